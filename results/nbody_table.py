"""Prints the N-body tables of docs/results.md from the result files of train_nbody.py in results/nbody/.

    python results/nbody_table.py

A row is one preset, network and number of simulations; runs that differ in their seed alone are averaged. The protocol
`egnn` predicts something else than the two others, so it has a table of its own.
"""

import json
from pathlib import Path
from statistics import mean, stdev

NETWORK = ("num_iterations", "num_layers", "num_degrees", "num_channels", "num_heads", "channels_div")
TRAINING = ("preset", "epochs", "num_start_frames", "weight_decay")
# Further settings of the training, and what was done before they could be chosen: older files lack them.
CHOSEN_LATER = {"first_start_frame": 0, "loss_on_the_way": True, "augment": "none"}
PUBLISHED = {"SE(3)-Transformer": 0.0244, "EGNN": 0.0071, "SEGNN": 0.0043, "CGENN": 0.0039}  # on 3,000 simulations


def main() -> None:
    rows: dict[tuple, list[dict]] = {}
    for path in sorted((Path(__file__).parent / "nbody").glob("*_result.json")):
        result = json.loads(path.read_text())
        settings = result["settings"]
        later = (settings.get(key, before) for key, before in CHOSEN_LATER.items())
        key = (result["simulations"]["train"], *(settings[key] for key in TRAINING + NETWORK), *later)
        rows.setdefault(key, []).append(result)
    ordered = sorted(rows.values(), key=lambda results: results[0]["simulations"]["train"])
    by_preset = {
        preset: [results for results in ordered if results[0]["settings"]["preset"] == preset]
        for preset in ("paper", "readme", "egnn")
    }
    print_both_protocols(by_preset["paper"] + by_preset["readme"])
    print_egnn(by_preset["egnn"])


def print_both_protocols(rows: list[list[dict]]) -> None:
    """Positions and velocities, in the protocols of the SE(3)-Transformer paper and of its code."""
    print(
        "| protocol | simulations | epochs | network | seeds | MSE x | MSE v | no change x / v | constant velocity x |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for results in rows:
        first, baselines = results[0], results[0]["baselines"]
        x, v = ([result["test"][key] for result in results] for key in ("mse_x", "mse_v"))
        print(
            f"| `{first['settings']['preset']}` | {first['simulations']['train']:,} | {first['settings']['epochs']} "
            f"| {network(first)} | {len(results)} | {spread(x, 5)} | {spread(v, 4)} "
            f"| {baselines['no_change_x']:.4f} / {baselines['no_change_v']:.4f} "
            f"| {baselines['constant_velocity_x']:.4f} |"
        )


def print_egnn(rows: list[list[dict]]) -> None:
    """Positions alone, in the protocol of Satorras et al. 2021, and what others published in it."""
    print("\n| `egnn` | simulations | frames that training sees | augmentation | epochs | seeds | MSE x |")
    print("|---|---|---|---|---|---|---|")
    for results in rows:
        first = results[0]
        settings = first["settings"]
        one = settings["num_start_frames"] == 1 and not settings["loss_on_the_way"]
        errors = [result["test"]["mse_x"] for result in results]
        print(
            f"| {network(first)} | {first['simulations']['train']:,} | {'30 and 40' if one else 'all'} "
            f"| {settings['augment']} | {settings['epochs']} | {len(results)} | {spread(errors, 4)} |"
        )
    baselines = rows[0][0]["baselines"]
    print(f"| no change | | | | | | {baselines['no_change_x']:.4f} |")
    print(f"| constant velocity | | | | | | {baselines['constant_velocity_x']:.4f} |")
    for name, error in PUBLISHED.items():
        print(f"| {name}, published | 3,000 | 30 and 40 | | | | {error:.4f} |")


def network(result: dict) -> str:
    """The network's settings in words."""
    settings = result["settings"]
    return ", ".join(f"{settings[key]} {key.removeprefix('num_')}" for key in NETWORK if settings[key] != 1)


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
