"""QM9: which value has a molecule's property (Fuchs et al. 2020, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure  # made without pyplot: needs no display, nothing to close
from torch import Tensor, nn
from tqdm import tqdm

from dataloader.qm9 import (
    ELEMENTS,
    NUM_EDGE_FEATURES,
    NUM_NODE_FEATURES,
    TARGETS,
    QM9Batch,
    QM9Dataset,
    Target,
    length_balanced_batches,
)
from experiments.augment import random_turns, turn_matrices
from se3_transformer.model import Fiber, SE3TransformerPooled
from se3_transformer.runtime.checkpoint import CheckpointError, load_checkpoint
from se3_transformer.runtime.cuda_graphs import Replayed
from se3_transformer.runtime.distributed import gather_shares, is_main, rank, world_size

NETWORK_SETTINGS = (
    "num_layers",
    "num_degrees",
    "num_channels",
    "num_heads",
    "channels_div",
    "pooling",
    "norm",
    "use_layer_norm",
    "tensor_cores",
    "low_memory",
)
AUGMENTATIONS = ("none", "rotations")
REFERENCES = ("none", "fit", "atoms")


def build_network(settings: Mapping[str, Any]) -> SE3TransformerPooled:
    """The network of some settings (`NETWORK_SETTINGS`): atom types in, one number per molecule out."""
    return SE3TransformerPooled(
        fiber_in=Fiber({0: NUM_NODE_FEATURES}),
        fiber_out=Fiber({0: settings["num_degrees"] * settings["num_channels"]}),
        fiber_edge=Fiber({0: NUM_EDGE_FEATURES}),
        output_dim=1,
        **{key: settings[key] for key in NETWORK_SETTINGS},
    )


def run_network(network: nn.Module, batch: QM9Batch, max_degree: int) -> Tensor:
    """(B,) standardised prediction for each molecule of a batch."""
    return network(batch.graph, batch.node_feats, batch.edge_feats, batch.basis(max_degree))


class QM9Task:
    """Batches, loss and validation for the trainer (see `se3_transformer.runtime.trainer.Task`).

    The loss is the mean absolute error of the target, less what the molecule's elements contribute (see
    `fit_reference`), standardised with mean and standard deviation of the training molecules.

    Args:
        dataset: all molecules.
        task: name of the target, a key of `TARGETS`.
        split: molecules for "train" and "val", see `split_molecules`.
        max_degree: of the network.
        batch_size: molecules in a batch.
        seed: of the order of molecules; each epoch has its own.
        balanced: make batches of about the same number of edges, see `length_balanced_batches`.
        num_train, num_val: train and validate on this many first molecules of these splits; 0: on all.
        reference: see `fit_reference`.
        augment: "none"; "rotations": every molecule is turned at random, which changes nothing for an equivariant
            network.
        cuda_graphs: replay forward and backward pass, see `Replayed`; batches are `QM9Batch.padded` for that.
    """

    def __init__(
        self,
        dataset: QM9Dataset,
        task: str,
        split: Mapping[str, Tensor],
        max_degree: int,
        batch_size: int,
        seed: int,
        balanced: bool,
        num_train: int,
        num_val: int,
        reference: str,
        augment: str,
        cuda_graphs: bool = False,
    ):
        for name, value in (("train", num_train), ("val", num_val)):
            if value > len(split[name]):
                raise ValueError(f"num_{name} must be at most {len(split[name])}, as many as there are, got {value}")
        self.dataset, self.target, self.max_degree = dataset, TARGETS[task], max_degree
        self._mae = f"mae [{self.target.shown_unit}]"  # name of the error where it is logged
        self.batch_size, self.seed, self.balanced, self.augment = batch_size, seed, balanced, augment
        self._padded, predictions = cuda_graphs, partial(run_network, max_degree=max_degree)
        self._predictions = Replayed(predictions) if cuda_graphs else predictions
        self.train, self.validation = split["train"][: num_train or None], split["val"][: num_val or None]
        self.column = list(TARGETS).index(task)
        self.reference = fit_reference(dataset, task, self.train, reference)
        rest = dataset.targets[:, self.column] - contributions(self.reference, dataset)  # (G,)
        known = rest[self.train]
        self.mean, self.std = known.mean().item(), known.std().item()
        if not self.std > 0:
            raise ValueError(
                f"{task}: all {len(known)} training molecules have the value {self.mean}: nothing to learn"
            )
        self._standardised = ((rest - self.mean) / self.std).float().to(dataset.device)  # (G,)

    def batches(self, epoch: int) -> Sequence[Tensor]:
        """For every batch of an epoch (B, 1) molecules; if they are turned (B, 5), with four numbers for a rotation."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if self.balanced:
            rows = length_balanced_batches(self.dataset.num_edges[self.train], self.batch_size, generator)
        else:
            rows = torch.randperm(len(self.train), generator=generator).split(self.batch_size)
        batches = [self.train[row, None] for row in rows]
        if self.augment == "none":
            return batches
        return [torch.cat([batch, random_turns(len(batch), generator)], dim=1) for batch in batches]

    def load(self, examples: Tensor) -> QM9Batch:
        """A batch of molecules whose `targets` are (B,) what the network is to predict."""
        batch = self.dataset.batch(examples[:, 0])
        molecules = examples[:, 0].to(self._standardised.device, non_blocking=True)
        batch = replace(batch, targets=self._standardised[molecules])
        if self.augment == "rotations":
            batch = batch.turn(turn_matrices(examples[:, 1:]).to(batch.rotations, non_blocking=True))
        return batch.padded() if self._padded else batch

    def loss(self, model: nn.Module, batch: QM9Batch) -> tuple[Tensor, dict[str, Tensor]]:
        error = (self._predictions(model, batch)[: len(batch.targets)] - batch.targets).abs().mean()
        return error, {self._mae: error * self.std * self.target.factor}

    def validate(self, model: nn.Module) -> dict[str, float]:
        """MAE in the unit that is shown; it chooses the best epoch."""
        self._predicted = predict(model, self.info, self.dataset, self.validation)
        mae = mean_absolute_error(self._true(), self._predicted) * self.target.factor
        return {self._mae: mae, "selection": mae}

    def figures(self, model: nn.Module) -> dict[str, Figure]:
        return {"parity": plot_parity(self._true(), self._predicted, self.target)}

    def _true(self) -> Tensor:
        return self.dataset.targets[self.validation, self.column]

    @property
    def info(self) -> dict:
        """What `predict` has to know besides the network; it travels in the checkpoint."""
        graph = {"graph": self.dataset.settings["graph"], "radius": self.dataset.settings.get("radius")}
        values = {"reference": self.reference, "mean": self.mean, "std": self.std}
        return {"task": self.target.name, "max_degree": self.max_degree} | values | graph


