"""The compiled parts of a convolution: the same function and derivatives as in PyTorch, and who is without them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from battery import varied
from helpers import assert_same, gradients, random_features, random_sample
from test_convolution import CASES, SOME, build, build_sample, call

from se3_transformer.model import Fiber, Graph
from se3_transformer.model.basis import ForwardBasis, constant, get_basis
from se3_transformer.model.layers import AttentionBlockSE3, AttentionSE3, ConvSE3, NormSE3, native
from se3_transformer.model.layers.linear import mix_degrees
from se3_transformer.model.transformer import get_populated_edge_features

TOLERANCE = 2e-5  # of single precision, second derivatives included

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


@needs_compiler
@pytest.mark.parametrize("use_layer_norm", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_equals_pytorch(name, use_layer_norm, monkeypatch):
    case = CASES[name]
    conv, sample = build(case, use_layer_norm).float(), build_sample(case, edges=70).to(torch.float32)
    calls = []
    monkeypatch.setattr(native, "call", lambda *args, call=native.call: (calls.append(args[0]), call(*args)))
    found, found_grads = gradients(lambda s: call(conv, s), sample, conv.named_parameters())
    both_ways = {f"{part}_{way}" for part in ("radial", "weights", "contraction") for way in ("forward", "backward")}
    rotations = {"rotate_in", "rotate_out", "group_edges", "sum_edges"} | (
        {"rotate_blocks"} if conv.max_degree else set()
    )
    assert set(calls) == both_ways | rotations
    with native.switched_off():
        expected, expected_grads = gradients(lambda s: call(conv, s), sample, conv.named_parameters())
    assert_same(found, expected, TOLERANCE, "values")
    assert_same(found_grads, expected_grads, TOLERANCE, "gradients")


@needs_compiler
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_second_derivatives(name, autocast):
    """Under autocast too in single precision, but for edges of length zero: the others are too narrow for tiles."""
    case = CASES[name]
    conv, sample = build(case).float(), build_sample(case).to(torch.float32)

    def second(autocast):
        positions = sample.pos.clone().requires_grad_()
        with torch.autocast("cpu", enabled=autocast):
            out = call(conv, replace(sample, pos=positions))
            (force,) = torch.autograd.grad(sum(x.square().sum() for x in out.values()), positions, create_graph=True)
        return torch.autograd.grad(force.square().sum(), [positions, *conv.parameters()], materialize_grads=True)

    found = second(autocast)
    with native.switched_off():
        expected = second(autocast=False)
    tolerance = 0.03 if autocast else 10 * TOLERANCE
    assert_same(dict(enumerate(found)), dict(enumerate(expected)), tolerance, "second derivatives")


@needs_compiler
def test_features_of_edges_alone():
    conv = ConvSE3(Fiber({}), Fiber({0: 2, 1: 3}), Fiber({1: 2}), max_degree=1)
    sample = random_sample({}, {1: 2}, nodes=(7,), edges=(20,), dtype=torch.float32)
    found, found_grads = gradients(lambda s: call(conv, s), sample, conv.named_parameters())
    with native.switched_off():
        expected, expected_grads = gradients(lambda s: call(conv, s), sample, conv.named_parameters())
    assert_same(found, expected, TOLERANCE, "values")
    assert_same(found_grads, expected_grads, TOLERANCE, "gradients")


@needs_compiler
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("rows", [0, 1, 31, 33, 100])
def test_numbers_of_edges(rows, share):
    """Blocks that are not full, no blocks at all; edges that share a row of the hidden layer."""
    conv = ConvSE3(Fiber.create(2, 3), Fiber.create(2, 2), pool=False, max_degree=1)
    src, rel_pos = torch.randint(5, (rows * share,)), torch.randn(rows * share, 3)
    graph = Graph(src, src, rel_pos=rel_pos, num_nodes=5)
    nodes, scalars = {"0": torch.randn(5, 3, 1), "1": torch.randn(5, 3, 3)}, torch.randn(rows, 1, 1)
    edges, basis = {"0": scalars.repeat_interleave(share, 0)}, ForwardBasis(get_basis(rel_pos, 1), in_pairs=share == 2)
    found = conv(nodes, edges, graph, basis)
    with native.switched_off():
        assert_same(found, conv(nodes, edges, graph, basis), TOLERANCE, "values")


@needs_compiler
@pytest.mark.parametrize("fiber_in", [{0: 4, 1: 4}, {0: 3}, {0: 2, 1: 5}])
@pytest.mark.parametrize("channels", [(4, 4), (4, 6)])
@pytest.mark.parametrize("softening", [0.0, 0.5])
def test_attention_and_norm(softening, channels, fiber_in, monkeypatch):
    """Keys and values in one tensor or apart, degrees with the same or other channels, nodes without edges."""
    fiber = Fiber(dict(enumerate(channels)))
    block = varied(AttentionBlockSE3(Fiber(fiber_in), fiber, num_heads=2, channels_div=1, max_degree=1))
    norm = varied(NormSE3(fiber, softening=softening))
    both = torch.nn.ModuleList([block, norm]).float()
    sample = random_sample(fiber_in, nodes=(6, 1, 9), edges=(20, 0, 11), dtype=torch.float32)
    calls = []
    monkeypatch.setattr(native, "call", lambda *args, call=native.call: (calls.append(args[0]), call(*args)))

    def results(second):
        inputs = {degree: feature.clone().requires_grad_() for degree, feature in sample.node_feats.items()}
        edges = get_populated_edge_features(sample.rel_pos)
        out = norm(block(inputs, edges, graph=sample.graph, basis=get_basis(sample.rel_pos, 1)))
        wanted = [*inputs.values(), *both.parameters()]
        loss = sum((x * torch.linspace(-1, 2, x.numel()).view_as(x)).square().sum() for x in out.values())
        grads = torch.autograd.grad(loss, wanted, create_graph=second)
        if second:
            grads = torch.autograd.grad(sum(x.square().sum() for x in grads), wanted, materialize_grads=True)
        return out, dict(enumerate(grads))

    for second in (False, True):
        out, grads = results(second)
        with native.switched_off():
            expected, expected_grads = results(second)
        assert_same(out, expected, TOLERANCE, "values")
        assert_same(grads, expected_grads, 10 * TOLERANCE, f"gradients, second: {second}")
    parts = ("attention", "linear", "norm")
    assert {f"{part}_{way}" for part in parts for way in ("forward", "backward")} <= set(calls)


@needs_compiler
@pytest.mark.parametrize("nodes", [0, 1, 33])
def test_linear(nodes):
    """Channels in two tensors, of any strides, in any number; values, gradients, and shapes that do not fit."""
    sizes = {0: (1, 5, 7), 1: (6, 0, 4), 2: (3, 2, 1), 3: (4, 4, 9)}  # degree: channels in, appended, out
    dims = [2 * degree + 1 for degree in sizes]
    shared = torch.randn(nodes, 6, sum(dims)).split(dims, dim=2)  # as keys and values are
    features = {str(d): shared[d][:, : sizes[d][0]] for d in sizes} | {"1": torch.randn(nodes, 6, 1).expand(-1, -1, 3)}
    appended = {str(d): torch.randn(nodes, 2 * d + 1, extra).mT for d, (_, extra, _) in sizes.items() if extra}
    weights = {str(d): torch.randn(out, c + extra) for d, (c, extra, out) in sizes.items()}
    leaves = [t.requires_grad_() for tensors in (weights, features, appended) for t in tensors.values()]

    def results():
        mixed = mix_degrees(weights, features, appended)
        loss = sum((x.flatten() * torch.linspace(-1, 2, x.numel())).sum() for x in mixed.values())
        return mixed, dict(enumerate(torch.autograd.grad(loss, leaves)))

    found, found_grads = results()
    with native.switched_off():
        expected, expected_grads = results()
    assert all(x.grad_fn.name() == "_NativeBackward" for x in found.values())
    assert_same(found, expected, TOLERANCE, "values")
    assert_same(found_grads, expected_grads, TOLERANCE, "gradients")
    with pytest.raises(RuntimeError, match="size|shapes"):
        mix_degrees({"0": torch.randn(3, 2)}, {"0": torch.randn(4, 5, 1)})


@needs_compiler
def test_second_derivatives_where_one_input_is_made_of_another():
    """Edge features made of node features: the first derivative that is differentiated again counts neither twice."""
    conv = ConvSE3(Fiber({0: 4, 1: 4}), Fiber({0: 4, 1: 4}), Fiber({1: 2}), max_degree=1, self_interaction=True)
    sample = random_sample({0: 4, 1: 4}, nodes=(7,), edges=(20,), dtype=torch.float32)

    def second():
        nodes = {degree: x.clone().requires_grad_() for degree, x in sample.node_feats.items()}
        edges = get_populated_edge_features(sample.rel_pos, {"1": nodes["1"][sample.graph.dst, :2] * 2})
        out = conv(nodes, edges, sample.graph, get_basis(sample.rel_pos, 1))
        first = torch.autograd.grad(sum(x.square().sum() for x in out.values()), [*nodes.values()], create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), [*nodes.values(), *conv.parameters()])

    found = second()
    with native.switched_off():
        expected = second()
    assert_same(dict(enumerate(found)), dict(enumerate(expected)), 10 * TOLERANCE, "second derivatives")


@needs_compiler
def test_refuses_what_would_be_read_out_of_bounds():
    conv, rel_pos = ConvSE3(Fiber.create(2, 3), Fiber.create(2, 2), max_degree=1), torch.randn(4, 3)
    edges, basis = {"0": torch.randn(4, 1, 1)}, get_basis(rel_pos, 1)
    graph = Graph(torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 1, 0]), rel_pos=rel_pos, num_nodes=3)

    def nodes(count=3, channels=3):
        return {"0": torch.randn(count, 3, 1), "1": torch.randn(count, channels, 3)}

    conv(nodes(), edges, graph, basis)
    with pytest.raises(ValueError, match=r"expected a feature .* \(3, 3, 3\), got \(3, 2, 3\)"):
        conv(nodes(channels=2), edges, graph, basis)
    with pytest.raises(ValueError, match=r"expected a .* Wigner block \(4, 1, 1\), got \(3, 1, 1\)"):
        conv(nodes(), edges, graph, get_basis(rel_pos[:3], 1))
    for shape in ((2, 1, 1), (4, 2, 1)):
        with pytest.raises(ValueError, match=rf"expected degree 0 as \(4, 1, 1\).* got {re.escape(str(shape))}"):
            conv(nodes(), {"0": torch.randn(shape)}, graph, basis)
    with pytest.raises(IndexError, match="negative or not below their number"):
        conv(nodes(count=2), edges, graph, basis)
    with pytest.raises(ValueError, match="some on the CPU, one on meta"):
        conv.to("meta")(nodes(), edges, graph, basis)


@needs_compiler
def test_attention_refuses_other_numbers_of_channels():
    fiber = Fiber({0: 4, 1: 4})
    attention, graph = AttentionSE3(2, fiber, fiber), Graph(torch.tensor([0, 1]), torch.tensor([1, 2]), num_nodes=3)
    few, right = Fiber({0: 2, 1: 4}), random_features(fiber, 3, torch.float32)
    edges = random_features(fiber, 2, torch.float32)
    with pytest.raises(ValueError, match="expected queries of 16 numbers in 3 rows, got 14 "):
        attention(edges, edges, random_features(few, 3, torch.float32), graph)
    with pytest.raises(ValueError, match="expected keys and values of 16 numbers in 2 rows, got 14 "):
        attention(edges, random_features(few, 2, torch.float32), right, graph)
    with pytest.raises(ValueError, match="expected keys and values of 32 numbers in 2 rows, got 16 "):
        attention(torch.randn(2, 4, 4), None, right, graph)


@needs_compiler
def test_negative_views():
    """Numbers that torch only marks as negative: in features, and in gradients of complex losses."""
    norm = varied(NormSE3(Fiber({0: 4}))).float()
    x = torch.randn(6, 4, 1, requires_grad=True)

    def results(marked):
        feature = torch.complex(x, -x).conj().imag if marked else x * 1
        assert feature.is_neg() == marked
        out = norm({"0": feature})["0"]
        loss = torch.complex(torch.zeros_like(out), out).conj() * torch.linspace(-1, 1, 4)[:, None] * 1j
        return out, torch.autograd.grad(loss.real.sum(), x)[0]

    for marked in (False, True):
        found = results(marked)
        with native.switched_off():
            expected = results(marked)
        assert_same(dict(enumerate(found)), dict(enumerate(expected)), TOLERANCE, "values and gradients")


@pytest.mark.parametrize("natively", [True, False])
def test_training_after_inference_mode(natively):
    """Constants that were first needed in inference mode."""
    with nullcontext() if natively else native.switched_off():
        conv, rel_pos = ConvSE3(Fiber({1: 7}), Fiber({2: 7}), max_degree=2), torch.randn(9, 3, requires_grad=True)
        graph = Graph(torch.randint(4, (9,)), torch.randint(4, (9,)), num_nodes=4)
        nodes = {"1": torch.randn(4, 7, 3)}

        def out():
            return conv(nodes, get_populated_edge_features(rel_pos), graph, get_basis(rel_pos, 2))["2"]

        with torch.inference_mode():
            out()
        out().sum().backward()
    assert rel_pos.grad.isfinite().all()


@needs_compiler
def test_threads():
    """One thread or several: the same up to rounding; as many as before: the same bits."""
    case = CASES["per output, wide"]
    conv, sample = build(case).float(), build_sample(case, edges=200).to(torch.float32)
    before, results = torch.get_num_threads(), {}
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            _, grads = gradients(lambda s: call(conv, s), sample, conv.named_parameters())
            if threads in results:
                assert_same(grads, results[threads], 0, "gradients, again")
            results[threads] = grads
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[3], TOLERANCE, "gradients")


@needs_compiler
def test_threads_of_python():
    """Several convolutions at a time, forward and backward, each in buffers of its own: the same bits."""
    case = CASES["per pair, edges of degrees 0, 1, 2"]
    conv, sample = build(case).float(), build_sample(case, edges=200).to(torch.float32)

    def grads(_):
        return gradients(lambda s: call(conv, s), sample, conv.named_parameters())[1]

    expected = grads(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(grads, range(8)):
            assert_same(found, expected, 0, "gradients")


def test_constants_in_threads():
    """Several threads that want the same constant for the first time."""

    @constant
    def slow(number):
        time.sleep(0.05)
        return torch.tensor(number)

    with ThreadPoolExecutor(4) as pool:
        assert [value.item() for value in pool.map(slow, [1, 1, 2, 2])] == [1, 1, 2, 2]


@needs_compiler
@pytest.mark.parametrize("what", ["nodes", "edges", "src", "frames", "radial"])
def test_changed_before_the_backward_pass(what):
    """What the backward pass reads again, and what the forward pass read, must be the same."""
    case = CASES["per output, unequal"]
    conv, sample = build(case).float(), build_sample(case).to(torch.float32)
    graph, basis = sample.graph, get_basis(sample.rel_pos, 2)
    edges = get_populated_edge_features(sample.rel_pos, sample.edge_feats)
    out = conv(sample.node_feats, edges, graph, basis)["0"].sum()
    with torch.no_grad():
        {
            "nodes": sample.node_feats["1"],
            "edges": edges["0"],
            "src": graph.src,
            "frames": basis["2"],
            "radial": next(conv.parameters()),
        }[what].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@needs_compiler
def test_what_it_is_not_for():
    x = torch.randn(4, 1, 3)
    assert native.fits(x)
    assert native.fits(x.bfloat16())  # of autocast; the sums are in single precision
    assert not native.fits(x.double())
    assert not native.fits(x.to("meta"))


@needs_compiler
def test_autocast():
    """Compiled layers give single precision, so that no features are converted from one to the next."""
    case = CASES["per output"]
    conv, sample = build(case).float(), build_sample(case).to(torch.float32)
    exact = call(conv, sample)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(conv, sample)
    assert_same(found, exact, 0.05, "values")
    assert {x.dtype for x in found.values()} == {torch.float32}
    assert {x.dtype for x in call(conv, sample.to(torch.bfloat16)).values()} == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which leaves float64 as it is
        assert_same(call(conv.double(), sample.to(torch.float64)), exact, TOLERANCE, "values")
    assert {x.dtype for x in call(conv.bfloat16(), sample.to(torch.bfloat16)).values()} == {torch.bfloat16}


needs_tiles = pytest.mark.skipif(not native.has_tiles(), reason="this processor has no tiles (AMX), or no C compiler")
PARTS = {0: TOLERANCE, 1: 0.02, 2: 1e-4, 3: TOLERANCE}  # bf16 numbers of which each is made, 0: none is; tolerance
TILES = [pytest.param(parts, threads, marks=needs_tiles) for parts, threads in ((1, 1), (2, 1), (3, 1), (3, 3))]


@needs_compiler
@pytest.mark.parametrize("parts, threads", [(0, 1), (0, 3), *TILES])
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize(
    "fiber_in, fiber_out, rows",
    [
        (Fiber({0: 3, 1: 32, 2: 5}), Fiber({0: 64, 1: 32, 2: 20}), 70),  # one term of them not made of panels
        (Fiber({0: 3, 1: 17}), Fiber({0: 16, 1: 48}), 70),  # registers of outputs, but no panels
        (Fiber.create(3, 7), Fiber.create(3, 32), 33),
        (Fiber.create(2, 5), Fiber.create(2, 32), 700),  # more than go through a matrix at a time
        (Fiber.create(1, 1), Fiber.create(1, 32), 1),
        (Fiber.create(2, 4), Fiber.create(2, 32), 0),
    ],
)
def test_products(fiber_in, fiber_out, rows, share, parts, threads, monkeypatch):
    """Convolutions of many channels, against float64; threads may be more than there are blocks or channels."""
    expected, expected_grads = wide_convolution(fiber_in, fiber_out, rows, share, torch.float64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(native, "parts_of_products", lambda dtype: parts)
    out, grads = wide_convolution(fiber_in, fiber_out, rows, share, torch.float32)
    assert_same(out, expected, PARTS[parts], "values")
    assert_same(grads, expected_grads, PARTS[parts], "gradients")


@needs_compiler
@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_hidden_units_that_are_zero(bias):
    """All of them, which leaves nothing to multiply, or none."""

    def results(dtype):
        return wide_convolution(Fiber.create(2, 5), Fiber.create(2, 32), 70, 1, dtype, bias)

    (expected, expected_grads), (out, grads) = results(torch.float64), results(torch.float32)
    assert all(bool(x.any()) == (bias > 0) for x in expected.values())
    assert_same(out, expected, TOLERANCE, "values")
    assert_same(grads, expected_grads, TOLERANCE, "gradients")


def wide_convolution(fiber_in, fiber_out, rows, share, dtype, bias=None):
    """What comes out of a convolution, and all gradients; the last hidden layers have this bias, or one by chance."""
    torch.manual_seed(0)
    max_degree = max(*fiber_in.degrees, *fiber_out.degrees)
    conv, src = varied(ConvSE3(fiber_in, fiber_out, max_degree=max_degree, pool=False)), torch.arange(rows * share) % 5
    for name, parameter in conv.named_parameters():
        if bias is not None and name.endswith("net.2.bias"):  # before the last ReLU
            torch.nn.init.constant_(parameter, bias)
    leaves = {f"nodes {degree}": torch.randn(5, c, 2 * degree + 1) for degree, c in fiber_in}
    leaves |= {"scalars": torch.randn(rows, 1, 1), "positions": torch.randn(rows * share, 3)}
    given = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
    nodes = {str(degree): given[f"nodes {degree}"] for degree in fiber_in.degrees}
    edges, rel_pos = {"0": given["scalars"].repeat_interleave(share, 0)}, given["positions"]
    basis = ForwardBasis(get_basis(rel_pos, max_degree, compute_gradients=True), in_pairs=share == 2)
    out = conv.to(dtype)(nodes, edges, Graph(src, src, rel_pos=rel_pos, num_nodes=5), basis)
    loss = sum((x * torch.linspace(-1, 2, x.numel(), dtype=dtype).view_as(x)).sum() for x in out.values())
    grads = torch.autograd.grad(loss, [*given.values(), *conv.parameters()], materialize_grads=True)
    return out, dict(zip([*given, *dict(conv.named_parameters())], grads, strict=True))


@needs_tiles
def test_tiles_are_as_they_were():
    """Products of PyTorch in bf16, which use them too, before and after ours and in turns with them."""
    conv, graph = ConvSE3(Fiber({0: 32}), Fiber({0: 32}), max_degree=0), Graph(*torch.randint(5, (2, 40)), num_nodes=5)
    rel_pos, left, right = torch.randn(40, 3), *torch.randn(2, 256, 256).bfloat16()
    arguments = {"0": torch.randn(5, 32, 1)}, get_populated_edge_features(rel_pos), graph, get_basis(rel_pos, 0)
    expected = left @ right
    with torch.autocast("cpu"):
        first = conv(*arguments)["0"]
        for _ in range(3):
            assert torch.equal(left @ right, expected)
            assert torch.equal(conv(*arguments)["0"], first)


MATMUL = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and newer


@pytest.mark.parametrize("names", [("highest", "high", "medium"), ("ieee", "tf32", "bf16")])
def test_parts_of_products(names, monkeypatch):
    """By either of torch's interfaces; the older one raises errors after uses of the newer one."""
    if names[0] == "ieee" and MATMUL is None:
        pytest.skip("this torch has only the older interface")
    before = MATMUL.fp32_precision if names[0] == "ieee" else torch.get_float32_matmul_precision()

    def allow(precision):
        if names[0] == "ieee":
            MATMUL.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(precision)

    for has_tiles, expected in ((True, (0, 2, 1)), (False, (0, 0, 0))):
        monkeypatch.setattr(native, "has_tiles", lambda has_tiles=has_tiles: has_tiles)
        found = []
        try:
            for precision in names:
                allow(precision)
                found.append(native.parts_of_products(torch.float32))
        finally:
            allow(before)
        assert tuple(found) == expected
        halves = [native.parts_of_products(dtype) for dtype in (torch.bfloat16, torch.float16)]
        assert halves == ([1, 2] if has_tiles else [0, 0])


