"""The training loop: optimiser, schedule, moving average of weights, logging, best and last checkpoint, resume."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from se3_transformer.runtime.checkpoint import (
    CheckpointError,
    how_to_start_anew,
    load_latest_checkpoint,
    save_checkpoint,
)
from se3_transformer.runtime.distributed import (
    any_process,
    barrier,
    is_main,
    rank,
    sum_over_processes,
    world_size,
)
from se3_transformer.runtime.log import RunLog
from se3_transformer.runtime.script import Stopped, UserError
from se3_transformer.runtime.settings import require, require_seed

PRECISIONS = {  # what products are computed in; weights and sums stay float32
    "float32": None,
    "tf32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
WITHOUT_INFLUENCE = {  # settings that do not change what is learned: a run may go on with others
    "device",
    "threads",
    "workers",
    "log_every",
    "save_every",
    "max_minutes",
}
OVERFLOWS = 50  # steps in a row that the scaler of float16 may skip, until its scale fits
WARMUP_OF_BENCHMARK = 5  # steps that are not timed


class Task(Protocol):
    """What a trainer has to know of an experiment."""

    def batches(self, epoch: int) -> Sequence[Tensor]:
        """The training batches of an epoch, a row for each example: the same for the same epoch, whatever was before.

        A batch is what one optimiser step sees, over all processes.
        """

    def load(self, examples: Tensor) -> Any:
        """The batch with these rows: something with the method `to(device, non_blocking)`, as tensors and graphs have
        it, or a tuple of such; where it lies on the CPU and goes to a GPU, `pin_memory()` is called first, if there is
        such a method.
        """

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the examples of a batch, and further means to log."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Errors on the validation set; `selection` among them chooses the best epoch, lower is better.

        Every process evaluates its share and gets the same result.
        """

    def figures(self, model: nn.Module) -> dict:
        """Figures to record after each validation, by name; the main process alone is asked."""


class NonFiniteLoss(UserError):
    """Loss or gradient is NaN or infinite; the message says where, and which saved state comes before that step."""


class OutOfTime(Stopped):
    """The time that the run was given is over; its state is saved."""


