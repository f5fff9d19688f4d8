"""The yardstick of all speed-ups: the package's models, with every convolution computed from dense bases.

That is how implementations of this network usually work. For each edge e of direction n there is a basis of kernels

    B[l_in, l_out](n) = Q_J · Y_J(n),        J = |l_in - l_out| … l_in + l_out        (E, M_in, F, M_out)

(Thomas et al. 2018, section 4), and the radial network gives each edge its own weights R (E, C_out, C_in · F):

    x' = x B   (E, C_in, F, M_out),        message = R x'   (E, C_out, M_out).

It is meant to be as fast as that can be in PyTorch: bases are made once in a forward pass, in one product, and shared
by all layers; without zeros in them; all output degrees of an input degree in one product x B; and for each output
degree one product with R. Where all degrees share a radial network (`tensor_cores=True`), its last layer is applied for
one output degree after the other, or, `fully_fused`, once for all of them, which needs x' with zeros where R belongs to
another output degree.

    model = SE3TransformerPooled(…)
    same_function = dense(model)
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from e3nn import o3
from torch import Tensor, nn
from torch.nn.functional import linear

from se3_transformer.model import SE3Transformer
from se3_transformer.model.basis import clebsch_gordan
from se3_transformer.model.fiber import degree_to_dim
from se3_transformer.model.graph import Graph, as_graph
from se3_transformer.model.layers import ConvSE3, native
from se3_transformer.model.layers.convolution import VersatileConvSE3
from se3_transformer.model.layers.linear import mix_degrees
from se3_transformer.model.segment import gather_rows, segment_sum
from se3_transformer.model.transformer import get_populated_edge_features


def dense(model: nn.Module, fully_fused: bool = False) -> nn.Module:
    """A copy of a model or layer, with the same state dict and the same results, that computes from dense bases.

    A dense `ConvSE3` takes `dense_bases(rel_pos, conv.max_degree)` as `basis`; a dense transformer makes them.

    Args:
        model: anything with `SE3Transformer` or `ConvSE3` in it.
        fully_fused: one product for all output degrees that share a radial network, see the top of this file.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) in DENSE:
            module.__class__ = DENSE[type(module)]  # same parameters, other computation
            module.fully_fused = fully_fused
    return model


def num_paths(degree_in: int, degree_out: int) -> int:
    """F, the number of J that couple two degrees."""
    return degree_to_dim(min(degree_in, degree_out))


def pair_size(degree_in: int, degree_out: int) -> int:
    """Numbers in the basis of a pair of degrees: M_in · F · M_out."""
    return degree_to_dim(degree_in) * num_paths(degree_in, degree_out) * degree_to_dim(degree_out)