def fit_reference(dataset: QM9Dataset, task: str, molecules: Tensor, kind: str) -> list[float]:
    """What an atom of each element of `ELEMENTS` contributes to a target, in the unit that is stored.

    Args:
        dataset: all molecules.
        task: name of the target.
        molecules: those to fit to, for training.
        kind: "none": nothing; "fit": least squares, target ≈ constant + Σ over atoms, so that the network learns what
            bonds and geometry add; "atoms": energies of free atoms, the same fit to target less atomisation energy, so
            that the network learns the latter.

    Raises:
        ValueError: no atomisation energies of this target, or none of these molecules has an element of the others.
    """
    if kind == "none":
        return [0.0] * len(ELEMENTS)
    counts = dataset.element_counts[molecules]  # (B, 5)
    for element, found, there in zip(ELEMENTS, counts.sum(0), dataset.element_counts.sum(0)):
        if there and not found:
            raise ValueError(
                f"reference {kind}: none of {len(molecules)} training molecules has {element}, so that its share "
                "cannot be known; train on more molecules, or give reference none"
            )
    values = dataset.targets[molecules, list(TARGETS).index(task)]
    if kind == "atoms":
        if f"{task}_atom" not in TARGETS:
            raise ValueError(f"reference atoms is for U0, U, H and G, which have atomisation energies, got task {task}")
        values = values - dataset.targets[molecules, list(TARGETS).index(f"{task}_atom")]
    known = ~values.isnan()
    if not known.any():
        raise ValueError(f"reference {kind}: no training molecule has {task}_atom; give reference fit")
    counts = torch.cat([counts, torch.ones(len(counts), 1)], dim=1)[known]
    return torch.linalg.lstsq(counts, values[known], driver="gelsd").solution[: len(ELEMENTS)].tolist()


