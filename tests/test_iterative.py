"""The Iterative SE(3)-Transformer: through the battery, against blocks called by hand, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
from battery import varied
from helpers import TOLERANCE, assert_equivariant, assert_same, gradients, random_sample
from scripts import run
from test_transformer import ModelBattery

from examples.relaxation import Points
from se3_transformer.model import Fiber
from se3_transformer.model.iterative import IterativeSE3Transformer


def moves(path, pos):
    """(K, N, 3) positions -> {'1': (N, K, 3)} moves since the start, which turn with the points and do not shift."""
    return {"1": (path - pos).transpose(0, 1)}


class TestIterative(ModelBattery):
    """Its features of degree 1 come out beside the moves."""

    fiber_in, fiber_hidden, fiber_out, fiber_edge = {0: 2}, {0: 4, 1: 4}, {0: 1, 1: 1}, {0: 1}
    num_layers, num_iterations = 1, 2
    options = {"shared_weights": False}

    def build(self):
        return IterativeSE3Transformer(
            self.num_iterations,
            *self.fibers[:3],
            fiber_edge=self.fibers[3],
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            channels_div=self.channels_div,
            **self.options,
        )

    def call(self, module, sample):
        path, features = module(sample.graph, sample.pos, sample.node_feats, sample.edge_feats)
        moved = moves(path, sample.pos)["1"]
        return {**features, "1": torch.cat([features["1"], moved], dim=1)} if features else {"1": moved}

    def reference(self, state, sample):
        fiber_in, fiber_hidden, fiber_out, fiber_edge = self.fibers
        fibers = fiber_in + fiber_out, fiber_hidden, fiber_out + Fiber({1: 1}), fiber_edge
        layers = self.num_layers, self.num_heads, self.channels_div
        pos, path = sample.pos, []
        features = {str(l): pos.new_zeros(len(pos), c, 2 * l + 1) for l, c in fiber_out}
        for k in range(self.num_iterations):
            block = reference.sub(state, f"blocks.{0 if self.options['shared_weights'] else k}.")
            inputs = {
                str(l): torch.cat([x[str(l)] for x in (sample.node_feats, features) if str(l) in x], dim=1)
                for l in fibers[0].degrees
            }
            edges = sample.src, sample.dst, pos[sample.dst] - pos[sample.src]
            out = reference.transformer(block, fibers, layers, True, inputs, sample.edge_feats, edges)[-1]
            pos = pos + out["1"][:, -1]
            path.append(pos)
            features = {str(l): out[str(l)][:, :c] for l, c in fiber_out}
        moved = moves(torch.stack(path), sample.pos)["1"]
        return {**features, "1": torch.cat([features["1"], moved], dim=1)} if features else {"1": moved}


class TestIterativeSharedWeights(TestIterative):
    """One network, no features handed on."""

    fiber_in, fiber_out = {0: 2, 1: 1}, {}
    options = {"shared_weights": True}


def build(num_iterations=2, fiber_in=None, **options):
    torch.manual_seed(0)
    sizes = dict(num_layers=1, num_heads=1, channels_div=1)
    fiber_in, hidden = Fiber(fiber_in or {0: 1}), Fiber({0: 2, 1: 2})
    return varied(IterativeSE3Transformer(num_iterations, fiber_in, hidden, **sizes, **options)).double()


def path_of(model, sample):
    return model(sample.graph, sample.pos, sample.node_feats)[0]


def test_positions_shift_with_the_points():
    model, sample, shift = build(), random_sample({0: 1}), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert_same(path_of(model, sample.translated(shift)), path_of(model, sample) + shift)


def test_shared_weights_are_one_network():
    model = build(num_iterations=3, shared_weights=True)
    assert len(model.blocks) == 1
    sample = random_sample({0: 1})
    one = build(num_iterations=1)
    one.load_state_dict(model.state_dict())
    for stop in path_of(model, sample):
        (positions,) = path_of(one, sample)
        assert_same(stop, positions)
        sample = replace(sample, pos=positions)


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_gradients_through_the_basis(num_iterations):
    """Without them the path is the same, and gradients with respect to the start and to the weights differ."""
    sample, with_, without = random_sample({0: 1}), build(num_iterations), build(num_iterations, basis_gradients=False)
    results = {}
    for name, model in (("with", with_), ("without", without)):
        model.load_state_dict(with_.state_dict())
        results[name] = gradients(lambda s, m=model: path_of(m, s)[-1], sample, model.named_parameters())
    assert_same(results["without"][0], results["with"][0], 1e-15)
    position, wrong = (results[name][1]["pos"] for name in ("with", "without"))
    assert (position - wrong).norm() > 0.01 * position.norm()
    first = "param/blocks.0.graph_modules.0.project.weights.1"
    differ = (results["with"][1][first] - results["without"][1][first]).norm() > 0.01 * results["with"][1][first].norm()
    assert differ == (num_iterations > 1)  # the weights of the first block reach the basis of the second alone


def test_edge_features_made_of_the_geometry(dtype):
    """A function of the relative positions is asked again for every block: those of its positions, with gradients."""
    model, asked = build(fiber_edge=Fiber({0: 1, 1: 1})).to(dtype), []

    def edge_feats(relative_pos):
        asked.append(relative_pos)
        return {"0": (-relative_pos.square().sum(dim=1)).exp()[:, None, None], "1": relative_pos[:, None]}

    def call(sample):
        path = model(sample.graph, sample.pos, sample.node_feats, edge_feats)[0]
        return moves(path, sample.pos)

    sample = random_sample({0: 1}, dtype=dtype)
    assert_equivariant(call, sample)
    path = model(sample.graph, sample.pos, sample.node_feats, edge_feats)[0]
    assert_same(asked[-1], path[0][sample.dst] - path[0][sample.src], TOLERANCE[dtype])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"pooling": "max", "return_type": 0}, "pooling and return_type: positions and all features"),
        ({"skip": "add"}, "skip must be 'cat' or 'sum'"),
    ],
)
def test_what_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_unknown_arguments():
    with pytest.raises(TypeError, match="shared_weight"):
        build(shared_weight=True)


def test_positions_of_the_wrong_shape():
    sample = random_sample({0: 1})
    with pytest.raises(ValueError, match=r"positions: expected shape \(5, 3\), got \(4, 3\)"):
        build()(sample.graph, sample.pos[:4], sample.node_feats)


# -------------------------------------------------------------------------------------------------- examples/relaxation


def test_double_well_of_the_example():
    """Its lowest value is 0, and both directions of an edge have the same one."""
    points = Points(num_sets=2, num_points=4, seed=0)
    distance = points.a + 1 + torch.linspace(-0.8, -0.6, 1001)[:, None]  # the deeper well
    potential = torch.stack([points.potential(torch.nn.functional.pad(r[:, None], (0, 2))) for r in distance])
    assert (potential.amin(dim=0).abs() < 1e-6).all()
    for src, dst, a in zip(points.graph.src, points.graph.dst, points.a, strict=True):
        back = (points.graph.src == dst) & (points.graph.dst == src)
        assert points.a[back].tolist() == [a.item()]


def test_relaxation_example(tmp_path):
    tiny = ["--num_points", "4", "--num_test", "8", "--batch_size", "4", "--steps", "2", "--seeds", "2"]
    tiny += ["--num_iterations", "2", "--num_layers", "1", "--num_degrees", "2", "--num_channels", "2"]
    done = run("examples/relaxation.py", *tiny, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    energies = {row[0]: float(row[2].split(" ± ")[0]) for row in rows}
    assert len(energies) == 6
    assert energies["gradient descent, 2,000 steps"] < 0.5 * energies["where the points start"]
    parameters = {row[0]: int(row[1].replace(",", "")) for row in rows if row[1]}
    assert parameters["2 iterations"] == 2 * parameters["2 iterations, one network for all"]


def test_relaxation_example_refuses_one_point(tmp_path):
    done = run("examples/relaxation.py", "--num_points", "1", cwd=tmp_path)
    assert done.returncode != 0
    assert "num_points must be at least 2, got 1" in done.stderr
