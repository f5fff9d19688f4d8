"""N-body data: the simulator, the files, preprocess_nbody.py and the batches cut from its cache."""

import math
import os
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import preprocess_nbody
from dataloader import nbody_simulator
from dataloader.cache import CacheError
from dataloader.nbody import NBodyDataset, baseline_errors, fully_connected_edges
from dataloader.nbody_files import describe_simulations, load_simulations, save_simulations
from dataloader.nbody_protocols import PROTOCOLS, cache_settings, eval_start_frames, position_std
from dataloader.nbody_simulator import simulate
from dataloader.qm9 import QM9Dataset
from experiments.nbody import NBodyNetwork, equivariance_error
from se3_transformer.model.basis import edge_frames
from se3_transformer.runtime.script import UserError

ROOT = Path(__file__).parent.parent
SIZES = {"train": 6, "val": 4, "test": 5}
SIZE_FLAGS = [f"--num_{split}={size}" for split, size in SIZES.items()]


# ---------------------------------------------------------------------------------------------------------- simulator


def slow_simulation(x, v, charges, box_size, steps=5000):
    """One simulation, particle by particle: lists x, v (3, n). Returns points, vel (F, 3, n) and clamp (F, n)."""
    n = len(charges)
    particles, coordinates = range(n), range(3)

    def accelerate():
        for i in particles:
            force = [0.0, 0.0, 0.0]
            for j in particles:
                if i != j:
                    r = [x[k][i] - x[k][j] for k in coordinates]
                    square = r[0] * r[0] + r[1] * r[1] + r[2] * r[2]
                    size = charges[i] * charges[j] / (square * math.sqrt(square))
                    force = [force[k] + size * r[k] for k in coordinates]
            for k in coordinates:
                v[k][i] += 0.001 * min(max(force[k], -100.0), 100.0)

    frames, hit = [], [0.0] * n
    accelerate()
    for step in range(1, steps):
        for k in coordinates:
            for i in particles:
                x[k][i] += 0.001 * v[k][i]
                if box_size and x[k][i] > box_size:
                    x[k][i], v[k][i], hit[i] = 2 * box_size - x[k][i], -abs(v[k][i]), 1.0
                if box_size and x[k][i] < -box_size:
                    x[k][i], v[k][i], hit[i] = -2 * box_size - x[k][i], abs(v[k][i]), 1.0
        if step % 100 == 0:
            frames.append((np.array(x), np.array(v), np.array(hit)))
            hit = [0.0] * n
        accelerate()
    return tuple(np.stack(arrays) for arrays in zip(*frames))


@pytest.mark.parametrize(("n", "box_size"), [(5, 0.0), (5, 1.3), (3, 0.5)])
def test_simulator_equals_the_slow_one_bit_by_bit(n, box_size):
    data = simulate(2, n, box_size, seed=5)
    points, velocities, charges = nbody_simulator._initial_state(2, n, 5)
    for s in range(2):
        slow = slow_simulation(points[s].tolist(), velocities[s].tolist(), charges[s].tolist(), box_size)
        for key, expected in zip(("points", "vel", "clamp"), slow):
            np.testing.assert_array_equal(data[key][s], expected, err_msg=f"{key} of simulation {s}")
    assert data["clamp"].any() == (box_size > 0)


def test_close_encounters_clip_the_force():
    """Two opposite charges at distance 0.02: the force 2,500 counts as 100 per component."""
    x, v = np.zeros((1, 3, 2)), np.zeros((1, 3, 2))
    x[0, 0] = [-0.01, 0.01]
    forces = nbody_simulator._Forces(np.array([[1.0], [-1.0]]))(x.transpose(1, 2, 0))
    np.testing.assert_array_equal(forces[:, :, 0], [[100, -100], [0, 0], [0, 0]])
    points, _, _ = nbody_simulator._simulate_block(x, v, np.array([[1.0, -1.0]]), 0.0)
    assert np.isfinite(points).all()


