"""Files that several processes may want: replaced at once, or held by one process alone.

Neither NumPy nor torch: importing this file is quick.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from filelock import FileLock, Timeout


class RunFiles(NamedTuple):
    """Where a training run leaves what it is known by."""

    last: Path  # state to go on from; the one before it is kept beside it
    best: Path  # weights of the best epoch
    log: Path  # directory for TensorBoard and `log.jsonl`


def run_files(data_dir: str | Path, run_name: str, runs: str | Path = "runs") -> RunFiles:
    """The files of a run: DATA_DIR/NAME_last.pt, DATA_DIR/NAME_best.pt, RUNS/NAME."""
    return RunFiles(
        Path(data_dir) / f"{run_name}_last.pt", Path(data_dir) / f"{run_name}_best.pt", Path(runs) / run_name
    )


@contextmanager
def exclusive(path: str | Path, problem: str = "another process is writing it; wait until it has ended") -> Iterator:
    """Hold the lock of what is at `path` (an empty file beside it); it is released when the process ends.

    Args:
        path: what is to be held; its directory is made if it is not there.
        problem: what to say after the path if another process holds it.

    Raises:
        BlockingIOError: another process holds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(f"{path}: {problem}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an OSError that names no file, like that of a full disk, the name of this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_file(path: str | Path, write: Callable[[BinaryIO], object], keep: Path | None = None) -> None:
    """Create or replace a file at once: readers see the old content or the new, also after a crash.

    One process at a time may write the same file (see `exclusive`).

    Args:
        path: the file.
        write: called with the open file.
        keep: rename the file that is there to this, instead of replacing it; between the two renames there is none.

    Raises:
        OSError: the disk is full, or the directory cannot be written; the old file is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.writing")  # what a killed process left is overwritten
    try:
        with naming(path), temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            path.replace(keep)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make names of files in a directory outlast a crash of the machine, where a system can open directories."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
