"""Charged particles in 3 dimensions, as the SE(3)-Transformer paper's authors simulate them.

n particles of unit mass and charge ±1 start at N(0, σ²) per coordinate, σ = 1 where nothing else is asked for, with
speed 0.5 in a random direction. The force on i is Σ_j q_i q_j (x_i - x_j) / |x_i - x_j|³, every component clipped to
±100 after the sum. Scheme (leapfrog): v += dt·F once, then for every step x += dt·v, reflect at the walls, store a
frame every 100 steps, v += dt·F. Units are those of the simulation: Coulomb constant, mass and charge 1.

Satorras et al. 2021 (EGNN) simulate the same without walls, with σ = (n/5)^(1/3). They put points that start beyond ±5
back inside, for n = 5 one coordinate in 1.7 million; that is left out here.

NumPy only: importing this file is quick, and its worker processes start quickly.
"""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from tqdm import tqdm

DELTA_T = 0.001  # time a step
NUM_STEPS = 5000  # steps a simulation
SAMPLE_FREQ = 100  # steps from frame to frame
NUM_FRAMES = NUM_STEPS // SAMPLE_FREQ - 1  # 49: the initial state is not stored
MAX_FORCE = 100.0  # each component of the force is clipped to ±MAX_FORCE
INITIAL_SPEED = 0.5
BLOCK_SIZES = (500, 1000)  # fewest and most simulations a block: large enough for NumPy, small enough for the cache


def simulate(
    num_simulations: int,
    n_balls: int = 5,
    box_size: float = 5.0,
    seed=0,
    position_std: float = 1.0,
    progress: str | None = None,
) -> dict:
    """Simulate on all available cores; the result depends on the arguments only, not on the number of cores.

    The first S simulations of a seed are the same however many are asked for.

    Args:
        num_simulations: S ≥ 1.
        n_balls: particles n ≥ 2.
        box_size: reflecting walls at ±box_size on each axis; 0: no walls.
        seed: an int or a sequence of ints ≥ 0, for `numpy.random.default_rng`.
        position_std: standard deviation σ > 0 of each coordinate at the start.
        progress: title of a progress bar; None: no bar.

    Returns:
        A dict in the authors' layout, F = 49 frames, arrays float64: `points` and `vel` (S, F, 3, n), `charges`
        (S, n, 1), `edges` (S, n, n) = q qᵀ, `clamp` (S, F, n) 1 where the particle hit a wall of any axis since the
        last frame, else 0, `E`, `U`, `K` (F,) total, potential and kinetic energy, each the mean over simulations;
        numbers: `delta_T` time a step, `sample_freq` steps a frame.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_simulations < 1 or n_balls < 2 or not 0 <= box_size < np.inf or not 0 < position_std < np.inf:
        raise ValueError(
            "expected num_simulations ≥ 1, n_balls ≥ 2, a finite box_size ≥ 0 and a finite position_std > 0, "
            f"got {num_simulations}, {n_balls}, {box_size} and {position_std}"
        )
    points, velocities, charges = _initial_state(num_simulations, n_balls, seed)
    points *= position_std
    shapes = {"points": (NUM_FRAMES, 3, n_balls), "vel": (NUM_FRAMES, 3, n_balls), "clamp": (NUM_FRAMES, n_balls)}
    data = {key: np.empty((num_simulations, *shape)) for key, shape in shapes.items()}

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = int(np.clip(-(-num_simulations // (4 * workers)), *BLOCK_SIZES))
    blocks = [slice(start, min(start + size, num_simulations)) for start in range(0, num_simulations, size)]
    tasks = [(points[block], velocities[block], charges[block], box_size) for block in blocks]
    with tqdm(total=num_simulations, desc=progress, unit="sim", disable=progress is None) as bar:
        for block, frames in zip(blocks, _run(tasks, min(workers, len(tasks)))):
            for key, value in zip(shapes, frames):
                data[key][block] = value
            bar.update(block.stop - block.start)

    kinetic, potential = energies(data["points"], data["vel"], charges)
    return data | {
        "charges": charges[:, :, None],
        "edges": charges[:, :, None] * charges[:, None, :],
        "E": (kinetic + potential).mean(0),
        "U": potential.mean(0),
        "K": kinetic.mean(0),
        "delta_T": DELTA_T,
        "sample_freq": SAMPLE_FREQ,
    }


def energies(points: np.ndarray, velocities: np.ndarray, charges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kinetic energy Σ_i |v_i|²/2 and potential energy Σ_{i<j} q_i q_j / |x_i - x_j|.

    Args:
        points: (S, F, 3, n).
        velocities: (S, F, 3, n).
        charges: (S, n).

    Returns:
        Two arrays (S, F).
    """
    kinetic = 0.5 * np.square(velocities).sum((2, 3))
    potential = np.zeros_like(kinetic)
    for i, j in zip(*np.triu_indices(points.shape[3], 1)):
        distance = np.linalg.norm(points[..., i] - points[..., j], axis=2)  # (S, F)
        potential += (charges[:, i] * charges[:, j])[:, None] / distance
    return kinetic, potential


