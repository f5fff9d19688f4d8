"""On a device that is not the CPU: same numbers, nothing in the wrong place, no training step that waits for it.

    python -m pytest tests/on_device.py  # on the GPU; where there is none, on `pretended_device`

`test_device.py` runs this in processes of its own: PyTorch takes note of devices when it first computes a gradient.
"""

from __future__ import annotations

import copy
import importlib
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext

import pretended_device
import pytest
import torch
from battery import EDGES, NODES, Battery, varied
from helpers import (
    TOLERANCE,
    assert_equivariant,
    assert_finite,
    assert_same,
    batched,
    degenerate_samples,
    gradients,
    random_sample,
)
from qm9_molecules import many_molecules, save
from scripts import PATIENCE, ROOT, run
from test_golden import CASES, Golden, assert_each_same, needs_golden, run_model
from test_golden import TOLERANCE as GOLDEN_TOLERANCE

from se3_transformer.model import Fiber, SE3Transformer
from se3_transformer.model.layers import contraction
from se3_transformer.model.layers.contraction import ORDERS
from se3_transformer.model.layers.convolution import VersatileConvSE3
from se3_transformer.model.neighbors import knn, radius
from se3_transformer.runtime import distributed
from se3_transformer.runtime.checkpoint import load_checkpoint
from se3_transformer.runtime.trainer import Trainer

WITH_BATTERY = ("test_layers", "test_transformer", "test_options", "test_tfn", "test_iterative")
BATTERIES = [
    thing
    for module in WITH_BATTERY
    for name, thing in vars(importlib.import_module(module)).items()
    if name.startswith("Test") and issubclass(thing, Battery)
]
REDUCED = {"bfloat16": 0.05, "float16": 0.01, "tf32": 0.01}  # relative errors of what a network says in low precision
REDUCED_GRADIENT = 0.3  # that of gradients, in any: a rounding error may open a ReLU
NBODY = ["--num_layers", "1", "--num_degrees", "2", "--num_channels", "4", "--num_heads", "2", "--channels_div", "2"]
NBODY += ["--batch_size", "8", "--warmup_steps", "1", "--threads", "1", "--ema_decay", "0.9"]
QM9 = [*NBODY, "--balanced", "true"]
NBODY += ["--num_iterations", "2"]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `test_same_bits`; asked for at the first product
ON_GPU = os.environ.get("SE3_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "pretended") == "cuda"


@pytest.fixture(params=[torch.float32, torch.float64] if ON_GPU else [torch.float32], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def device(monkeypatch) -> torch.device:
    """A device, with products in full precision; scripts that are told to take cuda take it."""
    if ON_GPU:
        torch.set_float32_matmul_precision("highest")
        return torch.device("cuda", 0)
    pretended = pretended_device.set_up(monkeypatch)

    @contextmanager
    def process_group(name):
        yield pretended if name == "cuda" else torch.device(name)

    monkeypatch.setattr(distributed, "process_group", process_group)
    return pretended


@contextmanager
def no_waiting(device: torch.device):
    """An error where the CPU would have to wait for the device."""
    if device.type == pretended_device.NAME:
        with pretended_device.no_waiting():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_cpu(tensors):
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def assert_same_there(module, call, sample, device, tolerance=None):
    """Values and gradients on the device are those of the CPU."""
    expected, expected_grads = gradients(lambda s: call(module, s), sample, module.named_parameters())
    module = copy.deepcopy(module).to(device)
    actual, grads = gradients(lambda s: call(module, s), sample.on(device), module.named_parameters())
    assert {x.device for x in [*actual.values(), *grads.values()]} <= {device}
    assert_same(on_cpu(actual), expected, tolerance, "values")
    assert_same(on_cpu(grads), expected_grads, tolerance, "gradients")


def network(**options):
    torch.manual_seed(0)
    fibers = Fiber({0: 3, 1: 1}), Fiber({0: 4, 1: 4, 2: 4}), Fiber({0: 2, 1: 3})
    return varied(SE3Transformer(2, *fibers, num_heads=2, channels_div=2, fiber_edge=Fiber({0: 2}), **options))


@pytest.fixture
def sample(dtype):
    return random_sample({0: 3, 1: 1}, {0: 2}, nodes=NODES, edges=EDGES, dtype=dtype)


def call(model, sample):
    return model(sample.graph, sample.node_feats, sample.edge_feats)


# --------------------------------------------------------------------------------------------------- layers and models


def test_there_are_batteries():
    assert len(BATTERIES) > 30


@pytest.mark.parametrize("battery", BATTERIES, ids=lambda battery: battery.__name__)
def test_layers_and_models(battery, device, dtype):
    battery = battery()
    sample = random_sample(battery.fiber_in, battery.fiber_edge, nodes=NODES, edges=EDGES, dtype=dtype)
    assert_same_there(varied(battery.build()).to(dtype), battery.call, sample, device)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"tensor_cores": True}], ids=str)
