"""A directory of flat `.npy` arrays, memory-mapped, and one `manifest.json` that says what they were made from.

A cache is written in a temporary directory beside its place and renamed when it is complete, so a process killed at any
moment leaves the old cache or none. Opening checks everything that can be checked without reading the arrays.

    with CacheWriter(directory, settings={...}, sources={"file.pkl": fingerprint("file.pkl")}) as writer:
        writer.create("positions", (10, 3), "float32")[:] = ...
    cache = open_cache(directory, rebuild="python preprocess.py", settings={...})
    cache.arrays["positions"]

NumPy only: importing this file is quick.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from se3_transformer.runtime.files import exclusive, naming, sync_directory, write_file
from se3_transformer.runtime.script import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
READ_SIZE = 1 << 20


class CacheError(UserError):
    """A cache that cannot be used: what was expected, what came, and the command that rebuilds it.

    The attribute `problem` is the message without the command.
    """

    def __init__(self, path: Path, expected, came, rebuild: str):
        self.problem = f"{path}: expected {expected}, got {came}"
        super().__init__(f"{self.problem}. Make the cache with: {rebuild}")


@dataclass(frozen=True)
class Cache:
    """An open cache."""

    directory: Path
    settings: dict  # what the arrays depend on besides the sources
    sources: dict[str, dict]  # name -> fingerprint of what they were made from
    info: dict  # anything else the writer noted
    arrays: dict[str, np.ndarray]  # mapped copy-on-write: changing one changes nothing on disk

    @property
    def identity(self) -> str:
        """Hash of the settings and of the content of the sources: what the arrays are a function of."""
        content = {name: source.get("sha256") for name, source in self.sources.items()}
        return _checksum({"settings": self.settings, "sources": sorted(content.items())})[:16]

    @property
    def num_bytes(self) -> int:
        """Size of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())


