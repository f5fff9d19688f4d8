"""The Iterative SE(3)-Transformer (Fuchs et al. 2021, arXiv 2102.13419): networks that move the points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from se3_transformer.model.basis import get_basis
from se3_transformer.model.fiber import Fiber, degree_to_dim
from se3_transformer.model.graph import Graph, as_graph
from se3_transformer.model.layers.linear import cat_features
from se3_transformer.model.transformer import SE3Transformer

if TYPE_CHECKING:
    import dgl


class IterativeSE3Transformer(nn.Module):
    """SE(3)-Transformers applied one after the other, each to where the one before it has moved the points.

        features[k+1], vectors = block_k(positions[k], inputs, features[k]),    positions[k+1] = positions[k] + vectors,

    with features[0] = 0. The geometry of the graph is computed anew for every block, and gradients flow through all of
    it; which nodes are joined by edges stays as it is.

    Args:
        num_iterations: K, blocks that the points go through.
        fiber_in: fiber of the node inputs, which every block sees.
        fiber_hidden: see `SE3Transformer`.
        fiber_out: fiber of the features that a block hands on to the next, and the last one to the caller; it may be
            empty.
        shared_weights: one network for all blocks, which then costs no more parameters than a single pass.
        basis_gradients: let gradients flow through the directions of edges. Without, only the distances are
            differentiated, as in programs that take the basis for constant; it is here to be compared with.
        **kwargs: further arguments of `SE3Transformer`, but for return_type and pooling.

    Raises:
        ValueError: fewer than one iteration, or what `SE3Transformer` refuses.
    """

    def __init__(
        self,
        num_iterations: int,
        fiber_in: Fiber,
        fiber_hidden: Fiber,
        fiber_out: Fiber = Fiber({}),  # noqa: B008 (a Fiber is never modified)
        *,
        shared_weights: bool = False,
        basis_gradients: bool = True,
        **kwargs,
    ):
        super().__init__()
        if num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
        if refused := {"return_type", "pooling"} & kwargs.keys():
            raise ValueError(f"{' and '.join(sorted(refused))}: positions and all features of fiber_out are returned")
        self.num_iterations, self.fiber_out, self.basis_gradients = num_iterations, fiber_out, basis_gradients
        self.blocks = nn.ModuleList(
            SE3Transformer(
                fiber_in=fiber_in + fiber_out,
                fiber_hidden=fiber_hidden,
                fiber_out=fiber_out + Fiber({1: 1}),
                **kwargs,
            )
            for _ in range(1 if shared_weights else num_iterations)
        )

    def forward(
        self,
        graph: Graph | dgl.DGLGraph,
        positions: Tensor,
        node_feats: dict[str, Tensor],
        edge_feats: dict[str, Tensor] | Callable[[Tensor], dict[str, Tensor]] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Move the points.

        Args:
            graph: edges; `rel_pos` is not read.
            positions: (N, 3) at the start.
            node_feats: {'l': (N, C, 2l+1)} of fiber_in.
            edge_feats: {'l': (E, C, 2l+1)} without the distance; or, where they depend on the geometry, a function that
                makes them of the relative positions (E, 3).

        Returns:
            positions (K, N, 3) after every block, and the features of fiber_out after the last.

        Raises:
            ValueError: positions that are not (N, 3), or what `SE3Transformer` refuses.
        """
        graph = as_graph(graph)
        if positions.shape != (graph.num_nodes, 3):
            raise ValueError(f"positions: expected shape {(graph.num_nodes, 3)}, got {tuple(positions.shape)}")
        inputs = {str(degree): feature for degree, feature in node_feats.items()}
        features = {
            str(degree): positions.new_zeros(len(positions), channels, degree_to_dim(degree))
            for degree, channels in self.fiber_out
        }
        path = []
        for iteration in range(self.num_iterations):
            block = cast(SE3Transformer, self.blocks[iteration % len(self.blocks)])
            relative_pos = positions[graph.dst] - positions[graph.src]
            features = block(
                replace(graph, rel_pos=relative_pos),
                features | cat_features(inputs, features),
                edge_feats(relative_pos) if callable(edge_feats) else edge_feats,
                get_basis(relative_pos, block.max_degree, compute_gradients=self.basis_gradients),
            )
            features["1"], vectors = features["1"][:, :-1], features["1"][:, -1]
            positions = positions + vectors
            path.append(positions)
            features = {degree: feature for degree, feature in features.items() if degree in self.fiber_out}
        return torch.stack(path), features
