"""Energies and forces: a network learns a potential, and a cluster of atoms then moves in it.

    python -m examples.forces                          # the table and the figure in docs/options.md
    python -m examples.forces --steps 100 --frames 50  # a first look

Clusters of atoms that attract each other by a Morse potential are drawn at a temperature (Langevin dynamics). The
energy of the network is a sum over atoms of invariant numbers, its forces are the negative gradient with respect to
positions; training differentiates them once more. Whether energy and forces belong together shows in dynamics without a
thermostat: the total energy stays what it is. Units: depth D and distance r0 of the Morse well, mass m of an atom.
"""

import time
from collections.abc import Callable

import torch
from easydict import EasyDict
from matplotlib.figure import Figure  # made without pyplot: needs no display, nothing to close
from torch import Tensor, nn

from se3_transformer.model import Fiber, SE3Transformer
from se3_transformer.model.neighbors import fully_connected
from se3_transformer.runtime.files import write_file
from se3_transformer.runtime.script import run_script
from se3_transformer.runtime.settings import parse_settings, require

SETTINGS = EasyDict(
    num_atoms=7,  # atoms of a cluster
    temperature=0.15,  # at which clusters are drawn
    num_train=1000,  # clusters for training
    num_test=500,  # clusters for the test
    num_layers=2,  # attention blocks
    num_degrees=3,  # degrees 0 … num_degrees-1 in the hidden layers
    num_channels=8,  # hidden channels of each degree
    num_radial=12,  # Gaussians of the distance on each edge
    steps=500,  # optimiser steps
    batch_size=16,  # clusters in a step
    learning_rate=5e-3,  # of Adam, at the start of the cosine
    frames=1000,  # steps of the dynamics
    time_step=0.01,  # of the dynamics
    seed=0,  # of data and weights
    figure="forces.png",  # where the figure goes
)
RHO = 4.0  # inverse width of the Morse well
EQUILIBRATION, APART = 5000, 50  # steps of Langevin dynamics before the first cluster that is drawn, and between two


def main() -> None:
    settings = parse_settings(SETTINGS, {}, __doc__, check)
    torch.manual_seed(settings.seed)
    positions = draw(settings, settings.num_train + settings.num_test)
    energies, forces = morse(positions)
    parts = [settings.num_train, settings.num_test]
    train_set, test_set = (Clusters(*part) for part in zip(*(t.split(parts) for t in (positions, energies, forces))))
    mean_energy = (test_set.energies - train_set.energies.mean()).abs().mean()
    print("| | MAE of energies | MAE of force components | spread of the total energy | CPU seconds |")
    print("|---|---|---|---|---|")
    print(f"| mean energy, no forces | {mean_energy:.4f} | {test_set.forces.abs().mean():.4f} | | |")
    start = test_set.positions[:1].double()
    velocities = settings.temperature**0.5 * torch.randn_like(start)
    paths = {"Morse potential": dynamics(morse, start, velocities, settings)}
    print(f"| Morse potential | 0 | 0 | {paths['Morse potential'].std():.1e} | |")
    kinds = {
        "trained on energies alone": dict(force_weight=0.0),
        "trained on energies and forces": dict(force_weight=1.0),
        "the same without norms": dict(force_weight=1.0, norm=False),
        "the same with softened norms": dict(force_weight=1.0, norm_softening=0.1),
    }
    for name, options in kinds.items():
        began = time.process_time()
        model = train(settings, train_set, **options)
        seconds = time.process_time() - began
        energy_error, force_error = test(model, test_set)
        paths[name] = dynamics(model.double(), start, velocities, settings)
        print(
            f"| {name} | {energy_error:.4f} | {force_error:.4f} | {paths[name].std():.1e} | {seconds:.0f} |", flush=True
        )
    figure = plot(paths, settings.time_step)
    write_file(settings.figure, lambda file: figure.savefig(file, dpi=110, format="png"))


def check(settings: EasyDict) -> None:
    """Raise ValueError for settings that make no sense."""
    counts = ["num_train", "num_test", "num_layers", "num_degrees", "num_channels", "steps", "batch_size", "frames"]
    require(settings, dict.fromkeys(counts, 1) | {"num_atoms": 2, "num_radial": 2, "seed": 0})
    require(settings, dict.fromkeys(["temperature", "time_step", "learning_rate"], 0))


# ----------------------------------------------------------------------------------------------------------------- data


class Clusters:
    """S clusters of n atoms: positions and forces (S, n, 3), energies (S,)."""

    def __init__(self, positions: Tensor, energies: Tensor, forces: Tensor):
        self.positions, self.energies, self.forces = positions, energies, forces


