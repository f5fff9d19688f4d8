"""Running the project's scripts in tests."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str

    def assert_refused(self, *parts: str) -> None:
        """The script ended with a message that has every part, not with a traceback."""
        assert self.returncode != 0 and "Traceback" not in self.stderr, self.stderr
        missing = [part for part in parts if part not in self.stderr]
        assert not missing, f"{missing} not in {self.stderr!r}"


def run(script: str, *flags: str, cwd: Path) -> Done:
    """Run a script as the command line would, but in this process: importing torch anew takes longer than training."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *flags])
        threads = torch.get_num_threads()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            err.write(stop.code if isinstance(stop.code, str) else "")
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision("highest")
    return Done(code, out.getvalue(), err.getvalue())


def start(*command: str, cwd: Path) -> subprocess.Popen:
    """A process of its own: `python` with these arguments, one thread each, with the project importable."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
