"""predict_qm9.py from the command line: tables, plots, and what is refused."""

import csv
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from qm9_molecules import SMALL, many_molecules, one_by_one, save, small_molecules
from scripts import PATIENCE, ROOT, Done, run, start
from test_molecules import small_mols, write_sdf, write_xyz

from dataloader.qm9 import QM9Dataset, split_molecules
from experiments.qm9 import NETWORK_SETTINGS, build_network
from se3_transformer.model import Graph
from se3_transformer.runtime.checkpoint import save_checkpoint

NETWORK = dict(zip(NETWORK_SETTINGS, (1, 2, 4, 2, 2, "max", True, True, True, False)))
INFO = {
    "task": "homo",
    "data": "another set",
    "mean": -6.0,
    "std": 0.5,
    "max_degree": 1,
    "graph": "bonds",
    "radius": None,
    "split_seed": 3,
}
HEADER = ["name", "smiles", "predicted homo [meV]"]

pytestmark = pytest.mark.filterwarnings("ignore:the geometries of SMILES")


@pytest.fixture(autouse=True)
def same_format_of_warnings(monkeypatch):
    """The script sets its own."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


def write_checkpoint(path: Path, change=lambda network: None, **info) -> torch.nn.Module:
    """A checkpoint as train_qm9.py writes it, of a network that was never trained."""
    network = build_network(NETWORK).eval()
    change(network)
    save_checkpoint(path, {"network": NETWORK, "info": INFO | info, "model": network.state_dict()})
    return network


@pytest.fixture
def work(tmp_path) -> Path:
    """A directory with a checkpoint and files of molecules."""
    write_checkpoint(tmp_path / "best.pt")
    write_sdf(tmp_path / "small.sdf", small_mols())
    write_xyz(tmp_path / "small.xyz", small_mols())
    (tmp_path / "atom.xyz").write_text("1\noxygen\nO 0 0 0\n")
    (tmp_path / "flat.sdf").write_text(
        write_sdf(tmp_path / "flat.sdf", small_mols()[-1:]).read_text().replace("3D", "2D")
    )
    (tmp_path / "bad.smi").write_text("C methane\nC[Si]C silicon\n[NH4+] ammonium\n")
    return tmp_path


def predict(work: Path, *flags: str) -> Done:
    return run("predict_qm9.py", "--checkpoint", "best.pt", *flags, cwd=work)


def table(work: Path, name: str = "predictions.csv") -> tuple[list[str], list[list[str]]]:
    with (work / name).open(newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows


@torch.no_grad()
def one_prediction(network, molecule, radius: float | None) -> float:
    """Slowly: meV, on edges that a double loop finds; radius None: bonds."""
    bonds = {(s, d): kind for s, d, kind in zip(molecule.src, molecule.dst, molecule.edge_attr)}
    atoms = range(int(molecule.n_node[0]))
    pairs = [(i, j) for i in atoms for j in atoms if i != j]
    distances = {(i, j): np.linalg.norm(molecule.node_pos[i] - molecule.node_pos[j]) for i, j in pairs}
    edges = list(bonds) if radius is None else [pair for pair in pairs if distances[pair] < radius]
    src, dst = torch.tensor(edges).T.long()
    positions = torch.from_numpy(molecule.node_pos)
    kinds = torch.tensor(np.array([bonds.get(edge, np.zeros(4)) for edge in edges]), dtype=torch.float32)
    graph = Graph(src, dst, positions[dst] - positions[src], num_nodes=len(positions))
    nodes = torch.from_numpy(molecule.node_attr[:, :6])
    value = network(graph, {"0": nodes[:, :, None]}, {"0": kinds[:, :, None]}).item()
    return 1000 * (INFO["mean"] + INFO["std"] * value)


@pytest.mark.parametrize(("graph", "radius"), [("bonds", None), ("radius", 2.0), ("complete", np.inf)])
def test_predictions_are_those_of_the_network(work, graph, radius):
    info = {"graph": graph, "radius": radius if graph == "radius" else None}
    network = write_checkpoint(work / "best.pt", **info)
    expected = [one_prediction(network, molecule, radius) for molecule in one_by_one(small_molecules())]
    for file in ("small.sdf", "small.xyz"):
        done = predict(work, "--molecules", file, "--batch_size", "3")
        assert done.returncode == 0, done.stderr
        header, rows = table(work)
        assert header == HEADER and [row[0] for row in rows] == list(SMALL) and rows[-1][1] == "c1ccccc1"
        np.testing.assert_allclose([float(row[2]) for row in rows], expected, atol=0.5)
    assert np.std(expected) > 5, "the molecules can hardly be told apart"
    assert "8 molecules, homo (energy of the highest occupied orbital): predictions.csv\n" in done.stdout


def test_true_values_of_an_sdf(work):
    mols = small_mols()
    mols[0].SetProp("homo", "-10.55")
    mols[2].SetProp("homo", "-7.25")
    write_sdf(work / "true.sdf", mols)
    done = predict(work, "--molecules", "true.sdf", "--output", "true.csv")
    assert done.returncode == 0, done.stderr
    header, rows = table(work, "true.csv")
    assert header == [*HEADER, "true homo [meV]", "error homo [meV]"]
    assert [row[3] for row in rows] == ["-10550.0000", "", "-7250.0000", *[""] * 5]
    errors = [float(row[4]) for row in rows if row[4]]
    assert errors == pytest.approx([float(rows[i][2]) - float(rows[i][3]) for i in (0, 2)], abs=1e-3)
    mae = np.mean(np.abs(errors))
    assert f"mean absolute error {mae:.4g} meV of 2 molecules (without the network: 2900 meV)" in done.stdout
    assert (work / "true.png").read_bytes().startswith(b"\x89PNG") and "true.csv, true.png" in done.stdout


def test_smiles_with_a_warning(work):
    script = str(ROOT / "predict_qm9.py")
    (work / "predictions.png").write_bytes(b"of other molecules")
    process = start(script, "--checkpoint", "best.pt", "--smiles", "CCO c1ccccc1", "--threads", "1", cwd=work)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert stderr.startswith("warning: the geometries of SMILES are guessed with a force field")
    header, rows = table(work)
    assert header == HEADER and [row[:2] for row in rows] == [["CCO", "CCO"], ["c1ccccc1", "c1ccccc1"]]
    assert not (work / "predictions.png").exists(), "a plot of other molecules was left beside the table"


def write_cache(work: Path, *flags: str):
    save(work / "molecules.npz", many_molecules(40))
    done = run("preprocess_qm9.py", "--source", "molecules.npz", *flags, cwd=work)
    assert done.returncode == 0, done.stderr


def test_a_split_of_the_cache(work):
    write_cache(work)
    write_checkpoint(work / "best.pt", data=QM9Dataset.open(work / "data/cache/qm9").identity)
    done = predict(work, "--split", "test")
    assert done.returncode == 0, done.stderr
    header, rows = table(work)
    assert header == ["name", HEADER[2], "true homo [meV]", "error homo [meV]"]
    true = many_molecules(40).targets[:, 2]
    test = split_molecules(true, INFO["split_seed"])["test"].tolist()
    assert [row[0] for row in rows] == [f"qm9 {i}" for i in test]
    np.testing.assert_allclose([float(row[2]) for row in rows], 1000 * true[test], atol=1e-4)
    mae, baseline = (np.abs(e).mean() for e in ([float(row[3]) for row in rows], 1000 * (true[test] + 6)))
    assert f"error {mae:.4g} meV of {len(test)} molecules (without the network: {baseline:.4g} meV)" in done.stdout
    assert (work / "predictions.png").exists()


def test_bad_molecules_are_left_out_on_demand(work):
    done = predict(work, "--molecules", "bad.smi", "--skip_bad", "true")
    assert done.returncode == 0, done.stderr
    assert "left out: 2 of 3 molecules cannot be used:\n  silicon: expected the elements" in done.stderr
    assert [row[0] for row in table(work)[1]] == ["methane"]


def with_nan(network):
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)


FAULTS = {
    "nothing": ((), "expected one of --molecules, --smiles and --split, got none"),
    "two": (("--smiles", "C", "--split", "test"), "expected one of .*, got --smiles and --split"),
    "no checkpoint": (("--smiles", "C", "--checkpoint", "none.pt"), "none.pt"),
    "damaged": (("--smiles", "C", "--checkpoint", "cut.pt"), "cut.pt: not a readable checkpoint"),
    "foreign": (("--smiles", "C", "--checkpoint", "foreign.pt"), "foreign.pt: expected a checkpoint of train_qm9.py"),
    "not finite": (("--smiles", "C", "--checkpoint", "nan.pt"), "expected finite predictions, .* is nan.pt damaged"),
    "no file": (("--molecules", "none.sdf"), "none.sdf"),
    "ending": (("--molecules", "small.pdb"), "molecules must be a file with one of the endings .sdf, .xyz, .smi"),
    "bad molecules": (
        ("--molecules", "bad.smi"),
        "2 of 3 molecules cannot be used:\n  silicon: .* got Si\n  ammonium: .*\nCorrect .* with --skip_bad true",
    ),
    "one atom": (("--molecules", "atom.xyz"), "atom.xyz: .* got none: \n  oxygen: expected at least two atoms"),
    "2D": (("--molecules", "flat.sdf"), "benzene: expected 3D coordinates, got a 2D drawing"),
    "bad SMILES": (("--smiles", "C1C"), "SMILES: expected molecules that can be used, got none: .*unclosed ring"),
    "no cache": (("--split", "test"), "manifest.json: expected the manifest .* python preprocess_qm9.py --name qm9"),
    "split": (("--split", "tests"), "split must be one of train, val, test, got 'tests'"),
    "directory": (("--smiles", "C", "--output", "none/a.csv"), "output must be a file .csv in a directory that exists"),
    "table": (("--smiles", "C", "--output", "a.txt"), "output must be a file .csv .*, got 'a.txt'"),
    "batch": (("--smiles", "C", "--batch_size", "0"), "batch_size must be at least 1, got 0"),
    "device": (("--smiles", "C", "--device", "gpu"), "device: expected auto, cpu, cuda or cuda:NUMBER, got 'gpu'"),
    "flag": (("--smile", "C"), "unknown argument --smile; did you mean --smiles"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_leave_nothing_behind(work, fault):
    flags, message = FAULTS[fault]
    (work / "cut.pt").write_bytes((work / "best.pt").read_bytes()[:-200])
    save_checkpoint(work / "foreign.pt", {"network": {}, "model": {}})
    write_checkpoint(work / "nan.pt", with_nan)
    before = sorted(work.rglob("*"))
    done = predict(work, *flags)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    with pytest.raises(ValueError, match=f"(?s)error: .*{message}"):
        raise ValueError(done.stderr)
    assert sorted(work.rglob("*")) == before


def test_a_cache_of_other_molecules_is_refused(work):
    write_cache(work)
    done = predict(work, "--split", "test")
    assert done.returncode != 0 and "was trained on other molecules or other graphs" in done.stderr


def test_a_cache_of_other_graphs_is_refused(work):
    write_cache(work, "--graph", "complete")
    done = predict(work, "--split", "test")
    assert done.returncode != 0 and "expected graph = 'bonds', got 'complete'" in done.stderr
    assert "python preprocess_qm9.py --name qm9 --data_dir data --graph bonds" in done.stderr


def test_without_rdkit(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    done = predict(work, "--molecules", "small.sdf")
    assert done.returncode != 0 and "error: RDKit is needed to read molecules: pip install rdkit" in done.stderr
