"""Whole models through the battery, and the known faults of other implementations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
from battery import Battery, varied
from helpers import TOLERANCE, assert_finite, assert_same, gradients, random_features, random_sample

from se3_transformer.model import Fiber, Graph, SE3Transformer, SE3TransformerPooled
from se3_transformer.model.basis import get_basis
from se3_transformer.model.transformer import get_populated_edge_features


class ModelBattery(Battery):
    fiber_in, fiber_hidden, fiber_out, fiber_edge = {0: 3}, {0: 4, 1: 4, 2: 4}, {0: 2, 1: 3}, {0: 2}
    num_layers, num_heads, channels_div = 2, 2, 2
    options = {}

    @property
    def fibers(self):
        return [Fiber(f) for f in (self.fiber_in, self.fiber_hidden, self.fiber_out, self.fiber_edge)]

    def build(self):
        return SE3Transformer(
            self.num_layers, *self.fibers[:3], self.num_heads, self.channels_div, self.fibers[3], **self.options
        )

    def call(self, module, sample):
        out = module(sample.graph, sample.node_feats, sample.edge_feats)
        if isinstance(out, dict):
            return out
        degree = self.options["return_type"] or 0
        return {str(degree): out[..., None] if self.options.get("pooling") and degree == 0 else out}

    def slow(self, state, sample):
        layers = self.num_layers, self.num_heads, self.channels_div
        return reference.transformer(
            state,
            self.fibers,
            layers,
            self.options.get("norm", True),
            sample.node_feats,
            sample.edge_feats,
            sample.edges,
        )[-1]

    def reference(self, state, sample):
        out = self.slow(state, sample)
        degree, pooling = self.options.get("return_type"), self.options.get("pooling")
        if degree is None:
            return out
        pooled = reference.pooled(out[str(degree)], sample.num_nodes, pooling) if pooling else out[str(degree)]
        return {str(degree): pooled[..., None] if pooling and degree == 0 else pooled}


class TestPartial(ModelBattery):
    pass


class TestTensorCores(ModelBattery):
    fiber_in, fiber_out, fiber_edge = {0: 4, 1: 4, 2: 4}, {0: 2, 1: 2, 2: 2}, {0: 1}
    options = {"tensor_cores": True}


class TestLowMemory(ModelBattery):
    options = {"low_memory": True}


class TestUneven(ModelBattery):
    fiber_hidden, fiber_edge, options = {0: 8, 1: 4, 2: 4}, {0: 1, 1: 2}, {"use_layer_norm": False}
    fiber_in = {0: 3, 1: 2}


class TestNoNorm(ModelBattery):
    fiber_edge, options = {}, {"norm": False, "return_type": 1}


class TestScalarsOnly(ModelBattery):
    """num_degrees = 1."""

    fiber_hidden, fiber_out = {0: 4}, {0: 3}
    options = {"return_type": 0}


class TestDegree6(ModelBattery):
    fiber_in, fiber_hidden, fiber_out, fiber_edge = {0: 2}, {0: 2, 6: 2}, {1: 1, 6: 1}, {}
    num_layers, num_heads = 1, 1


class TestPoolMax(ModelBattery):
    rows, options = "graphs", {"return_type": 0, "pooling": "max"}


class TestPoolMeanOfVectors(ModelBattery):
    rows, options = "graphs", {"return_type": 1, "pooling": "avg"}


class TestPooledModel(ModelBattery):
    rows, fiber_out = "graphs", {0: 6}
    options = {"pooling": "avg"}
    output_dim = 3

    def build(self):
        fiber_in, _, fiber_out, fiber_edge = self.fibers
        return SE3TransformerPooled(
            fiber_in,
            fiber_out,
            fiber_edge,
            len(self.fiber_hidden),
            self.fiber_hidden[0],
            self.output_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            channels_div=self.channels_div,
            **self.options,
        )

    def call(self, module, sample):
        out = module(sample.graph, sample.node_feats, sample.edge_feats)
        shape = (sample.graph.num_graphs,) if self.output_dim == 1 else (sample.graph.num_graphs, self.output_dim)
        assert out.shape == shape
        return {"0": out.reshape(-1, self.output_dim, 1)}

    def reference(self, state, sample):
        features = self.slow(reference.sub(state, "transformer."), sample)["0"]
        pooled = reference.pooled(features, sample.num_nodes, self.options.get("pooling", "max"))
        return {"0": reference.mlp(state, pooled).reshape(-1, self.output_dim, 1)}


# ----------------------------------------------------------------------------------------------------------- arguments


def small(fiber_in=None, fiber_hidden=None, fiber_out=None, fiber_edge=None, num_layers=2, num_heads=2, **options):
    torch.manual_seed(0)
    fibers = [Fiber(f) for f in (fiber_in or {0: 3}, fiber_hidden or {0: 4, 1: 4}, fiber_out or {0: 2, 1: 2})]
    return varied(SE3Transformer(num_layers, *fibers, num_heads, 2, Fiber(fiber_edge or {}), **options)).double()


def slow(model, state, sample):
    fibers = model.fiber_in, model.fiber_hidden, model.fiber_out, model.fiber_edge
    layers = model.num_layers, model.num_heads, model.channels_div
    return reference.transformer(state, fibers, layers, True, sample.node_feats, sample.edge_feats, sample.edges)[-1]


def run(model, sample):
    out = model(sample.graph, sample.node_feats, sample.edge_feats)
    return out if isinstance(out, dict) else {"tensor": out}


def test_return_type_and_pooling_shapes():
    sample = random_sample({0: 3}, nodes=(4, 3), edges=(6, 5))
    assert {l: tuple(x.shape) for l, x in run(small(), sample).items()} == {"0": (7, 2, 1), "1": (7, 2, 3)}
    for options, shape in [
        ({"return_type": 0}, (7, 2, 1)),
        ({"return_type": 1}, (7, 2, 3)),
        ({"return_type": 0, "pooling": "max"}, (2, 2)),
        ({"return_type": 0, "pooling": "avg"}, (2, 2)),
        ({"return_type": 1, "pooling": "avg"}, (2, 2, 3)),
    ]:
        assert run(small(**options), sample)["tensor"].shape == shape


@pytest.mark.parametrize("output_dim, shape", [(1, (2,)), (3, (2, 3))])
def test_pooled_model_without_pooling_argument(output_dim, shape):
    """Known fault elsewhere: a KeyError. The maximum it is."""
    torch.manual_seed(0)
    options = dict(num_degrees=2, num_channels=4, output_dim=output_dim, num_layers=1, num_heads=2, channels_div=2)
    models = [
        SE3TransformerPooled(Fiber({0: 3}), Fiber({0: 4}), Fiber({}), **options, **pooling).double()
        for pooling in ({}, {"pooling": "max"}, {"pooling": None})
    ]
    sample = random_sample({0: 3}, nodes=(4, 3), edges=(6, 5))
    expected = models[0](sample.graph, sample.node_feats)
    assert expected.shape == shape
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
        assert_same(model(sample.graph, sample.node_feats), expected, 1e-15)


def test_return_type_selects_from_the_dict():
    sample = random_sample({0: 3})
    assert_same(run(small(return_type=1), sample)["tensor"], run(small(), sample)["1"])


def test_layout_of_modules():
    with_norm, without = small(), small(norm=False)
    assert [type(m).__name__ for m in with_norm.graph_modules] == [
        "AttentionBlockSE3",
        "NormSE3",
        "AttentionBlockSE3",
        "NormSE3",
        "ConvSE3",
    ]
    assert [type(m).__name__ for m in without.graph_modules] == ["AttentionBlockSE3", "AttentionBlockSE3", "ConvSE3"]


def test_names_of_parameters():
    """The prefixes that existing checkpoints have."""
    keys = set(small(fiber_hidden={0: 4, 1: 4}, fiber_out={0: 2, 1: 3}).state_dict())
    for key in (
        "graph_modules.0.to_key_value.conv.0,1.radial_func.net.6.weight",
        "graph_modules.0.to_query.weights.0",
        "graph_modules.0.project.weights.1",
        "graph_modules.1.group_norm.weight",
        "graph_modules.2.to_key_value.conv_out.1.radial_func.net.3.bias",
        "graph_modules.4.conv_out.0.radial_func.net.6.weight",
        "graph_modules.4.to_kernel_self.1",
    ):
        assert key in keys
    keys = set(small(fiber_hidden={0: 8, 1: 4}, use_layer_norm=False).state_dict())
    assert "graph_modules.1.layer_norms.1.bias" in keys
    assert "graph_modules.0.to_key_value.conv.0,1.radial_func.net.4.weight" in keys
    pooled = SE3TransformerPooled(
        Fiber({0: 3}),
        Fiber({0: 4}),
        Fiber({}),
        num_degrees=2,
        num_channels=4,
        output_dim=1,
        num_layers=1,
        num_heads=2,
        channels_div=2,
    )
    assert {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"} <= set(pooled.state_dict())


@pytest.mark.parametrize("fuse", ["full", "partial", "none"])
@pytest.mark.parametrize(
    "fiber_hidden, fiber_out, fiber_edge",
    [
        ({0: 4, 1: 4, 2: 4}, {0: 2, 1: 2, 2: 2}, {0: 1}),
        ({0: 4, 1: 4, 2: 4}, {0: 2, 1: 3}, {}),
        ({0: 4, 1: 4, 2: 4}, {0: 2, 1: 2, 2: 2}, {1: 2}),
        ({0: 8, 1: 4}, {0: 2, 1: 2}, {}),
        ({0: 4, 2: 4}, {0: 2}, {}),
    ],
)
def test_sharing_in_the_model(fuse, fiber_hidden, fiber_out, fiber_edge):
    """tensor_cores and low_memory choose how far radial networks may be shared, the fibers how far they are."""
    options = {"tensor_cores": fuse == "full", "low_memory": fuse == "none"}
    model = small({0: 3}, fiber_hidden, fiber_out, fiber_edge, **options)
    state, top, fiber = model.state_dict(), max(*fiber_hidden, *fiber_out), {0: 3}
    for i in (0, 2):
        value, key = reference.block_fibers(fiber, fiber_hidden, 2)
        both = {l: c + key.get(l, 0) for l, c in value.items()}
        assert reference.sharing_of(
            reference.sub(state, f"graph_modules.{i}.to_key_value.")
        ) == reference.expected_sharing(fiber, both, fiber_edge, fuse, top)
        fiber = fiber_hidden
    assert reference.sharing_of(reference.sub(state, "graph_modules.4.")) == reference.expected_sharing(
        fiber, fiber_out, fiber_edge, fuse, top
    )


def test_precomputed_basis_changes_nothing(dtype):
    model, sample = small().to(dtype), random_sample({0: 3}, dtype=dtype)
    basis = get_basis(sample.rel_pos, max_degree=1)
    assert_same(model(sample.graph, sample.node_feats, None, basis), run(model, sample), 1e-15)
    higher = get_basis(sample.rel_pos, max_degree=3)  # more than the model needs
    assert_same(model(sample.graph, sample.node_feats, None, higher), run(model, sample))


def test_precomputed_basis_with_zero_length_edges():
    model, sample = small(), random_sample({0: 3})
    sample.pos[1] = sample.pos[0]
    sample.src[0], sample.dst[0] = 0, 1
    sample.src[4], sample.dst[4] = 2, 2
    basis = get_basis(sample.rel_pos, max_degree=1)
    assert_same(model(sample.graph, sample.node_feats, basis=basis), run(model, sample))


@pytest.mark.parametrize("with_self_loop", [(True, True), (True, False), (False, True)])
def test_precomputed_bases_of_several_graphs_joined(with_self_loop):
    """As the known package's data sets do, key by key."""
    model, graphs = small().float(), []
    for loop in with_self_loop:
        pos = torch.randn(2, 3)
        src, dst = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1 if loop else 0])
        graphs.append(Graph(src, dst, pos[dst] - pos[src], num_nodes=2))
    bases = [get_basis(graph.rel_pos, max_degree=1) for graph in graphs]
    basis = {key: torch.cat([basis[key] for basis in bases]) for key in bases[0]}
    rel_pos = torch.cat([graph.rel_pos for graph in graphs])
    src, dst = (torch.cat([getattr(graphs[0], end), getattr(graphs[1], end) + 2]) for end in ("src", "dst"))
    graph, node_feats = Graph(src, dst, rel_pos, batch_num_nodes=torch.tensor([2, 2])), {"0": torch.randn(4, 3, 1)}
    assert_same(model(graph, node_feats, basis=basis), model(graph, node_feats))
    with pytest.raises(ValueError, match="expected 'zero_length' as bool"):
        model(graph, node_feats, basis=basis | {"zero_length": torch.tensor([2])})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("length", [1e-2, 300.0, 3e4])
