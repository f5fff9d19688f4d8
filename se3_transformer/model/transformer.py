"""The SE(3)-Transformer (Fuchs et al. 2020): attention blocks, norms, and a last convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from se3_transformer.model.basis import ForwardBasis, check_relative_pos, get_basis
from se3_transformer.model.fiber import Fiber, degree_to_dim
from se3_transformer.model.graph import Graph, as_graph
from se3_transformer.model.layers import AttentionBlockSE3, ConvSE3, ConvSE3FuseLevel, GPooling, NormSE3

if TYPE_CHECKING:
    import dgl


class Sequential(nn.Sequential):
    """`nn.Sequential` that hands further arguments to every module."""

    def forward(self, features: dict[str, Tensor], *args, **kwargs) -> dict[str, Tensor]:
        for module in self:
            features = module(features, *args, **kwargs)
        return features


def get_populated_edge_features(
    relative_pos: Tensor, edge_features: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Edge features with the length of `relative_pos` (E, 3) as last channel of degree 0: {'0': (E, C + 1, 1), …}."""
    features = {str(degree): feature for degree, feature in (edge_features or {}).items()}
    length = relative_pos.norm(dim=-1)[:, None, None]
    features["0"] = torch.cat([features["0"], length], dim=1) if "0" in features else length
    return features