# -------------------------------------------------------------------------------------------------------- compilation

PROGRAM = """
import warnings
from se3_transformer.model.layers import native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    library = native.library()
    native.library()
print(library is not None, len(caught), *(str(warning.message) for warning in caught))
"""


def load(**environment):
    """Whether a fresh process has the library, how many warnings there were, and what they said."""
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    available, warnings, *text = run.stdout.split(maxsplit=2)
    return available == "True", int(warnings), " ".join(text)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_compilers(compiler, tmp_path):
    """Other versions have other names: clang-14 and so on."""
    names = [compiler, *(f"{compiler}-{version}" for version in range(30, 8, -1))]
    found = next(filter(shutil.which, names), None)
    if found is None:
        pytest.skip(f"no {compiler} here")
    assert load(SE3_TRANSFORMER_CACHE=str(tmp_path), CC=found) == (True, 0, "")


@needs_compiler
def test_compiled_once(tmp_path):
    assert load(SE3_TRANSFORMER_CACHE=str(tmp_path / "new" / "folder"))[:2] == (True, 0)
    (library,) = (tmp_path / "new" / "folder").iterdir()
    made = library.stat().st_mtime_ns
    assert load(SE3_TRANSFORMER_CACHE=str(library.parent))[:2] == (True, 0)
    assert [path.stat().st_mtime_ns for path in library.parent.iterdir()] == [made]