def test_lengths_do_not_overflow(dtype, length):
    """Nor do their squares, which half precision does not hold."""
    rel_pos = torch.tensor([[length, 0.0, 0.0], [0.0, 0.6 * length, 0.8 * length]], dtype=dtype)
    lengths = get_populated_edge_features(rel_pos)["0"].flatten()
    torch.testing.assert_close(lengths, rel_pos.double().norm(dim=1).to(dtype), rtol=0, atol=0)


def test_inputs_stay_as_they_are():
    model, sample = small(fiber_edge={0: 2}), random_sample({0: 3}, {0: 2})
    graph = sample.graph
    before = {name: x.clone() for name, x in sample.inputs.items()}
    edge_feats = dict(sample.edge_feats)
    first = model(graph, sample.node_feats, edge_feats)
    assert list(edge_feats) == ["0"] and edge_feats["0"] is sample.edge_feats["0"]
    assert_same(sample.inputs, before, 1e-30)
    assert_same(model(graph, sample.node_feats, edge_feats), first, 1e-15)


def test_same_result_in_evaluation_mode_and_without_gradients():
    model, sample = small(), random_sample({0: 3})
    expected = run(model, sample)
    assert_same(run(model.eval(), sample), expected, 1e-15)
    with torch.no_grad():
        assert_same(run(model, sample), expected, 1e-13)
    with torch.inference_mode():
        assert_same({l: x.clone() for l, x in run(model, sample).items()}, expected, 1e-13)


