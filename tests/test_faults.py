"""What happens when things go wrong: damaged and malicious files, full disks, killed processes; see docs/faults.md.

    SE3_MUTATIONS=10000 python -m pytest tests/test_faults.py -k mutated         # of each format; 60 by default
    SE3_SOAK_MINUTES=120 python -m pytest tests/test_faults.py -k soak -s        # memory and open files of a training

Faults of a single part are tested with that part; what is here goes through several, or through all files alike.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from qm9_molecules import SMALL, many_molecules, save, small_molecules
from scripts import KILL_AT, PATIENCE, ROOT, run, start, wait_for_file
from test_cache import write as write_cache
from test_molecules import METHANE, small_mols, write_raw, write_sdf, write_xyz
from test_nbody_data import Call, made_up
from test_nbody_training import TINY
from test_predict_qm9 import write_checkpoint
from test_runtime import ToyTask, assert_same_state, lines, trainer

from dataloader.cache import CacheWriter, open_cache
from dataloader.molecules import read_raw_qm9, read_sdf, read_xyz
from dataloader.nbody import NBodyDataset
from dataloader.nbody_files import describe_simulations, load_simulations, save_simulations
from dataloader.qm9 import QM9Dataset, graph_arrays
from dataloader.qm9_layout import check_molecules, load_molecules
from experiments.nbody import load_network
from se3_transformer.runtime.checkpoint import CheckpointError, load_checkpoint, load_latest_checkpoint, save_checkpoint
from se3_transformer.runtime.files import write_file
from se3_transformer.runtime.log import RunLog
from se3_transformer.runtime.script import UserError
from se3_transformer.runtime.trainer import NonFiniteLoss

MUTATIONS = int(os.environ.get("SE3_MUTATIONS", "60"))
SOAK_SECONDS = 60 * float(os.environ.get("SE3_SOAK_MINUTES", "0"))
SIZES = ["--num_train", "32", "--num_val", "10", "--num_test", "10"]
CLEAR = (UserError, ValueError, OSError)  # what `run_script` shows as a message

# -------------------------------------------------------------------------------------------------- nothing is executed

SUSPICIOUS = ("os.", "subprocess.", "pickle.find_class", "socket.", "shutil.", "ctypes.")
HARMLESS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")
seen: list[str] = []  # suspicious audit events since the last look


def _hook(event, _):
    if event.startswith(SUSPICIOUS) and event not in HARMLESS:
        seen.append(event)


@pytest.fixture
def nothing_executed():
    """Whatever Python can be made to do by a file, it tells the hook: commands, files removed, names looked up by
    pickle.
    """
    if not hasattr(sys, "_se3_faults"):
        sys.addaudithook(_hook)
        sys._se3_faults = True
    seen.clear()
    yield
    assert not seen


# ----------------------------------------------------------------------------------------------------- random mutations


def mutated(rng: random.Random, content: bytes) -> bytes:
    """The content after one to three random changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 100))
        other = rng.randrange(len(data) + 1)
        chunk = data[other : other + size]
        kind = rng.choice(("flip", "flip", "set", "cut", "insert", "delete", "repeat", "swap"))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "set":
            data[at : at + size] = rng.randbytes(len(data[at : at + size]))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = rng.randbytes(size)
        elif kind == "delete":
            del data[at : at + size]
        elif kind == "repeat":
            data[at:at] = chunk
        elif kind == "swap" and abs(at - other) >= size:
            data[other : other + size], data[at : at + size] = data[at : at + size], chunk
    return bytes(data)


def plain(value):
    """What can be compared with ==, arrays by their bytes."""
    if isinstance(value, np.ndarray | np.generic):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def usable(molecules):
    """Foreign files have no checksum: what is read from them must be molecules, whichever."""
    check_molecules(molecules, "what was read")
    assert np.isfinite(graph_arrays(molecules)["rotations"]).all()