class SE3Transformer(nn.Module):
    """Attention network on a 3D graph; outputs of degree l rotate with the Wigner matrices D_l, nothing else moves.

    Args:
        num_layers: attention blocks before the last convolution.
        fiber_in, fiber_hidden, fiber_out: fibers of node inputs, hidden layers and outputs.
        num_heads: attention heads; they split the channels of every degree.
        channels_div: keys and values have the hidden channels divided by this.
        fiber_edge: fiber of the edge features; the distance is always added as an edge scalar.
        return_type: return the features of this degree only, as a tensor.
        pooling: 'max' or 'avg' over the nodes of each graph, of degree `return_type` (0 by default).
        norm: `NormSE3` after every attention block.
        use_layer_norm: layer norm in the radial networks.
        tensor_cores: let all degrees share one radial network where the fibers allow it.
        low_memory: one radial network per pair of degrees, and least memory.

    Raises:
        ValueError: fibers, heads and channels that do not fit each other.
    """

    def __init__(
        self,
        num_layers: int,
        fiber_in: Fiber,
        fiber_hidden: Fiber,
        fiber_out: Fiber,
        num_heads: int,
        channels_div: int,
        fiber_edge: Fiber = Fiber({}),  # noqa: B008 (a Fiber is never modified)
        return_type: int | None = None,
        pooling: Literal["avg", "max"] | None = None,
        norm: bool = True,
        use_layer_norm: bool = True,
        tensor_cores: bool = False,
        low_memory: bool = False,
    ):
        super().__init__()
        self.num_layers, self.num_heads, self.channels_div = num_layers, num_heads, channels_div
        self.fiber_in, self.fiber_hidden, self.fiber_out, self.fiber_edge = (
            fiber_in,
            fiber_hidden,
            fiber_out,
            fiber_edge,
        )
        self.return_type, self.pooling = return_type, pooling
        self.tensor_cores, self.low_memory = tensor_cores, low_memory
        for name, fiber in (("fiber_in", fiber_in), ("fiber_hidden", fiber_hidden), ("fiber_out", fiber_out)):
            if not fiber.degrees:
                raise ValueError(f"{name}: expected at least one degree, got {fiber}")
        for name, value, lowest in (("num_layers", num_layers, 0), ("num_heads", num_heads, 1)):
            if value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        pooled_type = 0 if return_type is None else int(return_type)
        if (return_type is not None or pooling is not None) and pooled_type not in fiber_out:
            raise ValueError(f"return_type {pooled_type} is not among the output degrees {fiber_out.degrees}")

        self.max_degree = max(*fiber_in.degrees, *fiber_hidden.degrees, *fiber_out.degrees, *fiber_edge.degrees)
        if low_memory:
            fuse_level = ConvSE3FuseLevel.NONE
        else:
            fuse_level = ConvSE3FuseLevel.FULL if tensor_cores else ConvSE3FuseLevel.PARTIAL
        shared = dict(
            fiber_edge=fiber_edge,
            use_layer_norm=use_layer_norm,
            max_degree=self.max_degree,
            fuse_level=fuse_level,
            low_memory=low_memory,
        )
        modules: list[nn.Module] = []
        fiber = fiber_in
        for _ in range(num_layers):
            modules.append(
                AttentionBlockSE3(fiber, fiber_hidden, num_heads=num_heads, channels_div=channels_div, **shared)
            )
            if norm:
                modules.append(NormSE3(fiber_hidden))
            fiber = fiber_hidden
        modules.append(ConvSE3(fiber, fiber_out, self_interaction=True, **shared))
        self.graph_modules = Sequential(*modules)
        if pooling is not None:
            self.pooling_module = GPooling(pool=pooling, feat_type=pooled_type)

    def forward(
        self,
        graph: Graph | dgl.DGLGraph,
        node_feats: dict[str, Tensor],
        edge_feats: dict[str, Tensor] | None = None,
        basis: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor] | Tensor:
        """Run the network.

        Args:
            graph: with `rel_pos`, (E, 3) pos[dst] - pos[src]; of a DGL graph `edata['rel_pos']`.
            node_feats: {'l': (N, C, 2l+1)}.
            edge_feats: {'l': (E, C, 2l+1)}, without the distance.
            basis: `get_basis(rel_pos, max_degree)`; computed here if not given.

        Returns:
            {'l': (N, C_out, 2l+1)}; with return_type its tensor; with pooling (B, C_out) or (B, C_out, 2l+1).

        Raises:
            ValueError: a feature that does not fit the fibers or the graph, or positions that are not finite.
        """
        graph = as_graph(graph)
        relative_pos = graph.rel_pos
        if relative_pos is None:
            raise ValueError(
                "graph: no rel_pos; set edata['rel_pos'] (or Graph.rel_pos) to pos[dst] - pos[src], (E, 3)"
            )
        node_feats = {str(degree): feature for degree, feature in node_feats.items()}
        edge_feats = {str(degree): feature for degree, feature in (edge_feats or {}).items()}
        check_parameters(next(self.parameters()), relative_pos)
        check_features("node feature", node_feats, self.fiber_in, graph.num_nodes, relative_pos)
        check_features("edge feature", edge_feats, self.fiber_edge, graph.num_edges, relative_pos)
        if basis is None:
            basis = get_basis(relative_pos, self.max_degree)
        else:
            check_basis(basis, self.max_degree, relative_pos)

        edge_feats = get_populated_edge_features(relative_pos, edge_feats)
        node_feats = self.graph_modules(node_feats, edge_feats, graph=graph, basis=ForwardBasis(basis))
        if self.pooling is not None:
            return self.pooling_module(node_feats, graph=graph)
        if self.return_type is not None:
            return node_feats[str(self.return_type)]
        return node_feats


