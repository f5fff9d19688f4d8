"""`convolution.c`, compiled just in time for the processor at hand, loaded, and called with tensors.

It does what takes most time in a convolution on a CPU, in single precision: the hidden layers of the radial networks
(see `radial.py`) and the contraction (see `contraction.py`). The library lies in a folder of the user's cache, under a
name that says what it was made of and for. Where it cannot be had, both are done in PyTorch, with the same results up
to rounding, more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("convolution.c")
HIDDEN = 32  # hidden units that it is written for
EPSILON = 1e-5  # of its layer norms, the default of torch
# The order of sums may change, the treatment of NaN and infinity may not.
FLAGS = (
    "-std=gnu11 -O3 -march=native -fPIC -shared -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math"
).split()
OFF = "SE3_TRANSFORMER_NATIVE"  # environment variable: 0 to do without
FOLDER = "SE3_TRANSFORMER_CACHE"  # environment variable: folder of the compiled library


class Term(ctypes.Structure):
    """One |m| of one radial network, as in convolution.c."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("P", "K", "Q", "matrix", "hidden", "x", "x_offset", "x_sign", "out", "out_offset", "out_sign")
    ]


class Sizes(ctypes.Structure):
    """As in convolution.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "group", "hidden_row", "terms", "threads")]

    @staticmethod
    def of(terms: ctypes.Array, x: list[Tensor], hidden: Tensor) -> Sizes:
        rows = len(hidden)
        group = len(x[0]) // rows if rows else 1
        return Sizes(rows, group, hidden.shape[1:].numel(), len(terms), torch.get_num_threads())


def fits(x: Tensor, hidden_dim: int) -> bool:
    """Whether the library does this: on a CPU, in at most single precision, and if it can be had."""
    return (
        x.device.type == "cpu"
        and x.dtype != torch.float64
        and hidden_dim == HIDDEN
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and library() is not None
    )


@cache
def terms(
    rectangles: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...],
    groups_in: tuple[tuple[tuple[int, ...], int], ...],
    groups_out: tuple[tuple[tuple[int, ...], int], ...],
) -> ctypes.Array:
    """The terms of a convolution, in the order of its radial networks and their `frame_weights`.

    Args:
        rectangles: degrees in and out of each radial network.
        groups_in, groups_out: degrees that stand together in one tensor in the edge frame, and their channels.
    """
    made, matrix = [], 0
    for network, (degrees_in, degrees_out) in enumerate(rectangles):
        for order in range(min(max(degrees_in), max(degrees_out)) + 1):
            x, x_offset, x_sign, K = place(degrees_in, order, groups_in)
            out, out_offset, out_sign, Q = place(degrees_out, order, groups_out)
            P = 1 if order == 0 else 2
            made.append(Term(P, K, Q, matrix, network * HIDDEN, x, x_offset, x_sign, out, out_offset, out_sign))
            matrix += K * P * Q * HIDDEN
    return (Term * len(made))(*made)


def place(
    degrees: tuple[int, ...], order: int, groups: tuple[tuple[tuple[int, ...], int], ...]
) -> tuple[int, int, int, int]:
    """Where the order +m of some degrees, all of a group or one, is found in the rows of `split_orders`.

    Returns:
        group, offset, distance to -m, count; in numbers.
    """
    index = next(index for index, (group, _) in enumerate(groups) if degrees[0] in group)
    group, channels = groups[index]
    counts = [sum(degree >= m for degree in group) for m in range(order + 1)]
    row = counts[0] + 2 * sum(counts[1:order]) if order else 0
    if degrees == group:
        return index, row * channels, counts[order] * channels, counts[order] * channels
    row += sum(order <= degree < degrees[0] for degree in group)
    return index, row * channels, counts[order] * channels, channels


def contraction_forward(
    terms: ctypes.Array, x: list[Tensor], hidden: Tensor, matrices: Tensor, out: list[Tensor]
) -> None:
    """All terms of a convolution, added to `out`.

    Args:
        terms: see `terms`.
        x: (E, rows, C_in) of each group, float32 and contiguous like everything here.
        hidden: (E / share, R, H)
        matrices: (P · K · Q · H of all terms,), each matrix (K, P, Q, H).
        out: (E, rows, C_out) of each group.
    """
    call(
        "contraction_forward",
        Sizes.of(terms, x, hidden),
        *(terms, x, row_sizes(x), hidden, matrices, out, row_sizes(out)),
    )


def contraction_backward(
    terms: ctypes.Array,
    x: list[Tensor],
    hidden: Tensor,
    matrices: Tensor,
    grad: list[Tensor],
    grad_x: list[Tensor] | None,
    grad_hidden: Tensor,
    grad_matrices: Tensor,
) -> None:
    """Gradients from those of `out`: of x (if wanted) and hidden, which are added to, and of the matrices."""
    largest = max(term.P * term.K * term.Q for term in terms) * HIDDEN
    sizes = Sizes.of(terms, x, hidden)
    spare = matrices.new_empty(sizes.threads - 1, largest)
    call(
        "contraction_backward",
        *(sizes, terms, x, row_sizes(x), hidden, matrices, grad, row_sizes(grad)),
        *(grad_x, grad_hidden, grad_matrices, spare, ctypes.c_int64(largest)),
    )


def row_sizes(tensors: list[Tensor]) -> ctypes.Array:
    """Numbers of an edge in each tensor."""
    return (ctypes.c_int64 * len(tensors))(*(tensor.shape[1:].numel() for tensor in tensors))


class Radial(ctypes.Structure):
    """As in convolution.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "inputs", "networks", "norm", "threads")]

    @staticmethod
    def of(edge_scalars: Tensor, parameters: Tensor, norm: bool) -> Radial:
        return Radial(*edge_scalars.shape, len(parameters), norm, torch.get_num_threads())


