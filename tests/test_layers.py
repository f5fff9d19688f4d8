"""Every layer through the battery, and what is particular to each."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from battery import Battery
from helpers import assert_equivariant, assert_finite, assert_same, gradients, random_features, random_sample
from torch import nn

from se3_transformer.model import Fiber, Graph
from se3_transformer.model.basis import get_basis
from se3_transformer.model.layers import (
    AttentionBlockSE3,
    AttentionSE3,
    ConvSE3,
    ConvSE3FuseLevel,
    GPooling,
    LinearSE3,
    NormBiasSE3,
    NormSE3,
)


def test_norm_with_parameters_of_other_sizes():
    """PyTorch says so; compiled code would read past their end."""
    norm, features = NormSE3(Fiber({0: 8, 1: 8})), random_features(Fiber({0: 8, 1: 8}), 3, torch.float32)
    norm.group_norm.weight = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="weight"):
        norm(features)


class GraphLayer(Battery):
    """A layer called with (node features, edge features with distance, graph, basis)."""

    max_degree = 2

    def call(self, module, sample):
        basis = get_basis(sample.rel_pos, max_degree=self.max_degree, compute_gradients=True)
        edge_feats = reference.with_distance(sample.edge_feats, sample.rel_pos)
        return module(sample.node_feats, edge_feats, sample.graph, basis)


class ConvBattery(GraphLayer):
    fiber_out = {0: 2, 1: 3, 2: 1}
    options = {}

    def build(self):
        return ConvSE3(
            Fiber(self.fiber_in),
            Fiber(self.fiber_out),
            Fiber(self.fiber_edge),
            max_degree=self.max_degree,
            **self.options,
        )

    def reference(self, state, sample):
        return reference.convolution(
            state,
            self.fiber_in,
            self.fiber_out,
            self.fiber_edge,
            sample.node_feats,
            reference.with_distance(sample.edge_feats, sample.rel_pos),
            sample.edges,
            pool=self.options.get("pool", True),
            self_interaction=self.options.get("self_interaction", False),
        )


class TestConvOneNetwork(ConvBattery):
    fiber_out = {0: 2, 1: 2, 2: 2}
    options = {"self_interaction": True}


class TestConvPerOutput(ConvBattery):
    options = {"use_layer_norm": False}


class TestConvPerInput(ConvBattery):
    fiber_in = {0: 3, 1: 1}
    fiber_out = {0: 2, 1: 2, 2: 2}


class TestConvPerPairPerEdge(ConvBattery):
    fiber_in, fiber_edge = {0: 2, 2: 3}, {0: 1, 1: 2, 2: 1}
    rows = "edges"
    options = {"pool": False, "fuse_level": ConvSE3FuseLevel.NONE}


class TestConvDegree6(ConvBattery):
    fiber_in, fiber_out, fiber_edge = {0: 2, 3: 1, 6: 1}, {1: 1, 4: 1, 6: 2}, {}
    max_degree = 6


class AttentionBattery(GraphLayer):
    fiber_out = {0: 4, 1: 4, 2: 4}
    options = {"num_heads": 2, "channels_div": 2}

    def build(self):
        return AttentionBlockSE3(
            Fiber(self.fiber_in),
            Fiber(self.fiber_out),
            Fiber(self.fiber_edge),
            max_degree=self.max_degree,
            **self.options,
        )

    def reference(self, state, sample):
        return reference.attention_block(
            state,
            self.fiber_in,
            self.fiber_out,
            self.fiber_edge,
            self.options["num_heads"],
            self.options["channels_div"],
            sample.node_feats,
            reference.with_distance(sample.edge_feats, sample.rel_pos),
            sample.edges,
        )


class TestAttentionBlock(AttentionBattery):
    pass


class TestAttentionBlockFromScalars(AttentionBattery):
    fiber_in = {0: 3}
    options = {"num_heads": 1, "channels_div": 2, "use_layer_norm": True}


class TestAttentionBlockUneven(AttentionBattery):
    fiber_in, fiber_out, fiber_edge = {0: 5, 1: 2}, {0: 12, 1: 8, 2: 4}, {0: 1, 1: 2}
    options = {"num_heads": 2, "channels_div": 2}


class TestAttentionBlockKeysByChance(AttentionBattery):
    """Value + key channels are 16 for every degree although values and keys are not: {0: 8 + 8, 1: 16}."""

    fiber_in, fiber_out = {0: 8}, {0: 16, 1: 32}
    max_degree = 1
    options = {"num_heads": 4, "channels_div": 2}


class TestAttention(Battery):
    """Attention alone: keys and values are the edge features, queries the node features."""

    fiber_in = fiber_edge = {0: 4, 1: 2, 2: 2}

    def build(self):
        return AttentionSE3(2, Fiber(self.fiber_edge), Fiber(self.fiber_edge))

    def call(self, module, sample):
        return module(sample.edge_feats, sample.edge_feats, sample.node_feats, sample.graph)

    def reference(self, state, sample):
        return reference.attention(sample.edge_feats, sample.edge_feats, sample.node_feats, 2, sample.dst)


class TestLinear(Battery):
    fiber_out = {0: 3, 2: 5}

    def build(self):
        return LinearSE3(Fiber(self.fiber_in), Fiber(self.fiber_out))

    def call(self, module, sample):
        return module(sample.node_feats)

    def reference(self, state, sample):
        return reference.linear_se3(reference.sub(state, "weights."), sample.node_feats)


class TestNorm(Battery):
    """Equal channels: group norm over degrees."""

    fiber_in = {0: 4, 1: 4, 3: 4}

    def build(self):
        return NormSE3(Fiber(self.fiber_in))

    def call(self, module, sample):
        return module(sample.node_feats)

    def reference(self, state, sample):
        return reference.norm(state, sample.node_feats)


class TestNormUneven(TestNorm):
    """Unequal channels: layer norm of each degree."""

    fiber_in = {0: 6, 1: 3, 2: 4}


class TestMaxPooling(Battery):
    rows = "graphs"
    feat_type, pool = 0, "max"

    def build(self):
        return GPooling(self.feat_type, self.pool)

    def call(self, module, sample):
        pooled = module(sample.node_feats, sample.graph)
        assert pooled.shape == (
            (sample.graph.num_graphs, 4)
            if self.feat_type == 0
            else (sample.graph.num_graphs, 4, 2 * self.feat_type + 1)
        )
        return {str(self.feat_type): pooled[..., None] if self.feat_type == 0 else pooled}

    def reference(self, state, sample):
        pooled = reference.pooled(sample.node_feats[str(self.feat_type)], sample.num_nodes, self.pool)
        return {str(self.feat_type): pooled[..., None] if self.feat_type == 0 else pooled}


class TestMeanPooling(TestMaxPooling):
    feat_type, pool = 0, "avg"


class TestMeanPoolingOfVectors(TestMaxPooling):
    feat_type, pool = 1, "avg"


# ---------------------------------------------------------------------------------------------------- particular things


@pytest.mark.parametrize("fiber", [{0: 4, 1: 4}, {0: 4, 1: 2}], ids=["group norm", "layer norm"])
def test_norm_keeps_directions(fiber, dtype):
    features = random_features(Fiber(fiber), 6, dtype)
    for degree, x in NormSE3(Fiber(fiber)).to(dtype)(features).items():
        along = (x * features[degree]).sum(-1, keepdim=True) / (features[degree] ** 2).sum(-1, keepdim=True)
        assert (along >= 0).all()
        assert_same(along * features[degree], x)


@pytest.mark.parametrize("fiber", [{0: 4, 1: 4}, {0: 4, 1: 2}], ids=["group norm", "layer norm"])
def test_norm_of_zero_vectors(fiber, dtype):
    """Known fault elsewhere: NaN. Zero has no direction, so it stays zero, whatever the shift of the norm."""
    norm = NormSE3(Fiber(fiber)).to(dtype)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            if name.endswith("bias"):
                parameter += 1.0
    features = {l: x.requires_grad_() for l, x in random_features(Fiber(fiber), 6, dtype).items()}
    with torch.no_grad():
        features["1"][2] = 0
        features["0"][3] = 0
        features["1"][3] = 0
    out = norm(features)
    assert (out["1"][2] == 0).all() and (out["0"][3] == 0).all() and (out["1"][3] == 0).all()
    assert_finite(out)
    grads = torch.autograd.grad(sum((x**2).sum() + x.sum() for x in out.values()), list(features.values()))
    assert_finite(dict(enumerate(grads)), "gradients")


def test_norm_of_other_features():
    with pytest.raises(ValueError, match=r"NormSE3: expected degree 1 as \(6, 2, 3\), got \(6, 3, 3\)"):
        NormSE3(Fiber({0: 4, 1: 2}))(random_features({0: 4, 1: 3}, 6, torch.float32))


def test_norm_nonlinearity_is_used():
    fiber, features = Fiber({0: 4, 1: 4}), random_features({0: 4, 1: 4}, 6, torch.float32)
    assert (NormSE3(fiber, nonlinearity=torch.nn.Softplus())(features)["0"] != 0).all()
    assert (NormSE3(fiber)(features)["0"] == 0).any()  # ReLU


def test_linear_skips_degrees_that_are_not_there():
    linear = LinearSE3(Fiber({0: 3, 1: 2}), Fiber({1: 4, 2: 5}))
    assert {name: tuple(p.shape) for name, p in linear.named_parameters()} == {"weights.1": (4, 2)}
    assert {l: tuple(x.shape) for l, x in linear(random_features({0: 3, 1: 2}, 6, torch.float32)).items()} == {
        "1": (6, 4, 3)
    }


def test_attention_weights_of_equal_keys_are_equal(dtype):
    """With all keys the same, each node gets the mean of its incoming values."""
    sample = random_sample({0: 2}, {0: 4, 1: 2}, nodes=(4,), edges=(9,), dtype=dtype)
    keys = {"0": torch.ones(9, 2, 1, dtype=dtype)}
    out = AttentionSE3(2, Fiber({0: 2}), Fiber({0: 4, 1: 2}))(sample.edge_feats, keys, sample.node_feats, sample.graph)
    for degree, x in sample.edge_feats.items():
        for node in range(4):
            incoming = x[sample.dst == node]
            assert_same(out[degree][node], incoming.mean(dim=0) if len(incoming) else torch.zeros_like(x[0]))


@pytest.mark.parametrize("zero_length", [False, True])
@pytest.mark.parametrize("fuse_level", ConvSE3FuseLevel)
def test_one_tensor_for_all_degrees_equals_one_for_each(fuse_level, zero_length, dtype):
    """Keys and values as one tensor, from the convolution and through the attention."""
    fiber = Fiber.create(3, 4)
    sample = random_sample(dict(fiber.structure), nodes=(6,), edges=(14,), dtype=dtype)
    if zero_length:
        sample.pos[1] = sample.pos[0]
        sample.src[:2], sample.dst[:2] = torch.tensor([0, 1]), torch.tensor([1, 0])
    basis = get_basis(sample.rel_pos, max_degree=2)
    options = dict(max_degree=2, pool=False, fuse_level=fuse_level)
    fused = ConvSE3(fiber, fiber, allow_fused_output=True, **options).to(dtype)
    by_degree = ConvSE3(fiber, fiber, **options).to(dtype)
    by_degree.load_state_dict(fused.state_dict())
    arguments = (sample.node_feats, reference.with_distance({}, sample.rel_pos), sample.graph, basis)
    one, each = fused(*arguments), by_degree(*arguments)
    assert_same(one, torch.cat([each[str(degree)] for degree in range(3)], dim=2))
    attention = AttentionSE3(2, fiber, fiber)
    came = attention(one, one.flip(0), sample.node_feats, sample.graph)
    flipped = {degree: feature.flip(0) for degree, feature in each.items()}
    expected = attention(each, flipped, sample.node_feats, sample.graph)
    assert came.keys() == expected.keys()
    for degree, feature in expected.items():
        assert_same(came[degree], feature)


def test_attention_of_large_logits_is_finite(dtype):
    sample = random_sample({0: 2}, {0: 2}, nodes=(4,), edges=(9,), dtype=dtype)
    large = {l: 1e10 * x for l, x in sample.node_feats.items()}
    attention = AttentionSE3(1, Fiber({0: 2}), Fiber({0: 2}))
    out = attention(sample.edge_feats, sample.edge_feats, large, sample.graph)
    assert_finite(out)
    assert max(x.abs().max() for x in out.values()) <= sample.edge_feats["0"].abs().max() * (1 + 1e-5)


def test_self_interaction_is_added_per_incoming_edge(dtype):
    """What existing weights were trained with: two equal edges give twice the term, no edge none."""
    torch.manual_seed(0)
    conv = ConvSE3(Fiber({0: 2, 1: 2}), Fiber({1: 3}), max_degree=1, self_interaction=True).to(dtype)
    with torch.no_grad():
        for name, parameter in conv.named_parameters():
            if "radial_func" in name:
                parameter.zero_()
    sample = random_sample({0: 2, 1: 2}, nodes=(3,), edges=(0,), dtype=dtype)
    sample.src, sample.dst = torch.tensor([0, 0, 2]), torch.tensor([1, 1, 0])
    sample.num_edges = torch.tensor([3])
    basis = get_basis(sample.rel_pos, max_degree=1)
    out = conv(sample.node_feats, reference.with_distance({}, sample.rel_pos), sample.graph, basis)["1"]
    per_edge = conv.to_kernel_self["1"] @ sample.node_feats["1"]
    assert_same(out, per_edge * torch.tensor([1.0, 2.0, 0.0], dtype=dtype)[:, None, None])


def test_nodes_without_incoming_edges_keep_their_input(dtype):
    """In an attention block they get the projection of their own features."""
    torch.manual_seed(0)
    fiber = Fiber({0: 4, 1: 4})
    block = AttentionBlockSE3(fiber, fiber, num_heads=2, max_degree=1).to(dtype)
    sample = random_sample(fiber, nodes=(3,), edges=(0,), dtype=dtype)
    sample.src, sample.dst, sample.num_edges = torch.tensor([0]), torch.tensor([1]), torch.tensor([1])
    out = block(
        sample.node_feats,
        reference.with_distance({}, sample.rel_pos),
        sample.graph,
        get_basis(sample.rel_pos, max_degree=1),
    )
    for degree, x in sample.node_feats.items():
        own = block.project.weights[degree][:, 2:] @ x  # after the 2 channels of the values
        assert_same(out[degree][[0, 2]], own[[0, 2]])
        assert (out[degree][1] - own[1]).norm() > 1e-2


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_pooling_of_graphs_of_very_different_size(pool, dtype):
    sizes = torch.tensor([1, 40, 2])
    features = random_features({0: 3}, 43, dtype)
    none = torch.zeros(0, dtype=torch.int64)
    graph = Graph(none, none, num_nodes=43, batch_num_nodes=sizes, batch_num_edges=torch.zeros(3, dtype=torch.int64))
    assert_same(GPooling(0, pool)(features, graph), reference.pooled(features["0"], sizes, pool))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_edges_near_an_axis(axis, sign, dtype):
    """Known fault elsewhere: along the polar axis equivariance breaks and gradients are not finite."""
    torch.manual_seed(0)
    fiber = {0: 2, 1: 2, 2: 2}
    conv = ConvSE3(Fiber(fiber), Fiber(fiber), max_degree=2, use_layer_norm=False).to(dtype)
    direction = torch.zeros(3, dtype=torch.float64)
    direction[axis] = sign
    for offset in (0.0, 1e-300, 1e-30, 1e-12, 1e-6, 1e-3):
        sample = random_sample(fiber, nodes=(2,), edges=(0,))
        sample.src, sample.dst, sample.num_edges = torch.tensor([0]), torch.tensor([1]), torch.tensor([1])
        sample.pos = torch.stack([torch.zeros(3, dtype=torch.float64), direction + offset * math.pi])

        def call(s):
            basis = get_basis(s.rel_pos, max_degree=2, compute_gradients=True)
            return conv(s.node_feats, reference.with_distance({}, s.rel_pos), s.graph, basis)

        sample = sample.to(dtype)
        assert_equivariant(call, sample)
        assert_finite(gradients(call, sample, conv.named_parameters())[1], "gradients")


@pytest.mark.parametrize("norm", [NormSE3, NormBiasSE3])
def test_norms_in_half_precision(norm):
    """Under autocast and as a whole; features of length 0, and of squares that half precision does not hold."""
    feature = torch.randn(6, 4, 3) * torch.tensor([0, 1e-4, 1, 1, 100, 1000]).view(6, 1, 1)
    exact = norm(Fiber({1: 4}))({"1": feature})["1"]
    with torch.autocast("cpu", dtype=torch.float16):
        found = norm(Fiber({1: 4}))({"1": feature.half()})["1"]
    whole = norm(Fiber({1: 4})).half()({"1": feature.half()})["1"]
    assert found.dtype == whole.dtype == torch.float16
    for result in (found, whole):
        assert_same(result.float(), exact, 2e-3)


def test_norm_with_another_nonlinearity():
    """It sees all degrees together after a group norm, and each alone after layer norms."""
    for fiber, widths in ((Fiber({0: 3, 1: 3}), [6]), (Fiber({0: 3, 1: 2}), [3, 2])):
        seen, norm = [], NormSE3(fiber, nn.Identity())
        norm.nonlinearity.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.shape[1]))
        norm(random_features(fiber, 4, torch.float32))
        assert seen == widths
