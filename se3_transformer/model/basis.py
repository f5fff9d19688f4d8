"""Edge frames: the geometry that a convolution needs of each edge, and the couplings in that frame.

The kernel of an equivariant convolution satisfies K(g r) = D_out(g) K(r) D_in(g)^T for every rotation g. With g_e any
rotation that takes the polar axis y to the direction of edge e,

    K(r_e) = D_out(g_e) · K(|r_e| y) · D_in(g_e)^T,

and K(|r| y) couples only the orders +m and -m of the same |m| (Passaro & Zitnick 2023, arXiv 2302.03655):

    y[+m] = a_m x[+m] - b_m x[-m],        y[-m] = b_m x[+m] + a_m x[-m].

So the Wigner blocks D_l(g_e) are all that has to be known of an edge: 84 numbers up to degree 3 in place of the 1,092
of the dense bases Q_J Y_J. The result does not depend on which g_e is taken, hence gradients with respect to
positions are exact although g_e itself is only piecewise smooth.

Conventions are those of e3nn: real spherical harmonics of the unit vector, order m = -l … l, polar axis y, the basis
of degree 1 is (x, y, z), so that the Wigner block of degree 1 is the rotation matrix itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache, wraps
from threading import Lock
from types import SimpleNamespace

import torch
from torch import Tensor

# Types of device on which the basis is compiled; see `compile_basis`.
_compiled_devices = {"cuda"}

MAX_EDGES = 2048  # of which a CPU makes Wigner blocks at a time, so that what is in between stays small

# Entry of a basis that says which edges have no direction: bool (E,); where it is absent, all have one.
ZERO_LENGTH = "zero_length"


def compile_basis(device: str, enabled: bool = True) -> None:
    """Have torch.compile compile the basis on a type of device ('cpu', 'cuda'), just in time, or not.

    By default that is done on 'cuda' alone, where it saves launches. On a CPU it gains little, and compiling takes up
    to a minute. Where compiling fails (no C++ compiler, no Triton), the basis is computed without it, after one
    warning; the numbers are the same up to rounding. Where gradients flow to positions the frames are never compiled,
    since compiled functions have no second derivatives, which a loss on forces needs.
    """
    (_compiled_devices.add if enabled else _compiled_devices.discard)(device)


def _just_in_time(function: Callable) -> Callable:
    """`function`, compiled on the devices that `compile_basis` chose; its first argument tells the device."""
    compiled = None

    @wraps(function)
    def wrapper(first: Tensor, *args):
        nonlocal compiled
        device, differentiated = first.device.type, torch.is_grad_enabled() and first.requires_grad
        if device not in _compiled_devices or differentiated or torch.compiler.is_compiling():
            return function(first, *args)
        if compiled is None:
            compiled = torch.compile(function, dynamic=True)
        try:
            return compiled(first, *args)
        except Exception as error:  # of any compiler; an error of the function itself comes again from the next line
            result = function(first, *args)
            compile_basis(device, enabled=False)
            warnings.warn(f"the basis is not compiled, torch.compile failed: {error}", stacklevel=2)
            return result

    return wrapper


def precise_dtype(tensor: Tensor) -> torch.dtype:
    """In which geometry is computed from this tensor: double precision on a CPU; elsewhere that would be slow."""
    return torch.promote_types(tensor.dtype, torch.float64 if tensor.device.type == "cpu" else torch.float32)


@_just_in_time
def edge_frames(relative_pos: Tensor) -> Tensor:
    """Rotation g_e of every edge that takes the polar axis y to the direction of the edge.

    For a direction n with n_y >= 0 the smallest rotation that takes y to n; otherwise the smallest rotation that takes
    y to -n, after the half turn about x. There are no poles: every entry is finite with finite derivatives.

    Args:
        relative_pos: (E, 3) pos[dst] - pos[src], any unit of length.

    Returns:
        (E, 3, 3) rotations; zero matrices for edges of length zero, which have no direction.
    """
    precise = relative_pos.to(precise_dtype(relative_pos))
    scale = precise.detach().abs().amax(dim=-1, keepdim=True)  # (E, 1) keeps squares from under- and overflow
    zero = scale == 0
    scaled = precise / torch.where(zero, 1.0, scale)
    square = (scaled * scaled).sum(dim=-1, keepdim=True)
    x, y, z = (scaled / torch.where(zero, 1.0, square).sqrt()).unbind(dim=-1)
    sign = torch.where(y.detach() >= 0, 1.0, -1.0).to(y.dtype)
    inverse = 1 / (1 + sign * y)
    off_diagonal = -x * z * inverse
    rows = (
        1 - x * x * inverse, x, sign * off_diagonal,
        -sign * x, y, -z,
        off_diagonal, z, sign * (1 - z * z * inverse),
    )  # fmt: skip
    frames = torch.stack(rows, dim=-1) * ~zero
    return frames.unflatten(-1, (3, 3)).to(relative_pos.dtype)


def constant(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of hashable arguments, evaluated once for each; torch.compile takes what it returns as it is.

    Of a function that is only cached, torch.compile would trace the inside. It finds the values as attributes.
    """
    values = SimpleNamespace()
    names: dict[tuple, str] = {}
    lock = Lock()

    @torch.compiler.assume_constant_result
    def name_of(*args) -> str:
        if args not in names:
            with torch.inference_mode(False):  # made in inference, it could not be used in training
                value = function(*args)
            with lock:  # several threads may have made it at the same time
                if args not in names:
                    name = f"value_{len(names)}"
                    setattr(values, name, value)
                    names[args] = name
        return names[args]

    @wraps(function)
    def lookup(*args) -> Tensor:
        return getattr(values, name_of(*args))

    return lookup


