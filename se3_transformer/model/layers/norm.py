"""Norm-based normalisation and nonlinearity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from se3_transformer.model.fiber import Fiber


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
        squares = [features[degree].square().sum(dim=-1) for degree in degrees]  # (N, C)
        lengths = [square.clamp(min=self.NORM_CLAMP**2).sqrt() for square in squares]
        if hasattr(self, "group_norm"):
            normed = self.group_norm(torch.cat(lengths, dim=-1)).split(self.fiber.channels, dim=-1)
        else:
            normed = [self.layer_norms[degree](length) for degree, length in zip(degrees, lengths, strict=True)]
        return {
            degree: features[degree] * (self.nonlinearity(new) / old).unsqueeze(-1)
            for degree, new, old in zip(degrees, normed, lengths, strict=True)
        }
