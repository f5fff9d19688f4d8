"""Predicts a property of molecules with a network that train_qm9.py trained.

    python predict_qm9.py --checkpoint data/qm9_homo_best.pt --molecules FILE.sdf    # or .xyz, .smi
    python predict_qm9.py --checkpoint data/qm9_homo_best.pt --smiles "CCO c1ccccc1"
    python predict_qm9.py --checkpoint data/qm9_homo_best.pt --split test            # of the cache data/cache/qm9

Writes a table, predictions.csv, with units. Where true values are known, it has them too, the mean absolute error is
printed, and predictions.png shows predicted against true values. They are known in a split, and for molecules of an SDF
with a property of the label's name (homo, in the unit of QM9's files: eV for energies).
"""

import csv
import io
import math
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from easydict import EasyDict
from torch import Tensor

from dataloader.molecules import ReadMolecules, describe_refused, read_sdf, read_smiles, read_xyz
from dataloader.qm9 import QM9Dataset, graph_arrays, split_molecules
from dataloader.qm9_layout import TARGETS, Target, cache_settings
from experiments.qm9 import (
    check_same_data,
    expected_without_network,
    load_network,
    mean_absolute_error,
    plot_parity,
    predict,
)
from se3_transformer.runtime.distributed import is_main, process_group
from se3_transformer.runtime.files import write_file
from se3_transformer.runtime.script import run_script
from se3_transformer.runtime.settings import parse_settings, require

SUFFIXES = (".sdf", ".xyz", ".smi")
SPLITS = ("train", "val", "test")
SETTINGS = EasyDict(
    checkpoint="data/qm9_homo_best.pt",  # network, label and units
    molecules="",  # predict these: a file .sdf, .xyz or .smi (a SMILES and a name in each line)
    smiles="",  # or these: SMILES with spaces between them
    split="",  # or these: train, val or test of a cache
    skip_bad=False,  # leave out molecules that cannot be used, instead of stopping
    data_dir="data",  # where the cache of the split is
    name="qm9",  # the cache of the split: data_dir/cache/name
    output="predictions.csv",  # the table; the plot goes beside it
    batch_size=256,  # molecules
    device="auto",  # cpu, cuda, cuda:1, …; auto: cuda where there is any
    threads=0,  # CPU threads; 0: all
)


class Inputs(NamedTuple):
    """G molecules to predict."""

    names: list[str]  # G
    smiles: list[str]  # G, or empty if not known
    dataset: QM9Dataset
    molecules: torch.Tensor  # (G,) in the data set


def main() -> None:
    settings = parse_settings(SETTINGS, {}, __doc__, check)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with process_group(settings.device) as device:
        network, info = load_network(settings.checkpoint)
        target = TARGETS[info["task"]]
        inputs = from_split(settings, info, device) if settings.split else from_molecules(settings, info, device)
        predicted = predict(network.to(device), info, inputs.dataset, inputs.molecules, settings.batch_size)
        is_main_process = is_main()
    if not predicted.isfinite().all():
        name = inputs.names[predicted.isfinite().int().argmin()]
        raise ValueError(
            f"expected finite predictions, got others, first for {name}; is {settings.checkpoint} damaged?"
        )
    if not is_main_process:
        return
    true = inputs.dataset.targets[inputs.molecules, list(TARGETS).index(target.name)]
    without_network = expected_without_network(info, inputs.dataset, inputs.molecules)
    report(inputs, predicted, true, without_network, target, Path(settings.output))


def check(settings: EasyDict) -> None:
    """Raise ValueError for settings that make no sense."""
    require(settings, {"batch_size": 1, "threads": 0})
    given = [f"--{key}" for key in ("molecules", "smiles", "split") if settings[key].strip()]
    if len(given) != 1:
        raise ValueError(f"expected one of --molecules, --smiles and --split, got {' and '.join(given) or 'none'}")
    if settings.molecules and Path(settings.molecules).suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"molecules must be a file with one of the endings {', '.join(SUFFIXES)}: {settings.molecules}"
        )
    if settings.split and settings.split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {settings.split!r}")
    output = Path(settings.output)
    if output.suffix != ".csv" or not output.parent.is_dir():
        raise ValueError(f"output must be a file .csv in a directory that exists, got {settings.output!r}")


