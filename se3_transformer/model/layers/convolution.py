"""Tensor field convolution (Thomas et al. 2018; Fuchs et al. 2020, eq. 8), evaluated in edge frames.

With radial weights R_J = W_J h(e) made from the last hidden layer h of the radial network, and source features rotated
into the frame of the edge (see `se3_transformer.model.basis`), the kernel acts on each |m| separately, over all
degrees and channels at once:

    z[e, o] = sum_{i, h} W_m[o, i, h] · h[e, h] · x_m[e, i]

with i over (l_in >= m, C_in) and o over (l_out >= m, C_out). W_m is a fixed invertible mixture of the rows of the last
linear layer, so parameters mean what they mean in the dense form. How the product is done without anything of size
E · C_out · C_in · F: see `se3_transformer.model.layers.contraction`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import cache
from itertools import product
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from se3_transformer.model.basis import (
    ForwardBasis,
    constant,
    frame_kernels,
    frame_matrix,
    isotropic_kernel,
    split_orders,
    zero_length_edges,
)
from se3_transformer.model.fiber import Fiber, degree_to_dim
from se3_transformer.model.graph import Graph, as_graph
from se3_transformer.model.layers import native
from se3_transformer.model.layers.contraction import (
    ORDERS,
    Contraction,
    RadialWeightsFirst,
    contract,
    dtype_of_products,
)
from se3_transformer.model.layers.linear import mix_degrees
from se3_transformer.model.layers.native_convolution import Groups, Matrices, Messages, Plan, RadialNetwork, Source
from se3_transformer.model.layers.radial import RadialProfile, hidden_layers
from se3_transformer.model.layers.relative_position import RELATIVE_POSITIONS, RelativePosition, cat_relative_pos
from se3_transformer.model.layers.self_interaction import (
    SELF_INTERACTIONS,
    AttentiveSelfInteractionSE3,
    SelfInteraction,
)
from se3_transformer.model.options import check_choice
from se3_transformer.model.segment import gather_rows, segment_mean, segment_sum

# A convolution over more edges than this works in chunks; with low_memory over more than the second number. The
# backward pass computes them again, so that what is kept per edge is its message alone. Without low_memory those of
# compiled code are not computed again, which keeps little else.
MAX_EDGES, MAX_EDGES_LOW_MEMORY = 16384, 1024

SelfInteractionPer = Literal["edge", "node"]
Aggregation = Literal["sum", "mean"]
AGGREGATIONS = {"sum": segment_sum, "mean": segment_mean}


class ConvSE3FuseLevel(Enum):
    """How far a convolution may share radial networks: per pair of degrees, per output or input degree, one for all."""

    FULL = 2
    PARTIAL = 1
    NONE = 0


class VersatileConvSE3(nn.Module):
    """The radial network of a rectangle of degree pairs: all of `degrees_out` with all of `degrees_in`.

    Args:
        unit_scalar_kernel: the kernel of the pair (0, 0) is 1 instead of Y_0 times the coupling, as it is by
            definition where a pair has a radial network of its own.
    """

    def __init__(
        self,
        degrees_in: list[int],
        degrees_out: list[int],
        channels_in: int,
        channels_out: int,
        edge_dim: int,
        use_layer_norm: bool,
        unit_scalar_kernel: bool = False,
    ):
        super().__init__()
        self.degrees_in, self.degrees_out = tuple(degrees_in), tuple(degrees_out)
        self.unit_scalar_kernel = unit_scalar_kernel
        num_freq = sum(degree_to_dim(min(pair)) for pair in product(degrees_in, degrees_out))
        self.radial_func = RadialProfile(num_freq, channels_in, channels_out, edge_dim, use_layer_norm=use_layer_norm)
        hidden_dim = self.radial_func.mid_dim
        self.order = cheapest_order(self.degrees_in, self.degrees_out, channels_in, channels_out, hidden_dim)

    def frame_weights(self) -> list[Tensor]:
        """W_m of every order m = 0 … min(highest degrees): strided views (P, outs, C_out, ins, C_in, H).

        P = 1 for m = 0 (a_0) and 2 for m > 0 (a_m, b_m); outs and ins count the degrees >= m.
        """
        weight = self.radial_func.last_weight  # (C_out, C_in, F, H)
        settings = self.degrees_in, self.degrees_out, self.unit_scalar_kernel
        mixture = frame_mixture(*settings, dtype_of_products(weight), weight.device)
        mixed = mixture @ weight  # (C_out, C_in, F, H)
        counts = []  # (parts, outs, ins) of every order
        for order in range(min(max(self.degrees_in), max(self.degrees_out)) + 1):
            outs = sum(degree >= order for degree in self.degrees_out)
            ins = sum(degree >= order for degree in self.degrees_in)
            counts.append((1 if order == 0 else 2, outs, ins))
        by_order = mixed.split([parts * outs * ins for parts, outs, ins in counts], dim=2)
        return [
            rows.unflatten(2, count).permute(2, 3, 0, 4, 1, 5) for rows, count in zip(by_order, counts, strict=True)
        ]

    def isotropic_weight(self, degree: int) -> Tensor:
        """(C_out, C_in, H) weight of the path J = 0 from `degree` to itself, the only one of an edge of length zero."""
        start = 0
        for degree_out in self.degrees_out:
            for degree_in in self.degrees_in:
                if degree_in == degree_out == degree:
                    weight = self.radial_func.last_weight[:, :, start]
                    return weight * isotropic_kernel(degree, weight.dtype, weight.device)
                start += degree_to_dim(min(degree_in, degree_out))
        raise ValueError(f"no path from degree {degree} to itself among {self.degrees_in} -> {self.degrees_out}")


@constant
def frame_mixture(
    degrees_in: tuple[int, ...],
    degrees_out: tuple[int, ...],
    unit_scalar_kernel: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Constant (F, F) matrix from radial weights, ordered (l_out, l_in, J), to kernels in the edge frame.

    Its rows are ordered by (m, a or b, l_out, l_in).
    """
    paths, num_freq = {}, 0
    for degree_out in degrees_out:
        for degree_in in degrees_in:
            size = degree_to_dim(min(degree_in, degree_out))
            paths[degree_out, degree_in] = slice(num_freq, num_freq + size)
            num_freq += size
    rows = []
    for order in range(min(max(degrees_in), max(degrees_out)) + 1):
        for part in (0,) if order == 0 else (0, 1):
            for (degree_out, degree_in), path in paths.items():
                if order <= min(degree_in, degree_out):
                    row = torch.zeros(num_freq, dtype=torch.float64)
                    unit = unit_scalar_kernel and degree_in == degree_out == 0
                    row[path] = 1.0 if unit else frame_kernels(degree_in, degree_out)[part][order]
                    rows.append(row)
    return torch.stack(rows).to(dtype=dtype, device=device)


