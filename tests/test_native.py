"""The compiled parts of a convolution: the same function and derivatives as in PyTorch, and who is without them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_same, gradients
from test_convolution import CASES, SOME, build, build_sample, call

from se3_transformer.model.layers import contraction, native

TOLERANCE = 2e-5  # of single precision, second derivatives included

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


@needs_compiler
@pytest.mark.parametrize("use_layer_norm", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_equals_pytorch(name, use_layer_norm, monkeypatch):
    case = CASES[name]
    conv, sample = build(case, use_layer_norm).float(), build_sample(case, edges=70).to(torch.float32)
    calls = []
    monkeypatch.setattr(native, "call", lambda *args, call=native.call: (calls.append(args[0]), call(*args)))
    found, found_grads = gradients(lambda s: call(conv, s), sample, conv.named_parameters())
    assert set(calls) == {f"{part}_{way}" for part in ("radial", "contraction") for way in ("forward", "backward")}
    monkeypatch.setattr(native, "fits", lambda *_: False)
    expected, expected_grads = gradients(lambda s: call(conv, s), sample, conv.named_parameters())
    assert_same(found, expected, TOLERANCE, "values")
    assert_same(found_grads, expected_grads, TOLERANCE, "gradients")


@needs_compiler
@pytest.mark.parametrize("name", SOME)
def test_second_derivatives(name, monkeypatch):
    case = CASES[name]
    conv, sample = build(case).float(), build_sample(case).to(torch.float32)

    def second():
        positions = sample.pos.clone().requires_grad_()
        out = call(conv, replace(sample, pos=positions))
        (force,) = torch.autograd.grad(sum(x.square().sum() for x in out.values()), positions, create_graph=True)
        return torch.autograd.grad(force.square().sum(), [positions, *conv.parameters()], materialize_grads=True)

    found = second()
    monkeypatch.setattr(native, "fits", lambda *_: False)
    for number, (value, expected) in enumerate(zip(found, second(), strict=True)):
        assert_same(value, expected, 10 * TOLERANCE, f"second derivative {number}")


@needs_compiler
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("rows", [0, 1, 31, 33, 100])
def test_numbers_of_edges(rows, share):
    """Blocks that are not full, no blocks at all; edges that share a row of the hidden layer."""
    terms = native.terms((((0, 1), (0, 1)),), (((0, 1), 3),), (((0, 1), 2),))
    x, hidden = torch.randn(rows * share, 4, 3), torch.randn(rows, 1, native.HIDDEN)
    weights = [torch.randn(1, 2, 2, 2, 3, 32), torch.randn(2, 1, 2, 1, 3, 32)]

    def by_torch(x, hidden, weights):
        h, (rows_in,) = hidden[:, 0], x
        zero = contraction.contract(contraction.RadialWeightsFirst, rows_in[:, :2].flatten(1)[:, None], h, weights[0])
        one = contraction.contract(contraction.RadialWeightsFirst, rows_in[:, 2:], h, weights[1])
        return [torch.cat([zero.unflatten(2, (2, 2)).squeeze(1), one], dim=1)]

    (found,) = contraction.contract_natively(terms, [x], hidden, weights, [(4, 2)], by_torch)
    assert_same(found, by_torch([x], hidden, weights)[0], TOLERANCE)


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
def test_what_it_is_not_for():
    x = torch.randn(4, 1, 3)
    assert native.fits(x, 32)
    assert native.fits(x.bfloat16(), 32)  # of autocast; the sums are in single precision
    assert not native.fits(x.double(), 32)
    assert not native.fits(x.to("meta"), 32)
    assert not native.fits(x, 16)


@needs_compiler
def test_autocast():
    case = CASES["per output"]
    conv, sample = build(case).float(), build_sample(case).to(torch.float32)
    exact = call(conv, sample)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(conv, sample)
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    for degree, feature in found.items():
        assert_same(feature.float(), exact[degree], 0.05, f"degree {degree}")


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


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    available, warnings, text = load(SE3_TRANSFORMER_CACHE=str(tmp_path / "file"))
    assert (available, warnings) == (False, 1) or native.library() is None
    assert "file" in text


def test_switched_off():
    assert load(SE3_TRANSFORMER_NATIVE="0") == (False, 0, "")
