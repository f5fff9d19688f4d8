"""Molecules of chemical files in the arrays that QM9 comes in: SDF, XYZ, SMILES, and the raw files of QM9.

    molecules, names, smiles, refused = read_sdf("molecules.sdf")

The readers that take a user's file judge each molecule by itself: what cannot be used is left out and named in
`refused`, and the caller decides whether to go on without it. RDKit, an optional extra, is imported where it is needed.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from dataloader.qm9_layout import ATOMIC_NUMBERS, LARGEST, RAW_FILES, TARGETS, Molecules, bar_options, check_molecules

if TYPE_CHECKING:
    from rdkit.Chem import Mol

ELEMENTS = ("H", "C", "N", "O", "F")
BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")  # RDKit's names in the order of `Molecules.edge_attr`
CLOSEST = 0.4  # Å between two atoms; the shortest bond, that of H2, has 0.74
BOND_REACH = 1.15  # atoms closer than this times the sum of their covalent radii are bonded
EMBEDDING_SEED = 0  # of the geometries guessed for SMILES
EMBEDDING_STEPS = 2000  # of the force field, at most
BOND_ORDER_TRIALS = 10_000  # of bond orders for an XYZ; molecules of QM9 need fewer than ten

HARTREE = 27.211386246  # eV
KCAL_PER_MOL = HARTREE / 627.509  # eV, by the factor that the atomisation energies of gdb9.sdf.csv were made with
# Columns of gdb9.sdf.csv in the order of `TARGETS`, and what takes each to the unit there.
RAW_COLUMNS = {
    "mu": 1.0, "alpha": 1.0, "homo": HARTREE, "lumo": HARTREE, "gap": HARTREE, "r2": 1.0, "zpve": HARTREE,
    "u0": HARTREE, "u298": HARTREE, "h298": HARTREE, "g298": HARTREE, "cv": 1.0,
    "u0_atom": KCAL_PER_MOL, "u298_atom": KCAL_PER_MOL, "h298_atom": KCAL_PER_MOL, "g298_atom": KCAL_PER_MOL,
    "A": 1.0, "B": 1.0, "C": 1.0,
}  # fmt: skip
REFUSED_SHOWN = 10  # molecules that a message names


class ReadMolecules(NamedTuple):
    """The G usable molecules of a file, in its order; at least one."""

    molecules: Molecules  # targets are NaN where the file has none
    names: list[str]  # G, as in the file; "molecule 3" where it has none
    smiles: list[str]  # G, without hydrogens
    refused: list[str]  # "name: what was expected, what came" of each molecule that cannot be used


def read_sdf(path: str | Path, task: str | None = None) -> ReadMolecules:
    """Molecules of an SDF with 3D coordinates and every hydrogen as an atom.

    Args:
        path: the file.
        task: a name in `TARGETS`; where a molecule has a property of that name, it is its target, in the stored unit.

    Raises:
        ImportError: RDKit is not installed.
        OSError: the file cannot be read.
        ValueError: there is no molecule, or none that can be used.
    """
    rdkit = _import_rdkit()
    supplier = rdkit.Chem.SDMolSupplier()
    supplier.SetData(Path(path).read_text(errors="replace"), sanitize=False, removeHs=False)
    if not len(supplier):
        raise ValueError(f"{path}: expected molecules in SDF, got none")

    def read(i: int) -> tuple[Mol, float]:
        with rdkit.rdBase.CaptureErrorLog() as log:
            mol = supplier[i]
        if mol is None:
            raise ValueError(f"expected a record in SDF, got a damaged one ({_reason(log.messages)})")
        if not (mol.GetNumConformers() and mol.GetConformer().Is3D()):
            raise ValueError(
                "expected 3D coordinates, got a 2D drawing; make a 3D geometry, or give its SMILES "
                "(for a molecule that is flat, the second line of the record has to say 3D)"
            )
        return mol, _float(mol.GetProp(task), f"property {task}") if task and mol.HasProp(task) else np.nan

    return _collect(path, [supplier.GetItemText(i).split("\n", 1)[0] for i in range(len(supplier))], read, task)


def read_xyz(path: str | Path) -> ReadMolecules:
    """Molecules of an XYZ file of one or more frames, each with a comment line that names the molecule.

    Bonds are determined from distances, bond orders for a molecule without net charge. Columns after the position
    are left out.

    Args:
        path: the file.

    Raises:
        ImportError: RDKit is not installed.
        OSError: the file cannot be read.
        ValueError: there is no molecule, or none that can be used, or the number of atoms of a frame is wrong.
    """
    rdkit = _import_rdkit()
    frames = _xyz_frames(path)

    def read(i: int) -> tuple[Mol, float]:
        symbols, positions = zip(*map(_xyz_atom, frames[i][1]))
        _check_apart(np.array(positions))
        mol = rdkit.Chem.RWMol()
        conformer = rdkit.Chem.Conformer(len(symbols))
        for atom, symbol in enumerate(symbols):
            mol.AddAtom(rdkit.Chem.Atom(symbol))
            conformer.SetAtomPosition(atom, positions[atom])
        mol.AddConformer(conformer)
        try:
            rdkit.Chem.rdDetermineBonds.DetermineBonds(
                mol, embedChiral=False, covFactor=BOND_REACH, useVdw=True, maxIterations=BOND_ORDER_TRIALS
            )
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"expected positions of a neutral molecule with all its hydrogens, found no bonds that fit ({error}); "
                "give an SDF with bonds"
            ) from None
        return mol, np.nan

    return _collect(path, [comment for comment, _ in frames], read)


def read_smiles(source: str | Path | Sequence[str]) -> ReadMolecules:
    """Molecules of SMILES; their geometry is a guess: one conformer, relaxed in the force field MMFF94.

    Warns that predictions are then for this geometry and not for that of quantum chemistry, as in QM9.

    Args:
        source: a file with a SMILES and, after white space, a name in each line; or a list of such lines.

    Raises:
        ImportError: RDKit is not installed.
        OSError: the file cannot be read.
        ValueError: there is no molecule, or none that can be used.
    """
    rdkit = _import_rdkit()
    origin: str | Path = "SMILES"
    lines: Sequence[str]
    if isinstance(source, str | Path):
        origin, lines = source, Path(source).read_text(errors="replace").splitlines()
    else:
        lines = source
    records = [line.split(maxsplit=1) for line in lines if line.strip()]
    if not records:
        raise ValueError(f"{origin}: expected a SMILES in each line, got none")
    warnings.warn(
        "the geometries of SMILES are guessed with a force field; the molecules that QM9 networks are trained on "
        "have geometries of quantum chemistry, so expect larger errors",
        stacklevel=2,
    )

    def read(i: int) -> tuple[Mol, float]:
        with rdkit.rdBase.CaptureErrorLog() as log:
            mol = rdkit.Chem.MolFromSmiles(records[i][0])
        if mol is None:
            raise ValueError(f"expected a SMILES, got {records[i][0]!r} ({_reason(log.messages)})")
        _check_composition(mol)
        mol = rdkit.Chem.AddHs(mol)
        parameters = rdkit.Chem.rdDistGeom.ETKDGv3()
        parameters.randomSeed = EMBEDDING_SEED
        force_field = rdkit.Chem.rdForceFieldHelpers
        if (
            rdkit.Chem.rdDistGeom.EmbedMolecule(mol, parameters) != 0
            or force_field.MMFFOptimizeMolecule(mol, maxIters=EMBEDDING_STEPS) != 0
        ):
            raise ValueError("expected a molecule that MMFF94 can relax, found no geometry; give it as SDF or XYZ")
        return mol, np.nan

    return _collect(origin, [record[-1] for record in records], read)


def read_raw_qm9(directory: str | Path, progress: str | None = None) -> Molecules:
    """QM9 from the files of its authors, in the order of the file, without what `uncharacterized.txt` lists.

    Energies are converted from Hartree, atomisation energies from kcal/mol, to eV. Where RDKit does not accept the
    valences of a molecule (some zwitterions, whose charges the file does not give), it gets the features all the same.

    Args:
        directory: where `gdb9.sdf`, `gdb9.sdf.csv` and `uncharacterized.txt` are.
        progress: title of a progress bar; None: no bar.

    Raises:
        ImportError: RDKit is not installed.
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or they do not belong together.
    """
    rdkit = _import_rdkit()
    sdf_path, csv_path, list_path = (Path(directory) / name for name in RAW_FILES)
    for path in (sdf_path, csv_path, list_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; raw QM9 is {', '.join(RAW_FILES)} in one directory")
    left_out = _uncharacterized(list_path)
    ids, targets = _raw_targets(csv_path)
    supplier = rdkit.Chem.SDMolSupplier(str(sdf_path), sanitize=False, removeHs=False)
    if len(supplier) != len(ids):
        raise ValueError(f"{sdf_path}: expected the {len(ids)} molecules of {csv_path.name}, got {len(supplier)}")

    kept = [i for i, name in enumerate(ids) if name not in left_out]
    if not kept:
        raise ValueError(f"{csv_path}: expected molecules that {list_path.name} does not list, got none")
    parts = []
    with rdkit.rdBase.BlockLogs():
        for i in tqdm(kept, desc=progress, unit="molecule", **bar_options(progress)):
            mol = supplier[i]
            try:
                came = "a damaged record" if mol is None else repr(mol.GetProp("_Name"))
            except UnicodeDecodeError as error:
                came = repr(error.object)
            if came != repr(ids[i]):
                raise ValueError(f"{sdf_path}: expected {ids[i]} as molecule {i + 1}, got {came}")
            try:
                _sanitize(mol, any_valence=True)
                _check_bonds(mol)
            except ValueError as error:
                raise ValueError(f"{sdf_path}: {ids[i]}: {error}") from None
            parts.append(_arrays(mol))
    molecules = _join(parts, targets[kept])
    check_molecules(molecules, str(sdf_path))
    return molecules


def _import_rdkit():
    """The package `rdkit`, with the modules that are used here."""
    try:
        import rdkit.Chem.rdDetermineBonds
        import rdkit.Chem.rdDistGeom
        import rdkit.Chem.rdForceFieldHelpers
    except ImportError as error:
        raise ImportError(f"RDKit is needed to read molecules: pip install rdkit ({error})") from error
    return rdkit


def _collect(
    origin: str | Path, names: list[str], read: Callable[[int], tuple[Mol, float]], task: str | None = None
) -> ReadMolecules:
    """All molecules that can be used.

    Args:
        origin: where they come from.
        names: of the molecules; a name may be empty.
        read: returns the i-th molecule and its value of the task, or raises ValueError.
        task: a name in `TARGETS`.

    Raises:
        ValueError: none can be used.
    """
    from rdkit import Chem, rdBase

    parts, targets, used, smiles, refused = [], [], [], [], []
    with rdBase.BlockLogs():
        for i, name in enumerate(tqdm(names, unit="molecule", **bar_options("reading molecules"))):
            name = name.strip() or f"molecule {i + 1}"
            try:
                mol, value = read(i)
                _sanitize(mol)
                _check_bonds(mol)
                _check_composition(mol)
                _check_atoms(mol)
                arrays, written = _arrays(mol), Chem.MolToSmiles(Chem.RemoveHs(mol))
            except ValueError as error:
                refused.append(f"{name}: {error}")
                continue
            parts.append(arrays)
            targets.append([value if key == task else np.nan for key in TARGETS])
            used.append(name)
            smiles.append(written)
    if not used:
        raise ValueError(f"{origin}: expected molecules that can be used, got none: {describe_refused(refused)}")
    return ReadMolecules(_join(parts, np.array(targets)), used, smiles, refused)


def describe_refused(refused: list[str]) -> str:
    """The first of the molecules that cannot be used, a line each."""
    lines = refused[:REFUSED_SHOWN] + [f"and {len(refused) - REFUSED_SHOWN} more"] * (len(refused) > REFUSED_SHOWN)
    return "".join(f"\n  {line}" for line in lines)


def _check_bonds(mol: Mol) -> None:
    """Raise ValueError unless all bonds of a sanitized molecule are of a kind that QM9 has."""
    for bond in mol.GetBonds():
        kind, ends = bond.GetBondType().name, (bond.GetBeginAtom(), bond.GetEndAtom())
        where = f"between atoms {bond.GetBeginAtomIdx() + 1} and {bond.GetEndAtomIdx() + 1}"
        if kind not in BONDS:
            raise ValueError(f"expected bonds {', '.join(BONDS)}, got {kind} {where}")
        if kind == "AROMATIC" and not all(atom.GetIsAromatic() for atom in ends):
            raise ValueError(f"expected aromatic bonds in aromatic rings only, got one {where}")


def _check_composition(mol: Mol) -> None:
    """Raise ValueError unless this is one neutral, closed-shell molecule of the elements of QM9."""
    from rdkit import Chem

    unknown = {atom.GetSymbol() for atom in mol.GetAtoms()} - set(ELEMENTS)
    if unknown:
        raise ValueError(f"expected the elements {', '.join(ELEMENTS)}, got {', '.join(sorted(unknown))}")
    charge = Chem.GetFormalCharge(mol)
    unpaired = sum(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms())
    if charge or unpaired:
        raise ValueError(
            f"expected no charge and no unpaired electrons, got charge {charge:+d} and {unpaired} unpaired"
        )
    fragments = len(Chem.GetMolFrags(mol))
    if fragments > 1:
        raise ValueError(f"expected one molecule, got {fragments} that no bond connects; give each by itself")


def _check_atoms(mol: Mol) -> None:
    """Raise ValueError unless there is a bond, every hydrogen is an atom, and atoms are apart."""
    if not mol.GetNumBonds():
        raise ValueError(f"expected at least two atoms with a bond between them, got {mol.GetNumAtoms()} without")
    implied = sum(atom.GetTotalNumHs() for atom in mol.GetAtoms())
    if implied:
        raise ValueError(f"expected every hydrogen as an atom with a position, got {implied} only implied; add them")
    _check_apart(mol.GetConformer().GetPositions())


def _check_apart(positions: np.ndarray) -> None:
    """Raise ValueError if some of the positions (n, 3) are too close for atoms, or not finite."""
    if not (np.abs(positions) < LARGEST).all():
        raise ValueError(f"expected finite coordinates below {LARGEST:.0e} Å, got others")
    i, j = np.triu_indices(len(positions), k=1)
    apart = np.linalg.norm(positions[i] - positions[j], axis=1)
    if not (apart >= CLOSEST).all():
        first = int(np.argmin(apart >= CLOSEST))
        raise ValueError(
            f"expected atoms at least {CLOSEST} Å apart, got {apart[first]:.3f} Å between atoms {i[first] + 1} "
            f"and {j[first] + 1}"
        )


def _sanitize(mol: Mol, any_valence: bool = False) -> None:
    """Find rings, aromatic atoms and hybridisation; ValueError where valences are impossible, unless these may be any.

    Args:
        mol: changed in place.
        any_valence: go on without charges that would make valences possible.
    """
    from rdkit import Chem

    try:
        try:
            Chem.SanitizeMol(mol)
        except Chem.MolSanitizeException as error:
            if not any_valence:
                raise ValueError(f"expected possible valences and rings, got none: {error}") from None
            mol.UpdatePropertyCache(strict=False)
            Chem.SanitizeMol(mol, Chem.SanitizeFlags.SANITIZE_ALL ^ Chem.SanitizeFlags.SANITIZE_PROPERTIES)
    except RuntimeError as error:  # such as a charge beyond the periodic table; of its lines the second is the reason
        reason = str(error).splitlines()[:2][-1].strip()
        raise ValueError(f"expected possible atoms and bonds, got others: {reason}") from None


def _arrays(mol: Mol) -> dict[str, np.ndarray]:
    """A sanitized molecule of n atoms and e bonds, each in both directions, sorted by src, then dst.

    Returns:
        node_attr (n, 11), node_pos (n, 3), src (2e,), dst (2e,), edge_attr (2e, 4), as in `Molecules`.
    """
    from rdkit.Chem import HybridizationType

    sp = [int(kind) for kind in (HybridizationType.SP, HybridizationType.SP2, HybridizationType.SP3)]
    atoms = np.array([(a.GetAtomicNum(), a.GetIsAromatic(), int(a.GetHybridization())) for a in mol.GetAtoms()])
    number, aromatic, hybridization = atoms.T[:, :, None]  # (n, 1)
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), BONDS.index(b.GetBondType().name)) for b in mol.GetBonds()]
    both = bonds + [(end, begin, order) for begin, end, order in bonds]
    src, dst, order = np.array(sorted(both), "int32").reshape(-1, 3).T
    hydrogens = np.bincount(src[number[dst, 0] == 1], minlength=len(atoms))[:, None]
    columns = [number == ATOMIC_NUMBERS, number, aromatic, hybridization == sp, hydrogens]
    return {
        "node_attr": np.concatenate(columns, axis=1, dtype="float32"),
        "node_pos": mol.GetConformer().GetPositions().astype("float32"),
        "src": src,
        "dst": dst,
        "edge_attr": np.eye(4, dtype="float32")[order],
    }


def _join(parts: list[dict[str, np.ndarray]], targets: np.ndarray) -> Molecules:
    """Molecules, one after another, with their targets (G, 19)."""
    return Molecules(
        n_node=np.array([len(part["node_pos"]) for part in parts], "int32"),
        n_edge=np.array([len(part["src"]) for part in parts], "int32"),
        **{key: np.concatenate([part[key] for part in parts]) for key in parts[0]},
        targets=targets,
    )


def _reason(log: str) -> str:
    """The first message that RDKit logged, without the time."""
    messages = re.findall(r"^\[[\d:]+\] (?:ERROR: )?(.+)$", log, re.MULTILINE)
    return messages[0] if messages else "RDKit gives no reason"


def _float(text: str, what: str) -> float:
    """The number that a text says."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{what}: expected a number, got {text!r}") from None


