"""Trains an SE(3)-Transformer on a property of the molecules that preprocess_qm9.py cached, and reports its test error.

    python train_qm9.py --preset tiny                       # minutes on a CPU: data/qm9_homo_result.json, runs/qm9_homo
    python train_qm9.py --preset fast --task gap            # on a GPU
    torchrun --nproc_per_node 4 train_qm9.py --preset fast  # on four
    python train_qm9.py --preset fast --benchmark 50        # training throughput over 50 steps, nothing is saved
    python train_qm9.py --evaluate data/qm9_homo_best.pt    # test error of a checkpoint
    tensorboard --logdir runs

Interrupted or killed, it goes on where it was when the same command is given again; finished, it only prints its
report.
"""

import json
import math
import tempfile
import time
from pathlib import Path

import torch
from easydict import EasyDict

from dataloader.qm9 import TARGETS, QM9Dataset, split_molecules
from experiments.qm9 import (
    AUGMENTATIONS,
    NETWORK_SETTINGS,
    REFERENCES,
    QM9Task,
    build_network,
    check_same_data,
    expected_without_network,
    load_network,
    mean_absolute_error,
    plot_parity,
    predict,
)
from se3_transformer.model.layers.pooling import POOLINGS
from se3_transformer.runtime.cuda_graphs import check_cuda_graphs
from se3_transformer.runtime.distributed import exclusive_run, is_main, process_group
from se3_transformer.runtime.files import RunFiles, run_files, write_file
from se3_transformer.runtime.script import run_script
from se3_transformer.runtime.settings import parse_settings, require, require_file_name, require_seed
from se3_transformer.runtime.trainer import WITHOUT_INFLUENCE, Trainer, check_training_settings

SETTINGS = EasyDict(
    preset="tiny",  # paper: as in the paper; fast: the best known recipe; tiny: minutes on a CPU
    task="homo",  # what to predict, one of the 19 labels
    data_dir="data",  # where the cache is, and where checkpoints and results go
    name="qm9",  # the molecules: cache in data_dir/cache/name
    run_name="",  # name of this run, for its files; by default NAME_TASK
    split_seed=0,  # of the random split into training, validation and test molecules
    num_train=0,  # train on this many of the training molecules; 0: on all
    num_val=0,  # validate on this many of the validation molecules; 0: on all
    num_layers=7,  # attention blocks
    num_degrees=4,  # degrees 0 … num_degrees-1 in the hidden layers
    num_channels=32,  # hidden channels of each degree
    num_heads=8,  # attention heads
    channels_div=2,  # keys and values have num_channels / channels_div channels
    pooling="max",  # over the atoms: max, as published, avg, or sum: for what grows with the molecule, like U0 or zpve
    reference="none",  # share of each element, not learned: none, as published; fit: least squares; atoms: free atoms
    norm=True,  # equivariant norm after every attention block
    use_layer_norm=True,  # layer norm in the radial networks
    tensor_cores=True,  # one radial network for all pairs of degrees, where the fibers allow it
    low_memory=False,  # one radial network per pair of degrees, and least memory
    augment="none",  # of training molecules: none, or rotations, which change nothing for this network
    epochs=100,  # passes over the training molecules
    batch_size=240,  # molecules in an optimiser step, over all processes
    accumulate=1,  # parts of a batch that are computed one after the other, to save memory
    balanced=False,  # batches of about the same number of edges
    learning_rate=2e-3,  # of Adam, at its highest
    final_learning_rate=2e-4,  # at the end of the cosine
    warmup_steps=100,  # steps of linear increase to the highest learning rate
    weight_decay=0.1,  # decoupled, of matrices
    max_grad_norm=1.0,  # gradients are clipped to this norm
    ema_decay=0.999,  # of the moving average of weights that is validated and kept; 0: none
    precision="float32",  # of products: float32, tf32, bfloat16 or float16
    compile=False,  # torch.compile the network, for GPUs: on a CPU our own compiled code is faster
    cuda_graphs=False,  # launch forward and backward pass as one each, recorded for every size of a batch
    validate_every=1,  # epochs between two validations; the last epoch is always validated
    seed=0,  # of weights and order
    device="auto",  # cpu, cuda, cuda:1, …; auto: cuda where there is any
    resident=True,  # keep all molecules on the GPU
    threads=0,  # CPU threads; 0: all
    workers=0,  # processes that load batches on the CPU; 0: none but the training one
    log_every=50,  # steps between two records
    save_every=0,  # steps between two saved states, besides one after every epoch; 0: none
    max_minutes=0.0,  # stop after this time, start and validation included, to go on another time; 0: no limit
    benchmark=0,  # only measure the training throughput over this many steps; 0: train
    evaluate="",  # only measure the test error of this checkpoint
)
PRESETS = {
    "tiny": {
        "num_layers": 3,
        "num_degrees": 2,
        "num_channels": 16,
        "num_heads": 4,
        "epochs": 4,
        "batch_size": 128,
        "final_learning_rate": 1e-5,
        "weight_decay": 0.01,
    },
    "fast": {"precision": "bfloat16"},
    "paper": {
        "norm": False,
        "use_layer_norm": False,
        "tensor_cores": False,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1e6,  # the paper clips nothing
        "ema_decay": 0.0,
    },
}


