"""What code written for the known package imports from this place."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from se3_transformer.model.fiber import degree_to_dim
from se3_transformer.runtime.distributed import is_main

__all__ = [
    "aggregate_residual",
    "degree_to_dim",
    "get_local_rank",
    "increase_l2_fetch_granularity",
    "init_distributed",
    "rank_zero_only",
    "seed_everything",
    "str2bool",
    "to_cuda",
    "unfuse_features",
    "using_tensor_cores",
]


def aggregate_residual(feats1: dict[str, Tensor], feats2: dict[str, Tensor], method: str) -> dict[str, Tensor]:
    """feats2 with feats1 added ('add', 'sum') or as further channels ('cat', 'concat'), for each degree of both."""
    if method not in ("add", "sum", "cat", "concat"):
        raise ValueError(f"method must be 'add', 'sum', 'cat' or 'concat', got {method!r}")

    def joined(feature: Tensor, other: Tensor) -> Tensor:
        return feature + other if method in ("add", "sum") else torch.cat([feature, other], dim=1)

    return {degree: joined(x, feats1[degree]) if degree in feats1 else x for degree, x in feats2.items()}


def unfuse_features(features: Tensor, degrees: list[int]) -> dict[str, Tensor]:
    """(…, C, sum of 2l+1) -> {'l': (…, C, 2l+1)}"""
    parts = features.split([degree_to_dim(degree) for degree in degrees], dim=-1)
    return {str(degree): part for degree, part in zip(degrees, parts, strict=True)}


def str2bool(value: bool | str) -> bool:
    """The value of a yes-or-no flag, as a `type` for argparse."""
    if isinstance(value, bool):
        return value
    if value.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if value.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected yes or no, got {value!r}")


def to_cuda(value: Any) -> Any:
    """Tensors, graphs, and tuples, lists and dicts of them on the current CUDA device."""
    if isinstance(value, tuple | list):
        return type(value)(to_cuda(item) for item in value)
    if isinstance(value, dict):
        return {key: to_cuda(item) for key, item in value.items()}
    return value.to(torch.device("cuda", torch.cuda.current_device()))


def using_tensor_cores(amp: bool) -> bool:
    """Whether there is a CUDA device with tensor cores for products in half (`amp`) or single precision."""
    major, _ = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return major >= 8 or (amp and major >= 7)


def get_local_rank() -> int:
    """Number of this process on its machine, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def init_distributed() -> bool:
    """Join the processes that a launcher started, if there are several; returns whether there are."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(get_local_rank())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return True


def rank_zero_only(function: Callable) -> Callable:
    """The function on the main process, nothing on the others."""

    @wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) if is_main() else None

    return wrapper


def seed_everything(seed: int | str) -> None:
    """Seed the random numbers of Python, NumPy and torch."""
    random.seed(int(seed))
    np.random.seed(int(seed))
    torch.manual_seed(int(seed))


def increase_l2_fetch_granularity() -> None:
    """Nothing: a setting of the GPU that made the known package faster, and that nothing here profits from."""