def test_no_compiler(tmp_path):
    available, warnings, text = load(CC="no_such_compiler", SE3_TRANSFORMER_CACHE=str(tmp_path))
    assert (available, warnings) == (False, 1)
    assert "no C compiler 'no_such_compiler'" in text and "SE3_TRANSFORMER_NATIVE=0" in text
    assert not list(tmp_path.iterdir())


def test_compiler_that_fails(tmp_path):
    available, warnings, _ = load(CC="false", SE3_TRANSFORMER_CACHE=str(tmp_path))
    assert (available, warnings) == (False, 1)
    assert not list(tmp_path.iterdir())


def compiler(path, script):
    """A C compiler that is a shell script, and calls the real one as `cc`."""
    path.write_text(f'#!/bin/sh\n{script}\nexec cc "$@"\n')
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_compiler_that_was_killed(tmp_path):
    """What comes of it is no reason to do without threads from then on."""
    killed = compiler(tmp_path / "killed", 'case "$*" in *-fopenmp*) kill -9 $$;; esac')
    available, warnings, text = load(CC=killed, SE3_TRANSFORMER_CACHE=str(tmp_path / "cache"))
    assert (available, warnings) == (False, 1) and "SIGKILL" in text
    assert not list((tmp_path / "cache").iterdir())


