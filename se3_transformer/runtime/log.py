"""The record of a run: TensorBoard and a file of JSON lines with the same numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.tensorboard import SummaryWriter

from se3_transformer.runtime.files import naming, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = "log.jsonl"


class RunLog:
    """Writes into one directory; what a resumed run has recorded after the state that it goes on from is dropped.

    Each line of `log.jsonl` is {"step": …, "group/name": value, …}. The attribute `lines` counts them.

    Args:
        log_dir: directory of the run.
        step: optimiser steps taken so far.
        lines: lines of `log.jsonl` when the state was saved.
    """

    def __init__(self, log_dir: str | Path, step: int, lines: int):
        self.path = Path(log_dir) / LINES
        with naming(log_dir):
            self._writer = SummaryWriter(str(log_dir), purge_step=step + 1)
        kept = self.path.read_bytes().splitlines(keepends=True)[:lines] if self.path.exists() else []
        write_file(self.path, lambda file: file.writelines(kept))
        self.lines = len(kept)
        self._file = self.path.open("a")

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Record numbers under `group/name`."""
        tagged = {f"{group}/{name}": value for name, value in values.items()}
        with naming(self.path.parent):
            for tag, value in tagged.items():
                self._writer.add_scalar(tag, value, step)
        self._write({"step": step} | tagged)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Record a figure (TensorBoard only)."""
        self._writer.add_figure(tag, figure, step)

    def outcome(self, settings: Mapping[str, object], metrics: Mapping[str, float], step: int) -> None:
        """Record the settings of the run with its test errors."""
        plain = {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in settings.items()}
        tagged = {f"test/{name}": value for name, value in metrics.items()}
        self._writer.add_hparams(plain, tagged, run_name=".", global_step=step)
        self._write({"step": step, "settings": plain} | tagged)
        self.close()

    def _write(self, record: dict) -> None:
        with naming(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self.lines += 1

    def close(self) -> None:
        with naming(self.path.parent):
            self._writer.close()
        self._file.close()
