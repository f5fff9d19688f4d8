"""Edge frames, Wigner blocks and the couplings in the edge frame, against e3nn."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from e3nn import o3
from helpers import TOLERANCE, assert_finite, assert_same, random_rotation, random_rotations, wigner_d
from reference import coupling, harmonics, paths
from torch.autograd import gradcheck, gradgradcheck

from se3_transformer.model import basis
from se3_transformer.model.basis import edge_frames, get_basis, wigner_blocks

MAX_DEGREE = 6
AXES = torch.cat([torch.eye(3, dtype=torch.float64), -torch.eye(3, dtype=torch.float64)])


def directions():
    """Unit vectors (E, 3): random ones, the axes, and ones close to the axes, the poles and the seam y = 0."""
    generator = torch.Generator().manual_seed(0)
    random = torch.nn.functional.normalize(torch.randn(40, 3, dtype=torch.float64, generator=generator), dim=1)
    close = [a + epsilon * random[i] for i, a in enumerate(AXES) for epsilon in (1e-3, 1e-8, 1e-15)]
    seam = random[:12] * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    tilt = torch.tensor([0.0, 1e-12, 0.0], dtype=torch.float64)
    all_of_them = torch.cat([random, AXES, torch.stack(close), seam, seam + tilt, seam - tilt])
    return torch.nn.functional.normalize(all_of_them, dim=1)


def kernels(rel_pos, max_degree):
    """Σ over orders of the frame form: {(l_in, l_out, J): Q_J Y_J (E, M_out, M_in)} rebuilt from Wigner blocks."""
    blocks = {int(l): b for l, b in wigner_blocks(edge_frames(rel_pos), max_degree).items()}
    pole = rel_pos.new_tensor([[0.0, 1.0, 0.0]])
    return {
        (i, o, J): blocks[o] @ (coupling(i, o, J).to(rel_pos) @ harmonics(J, pole)[0]) @ blocks[i].mT
        for i in range(max_degree + 1)
        for o in range(max_degree + 1)
        for J in paths(i, o)
    }


@pytest.mark.parametrize("length", [1.0, 1e-12, 1e-150, 1e12, 1e150])
def test_frames_take_y_to_the_edge(length):
    n = directions()
    frames = edge_frames(n * length)
    assert_same(frames @ torch.tensor([0.0, 1.0, 0.0], dtype=n.dtype), n, 1e-14)
    assert_same(frames @ frames.mT, torch.eye(3, dtype=n.dtype).expand(len(n), 3, 3), 1e-14)
    assert_same(torch.linalg.det(frames), torch.ones(len(n), dtype=n.dtype), 1e-14)


@pytest.mark.parametrize("length", [1.0, 1e-12, 1e-30, 1e12, 1e30])
def test_frames_float32(length):
    frames = edge_frames((directions() * length).float())
    assert frames.dtype == torch.float32
    assert_same(frames[:, :, 1], directions(), 1e-6)
    assert_same(frames @ frames.mT, torch.eye(3).expand(len(frames), 3, 3), 1e-6)


def test_blocks_equal_e3nn():
    frames = torch.cat([edge_frames(directions()), random_rotations(10)])
    blocks = wigner_blocks(frames, MAX_DEGREE)
    assert sorted(blocks) == [str(l) for l in range(MAX_DEGREE + 1)]
    assert_same(blocks["1"], frames, 1e-15)
    for degree in range(MAX_DEGREE + 1):
        worst = (blocks[str(degree)] - wigner_d(degree, frames)).abs().max().item()
        assert worst < 1e-12, f"degree {degree}: {worst}"


def test_blocks_are_orthogonal():
    for degree, block in wigner_blocks(edge_frames(directions()), MAX_DEGREE).items():
        eye = torch.eye(2 * int(degree) + 1, dtype=torch.float64)
        assert (block @ block.mT - eye).abs().max() < 1e-13
        assert_same(torch.linalg.det(block), torch.ones(len(block), dtype=torch.float64), 1e-12)


def test_blocks_are_a_homomorphism():
    one, two = random_rotations(20, seed=1), random_rotations(20, seed=2)
    product, left, right = (wigner_blocks(r, MAX_DEGREE) for r in (one @ two, one, two))
    assert_same(product, {l: left[l] @ right[l] for l in left}, 1e-13)
    transposed = wigner_blocks(one.mT, MAX_DEGREE)
    assert_same(transposed, {l: b.mT for l, b in left.items()}, 1e-13)


def test_blocks_turn_harmonics_from_the_pole_to_the_edge():
    n = directions()
    for degree, block in wigner_blocks(edge_frames(n), MAX_DEGREE).items():
        pole = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
        y = o3.spherical_harmonics(int(degree), n, normalize=True)
        assert_same((block @ harmonics(int(degree), pole)[0]), y, 1e-13)


def test_blocks_float32():
    blocks = wigner_blocks(edge_frames(directions().float()), MAX_DEGREE)
    for degree, block in blocks.items():
        assert block.dtype == torch.float32
        assert (block @ block.mT - torch.eye(2 * int(degree) + 1)).abs().max() < 2e-5


def test_max_degree_limits_blocks():
    frames = edge_frames(directions())
    assert sorted(wigner_blocks(frames, 0)) == ["0"]
    assert sorted(wigner_blocks(frames, 1)) == ["0", "1"]
    assert sorted(wigner_blocks(frames, 3)) == ["0", "1", "2", "3"]


def test_kernels_equal_dense_bases():
    n = directions()
    for (i, o, J), kernel in kernels(n, 4).items():
        assert_same(kernel, torch.einsum("klm,em->ekl", coupling(i, o, J), harmonics(J, n)), 1e-12, f"{i},{o},{J}")


def test_frame_kernels_couple_only_equal_orders():
    """The statement that the fast convolution rests on: K(y) mixes +m and -m alone, as a complex number would."""
    pole = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    for i in range(5):
        for o in range(5):
            for J in paths(i, o):
                kernel = coupling(i, o, J) @ harmonics(J, pole)[0]  # (M_out, M_in)
                rest = kernel.clone()
                for m in range(min(i, o) + 1):
                    plus_plus, minus_minus = kernel[o + m, i + m], kernel[o - m, i - m]
                    plus_minus, minus_plus = kernel[o + m, i - m], kernel[o - m, i + m]
                    assert math.isclose(plus_plus, minus_minus, abs_tol=1e-14)
                    assert m == 0 or math.isclose(plus_minus, -minus_plus, abs_tol=1e-14)
                    rest[[o + m, o + m, o - m, o - m], [i + m, i - m, i + m, i - m]] = 0
                assert rest.abs().max() < 1e-14


@pytest.mark.parametrize("step", [1e-6, 1e-9])
def test_kernels_are_continuous(step):
    """Frames jump where y changes sign; kernels must not, there or anywhere."""
    n = directions()
    generator = torch.Generator().manual_seed(3)
    moved = n + step * torch.randn(n.shape, dtype=n.dtype, generator=generator)
    before, after = kernels(n, 3), kernels(moved, 3)
    for path, kernel in before.items():
        assert (kernel - after[path]).abs().max() < 50 * step, path


def test_kernels_are_equivariant():
    n, rotation = directions(), random_rotation()
    before, after = kernels(n, 3), kernels(n @ rotation.T, 3)
    d = {l: wigner_d(l, rotation) for l in range(4)}
    assert_same(
        {str(path): after[path] for path in before},
        {str((i, o, J)): d[o] @ k @ d[i].T for (i, o, J), k in before.items()},
        1e-12,
    )


@pytest.mark.parametrize(
    "rel_pos",
    [*AXES, torch.tensor([0.3, 0.7, -0.4]), torch.tensor([-0.3, -0.7, 0.4])],
    ids=["+x", "+y", "+z", "-x", "-y", "-z", "upper half", "lower half"],
)
def test_kernel_gradients(rel_pos):
    """With respect to positions, once and twice, at the poles too. Kernels, since frames themselves jump at y = 0."""

    def function(r):
        return torch.cat([kernel.flatten() for kernel in kernels(r, 3).values()])

    rel_pos = rel_pos[None].double().requires_grad_()
    gradcheck(function, rel_pos, atol=1e-7, fast_mode=True)
    gradgradcheck(function, rel_pos, atol=1e-6, fast_mode=True)


def test_blocks_are_differentiated_as_their_recursion():
    """Along rotations: with respect to the positions that frames are made of. Once and twice."""
    rel_pos = directions().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(rel_pos.shape, dtype=rel_pos.dtype, generator=generator)
    degrees = range(2, MAX_DEGREE + 1)
    weights = [torch.randn(2 * l + 1, 2 * l + 1, dtype=torch.float64, generator=generator) for l in degrees]

    def derivatives(higher_blocks):
        blocks = higher_blocks(edge_frames(rel_pos))
        loss = sum(
            (block * weight).sum(dim=(1, 2)).square().sum() for block, weight in zip(blocks, weights, strict=True)
        )
        (first,) = torch.autograd.grad(loss, rel_pos, create_graph=True)
        (second,) = torch.autograd.grad((first * along).sum(), rel_pos)
        return {"first": first, "second": second}

    def recursion(frames):
        return basis._wigner_recursion(frames, *(basis._wigner_step(l, frames.dtype, frames.device) for l in degrees))

    def ours(frames):
        return [wigner_blocks(frames, MAX_DEGREE)[str(l)] for l in degrees]

    found, expected = derivatives(ours), derivatives(recursion)
    assert_same(found, expected, 1e-12)


def test_zero_length_edges(dtype):
    rel_pos = torch.zeros(3, 3, dtype=dtype)
    rel_pos[1] = torch.tensor([1.0, 2.0, 3.0])
    rel_pos.requires_grad_()
    frames = edge_frames(rel_pos)
    assert (frames[[0, 2]] == 0).all()
    blocks = wigner_blocks(frames, MAX_DEGREE)
    assert_finite(blocks)
    assert all((block[[0, 2]] == (1 if degree == "0" else 0)).all() for degree, block in blocks.items())
    (gradient,) = torch.autograd.grad(sum((b**2).sum() + b.sum() for b in blocks.values()), rel_pos)
    assert_finite(gradient)
    assert (gradient[[0, 2]] == 0).all()
    assert gradient[1].abs().sum() > 0


def test_no_edges(dtype):
    rel_pos = torch.zeros(0, 3, dtype=dtype, requires_grad=True)
    blocks = wigner_blocks(edge_frames(rel_pos), 3)
    assert {l: tuple(b.shape) for l, b in blocks.items()} == {
        "0": (0, 1, 1),
        "1": (0, 3, 3),
        "2": (0, 5, 5),
        "3": (0, 7, 7),
    }
    get_basis(rel_pos, max_degree=3)


def test_get_basis_holds_the_blocks(dtype):
    rel_pos = directions().to(dtype)
    basis = get_basis(rel_pos, max_degree=3)
    blocks = wigner_blocks(edge_frames(rel_pos), 3)
    assert_same({l: basis[l] for l in "123"}, {l: blocks[l] for l in "123"}, TOLERANCE[dtype] * 1e-2)
    assert all(basis[l].dtype == dtype for l in "123")


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_cpu_geometry_is_computed_in_double_precision(dtype, requires_grad):
    rel_pos = directions().to(dtype).requires_grad_(requires_grad)
    frames = edge_frames(rel_pos)
    assert_same(frames, edge_frames(rel_pos.double()).to(dtype), 0)
    blocks = wigner_blocks(frames.double(), MAX_DEGREE)
    assert_same(wigner_blocks(frames, MAX_DEGREE), {degree: block.to(dtype) for degree, block in blocks.items()}, 0)


def test_get_basis_gradients_are_optional():
    rel_pos = directions().requires_grad_()
    assert get_basis(rel_pos, max_degree=2, compute_gradients=True)["2"].requires_grad
    assert not get_basis(rel_pos, max_degree=2, compute_gradients=False)["2"].requires_grad


def test_autocast_does_not_change_the_numbers(monkeypatch):
    monkeypatch.setattr(basis, "precise_dtype", lambda tensor: tensor.dtype)  # as elsewhere than on a CPU
    frames = edge_frames(torch.randn(7, 3)).requires_grad_()

    def blocks_and_gradient():
        blocks = wigner_blocks(frames, 3)
        return blocks, torch.autograd.grad(sum(block.sum() for block in blocks.values()), frames)[0]

    blocks, gradient = blocks_and_gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blocks_under_autocast, gradient_under_autocast = blocks_and_gradient()
    assert_same(blocks_under_autocast, blocks, 0)
    assert_same(gradient_under_autocast, gradient, 0)


def test_constants_are_made_once_for_all_threads():
    """Also where several want them for the first time at once."""

    @basis.constant
    def number(n):
        time.sleep(0.01 * (n == 0))
        return torch.tensor(float(n))

    with ThreadPoolExecutor(4) as pool:
        for numbers in pool.map(lambda _: [number(n).item() for n in range(3)], range(4)):
            assert numbers == [0, 1, 2]
    assert [number(n).item() for n in range(3)] == [0, 1, 2]


def test_constants_do_not_depend_on_the_default_device():
    with torch.device("meta"):
        assert basis.clebsch_gordan.__wrapped__(1, 1, 2).device.type == "cpu"
        assert basis._generators.__wrapped__(2, torch.float64, torch.device("cpu")).device.type == "cpu"


def test_blocks_of_many_edges(monkeypatch):
    """In parts, each as if it were alone, with their gradients."""
    rel_pos = torch.randn(10, 3, requires_grad=True)

    def blocks_and_gradient():
        blocks = get_basis(rel_pos, 3)
        return blocks, torch.autograd.grad(sum(block.sum() for block in blocks.values()), rel_pos)[0]

    (expected, expected_gradient) = blocks_and_gradient()
    monkeypatch.setattr(basis, "MAX_EDGES", 4)
    blocks, gradient = blocks_and_gradient()
    assert_same(blocks, expected, 1e-7)
    assert_same(gradient, expected_gradient, 1e-6)


def test_default_dtype_does_not_change_the_numbers():
    from helpers import default_float64

    rel_pos = directions()
    plain = get_basis(rel_pos, max_degree=5)
    with default_float64():
        assert_same(get_basis(rel_pos, max_degree=5), plain, 1e-15)


@pytest.mark.parametrize("fails", [False, True])
def test_just_in_time(fails, monkeypatch):
    """What torch.compile makes is used where that was chosen; if it fails there is one warning, and the same result.

    It is not where gradients flow, which may have to be differentiated once more.
    """
    calls = []

    def compile(function, dynamic):
        def compiled(x):
            calls.append(dynamic)
            if fails:
                raise RuntimeError("no C++ compiler")
            return function(x)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(basis, "_compiled_devices", set())
    double, x = basis._just_in_time(lambda x: 2 * x), torch.ones(3)
    assert_same(double(x), 2 * x, 0)
    assert not calls
    basis.compile_basis("cpu")
    assert double(x.clone().requires_grad_()).requires_grad
    assert not calls
    with pytest.warns(UserWarning, match=r"not compiled.*no C\+\+ compiler") if fails else nullcontext():
        assert_same(double(x), 2 * x, 0)
    assert_same(double(x), 2 * x, 0)
    assert calls == ([True] if fails else [True, True])
