"""Every example runs with the command that it begins with, and does what it says."""

import re

import pytest
from scripts import ROOT, run

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d+|\d+e-\d+", text)]


def output(name, tmp_path):
    done = run(f"examples/{name}.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", EXAMPLES)
def test_begins_with_its_command(name):
    docstring = (ROOT / "examples" / f"{name}.py").read_text().split('"""')[1]
    assert re.search(rf"^ *python -m examples\.{name}\b", docstring, re.MULTILINE), docstring


def test_point_cloud(tmp_path):
    (line,) = output("point_cloud", tmp_path)
    assert line.startswith("vectors (200, 3)")
    assert numbers(line)[-1] < 1e-5


def test_own_dataset(tmp_path):
    """Learns, and run again reports the same without training again."""
    first = output("own_dataset", tmp_path)
    assert sum(line.startswith("epoch ") for line in first) > 1
    error, baseline = numbers(first[-1])
    assert error < 0.5 * baseline
    log = tmp_path / "runs" / "own_dataset" / "log.jsonl"
    lines = log.read_text()
    assert output("own_dataset", tmp_path) == [line for line in first if not line.startswith("epoch ")]
    assert log.read_text() == lines


def test_refinement(tmp_path):
    lines = output("refinement", tmp_path)
    start, *rounds = numbers(lines[-1])
    assert len(rounds) == 3
    assert max(rounds) < start, "every round should leave the atoms nearer to their places than they were"
    assert rounds[-1] < 0.8 * start
