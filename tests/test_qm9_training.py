"""QM9 training from the command line, on a hundred small molecules: results, resume, several processes, faults."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from qm9_molecules import many_molecules, save
from scripts import PATIENCE, ROOT, Done, run, start, time_of, wait_for_file

from dataloader.qm9 import TARGETS, QM9Dataset, graph_arrays, split_molecules
from experiments.qm9 import QM9Task, build_network, fit_reference, load_network, predict, run_network
from se3_transformer.model.graph import Graph
from se3_transformer.runtime.checkpoint import load_checkpoint, previous_path, save_checkpoint

TINY = ["--num_layers", "1", "--num_degrees", "2", "--num_channels", "4", "--num_heads", "1", "--batch_size", "16"]
TINY += ["--warmup_steps", "2", "--threads", "1", "--device", "cpu", "--learning_rate", "0.01", "--ema_decay", "0.9"]
TASK = dict(batch_size=16, seed=0, balanced=False, num_train=0, num_val=0, reference="none", augment="none")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A directory with a cache of a hundred molecules."""
    directory = tmp_path_factory.mktemp("qm9")
    save(directory / "small.npz", many_molecules(100))
    done = run("preprocess_qm9.py", "--source", "small.npz", cwd=directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def trained(prepared) -> Done:
    done = run("train_qm9.py", *TINY, "--epochs", "12", "--run_name", "whole", "--log_every", "1", cwd=prepared)
    assert done.returncode == 0, done.stderr
    return done


def results(directory, name):
    return json.loads((directory / f"data/{name}_result.json").read_text())


def losses(directory, name):
    """Loss of every step of a run with `--log_every 1`."""
    records = map(json.loads, (directory / f"runs/{name}/log.jsonl").read_text().splitlines())
    return [record["train/loss"] for record in records if "train/loss" in record]


def test_it_learns_and_reports(prepared, trained):
    result = results(prepared, "whole")
    assert result["mae"] < 0.5 * result["baseline_mae"]
    assert f"{result['mae']:.5g}" in trained.stdout and "meV" in trained.stdout
    assert result["molecules"] == {"train": 76, "validation": 14, "test": 10}
    assert (prepared / "data/whole_parity.png").stat().st_size > 5_000
    assert list((prepared / "runs/whole").glob("events*"))
    records = [json.loads(line) for line in (prepared / "runs/whole/log.jsonl").read_text().splitlines()]
    validation = [record["validation/mae [meV]"] for record in records if "validation/mae [meV]" in record]
    printed = [line for line in trained.stdout.splitlines() if line.startswith("epoch ")]
    assert len(printed) == len(validation) == 12
    assert all(f"validation mae [meV] {mae:.4g} " in line for line, mae in zip(printed, validation, strict=True))
    assert printed[-1].startswith("epoch 12/12   loss ")
    assert records[-1]["test/mae [meV]"] == result["mae"]


def test_checkpoint_predicts_what_was_reported(prepared, trained):
    """The MAE by hand: statistics of the training molecules, one molecule at a time, eV to meV."""
    dataset = QM9Dataset.open(prepared / "data/cache/qm9")
    homo = dataset.targets[:, list(TARGETS).index("homo")]
    split = split_molecules(homo, 0)
    network, info = load_network(prepared / "data/whole_best.pt")
    assert info["mean"] == pytest.approx(homo[split["train"]].mean().item())
    assert info["std"] == pytest.approx(homo[split["train"]].std().item())
    errors = []
    for molecule in split["test"].tolist():
        batch = dataset.batch(torch.tensor([molecule]))
        with torch.no_grad():
            output = run_network(network, batch, max_degree=1).double()
        errors.append((info["mean"] + info["std"] * output - homo[molecule]).abs().item() * 1000)
    assert sum(errors) / len(errors) == pytest.approx(results(prepared, "whole")["mae"], rel=1e-4)


def test_predictions_keep_the_order_of_the_molecules(prepared, trained):
    dataset = QM9Dataset.open(prepared / "data/cache/qm9")
    network, info = load_network(prepared / "data/whole_best.pt")
    molecules = torch.randperm(100)[:30]
    together = predict(network, info, dataset, molecules, batch_size=7)
    alone = torch.cat([predict(network, info, dataset, molecule[None]) for molecule in molecules])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_prediction_does_not_change_when_molecules_turn(prepared, trained):
    dataset = QM9Dataset.open(prepared / "data/cache/qm9")
    network, _ = load_network(prepared / "data/whole_best.pt")
    batch = dataset.batch(torch.arange(20))
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    turn = turn * turn.det()
    graph = Graph(
        batch.graph.src, batch.graph.dst, batch.graph.rel_pos @ turn.T, batch_num_nodes=batch.graph.batch_num_nodes
    )
    with torch.no_grad():
        expected = run_network(network, batch, max_degree=1)
        came = network(graph, batch.node_feats, batch.edge_feats)
    torch.testing.assert_close(came, expected, rtol=1e-4, atol=1e-4)


def test_finished_run_only_reports(prepared, trained):
    again = run("train_qm9.py", *TINY, "--epochs", "12", "--run_name", "whole", "--log_every", "1", cwd=prepared)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-4:] == trained.stdout.splitlines()[-4:]


