"""What equivariance buys: N-body test error against the number of training simulations, of three ways to learn.

    python preprocess_nbody.py --preset egnn
    python results/nbody_learning_curve.py --threads 1     # again and again, if it is interrupted

Trains, with `train_nbody.py --preset egnn`, the SE(3)-Transformer, the same attention without equivariance, and this
with random rotations of the training simulations, all for the same number of steps. Prints the table, and writes it
to results/nbody/learning_curve.json, with a plot in docs/learning_curve.png. Further flags go to train_nbody.py as they
are.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
BATCH_SIZE = 100
WAYS = {  # name: flags of train_nbody.py
    "SE(3)-Transformer": ["--network", "equivariant", "--augment", "none"],
    "plain attention": ["--network", "plain", "--augment", "none"],
    "plain attention, random rotations": ["--network", "plain", "--augment", "rotations"],
}
NETWORK = ["--num_iterations", "1", "--num_layers", "3", "--learning_rate", "2e-3", "--weight_decay", "0"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", default="100,300,1000,3000", help="numbers of simulations (default %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=1500, help="optimiser steps of each training (default %(default)s)"
    )
    parser.add_argument("--data_dir", default="data", help="where the cache is (default %(default)s)")
    parser.add_argument("--output", default=str(ROOT / "results/nbody/learning_curve.json"), help="file of the table")
    parser.add_argument("--figure", default=str(ROOT / "docs/learning_curve.png"), help="file of the plot")
    arguments, flags = parser.parse_known_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    data_dir = Path(arguments.data_dir)
    errors = {
        name: [train(f"curve_{way}_{size}", size, arguments.steps, data_dir, [*way_flags, *flags]) for size in sizes]
        for way, (name, way_flags) in enumerate(WAYS.items())
    }
    result = {"simulations": sizes, "steps": arguments.steps, "flags": [*NETWORK, *flags], "mse_x": errors}
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    plot(sizes, errors).savefig(arguments.figure, dpi=110)
    print("\n| MSE x of | " + " | ".join(f"{size:,}" for size in sizes) + " |\n|---|" + "---|" * len(sizes))
    for name, row in errors.items():
        print(f"| {name} | " + " | ".join(f"{error:.4f}" for error in row) + " |")


def train(run_name: str, size: int, steps: int, data_dir: Path, flags: list[str]) -> float:
    """Test error of one training; exits where that fails or is interrupted."""
    epochs = max(1, steps // -(-size // BATCH_SIZE))
    lengths = {"num_train": size, "batch_size": BATCH_SIZE, "epochs": epochs, "validate_every": max(1, epochs // 20)}
    names = {"data_dir": data_dir, "run_name": run_name}
    command = [sys.executable, str(ROOT / "train_nbody.py"), "--preset", "egnn", *NETWORK]
    command += [f"--{key}={value}" for key, value in (lengths | names).items()]
    if status := subprocess.run([*command, *flags], check=False).returncode:
        sys.exit(status)
    return json.loads((data_dir / f"{run_name}_result.json").read_text())["test"]["mse_x"]


def plot(sizes: list[int], errors: dict[str, list[float]]) -> Figure:
    """Error against number of simulations, both logarithmic."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, row in errors.items():
        axes.loglog(sizes, row, "o-", label=name)
    axes.set(xlabel="training simulations", ylabel="test MSE of the positions")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