class MovingAverage(AveragedModel):
    """Exponential moving average of the weights of a model.

    As `AveragedModel`, which however copies its number of updates to the device in each one, and waits for it.

    Args:
        model: the model, on its device.
        decay: the share of what was before that an update keeps.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self._average = get_ema_multi_avg_fn(decay)

    def update_parameters(self, model: nn.Module) -> None:
        if self.n_averaged == 0:
            super().update_parameters(model)
            return
        self._average([*self.module.parameters()], [*model.parameters()], self.n_averaged)
        with torch.no_grad():
            for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
                average.copy_(buffer)
        self.n_averaged += 1


class _Parts(Dataset):
    """What `Task.load` makes of some examples, in the worker processes of a `DataLoader`."""

    def __init__(self, task: Task):
        self.task = task

    def __getitem__(self, examples: Tensor) -> Any:
        return self.task.load(examples)


class Trainer:
    """Trains a model on a task.

    With several processes (see `runtime.distributed`) each takes its share of every batch, so that results do not
    depend on their number, nor on `accumulate`, but for rounding. A run that was killed goes on from its last saved
    state, and ends with the same bits as one that was not.

    Args:
        model: the network.
        task: the experiment.
        settings: what decides the result: epochs, learning_rate, final_learning_rate, warmup_steps, weight_decay,
            max_grad_norm, ema_decay (0: none), accumulate (parts of a batch that are computed one after the other),
            precision (see `PRECISIONS`), validate_every (epochs between two validations; the last is always
            validated), and whatever else identifies the run.
        last_path: file of the state to resume from; the one before it is kept beside it.
        best_path: file of the best weights.
        log_dir: directory for TensorBoard and `log.jsonl`.
        describe: further content of the best checkpoint (fibers, statistics, …).
        device: where to train.
        workers: processes that load batches; 0: this one.
        log_every: steps between two records; on a GPU also between two looks at whether the loss is finite.
        save_every: save the state after this many steps too, not only after every epoch; 0: do not.
        deadline: `time.monotonic()` at which to stop, with the state saved. A validation that would end later, judging
            from the one before it, is left to the next time.

    Raises:
        CheckpointError: the saved state cannot be read, or was made with other settings.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: dict,
        last_path: str | Path,
        best_path: str | Path,
        log_dir: str | Path,
        describe: dict,
        device: torch.device | str = "cpu",
        workers: int = 0,
        log_every: int = 50,
        save_every: int = 0,
        deadline: float = math.inf,
    ):
        self.device = torch.device(device)
        self.model, self.task, self.settings = model.to(self.device), task, dict(settings)
        self.last_path, self.best_path, self.describe = Path(last_path), Path(best_path), describe
        self.workers, self.log_every, self.save_every = workers, log_every, save_every
        self.deadline, self._validation_seconds = deadline, 0.0
        s = self.settings
        self.steps_per_epoch = len(task.batches(0))
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": s["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=s["learning_rate"], fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            cosine_schedule(
                s["epochs"] * self.steps_per_epoch,
                s["warmup_steps"],
                s["final_learning_rate"] / s["learning_rate"],
            ),
        )
        self.averaged = MovingAverage(model, s["ema_decay"]) if s["ema_decay"] else None
        self.autocast_dtype = PRECISIONS[s["precision"]]
        torch.set_float32_matmul_precision("high" if s["precision"] == "tf32" else "highest")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=s["precision"] == "float16")
        self._overflows, self._allowed_overflows = 0, OVERFLOWS if self.scaler.is_enabled() else 0
        self.distributed = DistributedDataParallel(model) if world_size() > 1 else model
        self.epoch, self.step_in_epoch, self.best = 0, 0, math.inf
        self.facts = _EpochFacts()
        self.window: list[dict[str, float]] = []  # steps since the last record
        self.history: list[dict[str, float]] = []
        self._pending: list[tuple[int, Tensor]] = []  # numbers of steps that are still on the device
        self._last_is_whole = True  # else the next state to be saved must not push out the one before it
        self._log_lines = 0
        latest = load_latest_checkpoint(self.last_path)
        if latest is not None:
            state, path = latest
            self._resume(state, path)
            self._last_is_whole = path == self.last_path
        self.log = RunLog(log_dir, self.step, self._log_lines) if is_main() else None

    @property
    def step(self) -> int:
        """Optimiser steps taken so far."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is validated and kept: the moving average of weights, once that has begun."""
        return self.averaged.module if self.averaged is not None and self.averaged.n_averaged > 0 else self.model

    def train(self) -> None:
        """Train to the last epoch. An interrupt (at the end of a step), the end of the time that the run was given, and
        a loss that is not finite save the state first.

        Raises:
            KeyboardInterrupt, OutOfTime, NonFiniteLoss
        """
        with deferred_interrupt() as interrupted:
            while self.epoch < self.settings["epochs"]:
                try:
                    self._train_epoch(interrupted)
                    self._finish_epoch()
                    if any_process(interrupted.is_set(), self.device):
                        raise KeyboardInterrupt
                except (KeyboardInterrupt, OutOfTime, NonFiniteLoss) as stop:
                    # On a GPU, steps that follow the one with a loss that is not finite have been taken already.
                    if self.device.type == "cpu" or not isinstance(stop, NonFiniteLoss):
                        self._save_last()
                    if self.log is not None:
                        self.log.close()
                    raise
        barrier()  # others must not read the best weights before they are written

    def benchmark(self, steps: int) -> float:
        """Examples per second over some training steps after a warm-up, all processes together; nothing is saved.

        Where CUDA graphs are recorded, the warm-up is the same steps, so that all of them are.
        """
        self.model.train()
        epoch = self.task.batches(0)
        warmup = steps if self.settings.get("cuda_graphs") else WARMUP_OF_BENCHMARK
        batches = [epoch[i % len(epoch)] for i in (*range(warmup), *range(steps))]
        progress = tqdm(zip(batches, self._steps(batches)), total=len(batches), desc="benchmark", **_bar_options())
        for index, (_, parts) in enumerate(progress):
            if index == warmup:
                self._synchronize()
                began = time.perf_counter()
            self._step(index, parts)
        self._synchronize()
        return sum(len(batch) for batch in batches[warmup:]) / (time.perf_counter() - began)

    def _train_epoch(self, interrupted: Event) -> None:
        """One epoch, or what is left of it."""
        self.model.train()
        first, batches = self.step_in_epoch, self.task.batches(self.epoch)
        title = f"epoch {self.epoch + 1}/{self.settings['epochs']}"
        progress = tqdm(
            self._steps(batches[first:]), desc=title, initial=first, total=len(batches), leave=False, **_bar_options()
        )
        began, seconds = time.perf_counter(), self.facts.seconds
        for index, parts in enumerate(progress, start=first):
            if self._may_stop_now():
                if any_process(interrupted.is_set(), self.device):
                    raise KeyboardInterrupt
                self._stop_if_late()
            self._step(index, parts)
            self.step_in_epoch += 1
            self.facts.examples += len(batches[index])
            if self.step % self.log_every == 0:
                self._read_pending()
                self._log_window()
            self.facts.seconds = seconds + time.perf_counter() - began
            if self.save_every and self.step % self.save_every == 0:
                self._save_last()
        self._read_pending()
        self.facts.seconds = seconds + time.perf_counter() - began

    def _steps(self, batches: Sequence[Tensor]) -> Iterator[Iterator[tuple[Any, float]]]:
        """For each batch its parts that this process computes: pairs (batch, weight), see `_share`."""
        plan = [self._share(batch) for batch in batches]
        loader = DataLoader(
            _Parts(self.task),
            sampler=[examples for parts in plan for examples, _ in parts],
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or each loader would draw from the generator whose state is saved
        )
        loaded = iter(loader)
        for parts in plan:
            yield ((_moved(next(loaded), self.device), weight) for _, weight in parts)

    def _share(self, batch: Tensor) -> list[tuple[Tensor, float]]:
        """Parts of a batch that this process computes, one after the other.

        The weights are such that the mean over processes of the weighted sum of the parts' means is the mean over the
        batch. Where a batch is too small for all, a process computes an example with weight 0: all must take part.
        """
        world = world_size()
        parts = batch.tensor_split(world * self.settings["accumulate"])[rank() :: world]
        return [(part if len(part) else batch[:1], world * len(part) / len(batch)) for part in parts]

    def _step(self, index: int, parts: Iterator[tuple[Any, float]]) -> None:
        """One optimiser step."""
        self.optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        last = self.settings["accumulate"] - 1
        for number, (batch, weight) in enumerate(parts):
            network = self.distributed
            with network.no_sync() if isinstance(network, DistributedDataParallel) and number < last else nullcontext():
                with torch.autocast(
                    self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None
                ):
                    loss, scalars = self.task.loss(network, batch)
                self.scaler.scale(weight * loss).backward()
            for name, value in {"loss": loss, **scalars}.items():
                totals[name] = totals.get(name, 0) + weight * value.detach().float()
        self.scaler.unscale_(self.optimizer)
        totals["gradient_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["max_grad_norm"])
        self._names = list(totals)
        self._pending.append((index, torch.stack(list(totals.values()))))
        if self.device.type == "cpu":  # elsewhere, looking at values would hold up the device
            self._read_pending()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.averaged is not None and self.step >= self.settings["warmup_steps"]:
            self.averaged.update_parameters(self.model)

    def _read_pending(self) -> None:
        """Take the numbers of past steps from the device.

        Raises:
            NonFiniteLoss: the loss or, where no scaler looks after it, the gradient of a step is not finite.
        """
        if not self._pending:
            return
        indices, values = zip(*self._pending)
        self._pending = []
        means = (sum_over_processes(torch.stack(values)) / world_size()).tolist()
        for index, row in zip(indices, means):
            numbers = dict(zip(self._names, row))
            overflow = not math.isfinite(numbers["gradient_norm"])
            self._overflows = self._overflows + 1 if overflow else 0
            if not math.isfinite(numbers["loss"]) or self._overflows > self._allowed_overflows:
                raise NonFiniteLoss(self._where(index, numbers))
            if overflow:  # the scaler skips this step
                del numbers["gradient_norm"]
            self.facts.steps.append(numbers)
            self.window.append(numbers)

    def _where(self, index: int, numbers: dict[str, float]) -> str:
        """Message about the numbers of a step that are not finite."""
        values = ", ".join(f"{name} {numbers[name]}" for name in ("loss", "gradient_norm"))
        saved = self.device.type == "cpu" or self.last_path.exists()
        state = f"the state before it is in {self.last_path}" if saved else "no state was saved before it"
        return (
            f"{values} in epoch {self.epoch + 1}, batch {index}, step {self.epoch * self.steps_per_epoch + index}; "
            f"{state}. Lower learning_rate or max_grad_norm, or look at the examples of that batch"
        )

    def _may_stop_now(self) -> bool:
        """Whether to look if the run shall end here: asking other processes or a GPU takes time."""
        return (self.device.type == "cpu" and world_size() == 1) or self.step % self.log_every == 0

    def _stop_if_late(self, needed: float = 0.0) -> None:
        """Raise OutOfTime if less than so many seconds are left."""
        if any_process(time.monotonic() + needed > self.deadline, self.device):
            raise OutOfTime("out of time: the same command goes on")

    def _log_window(self) -> None:
        """Record the means since the last record."""
        if self.log is not None and self.window:
            means = _means(self.window)
            means["learning_rate"] = float(self.scheduler.get_last_lr()[0])
            self.log.scalars("train", means, self.step)
        self.window = []

    def _finish_epoch(self) -> None:
        """Validate if it is time, log, keep the best, save the state, print a line."""
        facts, epoch = self.facts.means(), self.epoch + 1
        facts["learning_rate"] = float(self.scheduler.get_last_lr()[0])
        errors = {}
        if epoch % self.settings["validate_every"] == 0 or epoch == self.settings["epochs"]:
            self._stop_if_late(self._validation_seconds)
            errors = self._validate(epoch)
        self.epoch, self.step_in_epoch, self.facts = epoch, 0, _EpochFacts()
        self.history.append({"epoch": epoch, **facts, **{f"val_{k}": v for k, v in errors.items()}})
        if self.log is not None:
            self.log.scalars("epoch", facts, self.step)
            if errors:
                self._log_validation(self.log, errors)
        if errors and errors["selection"] < self.best:
            self.best = errors["selection"]
            content = {**self.describe, "model": self.evaluated_model.state_dict(), "settings": self.settings}
            if is_main():
                save_checkpoint(self.best_path, {**content, "epoch": epoch, "validation": errors})
        self._save_last()
        if is_main():
            validation = [f"validation {name} {error:.4g}" for name, error in errors.items() if name != "selection"]
            shown = [f"epoch {epoch}/{self.settings['epochs']}", f"loss {facts['loss']:.4g}", *validation]
            print("   ".join(shown), f"  {facts['seconds']:.0f} s", flush=True)  # at once into a file, too

    @torch.no_grad()
    def _validate(self, epoch: int) -> dict[str, float]:
        began = time.monotonic()
        self.evaluated_model.eval()
        errors = self.task.validate(self.evaluated_model)
        self._validation_seconds = time.monotonic() - began
        if not math.isfinite(errors["selection"]):
            raise NonFiniteLoss(f"the validation error after epoch {epoch} is {errors}; lower learning_rate")
        return errors

    @torch.no_grad()
    def _log_validation(self, log: RunLog, errors: dict[str, float]) -> None:
        log.scalars("validation", errors, self.step)
        for name, figure in self.task.figures(self.evaluated_model).items():
            log.figure(f"validation/{name}", figure, self.step)

    @property
    def best_epoch(self) -> dict[str, float]:
        """What the history says of the epoch with the lowest validation error."""
        validated = [facts for facts in self.history if "val_selection" in facts]
        return min(validated, key=lambda facts: facts["val_selection"])

    def _save_last(self) -> None:
        self._read_pending()
        if self.log is None:  # of the main process alone
            return
        on_gpu = self.device.type == "cuda"
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "facts": asdict(self.facts),
            "window": self.window,
            "best": self.best,
            "history": self.history,
            "log_lines": self.log.lines,
        }
        save_checkpoint(self.last_path, state, keep_previous=self._last_is_whole)
        self._last_is_whole = True

    def _resume(self, state: dict, path: Path) -> None:
        """Continue from a saved state; raises CheckpointError if it is none, or was made with other settings."""
        known = state.get("settings", {})
        changed = [
            f"{key} {known.get(key)} (now {value})" for key, value in self.settings.items() if known.get(key) != value
        ]
        if changed:
            raise CheckpointError(
                f"{path}: cannot be resumed, it was trained with {', '.join(changed)}. Give those settings again, "
                f"take another --run_name, or, to start anew, {how_to_start_anew(self.last_path)}"
            )
        try:
            self._set_state(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: a state that does not fit this run ({type(error).__name__}: {error})"
            ) from error

    def _set_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.facts, self.window = _EpochFacts(**state["facts"]), state["window"]
        self.best, self.history, self._log_lines = state["best"], state["history"], state["log_lines"]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        barrier()


