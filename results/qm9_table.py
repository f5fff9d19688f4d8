"""Prints the QM9 table of docs/results.md from the result files of train_qm9.py in results/qm9/.

python results/qm9_table.py
"""

import json
from pathlib import Path

NETWORK = ("num_layers", "num_degrees", "num_channels")


def main() -> None:
    print("| target | preset | network | training molecules | epochs | test MAE | mean of the training set | time |")
    print("|---|---|---|---|---|---|---|---|")
    for path in sorted((Path(__file__).parent / "qm9").glob("*_result.json")):
        result = json.loads(path.read_text())
        settings, unit = result["settings"], result["unit"]
        network = ", ".join(f"{settings[key]} {key.removeprefix('num_')}" for key in NETWORK)
        print(
            f"| {result['task']} | `{settings['preset']}` | {network} | {result['molecules']['train']:,} "
            f"| {settings['epochs']} | {result['mae']:.4g} {unit} | {result['baseline_mae']:.4g} {unit} "
            f"| {result['train_seconds'] / 60:.0f} min |"
        )


if __name__ == "__main__":
    main()