def main() -> None:
    settings = parse_settings(SETTINGS, PRESETS, __doc__, check)
    deadline = time.monotonic() + 60 * settings.max_minutes if settings.max_minutes else math.inf
    settings.run_name = settings.run_name or f"{settings.name}_{settings.task}"
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with process_group(settings.device) as device:
        rebuild = f"python preprocess_qm9.py --name {settings.name} --data_dir {settings.data_dir}"
        if settings.workers and settings.resident and device.type == "cuda":
            raise ValueError(
                "workers load batches on the CPU, but resident true keeps the molecules on the GPU: choose one"
            )
        check_cuda_graphs(settings, device)
        resident = device if settings.resident else "cpu"
        dataset = QM9Dataset.open(Path(settings.data_dir) / "cache" / settings.name, None, resident, rebuild)
        if settings.evaluate:
            evaluate(settings, dataset, device)
        elif settings.benchmark:
            benchmark(settings, dataset, device)
        else:
            files = run_files(settings.data_dir, settings.run_name)
            with exclusive_run(files, device):
                train(settings, dataset, files, device, deadline)


def check(settings: EasyDict) -> None:
    """Raise ValueError for settings that make no sense."""
    positive = ["num_layers", "num_degrees", "num_channels", "num_heads", "channels_div"]
    require(settings, dict.fromkeys(positive, 1) | dict.fromkeys(["num_train", "num_val", "benchmark"], 0))
    require_seed(settings, "split_seed")
    check_training_settings(settings)
    for key in ("name", "run_name"):
        if settings[key]:
            require_file_name(settings, key)
    choices = {"task": TARGETS, "pooling": POOLINGS, "reference": REFERENCES, "augment": AUGMENTATIONS}
    for key, known in choices.items():
        if settings[key] not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}, got {settings[key]!r}")


def split_of(dataset: QM9Dataset, task: str, seed: int) -> dict[str, torch.Tensor]:
    """The random split of the molecules whose target is known; says how many there are."""
    known = dataset.targets[:, list(TARGETS).index(task)]
    split = split_molecules(known, seed)
    if is_main():
        sizes = ", ".join(f"{len(molecules):,} {name}" for name, molecules in split.items())
        unknown = int(known.isnan().sum())
        print(f"{task}: {sizes} molecules; {unknown:,} of {len(dataset):,} left out, their {task} is not known")
    return split


def make_trainer(
    settings: EasyDict, dataset: QM9Dataset, files: RunFiles, device: torch.device, deadline: float
) -> tuple[Trainer, torch.Tensor]:
    """The trainer of a run, where that left off, and the test molecules."""
    split = split_of(dataset, settings.task, settings.split_seed)
    torch.manual_seed(settings.seed)
    network = build_network(settings)
    if settings.compile:
        network.compile(dynamic=True)
    of_batches = ["batch_size", "seed", "balanced", "num_train", "num_val", "augment", "cuda_graphs"]
    task_settings = {key: settings[key] for key in [*of_batches, "reference"]}
    task = QM9Task(dataset, settings.task, split, settings.num_degrees - 1, **task_settings)
    describe = {
        "network": {key: settings[key] for key in NETWORK_SETTINGS},
        "info": task.info | {"split_seed": settings.split_seed, "data": dataset.identity},
    }
    without_influence = WITHOUT_INFLUENCE | {"data_dir", "resident", "benchmark", "evaluate"}
    decisive = {key: value for key, value in settings.items() if key not in without_influence}
    decisive["data"] = dataset.identity
    control = {key: settings[key] for key in ("workers", "log_every", "save_every")}
    return Trainer(network, task, decisive, *files, describe, device, deadline=deadline, **control), split["test"]