def test_orders_of_contraction(options, order, device, sample, dtype):
    model = network(**options).to(dtype)
    for module in model.modules():
        if isinstance(module, VersatileConvSE3):
            module.order = order
    assert_same_there(model, call, sample, device)


def test_degenerate_graphs(device, dtype):
    odd = degenerate_samples({0: 3, 1: 1}, {0: 2}, dtype)
    for sample in (batched(odd.values()), odd["no edges"], odd["one node"]):
        assert_same_there(network().to(dtype), call, sample, device)


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_golden_files(case, device, dtype):
    golden, tolerance = Golden(case), GOLDEN_TOLERANCE[dtype]
    for found, expected in zip(
        run_model(golden, dtype, lambda sample: sample.graph, device), (golden.outputs, golden.gradients), strict=True
    ):
        assert_each_same(found, expected, tolerance, case)


def in_precision(name, model, device):
    """What calls a model on a device with products in a lower precision."""
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)

    def called(sample):
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            return {degree: x.float() for degree, x in call(model, sample).items()}

    return called


@pytest.mark.parametrize("reduced", REDUCED)
@pytest.mark.parametrize("options", [{"tensor_cores": True}, {"low_memory": True}], ids=str)
def test_reduced_precision(options, reduced, device):
    """Autocast on a GPU casts other operations than on the CPU; what comes out is close to single precision."""
    if reduced == "tf32" and device.type == pretended_device.NAME:
        pytest.skip("the CPU has no products in tf32")
    model = network(use_layer_norm=True, **options)
    sample = random_sample({0: 3, 1: 1}, {0: 2}, nodes=(9,), edges=(60,), dtype=torch.float32)
    expected, expected_grads = gradients(lambda s: call(model, s), sample, model.named_parameters())
    model = model.to(device)
    torch.set_float32_matmul_precision("high" if reduced == "tf32" else "highest")
    actual, grads = gradients(in_precision(reduced, model, device), sample.on(device), model.named_parameters())
    assert_same(on_cpu(actual), expected, REDUCED[reduced], "values")
    together = [torch.cat([g.flatten() for g in of.values()]) for of in (on_cpu(grads), expected_grads)]
    assert_same(*together, REDUCED_GRADIENT, "gradients")


