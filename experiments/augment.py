"""Random rotations of training examples: for a network that is not equivariant, or to show that one is."""

from __future__ import annotations

import torch
from e3nn.o3 import quaternion_to_matrix
from torch import Tensor

RESOLUTION = 1_000_000  # of the numbers below


def random_turns(count: int, generator: torch.Generator) -> Tensor:
    """(count, 4) random rotations as quaternions of any length, in whole numbers that can travel beside an index."""
    return (RESOLUTION * torch.randn(count, 4, generator=generator, dtype=torch.float64)).round().long()


def turn_matrices(turns: Tensor) -> Tensor:
    """(B, 3, 3) float64 rotation matrices of (B, 4) such numbers; uniform over all rotations."""
    return quaternion_to_matrix(torch.nn.functional.normalize(turns.double(), dim=1))
