"""The checkpoints in pretrained/ load, are equivariant, and have the errors that their card says."""

import pickle
import re
from dataclasses import replace

import pytest
import torch
from helpers import assert_same, random_rotation
from qm9_molecules import many_molecules
from scripts import ROOT, run

from dataloader.nbody_simulator import simulate
from dataloader.qm9 import QM9Dataset, graph_arrays
from dataloader.qm9_layout import cache_settings
from experiments import nbody, qm9
from se3_transformer.runtime.checkpoint import CheckpointError, load_checkpoint

PRETRAINED = ROOT / "pretrained"
CARD = (PRETRAINED / "README.md").read_text()
TEST_SIMULATIONS = {"readme": 1000, "paper": 1000, "egnn": 2000}  # by preset


def test_card_lists_every_checkpoint():
    """All are small, and hold nothing but what predicting and telling where they come from need."""
    files = sorted(PRETRAINED.glob("*.pt"))
    assert [path.name for path in files] == sorted(re.findall(r"^\| \[`(\w+\.pt)`\]", CARD, re.MULTILINE))
    for path in files:
        assert path.stat().st_size < 5e6
        needed = {"network", "model", "settings", "epoch", "validation"}
        assert load_checkpoint(path).keys() - {"info"} == needed


def test_code_of_the_card_runs(monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", CARD, re.DOTALL)
    monkeypatch.chdir(ROOT)
    variables = {}
    exec(block, variables)
    assert isinstance(variables["network"], torch.nn.Module) and variables["info"]["task"] == "homo"


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """A cache for each preset with the test simulations that preprocess_nbody.py makes; without walls once for two."""
    directory = tmp_path_factory.mktemp("nbody")
    walls, free = (simulate(number, box_size=box, seed=[0, 2]) for number, box in ((1000, 5.0), (2000, 0.0)))
    (directory / "data").mkdir()
    for preset, name in (("readme", "nbody"), ("paper", "nbody_paper"), ("egnn", "nbody_egnn")):
        for split, number in (("train", 1), ("val", 1), ("test", TEST_SIMULATIONS[preset])):
            some = {
                key: value[:number] if key in ("points", "vel", "charges", "edges", "clamp") else value
                for key, value in (walls if preset == "readme" else free).items()
            }
            (directory / f"data/{name}_{split}.pkl").write_bytes(pickle.dumps(some))
        done = run("preprocess_nbody.py", "--preset", preset, cwd=directory)
        assert done.returncode == 0, done.stderr
    return directory


def evaluate(directory, preset, path):
    return run("train_nbody.py", "--preset", preset, "--evaluate", str(path), "--threads", "1", cwd=directory)


@pytest.mark.parametrize("preset", TEST_SIMULATIONS)
def test_nbody_errors_are_those_of_the_card(simulated, preset):
    done = evaluate(simulated, preset, PRETRAINED / f"nbody_{preset}.pt")
    assert done.returncode == 0, done.stderr
    (row,) = re.findall(rf"^\| \[`nbody_{preset}\.pt`\].*$", CARD, re.MULTILINE)
    in_card = [list(map(float, re.findall(r"\d\.\d{5}", cell))) for cell in row.split("|")[4:6]]
    printed = {line[:20].strip(): list(map(float, line[20:].split())) for line in done.stdout.splitlines()[3:6]}
    assert printed["SE(3)-Transformer"] == pytest.approx(in_card[0], rel=2e-3)
    assert printed["constant velocity"] == pytest.approx(in_card[1], rel=2e-3)
    (equivariance_error,) = re.findall(r"^equivariance error (\S+)", done.stdout, re.MULTILINE)
    assert float(equivariance_error) < 1e-5
    assert not list(simulated.glob("data/*.pt")), "evaluating trains nothing"


@pytest.mark.parametrize(
    "preset, name, message",
    [
        ("readme", "nbody_paper", "trained with --preset paper --box_size 0.0, got --preset readme --box_size 5.0"),
        ("paper", "nbody_egnn", "trained with --preset egnn, got --preset paper"),
        ("paper", "qm9_homo_tiny", "expected a checkpoint of train_nbody.py, got one with network, info"),
        ("paper", "nbody_missing", "no such checkpoint"),
    ],
)
def test_wrong_checkpoints_are_refused(simulated, preset, name, message):
    done = evaluate(simulated, preset, PRETRAINED / f"{name}.pt")
    assert done.returncode == 1 and message in done.stderr


def test_qm9_network_predicts_the_same_of_turned_molecules():
    """Without symmetry, which makes vectors zero: the norm gives those the length and direction of rounding errors."""
    network, info = qm9.load_network(PRETRAINED / "qm9_homo_tiny.pt")
    molecules = many_molecules(24)
    turned = replace(molecules, node_pos=(molecules.node_pos @ random_rotation().numpy().T).astype("float32"))
    predicted, graph = [], (info["graph"], info["radius"])
    for sample in (molecules, turned):
        dataset = QM9Dataset(graph_arrays(sample, *graph), cache_settings(*graph))
        predicted.append(qm9.predict(network, info, dataset, torch.arange(len(dataset))))
    assert predicted[0].std() > 0.1, "eV"
    assert_same(predicted[1], predicted[0], 1e-5)


def test_checkpoint_whose_weights_do_not_fit(tmp_path):
    content = load_checkpoint(PRETRAINED / "nbody_readme.pt")
    content["network"]["num_channels"] = 16
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(CheckpointError, match="weights that do not fit the settings beside them"):
        nbody.load_network(tmp_path / "wrong.pt")
