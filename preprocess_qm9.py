"""Gets QM9 and writes the cache of graphs and edge frames for training.

    python preprocess_qm9.py                           # data/qm9_edge.npz, raw files in data/, or a download to there
    python preprocess_qm9.py --source qm9_edge.npz     # a file in the layout of DGL's QM9EdgeDataset
    python preprocess_qm9.py --source raw              # a directory with the raw files, read with RDKit
    python preprocess_qm9.py --graph radius --name qm9_radius   # edges: all pairs closer than 5 Å

The raw files are gdb9.sdf, gdb9.sdf.csv and uncharacterized.txt. The cache is data/cache/NAME.
"""

import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from easydict import EasyDict

from dataloader.cache import Cache, CacheError, CacheWriter, fingerprint, open_cache
from dataloader.qm9_layout import GRAPHS, RAW_FILES, TARGETS, Molecules, cache_settings, load_molecules
from se3_transformer.runtime.files import exclusive
from se3_transformer.runtime.script import run_script
from se3_transformer.runtime.settings import parse_settings, require_file_name

SETTINGS = EasyDict(
    source="",  # file in the layout of qm9_edge.npz, or directory of the raw files; by default looked for in data_dir
    graph="bonds",  # what is an edge: bonds, radius (pairs of atoms closer than radius) or complete (all pairs)
    radius=5.0,  # Å, for graph radius
    data_dir="data",  # where a download and the cache go
    name="qm9",  # of the cache
)

FILE = "qm9_edge.npz"
PATIENCE = 10  # seconds until a server that does not answer counts as out of reach
WAYS_OUT = f"""
There are three ways to QM9:
1. Download: with internet, DGL and Python up to 3.11 (pip install "dgl==1.1.3" packaging), the same command again.
2. A file in the layout of DGL's {FILE}, from wherever you can get it: --source FILE.
3. The raw files {", ".join(RAW_FILES)} in one directory: --source DIRECTORY (pip install rdkit).
   They are in https://deepchemdata.s3-us-west-1.amazonaws.com/datasets/molnet_publish/qm9.zip
   and https://ndownloader.figshare.com/files/3195404 (uncharacterized.txt)."""


def main():
    began = time.perf_counter()
    settings = parse_settings(SETTINGS, {}, __doc__, check)
    data_dir = Path(settings.data_dir)
    cache_dir = data_dir / "cache" / settings.name
    command = shlex.join(["python", *sys.argv])
    cache_dir.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(data_dir / settings.name):
        paths = find_source(settings.source, data_dir)
        try:
            known = open_cache(cache_dir, command).sources
        except CacheError:
            known = {}
        names = {os.path.relpath(path, cache_dir): path for path in paths}
        sources = {name: fingerprint(path, known.get(name)) for name, path in names.items()}
        wanted = cache_settings(settings.graph, settings.radius)
        try:
            cache = open_cache(cache_dir, command, wanted, sources, verify=True)
            print("Nothing has changed: the cache is complete and up to date.")
        except CacheError as reason:
            print(f"Reading {', '.join(map(str, paths))}")
            molecules = read_molecules(paths)
            print(f"Writing the cache {cache_dir}" + (f", because of {reason.problem}" if cache_dir.exists() else ""))
            write_cache(cache_dir, molecules, sources, settings)
            cache = open_cache(cache_dir, command)
    report(cache, paths, time.perf_counter() - began)


def check(settings: EasyDict) -> None:
    """Raise ValueError for settings that make no sense."""
    if settings.graph not in GRAPHS:
        raise ValueError(f"graph must be one of {', '.join(GRAPHS)}, got {settings.graph!r}")
    if not 0 < settings.radius < float("inf"):
        raise ValueError(f"radius must be positive, got {settings.radius}")
    require_file_name(settings, "name")


