"""Whatever comes as a graph: DGL, PyG, tensors, and graphs made from positions."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_equivariant, assert_same, random_rotation, random_sample, refused
from scripts import PATIENCE, ROOT

from se3_transformer.model import Fiber, Graph, SE3Transformer
from se3_transformer.model.graph import as_graph
from se3_transformer.model.neighbors import fully_connected, knn, radius

# ---------------------------------------------------------------------------------------------------------- conversion


@pytest.fixture
def sample():
    return random_sample({0: 3}, nodes=(4, 3), edges=(6, 5))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SE3Transformer(
        1, Fiber({0: 3}), Fiber({0: 4, 1: 4}), Fiber({1: 2}), 2, 2, return_type=1, pooling="avg"
    ).double()


def pyg_attributes(sample, **others):
    """What a PyG `Batch` has."""
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sample.num_nodes.cumsum(0)])
    graphs = torch.repeat_interleave(sample.num_nodes)
    return dict(edge_index=torch.stack([sample.src, sample.dst]), pos=sample.pos, ptr=starts, batch=graphs) | others


def to_dgl(sample):
    pytest.importorskip("dgl", reason="DGL is not installed")
    return sample.graph.to_dgl()


def to_pyg_batch(sample):
    data = pytest.importorskip("torch_geometric.data", reason="PyG is not installed")
    singles = [sample.single(b) for b in range(len(sample.num_nodes))]
    return data.Batch.from_data_list(
        [data.Data(edge_index=torch.stack([single.src, single.dst]), pos=single.pos) for single in singles]
    )


DOORS = {
    "dgl": to_dgl,
    "dgl int32": lambda sample: to_dgl(sample).int(),
    "PyG batch": to_pyg_batch,
    "like PyG": lambda sample: SimpleNamespace(**pyg_attributes(sample)),
    "like PyG without ptr": lambda sample: SimpleNamespace(**pyg_attributes(sample, ptr=None)),
    "like PyG with rel_pos": lambda sample: SimpleNamespace(
        **pyg_attributes(sample, pos=None, rel_pos=sample.rel_pos, num_nodes=7)
    ),
    "tensors": lambda sample: Graph.from_positions(sample.pos, sample.src, sample.dst, sample.num_nodes),
    "int32 tensors": lambda sample: Graph.from_positions(sample.pos, sample.src.int(), sample.dst.int(), [4, 3]),
}


@pytest.mark.parametrize("door", DOORS)
def test_the_model_takes_it(model, sample, door):
    graph = DOORS[door](sample)
    assert_same(model(graph, sample.node_feats), model(sample.graph, sample.node_feats), 1e-14)


def test_single_pyg_graph(model, sample):
    data = pytest.importorskip("torch_geometric.data", reason="PyG is not installed")
    sample = sample.single(0)
    graph = data.Data(edge_index=torch.stack([sample.src, sample.dst]), pos=sample.pos)
    assert_same(model(graph, sample.node_feats), model(sample.graph, sample.node_feats), 1e-14)


def test_gradients_reach_the_positions_of_a_pyg_graph(model, sample):
    positions = sample.pos.clone().requires_grad_()
    model(SimpleNamespace(**pyg_attributes(sample, pos=positions)), sample.node_feats).square().sum().backward()
    assert positions.grad.norm() > 1e-3


def test_to_dgl_and_back(sample):
    back = Graph.from_dgl(to_dgl(sample))
    for name in ("src", "dst", "rel_pos", "batch_num_nodes", "batch_num_edges"):
        assert torch.equal(getattr(back, name), getattr(sample.graph, name)), name
    with refused("batch_num_edges"):
        Graph.from_positions(sample.pos, sample.src, sample.dst, sample.num_nodes).to_dgl()


def test_neither_dgl_nor_pyg_is_imported():
    code = """