class SE3TransformerPooled(nn.Module):
    """SE(3)-Transformer with pooled scalar outputs and a two-layer network on top: one prediction per graph.

    Args:
        fiber_in, fiber_out: fibers of node inputs and of the pooled features (degree 0).
        fiber_edge: fiber of the edge features.
        num_degrees, num_channels: hidden degrees 0 … num_degrees-1, num_channels each.
        output_dim: numbers predicted per graph.
        **kwargs: further arguments of `SE3Transformer`; pooling is 'max' unless given.
    """

    def __init__(
        self,
        fiber_in: Fiber,
        fiber_out: Fiber,
        fiber_edge: Fiber,
        num_degrees: int,
        num_channels: int,
        output_dim: int,
        **kwargs,
    ):
        super().__init__()
        if fiber_out.degrees != [0]:
            raise ValueError(f"fiber_out: pooled are scalars, expected degree 0 alone, got {fiber_out}")
        kwargs["pooling"] = kwargs.get("pooling") or "max"
        self.transformer = SE3Transformer(
            fiber_in=fiber_in,
            fiber_hidden=Fiber.create(num_degrees, num_channels),
            fiber_out=fiber_out,
            fiber_edge=fiber_edge,
            return_type=0,
            **kwargs,
        )
        features = fiber_out.num_features
        self.mlp = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, output_dim))

    def forward(
        self,
        graph: Graph | dgl.DGLGraph,
        node_feats: dict[str, Tensor],
        edge_feats: dict[str, Tensor] | None = None,
        basis: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Predictions (B,) if output_dim is 1, else (B, output_dim); arguments as for `SE3Transformer.forward`."""
        return self.mlp(self.transformer(graph, node_feats, edge_feats, basis)).squeeze(-1)


def check_parameters(parameter: Tensor, relative_pos: Tensor) -> None:
    """Raise ValueError unless the positions are on the device and of the dtype of the model's parameters."""
    if parameter.device != relative_pos.device:
        raise ValueError(f"rel_pos: expected on {parameter.device} like the model, got {relative_pos.device}")
    autocast = torch.is_autocast_enabled(parameter.device.type)
    if relative_pos.is_floating_point() and parameter.dtype != relative_pos.dtype and not autocast:
        raise ValueError(f"rel_pos: expected {parameter.dtype} like the model's parameters, got {relative_pos.dtype}")


def check_features(name: str, features: dict[str, Tensor], fiber: Fiber, rows: int, relative_pos: Tensor) -> None:
    """Raise ValueError unless features are {'l': (rows, C, 2l+1)} of the fiber, on the device and of the dtype."""
    extra = [degree for degree in features if degree not in fiber]
    if extra:
        raise ValueError(f"{name}s of degree {', '.join(extra)} came, but the model's fiber is {fiber}")
    for degree, channels in fiber:
        if str(degree) not in features:
            raise ValueError(
                f"{name} of degree {degree} is missing: expected {channels} channels, got {list(features)}"
            )
        feature, expected = features[str(degree)], (rows, channels, degree_to_dim(degree))
        if not isinstance(feature, Tensor):
            raise TypeError(f"{name} of degree {degree}: expected a Tensor, got {type(feature).__name__}")
        if tuple(feature.shape) != expected:
            raise ValueError(f"{name} of degree {degree}: expected shape {expected}, got {tuple(feature.shape)}")
        if not feature.is_floating_point():
            raise ValueError(f"{name} of degree {degree}: expected a floating point dtype, got {feature.dtype}")
        if feature.device != relative_pos.device:
            raise ValueError(
                f"{name} of degree {degree}: expected on {relative_pos.device} like rel_pos, got {feature.device}"
            )
        if feature.dtype != relative_pos.dtype and not torch.is_autocast_enabled(feature.device.type):
            raise ValueError(
                f"{name} of degree {degree}: expected {relative_pos.dtype} like rel_pos, got {feature.dtype}"
            )


def check_basis(basis: dict[str, Tensor], max_degree: int, relative_pos: Tensor) -> None:
    """Raise ValueError unless basis has a Wigner block of every edge for every degree up to max_degree."""
    check_relative_pos(relative_pos, values=relative_pos.device.type == "cpu")  # elsewhere it would hold up the device
    for degree in range(1, max_degree + 1):
        expected = (len(relative_pos), degree_to_dim(degree), degree_to_dim(degree))
        shape = tuple(basis[str(degree)].shape) if str(degree) in basis else None
        if shape != expected:
            raise ValueError(
                f"basis of degree {degree}: expected a block {expected} as get_basis(rel_pos, {max_degree}) gives it, "
                f"got {shape}"
            )
        block = basis[str(degree)]
        if (block.dtype, block.device) != (relative_pos.dtype, relative_pos.device):
            raise ValueError(
                f"basis of degree {degree}: expected {relative_pos.dtype} on {relative_pos.device} like rel_pos, "
                f"got {block.dtype} on {block.device}"
            )
