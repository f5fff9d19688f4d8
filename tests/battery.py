"""The tests that every layer and every model inherits: subclass `Battery`, say how to build and how to call it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import (
    TOLERANCE,
    as_features,
    assert_equivariant,
    assert_finite,
    assert_same,
    batched,
    degenerate_samples,
    gradients,
    random_rotation,
    random_sample,
)

NODES, EDGES = (4, 3, 2), (7, 5, 3)


def varied(module, seed=0):
    """The module with parameters that are nowhere special: scales and shifts that start at 1 and 0 are moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


class Battery:
    """What holds for every layer and model. `fiber_in` and `fiber_edge` say what goes in, `rows` what comes out."""

    fiber_in = {0: 4, 1: 4, 2: 4}
    fiber_edge = {0: 2}
    rows = "nodes"  # or "edges" or "graphs": what the rows of the output stand for

    def build(self):
        """The module, in float32."""
        raise NotImplementedError

    def call(self, module, sample):
        """{'l': (rows, C, 2l+1)}"""
        raise NotImplementedError

    def reference(self, state, sample):
        """What `call` should give, by tests/reference.py, from the parameters in a state dict."""
        raise NotImplementedError

    @pytest.fixture
    def module(self, dtype):
        return varied(self.build()).to(dtype)

    @pytest.fixture
    def sample(self, dtype):
        return random_sample(self.fiber_in, self.fiber_edge, nodes=NODES, edges=EDGES, dtype=dtype)

    @pytest.fixture(params=["no edges", "one node", "every oddity in one batch"])
    def odd_sample(self, request, dtype):
        odd = degenerate_samples(self.fiber_in, self.fiber_edge, dtype)
        return batched(odd.values()) if request.param not in odd else odd[request.param]

    def permuted(self, output, nodes=None, edges=None):
        order = {"nodes": nodes, "edges": edges, "graphs": None}[self.rows]
        return output if order is None else {l: x[order] for l, x in output.items()}

    def test_rotation(self, module, sample):
        half_turn = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))  # y > 0 to y < 0 and back
        for rotation in (random_rotation(), half_turn):
            assert_equivariant(lambda s: self.call(module, s), sample, rotation, what="under rotation")

    def test_translation(self, module, sample):
        shift = torch.tensor([1.0, -2.0, 0.5])
        assert_same(self.call(module, sample.translated(shift)), self.call(module, sample), what="translation")

    def test_node_permutation(self, module, sample):
        order = torch.cat([torch.randperm(n) + sum(NODES[:b]) for b, n in enumerate(NODES)])
        assert_same(
            self.call(module, sample.with_nodes_permuted(order)),
            self.permuted(self.call(module, sample), nodes=order),
            what="node permutation",
        )

    def test_edge_permutation(self, module, sample):
        order = torch.cat([torch.randperm(n) + sum(EDGES[:b]) for b, n in enumerate(EDGES)])
        assert_same(
            self.call(module, sample.with_edges_permuted(order)),
            self.permuted(self.call(module, sample), edges=order),
            what="edge permutation",
        )

    def test_batch_equals_single_graphs(self, module, sample):
        singles = [self.call(module, sample.single(b)) for b in range(len(NODES))]
        joined = {l: torch.cat([single[l] for single in singles]) for l in singles[0]}
        assert_same(self.call(module, sample), joined, what="batch against one graph at a time")

    def test_save_and_load(self):
        module, sample = varied(self.build()), random_sample(self.fiber_in, self.fiber_edge, dtype=torch.float32)
        state, whole = io.BytesIO(), io.BytesIO()
        torch.save(module.state_dict(), state)
        torch.save(module, whole)
        other = self.build()
        other.load_state_dict(torch.load(io.BytesIO(state.getvalue()), weights_only=True))
        expected = self.call(module, sample)
        assert_same(self.call(other, sample), expected, 1e-15, "after loading the state dict")
        assert_same(self.call(copy.deepcopy(module), sample), expected, 1e-15, "of a deep copy")
        unpickled = torch.load(io.BytesIO(whole.getvalue()), weights_only=False)
        assert_same(self.call(unpickled, sample), expected, 1e-15, "after unpickling the module")

    def test_values_and_gradients_equal_reference(self, module, sample, dtype):
        state = {name: p.detach().double().requires_grad_() for name, p in module.state_dict().items()}
        expected, expected_grads = gradients(lambda s: self.reference(state, s), sample.to(torch.float64), state)
        actual, actual_grads = gradients(lambda s: self.call(module, s), sample, module.named_parameters())
        assert_same(actual, expected, TOLERANCE[dtype], "values")
        assert_same(actual_grads, expected_grads, TOLERANCE[dtype], "gradients")

    def test_degenerate_graphs(self, module, odd_sample, dtype):
        """Finite values and gradients, equivariant, equal to the reference."""
        outputs, grads = gradients(lambda s: self.call(module, s), odd_sample, module.named_parameters())
        assert_finite(outputs)
        assert_finite(grads, "gradients")
        assert_equivariant(lambda s: self.call(module, s), odd_sample)
        if dtype == torch.float64:
            assert_same(outputs, self.reference(module.state_dict(), odd_sample), what="against the reference")

    def test_directional_derivative(self):
        """Gradients against a central difference, in a random direction of positions and features together."""
        module = varied(self.build()).double()
        sample = random_sample(self.fiber_in, self.fiber_edge, nodes=(4,), edges=(7,), seed=1)
        direction = sample.map(torch.randn_like)

        def loss(t):
            steps = iter(direction.inputs.values())  # `map` goes through the tensors in the order of `inputs`
            outputs = as_features(self.call(module, sample.map(lambda x: x + t * next(steps))))
            return sum(
                (x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in outputs.values()
            )

        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (analytic,) = torch.autograd.grad(loss(t), t)
        with torch.no_grad():
            numeric = (loss(1e-6) - loss(-1e-6)) / 2e-6
        assert abs(analytic - numeric) < 1e-6 * max(1.0, abs(numeric)), f"{analytic} against {numeric}"