def test_graph_in_one_piece_or_edges_of_graphs_mixed():
    """Without batch_num_edges the edges of a batch may be in any order."""
    model, sample = small(return_type=0, pooling="max"), random_sample({0: 3}, nodes=(4, 3), edges=(6, 5))
    expected = run(model, sample)
    mixed = sample.with_edges_permuted(torch.randperm(11))
    graph = Graph(mixed.src, mixed.dst, mixed.rel_pos, batch_num_nodes=mixed.num_nodes)
    assert_same(model(graph, mixed.node_feats), expected["tensor"])


def test_float32_of_large_and_small_distances():
    """Units must not matter to the frames: nanometres in metres, or light years."""
    model = small(use_layer_norm=True).float()
    for scale in (1e-9, 1e9):
        sample = random_sample({0: 3}, dtype=torch.float32)
        sample.pos = sample.pos * scale
        double = sample.to(torch.float64)
        expected = run(small(use_layer_norm=True), double)
        assert_same(run(model, sample), expected, 1e-3)


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"tensor_cores": True}], ids=str)
def test_autocast(options):
    """In bfloat16 nearly the same comes out, and every parameter gets a finite gradient; frames stay in float32."""
    model = small(fiber_hidden={0: 4, 1: 4, 2: 4}, **options).float()
    sample = random_sample({0: 3}, nodes=(6,), edges=(20,), dtype=torch.float32)
    sample.pos[1] = sample.pos[0]
    sample.src[0], sample.dst[0] = 0, 1
    expected = run(model, sample)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, sample)
        sum((x.float() ** 2).sum() for x in out.values()).backward()
    assert_same(out, expected, 0.1)
    assert_finite({name: p.grad for name, p in model.named_parameters()}, "gradients")


