"""N-body: from the files of simulations to a cache of graphs with their edge frames, and from the cache to batches.

A graph is one simulation at one start frame t: the particles, fully connected, with positions and velocities at t.
The task is to predict by how much both change until frame t + `delta_frames`. Training may start at every frame t that
leaves room for the target; a validation or test simulation has one start frame (`nbody_protocols.eval_start_frames`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataloader.cache import CacheError, CacheWriter, fingerprint, open_cache, same_content
from dataloader.nbody_protocols import LAYOUT_VERSION, eval_start_frames
from dataloader.nbody_simulator import energies
from se3_transformer.model.basis import edge_frames

BLOCK = 256  # simulations converted at a time


@dataclass
class NBodyBatch:
    """B graphs of n particles each as one; nodes are numbered graph by graph. float32, indices int64."""

    positions: Tensor  # (B·n, 3) at the start frame
    velocities: Tensor  # (B·n, 3) at the start frame
    charges: Tensor  # (B·n, 1) ±1
    displacement: Tensor  # (K, B·n, 3) positions at each of K target frames - positions
    velocity_change: Tensor  # (K, B·n, 3) velocities at each of K target frames - velocities
    rotations: Tensor  # (B·n·(n-1), 3, 3) edge frames of positions[dst] - positions[src]
    src: Tensor  # (B·n·(n-1),) node that an edge comes from
    dst: Tensor  # (B·n·(n-1),) node that an edge goes to
    num_graphs: int  # B
    num_particles: int  # n

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NBodyBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


class NBodyDataset:
    """One split of a cache; the arrays stay on disk, memory-mapped, until a batch reads them.

    Args:
        cache_dir: the directory that `preprocess_nbody.py` wrote.
        split: "train", "val" or "test".
        settings: settings that the cache must have, e.g. `{"delta_frames": 5}`.
        device: where batches are made; other than the CPU, the whole split is copied there.
        rebuild: the command that writes this cache, for error messages.

    Raises:
        CacheError: no usable cache, of other settings, or the file of simulations has been changed since.
        KeyError: there is no such split.
    """

    def __init__(
        self,
        cache_dir: str | Path,
        split: str,
        settings: dict | None = None,
        device="cpu",
        rebuild: str = "python preprocess_nbody.py",
    ):
        prefix = f"{split}_"
        settings = {"layout": LAYOUT_VERSION} | (settings or {})
        cache = open_cache(cache_dir, rebuild, settings, verify=True, prefix=prefix)
        if split not in cache.sources:
            raise KeyError(f"{cache_dir}: expected one of the splits {', '.join(cache.sources)}, got {split!r}")
        _check_unchanged(cache.sources[split], cache.directory, rebuild)
        self.settings, self.identity = cache.settings, cache.identity
        self.baselines: dict[str, float] = cache.info["baselines"][split]  # see `baseline_errors`
        self.interval: float = cache.info["interval"]  # simulated time from start to target
        self.split = split
        array = {
            name.removeprefix(prefix): torch.from_numpy(values).to(device) for name, values in cache.arrays.items()
        }
        # (S, F, n, 3) all frames; validation and test: F = delta_frames + 1, from the start to the target frame
        self.positions, self.velocities = array["positions"], array["velocities"]
        self.charges = array["charges"]  # (S, n)
        self.start_frames = array.get("start_frames")  # (S,) in the file of simulations; None for training
        self.rotations = array["rotations"]  # (S·T, n·(n-1), 3, 3), row = simulation·T + start frame
        self.delta_frames: int = cache.settings["delta_frames"]
        self.num_start_frames = self.positions.shape[1] - self.delta_frames  # T; 1 for validation and test
        self.num_particles = self.positions.shape[2]  # n
        self._edges = tuple(index.to(device) for index in fully_connected_edges(self.num_particles))

    def __len__(self) -> int:
        """Number of simulations S."""
        return len(self.positions)

    def batch(self, simulations: Tensor, start_frames: Tensor | None = None, num_targets: int = 1) -> NBodyBatch:
        """The graphs of some simulations at some start frames.

        Args:
            simulations: (B,) in 0 … S-1, on the CPU.
            start_frames: (B,) in 0 … T-1, on the CPU; None for validation and test, which have one each.
            num_targets: K target frames, evenly spaced; the last is `delta_frames` after the start.

        Raises:
            IndexError: a simulation or start frame that is not in the cache.
            ValueError: start frames are missing or not wanted, or of another shape than `simulations`; or
                `delta_frames` is no multiple of `num_targets`.
        """
        if (start_frames is None) == (self.split == "train"):
            raise ValueError(
                f"start_frames: expected for the split train and no other, got {start_frames} for {self.split}"
            )
        if start_frames is None:
            start_frames = torch.zeros_like(simulations)
        if simulations.ndim != 1 or start_frames.shape != simulations.shape:
            raise ValueError(
                "expected simulations (B,) and start_frames (B,), got "
                f"{tuple(simulations.shape)} and {tuple(start_frames.shape)}"
            )
        if num_targets < 1 or self.delta_frames % num_targets:
            raise ValueError(f"expected a number of targets that divides {self.delta_frames} frames, got {num_targets}")
        _check_range("simulations", simulations, len(self))
        _check_range("start_frames", start_frames, self.num_start_frames)

        device, B, n = self.positions.device, len(simulations), self.num_particles
        simulations, start_frames = (rows.to(device, non_blocking=True) for rows in (simulations, start_frames))
        start = simulations * self.positions.shape[1] + start_frames  # (B,) rows of (S·F, …)
        spacing = self.delta_frames // num_targets
        target = start + spacing * torch.arange(1, num_targets + 1, device=device)[:, None]  # (K, B)
        positions, velocities = self.positions.flatten(0, 1), self.velocities.flatten(0, 1)  # (S·F, n, 3)
        x, v = positions[start], velocities[start]  # (B, n, 3)
        offsets = torch.arange(0, B * n, n, device=device)[:, None]
        src, dst = ((offsets + index).flatten() for index in self._edges)
        return NBodyBatch(
            positions=x.flatten(0, 1),
            velocities=v.flatten(0, 1),
            charges=self.charges[simulations].reshape(-1, 1),
            displacement=(positions[target] - x).flatten(1, 2),
            velocity_change=(velocities[target] - v).flatten(1, 2),
            rotations=self.rotations[simulations * self.num_start_frames + start_frames].flatten(0, 1),
            src=src,
            dst=dst,
            num_graphs=B,
            num_particles=n,
        )


def fully_connected_edges(n: int) -> tuple[Tensor, Tensor]:
    """src and dst, (n·(n-1),) each, of all edges between n nodes without self loops, sorted by dst, then src."""
    dst, src = (~torch.eye(n, dtype=torch.bool)).nonzero().unbind(1)
    return src, dst


def add_split(writer: CacheWriter, split: str, data: dict, delta_frames: int, start_rule: str) -> dict:
    """Write one split into a cache.

    Args:
        writer: open.
        split: "train", or any other name for a split with one start frame per simulation.
        data: simulations, see `dataloader.nbody_files.LAYOUT`.
        delta_frames: frames from start to target.
        start_rule: start frames of a split other than training, see `nbody_protocols.eval_start_frames`.

    Returns:
        Facts: `baselines`, see `baseline_errors`; `interval`, the time from start to target; `energy`: `first` and
        `last`, means over simulations in these frames, and `kept`, the share where they differ by less than 0.01.

    Raises:
        ValueError: there are not enough frames.
    """
    S, F, _, n = data["points"].shape
    T = F - delta_frames
    if T < 1:
        raise ValueError(f"points: expected more than delta_frames = {delta_frames} frames, got {F}")
    simulations = np.arange(S)[:, None]
    if split == "train":
        frames = np.broadcast_to(np.arange(F), (S, F))
    else:
        start_frames = eval_start_frames(start_rule, S, T)
        frames = start_frames[:, None] + np.arange(delta_frames + 1)
        T = 1
        writer.create(f"{split}_start_frames", (S,), "int64")[:] = start_frames
    num_edges = n * (n - 1)
    positions = writer.create(f"{split}_positions", (*frames.shape, n, 3), "float32")
    velocities = writer.create(f"{split}_velocities", (*frames.shape, n, 3), "float32")
    rotations = writer.create(f"{split}_rotations", (S * T, num_edges, 3, 3), "float32")
    writer.create(f"{split}_charges", (S, n), "float32")[:] = data["charges"][:, :, 0]

    interval = float(delta_frames * data["sample_freq"] * data["delta_T"])
    src, dst = fully_connected_edges(n)
    errors, energy = [], []
    for begin in range(0, S, BLOCK):
        block = slice(begin, begin + BLOCK)
        rows = simulations[block], frames[block]
        positions[block] = data["points"][rows].swapaxes(2, 3)
        velocities[block] = data["vel"][rows].swapaxes(2, 3)
        start = torch.from_numpy(positions[block, :T]).flatten(0, 1)  # (B·T, n, 3)
        relative = (start[:, dst] - start[:, src]).flatten(0, 1)  # (B·T·E, 3)
        rotations[begin * T : (begin + BLOCK) * T] = edge_frames(relative).unflatten(0, (-1, num_edges)).numpy()
        x, v = positions[block], velocities[block]
        errors.append(baseline_errors(x[:, :T], v[:, :T], x[:, -T:], v[:, -T:], interval, axis=(1, 2, 3)))
        x_ends, v_ends = (data[key][block][:, [0, -1]] for key in ("points", "vel"))
        energy.append(np.add(*energies(x_ends, v_ends, data["charges"][block, :, 0])))  # (B, 2)
    first, last = np.concatenate(energy).T
    return {
        "baselines": {key: float(np.concatenate([error[key] for error in errors]).mean()) for key in errors[0]},
        "interval": interval,
        "energy": {"first": first.mean(), "last": last.mean(), "kept": np.mean(np.abs(last - first) < 0.01)},
    }


def baseline_errors(x, v, x_target, v_target, interval: float, axis=None) -> dict[str, np.ndarray]:
    """Mean squared errors per coordinate of what needs no model.

    Args:
        x, v: positions and velocities at the start, arrays of one shape.
        x_target, v_target: the same at the target.
        interval: time from start to target.
        axis: axes to average over.

    Returns:
        `no_change_x` and `no_change_v`: nothing changes; `constant_velocity_x`: the target is x + interval·v.
    """
    predictions = {
        "no_change_x": x - x_target,
        "no_change_v": v - v_target,
        "constant_velocity_x": x + interval * v - x_target,
    }
    return {key: np.square(error).mean(axis, dtype=np.float64) for key, error in predictions.items()}


def _check_unchanged(source: dict, directory: Path, rebuild: str):
    """Raise CacheError if the file of simulations is there with another content than the cache was made from."""
    path = directory / source["path"]
    if path.exists() and not same_content(fingerprint(path, source), source):
        raise CacheError(path.resolve(), f"the file that {directory} was made from", "a changed one", rebuild)


def _check_range(name: str, index: Tensor, size: int):
    """Raise IndexError unless all of 0 ≤ index < size."""
    if len(index) and (index.min() < 0 or index.max() >= size):
        raise IndexError(f"{name}: expected 0 … {size - 1}, which the cache holds, got {index.min()} … {index.max()}")