@dataclass
class _EpochFacts:
    """What has been measured in an epoch so far."""

    steps: list[dict[str, float]] = field(default_factory=list)  # numbers of each step
    examples: int = 0
    seconds: float = 0.0

    def means(self) -> dict[str, float]:
        """Means over steps, and seconds and throughput."""
        return _means(self.steps) | {"seconds": self.seconds, "examples_per_second": self.examples / self.seconds}


def _moved(batch: Any, device: torch.device) -> Any:
    """A batch, or each part of one that is a tuple, on a device."""
    if hasattr(batch, "to"):
        return batch.to(device, non_blocking=True)
    return tuple(part.to(device, non_blocking=True) for part in batch)


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each number over the rows that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: sum(column) / len(column) for name, column in values.items()}


def _bar_options() -> dict:
    """Options of a tqdm bar: silent on other processes, and where there is no terminal."""
    return {"disable": None if is_main() else True}


@contextmanager
def deferred_interrupt() -> Iterator[Event]:
    """While it lasts, Ctrl-C and SIGTERM set the event that this yields instead of breaking into a computation.

    The second one breaks in all the same.
    """
    interrupted = Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield interrupted
        return

    def handle(*_):
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, handle) for number in signals]
    try:
        yield interrupted
    finally:
        for number, handler in zip(signals, previous):
            signal.signal(number, handler)


def check_training_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless the settings that a `Trainer` knows make sense."""
    require(settings, dict.fromkeys(("epochs", "batch_size", "accumulate", "validate_every", "log_every"), 1))
    require_seed(settings, "seed")
    not_negative = ("warmup_steps", "final_learning_rate", "weight_decay", "threads", "workers")
    require(settings, dict.fromkeys((*not_negative, "save_every", "max_minutes"), 0))
    for key in ("learning_rate", "max_grad_norm"):
        if not 0 < settings[key] < math.inf:
            raise ValueError(f"{key} must be positive, got {settings[key]}")
    if not 0 <= settings["ema_decay"] < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {settings['ema_decay']}")
    if settings["precision"] not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {settings['precision']!r}")


def cosine_schedule(num_steps: int, warmup_steps: int, final: float) -> Callable[[int], float]:
    """Factor of the learning rate at each step: linear warm-up to 1, then a half cosine down to `final`."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
