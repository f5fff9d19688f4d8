"""Trainer, checkpoints, logs, settings: on a toy task where nothing hides behind a large network."""

import importlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from scripts import PATIENCE, ROOT, start
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from se3_transformer.runtime.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_latest_checkpoint,
    previous_path,
    save_checkpoint,
)
from se3_transformer.runtime.cuda_graphs import check_cuda_graphs, put_together, take_apart
from se3_transformer.runtime.distributed import exclusive_run, gather_shares, process_group
from se3_transformer.runtime.files import run_files
from se3_transformer.runtime.log import RunLog
from se3_transformer.runtime.settings import parse_settings
from se3_transformer.runtime.trainer import (
    MovingAverage,
    NonFiniteLoss,
    OutOfTime,
    Trainer,
    check_training_settings,
    cosine_schedule,
)

SETTINGS = {
    "epochs": 3,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "final_learning_rate": 1e-4,
    "warmup_steps": 2,
    "weight_decay": 0.01,
    "max_grad_norm": 10.0,
    "ema_decay": 0.9,
    "accumulate": 1,
    "precision": "float32",
    "validate_every": 1,
}
CONTROL = {"workers": 0, "log_every": 50, "save_every": 0}
CHECKED = SETTINGS | CONTROL | {"seed": 0, "threads": 0, "max_minutes": 0.0}


@dataclass
class ToyBatch:
    x: torch.Tensor  # (B, 4)
    y: torch.Tensor  # (B,)

    def to(self, device, non_blocking=False):
        return ToyBatch(self.x.to(device), self.y.to(device))


class ToyTask:
    """Regression on 45 points, so that the last batch of 8 has 5; batch `poisoned` of epoch 1 is not finite."""

    def __init__(self, poisoned=None):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(45, 4, generator=generator)
        self.y = self.x.square().sum(1)
        self.poisoned = poisoned
        self.steps = 0

    def batches(self, epoch):
        order = torch.randperm(45, generator=torch.Generator().manual_seed(epoch))
        return [-1 - b if (epoch, i) == (1, self.poisoned) else b for i, b in enumerate(order.split(8))]

    def load(self, examples):
        if examples.min() < 0:
            return ToyBatch(self.x[-1 - examples] * math.nan, self.y[-1 - examples])
        return ToyBatch(self.x[examples], self.y[examples])

    def loss(self, model, batch):
        error = model(batch.x)[:, 0] - batch.y
        return error.square().mean(), {"mae": error.abs().mean()}

    def validate(self, model):
        error = (model(self.x)[:, 0] - self.y).square().mean().item()
        return {"mse": error, "selection": error}

    def figures(self, model):
        return {}


def trainer(directory, task=None, **changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 1))
    paths = [directory / name for name in ("last.pt", "best.pt", "log")]
    control = {key: changes.pop(key) for key in CONTROL if key in changes}
    return Trainer(model, task or ToyTask(), SETTINGS | changes, *paths, describe={}, **control)


def lines(directory):
    return [json.loads(line) for line in (directory / "log/log.jsonl").read_text().splitlines()]


def assert_same_state(a, b):
    """Two saved states, bit for bit but for the clock."""
    clock = {"seconds", "examples_per_second"}
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - clock:
            assert_same_state(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_state(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_training_learns_and_keeps_the_best_epoch(tmp_path):
    run = trainer(tmp_path, epochs=30)
    run.train()
    errors = [facts["val_mse"] for facts in run.history]
    assert errors[-1] < 0.5 * errors[0]
    best = load_checkpoint(tmp_path / "best.pt")
    assert best["validation"]["mse"] == min(errors) == run.best
    model = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 1))
    model.load_state_dict(best["model"])
    with torch.no_grad():
        assert ToyTask().validate(model)["mse"] == min(errors)


def test_epochs_that_are_not_validated(tmp_path):
    run = trainer(tmp_path, epochs=5, validate_every=2)
    run.train()
    assert [facts["epoch"] for facts in run.history if "val_mse" in facts] == [2, 4, 5]
    assert [line["step"] for line in lines(tmp_path) if "validation/mse" in line] == [12, 24, 30]
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == run.best_epoch["epoch"]


