"""QM9 data: the layout, the graphs, batches, splits, and preprocess_qm9.py with its cache."""

import json
import os
import signal
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from qm9_molecules import MOLECULES, SMALL, concatenate, many_molecules, one_by_one, save, small_molecules
from scripts import KILL_AT, ROOT

import preprocess_qm9
from dataloader.cache import CacheError, open_cache
from dataloader.qm9 import QM9Dataset, graph_arrays, length_balanced_batches, rounded_up, split_molecules
from dataloader.qm9_layout import GRAPHS, TARGETS, cache_settings, check_molecules, load_molecules, offsets
from se3_transformer.model import Fiber, SE3Transformer
from se3_transformer.model.basis import edge_frames, get_basis

SHARED = Path(os.environ.get("SE3_SHARED", ROOT.parent / "shared")) / "qm9" / "qm9_edge.npz"
RADIUS = 2.0  # Å: between bonded and opposite atoms of the small molecules


# ------------------------------------------------------------------------------------------------------------- layout


def test_targets_are_those_of_dgl():
    qm9 = pytest.importorskip("dgl.data", reason="DGL is not installed").QM9EdgeDataset
    assert list(TARGETS) == qm9.keys
    assert [name for name, target in TARGETS.items() if target.name != name] == []


def test_units():
    energies = "homo lumo gap zpve U0 U H G U0_atom U_atom H_atom G_atom".split()
    for name, target in TARGETS.items():
        expected = ("eV", "meV", 1000.0) if name in energies else (target.unit, target.unit, 1.0)
        assert (target.unit, target.shown_unit, target.factor) == expected, name
    others = [target.unit for name, target in TARGETS.items() if name not in energies]
    assert others == ["D", "bohr³", "bohr²", "cal/(mol K)", "GHz", "GHz", "GHz"]


def test_files_come_back(tmp_path):
    molecules = small_molecules(*MOLECULES)
    molecules.targets[3, 2] = np.nan
    save(tmp_path / "file.npz", molecules, gdb_id=np.arange(len(molecules)))
    loaded = load_molecules(tmp_path / "file.npz")
    assert len(loaded) == len(MOLECULES)
    for name, array in vars(molecules).items():
        np.testing.assert_array_equal(getattr(loaded, name), array, err_msg=name)


def changed(name, where, value):
    """Small molecules, one entry of an array changed."""
    array = getattr(small_molecules(), name).copy()
    array[where] = value
    return {name: array}


