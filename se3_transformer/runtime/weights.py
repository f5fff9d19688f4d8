"""Weights that were trained elsewhere: read them from whatever surrounds them, write them for the known package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from se3_transformer.model.layers.convolution import VersatileConvSE3
from se3_transformer.runtime.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

# Degrees whose coupling had the opposite sign in e3nn before 0.4, in any order, where two of them are at most 4.
OLD_COUPLINGS = {(1, 2, 2), (1, 3, 3), (1, 4, 4), (3, 4, 6), (4, 4, 5)}
MAX_OLD_DEGREE = 4


def load_weights(model: nn.Module, source: str | Path | Mapping, prefix: str = "", old_couplings: bool = False) -> None:
    """Load the weights of a model from a checkpoint, wherever in it they are.

    That may be a checkpoint of this package, one of the known package ('state_dict', 'optimizer_state_dict', 'epoch'),
    a bare state dict, with or without 'module.', or the state dict of a larger network: looked for is the one place
    with all of the model's names and shapes.

    Args:
        model: `SE3Transformer`, `SE3TransformerPooled` or any module made of this package's layers, built with the
            settings that the weights were trained with.
        source: a file (nothing in it is executed), or what was read from one.
        prefix: the end of the place, where there are several: 'blocks.3.se3'.
        old_couplings: the weights were trained with e3nn < 0.4, where some couplings had the opposite sign.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: no readable file, or not one place that fits; the message lists what does not.
        ValueError: old couplings of degrees above 4.
    """
    name = "the weights" if isinstance(source, Mapping) else str(source)
    tensors = dict(named_tensors(source if isinstance(source, Mapping) else load_checkpoint(source)))
    wanted = model.state_dict()
    place = find_place(name, tensors, wanted, prefix)
    state = {key: tensors[place + key] for key in wanted}
    model.load_state_dict(with_old_couplings(model, state) if old_couplings else state)


def export_weights(
    model: nn.Module,
    path: str | Path,
    optimizer: torch.optim.Optimizer | None = None,
    epoch: int = 0,
    old_couplings: bool = False,
) -> None:
    """Write weights as the known package does: 'state_dict', 'optimizer_state_dict', 'epoch'.

    Args:
        model: `SE3Transformer` or `SE3TransformerPooled`, with its default options.
        path: the file; it is written whole or not at all.
        optimizer: what the known package would go on training with.
        epoch: epochs that it was trained for.
        old_couplings: for use with e3nn < 0.4, see `load_weights`.
    """
    state = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
    content = {
        "state_dict": with_old_couplings(model, state) if old_couplings else state,
        "optimizer_state_dict": optimizer.state_dict() if optimizer else {},
        "epoch": epoch,
    }
    save_checkpoint(path, content)


def named_tensors(content: Mapping, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested mappings, named by their keys with dots between them."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{place}{key}", value
        elif isinstance(value, Mapping):
            yield from named_tensors(value, f"{place}{key}.")


def find_place(name: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], prefix: str) -> str:
    """What stands before all of the wanted names in one place, and one only, where the shapes fit.

    Args:
        name: of the file, for messages.
        tensors: what there is.
        wanted: what the model has.
        prefix: the end of the place, see `load_weights`.
    """
    found: Counter[str] = Counter()  # place -> how many of the wanted names it has
    for path in tensors:
        parts = path.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                found["".join(f"{part}." for part in parts[:start])] += 1
    if prefix:
        end = "." + prefix.rstrip(".") + "."
        found = Counter({place: number for place, number in found.items() if ("." + place).endswith(end)})
    if not found:
        where = f" under {prefix!r}" if prefix else ""
        ours, theirs = next(iter(wanted)), next(iter(tensors), "no tensors")
        raise CheckpointError(f"{name}: no weights of the model{where}; it has {ours}, …, the file {theirs}, …")

    complete = [place for place, number in found.items() if number == len(wanted)]
    fits = [place for place in complete if all(tensors[place + key].shape == wanted[key].shape for key in wanted)]
    if len(fits) > 1:
        places = "\n  ".join(place.rstrip(".") for place in fits)
        raise CheckpointError(
            f"{name}: weights of the model in {len(fits)} places; say which one by prefix:\n  {places}"
        )
    place = fits[0] if fits else max(found, key=found.__getitem__)
    if problems := misfits(place, tensors, wanted):
        raise CheckpointError(
            f"{name}: weights that do not fit the model; build it with the settings that they were trained with "
            "(num_layers, fibers, norm, use_layer_norm, tensor_cores, low_memory). "
            f"In {place.rstrip('.') or 'the file'}:\n  " + "\n  ".join(problems)
        )
    return place


def misfits(place: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """A line for each name under a place that the model or the file lacks, or whose shape is another one."""
    there = {path[len(place) :]: tensor for path, tensor in tensors.items() if path.startswith(place)}
    lines = []
    for key in sorted({*there, *wanted}):
        ours, theirs = (tuple(side[key].shape) if key in side else "nothing" for side in (wanted, there))
        if ours != theirs:
            lines.append(f"{key}: {theirs} in the file, {ours} in the model")
    return lines


def with_old_couplings(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the model for the other convention of couplings: radial weights of `OLD_COUPLINGS` are negated.

    Doing it twice changes nothing.
    """
    state = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, VersatileConvSE3):
            key = f"{name}.radial_func.net.{len(module.radial_func.net) - 1}.weight"
            signs = [sign for o, i in product(module.degrees_out, module.degrees_in) for sign in old_signs(i, o)]
            rows = state[key].unflatten(0, (-1, len(signs)))  # (C_out · C_in, F, H)
            state[key] = (rows * rows.new_tensor(signs)[:, None]).flatten(0, 1)
    return state


def old_signs(degree_in: int, degree_out: int) -> list[int]:
    """For every path J between two degrees the sign of its coupling before e3nn 0.4."""
    if max(degree_in, degree_out) > MAX_OLD_DEGREE:
        raise ValueError(
            f"old_couplings: known up to degree {MAX_OLD_DEGREE}, but the model couples {degree_in} to {degree_out}"
        )
    paths = range(abs(degree_in - degree_out), degree_in + degree_out + 1)
    return [-1 if tuple(sorted((J, degree_in, degree_out))) in OLD_COUPLINGS else 1 for J in paths]
