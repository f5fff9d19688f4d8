"""Reductions over variable-sized groups of rows, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """values[index] along the first axis: (N, …), (E,) -> (E, …)."""
    return values.index_select(0, index)


def segment_sum(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Sum of the rows with the same index: (E, …), (E,) -> (num_segments, …); 0 for empty segments."""
    return values.new_zeros(num_segments, *values.shape[1:]).index_add(0, index, values)


def segment_mean(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Mean of the rows with the same index: (E, …), (E,) -> (num_segments, …); 0 for empty segments."""
    count = segment_sum(torch.ones_like(index, dtype=values.dtype), index, num_segments).clamp(min=1)
    return segment_sum(values, index, num_segments) / count.view(-1, *[1] * (values.ndim - 1))


def segment_max(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Maximum of the rows with the same index: (E, …), (E,) -> (num_segments, …); 0 for empty segments."""
    rows = index.view(-1, *[1] * (values.ndim - 1)).expand_as(values)
    return values.new_zeros(num_segments, *values.shape[1:]).scatter_reduce(0, rows, values, "amax", include_self=False)


def segment_softmax(logits: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Softmax over the rows with the same index: (E, …), (E,) -> (E, …)."""
    highest = segment_max(logits.detach(), index, num_segments)
    exponentials = (logits - gather_rows(highest, index)).exp()
    return exponentials / gather_rows(segment_sum(exponentials, index, num_segments), index)