def morse(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Energies (S,) and forces (S, n, 3) of clusters: every pair has ((1 - exp(-RHO (r - 1)))² - 1)."""
    difference = positions[:, :, None] - positions[:, None]  # (S, n, n, 3) from j to i
    distance = difference.norm(dim=-1) + torch.eye(positions.shape[1], dtype=positions.dtype)
    decay = (-RHO * (distance - 1)).exp()
    pairs = ((1 - decay).square() - 1).triu(1)
    slope = 2 * RHO * (1 - decay) * decay  # 0 on the diagonal, where the distance is set to 1
    return pairs.sum(dim=(1, 2)), -(slope / distance).unsqueeze(-1).mul(difference).sum(dim=2)


def draw(settings: EasyDict, number: int) -> Tensor:
    """(number, n, 3) clusters at the temperature: every 25th of as many Langevin dynamics side by side."""
    friction, dt, temperature = 1.0, 0.01, settings.temperature
    replicas = -(-number // 25)
    x = 0.4 * settings.num_atoms ** (1 / 3) * torch.randn(replicas, settings.num_atoms, 3)
    v = torch.zeros_like(x)
    keep = torch.exp(torch.tensor(-friction * dt))
    drawn = []
    for step in range(EQUILIBRATION + 25 * APART):
        force = morse(x)[1].clamp(-50, 50) - 0.05 * x  # the start is random; a weak spring keeps atoms from leaving
        v = keep * (v + dt * force) + ((1 - keep**2) * temperature).sqrt() * torch.randn_like(v)
        x = x + dt * v
        if step >= EQUILIBRATION and step % APART == 0:
            drawn.append(x)
    return torch.cat(drawn)[torch.randperm(25 * replicas)][:number]


# ---------------------------------------------------------------------------------------------------------------- model


class ForceField(nn.Module):
    """Energies and forces of clusters of one kind of atom.

    Args:
        settings: sizes of the network.
        energy_per_atom: mean of the training set; the network learns the rest.
        scale: unit of what the network gives.
        **options: more arguments of `SE3Transformer`.
    """

    def __init__(self, settings: EasyDict, energy_per_atom: float, scale: float, **options):
        super().__init__()
        self.energy_per_atom, self.scale = energy_per_atom, scale
        self.register_buffer("centers", torch.linspace(0.6, 3.0, settings.num_radial))
        self.network = SE3Transformer(
            num_layers=settings.num_layers,
            fiber_in=Fiber({0: 1}),
            fiber_hidden=Fiber.create(settings.num_degrees, settings.num_channels),
            fiber_out=Fiber({0: 1}),
            num_heads=1,
            channels_div=2,
            fiber_edge=Fiber({0: settings.num_radial}),
            return_type=0,
            pooling="sum",
            tensor_cores=True,
            self_interaction_per="node",
            **options,
        )

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(S, n, 3) -> energies (S,) and forces (S, n, 3), the forces with a graph of their own in training mode."""
        num_clusters, num_atoms = positions.shape[:2]
        with torch.enable_grad():
            points = positions.detach().flatten(0, 1).requires_grad_()
            graph = fully_connected(points, [num_atoms] * num_clusters)
            width = self.centers[1] - self.centers[0]
            radial = (-((graph.rel_pos.norm(dim=-1)[:, None] - self.centers) / width).square()).exp()  # (E, R)
            ones = torch.ones_like(points[:, :1, None])
            energy = self.scale * self.network(graph, {"0": ones}, {"0": radial[:, :, None]}).squeeze(-1)
            (gradient,) = torch.autograd.grad(energy.sum(), points, create_graph=self.training)
        return energy + num_atoms * self.energy_per_atom, -gradient.view_as(positions)


def train(settings: EasyDict, data: Clusters, force_weight: float, **options) -> ForceField:
    """A network (with these options) trained on energies, with the forces in the loss by their weight."""
    torch.manual_seed(settings.seed)
    scale = data.forces.std()
    model = ForceField(settings, data.energies.mean().item() / settings.num_atoms, scale.item(), **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for _ in range(settings.steps):
        batch = torch.randint(len(data.positions), (settings.batch_size,))
        energies, forces = model(data.positions[batch])
        loss = (energies - data.energies[batch]).square().mean() / settings.num_atoms
        loss = loss + force_weight * (forces - data.forces[batch]).square().mean()
        optimizer.zero_grad()
        (loss / scale**2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        scheduler.step()
    return model.eval()


def test(model: ForceField, data: Clusters) -> tuple[float, float]:
    """Mean absolute errors of energies and of force components."""
    errors = []
    for positions, energies, forces in zip(*(t.split(100) for t in (data.positions, data.energies, data.forces))):
        came = model(positions)
        errors.append(torch.stack([(came[0] - energies).abs().sum(), (came[1] - forces).abs().sum()]).detach())
    total = torch.stack(errors).sum(dim=0)
    return (total[0] / data.energies.numel()).item(), (total[1] / data.forces.numel()).item()


# ------------------------------------------------------------------------------------------------------------- dynamics


def dynamics(
    potential: Callable[[Tensor], tuple[Tensor, Tensor]], positions: Tensor, velocities: Tensor, settings: EasyDict
) -> Tensor:
    """(frames,) total energy in velocity-Verlet dynamics of one cluster, positions and velocities (1, n, 3)."""
    dt, total = settings.time_step, []
    _, forces = potential(positions)
    for _ in range(settings.frames):
        velocities = velocities + dt / 2 * forces
        positions = positions + dt * velocities
        energy, forces = potential(positions)
        velocities = velocities + dt / 2 * forces
        total.append((energy + velocities.square().sum() / 2).detach())
    return torch.cat(total)


def plot(paths: dict[str, Tensor], time_step: float) -> Figure:
    """Figure of the total energy against time, counted from the start."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, total in paths.items():
        axes.plot(time_step * torch.arange(len(total)), total - total[0], label=name, lw=1)
    axes.set(xlabel="time [$r_0 (m/D)^{1/2}$]", ylabel="total energy, less that of the start [$D$]")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    run_script(main, interrupted="interrupted: nothing is kept")