def test_initial_state():
    points, velocities, charges = nbody_simulator._initial_state(4000, 5, 0)
    np.testing.assert_allclose(np.linalg.norm(velocities, axis=1), 0.5, rtol=1e-12)
    assert np.abs(velocities.mean((0, 2))).max() < 0.01, "directions are not uniform"
    np.testing.assert_allclose((velocities**2).mean((0, 2)), 0.25 / 3, rtol=0.03)
    np.testing.assert_allclose([points.mean(), points.std()], [0, 1], atol=0.02)
    assert set(np.unique(charges)) == {-1, 1} and abs(charges.mean()) < 0.03


@pytest.fixture(scope="module", params=["walls", "no walls"])
def many(request):
    """300 simulations, and the means over 1,000 of the authors': no change x, no change v, constant velocity x."""
    if request.param == "walls":
        return simulate(300, box_size=5.0, seed=1), (0.0651, 0.2512, 0.0242)
    return simulate(300, box_size=0.0, seed=1), (0.0662, 0.2296, 0.0225)


def test_statistics_are_those_of_the_authors(many):
    """v is heavy-tailed: the standard errors of these 300 simulations are about 3 %, 10 % and 13 %."""
    data, expected = many
    x, v = data["points"], data["vel"]
    errors = baseline_errors(x[:, :-5], v[:, :-5], x[:, 5:], v[:, 5:], 0.5)
    for came, authors, tolerance in zip(errors.values(), expected, (0.1, 0.3, 0.4)):
        assert came == pytest.approx(authors, rel=tolerance)


def test_layout(many):
    data, _ = many
    shapes = {key: np.shape(value) for key, value in data.items()}
    assert shapes == {
        "points": (300, 49, 3, 5),
        "vel": (300, 49, 3, 5),
        "charges": (300, 5, 1),
        "edges": (300, 5, 5),
        "clamp": (300, 49, 5),
        "E": (49,),
        "U": (49,),
        "K": (49,),
        "delta_T": (),
        "sample_freq": (),
    }
    assert all(value.dtype == np.float64 for value in data.values() if isinstance(value, np.ndarray))
    assert (data["delta_T"], data["sample_freq"]) == (0.001, 100)
    q = data["charges"]
    np.testing.assert_array_equal(data["edges"], q * q.transpose(0, 2, 1))
    assert set(np.unique(data["clamp"])) <= {0, 1}
    np.testing.assert_allclose(data["E"], data["U"] + data["K"], rtol=1e-12)
    x, v, s, f = data["points"], data["vel"], 7, 30
    pairs = [(i, j) for i in range(5) for j in range(i)]
    potential = sum(q[s, i, 0] * q[s, j, 0] / math.dist(x[s, f, :, i], x[s, f, :, j]) for i, j in pairs)
    kinetic, potentials = nbody_simulator.energies(x, v, q[:, :, 0])
    assert potentials[s, f] == pytest.approx(potential, rel=1e-12)
    assert kinetic[s, f] == pytest.approx(0.5 * (v[s, f] ** 2).sum(), rel=1e-12)
    np.testing.assert_allclose(data["U"], potentials.mean(0), rtol=1e-12)


def test_walls(many):
    data, (no_change_x, *_) = many
    inside = np.abs(data["points"]).max() <= 5
    assert inside == data["clamp"].any() == (no_change_x == 0.0651)


def test_simulations_depend_on_the_seed_only(monkeypatch):
    """Not on the number of cores, blocks, or simulations."""
    one_block = simulate(4, 3, 1.0, seed=[2, 1])
    monkeypatch.setattr(nbody_simulator, "BLOCK_SIZES", (1, 3))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    blocks = simulate(5, 3, 1.0, seed=[2, 1], progress="two processes")
    for key in ("points", "vel", "clamp", "charges"):
        np.testing.assert_array_equal(blocks[key][:4], one_block[key])
    assert not np.array_equal(simulate(1, 3, 1.0, seed=[2, 2])["points"][0], one_block["points"][0])