def test_evaluate_repeats_the_report(prepared, trained):
    done = run("train_qm9.py", "--evaluate", "data/whole_best.pt", "--device", "cpu", cwd=prepared)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == trained.stdout.splitlines()[-4:-1]


def test_killed_run_ends_with_the_same_bits(prepared, trained):
    """A real SIGKILL, three times at whatever step that meets; the state is saved every second step."""
    flags = [*TINY, "--epochs", "12", "--run_name", "killed", "--log_every", "1", "--save_every", "2"]
    last = prepared / "data/killed_last.pt"
    for _ in range(3):
        before = time_of(last)
        process = start(str(ROOT / "train_qm9.py"), *flags, cwd=prepared)
        wait_for_file(last, process, after=before)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = run("train_qm9.py", *flags, cwd=prepared)
    assert done.returncode == 0 and "going on after" in done.stdout, done.stderr
    straight, killed = (load_checkpoint(prepared / f"data/{name}_last.pt") for name in ("whole", "killed"))
    for part in ("model", "averaged"):
        assert all(torch.equal(value, killed[part][name]) for name, value in straight[part].items())
    for index, state in straight["optimizer"]["state"].items():
        assert all(torch.equal(value, killed["optimizer"]["state"][index][name]) for name, value in state.items())
    assert losses(prepared, "whole") == losses(prepared, "killed")
    assert results(prepared, "whole")["mae"] == results(prepared, "killed")["mae"]
    assert previous_path(last).exists()


@pytest.mark.parametrize("flags", [[], ["--accumulate", "2", "--batch_size", "15"]])
def test_two_processes_equal_one(prepared, flags):
    """A real torchrun: 76 training and 10 test molecules, batches that do not divide by 2 or by 4."""
    flags = [*TINY, "--epochs", "2", "--log_every", "1", *flags]
    names = [f"{kind}{len(flags)}" for kind in ("one", "two")]
    assert run("train_qm9.py", *flags, "--run_name", names[0], cwd=prepared).returncode == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start(*launcher, str(ROOT / "train_qm9.py"), *flags, "--run_name", names[1], cwd=prepared)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert stdout.count("Test error of homo on 10 molecules") == 1
    one, two = (losses(prepared, name) for name in names)
    assert one == pytest.approx(two, rel=1e-5)
    one, two = (results(prepared, name) for name in names)
    assert one["mae"] == pytest.approx(two["mae"], rel=1e-4)
    assert one["validation_mae"] == pytest.approx(two["validation_mae"], rel=1e-4)


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_presets_train(prepared, preset):
    """The networks of the presets, narrower: a step in their own precision and with their own pooling."""
    flags = ["--preset", preset, "--num_layers", "2", "--num_channels", "16", "--epochs", "1", "--num_train", "20"]
    done = run("train_qm9.py", *flags, "--device", "cpu", "--run_name", preset, cwd=prepared)
    assert done.returncode == 0, done.stderr
    assert results(prepared, preset)["mae"] > 0