def train(settings: EasyDict, dataset: QM9Dataset, files: RunFiles, device: torch.device, deadline: float) -> None:
    """Train, or go on, and report."""
    trainer, test = make_trainer(settings, dataset, files, device, deadline)
    if is_main():
        parameters = sum(p.numel() for p in trainer.model.parameters())
        print(f"training on {len(trainer.task.train):,} molecules; {parameters:,} parameters; {device}")
        if trainer.step:
            print(f"going on after {trainer.step} of {settings.epochs * trainer.steps_per_epoch} steps ({files.last})")
    trainer.train()
    report(trainer, settings, test, files.best)


def benchmark(settings: EasyDict, dataset: QM9Dataset, device: torch.device) -> None:
    """Measure the training throughput; nothing is saved."""
    with tempfile.TemporaryDirectory() as directory:
        files = run_files(directory, settings.run_name, runs=directory)
        trainer, _ = make_trainer(settings, dataset, files, device, deadline=math.inf)
        rate = trainer.benchmark(settings.benchmark)
    if is_main():
        print(f"training throughput: {rate:,.1f} molecules/s, mean over {settings.benchmark} steps on {device}")


def report(trainer: Trainer, settings: EasyDict, test: torch.Tensor, best_path: Path) -> None:
    """Test error of the best epoch beside that of the mean: printed, as JSON, as a figure, and to TensorBoard."""
    task = trainer.task
    network, info = load_network(best_path)
    facts, figure = test_error(network.to(trainer.device), info, task.dataset, test)
    if not is_main():
        return
    best_epoch = trainer.best_epoch
    result = {
        **facts,
        "best_epoch": best_epoch["epoch"],
        "validation_mae": best_epoch["val_selection"],
        "molecules": {"train": len(task.train), "validation": len(task.validation), "test": len(test)},
        "train_seconds": sum(facts["seconds"] for facts in trainer.history),
        "settings": trainer.settings,
    }
    result_path, figure_path = (
        best_path.with_name(f"{settings.run_name}_{end}") for end in ("result.json", "parity.png")
    )
    write_file(figure_path, lambda file: figure.savefig(file, dpi=110, format="png"))
    trainer.log.figure("test/parity", figure, trainer.step)
    unit = facts["unit"]
    errors = {f"mae [{unit}]": facts["mae"], f"mae of the {facts['baseline']} [{unit}]": facts["baseline_mae"]}
    trainer.log.outcome(trainer.settings, errors, trainer.step)
    write_file(result_path, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))
    print(f"\nbest epoch {best_epoch['epoch']} of {settings.epochs}, chosen by validation")
    print_error(facts)
    print(f"weights {best_path}   result {result_path}   figure {figure_path}   curves: tensorboard --logdir runs")


def evaluate(settings: EasyDict, dataset: QM9Dataset, device: torch.device) -> None:
    """Test error of a checkpoint, on the test molecules of its own split."""
    network, info = load_network(settings.evaluate)
    check_same_data(info, dataset, settings.evaluate)
    test = split_of(dataset, info["task"], info["split_seed"])["test"]
    facts, _ = test_error(network.to(device), info, dataset, test)
    if is_main():
        print_error(facts)


def test_error(network, info: dict, dataset: QM9Dataset, test: torch.Tensor):
    """Errors on the test molecules, in the unit that is shown, and the parity plot."""
    target = TARGETS[info["task"]]
    true = dataset.targets[test, list(TARGETS).index(target.name)]
    predicted = predict(network, info, dataset, test)
    facts = {
        "task": target.name,
        "unit": target.shown_unit,
        "mae": mean_absolute_error(true, predicted) * target.factor,
        "baseline": "mean and elements" if any(info["reference"]) else "mean",
        "baseline_mae": mean_absolute_error(true, expected_without_network(info, dataset, test)) * target.factor,
        "test_molecules": len(test),
    }
    return facts, plot_parity(true, predicted, target)


def print_error(facts: dict) -> None:
    """The table of test errors."""
    print(f"Test error of {facts['task']} on {facts['test_molecules']:,} molecules: MAE, {facts['unit']}")
    baseline = f"{facts['baseline']} of the training set"
    for name, mae in ((baseline, facts["baseline_mae"]), ("SE(3)-Transformer", facts["mae"])):
        print(f"{name:38}{mae:12.5g}")


if __name__ == "__main__":
    run_script(main, interrupted="interrupted: the same command goes on")
