"""The messages of a convolution by compiled code: gather, rotate, contract, rotate back, see the files in `c/`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from se3_transformer.model.fiber import degree_to_dim
from se3_transformer.model.layers import native
from se3_transformer.model.layers.native import BLOCK, HIDDEN, array, numbers

Groups = tuple[tuple[tuple[int, ...], int], ...]  # degrees that stand together in the edge frame, and their channels


class Term(ctypes.Structure):
    """One |m| of one radial network, as in contraction.c."""

    _fields_ = numbers("P K Q matrix hidden x x_offset x_sign out out_offset out_sign")


class Sizes(ctypes.Structure):
    _fields_ = numbers("rows group hidden_row terms threads parts")


class Features(ctypes.Structure):
    """Features of a degree outside and in the edge frame, as in rotation.c."""

    _fields_ = numbers("M C block data start step x rows")


class Rotation(ctypes.Structure):
    _fields_ = numbers("edges group features threads numbers M")


class Row(ctypes.Structure):
    """A row of a mixture of radial weights, as in weights.c."""

    _fields_ = numbers("start length coefficient row step")


class Network(ctypes.Structure):
    _fields_ = numbers("C_out C_in F first end")


class Mixing(ctypes.Structure):
    _fields_ = numbers("networks threads")


class RadialNetwork(NamedTuple):
    """What has to be known of a `VersatileConvSE3`."""

    degrees_in: tuple[int, ...]
    degrees_out: tuple[int, ...]
    channels_in: int
    channels_out: int
    mixture: Tensor  # (F, F) float64 on the CPU, see `frame_mixture`


class Source(NamedTuple):
    """Features that edges carry: of some channels of a degree, from `channel` on among those of the degree."""

    degree: int
    channels: int
    channel: int
    of_node: bool  # of the source node, or of the edge itself


class Side(NamedTuple):
    """What goes into a convolution, or what comes out."""

    features: ctypes.Array
    M: int  # of the highest degree
    numbers: ctypes.Array  # of an item of each of the data
    largest: int  # of these
    rows: ctypes.Array  # of each group of degrees in the edge frame: an order of a channel each


class Plan:
    """Sizes and places of everything in a convolution, for the C code.

    Args:
        networks: the radial networks.
        groups_in, groups_out: see `Groups`.
        sources: what the channels that go in are made of.
        fused: all degrees that come out in one tensor (E, C, sum of 2l+1); there is one group then.
    """

    def __init__(
        self,
        networks: tuple[RadialNetwork, ...],
        groups_in: Groups,
        groups_out: Groups,
        sources: tuple[Source, ...],
        fused: bool,
    ):
        self.sources = sources
        degrees_out = [(degree, channels) for degrees, channels in groups_out for degree in degrees]
        self.degrees_out = [degree for degree, _ in degrees_out]
        self.degrees = sorted({source.degree for source in sources} | set(self.degrees_out))
        self._terms(networks, groups_in, groups_out)

        places: list[int] = []
        features = []
        for data, source in enumerate(sources):
            features.append(self._features(source.degree, source.channels, groups_in, source.channel, places))
            features[-1].data, features[-1].step = data, degree_to_dim(source.degree)
        shapes_in = [(source.channels, degree_to_dim(source.degree)) for source in sources]
        self.inputs = side(features, shapes_in, groups_in)
        self.shapes_out, features, start = [], [], 0
        for data, (degree, channels) in enumerate(degrees_out):
            features.append(self._features(degree, channels, groups_out, 0, places))
            self.shapes_out.append((channels, degree_to_dim(degree)))
            features[-1].data, features[-1].step = data, degree_to_dim(degree)
            if fused:
                features[-1].data, features[-1].start = 0, start
                start += degree_to_dim(degree)
        if fused:
            self.shapes_out = [(degrees_out[0][1], start)]
            for feature in features:
                feature.step = start
        self.outputs = side(features, self.shapes_out, groups_out)
        self.places = array(ctypes.c_int64, places)

    def _features(self, degree: int, channels: int, groups: Groups, channel: int, places: list[int]) -> Features:
        """Where features of a degree are in the edge frame, with the places of their orders added to `places`."""
        made = Features(M=degree_to_dim(degree), C=channels, block=self.degrees.index(degree), rows=len(places))
        for m in range(-degree, degree + 1):
            made.x, offset, to_minus, _ = place((degree,), abs(m), groups)
            places.append(offset + (to_minus if m < 0 else 0) + channel)
        return made

    def _terms(self, networks: tuple[RadialNetwork, ...], groups_in: Groups, groups_out: Groups) -> None:
        """The terms, and the rows of their matrices."""
        terms: list[Term] = []
        rows: list[Row] = []
        coefficients: list[float] = []
        sizes: list[Network] = []
        # Of every matrix, in their order, which is not that of the terms: degrees and channels in, P, the same out, H.
        self.shapes: list[tuple[int, ...]] = []
        self.matrix_size = 0  # of all matrices
        for number, network in enumerate(networks):
            first, mixture = len(rows), iter(network.mixture.tolist())
            for order in range(min(max(network.degrees_in), max(network.degrees_out)) + 1):
                x, x_offset, x_sign, K = place(network.degrees_in, order, groups_in)
                out, out_offset, out_sign, Q = place(network.degrees_out, order, groups_out)
                P, matrix = 1 if order == 0 else 2, self.matrix_size
                terms.append(Term(P, K, Q, matrix, number * HIDDEN, x, x_offset, x_sign, out, out_offset, out_sign))
                channels_in, channels_out = network.channels_in, network.channels_out
                self.shapes.append((K // channels_in, channels_in, P, Q // channels_out, channels_out, HIDDEN))
                self.matrix_size += K * P * Q * HIDDEN
                for part in range(P):
                    for q in range(0, Q, network.channels_out):
                        for k in range(0, K, network.channels_in):
                            values = next(mixture)
                            used = [j for j, value in enumerate(values) if value]
                            start, end = used[0], used[-1] + 1
                            row = matrix + ((k * P + part) * Q + q) * HIDDEN
                            rows.append(Row(start, end - start, len(coefficients), row, P * Q * HIDDEN))
                            coefficients += values[start:end]
            sizes.append(Network(network.channels_out, network.channels_in, len(network.mixture), first, len(rows)))
        terms.sort(key=lambda term: (term.x, term.x_offset))  # so that x is read once for those that share it
        self.terms, self.rows, self.networks = array(Term, terms), array(Row, rows), array(Network, sizes)
        self.coefficients = array(ctypes.c_float, coefficients)
        self.largest_matrix = max(term.P * term.K * term.Q for term in terms) * HIDDEN

    def weights(self, matrices: Tensor) -> list[Tensor]:
        """Views of `Matrices` as `frame_weights`, (P, outs, C_out, ins, C_in, H) of every term."""
        parts = matrices.split([math.prod(shape) for shape in self.shapes])
        return [part.view(shape).permute(2, 3, 4, 0, 1, 5) for part, shape in zip(parts, self.shapes, strict=True)]


def side(features: list[Features], shapes: list[tuple[int, int]], groups: Groups) -> Side:
    """Of data whose items have these shapes."""
    numbers = [channels * dim for channels, dim in shapes]
    rows = (sum(map(degree_to_dim, degrees)) * channels for degrees, channels in groups)
    sizes = max(feature.M for feature in features), array(ctypes.c_int64, numbers), max(numbers)
    return Side(array(Features, features), *sizes, array(ctypes.c_int64, rows))


def place(degrees: tuple[int, ...], order: int, groups: Groups) -> tuple[int, int, int, int]:
    """Where the order +m of some degrees, all of a group or one, is found in the edge frame, as `split_orders` has it.

    Returns:
        group, first row, distance to -m, count; a row is an order of a channel.
    """
    index = next(index for index, (group, _) in enumerate(groups) if degrees[0] in group)
    group, channels = groups[index]
    counts = [sum(degree >= m for degree in group) for m in range(order + 1)]
    row = counts[0] + 2 * sum(counts[1:order]) if order else 0
    if degrees == group:
        return index, row * channels, counts[order] * channels, counts[order] * channels
    row += sum(order <= degree < degrees[0] for degree in group)
    return index, row * channels, counts[order] * channels, channels


class Matrices(torch.autograd.Function):
    """The matrices of `contraction.c` (P · K · Q · H of all terms,) from the last layer of every radial network."""

    @staticmethod
    def forward(ctx, plan: Plan, *weights: Tensor) -> Tensor:
        ctx.plan, ctx.shapes = plan, [weight.shape for weight in weights]
        matrices = weights[0].new_empty(plan.matrix_size)
        own = [weight.contiguous() for weight in weights]
        native.call("weights_forward", mixing(plan), plan.networks, plan.rows, plan.coefficients, own, matrices)
        return matrices

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, *MatricesBackward.apply(ctx.plan, ctx.shapes, grad)


class MatricesBackward(torch.autograd.Function):
    """The transposed of `Matrices`, which is linear: each is the derivative of the other."""

    @staticmethod
    def forward(ctx, plan: Plan, shapes: list[torch.Size], grad: Tensor) -> tuple[Tensor, ...]:
        ctx.plan = plan
        weights, grad = [grad.new_empty(shape) for shape in shapes], grad.contiguous()
        native.call("weights_backward", mixing(plan), plan.networks, plan.rows, plan.coefficients, grad, weights)
        return tuple(weights)

    @staticmethod
    def backward(ctx, *grad: Tensor):
        return None, None, Matrices.apply(ctx.plan, *grad)


def mixing(plan: Plan) -> Mixing:
    return Mixing(len(plan.networks), torch.get_num_threads())


class Messages(torch.autograd.Function):
    """What comes out of a convolution, (E, C, 2l+1) of every degree, or all in one if the plan says so.

    Args:
        same: the same function of hidden, matrices and tensors in PyTorch, that can be differentiated more than once.
        parts: see `native.parts_of_products`.
        src: (E,)
        hidden: (E / share, R, H) last hidden layers of the radial networks; edges one after the other share them. They
            come out of a ReLU: where they are zero, their gradient may be left at zero.
        matrices: see `Matrices`.
        tensors: the sources, (N, C, 2l+1) or (E, C, 2l+1), then the Wigner blocks of the plan's degrees.
    """

    @staticmethod
    def forward(
        ctx, plan: Plan, parts: int, same: Callable, src: Tensor, hidden: Tensor, matrices: Tensor, *tensors: Tensor
    ):
        ctx.plan, ctx.parts, ctx.same = plan, parts, same
        call = _Call(plan, parts, src, hidden, matrices, tensors)
        z = call.contract(call.rotate_in())
        wants_blocks = any(ctx.needs_input_grad[-len(call.blocks) :])
        ctx.save_for_backward(src, hidden, matrices, *tensors, *(z if wants_blocks else ()))
        return tuple(call.rotate_out(z))

    @staticmethod
    def backward(ctx, *grad: Tensor):
        src, hidden, matrices, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        tensors, z = tensors[: len(wanted) - 2], tensors[len(wanted) - 2 :]
        if torch.is_grad_enabled():  # for second derivatives
            inputs = (hidden, matrices, *tensors)
            return None, None, None, None, *native.differentiable_gradients(ctx.same, inputs, wanted, grad)
        call = _Call(ctx.plan, ctx.parts, src, hidden, matrices, tensors)
        return None, None, None, None, *call.gradients([native.plain(of_degree) for of_degree in grad], z, wanted)


class _Call:
    """One convolution: the tensors that the functions of the library get.

    Raises:
        ValueError: a tensor that does not have the shape that the plan says.
        IndexError: an entry of src that is not a node.
    """

    def __init__(
        self, plan: Plan, parts: int, src: Tensor, hidden: Tensor, matrices: Tensor, tensors: tuple[Tensor, ...]
    ):
        self.parts = parts
        self.plan, self.src, self.hidden, self.matrices, self.num_edges = plan, src, hidden, matrices, src.shape[0]
        self.data, self.blocks = list(tensors[: len(plan.sources)]), list(tensors[len(plan.sources) :])
        of_node = [source.of_node for source in plan.sources]
        self.num_nodes = next((data.shape[0] for data, is_it in zip(self.data, of_node, strict=True) if is_it), 0)
        self.items = [self.num_nodes if is_it else self.num_edges for is_it in of_node]
        self.index = [src if is_it else None for is_it in of_node]
        expected = [(n, s.channels, degree_to_dim(s.degree)) for n, s in zip(self.items, plan.sources, strict=True)]
        expected += [(self.num_edges, degree_to_dim(degree), degree_to_dim(degree)) for degree in plan.degrees]
        for tensor, shape in zip(tensors, expected, strict=True):
            if tensor.shape != shape:
                raise ValueError(f"convolution: expected a feature or Wigner block {shape}, got {tuple(tensor.shape)}")

    def rotate_in(self) -> list[Tensor]:
        """Every group of degrees in, in the edge frame."""
        return self._into_frames(self.plan.inputs, self.data, self.items, self.index)

    def contract(self, x: list[Tensor]) -> list[Tensor]:
        """Every group of degrees out, in the edge frame."""
        plan, z = self.plan, self._frames(self.plan.outputs, self.hidden.new_zeros)
        spare = self.matrices.new_empty(self.parts, plan.largest_matrix, dtype=torch.bfloat16)
        native.call(
            "contraction_forward",
            *(self._sizes(), plan.terms, x, plan.inputs.rows, self.hidden, self.matrices, z, plan.outputs.rows, spare),
        )
        return z

    def rotate_out(self, z: list[Tensor]) -> list[Tensor]:
        """(E, C, 2l+1) of the degrees out."""
        out = [self.hidden.new_empty(self.num_edges, *shape) for shape in self.plan.shapes_out]
        self._rotate("rotate_out", self.plan.outputs, self.blocks, out, z)
        return out

    def gradients(self, grad: list[Tensor], z: list[Tensor], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, matrices, and those tensors that are wanted, from those of the output.

        z is needed if gradients of Wigner blocks are wanted.
        """
        plan, x, items, no_index = self.plan, self.rotate_in(), [self.num_edges] * len(grad), [None] * len(grad)
        grad_z = self._into_frames(plan.outputs, grad, items, no_index)
        grad_x = self._frames(plan.inputs, self.hidden.new_zeros)
        grad_hidden, grad_matrices = torch.zeros_like(self.hidden), torch.empty_like(self.matrices)
        sizes = self._sizes()
        sizes.threads = min(sizes.threads, max(term.K for term in plan.terms))  # more would have nothing to do
        spare = grad_hidden.new_empty(sizes.threads - 1, *grad_hidden.shape)
        native.call(
            "contraction_backward",
            *(sizes, plan.terms, x, plan.inputs.rows, self.hidden, self.matrices, grad_z, plan.outputs.rows),
            *(grad_x, grad_hidden, grad_matrices, spare),
        )
        none: tuple[None, ...] = (None,)
        grad_data: list[Tensor] | tuple[None, ...] = none * len(self.data)
        grad_blocks: list[Tensor] | tuple[None, ...] = none * len(self.blocks)
        if any(wanted[2 : 2 + len(self.data)]):
            grad_data = [data.new_empty(self.num_edges, *data.shape[1:]) for data in self.data]
            self._rotate("rotate_out", plan.inputs, self.blocks, grad_data, grad_x)
            grad_data = self._of_items(grad_data)
        if any(wanted[2 + len(self.data) :]):
            grad_blocks = [torch.zeros_like(block) for block in self.blocks]
            self._rotate("rotate_blocks", plan.inputs, grad_blocks, self.data, grad_x, self.items, self.index)
            self._rotate("rotate_blocks", plan.outputs, grad_blocks, grad, z, items, no_index)
        return grad_hidden, grad_matrices, *grad_data, *grad_blocks

    def _frames(self, side: Side, new: Callable[..., Tensor]) -> list[Tensor]:
        """(blocks · group, rows, BLOCK) of groups of degrees in the edge frame, see contraction.c."""
        blocks = -(-self.hidden.shape[0] // BLOCK) * self._group()
        return [new(blocks, rows, BLOCK) for rows in side.rows]

    def _into_frames(
        self, side: Side, data: list[Tensor], items: list[int], index: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Every group of degrees in the edge frame."""
        x = self._frames(side, self.hidden.new_empty)
        self._rotate("rotate_in", side, self.blocks, data, x, items, index)
        return x

    def _of_items(self, of_edges: list[Tensor]) -> list[Tensor]:
        """The sum over the edges of each node, of what belongs to nodes."""
        if all(index is None for index in self.index):
            return of_edges
        starts, order = native.grouped(self.src, self.num_nodes)

        def summed(data: Tensor) -> Tensor:
            out = data.new_empty(self.num_nodes, *data.shape[1:])
            sizes = array(ctypes.c_int64, (self.num_nodes, data.shape[1:].numel(), torch.get_num_threads()))
            native.call("sum_edges", sizes, starts, order, data, out)
            return out

        pairs = zip(of_edges, self.index, strict=True)
        return [data if index is None else summed(data) for data, index in pairs]

    def _rotate(
        self,
        name: str,
        side: Side,
        blocks: list[Tensor],
        data: list[Tensor],
        x: list[Tensor],
        items: list[int] | None = None,
        index: Sequence[Tensor | None] = (),
    ) -> None:
        """A function of rotation.c; items and index, if it wants them: how many the data have, which of each edge."""
        addresses = () if items is None else (array(ctypes.c_int64, items), list(index))
        sizes = (self.num_edges, self._group(), len(side.features), torch.get_num_threads(), side.largest, side.M)
        native.call(
            name,
            *(Rotation(*sizes), side.features, self.plan.places, blocks, data, side.numbers, *addresses, x, side.rows),
        )

    def _group(self) -> int:
        """Edges that share a row of `hidden`."""
        return self.num_edges // max(self.hidden.shape[0], 1) or 1

    def _sizes(self) -> Sizes:
        hidden_row, threads = self.hidden.shape[1:].numel(), torch.get_num_threads()
        return Sizes(self.hidden.shape[0], self._group(), hidden_row, len(self.plan.terms), threads, self.parts)
