"""Edges that come in pairs i -> j, j -> i with the same edge scalars, as in every undirected graph.

The radial weights of an edge depend on its scalars alone, so both edges of such a pair share them: a convolution that
makes the weights (see `RadialWeightsFirst`) does half the work if it knows the pairs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from se3_transformer.model.basis import ForwardBasis
from se3_transformer.model.graph import Graph
from se3_transformer.model.segment import gather_rows


def pair_order(src: Tensor, dst: Tensor, num_nodes: int) -> Tensor | None:
    """An order (E,) in which edges 2k and 2k + 1 are each other's reverse; None if some edge is without a reverse."""
    if len(src) == 0 or len(src) % 2:
        return None
    undirected = torch.minimum(src, dst) * num_nodes + torch.maximum(src, dst)
    order = undirected.argsort(stable=True)
    first, second = order[::2], order[1::2]
    if torch.equal(src[first], dst[second]) and torch.equal(dst[first], src[second]):
        return order
    return None


def in_pairs(
    graph: Graph, edge_feats: dict[str, Tensor], basis: dict[str, Tensor]
) -> tuple[Graph, dict[str, Tensor], ForwardBasis]:
    """The same edges in an order in which pairs stand together, and a basis that says so, where that is of use.

    It is not where the values of edge scalars want gradients, which differ within a pair, and on devices other than
    CPUs, where looking at values would hold up the device and the order of contraction is another one.

    Args:
        graph: N nodes, E edges.
        edge_feats: {'l': (E, C, 2l+1)}, '0' with the distance.
        basis: as `get_basis` gives it.
    """
    scalars, as_it_is = edge_feats["0"], ForwardBasis(basis)
    unfit = scalars.device.type != "cpu" or scalars.requires_grad or torch.compiler.is_compiling()
    unfit = unfit or as_it_is.zero_length is not None
    order = None if unfit else pair_order(graph.src, graph.dst, graph.num_nodes)
    if order is None:
        return graph, edge_feats, as_it_is
    scalars = gather_rows(scalars, order)
    if not torch.equal(scalars[::2], scalars[1::2]):
        return graph, edge_feats, as_it_is
    assert graph.rel_pos is not None  # else there was no distance
    graph = replace(
        graph,
        src=gather_rows(graph.src, order),
        dst=gather_rows(graph.dst, order),
        rel_pos=gather_rows(graph.rel_pos, order),
    )
    edge_feats = {degree: gather_rows(feature, order) for degree, feature in edge_feats.items()}
    basis = {degree: gather_rows(block, order) for degree, block in basis.items()}
    return graph, edge_feats, ForwardBasis(basis, in_pairs=True)