class CacheWriter:
    """Context manager that builds a cache; what it leaves at the end replaces an earlier cache.

    Args:
        directory: where the cache will be.
        settings: JSON values that the arrays depend on.
        sources: name -> fingerprint of each file that they depend on; other JSON values may be noted with it.

    Raises:
        BlockingIOError: another process is writing the same cache.

    The attribute `info`, a dict of JSON values, may be filled until the end.
    """

    def __init__(self, directory: str | Path, settings: dict, sources: dict[str, dict]):
        self.directory = Path(directory)
        self.info: dict[str, Any] = {}
        self._settings, self._sources = settings, sources
        self._arrays: dict[str, np.memmap] = {}
        self._building = self.directory.with_name(f".{self.directory.name}.building")
        self._replaced = self.directory.with_name(f".{self.directory.name}.replaced")

    def create(self, name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
        """A new array on disk, to be filled before the end."""
        path = self._building / f"{name}.npy"
        shape = tuple(map(int, shape))  # NumPy's integers would not be written as plain numbers
        with naming(path):
            self._arrays[name] = np.lib.format.open_memmap(path, mode="w+", shape=shape, dtype=np.dtype(dtype))
            if hasattr(os, "posix_fallocate"):  # else a disk that gets full ends the process without a word
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return self._arrays[name]

    def __enter__(self):
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self._lock = exclusive(self.directory)
        self._lock.__enter__()
        self._remove_leftovers()
        self._building.mkdir()
        return self

    def __exit__(self, error_type, *error):
        try:
            if error_type is None:
                self._finish()
        finally:
            self._arrays.clear()
            self._remove_leftovers()
            self._lock.__exit__(None, None, None)

    def _finish(self):
        entries = {}
        for name, array in self._arrays.items():
            array.flush()
            path = self._building / f"{name}.npy"
            entries[name] = {
                "shape": list(array.shape),
                "dtype": array.dtype.str,
                "bytes": path.stat().st_size,
                "crc32": _crc32(path),
            }
        manifest = {
            "format": FORMAT_VERSION,
            "settings": self._settings,
            "sources": self._sources,
            "info": self.info,
            "arrays": entries,
        }
        manifest["checksum"] = _checksum(manifest)
        write_file(self._building / MANIFEST, lambda file: file.write(json.dumps(manifest, indent=1).encode()))
        if self.directory.exists():
            self.directory.rename(self._replaced)
        self._building.rename(self.directory)
        sync_directory(self.directory.parent)

    def _remove_leftovers(self):
        """Whatever a killed writer left: the lock is ours, so nobody uses it."""
        for path in (self._building, self._replaced):
            if path.exists():
                shutil.rmtree(path)


def open_cache(
    directory: str | Path,
    rebuild: str,
    settings: dict | None = None,
    sources: dict[str, dict] | None = None,
    verify: bool = False,
    prefix: str = "",
) -> Cache:
    """Open a cache after checking its manifest and the size, type and shape of every file.

    Args:
        directory: where the cache is.
        rebuild: the command that writes this cache, for the error messages.
        settings: each of these must be recorded with this value.
        sources: exactly these must be recorded, with these contents.
        verify: also read every file and compare its checksum.
        prefix: open the arrays whose names begin with this alone.

    Raises:
        CacheError: the cache cannot be used; the message says why and how to rebuild it.
        UserError: it is one of another kind of data.
    """
    directory = Path(directory)

    def require(good: bool, path: Path, expected, came):
        if not good:
            raise CacheError(path, expected, came, rebuild)

    path = directory / MANIFEST
    require(path.is_file(), path, "the manifest of a cache", "no such file")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise CacheError(path, "JSON", error, rebuild) from None
    require(isinstance(manifest, dict) and "format" in manifest, path, "a manifest with a format version", "other JSON")
    require(manifest["format"] == FORMAT_VERSION, path, f"format version {FORMAT_VERSION}", manifest["format"])
    require(
        manifest.pop("checksum", None) == _checksum(manifest),
        path,
        "the checksum of its content",
        "another one: the file was changed or damaged",
    )
    recorded = manifest["settings"]
    for key, value in _as_json(settings or {}).items():
        require_setting(directory, recorded, key)
        require(recorded[key] == value, path, f"{key} = {value!r}", repr(recorded[key]))
    if sources is not None:
        known = manifest["sources"]
        require(sources.keys() == known.keys(), path, f"sources {sorted(sources)}", sorted(known))
        for name, source in sources.items():
            good = same_content(source, known[name])
            require(good, path, f"the present content of {name}", "a cache made from another one")

    arrays = {}
    for name, entry in manifest["arrays"].items():
        if not name.startswith(prefix):
            continue
        path = directory / f"{name}.npy"
        require(path.is_file(), path, f"an array of {entry['bytes']} bytes", "no such file")
        require(path.stat().st_size == entry["bytes"], path, f"{entry['bytes']} bytes", f"{path.stat().st_size}")
        try:
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        except Exception as error:  # a damaged file may raise anything
            raise CacheError(path, "an .npy file", error, rebuild) from None
        require(array.dtype.str == entry["dtype"], path, f"dtype {entry['dtype']}", array.dtype.str)
        require(list(array.shape) == entry["shape"], path, f"shape {entry['shape']}", list(array.shape))
        require(
            not verify or _crc32(path) == entry["crc32"],
            path,
            "the checksum recorded in the manifest",
            "another one: the file was changed or damaged",
        )
        arrays[name] = array
    return Cache(directory, manifest["settings"], manifest["sources"], manifest["info"], arrays)


def require_setting(directory: str | Path, settings: dict, key: str) -> None:
    """Raise UserError unless a cache has a setting that all caches of its kind have."""
    if key not in settings:
        raise UserError(
            f"{directory} is a cache of other data: expected one with the setting {key}, got one with "
            f"{', '.join(settings)}. Give another --name"
        )


def fingerprint(path: str | Path, known: dict | None = None) -> dict:
    """Size, modification time and SHA-256 of a file: `{"bytes", "mtime_ns", "sha256"}`.

    Args:
        path: the file.
        known: an earlier fingerprint, whose hash is taken over if size and modification time are still the same.
    """
    path = Path(path)
    status = path.stat()
    quick = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    if known and all(known.get(key) == value for key, value in quick.items()):
        return quick | {"sha256": known["sha256"]}
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return quick | {"sha256": digest.hexdigest()}


def same_content(a: dict, b: dict) -> bool:
    """Whether two fingerprints are of the same content, whenever it was written."""
    return (a["bytes"], a["sha256"]) == (b["bytes"], b["sha256"])


def _crc32(path: Path) -> int:
    crc = 0
    for chunk in _chunks(path):
        crc = zlib.crc32(chunk, crc)
    return crc


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(READ_SIZE):
            yield chunk


def _as_json(value):
    """The value as it comes back from a JSON file: tuples become lists."""
    return json.loads(json.dumps(value))


def _checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(_as_json(manifest), sort_keys=True).encode()).hexdigest()
