"""N-body: where will charged particles be, and how fast, some time from now (Fuchs et al. 2020, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure  # made without pyplot: needs no display, nothing to close
from torch import Tensor, nn

from dataloader.nbody import NBodyBatch, NBodyDataset
from se3_transformer.model import Fiber, Graph, SE3Transformer
from se3_transformer.model.basis import edge_frames, wigner_blocks
from se3_transformer.runtime.checkpoint import load_checkpoint
from se3_transformer.runtime.distributed import rank, sum_over_processes, world_size

RADIAL_RANGE = 0.05, 8.0  # distances at which the first and the last radial function peak
EVALUATION_BATCH = 500  # graphs


class NBodyNetwork(nn.Module):
    """SE(3)-Transformer that predicts how far the particles move and how much their velocities change.

    Nodes carry the charge (degree 0) and the velocity: as the vector that it is (degree 1), and in higher degrees l
    the harmonics |v| Y_l(v/|v|), so that every degree has an input channel. Edges carry invariants: the product of the
    charges, alone and over the distance and its square, radial and total relative speed, Gaussians of the log distance,
    and these times the product of the charges. What the network adds is counted from motion at constant velocity.

    Walls are a boundary condition, not something to learn: the transformer, which knows of no absolute position,
    predicts the motion in free space, and the path is then folded back at the walls, exact for a path that is straight
    when it meets them.

    With several iterations the same transformer is applied again to where it has moved the particles, on their new
    edges (Iterative SE(3)-Transformers, Fuchs et al. 2021), each time over an equal part of the interval.

    Args:
        interval: time from start to target.
        box_size: reflecting walls at ±box_size on each axis; 0: none.
        num_iterations: K, how often the transformer is applied on the way to the target.
        num_layers, num_degrees, num_channels, num_heads, channels_div: see `SE3Transformer`.
        num_radial: Gaussians of the log distance.
    """

    def __init__(
        self,
        interval: float,
        box_size: float,
        num_iterations: int,
        num_layers: int,
        num_degrees: int,
        num_channels: int,
        num_heads: int,
        channels_div: int,
        num_radial: int,
    ):
        super().__init__()
        self.interval, self.box_size, self.num_iterations = interval, box_size, num_iterations
        self.register_buffer("centers", torch.linspace(*map(math.log, RADIAL_RANGE), num_radial), persistent=False)
        self.transformer = SE3Transformer(
            num_layers=num_layers,
            fiber_in=Fiber.create(num_degrees, 1),
            fiber_hidden=Fiber.create(num_degrees, num_channels),
            fiber_out=Fiber({1: 2}),
            num_heads=num_heads,
            channels_div=channels_div,
            fiber_edge=Fiber({0: 5 + 2 * num_radial}),
            tensor_cores=True,
        )

    def forward(self, batch: NBodyBatch) -> tuple[Tensor, Tensor]:
        """Predicted displacement and change of velocity since the start, (K, N, 3) each, after each iteration."""
        return self.path(batch, self.box_size)

    def path(self, batch: NBodyBatch, box_size: float) -> tuple[Tensor, Tensor]:
        """What `forward` returns, between walls at ±box_size; without walls (0) it is equivariant."""
        state, displacements, velocity_changes = batch, [], []
        for _ in range(self.num_iterations):
            displacement, velocity_change = self.free_motion(state)
            positions, velocities = state.positions + displacement, state.velocities + velocity_change
            if box_size:
                positions, sign = reflect(positions, box_size)
                velocities = sign * velocities
            displacements.append(positions - batch.positions)
            velocity_changes.append(velocities - batch.velocities)
            frames = edge_frames(positions[batch.dst] - positions[batch.src])
            state = replace(batch, positions=positions, velocities=velocities, rotations=frames)
        return torch.stack(displacements), torch.stack(velocity_changes)

    def free_motion(self, batch: NBodyBatch) -> tuple[Tensor, Tensor]:
        """Displacement and change of velocity, (N, 3) each, in one iteration as if there were no walls."""
        relative_pos = batch.positions[batch.dst] - batch.positions[batch.src]  # (E, 3)
        graph = Graph(
            batch.src,
            batch.dst,
            relative_pos,
            num_nodes=len(batch.positions),
            batch_num_nodes=torch.full((batch.num_graphs,), batch.num_particles, device=batch.src.device),
        )
        node_feats = {"0": batch.charges.unsqueeze(-1)}
        harmonics = wigner_blocks(edge_frames(batch.velocities), self.transformer.max_degree)
        speed = batch.velocities.norm(dim=-1)[:, None, None]
        for degree in range(1, self.transformer.max_degree + 1):
            node_feats[str(degree)] = speed * harmonics[str(degree)][:, None, :, degree]  # D_l(v) of the polar axis
        edge_feats = {"0": self.edge_scalars(batch, relative_pos).unsqueeze(-1)}
        basis = wigner_blocks(batch.rotations, self.transformer.max_degree)
        interval = self.interval / self.num_iterations
        added = interval * self.transformer(graph, node_feats, edge_feats, basis)["1"]  # (N, 2, 3)
        return interval * batch.velocities + added[:, 0], added[:, 1]

    def edge_scalars(self, batch: NBodyBatch, relative_pos: Tensor) -> Tensor:
        """(E, 5 + 2·num_radial) invariants of every edge."""
        distance = relative_pos.norm(dim=-1)
        relative_velocity = batch.velocities[batch.dst] - batch.velocities[batch.src]  # (E, 3)
        charges = (batch.charges[batch.src] * batch.charges[batch.dst]).squeeze(-1)
        invariants = [
            charges,
            charges / (distance + 0.1),
            charges / (distance.square() + 0.05),
            (relative_velocity * relative_pos).sum(dim=-1) / (distance + 1e-4),
            relative_velocity.norm(dim=-1),
        ]
        width = self.centers[1] - self.centers[0]
        exponent = -(((distance + 0.02).log()[:, None] - self.centers) / width).square()
        radial = exponent.clamp(min=-30).exp()  # (E, num_radial); without denormal numbers, which are slow
        return torch.cat([torch.stack(invariants, dim=1), radial, radial * charges[:, None]], dim=1)


def reflect(positions: Tensor, box_size: float) -> tuple[Tensor, Tensor]:
    """Where paths that lead to `positions` end if walls at ±box_size reflect them, and ±1, the sign of their motion."""
    period = 4 * box_size
    beyond = torch.remainder(positions + box_size, period)  # 0 … 2b on the way up, 2b … 4b on the way down
    down = beyond > period / 2
    return torch.where(down, period - beyond, beyond) - box_size, torch.where(down, -1.0, 1.0).to(positions)


class NBodyTask:
    """Batches, loss and validation for the trainer (see `se3_transformer.runtime.trainer.Task`).

    Args:
        train, validation: splits of a cache.
        batch_size: graphs in a batch.
        seed: of the order of simulations and of the start frames; each epoch has its own.
        position_weight: weight of the positions' mean squared error beside that of the velocities.
        num_train: train on this many first simulations; 0: on all.
        num_start_frames: every epoch each simulation starts at a random frame of this many first ones; 0: of all.
        num_targets: K frames on the way, the last of them the target, at which the loss is taken: the network's
            iterations.
    """

    def __init__(
        self,
        train: NBodyDataset,
        validation: NBodyDataset,
        batch_size: int,
        seed: int,
        position_weight: float,
        num_train: int,
        num_start_frames: int,
        num_targets: int,
    ):
        self.train, self.validation = train, validation
        self.batch_size, self.seed = batch_size, seed
        self.position_weight, self.num_targets = position_weight, num_targets
        if train.delta_frames % num_targets:
            raise ValueError(
                f"num_iterations must divide the {train.delta_frames} frames to the target, got {num_targets}"
            )
        self.num_train = num_train or len(train)
        self.num_start_frames = num_start_frames or train.num_start_frames
        for name, value, most in (
            ("num_train", self.num_train, len(train)),
            ("num_start_frames", self.num_start_frames, train.num_start_frames),
        ):
            if value > most:
                raise ValueError(f"{name} must be at most {most}, as many as there are, got {value}")

    def batches(self, epoch: int) -> Sequence[Tensor]:
        """(B, 2) simulation and start frame of each example, for every batch of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        simulations = torch.randperm(self.num_train, generator=generator)
        frames = torch.randint(self.num_start_frames, simulations.shape, generator=generator)
        return torch.stack([simulations, frames], dim=1).split(self.batch_size)

    def load(self, examples: Tensor) -> NBodyBatch:
        return self.train.batch(*examples.unbind(1), num_targets=self.num_targets)

    def loss(self, model: nn.Module, batch: NBodyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        errors = squared_errors(model, batch)  # (2, K)
        error_x, error_v = errors.mean(dim=1)
        return self.position_weight * error_x + error_v, {"mse_x": errors[0, -1], "mse_v": errors[1, -1]}

    def validate(self, model: NBodyNetwork) -> dict[str, float]:
        """MSE x and v, and the equivariance error; the epoch is chosen by their geometric mean."""
        errors = evaluate(model, self.validation)
        return errors | {
            "selection": math.sqrt(errors["mse_x"] * errors["mse_v"]),
            "equivariance_error": equivariance_error(
                model, self.validation.batch(torch.arange(min(64, len(self.validation))))
            ),
        }

    def figures(self, model: NBodyNetwork) -> dict:
        return {}  # one of the test simulations at the end is enough


def squared_errors(model: nn.Module, batch: NBodyBatch) -> Tensor:
    """Mean squared errors per coordinate, of positions and of velocities, after each iteration: (2, K).

    A batch with one target is compared with the end of the path.
    """
    predicted = torch.stack(model(batch))  # (2, K, N, 3)
    true = torch.stack([batch.displacement, batch.velocity_change])
    return (predicted[:, -true.shape[1] :] - true).square().mean(dim=(2, 3))


@torch.no_grad()
def evaluate(model: nn.Module, dataset: NBodyDataset) -> dict[str, float]:
    """MSE x and v of a model over all simulations of a validation or test split, shared by all processes."""
    totals = torch.zeros(2, dtype=torch.float64, device=dataset.positions.device)
    share = torch.arange(rank(), len(dataset), world_size())
    for simulations in share.split(EVALUATION_BATCH):
        totals += len(simulations) * squared_errors(model, dataset.batch(simulations))[:, -1].double()
    mse_x, mse_v = (sum_over_processes(totals) / len(dataset)).tolist()
    return {"mse_x": mse_x, "mse_v": mse_v}


@torch.no_grad()
def equivariance_error(model: nn.Module, batch: NBodyBatch) -> float:
    """How much turning the input, then predicting, differs from predicting, then turning: relative, Euclidean norm.

    Measured on the motion in free space, since walls do not turn.
    """
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    turn = (turn * turn.det()).to(batch.positions)  # a rotation: det = 1
    positions = batch.positions @ turn.T
    turned = replace(
        batch,
        positions=positions,
        velocities=batch.velocities @ turn.T,
        rotations=edge_frames(positions[batch.dst] - positions[batch.src]),
    )
    expected = torch.stack(model.path(batch, box_size=0)) @ turn.T
    return ((torch.stack(model.path(turned, box_size=0)) - expected).norm() / expected.norm()).item()


def plot_trajectories(model: NBodyNetwork, dataset: NBodyDataset, num_panels: int = 6) -> Figure:
    """Figure of simulations seen along z: true paths, predicted end points, end points at constant velocity."""
    simulations = torch.linspace(0, len(dataset) - 1, num_panels).long()
    batch = dataset.batch(simulations)
    with torch.no_grad():
        displacement = model(batch)[0][-1]
    n = batch.num_particles
    start = batch.positions
    predicted, straight = start + displacement, start + model.interval * batch.velocities
    start, predicted, straight = (points.view(-1, n, 3).cpu() for points in (start, predicted, straight))
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    for panel, axes in enumerate(figure.subplots(2, (num_panels + 1) // 2).flat[:num_panels]):
        path = dataset.positions[simulations[panel]].cpu()  # (F, n, 3)
        for particle in range(n):
            color = "tab:red" if batch.charges.view(-1, n)[panel, particle] > 0 else "tab:blue"
            axes.plot(*path[:, particle, :2].T, color=color, lw=1.5)
            axes.plot(*start[panel, particle, :2], "o", color=color, ms=6)
            axes.plot(*straight[panel, particle, :2], "+", color="0.6", ms=9)
            axes.plot(*predicted[panel, particle, :2], "x", color="black", ms=8, mew=1.8)
        axes.set(title=f"simulation {simulations[panel].item()}", xlabel="x", ylabel="y", aspect="equal")
        axes.grid(alpha=0.3)
    handles = [
        figure.axes[0].plot([], [], "o-", color="tab:red", label="positive: start and true path")[0],
        figure.axes[0].plot([], [], "o-", color="tab:blue", label="negative: start and true path")[0],
        figure.axes[0].plot([], [], "x", color="black", mew=1.8, label="predicted end")[0],
        figure.axes[0].plot([], [], "+", color="0.6", label="end at constant velocity")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def load_network(path: str | Path) -> NBodyNetwork:
    """The trained network of a checkpoint that `train_nbody.py` wrote, ready to predict."""
    content = load_checkpoint(path)
    network = NBodyNetwork(**content["network"])
    network.load_state_dict(content["model"])
    return network.eval()
