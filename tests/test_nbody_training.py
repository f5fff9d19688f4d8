"""N-body training from the command line, on tiny caches: results, resume, faults."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scripts import PATIENCE, ROOT, Done, run, start, wait_for_file

from dataloader.nbody import NBodyDataset
from experiments.augment import random_turns, turn_matrices
from experiments.nbody import NETWORKS, NBodyNetwork, NBodyTask, PlainNetwork, equivariance_error, load_network, reflect
from se3_transformer.model.basis import edge_frames
from se3_transformer.runtime.checkpoint import load_checkpoint
from se3_transformer.runtime.files import exclusive

TINY = ["--num_layers", "1", "--num_degrees", "2", "--num_channels", "4", "--num_heads", "1", "--batch_size", "8"]
TINY += ["--channels_div", "2", "--warmup_steps", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """A directory with a tiny cache of each preset."""
    directory = tmp_path_factory.mktemp("nbody")
    for preset in ("readme", "paper", "egnn"):
        sizes = ["--num_train", "32", "--num_val", "10", "--num_test", "10"]
        done = run("preprocess_nbody.py", "--preset", preset, *sizes, cwd=directory)
        assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def trained(simulated) -> Done:
    done = run("train_nbody.py", *TINY, "--epochs", "3", "--run_name", "whole", cwd=simulated)
    assert done.returncode == 0, done.stderr
    return done


def test_results_are_written_and_agree(simulated, trained):
    result = json.loads((simulated / "data/whole_result.json").read_text())
    assert f"{result['test']['mse_x']:.5f}" in trained.stdout
    assert result["baselines"]["constant_velocity_x"] > 0
    assert result["equivariance_error"] < 1e-4
    assert result["simulations"] == {"train": 32, "test": 10}
    assert (simulated / "data/whole_trajectories.png").stat().st_size > 10_000
    assert list((simulated / "runs/whole").glob("events*"))
    network = load_network(simulated / "data/whole_best.pt")
    dataset = NBodyDataset(simulated / "data/cache/nbody", "test")
    batch = dataset.batch(torch.arange(10))
    with torch.no_grad():
        displacement = network(batch)[0]
    mse = (displacement - batch.displacement).square().mean().item()
    assert mse == pytest.approx(result["test"]["mse_x"], rel=1e-5)


def test_finished_run_only_reports(simulated, trained):
    again = run("train_nbody.py", *TINY, "--epochs", "3", "--run_name", "whole", cwd=simulated)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-8:] == trained.stdout.splitlines()[-8:]


def test_interrupted_run_ends_with_the_same_bits(simulated):
    flags = [*TINY, "--epochs", "15"]
    assert run("train_nbody.py", *flags, "--run_name", "straight", cwd=simulated).returncode == 0
    process = start(str(ROOT / "train_nbody.py"), *flags, "--run_name", "broken", cwd=simulated)
    last = simulated / "data/broken_last.pt"
    wait_for_file(last, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and "the same command goes on" in stderr
    stopped_at = load_checkpoint(last)
    assert (stopped_at["epoch"], stopped_at["step_in_epoch"]) < (15, 0)
    assert run("train_nbody.py", *flags, "--run_name", "broken", cwd=simulated).returncode == 0
    straight, broken = (load_checkpoint(simulated / f"data/{name}_last.pt") for name in ("straight", "broken"))
    for part in ("model", "averaged"):
        for name, value in straight[part].items():
            assert torch.equal(value, broken[part][name]), name
    for index, state in straight["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, broken["optimizer"]["state"][index][name]), name
    assert straight["best"] == broken["best"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epoch", "3"], "did you mean --epochs"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--learning_rate", "0"], "learning_rate must be positive, got 0.0"),
        (["--num_heads", "3"], "do not divide by 3 heads"),
        (["--name", "missing"], "python preprocess_nbody.py"),
        (["--num_train", "33"], "num_train must be at most 32, as many as there are, got 33"),
        (["--num_iterations", "2"], "num_iterations must divide the 5 frames to the target, got 2"),
        (["--first_start_frame", "44"], "within the 44 frames that leave room for the target, got 44 and 0"),
        (
            ["--first_start_frame", "40", "--num_start_frames", "5"],
            "frames that leave room for the target, got 40 and 5",
        ),
        (["--augment", "rotations"], "augment must be none where there are walls, which do not turn, got 'rotations'"),
        (["--cuda_graphs", "true"], "cuda_graphs needs a GPU, got the CPU"),
        (["--network", "planar"], "network must be one of equivariant, plain, got 'planar'"),
        (["--position_weight", "0", "--velocity_weight", "0"], "position_weight or velocity_weight must be positive"),
        (["--preset", "paper", "--name", "nbody"], "delta_frames"),
        (["--epochs", "3", "--learning_rate", "0.5", "--run_name", "whole"], "learning_rate 0.001 (now 0.5)"),
    ],
)
def test_faults_are_named(simulated, trained, flags, message):
    before = (simulated / "data/whole_last.pt").read_bytes()
    run("train_nbody.py", *TINY, *flags, cwd=simulated).assert_refused(message)
    assert (simulated / "data/whole_last.pt").read_bytes() == before


def test_loss_that_is_not_finite_stops_the_run(simulated):
    flags = [*TINY, "--learning_rate", "1e30", "--max_grad_norm", "1e30", "--run_name", "nan"]
    run("train_nbody.py", *flags, cwd=simulated).assert_refused("epoch", "batch", "nan_last.pt")
    assert (simulated / "data/nan_last.pt").exists()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision(simulated, precision):
    """With degree 2, whose Wigner blocks are products."""
    flags = [*TINY, "--num_degrees", "3", "--epochs", "1", "--num_train", "20", "--precision", precision]
    done = run("train_nbody.py", *flags, "--run_name", precision, cwd=simulated)
    assert done.returncode == 0, done.stderr


def test_preset_paper(simulated):
    done = run("train_nbody.py", "--preset", "paper", "--num_train", "20", *TINY, "--epochs", "1", cwd=simulated)
    assert done.returncode == 0, done.stderr
    result = json.loads((simulated / "data/nbody_paper_result.json").read_text())
    assert result["settings"]["box_size"] == 0
    assert result["simulations"]["train"] == 20
    assert load_network(simulated / "data/nbody_paper_best.pt").num_iterations == 5


def test_preset_egnn(simulated):
    """Positions alone choose the epoch; velocities, which nothing was learned of, are not reported."""
    done = run("train_nbody.py", "--preset", "egnn", *TINY, "--epochs", "2", "--validate_every", "1", cwd=simulated)
    assert done.returncode == 0, done.stderr
    assert "MSE v" not in done.stdout
    result = json.loads((simulated / "data/nbody_egnn_result.json").read_text())
    state = load_checkpoint(simulated / "data/nbody_egnn_last.pt")
    assert [facts["val_selection"] for facts in state["history"]] == [facts["val_mse_x"] for facts in state["history"]]
    assert result["test"].keys() == {"mse_x"} and result["validation"].keys() == {"mse_x"}


def test_start_frames_and_targets_of_training(simulated):
    """What the presets take from the simulations: frame 30 alone with its target, or any with the frames on the way."""
    train, validation = (NBodyDataset(simulated / "data/cache/nbody_egnn", split) for split in ("train", "val"))
    weights = {"position_weight": 1.0, "velocity_weight": 1.0}
    for first, number, expected in ((30, 1, {30}), (7, 3, {7, 8, 9}), (36, 0, {36, 37, 38}), (0, 0, set(range(39)))):
        frames = {"first_start_frame": first, "num_start_frames": number}
        task = NBodyTask(train, validation, 8, 0, **weights, num_train=0, **frames, num_targets=1, augment="none")
        frames = torch.cat([batch[:, 1] for epoch in range(20) for batch in task.batches(epoch)])
        assert set(frames.tolist()) == expected
        batch = task.load(task.batches(0)[0])
        assert batch.displacement.shape == (1, 40, 3)
    network = NBodyNetwork(1.0, 0.0, 5, 1, 2, 4, 1, 2, 16)
    loss, scalars = task.loss(network, batch)
    assert loss == scalars["mse_x"] + scalars["mse_v"], "with one target, the loss is that of the end of the path"


def test_network_is_equivariant(simulated):
    torch.manual_seed(0)
    dataset = NBodyDataset(simulated / "data/cache/nbody", "train")
    network = NBodyNetwork(0.5, 5.0, 3, 2, 4, 8, 2, 4, 16)
    assert equivariance_error(network, dataset.batch(torch.arange(16), torch.arange(16))) < 1e-5


@pytest.mark.parametrize("augment", ["rotations", "symmetries"])
def test_rotations_change_nothing_for_the_equivariant_network(simulated, augment):
    """Loss and gradients in float64, of batches that are turned, and for `symmetries` mirrored back; the network that
    is not equivariant sees the difference.
    """
    train, validation = (NBodyDataset(simulated / "data/cache/nbody_paper", split) for split in ("train", "val"))
    settings = dict(batch_size=32, seed=0, position_weight=1.0, velocity_weight=1.0, num_train=0)
    settings |= dict(first_start_frame=0, num_start_frames=0, num_targets=5)
    plain, turned = (NBodyTask(train, validation, **settings, augment=kind) for kind in ("none", augment))
    examples = turned.batches(3)[0]
    assert torch.equal(examples, turned.batches(3)[0]) and not torch.equal(examples, turned.batches(4)[0])
    a, b = in_float64(plain.load(examples[:, :2])), in_float64(turned.load(examples))
    assert (a.displacement - b.displacement).abs().max() > 0.1, "nothing was turned"
    torch.testing.assert_close(b.displacement.norm(dim=2), a.displacement.norm(dim=2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b.rotations[:, :, 1] * distance(b), b.positions[b.dst] - b.positions[b.src])
    if augment == "symmetries":
        signs = (a.charges == b.charges).view(32, 5)
        assert (signs == signs[:, :1]).all() and 0 < signs[:, 0].sum() < 32
        return
    differences = {}
    for name, network in NETWORKS.items():
        torch.manual_seed(0)
        network = network(1.0, 0.0, 5, 1, 3, 4, 1, 2, 8).double()
        losses, gradients = [], []
        for batch in (a, b):
            loss, _ = plain.loss(network, batch)
            losses.append(loss)
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, network.parameters())]))
        differences[name] = [((y - x).norm() / x.norm()).item() for x, y in (losses, gradients)]
    assert max(differences["equivariant"]) < 1e-5, "float32 positions that are turned are rounded"
    assert min(differences["plain"]) > 1e-2


def in_float64(batch):
    """The same batch, with frames computed anew."""
    doubled = {
        name: value.double() for name, value in vars(batch).items() if getattr(value, "is_floating_point", bool)()
    }
    batch = replace(batch, **doubled)
    return replace(batch, rotations=edge_frames(batch.positions[batch.dst] - batch.positions[batch.src]))


def distance(batch):
    """(E, 1)"""
    return (batch.positions[batch.dst] - batch.positions[batch.src]).norm(dim=1, keepdim=True)


def test_random_turns_are_rotations_of_every_kind():
    turns = random_turns(4000, torch.Generator().manual_seed(0))
    assert turns.dtype == torch.int64
    matrices = turn_matrices(turns)
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3).double().expand(4000, 3, 3))
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(4000).double())
    assert matrices.mean(0).abs().max() < 0.03, "some directions are preferred"
    assert matrices.square().mean(0).sub(1 / 3).abs().max() < 0.03


def test_plain_network_trains_and_loads(simulated):
    flags = [
        "--preset",
        "paper",
        "--network",
        "plain",
        "--augment",
        "symmetries",
        "--epochs",
        "1",
        "--run_name",
        "plain",
    ]
    done = run("train_nbody.py", *flags, *TINY, cwd=simulated)
    assert done.returncode == 0, done.stderr
    assert isinstance(load_network(simulated / "data/plain_best.pt"), PlainNetwork)
    assert "\nplain attention " in done.stdout and "SE(3)" not in done.stdout
    assert json.loads((simulated / "data/plain_result.json").read_text())["equivariance_error"] > 1e-2


def test_learning_curve(simulated):
    files = ["--output", "curve.json", "--figure", "curve.png"]
    flags = ["--sizes", "8", "--steps", "1", *files, *TINY[:-4], "--threads", "1"]
    process = start(str(ROOT / "results/nbody_learning_curve.py"), *flags, cwd=simulated)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    result = json.loads((simulated / "curve.json").read_text())
    assert result["simulations"] == [8] and len(result["mse_x"]) == 3
    for name, errors in result["mse_x"].items():
        assert f"| {name} | {errors[0]:.4f} |" in stdout
    assert (simulated / "curve.png").stat().st_size > 5_000


def test_table_of_results_keeps_protocols_apart(tmp_path):
    done = run("results/nbody_table.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    both, egnn = done.stdout.split("\n\n")
    assert "egnn" not in both.lower() and "MSE v" in both
    assert "`paper`" not in egnn and "MSE v" not in egnn and "| EGNN, published | 3,000 | 30 and 40 |" in egnn


def test_reflect_equals_many_small_steps():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 3, generator=generator, dtype=torch.float64) * 10 - 5
    v = torch.randn(200, 3, generator=generator, dtype=torch.float64) * 8
    end, sign = reflect(x + v, 5.0)
    steps = 1000
    position, velocity = x.clone(), v.clone()
    for _ in range(steps):
        position = position + velocity / steps
        velocity = torch.where(position > 5, -velocity.abs(), torch.where(position < -5, velocity.abs(), velocity))
        position = torch.where(position > 5, 10 - position, torch.where(position < -5, -10 - position, position))
    torch.testing.assert_close(end, position, rtol=0, atol=1e-8)
    torch.testing.assert_close(sign * v, velocity)


def test_two_processes_equal_one(simulated):
    """A real torchrun: batches of 9 do not divide by 2."""
    flags = [*TINY, "--batch_size", "9", "--epochs", "2"]
    assert run("train_nbody.py", *flags, "--run_name", "one", cwd=simulated).returncode == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start(*launcher, str(ROOT / "train_nbody.py"), *flags, "--run_name", "two", cwd=simulated)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert stdout.count("Test error on 10 simulations") == 1
    one, two = (json.loads((simulated / f"data/{name}_result.json").read_text()) for name in ("one", "two"))
    for split in ("test", "validation"):
        assert one[split] == pytest.approx(two[split], rel=1e-4)


def test_a_run_that_is_in_progress_is_not_started_again(simulated, trained):
    before = (simulated / "runs/whole/log.jsonl").read_bytes()
    with exclusive(simulated / "data/whole_last.pt"):
        done = run("train_nbody.py", *TINY, "--epochs", "3", "--run_name", "whole", cwd=simulated)
    assert done.returncode != 0 and "error: data/whole_last.pt: another process is at this run" in done.stderr
    assert (simulated / "runs/whole/log.jsonl").read_bytes() == before


def test_other_simulations_are_not_taken_for_the_same(simulated, trained):
    """A run does not go on with simulations other than those that it began with."""
    before = (simulated / "data/whole_last.pt").read_bytes()
    sizes = ["--num_train", "32", "--num_val", "10", "--num_test", "10"]
    assert run("preprocess_nbody.py", *sizes, "--seed", "1", "--name", "other", cwd=simulated).returncode == 0
    cache, other = simulated / "data/cache/nbody", simulated / "data/cache/other"
    cache.rename(simulated / "data/cache/kept")
    other.rename(cache)
    try:
        done = run("train_nbody.py", *TINY, "--epochs", "3", "--run_name", "whole", cwd=simulated)
    finally:
        cache.rename(other)
        (simulated / "data/cache/kept").rename(cache)
    assert done.returncode != 0 and "cannot be resumed, it was trained with data " in done.stderr
    assert (simulated / "data/whole_last.pt").read_bytes() == before