@pytest.mark.parametrize("reduced", REDUCED)
def test_triton_kernels(reduced, device, monkeypatch):
    """The same within the errors of the precision; blocks of edges and outputs that are not whole."""
    if device.type == pretended_device.NAME:
        pytest.skip("the kernels need a GPU; `test_on_chip.py` interprets them")
    torch.manual_seed(0)
    model = SE3Transformer(2, Fiber({0: 6}), Fiber.create(4, 32), Fiber({0: 32}), 8, 2, tensor_cores=True)
    sample = random_sample({0: 6}, {}, nodes=(90, 200), edges=(700, 1800), dtype=torch.float32)
    expected, expected_grads = gradients(lambda s: call(model, s), sample, model.named_parameters())
    monkeypatch.setenv(contraction.TRITON, "1")
    contraction.kernels.cache_clear()
    on_chip, taken = contraction.kernels(), []
    fits = on_chip.fits
    monkeypatch.setattr(on_chip, "fits", lambda *arguments: taken.append(fits(*arguments)) or taken[-1])
    try:
        torch.set_float32_matmul_precision("high" if reduced == "tf32" else "highest")
        call_model = in_precision(reduced, model.to(device), device)
        actual, grads = gradients(call_model, sample.on(device), model.named_parameters())
    finally:
        contraction.kernels.cache_clear()
    assert taken and all(taken)
    assert_same(on_cpu(actual), expected, REDUCED[reduced], "values")
    together = [torch.cat([g.flatten() for g in of.values()]) for of in (on_cpu(grads), expected_grads)]
    assert_same(*together, REDUCED_GRADIENT, "gradients")


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_precision_of_features_that_are_zero(half, device):
    """Norms divide by their lengths. Nodes without neighbours have such features."""
    sample = random_sample({0: 3, 1: 1}, {0: 2}, nodes=NODES, edges=(1, 0, 2), dtype=torch.float32).on(device)
    for norm_type in ("norm", "bias"):
        model = network(norm_type=norm_type).to(device)
        assert_finite(in_precision(half, model, device)(sample), norm_type)
        model = network(norm_type=norm_type, norm_softening=0.1).to(device)
        assert_finite(gradients(in_precision(half, model, device), sample, model.named_parameters())[1], norm_type)


def test_equivariance(device, sample, dtype):
    model = network().to(device, dtype)
    assert_equivariant(lambda s: call(model, s), sample.on(device))