@pytest.mark.parametrize("arguments", [(0,), (1, 1), (1, 5, -1.0), (1, 5, math.nan), (1, 5, 0.0, 0, 0.0)])
def test_simulator_refuses(arguments):
    with pytest.raises(ValueError, match="expected num_simulations ≥ 1, n_balls ≥ 2, a finite box_size ≥ 0 and"):
        simulate(*arguments)


# -------------------------------------------------------------------------------------------------------------- files


def made_up(S=3, F=12, n=4):
    """Something of the right layout."""
    rng = np.random.default_rng(0)
    charges = rng.choice([-1.0, 1.0], (S, n, 1))
    return {"points": rng.standard_normal((S, F, 3, n)), "vel": rng.standard_normal((S, F, 3, n)), "charges": charges,
            "edges": charges * charges.swapaxes(1, 2), "clamp": np.zeros((S, F, n)), "E": np.zeros(F), "U": np.zeros(F),
            "K": np.zeros(F), "delta_T": 0.001, "sample_freq": 100}  # fmt: skip


def dump(path, data, protocol=5):
    path.write_bytes(pickle.dumps(data, protocol))
    return path


def assert_same_simulations(came, expected):
    assert came.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(came[key], value)


def test_files_come_back(tmp_path):
    data, how = made_up(), {"seed": [0, 1]}
    path = tmp_path / "new" / "file.pkl"
    save_simulations(path, data, how)
    assert_same_simulations(load_simulations(path), data)
    assert_same_simulations(pickle.loads(path.read_bytes()), data)
    assert describe_simulations(path)["simulated"] == how
    dump(path, made_up(S=4))
    with pytest.raises(ValueError, match=r"file\.pkl: expected the file that file\.pkl\.json describes, got another"):
        describe_simulations(path)
    (tmp_path / "new" / "file.pkl.json").write_text("{")
    with pytest.raises(ValueError, match=r"file\.pkl\.json: expected the note on how file\.pkl was simulated"):
        describe_simulations(path)


