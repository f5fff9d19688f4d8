"""Edges in pairs i -> j, j -> i: found where they are, and the network's results do not depend on it."""

from __future__ import annotations

import pytest
import torch
from battery import varied
from helpers import TOLERANCE, assert_same, random_features

from se3_transformer.model import Fiber, Graph, SE3Transformer, pairs
from se3_transformer.model.basis import get_basis
from se3_transformer.model.layers import convolution
from se3_transformer.model.pairs import in_pairs, pair_order
from se3_transformer.model.transformer import get_populated_edge_features

FIBER_IN, FIBER_EDGE = {0: 2, 1: 1}, {0: 2, 1: 1}


def undirected(dtype, nodes=7, edges=9):
    """Graph, node and edge features: edge scalars are the same in both directions, edge vectors are not."""
    both = torch.combinations(torch.arange(nodes))[torch.randperm(nodes * (nodes - 1) // 2)[:edges]]  # (edges, 2)
    order = torch.randperm(2 * edges)
    src, dst = torch.cat([both, both.flip(1)])[order].T
    positions = torch.randn(nodes, 3, dtype=dtype)
    edge_feats = random_features(FIBER_EDGE, edges, dtype)
    edge_feats["0"] = edge_feats["0"].repeat(2, 1, 1)[order]
    edge_feats["1"] = torch.randn(2 * edges, 1, 3, dtype=dtype)
    graph = Graph(src, dst, positions[dst] - positions[src], num_nodes=nodes)
    return graph, random_features(FIBER_IN, nodes, dtype), edge_feats


def paired(graph, edge_feats):
    edge_feats = get_populated_edge_features(graph.rel_pos, edge_feats)
    return in_pairs(graph, edge_feats, get_basis(graph.rel_pos, 1))


def test_order_of_pairs():
    graph, _, _ = undirected(torch.float64)
    order = pair_order(graph.src, graph.dst, graph.num_nodes)
    assert sorted(order.tolist()) == list(range(graph.num_edges))
    src, dst = graph.src[order], graph.dst[order]
    assert torch.equal(src[::2], dst[1::2]) and torch.equal(dst[::2], src[1::2])


@pytest.mark.parametrize(
    "src, dst, found",
    [
        ([], [], False),
        ([0, 1, 2], [1, 0, 0], False),  # an odd number
        ([0, 1, 2, 1], [1, 0, 1, 0], False),  # 2 -> 1 has no reverse
        ([0, 1, 0, 1], [1, 0, 1, 0], True),  # twice the same pair
        ([0, 0], [0, 0], True),  # two self loops
        ([0, 1], [1, 2], False),
    ],
)
def test_order_of_few_edges(src, dst, found):
    order = pair_order(torch.tensor(src, dtype=torch.int64), torch.tensor(dst, dtype=torch.int64), 3)
    assert (order is not None) == found


def test_pairs_are_found_and_everything_moves_along():
    graph, _, edge_feats = undirected(torch.float64)
    new, new_feats, basis = paired(graph, edge_feats)
    assert basis.in_pairs
    place = {edge: k for k, edge in enumerate(zip(graph.src.tolist(), graph.dst.tolist(), strict=True))}
    order = torch.tensor([place[edge] for edge in zip(new.src.tolist(), new.dst.tolist(), strict=True)])
    assert_same(new.rel_pos, graph.rel_pos[order], 0)
    assert_same(new_feats["1"], edge_feats["1"][order], 0)
    assert_same(new_feats["0"][:, :-1], edge_feats["0"][order], 0)
    assert_same(basis["1"], get_basis(graph.rel_pos, 1)["1"][order], 0)


def other_scalars(graph, edge_feats):
    edge_feats["0"][3] += 1


def wanted_gradients(graph, edge_feats):
    edge_feats["0"].requires_grad_()


def wanted_positions(graph, edge_feats):
    graph.rel_pos.requires_grad_()


def zero_length(graph, edge_feats):
    graph.rel_pos.zero_()


@pytest.mark.parametrize("change", [other_scalars, wanted_gradients, wanted_positions, zero_length])
def test_no_pairs(change):
    graph, _, edge_feats = undirected(torch.float64)
    change(graph, edge_feats)
    same, _, basis = paired(graph, edge_feats)
    assert same is graph and not basis.in_pairs


@pytest.mark.parametrize("max_edges", [10**6, 5, 1])
@pytest.mark.parametrize("options", [{}, {"tensor_cores": True}, {"low_memory": True}])
def test_pairs_change_nothing(options, max_edges, dtype, monkeypatch):
    for name in ("MAX_EDGES", "MAX_EDGES_LOW_MEMORY"):
        monkeypatch.setattr(convolution, name, max_edges)
    fiber_hidden, fiber_out = Fiber.create(3, 4), Fiber({0: 2, 1: 1})
    network = SE3Transformer(2, Fiber(FIBER_IN), fiber_hidden, fiber_out, 2, 2, fiber_edge=Fiber(FIBER_EDGE), **options)
    network = varied(network).to(dtype)
    graph, node_feats, edge_feats = undirected(dtype)

    def results():
        out = network(graph, node_feats, edge_feats)
        return out, torch.autograd.grad(sum(x.square().sum() for x in out.values()), network.parameters())

    out, grads = results()
    monkeypatch.setattr(pairs, "pair_order", lambda *_: None)
    expected, expected_grads = results()
    assert_same(out, expected, TOLERANCE[dtype])
    assert_same(dict(enumerate(grads)), dict(enumerate(expected_grads)), TOLERANCE[dtype], "gradients")