STATE = {
    "model": {"weight": torch.arange(12.0).view(3, 4), "bias": torch.zeros(3, dtype=torch.float64)},
    "random": torch.arange(7, dtype=torch.uint8),
    "history": [{"epoch": 1, "loss": 0.5}],
    "settings": {"name": "x", "rate": 1e-3, "flag": True, "none": None},
}


def rezipped(path: Path, read):
    """Read a file that holds the pickle of a checkpoint, put it back into the checkpoint, checksums right."""
    whole = io.BytesIO()
    torch.save(STATE, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path.with_suffix(".pt"), "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, path.read_bytes() if name.endswith("data.pkl") else content)
    return plain(read(path.with_suffix(".pt")))


def pickle_of_a_checkpoint(path: Path) -> Path:
    whole = io.BytesIO()
    torch.save(STATE, whole)
    with zipfile.ZipFile(whole) as source:
        path.write_bytes(next(source.read(name) for name in source.namelist() if name.endswith("data.pkl")))
    return path


def simulations(directory, ours):
    path = directory / "file.pkl"
    save_simulations(path, made_up(), {"seed": [0, 1]})
    if not ours:
        (directory / "file.pkl.json").unlink()
    return [path], lambda: describe_simulations(path)["simulated"] and load_simulations(path) or load_simulations(path)


def note(directory):
    path = directory / "file.pkl"
    save_simulations(path, made_up(), {"seed": [0, 1]})
    return [directory / "file.pkl.json"], lambda: describe_simulations(path)


def cache(directory):
    write_cache(directory / "cache")
    files = sorted((directory / "cache").iterdir())
    return [*files, directory / "cache/manifest.json"], lambda: vars(open_cache(directory / "cache", "", verify=True))


def npz(directory):
    path = directory / "file.npz"
    save(path, small_molecules())
    return [path], lambda: asdict(load_molecules(path))


def checkpoint(directory):
    path = directory / "file.pt"
    save_checkpoint(path, STATE)
    return [path], lambda: load_checkpoint(path)


def crafted_checkpoint(directory):
    path = pickle_of_a_checkpoint(directory / "data.pkl")
    return [path], lambda: rezipped(path, load_checkpoint)


def sdf(directory):
    mols = small_mols()
    mols[0].SetProp("homo", "-10.5")
    path = write_sdf(directory / "file.sdf", mols)
    return [path], lambda: usable(read_sdf(path, "homo").molecules)


def xyz(directory):
    path = write_xyz(directory / "file.xyz", small_mols())
    return [path], lambda: usable(read_xyz(path).molecules)


def raw(directory):
    write_raw(directory, small_mols(), [METHANE] * len(SMALL), left_out=[2, 7])
    return sorted(directory.iterdir()), lambda: usable(read_raw_qm9(directory))


FORMATS = {  # what makes a file and its reader, and whether a checksum must tell that the content has changed
    "N-body pickle": (lambda directory: simulations(directory, ours=True), True),
    "N-body pickle of others": (lambda directory: simulations(directory, ours=False), False),
    "note on simulations": (note, False),
    "cache": (cache, True),
    "QM9 npz": (npz, True),
    "checkpoint": (checkpoint, True),
    "checkpoint with right checksums": (crafted_checkpoint, False),
    "SDF": (sdf, False),
    "XYZ": (xyz, False),
    "raw QM9": (raw, False),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_give_a_clear_error_or_the_same_content(tmp_path, name, nothing_executed):
    make, has_checksum = FORMATS[name]
    files, read = make(tmp_path)
    seen.clear()
    expected, before = plain(read()), {path: path.read_bytes() for path in files}
    rng, refused = random.Random(name + os.environ.get("SE3_MUTATIONS", "")), 0
    for number in range(MUTATIONS):
        path = rng.choice(files)
        path.write_bytes(mutated(rng, before[path]))  # where this test fails, the file stays
        try:
            came = read()
        except CLEAR as error:
            assert str(tmp_path) in str(error), f"mutation {number} of {path}: {error!r} names no file"
            refused += 1
        except BaseException as error:
            raise AssertionError(f"mutation {number} of {path}: {error!r}") from error
        else:
            assert not has_checksum or plain(came) == expected, f"mutation {number} of {path} is not noticed"
        path.write_bytes(before[path])
    assert plain(read()) == expected, "reading damaged files has changed something"
    assert refused >= (0.8 if has_checksum else 0.01) * MUTATIONS


# ------------------------------------------------------------------------------------------------------ malicious files


class BuildCall:
    """Unpickling calls a function and gives the result a state."""

    def __init__(self, function, arguments, state):
        self.parts = function, arguments, state

    def __reduce__(self):
        return self.parts


def nested(path):
    return pickle.dumps(Call(os.system, f"touch {path}"))


ATTACKS = {
    "os.system": lambda p: Call(os.system, f"touch {p}"),
    "eval": lambda p: Call(eval, f"open({str(p)!r}, 'w')"),
    "open": lambda p: Call(open, str(p), "w"),
    "import": lambda p: Call(__import__, "antigravity"),
    "Popen": lambda p: Call(subprocess.Popen, ["touch", str(p)]),
    "pickle in a pickle": lambda p: Call(pickle.loads, nested(p)),
    "numpy.load": lambda p: Call(np.load, io.BytesIO(nested(p)), None, True),
    "torch.load": lambda p: Call(torch.load, io.BytesIO(nested(p)), "cpu"),
    "object array": lambda p: np.array([Call(os.system, f"touch {p}")], dtype=object),
    "object scalar": lambda p: Call(np.float64(0).__reduce__()[0], np.dtype("O"), Call(os.system, f"touch {p}")),
    "array with the state of an object": lambda p: BuildCall(
        np.empty(1).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("O"), False, [Call(os.mkdir, str(p))])
    ),
    "state of a function": lambda p: BuildCall(getattr, (Path, "mkdir"), (None, {"__code__": 1})),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_malicious_files_are_refused(tmp_path, attack, nothing_executed):
    """As simulations, as checkpoints in all forms that torch reads, and as an array of molecules."""
    marker, payload = tmp_path / "executed", ATTACKS[attack](tmp_path / "executed")
    contents = {"pickle": pickle.dumps(made_up() | {"points": payload}), "bare": pickle.dumps(payload)}
    for name, zipped in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save(STATE | {"model": payload}, buffer, _use_new_zipfile_serialization=zipped)
        contents[name] = buffer.getvalue()
    molecules = io.BytesIO()
    np.savez(molecules, **asdict(small_molecules()) | {"n_node": np.array([payload], dtype=object)})
    path = tmp_path / "file"
    for name, content in contents.items():
        path.write_bytes(content)
        readers = (load_simulations, load_checkpoint) if name in ("pickle", "bare") else (load_checkpoint,)
        for reader in readers:
            seen.clear()
            with pytest.raises((ValueError, CheckpointError), match=str(path)):
                reader(path)
            assert not seen, (name, reader)
    path.write_bytes(molecules.getvalue())
    seen.clear()
    with pytest.raises(ValueError, match="n_node: expected an array of numbers, got a damaged one"):
        load_molecules(path)
    assert not marker.exists()


def test_types_in_a_pickle_are_not_believed(tmp_path):
    """A float64 that says its numbers are pointers to objects: NumPy would follow them."""
    data = made_up()
    lying = BuildCall(np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63))
    state = (1, data["vel"].shape, lying, False, data["vel"].tobytes())
    array = BuildCall(np.empty(1).__reduce__()[0], (np.ndarray, (0,), b"b"), state)
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(data | {"vel": array}))
    came = load_simulations(tmp_path / "file.pkl")["vel"]
    assert came.dtype == np.dtype("f8") and np.array_equal(came, data["vel"])


