"""Prints the N-body table of the README from the result files of train_nbody.py in results/nbody/.

    python results/nbody_table.py

A row is one preset, network and number of simulations; runs that differ in their seed alone are averaged.
"""

import json
from pathlib import Path
from statistics import mean, stdev

NETWORK = ("num_iterations", "num_layers", "num_degrees", "num_channels", "num_heads", "channels_div")


def main() -> None:
    rows: dict[tuple, list[dict]] = {}
    for path in sorted((Path(__file__).parent / "nbody").glob("*.json")):
        result = json.loads(path.read_text())
        settings = result["settings"]
        network = ", ".join(f"{settings[key]} {key.removeprefix('num_')}" for key in NETWORK if settings[key] != 1)
        key = (settings["preset"], result["simulations"]["train"], settings["epochs"], network)
        rows.setdefault(key, []).append(result)
    print(
        "| protocol | simulations | epochs | network | seeds | MSE x | MSE v | no change x / v | constant velocity x |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for (preset, simulations, epochs, network), results in sorted(rows.items()):
        x, v = ([result["test"][key] for result in results] for key in ("mse_x", "mse_v"))
        baselines = results[0]["baselines"]
        print(
            f"| `{preset}` | {simulations:,} | {epochs} | {network} | {len(results)} | {spread(x, 5)} | {spread(v, 4)} "
            f"| {baselines['no_change_x']:.4f} / {baselines['no_change_v']:.4f} "
            f"| {baselines['constant_velocity_x']:.4f} |"
        )


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
