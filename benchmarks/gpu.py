"""Throughput and memory of the QM9 network, ours and the dense-basis yardstick (benchmarks/yardstick.py).

    python -m benchmarks.gpu                                                   # on a GPU, ten minutes at most
    python -m benchmarks.gpu --batch_sizes 240 --precisions bf16 --profile true
    python -m benchmarks.gpu --batch_sizes 240 --implementations ours --compile true
    python -m benchmarks.gpu --batch_sizes 240 --implementations ours --triton true --cuda_graphs true
    python -m benchmarks.gpu --batch_sizes 4 --num_layers 1 --num_channels 8 --num_heads 2 --molecules 16 --seconds 0.1

Made-up molecules of QM9's sizes, all on the device. A training step makes a batch of random molecules, runs forward and
backward, clips gradients and takes a step of AdamW; inference makes a batch and runs forward. Ours takes the cached
edge frames as in training, the yardstick makes its bases from positions (one small product, faster than reading them).
Molecules per millisecond are the median over blocks of steps, each between two synchronisations. Memory is the most
that lives in a step above molecules, parameters, gradients and optimiser state. With --cuda_graphs, training goes
through the same few batches again and again, after they have been recorded, and memory is not measured.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice

import torch
from easydict import EasyDict
from torch import nn

from benchmarks.measure import PRECISIONS, block_seconds, header, peak_bytes, precision, synchronize
from benchmarks.molecules import qm9_sized_molecules, synthetic_dataset
from benchmarks.yardstick import dense
from dataloader.qm9 import QM9Batch, QM9Dataset
from experiments.qm9 import build_network, run_network
from se3_transformer.model.layers.contraction import TRITON
from se3_transformer.runtime.cuda_graphs import Replayed, check_cuda_graphs
from se3_transformer.runtime.settings import parse_settings, require

SETTINGS = EasyDict(
    batch_sizes="240,1600,100",  # molecules, the most important first
    precisions="bf16,tf32,float32",
    implementations="ours,yardstick",  # and yardstick_fused: one product for all degrees
    modes="training,inference",
    device="auto",  # cpu, cuda, cuda:1, …; auto: cuda where there is any
    molecules=3200,  # in the data set
    graph="bonds",  # what is an edge: bonds, radius or complete
    num_layers=7,
    num_degrees=4,
    num_channels=32,
    num_heads=8,
    channels_div=2,
    tensor_cores=True,  # one radial network for all pairs of degrees, where the fibers allow it
    compile=False,  # torch.compile the network, dynamic in nodes and edges
    triton=False,  # ours contracts in Triton kernels, where it is not compiled
    cuda_graphs=False,  # forward and backward pass of training are replayed, of batches padded to few shapes
    profile=False,  # print the kernels that take most time instead of measuring
    seconds=2.0,  # of each measurement
    max_minutes=9.0,  # leave out what does not fit
)
NETWORK = dict(pooling="max", norm=True, use_layer_norm=True, low_memory=False)
IMPLEMENTATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ours": lambda network: network,
    "yardstick": dense,
    "yardstick_fused": lambda network: dense(network, fully_fused=True),
}
PROFILED_STEPS, PROFILED_ROWS = 3, 25
RECORDED_BATCHES = 16  # different ones, if CUDA graphs are recorded
ROW = "| {:15} | {:9} | {:9} | {:>10} | {:>12} | {:>9} |"


def main() -> None:
    settings = parse_settings(SETTINGS, {}, __doc__, check)
    deadline = time.monotonic() + 60 * settings.max_minutes
    if settings.triton:
        os.environ[TRITON] = "1"
    name = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    check_cuda_graphs({"accumulate": 1, "workers": 0, **settings}, device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    print(f"{header(device)}\n")
    dataset = synthetic_dataset(qm9_sized_molecules(settings.molecules), settings.graph, device)
    if not settings.profile:
        print(ROW.format("", "precision", "", "batch size", "molecules/ms", "peak MiB"))
        print(ROW.format(*[":---"] * 3, *["---:"] * 3), flush=True)
    for case in cases(settings):
        if time.monotonic() > deadline:
            print("\nOut of time: the rest is left out.")
            break
        measure(settings, dataset, device, *case)


def check(settings: EasyDict) -> None:
    """Raise ValueError for settings that make no sense."""
    positive = ("molecules", "num_layers", "num_degrees", "num_channels", "num_heads", "channels_div")
    require(settings, dict.fromkeys(positive, 1) | {"seconds": 0, "max_minutes": 0})
    known = {"precisions": PRECISIONS, "implementations": IMPLEMENTATIONS, "modes": ("training", "inference")}
    for key, names in known.items():
        for name in settings[key].split(","):
            if name not in names:
                raise ValueError(f"{key}: expected some of {', '.join(names)}, got {name!r}")
    if settings.cuda_graphs and settings.implementations != "ours":
        raise ValueError(f"cuda_graphs: expected implementations ours, got {settings.implementations}")
    for size in settings.batch_sizes.split(","):
        if not size.isdecimal() or not 1 <= int(size) <= settings.molecules:
            raise ValueError(f"batch_sizes: expected 1 … {settings.molecules}, as many as there are, got {size!r}")


def cases(settings: EasyDict) -> Iterator[tuple[str, str, str, int]]:
    """(implementation, precision, mode, batch size); implementations of the same take turns."""
    for batch_size in map(int, settings.batch_sizes.split(",")):
        for kind in settings.precisions.split(","):
            for mode in settings.modes.split(","):
                for implementation in settings.implementations.split(","):
                    yield implementation, kind, mode, batch_size


def measure(
    settings: EasyDict,
    dataset: QM9Dataset,
    device: torch.device,
    implementation: str,
    kind: str,
    mode: str,
    batch_size: int,
) -> None:
    """Print one row of the table, or the profile."""
    torch.manual_seed(0)
    network = IMPLEMENTATIONS[implementation](build_network(settings | NETWORK)).to(device)
    if settings.compile:
        network.compile(dynamic=True)
    make = training_step if mode == "training" else inference_step
    predict = partial(predictions, implementation=implementation, max_degree=settings.num_degrees - 1)
    chosen, recorded = random_molecules(dataset, batch_size), settings.cuda_graphs and mode == "training"
    batches = map(dataset.batch, cycle(islice(chosen, RECORDED_BATCHES)) if recorded else chosen)
    if recorded:
        predict, batches = Replayed(predict), (batch.padded() for batch in batches)
    step = make(network, predict, batches, kind)
    try:
        for _ in range(RECORDED_BATCHES if recorded else 0):
            step()
        if settings.profile:
            print(
                f"## {implementation}, {kind}, {mode}, batch size {batch_size}\n\n{profile(step, device)}", flush=True
            )
            return
        seconds, memory = block_seconds(step, device, settings.seconds), peak_bytes(step, device)
        # What is recorded is allocated once, so that the allocator does not know what lives in a step.
        numbers = [f"{1e-3 * batch_size / seconds:.3g}", "" if recorded else f"{memory / 2**20:.0f}"]
    except torch.OutOfMemoryError:
        numbers = ["out of memory", ""]
    print(ROW.format(implementation, kind, mode, batch_size, *numbers), flush=True)
    del step, network
    if device.type == "cuda":
        torch.cuda.empty_cache()


def random_molecules(dataset: QM9Dataset, batch_size: int) -> Iterator[torch.Tensor]:
    """The molecules (B,) of batches, without end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randperm(len(dataset), generator=generator)[:batch_size]