def radial_forward(edge_scalars: Tensor, parameters: Tensor, norm: bool) -> Tensor:
    """Last hidden layers (E, R, H) from edge scalars (E, edge_dim) and the parameters (R, …), see convolution.c."""
    out = edge_scalars.new_zeros(len(edge_scalars), len(parameters), HIDDEN)
    call("radial_forward", Radial.of(edge_scalars, parameters, norm), edge_scalars, parameters, out)
    return out


def radial_backward(
    edge_scalars: Tensor, parameters: Tensor, norm: bool, grad: Tensor, wants_scalars: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients with respect to edge scalars (if wanted) and parameters from `grad` (E, R, H)."""
    sizes = Radial.of(edge_scalars, parameters, norm)
    grad_scalars = torch.zeros_like(edge_scalars) if wants_scalars else None
    grad_parameters = parameters.new_empty(sizes.threads, *parameters.shape)
    call("radial_backward", sizes, edge_scalars, parameters, grad, grad_scalars, grad_parameters)
    return grad_scalars, grad_parameters[0]


def call(name: str, sizes: ctypes.Structure, *arguments) -> None:
    """Call a function of the library; tensors and lists of tensors become pointers.

    Raises:
        MemoryError: it found no memory for its buffers.
    """

    def pointer(argument):
        if isinstance(argument, Tensor):
            return ctypes.c_void_p(argument.data_ptr())
        if isinstance(argument, list):
            return (ctypes.c_void_p * len(argument))(*(tensor.data_ptr() for tensor in argument))
        return argument

    if getattr(library(), name)(ctypes.byref(sizes), *map(pointer, arguments)):
        raise MemoryError(f"{name}: no memory for the buffers of {sizes.threads} threads")


def differentiable_gradients(
    function: Callable, inputs: tuple[Tensor, ...], wanted: tuple[bool, ...], grad: Tensor | tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients, which can be differentiated again, of a function with respect to the wanted ones of its inputs."""
    chosen = [tensor for tensor, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
    gradients = iter(torch.autograd.grad(function(*inputs), chosen, grad, create_graph=True))
    return tuple(next(gradients) if is_wanted else None for is_wanted in wanted)


@cache
def library() -> ctypes.CDLL | None:
    """The library, compiled if that has not been done; None, after one warning, where there is none."""
    if os.environ.get(OFF) == "0":
        return None
    try:
        return ctypes.CDLL(str(compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"no compiled convolution.c, convolutions on the CPU will be slower: {error}. A C compiler (cc, or the one "
            f"named by CC) is needed; {OFF}=0 does without it and without this warning.",
            stacklevel=2,
        )
        return None


def compiled() -> Path:
    """Path of the library for this processor, compiler and source; compiled if it is not there.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, or it failed, or no folder to write to.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise FileNotFoundError(f"no C compiler {os.environ.get('CC', 'cc')!r}")
    version = run([compiler, "--version"])
    made_of = "\n".join([SOURCE.read_text(), version, *FLAGS, processor()])
    path = folder() / f"convolution_{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            new = Path(scratch) / path.name
            try:
                run([compiler, *FLAGS, "-fopenmp", "-o", str(new), str(SOURCE)])
            except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread
                run([compiler, *FLAGS, "-o", str(new), str(SOURCE)])
            new.replace(path)
    return path


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


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
        Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "se3_transformer"
    )
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
