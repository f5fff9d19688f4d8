"""Pooling of node features to one feature per graph."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from se3_transformer.model.graph import Graph, as_graph
from se3_transformer.model.options import check_choice
from se3_transformer.model.segment import segment_max, segment_mean, segment_sum

Pooling = Literal["max", "avg", "sum"]
POOLINGS = {"max": segment_max, "avg": segment_mean, "sum": segment_sum}


class GPooling(nn.Module):
    """Pools the features of one degree over the nodes of each graph: {'l': (N, C, 2l+1)} -> (B, C) or (B, C, 2l+1).

    Args:
        feat_type: degree to pool. Only degree 0 may be max-pooled: the maximum of vector components is not equivariant.
        pool: 'max', 'avg' or 'sum'.

    Raises:
        ValueError: an unknown kind of pooling, or max pooling of a degree > 0.
    """

    def __init__(self, feat_type: int = 0, pool: Pooling = "max"):
        super().__init__()
        check_choice("pooling", pool, POOLINGS)
        if pool == "max" and feat_type != 0:
            raise ValueError(
                f"max pooling of degree {feat_type} is not equivariant; use 'avg' or 'sum', or pool degree 0"
            )
        self.feat_type, self.reduce = feat_type, POOLINGS[pool]

    def forward(self, features: dict[str, Tensor], graph: Graph) -> Tensor:
        graph = as_graph(graph)
        pooled = self.reduce(features[str(self.feat_type)], graph.graph_of_node(), graph.num_graphs)
        return pooled.squeeze(-1)
