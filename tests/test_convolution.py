"""The fast convolution against the slow one: sharing of radial networks, fibers, edge features, chunks, gradients."""

from __future__ import annotations

import copy
import shutil
from itertools import product
from typing import NamedTuple

import pytest
import reference
import torch
from battery import varied
from helpers import TOLERANCE, assert_same, gradients, random_sample
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from se3_transformer.model import Fiber
from se3_transformer.model.basis import get_basis
from se3_transformer.model.layers import ConvSE3, ConvSE3FuseLevel, contraction, convolution
from se3_transformer.model.layers.radial import RadialProfile


class Case(NamedTuple):
    sharing: str  # how radial networks must be shared
    fuse: str
    max_degree: int
    fiber_in: dict
    fiber_out: dict
    fiber_edge: dict = {0: 2}


CASES = {
    "one network": Case("conv", "full", 2, {0: 3, 1: 3, 2: 3}, {0: 2, 1: 2, 2: 2}),
    "one network, scalars only": Case("conv", "full", 0, {0: 3}, {0: 2}),
    "one network, degree 6": Case("conv", "full", 6, dict.fromkeys(range(7), 1), dict.fromkeys(range(7), 2)),
    "one network, edges fill up": Case("conv", "full", 2, {0: 3, 1: 1, 2: 2}, {0: 4, 1: 4, 2: 4}, {1: 2, 2: 1}),
    "per output": Case("conv_out", "partial", 2, {0: 3, 1: 3, 2: 3}, {0: 2, 1: 2, 2: 2}),
    "per output, unequal": Case("conv_out", "full", 2, {0: 3, 1: 3, 2: 3}, {0: 1, 1: 4, 2: 2}),
    "per output, one degree": Case("conv_out", "full", 2, {0: 3, 1: 3, 2: 3}, {1: 5}),
    "per output, scalars only": Case("conv_out", "partial", 0, {0: 3}, {0: 2}),
    "per output, wide": Case("conv_out", "partial", 1, {0: 20, 1: 20}, {0: 12, 1: 16}),
    "per input": Case("conv_in", "partial", 2, {0: 3, 1: 2}, {0: 4, 1: 4, 2: 4}),
    "per input, full allowed": Case("conv_in", "full", 2, {0: 3, 2: 5}, {0: 2, 1: 2, 2: 2}),
    "per input, uneven by edges": Case("conv_in", "full", 1, {0: 3, 1: 3}, {0: 2, 1: 2}, {0: 1, 1: 2}),
    "per pair": Case("pair", "none", 2, {0: 3, 1: 3, 2: 3}, {0: 2, 1: 2, 2: 2}),
    "per pair, scalars only": Case("pair", "none", 0, {0: 3}, {0: 2}),
    "per pair, from scalars": Case("pair", "full", 3, {0: 4}, {0: 4, 1: 2, 2: 2, 3: 2}, {}),
    "per pair, missing degrees": Case("pair", "full", 3, {0: 3, 2: 2}, {1: 2, 3: 1}),
    "per pair, no scalars": Case("pair", "full", 3, {1: 2, 3: 1}, {2: 3}),
    "per pair, degree 6": Case("pair", "full", 6, {0: 2, 6: 1}, {1: 1, 6: 2}),
    "per pair, low max_degree": Case("pair", "full", 4, {0: 3, 1: 3}, {0: 2, 1: 2}),
    "per pair, edges of degrees 0, 1, 2": Case("pair", "full", 2, {0: 3, 1: 1, 2: 2}, {0: 1, 1: 2}, {0: 3, 1: 2, 2: 4}),
}
# One case per way of sharing and edge features, where running all cases would take long.
SOME = ("one network, edges fill up", "per output, unequal", "per input", "per pair, edges of degrees 0, 1, 2")
FUSE = {"full": ConvSE3FuseLevel.FULL, "partial": ConvSE3FuseLevel.PARTIAL, "none": ConvSE3FuseLevel.NONE}


def build(case, use_layer_norm=True, **kwargs):
    torch.manual_seed(1)
    return varied(
        ConvSE3(
            Fiber(case.fiber_in),
            Fiber(case.fiber_out),
            Fiber(case.fiber_edge),
            use_layer_norm=use_layer_norm,
            max_degree=case.max_degree,
            fuse_level=FUSE[case.fuse],
            **kwargs,
        )
    )


