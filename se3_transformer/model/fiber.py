"""Fibers: which degrees a feature has, and how many channels of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


class FiberEl(NamedTuple):
    degree: int
    channels: int


class Fiber(dict):
    """Structure of an equivariant feature: a mapping from degree l to its number of channels.

    A feature with this fiber is a dict ``{'l': tensor}`` of tensors (..., channels, 2l+1). The fiber is sorted by
    degree; iterating over it gives ``(degree, channels)`` pairs, and a degree that it lacks has 0 channels.

    Args:
        structure: mapping degree -> channels, or an iterable of (degree, channels) pairs. Degrees may be int or str.
            Degrees with 0 channels are dropped.

    Raises:
        ValueError: a degree or a number of channels is not a whole number >= 0, or a degree comes twice.
    """

    def __init__(self, structure: Mapping[int, int] | Mapping[str, int] | Iterable[tuple[int | str, int]] = ()):
        channels_of: dict[int, int] = {}
        for pair in structure.items() if isinstance(structure, Mapping) else structure:
            try:
                degree, channels = pair
            except (TypeError, ValueError):
                raise ValueError(f"Fiber: expected a mapping or pairs (degree, channels), got {pair!r}") from None
            if int(degree) != float(degree) or int(degree) < 0:
                raise ValueError(f"Fiber: a degree must be a whole number >= 0, got {degree!r}")
            if int(channels) != channels or channels < 0:
                raise ValueError(f"Fiber: channels of degree {degree} must be a whole number >= 0, got {channels!r}")
            if int(degree) in channels_of:
                raise ValueError(f"Fiber: degree {degree} is given twice")
            channels_of[int(degree)] = int(channels)
        self.structure = [FiberEl(degree, channels) for degree, channels in sorted(channels_of.items()) if channels]
        super().__init__(self.structure)

    @staticmethod
    def create(num_degrees: int, num_channels: int) -> Fiber:
        """Fiber with degrees 0 … num_degrees-1, num_channels each."""
        return Fiber([(degree, num_channels) for degree in range(num_degrees)])

    @staticmethod
    def from_features(features: dict[str, Tensor]) -> Fiber:
        """Fiber of a feature dict with tensors (..., channels, 2l+1)."""
        return Fiber([(degree, tensor.shape[-2]) for degree, tensor in features.items()])

    @property
    def degrees(self) -> list[int]:
        return [element.degree for element in self.structure]

    @property
    def channels(self) -> list[int]:
        return [element.channels for element in self.structure]

    @property
    def by_channels(self) -> list[int]:
        """Degrees from few to many channels: layers make their parameters in this order, as the known package does.

        The state of an optimizer, other than weights, is loaded by position.
        """
        return sorted(self.degrees, key=self.__getitem__)

    @property
    def num_features(self) -> int:
        """Numbers in one feature: sum over degrees of channels · (2l+1)."""
        return sum(channels * degree_to_dim(degree) for degree, channels in self.structure)

    def __getitem__(self, degree: int | str) -> int:
        return self.get(int(degree), 0)

    def __iter__(self) -> Iterator[FiberEl]:
        return iter(self.structure)

    def __contains__(self, degree: object) -> bool:
        return any(degree == own or degree == str(own) for own in self.degrees)

    def __mul__(self, other: Fiber | int) -> Fiber | list[tuple[FiberEl, FiberEl]]:
        """Fiber * int multiplies channels; Fiber * Fiber gives all pairs of their elements."""
        if isinstance(other, Fiber):
            return list(product(self.structure, other.structure))
        return Fiber([(degree, channels * other) for degree, channels in self.structure])

    def __add__(self, other: Fiber | int) -> Fiber:
        """Fiber + int adds channels to every degree; Fiber + Fiber adds the channels of each degree up."""
        if isinstance(other, int):
            return Fiber([(degree, channels + other) for degree, channels in self.structure])
        return Fiber([(degree, self[degree] + other[degree]) for degree in {*self.degrees, *other.degrees}])

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none
        return hash(tuple(self.structure))

    def __reduce__(self):
        return Fiber, (dict(self.structure),)

    def __repr__(self) -> str:
        return f"Fiber({dict(self.structure)})"

    @staticmethod
    def combine_max(fiber1: Fiber, fiber2: Fiber) -> Fiber:
        """Per degree the larger number of channels."""
        return Fiber([(d, max(fiber1[d], fiber2[d])) for d in {*fiber1.degrees, *fiber2.degrees}])

    @staticmethod
    def combine_selectively(fiber1: Fiber, fiber2: Fiber) -> Fiber:
        """The degrees of fiber1, each with the channels of both."""
        return Fiber([(degree, fiber1[degree] + fiber2[degree]) for degree in fiber1.degrees])

    def to_attention_heads(self, tensors: dict[str, Tensor], num_heads: int) -> Tensor:
        """Split the channels of each degree into heads and flatten: {'l': (..., C, 2l+1)} -> (..., heads, D / heads)

        with D = num_features.
        """
        by_degree = [tensors[str(degree)] for degree in self.degrees]
        sizes = [tensor.shape[-2:].numel() // num_heads for tensor in by_degree]
        heads = [t.reshape(*t.shape[:-2], num_heads, size) for t, size in zip(by_degree, sizes, strict=True)]
        return torch.cat(heads, dim=-1)


def degree_to_dim(degree: int) -> int:
    """Dimension 2l+1 of the irreducible representation of degree l."""
    return 2 * degree + 1
