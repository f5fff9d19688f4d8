"""The SE(3)-Transformer (Fuchs et al. 2020): attention blocks, norms, and a last convolution."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from se3_transformer.model.basis import ZERO_LENGTH, check_relative_pos, get_basis, precise_dtype
from se3_transformer.model.fiber import Fiber, degree_to_dim
from se3_transformer.model.graph import Graph, as_graph
from se3_transformer.model.layers import AttentionBlockSE3, ConvSE3, ConvSE3FuseLevel, GPooling
from se3_transformer.model.layers.attention import Skip
from se3_transformer.model.layers.convolution import Aggregation, SelfInteractionPer
from se3_transformer.model.layers.norm import NORMS, NormType
from se3_transformer.model.layers.pooling import Pooling
from se3_transformer.model.layers.relative_position import RelativePosition
from se3_transformer.model.layers.self_interaction import SELF_INTERACTIONS, SelfInteraction
from se3_transformer.model.options import check_choice
from se3_transformer.model.pairs import in_pairs

if TYPE_CHECKING:
    import dgl
    from torch_geometric.data import Data


class Sequential(nn.Sequential):
    """`nn.Sequential` that hands further arguments to every module."""

    def forward(self, features: dict[str, Tensor], *args, **kwargs):  # type: ignore[override]
        for module in self:
            features = module(features, *args, **kwargs)
        return features


PopulateEdge = Literal["lin", "arcsin", "log", "zero"]
EDGE_SCALARS: dict[str, Callable[[Tensor], Tensor]] = {  # of the length of an edge
    "lin": lambda length: length,
    "arcsin": lambda length: torch.arcsinh((length - 4).relu()) / 3,
    "log": torch.log1p,
    "zero": torch.zeros_like,
}


def get_populated_edge_features(
    relative_pos: Tensor, edge_features: dict[str, Tensor] | None = None, *, populate_edge: PopulateEdge = "lin"
) -> dict[str, Tensor]:
    """Edge features with a function of the lengths r as last channel of degree 0: {'0': (E, C + 1, 1), …}.

    Args:
        relative_pos: (E, 3)
        edge_features: {'l': (E, C, 2l+1)}
        populate_edge: 'lin': r; 'arcsin': arsinh(max(r - 4, 0)) / 3; 'log': log(1 + r); 'zero': 0.
    """
    features = {str(degree): feature for degree, feature in (edge_features or {}).items()}
    square = relative_pos.to(precise_dtype(relative_pos)).square().sum(dim=-1)[:, None, None]
    zero = square == 0  # where a norm has no second derivative
    lengths = (torch.where(zero, 1.0, square).sqrt() * ~zero).to(relative_pos.dtype)
    scalar = EDGE_SCALARS[populate_edge](lengths)
    features["0"] = torch.cat([features["0"], scalar], dim=1) if "0" in features else scalar
    return features


class EquivariantNetwork(nn.Module):
    """Layers on a 3D graph between a door that checks what comes in and, where wanted, pooling.

    Outputs of degree l rotate with the Wigner matrices D_l, nothing else moves. Subclasses set `graph_modules`.

    Args:
        num_layers: hidden layers.
        fiber_in, fiber_hidden, fiber_out: fibers of node inputs, hidden layers and outputs.
        fiber_edge: fiber of the edge features; the distance is always added as an edge scalar.
        return_type: return the features of this degree only, as a tensor.
        pooling: 'max', 'avg' or 'sum' over the nodes of each graph, of degree `return_type` (0 by default).
        relative_pos: see `ConvSE3`.
        populate_edge, compute_gradients: see `SE3Transformer`.

    Raises:
        ValueError: sizes that make no sense, or an unknown pooling or populate_edge.
    """

    def __init__(
        self,
        num_layers: int,
        fiber_in: Fiber,
        fiber_hidden: Fiber,
        fiber_out: Fiber,
        fiber_edge: Fiber,
        return_type: int | None,
        pooling: Pooling | None,
        relative_pos: RelativePosition | None,
        populate_edge: PopulateEdge = "lin",
        compute_gradients: bool = True,
    ):
        super().__init__()
        self.graph_modules: Sequential
        self.num_layers = num_layers
        self.fiber_in, self.fiber_hidden, self.fiber_out, self.fiber_edge = (
            fiber_in,
            fiber_hidden,
            fiber_out,
            fiber_edge,
        )
        self.return_type, self.pooling = return_type, pooling
        check_choice("populate_edge", populate_edge, EDGE_SCALARS)
        self.populate_edge, self.compute_gradients = populate_edge, compute_gradients
        fibers = {"fiber_in": fiber_in, "fiber_hidden": fiber_hidden, "fiber_out": fiber_out, "fiber_edge": fiber_edge}
        for name, fiber in fibers.items():
            if not isinstance(fiber, Fiber):
                raise TypeError(f"{name}: expected a Fiber, as Fiber({{0: 16}}) makes it, got {type(fiber).__name__}")
            if not fiber.degrees and name != "fiber_edge":
                raise ValueError(f"{name}: expected at least one degree, got {fiber}")
        if num_layers < 0:
            raise ValueError(f"num_layers must be at least 0, got {num_layers}")
        pooled_type = 0 if return_type is None else int(return_type)
        if (return_type is not None or pooling is not None) and pooled_type not in fiber_out:
            raise ValueError(f"return_type {pooled_type} is not among the output degrees {fiber_out.degrees}")
        if pooling is not None:
            self.pooling_module = GPooling(pool=pooling, feat_type=pooled_type)
        degrees = {*fiber_in.degrees, *fiber_hidden.degrees, *fiber_out.degrees, *fiber_edge.degrees}
        self.max_degree = max(degrees if relative_pos is None else degrees | {1})

    def forward(
        self,
        graph: Graph | dgl.DGLGraph | Data,
        node_feats: dict[str, Tensor],
        edge_feats: dict[str, Tensor] | None = None,
        basis: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor] | Tensor:
        """Run the network.

        Args:
            graph: with `rel_pos`, (E, 3) pos[dst] - pos[src]; of a DGL graph `edata['rel_pos']`; of a PyG `Data` or
                `Batch` its own `rel_pos`, else made from `pos`.
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
        for name, features in (("node features", node_feats), ("edge features", edge_feats or {})):
            if not isinstance(features, Mapping):
                raise TypeError(f"{name}: expected a dict like {{'0': (rows, C, 1)}}, got {type(features).__name__}")
        node_feats = {str(degree): feature for degree, feature in node_feats.items()}
        edge_feats = {str(degree): feature for degree, feature in (edge_feats or {}).items()}
        check_parameters(next(self.parameters()), relative_pos)
        check_features("node feature", node_feats, self.fiber_in, graph.num_nodes, relative_pos)
        check_features("edge feature", edge_feats, self.fiber_edge, graph.num_edges, relative_pos)
        if basis:
            check_basis(basis, self.max_degree, relative_pos)
        else:
            basis = get_basis(relative_pos, self.max_degree, self.compute_gradients)

        edge_feats = get_populated_edge_features(relative_pos, edge_feats, populate_edge=self.populate_edge)
        graph, edge_feats, basis = in_pairs(graph, edge_feats, basis)
        node_feats = self.graph_modules(node_feats, edge_feats, graph=graph, basis=basis)
        if self.pooling is not None:
            return self.pooling_module(node_feats, graph=graph)
        if self.return_type is not None:
            return node_feats[str(self.return_type)]
        return node_feats


