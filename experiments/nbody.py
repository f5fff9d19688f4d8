"""N-body: where will charged particles be, and how fast, some time from now (Fuchs et al. 2020, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure  # made without pyplot: needs no display, nothing to close
from torch import Tensor, nn

from dataloader.nbody import NBodyBatch, NBodyDataset
from experiments.augment import random_turns, turn_matrices
from se3_transformer.model import Fiber, Graph, SE3Transformer
from se3_transformer.model.basis import edge_frames, wigner_blocks
from se3_transformer.runtime.checkpoint import CheckpointError, load_checkpoint
from se3_transformer.runtime.cuda_graphs import Replayed
from se3_transformer.runtime.distributed import rank, sum_over_processes, world_size

RADIAL_RANGE = 0.05, 8.0  # distances at which the first and the last radial function peak
EVALUATION_BATCH = 500  # graphs
AUGMENTATIONS = ("none", "rotations", "symmetries")


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
        nearest, farthest = map(math.log, RADIAL_RANGE)
        self.centers: Tensor
        self.register_buffer("centers", torch.linspace(nearest, farthest, num_radial), persistent=False)
        self.transformer = SE3Transformer(
            num_layers=num_layers,
            **self.fibers(num_degrees, num_channels, 5 + 2 * num_radial),
            num_heads=num_heads,
            channels_div=channels_div,
            tensor_cores=True,
        )

    @staticmethod
    def fibers(num_degrees: int, num_channels: int, num_edge_scalars: int) -> dict[str, Any]:
        """Fibers of the transformer, with the names of its arguments."""
        return {
            "fiber_in": Fiber.create(num_degrees, 1),
            "fiber_hidden": Fiber.create(num_degrees, num_channels),
            "fiber_out": Fiber({1: 2}),
            "fiber_edge": Fiber({0: num_edge_scalars}),
        }

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
        edge_feats = {"0": self.edge_scalars(batch, relative_pos).unsqueeze(-1)}
        basis = wigner_blocks(batch.rotations, self.transformer.max_degree)
        interval = self.interval / self.num_iterations
        outputs = self.transformer(graph, self.node_features(batch), edge_feats, basis)
        added = interval * next(iter(outputs.values())).reshape(-1, 2, 3)  # the plain network has them as six scalars
        return interval * batch.velocities + added[:, 0], added[:, 1]

    def node_features(self, batch: NBodyBatch) -> dict[str, Tensor]:
        """{'l': (N, 1, 2l+1)} the charge, and |v| Y_l(v/|v|) for l > 0."""
        node_feats = {"0": batch.charges.unsqueeze(-1)}
        harmonics = wigner_blocks(edge_frames(batch.velocities), self.transformer.max_degree)
        speed = batch.velocities.norm(dim=-1)[:, None, None]
        for degree in range(1, self.transformer.max_degree + 1):
            node_feats[str(degree)] = speed * harmonics[str(degree)][:, None, :, degree]  # D_l(v) of the polar axis
        return node_feats

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


class PlainNetwork(NBodyNetwork):
    """For comparison: the same attention, which knows nothing of rotations.

    All coordinates, of velocities, relative positions and outputs, are scalars of their own; hidden layers have as many
    numbers a node as those of `NBodyNetwork`, all scalars.
    """

    @staticmethod
    def fibers(num_degrees: int, num_channels: int, num_edge_scalars: int) -> dict[str, Any]:
        return {
            "fiber_in": Fiber({0: 4}),
            "fiber_hidden": Fiber({0: num_channels * num_degrees**2}),
            "fiber_out": Fiber({0: 6}),
            "fiber_edge": Fiber({0: num_edge_scalars + 3}),
        }

    def node_features(self, batch: NBodyBatch) -> dict[str, Tensor]:
        return {"0": torch.cat([batch.charges, batch.velocities], dim=1).unsqueeze(-1)}

    def edge_scalars(self, batch: NBodyBatch, relative_pos: Tensor) -> Tensor:
        return torch.cat([super().edge_scalars(batch, relative_pos), relative_pos], dim=1)


NETWORKS = {"equivariant": NBodyNetwork, "plain": PlainNetwork}


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
        position_weight, velocity_weight: weights of the mean squared errors in the loss. Without weight for the
            velocities, MSE x chooses the best epoch, otherwise the geometric mean of MSE x and v.
        num_train: train on this many first simulations; 0: on all.
        first_start_frame, num_start_frames: every epoch each simulation starts at a random frame of this many, from
            this one on; 0 frames: of all that are left.
        num_targets: K frames on the way, evenly spaced, the last of them the target, at which the loss is taken: one,
            or as many as the network has iterations.
        augment: "none"; "rotations": every example is turned at random, which changes nothing for an equivariant
            network; "symmetries": besides, at random, it is mirrored, and all charges change their sign.
        cuda_graphs: replay forward and backward pass, see `Replayed`.
    """

    def __init__(
        self,
        train: NBodyDataset,
        validation: NBodyDataset,
        batch_size: int,
        seed: int,
        position_weight: float,
        velocity_weight: float,
        num_train: int,
        first_start_frame: int,
        num_start_frames: int,
        num_targets: int,
        augment: str,
        cuda_graphs: bool = False,
    ):
        self._replayed = Replayed(lambda network, batch: network(batch)) if cuda_graphs else None
        self.train, self.validation = train, validation
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self.position_weight, self.velocity_weight = position_weight, velocity_weight
        self.first_start_frame, self.num_targets = first_start_frame, num_targets
        if train.delta_frames % num_targets:
            raise ValueError(
                f"num_iterations must divide the {train.delta_frames} frames to the target, got {num_targets}"
            )
        self.num_train = num_train or len(train)
        if self.num_train > len(train):
            raise ValueError(f"num_train must be at most {len(train)}, as many as there are, got {self.num_train}")
        left = train.num_start_frames - first_start_frame
        self.num_start_frames = num_start_frames or left
        if not 0 < self.num_start_frames <= left:
            raise ValueError(
                f"first_start_frame and num_start_frames must lie within the {train.num_start_frames} frames that "
                f"leave room for the target, got {first_start_frame} and {num_start_frames}"
            )

    def batches(self, epoch: int) -> Sequence[Tensor]:
        """For every batch of an epoch (B, 2) simulation and start frame of each example; if examples are augmented
        (B, 8), with four numbers for a rotation, and 0 or 1 for a mirror and for opposite charges.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        simulations = torch.randperm(self.num_train, generator=generator)
        frames = torch.randint(self.num_start_frames, simulations.shape, generator=generator) + self.first_start_frame
        examples = torch.stack([simulations, frames], dim=1)
        if self.augment != "none":
            turns = random_turns(len(examples), generator)
            others = torch.randint(2 if self.augment == "symmetries" else 1, (len(examples), 2), generator=generator)
            examples = torch.cat([examples, turns, others], dim=1)
        return examples.split(self.batch_size)

    def load(self, examples: Tensor) -> NBodyBatch:
        batch = self.train.batch(examples[:, 0], examples[:, 1], num_targets=self.num_targets)
        if self.augment == "none":
            return batch
        mirror, opposite = (1 - 2 * examples[:, 6:]).to(batch.charges, non_blocking=True).unbind(1)  # (B,) ±1
        matrices = turn_matrices(examples[:, 2:6]).to(batch.positions, non_blocking=True) * mirror[:, None, None]
        return replace(
            turn(batch, matrices), charges=batch.charges * opposite.repeat_interleave(batch.num_particles)[:, None]
        )

    def loss(self, model: nn.Module, batch: NBodyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        paths = model if self._replayed is None else partial(self._replayed, model)
        errors = squared_errors(paths, batch)  # (2, K)
        error_x, error_v = errors.mean(dim=1)
        loss = self.position_weight * error_x + self.velocity_weight * error_v
        return loss, {name: errors[i, -1] for i, name in enumerate(learned_errors(self.velocity_weight))}

    def validate(self, model: NBodyNetwork) -> dict[str, float]:
        """MSE x and v, what chooses the epoch, and the equivariance error."""
        errors = evaluate(model, self.validation)
        errors = {name: errors[name] for name in learned_errors(self.velocity_weight)}
        return errors | {
            "selection": math.prod(errors.values()) ** (1 / len(errors)),  # the geometric mean
            "equivariance_error": equivariance_error(
                model, self.validation.batch(torch.arange(min(64, len(self.validation))))
            ),
        }

    def figures(self, model: NBodyNetwork) -> dict:
        return {}  # one of the test simulations at the end is enough


def learned_errors(velocity_weight: float) -> tuple[str, ...]:
    """Names of the errors that the loss contains: of positions, and of velocities where they have weight."""
    return ("mse_x", "mse_v") if velocity_weight else ("mse_x",)


def squared_errors(model: Callable[[NBodyBatch], tuple[Tensor, Tensor]], batch: NBodyBatch) -> Tensor:
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


def turn(batch: NBodyBatch, matrices: Tensor) -> NBodyBatch:
    """Each graph of a batch turned, or mirrored, by an orthogonal matrix of (B, 3, 3)."""
    matrices = matrices.repeat_interleave(batch.num_particles, dim=0)  # (N, 3, 3)

    def turned(vectors: Tensor) -> Tensor:
        return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)  # ([K,] N, 3)

    positions = turned(batch.positions)
    return replace(
        batch,
        positions=positions,
        velocities=turned(batch.velocities),
        displacement=turned(batch.displacement),
        velocity_change=turned(batch.velocity_change),
        rotations=edge_frames(positions[batch.dst] - positions[batch.src]),
    )


@torch.no_grad()
def equivariance_error(model: NBodyNetwork, batch: NBodyBatch) -> float:
    """How much turning the input, then predicting, differs from predicting, then turning: relative, Euclidean norm.

    Measured on the motion in free space, since walls do not turn.
    """
    generator = torch.Generator().manual_seed(0)
    matrix = turn_matrices(random_turns(1, generator)).to(batch.positions)  # (1, 3, 3)
    turned = turn(batch, matrix.expand(batch.num_graphs, 3, 3))
    expected = torch.stack(model.path(batch, box_size=0)) @ matrix[0].T
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
        axes.set(title=f"simulation {simulations[panel].item()}", xlabel="x", ylabel="y")
        axes.set_aspect("equal", adjustable="datalim")  # panels of one size
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
    """The trained network of a checkpoint that `train_nbody.py` wrote, ready to predict.

    Raises:
        FileNotFoundError, CheckpointError: no usable checkpoint.
    """
    content = load_checkpoint(path)
    if not {"network", "model", "settings"} <= content.keys() or "interval" not in content["network"]:
        raise CheckpointError(f"{path}: expected a checkpoint of train_nbody.py, got one with {', '.join(content)}")
    settings = {"network": "equivariant"} | content["network"]  # older ones do not name it
    try:
        network = NETWORKS[settings.pop("network")](**settings)
        network.load_state_dict(content["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: weights that do not fit the settings beside them ({error})") from error
    return network.eval()
