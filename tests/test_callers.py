"""Code written for the known package runs unchanged: names, arguments, fibers, layers alone, precomputed bases."""

from __future__ import annotations

import argparse
import inspect
import random
import warnings
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from helpers import assert_same, random_features, random_sample
from torch import nn

from se3_transformer.model import SE3Transformer, SE3TransformerPooled
from se3_transformer.model.basis import get_basis, update_basis_with_fused
from se3_transformer.model.fiber import Fiber, FiberEl
from se3_transformer.model.layers import ConvSE3, LinearSE3, NormSE3
from se3_transformer.model.layers.attention import AttentionBlockSE3, AttentionSE3
from se3_transformer.model.layers.convolution import ConvSE3FuseLevel, RadialProfile
from se3_transformer.model.layers.pooling import GPooling
from se3_transformer.model.transformer import get_populated_edge_features
from se3_transformer.runtime import utils

# -------------------------------------------------------------------------------------------------------------- fibers


@pytest.mark.parametrize(
    "structure",
    [
        {0: 16, 1: 3},
        {"0": 16, "1": 3},
        {1: 3, 0: 16},
        [(0, 16), (1, 3)],
        [(1, 3), (0, 16)],
        [["0", 16], ["1", 3]],
        [FiberEl(0, 16), FiberEl(1, 3)],
        ((degree, channels) for degree, channels in [(0, 16), (1, 3)]),
        Fiber({0: 16, 1: 3}),
        {0: 16, 1: 3, 2: 0},
    ],
    ids=lambda structure: "generator" if isinstance(structure, Generator) else str(structure),
)
def test_ways_to_make_a_fiber(structure):
    fiber = Fiber(structure)
    assert fiber == {0: 16, 1: 3} and fiber.structure == [(0, 16), (1, 3)]
    assert (fiber.degrees, fiber.channels, fiber.num_features) == ([0, 1], [16, 3], 25)


def test_reading_a_fiber():
    fiber = Fiber.create(num_degrees=3, num_channels=4)
    assert fiber == Fiber([(0, 4), (1, 4), (2, 4)])
    assert [(element.degree, element.channels) for element in fiber] == [(d, c) for d, c in fiber]
    assert (fiber[1], fiber["1"], fiber[5], len(fiber)) == (4, 4, 0, 3)
    assert 1 in fiber and "1" in fiber and 5 not in fiber
    assert Fiber({}).degrees == Fiber([]).degrees == []
    assert Fiber.from_features(random_features(fiber, 5)) == fiber


def test_sums_and_products_of_fibers():
    fiber, other = Fiber({0: 2, 1: 3}), Fiber({1: 5, 2: 7})
    assert fiber + other == {0: 2, 1: 8, 2: 7}
    assert fiber + 1 == {0: 3, 1: 4}
    assert fiber * 2 == {0: 4, 1: 6}
    pairs = [(d_in, d_out, c_in, c_out) for (d_in, c_in), (d_out, c_out) in fiber * other]
    assert pairs == [(0, 1, 2, 5), (0, 2, 2, 7), (1, 1, 3, 5), (1, 2, 3, 7)]
    assert Fiber.combine_max(fiber, other) == {0: 2, 1: 5, 2: 7}
    assert Fiber.combine_selectively(fiber, other) == {0: 2, 1: 8}


def test_attention_heads_of_a_fiber():
    """Per degree (N, C, 2l+1) -> (N, heads, C / heads · (2l+1)), degrees one after the other."""
    features = random_features({0: 4, 1: 2}, 5)
    heads = Fiber({0: 4, 1: 2}).to_attention_heads(features, 2)
    expected = [torch.cat([features["0"][:, 2 * h : 2 * h + 2, 0], features["1"][:, h]], dim=1) for h in range(2)]
    assert torch.equal(heads, torch.stack(expected, dim=1))


# ----------------------------------------------------------------------------------------------------------- arguments