@cache
def couplings(max_degree: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All Q_J as one matrix from harmonics, rows (J, m), to bases, columns (l_in, m_in, l_out, J, m_out)."""
    blocks = []
    for degree_in in range(max_degree + 1):
        by_degree_out = []
        for degree_out in range(max_degree + 1):
            block = torch.zeros(
                (2 * max_degree + 1) ** 2,
                degree_to_dim(degree_in),
                num_paths(degree_in, degree_out),
                degree_to_dim(degree_out),
                dtype=torch.float64,
            )
            for path, J in enumerate(range(abs(degree_in - degree_out), degree_in + degree_out + 1)):
                block[J * J : (J + 1) ** 2, :, path] = clebsch_gordan(J, degree_in, degree_out)
            by_degree_out.append(block.flatten(2))
        blocks.append(torch.cat(by_degree_out, dim=2).flatten(1))
    return torch.cat(blocks, dim=1).to(dtype=dtype, device=device)


def dense_bases(relative_pos: Tensor, max_degree: int) -> list[Tensor]:
    """The bases of every edge, in the dtype of autocast if that is on.

    Args:
        relative_pos: (E, 3), any unit of length.
        max_degree: highest degree L of any feature.

    Returns:
        for each l_in = 0 … L (E, M_in, Σ F · M_out), the sum over l_out = 0 … L; all views of one tensor.
    """
    device = relative_pos.device.type
    with torch.autocast(device, enabled=False):
        harmonics = o3.spherical_harmonics(
            list(range(2 * max_degree + 1)), relative_pos, normalize=True, normalization="integral"
        )  # (E, (2L+1)²)
        bases = harmonics @ couplings(max_degree, harmonics.dtype, harmonics.device)
    if torch.is_autocast_enabled(device):
        bases = bases.to(torch.get_autocast_dtype(device))
    degrees = range(max_degree + 1)
    by_degree_in = bases.split([sum(pair_size(i, o) for o in degrees) for i in degrees], dim=1)
    return [basis.unflatten(1, (degree_to_dim(i), -1)) for i, basis in enumerate(by_degree_in)]


class DenseConvSE3(ConvSE3):
    """`ConvSE3` from dense bases."""

    def forward(
        self, node_feats: dict[str, Tensor], edge_feats: dict[str, Tensor], graph: Graph, basis: list[Tensor]
    ) -> dict[str, Tensor] | Tensor:
        """As `ConvSE3.forward`, but basis is what `dense_bases` returns."""
        graph = as_graph(graph)
        projected: dict[tuple[int, int], Tensor] = {}  # (l_in, l_out) -> x' (E, C_in, F, M_out)
        for degree, _ in self.fiber_source:
            features = self.source_features(node_feats, edge_feats, graph.src, degree)
            projected.update(self.project(features, basis[degree], degree))
        out: dict[str, Tensor] = {}
        scalars = edge_feats["0"].squeeze(-1)  # (E, edge scalars)
        for network in self.modules():
            if isinstance(network, VersatileConvSE3):
                for degree, message in self.messages(network, scalars, projected):
                    out[degree] = out[degree] + message if degree in out else message
        if self.fused_output:
            return torch.cat([out[str(degree)] for degree in self.fiber_out.degrees], dim=2)
        if self.self_interaction:
            for degree, own in mix_degrees(dict(self.to_kernel_self.items()), node_feats).items():
                out[degree] = out[degree] + gather_rows(own, graph.dst)
        if self.pool:
            out = {degree: segment_sum(feature, graph.dst, graph.num_nodes) for degree, feature in out.items()}
        return {str(degree): out[str(degree)] for degree in self.fiber_out.degrees}

    def source_features(self, node_feats, edge_feats, src: Tensor, degree: int) -> Tensor:
        """(E, C_in, M_in) features of one degree that edges carry: those of the source node, then those of the edge."""
        parts = []
        if degree in self.fiber_in:
            parts.append(gather_rows(node_feats[str(degree)], src))
        if degree > 0 and degree in self.fiber_edge:
            parts.append(edge_feats[str(degree)])
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def project(self, features: Tensor, basis: Tensor, degree_in: int) -> dict[tuple[int, int], Tensor]:
        """x' (E, C_in, F, M_out) of one input degree and every output degree."""
        last = self.fiber_out.degrees[-1]
        sizes = [(num_paths(degree_in, o), degree_to_dim(o)) for o in range(last + 1)]
        columns = [paths * dim for paths, dim in sizes]
        parts = torch.bmm(features.to(basis.dtype), basis[:, :, : sum(columns)]).split(columns, dim=2)
        pairs = {
            (degree_in, degree_out): part.unflatten(2, size)
            for degree_out, (part, size) in enumerate(zip(parts, sizes, strict=True))
        }
        if self.own_networks and degree_in == 0:  # by definition this kernel is 1
            pairs[0, 0] = features.unsqueeze(2)
        return pairs

    @property
    def own_networks(self) -> bool:
        """Whether each pair of degrees has a radial network of its own."""
        return not hasattr(self, "conv_out") and not hasattr(self, "conv_in") and isinstance(self.conv, nn.ModuleDict)

    def messages(self, network: VersatileConvSE3, scalars: Tensor, projected: dict) -> list[tuple[str, Tensor]]:
        """(l_out, (E, C_out, M_out)) for every output degree of a radial network."""
        degrees_in, degrees_out = network.degrees_in, network.degrees_out
        by_degree = [torch.cat([projected[i, o] for i in degrees_in], dim=2) for o in degrees_out]  # (E, C_in, F, M)
        radial = network.radial_func
        if len(degrees_out) == 1 or self.fully_fused:
            weights = radial(scalars).unflatten(1, (radial.channels_out, -1))  # (E, C_out, C_in · F)
            message = torch.bmm(weights, block_diagonal(by_degree).flatten(1, 2).to(weights.dtype))
            parts = message.split([degree_to_dim(o) for o in degrees_out], dim=2)
        else:
            hidden = radial.net[:-1](scalars)  # (E, H)
            last = radial.net[-1].weight.unflatten(0, (radial.channels_out, radial.channels_in, -1))
            parts = []
            for part, rows in zip(by_degree, last.split([part.shape[2] for part in by_degree], dim=2), strict=True):
                weights = linear(hidden, rows.flatten(0, 2)).unflatten(1, (radial.channels_out, -1))
                parts.append(torch.bmm(weights, part.flatten(1, 2).to(weights.dtype)))
        return [(str(o), part) for o, part in zip(degrees_out, parts, strict=True)]


def block_diagonal(blocks: list[Tensor]) -> Tensor:
    """(E, C, F, M) blocks -> (E, C, ΣF, ΣM) with zeros elsewhere."""
    if len(blocks) == 1:
        return blocks[0]
    total, start, rows = sum(block.shape[3] for block in blocks), 0, []
    for block in blocks:
        rows.append(nn.functional.pad(block, (start, total - start - block.shape[3])))
        start += block.shape[3]
    return torch.cat(rows, dim=2)


class DenseSE3Transformer(SE3Transformer):
    """`SE3Transformer` that makes dense bases once for all its convolutions; inputs are not checked."""

    def forward(
        self,
        graph: Graph,
        node_feats: dict[str, Tensor],
        edge_feats: dict[str, Tensor] | None = None,
        basis: list[Tensor] | None = None,
    ) -> dict[str, Tensor] | Tensor:
        """As `SE3Transformer.forward`, but basis is what `dense_bases` returns."""
        if basis is None:
            basis = dense_bases(graph.rel_pos, self.max_degree)
        edge_feats = get_populated_edge_features(graph.rel_pos, edge_feats)
        with native.switched_off():  # compiled attention and norms are as little part of the usual way
            out = self.graph_modules(node_feats, edge_feats, graph=graph, basis=basis)
        if self.pooling is not None:
            return self.pooling_module(out, graph=graph)
        return out if self.return_type is None else out[str(self.return_type)]


DENSE = {ConvSE3: DenseConvSE3, SE3Transformer: DenseSE3Transformer}
