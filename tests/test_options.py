"""The papers' options of layers and models: each through the battery, against a slow version, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import reference
import test_layers
import torch
from battery import Battery
from helpers import assert_same, random_features, random_rotations, random_sample
from test_transformer import ModelBattery

from se3_transformer.model import Fiber, Graph, SE3Transformer
from se3_transformer.model.basis import get_basis
from se3_transformer.model.layers import (
    AttentionBlockSE3,
    AttentiveSelfInteractionSE3,
    ConvSE3,
    GPooling,
    LinearSE3,
    NormBiasSE3,
    NormSE3,
    native,
)
from se3_transformer.model.neighbors import fully_connected
from se3_transformer.model.transformer import get_populated_edge_features

# ------------------------------------------------------------------------------------------------- the slow definitions


def slow_self_interaction(state, kind, features):
    """Eq. 12 or eq. 13, node by node, from parameters as `LinearSE3` or `AttentiveSelfInteractionSE3` name them."""
    if kind == "linear":
        return reference.linear_se3(reference.sub(state, "weights."), features)
    out = {}
    for degree in {name.split(".")[1] for name in state}:
        net = reference.sub(state, f"networks.{degree}.")
        nodes = []
        for x in features[degree]:  # (C, M)
            products = torch.einsum("am,bm->ab", x, x).flatten()
            hidden = torch.nn.functional.layer_norm(products, products.shape, net["0.weight"], net["0.bias"])
            hidden = (net["1.weight"] @ hidden + net["1.bias"]).relu()
            weights = net["3.weight"] @ hidden + net["3.bias"]
            nodes.append(weights.view(-1, len(x)) @ x)
        out[degree] = torch.stack(nodes)
    return out


def slow_convolution(state, fibers, x, edge_feats, edges, options, self_interaction=None, pool=True):
    """Convolution with options; every edge gets source features of its own, which `reference.convolution` convolves."""
    fiber_in, fiber_out, fiber_edge = map(Fiber, fibers)
    src, dst, rel_pos = edges
    source = {degree: feature[src] for degree, feature in x.items()}
    relative_pos = options.get("relative_pos")
    if relative_pos == "add" and "1" in x:
        source["1"][:, 0] += rel_pos
    elif relative_pos:
        vectors = [edge_feats["1"]] if "1" in edge_feats else []
        edge_feats = {**edge_feats, "1": torch.cat([*vectors, rel_pos[:, None]], dim=1)}
        fiber_edge = fiber_edge + Fiber({1: 1})
    own_row = torch.arange(len(src)), dst, rel_pos
    out = reference.convolution(state, fiber_in, fiber_out, fiber_edge, source, edge_feats, own_row, pool=False)
    own = {}
    if self_interaction:
        named = reference.sub(state, "to_kernel_self.")
        if self_interaction == "linear":
            named = {f"weights.{degree}": weight for degree, weight in named.items()}
        own = slow_self_interaction(named, self_interaction, x)
    if own and options["self_interaction_per"] == "edge":
        out = {degree: messages + own[degree][dst] if degree in own else messages for degree, messages in out.items()}
    if not pool:
        return out
    pooled = {}
    for degree, messages in out.items():
        pooled[degree] = reference.sum_incoming(messages, dst, len(next(iter(x.values()))))
        if options["aggregation"] == "mean":
            incoming = torch.tensor([max((dst == node).sum(), 1) for node in range(len(pooled[degree]))])
            pooled[degree] = pooled[degree] / incoming[:, None, None]
        if options["self_interaction_per"] == "node" and degree in own:
            pooled[degree] = pooled[degree] + own[degree]
    return pooled


def slow_block(state, fibers, num_heads, channels_div, x, edge_feats, edges, options, skip, self_interaction):
    """`reference.attention_block` with options."""
    fiber_in, fiber_out, fiber_edge = fibers
    fiber_value, fiber_key = reference.block_fibers(fiber_in, fiber_out, channels_div)
    both = {degree: c + fiber_key.get(degree, 0) for degree, c in fiber_value.items()}
    convolved = reference.sub(state, "to_key_value.")
    fused = slow_convolution(convolved, (fiber_in, both, fiber_edge), x, edge_feats, edges, options, pool=False)
    value = {str(degree): fused[str(degree)][:, :c] for degree, c in fiber_value.items()}
    key = {str(degree): fused[str(degree)][:, fiber_value[degree] :] for degree in fiber_key}
    query = reference.linear_se3(reference.sub(state, "to_query."), x)
    out = reference.attention(value, key, query, num_heads, edges[1])
    if skip == "cat":
        out = {degree: torch.cat([z, x[degree]], dim=1) if degree in x else z for degree, z in out.items()}
    out = slow_self_interaction(reference.sub(state, "project."), self_interaction, out)
    if skip == "sum":
        for degree in x.keys() & out.keys():
            feature = x[degree]
            room = out[degree].shape[1] - feature.shape[1]
            nothing = feature.new_zeros(len(feature), room, feature.shape[2])
            out[degree] = out[degree] + torch.cat([feature, nothing], dim=1)
    return out


def slow_norm(state, kind, features, softening=0.0):
    if kind == "norm":
        return reference.norm(state, features, softening)
    out = {}
    for degree, x in features.items():
        length = x.norm(dim=-1, keepdim=True).clamp(min=reference.NORM_CLAMP).square().add(softening**2).sqrt()
        out[degree] = x / length * (length + state[f"biases.{degree}"][:, None]).relu()
    return out


# --------------------------------------------------------------------------------------------------------------- layers


class TestAttentiveSelfInteraction(Battery):
    fiber_in, fiber_out = {0: 3, 1: 2, 2: 1}, {0: 2, 1: 3, 3: 1}

    def build(self):
        return AttentiveSelfInteractionSE3(Fiber(self.fiber_in), Fiber(self.fiber_out))

    def call(self, module, sample):
        return module(sample.node_feats)

    def reference(self, state, sample):
        return slow_self_interaction(state, "attentive", sample.node_feats)


class TestNormBias(Battery):
    fiber_in = {0: 4, 1: 3, 3: 2}

    def build(self):
        return NormBiasSE3(Fiber(self.fiber_in))

    def call(self, module, sample):
        return module(sample.node_feats)

    def reference(self, state, sample):
        return slow_norm(state, "bias", sample.node_feats)


class TestSoftNorm(test_layers.TestNorm):
    def build(self):
        return NormSE3(Fiber(self.fiber_in), softening=0.5)

    def reference(self, state, sample):
        return slow_norm(state, "norm", sample.node_feats, softening=0.5)


class TestSoftNormBias(TestNormBias):
    def build(self):
        return NormBiasSE3(Fiber(self.fiber_in), softening=0.5)

    def reference(self, state, sample):
        return slow_norm(state, "bias", sample.node_feats, softening=0.5)


class TestSumPooling(test_layers.TestMaxPooling):
    feat_type, pool = 1, "sum"

    def reference(self, state, sample):
        graphs = sample.node_feats["1"].split(sample.num_nodes.tolist())
        return {"1": torch.stack([nodes.sum(dim=0) for nodes in graphs])}


class ConvOptionsBattery(test_layers.ConvBattery):
    fiber_in, fiber_edge = {0: 2, 1: 2}, {0: 1, 1: 1}
    fiber_out = {0: 2, 1: 3}

    def reference(self, state, sample):
        fibers = self.fiber_in, self.fiber_out, self.fiber_edge
        edge_feats = reference.with_distance(sample.edge_feats, sample.rel_pos)
        options = {"aggregation": "sum", "self_interaction_per": "edge", **self.options}
        kind, pool = self.options["self_interaction"], self.options.get("pool", True)
        return slow_convolution(state, fibers, sample.node_feats, edge_feats, sample.edges, options, kind, pool)


class TestConvCat(ConvOptionsBattery):
    options = {"self_interaction": "attentive", "relative_pos": "cat"}


class TestConvAdd(ConvOptionsBattery):
    options = {
        "self_interaction": "linear",
        "relative_pos": "add",
        "aggregation": "mean",
        "self_interaction_per": "node",
    }


def test_attentive_self_interaction_contains_the_linear_one(dtype):
    """With the last layer's weight zero, eq. 13 is eq. 12 with the bias as matrix."""
    fiber_in, fiber_out, features = Fiber({0: 3, 1: 2}), Fiber({0: 4, 1: 5}), random_features({0: 3, 1: 2}, 6, dtype)
    attentive = AttentiveSelfInteractionSE3(fiber_in, fiber_out).to(dtype)
    linear = LinearSE3(fiber_in, fiber_out).to(dtype)
    before = attentive(features)
    with torch.no_grad():
        for degree, weight in linear.weights.items():
            attentive.networks[degree][-1].weight.zero_()
            attentive.networks[degree][-1].bias.copy_(weight.flatten())
    assert_same(attentive(features), linear(features))
    assert all((before[degree] - x).norm() > 0.1 * x.norm() for degree, x in linear(features).items())


