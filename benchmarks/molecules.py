"""Made-up molecules of QM9's sizes: what benchmarks run on where QM9 is not at hand. No chemistry."""

from __future__ import annotations

import numpy as np

from dataloader.qm9 import QM9Dataset, graph_arrays
from dataloader.qm9_layout import ATOMIC_NUMBERS, TARGETS, Molecules

BOND_LENGTH = 1.3  # Å
MAX_BONDS = 4  # of an atom, before rings are closed
DIRECTIONS = 8  # tried for every atom; the one that leads farthest from the others is taken
# As in QM9: atoms 18.1 ± 2.9, from 3 to 29; share of molecules with 0, 1, … rings; share of each element.
MEAN_ATOMS, STD_ATOMS, MIN_ATOMS, MAX_ATOMS = 18.1, 2.9, 3, 29
RINGS = np.array([0.10, 0.39, 0.32, 0.16, 0.03])
ELEMENTS = np.array([0.51, 0.35, 0.06, 0.079, 0.001])  # H C N O F


def synthetic_dataset(molecules: Molecules, graph: str = "bonds", device: str = "cpu") -> QM9Dataset:
    """The molecules as `train_qm9.py` would have them, wholly on the device."""
    return QM9Dataset(graph_arrays(molecules, graph), {"graph": graph}, device)


def qm9_sized_molecules(count: int, seed: int = 0) -> Molecules:
    """Molecules with QM9's distribution of sizes."""
    rng = np.random.default_rng(seed)
    atoms = rng.normal(MEAN_ATOMS, STD_ATOMS, count).round().clip(MIN_ATOMS, MAX_ATOMS).astype(int)
    rings = np.minimum(rng.choice(len(RINGS), count, p=RINGS), atoms - 2)
    return synthetic_molecules(atoms, rings, rng)


def equal_molecules(count: int, seed: int = 0) -> Molecules:
    """Molecules of 18 atoms, with one and two rings in turn: 32 have 1,184 bonds, and 9,792 pairs of atoms."""
    return synthetic_molecules(np.full(count, 18), 1 + np.arange(count) % 2, np.random.default_rng(seed))


def synthetic_molecules(atoms: np.ndarray, rings: np.ndarray, rng: np.random.Generator) -> Molecules:
    """Random trees with some more bonds.

    Args:
        atoms: (G,) atoms of each molecule, at least 3.
        rings: (G,) bonds beyond those of a tree, at most atoms - 2.
        rng: of everything else.
    """
    positions, sources, destinations = [], [], []
    for num_atoms, num_rings in zip(atoms, rings, strict=True):
        position, bonded = grow(num_atoms, num_rings, rng)
        src, dst = bonded.nonzero()
        positions.append(position)
        sources.append(src)
        destinations.append(dst)
    n_edge = np.array([len(src) for src in sources])
    src, dst = np.concatenate(sources), np.concatenate(destinations)
    molecule = np.repeat(np.arange(len(atoms)), n_edge)
    bond = np.where(src < dst, src * MAX_ATOMS + dst, dst * MAX_ATOMS + src) + molecule  # the same in both directions
    element = rng.choice(len(ELEMENTS), atoms.sum(), p=ELEMENTS)
    node_attr = np.zeros((atoms.sum(), 11), np.float32)
    node_attr[np.arange(len(element)), element] = 1
    node_attr[:, 5] = ATOMIC_NUMBERS[element]
    return Molecules(
        n_node=atoms,
        n_edge=n_edge,
        node_attr=node_attr,
        node_pos=np.concatenate(positions).astype(np.float32),
        edge_attr=np.eye(4, dtype=np.float32)[bond % 4],
        src=src,
        dst=dst,
        targets=rng.normal(size=(len(atoms), len(TARGETS))),
    )


def grow(num_atoms: int, num_rings: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One molecule, atom by atom: positions (N, 3) and which atoms are bonded, (N, N) symmetric."""
    position, bonded = np.zeros((num_atoms, 3)), np.zeros((num_atoms, num_atoms), bool)
    for atom in range(1, num_atoms):
        free = (bonded[:atom].sum(1) < MAX_BONDS).nonzero()[0]
        parent = free[rng.integers(len(free))]
        directions = rng.normal(size=(DIRECTIONS, 3))
        candidates = position[parent] + BOND_LENGTH * directions / np.linalg.norm(directions, axis=1, keepdims=True)
        nearest = np.linalg.norm(candidates[:, None] - position[:atom], axis=2).min(1)  # (DIRECTIONS,)
        position[atom] = candidates[nearest.argmax()]
        bonded[atom, parent] = bonded[parent, atom] = True
    i, j = np.triu(~bonded, 1).nonzero()
    chosen = rng.choice(len(i), num_rings, replace=False)
    bonded[i[chosen], j[chosen]] = bonded[j[chosen], i[chosen]] = True
    return position, bonded
