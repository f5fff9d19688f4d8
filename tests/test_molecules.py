"""Molecules through RDKit: SDF, XYZ, SMILES and raw QM9 against hand-written arrays, and what is refused."""

import os
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from qm9_molecules import SMALL, concatenate, one_by_one, small_molecules

from dataloader import molecules
from dataloader.molecules import RAW_COLUMNS, read_raw_qm9, read_sdf, read_smiles, read_xyz
from dataloader.qm9_layout import TARGETS, Molecules, check_molecules

pytest.importorskip("rdkit", reason="RDKit is not installed")
from rdkit import Chem  # noqa: E402

SHARED = Path(os.environ.get("SE3_SHARED", Path(__file__).parent.parent.parent / "shared"))
QM9_FILE = SHARED / "qm9" / "qm9_edge.npz"
BOND_TYPES = Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE, Chem.BondType.AROMATIC


def to_mol(molecule: Molecules, name: str = "") -> Chem.Mol:
    """The RDKit molecule with the atoms, positions and bonds of the only one in `molecule`."""
    mol = Chem.RWMol()
    conformer = Chem.Conformer(int(molecule.n_node[0]))
    for i, (attr, position) in enumerate(zip(molecule.node_attr, molecule.node_pos)):
        atom = Chem.Atom(int(attr[5]))
        atom.SetIsAromatic(bool(attr[6]))
        atom.SetNoImplicit(True)
        mol.AddAtom(atom)
        conformer.SetAtomPosition(i, position.astype(float).tolist())
    mol.AddConformer(conformer)
    for src, dst, kind in zip(molecule.src, molecule.dst, molecule.edge_attr.argmax(1)):
        if src < dst:
            mol.AddBond(int(src), int(dst), BOND_TYPES[kind])
    mol.SetProp("_Name", name)
    return mol


def write_sdf(path: Path, mols: list[Chem.Mol]) -> Path:
    """Bonds single, double and triple in turn, as most programs write aromatic molecules."""
    with Chem.SDWriter(str(path)) as writer:
        for mol in mols:
            writer.write(mol)
    return path


def write_xyz(path: Path, mols: list[Chem.Mol]) -> Path:
    def frame(mol):
        lines = Chem.MolToXYZBlock(mol).splitlines()
        return "\n".join([lines[0], mol.GetProp("_Name"), *lines[2:], ""])

    path.write_text("".join(map(frame, mols)))
    return path


def small_mols() -> list[Chem.Mol]:
    return [to_mol(molecule, name) for name, molecule in zip(SMALL, one_by_one(small_molecules()))]


def assert_same_molecules(came: Molecules, expected: Molecules, position_error: float, targets: bool = False):
    for name in (field.name for field in fields(Molecules)):
        if name == "node_pos":
            np.testing.assert_allclose(came.node_pos, expected.node_pos, atol=position_error, rtol=0)
        elif name != "targets" or targets:
            np.testing.assert_array_equal(getattr(came, name), getattr(expected, name), err_msg=name)
            assert getattr(came, name).dtype == getattr(expected, name).dtype, name


# ------------------------------------------------------------------------------------------------------------ readers


def test_sdf_and_xyz_give_the_hand_written_arrays(tmp_path):
    mols = small_mols()
    for result in (read_sdf(write_sdf(tmp_path / "a.sdf", mols)), read_xyz(write_xyz(tmp_path / "a.xyz", mols))):
        assert_same_molecules(result.molecules, small_molecules(), position_error=6e-5)
        assert np.isnan(result.molecules.targets).all() and result.molecules.targets.shape == (len(SMALL), len(TARGETS))
        assert result.names == list(SMALL) and not result.refused
        assert result.smiles == ["C", "N", "O", "C#C", "C#N", "C=O", "CF", "c1ccccc1"]