# --------------------------------------------------------------------------------------- known faults of other packages


def test_gradients_reach_positions_through_the_basis():
    """The direction matters to an output of degree 1, so moving a node sideways must have a gradient."""
    model, sample = small(return_type=1), random_sample({0: 3}, nodes=(3,), edges=(4,)).leaves()
    out = run(model, sample)["tensor"]
    (gradient,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), sample.pos)
    assert gradient.norm() > 1e-3
    # The loss does not change when all nodes move together.
    assert gradient.sum(dim=0).norm() < 1e-10 * gradient.norm()


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_position_gradients_along_axes(axis, sign):
    """Against central differences, node by node and coordinate by coordinate, with all edges along one axis."""
    model = small(num_layers=1, fiber_hidden={0: 4, 1: 4, 2: 4})
    sample = random_sample({0: 3}, nodes=(3,), edges=(0,))
    sample.src, sample.dst = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    sample.num_edges = torch.tensor([3])
    sample.pos = torch.zeros(3, 3, dtype=torch.float64)
    sample.pos[:, axis] = sign * torch.tensor([0.0, 0.8, 2.1], dtype=torch.float64)

    def loss(pos):
        outputs = run(model, replace(sample, pos=pos)).values()
        return sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in outputs)

    pos = sample.pos.clone().requires_grad_()
    (analytic,) = torch.autograd.grad(loss(pos), pos)
    with torch.no_grad():
        steps = 1e-6 * torch.eye(9, dtype=torch.float64).view(9, 3, 3)
        numeric = torch.stack([(loss(pos + step) - loss(pos - step)) / 2e-6 for step in steps]).view(3, 3)
    assert_same(analytic, numeric, 1e-7)


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"tensor_cores": True}], ids=str)
def test_every_parameter_gets_a_gradient(options):
    """Known fault elsewhere: in low-memory mode the first layer's keys and values get none."""
    model, sample = small(**options), random_sample({0: 3}, nodes=(6,), edges=(20,))
    out = run(model, sample)  # inputs that ask for no gradient
    sum((x * torch.randn_like(x)).sum() for x in out.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.norm() == 0]
    assert not without


