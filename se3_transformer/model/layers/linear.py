"""Linear maps of the channels of each degree."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from se3_transformer.model.fiber import Fiber
from se3_transformer.model.layers import native


def mix_degrees(
    weights: Mapping[str, Tensor], features: dict[str, Tensor], appended: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """weight @ feature for every degree of the weights, {'l': (N, C_out, 2l+1)}.

    Args:
        weights: {'l': (C_out, C_in)}
        features: {'l': (N, C_in, 2l+1)}
        appended: channels that follow those of `features`, where it has the degree.
    """
    appended = appended or {}
    pieces = [[f[degree] for f in (features, appended) if degree in f or f is features] for degree in weights]
    tensors = [tensor for of_degree in pieces for tensor in of_degree]
    if (
        tensors
        and native.fits(*tensors, *weights.values(), precisions=(torch.float32,))
        and are_consistent(weights, pieces)
    ):
        mixed = _Native.apply(tuple(map(len, pieces)), *tensors, *weights.values())
    else:
        mixed = by_torch(pieces, list(weights.values()))
    return dict(zip(weights, mixed, strict=True))


def cat_features(features: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Channels of `features`, then those of `others` where these have the degree."""
    return {
        degree: torch.cat([feature, others[degree]], dim=1) if degree in others else feature
        for degree, feature in features.items()
    }


def by_torch(pieces: list[list[Tensor]], weights: list[Tensor]) -> list[Tensor]:
    """`mix_degrees`, of the channels of several tensors for each degree; as one matrix product over all nodes."""
    features = [of_degree[0] if len(of_degree) == 1 else torch.cat(of_degree, dim=1) for of_degree in pieces]
    return [(x.transpose(1, 2) @ weight.T).transpose(1, 2) for x, weight in zip(features, weights, strict=True)]


def are_consistent(weights: Mapping[str, Tensor], pieces: list[list[Tensor]]) -> bool:
    """Whether shapes fit each other; where they do not, PyTorch says so."""
    nodes = pieces[0][0].shape[0]
    return all(
        all(x.ndim == 3 and x.shape[0] == nodes and x.shape[2] == of_degree[0].shape[2] for x in of_degree)
        and sum(x.shape[1] for x in of_degree) == weight.shape[1]
        for of_degree, weight in zip(pieces, weights.values(), strict=True)
    )


class LinearSE3(nn.Module):
    """Mixes the channels of each degree (Fuchs et al. 2020, eq. 12): {'l': (N, C_in, 2l+1)} -> {'l': (N, C_out, 2l+1)}.

    Degrees of fiber_out that fiber_in lacks are absent from the output.

    Raises:
        ValueError: the fibers have no degree in common.
    """

    def __init__(self, fiber_in: Fiber, fiber_out: Fiber):
        super().__init__()
        self.weights = nn.ParameterDict(
            {
                str(d): nn.Parameter(torch.randn(fiber_out[d], fiber_in[d]) / fiber_in[d] ** 0.5)
                for d in fiber_out.by_channels
                if d in fiber_in
            }
        )
        self._degrees = sorted(self.weights, key=int)
        if not self._degrees:
            raise ValueError(f"LinearSE3: {fiber_in} and {fiber_out} have no degree in common")

    def forward(
        self, features: dict[str, Tensor], *args, appended: dict[str, Tensor] | None = None, **kwargs
    ) -> dict[str, Tensor]:
        """Mix; `appended`: channels that follow those of `features`, of degrees that it has."""
        return mix_degrees({degree: self.weights[degree] for degree in self._degrees}, features, appended)


class Linear(ctypes.Structure):
    """As in linear.c."""

    _fields_ = native.numbers("nodes degrees threads weights rows_in rows_out")


class Degree(ctypes.Structure):
    _fields_ = native.numbers("M C_in C_out pieces node channel order")


class _Native(torch.autograd.Function):
    """`by_torch`, by linear.c; `counts`: pieces of each degree."""

    @staticmethod
    def forward(ctx, counts: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.counts = counts
        ctx.save_for_backward(*tensors)
        pieces, weights = split(counts, tensors)
        out = [x.new_empty(x.shape[0], w.shape[0], x.shape[2]) for (x, *_), w in zip(pieces, weights, strict=True)]
        native.call("linear_forward", *_Native.arguments(pieces, weights, out), out)
        return tuple(out)

    @staticmethod
    def backward(ctx, *grad: Tensor):
        counts, tensors = ctx.counts, ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives

            def same(*tensors: Tensor) -> list[Tensor]:
                return by_torch(*split(counts, tensors))

            return None, *native.differentiable_gradients(same, tensors, ctx.needs_input_grad[1:], grad)
        pieces, weights = split(counts, tensors)
        grad = tuple(map(native.plain, grad))
        arguments = _Native.arguments(pieces, weights, grad)
        grads = [x.new_empty(x.shape) for of_degree in pieces for x in of_degree]
        of_weights = grad[0].new_empty(arguments[0].threads, arguments[0].weights)
        native.call("linear_backward", *arguments, list(grad), grads, of_weights)
        by_degree = of_weights[0].split([weight.numel() for weight in weights])
        return None, *grads, *(of.view(w.shape) for of, w in zip(by_degree, weights, strict=True))

    @staticmethod
    def arguments(pieces: list[list[Tensor]], weights: list[Tensor], out) -> tuple:
        """What both functions get, `out` with the distances of what comes out or of its gradient."""
        degrees: list[Degree] = []
        places: list[native.Piece] = []
        rows_in, rows_out = 0, 0
        for of_degree, weight, of_out in zip(pieces, weights, out, strict=True):
            (C_out, C_in), M = weight.shape, of_out.shape[2]
            degrees.append(Degree(M, C_in, C_out, len(of_degree), *of_out.stride()))
            places += map(native.piece, of_degree)
            rows_in, rows_out = max(rows_in, C_in * M), max(rows_out, C_out * M)
        sizes = (out[0].shape[0], len(degrees), torch.get_num_threads(), sum(weight.numel() for weight in weights))
        tensors = [x for of_degree in pieces for x in of_degree]
        weights = [weight.contiguous() for weight in weights]
        arrays = native.array(Degree, degrees), native.array(native.Piece, places)
        return Linear(*sizes, rows_in, rows_out), *arrays, tensors, weights


def split(counts: tuple[int, ...], tensors: tuple[Tensor, ...]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The pieces of each degree, and the weights, which follow them."""
    pieces, start = [], 0
    for count in counts:
        pieces.append(list(tensors[start : start + count]))
        start += count
    return pieces, list(tensors[start:])