@cache
def plan(
    networks: tuple[tuple, ...], groups_in: Groups, groups_out: Groups, sources: tuple[Source, ...], fused: bool
) -> Plan:
    """A `Plan`; of each radial network (degrees in, degrees out, channels in, channels out, unit_scalar_kernel)."""
    made = []
    for degrees_in, degrees_out, channels_in, channels_out, unit in networks:
        mixture = frame_mixture(degrees_in, degrees_out, unit, torch.float64, torch.device("cpu"))
        made.append(RadialNetwork(degrees_in, degrees_out, channels_in, channels_out, mixture))
    return Plan(tuple(made), groups_in, groups_out, sources, fused)


def cheapest_order(
    degrees_in: tuple[int, ...], degrees_out: tuple[int, ...], channels_in: int, channels_out: int, hidden_dim: int
) -> type[Contraction]:
    """The order of contraction with the smallest intermediates, all |m| together."""
    sizes = dict.fromkeys(ORDERS, 0)
    for m in range(min(max(degrees_in), max(degrees_out)) + 1):
        signs = 1 if m == 0 else 2
        n_in = sum(degree >= m for degree in degrees_in) * channels_in
        n_out = sum(degree >= m for degree in degrees_out) * channels_out
        for order in ORDERS:
            K, Q = (signs * n_in, n_out) if order.stacks_features else (n_in, signs * n_out)
            sizes[order] += order.size(signs, K, Q, hidden_dim)
    return min(sizes, key=sizes.__getitem__)


def group_by_value(values: dict[int, object]) -> list[tuple[int, ...]]:
    """The keys with equal values, together."""
    groups: dict[object, list[int]] = {}
    for key, value in values.items():
        groups.setdefault(value, []).append(key)
    return [tuple(keys) for keys in groups.values()]


