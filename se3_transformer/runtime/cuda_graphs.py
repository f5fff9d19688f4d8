"""CUDA graphs: forward and backward pass recorded once for every size of a batch, then each launched as one.

A network is some thousand small kernels; where they are done faster than the CPU can launch them, this helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from se3_transformer.runtime.distributed import world_size

TENSOR = object()  # stands for a tensor in what `take_apart` returns


class Replayed:
    """A function of a network and a batch whose passes are replayed; for training, one network and one autocast.

    For every layout of a batch, that is shapes and all that is not a tensor, it is computed some times, recorded, and
    from then on replayed with the numbers of other batches. So these must not decide which operations there are. What
    comes out is overwritten by the next call, and so are gradients of parameters that were None before the backward
    pass.

    Args:
        function: (network, batch) -> a tensor, or a tuple of tensors; the batch a dataclass or dict of tensors, numbers
            and the like.
    """

    def __init__(self, function: Callable[[nn.Module, Any], Any]):
        self._function = function
        self._recorded: dict[tuple, Callable] = {}
        self._pool: Any = None

    def __call__(self, network: nn.Module, batch: Any) -> Any:
        tensors, layout = take_apart(batch)
        key = (layout, tuple((tensor.shape, tensor.dtype) for tensor in tensors))
        if key not in self._recorded:
            self._recorded[key] = self._record(network, layout, tensors)
        return self._recorded[key](*tensors)

    def _record(self, network: nn.Module, layout: Any, tensors: list[Tensor]) -> Callable:
        if self._pool is None:  # of memory, for all sizes, as no two of them are computed at a time
            self._pool = torch.cuda.graph_pool_handle()
        samples = tuple(tensor.clone() for tensor in tensors)
        module = _OfTensors(network, self._function, layout, samples[0].device.type)
        # The passes are as without recording: autocast, with casts that are not kept from one call to the next, is for
        # the forward pass alone.
        with torch.cuda.device_of(samples[0]), torch.autocast(module.device, enabled=False):
            return torch.cuda.make_graphed_callables(module, samples, allow_unused_input=True, pool=self._pool)


class _OfTensors(nn.Module):
    """A function of a network and a batch, under autocast as it is now, as a module with the tensors as arguments."""

    def __init__(self, network: nn.Module, function: Callable, layout: Any, device: str):
        super().__init__()
        self.network, self.function, self.layout, self.device = network, function, layout, device
        self.dtype, self.enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def forward(self, *tensors: Tensor) -> Any:
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False):
            return self.function(self.network, put_together(self.layout, iter(tensors)))


def take_apart(value: Any) -> tuple[list[Tensor], Any]:
    """The tensors of nested dataclasses and dicts, and a layout that can be compared, for `put_together`."""
    if isinstance(value, Tensor):
        return [value], TENSOR
    if isinstance(value, dict):
        parts = value
    elif is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
    else:
        return [], value
    apart = {name: take_apart(part) for name, part in parts.items()}
    tensors = [tensor for found, _ in apart.values() for tensor in found]
    return tensors, (type(value), tuple((name, layout) for name, (_, layout) in apart.items()))


def put_together(layout: Any, tensors: Iterator[Tensor]) -> Any:
    """What `take_apart` took apart, of other tensors."""
    if layout is TENSOR:
        return next(tensors)
    if not isinstance(layout, tuple):
        return layout
    kind, parts = layout
    return kind(**{name: put_together(part, tensors) for name, part in parts})


def check_cuda_graphs(settings: Mapping[str, Any], device: torch.device) -> None:
    """Raise ValueError if settings ask for CUDA graphs where there can be none."""
    if not settings["cuda_graphs"]:
        return
    if device.type == "cpu":
        raise ValueError("cuda_graphs needs a GPU, got the CPU; give --device cuda, or do without")
    numbers = {"accumulate": settings["accumulate"], "processes": world_size(), "workers": settings["workers"]}
    for name, expected in {"accumulate": 1, "processes": 1, "workers": 0}.items():
        if numbers[name] != expected:
            raise ValueError(f"cuda_graphs: expected {expected} {name}, got {numbers[name]}; give one of the two up")
