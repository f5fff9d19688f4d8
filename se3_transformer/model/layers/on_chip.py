"""The contraction of contraction.py in Triton kernels, with the outer product of features and hidden layer on the chip.

PyTorch has to write that product, (E, S, K · H), to memory and to read it again; here a program makes it for a block of
edges, a few k at a time, and multiplies it at once. Written out for the parts A and B and the signs of m > 0, with
o[±] = x[±] ⊗ hidden,

    z[+] = A o[+] - B o[-],    z[-] = A o[-] + B o[+]

and z = A o for m = 0. Nothing is added up in an order that changes from one time to the next.

It has run in Triton's interpreter and been compiled for GPUs, but not run on one, and is off by default; see
`contraction.kernels`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from se3_transformer.model.layers import native

EDGES, OUTS = 64, 64  # edges and outputs of a block; fewer outputs where there are not so many
FEATURES = {1: 4, 2: 2}  # of the gradient of the matrix that a program makes, by the number of parts of the matrix
FEATURES_IN_TURN = 32  # that a program of the gradient of x and hidden goes through
EDGES_IN_TURN = 1024  # that one of the gradient of the matrix goes through
WARPS = 4


@triton.jit
def forward_kernel(
    x, hidden, matrix, out, num_edges, K, Q, x_edge, x_sign, hidden_edge,
    H: tl.constexpr, P: tl.constexpr, EDGES: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """out (E, P, Q) of a block of edges and outputs, from matrix (P, Q, K, H)."""
    edges = tl.program_id(0).to(tl.int64) * EDGES + tl.arange(0, EDGES)
    outs = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    units = tl.arange(0, H)
    is_edge, is_out = edges < num_edges, outs < Q
    h = tl.load(hidden + edges[:, None] * hidden_edge + units[None, :], mask=is_edge[:, None], other=0.0)
    x += edges * x_edge
    matrix += outs[None, :] * K * H + units[:, None]
    plus = tl.zeros((EDGES, OUTS), tl.float32)
    minus = tl.zeros((EDGES, OUTS), tl.float32)
    for k in range(K):
        a = tl.load(matrix + k * H, mask=is_out[None, :], other=0.0)
        outer = (tl.load(x + k, mask=is_edge, other=0.0)[:, None] * h).to(a.dtype)
        plus = tl.dot(outer, a, plus)
        if P == 2:
            b = tl.load(matrix + Q * K * H + k * H, mask=is_out[None, :], other=0.0)
            outer_minus = (tl.load(x + x_sign + k, mask=is_edge, other=0.0)[:, None] * h).to(a.dtype)
            plus = tl.dot(-outer_minus, b, plus)
            minus = tl.dot(outer_minus, a, minus)
            minus = tl.dot(outer, b, minus)
    out += edges[:, None] * P * Q + outs[None, :]
    mask = is_edge[:, None] & is_out[None, :]
    tl.store(out, plus.to(out.dtype.element_ty), mask=mask)
    if P == 2:
        tl.store(out + Q, minus.to(out.dtype.element_ty), mask=mask)


@triton.jit
def factors_kernel(
    x, hidden, matrix, grad, grad_x, grad_hidden, num_edges, K, Q, x_edge, x_sign, hidden_edge, ks,
    H: tl.constexpr, P: tl.constexpr, EDGES: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """Shares of the gradients of x and hidden, by a block of outputs and some of the features.

    grad_x (blocks of outputs, E, P, K), grad_hidden (blocks of outputs, parts of the features, E, H)
    """
    edges = tl.program_id(0).to(tl.int64) * EDGES + tl.arange(0, EDGES)
    outs = tl.program_id(2) * OUTS + tl.arange(0, OUTS)
    units = tl.arange(0, H)
    is_edge, is_out = edges < num_edges, outs < Q
    mask = is_edge[:, None] & is_out[None, :]
    h = tl.load(hidden + edges[:, None] * hidden_edge + units[None, :], mask=is_edge[:, None], other=0.0)
    h = h.to(tl.float32)
    grad += edges[:, None] * P * Q + outs[None, :]
    g = tl.load(grad, mask=mask, other=0.0)
    g_minus = g
    if P == 2:
        g_minus = tl.load(grad + Q, mask=mask, other=0.0)
    x += edges * x_edge
    grad_x += (tl.program_id(2) * num_edges + edges) * P * K
    matrix += outs[:, None] * K * H + units[None, :]
    of_h = tl.zeros((EDGES, H), tl.float32)
    first = tl.program_id(1) * ks
    for k in range(first, tl.minimum(first + ks, K)):
        a = tl.load(matrix + k * H, mask=is_out[:, None], other=0.0)
        of_outer = tl.dot(g, a)
        xk = tl.load(x + k, mask=is_edge, other=0.0).to(tl.float32)
        if P == 2:
            b = tl.load(matrix + Q * K * H + k * H, mask=is_out[:, None], other=0.0)
            of_outer = tl.dot(g_minus, b, of_outer)
            of_minus = tl.dot(g_minus, a)
            of_minus = tl.dot(-g, b, of_minus)
            x_minus = tl.load(x + x_sign + k, mask=is_edge, other=0.0).to(tl.float32)
            of_h += of_minus * x_minus[:, None]
            of_x_minus = tl.sum(of_minus * h, axis=1)
            tl.store(grad_x + K + k, of_x_minus.to(grad_x.dtype.element_ty), mask=is_edge)
        of_h += of_outer * xk[:, None]
        of_x = tl.sum(of_outer * h, axis=1)
        tl.store(grad_x + k, of_x.to(grad_x.dtype.element_ty), mask=is_edge)
    share = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    grad_hidden += (share * num_edges + edges)[:, None] * H + units[None, :]
    tl.store(grad_hidden, of_h, mask=is_edge[:, None])


@triton.jit
def matrix_kernel(
    x, hidden, grad, grad_matrix, num_edges, K, Q, x_edge, x_sign, hidden_edge, in_turn,
    H: tl.constexpr, P: tl.constexpr, EDGES: tl.constexpr, OUTS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Share of the gradient of the matrix, (parts of the edges, P, Q, K, H), by some of the edges."""
    ks = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    outs = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    units = tl.arange(0, H)
    is_k, is_out = ks < K, outs < Q
    of_a = tl.zeros((OUTS, FEATURES * H), tl.float32)
    of_b = tl.zeros((OUTS, FEATURES * H), tl.float32)
    first = tl.program_id(2).to(tl.int64) * in_turn
    for start in range(first, tl.minimum(first + in_turn, num_edges), EDGES):
        edges = start + tl.arange(0, EDGES)
        is_edge = edges < num_edges
        h = tl.load(hidden + edges[:, None] * hidden_edge + units[None, :], mask=is_edge[:, None], other=0.0)
        mask = is_edge[None, :] & is_out[:, None]
        g = tl.load(grad + edges[None, :] * P * Q + outs[:, None], mask=mask, other=0.0)
        places = x + edges[:, None] * x_edge + ks[None, :]
        x_plus = tl.load(places, mask=is_edge[:, None] & is_k[None, :], other=0.0)
        outer = tl.reshape(x_plus[:, :, None] * h[:, None, :], (EDGES, FEATURES * H)).to(g.dtype)
        of_a = tl.dot(g, outer, of_a)
        if P == 2:
            g_minus = tl.load(grad + edges[None, :] * P * Q + Q + outs[:, None], mask=mask, other=0.0)
            x_minus = tl.load(places + x_sign, mask=is_edge[:, None] & is_k[None, :], other=0.0)
            outer_minus = tl.reshape(x_minus[:, :, None] * h[:, None, :], (EDGES, FEATURES * H)).to(g.dtype)
            of_a = tl.dot(g_minus, outer_minus, of_a)
            of_b = tl.dot(g_minus, outer, of_b)
            of_b = tl.dot(-g, outer_minus, of_b)
    columns = tl.program_id(0) * FEATURES * H + tl.arange(0, FEATURES * H)
    mask = is_out[:, None] & (columns < K * H)[None, :]
    grad_matrix += tl.program_id(2).to(tl.int64) * P * Q * K * H + outs[:, None] * K * H + columns[None, :]
    tl.store(grad_matrix, of_a, mask=mask)
    if P == 2:
        tl.store(grad_matrix + Q * K * H, of_b, mask=mask)


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def fits(x: Tensor, hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels take these: on a GPU, products in tf32 or less, a row of hidden for every edge."""
    H = hidden.shape[1]
    half = dtype in (torch.bfloat16, torch.float16)
    return (
        (x.is_cuda or INTERPRETED)
        and (half or (dtype == torch.float32 and native.matmul_precision(x.device.type) != "ieee"))
        and len(hidden) == len(x)
        and H in (16, 32)  # more would take too much of the memory on the chip
    )


class OnChip(torch.autograd.Function):
    """z (E, P, Q) of x (E, P, K), hidden (E, H) and matrix (P, Q, K · H), in the precision of the matrix."""

    @staticmethod
    def forward(ctx, x: Tensor, hidden: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(x, hidden, matrix)
        x, hidden, matrix = _rows(x), _rows(hidden), native.plain(matrix)
        (E, P, K), Q, H = x.shape, matrix.shape[1], hidden.shape[1]
        out = matrix.new_empty(E, P, Q)
        if out.numel():
            outs = _outs(Q)
            with torch.cuda.device_of(x):
                forward_kernel[triton.cdiv(E, EDGES), triton.cdiv(Q, outs)](
                    *(x, hidden, matrix, out, E, K, Q, x.stride(0), x.stride(1), hidden.stride(0)),
                    *(H, P, EDGES, outs),
                    num_warps=WARPS,
                )
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, hidden, matrix = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            return tuple(native.differentiable_gradients(plain, (x, hidden, matrix), ctx.needs_input_grad, grad))
        x, hidden, matrix = _rows(x), _rows(hidden), native.plain(matrix)
        (E, P, K), Q, H = x.shape, matrix.shape[1], hidden.shape[1]
        if not grad.numel():
            return torch.zeros_like(x), torch.zeros_like(hidden), torch.zeros_like(matrix)
        grad, outs = native.plain(grad.to(matrix.dtype)), _outs(Q)
        sizes = (E, K, Q, x.stride(0), x.stride(1), hidden.stride(0))
        blocks, parts, turns = triton.cdiv(Q, outs), triton.cdiv(K, FEATURES_IN_TURN), triton.cdiv(E, EDGES_IN_TURN)
        grad_x = x.new_empty(blocks, E, P, K, dtype=x.dtype if blocks == 1 else torch.float32)
        grad_hidden = x.new_empty(blocks * parts, E, H, dtype=torch.float32)
        grad_matrix = x.new_empty(turns, *matrix.shape, dtype=torch.float32)
        with torch.cuda.device_of(x):
            factors_kernel[triton.cdiv(E, EDGES), parts, blocks](
                *(x, hidden, matrix, grad, grad_x, grad_hidden, *sizes, FEATURES_IN_TURN),
                *(H, P, EDGES, outs),
                num_warps=WARPS,
            )
            matrix_kernel[triton.cdiv(K, FEATURES[P]), blocks, turns](
                *(x, hidden, grad, grad_matrix, *sizes, EDGES_IN_TURN),
                *(H, P, EDGES, outs, FEATURES[P]),
                num_warps=WARPS,
            )
        shares = ((grad_x, x), (grad_hidden, hidden), (grad_matrix, matrix))
        return tuple((share[0] if len(share) == 1 else share.sum(0)).to(of.dtype) for share, of in shares)


def plain(x: Tensor, hidden: Tensor, matrix: Tensor) -> Tensor:
    """The definition of `OnChip`, differentiable as often as one likes."""
    outer = (x.unsqueeze(-1) * hidden[:, None, None]).flatten(2).to(matrix.dtype)
    if len(matrix) == 1:
        return outer @ matrix[0].T
    (plus_a, plus_b), (minus_a, minus_b) = ([o @ part.T for part in matrix] for o in outer.unbind(1))
    return torch.stack([plus_a - minus_b, minus_a + plus_b], dim=1)


def _rows(tensor: Tensor) -> Tensor:
    """It with rows whose numbers are one after the other."""
    return tensor if tensor.stride(-1) == 1 and not tensor.is_neg() else native.plain(tensor)


def _outs(Q: int) -> int:
    """Outputs of a block."""
    return min(OUTS, max(16, triton.next_power_of_2(Q)))