def test_splitting_keys_and_values():
    """Known fault elsewhere: {0: 8} to {0: 16, 1: 32} has 16 key and value channels in every degree, by chance."""
    model = small({0: 8}, {0: 16, 1: 32}, {0: 2, 1: 2}, num_heads=4, tensor_cores=True)
    sample = random_sample({0: 8}, nodes=(4,), edges=(8,))
    assert_same(run(model, sample), slow(model, model.state_dict(), sample))


def test_edge_features_of_a_degree_that_nodes_lack():
    """Known fault elsewhere: silently ignored. Here the first layer reads them as well."""
    model, sample = small({0: 3}, fiber_edge={1: 2}), random_sample({0: 3}, {1: 2})
    outputs, grads = gradients(lambda s: run(model, s), sample, model.named_parameters())
    state = {name: p.detach().clone().requires_grad_() for name, p in model.state_dict().items()}
    expected, expected_grads = gradients(lambda s: slow(model, state, s), sample, state)
    assert_same(outputs, expected)
    assert_same(grads, expected_grads)
    assert grads["edge_feats/1"].norm() > 1e-3


def test_edge_features_of_a_higher_degree_than_all_fibers():
    model, sample = small({0: 3}, fiber_edge={3: 1}), random_sample({0: 3}, {3: 1})
    _, grads = gradients(lambda s: run(model, s), sample)
    assert grads["edge_feats/3"].norm() > 1e-3


def test_batches_with_empty_graphs():
    """A graph of the batch without edges, next to ones with; and a batch without any edge."""
    model = small(return_type=0, pooling="avg")
    sample = random_sample({0: 3}, nodes=(3, 2, 4), edges=(5, 0, 7))
    assert_same(run(model, sample)["tensor"], torch.cat([run(model, sample.single(b))["tensor"] for b in range(3)]))
    sample = random_sample({0: 3}, nodes=(3, 2), edges=(0, 0))
    assert run(model, sample)["tensor"].shape == (2, 2)


# ----------------------------------------------------------------------------------------------------------------- DGL


