"""Forces as the negative position gradient of an energy: second derivatives are right on every path of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from battery import varied
from helpers import assert_finite, assert_same, degenerate_samples, random_sample
from scripts import run

from examples.forces import morse
from se3_transformer.model import Fiber, SE3Transformer
from se3_transformer.model.layers import contraction, convolution
from se3_transformer.model.layers.contraction import ORDERS
from se3_transformer.model.layers.convolution import VersatileConvSE3

AUTHORS = {"relative_pos": "add", "norm_type": "bias", "final_layer": "attention", "last_self_interaction": "attentive"}


def build(**options):
    """A network whose output is one energy for each graph."""
    torch.manual_seed(0)
    fibers = Fiber({0: 2}), Fiber({0: 2, 1: 2, 2: 2}), Fiber({0: 1})
    return varied(SE3Transformer(1, *fibers, 1, 1, return_type=0, pooling="sum", **options)).double()


def energy(model, sample, pos):
    """(B,)"""
    return model(replace(sample, pos=pos).graph, sample.node_feats).squeeze(-1)


def forces(model, sample, pos, **kwargs):
    """(N, 3)"""
    return -torch.autograd.grad(energy(model, sample, pos).sum(), pos, **kwargs)[0]


@pytest.fixture
def sample():
    return random_sample({0: 2}, nodes=(3, 2), edges=(5, 2))


@pytest.fixture
def tiny_chunks(monkeypatch):
    """One edge to a chunk of the contraction, three to a chunk that the backward pass computes again."""
    monkeypatch.setitem(contraction.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(convolution, "MAX_EDGES", 3)
    monkeypatch.setattr(convolution, "MAX_EDGES_LOW_MEMORY", 3)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"tensor_cores": True}, AUTHORS], ids=str)
def test_first_and_second_derivatives(options, order, sample, tiny_chunks):
    """Against central differences, with every order of contraction, in chunks and with checkpoints."""
    model = build(**options)
    for module in model.modules():
        if isinstance(module, VersatileConvSE3):
            module.order = order
    pos = sample.pos.clone().requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: energy(model, sample, x), pos, fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"low_memory": True}], ids=str)
def test_gradients_of_a_loss_on_forces(options, sample, tiny_chunks):
    """With respect to all parameters together, against a central difference in a random direction."""
    model = build(**options)
    target = torch.randn(5, 3, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in parameters]

    def loss():
        pos = sample.pos.clone().requires_grad_()
        return (forces(model, sample, pos, create_graph=True) - target).square().sum()

    # A shift of the energy, like the last bias of a layer norm that only scales zero, has no force.
    grads = torch.autograd.grad(loss(), parameters, allow_unused=True)
    analytic = sum((g * d).sum() for g, d in zip(grads, direction) if g is not None)
    step, values = 1e-6, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, direction):
                p += sign * step * d
        values.append(loss().detach())
    assert_same(analytic, (values[0] - values[1]) / (2 * step), 1e-6)


def test_forces_are_the_same_with_and_without_a_graph_of_them(sample, dtype):
    """Training differentiates the definition of the contraction, prediction its chunks."""
    model, sample = build().to(dtype), sample.to(dtype)
    pos = sample.pos.clone().requires_grad_()
    assert_same(forces(model, sample, pos), forces(model, sample, pos, create_graph=True))


def test_forces_add_up_to_nothing(sample):
    """Neither a force nor a torque acts on a graph as a whole: its energy knows no place and no direction."""
    pos = sample.pos.clone().requires_grad_()
    found = forces(build(), sample, pos)
    for graph in (slice(0, 3), slice(3, 5)):
        assert found[graph].norm() > 1e-3
        assert found[graph].sum(dim=0).norm() < 1e-12
        assert torch.linalg.cross(pos[graph], found[graph]).sum(dim=0).norm() < 1e-12


@pytest.mark.parametrize("odd", ["one node", "no edges", "self loops", "coincident nodes", "edges along the axes"])
def test_second_derivatives_of_odd_graphs_are_finite(odd):
    sample, model = degenerate_samples({0: 2})[odd], build()
    pos = sample.pos.clone().requires_grad_()
    found = energy(model, sample, pos).sum()
    (force,) = torch.autograd.grad(found, pos, create_graph=True, allow_unused=True)
    if force is None:  # nothing depends on positions
        assert odd in ("one node", "no edges")
        return
    grads = torch.autograd.grad(force.square().sum(), [pos, *model.parameters()], allow_unused=True)
    assert_finite({str(i): g for i, g in enumerate(grads)}, "second derivatives")


# ------------------------------------------------------------------------------------------------------ examples/forces


def test_forces_of_the_morse_potential():
    """They are the negative gradient, and a pair at distance 1 lies at the bottom of the well."""
    positions = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    energies, found = morse(positions)
    assert_same(found, -torch.autograd.grad(energies.sum(), positions)[0])
    (bottom,), flat = morse(torch.tensor([[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]], dtype=torch.float64))
    assert bottom == -1 and flat.norm() == 0


def test_forces_example(tmp_path):
    tiny = ["--num_atoms", "3", "--num_train", "20", "--num_test", "10", "--num_layers", "1", "--num_degrees", "2"]
    tiny += ["--num_channels", "2", "--num_radial", "4", "--steps", "2", "--batch_size", "4", "--frames", "20"]
    done = run("examples/forces.py", *tiny, "--figure", "found.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 6
    spread = {row[0]: float(row[3]) for row in rows if row[3]}
    assert spread["Morse potential"] < 1e-2
    assert spread["trained on energies and forces"] < 1e-2  # the energy is kept although next to nothing was learned