def test_aromatic_bonds_of_an_sdf(tmp_path):
    """Some programs write them as such."""
    with Chem.SDWriter(str(tmp_path / "a.sdf")) as writer:
        writer.SetKekulize(False)
        writer.write(small_mols()[-1])
    assert "  1  2  4  0" in (tmp_path / "a.sdf").read_text()
    assert_same_molecules(read_sdf(tmp_path / "a.sdf").molecules, small_molecules("benzene"), position_error=6e-5)


# SMILES, and of every heavy atom: aromatic, hybridisation, bonded hydrogens.
HEAVY_ATOMS = {
    "CC#N": [(0, 3, 3), (0, 1, 0), (0, 1, 0)],
    "O=C=O": [(0, 2, 0), (0, 1, 0), (0, 2, 0)],
    "c1cc[nH]c1": [(1, 2, 1), (1, 2, 1), (1, 2, 1), (1, 2, 1), (1, 2, 1)],
    "c1ccoc1": [(1, 2, 1), (1, 2, 1), (1, 2, 1), (1, 2, 0), (1, 2, 1)],
    "C[N+](=O)[O-]": [(0, 3, 3), (0, 2, 0), (0, 2, 0), (0, 2, 0)],
    "OC(F)C=N": [(0, 3, 1), (0, 3, 1), (0, 3, 0), (0, 2, 1), (0, 2, 1)],
}


def test_smiles():
    with pytest.warns(UserWarning, match="geometries of SMILES are guessed with a force field"):
        result = read_smiles(list(HEAVY_ATOMS))
    assert result.names == result.smiles or set(result.names) == set(HEAVY_ATOMS)
    check_molecules(result.molecules, "SMILES")
    for molecule, (smiles, expected) in zip(one_by_one(result.molecules), HEAVY_ATOMS.items(), strict=True):
        heavy = molecule.node_attr[molecule.node_attr[:, 0] == 0]
        aromatic, hybrid, hydrogens = heavy[:, 6], heavy[:, 7:10] @ [1, 2, 3], heavy[:, 10]
        assert list(zip(aromatic, hybrid, hydrogens)) == expected, smiles
        assert (molecule.node_attr[molecule.node_attr[:, 0] == 1, 5:] == [1, 0, 0, 0, 0, 0]).all(), smiles
        lengths = np.linalg.norm(molecule.node_pos[molecule.src] - molecule.node_pos[molecule.dst], axis=1)
        assert 0.9 < lengths.min() and lengths.max() < 1.6, smiles
    with pytest.warns(UserWarning):
        again = read_smiles(list(HEAVY_ATOMS))
    np.testing.assert_array_equal(again.molecules.node_pos, result.molecules.node_pos)


@pytest.mark.filterwarnings("ignore:the geometries of SMILES")
def test_smiles_of_a_file_have_names(tmp_path):
    (tmp_path / "a.smi").write_text("CO methyl alcohol\n\nC\n")
    result = read_smiles(tmp_path / "a.smi")
    assert (result.names, result.smiles) == (["methyl alcohol", "C"], ["CO", "C"])
    np.testing.assert_array_equal(result.molecules.n_node, [6, 5])


def test_a_property_of_the_name_of_the_task_is_its_target(tmp_path):
    mols = small_mols()[:4]
    for mol, value in zip(mols, ("-10.5", "1e1", "eleven", "")):
        mol.SetProp("homo", value) if value else mol.SetProp("C", "a comment")
    result = read_sdf(write_sdf(tmp_path / "a.sdf", mols), task="homo")
    column = list(TARGETS).index("homo")
    np.testing.assert_array_equal(result.molecules.targets[:, column], [-10.5, 10, np.nan])
    assert np.isnan(np.delete(result.molecules.targets, column, axis=1)).all()
    assert result.refused == ["water: property homo: expected a number, got 'eleven'"]
    assert np.isnan(read_sdf(tmp_path / "a.sdf").molecules.targets).all()


# ------------------------------------------------------------------------------------------------------------ refusals


