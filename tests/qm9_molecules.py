"""Small molecules in the layout of QM9, written by hand or made from these."""

from dataclasses import asdict, replace

import numpy as np

from dataloader.qm9_layout import TARGETS, Molecules, offsets

ELEMENTS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
BONDS = {"-": 0, "=": 1, "#": 2, ":": 3}  # single, double, triple, aromatic
HYBRIDS = {"sp": 7, "sp2": 8, "sp3": 9}  # columns of node_attr


def _ring(radius: float) -> list[tuple[float, float, float]]:
    return [(radius * np.cos(angle), radius * np.sin(angle), 0.0) for angle in np.arange(6) * np.pi / 3]


# Name: elements, hybridisation of heavy atoms (one for all), positions in Å, bonds.
MOLECULES = {
    "methane": (
        "CHHHH", "sp3",
        [(0, 0, 0), (0.629, 0.629, 0.629), (0.629, -0.629, -0.629), (-0.629, 0.629, -0.629), (-0.629, -0.629, 0.629)],
        ["0-1", "0-2", "0-3", "0-4"],
    ),
    "ammonia": (
        "NHHH", "sp3",
        [(0, 0, 0.116), (0, 0.94, -0.27), (0.814, -0.47, -0.27), (-0.814, -0.47, -0.27)],
        ["0-1", "0-2", "0-3"],
    ),
    "water": ("OHH", "sp3", [(0, 0, 0.119), (0, 0.763, -0.477), (0, -0.763, -0.477)], ["0-1", "0-2"]),
    "ethyne": (
        "CCHH", "sp",
        [(0, 0, 0.601), (0, 0, -0.601), (0, 0, 1.662), (0, 0, -1.662)],
        ["0#1", "0-2", "1-3"],
    ),
    "hydrogen cyanide": ("CNH", "sp", [(0, 0, 0), (0, 1.157, 0), (0, -1.066, 0)], ["0#1", "0-2"]),
    "formaldehyde": (
        "COHH", "sp2",
        [(0, 0, -0.53), (0, 0, 0.676), (0, 0.934, -1.11), (0, -0.934, -1.11)],
        ["0=1", "0-2", "0-3"],
    ),
    "fluoromethane": (
        "CFHHH", "sp3",
        [(0, 0, -0.634), (0, 0, 0.749), (1.027, 0, -0.986), (-0.5135, 0.889, -0.986), (-0.5135, -0.889, -0.986)],
        ["0-1", "0-2", "0-3", "0-4"],
    ),
    "benzene": (
        "CCCCCCHHHHHH", "sp2", _ring(1.397) + _ring(2.484),
        ["0:1", "1:2", "2:3", "3:4", "4:5", "0:5", "0-6", "1-7", "2-8", "3-9", "4-10", "5-11"],
    ),
    "oxygen atom": ("O", "sp3", [(0.1, 0.2, 0.3)], []),  # one atom; QM9 has none
    "two neon-like atoms": ("CC", "sp3", [(0, 0, 0), (0, 0, 3.0)], []),  # no bonds; QM9 has none
}  # fmt: skip
SMALL = tuple(MOLECULES)[:8]  # methane to benzene


def small_molecules(*names: str) -> Molecules:
    """The molecules with these names, by default methane to benzene; all 19 targets are known, and all made up."""
    return concatenate([_molecule(*MOLECULES[name]) for name in names or SMALL])


def many_molecules(count: int, seed: int = 0) -> Molecules:
    """Methane to benzene again and again, the atoms moved by 0.05 Å at random; targets depend on composition and size.

    Every target is 0.1·(carbons + 2·nitrogens + 3·oxygens + 4·fluorines) + mean distance from the centre, times a
    factor of its own: something that a small network learns at once.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for i in range(count):
        molecule = small_molecules(SMALL[i % len(SMALL)])
        moved = molecule.node_pos + rng.normal(scale=0.05, size=molecule.node_pos.shape).astype(np.float32)
        extent = np.linalg.norm(moved - moved.mean(0), axis=1).mean()
        value = 0.1 * (molecule.node_attr[:, 1:5].sum(0) @ [1, 2, 3, 4]) + extent
        parts.append(replace(molecule, node_pos=moved, targets=value * np.arange(1.0, 20)[None]))
    return concatenate(parts)


def concatenate(parts: list[Molecules]) -> Molecules:
    """Molecules one after the other."""
    return Molecules(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def save(path, molecules: Molecules, **changes) -> None:
    """Write an .npz file in the layout of DGL's QM9EdgeDataset; changes replace arrays, None leaves one out."""
    arrays = asdict(molecules) | changes
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})


def one_by_one(molecules: Molecules) -> list[Molecules]:
    """Each molecule alone."""
    nodes, edges = offsets(molecules.n_node), offsets(molecules.n_edge)
    return [
        Molecules(
            **{name: getattr(molecules, name)[i : i + 1] for name in ("n_node", "n_edge", "targets")},
            **{name: getattr(molecules, name)[nodes[i] : nodes[i + 1]] for name in ("node_attr", "node_pos")},
            **{name: getattr(molecules, name)[edges[i] : edges[i + 1]] for name in ("edge_attr", "src", "dst")},
        )
        for i in range(len(molecules))
    ]


def _molecule(elements: str, hybrid: str, positions: list, bonds: list[str]) -> Molecules:
    numbers = np.array([ELEMENTS[element] for element in elements])
    edges = []
    for bond in bonds:
        kind = next(symbol for symbol in BONDS if symbol in bond)
        i, j = map(int, bond.split(kind))
        edges += [(i, j, BONDS[kind]), (j, i, BONDS[kind])]
    src, dst, kinds = np.array(sorted(edges), dtype=np.int32).reshape(-1, 3).T
    attr = np.zeros((len(elements), 11), np.float32)
    attr[:, :5] = numbers[:, None] == list(ELEMENTS.values())
    attr[:, 5] = numbers
    attr[np.unique(src[kinds == BONDS[":"]]), 6] = 1
    attr[numbers > 1, HYBRIDS[hybrid]] = 1
    np.add.at(attr[:, 10], src[numbers[dst] == 1], 1)
    return Molecules(
        n_node=np.array([len(elements)], np.int32),
        n_edge=np.array([len(edges)], np.int32),
        node_attr=attr,
        node_pos=np.array(positions, np.float32),
        edge_attr=np.eye(4, dtype=np.float32)[kinds],
        src=src,
        dst=dst,
        targets=(np.arange(1.0, 1 + len(TARGETS)) * -0.1 * numbers.sum())[None],
    )
