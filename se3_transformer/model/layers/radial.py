"""Radial networks (Thomas et al. 2018, eq. 5): from the scalars of an edge to the weights of its kernel."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import cast

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
        self.mid_dim, self.use_layer_norm = mid_dim, use_layer_norm

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
        self._made = [(type(layer), _shapes(layer)) for layer in self.net]

    @property
    def hidden(self) -> list[nn.Linear | nn.LayerNorm]:
        """The hidden layers that have parameters."""
        return [layer for layer in list(self.net)[:-1] if isinstance(layer, nn.Linear | nn.LayerNorm)]

    @property
    def is_as_made(self) -> bool:
        """Whether nobody put other layers, hooks, or parameters of other shapes into the network."""
        layers = list(self.net)
        return len(layers) == len(self._made) and all(map(_is_as_made, layers, self._made))

    @property
    def last_weight(self) -> Tensor:
        """(C_out, C_in, F, H) weight that makes the radial weights from the hidden layer.

        Raises:
            ValueError: the last layer was replaced by one that is not linear.
        """
        last = self.net[-1]
        if _is_as_made(last, self._made[-1]):
            weight = cast(Tensor, last.weight)
        else:
            weight = matrix_of(last, next(self.parameters()), self.mid_dim)
        return weight.unflatten(0, (self.channels_out, self.channels_in, self.num_freq))

    def forward(self, edge_scalars: Tensor) -> Tensor:
        return self.net(edge_scalars)


def _shapes(layer: nn.Module) -> list[torch.Size | None]:
    return [p if p is None else p.shape for p in layer._parameters.values()]


def _is_as_made(layer: nn.Module, made: tuple[type, list]) -> bool:
    kind, shapes = made
    return (
        type(layer) is kind
        and not (layer._forward_pre_hooks or layer._forward_hooks)
        and (not shapes or _shapes(layer) == shapes)
        and (not isinstance(layer, nn.LayerNorm) or layer.eps == native.EPSILON)
    )


def matrix_of(layer: nn.Module, like: Tensor, inputs: int) -> Tensor:
    """(outputs, inputs) matrix of what stands in the place of a linear layer without bias, an adapter for example.

    Raises:
        ValueError: it is not linear.
    """
    units = torch.eye(inputs, dtype=like.dtype, device=like.device)
    with torch.autocast(like.device.type, enabled=False):  # one call, since hooks may change it from one to the next
        rows, others = layer(torch.cat([units, 0 * units[:1], units.sum(0)[None]])).split([inputs, 2])
    difference = others.detach() - torch.stack([0 * rows[0], rows.sum(0)]).detach()
    random = any(isinstance(part, nn.Dropout) and part.training for part in layer.modules())
    if not random and difference.abs().max() > 1e-2 * rows.detach().abs().max():
        raise ValueError(f"radial network: expected a linear last layer without bias, got {layer}")
    return rows.T


def hidden_layers(networks: list[RadialProfile], edge_scalars: Tensor, as_made: bool) -> Tensor:
    """The last hidden layer of every network, (E, R, H).

    Args:
        networks: R radial networks of the same sizes.
        edge_scalars: (E, edge_dim), the input of all of them.
        as_made: all of them are, so that they can be computed together.
    """
    if not as_made:
        return torch.stack([network.net[:-1](edge_scalars) for network in networks], dim=1)
    parameters = [p for network in networks for layer in network.hidden for p in (layer.weight, layer.bias)]
    sizes = (len(networks), networks[0].mid_dim, networks[0].use_layer_norm)
    if sizes[1] == native.HIDDEN and native.fits(edge_scalars):
        with torch.autocast("cpu", enabled=False):
            return _Native.apply(sizes, edge_scalars.float().contiguous(), *(p.float() for p in parameters))
    return by_torch(sizes, edge_scalars, *parameters)


def by_torch(sizes: tuple[int, int, bool], edge_scalars: Tensor, *parameters: Tensor) -> Tensor:
    """What `hidden_layers` returns, from (R, H, layer norm) and the parameters of one network after the other."""
    R, hidden_dim, norm = sizes
    hidden, packed = edge_scalars, packed_parameters(R, parameters)
    for inputs in (edge_scalars.shape[1], hidden_dim):
        lengths = [hidden_dim * inputs, *[hidden_dim] * (3 if norm else 1)]
        of_layer, packed = packed.split([sum(lengths), packed.shape[1] - sum(lengths)], dim=1)
        weight, bias, *affine = of_layer.split(lengths, dim=1)
        weight = weight.unflatten(1, (hidden_dim, inputs))  # (R, H, inputs)
        if hidden is edge_scalars:
            hidden = linear(hidden, weight.flatten(0, 1), bias.flatten())  # (E, R · H)
        else:
            by_network = hidden.unflatten(1, (R, -1)).transpose(0, 1) @ weight.transpose(1, 2)  # (R, E, H)
            hidden = by_network.transpose(0, 1).flatten(1) + bias.flatten()
        if norm:  # each network is a group
            scale, shift = (values.flatten() for values in affine)
            hidden = group_norm(hidden, R, scale, shift, eps=native.EPSILON)
        hidden = relu(hidden)
    return hidden.unflatten(1, (R, -1))


def packed_parameters(num_networks: int, parameters: tuple[Tensor, ...]) -> Tensor:
    """(R, …) all parameters of every network one after the other."""
    return torch.cat([p.flatten() for p in parameters]).view(num_networks, -1)


class Radial(ctypes.Structure):
    """As in radial.c."""

    _fields_ = native.numbers("rows inputs networks norm threads")


class _Native(torch.autograd.Function):
    """`radial.c`."""

    @staticmethod
    def forward(ctx, sizes: tuple[int, int, bool], edge_scalars: Tensor, *parameters: Tensor):
        ctx.sizes = sizes
        packed = packed_parameters(sizes[0], parameters)
        ctx.save_for_backward(edge_scalars, packed, *parameters)
        out = edge_scalars.new_empty(edge_scalars.shape[0], *sizes[:2])
        native.call("radial_forward", _Native.radial(sizes, edge_scalars), edge_scalars, packed, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        edge_scalars, packed, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # for second derivatives
            same = partial(by_torch, ctx.sizes)
            return None, *native.differentiable_gradients(same, (edge_scalars, *parameters), wanted, grad)
        radial = _Native.radial(ctx.sizes, edge_scalars)
        grad_scalars = torch.empty_like(edge_scalars) if wanted[0] else None
        grad_packed = packed.new_empty(radial.threads, *packed.shape)
        native.call("radial_backward", radial, edge_scalars, packed, native.plain(grad), grad_scalars, grad_packed)
        grads = grad_packed[0].flatten().split([p.numel() for p in parameters])
        return None, grad_scalars, *(of.view(p.shape) for of, p in zip(grads, parameters, strict=True))

    @staticmethod
    def radial(sizes: tuple[int, int, bool], edge_scalars: Tensor) -> Radial:
        num_networks, _, norm = sizes
        return Radial(*edge_scalars.shape, num_networks, norm, torch.get_num_threads())
