"""Samples (graph + features), rotations, comparisons, refusals; how close is close enough says `TOLERANCE` alone."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from e3nn import o3

from se3_transformer.model import Fiber, Graph

# Largest norm of a difference / norm of what was expected, wherever two tensors should be equal.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


# -------------------------------------------------------------------------------------------------------- comparisons


def as_features(value):
    """A dict of named tensors, whatever comes."""
    if value is None:
        return {}
    if isinstance(value, torch.Tensor):
        return {"tensor": value}
    return {str(name): tensor for name, tensor in value.items()}


def assert_same(actual, expected, tolerance=None, what="output"):
    """Tensors, or dicts of them, agree: |actual - expected| <= tolerance * |expected| for each (Frobenius norms).

    |expected| counts as at least a thousandth of the largest norm in the dict, so that a tensor which is zero up to
    rounding (the gradient of a bias that cancels, say) is held to the scale of its neighbours. All that differ are
    listed. The default tolerance is that of `actual`'s dtype.
    """
    actual, expected = as_features(actual), as_features(expected)
    assert actual.keys() == expected.keys(), f"{what}: got {sorted(actual)}, expected {sorted(expected)}"
    floor = max([1e-3 * t.detach().double().norm().item() for t in expected.values()], default=0.0) or 1e-30
    wrong = []
    for name, should in expected.items():
        got, should = actual[name].detach(), should.detach()
        allowed = TOLERANCE[got.dtype] if tolerance is None else tolerance
        if got.shape != should.shape:
            wrong.append(f"{name}: shape {tuple(got.shape)}, expected {tuple(should.shape)}")
            continue
        got, should = got.cpu().double(), should.cpu().double()
        error = (got - should).norm().item() / max(should.norm().item(), floor)
        if not error <= allowed:  # NaN is wrong too
            wrong.append(
                f"{name} {tuple(got.shape)}: relative error {error:.2e} > {allowed:.0e}"
                + ("" if got.isfinite().all() else f", {(~got.isfinite()).sum()} entries not finite")
            )
    assert not wrong, f"{what}: {len(wrong)} of {len(expected)} tensors differ\n  " + "\n  ".join(wrong)


def assert_finite(tensors, what="output"):
    bad = [
        f"{name}: {(~t.isfinite()).sum()} of {t.numel()} entries are not finite"
        for name, t in as_features(tensors).items()
        if t is not None and not t.isfinite().all()
    ]
    assert not bad, f"{what}\n  " + "\n  ".join(bad)


@contextmanager
def refused(*parts, error=ValueError):
    """The block raises `error`, and its message has every part (regular expressions)."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    missing = [part for part in parts if not re.search(part, message)]
    assert not missing, f"{missing} not in the message {message!r}"


# ---------------------------------------------------------------------------------------------------------- rotations


@contextmanager
def default_float64():
    """e3nn builds its Wigner D from generators of the default dtype: float64 while it does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_rotations(number, seed=0):
    """(number, 3, 3) float64 rotations from the uniform distribution."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(number, 3, 3, dtype=torch.float64, generator=generator))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    return q * torch.linalg.det(q)[:, None, None]


def random_rotation(seed=0):
    return random_rotations(1, seed)[0]


def wigner_d(degree, rotation):
    """D_l (…, 2l+1, 2l+1) float64 of rotations (…, 3, 3), by e3nn's `wigner_D`.

    The angles are our own: e3nn takes them from an arc cosine, which is good to 1e-8 only where the axis is near y.
    """
    rotation = rotation.double()
    x, y, z = rotation[..., 1].unbind(-1)  # where y goes
    alpha, beta = torch.atan2(x, z), torch.atan2(torch.hypot(x, z), y)
    with default_float64():
        last = (o3.matrix_y(alpha) @ o3.matrix_x(beta)).mT @ rotation
        return o3.wigner_D(degree, alpha, beta, torch.atan2(last[..., 0, 2], last[..., 0, 0]))


def rotate(features, rotation):
    """Each (…, C, 2l+1) of a feature dict through D_l. {} and None stay."""
    return {l: x @ wigner_d(int(l), rotation).to(x).T for l, x in features.items()} if features else features


# ------------------------------------------------------------------------------------------------------------ samples


def random_features(fiber, rows, dtype=torch.float64, generator=None):
    """{'l': (rows, C, 2l+1)} of standard normal numbers."""
    return {
        str(degree): torch.randn(rows, channels, 2 * degree + 1, dtype=torch.float64, generator=generator).to(dtype)
        for degree, channels in Fiber(fiber)
    }