def test_norm_bias_starts_as_the_identity():
    fiber, features = Fiber({0: 4, 1: 2}), random_features({0: 4, 1: 2}, 6, torch.float32)
    norm = NormBiasSE3(fiber)
    assert_same(norm(features), features)
    with torch.no_grad():
        norm.biases["1"].fill_(-1.0)
    lengths = norm(features)["1"].norm(dim=-1)
    assert_same(lengths, (features["1"].norm(dim=-1) - 1).relu())


@pytest.mark.parametrize("softening, changes", [(0.0, True), (0.1, False)])
@pytest.mark.parametrize("natively", [True, False])
def test_symmetric_molecule_in_other_orientations(softening, changes, natively):
    """Methane, in single precision: vectors of the carbon are zero by symmetry, and rounding errors in the computer."""
    bonds = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    positions = torch.cat([torch.zeros(1, 3), bonds]) - torch.tensor([0.3, 0.1, 0.2])
    torch.manual_seed(1)
    options = dict(num_layers=2, num_heads=1, channels_div=1, fiber_out=Fiber({0: 1}), return_type=0, pooling="sum")
    model = SE3Transformer(fiber_in=Fiber({0: 2}), fiber_hidden=Fiber.create(2, 8), norm_softening=softening, **options)
    kinds = {"0": torch.eye(2)[[0, 1, 1, 1, 1]].unsqueeze(-1)}
    with torch.no_grad(), nullcontext() if natively else native.switched_off():
        for layer in model.graph_modules[1::2]:
            layer.group_norm.bias.fill_(2.0)  # as may be learned: a length of zero becomes a positive one
        found = torch.stack(
            [model(fully_connected(positions @ rotation.float().T), kinds) for rotation in random_rotations(20)]
        ).flatten()
    assert (found.std() > 1e-5 * found.abs().mean()) == changes