def _xyz_frames(path: str | Path) -> list[tuple[str, list[str]]]:
    """Comment and lines of atoms of each frame."""
    lines = Path(path).read_text(errors="replace").rstrip().splitlines()
    frames, at = [], 0
    while at < len(lines):
        count = lines[at].strip()
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"{path}: line {at + 1}: expected the number of atoms of a molecule, got {lines[at]!r}")
        atoms = lines[at + 2 : at + 2 + int(count)]
        if len(atoms) < int(count):
            raise ValueError(
                f"{path}: line {at + 1}: expected {count} lines of atoms after a comment, got {len(atoms)}"
            )
        frames.append((lines[at + 1], atoms))
        at += 2 + int(count)
    if not frames:
        raise ValueError(f"{path}: expected molecules in XYZ, got an empty file")
    return frames


def _xyz_atom(line: str) -> tuple[str, list[float]]:
    """Symbol and position (Å)."""
    symbol, *columns = line.split() or [""]
    try:
        position = [float(column) for column in columns[:3]]
    except ValueError:
        position = []
    if len(position) < 3 or not np.isfinite(position).all():
        raise ValueError(f"expected an element and three coordinates, got {line!r}")
    if symbol not in ELEMENTS:
        raise ValueError(f"expected the elements {', '.join(ELEMENTS)}, got {symbol}")
    return symbol, position