def test_moving_average():
    """Weights, buffers and state as torch's own class has them, after each of three updates."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    averages = MovingAverage(model, 0.9), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        model(torch.randn(8, 4)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        for average in averages:
            average.update_parameters(model)
        assert_same_state(*(average.state_dict() for average in averages))


@pytest.mark.parametrize("accumulate", [2, 3, 8, 20])
def test_accumulation_does_not_change_the_result(tmp_path, accumulate):
    """45 examples in batches of 8: the last has 5, which do not divide by 2, 3, 8 or 20 parts."""
    whole, parts = trainer(tmp_path / "whole"), trainer(tmp_path / "parts", accumulate=accumulate)
    whole.train()
    parts.train()
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(whole.history, parts.history):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["mae"] == pytest.approx(b["mae"], rel=1e-5)


def test_loss_of_an_epoch_is_that_of_the_steps(tmp_path):
    """The recorded loss against the formula, step by step with plain SGD semantics left to torch."""
    run = trainer(tmp_path, epochs=1, log_every=1)
    task, model = ToyTask(), nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 1))
    model.load_state_dict(run.model.state_dict())
    with torch.no_grad():
        first = task.loss(model, task.load(task.batches(0)[0]))[0].item()
    run.train()
    steps = [line["train/loss"] for line in lines(tmp_path) if "train/loss" in line]
    assert steps[0] == pytest.approx(first)
    assert len(steps) == 6
    assert run.history[0]["loss"] == pytest.approx(sum(steps) / 6)


@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_precision_is_used(tmp_path, precision):
    seen = []

    class Spy(ToyTask):
        def loss(self, model, batch):
            seen.append(model(batch.x).dtype)
            seen.append(torch.get_float32_matmul_precision())
            return super().loss(model, batch)

    trainer(tmp_path, Spy(), precision=precision, epochs=1).train()
    torch.set_float32_matmul_precision("highest")
    assert seen[:2] == {"bfloat16": [torch.bfloat16, "highest"], "tf32": [torch.float32, "high"]}[precision]


def test_scaler_of_float16_survives_an_overflow(tmp_path):
    """The first scales are too large for this gradient: those steps are skipped, and then it learns."""

    class Steep(ToyTask):
        def loss(self, model, batch):
            loss, scalars = super().loss(model, batch)
            return 1e36 * loss, scalars

    run = trainer(tmp_path, Steep(), precision="float16", epochs=2, max_grad_norm=1e36)
    before = run.scaler.get_scale()
    run.train()
    assert run.scaler.get_scale() < before
    assert all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize("steps", [1, 5, 6, 7, 11])
def test_stopped_run_ends_with_the_same_bits(tmp_path, steps):
    """Stopped by the clock after some steps, in the middle or at the end of an epoch; also the logs agree."""
    straight = trainer(tmp_path / "straight", log_every=4)
    straight.train()

    class Slow(ToyTask):
        def loss(self, model, batch):
            self.steps += 1
            if self.steps == steps:
                stopped.deadline = 0
            return super().loss(model, batch)

    stopped = trainer(tmp_path / "stopped", Slow(), log_every=4)
    stopped.deadline = math.inf
    with pytest.raises(OutOfTime):
        stopped.train()
    assert stopped.step == steps
    again = trainer(tmp_path / "stopped", log_every=4)
    assert again.step == steps
    again.train()
    assert_same_state(load_checkpoint(tmp_path / "straight/last.pt"), load_checkpoint(tmp_path / "stopped/last.pt"))
    a, b = lines(tmp_path / "straight"), lines(tmp_path / "stopped")
    for line in a + b:
        for key in ("epoch/seconds", "epoch/examples_per_second"):
            line.pop(key, None)
    assert a == b


def test_validation_that_would_end_too_late_is_left_to_the_next_time(tmp_path):
    """The one before it took ten minutes, and nine are left: it is not begun, and the run ends with the same bits."""
    straight = trainer(tmp_path / "straight")
    straight.train()
    stopped = trainer(tmp_path / "stopped")
    stopped.deadline, stopped._validation_seconds = time.monotonic() + 540, 600
    with pytest.raises(OutOfTime, match="the same command goes on"):
        stopped.train()
    assert stopped.step == 6 and stopped.history == []
    trainer(tmp_path / "stopped").train()
    assert_same_state(load_checkpoint(tmp_path / "straight/last.pt"), load_checkpoint(tmp_path / "stopped/last.pt"))


VALIDATING = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_runtime import ToyTask, trainer
class Slow(ToyTask):
    def validate(self, model):
        print("validating", flush=True)
        self.validations = getattr(self, "validations", 0) + 1
        time.sleep(600 * (self.validations > 1))
        return super().validate(model)
trainer(Path(sys.argv[1]), Slow(), save_every=int(sys.argv[3])).train()
"""


