"""The record of a run: TensorBoard and a file of JSON lines with the same numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.tensorboard import SummaryWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = "log.jsonl"


class RunLog:
    """Writes into one directory; records of a resumed run that lie after the step it goes on from are dropped.

    Each line of `log.jsonl` is {"step": …, "group/name": value, …}.

    Args:
        log_dir: directory of the run.
        step: optimiser steps taken so far.
    """

    def __init__(self, log_dir: str | Path, step: int):
        self.path = Path(log_dir) / LINES
        self._writer = SummaryWriter(str(log_dir), purge_step=step + 1)
        kept = [line for line in self._whole_lines() if json.loads(line)["step"] <= step]
        self._file = self.path.open("w")
        self._file.writelines(kept)
        self._file.flush()

    def _whole_lines(self) -> list[str]:
        """The lines that are there, without one that a killed process did not finish."""
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("}\n")]

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Record numbers under `group/name`."""
        tagged = {f"{group}/{name}": value for name, value in values.items()}
        for tag, value in tagged.items():
            self._writer.add_scalar(tag, value, step)
        self._file.write(json.dumps({"step": step} | tagged) + "\n")
        self._file.flush()

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Record a figure (TensorBoard only)."""
        self._writer.add_figure(tag, figure, step)

    def outcome(self, settings: Mapping[str, object], metrics: Mapping[str, float], step: int) -> None:
        """Record the settings of the run with its final metrics."""
        plain = {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in settings.items()}
        tagged = {f"final/{name}": value for name, value in metrics.items()}
        self._writer.add_hparams(plain, tagged, run_name=".", global_step=step)
        self._file.write(json.dumps({"step": step, "settings": plain} | tagged) + "\n")
        self.close()

    def close(self) -> None:
        self._writer.close()
        self._file.close()