def predictions(network: nn.Module, batch: QM9Batch, implementation: str, max_degree: int) -> torch.Tensor:
    if implementation == "ours":
        return run_network(network, batch, max_degree)
    return network(batch.graph, batch.node_feats, batch.edge_feats)


def training_step(network, predict: Callable, batches: Iterator[QM9Batch], kind: str):
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    renewed = isinstance(predict, Replayed)  # gradients, which else are kept: no part of the memory that is measured

    def step() -> None:
        batch = next(batches)
        optimizer.zero_grad(set_to_none=renewed)
        with precision(kind, batch.targets.device.type):
            error = predict(network, batch)[: len(batch.targets)] - batch.targets[:, 0].float()
            error.abs().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


def inference_step(network, predict: Callable, batches: Iterator[QM9Batch], kind: str):
    network.eval()

    @torch.no_grad()
    def step() -> None:
        batch = next(batches)
        with precision(kind, batch.targets.device.type):
            predict(network, batch)

    return step


def profile(step: Callable[[], None], device: torch.device) -> str:
    """What takes most time in a step, on the device, and how many kernels it launches."""
    for _ in range(3):
        step()
    synchronize(device)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
        synchronize(device)
    averages = profiler.key_averages()
    on_device = [row for row in averages if row.device_type.name.lower() == device.type]
    count = sum(row.count for row in on_device) / PROFILED_STEPS
    table = averages.table(sort_by=f"self_{device.type}_time_total", row_limit=PROFILED_ROWS, max_name_column_width=60)
    return f"{count:,.0f} {'kernels' if device.type == 'cuda' else 'operations'} in a step\n\n{table}"


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