def _initial_state(num_simulations: int, n: int, seed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points (S, 3, n), velocities (S, 3, n), charges (S, n), drawn simulation by simulation."""
    normal = np.random.default_rng(seed).standard_normal((num_simulations, 7, n))
    points, direction, charges = normal[:, :3], normal[:, 3:6], np.where(normal[:, 6] < 0, -1.0, 1.0)
    return points, INITIAL_SPEED * direction / np.linalg.norm(direction, axis=1, keepdims=True), charges


def _run(tasks: list, workers: int):
    """Yield `_simulate_block(*task)` in the order of the tasks."""
    if workers == 1:
        yield from (_simulate_block(*task) for task in tasks)
        return
    # Processes, not threads: the array operations are too short for threads to share the interpreter lock.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent) as pool:
        yield from pool.map(_simulate_block, *zip(*tasks))


def _end_with_parent():
    """In a worker: leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _simulate_block(points, velocities, charges, box_size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Simulate B systems: arguments (B, 3, n), (B, 3, n), (B, n); returns `points`, `vel`, `clamp` of `simulate`.

    Arrays are (3, n, B) inside, so that every operation runs over many simulations. Each element goes through the same
    IEEE operations wherever it stands in a block.
    """
    x, v = (np.ascontiguousarray(a.transpose(1, 2, 0)) for a in (points, velocities))  # (3, n, B)
    flat_x, flat_v = x.reshape(-1), v.reshape(-1)  # views
    drift, beyond, hit = np.empty_like(x), np.empty(x.shape, bool), np.zeros(x.shape, bool)
    forces = _Forces(charges.T)
    frames = [np.empty((NUM_FRAMES, *x.shape)), np.empty((NUM_FRAMES, *x.shape)), np.empty((NUM_FRAMES, *x.shape[1:]))]

    v += DELTA_T * forces(x)
    for step in range(1, NUM_STEPS):
        x += np.multiply(v, DELTA_T, out=drift)
        if box_size:
            np.greater(np.abs(x, out=drift), box_size, out=beyond)
            index = np.flatnonzero(beyond)
            if len(index):
                flat_x[index], flat_v[index] = _reflect(flat_x[index], flat_v[index], box_size)
                hit |= beyond
        if step % SAMPLE_FREQ == 0:
            for array, value in zip(frames, (x, v, hit.any(0))):
                array[step // SAMPLE_FREQ - 1] = value
            hit[:] = False
        v += np.multiply(forces(x), DELTA_T, out=drift)
    points, velocities, hits = (np.moveaxis(array, -1, 0) for array in frames)
    return points, velocities, hits


def _reflect(x: np.ndarray, v: np.ndarray, box_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates and their velocities (K,) after the walls at box_size, then at -box_size."""
    over = x > box_size
    x, v = np.where(over, 2 * box_size - x, x), np.where(over, -np.abs(v), v)
    under = x < -box_size
    return np.where(under, -2 * box_size - x, x), np.where(under, np.abs(v), v)


class _Forces:
    """F(x) for charges (n, B), through buffers that are allocated once; each pair is computed once (F_ji = -F_ij)."""

    def __init__(self, charges: np.ndarray):
        n, num_simulations = charges.shape
        self.pairs = list(zip(*np.triu_indices(n, 1)))  # P pairs i < j, in lexicographic order
        self.charge_products = np.stack([charges[i] * charges[j] for i, j in self.pairs])  # (P, B)
        self.pair_force = np.empty((3, len(self.pairs), num_simulations))
        self.squares = np.empty_like(self.pair_force)
        self.cube = np.empty_like(self.charge_products)
        self.total = np.empty((3, n, num_simulations))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(3, n, B) -> (3, n, B), a buffer that the next call overwrites."""
        n, pair_force, squares, cube, total = x.shape[1], self.pair_force, self.squares, self.cube, self.total
        start = 0
        for i in range(n - 1):
            np.subtract(x[:, i, None], x[:, i + 1 :], out=pair_force[:, start : start + n - 1 - i])
            start += n - 1 - i
        np.multiply(pair_force, pair_force, out=squares)
        np.add(squares[0], squares[1], out=cube)
        cube += squares[2]
        cube *= np.sqrt(cube, out=squares[0])
        pair_force *= np.divide(self.charge_products, cube, out=cube)
        total[:] = 0
        for p, (low, high) in enumerate(self.pairs):  # every particle sums over the others in ascending order
            total[:, low] += pair_force[:, p]
            total[:, high] -= pair_force[:, p]
        return np.clip(total, -MAX_FORCE, MAX_FORCE, out=total)
