"""The benchmark scripts run, on sizes that take no time; what they measure with is right."""

from __future__ import annotations

import re

import pytest
import torch
from scripts import run

from benchmarks.measure import block_seconds, interleaved, peak_bytes
from benchmarks.molecules import equal_molecules, qm9_sized_molecules, synthetic_dataset
from dataloader.qm9 import check_molecules

SMALL = "--num_layers", "1", "--num_channels", "4", "--num_heads", "2"
CPU = torch.device("cpu")


def rows(output: str) -> list[list[str]]:
    """Cells of all tables, without the rules below their heads."""
    lines = [line.strip("|").split("|") for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if "--" not in line[0]]


STEP_FLAGS = (
    *SMALL,
    *"--threads 1 --rounds 1 --molecules 2 --simulations 2 --residues 6 --nodes 5 --edges 16,32".split(),
)


def test_step(tmp_path):
    parts = "convolution,bonded,directed,complete,large,nbody,protein,scaling"
    done = run("benchmarks/step.py", *STEP_FLAGS, "--parts", parts, "--precisions", "float32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(f"- {fact}: " in done.stdout for fact in ("command", "commit", "torch", "processor", "threads"))
    found = [row for row in rows(done.stdout) if row[0] in ("ours float32", "yardstick float32")]
    assert len(found) == 6 * 2 + 2 * 2 + 2  # six comparisons, two sizes, the loss of the protein network
    assert all(float(cell.replace(",", "")) > 0 for row in found for cell in row[1:4])
    ours, yardstick = ([float(loss) for loss in row[1:]] for row in found if len(row) == 3)
    assert ours == pytest.approx(yardstick, rel=1e-4) and ours[1] < ours[0], "ten steps, from the same weights"
    assert sum(row[0].startswith("ours, low_memory=") for row in rows(done.stdout)) == 2


def test_step_accuracy(tmp_path):
    done = run("benchmarks/step.py", *STEP_FLAGS, "--parts", "accuracy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {row[0]: row[1:] for row in rows(done.stdout)[1:]}
    errors = {name: list(map(float, cells)) for name, cells in found.items() if " / " not in name}
    assert len(errors) == 2 * 4
    ratios = [float(cell.split(",")[0]) for cell in found["convolution, ours / yardstick float32"]]
    pairs = zip(errors["convolution, ours float32"], errors["convolution, yardstick float32"], strict=True)
    assert ratios == pytest.approx([a / b for a, b in pairs], rel=0.15)  # of the one graph here, rounded
    for what in ("convolution, ours", "convolution, yardstick", "QM9 network, ours", "QM9 network, yardstick"):
        least = 1e-4 if what.endswith("yardstick") else 1e-9  # ours is too narrow here for products in bf16
        for single, half in zip(errors[f"{what} float32"], errors[f"{what} bf16"], strict=True):
            assert 1e-9 < single < 1e-4 and least < half < 10, what


def test_step_leaves_out_what_does_not_fit(tmp_path):
    flags = "--parts", "scaling", "--precisions", "float32", "--max_gib", "0"
    done = run("benchmarks/step.py", *STEP_FLAGS, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row[:2] for row in rows(done.stdout)[1:]] == [
        ["ours float32", "16"],
        ["yardstick float32", "16"],  # its size is not known yet
        ["ours float32", "32"],
    ]


GPU_FLAGS = *SMALL, "--num_degrees", "2", "--molecules", "6", "--seconds", "0", "--device", "cpu"


def test_gpu(tmp_path):
    flags = "--batch_sizes", "3", "--implementations", "ours,yardstick,yardstick_fused", "--precisions", "bf16,tf32"
    done = run("benchmarks/gpu.py", *GPU_FLAGS, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)[1:]
    assert len(found) == 3 * 2 * 2
    assert all(float(row[4]) > 0 for row in found)


def test_gpu_profile(tmp_path):
    flags = "--batch_sizes", "3", "--implementations", "ours", "--precisions", "float32", "--profile", "true"
    done = run("benchmarks/gpu.py", *GPU_FLAGS, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "operations in a step" in done.stdout and "aten::" in done.stdout


def test_gpu_stops_in_time(tmp_path):
    done = run("benchmarks/gpu.py", *GPU_FLAGS, "--batch_sizes", "3", "--max_minutes", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(rows(done.stdout)) == 1 and "Out of time" in done.stdout


@pytest.mark.parametrize(
    "script, flags, error",
    [
        ("step", ("--parts", "nbdy"), "parts: expected some of convolution, .*, got 'nbdy'"),
        ("step", ("--rounds", "0"), "rounds must be at least 1, got 0"),
        ("gpu", ("--precisions", "fp8"), "precisions: expected some of float32, tf32, bf16, got 'fp8'"),
        ("gpu", ("--cuda_graphs", "true"), "cuda_graphs: expected implementations ours, got ours,yardstick"),
        ("gpu", ("--batch_sizes", "9999"), "batch_sizes: expected 1 … 3200, as many as there are, got '9999'"),
    ],
)
def test_wrong_settings(script, flags, error, tmp_path):
    done = run(f"benchmarks/{script}.py", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(error, done.stderr)


def test_molecules():
    """They are valid, of QM9's sizes, the same for the same seed, and of the edges that issue tables name."""
    molecules = qm9_sized_molecules(200)
    check_molecules(molecules, "made up")
    assert abs(molecules.n_node.mean() - 18.1) < 0.6 and abs(molecules.n_edge.mean() - 37.5) < 1.5
    assert (molecules.node_pos == qm9_sized_molecules(200).node_pos).all()
    bonded, complete = (synthetic_dataset(equal_molecules(32), graph) for graph in ("bonds", "complete"))
    assert (bonded.num_edges.sum(), complete.num_edges.sum()) == (1184, 9792)


def test_peak_bytes():
    """Of a megabyte that stays, one that goes, and half a one after that."""

    def function():
        kept, gone = torch.ones(2**18), torch.ones(2**18)
        del gone
        return kept, torch.ones(2**17)

    assert peak_bytes(function, CPU) == 2 * 2**20


def test_times():
    calls = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3 and {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    assert block_seconds(lambda: torch.ones(10).sum(), CPU, 0.0) > 0
