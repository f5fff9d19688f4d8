"""Graphs of point clouds: which points exchange messages.

Every function takes the positions of one or several clouds in one tensor, joins points of the same cloud only, and
makes `rel_pos` from the positions, so that gradients flow to them. Neighbours are searched on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from se3_transformer.model.graph import Graph, check_index, check_positions


def fully_connected(positions: Tensor, sizes: Tensor | Sequence[int] | None = None) -> Graph:
    """Every point sends to every other one.

    Args:
        positions: (N, 3).
        sizes: (B,) points of each cloud; by default one cloud.
    """
    clouds = _clouds(positions, sizes)
    return _joined(positions, clouds, [(~np.eye(len(cloud), dtype=bool)).nonzero() for cloud in clouds])


def knn(positions: Tensor, k: int, sizes: Tensor | Sequence[int] | None = None) -> Graph:
    """Every point receives from its k nearest others, or from all others where there are fewer.

    Args:
        positions: (N, 3).
        k: neighbours of a point.
        sizes: (B,) points of each cloud; by default one cloud.
    """
    if k < 1:
        raise ValueError(f"knn: k must be at least 1, got {k}")
    clouds = _clouds(positions, sizes)
    return _joined(positions, clouds, [_nearest(cloud, k) for cloud in clouds])


def radius(
    positions: Tensor, cutoff: float, sizes: Tensor | Sequence[int] | None = None, cells: Tensor | None = None
) -> Graph:
    """Points send to each other where their distance is at most `cutoff`.

    Args:
        positions: (N, 3).
        cutoff: in the unit of the positions.
        sizes: (B,) points of each cloud; by default one cloud.
        cells: (B, 3, 3) the lattice vectors (rows) along which each cloud is repeated. Edges then come from all images
            of a point, its own among them, `rel_pos` leads from the image, and gradients flow to the cells too.

    Raises:
        ImportError: cells are given, but vesin is not installed.
    """
    if not cutoff > 0:
        raise ValueError(f"radius: cutoff must be positive, got {cutoff}")
    clouds = _clouds(positions, sizes)
    if cells is None:
        return _joined(positions, clouds, [_within(cloud, cutoff) for cloud in clouds])

    if cells.shape != (len(clouds), 3, 3):
        raise ValueError(f"radius: expected cells {(len(clouds), 3, 3)}, one for each cloud, got {tuple(cells.shape)}")
    if (flat := cells.detach().det() == 0).any():
        raise ValueError(f"radius: the cell of cloud {int(flat.nonzero()[0])} has no volume")
    found = [_within_of_images(*cloud, cutoff) for cloud in zip(clouds, _to_numpy(cells), strict=True)]
    graph = _joined(positions, clouds, [(src, dst) for src, dst, _ in found])
    steps = torch.from_numpy(np.concatenate([step for *_, step in found])).to(cells)  # (E, 3) along lattice vectors
    assert graph.rel_pos is not None and graph.batch_num_edges is not None  # `_joined` made both
    cell_of_edge = cells.repeat_interleave(graph.batch_num_edges, dim=0)  # (E, 3, 3)
    graph.rel_pos = graph.rel_pos + (steps[:, None, :] @ cell_of_edge).squeeze(1)
    return graph


def _nearest(cloud: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges (src, dst) to every point (n, 3) from its k nearest others."""
    from scipy.spatial import KDTree  # here, because most models do not need it

    if len(cloud) < 2:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    _, nearest = KDTree(cloud).query(cloud, k=min(k + 1, len(cloud)))  # (n, k + 1)
    other = nearest != np.arange(len(cloud))[:, None]
    other[other.all(axis=1), -1] = False  # among many coincident points, one may not be found near itself
    return nearest[other], other.nonzero()[0]


def _within(cloud: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges (src, dst), in both directions, of all pairs of points (n, 3) at most `cutoff` apart."""
    from scipy.spatial import KDTree

    i, j = KDTree(cloud).query_pairs(cutoff, output_type="ndarray").T
    return np.concatenate([i, j]), np.concatenate([j, i])


def _within_of_images(cloud: np.ndarray, cell: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges (src, dst) as `_within` gives them for a repeated cloud, and the steps (e, 3) from the image of dst."""
    try:
        from vesin import NeighborList
    except ImportError as error:
        raise ImportError("radius: cells need the package vesin (pip install vesin)") from error
    return NeighborList(cutoff=cutoff, full_list=True).compute(cloud, cell, periodic=True, quantities="ijS")


def _clouds(positions: Tensor, sizes: Tensor | Sequence[int] | None) -> list[np.ndarray]:
    """The points (n, 3) of each cloud.

    Raises:
        ValueError: positions of a wrong shape or not finite, or sizes that do not add up to their number.
    """
    check_positions(positions)
    if not positions.isfinite().all():
        raise ValueError("positions: expected finite numbers, got NaN or infinity")
    if sizes is None:
        return [_to_numpy(positions)]
    sizes = torch.as_tensor(sizes)
    check_index("sizes", sizes)
    if sizes.sum() != len(positions) or (sizes < 0).any():
        raise ValueError(f"sizes: expected numbers >= 0 that add up to {len(positions)} points, got {sizes.tolist()}")
    return np.split(_to_numpy(positions), sizes.cpu().cumsum(0)[:-1])


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _joined(positions: Tensor, clouds: list[np.ndarray], edges: list[tuple[np.ndarray, ...]]) -> Graph:
    """One graph of the edges (src, dst) of every cloud, which count its points from 0."""
    sizes = [len(cloud) for cloud in clouds]
    starts = np.cumsum([0, *sizes[:-1]])
    src, dst = (
        torch.from_numpy(np.concatenate([ends.astype(np.int64) + start for ends, start in zip(column, starts)]))
        for column in zip(*edges, strict=True)
    )
    graph = Graph.from_positions(positions, src.to(positions.device), dst.to(positions.device), sizes)
    graph.batch_num_edges = torch.tensor([len(dst) for _, dst in edges], device=positions.device)
    return graph