@pytest.mark.parametrize(("save_every", "step"), [(0, 6), (6, 12)])
def test_kill_during_validation(tmp_path, save_every, step):
    """A real SIGKILL in the second of three validations; the last step before it is saved or not."""
    trainer(tmp_path / "straight").train()
    process = start("-c", VALIDATING, "killed", str(Path(__file__).parent), str(save_every), cwd=tmp_path)
    for expected in ("validating\n", "epoch 1/3   loss ", "validating\n"):
        assert process.stdout.readline().startswith(expected)
    process.send_signal(signal.SIGKILL)
    stdout, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL and stdout == ""
    again = trainer(tmp_path / "killed", save_every=save_every)
    assert again.step == step
    again.train()
    assert_same_state(load_checkpoint(tmp_path / "straight/last.pt"), load_checkpoint(tmp_path / "killed/last.pt"))
    a, b = ([line for line in lines(tmp_path / name) if "validation/mse" in line] for name in ("straight", "killed"))
    assert a == b and len(a) == 3


HOLDER = """
import sys, time, torch
from se3_transformer.runtime.distributed import exclusive_run
from se3_transformer.runtime.files import run_files
with exclusive_run(run_files("data", sys.argv[1], "logs"), torch.device("cpu")):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(("data_dir", "held"), [("data", "data/name_last.pt"), ("elsewhere", "logs/name")])
def test_a_run_is_held_by_one_process_until_it_is_killed(tmp_path, monkeypatch, data_dir, held):
    monkeypatch.chdir(tmp_path)
    process = start("-c", HOLDER, "name", cwd=tmp_path)
    assert process.stdout.readline() == "held\n"
    files, cpu = run_files(data_dir, "name", "logs"), torch.device("cpu")
    with exclusive_run(run_files(data_dir, "another", "logs"), cpu):
        with pytest.raises(BlockingIOError, match=f"{held}: another process is at this run; .* another --run_name"):
            exclusive_run(files, cpu).__enter__()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with exclusive_run(files, cpu):
        pass


RANKS = """
from se3_transformer.runtime.distributed import exclusive_run, process_group
from se3_transformer.runtime.files import run_files
with process_group("cpu") as device, exclusive_run(run_files("data", "name", "logs"), device):
    print("entered")
"""


def test_all_processes_of_a_run_hold_it_or_none(tmp_path, monkeypatch):
    """A real torchrun."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ranks.py").write_text(RANKS)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "ranks.py"]
    with exclusive_run(run_files("data", "name", "logs"), torch.device("cpu")):
        process = start(*command, cwd=tmp_path)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and "entered" not in stdout
    assert stderr.count("name_last.pt: another process is at this run") == 1
    process = start(*command, cwd=tmp_path)
    assert process.communicate(timeout=PATIENCE)[0].count("entered") == 2 and process.returncode == 0


