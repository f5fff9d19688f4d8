"""The package imports and runs on a bare machine, quietly, and leaves torch's settings alone."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import assert_same, random_sample
from scripts import PATIENCE, ROOT

from se3_transformer.model import Fiber, SE3Transformer
from se3_transformer.model.basis import get_basis

# A process without DGL and PyG, whatever is installed.
BLOCK = """
import sys
for name in ("dgl", "torch_geometric"):
    sys.modules[name] = None
"""

SETTINGS = """
import logging, os, signal, sys, warnings
import torch
assert not torch.cuda.is_available()

def settings():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.get_deterministic_debug_mode()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled),
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        "gradients": (torch.is_grad_enabled(), torch.is_anomaly_enabled()),
        "random numbers": torch.get_rng_state().sum().item(),
        "flush denormal": (torch.tensor([1e-40]) * 1.0).item() != 0,
        "log handlers": (list(logging.root.handlers), logging.root.level),
        "signal handlers": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "environment": dict(os.environ),
        "hooks": (sys.excepthook, sys.displayhook),
        "multiprocessing": torch.multiprocessing.get_sharing_strategy(),
    }

before = settings()
"""

COMPARE = """
after = settings()
changed = [f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
assert not changed, changed
"""


def python(code, *arguments, without_compiler=True):
    """Runs code in a new process without CUDA; returns what it printed on both streams."""
    warnings = "default,ignore:Implicitly cleaning up"  # torch < 2.7 leaves a temporary directory behind
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": warnings}
    if without_compiler:
        environment |= {"PATH": "/nonexistent", "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_import_is_quiet_and_changes_nothing():
    code = (
        BLOCK
        + SETTINGS
        + """
loaded = set(sys.modules)
import se3_transformer.model, se3_transformer.model.layers
"""
        + COMPARE
        + """
new = {name.split(".")[0] for name in set(sys.modules) - loaded}
unwanted = new & {"dgl", "torch_geometric", "matplotlib", "tensorboard", "pandas", "tqdm", "dataloader", "scipy"}
assert not unwanted, unwanted
others = [n for n in sys.modules if n.startswith("se3_transformer.") and not n.startswith("se3_transformer.model")]
assert not others, f"the model package must not import {others}"
"""
    )
    assert python(code) == ""


def test_model_runs_without_dgl_cuda_and_compiler_with_the_same_numbers(tmp_path):
    """Forward and backward, the same results as here, nothing printed but e3nn's own warnings, no setting changed."""
    torch.manual_seed(0)
    model = SE3Transformer(1, Fiber({0: 2}), Fiber({0: 4, 1: 4}), Fiber({1: 1}), 2, 2).double()
    sample = random_sample({0: 2}, nodes=(4,), edges=(8,))
    here = {"basis": get_basis(sample.rel_pos, max_degree=1)["1"], "out": model(sample.graph, sample.node_feats)["1"]}
    (here["out"] ** 2).sum().backward()
    here |= {f"grad/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save(
        {
            "state": model.state_dict(),
            "pos": sample.pos,
            "src": sample.src,
            "dst": sample.dst,
            "features": sample.node_feats["0"],
        },
        tmp_path / "in.pt",
    )
    code = (
        BLOCK
        + SETTINGS
        + """
from se3_transformer.model import Fiber, Graph, SE3Transformer
from se3_transformer.model.basis import get_basis
data = torch.load(sys.argv[1], weights_only=True)
rng = torch.get_rng_state()
model = SE3Transformer(1, Fiber({0: 2}), Fiber({0: 4, 1: 4}), Fiber({1: 1}), 2, 2).double()
torch.set_rng_state(rng)
model.load_state_dict(data["state"])
rel_pos = data["pos"][data["dst"]] - data["pos"][data["src"]]
out = model(Graph(data["src"], data["dst"], rel_pos, num_nodes=4), {"0": data["features"]})["1"]
(out ** 2).sum().backward()
there = {"basis": get_basis(rel_pos, max_degree=1)["1"], "out": out.detach()}
there |= {f"grad/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
torch.save(there, sys.argv[2])
"""
        + COMPARE
    )
    printed = python(code, tmp_path / "in.pt", tmp_path / "out.pt")
    ours = [line for line in printed.splitlines() if "se3_transformer" in line]
    assert not ours, printed
    assert_same(torch.load(tmp_path / "out.pt", weights_only=True), here, 1e-12)


@pytest.mark.parametrize(
    "statement",
    [
        "from se3_transformer.model import SE3Transformer, SE3TransformerPooled, Fiber, Graph",
        "from se3_transformer.model.fiber import Fiber",
        "from se3_transformer.model.transformer import SE3Transformer, SE3TransformerPooled",
        "from se3_transformer.model.basis import get_basis, edge_frames, wigner_blocks",
        "from se3_transformer.model.layers import ConvSE3, AttentionBlockSE3, AttentionSE3, NormSE3, GPooling",
        "from se3_transformer.model.layers.convolution import ConvSE3, ConvSE3FuseLevel",
        "from se3_transformer.model.layers.attention import AttentionBlockSE3, AttentionSE3",
        "from se3_transformer.model.layers.linear import LinearSE3",
        "from se3_transformer.model.layers.norm import NormSE3",
        "from se3_transformer.model.layers.pooling import GPooling",
    ],
)
def test_names_that_users_import(statement):
    exec(statement, {})


def test_every_module_imports_without_dgl():
    code = (
        BLOCK
        + """
import importlib, pkgutil
import se3_transformer
for module in pkgutil.walk_packages(se3_transformer.__path__, "se3_transformer."):
    importlib.import_module(module.name)
"""
    )
    python(code)
