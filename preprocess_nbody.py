"""Simulates charged particles where files are missing, and writes the cache of graphs and edge frames for training.

    python preprocess_nbody.py                                 # walls, 5 frames ahead: data/nbody_*, data/cache/nbody
    python preprocess_nbody.py --preset paper                  # no walls, 10 frames ahead: data/nbody_paper_*, …
    python preprocess_nbody.py --preset egnn                   # no walls, from frame 30 to 40: data/nbody_egnn_*, …
    python preprocess_nbody.py --num_train 50000 --name large  # data/large_*, data/cache/large

Files that are already there are never overwritten. Put your own, in the layout of the paper's authors, at
data/NAME_train.pkl, data/NAME_val.pkl and data/NAME_test.pkl, and they are taken instead.
"""

import os
import shlex
import sys
import time
from pathlib import Path

from easydict import EasyDict

from dataloader.cache import Cache, CacheError, CacheWriter, open_cache
from dataloader.nbody_files import describe_simulations, load_simulations, save_simulations
from dataloader.nbody_protocols import cache_settings, position_std
from dataloader.nbody_simulator import simulate
from se3_transformer.runtime.files import exclusive
from se3_transformer.runtime.script import run_script
from se3_transformer.runtime.settings import parse_settings, require, require_file_name

SPLITS = ("train", "val", "test")
SETTINGS = EasyDict(
    preset="readme",  # protocol: readme (walls, 5 frames ahead), paper or egnn (no walls, 10 frames ahead)
    num_train=5000,  # simulations for training
    num_val=1000,  # simulations for validation
    num_test=1000,  # simulations for the test
    n_balls=5,  # particles a simulation
    box_size=5.0,  # reflecting walls at ±box_size per axis; 0: none
    seed=0,  # of all random numbers; each split draws its own from it
    data_dir="data",  # where files and cache go
    name="nbody",  # first part of the file names
)
PRESETS = {
    "readme": {},
    "paper": {"name": "nbody_paper", "box_size": 0.0},
    "egnn": {"name": "nbody_egnn", "box_size": 0.0, "num_train": 3000, "num_val": 2000, "num_test": 2000},
}


def main():
    began = time.perf_counter()
    settings = parse_settings(SETTINGS, PRESETS, __doc__, check)
    data_dir = Path(settings.data_dir)
    cache_dir = data_dir / "cache" / settings.name
    command = shlex.join(["python", *sys.argv])
    cache_dir.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(data_dir / settings.name):
        try:
            known = open_cache(cache_dir, command).sources
        except CacheError:
            known = {}
        sources = {split: find_or_simulate(split, data_dir, cache_dir, settings, known) for split in SPLITS}
        try:
            cache = open_cache(cache_dir, command, cache_settings(settings.preset), sources, verify=True)
            print("Nothing has changed: simulations and cache are complete and up to date.")
        except CacheError as reason:
            print(f"Writing the cache {cache_dir}" + (f", because of {reason.problem}" if cache_dir.exists() else ""))
            write_cache(cache_dir, data_dir, sources, settings)
            cache = open_cache(cache_dir, command)
    report(cache, data_dir, settings, time.perf_counter() - began)


def check(settings: EasyDict) -> None:
    """Raise ValueError for settings that make no sense."""
    require(settings, {"num_train": 1, "num_val": 1, "num_test": 1, "n_balls": 2, "box_size": 0, "seed": 0})
    require_file_name(settings, "name")


def find_or_simulate(split: str, data_dir: Path, cache_dir: Path, settings: EasyDict, known: dict) -> dict:
    """The record of the split's file of simulations, which is made if it is not there."""
    path = data_dir / f"{settings.name}_{split}.pkl"
    asked = {
        "num_simulations": settings[f"num_{split}"],
        "n_balls": settings.n_balls,
        "box_size": settings.box_size,
        "seed": [settings.seed, SPLITS.index(split)],
    }
    if (std := position_std(settings.preset, settings.n_balls)) != 1:  # not noted where it is 1, as in older files
        asked["position_std"] = std
    if not path.exists():
        save_simulations(path, simulate(**asked, progress=f"simulating {path}"), asked)
    record = describe_simulations(path, known.get(split))
    if record["simulated"] is None:
        print(f"{path}: not made by this program, taken as it is")
    elif record["simulated"] != asked:
        differing = [key for key in asked if record["simulated"].get(key) != asked[key]]
        came, wanted = ([f"{key} {values.get(key)}" for key in differing] for values in (record["simulated"], asked))
        raise ValueError(
            f"{path} was simulated with {', '.join(came)}, asked for is {', '.join(wanted)}. "
            "Give the new simulations another --name, or delete this file"
        )
    return record | {"path": os.path.relpath(path, cache_dir)}


def write_cache(cache_dir: Path, data_dir: Path, sources: dict, settings: EasyDict):
    """Graphs and edge frames of all splits."""
    from dataloader.nbody import add_split  # here, because it imports torch: longer than a run without changes

    protocol = cache_settings(settings.preset)
    common = {}
    with CacheWriter(cache_dir, protocol, sources) as writer:
        for split in SPLITS:
            path = data_dir / f"{settings.name}_{split}.pkl"
            data = load_simulations(path)
            try:
                facts = add_split(writer, split, data, protocol["delta_frames"], protocol["eval_start_frames"])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            for key, value in {"num_particles": data["points"].shape[3], "interval": facts["interval"]}.items():
                if common.setdefault(key, value) != value:
                    raise ValueError(f"{path}: expected {key} {common[key]} as in the file for training, got {value}")
            for key in ("baselines", "energy"):
                writer.info.setdefault(key, {})[split] = facts[key]
        writer.info |= common


def report(cache: Cache, data_dir: Path, settings: EasyDict, seconds: float):
    """Print what is there now."""
    print(
        "\n        simulations   graphs      file     cache   no change: MSE x, v   constant velocity: MSE x   "
        "energy: first, last frame, kept"
    )
    for split, source in cache.sources.items():
        errors, energy = cache.info["baselines"][split], cache.info["energy"][split]
        size = sum(array.nbytes for name, array in cache.arrays.items() if name.startswith(split))
        print(
            f"{split:6} {len(cache.arrays[f'{split}_charges']):12,} {len(cache.arrays[f'{split}_rotations']):8,} "
            f"{source['bytes'] / 1e6:6.1f} MB {size / 1e6:6.1f} MB   "
            f"{errors['no_change_x']:10.4f} {errors['no_change_v']:8.4f}   {errors['constant_velocity_x']:24.4f}   "
            f"{energy['first']:14.3f} {energy['last']:10.3f} {energy['kept']:5.0%}"
        )
    print(
        f"\n{cache.info['num_particles']} particles; the target is {cache.info['interval']:.3g} time units ahead.\n"
        "Energy: mean over simulations, and the share in which it changed by less than 0.01; it changes\n"
        "where particles meet so closely that the force is clipped."
    )
    print(
        f"Simulations: {data_dir / settings.name}_*.pkl. Cache: {cache.directory}, {cache.num_bytes / 1e6:.1f} MB. "
        f"Time: {seconds:.1f} s."
    )


if __name__ == "__main__":
    run_script(main, interrupted="interrupted: files that are complete are kept; run the same command again to go on")