def test_damaged_state_is_named_and_the_one_before_it_used(tmp_path, capsys):
    straight = trainer(tmp_path / "straight")
    straight.train()
    run = trainer(tmp_path / "damaged", epochs=3)
    run.train()
    last = tmp_path / "damaged/last.pt"
    os.truncate(last, 1000)
    again = trainer(tmp_path / "damaged")
    assert again.step == 12
    warning = capsys.readouterr().err
    assert f"{last}: not a readable checkpoint" in warning and f"{previous_path(last)}" in warning
    again._save_last()
    assert load_checkpoint(previous_path(last))["epoch"] == 2, "the damaged state has pushed out the good one"
    again.train()
    assert_same_state(load_checkpoint(tmp_path / "straight/last.pt"), load_checkpoint(last))
    os.truncate(last, 1000)
    os.truncate(previous_path(last), 1000)
    with pytest.raises(CheckpointError, match=r"no other to go on from; .*delete .*last\.pt and .*last\.previous\.pt"):
        trainer(tmp_path / "damaged")


def test_other_settings_are_refused(tmp_path):
    trainer(tmp_path).train()
    with pytest.raises(CheckpointError, match=r"learning_rate 0\.01 \(now 0\.5\)"):
        trainer(tmp_path, learning_rate=0.5)


@pytest.mark.parametrize("batch", [0, 3])
def test_loss_that_is_not_finite_stops_with_the_state_before_it(tmp_path, batch):
    run = trainer(tmp_path / "bad", ToyTask(poisoned=batch))
    with pytest.raises(NonFiniteLoss, match=rf"loss nan.* in epoch 2, batch {batch}, step {6 + batch};.*last\.pt"):
        run.train()
    good = trainer(tmp_path / "bad")  # the state before that step goes on as if nothing had been
    assert good.step == 6 + batch
    good.train()
    straight = trainer(tmp_path / "straight")
    straight.train()
    assert_same_state(load_checkpoint(tmp_path / "straight/last.pt"), load_checkpoint(tmp_path / "bad/last.pt"))


def test_validation_error_that_is_not_finite_stops(tmp_path):
    class Lost(ToyTask):
        def validate(self, model):
            return {"selection": math.nan}

    with pytest.raises(NonFiniteLoss, match="the validation error after epoch 1"):
        trainer(tmp_path, Lost()).train()


def test_float16_that_always_overflows_stops(tmp_path):
    """The loss is finite, its gradient is not, at any scale."""

    class Steep(ToyTask):
        def loss(self, model, batch):
            loss, scalars = super().loss(model, batch)
            weight = model[0].weight
            return loss + (weight - weight.detach()).abs().sqrt().sum(), scalars

    with pytest.raises(NonFiniteLoss, match="gradient_norm"):
        trainer(tmp_path, Steep(), precision="float16", epochs=20).train()


def test_kill_between_log_and_state(tmp_path):
    """What was recorded after the last saved state does not come twice."""
    trainer(tmp_path / "straight", log_every=2).train()
    killed = trainer(tmp_path / "killed", log_every=2, save_every=6)
    save, saves = killed._save_last, []

    def save_once():  # the state in the last step of the epoch is saved, the one after validation is not
        if saves:
            raise SystemExit
        saves.append(save())

    killed._save_last = save_once
    with pytest.raises(SystemExit):
        killed.train()
    trainer(tmp_path / "killed", log_every=2, save_every=6).train()
    steps = [[line["step"] for line in lines(tmp_path / name)] for name in ("straight", "killed")]
    assert steps[0] == steps[1]


def test_worker_processes_do_not_change_the_result(tmp_path):
    alone, helped = trainer(tmp_path / "alone", epochs=1), trainer(tmp_path / "helped", epochs=1, workers=2)
    alone.train()
    helped.train()
    assert_same_state(load_checkpoint(tmp_path / "alone/last.pt"), load_checkpoint(tmp_path / "helped/last.pt"))


def test_benchmark_saves_nothing(tmp_path):
    run = trainer(tmp_path)
    assert run.benchmark(10) > 0
    assert not (tmp_path / "last.pt").exists() and not (tmp_path / "best.pt").exists()


KILLED = """
import sys, torch
from se3_transformer.runtime.checkpoint import save_checkpoint
for i in range(10_000):
    save_checkpoint(sys.argv[1], {"number": i, "tensor": torch.full((500_000,), i)}, keep_previous=True)
    if i == 0:
        print("ready", flush=True)
"""