import sys
from types import SimpleNamespace
import torch
from se3_transformer.model import neighbors
from se3_transformer.model.graph import as_graph
as_graph(SimpleNamespace(edge_index=torch.tensor([[0], [1]]), pos=torch.randn(2, 3)))
assert not {"dgl", "torch_geometric", "vesin", "scipy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=PATIENCE)


# -------------------------------------------------------------------------------------------------------------- errors


def test_not_a_graph():
    with refused("DGLGraph", "PyG", "from_positions", "ndarray", error=TypeError):
        as_graph(torch.zeros(2, 5).numpy())


@pytest.mark.parametrize(
    "edges", [torch.zeros(5, 2, dtype=torch.int64), torch.tensor([0, 1]), None, [[0], [1]]], ids=str
)
def test_edge_index_of_wrong_shape(edges):
    with refused("edge_index", r"\(2, E\)", r"\(5, 2\)|\(2,\)|NoneType|list"):
        as_graph(SimpleNamespace(edge_index=edges, pos=torch.randn(5, 3)))


def test_pyg_without_positions(model, sample):
    with refused("rel_pos"):
        model(SimpleNamespace(**pyg_attributes(sample, pos=None, num_nodes=7)), sample.node_feats)


def test_nodes_of_graphs_that_are_mixed(sample):
    with refused("batch", "sorted"):
        as_graph(SimpleNamespace(**pyg_attributes(sample, ptr=None, batch=torch.tensor([0, 1, 0, 1, 0, 1, 0]))))


@pytest.mark.parametrize("positions", [torch.zeros(7, 2), torch.zeros(21), torch.zeros(7, 3, dtype=torch.int64)])
def test_positions_of_wrong_shape_or_dtype(sample, positions):
    came = rf"{positions.dtype} {tuple(positions.shape)}".replace("(", r"\(").replace(")", r"\)")
    with refused("positions", r"\(N, 3\)", came):
        Graph.from_positions(positions, sample.src, sample.dst)
    with refused("positions", r"\(N, 3\)", came):
        knn(positions, 2)


def test_positions_that_are_no_tensor(sample):
    with refused("positions", "tensor", "ndarray", "as_tensor", error=TypeError):
        knn(sample.pos.numpy(), 2)


def test_float_indices(sample):
    with refused("Graph.src", "integer", "float64"):
        Graph.from_positions(sample.pos, sample.src.double(), sample.dst)
    with refused("Graph.dst", "integer", "float32"):
        Graph(sample.src, sample.dst.float())
    with refused("Graph.src", "integer", "float32"):
        as_graph(SimpleNamespace(**pyg_attributes(sample, edge_index=torch.zeros(2, 5))))
    with refused("batch_num_nodes", "integer", "float64"):
        Graph.from_positions(sample.pos, sample.src, sample.dst, sample.num_nodes.double())
    with refused("Graph.src", "tensor", "list", error=TypeError):
        Graph([0, 1], [1, 0])


def test_ids_of_nodes_that_are_not_there(sample):
    with refused("Graph.dst", "7 nodes", "to 7"):
        Graph.from_positions(sample.pos, sample.src, sample.dst + 7 - sample.dst.max())


def test_number_of_nodes(model, sample):
    with refused("batch_num_nodes", "8", "7"):
        Graph.from_positions(sample.pos, sample.src, sample.dst, [4, 4])
    with refused("batch_num_nodes", "-1"):
        Graph.from_positions(sample.pos, sample.src, sample.dst, [8, -1])
    with refused("node feature", r"\(7, 3, 1\)", r"\(6, 3, 1\)"):
        model(sample.graph, {"0": sample.node_feats["0"][:6]})


def test_graph_and_features_on_different_devices(model, sample):
    """The device 'meta' stands for a GPU."""
    elsewhere = sample.node_feats["0"].to("meta")
    with refused("node feature", "expected on cpu", "meta"):
        model(sample.graph, {"0": elsewhere})
    graph = Graph(sample.src.to("meta"), sample.dst.to("meta"), sample.rel_pos.to("meta"), num_nodes=7)
    with refused("rel_pos", "expected on cpu", "meta"):
        model(graph, sample.node_feats)
    with refused("Graph.dst", "cpu", "meta"):
        Graph(sample.src, sample.dst.to("meta"), num_nodes=7)
    with refused("Graph.rel_pos", "cpu", "meta"):
        Graph(sample.src, sample.dst, sample.rel_pos.to("meta"))
    with refused("Graph.src", "meta", "cpu"):
        Graph.from_positions(sample.pos.to("meta"), sample.src, sample.dst)


# ------------------------------------------------------------------------------------------------------------ builders

SIZES = {"one cloud": None, "list": [5, 1, 8], "tensor": torch.tensor([6, 0, 8])}


def slow_edges(positions, sizes, joined):
    """{(src, dst)} of points of the same cloud for which joined(distances from the others, which other) says so."""
    edges, start = set(), 0
    for size in [len(positions)] if sizes is None else map(int, sizes):
        for dst in range(start, start + size):
            others = [src for src in range(start, start + size) if src != dst]
            distances = [(positions[src] - positions[dst]).norm().item() for src in others]
            edges |= {(src, dst) for src, distance in zip(others, distances) if joined(distance, sorted(distances))}
        start += size
    return edges


BUILDERS = {
    "fully_connected": (fully_connected, lambda distance, all_distances: True),
    "radius": (lambda pos, sizes: radius(pos, 1.5, sizes), lambda distance, all_distances: distance <= 1.5),
    "knn": (lambda pos, sizes: knn(pos, 3, sizes), lambda distance, all_distances: distance in all_distances[:3]),
}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_builders(name, sizes, dtype):
    """The edges of a double loop, cloud after cloud, with relative positions that carry gradients."""
    build, joined = BUILDERS[name]
    positions = torch.randn(14, 3, dtype=dtype, requires_grad=True)
    graph = build(positions, sizes)
    edges = list(zip(graph.src.tolist(), graph.dst.tolist()))
    assert len(edges) == len(set(edges)) > 0 and set(edges) == slow_edges(positions.detach(), sizes, joined)
    assert_same(graph.rel_pos, positions[graph.dst] - positions[graph.src], 1e-15)
    graph.rel_pos.square().sum().backward()
    assert positions.grad.norm() > 0 and graph.rel_pos.dtype == dtype
    assert graph.batch_num_nodes.tolist() == ([14] if sizes is None else list(map(int, sizes)))
    cloud_of_edge = graph.graph_of_node()[graph.dst]
    assert cloud_of_edge.tolist() == torch.repeat_interleave(graph.batch_num_edges).tolist()


@pytest.mark.parametrize("name", BUILDERS)
def test_builders_go_with_rotations(model, name, sample):
    build, _ = BUILDERS[name]
    assert_equivariant(
        lambda s: {"1": model(build(s.pos, s.num_nodes), s.node_feats)}, sample, random_rotation(), torch.randn(3)
    )


def test_nearest_among_coincident_points():
    graph = knn(torch.zeros(6, 3), k=2)
    assert graph.dst.bincount().tolist() == [2] * 6 and (graph.src != graph.dst).all()


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("points", [0, 1])
def test_no_or_one_point(name, points):
    graph = BUILDERS[name][0](torch.zeros(points, 3), None)
    assert (graph.num_nodes, graph.num_edges, graph.rel_pos.shape) == (points, 0, (0, 3))


def test_radius_in_periodic_cells():
    """Against a double loop over 7³ images, each cloud in a skewed cell of its own; gradients reach the cells."""
    pytest.importorskip("vesin", reason="vesin is not installed")
    positions, sizes, cutoff = 2 * torch.rand(5, 3, dtype=torch.float64), [2, 3], 1.9
    cells = torch.tensor([1.7, 2.3], dtype=torch.float64)[:, None, None] * torch.eye(3, dtype=torch.float64)
    cells = (cells + 0.3 * torch.randn(2, 3, 3, dtype=torch.float64)).requires_grad_()
    graph = radius(positions, cutoff, sizes, cells)
    steps = torch.cartesian_prod(*[torch.arange(-3.0, 4.0, dtype=torch.float64)] * 3)
    expected = []
    for cloud, nodes in enumerate([range(2), range(2, 5)]):
        for dst in nodes:
            for src in nodes:
                vectors = positions[dst] - positions[src] + steps @ cells.detach()[cloud]
                near = vectors.norm(dim=1)
                expected += [(src, dst, *v.tolist()) for v in vectors[(near <= cutoff) & (near > 0)]]
    found = [(s, d, *v) for s, d, v in zip(graph.src.tolist(), graph.dst.tolist(), graph.rel_pos.tolist())]
    assert len(found) == len(expected) > 20
    assert_same(torch.tensor(sorted(found, key=rounded)), torch.tensor(sorted(expected, key=rounded)), 1e-6)
    assert any(s == d for s, d, *_ in found), "no point sees its own image: the test is too easy"
    graph.rel_pos.square().sum().backward()
    assert cells.grad.norm() > 0


def rounded(row):
    return tuple(round(number, 6) for number in row)


def test_periodic_energy_does_not_depend_on_the_cell_that_a_point_is_written_in(model):
    pytest.importorskip("vesin", reason="vesin is not installed")
    positions, cells = torch.rand(4, 3, dtype=torch.float64), 1.5 * torch.eye(3, dtype=torch.float64)[None]
    features = {"0": torch.randn(4, 3, 1, dtype=torch.float64)}
    moved = positions + torch.randint(-2, 3, (4, 3)).double() @ cells[0]
    expected = model(radius(positions, 1.4, cells=cells), features)
    assert_same(model(radius(moved, 1.4, cells=cells), features), expected)


def test_cells_without_vesin(monkeypatch):
    monkeypatch.setitem(sys.modules, "vesin", None)
    with refused("vesin", "pip install", error=ImportError):
        radius(torch.randn(4, 3), 1.0, cells=torch.eye(3)[None])


def test_builders_refuse():
    positions = torch.randn(5, 3)
    for cutoff in (0, -1.0, float("nan")):
        with refused("cutoff", "positive", str(cutoff)):
            radius(positions, cutoff)
    with refused("k must be", "0"):
        knn(positions, 0)
    for sizes in ([2, 2], [6, -1]):
        with refused("sizes", "5 points", str(sizes[1])):
            fully_connected(positions, sizes)
    with refused("sizes", "float32"):
        fully_connected(positions, [2.0, 3.0])
    with refused("cells", r"\(1, 3, 3\)", r"\(3, 3\)"):
        radius(positions, 1.0, cells=torch.eye(3))
    with refused("cell of cloud 1", "volume"):
        radius(positions, 1.0, [2, 3], torch.stack([torch.eye(3), torch.zeros(3, 3)]))
    positions[2, 1] = float("nan")
    with refused("positions", "NaN"):
        fully_connected(positions)