def test_a_pickle_cannot_change_what_reads_it(tmp_path):
    """The state of a function that is admitted."""
    (tmp_path / "file.pkl").write_bytes(b"\x80\x02c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.")
    with pytest.raises(
        ValueError, match=r"file\.pkl: expected NumPy arrays and plain values, got a <class 'function'>"
    ):
        load_simulations(tmp_path / "file.pkl")


def test_a_checkpoint_cannot_read_beyond_its_end(tmp_path):
    """A tensor that says it is larger than its bytes, with right checksums."""
    path = pickle_of_a_checkpoint(tmp_path / "data.pkl")
    content = path.read_bytes()
    assert content.count(b"K\x0ct") == 1 and content.count(b"K\x03K\x04\x86") == 1
    path.write_bytes(
        content.replace(b"K\x0ct", b"J\x00\x00\x10\x00t").replace(b"K\x03K\x04\x86", b"K\x01J\x00\x00\x10\x00\x86")
    )
    with pytest.raises(CheckpointError, match=r"data\.pt"):
        rezipped(path, load_checkpoint)


def test_a_state_of_another_version_is_refused(tmp_path):
    trainer(tmp_path, epochs=1).train()
    state = load_checkpoint(tmp_path / "last.pt")
    for change in ({"facts": {"duration": 1.0}}, {"random": None}):
        save_checkpoint(tmp_path / "last.pt", state | change)
        with pytest.raises(CheckpointError, match=r"last\.pt: a state that does not fit this run"):
            trainer(tmp_path, epochs=1)


