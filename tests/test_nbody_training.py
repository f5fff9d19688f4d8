"""N-body training from the command line, on tiny caches: results, resume, faults."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from scripts import ROOT, Done, run, start

from dataloader.nbody import NBodyDataset
from experiments.nbody import NBodyNetwork, equivariance_error, load_network, reflect
from se3_transformer.runtime.checkpoint import load_checkpoint

TINY = ["--num_layers", "1", "--num_degrees", "2", "--num_channels", "4", "--num_heads", "1", "--batch_size", "8"]
TINY += ["--channels_div", "2", "--warmup_steps", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """A directory with a tiny cache of each preset."""
    directory = tmp_path_factory.mktemp("nbody")
    for preset in ("readme", "paper"):
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
    deadline = time.time() + 120
    while not last.exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
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
        (["--preset", "paper", "--name", "nbody"], "delta_frames"),
        (["--epochs", "3", "--learning_rate", "0.5", "--run_name", "whole"], "learning_rate 0.001 (now 0.5)"),
    ],
)
def test_faults_are_named(simulated, trained, flags, message):
    before = (simulated / "data/whole_last.pt").read_bytes()
    done = run("train_nbody.py", *TINY, *flags, cwd=simulated)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr
    assert (simulated / "data/whole_last.pt").read_bytes() == before


def test_loss_that_is_not_finite_stops_the_run(simulated):
    flags = [*TINY, "--learning_rate", "1e30", "--max_grad_norm", "1e30", "--run_name", "nan"]
    done = run("train_nbody.py", *flags, cwd=simulated)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "epoch" in done.stderr and "batch" in done.stderr and "nan_last.pt" in done.stderr
    assert (simulated / "data/nan_last.pt").exists()


def test_preset_paper(simulated):
    done = run("train_nbody.py", "--preset", "paper", "--num_train", "20", *TINY, "--epochs", "1", cwd=simulated)
    assert done.returncode == 0, done.stderr
    result = json.loads((simulated / "data/nbody_paper_result.json").read_text())
    assert result["settings"]["box_size"] == 0
    assert result["simulations"]["train"] == 20
    assert load_network(simulated / "data/nbody_paper_best.pt").num_iterations == 5


def test_network_is_equivariant(simulated):
    torch.manual_seed(0)
    dataset = NBodyDataset(simulated / "data/cache/nbody", "train")
    network = NBodyNetwork(0.5, 5.0, 3, 2, 4, 8, 2, 4, 16)
    assert equivariance_error(network, dataset.batch(torch.arange(16), torch.arange(16))) < 1e-5


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
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert stdout.count("Test error on 10 simulations") == 1
    one, two = (json.loads((simulated / f"data/{name}_result.json").read_text()) for name in ("one", "two"))
    for split in ("test", "validation"):
        assert one[split] == pytest.approx(two[split], rel=1e-4)


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
