"""The Triton kernels, in Triton's interpreter: what they compute; and that they can be compiled for GPUs.

The interpreter has no products in bfloat16, and those in tf32 are exact there.
"""

import os
import subprocess
import sys

import pytest
import torch
from battery import varied
from helpers import assert_same, batched, degenerate_samples, gradients, random_sample
from scripts import PATIENCE, ROOT

from se3_transformer.model import Fiber, SE3Transformer
from se3_transformer.model.layers import contraction, native

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU on_device.py runs the kernels themselves")
PRECISION = {torch.float32: 1e-6, torch.float16: 1e-3}  # of the matrix, and relative errors


@pytest.fixture(scope="module")
def on_chip():
    """The module, interpreted, as the environment variable chooses it."""
    module = "se3_transformer.model.layers.on_chip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(contraction.TRITON, "1")
        patch.delitem(sys.modules, module, raising=False)
        contraction.kernels.cache_clear()
        torch.set_float32_matmul_precision("high")
        yield contraction.kernels()
    torch.set_float32_matmul_precision("highest")
    contraction.kernels.cache_clear()
    sys.modules.pop(module)


@pytest.fixture(autouse=True)
def in_small_blocks(on_chip, monkeypatch):
    """So that a program does not do all there is."""
    for name, size in {"EDGES": 16, "OUTS": 16, "FEATURES_IN_TURN": 3, "EDGES_IN_TURN": 32}.items():
        monkeypatch.setattr(on_chip, name, size)


def random_inputs(E, P, K, Q, H, dtype):
    """x, hidden, matrix as `OnChip` gets them; x and hidden are parts of larger tensors, as in a convolution."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(E, P + 1, K + 2, generator=generator)[:, 1:, :K]
    hidden = torch.randn(E, 2, H, generator=generator)[:, 1]
    return x, hidden, torch.randn(P, Q, K * H, generator=generator).to(dtype)


def values_and_gradients(function, inputs, dtype=None):
    inputs = [x.to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, torch.linspace(-1, 2, out.numel()).view(out.shape).to(out.dtype))


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("sizes", [(70, 5, 19, 16), (16, 1, 16, 32), (1, 4, 3, 32), (0, 2, 2, 16)], ids=str)
@pytest.mark.parametrize("P", [1, 2])
def test_values_and_gradients(P, sizes, dtype, on_chip):
    E, K, Q, H = sizes
    inputs = random_inputs(E, P, K, Q, H, dtype)
    expected = values_and_gradients(on_chip.plain, inputs, torch.float64)
    actual = values_and_gradients(on_chip.OnChip.apply, inputs)
    assert [x.dtype for x in actual] == [dtype, torch.float32, torch.float32, dtype]
    names = ("out", "x", "hidden", "matrix")
    assert_same(dict(zip(names, actual)), dict(zip(names, expected)), PRECISION[dtype])


@pytest.mark.parametrize("contiguous", [True, False])
def test_second_derivatives(contiguous, on_chip):
    def found(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in random_inputs(5, 2, 2, 3, 16, torch.float32)]
        own = inputs if contiguous else [x.mT.contiguous().mT for x in inputs]
        (of_x,) = torch.autograd.grad(function(*own).square().sum(), inputs[:1], create_graph=True)
        return dict(zip("xhm", torch.autograd.grad(of_x.square().sum(), inputs)))

    assert_same(found(on_chip.OnChip.apply, torch.float32), found(on_chip.plain, torch.float64), 1e-5)


@pytest.mark.parametrize("half", [False, True], ids=["tf32", "float16"])
@pytest.mark.parametrize("options", [{}, {"tensor_cores": True}, {"low_memory": True}], ids=str)
def test_network(options, half, on_chip, monkeypatch):
    """All convolutions of a network go through the kernels; values and gradients are those without them."""
    torch.manual_seed(0)
    fibers = Fiber({0: 3, 1: 1}), Fiber({0: 4, 1: 4, 2: 4}), Fiber({0: 2, 1: 3})
    options |= dict(num_heads=2, channels_div=2, fiber_edge=Fiber({0: 2}), norm_softening=0.1)
    model = varied(SE3Transformer(1, *fibers, **options))
    sample = random_sample({0: 3, 1: 1}, {0: 2}, nodes=(4, 3, 2), edges=(7, 5, 3), dtype=torch.float32)
    samples = [sample, batched(degenerate_samples({0: 3, 1: 1}, {0: 2}, torch.float32).values())]
    calls, fits = [], on_chip.fits
    monkeypatch.setattr(on_chip, "fits", lambda *arguments: calls.append(fits(*arguments)) or calls[-1])

    def call(sample):
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            return model(sample.graph, sample.node_feats, sample.edge_feats)

    for sample in samples:
        with native.switched_off():
            actual, grads = gradients(call, sample, model.named_parameters())
        assert calls and all(calls)
        with monkeypatch.context() as patch:
            patch.setattr(contraction, "kernels", lambda: None)
            calls.clear()
            expected, expected_grads = gradients(call, sample, model.named_parameters())
            assert not calls
        assert_same(actual, expected, 5e-3 if half else 1e-5, "values")
        together = [torch.cat([g.flatten() for g in of.values()]) for of in (grads, expected_grads)]
        assert_same(*together, 5e-2 if half else 1e-5, "gradients")


def test_not_taken(on_chip):
    """Single precision in full, and edges that share radial weights."""
    x, hidden, _ = random_inputs(4, 1, 2, 2, 32, torch.float32)
    assert on_chip.fits(x, hidden, torch.float32)
    assert not on_chip.fits(x, hidden, torch.float64)
    assert not on_chip.fits(x, hidden[::2], torch.float32)
    assert not on_chip.fits(x, hidden[:, :20], torch.float32)
    assert not on_chip.fits(x, hidden.repeat(1, 2), torch.float32)
    torch.set_float32_matmul_precision("highest")
    assert not on_chip.fits(x, hidden, torch.float32) and on_chip.fits(x, hidden, torch.bfloat16)
    torch.set_float32_matmul_precision("high")


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from se3_transformer.model.layers import on_chip

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes of a program at most, by compute capability
for capability, kind in ((80, "fp32"), (90, "bf16")):
    pointers = dict.fromkeys(("x", "hidden", "matrix", "out", "grad"), f"*{kind}")
    pointers |= dict.fromkeys(("grad_x", "grad_hidden", "grad_matrix"), "*fp32")
    chosen = dict(H=32, P=2, EDGES=on_chip.EDGES, OUTS=on_chip.OUTS, FEATURES=on_chip.FEATURES[2])
    for kernel in (on_chip.forward_kernel, on_chip.factors_kernel, on_chip.matrix_kernel):
        constants = {name: chosen[name] for name in kernel.arg_names if name in chosen}
        types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, types, {(kernel.arg_names.index(name),): x for name, x in constants.items()})
        made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": on_chip.WARPS})
        assert made.metadata.shared <= SHARED_MEMORY[capability], (kernel, made.metadata.shared)
        assert made.asm["cubin"]
"""


@pytest.mark.skipif(not hasattr(triton, "set_allocator"), reason="this Triton is asked in another way, before 3.3")
def test_kernels_compile_for_gpus(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