def _uncharacterized(path: Path) -> set[str]:
    """Ids (`gdb_58`) of the molecules whose geometry is not that of their SMILES: the first column of a table."""
    lines = path.read_text(errors="replace").split("\n")
    rules = [i for i, line in enumerate(lines) if line.startswith("===")]
    numbers = [(line.split() or [""])[0] for line in lines[rules[1] + 1 : rules[2]]] if len(rules) == 3 else []
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise ValueError(
            f"{path}: expected a table of molecules with rules of === above and below its heading and at its end, "
            "got another or a truncated file"
        )
    return {f"gdb_{number}" for number in numbers}


def _raw_targets(path: Path) -> tuple[list[str], np.ndarray]:
    """Ids of all molecules of `gdb9.sdf.csv`, and their targets (G, 19) in the units of `TARGETS`."""
    ids, rows = [], []
    with path.open(newline="", errors="replace") as file:
        reader = csv.DictReader(file, restval="")
        try:
            if missing := {"mol_id", *RAW_COLUMNS}.difference(reader.fieldnames or []):
                raise ValueError(f"{path}: expected the columns of QM9, got none named {', '.join(sorted(missing))}")
            for row in reader:
                ids.append(row["mol_id"])
                rows.append([_float(row[column], f"{path}: {row['mol_id']}: {column}") for column in RAW_COLUMNS])
        except csv.Error as error:
            raise ValueError(f"{path}: expected a table with commas, got a damaged one ({error})") from None
    return ids, np.array(rows).reshape(-1, len(RAW_COLUMNS)) * list(RAW_COLUMNS.values())
