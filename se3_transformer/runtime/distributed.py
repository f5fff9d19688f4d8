"""One program on several processes, started by torchrun; without torchrun everything here is the identity."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from se3_transformer.runtime.files import RunFiles, exclusive


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields the device of this process.

    Args:
        device: "cpu", "cuda" (under torchrun the one of this process's local rank), "cuda:1", …, or "auto": cuda if
            there is any.

    Raises:
        ValueError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:NUMBER, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:NUMBER, got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected a device of this machine, got {device!r}, but torch finds no CUDA device")
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    if chosen.type == "cuda":
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched else 0)
        if chosen.index >= (count := torch.cuda.device_count()):
            raise ValueError(f"device: expected one of {count} CUDA devices, got {chosen}")
        torch.cuda.set_device(chosen)
    if not launched:
        yield chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 … world_size - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of a tensor over all processes, on every one of them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process."""
    if not dist.is_initialized():
        return flag
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)) > 0)


@contextmanager
def exclusive_run(files: RunFiles, device: torch.device) -> Iterator[None]:
    """Hold a run, its state and its log, for all processes together.

    Raises:
        BlockingIOError: other processes hold them; raised by the main process, the others end quietly.
    """
    with ExitStack() as held:
        error = None
        if is_main():
            problem = "another process is at this run; wait until it has ended, or take another --run_name"
            try:
                for path in (files.last, files.log):
                    held.enter_context(exclusive(path, problem))
            except BlockingIOError as raised:
                error = raised
        if any_process(error is not None, device):
            raise error or SystemExit(1)
        yield


def gather_shares(share: Tensor, total: int) -> Tensor:
    """Put together rows that were dealt out in turn: process r holds the rows r, r + world_size, … of `total`."""
    if not dist.is_initialized():
        return share
    world = world_size()
    rows = -(-total // world)  # the largest share
    padded = share.new_zeros(rows, *share.shape[1:])
    padded[: len(share)] = share
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded)
    return torch.stack(gathered, dim=1).flatten(0, 1)[:total]