def isolated():
    """Three nodes, two edges to node 0, none to the others."""
    sample = random_sample({0: 2, 1: 2}, nodes=(3,), edges=(0,))
    sample.src, sample.dst, sample.num_edges = torch.tensor([1, 2]), torch.tensor([0, 0]), torch.tensor([2])
    return sample


def test_self_interaction_once_per_node():
    """Nodes without incoming edges keep it, and a second incoming edge does not double it."""
    sample = isolated()
    conv = ConvSE3(Fiber({0: 2, 1: 2}), Fiber({1: 3}), self_interaction=True, self_interaction_per="node").double()
    with torch.no_grad():
        for name, parameter in conv.named_parameters():
            if "radial_func" in name:
                parameter.zero_()
    basis = get_basis(sample.rel_pos, max_degree=1)
    out = conv(sample.node_feats, reference.with_distance({}, sample.rel_pos), sample.graph, basis)
    assert_same(out, {"1": conv.to_kernel_self["1"] @ sample.node_feats["1"]})


def test_mean_of_two_equal_messages_is_the_message():
    sample = isolated()
    sample.src[1] = 1
    fibers, arguments = (Fiber({0: 2, 1: 2}), Fiber({0: 1, 1: 3})), dict(max_degree=1)
    total, mean = ConvSE3(*fibers, **arguments).double(), ConvSE3(*fibers, aggregation="mean", **arguments).double()
    mean.load_state_dict(total.state_dict())
    call = sample.node_feats, reference.with_distance({}, sample.rel_pos), sample.graph, get_basis(sample.rel_pos, 1)
    assert_same(mean(*call), {degree: x / 2 for degree, x in total(*call).items()})


# --------------------------------------------------------------------------------------------------------------- models


SLOW_SCALARS = {
    "lin": lambda r: r,
    "arcsin": lambda r: torch.where(r > 4, r - 4 + (1 + (r - 4) ** 2).sqrt(), 1.0).log() / 3,
    "log": lambda r: (1 + r).log(),
    "zero": lambda r: 0 * r,
}


