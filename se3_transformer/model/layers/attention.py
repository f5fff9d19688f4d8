"""Equivariant attention (Fuchs et al. 2020, eqs. 10-12)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from se3_transformer.model.fiber import Fiber, degree_to_dim
from se3_transformer.model.graph import Graph, as_graph
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
        self, value: dict[str, Tensor] | Tensor, key: dict[str, Tensor] | Tensor, query: dict[str, Tensor], graph: Graph
    ) -> dict[str, Tensor]:
        """Attend.

        Args:
            value: {'l': (E, C_value, 2l+1)}; where all degrees have the same number of channels also one tensor
                (E, C_value, sum of 2l+1).
            key: {'l': (E, C_key, 2l+1)}, or one tensor like `value`.
            query: {'l': (N, C_key, 2l+1)}

        Returns:
            {'l': (N, C_value, 2l+1)}; 0 for nodes without incoming edges.
        """
        graph = as_graph(graph)
        if isinstance(key, Tensor):  # another order of the features of a head, the same sums
            query = torch.cat([query[str(degree)] for degree in self.key_fiber.degrees], dim=-1)
        keys = self._heads(key, self.key_fiber)  # (E, heads, D_key / heads)
        queries = self._heads(query, self.key_fiber)  # (N, heads, D_key / heads)
        logits = (keys * gather_rows(queries, graph.dst)).sum(dim=-1) / self.key_fiber.num_features**0.5  # (E, heads)
        weights = segment_softmax(logits, graph.dst, graph.num_nodes)
        values = self._heads(value, self.value_fiber)  # (E, heads, D_value / heads)
        summed = segment_sum(values * weights.unsqueeze(-1), graph.dst, graph.num_nodes)
        if isinstance(value, Tensor):
            by_degree = summed.view(graph.num_nodes, *value.shape[1:])
            dims = [degree_to_dim(degree) for degree in self.value_fiber.degrees]
            return dict(zip(map(str, self.value_fiber.degrees), by_degree.split(dims, dim=2), strict=True))
        sizes = [channels * degree_to_dim(degree) // self.num_heads for degree, channels in self.value_fiber]
        return {
            str(degree): part.reshape(graph.num_nodes, channels, degree_to_dim(degree))
            for (degree, channels), part in zip(self.value_fiber, summed.split(sizes, dim=-1), strict=True)
        }

    def _heads(self, features: dict[str, Tensor] | Tensor, fiber: Fiber) -> Tensor:
        """(…, heads, D / heads)"""
        if isinstance(features, Tensor):
            return features.reshape(features.shape[0], self.num_heads, fiber.num_features // self.num_heads)
        return fiber.to_attention_heads(features, self.num_heads)


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
        if isinstance(key_value, Tensor):
            value, key = key_value.chunk(2, dim=1)
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
            return self.project(cat_features(attended, inputs))
        return add_features(self.project(attended), inputs)


def cat_features(features: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Channels of `features`, then those of `others` where these have the degree."""
    return {
        degree: torch.cat([feature, others[degree]], dim=1) if degree in others else feature
        for degree, feature in features.items()
    }


def add_features(features: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """`others` added to the first channels of `features`, where both have the degree."""
    return {
        degree: feature + pad(others[degree], (0, 0, 0, feature.shape[1] - others[degree].shape[1]))
        if degree in others
        else feature
        for degree, feature in features.items()
    }
