"""torch.compile of a whole network: without a break in the graph, once for all numbers of nodes and edges."""

import pytest
import torch
from battery import varied
from helpers import assert_same, random_sample
from torch._dynamo.testing import CompileCounterWithBackend

from se3_transformer.model import Fiber, SE3Transformer
from se3_transformer.model.basis import get_basis


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 cannot trace names made of numbers")
@pytest.mark.parametrize("with_basis", [True, False])
def test_one_graph_for_all_sizes(with_basis):
    """Edges of length zero among the others, too."""
    network = varied(
        SE3Transformer(1, Fiber({0: 2, 1: 1}), Fiber.create(2, 4), Fiber({0: 1, 1: 1}), 2, 2, Fiber({0: 1}))
    )
    network = network.double()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=counter)
    for seed, (nodes, edges) in enumerate([(5, 12), (7, 30), (3, 6), (20, 41)]):
        sample = random_sample(Fiber({0: 2, 1: 1}), Fiber({0: 1}), nodes=(nodes,), edges=(edges,), seed=seed)
        sample.pos[sample.src[0]] = sample.pos[sample.dst[0]]
        basis = get_basis(sample.rel_pos, 1) if with_basis else None
        results = []
        for model in (network, compiled):
            out = model(sample.graph, sample.node_feats, sample.edge_feats, basis)
            loss = sum(x.square().sum() for x in out.values())
            results.append((out, torch.autograd.grad(loss, network.parameters())))
        (expected, expected_grads), (found, grads) = results
        assert_same(found, expected, 1e-10)
        assert_same(dict(enumerate(grads)), dict(enumerate(expected_grads)), 1e-10, "gradients")
    assert counter.frame_count == 1