FILES = {  # what is wrong: arrays in place of those of methane (atoms 0 … 4, edges 0 … 7), ammonia (5 …, 8 …), …
    "missing array": ({"src": None, "targets": None}, "expected the arrays n_node, .*, got none named src, targets"),
    "objects": ({"n_node": np.array([{}], dtype=object)}, "n_node: expected an array of numbers, got .* damaged"),
    "text": ({"node_pos": np.array(["a"])}, "node_pos: expected floating point numbers, got <U1"),
    "whole positions": ({"node_pos": np.zeros((3, 3), int)}, "node_pos: expected floating point numbers, got int64"),
    "fractional sizes": ({"n_node": np.ones(8)}, "n_node: expected integers, got float64"),
    "text features": ({"node_attr": np.array(["a"])}, "node_attr: expected numbers, got <U1"),
    "other axes": ({"node_pos": np.zeros((3, 40))}, r"node_pos: expected shape \(40, 3\), got \(3, 40\)"),
    "few targets": ({"targets": np.zeros((8, 12))}, r"targets: expected shape \(8, 19\), got \(8, 12\)"),
    "flat features": ({"node_attr": np.zeros(396)}, r"node_attr: expected shape \(ΣN, 11\), got \(396,\)"),
    "more src": ({"src": np.zeros(9, int)}, r"src: expected shape \(66\), got \(9,\)"),
    "negative size": (changed("n_edge", 2, -2), "molecule 2: expected n_edge of at least 0, got -2"),
    "no atoms": (changed("n_node", 1, 0), "molecule 1: expected n_node of at least 1, got 0"),
    "sum of nodes": (changed("n_node", 1, 5), "expected ΣN = 40 as sum of n_node, got 41"),
    "sum of edges": (changed("n_edge", 1, 5), "expected ΣE = 66 as sum of n_edge, got 65"),
    "no such atom": (changed("dst", 9, 4), r"molecule 1, edge 1: expected src and dst in 0 … n_node - 1, got \[0, 4\]"),
    "negative atom": (changed("src", 9, -1), r"molecule 1, edge 1: expected src and dst in .*, got \[-1, 2\]"),
    "loop": (changed("dst", 8, 0), r"molecule 1, edge 0: expected a bond between two atoms, got \[0, 0\]"),
    "twice": (changed("dst", 9, 1), r"molecule 1, edge 1: expected edges sorted by src, then dst, each once, got"),
    "one way": (changed("dst", 4, 2), r"molecule 0, edge 0: expected the opposite edge as well, got \[0, 1\]"),
    "no bond type": (changed("edge_attr", (10, 0), 0), r"molecule 1, edge 2: expected edge_attr one-hot .*, got \[0"),
    "half a bond": (changed("edge_attr", (0, 0), 0.5), r"molecule 0, edge 0: expected edge_attr one-hot"),
    "two types": (changed("edge_attr", 8, [0, 1, 0, 0]), r"molecule 1, edge 0: expected the same edge_attr as the opp"),
    "nan": (changed("node_pos", (6, 1), np.nan), r"molecule 1, atom 1: expected finite coordinates in node_pos, below"),
    "coincident": (changed("node_pos", 7, small_molecules().node_pos[6]), "molecule 1, atom 2: expected a place of"),
    "no coordinates": ({"node_pos": np.zeros((40, 3))}, "molecule 0, atom 1: expected a place of its own in node_pos"),
    "chlorine": (changed("node_attr", (9, 5), 17), r"molecule 2, atom 0: expected .* one-hot .*, got \[.*17.0\]"),
    "two elements": (changed("node_attr", (9, 0), 1), "molecule 2, atom 0: expected node_attr with one-hot H C N O F"),
    "half hydrogens": (changed("node_attr", (9, 10), 0.5), "molecule 2, atom 0: expected node_attr in whole numbers"),
    "nan feature": (changed("node_attr", (9, 6), np.nan), "molecule 2, atom 0: expected node_attr in whole numbers"),
    "infinite": (changed("targets", (4, 0), np.inf), "molecule 4: expected targets that are numbers below"),
    "nothing": ({name: array[:0] for name, array in vars(small_molecules()).items()}, "expected at least one molecule"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FILES)
def test_wrong_files_are_refused(tmp_path, fault):
    changes, message = FILES[fault]
    save(tmp_path / "file.npz", small_molecules(), **changes)
    with pytest.raises(ValueError, match=rf"file\.npz: {message}"):
        load_molecules(tmp_path / "file.npz")


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda path: os.truncate(path, path.stat().st_size // 2), "expected an .npz file, got another or a truncated one"),
    (lambda path: path.write_bytes(b""), "expected an .npz file"),
    (lambda path: np.save(path.open("wb"), np.zeros(3)), "expected an .npz file"),
    (lambda path: flip_bit(path, path.read_bytes().index(b"node_attr.npy") + 50), "node_attr: .* a damaged one"),
    (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "text"), "expected the arrays"),
])  # fmt: skip
def test_damaged_files_are_refused(tmp_path, damage, message):
    path = tmp_path / "file.npz"
    save(path, small_molecules())
    damage(path)
    with pytest.raises(ValueError, match=rf"file\.npz: {message}"):
        load_molecules(path)


@pytest.mark.skipif(not SHARED.is_file(), reason=f"{SHARED} is not there (set SE3_SHARED)")
def test_the_real_file():
    molecules = load_molecules(SHARED)
    known = dict(zip(TARGETS, (~np.isnan(molecules.targets)).sum(0).tolist()))
    assert (len(molecules), known["homo"], known["lumo"], known["U0"]) == (118_756, 118_756, 110_865, 95_837)
    homo = molecules.targets[:, list(TARGETS).index("homo")]
    assert -6.6 < homo.mean() < -6.4, "not in eV"
    parts = split_molecules(homo)
    assert {split: len(part) for split, part in parts.items()} == {"train": 90_771, "val": 16_339, "test": 11_646}


# ------------------------------------------------------------------------------------------------------------- graphs


def slow_edges(molecule, graph):
    """(src, dst, bond one-hot) of each edge of one molecule, by a double loop."""
    bonds = {(i, j): row for i, j, row in zip(molecule.src.tolist(), molecule.dst.tolist(), molecule.edge_attr)}
    edges = []
    for i in range(molecule.n_node[0]):
        for j in range(molecule.n_node[0]):
            near = np.linalg.norm(molecule.node_pos[i] - molecule.node_pos[j]) < RADIUS
            if i != j and {"bonds": (i, j) in bonds, "radius": near, "complete": True}[graph]:
                edges.append((i, j, bonds.get((i, j), np.zeros(4, np.float32))))
    return edges


@pytest.fixture(scope="module")
def molecules():
    """All kinds, also one atom and no bonds, with unknown targets."""
    made = concatenate([small_molecules(*MOLECULES), many_molecules(30), small_molecules("oxygen atom")])
    made.targets[5, 3] = np.nan
    return made


@pytest.fixture(scope="module", params=GRAPHS)
def graph(request):
    return request.param