def build_sample(case, edges=9, nodes=5):
    """With a zero-length edge and edges along the axes among the random ones."""
    sample = random_sample(case.fiber_in, case.fiber_edge, nodes=(nodes,), edges=(edges,))
    sample.pos[0] = 0
    sample.pos[1] = torch.tensor([0.0, 0.0, 1.5])
    sample.src[:3], sample.dst[:3] = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2])
    return sample


def call(conv, sample):
    basis = get_basis(sample.rel_pos, max_degree=conv.max_degree, compute_gradients=True)
    return conv(sample.node_feats, reference.with_distance(sample.edge_feats, sample.rel_pos), sample.graph, basis)


def slow(state, conv, sample):
    return reference.convolution(
        state,
        conv.fiber_in,
        conv.fiber_out,
        conv.fiber_edge,
        sample.node_feats,
        reference.with_distance(sample.edge_feats, sample.rel_pos),
        sample.edges,
        pool=conv.pool,
        self_interaction=conv.self_interaction,
    )


def assert_equals_slow(conv, sample, dtype, tolerance):
    state = {name: p.detach().double().requires_grad_() for name, p in conv.state_dict().items()}
    expected, expected_grads = gradients(lambda s: slow(state, conv, s), sample, state)
    conv = conv.to(dtype)
    actual, actual_grads = gradients(lambda s: call(conv, s), sample.to(dtype), conv.named_parameters())
    assert_same(actual, expected, tolerance, "values")
    assert_same(actual_grads, expected_grads, tolerance, "gradients")


class Adapter(nn.Module):
    """W + B A in the place of a linear layer, as programs for fine-tuning put it there."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.A, self.B = nn.Parameter(torch.randn(2, base.in_features)), nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [0, 3, 6])
def test_adapters_in_radial_networks(layer, dtype):
    """They equal the network with their sum in the place of its weight, in values and gradients."""
    conv, sample = build(CASES["per pair"], use_layer_norm=True).to(dtype), build_sample(CASES["per pair"]).to(dtype)
    merged = copy.deepcopy(conv)
    for module, other in zip(radial_networks(conv), radial_networks(merged), strict=True):
        module.net[layer] = adapter = Adapter(module.net[layer]).to(dtype)
        other.net[layer].weight = nn.Parameter((adapter.base.weight + adapter.B @ adapter.A).detach())
    found, expected = call(conv, sample), call(merged, sample)
    assert_same(found, expected)
    for out in (found, expected):
        sum(x.square().sum() for x in out.values()).backward()
    for module, other in zip(radial_networks(conv), radial_networks(merged), strict=True):
        adapter, gradient = module.net[layer], other.net[layer].weight.grad
        assert_same(adapter.base.weight.grad, gradient)
        assert_same(adapter.B.grad, gradient @ adapter.A.T)


@pytest.mark.parametrize(
    "changed", [nn.utils.spectral_norm, nn.utils.weight_norm, nn.utils.parametrizations.weight_norm]
)
def test_hooks_and_parametrizations_in_radial_networks(changed):
    """They are there in each of several steps."""
    conv, sample = build(CASES["per pair"]).float(), build_sample(CASES["per pair"]).to(torch.float32)
    before = call(conv, sample)
    for module in radial_networks(conv):
        for layer in (0, 3, 6):
            changed(module.net[layer])
    for _ in range(2):
        out = call(conv, sample)
        sum(x.square().sum() for x in out.values()).backward()
    assert all(p.grad is not None for p in conv.parameters())
    assert changed is not nn.utils.spectral_norm or (out["0"] - before["0"]).norm() > 1e-3 * before["0"].norm()


def test_another_nonlinearity_in_radial_networks():
    conv, sample = build(CASES["per pair"]).float(), build_sample(CASES["per pair"]).to(torch.float32)
    before = call(conv, sample)
    for module in radial_networks(conv):
        module.net[2], module.net[5] = nn.SiLU(), nn.SiLU()
    assert all((x - before[degree]).norm() > 1e-3 * before[degree].norm() for degree, x in call(conv, sample).items())
    for module in radial_networks(conv):
        module.net[6] = nn.Sequential(module.net[6], nn.Tanh())
    with pytest.raises(ValueError, match="expected a linear last layer"):
        call(conv, sample)


def test_parameters_of_other_sizes():
    conv, sample = build(CASES["per pair"]).float(), build_sample(CASES["per pair"]).to(torch.float32)
    radial_networks(conv)[0].net[0].weight = nn.Parameter(torch.randn(32, 7))
    with pytest.raises(RuntimeError, match="shapes"):
        call(conv, sample)


class OwnTensor(torch.Tensor):
    """A class of its own, as those have whose numbers lie elsewhere."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_parameters_of_another_class():
    conv, sample = build(CASES["per pair"]).float(), build_sample(CASES["per pair"]).to(torch.float32)
    layer = radial_networks(conv)[0].net[0]
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(OwnTensor))
    with pytest.raises(TypeError, match="expected plain tensors, got OwnTensor"):
        call(conv, sample)


