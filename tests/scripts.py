"""Running the project's scripts in tests."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PATIENCE = 600  # seconds: on a busy machine anything may take long, and only what hangs takes as long as this


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


def time_of(path: Path) -> int:
    """When a file was written (ns), 0 if there is none: between two renames there is none for a moment."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def wait_for_file(path: Path, process: subprocess.Popen, after: int = 0) -> None:
    """Wait until a process has written a file, later than this `time_of` it."""
    deadline = time.monotonic() + PATIENCE
    while time_of(path) <= after:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.005)


# Goes before the code of a process of its own, which then kills itself at the k-th call of a function.
KILL_AT = """
import os, signal

def kill_at(owner, name, calls):
    original = getattr(owner, name)

    def killer(*args, **kwargs):
        nonlocal calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, killer)
"""