KNOWN_ARGUMENTS = {  # in the order of the known package, without its **kwargs
    SE3Transformer: "num_layers fiber_in fiber_hidden fiber_out num_heads channels_div fiber_edge return_type=None "
    "pooling=None norm=True use_layer_norm=True tensor_cores=False low_memory=False",
    SE3Transformer.forward: "self graph node_feats edge_feats=None basis=None",
    SE3TransformerPooled: "fiber_in fiber_out fiber_edge num_degrees num_channels output_dim",
    SE3TransformerPooled.forward: "self graph node_feats edge_feats basis=None",
    ConvSE3: "fiber_in fiber_out fiber_edge pool=True use_layer_norm=False self_interaction=False max_degree=4 "
    "fuse_level=FULL allow_fused_output=False low_memory=False",
    ConvSE3.forward: "self node_feats edge_feats graph basis",
    AttentionBlockSE3: "fiber_in fiber_out fiber_edge=None num_heads=4 channels_div=2 use_layer_norm=False "
    "max_degree=4 fuse_level=FULL low_memory=False",
    AttentionBlockSE3.forward: "self node_features edge_features graph basis",
    AttentionSE3: "num_heads key_fiber value_fiber",
    AttentionSE3.forward: "self value key query graph",
    NormSE3: "fiber nonlinearity",
    NormSE3.forward: "self features",
    LinearSE3: "fiber_in fiber_out",
    LinearSE3.forward: "self features",
    GPooling: "feat_type=0 pool=max",
    GPooling.forward: "self features graph",
    RadialProfile: "num_freq channels_in channels_out edge_dim=1 mid_dim=32 use_layer_norm=False",
    get_basis: "relative_pos max_degree=4 compute_gradients use_pad_trick=False amp=False",
    update_basis_with_fused: "basis max_degree use_pad_trick fully_fused",
    get_populated_edge_features: "relative_pos edge_features=None",
}