@dataclass
class Sample:
    """A batch of graphs with positions and features: everything that a layer or model is called with."""

    pos: torch.Tensor  # (N, 3)
    src: torch.Tensor  # (E,)
    dst: torch.Tensor  # (E,)
    num_nodes: torch.Tensor  # (B,)
    num_edges: torch.Tensor  # (B,)
    node_feats: dict = field(default_factory=dict)  # {'l': (N, C, 2l+1)}
    edge_feats: dict = field(default_factory=dict)  # {'l': (E, C, 2l+1)}, without the distance

    @property
    def rel_pos(self):
        return self.pos[self.dst] - self.pos[self.src]

    @property
    def edges(self):
        """(src, dst, rel_pos)"""
        return self.src, self.dst, self.rel_pos

    @property
    def graph(self):
        return Graph(
            self.src,
            self.dst,
            rel_pos=self.rel_pos,
            num_nodes=len(self.pos),
            batch_num_nodes=self.num_nodes,
            batch_num_edges=self.num_edges,
        )

    @property
    def inputs(self):
        """All floating point tensors by name."""
        return {
            "pos": self.pos,
            **{f"node_feats/{l}": x for l, x in self.node_feats.items()},
            **{f"edge_feats/{l}": x for l, x in self.edge_feats.items()},
        }

    def map(self, function):
        """The same sample with a function applied to every floating point tensor."""
        return replace(
            self,
            pos=function(self.pos),
            node_feats={l: function(x) for l, x in self.node_feats.items()},
            edge_feats={l: function(x) for l, x in self.edge_feats.items()},
        )

    def to(self, dtype):
        return self.map(lambda x: x.to(dtype))

    def on(self, device):
        """The same sample on a device."""
        indices = {name: getattr(self, name).to(device) for name in ("src", "dst", "num_nodes", "num_edges")}
        return replace(self.map(lambda x: x.to(device)), **indices)

    def leaves(self):
        """A copy whose positions and features ask for gradients."""
        return self.map(lambda x: x.detach().clone().requires_grad_())

    def rotated(self, rotation):
        return replace(
            self,
            pos=self.pos @ rotation.to(self.pos).T,
            node_feats=rotate(self.node_feats, rotation),
            edge_feats=rotate(self.edge_feats, rotation),
        )

    def translated(self, shift):
        return replace(self, pos=self.pos + shift.to(self.pos.dtype))

    def with_nodes_permuted(self, order):
        """New node i is old node order[i]."""
        new_id = torch.empty_like(order).index_copy(0, order, torch.arange(len(order)))
        return replace(
            self,
            pos=self.pos[order],
            src=new_id[self.src],
            dst=new_id[self.dst],
            node_feats={l: x[order] for l, x in self.node_feats.items()},
        )

    def with_edges_permuted(self, order):
        """New edge e is old edge order[e]."""
        return replace(
            self, src=self.src[order], dst=self.dst[order], edge_feats={l: x[order] for l, x in self.edge_feats.items()}
        )

    def single(self, b):
        """Graph b of the batch alone."""
        nodes = slice(int(self.num_nodes[:b].sum()), int(self.num_nodes[: b + 1].sum()))
        edges = slice(int(self.num_edges[:b].sum()), int(self.num_edges[: b + 1].sum()))
        return Sample(
            self.pos[nodes],
            self.src[edges] - nodes.start,
            self.dst[edges] - nodes.start,
            self.num_nodes[b : b + 1],
            self.num_edges[b : b + 1],
            {l: x[nodes] for l, x in self.node_feats.items()},
            {l: x[edges] for l, x in self.edge_feats.items()},
        )


