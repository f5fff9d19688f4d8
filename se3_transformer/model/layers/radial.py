"""Radial networks (Thomas et al. 2018, eq. 5): from the scalars of an edge to the weights of its kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, linear, relu

from se3_transformer.model.layers import native


class RadialProfile(nn.Module):
    """Radial network: edge scalars (E, edge_dim) -> radial weights (E, channels_out · channels_in · num_freq)."""

    def __init__(
        self,
        num_freq: int,
        channels_in: int,
        channels_out: int,
        edge_dim: int = 1,
        mid_dim: int = 32,
        use_layer_norm: bool = False,
    ):
        super().__init__()
        self.num_freq, self.channels_in, self.channels_out = num_freq, channels_in, channels_out

        def norm() -> list[nn.Module]:
            return [nn.LayerNorm(mid_dim)] if use_layer_norm else []

        self.net = nn.Sequential(
            nn.Linear(edge_dim, mid_dim),
            *norm(),
            nn.ReLU(),
            nn.Linear(mid_dim, mid_dim),
            *norm(),
            nn.ReLU(),
            nn.Linear(mid_dim, num_freq * channels_in * channels_out, bias=False),
        )

    @property
    def last_weight(self) -> Tensor:
        """(C_out, C_in, F, H) weight that makes the radial weights from the hidden layer."""
        return self.net[-1].weight.unflatten(0, (self.channels_out, self.channels_in, self.num_freq))

    def forward(self, edge_scalars: Tensor) -> Tensor:
        return self.net(edge_scalars)


def hidden_layers(networks: list[RadialProfile], edge_scalars: Tensor) -> Tensor:
    """The last hidden layer of every network, (E, R, H): all are computed together.

    Args:
        networks: R radial networks of the same sizes.
        edge_scalars: (E, edge_dim), the input of all of them.
    """
    below_last = [network.net[:-1] for network in networks]
    layers = [module for modules in below_last for module in modules if not isinstance(module, nn.ReLU)]
    parameters = torch.cat([p.flatten() for layer in layers for p in (layer.weight, layer.bias)])
    parameters = parameters.view(len(networks), -1)
    hidden_dim, norm = below_last[0][0].out_features, isinstance(below_last[0][1], nn.LayerNorm)
    if native.fits(edge_scalars, hidden_dim):
        with torch.autocast("cpu", enabled=False):
            return _Native.apply(norm, edge_scalars.float().contiguous(), parameters.float())
    return by_torch(edge_scalars, parameters, hidden_dim, norm)


def by_torch(edge_scalars: Tensor, parameters: Tensor, hidden_dim: int, norm: bool) -> Tensor:
    """What `hidden_layers` returns, from the parameters (R, …) of every network one after the other."""
    R, hidden = len(parameters), edge_scalars
    for inputs in (edge_scalars.shape[1], hidden_dim):
        sizes = [hidden_dim * inputs, *[hidden_dim] * (3 if norm else 1)]
        of_layer, parameters = parameters.split([sum(sizes), parameters.shape[1] - sum(sizes)], dim=1)
        weight, bias, *affine = of_layer.split(sizes, dim=1)
        weight = weight.unflatten(1, (hidden_dim, inputs))  # (R, H, inputs)
        if hidden is edge_scalars:
            hidden = linear(hidden, weight.flatten(0, 1), bias.flatten())  # (E, R · H)
        else:
            by_network = hidden.unflatten(1, (R, -1)).transpose(0, 1) @ weight.transpose(1, 2)  # (R, E, H)
            hidden = by_network.transpose(0, 1).flatten(1) + bias.flatten()
        if norm:  # each network is a group
            hidden = group_norm(hidden, R, *(values.flatten() for values in affine), eps=native.EPSILON)
        hidden = relu(hidden)
    return hidden.unflatten(1, (R, -1))


class _Native(torch.autograd.Function):
    """`convolution.c`."""

    @staticmethod
    def forward(ctx, norm: bool, edge_scalars: Tensor, parameters: Tensor):
        ctx.norm = norm
        ctx.save_for_backward(edge_scalars, parameters)
        return native.radial_forward(edge_scalars, parameters, norm)

    @staticmethod
    def backward(ctx, grad: Tensor):
        edge_scalars, parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # for second derivatives

            def same(edge_scalars: Tensor, parameters: Tensor) -> Tensor:
                return by_torch(edge_scalars, parameters, native.HIDDEN, ctx.norm)

            return None, *native.differentiable_gradients(same, (edge_scalars, parameters), wanted, grad)
        return None, *native.radial_backward(edge_scalars, parameters, ctx.norm, grad.contiguous(), wanted[0])