class SE3Transformer(EquivariantNetwork):
    """Attention network on a 3D graph; outputs of degree l rotate with the Wigner matrices D_l, nothing else moves.

    Args:
        num_layers: attention blocks before the last layer.
        fiber_in, fiber_hidden, fiber_out: fibers of node inputs, hidden layers and outputs.
        num_heads: attention heads; they split the channels of every degree.
        channels_div: keys and values have the hidden channels divided by this.
        fiber_edge: fiber of the edge features; the distance is added as an edge scalar, see `populate_edge`.
        return_type: return the features of this degree only, as a tensor.
        pooling: 'max', 'avg' or 'sum' over the nodes of each graph, of degree `return_type` (0 by default).
        norm: a nonlinearity after every attention block, see `norm_type`.
        use_layer_norm: layer norm in the radial networks.
        tensor_cores: let all degrees share one radial network where the fibers allow it.
        low_memory: one radial network per pair of degrees, and least memory.
        norm_type: the nonlinearity, 'norm' (`NormSE3`) or 'bias' (`NormBiasSE3`).
        norm_softening: length below which it makes features shorter instead of keeping their lengths, see `NormSE3`.
        self_interaction: in the attention blocks, 'linear' or 'attentive', see `AttentionBlockSE3`.
        skip: skip connection of these blocks, 'cat' or 'sum', see `AttentionBlockSE3`.
        relative_pos: relative positions as vectors among the source features of every layer, 'cat' or 'add', see
            `ConvSE3`.
        final_layer: 'conv'; 'lin' for a self-interaction alone, which sees no neighbours; or 'attention' for one more
            block, with one head, channels_div 1 and skip 'cat'.
        last_self_interaction: in the last layer, 'linear' or 'attentive'.
        aggregation: in the last convolution, 'sum' or 'mean' over incoming edges, see `ConvSE3`.
        self_interaction_per: in the last convolution, 'edge' or 'node', see `ConvSE3`.
        populate_edge: how the distance enters the radial networks, 'lin', 'arcsin', 'log' or 'zero', see
            `get_populated_edge_features`.
        compute_gradients: let gradients with respect to positions flow through the directions of edges, too, where the
            basis is not given.

    Raises:
        ValueError: fibers, heads and channels that do not fit each other, or options that do not.
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
        pooling: Pooling | None = None,
        norm: bool = True,
        use_layer_norm: bool = True,
        tensor_cores: bool = False,
        low_memory: bool = False,
        *,
        norm_type: NormType = "norm",
        norm_softening: float = 0.0,
        self_interaction: SelfInteraction = "linear",
        skip: Skip = "cat",
        relative_pos: RelativePosition | None = None,
        final_layer: Literal["conv", "lin", "attention"] = "conv",
        last_self_interaction: SelfInteraction = "linear",
        aggregation: Aggregation = "sum",
        self_interaction_per: SelfInteractionPer = "edge",
        populate_edge: PopulateEdge = "lin",
        compute_gradients: bool = True,
    ):
        super().__init__(
            num_layers,
            fiber_in,
            fiber_hidden,
            fiber_out,
            fiber_edge,
            return_type,
            pooling,
            relative_pos,
            populate_edge,
            compute_gradients,
        )
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        self.num_heads, self.channels_div = num_heads, channels_div
        self.tensor_cores, self.low_memory = tensor_cores, low_memory
        self.fuse_level = fuse_level(tensor_cores, low_memory)
        check_choice("final_layer", final_layer, ("conv", "lin", "attention"))
        check_choice("last_self_interaction", last_self_interaction, SELF_INTERACTIONS)
        if final_layer != "conv" and (aggregation, self_interaction_per) != ("sum", "edge"):
            raise ValueError(
                f"aggregation and self_interaction_per are of the last convolution, but final_layer is {final_layer!r}"
            )

        shared: dict[str, Any] = dict(
            fiber_edge=fiber_edge,
            use_layer_norm=use_layer_norm,
            max_degree=self.max_degree,
            fuse_level=self.fuse_level,
            low_memory=low_memory,
            relative_pos=relative_pos,
        )
        modules: list[nn.Module] = []
        fiber = fiber_in
        for _ in range(num_layers):
            modules.append(
                AttentionBlockSE3(
                    fiber,
                    fiber_hidden,
                    num_heads=num_heads,
                    channels_div=channels_div,
                    skip=skip,
                    self_interaction=self_interaction,
                    **shared,
                )
            )
            modules += nonlinearity(norm, norm_type, norm_softening, fiber_hidden)
            fiber = fiber_hidden
        last: nn.Module
        if final_layer == "lin":
            if lacking := [degree for degree in fiber_out.degrees if degree not in fiber]:
                raise ValueError(
                    f"final_layer 'lin' makes no new degrees, but fiber_out has {lacking}, which the features before "
                    f"it lack ({fiber})"
                )
            last = SELF_INTERACTIONS[last_self_interaction](fiber, fiber_out)
        elif final_layer == "attention":
            last = AttentionBlockSE3(
                fiber, fiber_out, num_heads=1, channels_div=1, self_interaction=last_self_interaction, **shared
            )
        else:
            last = ConvSE3(
                fiber,
                fiber_out,
                self_interaction=last_self_interaction,
                aggregation=aggregation,
                self_interaction_per=self_interaction_per,
                **shared,
            )
        self.graph_modules = Sequential(*modules, last)


def fuse_level(tensor_cores: bool, low_memory: bool) -> ConvSE3FuseLevel:
    """How far the radial networks of a model may be shared."""
    if low_memory:
        return ConvSE3FuseLevel.NONE
    return ConvSE3FuseLevel.FULL if tensor_cores else ConvSE3FuseLevel.PARTIAL


def nonlinearity(norm: bool, norm_type: NormType, norm_softening: float, fiber: Fiber) -> list[nn.Module]:
    """The layer between two others: one, or none without `norm`."""
    check_choice("norm_type", norm_type, NORMS)
    if not norm and norm_type != "norm":
        raise ValueError(f"norm_type {norm_type!r} needs norm=True")
    if not norm and norm_softening:
        raise ValueError(f"norm_softening {norm_softening} needs norm=True")
    return [NORMS[norm_type](fiber, softening=norm_softening)] if norm else []


class SE3TransformerPooled(nn.Module):
    """SE(3)-Transformer with pooled scalar outputs and a two-layer network on top: one prediction per graph.

    Args:
        fiber_in, fiber_out: fibers of node inputs and of the pooled features (degree 0).
        fiber_edge: fiber of the edge features.
        num_degrees, num_channels: hidden degrees 0 … num_degrees-1, num_channels each.
        output_dim: numbers predicted per graph.
        **kwargs: further arguments of `SE3Transformer`; pooling is 'max' unless given. Existing scripts hand over all
            their settings: what is no argument of it is left out with a warning, unless it looks misspelt.
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
        kwargs = without_foreign(kwargs)
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
        graph: Graph | dgl.DGLGraph | Data,
        node_feats: dict[str, Tensor],
        edge_feats: dict[str, Tensor] | None = None,
        basis: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Predictions (B,) if output_dim is 1, else (B, output_dim); arguments as for `SE3Transformer.forward`."""
        return self.mlp(self.transformer(graph, node_feats, edge_feats, basis)).squeeze(-1)


def without_foreign(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `SE3Transformer` among some options, with a warning that names the others.

    Raises:
        TypeError: an option that is called like an argument but for one slip, see `is_slip`.
    """
    known = list(inspect.signature(SE3Transformer).parameters)
    foreign = [name for name in options if name not in known]
    for name in foreign:
        for argument in known:
            if is_slip(name, argument):
                raise TypeError(f"SE3Transformer has no argument {name!r}; did you mean {argument!r}?")
    if foreign:
        warnings.warn(f"left out, as they are no arguments of SE3Transformer: {', '.join(foreign)}", stacklevel=3)
    return {name: value for name, value in options.items() if name in known}


