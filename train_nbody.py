"""Trains an SE(3)-Transformer on the N-body simulations that preprocess_nbody.py cached, and reports its test error.

    python train_nbody.py                          # preset readme: results in data/nbody_result.json, runs/nbody
    python train_nbody.py --preset paper           # no walls, 10 frames ahead, from the first frame
    python train_nbody.py --preset egnn            # no walls, from frame 30 to frame 40, positions alone
    python train_nbody.py --seed 1 --run_name nbody_s1  # another seed, under another name
    python train_nbody.py --evaluate data/nbody_best.pt # test error of a checkpoint
    tensorboard --logdir runs

Interrupted, it goes on where it was when the same command is given again; finished, it only prints its report.
"""

import json
import math
import time
from pathlib import Path

import torch
from easydict import EasyDict

from dataloader.nbody import NBodyDataset
from dataloader.nbody_protocols import cache_settings
from experiments.nbody import (
    AUGMENTATIONS,
    NETWORKS,
    NBodyNetwork,
    NBodyTask,
    PlainNetwork,
    equivariance_error,
    evaluate,
    learned_errors,
    load_network,
    plot_trajectories,
)
from se3_transformer.runtime.checkpoint import load_checkpoint
from se3_transformer.runtime.cuda_graphs import check_cuda_graphs
from se3_transformer.runtime.distributed import exclusive_run, is_main, process_group
from se3_transformer.runtime.files import RunFiles, run_files, write_file
from se3_transformer.runtime.script import run_script
from se3_transformer.runtime.settings import parse_settings, require, require_file_name
from se3_transformer.runtime.trainer import WITHOUT_INFLUENCE, Trainer, check_training_settings

SETTINGS = EasyDict(
    preset="readme",  # readme: with walls, 5 frames ahead; paper, egnn: without walls, 10 frames ahead
    data_dir="data",  # where the cache is, and where checkpoints and results go
    name="nbody",  # the simulations: cache in data_dir/cache/name
    box_size=5.0,  # reflecting walls of the simulations, at ±box_size on each axis; 0: none
    run_name="",  # name of this run, for its files; by default that of the simulations
    network="equivariant",  # or plain: attention that knows nothing of rotations, for comparison
    num_iterations=1,  # times that the network is applied on the way to the target, to where it has moved the particles
    num_layers=4,  # attention blocks
    num_degrees=4,  # degrees 0 … num_degrees-1 in the hidden layers
    num_channels=8,  # hidden channels of each degree
    num_heads=2,  # attention heads
    channels_div=4,  # keys and values have num_channels / channels_div channels
    num_radial=16,  # radial functions of the distance on each edge
    num_train=0,  # train on this many first simulations; 0: on all
    first_start_frame=0,  # training starts at this frame, or a later one
    num_start_frames=0,  # training starts at a random one of this many frames; 0: of all that leave room for the target
    augment="none",  # of training simulations: none; rotations; symmetries, that is also mirrors and opposite charges
    loss_on_the_way=True,  # take the loss after every iteration, at the frames on the way; false: at the target alone
    epochs=100,  # passes over the simulations, one start frame each
    batch_size=128,  # simulations in an optimiser step, over all processes
    accumulate=1,  # parts of a batch that are computed one after the other, to save memory
    learning_rate=1e-3,  # of Adam, at its highest
    final_learning_rate=1e-5,  # at the end of the cosine
    warmup_steps=100,  # steps of linear increase to the highest learning rate
    weight_decay=0.0,  # decoupled, of matrices
    max_grad_norm=1.0,  # gradients are clipped to this norm
    ema_decay=0.995,  # of the moving average of weights that is validated and kept; 0: none
    position_weight=4.0,  # of MSE x in the loss
    velocity_weight=1.0,  # of MSE v in the loss; 0: positions alone are learned, and choose the best epoch
    precision="float32",  # of products: float32, tf32, bfloat16 or float16
    cuda_graphs=False,  # launch forward and backward pass as one each, recorded for every size of a batch
    validate_every=5,  # epochs between two validations; the last epoch is always validated
    seed=0,  # of weights, order and start frames
    device="auto",  # cpu, cuda, cuda:1, …; auto: cuda where there is any
    threads=0,  # CPU threads; 0: all
    workers=0,  # processes that load batches on the CPU; 0: none but the training one
    log_every=50,  # steps between two records
    save_every=0,  # steps between two saved states, besides one after every epoch; 0: none
    max_minutes=0.0,  # stop after this time, start and validation included, to go on another time; 0: no limit
    evaluate="",  # only measure the test error of this checkpoint
)
ITERATIVE = {
    "box_size": 0.0,
    "num_iterations": 5,
    "num_layers": 2,
    "num_degrees": 2,
    "num_channels": 16,
    "num_heads": 4,
    "learning_rate": 3e-3,
}
PRESETS = {
    "readme": {},
    "paper": ITERATIVE | {"name": "nbody_paper", "num_start_frames": 8},
    "egnn": ITERATIVE
    | {
        "name": "nbody_egnn",
        "first_start_frame": 30,
        "num_start_frames": 1,
        "augment": "symmetries",
        "loss_on_the_way": False,
        "velocity_weight": 0.0,
        "batch_size": 100,
        "epochs": 140,
        "weight_decay": 0.1,
    },
}


