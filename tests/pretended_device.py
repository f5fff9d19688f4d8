"""A device that is no CPU, for machines without a GPU: its tensors are CPU tensors in disguise.

As a GPU does, it refuses operations on tensors that are partly elsewhere, casts under autocast by CUDA's rules, can say
where a program would have to wait for it, and records what is computed to do it again, as CUDA graphs do. What it
cannot show is whether kernels of a GPU compute the same.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

NAME = "pretended"

# Operations whose result has a size, or is a number, that the CPU has to ask the device for.
WAITING = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
INDEXED_FROM_CPU = {"index", "index_put", "index_put_", "_index_put_impl_"}  # their indices may lie on the CPU
# Op-specific behaviour of autocast on CUDA, of the operations that occur here, as documented with torch.amp.
IN_LOW_PRECISION = ("addmm", "baddbmm", "bmm", "einsum", "linear", "matmul", "mm")
IN_FLOAT32 = (
    "cumsum", "exp", "group_norm", "layer_norm", "linalg_vector_norm", "log", "norm.ScalarOpt_dim", "pow.Tensor_Scalar",
    "prod", "reciprocal", "rsqrt", "softmax.int", "softplus", "sum", "sum.dim_IntList",
)  # fmt: skip
IN_WIDEST = ("index_put", "scatter_add", "tensordot", "vdot")

LAYOUT = {
    torch.ops.aten.size.default: torch.Tensor.size,
    torch.ops.aten.sym_size.default: torch.Tensor.size,
    torch.ops.aten.stride.default: torch.Tensor.stride,
    torch.ops.aten.sym_stride.default: torch.Tensor.stride,
    torch.ops.aten.numel.default: torch.Tensor.numel,
    torch.ops.aten.sym_numel.default: torch.Tensor.numel,
    torch.ops.aten.dim.default: torch.Tensor.dim,
    torch.ops.aten.storage_offset.default: torch.Tensor.storage_offset,
    torch.ops.aten.sym_storage_offset.default: torch.Tensor.storage_offset,
    torch.ops.aten.is_contiguous.default: torch.Tensor.is_contiguous,
}

_refuses_to_wait = False
_record: list[tuple] | None = None  # operations as they come, with arguments and results


class Pretended(torch.Tensor):
    """A tensor on the pretended device; `held` is where its numbers are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        # Sizes are asked for, as those of what is held may change, by unsqueeze_ for example.
        sizes = {"dispatch_sizes_strides_policy": "sizes", **layout}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=f"{NAME}:0", **sizes)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in LAYOUT:
            return LAYOUT[func](args[0].held)
        return _compute(func, *args, **(kwargs or {}))

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)


@contextmanager
def no_waiting():
    """An error where the CPU would have to wait for the device, as `torch.cuda.set_sync_debug_mode("error")` has it."""
    global _refuses_to_wait
    _refuses_to_wait = True
    try:
        yield
    finally:
        _refuses_to_wait = False