@pytest.mark.parametrize("numpy_core", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_files_of_any_numpy_and_protocol(tmp_path, protocol, numpy_core):
    data = made_up() | {"delta_T": np.float64(0.001), "args": {"seed": 42, "dim": [3]}, "git_commit": "b'abc'"}
    data["points"] = np.asfortranarray(data["points"])
    content = pickle.dumps(data, protocol)
    for frame in reversed([position for code, _, position in pickletools.genops(content) if code.name == "FRAME"]):
        content = content[:frame] + content[frame + 9 :]  # a frame states its length, which changes below
    for core in (b"numpy._core", b"numpy.core"):
        for module in (b".multiarray", b".numeric"):
            old, new = core + module, numpy_core + module
            content = content.replace(b"c" + old, b"c" + new)  # GLOBAL
            old, new = bytes([len(old)]) + old, bytes([len(new)]) + new
            content = content.replace(b"\x8c" + old, b"\x8c" + new)  # SHORT_BINUNICODE
    path = tmp_path / "file.pkl"
    path.write_bytes(content)
    assert_same_simulations(load_simulations(path), {key: data[key] for key in made_up()})


class Call:
    """Unpickling calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(("attack", "name"), [
    (lambda p: Call(os.system, f"touch {p}"), "posix.system"),
    (lambda p: Call(eval, f"open({str(p)!r}, 'w')"), "(__builtin__|builtins).eval"),
    (lambda p: Call(open, str(p), "w"), "(_?io|builtins).open"),
    (lambda p: Call(np.save, str(p), 1), "numpy.*save"),
    (lambda p: Call(getattr, np.ndarray, "tofile"), "(__builtin__|builtins).getattr"),
    (lambda p: made_up() | {"points": np.array([Call(os.system, f"touch {p}")], dtype=object)}, "posix.system"),
    (lambda p: made_up() | {"more": {"deep": [Call(os.system, f"touch {p}")]}}, "posix.system"),
    (lambda p: made_up() | {"more": Path("/")}, r"pathlib\.(_local\.)?PosixPath"),
    (lambda p: made_up() | {"more": torch.zeros(1)}, "torch._utils._rebuild_tensor_v2"),
])  # fmt: skip
def test_a_pickle_cannot_run_anything(tmp_path, attack, name, protocol):
    marker = tmp_path / "executed"
    path = dump(tmp_path / "file.pkl", attack(marker), protocol)
    with pytest.raises(ValueError, match=rf"file\.pkl: expected NumPy .*, refused to load {name}"):
        load_simulations(path)
    assert not marker.exists()


def test_old_pickles_may_encode_latin1_only(tmp_path):
    (tmp_path / "file.pkl").write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.")
    with pytest.raises(ValueError, match="expected the encoding latin1, got 'zlib'"):
        load_simulations(tmp_path / "file.pkl")


def with_entry(key, change):
    data = made_up()
    data[key] = change(data[key])
    return data


def with_nan(points):
    points[1, 2, 0, 3] = np.nan
    return points


@pytest.mark.parametrize(("data", "message"), [
    ([1, 2], r"expected a dict with the keys points, vel, .*, got list"),
    ({key: value for key, value in made_up().items() if key not in "vel K"}, "expected .*, got dict without vel, K"),
    (with_entry("points", lambda a: a.swapaxes(2, 3)), r"points: expected shape \(S, F, 3, n\), got \(3, 12, 4, 3\)"),
    (with_entry("vel", lambda a: a[:2]), r"vel: expected shape \(3, 12, 3, 4\), got \(2, 12, 3, 4\)"),
    (with_entry("charges", lambda a: a[..., 0]), r"charges: expected shape \(3, 4, 1\), got \(3, 4\)"),
    (with_entry("clamp", lambda a: a[:, 1:]), r"clamp: expected shape \(3, 12, 4\), got \(3, 11, 4\)"),
    (with_entry("E", lambda a: a[1:]), r"E: expected shape \(12\), got \(11,\)"),
    (with_entry("delta_T", lambda a: np.ones(2)), r"delta_T: expected shape \(\), got \(2,\)"),
    (with_entry("points", with_nan), r"points: expected finite numbers below 1e\+15, got nan at \(1, 2, 0, 3\)"),
    (with_entry("sample_freq", lambda a: math.inf), r"sample_freq: expected finite numbers below .*, got inf at \(\)"),
    (with_entry("vel", lambda a: a.astype(object)), r"vel: expected numbers, got O8"),
    (with_entry("vel", lambda a: a.tolist()), r"vel: expected numbers, got list"),
    (with_entry("delta_T", lambda a: "0.001"), r"delta_T: expected numbers, got str"),
    (with_entry("delta_T", lambda a: 0), r"expected delta_T and sample_freq above 0, got 0 and 100"),
    (with_entry("edges", lambda a: -a), r"edges: expected the products of the charges"),
    (made_up(n=1), r"points: expected at least 1 simulation, 2 frames and 2 particles, got shape \(3, 12, 3, 1\)"),
])  # fmt: skip
def test_wrong_files_are_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=rf"file\.pkl: {message}"):
        load_simulations(dump(tmp_path / "file.pkl", data))


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps(made_up())[:2000], pickle.dumps(made_up())[:-1]])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "file.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.pkl: "):
        load_simulations(tmp_path / "file.pkl")


# --------------------------------------------------------------------------------------------- preprocessing, batches


def preprocess(directory, *flags):
    """Run preprocess_nbody.py in this process."""
    before = sys.argv
    sys.argv = ["preprocess_nbody.py", f"--data_dir={directory}", *SIZE_FLAGS, *flags]
    try:
        preprocess_nbody.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Both presets, the first one made as a user does."""
    directory = tmp_path_factory.mktemp("nbody") / "data"
    command = [sys.executable, ROOT / "preprocess_nbody.py", "--data_dir", directory, *SIZE_FLAGS]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Writing the cache" in process.stdout and "simulating" in process.stderr
    preprocess(directory, "--preset=paper")
    preprocess(directory, "--preset=egnn")
    return directory


@pytest.fixture(params=PROTOCOLS)
def preset(request):
    return request.param


NAMES = {"readme": "nbody", "paper": "nbody_paper", "egnn": "nbody_egnn"}


def open_split(data_dir, preset, split):
    dataset = NBodyDataset(data_dir / "cache" / NAMES[preset], split, cache_settings(preset))
    return dataset, load_simulations(data_dir / f"{NAMES[preset]}_{split}.pkl")


def rows(dataset, preset):
    """Every (simulation, start frame) of a split, and the arguments of `batch` for them."""
    if dataset.split == "train":
        start_frames = torch.arange(49 - dataset.delta_frames)
        simulations, frames = torch.cartesian_prod(torch.arange(len(dataset)), start_frames).T
        order = torch.randperm(len(frames))
        return simulations[order], frames[order], (simulations[order], frames[order])
    simulations = torch.randperm(len(dataset))
    spread = [math.floor(44 / len(dataset) * i) for i in simulations.tolist()]
    frames = {"readme": spread, "paper": [0] * len(dataset), "egnn": [30] * len(dataset)}[preset]
    return simulations, torch.tensor(frames), (simulations,)


@pytest.mark.parametrize("num_targets", [1, 5])
@pytest.mark.parametrize("split", SIZES)
def test_batches_hold_the_simulations(data_dir, preset, split, num_targets):
    """Every graph that can be drawn, against the file, simulation by simulation."""
    dataset, data = open_split(data_dir, preset, split)
    simulations, frames, arguments = rows(dataset, preset)
    batch = dataset.batch(*arguments, num_targets=num_targets)
    delta = {"readme": 5, "paper": 10, "egnn": 10}[preset]
    targets = delta // num_targets * np.arange(1, num_targets + 1)
    assert (len(dataset), batch.num_graphs, batch.num_particles) == (SIZES[split], len(frames), 5)
    assert dataset.interval == pytest.approx(delta * 0.1)
    points, velocities = (data[key].astype(np.float32).swapaxes(2, 3) for key in ("points", "vel"))
    expected = {"positions": [], "velocities": [], "charges": [], "displacement": [], "velocity_change": []}
    for s, t in zip(simulations.tolist(), frames.tolist()):
        expected["positions"].append(points[s, t])
        expected["velocities"].append(velocities[s, t])
        expected["charges"].append(data["charges"][s])
        expected["displacement"].append(points[s, t + targets] - points[s, t])
        expected["velocity_change"].append(velocities[s, t + targets] - velocities[s, t])
    for name, values in expected.items():
        came = getattr(batch, name)
        assert came.dtype == torch.float32
        np.testing.assert_array_equal(came.numpy(), np.concatenate(values, axis=came.ndim - 2), err_msg=name)


@pytest.mark.parametrize("split", SIZES)
def test_cached_frames_are_those_of_the_start_positions(data_dir, preset, split):
    """The trap: frames of one start frame used with another still train."""
    dataset, _ = open_split(data_dir, preset, split)
    batch = dataset.batch(*rows(dataset, preset)[2])
    rel_pos = batch.positions[batch.dst] - batch.positions[batch.src]
    assert (rel_pos.norm(dim=1) > 0).all(), "edges without length"
    assert torch.equal(batch.rotations, edge_frames(rel_pos)), "not what is computed on the fly"
    torch.testing.assert_close(batch.rotations[:, :, 1], torch.nn.functional.normalize(rel_pos, dim=1))
    for alone in range(0, batch.num_graphs, 7):
        edges = slice(alone * 20, alone * 20 + 20)
        assert torch.equal(batch.rotations[edges], edge_frames(rel_pos[edges])), "depends on the size of the batch"


@pytest.mark.parametrize("n", [2, 3, 5])
def test_fully_connected_edges(n):
    src, dst = fully_connected_edges(n)
    assert list(zip(dst.tolist(), src.tolist())) == [(i, j) for i in range(n) for j in range(n) if i != j]


def test_edges_of_a_batch_stay_in_their_graph(data_dir):
    dataset, _ = open_split(data_dir, "readme", "val")
    batch = dataset.batch(torch.tensor([3, 0, 3]))
    src, dst = fully_connected_edges(5)
    assert torch.equal(batch.src, torch.cat([src, src + 5, src + 10]))
    assert torch.equal(batch.dst, torch.cat([dst, dst + 5, dst + 10]))
    assert dataset.batch(torch.tensor([], dtype=torch.int64)).positions.shape == (0, 3)


def test_start_frames_of_evaluation():
    assert eval_start_frames("first", 3, 44).tolist() == [0, 0, 0]
    spread = eval_start_frames("spread", 1000, 44)
    assert spread.tolist() == [int(44 / 1000 * i) for i in range(1000)]
    assert eval_start_frames(30, 3, 39).tolist() == [30, 30, 30]
    with pytest.raises(ValueError, match="expected the rule first, spread or a frame, got 'last'"):
        eval_start_frames("last", 3, 44)
    with pytest.raises(ValueError, match="points: expected room for the target after frame 30, got 30 frames"):
        eval_start_frames(30, 3, 30)


def test_density_of_the_egnn_protocol(tmp_path):
    """Seven particles start in a volume 7/5 times that of five; five start as in the other protocols."""
    assert [position_std(preset, 7) for preset in ("readme", "paper")] == [1, 1] and position_std("egnn", 5) == 1
    std = position_std("egnn", 7)
    assert std == (7 / 5) ** (1 / 3)
    preprocess(tmp_path, "--preset=egnn", "--n_balls=7", "--num_train=1", "--num_val=1", "--num_test=1")
    assert describe_simulations(tmp_path / "nbody_egnn_test.pkl")["simulated"]["position_std"] == std
    points = load_simulations(tmp_path / "nbody_egnn_test.pkl")["points"]
    start, velocities, charges = nbody_simulator._initial_state(1, 7, [0, 2])
    np.testing.assert_array_equal(points, nbody_simulator._simulate_block(std * start, velocities, charges, 0.0)[0])


@pytest.mark.parametrize("preset", PROTOCOLS)
def test_twenty_particles(tmp_path, preset):
    own_files(tmp_path, n=20, F=49)
    preprocess(tmp_path, "--name=own", f"--preset={preset}")
    batch = NBodyDataset(tmp_path / "cache" / "own", "test", cache_settings(preset)).batch(torch.tensor([3, 1]))
    assert batch.rotations.shape == (2 * 20 * 19, 3, 3) and batch.num_particles == 20
    network = NBodyNetwork(1.0, 5.0, 1, 1, 2, 4, 1, 2, 16)
    assert equivariance_error(network, batch) < 1e-4


@pytest.mark.parametrize(("split", "simulations", "frames", "error", "message"), [
    ("train", [0, 6], [0, 0], IndexError, "simulations: expected 0 … 5, which the cache holds, got 0 … 6"),
    ("train", [-1], [0], IndexError, "simulations: expected 0 … 5"),
    ("train", [0], [44], IndexError, "start_frames: expected 0 … 43, which the cache holds, got 44 … 44"),
    ("train", [0], [-1], IndexError, "start_frames: expected 0 … 43"),
    ("train", [0, 1], [3], ValueError, r"simulations \(B,\) and start_frames \(B,\), got \(2,\) and \(1,\)"),
    ("train", [[0]], [[3]], ValueError, r"expected simulations \(B,\)"),
    ("train", [0], None, ValueError, "start_frames: expected for the split train and no other, got None for train"),
    ("val", [0], [0], ValueError, "start_frames: expected for the split train and no other"),
    ("test", [5], None, IndexError, "simulations: expected 0 … 4"),
])  # fmt: skip
def test_graphs_that_are_not_cached_are_refused(data_dir, split, simulations, frames, error, message):
    dataset, _ = open_split(data_dir, "readme", split)
    with pytest.raises(error, match=message):
        dataset.batch(torch.tensor(simulations), None if frames is None else torch.tensor(frames))


@pytest.mark.parametrize("num_targets", [0, 2])
def test_targets_that_do_not_fall_on_frames(data_dir, num_targets):
    dataset, _ = open_split(data_dir, "readme", "test")
    with pytest.raises(ValueError, match=f"a number of targets that divides 5 frames, got {num_targets}"):
        dataset.batch(torch.tensor([0]), num_targets=num_targets)


def test_batches_move(data_dir):
    dataset, _ = open_split(data_dir, "readme", "test")
    batch = dataset.batch(torch.arange(2)).to("meta")
    there = NBodyDataset(data_dir / "cache" / "nbody", "test", device="meta").batch(torch.arange(2))
    for moved in (batch, there):
        tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == 8 and all(tensor.is_meta for tensor in tensors) and moved.num_graphs == 2


def test_wrong_caches_are_refused(data_dir, tmp_path):
    cache = data_dir / "cache" / "nbody"
    with pytest.raises(CacheError, match="expected delta_frames = 10, got 5.*python preprocess_nbody.py --mine"):
        NBodyDataset(cache, "train", cache_settings("paper"), rebuild="python preprocess_nbody.py --mine")
    with pytest.raises(CacheError, match="got no such file. Make the cache with: python preprocess_nbody.py"):
        NBodyDataset(tmp_path, "train")
    with pytest.raises(KeyError, match="expected one of the splits train, val, test, got 'validation'"):
        NBodyDataset(cache, "validation")
    with pytest.raises(UserError, match="is a cache of other data: expected one with the setting graph"):
        QM9Dataset.open(cache)


def test_baselines(data_dir, preset):
    dataset, _ = open_split(data_dir, preset, "train")
    batch = dataset.batch(*rows(dataset, preset)[2])
    errors = {
        "no_change_x": batch.displacement,
        "no_change_v": batch.velocity_change,
        "constant_velocity_x": batch.displacement - dataset.interval * batch.velocities,
    }
    assert dataset.baselines == pytest.approx({key: error.square().mean().item() for key, error in errors.items()})


def contents(directory):
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def test_a_second_run_changes_nothing(data_dir, capsys):
    before = contents(data_dir)
    code = "import sys, preprocess_nbody; preprocess_nbody.main(); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "--data_dir", data_dir, *SIZE_FLAGS]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 0, "torch is imported for nothing, or an error: " + process.stderr
    assert "Nothing has changed" in process.stdout and process.stderr == ""
    os.utime(data_dir / "nbody_val.pkl")
    preprocess(data_dir)
    assert "Nothing has changed" in capsys.readouterr().out, "only the time of a file had changed"
    after = contents(data_dir)
    before.pop(data_dir / "nbody_val.pkl"), after.pop(data_dir / "nbody_val.pkl")
    assert before == after


def own_files(directory, name="own", **sizes):
    directory.mkdir(exist_ok=True)
    for i, split in enumerate(SIZES):
        dump(directory / f"{name}_{split}.pkl", made_up(S=2 + i, **sizes), protocol=3)


def test_own_files_are_taken(tmp_path, capsys):
    own_files(tmp_path)
    before = contents(tmp_path)
    preprocess(tmp_path, "--name=own")
    assert capsys.readouterr().out.count("not made by this program, taken as it is") == 3
    assert before.items() <= contents(tmp_path).items(), "a user's file was touched"
    dataset = NBodyDataset(tmp_path / "cache" / "own", "train", cache_settings("readme"))
    assert (len(dataset), dataset.num_start_frames, dataset.num_particles) == (2, 7, 4)
    np.testing.assert_array_equal(
        dataset.batch(torch.tensor([1]), torch.tensor([6])).positions, made_up(S=2)["points"][1, 6].T.astype(np.float32)
    )
    preprocess(tmp_path, "--name=own")
    assert "Nothing has changed" in capsys.readouterr().out

    dump(tmp_path / "own_train.pkl", made_up(S=6))
    with pytest.raises(CacheError, match=r"own_train\.pkl: expected the file that .* was made from, got a changed one"):
        NBodyDataset(tmp_path / "cache" / "own", "train")
    preprocess(tmp_path, "--name=own")
    assert "the present content of train" in capsys.readouterr().out
    assert len(NBodyDataset(tmp_path / "cache" / "own", "train")) == 6
    (tmp_path / "own_train.pkl").unlink()
    assert len(NBodyDataset(tmp_path / "cache" / "own", "train")) == 6, "the cache needs the file it was made from"


def test_own_files_must_fit(tmp_path):
    own_files(tmp_path)
    dump(tmp_path / "own_test.pkl", made_up(n=3))
    with pytest.raises(ValueError, match=r"own_test\.pkl: expected num_particles 4 as in the file for training, got 3"):
        preprocess(tmp_path, "--name=own")
    own_files(tmp_path, F=5)
    with pytest.raises(ValueError, match=r"own_train\.pkl: points: expected more than delta_frames = 5 frames, got 5"):
        preprocess(tmp_path, "--name=own")
    assert not (tmp_path / "cache" / "own").exists()


def test_our_files_are_not_overwritten(data_dir):
    before = contents(data_dir)
    with pytest.raises(
        ValueError,
        match=r"nbody_train\.pkl was simulated with seed \[0, 0\], asked for is seed "
        r"\[1, 0\]\. Give the new simulations another --name, or delete this file",
    ):
        preprocess(data_dir, "--seed=1")
    with pytest.raises(ValueError, match=r"nbody_val\.pkl was simulated with num_simulations 4, .* num_simulations 9"):
        preprocess(data_dir, "--num_val=9")
    assert contents(data_dir) == before


def test_only_what_is_missing_is_simulated(data_dir, capsys):
    before = contents(data_dir)
    content = (data_dir / "nbody_test.pkl").read_bytes()
    (data_dir / "nbody_test.pkl").unlink()
    preprocess(data_dir)
    output = capsys.readouterr()
    assert "Nothing has changed" in output.out
    assert "nbody_test.pkl" in output.err and "nbody_train.pkl" not in output.err
    assert (data_dir / "nbody_test.pkl").read_bytes() == content, "the same seed gives another file"
    changed = {path.name for path, state in contents(data_dir).items() if before[path] != state}
    assert changed == {"nbody_test.pkl", "nbody_test.pkl.json"}


@pytest.mark.parametrize(("flags", "message"), [
    (["--num_trian", "5"], "unknown argument --num_trian; did you mean --num_train?"),
    (["--num", "5"], "unknown argument --num"),
    (["--num_train", "0"], "num_train must be at least 1, got 0"),
    (["--n_balls", "1"], "n_balls must be at least 2, got 1"),
    (["--box_size", "nan"], "box_size must be at least 0, got nan"),
    (["--preset", "new"], "invalid choice: 'new'"),
    (["--name", "a/b"], "name must be a name for files, without directories, got 'a/b'"),
])  # fmt: skip
def test_wrong_flags_are_refused(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        preprocess(tmp_path, *flags)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_errors_end_the_script_without_a_traceback(data_dir):
    command = [sys.executable, ROOT / "preprocess_nbody.py", "--data_dir", data_dir, *SIZE_FLAGS, "--seed=1"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ") and "was simulated with" in process.stderr
    assert "Traceback" not in process.stderr
