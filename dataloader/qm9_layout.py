"""QM9 as it is stored: the labels with their units, molecules as flat arrays, and the checks of both.

The arrays are those of DGL's `QM9EdgeDataset`, whose `qm9_edge.npz` is read here without DGL.

NumPy only: importing this file is quick.
"""

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

LAYOUT_VERSION = 1  # of the arrays in a QM9 cache: raise it with every change of what `dataloader.qm9` writes
RAW_FILES = ("gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt")  # QM9 as it was published for machine learning
GRAPHS = ("bonds", "radius", "complete")  # what is an edge: a bond, a pair closer than the radius, every pair
ELEMENTS = ("H", "C", "N", "O", "F")
ATOMIC_NUMBERS = np.array([1, 6, 7, 8, 9])  # of `ELEMENTS`, the order of the one-hot columns of `node_attr`
LARGEST = 1e15  # of any coordinate and target: the squares of larger ones are not finite in float32


@dataclass(frozen=True)
class Target:
    """A label of QM9; a stored value times `factor` is in `shown_unit`."""

    name: str
    unit: str  # as stored
    shown_unit: str  # in printouts
    factor: float
    description: str


def _energy(name: str, description: str) -> Target:
    return Target(name, "eV", "meV", 1000.0, description)


def _as_stored(name: str, unit: str, description: str) -> Target:
    return Target(name, unit, unit, 1.0, description)


TARGETS = {
    target.name: target
    for target in (
        _as_stored("mu", "D", "dipole moment"),
        _as_stored("alpha", "bohr³", "isotropic polarizability"),
        _energy("homo", "energy of the highest occupied orbital"),
        _energy("lumo", "energy of the lowest unoccupied orbital"),
        _energy("gap", "gap between both orbitals"),
        _as_stored("r2", "bohr²", "electronic spatial extent"),
        _energy("zpve", "zero point vibrational energy"),
        _energy("U0", "internal energy at 0 K"),
        _energy("U", "internal energy at 298.15 K"),
        _energy("H", "enthalpy at 298.15 K"),
        _energy("G", "free energy at 298.15 K"),
        _as_stored("Cv", "cal/(mol K)", "heat capacity at 298.15 K"),
        _energy("U0_atom", "atomisation energy at 0 K"),
        _energy("U_atom", "atomisation energy at 298.15 K"),
        _energy("H_atom", "atomisation enthalpy at 298.15 K"),
        _energy("G_atom", "atomisation free energy at 298.15 K"),
        _as_stored("A", "GHz", "rotational constant A"),
        _as_stored("B", "GHz", "rotational constant B"),
        _as_stored("C", "GHz", "rotational constant C"),
    )
}  # in the order of the columns of `Molecules.targets`


@dataclass(frozen=True)
class Molecules:
    """G molecules with ΣN atoms and ΣE directed bonds, one after the other."""

    n_node: np.ndarray  # (G,) atoms of each molecule
    n_edge: np.ndarray  # (G,) directed bonds of each molecule
    node_attr: np.ndarray  # (ΣN, 11) one-hot H C N O F, atomic number, aromatic, sp, sp2, sp3, number of bonded H
    node_pos: np.ndarray  # (ΣN, 3) Å
    edge_attr: np.ndarray  # (ΣE, 4) one-hot single, double, triple, aromatic
    src: np.ndarray  # (ΣE,) atom within its molecule; both directions of every bond, sorted by src, then dst
    dst: np.ndarray  # (ΣE,)
    targets: np.ndarray  # (G, 19) in the order and units of `TARGETS`, NaN where unknown

    def __len__(self) -> int:
        return len(self.n_node)


# Axes of each array in order of checking, and the kinds of dtype that it may have.
_SHAPES = {
    "n_node": (("G",), "iu"),
    "n_edge": (("G",), "iu"),
    "node_attr": (("ΣN", 11), "biuf"),
    "node_pos": (("ΣN", 3), "f"),
    "edge_attr": (("ΣE", 4), "biuf"),
    "src": (("ΣE",), "iu"),
    "dst": (("ΣE",), "iu"),
    "targets": (("G", len(TARGETS)), "f"),
}


def cache_settings(graph: str, radius: float) -> dict:
    """What a cache of QM9 depends on besides its source; the radius only counts where `graph` is "radius"."""
    return {"layout": LAYOUT_VERSION, "graph": graph} | ({"radius": radius} if graph == "radius" else {})