@pytest.fixture(scope="module")
def dataset(molecules, graph):
    return QM9Dataset(graph_arrays(molecules, graph, RADIUS), cache_settings(graph, RADIUS))


def tensors(batch):
    """Every tensor of a batch by name."""
    return {
        "src": batch.graph.src,
        "dst": batch.graph.dst,
        "rel_pos": batch.graph.rel_pos,
        "batch_num_nodes": batch.graph.batch_num_nodes,
        "batch_num_edges": batch.graph.batch_num_edges,
        "node_feats": batch.node_feats["0"],
        "edge_feats": batch.edge_feats["0"],
        "rotations": batch.rotations,
        "targets": batch.targets,
    }


def test_batches_equal_the_slow_ones(molecules, graph, dataset, monkeypatch):
    alone = one_by_one(molecules)
    index = torch.randperm(len(molecules)).tolist() + [9, 9, 1]
    expected = {name: [] for name in ("src", "dst", "rel_pos", "edge_feats", "node_feats", "targets")}
    num_nodes, num_edges = [], []
    for molecule in (alone[i] for i in index):
        edges = slow_edges(molecule, graph)
        for i, j, bond in edges:
            expected["src"].append(i + sum(num_nodes))
            expected["dst"].append(j + sum(num_nodes))
            expected["rel_pos"].append(molecule.node_pos[j] - molecule.node_pos[i])
            expected["edge_feats"].append(bond[:, None])
        expected["node_feats"].extend(molecule.node_attr[:, :6, None])
        expected["targets"].append(molecule.targets[0])
        num_nodes.append(molecule.n_node[0])
        num_edges.append(len(edges))
    came = tensors(dataset.batch(torch.tensor(index)))
    for name, values in expected.items():
        np.testing.assert_array_equal(came[name].numpy(), np.array(values), err_msg=name)
    assert came["batch_num_nodes"].tolist() == num_nodes == dataset.num_nodes[index].tolist()
    assert came["batch_num_edges"].tolist() == num_edges == dataset.num_edges[index].tolist()
    assert min(num_edges) == 0 and (graph == "bonds") == (max(num_edges) == 24)
    types = {"src": torch.int64, "dst": torch.int64, "targets": torch.float64}
    for name in expected:
        assert came[name].dtype == types.get(name, torch.float32), name


def test_batch_equals_one_molecule_at_a_time(dataset):
    index = torch.randperm(len(dataset))
    batch = tensors(dataset.batch(index))
    alone = [tensors(dataset.batch(index[i : i + 1])) for i in range(len(index))]
    first = dict.fromkeys(("src", "dst"), offsets(dataset.num_nodes[index].numpy())[:-1])
    for name, came in batch.items():
        shifts = first.get(name, np.zeros(len(index), np.int64)).tolist()
        expected = torch.cat([part[name] + shift for part, shift in zip(alone, shifts)])
        np.testing.assert_array_equal(came.numpy(), expected.numpy(), err_msg=name)


def test_blocks_of_conversion_leave_no_trace(molecules, graph, dataset, monkeypatch):
    monkeypatch.setattr("dataloader.qm9.BLOCK", 3)
    for name, array in graph_arrays(molecules, graph, RADIUS).items():
        np.testing.assert_array_equal(array, dataset._arrays[name].numpy(), err_msg=name)


def test_cached_frames_are_those_computed_on_the_fly(dataset):
    for size in (1, 7, len(dataset)):
        batch = dataset.batch(torch.randperm(len(dataset))[:size])
        assert torch.equal(batch.rotations, edge_frames(batch.graph.rel_pos))
        basis, expected = batch.basis(3), get_basis(batch.graph.rel_pos, 3)
        assert basis.keys() == {"0", "1", "2", "3"}
        for degree, block in basis.items():
            assert torch.equal(block, expected[degree]), f"degree {degree}"


