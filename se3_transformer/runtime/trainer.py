"""The training loop: optimiser, schedule, moving average of weights, logging, best and last checkpoint, resume."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from se3_transformer.runtime.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


class Task(Protocol):
    """What a trainer has to know of an experiment."""

    def batches(self, epoch: int) -> Sequence:
        """The training batches of an epoch; the same for the same epoch, whatever happened before."""

    def loss(self, model: nn.Module, batch: object) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, and further scalars to log."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Errors on the validation set; `selection` among them chooses the best epoch, lower is better."""


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; the message says where, and where the state before that step was saved."""


class Trainer:
    """Trains a model on a task.

    Args:
        model: the network.
        task: the experiment.
        settings: epochs, batch_size, learning_rate, final_learning_rate, warmup_steps, weight_decay, max_grad_norm,
            ema_decay (0: none), and whatever identifies the run.
        last_path: file of the state to resume from, written after every epoch.
        best_path: file of the best weights.
        log_dir: directory for TensorBoard.
        describe: further content of the best checkpoint (fibers, statistics, …).
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
    ):
        self.model, self.task, self.settings = model, task, dict(settings)
        self.last_path, self.best_path, self.describe = Path(last_path), Path(best_path), describe
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
        decay = s["ema_decay"]
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        self.epoch, self.step_in_epoch, self.best = 0, 0, math.inf
        self.history: list[dict[str, float]] = []
        if self.last_path.exists():
            self._resume()
        self.writer = SummaryWriter(str(log_dir), purge_step=self.step)

    @property
    def step(self) -> int:
        """Optimiser steps taken so far."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is validated and kept: the moving average of weights, once that has begun."""
        return self.averaged.module if self.averaged is not None and self.averaged.n_averaged > 0 else self.model

    def train(self) -> None:
        """Train to the last epoch. Ctrl-C, at the end of a step, and a loss that is not finite save the state first.

        Raises:
            KeyboardInterrupt, NonFiniteLoss
        """
        with deferred_interrupt() as interrupted:
            while self.epoch < self.settings["epochs"]:
                try:
                    facts = self._train_epoch(interrupted)
                except (KeyboardInterrupt, NonFiniteLoss):
                    self._save_last()
                    raise
                self._finish_epoch(facts)

    def _train_epoch(self, interrupted: Event) -> dict[str, float]:
        """One epoch, or what is left of it. Returns means of the logged scalars, throughput among them."""
        self.model.train()
        batches = self.task.batches(self.epoch)
        begin, first = time.perf_counter(), self.step_in_epoch
        sums: dict[str, Tensor] = {}
        progress = tqdm(
            range(first, len(batches)),
            desc=f"epoch {self.epoch + 1}/{self.settings['epochs']}",
            disable=None,
            leave=False,
        )
        for index in progress:
            if interrupted.is_set():
                raise KeyboardInterrupt
            loss, scalars = self.task.loss(self.model, batches[index])
            if not torch.isfinite(loss):
                raise NonFiniteLoss(
                    f"loss is {loss.item()} in epoch {self.epoch + 1}, batch {index}, step {self.step}; "
                    f"the state before this step is in {self.last_path}. Lower the learning rate or max_grad_norm"
                )
            self.optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["max_grad_norm"])
            self.optimizer.step()
            self.scheduler.step()
            if self.averaged is not None and self.step >= self.settings["warmup_steps"]:
                self.averaged.update_parameters(self.model)
            self.step_in_epoch += 1
            for name, value in {"loss": loss, "gradient_norm": norm, **scalars}.items():
                sums[name] = sums.get(name, 0) + value.detach()
        done = len(batches) - first
        facts = {name: (value / done).item() for name, value in sums.items()}
        facts["seconds"] = time.perf_counter() - begin
        facts["steps_per_second"] = done / facts["seconds"]
        return facts

    def _finish_epoch(self, facts: dict[str, float]) -> None:
        """Validate, log, keep the best, save the state."""
        self.evaluated_model.eval()
        with torch.no_grad():
            errors = self.task.validate(self.evaluated_model)
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        rate = self.scheduler.get_last_lr()[0]
        self.history.append(
            {"epoch": self.epoch, "learning_rate": rate, **facts, **{f"val_{k}": v for k, v in errors.items()}}
        )
        for name, value in facts.items():
            self.writer.add_scalar(f"train/{name}", value, self.step)
        self.writer.add_scalar("train/learning_rate", rate, self.step)
        for name, value in errors.items():
            self.writer.add_scalar(f"validation/{name}", value, self.step)
        if errors["selection"] < self.best:
            self.best = errors["selection"]
            content = {**self.describe, "model": self.evaluated_model.state_dict(), "settings": self.settings}
            save_checkpoint(self.best_path, {**content, "epoch": self.epoch, "validation": errors})
        self._save_last()

    def _save_last(self) -> None:
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "best": self.best,
            "history": self.history,
        }
        save_checkpoint(self.last_path, state)

    def _resume(self) -> None:
        """Continue from the last state; raises CheckpointError if it was made with other settings."""
        state = load_checkpoint(self.last_path)
        changed = [
            f"{key} {state['settings'].get(key)} (now {value})"
            for key, value in self.settings.items()
            if state["settings"].get(key) != value
        ]
        if changed:
            raise CheckpointError(
                f"{self.last_path}: cannot be resumed, it was trained with {', '.join(changed)}. "
                "Give those settings again, take another --run, or delete the file to start anew"
            )
        self.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.best, self.history = state["best"], state["history"]


@contextmanager
def deferred_interrupt() -> Iterator[Event]:
    """While it lasts, Ctrl-C sets the event that this yields instead of breaking into whatever is being computed."""
    interrupted = Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield interrupted
        return
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def cosine_schedule(num_steps: int, warmup_steps: int, final: float) -> Callable[[int], float]:
    """Factor of the learning rate at each step: linear warm-up to 1, then a half cosine down to `final`."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
