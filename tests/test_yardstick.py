"""The benchmarks' dense-basis yardstick computes the same function as the package."""

from __future__ import annotations

import pytest
import torch
from battery import varied
from helpers import assert_same, gradients, random_sample
from reference import with_distance

from benchmarks.yardstick import dense, dense_bases
from se3_transformer.model import Fiber, SE3Transformer, SE3TransformerPooled
from se3_transformer.model.basis import get_basis
from se3_transformer.model.layers import ConvSE3, ConvSE3FuseLevel

FULL, PARTIAL, NONE = ConvSE3FuseLevel.FULL, ConvSE3FuseLevel.PARTIAL, ConvSE3FuseLevel.NONE
CONVOLUTIONS = {  # allowed sharing, highest degree, fibers of input, output, edges
    "one network": (FULL, 3, {0: 4, 1: 4, 2: 4, 3: 4}, {0: 3, 1: 3, 2: 3, 3: 3}, {0: 2}),
    "one network, edge channels": (FULL, 2, {0: 3, 1: 1, 2: 2}, {0: 2, 1: 2, 2: 2}, {1: 2, 2: 1}),
    "per output degree": (PARTIAL, 3, {0: 4, 1: 4, 2: 4, 3: 4}, {0: 3, 2: 2}, {0: 2}),
    "per input degree": (PARTIAL, 3, {0: 4, 1: 2}, {0: 3, 1: 3, 2: 3, 3: 3}, {}),
    "per pair": (NONE, 2, {0: 3, 1: 3, 2: 3}, {0: 2, 1: 2, 2: 2}, {0: 2, 1: 1}),
    "per pair, degrees missing": (PARTIAL, 3, {1: 2, 3: 2}, {0: 1, 2: 3}, {}),
}
FUSED = ("one network", "one network, edge channels", "per input degree")  # several output degrees to a network
SHARING = {"default": {}, "one network": {"tensor_cores": True}, "per pair": {"low_memory": True}}


@pytest.mark.parametrize(
    "name, fully_fused", [*((name, False) for name in CONVOLUTIONS), *((name, True) for name in FUSED)]
)
def test_convolution(name, fully_fused):
    fuse_level, max_degree, fiber_in, fiber_out, fiber_edge = CONVOLUTIONS[name]
    conv = varied(
        ConvSE3(
            Fiber(fiber_in),
            Fiber(fiber_out),
            Fiber(fiber_edge),
            self_interaction=True,
            max_degree=max_degree,
            fuse_level=fuse_level,
        )
    )

    def call(module, sample):
        edge_feats = with_distance(sample.edge_feats, sample.rel_pos)
        make_basis = get_basis if type(module) is ConvSE3 else dense_bases
        return module(sample.node_feats, edge_feats, sample.graph, make_basis(sample.rel_pos, max_degree))

    assert_equal_functions(conv, fully_fused, call, random_sample(fiber_in, fiber_edge))


@pytest.mark.parametrize("sharing, fully_fused", [*((name, False) for name in SHARING), ("one network", True)])
def test_pooled_network(sharing, fully_fused):
    """The QM9 network of the benchmarks, smaller."""
    model = SE3TransformerPooled(
        fiber_in=Fiber({0: 6}),
        fiber_out=Fiber({0: 16}),
        fiber_edge=Fiber({0: 4}),
        num_degrees=4,
        num_channels=4,
        output_dim=1,
        num_layers=2,
        num_heads=2,
        channels_div=2,
        **SHARING[sharing],
    )
    assert_equal_functions(model, fully_fused, call_network, random_sample({0: 6}, {0: 4}, (5, 4), (9, 6)))


@pytest.mark.parametrize("sharing", SHARING)
def test_network_of_vectors(sharing):
    """The N-body network of the benchmarks, smaller."""
    model = SE3Transformer(
        num_layers=2,
        fiber_in=Fiber({0: 1, 1: 1}),
        fiber_hidden=Fiber.create(4, 4),
        fiber_out=Fiber({1: 2}),
        num_heads=1,
        channels_div=4,
        fiber_edge=Fiber({0: 1}),
        **SHARING[sharing],
    )
    assert_equal_functions(model, False, call_network, random_sample({0: 1, 1: 1}, {0: 1}, (4, 4), (9, 6)))


@pytest.mark.parametrize("max_degree, numbers", [(3, 1092), (4, 3333)])
def test_size_of_bases(max_degree, numbers):
    bases = dense_bases(torch.randn(5, 3), max_degree)
    assert sum(basis[0].numel() for basis in bases) == numbers


def call_network(model, sample):
    return model(sample.graph, sample.node_feats, sample.edge_feats)


def assert_equal_functions(model, fully_fused, call, sample):
    """State dicts, outputs and gradients (positions, features, parameters) of a model and its yardstick agree."""
    model = varied(model).double()
    yardstick = dense(model, fully_fused)
    assert_same(yardstick.state_dict(), model.state_dict(), 1e-15, "state dict")
    expected, expected_grads = gradients(lambda s: call(model, s), sample, model.named_parameters())
    actual, actual_grads = gradients(lambda s: call(yardstick, s), sample, yardstick.named_parameters())
    assert_same(actual, expected, what="values")
    assert_same(actual_grads, expected_grads, what="gradients")
