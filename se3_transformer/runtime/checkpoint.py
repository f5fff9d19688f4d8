"""Checkpoints: flat files of tensors and plain values, written whole or not at all."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write `content` (tensors and plain values) to `path` so that a reader finds the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict:
    """What `save_checkpoint` wrote; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: truncated, or not a checkpoint of tensors and plain values.
    """
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict, got {type(content).__name__}")
    return content
