"""The Tensor Field Network through the battery, and beside the SE(3)-Transformer."""

from __future__ import annotations

import pytest
import reference
import torch
from helpers import assert_same, random_sample
from test_options import slow_convolution, slow_norm
from test_transformer import ModelBattery

from se3_transformer.model import Fiber, SE3Transformer
from se3_transformer.model.tfn import TensorFieldNetwork


class TFNBattery(ModelBattery):
    def build(self):
        return TensorFieldNetwork(self.num_layers, *self.fibers, **self.options)

    def slow(self, state, sample):
        options = {"aggregation": "sum", "self_interaction_per": "node", **self.options}
        fiber_in, fiber_hidden, fiber_out, fiber_edge = self.fibers
        fibers = [fiber_in, *[fiber_hidden] * self.num_layers, fiber_out]
        edge_feats = reference.with_distance(sample.edge_feats, sample.rel_pos)
        x, step = sample.node_feats, 1 + self.options.get("norm", True)
        for layer, pair in enumerate(zip(fibers, fibers[1:])):
            x = slow_convolution(
                reference.sub(state, f"graph_modules.{step * layer}."),
                (*pair, fiber_edge),
                x,
                edge_feats,
                sample.edges,
                options,
                options.get("self_interaction", "linear"),
            )
            if step == 2 and layer < self.num_layers:
                norm = reference.sub(state, f"graph_modules.{step * layer + 1}.")
                x = slow_norm(norm, options.get("norm_type", "norm"), x, options.get("norm_softening", 0.0))
        return x


class TestTensorFieldNetwork(TFNBattery):
    pass


class TestWithOptions(TFNBattery):
    fiber_hidden, fiber_edge = {0: 4, 1: 4}, {0: 1, 1: 1}
    num_layers = 1
    options = {
        "norm_type": "bias",
        "norm_softening": 0.2,
        "self_interaction": "attentive",
        "relative_pos": "add",
        "aggregation": "mean",
        "self_interaction_per": "edge",
        "tensor_cores": True,
    }


class TestPooledWithoutNorm(TFNBattery):
    rows, options = "graphs", {"norm": False, "return_type": 1, "pooling": "avg", "low_memory": True}
    fiber_hidden, num_layers = {0: 4, 1: 4}, 1


def test_without_layers_it_is_the_last_convolution_of_the_transformer():
    fibers = Fiber({0: 3, 1: 2}), Fiber({0: 4, 1: 4}), Fiber({0: 2, 1: 1})
    transformer = SE3Transformer(0, *fibers, num_heads=1, channels_div=1)
    network = TensorFieldNetwork(0, *fibers, self_interaction_per="edge")
    network.load_state_dict(transformer.state_dict())
    sample = random_sample({0: 3, 1: 2}, dtype=torch.float32)
    assert_same(network(sample.graph, sample.node_feats), transformer(sample.graph, sample.node_feats), 1e-15)


def test_there_are_no_heads():
    with pytest.raises(TypeError, match="num_heads"):
        TensorFieldNetwork(1, Fiber({0: 1}), Fiber({0: 2}), Fiber({0: 1}), num_heads=2)