def test_basis_is_exact_under_autocast(dataset):
    batch = dataset.batch(torch.arange(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = batch.basis(3)
    torch.testing.assert_close(under_autocast, batch.basis(3), rtol=0, atol=0)


def test_batches_go_into_the_model(dataset):
    model = SE3Transformer(
        fiber_in=Fiber({0: 6}), fiber_hidden=Fiber.create(2, 4), fiber_out=Fiber({0: 4}), fiber_edge=Fiber({0: 4}),
        num_layers=1, num_heads=1, channels_div=2, return_type=0, pooling="avg",
    )  # fmt: skip
    with torch.no_grad():
        together, *alone = (
            model(batch.graph, batch.node_feats, batch.edge_feats, basis=batch.basis(1))
            for batch in map(dataset.batch, [torch.arange(8), *torch.arange(8).split(1)])
        )
    torch.testing.assert_close(together, torch.stack(alone).reshape(together.shape))
    assert len(together.unique(dim=0)) == 8, "the same for different molecules"


def test_padded_batches(dataset):
    """Few shapes, and one more molecule without influence on the others, whose atoms all have an edge."""
    model = SE3Transformer(
        fiber_in=Fiber({0: 6}), fiber_hidden=Fiber.create(2, 4), fiber_out=Fiber({0: 4}), fiber_edge=Fiber({0: 4}),
        num_layers=1, num_heads=1, channels_div=2, return_type=0, pooling="max",
    )  # fmt: skip

    def predictions(batch):
        return model(batch.graph, batch.node_feats, batch.edge_feats, basis=batch.basis(1))

    shapes = set()
    for size in (1, 2, 3, 12):
        batch = dataset.batch(torch.arange(size))
        padded = batch.padded()
        graph, number = padded.graph, batch.graph.num_nodes
        shapes.add((graph.num_nodes, graph.num_edges))
        assert graph.dst[batch.graph.num_edges :].unique().tolist() == [*range(number, graph.num_nodes)]
        assert padded.targets is batch.targets
        values = predictions(padded)
        torch.testing.assert_close(values[:-1], predictions(batch).reshape(size, -1))
        found = torch.autograd.grad(values[:-1].sum(), list(model.parameters()), allow_unused=True)
        expected = torch.autograd.grad(predictions(batch).sum(), list(model.parameters()), allow_unused=True)
        for gradient, other in zip(found, expected, strict=True):
            assert (gradient is None) == (other is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)
    assert len(shapes) < 4


def test_sizes_of_padded_batches():
    for number in (1, 31, 33, 1000, 4321, 77_777):
        larger = rounded_up(number)
        assert number <= larger <= max(number * 17 / 16, number + 31) and rounded_up(larger) == larger
    assert len({rounded_up(number) for number in range(8700, 9100)}) == 3


def test_dgl_gives_the_same_item(tmp_path, molecules, dataset, graph):
    pytest.importorskip("dgl", reason="DGL is not installed")
    from dgl.data import QM9EdgeDataset

    connected = small_molecules()
    save(tmp_path / "qm9_edge.npz", connected)
    item, label = QM9EdgeDataset(raw_dir=str(tmp_path), verbose=False)[6]
    ours = QM9Dataset(graph_arrays(connected, graph, RADIUS), {}).dgl_graph(6)
    assert ours.ndata.keys() == {"pos", "attr"} and ours.edata.keys() == {"edge_attr", "rel_pos"}
    assert ours.num_nodes() == item.num_nodes() == 5
    for name in item.ndata:
        assert torch.equal(ours.ndata[name], item.ndata[name]) and ours.ndata[name].dtype == torch.float32, name
    src, dst = ours.edges()
    assert torch.equal(ours.edata["rel_pos"], ours.ndata["pos"][dst] - ours.ndata["pos"][src])
    if graph == "bonds":
        assert all(torch.equal(*ends) for ends in zip(ours.edges(), item.edges()))
        assert torch.equal(ours.edata["edge_attr"], item.edata["edge_attr"])
    assert torch.equal(QM9Dataset(graph_arrays(connected), {}).targets[6].float(), label.flatten())
    atom = dataset.dgl_graph(list(MOLECULES).index("oxygen atom"))
    assert (atom.num_nodes(), atom.num_edges()) == (1, 0)


def test_large_molecules():
    """300 carbons in a row: their numbers do not fit in a byte."""
    carbon = small_molecules("two neon-like atoms")
    chain = replace(
        concatenate([carbon] * 150),
        n_node=np.array([300]),
        n_edge=np.array([0]),
        node_pos=np.linspace([0, 0, 0], [299, 0, 0], 300),
        targets=carbon.targets,
    )
    check_molecules(chain, "chain")
    batch = QM9Dataset(graph_arrays(chain, "radius", 1.5), {}).batch(torch.tensor([0, 0]))
    i = torch.arange(299)
    edges = torch.cat([torch.stack([i, i + 1]), torch.stack([i + 1, i])], dim=1)
    expected = torch.cat([edges, edges + 300], dim=1)
    assert set(map(tuple, expected.T.tolist())) == set(zip(batch.graph.src.tolist(), batch.graph.dst.tolist()))
    assert batch.graph.src.max() == 599


def test_unknown_graph():
    with pytest.raises(ValueError, match="graph must be one of bonds, radius, complete, got 'bond'"):
        graph_arrays(small_molecules(), "bond")


@pytest.mark.parametrize(("index", "error", "message"), [
    ([0, 41], IndexError, "molecules: expected 0 … 40, which the cache holds, got 0 … 41"),
    ([-1], IndexError, "molecules: expected 0 … 40"),
    ([[0]], ValueError, r"expected molecules \(B,\), got \(1, 1\)"),
])  # fmt: skip
def test_molecules_that_are_not_there(dataset, index, error, message):
    with pytest.raises(error, match=message):
        dataset.batch(torch.tensor(index))


def test_empty_batches(dataset):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(dataset.batch(torch.arange(0))).items()}
    assert shapes == {
        "src": (0,), "dst": (0,), "rel_pos": (0, 3), "batch_num_nodes": (0,), "batch_num_edges": (0,),
        "node_feats": (0, 6, 1), "edge_feats": (0, 4, 1), "rotations": (0, 3, 3), "targets": (0, 19),
    }  # fmt: skip


def test_batches_move_and_are_made_elsewhere(molecules, graph, dataset):
    """On the device "meta", which has no values: whatever asked a device for one would fail."""
    there = QM9Dataset(graph_arrays(molecules, graph, RADIUS), {}, device="meta")
    assert there.targets.device.type == there.num_edges.device.type == "cpu"
    here = tensors(dataset.batch(torch.arange(5)))
    for batch in (there.batch(torch.arange(5)), dataset.batch(torch.arange(5)).to("meta", non_blocking=True)):
        for name, tensor in tensors(batch).items():
            assert tensor.is_meta and tensor.shape == here[name].shape and tensor.dtype == here[name].dtype, name


def test_a_whole_batch_is_pinned(dataset, monkeypatch):
    """Page-locked memory needs a GPU; here only that every tensor gets there."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
    batch = dataset.batch(torch.arange(5)).pin_memory()
    assert all(tensor.is_meta for tensor in tensors(batch).values())


# ------------------------------------------------------------------------------------------------- splits, balancing


def test_split_of_all_of_qm9():
    parts = split_molecules(np.zeros(130_831))
    assert [len(parts[split]) for split in ("train", "val", "test")] == [100_000, 18_000, 12_831]
    assert torch.equal(torch.cat(list(parts.values())).sort()[0], torch.arange(130_831))
    assert 60_000 < parts["test"].double().mean() < 70_000, "not at random"
    more = split_molecules(np.zeros(133_885))
    assert {split: len(part) for split, part in more.items()} == {"train": 100_000, "val": 18_000, "test": 15_885}


def test_split_of_fewer_leaves_unknown_ones_out():
    targets = torch.linspace(0, 1, 1300, dtype=torch.float64)
    targets[::10] = torch.nan
    parts = split_molecules(targets)
    assert {split: len(part) for split, part in parts.items()} == {"train": 894, "val": 161, "test": 115}
    together = torch.cat(list(parts.values()))
    assert torch.equal(together.sort()[0], (~targets.isnan()).nonzero().flatten())
    again, other = split_molecules(targets), split_molecules(targets, seed=1)
    assert all(torch.equal(parts[split], again[split]) for split in parts)
    assert not torch.equal(parts["train"], other["train"])


def test_split_stays_as_it_is():
    """Results are compared across machines and years."""
    parts = split_molecules(np.zeros(10))
    assert {split: part.tolist() for split, part in parts.items()} == {
        "train": [2, 8, 4, 9, 1, 6, 7, 3],
        "val": [0],
        "test": [5],
    }


def test_split_needs_molecules():
    assert [len(part) for part in split_molecules(np.zeros(7)).values()] == [5, 1, 1]
    with pytest.raises(ValueError, match="expected at least 7 molecules whose label is known, got 6"):
        split_molecules(np.append(np.zeros(6), np.nan))


@pytest.mark.parametrize("batch_size", [1, 30, 240, 2000])
def test_balanced_batches(batch_size):
    num_edges = torch.randint(4, 57, (1003,))
    batches = length_balanced_batches(num_edges, batch_size, torch.Generator().manual_seed(1))
    assert len(batches) == -(-1003 // batch_size) and {len(batch) for batch in batches} <= {
        1003 // len(batches), 1003 // len(batches) + 1
    }  # fmt: skip
    assert torch.equal(torch.cat(batches).sort()[0], torch.arange(1003))
    edges = torch.stack([num_edges[batch].sum() for batch in batches]).double()
    random = torch.stack([num_edges[batch].sum() for batch in torch.randperm(1003).split(batch_size)[:-1] or batches])
    if batch_size in (30, 240):
        assert edges.max() - edges.min() <= 60 and edges.std() < 0.3 * random.double().std()
    again = length_balanced_batches(num_edges, batch_size, torch.Generator().manual_seed(1))
    other = length_balanced_batches(num_edges, batch_size, torch.Generator().manual_seed(2))
    assert all(map(torch.equal, batches, again))
    assert batch_size == 2000 or not all(map(torch.equal, batches, other))


# ------------------------------------------------------------------------------------------------------ preprocessing


def run(*flags):
    """preprocess_qm9.py as a user runs it."""
    command = [sys.executable, ROOT / "preprocess_qm9.py", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def preprocess(*flags):
    """preprocess_qm9.py in this process."""
    before = sys.argv
    sys.argv = ["preprocess_qm9.py", *map(str, flags)]
    try:
        preprocess_qm9.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source, a cache made of it, and what was printed."""
    directory = tmp_path_factory.mktemp("qm9")
    source = directory / "own.npz"
    molecules = many_molecules(20)
    molecules.targets[:5, 3] = np.nan
    molecules.targets[:, 4] = np.nan
    save(source, molecules)
    process = run("--source", source, "--data_dir", directory / "data")
    assert process.returncode == 0, process.stderr
    return source, directory / "data", process


@pytest.fixture
def own(made, tmp_path):
    """The same in a place where it may be damaged: the source, and a directory of data with the cache."""
    source, data_dir = tmp_path / "own.npz", tmp_path / "data"
    source.write_bytes(made[0].read_bytes())
    preprocess("--source", source, "--data_dir", data_dir)
    return source, data_dir


def test_the_script_says_what_it_did(made):
    source, data_dir, process = made
    assert f"Reading {source}" in process.stdout and f"Writing the cache {data_dir / 'cache' / 'qm9'}" in process.stdout
    assert process.stderr == "", "a progress bar without a terminal"
    rows = {line.split()[0]: line.split() for line in process.stdout.splitlines() if line}
    assert rows["homo"][1:3] == ["20", "yes"] and "meV" in rows["homo"]
    assert rows["lumo"][1:3] == ["15", "no"] and rows["gap"][1:] == ["0", "no"]
    homo = load_molecules(source).targets[:, 2]
    assert rows["homo"][3] == f"{1000 * homo.mean():,.2f}" and rows["homo"][5] == f"{1000 * homo.std():,.2f}"
    assert "20 molecules, 96 atoms, 156 edges (bonds)" in process.stdout


def test_the_cache_holds_the_molecules(made):
    source, data_dir, _ = made
    dataset = QM9Dataset.open(data_dir / "cache" / "qm9", {"graph": "bonds"})
    molecules = load_molecules(source)
    expected = QM9Dataset(graph_arrays(molecules), {})
    assert dataset.settings == cache_settings("bonds", 5.0)
    np.testing.assert_array_equal(dataset.targets.numpy(), molecules.targets)
    index = torch.randperm(20)
    for (name, came), other in zip(tensors(dataset.batch(index)).items(), tensors(expected.batch(index)).values()):
        np.testing.assert_array_equal(came.numpy(), other.numpy(), err_msg=name)


def contents(directory):
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def test_a_second_run_changes_nothing(made):
    source, data_dir, first = made
    before = contents(data_dir)
    code = "import sys, preprocess_qm9; preprocess_qm9.main(); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "--source", source, "--data_dir", data_dir]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 0, "torch is imported for nothing, or an error: " + process.stderr
    assert "Nothing has changed" in process.stdout and contents(data_dir) == before
    table = first.stdout[first.stdout.index("target") : first.stdout.index("Time")]
    assert table in process.stdout


def test_a_changed_source(own, capsys):
    source, data_dir = own
    cache = data_dir / "cache" / "qm9"
    os.utime(source)
    QM9Dataset.open(cache)
    save(source, many_molecules(21))
    with pytest.raises(
        CacheError, match=r"own\.npz, got a cache made from another one.*python preprocess_qm9.py --mine"
    ):
        QM9Dataset.open(cache, rebuild="python preprocess_qm9.py --mine")
    preprocess("--source", source, "--data_dir", data_dir)
    assert "because of" in capsys.readouterr().out
    assert len(QM9Dataset.open(cache)) == 21
    source.unlink()
    assert len(QM9Dataset.open(cache)) == 21, "the cache needs the file it was made from"


def test_another_source_of_the_same_content(own, tmp_path, capsys):
    """The cache must follow the place: else changing the first file would make it useless, and no command help."""
    source, data_dir = own
    elsewhere = source.rename(tmp_path / "elsewhere.npz")
    preprocess("--source", elsewhere, "--data_dir", data_dir)
    assert "Writing the cache" in capsys.readouterr().out
    save(source, many_molecules(3))
    assert len(QM9Dataset.open(data_dir / "cache" / "qm9")) == 20


def edit_manifest(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FAULTS = {
    "truncated array": (lambda d: os.truncate(d / "rotations.npy", 999), r"rotations\.npy: expected 5744 bytes, got"),
    "missing array": (lambda d: (d / "src.npy").unlink(), r"src\.npy: expected an array of .*, got no such file"),
    "flipped bit": (lambda d: flip_bit(d / "manifest.json", 700), r"manifest\.json: expected"),
    "other format": (lambda d: edit_manifest(d / "manifest.json", format=9), "expected format version 1, got 9"),
    "no cache": (lambda d: d.rename(d.with_name("other")), "expected the manifest of a cache, got no such file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_caches_are_refused_and_mended(own, fault):
    source, data_dir = own
    cache = data_dir / "cache" / "qm9"
    damage, message = FAULTS[fault]
    damage(cache)
    with pytest.raises(CacheError, match=message) as error:
        QM9Dataset.open(cache)
    assert str(error.value).endswith("Make the cache with: python preprocess_qm9.py")
    preprocess("--source", source, "--data_dir", data_dir)
    assert len(QM9Dataset.open(cache)) == 20


def test_a_damaged_array_is_mended(own, capsys):
    """Only preprocess_qm9.py reads every byte."""
    source, data_dir = own
    flip_bit(data_dir / "cache" / "qm9" / "rotations.npy", 500)
    preprocess("--source", source, "--data_dir", data_dir)
    assert "rotations.npy: expected the checksum" in capsys.readouterr().out
    open_cache(data_dir / "cache" / "qm9", "", verify=True)


def test_other_layouts_and_graphs_are_refused(own, monkeypatch, capsys):
    source, data_dir = own
    cache = data_dir / "cache" / "qm9"
    with pytest.raises(CacheError, match="expected graph = 'radius', got 'bonds'"):
        QM9Dataset.open(cache, cache_settings("radius", 5.0))
    preprocess("--source", source, "--data_dir", data_dir, "--graph", "radius", "--radius", "2")
    assert "expected graph = 'radius', got 'bonds'" in capsys.readouterr().out
    with pytest.raises(CacheError, match=r"expected radius = 5\.0, got 2\.0"):
        QM9Dataset.open(cache, cache_settings("radius", 5.0))
    dataset = QM9Dataset.open(cache, cache_settings("radius", 2.0))
    expected = QM9Dataset(graph_arrays(load_molecules(source), "radius", 2.0), {})
    assert torch.equal(dataset.num_edges, expected.num_edges)
    monkeypatch.setattr("dataloader.qm9.LAYOUT_VERSION", 99)
    with pytest.raises(CacheError, match="expected layout = 99, got 1"):
        QM9Dataset.open(cache)


PREPROCESS = """
import sys
import dataloader.qm9, preprocess_qm9
name, calls = sys.argv.pop(1), int(sys.argv.pop(1))
owner, attribute = {"frames": (dataloader.qm9, "edge_frames"), "rename": (preprocess_qm9.Path, "rename")}[name]
kill_at(owner, attribute, calls)
dataloader.qm9.BLOCK = 5
preprocess_qm9.main()
"""


@pytest.mark.parametrize(("name", "calls", "left"), [("frames", 3, "old"), ("rename", 2, "none")])
def test_killed_it_leaves_the_old_cache_or_none(own, name, calls, left):
    """In the midst of computing frames, and between the two renames of directories; see test_cache.py for the rest."""
    source, data_dir = own
    flags = ["--source", source, "--data_dir", data_dir, "--graph", "complete"]
    command = [sys.executable, "-c", KILL_AT + PREPROCESS, name, str(calls), *flags]
    process = subprocess.run(command, cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    cache = data_dir / "cache" / "qm9"
    if left == "old":
        open_cache(cache, "", {"graph": "bonds"}, verify=True)
    else:
        with pytest.raises(CacheError, match="got no such file"):
            QM9Dataset.open(cache)
    preprocess(*flags)
    open_cache(cache, "", {"graph": "complete"}, verify=True)
    assert [path.name for path in cache.parent.iterdir() if path.is_dir()] == ["qm9"], "leftovers"


def assert_three_ways_out(message):
    for way in ('pip install "dgl==1.1.3" packaging', "--source FILE", "--source DIRECTORY (pip install rdkit)"):
        assert way in message
    for name in ("qm9_edge.npz", "gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt"):
        assert name in message


@pytest.mark.parametrize(("source", "message"), [
    ("none.npz", "got no such file or directory"),
    ("raw", "got a directory without gdb9.sdf.csv, uncharacterized.txt"),
])  # fmt: skip
def test_missing_sources(tmp_path, source, message):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "gdb9.sdf").touch()
    process = run("--source", tmp_path / source, "--data_dir", tmp_path / "data")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert process.stderr.startswith(f"error: {tmp_path / source}: expected ") and message in process.stderr
    assert_three_ways_out(process.stderr)


def test_a_wrong_source_ends_the_script_without_a_traceback(tmp_path):
    (tmp_path / "gdb9.sdf").write_text("text")
    process = run("--source", tmp_path / "gdb9.sdf", "--data_dir", tmp_path / "data")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert process.stderr.startswith("error: ") and "gdb9.sdf: expected an .npz file" in process.stderr
    assert not (tmp_path / "data" / "cache" / "qm9").exists()


def test_without_dgl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dgl", None)
    monkeypatch.setitem(sys.modules, "dgl.data", None)
    with pytest.raises(FileNotFoundError, match="no QM9 in .*, and the download through DGL failed") as error:
        preprocess("--data_dir", tmp_path)
    assert_three_ways_out(str(error.value))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["cache"]


class Answer:
    """What `requests.get` returns, as far as it is used."""

    def __init__(self, *args, timeout, **kwargs):
        assert timeout <= 10

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def raise_for_status(self):
        pass


class NoAnswer(Answer):
    def raise_for_status(self):
        raise ConnectionError("no route to host")


@pytest.fixture
def server(made, monkeypatch):
    """DGL's download, from here: `server.bytes` of the file arrive, all by default; the first question is answered."""
    data = pytest.importorskip("dgl.data", reason="DGL is not installed")
    server = types.SimpleNamespace(bytes=None, downloads=0)

    def download(self):
        server.downloads += 1
        Path(self.npz_path).write_bytes(made[0].read_bytes()[: server.bytes])

    monkeypatch.setattr(data.QM9EdgeDataset, "download", download)
    monkeypatch.setattr("requests.get", Answer)
    return server


def test_download(server, tmp_path, capsys):
    preprocess("--data_dir", tmp_path)
    assert f"Reading {tmp_path / 'qm9_edge.npz'}" in capsys.readouterr().out
    preprocess("--data_dir", tmp_path)
    assert "Nothing has changed" in capsys.readouterr().out and server.downloads == 1
    assert len(QM9Dataset.open(tmp_path / "cache" / "qm9")) == 20
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {"qm9_edge.npz", "cache"}


def test_a_truncated_download_is_not_kept(server, tmp_path):
    server.bytes = 1000
    with pytest.raises(FileNotFoundError, match=r"download .* failed \(ValueError: .*truncated") as error:
        preprocess("--data_dir", tmp_path)
    assert_three_ways_out(str(error.value))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["cache"]


def test_what_a_killed_download_left_is_not_taken(server, tmp_path):
    directory = tmp_path / ".qm9_edge.npz.downloading"
    directory.mkdir()
    (directory / "qm9_edge.npz").write_bytes(b"PK")
    preprocess("--data_dir", tmp_path)
    assert server.downloads == 1 and not directory.exists()


def test_without_internet(server, tmp_path, monkeypatch):
    monkeypatch.setattr("requests.get", NoAnswer)
    with pytest.raises(FileNotFoundError, match="ConnectionError: no route to host") as error:
        preprocess("--data_dir", tmp_path)
    assert_three_ways_out(str(error.value))
    assert server.downloads == 0, "DGL tries for minutes"


@pytest.mark.parametrize("flags", [[], ["--source"]])
def test_raw_files(tmp_path, monkeypatch, capsys, flags):
    """Found in the directory of data or in another one, and handed to the reader of raw files."""
    asked = []
    reader = types.ModuleType("dataloader.molecules")
    reader.read_raw_qm9 = lambda directory, progress: asked.append(directory) or small_molecules()
    monkeypatch.setitem(sys.modules, "dataloader.molecules", reader)
    raw = tmp_path / "raw" if flags else tmp_path
    raw.mkdir(exist_ok=True)
    for name in ("gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt"):
        (raw / name).write_text(name)
    flags = [*flags, raw] if flags else []
    preprocess("--data_dir", tmp_path, *flags)
    assert asked == [raw] and len(QM9Dataset.open(tmp_path / "cache" / "qm9")) == len(SMALL)
    preprocess("--data_dir", tmp_path, *flags)
    assert len(asked) == 1 and "Nothing has changed" in capsys.readouterr().out
    (raw / "uncharacterized.txt").write_text("changed")
    with pytest.raises(CacheError, match=r"uncharacterized\.txt, got a cache made from another one"):
        QM9Dataset.open(tmp_path / "cache" / "qm9")


@pytest.mark.parametrize(("flags", "message"), [
    (["--sorce", "a"], "unknown argument --sorce; did you mean --source?"),
    (["--graph", "bond"], "graph must be one of bonds, radius, complete, got 'bond'"),
    (["--radius", "0"], "radius must be positive, got 0"),
    (["--radius", "nan"], "radius must be positive, got nan"),
    (["--name", "a/b"], "name must be a name for files, without directories, got 'a/b'"),
])  # fmt: skip
def test_wrong_flags_are_refused(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        preprocess("--data_dir", tmp_path, *flags)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_radius_that_leaves_no_edges():
    with pytest.raises(ValueError, match="radius: no two atoms are closer than 0.1 Å"):
        graph_arrays(small_molecules(), "radius", 0.1)