def test_kill_during_a_write_leaves_a_whole_checkpoint(tmp_path):
    """A real SIGKILL at five different moments, the process doing nothing but write checkpoints."""
    path = tmp_path / "a.pt"
    for moment in range(5):
        process = start("-c", KILLED, str(path), cwd=tmp_path)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.013 * moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        state, _ = load_latest_checkpoint(path)
        assert (state["tensor"] == state["number"]).all()
    assert len(list(tmp_path.iterdir())) <= 3  # the file, the one before it, and one that was being written


def test_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"weights": torch.zeros(10_000)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt: not a readable checkpoint \(.* is damaged\)"):
        load_checkpoint(path)


def test_state_of_another_network_is_named(tmp_path):
    trainer(tmp_path).train()
    state = load_checkpoint(tmp_path / "last.pt")
    save_checkpoint(tmp_path / "last.pt", state | {"model": {}})
    with pytest.raises(CheckpointError, match=r"last\.pt: a state that does not fit this run"):
        trainer(tmp_path)


def test_missing_checkpoint_falls_back_on_the_one_before(tmp_path):
    """What is there when a process is killed between the two renames of a write."""
    assert load_latest_checkpoint(tmp_path / "a.pt") is None
    save_checkpoint(tmp_path / "a.pt", {"value": 1})
    (tmp_path / "a.pt").rename(previous_path(tmp_path / "a.pt"))
    assert load_latest_checkpoint(tmp_path / "a.pt") == ({"value": 1}, previous_path(tmp_path / "a.pt"))


def test_log_drops_what_lies_ahead_and_what_was_cut_off(tmp_path):
    log = RunLog(tmp_path, 0, 0)
    for step in (10, 20, 30):
        log.scalars("train", {"loss": 1.0 / step}, step)
    log.close()
    with open(log.path, "a") as file:
        file.write('{"step": 40, "train/lo')
    log = RunLog(tmp_path, 20, 2)
    log.scalars("train", {"loss": 2.0}, 30)
    log.outcome({"rate": 0.1, "name": "x"}, {"mse": 3.0}, 30)
    records = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [record.get("train/loss") for record in records] == [0.1, 0.05, 2.0, None]
    assert records[-1] == {"step": 30, "settings": {"rate": 0.1, "name": "x"}, "test/mse": 3.0}


def test_one_process_has_all_shares():
    values = torch.arange(5.0)
    assert gather_shares(values, 5) is values


@pytest.mark.parametrize(("device", "message"), [("tpu", "expected auto, cpu"), ("meta", "expected auto, cpu")])
def test_unknown_device(device, message):
    with pytest.raises(ValueError, match=message), process_group(device):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device():
    with pytest.raises(ValueError, match="finds no CUDA device"), process_group("cuda"):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be positive, got nan"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        ({"precision": "half"}, "precision must be one of float32, tf32, bfloat16, float16, got 'half'"),
        ({"max_minutes": -1.0}, "max_minutes must be at least 0"),
        ({"seed": 2**32}, "seed must be in 0 … 2^32 - 1, got 4294967296"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    check_training_settings(CHECKED)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_training_settings(CHECKED | change)


def test_schedule():
    factor = cosine_schedule(num_steps=110, warmup_steps=10, final=0.1)
    assert [factor(0), factor(9), factor(10)] == pytest.approx([0.1, 1.0, 1.0])
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)


def test_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"weights": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load_checkpoint(path)


def test_malicious_checkpoint_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"model": Harm()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "harm").exists()


