"""Self-interaction: the channels of a node are mixed, by constant weights or by weights made from the node itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from se3_transformer.model.fiber import Fiber
from se3_transformer.model.layers.linear import LinearSE3, cat_features

SelfInteraction = Literal["linear", "attentive"]
HIDDEN = 32  # width of the networks that make weights, as of the radial networks


class AttentiveSelfInteractionSE3(nn.Module):
    """Mixes the channels of each degree by weights made of their scalar products (Fuchs et al. 2020, eq. 13).

        y[c'] = sum_c w[c', c] x[c],        w = network({x[a] · x[b] for all a, b})

    for every node and degree: {'l': (N, C_in, 2l+1)} -> {'l': (N, C_out, 2l+1)}. The products are invariant, so w is.
    The bias of the network's last layer is the matrix of `LinearSE3` (eq. 12), from which w departs; there is no
    softmax over c as in the authors' program, with which that matrix could not be had. Degrees of fiber_out that
    fiber_in lacks are absent from the output. A degree with a single channel has a single product, of which the
    network's layer norm leaves nothing: there it is eq. 12.

    Raises:
        ValueError: the fibers have no degree in common.
    """

    def __init__(self, fiber_in: Fiber, fiber_out: Fiber):
        super().__init__()
        constant = LinearSE3(fiber_in, fiber_out).weights
        self.networks = nn.ModuleDict()
        for degree, weight in constant.items():
            last = nn.Linear(HIDDEN, weight.numel())
            with torch.no_grad():
                last.weight.mul_(fiber_in[degree] ** -0.5)
                last.bias.copy_(weight.flatten())
            products = fiber_in[degree] ** 2
            self.networks[degree] = nn.Sequential(nn.LayerNorm(products), nn.Linear(products, HIDDEN), nn.ReLU(), last)

    def forward(
        self, features: dict[str, Tensor], *args, appended: dict[str, Tensor] | None = None, **kwargs
    ) -> dict[str, Tensor]:
        """Mix; `appended`: channels that follow those of `features`, of degrees that it has."""
        features, out = cat_features(features, appended or {}), {}
        for degree, network in self.networks.items():
            x = features[degree]  # (N, C_in, M)
            products = (x @ x.transpose(1, 2)).flatten(1)  # (N, C_in · C_in)
            weights = network(products).unflatten(1, (-1, x.shape[1]))  # (N, C_out, C_in)
            out[degree] = weights @ x
        return out


SELF_INTERACTIONS: dict[str, type[nn.Module]] = {"linear": LinearSE3, "attentive": AttentiveSelfInteractionSE3}