def test_balanced_batches_train_on_every_molecule_once(prepared):
    dataset = QM9Dataset.open(prepared / "data/cache/qm9")
    split = split_molecules(dataset.targets[:, 0], 0)
    task = QM9Task(dataset, "mu", split, max_degree=1, **TASK | {"balanced": True, "num_train": 50})
    batches = task.batches(3)
    assert sorted(torch.cat(batches)[:, 0].tolist()) == sorted(split["train"][:50].tolist())


def test_benchmark_prints_a_rate_and_saves_nothing(prepared):
    done = run("train_qm9.py", *TINY, "--benchmark", "3", "--run_name", "speed", cwd=prepared)
    assert done.returncode == 0 and "molecules/s" in done.stdout
    assert not list((prepared / "data").glob("speed*")) and not (prepared / "runs/speed").exists()


def test_compile_trains_the_same_network(prepared, monkeypatch):
    """Without the compiler itself, which takes minutes: `test_compile.py` has the compiled network."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(options))
    done = run("train_qm9.py", *TINY, "--benchmark", "1", "--run_name", "compiled", "--compile", "true", cwd=prepared)
    assert done.returncode == 0 and compiled == [{"dynamic": True}]


def test_time_limit_stops_and_goes_on(prepared):
    flags = [*TINY, "--epochs", "2", "--run_name", "limited"]
    done = run("train_qm9.py", *flags, "--max_minutes", "1e-6", cwd=prepared)
    assert done.returncode != 0 and "out of time: the same command goes on" in done.stderr
    assert run("train_qm9.py", *flags, cwd=prepared).returncode == 0
    assert results(prepared, "limited")["best_epoch"] in (1, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--taks", "homo"], "did you mean --task"),
        (["--task", "homos"], "task must be one of mu, alpha, homo"),
        (["--pooling", "min"], "pooling must be one of max, avg, sum, got 'min'"),
        (["--reference", "fitted"], "reference must be one of none, fit, atoms, got 'fitted'"),
        (["--reference", "atoms"], "reference atoms is for U0, U, H and G, which have atomisation energies"),
        (["--reference", "fit", "--num_train", "3"], "training molecules has"),
        (["--augment", "symmetries"], "augment must be one of none, rotations, got 'symmetries'"),
        (["--cuda_graphs", "true"], "cuda_graphs needs a GPU, got the CPU"),
        (["--accumulate", "0"], "accumulate must be at least 1"),
        (["--split_seed", "4294967296"], "split_seed must be in 0 … 2^32 - 1, got 4294967296"),
        (["--precision", "half"], "precision must be one of"),
        (["--name", "missing"], "python preprocess_qm9.py --name missing"),
        (["--num_train", "77"], "num_train must be at most 76"),
        (["--num_val", "15"], "num_val must be at most 14"),
        (["--num_heads", "3"], "do not divide by 3 heads"),
        (["--run_name", "a/b"], "run_name must be a name for files, without directories, got 'a/b'"),
        (["--evaluate", "data/none.pt"], "none.pt"),
        (["--evaluate", "small.npz"], "small.npz: not a readable checkpoint"),
        (["--evaluate", "data/whole_last.pt"], "expected a checkpoint of train_qm9.py"),
        (["--epochs", "12", "--run_name", "whole", "--seed", "5"], "seed 0 (now 5)"),
    ],
)
def test_faults_are_named(prepared, trained, flags, message):
    before = (prepared / "data/whole_last.pt").read_bytes()
    run("train_qm9.py", *TINY, *flags, cwd=prepared).assert_refused(message)
    assert (prepared / "data/whole_last.pt").read_bytes() == before


def test_checkpoint_of_other_graphs_is_refused(prepared, trained):
    done = run("preprocess_qm9.py", "--source", "small.npz", "--graph", "complete", "--name", "pairs", cwd=prepared)
    assert done.returncode == 0, done.stderr
    done = run("train_qm9.py", "--name", "pairs", "--evaluate", "data/whole_best.pt", "--device", "cpu", cwd=prepared)
    assert done.returncode != 0 and "bonds" in done.stderr and "complete" in done.stderr


SHARES = torch.tensor([-13.6, -1029.9, -1485.3, -2042.6, -2713.5], dtype=torch.float64)  # eV, of H C N O F


@pytest.fixture(scope="module")
def energies(tmp_path_factory) -> Path:
    """A directory with a cache of molecules whose U0 is their atomisation energy, unknown of two, and a large share of
    each atom.
    """
    directory = tmp_path_factory.mktemp("energies")
    molecules = many_molecules(100)
    counts = np.add.reduceat(molecules.node_attr[:, :5], np.cumsum(molecules.n_node) - molecules.n_node, axis=0)
    targets = molecules.targets.copy()
    U0, U0_atom = (list(TARGETS).index(name) for name in ("U0", "U0_atom"))
    targets[:, U0] = targets[:, U0_atom] + counts @ SHARES.numpy()
    targets[[3, 50], U0_atom] = np.nan
    save(directory / "small.npz", replace(molecules, targets=targets))
    done = run("preprocess_qm9.py", "--source", "small.npz", cwd=directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize("reference", ["fit", "atoms"])
def test_shares_of_elements_are_fitted_kept_and_added_back(energies, reference):
    """Both from training to prediction; without them the network would have to learn thousands of eV."""
    flags = [*TINY, "--task", "U0", "--reference", reference, "--pooling", "sum", "--epochs", "8", "--batch_size", "8"]
    done = run("train_qm9.py", *flags, "--run_name", reference, cwd=energies)
    assert done.returncode == 0, done.stderr
    assert "mean and elements of the training set" in done.stdout
    network, info = load_network(energies / f"data/{reference}_best.pt")
    assert network.transformer.pooling == "sum"
    dataset = QM9Dataset.open(energies / "data/cache/qm9")
    U0, U0_atom = (dataset.targets[:, list(TARGETS).index(name)] for name in ("U0", "U0_atom"))
    split = split_molecules(U0, 0)
    if reference == "atoms":
        torch.testing.assert_close(torch.tensor(info["reference"], dtype=torch.float64), SHARES, rtol=1e-9, atol=1e-6)
        known = U0_atom[split["train"]]
        assert info["mean"] == pytest.approx(known[~known.isnan()].mean().item(), rel=0.1)
    else:
        counts = np.pad(dataset.element_counts[split["train"]], ((0, 0), (0, 1)), constant_values=1)
        solution = np.linalg.lstsq(counts, U0[split["train"]].numpy())[0][:5]
        torch.testing.assert_close(
            torch.tensor(info["reference"], dtype=torch.float64), torch.from_numpy(solution), rtol=1e-6, atol=1e-6
        )
    result = results(energies, reference)
    assert result["baseline_mae"] < 20_000, "meV: the elements explain all but the atomisation energies"
    assert result["mae"] < result["baseline_mae"]
    table = ["--checkpoint", f"data/{reference}_best.pt", "--split", "test", "--output", "table.csv", "--device", "cpu"]
    done = run("predict_qm9.py", *table, cwd=energies)
    assert done.returncode == 0, done.stderr
    errors = [float(line.split(",")[-1]) for line in (energies / "table.csv").read_text().splitlines()[1:]]
    assert sum(map(abs, errors)) / len(errors) == pytest.approx(result["mae"], rel=1e-3)
    assert f"(without the network: {result['baseline_mae']:.4g} meV)" in done.stdout


def test_free_atoms_need_atomisation_energies():
    molecules = many_molecules(20)
    targets = molecules.targets.copy()
    targets[:, list(TARGETS).index("U0_atom")] = np.nan
    dataset = QM9Dataset(graph_arrays(replace(molecules, targets=targets)), {})
    with pytest.raises(ValueError, match="no training molecule has U0_atom; give reference fit"):
        fit_reference(dataset, "U0", torch.arange(20), "atoms")


def test_elements_are_counted(energies):
    dataset = QM9Dataset.open(energies / "data/cache/qm9")
    expected = [[4, 1, 0, 0, 0], [3, 0, 1, 0, 0], [2, 0, 0, 1, 0], [2, 2, 0, 0, 0]]
    assert dataset.element_counts[:4].tolist() == expected and dataset.element_counts.shape == (100, 5)


def test_checkpoints_without_reference_are_read(energies, tmp_path):
    done = run("train_qm9.py", *TINY, "--epochs", "1", "--run_name", "old", cwd=energies)
    assert done.returncode == 0, done.stderr
    content = load_checkpoint(energies / "data/old_best.pt")
    assert content["info"].pop("reference") == [0.0] * 5
    save_checkpoint(tmp_path / "old.pt", content)
    assert load_network(tmp_path / "old.pt")[1] == load_network(energies / "data/old_best.pt")[1]


def test_rotations_change_nothing(prepared):
    """Loss and gradients of a batch that is turned are those of the batch that is not."""
    dataset = QM9Dataset.open(prepared / "data/cache/qm9")
    split = split_molecules(dataset.targets[:, 2], 0)
    plain, turned = (QM9Task(dataset, "homo", split, 2, **TASK | {"augment": kind}) for kind in ("none", "rotations"))
    examples = turned.batches(3)[0]
    assert torch.equal(examples[:, :1], plain.batches(3)[0]), "other molecules than without"
    a, b = plain.load(examples[:, :1]), turned.load(examples)
    assert (a.graph.rel_pos - b.graph.rel_pos).norm(dim=1).mean() > 0.5, "nothing was turned"
    torch.testing.assert_close(b.graph.rel_pos.norm(dim=1), a.graph.rel_pos.norm(dim=1))
    torch.testing.assert_close(b.rotations[:, :, 1], torch.nn.functional.normalize(b.graph.rel_pos, dim=1))
    shape = dict(num_layers=2, num_degrees=3, num_channels=8, num_heads=2, channels_div=2, pooling="max")
    network = build_network(shape | dict(norm=True, use_layer_norm=True, tensor_cores=True, low_memory=False))
    losses = [plain.loss(network, batch)[0] for batch in (a, b)]
    gradients = [torch.autograd.grad(loss, network.parameters()) for loss in losses]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_network_is_that_of_the_settings():
    settings = dict(num_layers=2, num_degrees=3, num_channels=8, num_heads=2, channels_div=2, pooling="avg")
    network = build_network(settings | dict(norm=True, use_layer_norm=False, tensor_cores=True, low_memory=False))
    assert network.transformer.max_degree == 2 and network.transformer.pooling == "avg"


def test_several_targets_in_pieces(prepared):
    """Two targets, the first piece too short for anything; the same command twice more, then there is nothing to do."""
    command = [str(ROOT / "train_qm9_targets.py"), "--targets", "gap,Cv", "--prefix", "piece", *TINY, "--epochs", "2"]
    outputs = []
    for limit in ("1e-6", "10", "10"):
        process = start(*command, "--max_minutes", limit, cwd=prepared)
        outputs.append((process.communicate(timeout=PATIENCE), process.returncode))
    assert outputs[0][1] != 0 and "out of time: the same command goes on" in outputs[0][0][1]
    for (stdout, _), status in outputs[1:]:
        assert status == 0
        assert "Test error of gap" in stdout and "Test error of Cv" in stdout and "cal/(mol K)" in stdout
        assert stdout.endswith("all targets are done\n")
    reports = [[line for line in stdout.splitlines() if line.startswith("SE(3)")] for (stdout, _), _ in outputs[1:]]
    assert reports[0] == reports[1] and len(reports[0]) == 2