class OptionsBattery(ModelBattery):
    num_layers = 1
    fiber_in, fiber_hidden, fiber_out, fiber_edge = {0: 2}, {0: 4, 1: 4}, {0: 1, 1: 2}, {0: 1}

    def slow(self, state, sample):
        options = {
            "norm": True,
            "norm_type": "norm",
            "norm_softening": 0.0,
            "self_interaction": "linear",
            "skip": "cat",
            "last_self_interaction": "linear",
            "aggregation": "sum",
            "self_interaction_per": "edge",
            **self.options,
        }
        fiber, fiber_hidden, fiber_out, fiber_edge = self.fibers
        edge_feats = reference.with_distance(sample.edge_feats, sample.rel_pos)
        distance = edge_feats["0"][:, -1:]
        scalar = SLOW_SCALARS[self.options.get("populate_edge", "lin")](distance)
        edge_feats["0"] = torch.cat([edge_feats["0"][:, :-1], scalar], dim=1)
        x, step = sample.node_feats, 0
        for _ in range(self.num_layers):
            x = slow_block(
                reference.sub(state, f"graph_modules.{step}."),
                (fiber, fiber_hidden, fiber_edge),
                self.num_heads,
                self.channels_div,
                x,
                edge_feats,
                sample.edges,
                options,
                options["skip"],
                options["self_interaction"],
            )
            fiber, step = fiber_hidden, step + 1
            if options["norm"]:
                norm = reference.sub(state, f"graph_modules.{step}.")
                x = slow_norm(norm, options["norm_type"], x, options["norm_softening"])
                step += 1
        last, fibers = reference.sub(state, f"graph_modules.{step}."), (fiber, fiber_out, fiber_edge)
        kind = options["last_self_interaction"]
        if options.get("final_layer") == "attention":
            return slow_block(last, fibers, 1, 1, x, edge_feats, sample.edges, options, "cat", kind)
        if options.get("final_layer") == "lin":
            return slow_self_interaction(last, kind, x)
        return slow_convolution(last, fibers, x, edge_feats, sample.edges, options, kind)


class TestOfTheAuthorsProgram(OptionsBattery):
    """The N-body network of the paper's program: relative positions added, attention to the end."""

    options = {
        "relative_pos": "add",
        "norm_type": "bias",
        "final_layer": "attention",
        "last_self_interaction": "attentive",
    }


class TestCleanLastConvolution(OptionsBattery):
    num_layers = 2
    options = {
        "relative_pos": "cat",
        "norm_softening": 0.2,
        "skip": "sum",
        "self_interaction": "attentive",
        "aggregation": "mean",
        "self_interaction_per": "node",
    }


class TestOfStructurePrediction(OptionsBattery):
    """The network of RoseTTAFold2 and RoseTTAFold All-Atom, but for its size."""

    fiber_in = {0: 2, 1: 3}
    options = {"populate_edge": "arcsin", "final_layer": "lin"}


class TestSelfInteractionToTheEnd(OptionsBattery):
    options = {"populate_edge": "log", "final_layer": "lin", "last_self_interaction": "attentive"}


class TestSumOverNodes(ModelBattery):
    rows, options = "graphs", {"return_type": 0, "pooling": "sum"}
    num_layers = 1


@pytest.mark.parametrize("populate_edge", SLOW_SCALARS)
def test_how_the_distance_enters(populate_edge):
    lengths = torch.tensor([0.0, 3.0, 4.5, 30.0], dtype=torch.float64)
    rel_pos = (lengths[:, None] * torch.tensor([2 / 3, -1 / 3, 2 / 3], dtype=torch.float64)).requires_grad_()

    def scalar(rel_pos):
        return get_populated_edge_features(rel_pos, populate_edge=populate_edge)["0"][:, 0, 0]

    assert_same(scalar(rel_pos), SLOW_SCALARS[populate_edge](lengths))
    (at_zero, *_) = torch.autograd.grad(scalar(rel_pos).sum() + 0 * rel_pos.sum(), rel_pos)[0]
    assert (at_zero == 0).all()
    assert torch.autograd.gradcheck(scalar, rel_pos[1:].detach().requires_grad_())


def build(**options):
    options = {"num_layers": 1, "num_heads": 2, "channels_div": 2} | options
    return SE3Transformer(
        fiber_in=Fiber({0: 3}), fiber_hidden=Fiber({0: 4, 1: 4}), fiber_out=Fiber({0: 2, 1: 2}), **options
    )


def test_default_is_what_the_options_say_it_is():
    """Every option has the value by default that leaves the widely used model as it is, under the same keys."""
    spelt_out = build(
        norm_type="norm",
        norm_softening=0.0,
        self_interaction="linear",
        skip="cat",
        relative_pos=None,
        final_layer="conv",
        last_self_interaction="linear",
        aggregation="sum",
        self_interaction_per="edge",
        populate_edge="lin",
        compute_gradients=True,
    )
    plain, sample = build(), random_sample({0: 3}, dtype=torch.float32)
    spelt_out.load_state_dict(plain.state_dict())
    assert_same(spelt_out(sample.graph, sample.node_feats), plain(sample.graph, sample.node_feats), 1e-15)


