"""The product at the heart of a convolution, in three orders, through small buffers that are used again and again.

For one |m|, with features x of the sources in the edge frame and the last hidden layer of the radial network,

    z[e, ±m, o] = sum_{i, h} hidden[e, h] · (A[o, i, h] · x[e, ±m, i] ∓ B[o, i, h] · x[e, ∓m, i])

where i runs over (degree in, channel in) and o over (degree out, channel out); for m = 0 there is A alone. Either the
features take the two parts, as [x+ -x-; x- x+] (E, S, P · N_in), or the outputs do and are combined in the end: with
S = P = 1 for m = 0, else 2, that leaves a trilinear form

    z[e, s, q] = sum_{k, h} W[q, k, h] · hidden[e, h] · x[e, s, k].

Its order of contraction decides what comes between: (E, S · K · H), (E, S · Q · H) or (E, K · Q) numbers. None of these
is ever held for all edges: forward and backward go through chunks of edges whose intermediate fits into the cache, and
the backward pass makes them again from x and hidden, which are small.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from se3_transformer.model.layers import native

# Bytes of the intermediate of one chunk of edges, by type of device: a cache's worth on a CPU, enough for one big
# product on a GPU.
CHUNK_BYTES = {"cpu": 2 * 2**20, "cuda": 2**28}
TRITON = "SE3_TRANSFORMER_TRITON"  # environment variable: 1 to contract in `on_chip.py` where that can be done


class Contraction(ABC):
    """An order of contraction; the three subclasses give the same result."""

    stacks_features: bool  # whether the features take the parts A and B, or the outputs

    @staticmethod
    @abstractmethod
    def size(S: int, K: int, Q: int, H: int) -> int:
        """Numbers per edge in the intermediate."""

    @staticmethod
    @abstractmethod
    def matrix(weight: Tensor) -> Tensor:
        """The weight (P, outs, C_out, ins, C_in, H), any strides, as the matrix of this order's product."""

    @staticmethod
    @abstractmethod
    def plain(x: Tensor, hidden: Tensor, matrix: Tensor) -> Tensor:
        """The definition: x (E, S, K), hidden (E, H), matrix -> (E, S, Q), differentiable as often as one likes."""

    @staticmethod
    @abstractmethod
    def forward(x: Tensor, hidden: Tensor, matrix: Tensor, out: Tensor, buffer: Tensor) -> None:
        """One chunk into out (E, S, Q), through buffer (E, size)."""

    @staticmethod
    @abstractmethod
    def backward(
        x: Tensor,
        hidden: Tensor,
        matrix: Tensor,
        grad: Tensor,
        buffers: tuple[Tensor, Tensor],
        grad_x: Tensor | None,
        grad_hidden: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of one chunk: written to grad_x (if wanted) and grad_hidden.

        Returns:
            Two matrices whose product A^T B is the gradient with respect to `matrix`.
        """


class OuterProductFirst(Contraction):
    """(x ⊗ hidden) W, by way of (E, S, K · H); matrix (Q, K · H)."""

    stacks_features = False

    @staticmethod
    def size(S, K, Q, H):
        return S * K * H

    @staticmethod
    def matrix(weight):
        return weight.flatten(3).flatten(0, 2)

    @staticmethod
    def plain(x, hidden, matrix):
        return (x.unsqueeze(-1) * hidden[:, None, None]).flatten(2) @ matrix.T

    @staticmethod
    def forward(x, hidden, matrix, out, buffer):
        E, S, n_in = x.shape
        torch.mul(x.unsqueeze(-1), hidden[:, None, None], out=buffer.view(E, S, n_in, -1))
        torch.mm(buffer.view(E * S, -1), matrix.T, out=out.view(E * S, -1))

    @staticmethod
    def backward(x, hidden, matrix, grad, buffers, grad_x, grad_hidden):
        E, S, n_in = x.shape
        outer, grad_outer = buffers
        torch.mul(x.unsqueeze(-1), hidden[:, None, None], out=outer.view(E, S, n_in, -1))
        torch.mm(grad.view(E * S, -1), matrix, out=grad_outer.view(E * S, -1))
        by_feature = grad_outer.view(E, S * n_in, -1)
        if grad_x is not None:
            torch.bmm(by_feature, hidden.unsqueeze(2), out=grad_x.view(E, -1, 1))
        torch.bmm(x.reshape(E, 1, -1), by_feature, out=grad_hidden.view(E, 1, -1))
        return grad.view(E * S, -1), outer.view(E * S, -1)


class FeaturesFirst(Contraction):
    """(x W) hidden, by way of (E, S, Q · H); matrix (K, Q · H)."""

    stacks_features = True

    @staticmethod
    def size(S, K, Q, H):
        return S * Q * H

    @staticmethod
    def matrix(weight):
        return weight.permute(0, 3, 4, 1, 2, 5).flatten(3).flatten(0, 2)

    @staticmethod
    def plain(x, hidden, matrix):
        (E, S, _), H = x.shape, hidden.shape[1]
        product = (x @ matrix).view(E, S * matrix.shape[1] // H, H)
        return (product @ hidden.unsqueeze(-1)).view(E, S, matrix.shape[1] // H)

    @staticmethod
    def forward(x, hidden, matrix, out, buffer):
        E, S, n_in = x.shape
        torch.mm(x.reshape(E * S, n_in), matrix, out=buffer.view(E * S, -1))
        torch.bmm(buffer.view(E, -1, hidden.shape[1]), hidden.unsqueeze(2), out=out.view(E, -1, 1))

    @staticmethod
    def backward(x, hidden, matrix, grad, buffers, grad_x, grad_hidden):
        E, S, n_in = x.shape
        product, grad_product = buffers
        rows = x.reshape(E * S, n_in)
        torch.mm(rows, matrix, out=product.view(E * S, -1))
        torch.bmm(grad.view(E, 1, -1), product.view(E, -1, hidden.shape[1]), out=grad_hidden.view(E, 1, -1))
        torch.mul(grad.view(E, -1, 1), hidden.unsqueeze(1), out=grad_product.view(E, -1, hidden.shape[1]))
        if grad_x is not None:
            torch.mm(grad_product.view(E * S, -1), matrix.T, out=grad_x.view(E * S, n_in))
        return rows, grad_product.view(E * S, -1)


class RadialWeightsFirst(Contraction):
    """(hidden W) x, by way of (E, K · Q), the radial weights of every edge; matrix (K · Q, H)."""

    stacks_features = False

    @staticmethod
    def size(S, K, Q, H):
        return K * Q

    @staticmethod
    def matrix(weight):
        return _by_input(weight).flatten(0, 4)

    @staticmethod
    def plain(x, hidden, matrix):
        return x @ (hidden @ matrix.T).view(x.shape[0], x.shape[2], len(matrix) // x.shape[2])

    @staticmethod
    def forward(x, hidden, matrix, out, buffer):
        torch.mm(hidden, matrix.T, out=buffer)
        torch.bmm(x, buffer.view(len(x), x.shape[2], -1), out=out)

    @staticmethod
    def backward(x, hidden, matrix, grad, buffers, grad_x, grad_hidden):
        radial, grad_radial = buffers
        if grad_x is not None:
            torch.mm(hidden, matrix.T, out=radial)
            columns = grad.transpose(1, 2).contiguous()  # several times faster than a product with radial transposed
            grad_x.copy_(torch.bmm(radial.view(len(x), x.shape[2], -1), columns).transpose(1, 2))
        outer = torch.mul if x.shape[1] == 1 else torch.bmm  # the same for one row, and faster
        outer(x.transpose(1, 2), grad, out=grad_radial.view(len(x), x.shape[2], -1))
        torch.mm(grad_radial, matrix, out=grad_hidden)
        return grad_radial, hidden


ORDERS = (OuterProductFirst, FeaturesFirst, RadialWeightsFirst)


def contract(order: type[Contraction], x: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """z of the formula at the top of this file.

    Args:
        order: order of contraction.
        x: (E, S, N_in) features of +m and -m, N_in = ins · C_in.
        hidden: (E, H), or for `RadialWeightsFirst` a row for every so many edges, which then share radial weights.
        weight: (P, outs, C_out, ins, C_in, H), parts A and B.

    Returns:
        (E, S, N_out) with N_out = outs · C_out, in the dtype of autocast if that is on.
    """
    device, dtype = x.device.type, dtype_of_products(x)
    E, S, n_out = *x.shape[:2], weight.shape[1:3].numel()
    compiling = torch.compiler.is_compiling()
    if not compiling and (on_chip := kernels()) and on_chip.fits(x, hidden, dtype):
        parts = OuterProductFirst.matrix(weight.to(dtype)).unflatten(0, (S, n_out))
        return on_chip.OnChip.apply(x, hidden, parts)
    x, hidden, matrix = x.to(dtype), hidden.to(dtype), order.matrix(weight.to(dtype))
    product = _whole if compiling else _Chunked.apply
    with torch.autocast(device, enabled=False):
        if len(weight) == 2 and order.stacks_features:
            x = torch.cat([x, _quarter_turn(x)], dim=2)
        if hidden.shape[0] < E:  # edges that share radial weights are as one edge with more rows
            x = x.reshape(len(hidden), -1, x.shape[2])
        if len(weight) == 1 or order.stacks_features:
            return product(order, x, hidden, matrix, n_out).view(E, S, n_out)
        ax, bx = product(order, x, hidden, matrix, 2 * n_out).view(E, S, 2, n_out).unbind(2)
        return ax + _quarter_turn(bx)


@cache
def kernels() -> ModuleType | None:
    """`on_chip.py`, if the environment asks for it.

    Raises:
        ImportError: it does, but there is no Triton.
    """
    if os.environ.get(TRITON) != "1":
        return None
    from se3_transformer.model.layers import on_chip

    return on_chip


def dtype_of_products(x: Tensor) -> torch.dtype:
    """That of autocast if it is on, else that of x; autocast leaves float64 as it is."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _quarter_turn(x: Tensor) -> Tensor:
    """(x+, x-) -> (-x-, x+), (E, 2, C)."""
    plus, minus = x.unbind(1)
    return torch.stack([-minus, plus], dim=1)


def _by_input(weight: Tensor) -> Tensor:
    """(P, outs, C_out, ins, C_in, H) -> (ins, C_in, P, outs, C_out, H), the order of `RadialWeightsFirst`."""
    return weight.permute(3, 4, 0, 1, 2, 5)


def _whole(order: type[Contraction], x: Tensor, hidden: Tensor, matrix: Tensor, n_out: int) -> Tensor:
    """What `_Chunked` does, for all edges at once: an exported model has to take any number of them."""
    return order.plain(x, hidden, matrix)


class _Chunked(torch.autograd.Function):
    """An order of contraction, chunk by chunk."""

    @staticmethod
    def forward(ctx, order: type[Contraction], x: Tensor, hidden: Tensor, matrix: Tensor, n_out: int) -> Tensor:
        ctx.order, ctx.n_out = order, n_out
        ctx.save_for_backward(x, hidden, matrix)
        out = x.new_empty(*x.shape[:2], n_out)
        chunks, size = _chunks(order, x, hidden, n_out)
        buffer = x.new_empty(chunks[0].stop if chunks else 0, size)
        for chunk in chunks:
            order.forward(x[chunk], hidden[chunk], matrix, out[chunk], buffer[: chunk.stop - chunk.start])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, hidden, matrix = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            return (
                None,
                *native.differentiable_gradients(ctx.order.plain, (x, hidden, matrix), ctx.needs_input_grad[1:4], grad),
                None,
            )

        grad = grad.contiguous()
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[1] else None
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        grad_matrix = torch.zeros_like(matrix, dtype=torch.promote_types(matrix.dtype, torch.float32))
        chunks, size = _chunks(ctx.order, x, hidden, ctx.n_out)
        buffers = tuple(x.new_empty(chunks[0].stop, size) for _ in range(2)) if chunks else ()
        for chunk in chunks:
            a, b = ctx.order.backward(
                x[chunk],
                hidden[chunk],
                matrix,
                grad[chunk],
                tuple(buffer[: chunk.stop - chunk.start] for buffer in buffers),
                None if grad_x is None else grad_x[chunk],
                grad_hidden[chunk],
            )
            if grad_matrix.dtype == a.dtype:
                grad_matrix.addmm_(a.T, b)
            else:  # chunks are added up in single precision
                grad_matrix += a.T @ b
        return None, grad_x, grad_hidden, grad_matrix.to(matrix.dtype), None


def _chunks(order: type[Contraction], x: Tensor, hidden: Tensor, n_out: int) -> tuple[list[slice], int]:
    """Slices of the edges, the longest first, and the numbers per edge in the intermediate."""
    _, S, n_in = x.shape
    size = order.size(S, n_in, n_out, hidden.shape[1])
    length = max(1, CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cuda"]) // (size * x.element_size()))
    return [slice(start, min(start + length, len(x))) for start in range(0, len(x), length)], size