def molblock(symbols: str, positions: list, bonds: list = (), dimension: str = "3D", more: str = "") -> str:
    """A record of an SDF, as text so that it can be wrong."""
    atoms = [f"{x:10.4f}{y:10.4f}{z:10.4f} {s:3} 0" + "  0" * 11 for s, (x, y, z) in zip(symbols.split(), positions)]
    lines = [f"{a:3}{b:3}{order:3}  0" for a, b, order in bonds]
    counts = f"{len(atoms):3}{len(bonds):3}" + "  0" * 8 + "999 V2000"
    head = ["bad one", " " * 20 + dimension, "", counts]
    return "\n".join([*head, *atoms, *lines, *([more] if more else []), "M  END", "$$$$", ""])


WATER = [(0, 0, 0), (0.96, 0, 0), (-0.24, 0.93, 0)]
WATER_BONDS = [(1, 2, 1), (1, 3, 1)]
BAD_RECORDS = {
    "unknown element": (molblock("Si H H", WATER, WATER_BONDS), "expected the elements H, C, N, O, F, got Si"),
    "no element": (molblock("Qq H H", WATER, WATER_BONDS), r"damaged one \(Element 'Qq' not found\)"),
    "one atom": (molblock("O", WATER[:1]), "at least two atoms with a bond between them, got 1 without"),
    "no atom": (molblock("", []), "at least two atoms with a bond between them, got 0 without"),
    "2D": (molblock("O H H", WATER, WATER_BONDS, "2D"), "expected 3D coordinates, got a 2D drawing"),
    "no hydrogens": (molblock("O C", WATER, [(1, 2, 1)]), "every hydrogen as an atom .*, got 4 only implied"),
    "valence": (molblock("O H H H", [*WATER, (0, -1, 0)], [*WATER_BONDS, (1, 4, 1)]), "possible valences .* O, 3, is"),
    "charge": (molblock("O H", WATER, [(1, 2, 1)], more="M  CHG  1   1  -1"), "no charge .*, got charge -1 and 0 unp"),
    "radical": (molblock("O H", WATER, [(1, 2, 1)], more="M  RAD  1   1   2"), "got charge \\+0 and 1 unpaired"),
    "two molecules": (
        molblock("O H H O H H", [*WATER, *((x + 3, y, z) for x, y, z in WATER)], [*WATER_BONDS, (4, 5, 1), (4, 6, 1)]),
        "expected one molecule, got 2 that no bond connects",
    ),
    "same place": (molblock("O H H", [*WATER[:2], WATER[1]], WATER_BONDS), "apart, got 0.000 Å between atoms 2 and 3"),
    "other bond": (molblock("O H H", WATER, [(1, 2, 1), (1, 3, 8)]), "bonds SINGLE, DOUBLE, TRIPLE, AROMATIC, got"),
    "charge beyond all elements": (
        molblock("O H H", WATER, WATER_BONDS).replace("O   0  0", "O   0120", 1),
        "expected possible atoms and bonds, got others: Atomic number not found",
    ),
    "cut off": (molblock("O H H", WATER, WATER_BONDS)[:120], r"expected a record in SDF, got a damaged one \(EOF hit"),
}


@pytest.mark.parametrize("fault", BAD_RECORDS)
def test_bad_records_of_an_sdf_are_named(tmp_path, fault):
    record, message = BAD_RECORDS[fault]
    text = write_sdf(tmp_path / "good.sdf", small_mols()[:2]).read_text()
    (tmp_path / "a.sdf").write_text(text + record)
    result = read_sdf(tmp_path / "a.sdf")
    assert result.names == ["methane", "ammonia"]
    assert_same_molecules(result.molecules, small_molecules("methane", "ammonia"), position_error=6e-5)
    with pytest.raises(ValueError, match=f"^bad one: .*{message}"):
        raise ValueError(*result.refused)


def frame(atoms: str) -> str:
    lines = atoms.split("; ")
    return "\n".join([str(len(lines)), "bad one", *lines, ""])


