"""What a convolution convolves: features of source nodes and of edges, with or without the relative position.

As a vector among them it is the option "x_ij" of the authors' program. Each function returns source features, edge
features, and for every edge the row of its source.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from se3_transformer.model.graph import Graph
from se3_transformer.model.segment import gather_rows

RelativePosition = Literal["add", "cat"]
Features = dict[str, Tensor]


def without_relative_pos(node_feats: Features, edge_feats: Features, graph: Graph) -> tuple[Features, Features, Tensor]:
    """Everything as it is."""
    return node_feats, edge_feats, graph.src


def cat_relative_pos(node_feats: Features, edge_feats: Features, graph: Graph) -> tuple[Features, Features, Tensor]:
    """The relative position is the last channel of the edge features of degree 1."""
    vectors = _relative_pos(graph)
    if "1" in edge_feats:
        vectors = torch.cat([edge_feats["1"], vectors], dim=1)
    return node_feats, {**edge_feats, "1": vectors}, graph.src


def add_relative_pos(node_feats: Features, edge_feats: Features, graph: Graph) -> tuple[Features, Features, Tensor]:
    """The relative position is added to the first channel of degree 1 of the source, so that each edge has its own."""
    source_feats = {degree: gather_rows(feature, graph.src) for degree, feature in node_feats.items()}
    first, others = source_feats["1"][:, :1], source_feats["1"][:, 1:]
    source_feats["1"] = torch.cat([first + _relative_pos(graph), others], dim=1)
    return source_feats, edge_feats, torch.arange(graph.num_edges, device=graph.device)


def _relative_pos(graph: Graph) -> Tensor:
    """(E, 1, 3); ValueError where the graph has none."""
    if graph.rel_pos is None:
        raise ValueError(
            "graph: no rel_pos, which the option relative_pos needs; set it to pos[dst] - pos[src], (E, 3)"
        )
    return graph.rel_pos.unsqueeze(1)


RELATIVE_POSITIONS = {None: without_relative_pos, "cat": cat_relative_pos, "add": add_relative_pos}