def test_failed_write_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"value": 1})
    with pytest.raises(Exception, match="pickle|local object"):
        save_checkpoint(path, {"value": lambda: None})
    assert load_checkpoint(path) == {"value": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_preset_yields_to_flags(capsys):
    defaults = {"preset": "small", "width": 1, "rate": 0.5, "flag": False}
    presets = {"small": {}, "large": {"width": 10, "rate": 0.1}}
    settings = parse_settings(
        defaults, presets, "", lambda s: None, ["--preset", "large", "--rate", "0.2", "--flag", "yes"]
    )
    assert settings == {"preset": "large", "width": 10, "rate": 0.2, "flag": True}
    with pytest.raises(SystemExit):
        parse_settings(defaults, presets, "", lambda s: None, ["--flag", "maybe"])
    assert "--flag: expected true or false, got 'maybe'" in capsys.readouterr().err
    with pytest.raises(KeyError, match=r"preset small names unknown settings \['height'\]"):
        parse_settings(defaults, {"small": {"height": 2}}, "", lambda s: None, [])


@pytest.mark.parametrize("script", ["preprocess_nbody", "preprocess_qm9", "train_nbody", "train_qm9", "predict_qm9"])
def test_help_says_what_every_setting_is(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit):
        parse_settings(module.SETTINGS, getattr(module, "PRESETS", {}), "", module.check, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for key in module.SETTINGS:
        assert re.search(rf" --{key} \S+ [^(-]+", text), f"{key} has no comment"


def test_help_shows_what_presets_change(capsys):
    with pytest.raises(SystemExit):
        parse_settings(
            {"preset": "small", "width": 1}, {"small": {}, "large": {"width": 10}}, "", lambda s: None, ["--help"]
        )
    assert "(default 1, large: 10)" in capsys.readouterr().out


@dataclass
class NestedBatch:
    features: dict[str, torch.Tensor]
    toy: ToyBatch
    size: int
    weights: torch.Tensor | None = None


def test_batches_come_apart_and_together():
    """For CUDA graphs, which `on_device.py` tests; layouts of batches with the same shapes are equal."""
    x, y, z = torch.arange(3), torch.ones(2, 4), torch.zeros(2)
    tensors, layout = take_apart(NestedBatch({"0": x}, ToyBatch(y, z), 5))
    assert [id(tensor) for tensor in tensors] == [id(x), id(y), id(z)]
    together = put_together(layout, iter([z, x, y]))
    assert together.features["0"] is z and together.toy.x is x and together.toy.y is y
    assert together.size == 5 and together.weights is None
    same, *others = (
        take_apart(batch)[1]
        for batch in (
            NestedBatch({"0": y}, ToyBatch(x, x), 5),
            NestedBatch({"0": x}, ToyBatch(y, z), 6),
            NestedBatch({"1": x}, ToyBatch(y, z), 5),
            NestedBatch({"0": x}, ToyBatch(y, z), 5, weights=z),
        )
    )
    assert same == layout and hash(same) == hash(layout)
    assert layout not in others


@pytest.mark.parametrize(
    "device, settings, message",
    [
        ("cpu", {}, "cuda_graphs needs a GPU, got the CPU"),
        ("cuda", {"accumulate": 2}, "expected 1 accumulate, got 2"),
        ("cuda", {"workers": 2}, "expected 0 workers, got 2"),
        ("cuda", {}, "expected 1 processes, got 3"),
    ],
)
def test_where_there_are_no_cuda_graphs(device, settings, message, monkeypatch):
    monkeypatch.setattr("se3_transformer.runtime.cuda_graphs.world_size", lambda: 3 if "processes" in message else 1)
    settings = {"cuda_graphs": True, "accumulate": 1, "workers": 0, **settings}
    with pytest.raises(ValueError, match=message):
        check_cuda_graphs(settings, torch.device(device))
    check_cuda_graphs(settings | {"cuda_graphs": False}, torch.device(device))


FREED = """
import ctypes, os, resource, sys
from se3_transformer.runtime.script import keep_freed_memory

assert keep_freed_memory() == (sys.argv[1] == "kept")
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (2**24, 2**23, 2**24):
        block = libc.malloc(size)
        ctypes.memset(block, 1, size)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    faults = {}
    for kind, more in (("kept", {}), ("as told", {"MALLOC_MMAP_THRESHOLD_": "65536"})):
        command = [sys.executable, "-c", FREED, kind]
        done = subprocess.run(command, cwd=ROOT, env=environment | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        faults[kind] = int(done.stdout)
    assert faults["kept"] < 100 < 5000 < faults["as told"]
