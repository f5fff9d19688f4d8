"""Nonlinearities that act on the lengths of features and leave their directions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from se3_transformer.model.fiber import Fiber

NormType = Literal["norm", "bias"]


class NormSE3(nn.Module):
    """Normalises the lengths of features and leaves their directions: x · nonlinearity(norm(|x|)) / |x|.

    `norm` is a group norm with degrees as groups where all degrees have the same number of channels, else a layer norm
    per degree. {'l': (N, C, 2l+1)} -> the same shapes.
    """

    NORM_CLAMP = 2**-24  # smallest subnormal number of half precision

    def __init__(self, fiber: Fiber, nonlinearity: nn.Module | None = None):
        super().__init__()
        self.fiber = fiber
        self.nonlinearity = nn.ReLU() if nonlinearity is None else nonlinearity
        if len(set(fiber.channels)) == 1:
            self.group_norm = nn.GroupNorm(num_groups=len(fiber.degrees), num_channels=sum(fiber.channels))
        else:
            self.layer_norms = nn.ModuleDict({str(degree): nn.LayerNorm(channels) for degree, channels in fiber})

    def forward(self, features: dict[str, Tensor], *args, **kwargs) -> dict[str, Tensor]:
        degrees = [str(degree) for degree in self.fiber.degrees]
        lengths = [clamped_length(features[degree]) for degree in degrees]
        if hasattr(self, "group_norm"):
            normed = self.group_norm(torch.cat(lengths, dim=-1)).split(self.fiber.channels, dim=-1)
        else:
            normed = [self.layer_norms[degree](length) for degree, length in zip(degrees, lengths, strict=True)]
        return {
            degree: features[degree] * (self.nonlinearity(new) / old).unsqueeze(-1)
            for degree, new, old in zip(degrees, normed, lengths, strict=True)
        }


class NormBiasSE3(nn.Module):
    """Shifts the lengths of features and leaves their directions: x · ReLU(|x| + bias) / |x| (Thomas et al. 2018).

    There is no normalisation: a bias for each channel of each degree is all that is learned. They start at 0, where
    the layer is the identity. {'l': (N, C, 2l+1)} -> the same shapes.
    """

    def __init__(self, fiber: Fiber):
        super().__init__()
        self.biases = nn.ParameterDict({str(degree): nn.Parameter(torch.zeros(c)) for degree, c in fiber})

    def forward(self, features: dict[str, Tensor], *args, **kwargs) -> dict[str, Tensor]:
        out = {}
        for degree, bias in self.biases.items():
            length = clamped_length(features[degree])
            out[degree] = features[degree] * (relu(length + bias) / length).unsqueeze(-1)
        return out


def clamped_length(feature: Tensor) -> Tensor:
    """(N, C, 2l+1) -> (N, C), at least `NormSE3.NORM_CLAMP`; with finite derivatives everywhere."""
    return feature.square().sum(dim=-1).clamp(min=NormSE3.NORM_CLAMP**2).sqrt()


NORMS: dict[str, type[nn.Module]] = {"norm": NormSE3, "bias": NormBiasSE3}