def random_sample(fiber_in, fiber_edge=(), nodes=(5,), edges=(12,), dtype=torch.float64, seed=0):
    """A random batch: edges between different nodes of the same graph, in no order, repeated at times.

    Args:
        nodes, edges: number of each in every graph of the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs, offset = [torch.empty(2, 0, dtype=torch.int64)], 0
    for n, e in zip(nodes, edges, strict=True):
        dst = torch.randint(n, (e,), generator=generator)
        src = (dst + torch.randint(1, max(n, 2), (e,), generator=generator)) % n
        pairs.append(torch.stack([src, dst]) + offset)
        offset += n
    src, dst = torch.cat(pairs, dim=1)
    pos = torch.randn(offset, 3, dtype=torch.float64, generator=generator).to(dtype)
    return Sample(
        pos,
        src,
        dst,
        torch.tensor(nodes),
        torch.tensor(edges),
        random_features(fiber_in, offset, dtype, generator),
        random_features(fiber_edge, len(src), dtype, generator),
    )


def sample_with_edges(sample, pairs, pos=None):
    """The sample's node features on one graph with the given edges [(src, dst), …] (and positions), fresh edge
    features of the same fiber."""
    src, dst = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    generator = torch.Generator().manual_seed(1)
    fiber_edge = {int(l): x.shape[1] for l, x in sample.edge_feats.items()}
    return replace(
        sample,
        pos=sample.pos if pos is None else pos,
        src=src,
        dst=dst,
        num_nodes=torch.tensor([len(sample.pos)]),
        num_edges=torch.tensor([len(src)]),
        edge_feats=random_features(fiber_edge, len(src), sample.pos.dtype, generator),
    )


def degenerate_samples(fiber_in, fiber_edge=(), dtype=torch.float64, seed=0):
    """{what is odd about it: sample}, with 4 nodes or 1."""
    four = random_sample(fiber_in, fiber_edge, nodes=(4,), edges=(0,), dtype=dtype, seed=seed)
    one = random_sample(fiber_in, fiber_edge, nodes=(1,), edges=(0,), dtype=dtype, seed=seed)
    coincident = four.pos.clone()
    coincident[1] = coincident[0]
    axes = torch.eye(3, dtype=dtype)
    return {
        "no edges": sample_with_edges(four, []),
        "one node": sample_with_edges(one, []),
        "one node with self loop": sample_with_edges(one, [(0, 0)]),
        "isolated nodes": sample_with_edges(four, [(0, 1), (1, 0)]),
        "coincident nodes": sample_with_edges(four, [(0, 1), (1, 0), (2, 0), (2, 1), (3, 2)], coincident),
        "all nodes coincident": sample_with_edges(four, [(0, 1), (1, 0), (2, 3), (0, 3)], torch.zeros_like(four.pos)),
        "self loops": sample_with_edges(four, [(0, 0), (0, 1), (1, 0), (2, 2), (3, 1)]),
        "duplicate edges": sample_with_edges(four, [(0, 1), (0, 1), (0, 1), (1, 0), (2, 3)]),
        "edges along the axes": sample_with_edges(
            four, [(0, 1), (1, 0), (0, 2), (2, 0), (0, 3), (3, 0)], torch.cat([torch.zeros_like(axes[:1]), axes])
        ),
        "zero features": replace(
            sample_with_edges(four, [(0, 1), (1, 0), (2, 0), (3, 2)]),
            node_feats={l: torch.zeros_like(x) for l, x in four.node_feats.items()},
        ),
    }


def batched(samples):
    """One batch of several samples."""
    samples = list(samples)
    offsets = [sum(len(s.pos) for s in samples[:i]) for i in range(len(samples))]

    def joined(name):
        features = [getattr(s, name) for s in samples]
        return {l: torch.cat([f[l] for f in features]) for l in features[0]}

    return Sample(
        pos=torch.cat([s.pos for s in samples]),
        src=torch.cat([s.src + offset for s, offset in zip(samples, offsets, strict=True)]),
        dst=torch.cat([s.dst + offset for s, offset in zip(samples, offsets, strict=True)]),
        num_nodes=torch.cat([s.num_nodes for s in samples]),
        num_edges=torch.cat([s.num_edges for s in samples]),
        node_feats=joined("node_feats"),
        edge_feats=joined("edge_feats"),
    )


# ------------------------------------------------------------------------------------------------------- equivariance


def assert_equivariant(function, sample, rotation=None, shift=None, tolerance=None, what=""):
    """function(sample) -> {'l': (…, 2l+1)} turns as its input does: f(D x) = D f(x). Says what moved, and how far."""
    rotation = random_rotation() if rotation is None else rotation
    moved = sample.rotated(rotation)
    moved = moved if shift is None else moved.translated(shift)
    expected = rotate(as_features(function(sample)), rotation)
    assert_same(function(moved), expected, tolerance, f"equivariance {what}".strip())


def gradients(function, sample, parameters=None, seed=0):
    """Outputs of function(sample), and gradients of Σ output · (fixed random numbers), as two dicts.

    Gradients are with respect to positions, features and the named parameters; what is not reached counts as zero.
    """
    sample = sample.leaves()
    outputs = as_features(function(sample))
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
        for _, x in sorted(outputs.items())
    )
    wanted = {**sample.inputs, **{f"param/{name}": p for name, p in dict(parameters or {}).items()}}
    if not loss.requires_grad:
        return outputs, {name: torch.zeros_like(x) for name, x in wanted.items()}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return outputs, {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(wanted.items(), found, strict=True)
    }
