"""Trains one network for each of several targets of QM9, one after the other, in pieces of limited time.

    python train_qm9_targets.py --max_minutes 9.5 --preset fast  # again and again, until it says that all are done
    python train_qm9_targets.py --targets homo,gap --preset tiny --threads 2

Further flags go to train_qm9.py as they are. A target whose result is there already is left alone; one that was begun
goes on where it was.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

TARGETS = "homo,gap,lumo,alpha,mu,Cv"  # those that the papers report, the most telling first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=TARGETS, help=f"default {TARGETS}")
    parser.add_argument("--max_minutes", type=float, default=0.0, help="time for this piece; default: no limit")
    parser.add_argument("--data_dir", default="data", help="as in train_qm9.py")
    parser.add_argument("--prefix", default="qm9", help="names of the runs are PREFIX_TARGET; default qm9")
    arguments, flags = parser.parse_known_args()
    deadline = time.monotonic() + 60 * arguments.max_minutes
    script = str(Path(__file__).with_name("train_qm9.py"))
    for target in arguments.targets.split(","):
        run_name = f"{arguments.prefix}_{target}"
        result = Path(arguments.data_dir) / f"{run_name}_result.json"
        if not result.exists():
            command = [script, "--task", target, "--run_name", run_name, "--data_dir", arguments.data_dir, *flags]
            if arguments.max_minutes:
                left = (deadline - time.monotonic()) / 60
                if left <= 0:
                    sys.exit("out of time: the same command goes on")
                command += ["--max_minutes", str(left)]
            status = subprocess.run([sys.executable, *command]).returncode
            if status:
                sys.exit(status)
        facts = json.loads(result.read_text())
        print(f"{target}: test MAE {facts['mae']:.4g} {facts['unit']} ({result})", flush=True)
    print("all targets are done")


if __name__ == "__main__":
    main()
