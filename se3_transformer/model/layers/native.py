"""The C code in `c/`, compiled just in time for the processor at hand, loaded, and called with tensors.

It does what takes most time on a CPU, in single precision: radial networks, rotations into the frames of edges and
back, the contraction, attention, linear layers and norms; only products of the contraction may be in less, see
`parts_of_products`. Each is called from the module that has the same in PyTorch. Under autocast what comes out stays in
single precision, where PyTorch's results are in that of autocast. The library lies in a folder of the user's cache,
under a name that says what it was made of and for. Where it cannot be had, all is done in PyTorch, with the same
results up to rounding, more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).with_name("c")
HIDDEN = 32  # hidden units of the radial networks that it is written for
BLOCK = 32  # edges that stand side by side, see c/common.h
EPSILON = 1e-5  # of its layer norms, the default of torch
# The order of sums may change, the treatment of NaN and infinity may not.
FLAGS = "-std=gnu11 -O3 -fPIC -shared -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math".split()
OPTIONAL = {  # flags that some compilers lack, with what those say then; without: slower code, one thread
    "-march=native": r"march",
    "-fopenmp": r"openmp|\b(lib|l)?[gi]?omp\b",
}
AT_MOST_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = (Tensor, torch.nn.Parameter)
OFF = "SE3_TRANSFORMER_NATIVE"  # environment variable: 0 to do without
FOLDER = "SE3_TRANSFORMER_CACHE"  # environment variable: folder of the compiled library


def fits(*tensors: Tensor, precisions: tuple[torch.dtype, ...] = AT_MOST_SINGLE) -> bool:
    """Whether the library works on these tensors: on a CPU, in one of these precisions, and if it can be had."""
    return (
        all(type(x) in TENSORS and x.device.type == "cpu" and x.dtype in precisions for x in tensors)
        and not torch.compiler.is_compiling()
        and not any(x.is_neg() for x in tensors)  # marked as negative, which the numbers in memory are not
        and not _switched_off
        and library() is not None
    )


_switched_off = False


@contextmanager
def switched_off() -> Iterator[None]:
    """Do without the library, as where there is none."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def numbers(names: str) -> list[tuple[str, type]]:
    """The fields of a struct of int64."""
    return [(name, ctypes.c_int64) for name in names.split()]


class Piece(ctypes.Structure):
    """Features (nodes, C, 2l+1), with their distances in memory, as in common.h."""

    _fields_ = numbers("C node channel order")


def piece(features: Tensor) -> Piece:
    return Piece(features.shape[1], *features.stride())


def array(kind: Any, values: Iterable) -> ctypes.Array:
    """A C array of a kind of numbers or structs."""
    values = list(values)
    return (kind * len(values))(*values)


def call(name: str, *arguments) -> None:
    """Call a function of the library; tensors and lists of tensors (or None) become pointers.

    Raises:
        ValueError: a tensor is not on the CPU.
        TypeError: a tensor of a class of its own, which may have its numbers elsewhere.
        MemoryError: it found no memory for its buffers.
        IndexError: an index is out of range.
    """

    def address(tensor):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: expected all tensors on one device, got some on the CPU, one on {tensor.device}")
        if type(tensor) not in TENSORS:
            raise TypeError(f"{name}: expected plain tensors, got {type(tensor).__name__}; {OFF}=0 does without {name}")
        return tensor.data_ptr()

    def pointer(argument):
        if isinstance(argument, Tensor):
            return ctypes.c_void_p(address(argument))
        if isinstance(argument, list):
            return array(ctypes.c_void_p, (tensor if tensor is None else address(tensor) for tensor in argument))
        return ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument

    fault = getattr(library(), name)(*map(pointer, arguments))
    if fault == 1:
        raise MemoryError(f"{name}: no memory for its buffers")
    if fault == 2:
        raise IndexError(f"{name}: expected indices of nodes, got one that is negative or not below their number")


def plain(tensor: Tensor) -> Tensor:
    """It with all its numbers in memory one after the other; autograd may only mark gradients as negative."""
    return tensor.resolve_neg().contiguous()