def main() -> None:
    settings = parse_settings(SETTINGS, PRESETS, __doc__, check)
    deadline = time.monotonic() + 60 * settings.max_minutes if settings.max_minutes else math.inf
    settings.run_name = settings.run_name or settings.name
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with process_group(settings.device) as device:
        if settings.workers and device.type == "cuda":
            raise ValueError(
                "workers load batches on the CPU, but the simulations are kept on the GPU: leave workers at 0"
            )
        if settings.evaluate:
            evaluate_checkpoint(settings, device)
            return
        check_cuda_graphs(settings, device)
        files = run_files(settings.data_dir, settings.run_name)
        with exclusive_run(files, device):
            train(settings, files, device, deadline)


def open_split(settings: EasyDict, split: str, device: torch.device) -> NBodyDataset:
    data_dir = Path(settings.data_dir)
    rebuild = f"python preprocess_nbody.py --preset {settings.preset} --name {settings.name} --data_dir {data_dir}"
    return NBodyDataset(data_dir / "cache" / settings.name, split, cache_settings(settings.preset), device, rebuild)


def train(settings: EasyDict, files: RunFiles, device: torch.device, deadline: float) -> None:
    """Train, or go on, and report."""
    train, validation, test = (open_split(settings, split, device) for split in ("train", "val", "test"))
    torch.manual_seed(settings.seed)
    shape = ["box_size", "num_iterations", "num_layers", "num_degrees", "num_channels", "num_heads", "channels_div"]
    network_settings = {"interval": train.interval} | {key: settings[key] for key in [*shape, "num_radial"]}
    network = NETWORKS[settings.network](**network_settings)
    weights, frames = ["position_weight", "velocity_weight"], ["first_start_frame", "num_start_frames"]
    of_batches = ["batch_size", "seed", "num_train", *frames, "augment", "cuda_graphs"]
    task_settings = {key: settings[key] for key in [*of_batches, *weights]}
    num_targets = settings.num_iterations if settings.loss_on_the_way else 1
    task = NBodyTask(train, validation, **task_settings, num_targets=num_targets)
    without_influence = WITHOUT_INFLUENCE | {"data_dir", "evaluate"}
    decisive = {key: value for key, value in settings.items() if key not in without_influence}
    trainer = Trainer(
        network,
        task,
        decisive | {"data": train.identity},
        *files,
        describe={"network": network_settings | {"network": settings.network}},
        device=device,
        deadline=deadline,
        **{key: settings[key] for key in ("workers", "log_every", "save_every")},
    )
    if is_main():
        parameters = sum(p.numel() for p in network.parameters())
        print(f"{task.num_train:,} simulations of {train.num_particles} particles; {parameters:,} parameters")
        if trainer.step:
            print(f"going on after epoch {trainer.epoch} of {settings.epochs} ({files.last})")
    trainer.train()
    report(load_network(files.best).to(device), test, trainer, settings, files.best)


