"""QM9: from molecules to a cache of graphs with their edge frames, and from the cache to batches.

A graph is one molecule: the atoms, and as edges its bonds, all pairs closer than a radius, or all pairs. The task is to
predict one of the 19 labels in `TARGETS`. A batch is cut out of flat arrays by index arithmetic, without a loop over
molecules; with the data set on a GPU, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataloader.cache import fingerprint, open_cache, require_setting
from dataloader.qm9_layout import (
    ELEMENTS,
    GRAPHS,
    LAYOUT_VERSION,
    TARGETS,
    Molecules,
    Target,
    bar_options,
    check_molecules,
    load_molecules,
    offsets,
)
from se3_transformer.model.basis import edge_frames, wigner_blocks
from se3_transformer.model.graph import Graph
from se3_transformer.model.segment import segment_sum

if TYPE_CHECKING:
    import dgl

__all__ = [
    "TARGETS",
    "Molecules",
    "QM9Batch",
    "QM9Dataset",
    "Target",
    "check_molecules",
    "graph_arrays",
    "length_balanced_batches",
    "load_molecules",
    "split_molecules",
]

NUM_NODE_FEATURES = 6  # of the columns of `Molecules.node_attr`: one-hot H C N O F, atomic number
NUM_EDGE_FEATURES = 4  # one-hot single, double, triple, aromatic; zero where there is no bond
NO_BOND = 4  # bond type of an edge that is no bond; the others are 0 … 3 in the order of the one-hot
SPLIT = {"train": 100_000, "val": 18_000, "test": 12_831}  # molecules of the usual split
BLOCK = 2048  # molecules converted at a time


@dataclass
class QM9Batch:
    """B molecules as one graph; atoms are numbered molecule by molecule. float32 where nothing else is said."""

    graph: Graph  # with rel_pos (E, 3) pos[dst] - pos[src], Å, and sizes of the molecules
    node_feats: dict[str, Tensor]  # {'0': (N, 6, 1)} one-hot H C N O F, atomic number
    edge_feats: dict[str, Tensor]  # {'0': (E, 4, 1)} one-hot single, double, triple, aromatic; zero: no bond
    rotations: Tensor  # (E, 3, 3) edge frames of rel_pos
    targets: Tensor  # (B, 19) float64, in the order and units of `TARGETS`, NaN where unknown

    def basis(self, max_degree: int) -> dict[str, Tensor]:
        """What the model takes as `basis`, up to a degree; there are no edges of length zero."""
        with torch.autocast(self.rotations.device.type, enabled=False):
            return wigner_blocks(self.rotations, max_degree)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> QM9Batch:
        """The same batch on another device."""

        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def turn(self, matrices: Tensor) -> QM9Batch:
        """Each molecule turned by a rotation matrix of (B, 3, 3)."""
        assert self.graph.batch_num_edges is not None and self.graph.rel_pos is not None  # graphs of `QM9Dataset.batch`
        matrices = matrices.repeat_interleave(self.graph.batch_num_edges, dim=0, output_size=self.graph.num_edges)
        rel_pos = (matrices @ self.graph.rel_pos.unsqueeze(-1)).squeeze(-1)  # (E, 3)
        return replace(self, graph=replace(self.graph, rel_pos=rel_pos), rotations=edge_frames(rel_pos))

    def padded(self) -> QM9Batch:
        """The batch with one more molecule, made up, so that of batches about as large many have the same shapes.

        It has 16 atoms or more, so that the loops that are its edges are spread, one or more for each. There are no
        `targets` for it.
        """
        graph = self.graph
        assert graph.batch_num_edges is not None and graph.rel_pos is not None
        nodes = rounded_up(graph.num_nodes + 16) - graph.num_nodes
        edges = rounded_up(graph.num_edges + nodes) - graph.num_edges
        ends = graph.num_nodes + torch.arange(edges, device=graph.device) % nodes
        pole = graph.rel_pos.new_zeros(edges, 3)
        pole[:, 1] = 1
        identity = torch.eye(3, dtype=self.rotations.dtype, device=graph.device).expand(edges, 3, 3)

        def extended(tensor: Tensor, number: int) -> Tensor:
            return torch.cat([tensor, tensor.new_ones(number, *tensor.shape[1:])])

        return replace(
            self,
            graph=Graph(
                src=torch.cat([graph.src, ends]),
                dst=torch.cat([graph.dst, ends]),
                rel_pos=torch.cat([graph.rel_pos, pole]),
                num_nodes=graph.num_nodes + nodes,
                batch_num_nodes=torch.cat([graph.batch_num_nodes, graph.batch_num_nodes.new_full((1,), nodes)]),
                batch_num_edges=torch.cat([graph.batch_num_edges, graph.batch_num_edges.new_full((1,), edges)]),
            ),
            node_feats={degree: extended(feature, nodes) for degree, feature in self.node_feats.items()},
            edge_feats={degree: extended(feature, edges) for degree, feature in self.edge_feats.items()},
            rotations=torch.cat([self.rotations, identity]),
        )

    def pin_memory(self) -> QM9Batch:
        """The same batch in page-locked memory, which a GPU reads without being waited for; on a GPU, itself."""
        if self.rotations.is_cuda:
            return self

        def pin(value):
            if isinstance(value, Graph):
                tensors = {name: part for name, part in vars(value).items() if isinstance(part, Tensor)}
                return replace(value, **{name: part.pin_memory() for name, part in tensors.items()})
            return value.pin_memory()

        return self._map(pin)

    def _map(self, function: Callable) -> QM9Batch:
        """The batch with the function applied to every tensor and to the graph."""

        def apply(value):
            return {key: function(part) for key, part in value.items()} if isinstance(value, dict) else function(value)

        return QM9Batch(**{name: apply(value) for name, value in vars(self).items()})


def rounded_up(number: int) -> int:
    """At most a sixteenth more, or 32 if that is more: one of few numbers."""
    step = max(32, 2 ** (number.bit_length() - 6))
    return -(-number // step) * step


class QM9Dataset:
    """All molecules of a cache; on the CPU the arrays stay on disk, memory-mapped, until a batch reads them.

    Args:
        arrays: what `graph_arrays` returns.
        settings: what they were made with, kept as the attribute `settings`.
        device: where batches are made; other than the CPU, all molecules are copied there.
        identity: tells data sets apart, see `Cache.identity`; kept as the attribute `identity`.
    """

    def __init__(
        self, arrays: dict[str, np.ndarray], settings: dict, device: torch.device | str = "cpu", identity: str = ""
    ):
        on_cpu = {name: torch.from_numpy(values) for name, values in arrays.items()}
        self.settings, self.identity = settings, identity
        self.targets = on_cpu["targets"]  # (G, 19) float64 on the CPU, in the order and units of `TARGETS`
        # Sizes stay on the CPU, so that the shapes of a batch are known without asking the device.
        self.num_nodes: Tensor = on_cpu["node_offsets"].diff()  # (G,) atoms of each molecule
        self.num_edges: Tensor = on_cpu["edge_offsets"].diff()  # (G,)
        self._arrays = {name: values.to(device) for name, values in on_cpu.items()}
        self._num_nodes, self._num_edges = self.num_nodes.to(device), self.num_edges.to(device)
        one_hot = torch.cat([torch.eye(NUM_EDGE_FEATURES), torch.zeros(1, NUM_EDGE_FEATURES)])
        self._bond_features = one_hot.to(device)  # (5, 4) a row for each bond type
        self.device = self._bond_features.device

    @classmethod
    def open(
        cls,
        cache_dir: str | Path,
        settings: dict | None = None,
        device: torch.device | str = "cpu",
        rebuild: str = "python preprocess_qm9.py",
    ) -> QM9Dataset:
        """The molecules of a cache.

        Args:
            cache_dir: the directory that `preprocess_qm9.py` wrote.
            settings: settings that the cache must have, e.g. `{"graph": "bonds"}`.
            device: see `QM9Dataset`.
            rebuild: the command that writes this cache, for error messages.

        Raises:
            CacheError: no usable cache, of other settings, or its source has been changed since.
            UserError: a cache of other data.
        """
        settings = {"layout": LAYOUT_VERSION} | (settings or {})
        found = open_cache(cache_dir, rebuild, settings)
        require_setting(cache_dir, found.settings, "graph")
        paths = {name: Path(cache_dir) / name for name in found.sources}
        present = {
            name: fingerprint(paths[name], source) if paths[name].exists() else source
            for name, source in found.sources.items()
        }
        cache = open_cache(cache_dir, rebuild, settings, present, verify=True)
        return cls(cache.arrays, cache.settings, device, cache.identity)

    def __len__(self) -> int:
        """Number of molecules G."""
        return len(self.targets)

    def batch(self, molecules: Tensor) -> QM9Batch:
        """Some molecules, in the order given.

        Args:
            molecules: (B,) in 0 … G-1, on the CPU.

        Raises:
            IndexError: a molecule that is not in the cache.
            ValueError: not a list of molecules.
        """
        if molecules.ndim != 1:
            raise ValueError(f"expected molecules (B,), got {tuple(molecules.shape)}")
        if len(molecules) and (molecules.min() < 0 or molecules.max() >= len(self)):
            raise IndexError(
                f"molecules: expected 0 … {len(self) - 1}, which the cache holds, "
                f"got {molecules.min()} … {molecules.max()}"
            )
        N, E = (int(sizes[molecules].sum()) for sizes in (self.num_nodes, self.num_edges))
        array, device = self._arrays, self.device
        molecules = molecules.to(device, non_blocking=True)
        num_nodes, num_edges = self._num_nodes[molecules], self._num_edges[molecules]  # (B,)
        first_node = num_nodes.cumsum(0) - num_nodes  # (B,) in the batch
        first_edge = num_edges.cumsum(0) - num_edges

        # Rows of the flat arrays: within a molecule they follow each other, as do those of the batch.
        shift = array["node_offsets"][molecules] - first_node  # (B,)
        nodes = shift.repeat_interleave(num_nodes, output_size=N) + torch.arange(N, device=device)  # (N,)
        shift = torch.stack([array["edge_offsets"][molecules] - first_edge, first_node])  # (2, B)
        shift = shift.repeat_interleave(num_edges, dim=1, output_size=E)  # (2, E)
        edges = shift[0] + torch.arange(E, device=device)  # (E,)

        src = array["src"].index_select(0, edges) + shift[1]  # (E,)
        dst = array["dst"].index_select(0, edges) + shift[1]
        positions = array["positions"].index_select(0, nodes)  # (N, 3)
        node_attr = array["node_attr"].index_select(0, nodes)[:, :NUM_NODE_FEATURES]
        bond_type = array["bond_type"].index_select(0, edges).int()  # (E,)
        return QM9Batch(
            graph=Graph(
                src=src,
                dst=dst,
                rel_pos=positions.index_select(0, dst) - positions.index_select(0, src),
                num_nodes=N,
                batch_num_nodes=num_nodes,
                batch_num_edges=num_edges,
            ),
            node_feats={"0": node_attr.float()[:, :, None]},
            edge_feats={"0": self._bond_features.index_select(0, bond_type)[:, :, None]},
            rotations=array["rotations"].index_select(0, edges),
            targets=array["targets"].index_select(0, molecules),
        )

    @cached_property
    def element_counts(self) -> Tensor:
        """(G, 5) float64 on the CPU: atoms of each element of `ELEMENTS` in each molecule."""
        one_hot = self._arrays["node_attr"][:, : len(ELEMENTS)].double().cpu()
        molecules = torch.arange(len(self)).repeat_interleave(self.num_nodes)  # (ΣN,)
        return segment_sum(one_hot, molecules, len(self))

    def dgl_graph(self, molecule: int) -> dgl.DGLGraph:
        """One molecule as DGL's `QM9EdgeDataset` gives it.

        ndata: `pos` (N, 3) Å, `attr` (N, 11); edata: `edge_attr` (E, 4), and more than there `rel_pos` (E, 3), which
        the model needs. All float32.

        Raises:
            ImportError: DGL is not installed.
        """
        batch = self.batch(torch.tensor([molecule]))
        start, end = self._arrays["node_offsets"][molecule : molecule + 2].tolist()
        graph = batch.graph.to_dgl()
        graph.ndata["pos"] = self._arrays["positions"][start:end]
        graph.ndata["attr"] = self._arrays["node_attr"][start:end].float()
        graph.edata["edge_attr"] = batch.edge_feats["0"].squeeze(2)
        return graph


def graph_arrays(
    molecules: Molecules,
    graph: str = "bonds",
    radius: float = 5.0,
    create: Callable[[str, tuple[int, ...], np.dtype], np.ndarray] = lambda _, shape, dtype: np.empty(shape, dtype),
    progress: str | None = None,
) -> dict[str, np.ndarray]:
    """The flat arrays that are cached.

    Args:
        molecules: checked, see `check_molecules`.
        graph: what is an edge: "bonds", "radius" (every pair closer than `radius`) or "complete" (every pair).
        radius: Å.
        create: makes an array that is filled here, by its name, shape and dtype; e.g. `CacheWriter.create`.
        progress: title of a progress bar; None: no bar.

    Returns:
        node_offsets, edge_offsets (G+1,) int64: rows of each molecule in
        node_attr (ΣN, 11) uint8, positions (ΣN, 3) float32 Å, and
        src, dst (ΣE,) uint8 (int32 where a molecule has more than 256 atoms) atoms within the molecule, sorted,
        bond_type (ΣE,) uint8 0 … 3, or 4 where there is no bond, rotations (ΣE, 3, 3) float32 edge frames of
        positions[dst] - positions[src]; targets (G, 19) float64.

    Raises:
        ValueError: there is no such kind of graph, or the radius leaves no edges.
    """
    if graph not in GRAPHS:
        raise ValueError(f"graph must be one of {', '.join(GRAPHS)}, got {graph!r}")
    G, positions = len(molecules), molecules.node_pos.astype(np.float32)
    node_offsets, bond_offsets = offsets(molecules.n_node), offsets(molecules.n_edge)
    local = np.dtype(np.uint8 if molecules.n_node.max() <= 256 else np.int32)
    blocks = [slice(start, min(start + BLOCK, G)) for start in range(0, G, BLOCK)]
    edge_parts: dict[str, list[np.ndarray]] = {"num_edges": [], "src": [], "dst": [], "bond_type": []}
    with tqdm(total=2 * G, desc=progress, unit="molecule", **bar_options(progress)) as bar:
        for block in blocks:
            nodes = slice(node_offsets[block.start], node_offsets[block.stop])
            bonds = slice(bond_offsets[block.start], bond_offsets[block.stop])
            part = _block_edges(
                molecules.n_node[block].astype(np.int64),
                positions[nodes],
                molecules.n_edge[block].astype(np.int64),
                molecules.src[bonds].astype(np.int64),
                molecules.dst[bonds].astype(np.int64),
                molecules.edge_attr[bonds].argmax(1).astype(np.uint8),
                graph,
                radius,
            )
            for (name, parts), values in zip(edge_parts.items(), part, strict=True):
                parts.append(values.astype(local) if name in ("src", "dst") else values)
            bar.update(block.stop - block.start)
        edges = {name: np.concatenate(parts) for name, parts in edge_parts.items()}

        edge_offsets = offsets(edges.pop("num_edges"))
        if graph == "radius" and not edge_offsets[-1]:
            raise ValueError(f"radius: no two atoms are closer than {radius} Å; bonds are 1 to 1.6 Å long")
        whole = {
            "node_offsets": node_offsets,
            "edge_offsets": edge_offsets,
            "node_attr": molecules.node_attr.astype(np.uint8),
            "positions": positions,
            **edges,
            "targets": molecules.targets.astype(np.float64),
        }
        arrays = {name: create(name, value.shape, value.dtype) for name, value in whole.items()}
        for name, value in whole.items():
            arrays[name][:] = value
        arrays["rotations"] = create("rotations", (len(edges["src"]), 3, 3), np.dtype(np.float32))
        for block in blocks:
            rows = slice(edge_offsets[block.start], edge_offsets[block.stop])
            first = np.repeat(node_offsets[block], np.diff(edge_offsets)[block])
            relative = positions[first + edges["dst"][rows]] - positions[first + edges["src"][rows]]
            arrays["rotations"][rows] = edge_frames(torch.from_numpy(relative)).numpy()
            bar.update(block.stop - block.start)
    return arrays


def _block_edges(n_node, positions, n_edge, src, dst, bond_type, graph: str, radius: float) -> tuple[np.ndarray, ...]:
    """Edges of some molecules; arguments are their bonds, indices int64.

    Returns:
        num_edges (B,), and for each edge src, dst within the molecule and the bond type.
    """
    if graph == "bonds":
        return n_edge, src, dst, bond_type
    num_pairs = n_node**2
    pair_offsets = offsets(num_pairs)
    first_pair, size = np.repeat(pair_offsets[:-1], num_pairs), np.repeat(n_node, num_pairs)  # (P,)
    i, j = np.divmod(np.arange(pair_offsets[-1]) - first_pair, size)  # every pair of atoms of a molecule, in this order
    wanted = i != j
    if graph == "radius":
        first = np.repeat(offsets(n_node)[:-1], num_pairs)
        relative = positions[first + j] - positions[first + i]
        wanted &= np.square(relative).sum(1) < radius**2
    types = np.full(len(i), NO_BOND, np.uint8)
    types[np.repeat(pair_offsets[:-1], n_edge) + src * np.repeat(n_node, n_edge) + dst] = bond_type
    num_edges = np.diff(offsets(wanted)[pair_offsets])
    return num_edges, i[wanted], j[wanted], types[wanted]


def split_molecules(targets_of_task: np.ndarray | Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Molecules for training, validation and test, drawn at random: QM9 in file order is sorted by size.

    Args:
        targets_of_task: (G,) the label to be predicted; where it is NaN, the molecule is left out.
        seed: of the permutation.

    Returns:
        {"train", "val", "test"}: 100,000, 18,000 and the rest; in this proportion of 130,831 if there are fewer.

    Raises:
        ValueError: so few molecules have the label that a split would be empty.
    """
    usable = np.flatnonzero(~np.isnan(np.asarray(targets_of_task)))
    share = min(1.0, len(usable) / sum(SPLIT.values()))
    ends = np.cumsum([round(share * SPLIT[split]) for split in ("train", "val")])
    order = np.random.RandomState(seed).permutation(usable)  # the generator whose stream NumPy promises to keep
    parts = dict(zip(SPLIT, np.split(order, ends)))
    if not all(len(part) for part in parts.values()):
        raise ValueError(f"expected at least 7 molecules whose label is known, got {len(usable)}")
    return {split: torch.from_numpy(part) for split, part in parts.items()}


def length_balanced_batches(num_edges: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """All molecules in random batches of nearly equal size that have about the same number of edges.

    From the longest molecules to the shortest, each batch gets one of a row of similar ones in turn, the batch with the
    fewest edges the longest of them.

    Args:
        num_edges: (G,) of the molecules to be divided.
        batch_size: the most molecules in a batch.
        generator: decides among molecules and batches of equal length.

    Returns:
        ceil(G / batch_size) index tensors into `num_edges`, each index once.
    """
    count = -(-len(num_edges) // batch_size)
    order = torch.randperm(len(num_edges), generator=generator)
    order = order[num_edges[order].argsort(descending=True, stable=True)]
    edges, batches = torch.zeros(count, dtype=torch.int64), []
    for row in order.split(count):
        place = torch.randperm(count, generator=generator)
        place = place[edges[place].argsort(stable=True)][: len(row)]  # (count,) the emptiest batch first
        edges[place] += num_edges[row]
        batches.append(torch.full((count,), -1).index_copy(0, place, row))
    return [batch[batch >= 0] for batch in torch.stack(batches, dim=1)]  # (count, rows)
