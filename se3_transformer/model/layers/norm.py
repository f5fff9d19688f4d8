"""Nonlinearities that act on the lengths of features and leave their directions."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, relu

from se3_transformer.model.fiber import Fiber, degree_to_dim
from se3_transformer.model.layers import native

NormType = Literal["norm", "bias"]


class NormSE3(nn.Module):
    """Normalises the lengths of features and leaves their directions: x · nonlinearity(norm(|x|)) / |x|.

    `norm` is a group norm with degrees as groups where all degrees have the same number of channels, else a layer norm
    per degree. {'l': (N, C, 2l+1)} -> the same shapes.

    Args:
        fiber: of the features.
        nonlinearity: ReLU unless given.
        softening: s, with which (|x|² + s²)^½ stands for both |x|. With s = 0 what comes out need not shrink with x,
            and of x that is zero by symmetry, and a rounding error in the computer, a long feature may be made.

    Raises:
        ValueError: a softening that is negative or not finite.
    """

    NORM_CLAMP = 2**-24  # smallest subnormal number of half precision

    def __init__(self, fiber: Fiber, nonlinearity: nn.Module | None = None, *, softening: float = 0.0):
        super().__init__()
        self.fiber, self.softening = fiber, checked_softening(softening)
        self.nonlinearity = nn.ReLU() if nonlinearity is None else nonlinearity
        if len(set(fiber.channels)) == 1:
            self.group_norm = nn.GroupNorm(num_groups=len(fiber.degrees), num_channels=sum(fiber.channels))
        else:
            self.layer_norms = nn.ModuleDict({str(d): nn.LayerNorm(fiber[d]) for d in fiber.by_channels})

    def forward(self, features: dict[str, Tensor], *args, **kwargs) -> dict[str, Tensor]:
        inputs = [features[str(degree)] for degree in self.fiber.degrees]
        for (degree, channels), feature in zip(self.fiber, inputs, strict=True):
            expected = (inputs[0].shape[0], channels, degree_to_dim(degree))
            if feature.shape != expected:
                raise ValueError(f"NormSE3: expected degree {degree} as {expected}, got {tuple(feature.shape)}")
        together = hasattr(self, "group_norm")
        norms: list[Any] = [self.group_norm] if together else [self.layer_norms[str(d)] for d in self.fiber.degrees]
        affine = (torch.cat([norm.weight for norm in norms]), torch.cat([norm.bias for norm in norms]))
        natively = type(self.nonlinearity) is nn.ReLU and all(len(a) == sum(self.fiber.channels) for a in affine)
        if natively and native.fits(*affine, *inputs, precisions=(torch.float32,)):
            outputs = _Native.apply(self._normalised, self.softening, *affine, *inputs)
        else:
            outputs = self._normalised(*affine, *inputs)
        return dict(zip(map(str, self.fiber.degrees), outputs, strict=True))

    def _normalised(self, weight: Tensor, bias: Tensor, *features: Tensor) -> list[Tensor]:
        """From scale and shift (sum of C,) and the features of every degree."""
        lengths, channels = softened_lengths(features, self.softening), self.fiber.channels
        weight, bias = weight.to(lengths.dtype), bias.to(lengths.dtype)
        if hasattr(self, "group_norm"):
            # not the one of nn.functional, which refuses one node with one channel
            new = self.nonlinearity(torch.group_norm(lengths, len(channels), weight, bias))
        else:
            parts = zip(*(tensor.split(channels, dim=-1) for tensor in (lengths, weight, bias)), strict=True)
            by_degree = [self.nonlinearity(layer_norm(length, length.shape[1:], *affine)) for length, *affine in parts]
            new = torch.cat(by_degree, dim=-1)
        return scaled(features, new / lengths)


class Norm(ctypes.Structure):
    """As in norm.c."""

    _fields_ = [*native.numbers("nodes degrees threads channels rows most"), ("softening", ctypes.c_float)]


class Degree(ctypes.Structure):
    """Features of a degree, as in norm.c."""

    _fields_ = [*native.numbers("M first"), ("x", native.Piece), ("grad", native.Piece)]


class _Native(torch.autograd.Function):
    """`NormSE3` with ReLU, by norm.c; `same` is the same function in PyTorch."""

    @staticmethod
    def forward(
        ctx, same: Callable, softening: float, weight: Tensor, bias: Tensor, *features: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.same, ctx.softening = same, softening
        ctx.save_for_backward(weight, bias, *features)
        out = [feature.new_empty(feature.shape) for feature in features]
        sizes = _Native.sizes(softening, weight, features, features)
        native.call("norm_forward", *sizes, list(features), weight.contiguous(), bias.contiguous(), out)
        return tuple(out)

    @staticmethod
    def backward(ctx, *grad: Tensor):
        weight, bias, *features = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            inputs = (weight, bias, *features)
            return None, None, *native.differentiable_gradients(ctx.same, inputs, ctx.needs_input_grad[2:], grad)
        grads_out = [native.plain(of_feature) for of_feature in grad]
        sizes = _Native.sizes(ctx.softening, weight, features, grads_out)
        grads = [feature.new_empty(feature.shape) for feature in features]
        of_affine = weight.new_empty(sizes[0].threads, 2, len(weight))
        native.call(
            "norm_backward",
            *(*sizes, features, weight.contiguous(), bias.contiguous(), grads_out, grads, of_affine),
        )
        return None, None, *of_affine[0].clone(), *grads

    @staticmethod
    def sizes(
        softening: float, weight: Tensor, features: Sequence[Tensor], grad: Sequence[Tensor]
    ) -> tuple[Norm, ctypes.Array]:
        degrees, first = [], 0
        for feature, of_feature in zip(features, grad, strict=True):
            degrees.append(Degree(feature.shape[2], first, native.piece(feature), native.piece(of_feature)))
            first += feature.shape[1]
        sizes = (feature.shape[1:] for feature in features)
        rows, most = (max(each) for each in zip(*((C * M, C) for C, M in sizes), strict=True))
        norm = Norm(len(features[0]), len(degrees), torch.get_num_threads(), len(weight), rows, most, softening)
        return norm, native.array(Degree, degrees)


class NormBiasSE3(nn.Module):
    """Shifts the lengths of features and leaves their directions: x · ReLU(|x| + bias) / |x| (Thomas et al. 2018).

    There is no normalisation: a bias for each channel of each degree is all that is learned. They start at 0, where
    the layer is the identity. {'l': (N, C, 2l+1)} -> the same shapes. `softening` and errors are those of `NormSE3`.
    """

    def __init__(self, fiber: Fiber, *, softening: float = 0.0):
        super().__init__()
        self.softening = checked_softening(softening)
        self.biases = nn.ParameterDict({str(degree): nn.Parameter(torch.zeros(c)) for degree, c in fiber})

    def forward(self, features: dict[str, Tensor], *args, **kwargs) -> dict[str, Tensor]:
        inputs = [features[degree] for degree in self.biases.keys()]
        lengths = softened_lengths(inputs, self.softening)
        outputs = scaled(inputs, relu(lengths + torch.cat([*self.biases.values()])) / lengths)
        return dict(zip(self.biases.keys(), outputs, strict=True))


def softened_lengths(features: Sequence[Tensor], softening: float) -> Tensor:
    """(N, C, 2l+1) of every degree -> (N, sum of C), at least `NormSE3.NORM_CLAMP`; with finite derivatives everywhere.

    In at least single precision: squares leave the range of half precision both ways.
    """
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    squares = torch.cat([feature.to(dtype).square().sum(dim=-1) for feature in features], dim=-1)
    squares = squares.clamp(min=NormSE3.NORM_CLAMP**2)
    return (squares + softening**2 if softening else squares).sqrt()


def scaled(features: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """(N, C, 2l+1) of every degree times (N, sum of C), in the dtype of the features.

    The factors of features that are zero are too large for half precision, in which 0 times infinity would be NaN.
    """
    by_degree = factors.split([feature.shape[1] for feature in features], dim=-1)
    return [
        (feature * factor.unsqueeze(-1)).to(feature.dtype) for feature, factor in zip(features, by_degree, strict=True)
    ]


def checked_softening(softening: float) -> float:
    if not 0 <= softening < math.inf:
        raise ValueError(f"softening of norms must be a length, 0 or more, got {softening}")
    return softening


NORMS: dict[str, type[nn.Module]] = {"norm": NormSE3, "bias": NormBiasSE3}