class ConvSE3(nn.Module):
    """Convolution of node features over the edges of a graph (Fuchs et al. 2020, eq. 8; design of NVIDIA's package).

    Args:
        fiber_in, fiber_out: fibers of input and output.
        fiber_edge: fiber of the edge features, without the distance, which is always one more edge scalar. Degree 0
            goes into the radial networks; degrees l > 0 are concatenated to the channels of the source node.
        pool: sum over the incoming edges of each node, giving node features; otherwise edge features.
        use_layer_norm: layer norm in the radial networks.
        self_interaction: add a map of the receiving node's features: 'linear' (or True), or 'attentive' for
            `AttentiveSelfInteractionSE3`.
        max_degree: highest degree of the network; radial networks are shared only where all degrees up to it are there.
        fuse_level: how far radial networks may be shared.
        allow_fused_output: where all output degrees have the same number of channels, and neither `pool` nor
            `self_interaction` is on, return one tensor (E, C_out, sum of 2l+1) instead of one for each degree.
        low_memory: always work in small chunks of edges that the backward pass computes again.
        relative_pos: the vector `graph.rel_pos` among the source features. 'cat': as one more channel of degree 1;
            'add': added to the first channel of degree 1, or as the only one where the source has none.
        aggregation: how `pool` takes the incoming edges together, 'sum' or 'mean'.
        self_interaction_per: 'edge' adds it to every incoming edge, so that its share depends on their number; 'node'
            adds it once to each node, those without incoming edges included.

    Raises:
        ValueError: nothing to convolve, or an option that is unknown or does not fit the others.
    """

    def __init__(
        self,
        fiber_in: Fiber,
        fiber_out: Fiber,
        fiber_edge: Fiber | None = None,
        pool: bool = True,
        use_layer_norm: bool = False,
        self_interaction: bool | SelfInteraction = False,
        max_degree: int = 4,
        fuse_level: ConvSE3FuseLevel = ConvSE3FuseLevel.FULL,
        allow_fused_output: bool = False,
        low_memory: bool = False,
        *,
        relative_pos: RelativePosition | None = None,
        aggregation: Aggregation = "sum",
        self_interaction_per: SelfInteractionPer = "edge",
    ):
        super().__init__()
        fiber_edge = Fiber({}) if fiber_edge is None else fiber_edge
        check_choice("self_interaction", self_interaction, (False, True, *SELF_INTERACTIONS))
        check_choice("relative_pos", relative_pos, RELATIVE_POSITIONS)
        check_choice("aggregation", aggregation, AGGREGATIONS)
        check_choice("self_interaction_per", self_interaction_per, ("edge", "node"))
        if aggregation == "mean" and not pool:
            raise ValueError("aggregation: 'mean' is over the incoming edges of a node, which needs pool")
        if self_interaction_per == "node" and not (pool and self_interaction):
            raise ValueError("self_interaction_per: 'node' needs pool and a self_interaction")
        self.aggregate, self.self_interaction_per = AGGREGATIONS[aggregation], self_interaction_per
        self.sources = RELATIVE_POSITIONS[relative_pos]
        if relative_pos == "cat" or (relative_pos == "add" and 1 not in fiber_in):
            self.sources, fiber_edge = cat_relative_pos, fiber_edge + Fiber({1: 1})
        self.pool, self.self_interaction, self.low_memory = pool, self_interaction, low_memory
        self.fiber_in, self.fiber_out, self.fiber_edge, self.max_degree = fiber_in, fiber_out, fiber_edge, max_degree
        # Channels that are convolved: those of the source node, then those of the edge.
        self.fiber_source = fiber_in + Fiber({degree: c for degree, c in fiber_edge if degree > 0})
        if not self.fiber_source.degrees or not fiber_out.degrees:
            raise ValueError(f"ConvSE3: nothing to convolve from {self.fiber_source} to {fiber_out}")

        all_degrees = list(range(max_degree + 1))
        same_in = len(set(self.fiber_source.channels)) == 1 and self.fiber_source.degrees == all_degrees
        same_out = len(set(fiber_out.channels)) == 1 and fiber_out.degrees == all_degrees
        partial = fuse_level in (ConvSE3FuseLevel.PARTIAL, ConvSE3FuseLevel.FULL)
        degrees_in = [*fiber_in.by_channels, *(d for d in self.fiber_source.degrees if d not in fiber_in)]

        def rectangle(degrees_in: list[int], degrees_out: list[int], **kwargs) -> VersatileConvSE3:
            return VersatileConvSE3(
                degrees_in,
                degrees_out,
                self.fiber_source[degrees_in[0]],
                fiber_out[degrees_out[0]],
                edge_dim=fiber_edge[0] + 1,
                use_layer_norm=use_layer_norm,
                **kwargs,
            )

        if fuse_level == ConvSE3FuseLevel.FULL and same_in and same_out:
            self.used_fuse_level = ConvSE3FuseLevel.FULL
            self.conv: nn.Module = rectangle(all_degrees, all_degrees)
        elif partial and same_in:
            self.used_fuse_level = ConvSE3FuseLevel.PARTIAL
            self.conv_out = nn.ModuleDict({str(d): rectangle(all_degrees, [d]) for d in fiber_out.by_channels})
        elif partial and same_out:
            self.used_fuse_level = ConvSE3FuseLevel.PARTIAL
            self.conv_in = nn.ModuleDict({str(d): rectangle([d], all_degrees) for d in degrees_in})
        else:
            self.used_fuse_level = ConvSE3FuseLevel.NONE
            pairs = product(degrees_in, fiber_out.by_channels)
            self.conv = nn.ModuleDict({f"{i},{o}": rectangle([i], [o], unit_scalar_kernel=True) for i, o in pairs})

        # Degrees with the same number of channels are rotated together.
        self._groups_in = group_by_value(dict(self.fiber_source.structure))
        self._groups_out = group_by_value(dict(fiber_out.structure))
        self._degrees_out = [degree for degrees in self._groups_out for degree in degrees]
        self.fused_output = allow_fused_output and not pool and not self_interaction and len(self._groups_out) == 1
        self.to_kernel_self: AttentiveSelfInteractionSE3 | nn.ParameterDict
        if self_interaction == "attentive":
            self.to_kernel_self = AttentiveSelfInteractionSE3(fiber_in, fiber_out)
        elif self_interaction:
            self.to_kernel_self = nn.ParameterDict(
                [  # of pairs, because a dict would be sorted
                    (str(d), nn.Parameter(torch.randn(fiber_out[d], fiber_in[d]) / fiber_in[d] ** 0.5))
                    for d in fiber_out.by_channels
                    if d in fiber_in
                ]
            )

    @property
    def _rectangles(self) -> list[VersatileConvSE3]:
        """What the pairs of degrees are divided into; read anew each time, since users replace modules."""
        (found,) = (self._modules[name] for name in ("conv", "conv_out", "conv_in") if name in self._modules)
        return cast(list[VersatileConvSE3], list(found.values()) if isinstance(found, nn.ModuleDict) else [found])

    def forward(
        self, node_feats: dict[str, Tensor], edge_feats: dict[str, Tensor], graph: Graph, basis: dict[str, Tensor]
    ) -> dict[str, Tensor] | Tensor:
        """Convolve.

        Args:
            node_feats: {'l': (N, C_in, 2l+1)}.
            edge_feats: {'l': (E, C_edge, 2l+1)}; '0' is (E, C_edge + 1, 1) with the distance as last channel.
            graph: `Graph` or `dgl.DGLGraph`.
            basis: as `get_basis` gives it.

        Returns:
            {'l': (N, C_out, 2l+1)}, or with E rows if not `pool`; see also `allow_fused_output`.
        """
        graph = as_graph(graph)
        source_feats, edge_feats, src = self.sources(node_feats, edge_feats, graph)
        messages = self._convolve(source_feats, edge_feats, src, basis)
        zero_length = zero_length_edges(basis)
        if self.fused_output and zero_length is None:
            return messages[0]
        if self.fused_output:
            messages = messages[0].split([degree_to_dim(degree) for degree in self._degrees_out], dim=2)
        parts = dict(zip(self._degrees_out, messages, strict=True))
        if zero_length is not None:
            parts = self._add_isotropic(parts, source_feats, edge_feats, src, zero_length)
        if self.fused_output:
            return torch.cat([parts[degree] for degree in self.fiber_out.degrees], dim=2)
        out = {str(degree): parts[degree] for degree in self.fiber_out.degrees}
        own = self._self_interaction(node_feats) if self.self_interaction else {}
        if self.self_interaction_per == "edge":
            out |= {degree: out[degree] + gather_rows(feature, graph.dst) for degree, feature in own.items()}
        if self.pool:
            out = {degree: self.aggregate(feature, graph.dst, graph.num_nodes) for degree, feature in out.items()}
        if self.self_interaction_per == "node":
            out |= {degree: out[degree] + feature for degree, feature in own.items()}
        return out

    def _self_interaction(self, node_feats: dict[str, Tensor]) -> dict[str, Tensor]:
        """{'l': (N, C_out, 2l+1)} of the degrees that go in and out."""
        if isinstance(self.to_kernel_self, AttentiveSelfInteractionSE3):
            return self.to_kernel_self(node_feats)
        return mix_degrees(dict(self.to_kernel_self.items()), node_feats)

    def _convolve(
        self, node_feats: dict[str, Tensor], edge_feats: dict[str, Tensor], src: Tensor, basis: dict[str, Tensor]
    ) -> list[Tensor]:
        """Messages (E, C_out, 2l+1) of `_degrees_out`, in chunks of edges if there are many.

        With `fused_output` all in one, (E, C_out, sum of 2l+1).
        """
        expected = (src.shape[0], self.fiber_edge[0] + 1, 1)
        if edge_feats["0"].shape != expected:
            raise ValueError(
                f"edge features: expected degree 0 as {expected}, the distance in the last channel (see "
                f"get_populated_edge_features), got {tuple(edge_feats['0'].shape)}"
            )
        needed = sorted({*self.fiber_source.degrees, *self.fiber_out.degrees})
        if any(str(degree) not in basis for degree in needed):
            raise ValueError(
                f"basis: expected Wigner blocks of degrees {needed}, as se3_transformer.model.basis.get_basis of this "
                f"package gives them, got {list(basis)[:5]}"
            )
        share = 2 if isinstance(basis, ForwardBasis) and basis.in_pairs else 1
        work: Callable[..., list[Tensor]]
        geometry: dict[Any, Tensor]
        weights: Any  # as `work` wants them
        networks = [rectangle.radial_func for rectangle in self._rectangles]
        as_made = all(network.is_as_made for network in networks)
        natively = (
            as_made
            and networks[0].mid_dim == native.HIDDEN
            and native.fits(edge_feats["0"], *self._sources(node_feats, edge_feats))
        )
        if natively:
            plan, work = self._plan(), self._messages_natively
            with torch.autocast("cpu", enabled=False):
                weights = Matrices.apply(plan, *(network.last_weight.float() for network in networks))
            geometry = {str(degree): basis[str(degree)] for degree in plan.degrees}
        else:
            work = self._messages
            weights = [weight for rectangle in self._rectangles for weight in rectangle.frame_weights()]
            geometry = {degrees: frame_matrix(basis, degrees) for degrees in {*self._groups_in, *self._groups_out}}

        def messages(edges: slice) -> list[Tensor]:
            features = {degree: feature[edges] for degree, feature in edge_feats.items()}
            scalars = features["0"].squeeze(-1)[::share]  # of every `share` edges one after the other they are the same
            hidden = hidden_layers(networks, scalars, as_made)
            of_edges = {key: tensor[edges] for key, tensor in geometry.items()}
            return work(node_feats, features, src[edges], of_edges, hidden, weights)

        chunk = MAX_EDGES_LOW_MEMORY if self.low_memory else MAX_EDGES
        chunk = max(chunk - chunk % share, share)
        if torch.compiler.is_compiling() or len(src) <= chunk:
            return messages(slice(None))
        edges = [slice(start, start + chunk) for start in range(0, len(src), chunk)]
        if torch.is_grad_enabled() and (self.low_memory or not natively):
            chunks = [checkpoint(messages, e, use_reentrant=False, preserve_rng_state=False) for e in edges]
        else:
            chunks = [messages(e) for e in edges]
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def _source_features(
        self, node_feats: dict[str, Tensor], edge_feats: dict[str, Tensor], src: Tensor, degrees: tuple[int, ...]
    ) -> Tensor:
        """(E, rows, C) features of some degrees that edges carry: those of the source node, then those of the edge.

        The rows are (degree, m); the degrees have the same number of channels.
        """
        if len({self.fiber_in[degree] for degree in degrees}) > 1:  # node and edge channels only add up to the same
            return torch.cat([self._source_features(node_feats, edge_feats, src, (d,)) for d in degrees], dim=1)
        parts = []
        if degrees[0] in self.fiber_in:
            nodes = torch.cat([node_feats[str(degree)] for degree in degrees], dim=2).transpose(1, 2)  # (N, rows, C)
            parts.append(gather_rows(nodes, src))
        if self.fiber_source[degrees[0]] > self.fiber_in[degrees[0]]:
            edges = torch.cat([edge_feats[str(degree)] for degree in degrees], dim=2).transpose(1, 2)
            parts.append(edges)
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    def _messages(
        self,
        node_feats: dict[str, Tensor],
        edge_feats: dict[str, Tensor],
        src: Tensor,
        frames: dict[tuple[int, ...], Tensor],
        hidden: Tensor,
        weights: list[Tensor],
    ) -> list[Tensor]:
        """What `_convolve` returns, for a chunk of edges: gather, rotate, contract order by order, rotate back.

        Args:
            frames: `frame_matrix` of every group of degrees.
            hidden: (E / share, R, H) last hidden layers of the radial networks.
            weights: `frame_weights` of one radial network after the other.
        """
        x = [frames[d] @ self._source_features(node_feats, edge_feats, src, d) for d in self._groups_in]
        z = self._contract(x, hidden, weights)
        groups = [rows.transpose(1, 2) @ frames[degrees] for rows, degrees in zip(z, self._groups_out, strict=True)]
        if self.fused_output:
            return groups
        sizes = [[degree_to_dim(degree) for degree in degrees] for degrees in self._groups_out]
        return [part for group, dims in zip(groups, sizes, strict=True) for part in group.split(dims, dim=2)]

    def _messages_natively(
        self,
        node_feats: dict[str, Tensor],
        edge_feats: dict[str, Tensor],
        src: Tensor,
        blocks: dict[str, Tensor],
        hidden: Tensor,
        matrices: Tensor,
    ) -> list[Tensor]:
        """`_messages`, by compiled code; from Wigner blocks and `Matrices`.

        In the dtype of the features, under autocast in single precision: only products may be in less.
        """
        plan = self._plan()
        sources = self._sources(node_feats, edge_feats)
        dtype, autocast = sources[0].dtype, torch.is_autocast_enabled("cpu")
        parts = native.parts_of_products(torch.get_autocast_dtype("cpu") if autocast else dtype)

        def same(hidden: Tensor, matrices: Tensor, *tensors: Tensor) -> list[Tensor]:
            of_node: dict[str, Tensor] = {}
            of_edge: dict[str, Tensor] = {}
            for source, tensor in zip(plan.sources, tensors, strict=False):
                (of_node if source.of_node else of_edge)[str(source.degree)] = tensor
            blocks = dict(zip(map(str, plan.degrees), tensors[len(plan.sources) :], strict=True))
            frames = {degrees: frame_matrix(blocks, degrees) for degrees in {*self._groups_in, *self._groups_out}}
            return self._messages(of_node, of_edge, src, frames, hidden, plan.weights(matrices))

        with torch.autocast("cpu", enabled=False):
            tensors = [tensor.float().contiguous() for tensor in (hidden, matrices, *sources, *blocks.values())]
            messages = Messages.apply(plan, parts, same, src.long().contiguous(), *tensors)
        return list(messages) if autocast else [message.to(dtype) for message in messages]

    def _sources(self, node_feats: dict[str, Tensor], edge_feats: dict[str, Tensor]) -> list[Tensor]:
        """The features that are convolved: those of nodes, then those of edges."""
        nodes = [node_feats[str(degree)] for degree in self.fiber_in.degrees]
        return nodes + [edge_feats[str(degree)] for degree in self.fiber_edge.degrees if degree > 0]

    def _plan(self) -> Plan:
        """See `Plan`."""
        return plan(
            tuple(
                (
                    r.degrees_in,
                    r.degrees_out,
                    r.radial_func.channels_in,
                    r.radial_func.channels_out,
                    r.unit_scalar_kernel,
                )
                for r in self._rectangles
            ),
            tuple((degrees, self.fiber_source[degrees[0]]) for degrees in self._groups_in),
            tuple((degrees, self.fiber_out[degrees[0]]) for degrees in self._groups_out),
            (
                *(Source(degree, channels, 0, True) for degree, channels in self.fiber_in),
                *(Source(degree, c, self.fiber_in[degree], False) for degree, c in self.fiber_edge if degree > 0),
            ),
            self.fused_output,
        )

    def _contract(self, x: list[Tensor], hidden: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """All products of the convolution in the edge frame, order by order.

        Args:
            x: (E, rows, C_in) of each group of input degrees, rows as in `split_orders`.
            hidden: (E / share, R, H) last hidden layers of the radial networks.
            weights: `frame_weights` of one radial network after the other.

        Returns:
            (E, rows, C_out) of each group of output degrees.
        """
        inputs: dict[tuple, Tensor] = {}  # (degrees, m) -> (E, S, N_in), S = 1 for m = 0, else (+m, -m)
        for degrees, rows in zip(self._groups_in, x, strict=True):
            for order, by_degree in enumerate(split_orders(rows, degrees)):  # (E, S, degrees >= m, C)
                inputs[degrees, order] = by_degree.flatten(2)
                if len(degrees) > 1:
                    at_least = [degree for degree in degrees if degree >= order]
                    inputs.update({((d,), order): part for d, part in zip(at_least, by_degree.unbind(2), strict=True)})

        z: dict[tuple, Tensor] = {}  # (degrees, m) -> (E, S, N_out)
        queue, hidden = iter(weights), hidden.to(dtype_of_products(x[0]))
        for rectangle, h in zip(self._rectangles, hidden.unbind(1), strict=True):
            contraction = RadialWeightsFirst if hidden.shape[0] < x[0].shape[0] else rectangle.order
            for order in range(min(max(rectangle.degrees_in), max(rectangle.degrees_out)) + 1):
                product = contract(contraction, inputs[rectangle.degrees_in, order], h, next(queue))  # (E, S, N_out)
                key = (rectangle.degrees_out, order)
                z[key] = z[key] + product if key in z else product
        return [
            torch.cat(
                [self._rows_of_order(z, degrees, order, x[0].shape[0]) for order in range(max(degrees) + 1)], dim=1
            )
            for degrees in self._groups_out
        ]

    def _rows_of_order(self, z: dict[tuple, Tensor], degrees: tuple[int, ...], order: int, num_edges: int) -> Tensor:
        """(E, S · (degrees >= order), C_out) output in the edge frame, as `split_orders` would split it."""
        channels, signs = self.fiber_out[degrees[0]], 1 if order == 0 else 2
        if (degrees, order) in z:
            return z[degrees, order].unflatten(2, (-1, channels)).flatten(1, 2)
        nothing = next(iter(z.values())).new_zeros(num_edges, signs, channels)
        by_degree = [z.get(((degree,), order), nothing) for degree in degrees if degree >= order]
        return torch.stack(by_degree, dim=2).flatten(1, 2)

    def _add_isotropic(
        self,
        out: dict[int, Tensor],
        node_feats: dict[str, Tensor],
        edge_feats: dict[str, Tensor],
        src: Tensor,
        edges: Tensor,
    ) -> dict[int, Tensor]:
        """Add what edges of length zero may carry: the path J = 0, from each degree l > 0 to itself.

        Their Wigner blocks are zero, so that of the other paths only the one from degree 0 to degree 0 is in `out`.

        Args:
            edges: as `zero_length_edges` gives them: indices, or a mask.
        """
        masked = edges.dtype == torch.bool
        if not masked:
            edge_feats = {degree: gather_rows(feature, edges) for degree, feature in edge_feats.items()}
            src = gather_rows(src, edges)
        networks = [rectangle.radial_func for rectangle in self._rectangles]
        as_made = all(network.is_as_made for network in networks)
        hidden_of = hidden_layers(networks, edge_feats["0"].squeeze(-1), as_made)
        for rectangle, hidden in zip(self._rectangles, hidden_of.unbind(1), strict=True):
            for degree in set(rectangle.degrees_in) & set(rectangle.degrees_out) - {0}:
                weight = rectangle.isotropic_weight(degree)
                x = self._source_features(node_feats, edge_feats, src, (degree,))
                kernel = hidden.to(weight.dtype) @ weight.flatten(0, 1).T
                kernel = kernel.unflatten(1, weight.shape[:2]).to(x.dtype)  # (E0, C_out, C_in)
                message = torch.bmm(kernel, x.transpose(1, 2)).to(out[degree].dtype)
                if masked:
                    out[degree] = out[degree] + message * edges[:, None, None]
                else:
                    out[degree] = out[degree].index_add(0, edges, message)
        return out