def check(settings: EasyDict) -> None:
    """Raise ValueError for settings that make no sense."""
    positive = ["num_iterations", "num_layers", "num_degrees", "num_channels", "num_heads", "channels_div"]
    require(settings, dict.fromkeys(positive, 1) | {"num_radial": 2})
    not_negative = ["box_size", "num_train", "first_start_frame", "num_start_frames"]
    require(settings, dict.fromkeys([*not_negative, "position_weight", "velocity_weight"], 0))
    if not settings.position_weight + settings.velocity_weight > 0:
        raise ValueError("position_weight or velocity_weight must be positive, got 0 for both")
    for key, known in (("network", NETWORKS), ("augment", AUGMENTATIONS)):
        if settings[key] not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}, got {settings[key]!r}")
    if settings.augment != "none" and settings.box_size:
        raise ValueError(f"augment must be none where there are walls, which do not turn, got {settings.augment!r}")
    check_training_settings(settings)
    for key in ("name", "run_name"):
        if settings[key]:
            require_file_name(settings, key)


def evaluate_checkpoint(settings: EasyDict, device: torch.device) -> None:
    """Test error of a checkpoint on the test simulations of the protocol that it was trained in."""
    network = load_network(settings.evaluate).to(device)
    trained = load_checkpoint(settings.evaluate)["settings"]
    if differing := [key for key in ("preset", "box_size") if trained[key] != settings[key]]:
        flags, given = (" ".join(f"--{key} {values[key]}" for key in differing) for values in (trained, settings))
        raise ValueError(f"{settings.evaluate} was trained with {flags}, got {given}; give the former")
    test = open_split(settings, "test", device)
    errors = test_errors(network, test, settings)
    if is_main():
        print_errors(network, test, errors, settings.evaluate)


def report(network: NBodyNetwork, test: NBodyDataset, trainer: Trainer, settings: EasyDict, best_path: Path) -> None:
    """Test errors of the best epoch beside the baselines: printed, as JSON, as a figure, and to TensorBoard."""
    errors = test_errors(network, test, settings)
    if not is_main():
        return
    best_epoch = trainer.best_epoch
    result = {
        "test": errors,
        "baselines": test.baselines,
        "equivariance_error": symmetry_error(network, test),
        "best_epoch": best_epoch["epoch"],
        "validation": {key: best_epoch[f"val_{key}"] for key in errors},
        "simulations": {"train": trainer.task.num_train, "test": len(test)},
        "train_seconds": sum(facts["seconds"] for facts in trainer.history),
        "settings": trainer.settings,
    }
    result_path = best_path.with_name(f"{settings.run_name}_result.json")
    figure = plot_trajectories(network, test)
    figure_path = best_path.with_name(f"{settings.run_name}_trajectories.png")
    write_file(figure_path, lambda file: figure.savefig(file, dpi=110, format="png"))
    trainer.log.figure("test/trajectories", figure, trainer.step)
    trainer.log.outcome(trainer.settings, errors, trainer.step)
    write_file(result_path, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))
    print_errors(network, test, errors, f"best epoch {best_epoch['epoch']} chosen by validation")
    print(f"\nweights {best_path}   result {result_path}   figure {figure_path}   curves: tensorboard --logdir runs")


def test_errors(network: NBodyNetwork, test: NBodyDataset, settings: EasyDict) -> dict[str, float]:
    """Errors of what was learned."""
    errors = evaluate(network, test)
    return {name: errors[name] for name in learned_errors(settings.velocity_weight)}


def symmetry_error(network: NBodyNetwork, test: NBodyDataset) -> float:
    """Equivariance error on the first test simulations."""
    return equivariance_error(network, test.batch(torch.arange(min(64, len(test)))))


def print_errors(network: NBodyNetwork, test: NBodyDataset, errors: dict[str, float], what: str) -> None:
    """The table of test errors."""
    no_change_x, no_change_v, constant_velocity_x = test.baselines.values()
    rows = {
        "no change": {"mse_x": no_change_x, "mse_v": no_change_v},
        "constant velocity": {"mse_x": constant_velocity_x, "mse_v": no_change_v},
        {NBodyNetwork: "SE(3)-Transformer", PlainNetwork: "plain attention"}[type(network)]: errors,
    }
    print(f"\nTest error on {len(test):,} simulations, {what}")
    print(" " * 20 + "".join({"mse_x": "     MSE x", "mse_v": "     MSE v"}[key] for key in errors))
    for name, row in rows.items():
        print(f"{name:20}" + "".join(f"{row[key]:10.5f}" for key in errors))
    print(f"equivariance error {symmetry_error(network, test):.1e} (relative)")


if __name__ == "__main__":
    run_script(main, interrupted="interrupted: the same command goes on")