def test_dgl_graph_equals_own_graph():
    dgl = pytest.importorskip("dgl", reason="DGL is not installed")
    model, sample = small(return_type=0, pooling="max"), random_sample({0: 3}, nodes=(4, 3), edges=(6, 5))
    expected = run(model, sample)["tensor"]
    graphs = []
    for b in range(2):
        single = sample.single(b)
        graph = dgl.graph((single.src, single.dst), num_nodes=len(single.pos))
        graph.edata["rel_pos"] = single.rel_pos
        graphs.append(graph)
    batch = dgl.batch(graphs)
    assert_same(model(batch, sample.node_feats), expected, 1e-14)
    own = Graph.from_dgl(batch)
    assert (own.num_nodes, own.num_edges, own.num_graphs) == (7, 11, 2)
    assert_same(model(own, sample.node_feats), expected, 1e-14)
    there_and_back = Graph.from_dgl(own.to_dgl())
    for name in ("src", "dst", "rel_pos", "batch_num_nodes", "batch_num_edges"):
        assert torch.equal(getattr(there_and_back, name), getattr(own, name)), name
    int32 = batch.int()
    assert_same(model(int32, sample.node_feats), expected, 1e-14)


def test_dgl_layers():
    """Layers take a DGL graph as well as the model does."""
    pytest.importorskip("dgl", reason="DGL is not installed")
    model, sample = small(), random_sample({0: 3})
    edge_feats = reference.with_distance({}, sample.rel_pos)
    basis = get_basis(sample.rel_pos, max_degree=1)
    expected, features = sample.node_feats, sample.node_feats
    for module in model.graph_modules:
        features = module(features, edge_feats, graph=sample.graph.to_dgl(), basis=basis)
        expected = module(expected, edge_feats, graph=sample.graph, basis=basis)
        assert_same(features, expected, 1e-14)


def test_graph_defaults():
    src, dst = torch.tensor([0, 3]), torch.tensor([2, 0])
    graph = Graph(src, dst)
    assert (graph.num_nodes, graph.num_edges, graph.num_graphs) == (4, 2, 1)
    assert Graph(src, dst, num_nodes=6).num_nodes == 6
    assert Graph(src, dst, batch_num_nodes=torch.tensor([2, 3])).num_nodes == 5
    assert graph.to("cpu").num_nodes == 4


def test_batch_of_graphs():
    """The graphs of a batch, batches among them, one after the other; results are those of each graph."""
    model = small(return_type=0, pooling="max")
    samples = [random_sample({0: 3}, nodes=(n,), edges=(e,), seed=n) for n, e in ((4, 6), (3, 0), (5, 9))]
    graphs = [sample.graph for sample in samples]
    batch = Graph.batch([Graph.batch(graphs[:2]), graphs[2]])
    assert (batch.num_nodes, batch.num_edges, batch.num_graphs) == (12, 15, 3)
    assert batch.batch_num_edges.tolist() == [6, 0, 9]
    found = model(batch, {"0": torch.cat([sample.node_feats["0"] for sample in samples])})
    assert_same(found, torch.cat([model(sample.graph, sample.node_feats) for sample in samples]), 1e-14)
    for wrong in ([], [graphs[0], replace(graphs[1], rel_pos=None)]):
        with pytest.raises(ValueError, match="all with rel_pos or all without"):
            Graph.batch(wrong)


def test_state_of_one_dtype_loads_into_another():
    model, sample = small(), random_sample({0: 3}, dtype=torch.float32)
    single = small().float()
    single.load_state_dict(model.state_dict())
    assert_same(run(single, sample), run(model, sample.to(torch.float64)), TOLERANCE[torch.float32])


def test_random_features_have_the_fiber():
    assert Fiber.from_features(random_features({0: 3, 2: 1}, 4)) == Fiber({0: 3, 2: 1})


def test_basis_may_be_used_again():
    """A basis that was first used without gradients gives the gradients of one that was not, and is not changed."""
    model = SE3Transformer(1, Fiber({0: 3}), Fiber.create(3, 4), Fiber({0: 2}), 2, 2, return_type=0).double()
    sample = random_sample({0: 3})

    def gradient(use_before: bool):
        positions = sample.pos.detach().clone().requires_grad_()
        relative_pos = positions[sample.dst] - positions[sample.src]
        graph = Graph(sample.src, sample.dst, relative_pos, num_nodes=len(positions))
        basis = get_basis(relative_pos, max_degree=2)
        entries = set(basis)
        if use_before:
            with torch.no_grad():
                model(graph, sample.node_feats, basis=basis)
        model(graph, sample.node_feats, basis=basis).square().sum().backward()
        assert set(basis) == entries
        return positions.grad

    assert_same(gradient(use_before=True), gradient(use_before=False), 1e-14)