def test_checkpoints_of_other_programs_are_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"model": {}, "network": {"layers": 3}})
    with pytest.raises(CheckpointError, match=r"a\.pt: expected a checkpoint of train_nbody\.py"):
        load_network(tmp_path / "a.pt")
    torch.save([1.0], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: expected a dict, got list"):
        load_checkpoint(tmp_path / "a.pt")


# ----------------------------------------------------------------------------------------------------------- full disks


@contextmanager
def file_size_limit(size: int):
    """Writing more than this into a file fails, at the byte where a disk would be full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def written_cache(path, value):
    with CacheWriter(path, {}, {}) as writer:
        writer.create("x", (100,), "float64")[:] = value


WRITERS = {  # what writes a number at a path, and what reads it
    "file": (lambda p, n: write_file(p, lambda f: f.write(bytes([n] * 900))), lambda p: p.read_bytes()[-1]),
    "checkpoint": (
        lambda p, n: save_checkpoint(p, {"n": torch.full((100,), n)}, keep_previous=True),
        lambda p: load_checkpoint(p)["n"][-1].item(),
    ),
    "simulations": (
        lambda p, n: save_simulations(p, made_up() | {"delta_T": n}, {"n": n}),
        lambda p: load_simulations(p)["delta_T"] + 0 * len(describe_simulations(p)),
    ),
    "cache": (written_cache, lambda p: open_cache(p, "", verify=True).arrays["x"][-1]),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_file(tmp_path, kind):
    write, read = WRITERS[kind]
    path = tmp_path / "there"
    write(path, 1)
    names = {file.name for file in tmp_path.iterdir()}
    failed = 0
    for limit in (0, 1, 100, 500, 800, 899, 2000, 5000):
        with file_size_limit(limit):
            try:
                write(path, 2)
            except OSError as error:
                failed += 1
                assert error.errno == errno.EFBIG and str(tmp_path) in str(error)
                assert read(path) == 1
                assert {file.name for file in tmp_path.iterdir()} == names, "leftovers"
    assert failed >= 5
    write(path, 3)
    assert read(path) == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_training_on_a_full_disk_goes_on_with_the_same_bits(tmp_path):
    """There is no room, one after the other, for the log, for the first state, and for all of the log."""

    def run():
        trainer(tmp_path / "full", log_every=1, save_every=4, epochs=12).train()

    trainer(tmp_path / "straight", log_every=1, save_every=4, epochs=12).train()
    state, log = (tmp_path / "straight" / name for name in ("last.pt", "log/log.jsonl"))
    stopped = []
    for limit in (300, 2000, log.stat().st_size - 500):
        with file_size_limit(limit), pytest.raises(OSError, match=rf"File too large: '{tmp_path}/full/") as error:
            run()
        stopped.append(Path(error.value.filename).name)
    assert stopped[0] in ("log.jsonl", "log") and stopped[1] == "last.pt"  # "log": TensorBoard's thread came first
    run()
    assert_same_state(load_checkpoint(state), load_checkpoint(tmp_path / "full/last.pt"))
    a, b = ([line["step"] for line in lines(tmp_path / name)] for name in ("straight", "full"))
    assert a == b


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_and_tensorboard(tmp_path):
    """It writes when it likes to, at the latest in the end."""
    others = set(threading.enumerate())
    log = RunLog(tmp_path, 0, 0)
    with file_size_limit(1000), pytest.raises(OSError, match=rf"File too large: '{tmp_path}'"):
        log.figure("figure", Figure(), 1)
        log.close()
    for thread in set(threading.enumerate()) - others:  # that of TensorBoard ends with a traceback of its own
        thread.join()


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 300 kB."""
    (tmp_path / "disk").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path / "disk")]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"mounting a small disk is not allowed here: {done.stderr.decode().strip()}")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_disk_that_is_really_full(small_disk):
    """Arrays are mapped: without space set aside, writing to one would end the process by a signal."""
    space = os.statvfs(small_disk)
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*x\.npy'"),
        CacheWriter(small_disk / "c", {}, {}) as w,
    ):
        w.create("x", (space.f_bavail * space.f_frsize,), "int8")
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.pt'"):
        save_checkpoint(small_disk / "a.pt", {"x": torch.zeros(100_000)})
    assert [path.name for path in small_disk.iterdir() if path.suffix != ".lock"] == []
    written_cache(small_disk / "c", 1)