def find_source(source: str, data_dir: Path) -> list[Path]:
    """The file in the layout of qm9_edge.npz, or the three raw files; it is downloaded if nothing is there.

    Raises:
        FileNotFoundError: there is no such source, or nothing in data_dir and no download; the message says what to do.
    """
    if source and Path(source).is_file():
        return [Path(source)]
    raw = [Path(source or data_dir) / name for name in RAW_FILES]
    missing = [path.name for path in raw if not path.is_file()]
    if source and missing:
        came = f"a directory without {', '.join(missing)}" if Path(source).is_dir() else "no such file or directory"
        raise FileNotFoundError(
            f"{source}: expected a file in the layout of {FILE}, or the directory of the raw files, got {came}."
            + WAYS_OUT
        )
    if not source and (data_dir / FILE).is_file():
        return [data_dir / FILE]
    if missing:
        with exclusive(data_dir / FILE):  # caches of several names may need it at the same time
            download(data_dir / FILE)
        return [data_dir / FILE]
    return raw


def download(path: Path):
    """Fetch qm9_edge.npz through DGL; at `path` there is the complete file or none, whenever this is killed.

    Raises:
        FileNotFoundError: that is not possible here; the message says why and what to do.
    """
    directory = path.with_name(f".{path.name}.downloading")
    shutil.rmtree(directory, ignore_errors=True)
    try:
        import requests
        from dgl.data import QM9EdgeDataset

        class Download(QM9EdgeDataset):
            """The download alone: reading is `load_molecules`, which refuses the pickled objects that DGL admits."""

            def download(self):
                # First a question, because DGL would try a server out of reach for many minutes.
                with requests.get(self.url, stream=True, timeout=PATIENCE) as answer:
                    answer.raise_for_status()
                super().download()

            def process(self):
                pass

            def save(self):
                pass

        Download(raw_dir=str(directory))
        load_molecules(directory / FILE)
        (directory / FILE).rename(path)
    except Exception as error:  # of DGL, which may fail to import in many ways, of the network, or a damaged file
        raise FileNotFoundError(
            f"no QM9 in {path.parent}, and the download through DGL failed ({type(error).__name__}: {error}).{WAYS_OUT}"
        ) from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def read_molecules(paths: list[Path]) -> Molecules:
    """The molecules of a source that `find_source` found."""
    if len(paths) == 1:
        return load_molecules(paths[0], progress="reading")
    from dataloader.molecules import read_raw_qm9  # here, because it is needed for raw files only

    return read_raw_qm9(paths[0].parent, progress="reading")


def write_cache(cache_dir: Path, molecules: Molecules, sources: dict, settings: EasyDict):
    """Graphs and edge frames of all molecules."""
    from dataloader.qm9 import graph_arrays  # here, because it imports torch: longer than a run without changes

    with CacheWriter(cache_dir, cache_settings(settings.graph, settings.radius), sources) as writer:
        graph_arrays(molecules, settings.graph, settings.radius, writer.create, progress="edge frames")
        for column, name in enumerate(TARGETS):
            values = molecules.targets[:, column]
            known = values[~np.isnan(values)]
            spread = {"mean": known.mean(), "std": known.std()} if len(known) else {}
            writer.info[name] = {"known": len(known)} | spread


def report(cache: Cache, paths: list[Path], seconds: float):
    """Print what is there now."""
    arrays = cache.arrays
    molecules, atoms, edges = (len(arrays[name]) for name in ("targets", "positions", "src"))
    print("\ntarget   molecules  complete            mean ± std")
    for name, target in TARGETS.items():
        facts = cache.info[name]
        complete = "yes" if facts["known"] == molecules else "no"
        line = f"{name:8} {facts['known']:9,}  {complete:8}"
        if facts["known"]:
            mean, std = (facts[key] * target.factor for key in ("mean", "std"))
            line += f" {mean:14,.2f} ± {std:12,.2f} {target.shown_unit:11}  {target.description}"
        print(line)
    radius = f" {cache.settings['radius']} Å" if "radius" in cache.settings else ""
    print(
        f"\n{molecules:,} molecules, {atoms:,} atoms, {edges:,} edges ({cache.settings['graph']}{radius}), "
        f"from {', '.join(f'{path} ({path.stat().st_size / 1e6:.1f} MB)' for path in paths)}.\n"
        f"Cache: {cache.directory}, {cache.num_bytes / 1e6:.1f} MB. Time: {seconds:.1f} s."
    )


if __name__ == "__main__":
    run_script(main, interrupted="interrupted: an earlier cache is kept; run the same command again")
