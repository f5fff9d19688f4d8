"""Trains one network for each of several targets of QM9, one after the other, in pieces of limited time.

    python train_qm9_targets.py --max_minutes 9 --preset fast  # again and again, until it says that all are done
    python train_qm9_targets.py --targets homo,gap --preset tiny --prefix tiny --threads 2

Further flags go to train_qm9.py as they are. A target that is finished only reports; one that was begun goes on where
it was.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

TARGETS = "homo,gap,lumo,alpha,mu,Cv"  # those that the papers report, the most telling first
SET_HERE = ("--task", "--run_name", "--evaluate", "--benchmark")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--targets", default=TARGETS, help=f"default {TARGETS}")
    parser.add_argument("--max_minutes", type=float, default=0.0, help="time for this piece; default: no limit")
    parser.add_argument("--prefix", default="qm9", help="names of the runs are PREFIX_TARGET; default qm9")
    arguments, flags = parser.parse_known_args()
    for flag in flags:
        if flag.split("=")[0] in SET_HERE:
            parser.error(f"{flag.split('=')[0]} is not for this script: use train_qm9.py")
    deadline = time.monotonic() + 60 * arguments.max_minutes
    for target in arguments.targets.split(","):
        command = ["--task", target, "--run_name", f"{arguments.prefix}_{target}", *flags]
        if arguments.max_minutes:
            left = (deadline - time.monotonic()) / 60
            if left <= 0:
                sys.exit("out of time: the same command goes on")
            command += ["--max_minutes", str(left)]
        if status := train(command):
            sys.exit(status)
    print("all targets are done")


def train(flags: list[str]) -> int:
    """Run train_qm9.py; what stops this process, stops that one, which saves its state first. Returns its status."""
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("train_qm9.py")), *flags])
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # a terminal sends it to both processes
            continue


if __name__ == "__main__":
    main()
