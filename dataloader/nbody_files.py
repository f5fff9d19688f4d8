"""The files that hold N-body simulations: pickles in the layout of the SE(3)-Transformer paper's authors.

A pickle is a program, so it is read through an unpickler that admits NumPy arrays and plain values and refuses
everything else before it runs. The arrays are made here, from bytes, types and shapes: NumPy's own functions for this
believe whatever a pickle says of a type, and crash. A small JSON file beside a pickle says that we simulated it, and
how, with a checksum.

NumPy only: importing this file is quick.
"""

import json
import pickle
import re
from pathlib import Path

import numpy as np

from dataloader.cache import fingerprint, same_content
from se3_transformer.runtime.files import write_file

# What `simulate` returns: an axis a letter, S simulations, F frames, n particles, 3 coordinates; "" is a number.
LAYOUT = {
    "points": "SF3n", "vel": "SF3n", "charges": "Sn1", "edges": "Snn", "clamp": "SFn",
    "E": "F", "U": "F", "K": "F", "delta_T": "", "sample_freq": "",
}  # fmt: skip
LARGEST = 1e15  # of any number: the squares of larger ones are not finite in float32


def save_simulations(path: str | Path, data: dict, how: dict):
    """Write the pickle of `simulate`'s result, and beside it a note of the arguments that made it.

    Args:
        path: the pickle, complete or absent at any moment.
        data: see `LAYOUT`.
        how: JSON values.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(file):
        pickle.dump(data, file, protocol=5)
        file.flush()
        note = {"simulated": how, "file": fingerprint(file.name)}
        # The note first: without its file it means nothing, while a file without its note would pass for a foreign one.
        write_file(_note_path(path), lambda note_file: note_file.write(json.dumps(note, indent=1).encode()))

    write_file(path, write)


def describe_simulations(path: str | Path, known: dict | None = None) -> dict:
    """Fingerprint of a pickle, and under `simulated` the arguments that made it; None if it is not one of ours.

    Args:
        path: the pickle.
        known: an earlier result for this file, to save the hashing of an unchanged file.

    Raises:
        ValueError: there is a note, but it is damaged or of another file than this.
    """
    path, note_path = Path(path), _note_path(Path(path))
    try:
        note = json.loads(note_path.read_bytes())
        simulated, ours = dict(note["simulated"]), note["file"]
        present = fingerprint(path, ours)
        same = same_content(present, ours)
    except FileNotFoundError:
        return fingerprint(path, known) | {"simulated": None}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{note_path}: expected the note on how {path.name} was simulated, got a damaged file; delete both"
        ) from None
    if not same:
        raise ValueError(
            f"{path}: expected the file that {note_path.name} describes, got another or a damaged one; if it is your "
            f"own, delete {note_path}, if not, delete both"
        )
    return present | {"simulated": simulated}


def load_simulations(path: str | Path) -> dict:
    """Read and check a pickle; executes nothing that the file says beyond making arrays and plain values.

    Returns:
        The dict of `LAYOUT`; entries that are not in the layout are left out.

    Raises:
        ValueError: the file holds something else; the message names the key, what was expected and what came.
    """
    with open(path, "rb") as file:
        try:
            data = _ArrayUnpickler(file).load()
            if isinstance(data, dict):
                data = {key: value.array if isinstance(value, _Array) else value for key, value in data.items()}
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path}: {error}") from None
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(
                f"{path}: expected a pickle, got a damaged or foreign file ({type(error).__name__}: {error})"
            ) from error
    try:
        return _checked(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _note_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _checked(data) -> dict:
    """The entries of `LAYOUT`, after checking all of them."""
    missing = [key for key in LAYOUT if key not in data] if isinstance(data, dict) else LAYOUT
    if missing:
        raise ValueError(
            f"expected a dict with the keys {', '.join(LAYOUT)}, got {type(data).__name__} without {', '.join(missing)}"
        )
    sizes = {"1": 1, "3": 3}
    for key, axes in LAYOUT.items():
        value = data[key]
        if not isinstance(value, np.ndarray | np.generic | int | float):
            raise ValueError(f"{key}: expected numbers, got {getattr(value, 'name', type(value).__name__)}")
        shape = np.shape(value)
        expected = tuple(sizes.get(axis, axis) for axis in axes)
        if len(shape) != len(axes) or any(size != sizes.setdefault(axis, size) for axis, size in zip(axes, shape)):
            raise ValueError(
                f"{key}: expected shape ({', '.join(map(str, expected))}), got {shape}; "
                "S simulations, F frames, n particles"
            )
        good = np.abs(value) < LARGEST
        if not good.all():
            first = tuple(np.argwhere(~good)[0].tolist())
            raise ValueError(
                f"{key}: expected finite numbers below {LARGEST:.0e}, got {np.asarray(value)[first]} at {first}"
            )
    if sizes["S"] < 1 or sizes["F"] < 2 or sizes["n"] < 2:
        raise ValueError(
            f"points: expected at least 1 simulation, 2 frames and 2 particles, got shape {data['points'].shape}"
        )
    if data["delta_T"] <= 0 or data["sample_freq"] <= 0:
        raise ValueError(f"expected delta_T and sample_freq above 0, got {data['delta_T']} and {data['sample_freq']}")
    if not np.allclose(data["edges"], data["charges"] * data["charges"].swapaxes(1, 2)):
        raise ValueError("edges: expected the products of the charges, got other numbers")
    return {key: data[key] for key in LAYOUT}


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How old pickles write bytes; in place of `codecs.encode`, which knows many more encodings."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"expected the encoding latin1, got {encoding!r}")
    return text.encode("latin1")


class _Dtype:
    """In place of `numpy.dtype`: types of numbers; of any other, the name alone."""

    def __init__(self, name: str, *_):
        self.name, self.numbers = str(name), None

    def __setstate__(self, state: tuple):
        order = state[1]
        if re.fullmatch("b1|[iu][1248]|f[248]", self.name) and order in ("<", ">", "|"):
            self.numbers = np.dtype(order + self.name)


class _Array:
    """In place of `numpy.ndarray` while its parts come; `array` is what becomes of it."""

    array = None

    def __setstate__(self, state: tuple):
        _, shape, dtype, is_fortran, content = state
        self.array = _array(content, dtype, shape, "F" if is_fortran else "C")


def _array(content: bytes, dtype: _Dtype, shape: tuple = (), order: str = "C", axes: tuple | None = None):
    """An array of numbers, or where it is of others, its type."""
    if dtype.numbers is None:
        return dtype
    array = np.frombuffer(content, dtype.numbers)
    return array.reshape(shape, order=order) if axes is None else array.reshape(shape).transpose(axes)


# What rebuilds arrays, scalars and dtypes, under the module names of NumPy 1 and 2, and what each name is taken for.
_ADMITTED = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype, ("_codecs", "encode"): _encode_latin1} | {
    (f"numpy.{core}.{module}", name): function
    for core in ("core", "_core")
    for module, name, function in (
        ("multiarray", "_reconstruct", lambda *_: _Array()),
        ("multiarray", "scalar", lambda dtype, content: _array(content, dtype)),
        ("numeric", "_frombuffer", _array),
    )
}


class _ArrayUnpickler(pickle._Unpickler):  # the one in Python: that in C may ask for all memory for a damaged file
    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self):
        if not isinstance(self.stack[-2], _Array | _Dtype):
            raise pickle.UnpicklingError(f"expected NumPy arrays and plain values, got a {type(self.stack[-2])}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]

    def find_class(self, module: str, name: str):
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"expected NumPy arrays and plain values, refused to load {module}.{name}")
        return _ADMITTED[module, name]
