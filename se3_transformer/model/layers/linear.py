"""Linear maps of the channels of each degree."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from se3_transformer.model.fiber import Fiber


def mix_channels(weight: Tensor, feature: Tensor) -> Tensor:
    """weight @ feature, (C_out, C_in), (N, C_in, M) -> (N, C_out, M), as one matrix product over all nodes."""
    return (feature.transpose(1, 2) @ weight.T).transpose(1, 2)


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
                str(degree): nn.Parameter(torch.randn(channels, fiber_in[degree]) / fiber_in[degree] ** 0.5)
                for degree, channels in fiber_out
                if degree in fiber_in
            }
        )
        if not len(self.weights):
            raise ValueError(f"LinearSE3: {fiber_in} and {fiber_out} have no degree in common")

    def forward(self, features: dict[str, Tensor], *args, **kwargs) -> dict[str, Tensor]:
        return {degree: mix_channels(weight, features[degree]) for degree, weight in self.weights.items()}