@pytest.mark.parametrize(("atoms", "message"), [
    ("Si 0 0 0; H 1 0 0", "expected the elements H, C, N, O, F, got Si"),
    ("6 0 0 0; H 1 0 0", "expected the elements H, C, N, O, F, got 6"),
    ("O 0 0 0", "expected at least two atoms with a bond between them, got 1 without"),
    ("O 0 0 0; H 0.96 0 0", "expected positions of a neutral molecule with all its hydrogens"),
    ("C 0 0 0; O 1.2 0 0; O -1.2 0 nan", "expected an element and three coordinates, got 'O -1.2 0 nan'"),
    ("C 0 0 0; O 1.2 0; O -1.2 0 0", "expected an element and three coordinates, got 'O 1.2 0'"),
    ("C 0 0 0; O 1.2 0 x; O -1.2 0 0", "expected an element and three coordinates, got 'O 1.2 0 x'"),
    ("O 0 0 0; H 0.96 0 0; H 0.96 0 0", "expected atoms at least 0.4 Å apart, got 0.000 Å between atoms 2 and 3"),
])  # fmt: skip
def test_bad_frames_of_an_xyz_are_named(tmp_path, atoms, message):
    text = write_xyz(tmp_path / "good.xyz", small_mols()[-1:]).read_text()
    (tmp_path / "a.xyz").write_text(frame(atoms) + text)
    result = read_xyz(tmp_path / "a.xyz")
    assert (result.names, len(result.refused)) == (["benzene"], 1)
    assert result.refused[0].startswith(f"bad one: {message}")


def test_bond_orders_are_given_up_at_some_point(tmp_path, monkeypatch):
    monkeypatch.setattr(molecules, "BOND_ORDER_TRIALS", 1)
    with pytest.raises(ValueError, match="benzene: expected positions of a neutral .*, found no bonds that fit"):
        read_xyz(write_xyz(tmp_path / "a.xyz", small_mols()[-1:]))


def test_frames_without_a_comment_and_with_more_columns(tmp_path):
    (tmp_path / "a.xyz").write_text("3\n\nO 0 0 0 -0.8\nH 0.96 0 0 0.4\nH -0.24 0.93 0 0.4\n\n")
    assert read_xyz(tmp_path / "a.xyz").names == ["molecule 1"]


@pytest.mark.parametrize(("text", "message"), [
    ("", "expected molecules in XYZ, got an empty file"),
    ("O 0 0 0\n", "line 1: expected the number of atoms of a molecule, got 'O 0 0 0'"),
    ("0\n\n", "line 1: expected the number of atoms of a molecule, got '0'"),
    ("2\nname\nO 0 0 0\n", "line 1: expected 2 lines of atoms after a comment, got 1"),
    ("1\nname\nO 0 0 0\nH 1 0 0\n", "line 4: expected the number of atoms of a molecule, got 'H 1 0 0'"),
])  # fmt: skip
def test_files_that_are_not_xyz_are_refused(tmp_path, text, message):
    (tmp_path / "a.xyz").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.xyz: {message}"):
        read_xyz(tmp_path / "a.xyz")


@pytest.mark.filterwarnings("ignore:the geometries of SMILES")
def test_bad_smiles_are_named():
    bad = {
        "C1C": r"expected a SMILES, got 'C1C' \(.*unclosed ring",
        "C[Si]C": "expected the elements H, C, N, O, F, got Si",
        "[NH4+]": "expected no charge .*, got charge \\+1",
        "[CH3]": ".*got charge \\+0 and 1 unpaired",
        "C.O": "expected one molecule, got 2",
        "F": "expected a molecule that MMFF94 can relax",
        "CN(C)(C)C": r"expected a SMILES, got .* \(Explicit valence",
    }
    result = read_smiles([*bad, "C"])
    assert result.names == ["C"]
    for refused, (smiles, message) in zip(result.refused, bad.items(), strict=True):
        with pytest.raises(ValueError, match=f"^{message}"):
            raise ValueError(refused.removeprefix(f"{smiles}: "))


