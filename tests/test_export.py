"""An exported model runs in a process that knows nothing of this package."""

import inspect
import subprocess
import sys

import torch
from battery import varied
from helpers import assert_same, degenerate_samples, random_sample
from scripts import PATIENCE

from se3_transformer.model import Fiber, SE3TransformerPooled
from se3_transformer.runtime.export import export_model

FIBER_IN, FIBER_EDGE = Fiber({0: 3, 1: 2}), Fiber({0: 2, 1: 1})


def output_and_gradient(model, *arguments, rel_pos):
    """The output, and the gradient of the sum of its squares with respect to relative positions."""
    out = model(*arguments)
    (gradient,) = torch.autograd.grad((out**2).sum(), rel_pos)
    return {"out": out.detach(), "gradient": gradient}


ELSEWHERE = """
import sys
sys.modules["se3_transformer"] = None  # may be installed
import torch
model = torch.export.load("model.pt2").module()
results = []
for inputs in torch.load("inputs.pt", weights_only=True):
    results.append(output_and_gradient(model, *inputs, rel_pos=inputs[2]))
torch.save(results, "results.pt")
"""


def test_exported_model_runs_without_this_package(tmp_path):
    """The same outputs and gradients, for many other numbers of nodes, edges and graphs than it was exported with: also
    one and none, and edges of length zero. With low_memory there are commas in the names of modules."""
    settings = dict(num_layers=1, num_heads=2, channels_div=2, low_memory=True)
    model = varied(SE3TransformerPooled(FIBER_IN, Fiber({0: 4}), FIBER_EDGE, 2, 4, output_dim=1, **settings))
    samples = [random_sample(FIBER_IN, FIBER_EDGE, nodes=(9, 4, 6), edges=(30, 1, 12), dtype=torch.float32)]
    samples += degenerate_samples(FIBER_IN, FIBER_EDGE, torch.float32).values()
    inputs = [(s.src, s.dst, s.rel_pos.requires_grad_(), s.node_feats, s.edge_feats, s.num_nodes) for s in samples]
    export_model(model, tmp_path / "model.pt2")
    torch.save(inputs, tmp_path / "inputs.pt")
    code = inspect.getsource(output_and_gradient) + ELSEWHERE
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for sample, result in zip(samples, results, strict=True):
        graph = sample.graph
        graph.rel_pos.requires_grad_()
        arguments = graph, sample.node_feats, sample.edge_feats
        assert_same(result, output_and_gradient(model, *arguments, rel_pos=graph.rel_pos))