def test_replaced_modules_are_those_that_work():
    conv, sample = build(CASES["per pair"]).float(), build_sample(CASES["per pair"]).to(torch.float32)
    before = call(conv, sample)
    conv.conv["1,0"] = copy.deepcopy(conv.conv["1,0"])
    with torch.no_grad():
        conv.conv["1,0"].radial_func.net[6].weight.mul_(2)
    assert (call(conv, sample)["0"] - before["0"]).norm() > 1e-3


def radial_networks(module):
    return [part for part in module.modules() if isinstance(part, RadialProfile)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_sharing_of_radial_networks(case):
    conv = build(case)
    assert reference.sharing_of(conv.state_dict()) == case.sharing
    assert case.sharing == reference.expected_sharing(
        case.fiber_in, case.fiber_out, case.fiber_edge, case.fuse, case.max_degree
    )
    used = {"conv": ConvSE3FuseLevel.FULL, "pair": ConvSE3FuseLevel.NONE}.get(case.sharing, ConvSE3FuseLevel.PARTIAL)
    assert conv.used_fuse_level == used


@pytest.mark.parametrize(
    "use_layer_norm, pool, self_interaction",
    [(True, True, True), (False, True, False), (False, False, True), (True, False, False)],
)
@pytest.mark.parametrize("name", SOME)
def test_state_dict(name, use_layer_norm, pool, self_interaction):
    """Names and shapes of the parameters are those of existing checkpoints."""
    case = CASES[name]
    conv = build(case, use_layer_norm, pool=pool, self_interaction=self_interaction)
    carried = reference.with_edge_channels(case.fiber_in, case.fiber_edge)
    edge_dim, hidden = case.fiber_edge.get(0, 0) + 1, 32
    degrees = range(case.max_degree + 1)
    out = case.fiber_out
    networks = {  # name: (channels in, channels out, pairs)
        "conv": {"conv": (carried[0], out.get(0), [(i, o) for i in degrees for o in degrees])},
        "conv_out": {f"conv_out.{o}": (carried[0], c, [(i, o) for i in degrees]) for o, c in out.items()},
        "conv_in": {f"conv_in.{i}": (c, out.get(0), [(i, o) for o in degrees]) for i, c in carried.items()},
        "pair": {f"conv.{i},{o}": (c, c_out, [(i, o)]) for i, c in carried.items() for o, c_out in out.items()},
    }[case.sharing]
    expected = {}
    for network, (c_in, c_out, pairs) in networks.items():
        rows = c_in * c_out * sum(2 * min(pair) + 1 for pair in pairs)
        second, last = (3, 6) if use_layer_norm else (2, 4)
        net = {
            "0.weight": (hidden, edge_dim),
            "0.bias": (hidden,),
            f"{second}.weight": (hidden, hidden),
            f"{second}.bias": (hidden,),
            f"{last}.weight": (rows, hidden),
        }
        if use_layer_norm:
            net |= {f"{k}.{kind}": (hidden,) for k in (1, 4) for kind in ("weight", "bias")}
        expected |= {f"{network}.radial_func.net.{key}": shape for key, shape in net.items()}
    if self_interaction:
        expected |= {f"to_kernel_self.{l}": (c, case.fiber_in[l]) for l, c in out.items() if l in case.fiber_in}
    assert {key: tuple(p.shape) for key, p in conv.state_dict().items()} == expected


@pytest.mark.parametrize(
    "pool, self_interaction, use_layer_norm",
    [(True, True, True), (False, False, False)],
    ids=["pooled, self-interaction, layer norm", "per edge"],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_slow(case, pool, self_interaction, use_layer_norm):
    """Values and all gradients: features, edge features, positions, parameters."""
    conv = build(case, use_layer_norm, pool=pool, self_interaction=self_interaction).double()
    assert_equals_slow(conv, build_sample(case), torch.float64, TOLERANCE[torch.float64])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_slow_float32(case):
    conv = build(case, pool=True, self_interaction=True)
    assert_equals_slow(conv, build_sample(case), torch.float32, TOLERANCE[torch.float32])


@pytest.mark.parametrize("pool, self_interaction", [(True, False), (False, True)])
@pytest.mark.parametrize("name", SOME)
def test_equals_slow_other_options(name, pool, self_interaction):
    conv = build(CASES[name], pool=pool, self_interaction=self_interaction).double()
    assert_equals_slow(conv, build_sample(CASES[name]), torch.float64, TOLERANCE[torch.float64])


def test_edges_in_any_order():
    """The order of the edges is free, and so is the place of the zero-length ones."""
    case = CASES["per pair, edges of degrees 0, 1, 2"]
    conv, sample = build(case, pool=False).double(), build_sample(case)
    order = torch.randperm(len(sample.src))
    expected = {l: x[order] for l, x in call(conv, sample).items()}
    assert_same(call(conv, sample.with_edges_permuted(order)), expected)


# ------------------------------------------------------------------------------------- chunks and order of contraction


def use_chunks(monkeypatch, max_edges, chunk_bytes):
    """Checkpointed chunks of max_edges, contracted in chunks whose intermediate has chunk_bytes."""
    monkeypatch.setattr(convolution, "MAX_EDGES", max_edges)
    monkeypatch.setitem(contraction.CHUNK_BYTES, "cpu", chunk_bytes)


def use_order(conv, order):
    """Contract in this order, whichever would be cheapest."""
    networks = [module for module in conv.modules() if hasattr(module, "order")]
    assert networks
    for module in networks:
        module.order = order
    return conv


CHUNKS = [(1, 1), (10**6, 1), (5, 10**6), (10**6, 2**13)]  # edges, and bytes of a contraction


@pytest.mark.parametrize("name, chunks", [*product(CASES, [(5, 2**13)]), *product(SOME, CHUNKS)])
def test_chunks_change_nothing(name, chunks, monkeypatch):
    case = CASES[name]
    conv, sample = build(case, pool=True, self_interaction=True).double(), build_sample(case, edges=14)
    whole, whole_grads = gradients(lambda s: call(conv, s), sample, conv.named_parameters())
    use_chunks(monkeypatch, *chunks)
    chunked, chunked_grads = gradients(lambda s: call(conv, s), sample, conv.named_parameters())
    assert_same(chunked, whole, 1e-12, "values")
    assert_same(chunked_grads, whole_grads, 1e-12, "gradients")
    with torch.no_grad():
        assert_same(call(conv, sample), whole, 1e-12, "without gradients")


@pytest.mark.parametrize("max_edges", [1, 13, 14])
def test_low_memory_changes_nothing(max_edges, monkeypatch):
    monkeypatch.setattr(convolution, "MAX_EDGES_LOW_MEMORY", max_edges)
    case = CASES["per pair"]
    usual, low = (build(case, low_memory=low).double() for low in (False, True))
    low.load_state_dict(usual.state_dict())
    sample = build_sample(case, edges=14)
    values, grads = gradients(lambda s: call(usual, s), sample, usual.named_parameters())
    low_values, low_grads = gradients(lambda s: call(low, s), sample, low.named_parameters())
    assert_same(low_values, values, 1e-12, "values")
    assert_same(low_grads, grads, 1e-12, "gradients")


@pytest.mark.parametrize("order", contraction.ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("name", SOME)
def test_every_order_equals_slow(name, order, monkeypatch):
    use_chunks(monkeypatch, 6, 2**13)
    conv = use_order(build(CASES[name], pool=True, self_interaction=True).double(), order)
    assert_equals_slow(conv, build_sample(CASES[name]), torch.float64, TOLERANCE[torch.float64])


@pytest.mark.parametrize("order", contraction.ORDERS, ids=lambda order: order.__name__)
def test_every_order_when_some_gradients_are_not_wanted(order):
    """Frozen parameters, or inputs that are data: what is wanted comes out the same."""
    case = CASES["per output, unequal"]
    conv, sample = use_order(build(case).double(), order), build_sample(case)
    _, everything = gradients(lambda s: call(conv, s), sample, conv.named_parameters())
    out = call(conv, sample)
    generator = torch.Generator().manual_seed(0)  # as `gradients` does
    for _, x in sorted(out.items()):
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum().backward(retain_graph=True)
    assert_same(
        {n: p.grad for n, p in conv.named_parameters()},
        {n: everything[f"param/{n}"] for n, _ in conv.named_parameters()},
        1e-12,
        "parameters alone",
    )
    conv.requires_grad_(False)
    _, inputs = gradients(lambda s: call(conv, s), sample)
    assert_same(inputs, {n: everything[n] for n in inputs}, 1e-12, "inputs alone")


@pytest.mark.parametrize("chunks", [(10**6, 10**6), (3, 2**12)], ids=["whole", "chunks"])
@pytest.mark.parametrize("order", contraction.ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("name", SOME)
def test_second_derivatives(name, order, chunks, monkeypatch):
    """Training on forces takes derivatives of derivatives. With respect to positions, features and parameters."""
    use_chunks(monkeypatch, *chunks)
    case = CASES[name]
    conv = use_order(build(case).double(), order)
    parameters = [p for n, p in conv.named_parameters() if "radial_func" in n][:8]
    sample = random_sample(case.fiber_in, case.fiber_edge, nodes=(3,), edges=(5,))
    direction = sample.map(torch.randn_like)

    def first_derivative(t):
        """Of a quadratic loss with respect to inputs and parameters, all in one number, at sample + t * direction."""
        steps = iter(direction.inputs.values())
        moved = sample.map(lambda x: x + t * next(steps))
        if not isinstance(t, torch.Tensor):
            moved = moved.leaves()
        loss = sum((x**2).sum() for x in call(conv, moved).values())
        wanted = [*moved.inputs.values(), *parameters]
        grads = torch.autograd.grad(loss, wanted, create_graph=isinstance(t, torch.Tensor))
        return sum((g * torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in grads)

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (analytic,) = torch.autograd.grad(first_derivative(t), t)
    numeric = (first_derivative(1e-6) - first_derivative(-1e-6)) / 2e-6
    assert abs(analytic - numeric) < 1e-6 * max(1.0, abs(numeric)), f"{analytic} against {numeric}"


@pytest.mark.parametrize("order", contraction.ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("name", SOME)
def test_no_edges(name, order):
    """Values are zero, gradients too, and so are second derivatives."""
    case = CASES[name]
    conv = use_order(build(case).double(), order)
    sample = random_sample(case.fiber_in, case.fiber_edge, nodes=(3,), edges=(0,)).leaves()
    out = call(conv, sample)
    assert {l: tuple(x.shape) for l, x in out.items()} == {str(l): (3, c, 2 * l + 1) for l, c in case.fiber_out.items()}
    assert all((x == 0).all() for x in out.values())
    wanted = [*sample.inputs.values(), *conv.parameters()]
    loss = sum((x**2).sum() + x.sum() for x in out.values())
    grads = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    assert all(g is None or (g == 0).all() for g in grads)
    total = sum((g**2).sum() for g in grads if g is not None)
    if isinstance(total, torch.Tensor) and total.requires_grad:
        second = torch.autograd.grad(total, wanted, allow_unused=True)
        assert all(g is None or (g == 0).all() for g in second)


# ------------------------------------------------------------------------------------------------------------- memory


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return out


@pytest.mark.parametrize(
    "case",
    [
        Case("conv", "full", 3, *[dict.fromkeys(range(4), 16)] * 2, {}),
        Case("conv_out", "partial", 3, *[dict.fromkeys(range(4), 16)] * 2, {}),
        Case("conv_in", "full", 3, {0: 16, 1: 16, 2: 16, 3: 8}, dict.fromkeys(range(4), 16), {}),
        Case("pair", "none", 3, *[dict.fromkeys(range(4), 16)] * 2, {}),
    ],
    ids=lambda case: case.sharing,
)
def test_memory_does_not_grow_with_channels_squared(case, monkeypatch):
    """No tensor of edges × C_in × C_out, and little kept per edge for the backward pass."""
    use_chunks(monkeypatch, 10**6, 2**19)
    conv, float32, kept, edges = build(case), 4, {}, 300
    pairs = [(i, o) for i in case.fiber_in for o in case.fiber_out]
    dense = float32 * sum((2 * min(i, o) + 1) * case.fiber_in[i] * case.fiber_out[o] for i, o in pairs)  # of an edge
    for number in (100, edges):
        sample = random_sample(case.fiber_in, nodes=(50,), edges=(number,), dtype=torch.float32).leaves()
        edge_feats = reference.with_distance(sample.edge_feats, sample.rel_pos)
        basis = get_basis(sample.rel_pos.detach(), max_degree=3)
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with LargestTensor() as largest:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                out = conv(sample.node_feats, edge_feats, sample.graph, basis)
            sum((x**2).sum() for x in out.values()).backward()
        kept[number] = sum(saved.values())
    assert largest.bytes < edges * dense / 4, f"a tensor of {largest.bytes / 2**20:.1f} MiB"
    per_edge = (kept[edges] - kept[100]) / (edges - 100)
    assert per_edge < dense / 2, f"{per_edge:.0f} bytes kept per edge, {dense} are its radial weights"