@needs_compiler
@pytest.mark.parametrize("flags", [["-fopenmp"], ["-march=native"], ["-march=native", "-fopenmp"]])
def test_compiler_that_lacks_flags(flags, tmp_path):
    refuse = (f'case "$*" in *{flag}*) echo "unsupported option {flag}" >&2; exit 1;; esac' for flag in flags)
    without = compiler(tmp_path / "without", "\n".join(refuse))
    assert load(CC=without, SE3_TRANSFORMER_CACHE=str(tmp_path / "cache"))[:2] == (True, 0)


def test_what_the_compiler_says(tmp_path):
    says = compiler(tmp_path / "says", 'echo "no string.h, \351" >&2; exit 1')
    available, warnings, text = load(CC=says, SE3_TRANSFORMER_CACHE=str(tmp_path / "cache"))
    assert (available, warnings) == (False, 1) and "no string.h" in text


@needs_compiler
def test_locale_that_is_not_utf8(tmp_path):
    locale = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert load(SE3_TRANSFORMER_CACHE=str(tmp_path), **locale)[:2] == (True, 0)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    available, warnings, text = load(SE3_TRANSFORMER_CACHE=str(tmp_path / "file"))
    assert (available, warnings) == (False, 1) or native.library() is None
    assert "file" in text


def test_switched_off():
    assert load(SE3_TRANSFORMER_NATIVE="0") == (False, 0, "")
