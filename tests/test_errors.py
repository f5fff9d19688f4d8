"""What does not fit is refused with a message that says which feature, what was expected and what came."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import random_sample, refused

from se3_transformer.model import Fiber, Graph, SE3Transformer, SE3TransformerPooled
from se3_transformer.model.basis import get_basis
from se3_transformer.model.layers import AttentionBlockSE3, ConvSE3, GPooling, LinearSE3

FIBER_IN, FIBER_EDGE = {0: 3, 1: 2}, {0: 2, 1: 1}


def build(**options):
    settings = dict(
        fiber_in=Fiber(FIBER_IN),
        fiber_hidden=Fiber({0: 4, 1: 4}),
        fiber_out=Fiber({0: 2, 1: 2}),
        fiber_edge=Fiber(FIBER_EDGE),
        num_layers=1,
        num_heads=2,
        channels_div=2,
    )
    return SE3Transformer(**{**settings, **options})


def build_pooled(fiber_out, **options):
    layers = dict(num_layers=1, num_heads=2, channels_div=2)
    sizes = dict(num_degrees=2, num_channels=4, output_dim=1)
    return SE3TransformerPooled(Fiber({0: 3}), Fiber(fiber_out), Fiber({}), **sizes, **layers, **options)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def sample():
    return random_sample(FIBER_IN, FIBER_EDGE, nodes=(4, 3), edges=(6, 5), dtype=torch.float32)


def test_what_fits_is_accepted(model, sample):
    model(sample.graph, sample.node_feats, sample.edge_feats)
    by_number = [{int(l): x for l, x in features.items()} for features in (sample.node_feats, sample.edge_feats)]
    model(sample.graph, *by_number)  # degrees as numbers


# ------------------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize("degree", ["0", "1"])
@pytest.mark.parametrize("kind, rows", [("node", 7), ("edge", 11)])
class TestFeatures:
    @pytest.fixture
    def call(self, model, sample, kind, degree):
        """Calls the model with the tensor of one degree replaced, or taken away."""

        def call(tensor):
            features = dict(sample.node_feats if kind == "node" else sample.edge_feats)
            features.pop(degree)
            if tensor is not None:
                features[degree] = tensor
            others = (features, sample.edge_feats) if kind == "node" else (sample.node_feats, features)
            return model(sample.graph, *others)

        return call

    @pytest.fixture
    def channels(self, kind, degree):
        return (FIBER_IN if kind == "node" else FIBER_EDGE)[int(degree)]

    def test_missing(self, call, kind, rows, degree, channels):
        with refused(f"{kind} feature", f"degree {degree}", "missing"):
            call(None)

    @pytest.mark.parametrize("wrong", ["rows", "one row too many", "channels", "orders", "flat", "transposed", "none"])
    def test_shape(self, call, kind, rows, degree, channels, wrong):
        shape = (rows, channels, 2 * int(degree) + 1)
        came = {
            "rows": (rows - 1, *shape[1:]),
            "one row too many": (rows + 1, *shape[1:]),
            "channels": (rows, channels + 1, shape[2]),
            "orders": (*shape[:2], shape[2] + 2),
            "flat": (rows, channels * shape[2]),
            "transposed": shape[::-1],
            "none": (0, *shape[1:]),
        }[wrong]
        with refused(f"{kind} feature", f"degree {degree}", re.escape(str(shape)), re.escape(str(came))):
            call(torch.zeros(came))

    @pytest.mark.parametrize("wrong", [torch.float64, torch.int64, torch.bool, torch.float16, torch.complex64])
    def test_dtype(self, call, kind, rows, degree, channels, wrong):
        with refused(f"{kind} feature", f"degree {degree}", str(wrong)):
            call(torch.zeros(rows, channels, 2 * int(degree) + 1, dtype=wrong))

    def test_device(self, call, kind, rows, degree, channels):
        with refused(f"{kind} feature", f"degree {degree}", "cpu", "meta"):
            call(torch.zeros(rows, channels, 2 * int(degree) + 1, device="meta"))

    def test_not_a_tensor(self, call, kind, rows, degree, channels):
        with refused(f"{kind} feature", f"degree {degree}", "[Tt]ensor", "ndarray", error=(TypeError, ValueError)):
            call(torch.zeros(rows, channels, 2 * int(degree) + 1).numpy())


@pytest.mark.parametrize("kind", ["node", "edge"])
def test_degree_that_the_fiber_lacks(model, sample, kind):
    features = {"node": dict(sample.node_feats), "edge": dict(sample.edge_feats)}
    features[kind]["2"] = torch.zeros(7 if kind == "node" else 11, 1, 5)
    with refused(f"{kind} feature", "degree 2", r"0: [32], 1: [21]"):
        model(sample.graph, features["node"], features["edge"])


def test_edge_features_missing_altogether(model, sample):
    with refused("edge feature", "degree 0", "missing"):
        model(sample.graph, sample.node_feats)


def test_edge_features_that_were_not_announced(sample):
    with refused("edge feature", "degree 0"):
        build(fiber_edge=Fiber({}))(sample.graph, sample.node_feats, {"0": sample.edge_feats["0"]})


def test_parameters_of_another_dtype(model, sample):
    with refused("float32", "float64"):
        double = sample.to(torch.float64)
        model(double.graph, double.node_feats, double.edge_feats)


def test_parameters_on_another_device(model, sample):
    with refused("cpu", "meta"):
        moved = sample.map(lambda x: x.to("meta"))
        graph = Graph(sample.src.to("meta"), sample.dst.to("meta"), torch.zeros(11, 3, device="meta"), num_nodes=7)
        model(graph, moved.node_feats, moved.edge_feats)


# --------------------------------------------------------------------------------------------------- graph, positions


@pytest.mark.parametrize("with_basis", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_positions_that_are_not_finite(model, sample, value, with_basis):
    basis = get_basis(sample.rel_pos, max_degree=1) if with_basis else None
    sample.pos[2, 1] = value
    with refused("rel_pos|position", "NaN|infinity|finite"):
        model(sample.graph, sample.node_feats, sample.edge_feats, basis)


def test_not_finite_position_names_the_edge(sample):
    rel_pos = sample.rel_pos
    rel_pos[5, 2] = float("nan")
    with refused("rel_pos", "1 of 11", r"edge 5\b"):
        get_basis(rel_pos)


@pytest.mark.parametrize("rel_pos", [torch.zeros(11, 2), torch.zeros(11, 1, 3), torch.zeros(11), torch.zeros(11, 4)])
def test_shape_of_rel_pos(model, sample, rel_pos):
    with refused("rel_pos", "3", re.escape(str(tuple(rel_pos.shape)))):
        model(replace_rel_pos(sample, rel_pos), sample.node_feats, sample.edge_feats)


def replace_rel_pos(sample, rel_pos):
    return Graph(
        sample.src, sample.dst, rel_pos, num_nodes=7, batch_num_nodes=sample.num_nodes, batch_num_edges=sample.num_edges
    )


def test_rows_of_rel_pos(sample):
    with refused("rel_pos", "11", "10"):
        replace_rel_pos(sample, torch.zeros(10, 3))


def test_dtype_of_rel_pos(model, sample):
    with refused("rel_pos", "int64"):
        model(replace_rel_pos(sample, torch.zeros(11, 3, dtype=torch.int64)), sample.node_feats, sample.edge_feats)


def test_no_rel_pos(model, sample):
    with refused("rel_pos"):
        model(replace_rel_pos(sample, None), sample.node_feats, sample.edge_feats)


def test_no_rel_pos_in_a_dgl_graph(model, sample):
    pytest.importorskip("dgl", reason="DGL is not installed")
    graph = sample.graph.to_dgl()
    del graph.edata["rel_pos"]
    with refused("rel_pos"):
        model(graph, sample.node_feats, sample.edge_feats)


@pytest.mark.parametrize("graph", [None, "graph", (torch.tensor([0]), torch.tensor([1])), {"src": 0}], ids=str)
def test_not_a_graph(model, sample, graph):
    with refused("graph", type(graph).__name__, error=TypeError):
        model(graph, sample.node_feats, sample.edge_feats)


def test_ends_of_edges_must_be_indices():
    two, floats = torch.tensor([0, 1]), torch.tensor([0.0, 1.0])
    with refused("src", "float32"):
        Graph(floats, two)
    with refused("dst", "float32"):
        Graph(two, floats)
    with refused("src", r"\(1, 2\)"):
        Graph(two[None], two)
    with refused("src", "dst", "2", "3"):
        Graph(two, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("src, dst", [([0, 7], [1, 2]), ([0, 1], [1, 7]), ([-1, 0], [1, 2]), ([1, 0], [1, -2])])
def test_edges_to_nodes_that_are_not_there(src, dst):
    with refused("src|dst", "7|-1|-2", "4"):
        Graph(torch.tensor(src), torch.tensor(dst), num_nodes=4)


def test_sizes_of_graphs_must_add_up():
    src = dst = torch.tensor([0, 1, 2])
    with refused("batch_num_nodes", "5", "6"):
        Graph(src, dst, num_nodes=6, batch_num_nodes=torch.tensor([2, 3]))
    with refused("batch_num_edges", "3", "4"):
        Graph(src, dst, num_nodes=5, batch_num_nodes=torch.tensor([2, 3]), batch_num_edges=torch.tensor([2, 2]))
    with refused("batch_num_edges", "batch_num_nodes", "2", "1"):
        Graph(src, dst, num_nodes=5, batch_num_nodes=torch.tensor([2, 3]), batch_num_edges=torch.tensor([3]))


# --------------------------------------------------------------------------------------------------------------- basis


def test_basis_of_too_low_degree(model, sample):
    with refused("basis", "degree 1"):
        model(sample.graph, sample.node_feats, sample.edge_feats, get_basis(sample.rel_pos, max_degree=0))


def test_basis_of_another_graph(model, sample):
    with refused("basis", "11", "10"):
        model(sample.graph, sample.node_feats, sample.edge_feats, get_basis(sample.rel_pos[:10], max_degree=1))


def test_dense_basis_of_another_package(model, sample):
    dense = {
        "0,1": torch.zeros(11, 1, 1, 3),
        "out0_fused": torch.zeros(11, 4, 2, 1),
        "in0_fused": torch.zeros(11, 1, 2, 4),
    }
    with refused("basis", "dense", "get_basis", "'0,1'"):
        model(sample.graph, sample.node_feats, sample.edge_feats, dense)


def test_basis_of_another_dtype(model, sample):
    with refused("basis", "float32", "float64"):
        model(sample.graph, sample.node_feats, sample.edge_feats, get_basis(sample.rel_pos.double(), max_degree=1))


# -------------------------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize("hidden, heads, div", [({0: 4, 1: 4}, 3, 1), ({0: 4, 1: 4}, 4, 2), ({0: 8, 1: 4}, 4, 2)])
def test_channels_that_heads_do_not_divide(hidden, heads, div):
    with refused("channels", "heads", rf"\b{heads}\b", "degree"):
        build(fiber_hidden=Fiber(hidden), num_heads=heads, channels_div=div)


@pytest.mark.parametrize("hidden", [{0: 4, 1: 4}, {0: 16, 1: 4}])
def test_channels_that_are_divided_away(hidden):
    with refused("channels", "channels_div|8"):
        build(fiber_hidden=Fiber(hidden), channels_div=8)


@pytest.mark.parametrize(
    "name, value", [("num_heads", 0), ("num_heads", -2), ("channels_div", 0), ("channels_div", -1), ("num_layers", -1)]
)
def test_numbers_that_make_no_sense(name, value):
    with refused(name, str(value)):
        build(**{name: value})


@pytest.mark.parametrize("name", ["fiber_in", "fiber_hidden", "fiber_out"])
def test_empty_fiber(name):
    with refused(r"Fiber\(\{\}\)|" + name):
        build(**{name: Fiber({})})


def test_return_type_that_is_not_there():
    with refused("return_type", "2", r"\[0, 1\]"):
        build(return_type=2)


def test_pooling():
    with refused("pooling", "median", "max", "avg", "sum"):
        build(return_type=0, pooling="median")
    with refused("max", "degree 1", "equivariant"):
        build(return_type=1, pooling="max")
    with refused("degree 0|return_type 0|return_type"):
        build(fiber_out=Fiber({1: 2}), pooling="avg")
    with refused("max", "degree 2"):
        GPooling(2, "max")


@pytest.mark.parametrize("fiber_out", [{1: 4}, {0: 4, 1: 2}])
def test_pooled_model_pools_scalars(fiber_out):
    with refused("degree 0|return_type|fiber_out"):
        build_pooled(fiber_out)


@pytest.mark.parametrize(
    "build",
    [
        lambda **kwargs: build(**kwargs),
        lambda **kwargs: build_pooled({0: 4}, **kwargs),
    ],
    ids=["SE3Transformer", "SE3TransformerPooled"],
)
def test_misspelt_argument(build):
    with refused("low_memroy", error=TypeError):
        build(low_memroy=True)


def test_containers(model):
    """A tensor in place of a dict of them, a dict in place of a fiber."""
    sample = random_sample(FIBER_IN, FIBER_EDGE)
    with refused("node features: expected a dict", "got Tensor", error=TypeError):
        model.double()(sample.graph, sample.node_feats["0"], sample.edge_feats)
    with refused("fiber_hidden: expected a Fiber", "got dict", error=TypeError):
        build(fiber_hidden={0: 4})


def test_attention_without_a_common_degree():
    with refused(r"0: 3", r"1: 4"):
        AttentionBlockSE3(Fiber({0: 3}), Fiber({1: 4}))


def test_layers_without_degrees():
    with refused(r"Fiber\(\{\}\)"):
        ConvSE3(Fiber({}), Fiber({0: 2}))
    with refused(r"Fiber\(\{\}\)"):
        ConvSE3(Fiber({0: 2}), Fiber({}))
    with refused(r"0: 3", r"1: 4", "common"):
        LinearSE3(Fiber({0: 3}), Fiber({1: 4}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_convolution_alone(dtype):
    """What the model would have looked at: edge scalars without the distance, or too many; a foreign basis."""
    conv = ConvSE3(Fiber({0: 3}), Fiber({0: 2, 1: 2}), Fiber({0: 2}), max_degree=1).to(dtype)
    sample = random_sample({0: 3}, dtype=dtype)
    basis = get_basis(sample.rel_pos, 1)
    for channels in (2, 40):
        with refused("degree 0", r"\(12, 3, 1\)", rf"got \(12, {channels}, 1\)"):
            scalars = torch.zeros(len(sample.rel_pos), channels, 1, dtype=dtype)
            conv(sample.node_feats, {"0": scalars}, sample.graph, basis)
    with refused("basis", r"\[0, 1\]", "0,0", error=ValueError):
        edges = {"0": torch.zeros(len(sample.rel_pos), 3, 1, dtype=dtype)}
        conv(sample.node_feats, edges, sample.graph, {"0,0": basis["0"], "fully_fused": basis["1"]})


@pytest.mark.parametrize(
    "structure, parts",
    [
        ({-1: 2}, ("degree", "-1")),
        ({0: -2}, ("channels", "-2", "degree 0")),
        ({0.5: 2}, ("degree", "0.5")),
        ({0: 2.5}, ("channels", "2.5")),
        ([(0, 2), (0, 3)], ("degree 0", "twice")),
        ({"0": 2, 0: 3}, ("degree 0", "twice")),
        ([(0, 2, 1)], ("pairs", r"\(0, 2, 1\)")),
        ([16, 3], ("pairs", "16")),
    ],
)
def test_fiber(structure, parts):
    with refused(*parts):
        Fiber(structure)