def test_same_bits(device):
    """Twice the same, where PyTorch is told to compute deterministically."""
    model = network(return_type=0, pooling="max", tensor_cores=True).to(device)
    sample = random_sample({0: 3, 1: 1}, {0: 2}, nodes=(30, 50), edges=(200, 900), dtype=torch.float32).on(device)
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (gradients(lambda s: call(model, s), sample, model.named_parameters()) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(once[0], again[0], 0, "values")
    assert_same(once[1], again[1], 0, "gradients")


def test_loss_on_forces(device, sample, dtype):
    """Second derivatives with respect to positions."""
    model = network(return_type=0, pooling="sum").to(dtype)

    def loss(model, sample):
        sample = sample.leaves()
        (force,) = torch.autograd.grad(call(model, sample).square().sum(), sample.pos, create_graph=True)
        inputs = {"pos": sample.pos, **dict(model.named_parameters())}
        found = torch.autograd.grad(force.square().sum(), [*inputs.values()], allow_unused=True)
        return {
            name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(inputs.items(), found, strict=True)
        }

    found = loss(copy.deepcopy(model).to(device), sample.on(device))
    assert_same(on_cpu(found), loss(model, sample), 10 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    "build", [lambda pos, n: knn(pos, 3, n), lambda pos, n: radius(pos, 1.5, n)], ids=["knn", "radius"]
)
def test_neighbors(build, device):
    sample = random_sample({0: 1}, nodes=NODES, edges=EDGES)
    expected, found = build(sample.pos, sample.num_nodes), build(sample.pos.to(device), sample.num_nodes.to(device))
    assert found.src.device == found.rel_pos.device == device
    assert_same(
        {"src": found.src.cpu(), "dst": found.dst.cpu(), "rel_pos": found.rel_pos.cpu()},
        {"src": expected.src, "dst": expected.dst, "rel_pos": expected.rel_pos},
        1e-15,
    )


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory with tiny caches of both data sets."""
    directory = tmp_path_factory.mktemp("device")
    save(directory / "small.npz", many_molecules(60))
    sizes = ["--num_train", "20", "--num_val", "4", "--num_test", "4"]
    for command in (
        ["preprocess_qm9.py", "--source", "small.npz"],
        ["preprocess_nbody.py", "--preset", "egnn", *sizes],
    ):
        done = run(*command, cwd=directory)
        assert done.returncode == 0, done.stderr
    return directory


RUNS = {
    "nbody resumed": ("train_nbody.py", "--preset", "egnn", *NBODY),
    "nbody in bf16": ("train_nbody.py", "--preset", "egnn", *NBODY, "--num_iterations", "1", "--precision", "bfloat16"),
    "qm9 resumed": ("train_qm9.py", *QM9, "--augment", "rotations", "--reference", "fit"),
    "nbody in graphs, resumed": ("train_nbody.py", "--preset", "egnn", *NBODY, "--cuda_graphs", "true"),
    "qm9 in graphs, resumed": ("train_qm9.py", *QM9, "--augment", "rotations", "--cuda_graphs", "true"),
    "qm9 in graphs and bf16": ("train_qm9.py", *QM9, "--precision", "bfloat16", "--cuda_graphs", "true"),
    "qm9 in fp16": ("train_qm9.py", *QM9, "--precision", "float16", "--resident", "false", "--accumulate", "2"),
}


@pytest.mark.parametrize("which", RUNS)
def test_training(which, device, prepared, monkeypatch):
    """A run ends where it ends on the CPU, in single precision, and where one ends that was interrupted.

    No step waits for the device, but for what is done once: constants of the model, the first average, CUDA graphs.
    """
    steps, step = 0, Trainer._step

    def watched(self, index, parts):
        nonlocal steps
        steps += 1
        with no_waiting(device) if self.device == device and steps > 2 else nullcontext():
            step(self, index, parts)
        if steps == interrupted_after:
            signal.raise_signal(signal.SIGINT)

    def weights(kind, on="cuda"):
        nonlocal steps
        steps, name = 0, f"{which}_{device.type}_{kind}".replace(" ", "_")
        graphs = ["--cuda_graphs", "false"] if on == "cpu" else []
        done = run(*RUNS[which], *graphs, "--device", on, "--epochs", "2", "--run_name", name, cwd=prepared)
        assert ("the same command goes on" in done.stderr) if interrupted_after else not done.returncode, done.stderr
        return load_checkpoint(prepared / f"data/{name}_last.pt")["model"]

    interrupted_after = 0
    monkeypatch.setattr(Trainer, "_step", watched)
    whole = weights("whole")
    assert steps > 4
    if "resumed" in which:
        assert_same(whole, weights("cpu", on="cpu"), 1e-3, "weights, against the CPU's")
        interrupted_after = 4
        weights("resumed")
        interrupted_after = 0
        assert_same(weights("resumed"), whole, 1e-3 if device.type == "cuda" else 0, "weights after an interruption")


def test_benchmark(device, prepared):
    """Training steps of `benchmarks.gpu` in CUDA graphs."""
    flags = "--batch_sizes 3 --implementations ours --precisions bf16 --molecules 16 --num_layers 1 --num_channels 8"
    flags += f" --num_heads 2 --seconds 0.1 --cuda_graphs true --device {device}"
    done = run("benchmarks/gpu.py", *flags.split(), cwd=prepared)
    assert done.returncode == 0, done.stderr
    rates = [float(line.split("|")[5]) for line in done.stdout.splitlines() if line.startswith("| ours")]
    assert len(rates) == 2 and min(rates) > 0


def test_torchrun(device, prepared):
    """One process that torchrun starts, with NCCL, trains as one that it does not start."""
    if device.type == pretended_device.NAME:
        pytest.skip("NCCL needs a GPU; `test_two_processes_equal_one` has torchrun on the CPU")
    names, flags = ("one_process", "torchrun"), [*RUNS["nbody resumed"][1:], "--device", "cuda", "--epochs", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    for name, python in zip(names, ([sys.executable], launcher), strict=True):
        command = [*python, str(ROOT / "train_nbody.py"), *flags, "--run_name", name]
        done = subprocess.run(command, cwd=prepared, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
    one, other = (load_checkpoint(prepared / f"data/{name}_last.pt")["model"] for name in names)
    assert_same(one, other, 1e-3, "weights")