@pytest.mark.parametrize("relative_pos", ["add", "cat"])
def test_relative_position_of_edges_in_pairs(relative_pos):
    """On an undirected graph edges are put in pairs, unless their scalars want gradients: the same comes out."""
    model, sample = build(relative_pos=relative_pos).double(), random_sample({0: 3}, nodes=(5,), edges=(0,))
    sample.dst, sample.src = (~torch.eye(5, dtype=torch.bool)).nonzero().T
    sample.num_edges = torch.tensor([20])
    expected = model(sample.leaves().graph, sample.node_feats)
    assert_same(model(sample.graph, sample.node_feats), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"self_interaction": "att"}, "self_interaction must be 'linear' or 'attentive', got 'att'"),
        ({"last_self_interaction": "att"}, "last_self_interaction must be 'linear' or 'attentive', got 'att'"),
        ({"relative_pos": "concat"}, "relative_pos must be None or 'cat' or 'add', got 'concat'"),
        ({"skip": "add"}, "skip must be 'cat' or 'sum', got 'add'"),
        ({"norm_type": "layer"}, "norm_type must be 'norm' or 'bias', got 'layer'"),
        ({"norm_type": "bias", "norm": False}, "norm_type 'bias' needs norm=True"),
        ({"norm_softening": 0.1, "norm": False}, "norm_softening 0.1 needs norm=True"),
        ({"norm_softening": -0.1}, "softening of norms must be a length, 0 or more, got -0.1"),
        ({"norm_softening": float("nan"), "norm_type": "bias"}, "must be a length, 0 or more, got nan"),
        ({"final_layer": "att"}, "final_layer must be 'conv' or 'lin' or 'attention', got 'att'"),
        ({"final_layer": "lin", "num_layers": 0}, "makes no new degrees, but fiber_out has [1]"),
        ({"final_layer": "lin", "aggregation": "mean"}, "last convolution, but final_layer is 'lin'"),
        ({"populate_edge": "sin"}, "populate_edge must be 'lin' or 'arcsin' or 'log' or 'zero', got 'sin'"),
        ({"aggregation": "avg"}, "aggregation must be 'sum' or 'mean', got 'avg'"),
        ({"self_interaction_per": "graph"}, "self_interaction_per must be 'edge' or 'node', got 'graph'"),
        ({"final_layer": "attention", "aggregation": "mean"}, "last convolution, but final_layer is 'attention'"),
        ({"pooling": "mean"}, "pooling must be 'max' or 'avg' or 'sum', got 'mean'"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError) as caught:
        build(**options)
    assert message in str(caught.value)


def test_skip_by_sum_needs_room():
    with pytest.raises(ValueError, match="the 5 input channels of degree 0 must be at most as many as the output's, 4"):
        AttentionBlockSE3(Fiber({0: 5}), Fiber({0: 4}), skip="sum")


def test_convolution_options_that_make_no_sense():
    fiber = Fiber({0: 2, 1: 2})
    for options, message in [
        ({"aggregation": "mean", "pool": False}, "which needs pool"),
        ({"self_interaction_per": "node", "self_interaction": True, "pool": False}, "needs pool and a self_interact"),
        ({"self_interaction_per": "node"}, "needs pool and a self_interact"),
        ({"self_interaction": "att"}, "self_interaction must be False or True or 'linear' or 'attentive', got 'att'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ConvSE3(fiber, fiber, **options)


def test_relative_position_needs_positions():
    conv, sample = ConvSE3(Fiber({0: 2}), Fiber({0: 1}), relative_pos="cat"), random_sample({0: 2}, dtype=torch.float32)
    graph = Graph(sample.src, sample.dst, num_nodes=5)
    call = sample.node_feats, reference.with_distance({}, sample.rel_pos), graph, get_basis(sample.rel_pos, 1)
    with pytest.raises(ValueError, match="no rel_pos, which the option relative_pos needs"):
        conv(*call)


def test_vectors_of_higher_degree_cannot_be_max_pooled():
    with pytest.raises(ValueError, match="use 'avg' or 'sum'"):
        GPooling(1, "max")