def offsets(counts: np.ndarray) -> np.ndarray:
    """Where each of G groups begins, and the end: int64 (G+1,)."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def load_molecules(path: str | Path, progress: str | None = None) -> Molecules:
    """Read and check a file in the layout of DGL's `qm9_edge.npz`; pickled objects are refused.

    Args:
        path: the file; arrays that are not in the layout are left out.
        progress: title of a progress bar; None: no bar.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; the message names file, array or molecule, what was expected and what came.
    """
    names = [field.name for field in fields(Molecules)]
    with open(path, "rb") as file:
        try:
            archive = zipfile.ZipFile(file)
        except Exception:  # a damaged file may raise anything
            raise ValueError(f"{path}: expected an .npz file, got another or a truncated one") from None
        if missing := [name for name in names if f"{name}.npy" not in archive.namelist()]:
            raise ValueError(f"{path}: expected the arrays {', '.join(names)}, got none named {', '.join(missing)}")
        arrays = {}
        for name in tqdm(names, desc=progress, unit="array", **bar_options(progress)):
            try:
                arrays[name] = _read_array(archive, name)
            except Exception as error:
                raise ValueError(f"{path}: {name}: expected an array of numbers, got a damaged one ({error})") from None
    molecules = Molecules(**arrays)
    check_molecules(molecules, str(path))
    return molecules


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of an .npz file; unlike `numpy.load` this compares its checksum, whatever size its header states."""
    with archive.open(f"{name}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # the checksum is compared where an entry ends
            raise ValueError("there is more than its header says")
        return array


def bar_options(progress: str | None) -> dict:
    """Options of a tqdm bar with this title: None is no bar, and a title makes one on a terminal only."""
    return {"disable": True if progress is None else None}


def check_molecules(molecules: Molecules, origin: str) -> None:
    """Raise ValueError unless the arrays are molecules that a network can be trained on.

    Args:
        molecules: what to check; unknown targets (NaN) are fine.
        origin: where they come from, for the message: it names origin, molecule and atom or edge, all counted from 0.
    """
    _check_shapes(molecules, origin)
    n_node, n_edge = molecules.n_node.astype(np.int64), molecules.n_edge.astype(np.int64)
    starts = {"atom": offsets(n_node), "edge": offsets(n_edge)}

    def require(good: np.ndarray | np.bool_, row: str, expected: str, came: np.ndarray):
        """`good` and `came` have a row for each molecule, atom or edge."""
        if good.all():
            return
        first = int(np.argmin(good))
        where = f"molecule {first}"
        if row in starts:
            molecule = int(np.searchsorted(starts[row], first, side="right")) - 1
            where = f"molecule {molecule}, {row} {first - starts[row][molecule]}"
        raise ValueError(f"{origin}: {where}: expected {expected}, got {came[first].tolist()}")

    attr, positions = molecules.node_attr, molecules.node_pos.astype(np.float32)
    one_hot = attr[:, None, 5] == ATOMIC_NUMBERS  # (ΣN, 5)
    good = (attr[:, :5] == one_hot).all(1) & one_hot.any(1)
    require(good, "atom", "node_attr with one-hot H C N O F and the atomic number of one of them", attr[:, :6])
    good = ((attr >= 0) & (attr <= 255) & (attr == np.floor(attr))).all(1)
    require(good, "atom", "node_attr in whole numbers from 0 to 255", attr)
    good = (np.abs(positions) < LARGEST).all(1)
    require(good, "atom", f"finite coordinates in node_pos, below {LARGEST:.0e}", positions)
    require(_apart(positions, n_node), "atom", "a place of its own in node_pos, which no other atom has", positions)

    src, dst = molecules.src.astype(np.int64), molecules.dst.astype(np.int64)
    size, ends = np.repeat(n_node, n_edge), np.stack([src, dst], axis=1)  # (ΣE,), (ΣE, 2)
    good = ((ends >= 0) & (ends < size[:, None])).all(1)
    require(good, "edge", "src and dst in 0 … n_node - 1", ends)
    require(src != dst, "edge", "a bond between two atoms", ends)
    pair_starts = np.repeat(offsets(n_node**2)[:-1], n_edge)
    pairs, reverse = pair_starts + src * size + dst, pair_starts + dst * size + src  # (ΣE,) a number for each pair
    good = np.diff(pairs, prepend=-1) > 0
    require(good, "edge", "edges sorted by src, then dst, each once", ends)
    opposite = np.searchsorted(pairs, reverse).clip(max=len(pairs) - 1)
    require(pairs[opposite] == reverse, "edge", "the opposite edge as well", ends)
    bonds = molecules.edge_attr
    good = ((bonds == 0) | (bonds == 1)).all(1) & (bonds.sum(1) == 1)
    require(good, "edge", "edge_attr one-hot single, double, triple, aromatic", bonds)
    require((bonds == bonds[opposite]).all(1), "edge", "the same edge_attr as the opposite edge", bonds)
    good = ~(np.abs(molecules.targets) >= LARGEST).any(1)
    require(good, "molecule", f"targets that are numbers below {LARGEST:.0e} or NaN", molecules.targets)


def _check_shapes(molecules: Molecules, origin: str) -> None:
    """Raise ValueError unless types and shapes of all arrays are right and the sizes add up."""
    sizes: dict[str | int, int] = {}
    for name, (axes, kinds) in _SHAPES.items():
        array = getattr(molecules, name)
        if array.dtype.kind not in kinds:
            wanted = {"iu": "integers", "f": "floating point numbers"}.get(kinds, "numbers")
            raise ValueError(f"{origin}: {name}: expected {wanted}, got {array.dtype}")
        expected = tuple(sizes.get(axis, axis) for axis in axes)
        if array.ndim != len(axes) or any(
            size != (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
            for axis, size in zip(axes, array.shape)
        ):
            raise ValueError(f"{origin}: {name}: expected shape ({', '.join(map(str, expected))}), got {array.shape}")
    if sizes["G"] == 0:
        raise ValueError(f"{origin}: expected at least one molecule, got none")
    for name, low, axis in (("n_node", 1, "ΣN"), ("n_edge", 0, "ΣE")):
        counts = getattr(molecules, name).astype(np.int64)
        if (counts < low).any():
            first = int(np.argmax(counts < low))
            raise ValueError(f"{origin}: molecule {first}: expected {name} of at least {low}, got {counts[first]}")
        if (total := counts.sum()) != sizes[axis]:
            raise ValueError(f"{origin}: expected {axis} = {sizes[axis]} as sum of {name}, got {total}")


def _apart(positions: np.ndarray, n_node: np.ndarray) -> np.ndarray:
    """(ΣN,) bool: no earlier atom of the molecule is at the very same place."""
    molecule = np.repeat(np.arange(len(n_node)), n_node)
    order = np.lexsort((*positions.T, molecule))
    same = (np.diff(molecule[order]) == 0) & (np.diff(positions[order], axis=0) == 0).all(1)
    apart = np.ones(len(positions), bool)
    apart[order[1:]] = ~same
    return apart
