"""Equivariant attention (Fuchs et al. 2020, eqs. 10-12)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from se3_transformer.model.fiber import Fiber, degree_to_dim
from se3_transformer.model.graph import Graph, as_graph
from se3_transformer.model.layers import native
from se3_transformer.model.layers.convolution import ConvSE3, ConvSE3FuseLevel
from se3_transformer.model.layers.linear import LinearSE3
from se3_transformer.model.layers.relative_position import RelativePosition
from se3_transformer.model.layers.self_interaction import SELF_INTERACTIONS, SelfInteraction
from se3_transformer.model.options import check_choice
from se3_transformer.model.segment import gather_rows, segment_softmax, segment_sum

Skip = Literal["cat", "sum"]


class AttentionSE3(nn.Module):
    """Multi-head attention of each node over its incoming edges; heads split the channels of every degree.

    Raises:
        ValueError: channels of some degree do not divide by the number of heads.
    """

    def __init__(self, num_heads: int, key_fiber: Fiber, value_fiber: Fiber):
        super().__init__()
        for name, fiber in (("key", key_fiber), ("value", value_fiber)):
            for degree, channels in fiber:
                if channels % num_heads:
                    raise ValueError(
                        f"attention: {channels} {name} channels of degree {degree} do not divide by {num_heads} heads; "
                        "change num_heads, channels_div or the hidden channels"
                    )
        self.num_heads, self.key_fiber, self.value_fiber = num_heads, key_fiber, value_fiber

    def forward(
        self,
        value: dict[str, Tensor] | Tensor,
        key: dict[str, Tensor] | Tensor | None,
        query: dict[str, Tensor],
        graph: Graph,
    ) -> dict[str, Tensor]:
        """Attend.

        Args:
            value: {'l': (E, C_value, 2l+1)}; where all degrees have the same number of channels also one tensor
                (E, C_value, sum of 2l+1).
            key: {'l': (E, C_key, 2l+1)}, or one tensor like `value`; None if `value` is one tensor of both,
                (E, C_value + C_key, sum of 2l+1).
            query: {'l': (N, C_key, 2l+1)}

        Returns:
            {'l': (N, C_value, 2l+1)}; 0 for nodes without incoming edges.

        Raises:
            ValueError: features of another number of nodes or edges than the graph has.
        """
        graph = as_graph(graph)
        together: dict[str, Tensor] | Tensor = query
        if isinstance(value, Tensor):  # another order of the features of a head, the same sums
            together = torch.cat([query[str(degree)] for degree in self.key_fiber.degrees], dim=-1)
        queries, values = self._flat(together, self.key_fiber), self._flat(value, self.value_fiber)
        keys_values = (values,) if key is None else (values, self._flat(key, self.key_fiber))
        sizes = (self.num_heads, self.value_fiber.num_features, self.key_fiber.num_features)
        of_edge = sizes[1:] if key is not None else (sum(sizes[1:]),)
        names = ("queries", *["keys and values"] * len(keys_values))
        shapes = ((graph.num_nodes, sizes[2]), *((graph.num_edges, size) for size in of_edge))
        for name, feature, shape in zip(names, (queries, *keys_values), shapes, strict=True):
            if feature.shape != shape:
                expected, got = (f"{numbers} numbers in {rows} rows" for rows, numbers in (shape, feature.shape))
                raise ValueError(f"attention: expected {name} of {expected}, got {got}")
        if native.fits(queries, *keys_values, precisions=(torch.float32,)):
            tensors = (tensor.contiguous() for tensor in (queries, *keys_values))
            summed = _Native.apply(sizes, graph.dst, *tensors)
        else:
            summed = attend(sizes, graph.dst, queries, *keys_values)
        if isinstance(value, Tensor):
            by_degree = summed.view(graph.num_nodes, self.value_fiber.channels[0], value.shape[2])
            dims = [degree_to_dim(degree) for degree in self.value_fiber.degrees]
            return dict(zip(map(str, self.value_fiber.degrees), by_degree.split(dims, dim=2), strict=True))
        by_head = summed.unflatten(1, (self.num_heads, -1))
        of_head = [channels * degree_to_dim(degree) // self.num_heads for degree, channels in self.value_fiber]
        return {
            str(degree): part.reshape(graph.num_nodes, channels, degree_to_dim(degree))
            for (degree, channels), part in zip(self.value_fiber, by_head.split(of_head, dim=-1), strict=True)
        }

    def _flat(self, features: dict[str, Tensor] | Tensor, fiber: Fiber) -> Tensor:
        """(rows, D), head after head."""
        heads = features if isinstance(features, Tensor) else fiber.to_attention_heads(features, self.num_heads)
        return heads.flatten(1)


def attend(sizes: tuple[int, int, int], dst: Tensor, query: Tensor, *keys_values: Tensor) -> Tensor:
    """What each node collects over its incoming edges, (N, D_value), head after head.

    Args:
        sizes: heads, D_value, D_key
        dst: (E,)
        query: (N, D_key)
        keys_values: values (E, D_value) and keys (E, D_key), or one tensor of both.
    """
    heads, _, of_key = sizes
    value, key = split_keys_values(sizes, keys_values)
    value, key, query = (tensor.unflatten(1, (heads, -1)) for tensor in (value, key, query))
    logits = (key * gather_rows(query, dst)).sum(dim=-1) / of_key**0.5  # (E, heads)
    weights = segment_softmax(logits, dst, query.shape[0])
    return segment_sum(value * weights.unsqueeze(-1), dst, query.shape[0]).flatten(1)


def split_keys_values(sizes: tuple[int, int, int], keys_values: Sequence[Tensor]) -> Sequence[Tensor]:
    """Values and keys."""
    return keys_values[0].split(sizes[1:], dim=1) if len(keys_values) == 1 else keys_values


class Attention(ctypes.Structure):
    """As in attention.c."""

    _fields_ = native.numbers("nodes heads threads of_key of_value key_row value_row")


class _Native(torch.autograd.Function):
    """`attend`, by attention.c."""

    @staticmethod
    def forward(ctx, sizes: tuple[int, int, int], dst: Tensor, query: Tensor, *keys_values: Tensor) -> Tensor:
        starts, order = native.grouped(dst, len(query))
        value, key = split_keys_values(sizes, keys_values)
        weights, out = query.new_empty(len(dst), sizes[0]), query.new_empty(len(query), sizes[1])
        native.call(
            "attention_forward",
            *_Native.arguments(sizes, query, value, key),
            *(starts, order, value, key, query, weights, out),
        )
        ctx.sizes = sizes
        ctx.save_for_backward(dst, starts, order, weights, query, *keys_values)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        dst, starts, order, weights, query, *keys_values = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            same, inputs = partial(attend, ctx.sizes, dst), (query, *keys_values)
            return None, None, *native.differentiable_gradients(same, inputs, ctx.needs_input_grad[2:], grad)
        grads = [torch.empty_like(tensor) for tensor in (query, *keys_values)]
        value, key = split_keys_values(ctx.sizes, keys_values)
        grad_value, grad_key = split_keys_values(ctx.sizes, grads[1:])
        native.call(
            "attention_backward",
            *_Native.arguments(ctx.sizes, query, value, key),
            *(starts, order, value, key, query, weights, native.plain(grad), grad_value, grad_key, grads[0]),
        )
        return None, None, *grads

    @staticmethod
    def arguments(sizes: tuple[int, int, int], query: Tensor, value: Tensor, key: Tensor) -> tuple:
        heads, of_value, of_key = sizes
        of_head, rows = (of_key // heads, of_value // heads), (key.stride(0), value.stride(0))
        attention = Attention(len(query), heads, torch.get_num_threads(), *of_head, *rows)
        return attention, ctypes.c_float(of_key**-0.5)


class AttentionBlockSE3(nn.Module):
    """Keys and values from one convolution, queries from a linear map, attention, self-interaction, skip connection.

    Args:
        fiber_in, fiber_out: fibers of input and output.
        fiber_edge: fiber of the edge features without the distance.
        num_heads: attention heads.
        channels_div: values and keys have the channels of fiber_out divided by this.
        use_layer_norm, max_degree, fuse_level, low_memory, relative_pos: see `ConvSE3`.
        skip: how the inputs reach the output. 'cat': the self-interaction mixes concat(values, inputs); 'sum': it mixes
            the values, and the inputs are added to the first channels of each degree.
        self_interaction: 'linear' (`LinearSE3`) or 'attentive' (`AttentiveSelfInteractionSE3`).

    Raises:
        ValueError: fibers, heads and channels that do not fit each other, or an unknown option.
    """

    def __init__(
        self,
        fiber_in: Fiber,
        fiber_out: Fiber,
        fiber_edge: Fiber | None = None,
        num_heads: int = 4,
        channels_div: int = 2,
        use_layer_norm: bool = False,
        max_degree: int = 4,
        fuse_level: ConvSE3FuseLevel = ConvSE3FuseLevel.FULL,
        low_memory: bool = False,
        *,
        relative_pos: RelativePosition | None = None,
        skip: Skip = "cat",
        self_interaction: SelfInteraction = "linear",
    ):
        super().__init__()
        if num_heads < 1 or channels_div < 1:
            raise ValueError(f"num_heads and channels_div must be at least 1, got {num_heads} and {channels_div}")
        for degree, channels in fiber_out:
            if channels < channels_div:
                raise ValueError(
                    f"attention: {channels} channels of degree {degree} leave none if divided by {channels_div}"
                )
            if skip == "sum" and fiber_in[degree] > channels:
                raise ValueError(
                    f"attention: with skip 'sum' the {fiber_in[degree]} input channels of degree {degree} must be at "
                    f"most as many as the output's, {channels}; use 'cat'"
                )
        check_choice("skip", skip, ("cat", "sum"))
        check_choice("self_interaction", self_interaction, SELF_INTERACTIONS)
        self.fiber_in, self.skip = fiber_in, skip
        self.value_fiber = Fiber([(degree, channels // channels_div) for degree, channels in fiber_out])
        self.key_query_fiber = Fiber([(degree, c) for degree, c in self.value_fiber if degree in fiber_in])
        if not self.key_query_fiber.degrees:
            raise ValueError(f"attention: no degree of {fiber_out} in the input {fiber_in} to make queries and keys of")
        self.attention = AttentionSE3(num_heads, self.key_query_fiber, self.value_fiber)
        uniform = len(set(self.value_fiber.channels)) == 1
        self.to_key_value = ConvSE3(
            fiber_in,
            self.value_fiber + self.key_query_fiber,
            fiber_edge,
            pool=False,
            use_layer_norm=use_layer_norm,
            max_degree=max_degree,
            fuse_level=fuse_level,
            allow_fused_output=uniform and self.value_fiber.structure == self.key_query_fiber.structure,
            low_memory=low_memory,
            relative_pos=relative_pos,
        )
        self.to_query = LinearSE3(fiber_in, self.key_query_fiber)
        fiber_mixed = self.value_fiber + fiber_in if skip == "cat" else self.value_fiber
        self.project = SELF_INTERACTIONS[self_interaction](fiber_mixed, fiber_out)

    def forward(
        self,
        node_features: dict[str, Tensor],
        edge_features: dict[str, Tensor],
        graph: Graph,
        basis: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """{'l': (N, C_in, 2l+1)} -> {'l': (N, C_out, 2l+1)}; arguments as for `ConvSE3.forward`."""
        graph = as_graph(graph)
        key_value = self.to_key_value(node_features, edge_features, graph, basis)
        value: dict[str, Tensor] | Tensor
        key: dict[str, Tensor] | None
        if isinstance(key_value, Tensor):
            value, key = key_value, None
        else:
            value = {degree: feature[:, : self.value_fiber[degree]] for degree, feature in key_value.items()}
            key = {
                degree: feature[:, self.value_fiber[degree] :]
                for degree, feature in key_value.items()
                if degree in self.key_query_fiber
            }
        query = self.to_query(node_features)
        attended = self.attention(value, key, query, graph)
        inputs = {str(degree): node_features[str(degree)] for degree in self.fiber_in.degrees}
        if self.skip == "cat":
            return self.project(attended, appended=inputs)
        return add_features(self.project(attended), inputs)


def add_features(features: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """`others` added to the first channels of `features`, where both have the degree."""
    return {
        degree: feature + pad(others[degree], (0, 0, 0, feature.shape[1] - others[degree].shape[1]))
        if degree in others
        else feature
        for degree, feature in features.items()
    }