def from_split(settings: EasyDict, info: dict, device: torch.device) -> Inputs:
    """The molecules of a split, as training with this label divided them."""
    cache_dir = Path(settings.data_dir) / "cache" / settings.name
    rebuild = f"python preprocess_qm9.py --name {settings.name} --data_dir {settings.data_dir} --graph {info['graph']}"
    dataset = QM9Dataset.open(cache_dir, cache_settings(info["graph"], info["radius"]), device, rebuild)
    check_same_data(info, dataset, settings.checkpoint)
    known = dataset.targets[:, list(TARGETS).index(info["task"])]
    molecules = split_molecules(known, info["split_seed"])[settings.split]
    return Inputs([f"{settings.name} {i}" for i in molecules.tolist()], [], dataset, molecules)


def from_molecules(settings: EasyDict, info: dict, device: torch.device) -> Inputs:
    """The molecules of a file or of the command line, as the graphs that the network was trained on.

    Raises:
        ValueError: there are molecules that cannot be used, and `skip_bad` is not set.
    """
    molecules, names, smiles, refused = read(settings, info["task"])
    if refused:
        message = f"{len(refused)} of {len(refused) + len(names)} molecules cannot be used:{describe_refused(refused)}"
        if not settings.skip_bad:
            raise ValueError(f"{message}\nCorrect or remove them, or leave them out with --skip_bad true")
        print(f"left out: {message}", file=sys.stderr)
    arrays = graph_arrays(molecules, info["graph"], info["radius"])
    dataset = QM9Dataset(arrays, cache_settings(info["graph"], info["radius"]), device)
    return Inputs(names, smiles, dataset, torch.arange(len(dataset)))


def read(settings: EasyDict, task: str) -> ReadMolecules:
    """The molecules of a file or of the command line."""
    if settings.smiles:
        return read_smiles(settings.smiles.split())
    path = Path(settings.molecules)
    readers = {".sdf": lambda path: read_sdf(path, task), ".xyz": read_xyz, ".smi": read_smiles}
    return readers[path.suffix.lower()](path)


def report(
    inputs: Inputs, predicted: Tensor, true: Tensor, without_network: Tensor, target: Target, output: Path
) -> None:
    """Write the table, and if a true value is known, the plot; print what was written and the error.

    Args:
        inputs: the molecules.
        predicted, true: (G,) in the stored unit, `true` NaN where it is not known.
        without_network: (G,) see `expected_without_network`.
        target: the label.
        output: the table.
    """
    known, plot = ~true.isnan(), output.with_suffix(".png")
    if known.any():
        figure = plot_parity(true[known], predicted[known], target)
        write_file(plot, lambda file: figure.savefig(file, dpi=110, format="png"))
    else:
        plot.unlink(missing_ok=True)  # it would be taken for one of these molecules
    written = [output, plot] if known.any() else [output]
    table = format_table(inputs, predicted * target.factor, true * target.factor, target)
    write_file(output, lambda file: file.write(table.encode()))
    print(f"{len(true):,} molecules, {target.name} ({target.description}): {', '.join(map(str, written))}")
    if known.any():
        error, baseline = (
            mean_absolute_error(true[known], guess[known]) * target.factor for guess in (predicted, without_network)
        )
        print(
            f"mean absolute error {error:.4g} {target.shown_unit} of {known.sum():,} molecules "
            f"(without the network: {baseline:.4g} {target.shown_unit})"
        )


def format_table(inputs: Inputs, predicted: Tensor, true: Tensor, target: Target) -> str:
    """CSV of values in the shown unit; columns that would be empty are left out."""
    columns = {"name": inputs.names, "smiles": inputs.smiles}
    values = {"predicted": predicted, "true": true, "error": predicted - true}
    columns |= {
        f"{kind} {target.name} [{target.shown_unit}]": [
            "" if math.isnan(value) else f"{value:.4f}" for value in numbers.tolist()
        ]
        for kind, numbers in values.items()
    }
    columns = {title: column for title, column in columns.items() if any(column)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    run_script(main, interrupted="interrupted")