def is_slip(name: str, meant: str) -> bool:
    """Whether one letter too many, too few or wrong, or two that changed places, make the difference."""
    start = len(commonprefix([name, meant]))
    name, meant = name[start:], meant[start:]
    end = len(commonprefix([name[::-1], meant[::-1]]))
    name, meant = name[: len(name) - end], meant[: len(meant) - end]
    return max(len(name), len(meant)) <= 1 or (len(name) == 2 and name == meant[::-1])


def check_parameters(parameter: Tensor, relative_pos: Tensor) -> None:
    """Raise ValueError unless the positions are on the device and of the dtype of the model's parameters."""
    if parameter.device != relative_pos.device:
        raise ValueError(f"rel_pos: expected on {parameter.device} like the model, got {relative_pos.device}")
    autocast = torch.is_autocast_enabled(parameter.device.type)
    if relative_pos.is_floating_point() and parameter.dtype != relative_pos.dtype and not autocast:
        raise ValueError(f"rel_pos: expected {parameter.dtype} like the model's parameters, got {relative_pos.dtype}")


def check_features(name: str, features: dict[str, Tensor], fiber: Fiber, rows: int, relative_pos: Tensor) -> None:
    """Raise ValueError unless features are {'l': (rows, C, 2l+1)} of the fiber, on the device and of the dtype."""
    extra = [degree for degree, feature in features.items() if degree not in fiber and not is_empty(feature)]
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


def is_empty(feature: Tensor) -> bool:
    """Whether a feature (rows, C, 2l+1) has no channels; whoever builds fibers from numbers may pass such."""
    return isinstance(feature, Tensor) and feature.ndim == 3 and feature.shape[1] == 0


def check_basis(basis: dict[str, Tensor], max_degree: int, relative_pos: Tensor) -> None:
    """Raise ValueError unless basis has a Wigner block of every edge for every degree up to max_degree."""
    check_relative_pos(relative_pos, values=relative_pos.device.type == "cpu")  # elsewhere it would hold up the device
    if dense := [key for key in basis if "," in key or "fused" in key]:
        raise ValueError(
            f"basis: expected what se3_transformer.model.basis.get_basis of this package gives, got the dense basis of "
            f"another one (with {dense[0]!r}); make it anew"
        )
    zero_length = basis.get(ZERO_LENGTH)
    if zero_length is not None and (zero_length.dtype, zero_length.shape) != (torch.bool, relative_pos.shape[:1]):
        raise ValueError(
            f"basis: expected {ZERO_LENGTH!r} as bool ({len(relative_pos)},), got {zero_length.dtype} "
            f"{tuple(zero_length.shape)}; make it anew"
        )
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
