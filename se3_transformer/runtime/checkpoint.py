"""Checkpoints: flat files of tensors and plain values, written whole or not at all."""

from __future__ import annotations

import io
import sys
import zipfile
from copy import deepcopy
from pathlib import Path

import torch

from se3_transformer.runtime.files import write_file
from se3_transformer.runtime.script import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def save_checkpoint(path: str | Path, content: dict, keep_previous: bool = False) -> None:
    """Write `content` (tensors and plain values) to `path` so that a reader never finds half a file.

    Args:
        path: the file.
        content: what to save.
        keep_previous: rename the file that is there to `previous_path(path)` instead of replacing it; between the two
            renames there is none at `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # into a file on a full disk, torch.save fails with an internal error
    torch.save(content, buffer)
    write_file(path, lambda file: file.write(buffer.getbuffer()), keep=previous_path(path) if keep_previous else None)


def load_checkpoint(path: str | Path) -> dict:
    """What `save_checkpoint` wrote, on the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: truncated, or not a checkpoint of tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch does not compare checksums
                raise CheckpointError(f"{path}: not a readable checkpoint ({damaged} in it is damaged)")
        # Mapped: older versions of torch believe the sizes in a file and read beyond its end, but not of a mapped one.
        content = deepcopy(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except CheckpointError:
        raise
    except FileNotFoundError:
        message = f"{path}: no such checkpoint; a training writes its first one after its first validation"
        raise FileNotFoundError(message) from None
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict, got {type(content).__name__}")
    return content


def load_latest_checkpoint(path: str | Path) -> tuple[dict, Path] | None:
    """The checkpoint at `path`, or the one before it where that is missing or damaged, and its file; None: neither.

    A damaged file is named on stderr.

    Raises:
        CheckpointError: there are files, but none can be read.
    """
    error = None
    for candidate in (Path(path), previous_path(path)):
        try:
            content = load_checkpoint(candidate)
        except FileNotFoundError:
            continue
        except CheckpointError as failure:
            print(f"warning: {failure}", file=sys.stderr)
            error = error or failure
            continue
        if error:
            print(f"warning: going on from the one before it, {candidate}", file=sys.stderr)
        return content, candidate
    if error:
        raise CheckpointError(f"{error}. There is no other to go on from; to start anew, {how_to_start_anew(path)}")
    return None


def how_to_start_anew(path: str | Path) -> str:
    """What to delete so that a run does not go on from the checkpoint at `path`."""
    return f"delete {path} and {previous_path(path)}"


def previous_path(path: str | Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    path = Path(path)
    return path.with_name(f"{path.stem}.previous{path.suffix}")
