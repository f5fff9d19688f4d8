"""Points relax in a random pair potential: one pass of a network against several that move the points in between.

    python -m examples.relaxation                         # prints the table in docs/options.md
    python -m examples.relaxation --steps 100 --seeds 1   # a first look

The toy problem of Iterative SE(3)-Transformers (Fuchs et al. 2021, arXiv 2102.13419), made on the fly. Every pair of
points has a double well u(x) = x⁴ - x² + x/10 - min, x = |r| - a - 1, with its own random a in (0, 1). The network sees
where the points are, the a, and the u; it moves the points, and the mean of u over all pairs is both loss and result.
"""

import time
from statistics import mean, stdev

import torch
from easydict import EasyDict
from torch import Tensor

from se3_transformer.model import Fiber
from se3_transformer.model.iterative import IterativeSE3Transformer
from se3_transformer.model.neighbors import fully_connected
from se3_transformer.runtime.script import run_script
from se3_transformer.runtime.settings import parse_settings, require

SETTINGS = EasyDict(
    num_points=6,  # points that interact, each with all others
    num_iterations=3,  # times that the points are moved, except in one pass
    num_layers=2,  # attention blocks in each iteration; one pass has all of them
    num_degrees=3,  # degrees 0 … num_degrees-1 in the hidden layers
    num_channels=8,  # hidden channels of each degree, and scalars that one iteration hands on to the next
    steps=300,  # optimiser steps
    batch_size=32,  # sets of points in a step, new ones every time
    learning_rate=3e-3,  # of Adam, at the start of the cosine
    num_test=1000,  # sets of points in the test
    seeds=1,  # networks of each kind, with seeds 0 … seeds-1
)
LOWEST = -0.3219190  # of the double well without its constant


def main() -> None:
    settings = parse_settings(SETTINGS, {}, __doc__, check)
    several = f"{settings.num_iterations} iterations"
    layers = settings.num_layers
    kinds = {
        "one pass": dict(num_iterations=1, num_layers=layers * settings.num_iterations),
        several: dict(num_layers=layers),
        f"{several}, one network for all": dict(num_layers=layers, shared_weights=True),
        f"{several}, no gradient through the basis": dict(num_layers=layers, basis_gradients=False),
    }
    test = Points(settings.num_test, settings.num_points, seed=2**31)
    print("| | parameters | mean energy of a pair | CPU seconds |\n|---|---|---|---|")
    print(f"| where the points start | | {test.energy(test.positions):.4f} | |")
    print(f"| gradient descent, 2,000 steps | | {test.energy(descend(test)):.4f} | |")
    for name, options in kinds.items():
        energies, began = [], time.process_time()
        for seed in range(settings.seeds):
            model = train(settings, seed, **options)
            with torch.no_grad():
                energies.append(test.energy(test.move(model)).item())
        parameters = sum(p.numel() for p in model.parameters())
        deviation = f" ± {stdev(energies):.4f}" if len(energies) > 1 else ""
        seconds = (time.process_time() - began) / settings.seeds
        print(f"| {name} | {parameters:,} | {mean(energies):.4f}{deviation} | {seconds:.0f} |", flush=True)


def check(settings: EasyDict) -> None:
    """Raise ValueError for settings that make no sense."""
    counts = ["num_iterations", "num_layers", "num_degrees", "num_channels", "steps", "batch_size"]
    require(settings, dict.fromkeys([*counts, "num_test", "seeds"], 1) | {"num_points": 2, "learning_rate": 0})


class Points:
    """B sets of n points at N(0, 1/4) per coordinate, with the potential of every pair."""

    def __init__(self, num_sets: int, num_points: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.positions = 0.5 * torch.randn(num_sets * num_points, 3, generator=generator)  # (N, 3)
        self.graph = fully_connected(self.positions, [num_points] * num_sets)
        a = torch.rand(num_sets * num_points, num_points, generator=generator)
        low, high = torch.minimum(self.graph.src, self.graph.dst), torch.maximum(self.graph.src, self.graph.dst)
        self.a = a[low, high % num_points]  # (E,) the same in both directions

    def potential(self, relative_pos: Tensor) -> Tensor:
        """(E, 3) -> (E,) u of every edge, 0 in the deeper well."""
        x = relative_pos.norm(dim=-1) - self.a - 1
        return x**4 - x**2 + x / 10 - LOWEST

    def energy(self, positions: Tensor) -> Tensor:
        """Mean potential of all pairs, at other positions (N, 3)."""
        return self.potential(positions[self.graph.dst] - positions[self.graph.src]).mean()

    def move(self, model: IterativeSE3Transformer) -> Tensor:
        """(N, 3) where a network takes the points."""

        def edge_feats(relative_pos: Tensor) -> dict[str, Tensor]:
            return {"0": torch.stack([self.a, self.potential(relative_pos)], dim=1)[:, :, None]}

        ones = torch.ones(len(self.positions), 1, 1)
        return model(self.graph, self.positions, {"0": ones}, edge_feats)[0][-1]


def train(settings: EasyDict, seed: int, **options) -> IterativeSE3Transformer:
    """A network of one kind that has learned to lower the energy."""
    torch.manual_seed(seed)
    model = IterativeSE3Transformer(
        **{"num_iterations": settings.num_iterations, **options},
        fiber_in=Fiber({0: 1}),
        fiber_hidden=Fiber.create(settings.num_degrees, settings.num_channels),
        fiber_out=Fiber({0: settings.num_channels}),
        fiber_edge=Fiber({0: 2}),
        num_heads=1,
        channels_div=2,
        tensor_cores=True,
        aggregation="mean",
        self_interaction_per="node",
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step in range(settings.steps):
        points = Points(settings.batch_size, settings.num_points, seed=seed * settings.steps + step)
        loss = points.energy(points.move(model))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model


def descend(points: Points) -> Tensor:
    """(N, 3) where 2,000 steps of gradient descent take the points; no step is longer than 0.1 per coordinate."""
    positions = points.positions.clone().requires_grad_()
    for _ in range(2000):
        total = points.energy(positions) * len(points.a) / 2  # each pair once
        (gradient,) = torch.autograd.grad(total, positions)
        positions = (positions - (0.02 * gradient).clamp(-0.1, 0.1)).detach().requires_grad_()
    return positions


if __name__ == "__main__":
    run_script(main, interrupted="interrupted: nothing is kept")