@cache
def clebsch_gordan(degree_1: int, degree_2: int, degree_3: int) -> Tensor:
    """Coupling of three degrees, float64 (2·l1+1, 2·l2+1, 2·l3+1), of norm 1 (e3nn's `o3.wigner_3j`)."""
    from e3nn import o3  # here, because only this constant needs it and it takes seconds to import

    return o3.wigner_3j(degree_1, degree_2, degree_3, dtype=torch.float64, device="cpu")


def _coupling_to(degree: int) -> Tensor:
    """Isometry from degrees (l-1) ⊗ 1 to l, float64 (2l-1, 3, 2l+1)."""
    return clebsch_gordan(degree - 1, 1, degree) * math.sqrt(2 * degree + 1)


@constant
def _wigner_step(degree: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Constant T with vec(D_l) = vec(vec(D_{l-1}) vec(D_1)^T) T: (9·(2l-1)², (2l+1)²)."""
    coupling = _coupling_to(degree)
    step = torch.einsum("ija,klb->ikjlab", coupling, coupling).reshape(-1, coupling.shape[2] ** 2)
    return step.to(device=device, dtype=dtype)


def wigner_blocks(rotations: Tensor, max_degree: int) -> dict[str, Tensor]:
    """Wigner blocks of rotations by the recursion D_l = C (D_{l-1} ⊗ D_1) C^T, without angles; not under autocast.

    Gradients of the blocks of degree 2 and more are along rotations: right for rotations that are made of something
    else, not for matrices that are free to become anything.

    Args:
        rotations: (E, 3, 3), as `edge_frames` gives them.
        max_degree: highest degree L.

    Returns:
        {'0': (E, 1, 1), '1': (E, 3, 3), …, 'L': (E, 2L+1, 2L+1)}; where the rotation is the zero matrix, zero blocks
        of all degrees but 0.
    """
    blocks = {"0": rotations.new_ones(rotations.shape[0], 1, 1)}
    if max_degree >= 1:
        blocks["1"] = rotations
    if max_degree >= 2:
        dtype, device = precise_dtype(rotations), rotations.device
        steps = [_wigner_step(degree, dtype, device) for degree in range(2, max_degree + 1)]
        with torch.autocast(device.type, enabled=False):
            higher = (_wigner_recursion if torch.compiler.is_compiling() else _HigherBlocks.apply)(rotations, *steps)
        blocks.update({str(degree): block for degree, block in enumerate(higher, start=2)})
    return blocks


@_just_in_time
def _wigner_recursion(rotations: Tensor, *steps: Tensor) -> tuple[Tensor, ...]:
    """Wigner blocks of degree 2, 3, … from rotations (E, 3, 3), one for each `_wigner_step`, in the dtype of these."""
    first = rotations.to(steps[0].dtype).flatten(1)  # (E, 9)
    blocks, previous = [], first
    for degree, step in enumerate(steps, start=2):
        previous = (previous[:, :, None] * first[:, None, :]).flatten(1) @ step
        blocks.append(previous.unflatten(-1, (2 * degree + 1, 2 * degree + 1)).to(rotations.dtype))
    return tuple(blocks)


@constant
def _generators(degree: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """J with D_l = 1 + Σ_a ω_a J_a for the turn by a small vector ω, antisymmetric: (3, 2l+1, 2l+1)."""
    axes = torch.eye(3, dtype=torch.float64, device="cpu")  # whatever the default device is
    first = torch.linalg.cross(axes[:, None], axes[None]).mT  # J_a v = e_a × v
    generators = first
    for higher in range(2, degree + 1):  # J of a tensor product is J ⊗ 1 + 1 ⊗ J
        coupling = _coupling_to(higher)
        generators = torch.einsum("ikm,aij,jkn->amn", coupling, generators, coupling) + torch.einsum(
            "ikm,akj,ijn->amn", coupling, first, coupling
        )
    return generators.to(device=device, dtype=dtype)


class _HigherBlocks(torch.autograd.Function):
    """`_wigner_recursion`, differentiated along rotations alone, as often as one likes.

    Blocks of a rotation that is turned on by a small ω are D_l + Σ_a ω_a J_a D_l, with the generators J_a. A loss with
    gradients G_l with respect to the blocks changes by ω · τ, where τ_a = Σ_l ⟨G_l, J_a D_l⟩ is the torque, and the
    gradient with respect to the rotation that says the same is ½ Σ_a τ_a J_a D_1. Differentiating the recursion would
    take more time, and directions that lead away from rotations, which cancel in the end, would leave errors of
    rounding.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rotations: Tensor, *steps: Tensor) -> tuple[Tensor, ...]:
        chunk = MAX_EDGES if rotations.device.type == "cpu" else max(len(rotations), 1)
        parts = [_wigner_recursion(part, *steps) for part in rotations.split(chunk)]
        return tuple(torch.cat(of_degree) for of_degree in zip(*parts, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx, *grad: Tensor):
        rotations, *blocks = ctx.saved_tensors
        like = precise_dtype(rotations), rotations.device
        first = rotations.to(like[0])
        torque = first.new_zeros(len(first), 3)
        with torch.autocast(rotations.device.type, enabled=False):
            for degree, (of_block, block) in enumerate(zip(grad, blocks, strict=True), start=2):
                turning = of_block.to(like[0]) @ block.to(like[0]).mT
                torque = torque + turning.flatten(1) @ _generators(degree, *like).flatten(1).T  # (E, 3)
            turn = (torque @ _generators(1, *like).flatten(1)).unflatten(-1, (3, 3))
            return (turn @ first / 2).to(rotations.dtype), *[None] * len(blocks)


def get_basis(
    relative_pos: Tensor,
    max_degree: int = 4,
    compute_gradients: bool = True,
    use_pad_trick: bool = False,
    amp: bool = False,
) -> dict[str, Tensor]:
    """What every convolution of a model needs to know of the edges; compute it once per graph, pass it as `basis`.

    Args:
        relative_pos: (E, 3) floating point, pos[dst] - pos[src].
        max_degree: highest degree of any feature of the model.
        compute_gradients: whether gradients flow to `relative_pos`.
        use_pad_trick, amp: accepted for compatibility; they change nothing here.

    Returns:
        Wigner blocks of the edge frames (see `wigner_blocks`), and under `ZERO_LENGTH` which edges have length zero,
        bool (E,). All have a row for each edge: those of several graphs can be joined.

    Raises:
        ValueError: `relative_pos` has the wrong shape or dtype, or holds NaN or infinity.
    """
    check_relative_pos(relative_pos)
    with (
        torch.autocast(relative_pos.device.type, enabled=False),
        torch.set_grad_enabled(compute_gradients and torch.is_grad_enabled()),
    ):
        basis = wigner_blocks(edge_frames(relative_pos), max_degree)
    return basis | {ZERO_LENGTH: (relative_pos == 0).all(dim=-1)}


def update_basis_with_fused(
    basis: dict[str, Tensor], max_degree: int, use_pad_trick: bool, fully_fused: bool
) -> dict[str, Tensor]:
    """The basis as it came: callers of the known package call this after `get_basis`, here nothing has to be added."""
    return basis


def check_relative_pos(relative_pos: Tensor, values: bool = True) -> None:
    """Raise ValueError unless relative_pos is a floating point tensor (E, 3), and finite if `values` are to be read."""
    if relative_pos.ndim != 2 or relative_pos.shape[1] != 3 or not relative_pos.is_floating_point():
        raise ValueError(
            "rel_pos: expected a floating point tensor (E, 3) of pos[dst] - pos[src], "
            f"got {relative_pos.dtype} {tuple(relative_pos.shape)}"
        )
    if values and not torch.compiler.is_compiling() and not (finite := relative_pos.isfinite().all(dim=-1)).all():
        bad = (~finite).nonzero().flatten()
        raise ValueError(
            f"rel_pos: {len(bad)} of {len(relative_pos)} edges hold NaN or infinity, the first is edge {bad[0].item()} "
            f"with {relative_pos[bad[0]].tolist()}; check the node positions"
        )


@cache
def frame_kernels(degree_in: int, degree_out: int) -> tuple[Tensor, Tensor]:
    """The basis kernels Q_J Y_J of a pair of degrees in the edge frame.

    Returns:
        a, b: float64 (min(l_in, l_out)+1, F) with the free numbers a_m, b_m of K(y), see the top of this file, for
        m = 0 … min and each of the F values J = |l_in-l_out| … l_in+l_out. b_0 is not used.
    """
    low = min(degree_in, degree_out)
    a, b = [], []
    for J in range(abs(degree_in - degree_out), degree_in + degree_out + 1):
        polar = math.sqrt((2 * J + 1) / (4 * math.pi))  # Y_J of the polar axis: only the order 0 is not zero
        kernel = clebsch_gordan(J, degree_in, degree_out)[J].T * polar  # (M_out, M_in)
        orders = range(low + 1)
        a.append(torch.stack([kernel[degree_out + m, degree_in + m] for m in orders]))
        b.append(torch.stack([kernel[degree_out - m, degree_in + m] for m in orders]))
    return torch.stack(a, dim=1), torch.stack(b, dim=1)


@constant
def isotropic_kernel(degree: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The number that the kernel J = 0 from a degree to itself is, in every direction, as a tensor without axes."""
    a, _ = frame_kernels(degree, degree)
    return a[0, 0].to(dtype=dtype, device=device)


@constant
def order_rows(degrees: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each row of `frame_matrix` lies among the rows (degree, m) ordered by degree, int64 (rows,)."""
    starts, start = {}, 0
    for degree in degrees:
        starts[degree] = start
        start += 2 * degree + 1
    rows = [
        starts[degree] + degree + sign * order
        for order in range(max(degrees) + 1)
        for sign in ((1,) if order == 0 else (1, -1))
        for degree in degrees
        if degree >= order
    ]
    return torch.tensor(rows, device=device)


def split_orders(features: Tensor, degrees: tuple[int, ...]) -> list[Tensor]:
    """Rows in the edge frame, (E, rows, C) in the order of `frame_matrix`, by m: [(E, S, degrees >= m, C)].

    S is 1 for m = 0, else 2: +m and -m.
    """
    sizes = [(1 if order == 0 else 2, sum(degree >= order for degree in degrees)) for order in range(max(degrees) + 1)]
    parts = features.split([signs * count for signs, count in sizes], dim=1)
    return [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]


class ForwardBasis(dict):
    """A basis for one forward pass, in which the layers share what `frame_matrix` makes of it.

    Kept longer, a matrix made without gradients could meet a pass that wants them.

    Args:
        basis: as `get_basis` gives it.
        in_pairs: edges 2k and 2k + 1 have the same edge scalars, see `se3_transformer.model.pairs`.
    """

    def __init__(self, basis: dict[str, Tensor], in_pairs: bool = False):
        super().__init__(basis)
        self.in_pairs, self.zero_length = in_pairs, zero_length_edges(basis)


def zero_length_edges(basis: dict[str, Tensor]) -> Tensor | None:
    """The edges without direction, int64 (E0,), or None if there are none.

    While torch.compile looks on, for which no shape must depend on values: a mask of all edges, bool (E,).
    """
    if isinstance(basis, ForwardBasis):
        return basis.zero_length
    mask = basis.get(ZERO_LENGTH)
    if mask is None or torch.compiler.is_compiling():
        return mask
    edges = mask.nonzero().flatten()
    return edges if len(edges) else None


def frame_matrix(basis: dict[str, Tensor], degrees: tuple[int, ...]) -> Tensor:
    """Rotation into the edge frame of features of several degrees at once; a `ForwardBasis` keeps it.

    Returns:
        (E, rows, columns): columns are (degree, m) ordered by degree, rows the same ordered by (|m|, sign, degree), so
        that each |m| is a block of rows; see `split_orders`.
    """
    key = f"frames {degrees}"
    if key in basis:
        return basis[key]
    total, start, columns = sum(2 * degree + 1 for degree in degrees), 0, []
    for degree in degrees:
        size = 2 * degree + 1
        block = basis[str(degree)].transpose(1, 2)
        columns.append(torch.nn.functional.pad(block, (start, total - start - size)))
        start += size
    matrix = torch.cat(columns, dim=1).index_select(1, order_rows(degrees, columns[0].device))
    if isinstance(basis, ForwardBasis):
        basis[key] = matrix
    return matrix