@pytest.mark.parametrize("function", KNOWN_ARGUMENTS, ids=lambda function: function.__qualname__)
def test_arguments_by_position_name_and_default(function):
    ours = [p for p in inspect.signature(function).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    known = KNOWN_ARGUMENTS[function].split()
    assert [p.name for p in ours] == [argument.split("=")[0] for argument in known]
    for parameter, argument in zip(ours, known):
        if "=" in argument:
            assert getattr(parameter.default, "name", str(parameter.default)) == argument.split("=")[1], argument


def test_settings_of_a_whole_script_for_the_pooled_model():
    """Scripts write SE3TransformerPooled(fiber_in=…, **vars(args)); the known package ignores what it does not know."""
    model_settings = dict(num_degrees=2, num_channels=4, num_layers=1, num_heads=2, channels_div=2, pooling=None)
    others = dict(epochs=100, batch_size=240, seed=None, num_workers=8, amp=False, silent=False, gradient_clip=None)
    others |= dict(learning_rate=2e-3, min_learning_rate=None, momentum=0.9, weight_decay=0.1, task="homo", wandb=False)
    others |= dict(data_dir=".", log_dir=".", precompute_bases=False, eval_interval=20, optimizer="adam")
    others |= dict(num_classes=3, num_threads=2, num_edges=8, num_seeds=1, norm_eps=1e-6, final_layer_norm=True)
    args = argparse.Namespace(**model_settings, norm=True, use_layer_norm=True, low_memory=False, **others)
    fibers = dict(fiber_in=Fiber({0: 6}), fiber_out=Fiber({0: 8}), fiber_edge=Fiber({0: 4}))
    with pytest.warns(UserWarning, match="left out.*epochs, batch_size.*optimizer"):
        model = SE3TransformerPooled(**fibers, output_dim=1, tensor_cores=False, **vars(args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = SE3TransformerPooled(**fibers, output_dim=1, **model_settings)
    assert {k: p.shape for k, p in model.state_dict().items()} == {k: p.shape for k, p in same.state_dict().items()}


def test_order_of_parameters():
    """The state of an optimizer is loaded by position: layers of few channels come first, as in the known package."""
    model = SE3Transformer(1, Fiber({0: 6, 1: 2}), Fiber.create(3, 4), Fiber({0: 3, 1: 2}), 2, 2)
    names = [name.removeprefix("graph_modules.") for name, _ in model.named_parameters()]
    last_layers = [name for name in names if name.endswith("net.6.weight")]
    assert [name.removesuffix(".radial_func.net.6.weight") for name in last_layers] == [
        *(f"0.to_key_value.conv.{pair}" for pair in ("1,2", "1,0", "1,1", "0,2", "0,0", "0,1")),
        *("2.conv_out.1", "2.conv_out.0"),
    ]
    assert [name for name in names if "to_kernel_self" in name] == ["2.to_kernel_self.1", "2.to_kernel_self.0"]
    assert list(NormSE3(Fiber({0: 3, 1: 2})).layer_norms) == ["1", "0"]


@pytest.mark.parametrize("final_layer", ["conv", "lin", "attention"])
def test_order_of_results(final_layer):
    """By degree, whatever the numbers of channels."""
    model = SE3Transformer(
        1, Fiber({0: 6, 1: 2}), Fiber.create(2, 4), Fiber({0: 3, 1: 2}), 2, 2, final_layer=final_layer
    )
    sample = random_sample({0: 6, 1: 2}, dtype=torch.float32)
    assert list(model(sample.graph, sample.node_feats)) == ["0", "1"]


def test_attributes_that_callers_read():
    model = build_design_wrapper().se3
    assert (model.num_layers, model.num_heads, model.channels_div, model.max_degree) == (2, 4, 4, 2)
    assert (model.return_type, model.pooling, model.tensor_cores, model.low_memory) == (None, None, False, False)
    assert model.fiber_edge == {0: 8} and model.fuse_level == ConvSE3FuseLevel.PARTIAL


def test_channels_that_are_none(dtype):
    """Fibers made from settings may have degrees without channels, and features without channels come with them."""
    model = SE3Transformer(1, Fiber({0: 3, 1: 0}), Fiber({0: 4, 1: 4}), Fiber({0: 2}), 2, 2, Fiber({0: 0})).to(dtype)
    sample = random_sample({0: 3}, nodes=(4,), edges=(7,), dtype=dtype)
    expected = model(sample.graph, sample.node_feats)
    nodes, edges = torch.empty(4, 0, 3, dtype=dtype), torch.empty(7, 0, 1, dtype=dtype)
    assert_same(model(sample.graph, {**sample.node_feats, "1": nodes}, {"0": edges}), expected, 1e-15)


# --------------------------------------------------------------------------------------------------- a protein designer


class DesignWrapper(nn.Module):
    """How protein design programs hold the model: scalars and vectors of residues, pair features, weights by name."""

    def __init__(self, num_edge_features=8):
        super().__init__()
        self.se3 = SE3Transformer(
            num_layers=2,
            fiber_in=Fiber({0: 32, 1: 3}),
            fiber_hidden=Fiber.create(3, 32),
            fiber_out=Fiber({0: 32, 1: 2}),
            num_heads=4,
            channels_div=4,
            fiber_edge=Fiber({0: num_edge_features}),
            use_layer_norm=True,
        )
        for name, parameter in self.se3.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1 and "radial_func" in name:
                if "net.6" in name:
                    nn.init.zeros_(parameter)
                else:
                    nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        nn.init.zeros_(self.se3.graph_modules[-1].to_kernel_self["0"])
        nn.init.zeros_(self.se3.graph_modules[-1].to_kernel_self["1"])

    def forward(self, G, type_0_features, type_1_features, edge_features):
        return self.se3(G, {"0": type_0_features, "1": type_1_features}, {"0": edge_features})


def build_design_wrapper():
    torch.manual_seed(0)
    return DesignWrapper()


class StructureWrapper(nn.Module):
    """As RoseTTAFold2 and RoseTTAFold All-Atom hold it: no neighbours in the last layer, distances compressed."""

    def __init__(self):
        super().__init__()
        self.se3 = SE3Transformer(
            num_layers=1,
            fiber_in=Fiber({0: 8, 1: 3}),
            fiber_hidden=Fiber.create(3, 8),
            fiber_out=Fiber({0: 8, 1: 2}),
            num_heads=4,
            channels_div=2,
            fiber_edge=Fiber({0: 4}),
            populate_edge="arcsin",
            final_layer="lin",
            use_layer_norm=True,
            compute_gradients=False,
        )
        nn.init.zeros_(self.se3.graph_modules[-1].weights["0"])

    def forward(self, G, type_0_features, type_1_features, edge_features):
        return self.se3(G, {"0": type_0_features, "1": type_1_features}, {"0": edge_features})


def test_structure_prediction():
    model = StructureWrapper().double()
    last = [(name, tuple(p.shape)) for name, p in model.se3.named_parameters() if name.startswith("graph_modules.2.")]
    assert last == [("graph_modules.2.weights.0", (8, 8)), ("graph_modules.2.weights.1", (2, 8))]
    sample = random_sample({0: 8, 1: 3}, {0: 4})
    rel_pos = (6 * sample.rel_pos).requires_grad_()
    graph, inputs = replace(sample.graph, rel_pos=rel_pos), (sample.node_feats["0"], sample.node_feats["1"])
    out = model(graph, *inputs, sample.edge_feats["0"])
    assert (out["0"] == 0).all() and out["1"].shape == (len(inputs[0]), 2, 3)

    (grad,) = torch.autograd.grad(out["1"].square().sum(), rel_pos)
    along = torch.nn.functional.normalize(rel_pos.detach(), dim=1)
    assert grad.norm() > 0
    assert_same(grad, (grad * along).sum(dim=1, keepdim=True) * along, what="gradients through distances alone")


def residues(length, neighbours):
    """A random chain, each residue joined to its nearest: positions (L, 3), src and dst (L · neighbours,)."""
    positions = 3.8 * torch.nn.functional.normalize(torch.randn(length, 3), dim=1).cumsum(dim=0)
    distances = torch.cdist(positions, positions) + 1e3 * torch.eye(length)
    nearest = distances.topk(neighbours, largest=False).indices
    return positions, torch.arange(length).repeat_interleave(neighbours), nearest.flatten()


def test_protein_design_trains_from_zero_initialised_weights():
    dgl = pytest.importorskip("dgl", reason="DGL is not installed")
    model = build_design_wrapper()
    positions, src, dst = residues(40, 16)
    target = 0.3 * torch.randn(40, 2, 3)
    G = dgl.graph((src, dst), num_nodes=40)
    G.edata["rel_pos"] = (positions[dst] - positions[src]).detach()
    inputs = (torch.randn(40, 32, 1), torch.randn(40, 3, 3), torch.randn(len(src), 8, 1))

    assert all((feature == 0).all() for feature in model(G, *inputs).values())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        out = model(G, *inputs)
        assert out["0"].shape == (40, 32, 1) and out["1"].shape == (40, 2, 3)
        loss = ((out["1"] - target) ** 2).mean() + out["0"].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0], losses
    state = model.state_dict()
    assert "se3.graph_modules.4.conv_out.0.radial_func.net.6.weight" in state


def test_parameters_may_be_replaced():
    """Some initialisers put a new parameter in place of an entry of `to_kernel_self`."""
    model = build_design_wrapper()
    last = model.se3.graph_modules[-1]
    last.to_kernel_self["0"] = nn.Parameter(torch.ones_like(last.to_kernel_self["0"]))
    sample = random_sample({0: 32, 1: 3}, {0: 8}, nodes=(4,), edges=(7,), dtype=torch.float32)
    out = model.se3(sample.graph, sample.node_feats, sample.edge_feats)
    assert out["0"].norm() > 0 and (out["1"] == 0).all()


# ----------------------------------------------------------------------------------------------------- basis and layers


def slow_model(model, sample):
    fibers = [Fiber(f) for f in (model.fiber_in, model.fiber_hidden, model.fiber_out, model.fiber_edge)]
    layers = model.num_layers, model.num_heads, model.channels_div
    return reference.transformer(
        model.state_dict(), fibers, layers, True, sample.node_feats, sample.edge_feats, sample.edges
    )[-1]


@pytest.mark.parametrize("options", [{}, {"tensor_cores": True}, {"low_memory": True}], ids=str)
def test_basis_as_callers_precompute_it(options):
    """get_basis, update_basis_with_fused, split by graph in a data set, joined by a collate function."""
    model = SE3Transformer(1, Fiber({0: 3}), Fiber.create(2, 4), Fiber({0: 2, 1: 2}), 2, 2, Fiber({0: 1}), **options)
    model, sample = model.double(), random_sample({0: 3}, {0: 1}, nodes=(4, 3), edges=(7, 5))
    pad, full = model.tensor_cores and not model.low_memory, model.fuse_level == ConvSE3FuseLevel.FULL
    arguments = dict(max_degree=model.max_degree, use_pad_trick=pad)
    basis = get_basis(sample.rel_pos, compute_gradients=False, amp=torch.is_autocast_enabled("cpu"), **arguments)
    singles = [{key: rows.split([7, 5])[b] for key, rows in basis.items()} for b in range(2)]
    basis = {key: torch.cat([single[key] for single in singles]) for key in singles[0]}
    basis = update_basis_with_fused(basis, fully_fused=full, **arguments)
    expected = slow_model(model, sample)
    assert_same(model(sample.graph, sample.node_feats, sample.edge_feats, basis), expected)
    assert_same(model(sample.graph, sample.node_feats, sample.edge_feats, basis=basis), expected)
    edge_feats = get_populated_edge_features(sample.rel_pos, sample.edge_feats)
    out = model.graph_modules(sample.node_feats, edge_feats, graph=sample.graph, basis=basis)
    assert_same(out, expected, what="the layers without the model")
    assert_same(model(sample.graph, sample.node_feats, sample.edge_feats, {}), expected, what="an empty basis")


@pytest.mark.parametrize("as_graph", ["Graph", "dgl"])
def test_layers_alone(as_graph):
    """Every layer called as the known package's own code calls it, with fibers and a basis made by hand."""
    fiber, hidden, edge = Fiber({0: 4, 1: 4}), Fiber.create(3, 4), Fiber({0: 2, 1: 1})
    sample = random_sample(fiber, edge, nodes=(4, 3), edges=(7, 5))
    if as_graph == "dgl":
        pytest.importorskip("dgl", reason="DGL is not installed")
    graph = sample.graph.to_dgl() if as_graph == "dgl" else sample.graph
    basis = update_basis_with_fused(get_basis(sample.rel_pos, max_degree=2), 2, False, True)
    edge_feats = get_populated_edge_features(sample.rel_pos, sample.edge_feats)

    block = AttentionBlockSE3(fiber, hidden, edge, num_heads=2, channels_div=2, max_degree=2).double()
    out = block(sample.node_feats, edge_feats, graph=graph, basis=basis)
    expected = reference.attention_block(
        block.state_dict(), fiber, hidden, edge, 2, 2, sample.node_feats, edge_feats, sample.edges
    )
    assert_same(out, expected, what="attention block")

    norm = NormSE3(hidden).double()
    normed = norm(out, edge_feats, graph=graph, basis=basis)
    assert_same(normed, reference.norm(norm.state_dict(), expected), what="norm")

    conv = ConvSE3(hidden, fiber, edge, self_interaction=True, max_degree=2).double()
    convolved = conv(normed, edge_feats, graph, basis)
    edges = {**sample.edge_feats, "0": edge_feats["0"]}
    expected = reference.convolution(
        conv.state_dict(), hidden, fiber, edge, normed, edges, sample.edges, self_interaction=True
    )
    assert_same(convolved, expected, what="convolution")

    linear = LinearSE3(fiber, Fiber({0: 3, 1: 2})).double()
    mixed = linear(convolved)
    assert_same(mixed, {l: linear.weights[l] @ x for l, x in convolved.items()}, what="linear")
    pooled = GPooling(pool="avg", feat_type=1)(mixed, graph=graph)
    assert_same(pooled, reference.pooled(mixed["1"], sample.num_nodes, "avg"), what="pooling")


# ---------------------------------------------------------------------------------------------------- runtime functions


def test_functions_that_callers_import_from_runtime_utils(monkeypatch):
    x, y = random_features({0: 2, 1: 3}, 5), random_features({1: 3, 2: 4}, 5)
    assert_same(utils.aggregate_residual(x, y, "add"), {"1": x["1"] + y["1"], "2": y["2"]}, 1e-15)
    assert_same(utils.aggregate_residual(x, y, "cat"), {"1": torch.cat([y["1"], x["1"]], dim=1), "2": y["2"]}, 1e-15)
    with pytest.raises(ValueError, match="'add'.*'mean'"):
        utils.aggregate_residual(x, y, "mean")
    fused = torch.randn(5, 3, 1 + 3 + 7)
    assert {l: x.shape[-1] for l, x in utils.unfuse_features(fused, [0, 1, 3]).items()} == {"0": 1, "1": 3, "3": 7}
    assert utils.degree_to_dim(2) == 5
    assert [utils.str2bool(text) for text in ("yes", "False", "1", "n", True)] == [True, False, True, False, True]
    with pytest.raises(argparse.ArgumentTypeError, match="maybe"):
        utils.str2bool("maybe")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert utils.get_local_rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert utils.get_local_rank() == 3


def test_seed_everything():
    drawn = []
    for _ in range(2):
        utils.seed_everything("5")
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1] and drawn[0][2] == torch.rand(1, generator=torch.Generator().manual_seed(5)).item()


def test_functions_for_several_processes(monkeypatch):
    joined = []
    monkeypatch.setattr(torch.distributed, "init_process_group", joined.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not utils.init_distributed() and joined == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert utils.init_distributed() and joined == ["gloo"]

    double = utils.rank_zero_only(lambda number: 2 * number)
    assert double(3) == 6
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert double(3) is None
    assert utils.increase_l2_fetch_granularity() is None


@pytest.mark.parametrize(
    "capability, amp, expected",
    [((6, 1), True, False), ((7, 0), True, True), ((7, 0), False, False), ((8, 0), False, True), (None, True, False)],
)
def test_tensor_cores(monkeypatch, capability, amp, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert utils.using_tensor_cores(amp) is expected


def test_to_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    class Moved:
        def to(self, device):
            return device

    device = torch.device("cuda", 1)
    assert utils.to_cuda((Moved(), [Moved()], {"0": Moved()})) == (device, [device], {"0": device})