def set_up(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device, which PyTorch knows from then on in this process; skips the test where that cannot be done."""
    for name in ("tensor", "as_tensor"):  # they move what they have made out of reach of devices in Python
        monkeypatch.setattr(torch, name, _made_on_cpu(getattr(torch, name)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    if not hasattr(torch, NAME):
        _register()
    return torch.device(NAME, 0)


def make_graphed_callables(module, sample_args, allow_unused_input, pool):
    """As that of torch.cuda: the same operations again, on tensors in the same places."""
    assert not torch.is_autocast_enabled(NAME)  # or autocast would be on in the backward pass
    parameters = [*module.parameters()]
    module(*sample_args)  # what is done once
    with _recorded() as forward:
        outputs, spec = tree_flatten(module(*sample_args))
    given = [torch.empty_like(x) for x in outputs]
    with _recorded() as backward:
        found = torch.autograd.grad(outputs, parameters, given, allow_unused=allow_unused_input)

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            for place, x in zip(sample_args, inputs):
                place.copy_(x)
            _compute_again(forward)
            return tuple(x.detach() for x in outputs)

        @staticmethod
        def backward(ctx, *grads):
            for place, x in zip(given, grads, strict=True):
                place.copy_(x)
            _compute_again(backward)
            return *[None] * len(sample_args), *(None if g is None else g.detach() for g in found)

    return lambda *tensors: tree_unflatten(Replay.apply(*tensors, *parameters), spec)


@contextmanager
def _recorded():
    global _record
    _record = record = []
    try:
        with no_waiting():
            yield record
    finally:
        _record = None


def _compute_again(record: list[tuple]) -> None:
    for func, args, kwargs, result in record:
        for place, x in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() != place.untyped_storage().data_ptr():
                place.copy_(x)


def _register() -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices written in Python")
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    _libraries.append(everything := torch.library.Library("_", "IMPL"))
    everything.fallback(_compute, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _libraries.append(aten := torch.library.Library("aten", "IMPL"))
    rules = ((IN_LOW_PRECISION, _low), (IN_FLOAT32, lambda tensors: torch.float32), (IN_WIDEST, _widest))
    for names, rule in rules:
        for name in names:
            aten.impl(name, _cast(_overload(name), rule), "AutocastPrivateUse1")


_libraries: list[torch.library.Library] = []  # their registrations end with them


def _overload(name: str):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _compute(func, *args, **kwargs):
    """An operation on tensors of which some are pretended, or which makes one."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    elsewhere = [x for x in tensors if not isinstance(x, Pretended) and x.ndim]
    target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else NAME
    if name in ("_to_copy", "copy_"):
        source, into = (args[0], target) if name == "_to_copy" else (args[1], args[0].device.type)
        arrives_later = into == NAME and (kwargs.get("non_blocking") or len(args) > 2 and args[2])
        if source.device.type != into and not arrives_later:
            _wait(name)
    elif elsewhere and name not in INDEXED_FROM_CPU:
        shapes = [tuple(x.shape) for x in elsewhere]
        raise RuntimeError(f"{name}: expected all tensors on one device, got {shapes} on the CPU")
    by_mask = name in INDEXED_FROM_CPU and any(x is not None and x.dtype == torch.bool for x in args[1])
    if name in WAITING or by_mask or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _wait(name)

    disguised = {id(x.held): x for x in tensors if isinstance(x, Pretended)}
    args, kwargs = tree_map_only(Pretended, lambda x: x.held, (args, kwargs))
    if "device" in kwargs:
        kwargs |= {"device": "cpu", "pin_memory": False}
    result = func(*args, **kwargs)
    if _record is not None and "empty" not in name:  # which makes no numbers, and may be enlarged afterwards
        _record.append((func, args, kwargs, result))
    if target != NAME or (name == "copy_" and id(args[0]) not in disguised):
        return result
    return tree_map_only(torch.Tensor, lambda x: disguised.get(id(x)) if id(x) in disguised else Pretended(x), result)


def _made_on_cpu(function):
    return lambda data, *args, device=None, **kwargs: function(data, *args, **kwargs).to(device or "cpu")


def _wait(name: str) -> None:
    if _refuses_to_wait:
        raise RuntimeError(f"{name} waits for the device")


def _low(tensors: list[torch.Tensor]) -> torch.dtype:
    return torch.get_autocast_dtype(NAME)


def _widest(tensors: list[torch.Tensor]) -> torch.dtype:
    return torch.float32 if any(x.dtype == torch.float32 for x in tensors) else _low(tensors)


def _cast(func, rule):
    """`func` of floating point tensors in the dtype that the rule says; float64 stays."""
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def computed(*args, **kwargs):
        def to_dtype(x):
            return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

        with torch._C._ExcludeDispatchKeyGuard(autocast):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            dtype = rule(tensors)
            args, kwargs = tree_map_only(torch.Tensor, to_dtype, (args, kwargs))
            return func(*args, **kwargs)

    return computed