@pytest.mark.filterwarnings("ignore:the geometries of SMILES")
@pytest.mark.parametrize(("read", "name", "content"), [
    (read_sdf, "a.sdf", b""), (read_sdf, "a.sdf", b"\xff\xfe text"), (read_smiles, "a.smi", b" \n"),
])  # fmt: skip
def test_files_without_molecules_are_refused(tmp_path, read, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: expected .*, got none"):
        read(tmp_path / name)


def test_files_without_a_usable_molecule_are_refused(tmp_path):
    (tmp_path / "a.xyz").write_text(frame("O 0 0 0") * 12)
    with pytest.raises(ValueError, match=r"a\.xyz: expected molecules that can be used, got none") as error:
        read_xyz(tmp_path / "a.xyz")
    assert str(error.value).count("bad one: ") == 10 and str(error.value).endswith("\n  and 2 more")


@pytest.mark.parametrize("read", [read_sdf, read_xyz, read_smiles])
def test_missing_files_are_refused(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")


def test_without_rdkit(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ImportError, match="pip install rdkit"):
        read_smiles(["C"])


# ------------------------------------------------------------------------------------------------------------- raw QM9

# Methane in the csv of the authors, and the same in eV: the first row of the file that DGL distributes.
METHANE = dict(
    mu=0,
    alpha=13.21,
    homo=-0.3877,
    lumo=0.1171,
    gap=0.5048,
    r2=35.3641,
    zpve=0.044749,
    u0=-40.47893,
    u298=-40.476062,
    h298=-40.475117,
    g298=-40.498597,
    cv=6.469,
    u0_atom=-395.999594594,
    u298_atom=-398.64329,
    h298_atom=-401.014647,
    g298_atom=-372.471772,
    A=157.7118,
    B=157.70997,
    C=157.70699,
)
METHANE_IN_EV = dict(mu=0, alpha=13.21, homo=-10.54985445, lumo=3.18645333, gap=13.73630778, r2=35.3641,
                     zpve=1.21768232, U0=-1101.48779905, U=-1101.4097568, H=-1101.38404204, G=-1102.02296539, Cv=6.469,
                     U0_atom=-17.17218067, U_atom=-17.28682224, H_atom=-17.38965407, G_atom=-16.15191696, A=157.7118,
                     B=157.70997, C=157.70699)  # fmt: skip


def write_raw(directory: Path, mols: list[Chem.Mol], rows: list[dict], left_out: list[int]) -> Path:
    """The three files, molecules named gdb_1, gdb_2, …"""
    for i, mol in enumerate(mols):
        mol.SetProp("_Name", f"gdb_{i + 1}")
    write_sdf(directory / "gdb9.sdf", mols)
    order = ["A", "B", "C", *list(RAW_COLUMNS)[:-3]]  # as in the file of the authors
    lines = [",".join(["mol_id", *order])]
    lines += [",".join([f"gdb_{i + 1}", *(repr(float(row[key])) for key in order)]) for i, row in enumerate(rows)]
    (directory / "gdb9.sdf.csv").write_text("\n".join(lines) + "\n")
    rule = "=" * 80
    table = [f"{number:8}    C(=O)N    C(=O)N    C(=O)N    6.036217" for number in left_out]
    heading = [
        "",
        "",
        "List of molecules among the 133885 GDB9 molecules ...",
        "133885",
        "",
        rule,
        "#  Index  SMILES",
        rule,
    ]
    (directory / "uncharacterized.txt").write_text("\n".join([*heading, *table, rule, ""]))
    return directory


@pytest.fixture
def raw(tmp_path) -> Path:
    """Methane to benzene without ammonia (2) and fluoromethane (7)."""
    rows = [{key: value + i for key, value in METHANE.items()} for i in range(len(SMALL))]
    return write_raw(tmp_path, small_mols(), rows, left_out=[2, 7])


def test_raw_qm9(raw, capsys):
    molecules = read_raw_qm9(raw, progress="reading")
    kept = [name for name in SMALL if name not in ("ammonia", "fluoromethane")]
    assert_same_molecules(molecules, small_molecules(*kept), position_error=6e-5)
    assert molecules.targets.shape == (len(kept), len(TARGETS)) and list(METHANE_IN_EV) == list(TARGETS)
    np.testing.assert_allclose(molecules.targets[0], list(METHANE_IN_EV.values()), atol=2e-7)
    water = (molecules.targets[1] - molecules.targets[0]) / 2  # water is two rows below methane: 1 more in each
    expected = {"D": 1, "bohr³": 1, "bohr²": 1, "GHz": 1, "cal/(mol K)": 1, "eV": 27.211386}
    atomisation = [27.211386 / 627.509 if name.endswith("_atom") else None for name in TARGETS]
    np.testing.assert_allclose(water, [a or expected[t.unit] for a, t in zip(atomisation, TARGETS.values())], rtol=1e-6)
    assert capsys.readouterr().err == "", "a progress bar where there is no terminal"


def test_raw_zwitterions_without_charges_have_features(tmp_path):
    """Trimethylamine N-oxide in the form of raw QM9: a nitrogen with four bonds, and no charges."""
    with pytest.warns(UserWarning):
        charged = read_smiles(["C[N+](C)(C)[O-]"]).molecules
    mol = to_mol(charged)
    write_raw(tmp_path, [mol, small_mols()[0]], [METHANE] * 2, left_out=[2])
    assert "CHG" not in (tmp_path / "gdb9.sdf").read_text()
    assert_same_molecules(read_raw_qm9(tmp_path), charged, position_error=6e-5)


def change(name: str, old: str, new: str):
    def apply(directory: Path):
        path = directory / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return apply


RAW_FAULTS = {
    "no csv": (lambda d: (d / "gdb9.sdf.csv").unlink(), r"gdb9\.sdf\.csv: no such file; raw QM9 is gdb9\.sdf, "),
    "no list": (lambda d: (d / "uncharacterized.txt").unlink(), r"uncharacterized\.txt: no such file"),
    "column": (change("gdb9.sdf.csv", "zpve", "zero"), r"gdb9\.sdf\.csv: expected .*, got none named zpve"),
    "number": (change("gdb9.sdf.csv", "13.21", "much"), r"csv: gdb_1: alpha: expected a number, got 'much'"),
    "cut row": (
        lambda d: (d / "gdb9.sdf.csv").write_text((d / "gdb9.sdf.csv").read_text()[:-30]),
        r"csv: gdb_8: h298_atom: expected a number, got ''",
    ),
    "molecules": (change("gdb9.sdf", "$$$$\n", ""), r"gdb9\.sdf: expected the 8 molecules of gdb9\.sdf\.csv, got 7"),
    "order": (change("gdb9.sdf", "gdb_3\n", "gdb_4\n"), r"gdb9\.sdf: expected gdb_3 as molecule 3, got 'gdb_4'"),
    "name": (
        lambda d: (d / "gdb9.sdf").write_bytes((d / "gdb9.sdf").read_bytes().replace(b"gdb_3\n", b"gdb\xd7_3\n")),
        r"gdb9\.sdf: expected gdb_3 as molecule 3, got b'gdb.xd7_3'",
    ),
    "record": (change("gdb9.sdf", " C   0", " Qq  0"), r"gdb9\.sdf: expected gdb_1 .*, got a damaged record"),
    "element": (change("gdb9.sdf", " O   0", " S   0"), r"gdb9\.sdf: molecule 1, atom 0: expected .* number"),
    "bond": (change("gdb9.sdf", "  1  2  1  0", "  1  2  8  0"), r"gdb9\.sdf: gdb_1: expected bonds SINGLE, .*, got"),
    "aromatic": (
        change("gdb9.sdf", "  1  2  1  0", "  1  2  4  0"),
        r"gdb_1: expected aromatic bonds in aromatic rings only, got one between atoms 1 and 2",
    ),
    "none left": (
        lambda d: (d / "gdb9.sdf.csv").write_text((d / "gdb9.sdf.csv").read_text().split("\n")[0]),
        r"gdb9\.sdf: expected the 0 molecules",
    ),
    "all listed": (
        lambda d: write_raw(d, small_mols()[:1], [METHANE], left_out=[1]),
        r"gdb9\.sdf\.csv: expected molecules that uncharacterized\.txt does not list, got none",
    ),
    "list": (
        lambda d: (d / "uncharacterized.txt").write_text((d / "uncharacterized.txt").read_text()[:-90]),
        r"uncharacterized\.txt: expected a table .* or a truncated file",
    ),
    "empty line in the list": (
        change("uncharacterized.txt", f"{7:8}" + "    C(=O)N" * 3 + "    6.036217", ""),
        r"uncharacterized\.txt: expected a table",
    ),
    "list entry": (change("uncharacterized.txt", "  7  ", "  x  "), r"uncharacterized\.txt: expected a table"),
}  # fmt: skip


@pytest.mark.parametrize("fault", RAW_FAULTS)
def test_faults_of_raw_qm9(raw, fault):
    damage, message = RAW_FAULTS[fault]
    damage(raw)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_raw_qm9(raw)


# ----------------------------------------------------------------------------------------------- against the QM9 file


@pytest.fixture(scope="module")
def sample() -> Molecules:
    """150 molecules of QM9, drawn at random."""
    if not QM9_FILE.is_file():
        pytest.skip(f"no QM9 file: {QM9_FILE} is not there (set SE3_SHARED)")
    with np.load(QM9_FILE) as file:
        molecules = Molecules(**{field.name: file[field.name] for field in fields(Molecules)})
    nodes, edges = (np.cumsum(counts) - counts for counts in (molecules.n_node, molecules.n_edge))

    def one(i: int) -> Molecules:
        rows = slice(i, i + 1)
        atoms, bonds = slice(nodes[i], nodes[i] + molecules.n_node[i]), slice(edges[i], edges[i] + molecules.n_edge[i])
        return Molecules(
            molecules.n_node[rows], molecules.n_edge[rows], molecules.node_attr[atoms], molecules.node_pos[atoms],
            molecules.edge_attr[bonds], molecules.src[bonds], molecules.dst[bonds], molecules.targets[rows],
        )  # fmt: skip

    chosen = np.random.RandomState(0).permutation(len(molecules))[:150]
    return concatenate([one(i) for i in chosen])


def test_sdf_gives_the_arrays_of_qm9(sample, tmp_path):
    """All but the few zwitterions that cannot be rebuilt, since the arrays of QM9 have no charges."""
    mols, kept = [], []
    for i, molecule in enumerate(one_by_one(sample)):
        mol = to_mol(molecule, f"gdb {i}")
        if not Chem.SanitizeMol(mol, catchErrors=True):
            mols.append(mol)
            kept.append(molecule)
    assert len(kept) >= 0.97 * len(sample)
    result = read_sdf(write_sdf(tmp_path / "a.sdf", mols))
    assert not result.refused
    assert_same_molecules(result.molecules, concatenate(kept), position_error=6e-5)


def test_xyz_gives_the_arrays_of_qm9(sample, tmp_path):
    """All but the few molecules with more than one way to place double bonds and charges."""
    result = read_xyz(write_xyz(tmp_path / "a.xyz", [to_mol(m, str(i)) for i, m in enumerate(one_by_one(sample))]))
    assert not result.refused
    same = [
        np.array_equal(a.node_attr, b.node_attr)
        and np.array_equal(a.src, b.src)
        and np.array_equal(a.dst, b.dst)
        and np.array_equal(a.edge_attr, b.edge_attr)
        for a, b in zip(one_by_one(result.molecules), one_by_one(sample), strict=True)
    ]
    assert np.mean(same) >= 0.97