# ---------------------------------------------------------------------------------------------------------- directories


PREDICT = ["predict_qm9.py", "--checkpoint", "best.pt", "--molecules", "small.sdf", "--device", "cpu", "--threads", "1"]
TRAIN = ["train_nbody.py", *TINY, "--epochs", "1", "--run_name", "denied"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A directory with a cache of simulations and a checkpoint that has predicted."""
    directory = tmp_path_factory.mktemp("faults")
    done = run("preprocess_nbody.py", *SIZES, cwd=directory)
    assert done.returncode == 0, done.stderr
    write_checkpoint(directory / "best.pt")
    write_sdf(directory / "small.sdf", small_mols())
    done = run(*PREDICT, cwd=directory)  # here, so that what is compiled once is compiled by one who may
    assert done.returncode == 0, done.stderr
    return directory


COMMANDS = {  # command, and the directory that it cannot write
    "simulate": (["preprocess_nbody.py", *SIZES, "--data_dir", "there"], "there"),
    "preprocess": (["preprocess_qm9.py", "--source", "small.npz", "--data_dir", "there"], "there"),
    "train": (TRAIN, "runs"),
    "predict": ([*PREDICT, "--output", "there/predictions.csv"], "there"),
}


@pytest.fixture
def place(work):
    """A copy of it that everybody may write, where everybody finds it."""
    with tempfile.TemporaryDirectory() as directory:
        copy = shutil.copytree(work, Path(directory) / "work", ignore=shutil.ignore_patterns("*.lock", "runs"))
        save(copy / "small.npz", many_molecules(10))
        for path in (copy.parent, copy, *copy.rglob("*")):
            path.chmod(0o777)
        yield copy


@contextmanager
def not_root():
    """Root may write everywhere."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("command", COMMANDS)
def test_directories_that_cannot_be_written(place, command):
    flags, name = COMMANDS[command]
    (place / name).mkdir(mode=0o555)
    with not_root():
        run(*flags, cwd=place).assert_refused("error: ", "Permission denied: '", name)
    assert list((place / name).iterdir()) == []


@pytest.mark.parametrize("command", ["simulate", "preprocess", "train"])
def test_a_file_in_the_place_of_a_directory(place, command):
    flags, name = COMMANDS[command]
    (place / name).write_text("text")
    run(*flags, cwd=place).assert_refused("error: ", name)
    assert (place / name).read_text() == "text"


# ----------------------------------------------------------------------------------------------------- killed processes

RUN_A_SCRIPT = """
import importlib, runpy, sys
module, name, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv = sys.argv[4:]
kill_at(importlib.import_module(module), name, calls)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed_at(module: str, name: str, calls: int, script: str, *flags: str, cwd: Path):
    process = start("-c", KILL_AT + RUN_A_SCRIPT, module, name, str(calls), str(ROOT / script), *flags, cwd=cwd)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL, stderr


def test_preprocessing_killed_in_every_phase(work, tmp_path):
    """In the simulation, before a file gets its name, and in the cache; then the same command does the rest."""
    for moment in (
        ("dataloader.nbody_simulator", "_simulate_block", 2),
        ("os", "fsync", 2),
        ("dataloader.nbody", "add_split", 2),
    ):
        killed_at(*moment, "preprocess_nbody.py", *SIZES, cwd=tmp_path)
        with pytest.raises(UserError, match="got no such file"):
            NBodyDataset(tmp_path / "data/cache/nbody", "train")
    done = run("preprocess_nbody.py", *SIZES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = {path.relative_to(work) for path in (work / "data").rglob("*") if "runs" not in path.parts}
    assert {path.relative_to(tmp_path) for path in (tmp_path / "data").rglob("*")} == files
    for path in files:
        if path.suffix in (".pkl", ".npy"):
            assert (tmp_path / path).read_bytes() == (work / path).read_bytes(), path


def test_prediction_killed_before_its_table_has_its_name(work):
    (work / "predictions.csv").write_text("old")
    killed_at("os", "fsync", 1, *PREDICT, cwd=work)
    assert (work / "predictions.csv").read_text() == "old"
    done = run(*PREDICT, cwd=work)
    assert done.returncode == 0, done.stderr
    assert (work / "predictions.csv").read_text().count("\n") == 9 and not list(work.glob(".pred*"))


def test_two_processes_preprocessing_at_once(tmp_path):
    """One does it, the other one says so and ends."""
    processes = [start(str(ROOT / "preprocess_nbody.py"), *SIZES, cwd=tmp_path) for _ in range(2)]
    results = [(process.communicate(timeout=PATIENCE), process.returncode) for process in processes]
    assert sorted(code for _, code in results) == [0, 1], results
    stderr = next(stderr for (_, stderr), code in results if code)
    assert stderr == "error: data/nbody: another process is writing it; wait until it has ended\n"
    open_cache(tmp_path / "data/cache/nbody", "", verify=True)


# -------------------------------------------------------------------------------------------------- clock, NaN, damage


def test_a_clock_that_goes_backwards(tmp_path, monkeypatch):
    """Time limits, durations and the log do not look at it."""
    trainer(tmp_path / "straight", log_every=1).train()
    now = [2e9]

    def backwards():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    run = trainer(tmp_path / "back", log_every=1)
    run.deadline = time.monotonic() + PATIENCE
    run.train()
    assert now[0] < 2e9 - 3600 and all(0 < facts["seconds"] < PATIENCE for facts in run.history)
    assert_same_state(load_checkpoint(tmp_path / "straight/last.pt"), load_checkpoint(tmp_path / "back/last.pt"))
    assert [line["step"] for line in lines(tmp_path / "back")] == [
        line["step"] for line in lines(tmp_path / "straight")
    ]


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path):
    """The loss is finite; in float32 there is no scaler that would skip the step."""

    class Kink(ToyTask):
        def loss(self, model, batch):
            loss, scalars = super().loss(model, batch)
            self.steps += 1
            bad = (model[0].weight - model[0].weight.detach()).abs().sqrt().sum() if self.steps == 9 else 0
            return loss + bad, scalars

    with pytest.raises(NonFiniteLoss, match=r"loss \d.*gradient_norm nan in epoch 2, batch 2, step 8"):
        trainer(tmp_path, Kink()).train()
    state = load_checkpoint(tmp_path / "last.pt")
    assert (state["epoch"], state["step_in_epoch"]) == (1, 2)
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_damaged_cache_stops_training(work):
    """A bit of an array, which only its checksum tells."""
    path = work / "data/cache/nbody/train_velocities.npy"
    content = path.read_bytes()
    path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    try:
        run(*TRAIN, cwd=work).assert_refused(
            "train_velocities.npy: expected the checksum", "python preprocess_nbody.py"
        )
    finally:
        path.write_bytes(content)


def test_a_damaged_cache_of_molecules_is_not_opened(tmp_path):
    save(tmp_path / "own.npz", many_molecules(10))
    assert run("preprocess_qm9.py", "--source", "own.npz", cwd=tmp_path).returncode == 0
    path = tmp_path / "data/cache/qm9/positions.npy"
    content = path.read_bytes()
    path.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
    with pytest.raises(UserError, match=r"positions\.npy: expected the checksum"):
        QM9Dataset.open(tmp_path / "data/cache/qm9")


# ---------------------------------------------------------------------------------------------------- several processes


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="no list of children")
def test_the_death_of_one_process_ends_all(work):
    """A real torchrun; the second of two ranks is killed in the midst of training."""
    last = work / "data/ranks_last.pt"
    flags = [*TINY, "--epochs", "100000", "--save_every", "1", "--run_name", "ranks", "--device", "cpu"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train_nbody.py")]
    process = start(*launcher, *flags, cwd=work)
    wait_for_file(last, process)
    ranks = children(process.pid)
    environments = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in ranks]
    os.kill(next(pid for pid, env in zip(ranks, environments) if b"RANK=1" in env), signal.SIGKILL)
    for _ in range(600):  # a minute, in which a machine that stands still for a while does not count
        if process.poll() is not None:
            break
        time.sleep(0.1)
    _, stderr = process.communicate(timeout=0.1)
    assert process.returncode != 0 and "SIGKILL" in stderr.replace("Signal 9", "SIGKILL"), stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert load_latest_checkpoint(last) is not None


# ----------------------------------------------------------------------------------------------------------------- soak


@pytest.mark.skipif(not SOAK_SECONDS, reason="takes as many minutes as SE3_SOAK_MINUTES says")
def test_soak(work):
    """Training with checkpoints, validation and TensorBoard: memory and open files stay as they are."""
    flags = [*TINY, "--epochs", "1000000", "--save_every", "3", "--log_every", "1", "--validate_every", "1"]
    process = start(str(ROOT / "train_nbody.py"), *flags, "--run_name", "soak", "--device", "cpu", cwd=work)
    status, files = (Path(f"/proc/{process.pid}") / name for name in ("status", "fd"))
    if not status.exists():
        process.kill()
        pytest.skip("there is no /proc")
    last, samples = work / "data/soak_last.pt", []
    wait_for_file(last, process)
    began = time.monotonic()
    while (seconds := time.monotonic() - began) < SOAK_SECONDS:
        time.sleep(SOAK_SECONDS / 100)
        resident = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        samples.append((seconds, resident / 1024, len(list(files.iterdir()))))
        if len(samples) % 10 == 0:
            print("{:8.0f} s {:8.1f} MiB {:3} files".format(*samples[-1]), flush=True)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert "the same command goes on" in stderr
    print(f"{load_checkpoint(last)['epoch']} epochs")
    half = len(samples) // 2
    memory, opened = ([max(row[i] for row in part) for part in (samples[:half], samples[half:])] for i in (1, 2))
    assert memory[1] < memory[0] * 1.03 and opened[1] <= opened[0] + 1