def grouped(index: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The edges of every group, as order[starts[i] : starts[i + 1]]; from the group (E,) of each.

    Returns:
        starts, order: int64 (num_groups + 1,), (E,).
    """
    index = index.long().contiguous()
    starts, order = index.new_empty(num_groups + 1), torch.empty_like(index)
    call("group_edges", array(ctypes.c_int64, (len(index), num_groups)), index, starts, order)
    return starts, order


def differentiable_gradients(
    function: Callable, inputs: tuple[Tensor, ...], wanted: tuple[bool, ...], grad: Tensor | tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients, which can be differentiated again, of a function with respect to the wanted ones of its inputs.

    Not under autocast, as what is compiled is not.
    """
    inputs = tuple(tensor.view_as(tensor) for tensor in inputs)  # so that no input is made of another one
    chosen = [tensor for tensor, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
    with torch.autocast("cpu", enabled=False):
        gradients = iter(torch.autograd.grad(function(*inputs), chosen, grad, create_graph=True))
    return tuple(next(gradients) if is_wanted else None for is_wanted in wanted)


@cache
def has_tiles() -> bool:
    """Whether the processor multiplies tiles of bf16, and the system lets us."""
    loaded = library()
    return loaded is not None and bool(loaded.has_tiles())


def parts_of_products(dtype: torch.dtype) -> int:
    """Of how many bf16 numbers those of a contraction are made, see c/tiles.h; 0: products in single precision.

    One if bf16 is asked for, by autocast, by features in bf16, or by `torch.set_float32_matmul_precision("medium")`;
    two, 16 bits, for fp16 or "high". Three would be as exact as single precision, and no faster where tiles were
    measured (benchmarks/README.md).
    """
    if not has_tiles():
        return 0
    if dtype == torch.float32:
        return {"ieee": 0, "tf32": 2, "bf16": 1}[matmul_precision("cpu")]
    return 1 if dtype == torch.bfloat16 else 2


def matmul_precision(device_type: str) -> str:
    """In what products of float32 matrices may be made on a "cpu" or on "cuda": "ieee" (float32), "tf32" or "bf16"."""
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    if hasattr(backend, "matmul") and hasattr(backend.matmul, "fp32_precision"):  # whichever way it was set
        return backend.matmul.fp32_precision.replace("none", "ieee")
    return {"highest": "ieee", "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]


@cache
def library() -> ctypes.CDLL | None:
    """The library, compiled if that has not been done; None, after one warning, where there is none."""
    if os.environ.get(OFF) == "0":
        return None
    try:
        return ctypes.CDLL(str(compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home directory
        said = f" {error.stderr.strip()[-500:]}" if isinstance(error, subprocess.CalledProcessError) else ""
        warnings.warn(
            f"no compiled code, the model will be slower on the CPU: {error}.{said} A C compiler is needed (cc, or the "
            f"one that CC names) and a folder to load from (in the home directory, or {FOLDER}); {OFF}=0 does without "
            "them and without this warning.",
            stacklevel=2,
        )
        return None


def compiled() -> Path:
    """Path of the library for this processor, compiler and source; compiled if it is not there.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, or it failed, or no folder to write to.
    """
    name, *options = shlex.split(os.environ.get("CC") or "cc")  # as "ccache gcc", or with flags
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"no C compiler {name!r}")
    compiler = [found, *options]
    sources = [source.read_text(encoding="utf-8") for source in sorted(SOURCES.iterdir())]
    made_of = "\n".join([*sources, run([*compiler, "--version"]), *compiler, *FLAGS, *OPTIONAL, processor()])
    path = folder() / f"layers_{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            new = Path(scratch) / path.name
            compile_with(compiler, list(OPTIONAL), ["-o", str(new), *map(str, sorted(SOURCES.glob("*.c")))])
            new.replace(path)
    return path


def compile_with(compiler: list[str], optional: list[str], files: list[str]) -> None:
    """Run the compiler with optional flags, or those of them that it knows."""
    try:
        run([*compiler, *FLAGS, *optional, *files])
    except subprocess.CalledProcessError as error:
        known = [flag for flag in optional if not re.search(OPTIONAL[flag], error.stderr)]
        if known == optional:  # something else is wrong; or it was killed, which must not slow the library for good
            raise
        compile_with(compiler, known, files)


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=120).stdout


def processor() -> str:
    """What `-march=native` depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().partition("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
    return f"{platform.machine()} {platform.processor()}"


def folder() -> Path:
    """Folder of compiled libraries, one that only this user can write to."""
    chosen = os.environ.get(FOLDER)
    path = (
        Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "se3_transformer")
    )
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