def contributions(reference: Sequence[float], dataset: QM9Dataset) -> Tensor:
    """(G,) float64 what the elements of every molecule contribute, see `fit_reference`."""
    if not any(reference):
        return torch.zeros(len(dataset), dtype=torch.float64)
    return dataset.element_counts @ torch.tensor(reference, dtype=torch.float64)


def expected_without_network(info: Mapping[str, Any], dataset: QM9Dataset, molecules: Tensor) -> Tensor:
    """(G,) what is known of a target without looking at structures: the mean over the training molecules, and what the
    elements contribute.
    """
    return info["mean"] + contributions(info["reference"], dataset)[molecules]


def check_same_data(info: Mapping[str, Any], dataset: QM9Dataset, checkpoint: str) -> None:
    """Raise ValueError unless a network was trained on this very data set: with another, the splits would differ."""
    if info["data"] != dataset.identity:
        graph = {key: info[key] for key in ("graph", "radius") if info[key] is not None}
        raise ValueError(
            f"{checkpoint} was trained on other molecules or other graphs ({graph}) than this cache holds "
            f"({dataset.settings}); give --name and --data_dir of the cache that it was trained on"
        )


@torch.no_grad()
def predict(
    network: nn.Module, info: Mapping[str, Any], dataset: QM9Dataset, molecules: Tensor, batch_size: int = 256
) -> Tensor:
    """Predictions of a network for some molecules, shared by all processes.

    Args:
        network: see `build_network`.
        info: see `QM9Task.info`.
        dataset: the molecules, with the kind of graph that the network was trained on.
        molecules: (G,) which ones.
        batch_size: molecules in a batch.

    Returns:
        (G,) float64 on the CPU, in the unit that `TARGETS` says is stored.
    """
    device = next(network.parameters()).device
    order = dataset.num_edges[molecules].argsort(stable=True)  # molecules of one size together take least memory
    share = molecules[order][rank() :: world_size()]
    parts = [
        run_network(network, dataset.batch(part).to(device, non_blocking=True), info["max_degree"]).double()
        for part in tqdm(share.split(batch_size), desc="predicting", leave=False, disable=None if is_main() else True)
    ]
    empty = torch.zeros(0, dtype=torch.float64, device=device)
    sorted_values = gather_shares(torch.cat([*parts, empty]), len(molecules)).cpu()
    values = torch.empty_like(sorted_values)
    values[order] = sorted_values
    return expected_without_network(info, dataset, molecules) + info["std"] * values


def mean_absolute_error(true: Tensor, predicted: Tensor) -> float:
    return (predicted - true).abs().mean().item()


def plot_parity(true: Tensor, predicted: Tensor, target: Target) -> Figure:
    """Predicted against true values, (G,) each in the stored unit, shown in the shown unit, with the MAE."""
    true, predicted = (values * target.factor for values in (true, predicted))
    mae = mean_absolute_error(true, predicted)
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot(true, predicted, ".", ms=2, alpha=0.4, rasterized=True)
    low, high = torch.cat([true, predicted]).aminmax()
    axes.plot([low, high], [low, high], color="black", lw=0.8)
    axes.set(
        title=f"{target.name}: {target.description}\nMAE {mae:.4g} {target.shown_unit}, {len(true):,} molecules",
        xlabel=f"true [{target.shown_unit}]",
        ylabel=f"predicted [{target.shown_unit}]",
        aspect="equal",
    )
    axes.grid(alpha=0.3)
    return figure


def load_network(path: str | Path) -> tuple[SE3TransformerPooled, dict]:
    """The trained network of a checkpoint that `train_qm9.py` wrote, ready to predict, and its `QM9Task.info`.

    Raises:
        FileNotFoundError, CheckpointError: no usable checkpoint.
    """
    content = load_checkpoint(path)
    if not {"network", "info", "model"} <= content.keys():
        raise CheckpointError(f"{path}: expected a checkpoint of train_qm9.py, got one with {', '.join(content)}")
    try:
        network = build_network(content["network"])
        network.load_state_dict(content["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: weights that do not fit the settings beside them ({error})") from error
    return network.eval(), {"reference": [0.0] * len(ELEMENTS)} | content["info"]  # older ones have no reference
