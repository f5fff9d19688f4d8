"""Time, memory, and where it was measured."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PRECISIONS = ("float32", "tf32", "bf16")


@contextmanager
def precision(name: str, device_type: str) -> Iterator[None]:
    """Products in float32, tf32 or, by autocast, bf16."""
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def header(device: torch.device) -> str:
    """Hardware, versions, commit and command of a run, as a list in Markdown."""
    rows = {
        "command": command(),
        "commit": commit(),
        "torch": torch.__version__,
        "processor": f"{processor()}, {os.cpu_count()} cores, {cpu_bf16()}",
        "threads": torch.get_num_threads(),
        "load before": f"{os.getloadavg()[0]:.1f} processes of others",
    }
    if device.type == "cuda":
        rows["GPU"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return "\n".join(f"- {name}: {value}" for name, value in rows.items())


def command() -> str:
    """The command line of this process, without the path of the checkout."""
    module = sys.modules["__main__"].__spec__
    program = ["-m", module.name] if module else [Path(sys.argv[0]).name]
    return shlex.join(["python", *program, *sys.argv[1:]])


def commit() -> str:
    """Commit of this checkout, and whether files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"
    return name.strip() + (" with changes" if changed else "")


def cpu_info(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def processor() -> str:
    return cpu_info("model name") or platform.processor() or "unknown processor"


def cpu_bf16() -> str:
    """Whether bf16 products are an instruction of this processor, or made of float32 ones."""
    known = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in cpu_info("flags").split()]
    return f"bf16 by {', '.join(known)}" if known else "no bf16 instructions"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in every round A B … A B … after a first one that does not count; on the CPU."""
    seconds = {name: [] for name in functions}
    for _ in range(1 + rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def block_seconds(function: Callable[[], object], device: torch.device, seconds: float, blocks: int = 5) -> float:
    """Seconds of one call: the median over blocks of calls, each between two synchronisations with the device.

    Args:
        function: called as often as fits into the time, at least once in every block.
        seconds: for all blocks together.
    """

    def timed(calls: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        return (time.perf_counter() - began) / calls

    timed(2)  # warm-up
    calls = max(1, int(seconds / blocks / timed(1)))
    return statistics.median(timed(calls) for _ in range(blocks))


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that live at one time during a call, above those that lived before it.

    On a GPU the caching allocator counts them. On a CPU torch's profiler records every allocation; unlike the resident
    size of the process, that depends neither on what was freed before nor on what the C library keeps.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown, aligned; the first column to the left, the others to the right."""
    widths = [max(len(cells[i]) for cells in [columns, *rows]) for i in range(len(columns))]

    def line(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {first[0]:{first[1]}} | " + " | ".join(f"{cell:>{width}}" for cell, width in others) + " |"

    rule = "|".join("-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return "\n".join([line(columns), f"|{rule}|", *map(line, rows)])
