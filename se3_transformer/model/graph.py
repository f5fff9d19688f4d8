"""The graph that the model works on: index tensors, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import dgl
    from torch_geometric.data import Data

MADE_HERE: Any = None  # default of what a graph that is made always has


@dataclass
class Graph:
    """A batch of directed graphs; messages run src -> dst.

    Node ids of the graphs of a batch follow each other, as do their edges; within a graph edges come in any order.

    Raises:
        TypeError: something else where a tensor is expected.
        ValueError: indices that are not whole numbers, lengths or devices that differ; on a CPU also node ids that are
            not there, and sizes that do not add up.
    """

    src: Tensor  # (E,) int64 node that sends
    dst: Tensor  # (E,) int64 node that receives
    rel_pos: Tensor | None = None  # (E, 3) pos[dst] - pos[src]
    num_nodes: int = MADE_HERE  # N; by default the sum of batch_num_nodes, else the highest id + 1
    batch_num_nodes: Tensor = MADE_HERE  # (B,) int64 nodes of each graph; by default one graph
    batch_num_edges: Tensor | None = None  # (B,) int64 edges of each graph; by default one graph

    def __post_init__(self):
        for name in ("src", "dst", "batch_num_nodes", "batch_num_edges"):
            if (index := getattr(self, name)) is not None or name in ("src", "dst"):
                check_index(f"Graph.{name}", index)
        self.src, self.dst = self.src.long(), self.dst.long()
        if self.src.shape != self.dst.shape:
            raise ValueError(f"Graph: src and dst differ in length, {len(self.src)} and {len(self.dst)}")
        if self.rel_pos is not None and not isinstance(self.rel_pos, Tensor):
            raise TypeError(f"Graph.rel_pos: expected a tensor (E, 3), got {type(self.rel_pos).__name__}")
        if self.rel_pos is not None and self.rel_pos.shape[:1] != self.src.shape:
            raise ValueError(f"Graph.rel_pos: expected {len(self.src)} rows, one per edge, got {len(self.rel_pos)}")
        for name, tensor in (("dst", self.dst), ("rel_pos", self.rel_pos)):
            if tensor is not None and tensor.device != self.src.device:
                raise ValueError(f"Graph.{name}: expected on {self.src.device} like src, got {tensor.device}")
        if self.num_nodes is None:
            if self.batch_num_nodes is not None:
                self.num_nodes = int(self.batch_num_nodes.sum())
            else:
                self.num_nodes = max((int(ends.max()) for ends in (self.src, self.dst) if len(ends)), default=-1) + 1
        if self.batch_num_nodes is None:
            self.batch_num_nodes = torch.full((1,), self.num_nodes, device=self.src.device)
        if torch.compiler.is_compiling():  # an exported model cannot branch on values and sizes
            return
        if self.batch_num_edges is None and self.num_graphs == 1:
            self.batch_num_edges = torch.full((1,), self.num_edges, device=self.src.device)
        if self.src.device.type == "cpu":  # elsewhere, looking at values would hold up the device
            self._check_values()

    def _check_values(self) -> None:
        """Raise ValueError unless ids are those of nodes and the sizes of the graphs add up."""
        for name in ("src", "dst"):
            ends = getattr(self, name)
            lowest, highest = (int(end) for end in ends.aminmax()) if len(ends) else (0, -1)
            if lowest < 0 or highest >= self.num_nodes:
                raise ValueError(
                    f"Graph.{name}: expected ids of {self.num_nodes} nodes, got ids from {lowest} to {highest}"
                )
        for name in ("batch_num_nodes", "batch_num_edges"):
            if (sizes := getattr(self, name)) is not None and (sizes < 0).any():
                raise ValueError(f"Graph.{name}: expected sizes >= 0, got {sizes.tolist()}")
        if (total := int(self.batch_num_nodes.sum())) != self.num_nodes:
            raise ValueError(f"Graph: batch_num_nodes add up to {total}, but num_nodes is {self.num_nodes}")
        if self.batch_num_edges is None:
            return
        if len(self.batch_num_edges) != len(self.batch_num_nodes):
            raise ValueError(
                "Graph: batch_num_nodes and batch_num_edges differ in length, "
                f"{len(self.batch_num_nodes)} and {len(self.batch_num_edges)}"
            )
        if (total := int(self.batch_num_edges.sum())) != len(self.src):
            raise ValueError(f"Graph: batch_num_edges add up to {total}, but there are {len(self.src)} edges")

    @property
    def num_edges(self) -> int:
        return self.src.shape[0]

    @property
    def num_graphs(self) -> int:
        return self.batch_num_nodes.shape[0]

    @property
    def device(self) -> torch.device:
        return self.src.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Graph:
        """The same graph with its tensors on another device."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def graph_of_node(self) -> Tensor:
        """(N,) int64 index of the graph that each node belongs to."""
        graphs = torch.arange(self.num_graphs, device=self.device)
        return graphs.repeat_interleave(self.batch_num_nodes.to(self.device), output_size=self.num_nodes)

    @staticmethod
    def from_positions(
        positions: Tensor, src: Tensor, dst: Tensor, sizes: Tensor | Sequence[int] | None = None
    ) -> Graph:
        """The graph of given edges; `rel_pos` is made from the positions, so that gradients flow to them.

        Args:
            positions: (N, 3).
            src, dst: (E,) ends of the edges.
            sizes: (B,) nodes of each graph, which follow each other; by default one graph.

        Raises:
            TypeError, ValueError: see `Graph`; positions of another shape, dtype or device.
        """
        check_positions(positions)
        sizes = MADE_HERE if sizes is None else torch.as_tensor(sizes, device=positions.device)
        graph = Graph(src, dst, num_nodes=len(positions), batch_num_nodes=sizes)
        if graph.device != positions.device:
            raise ValueError(f"Graph.src: expected on {positions.device} like the positions, got {graph.device}")
        graph.rel_pos = positions[graph.dst] - positions[graph.src]
        return graph

    @staticmethod
    def batch(graphs: Sequence[Graph]) -> Graph:
        """Graphs, or batches of them, one after the other in one batch, as the collate function of a DataLoader does.

        Raises:
            ValueError: no graph, or `rel_pos` of some of them alone.
        """
        if not graphs or len({graph.rel_pos is None for graph in graphs}) > 1:
            raise ValueError(f"Graph.batch: expected graphs all with rel_pos or all without, got {len(graphs)} graphs")
        first = 0  # id of the first node of a graph
        parts: dict[str, list[Any]] = {field.name: [] for field in fields(Graph)}
        for graph in graphs:
            for name, values in parts.items():
                value = getattr(graph, name)
                values.append(value + first if name in ("src", "dst") else value)
            first += graph.num_nodes
        del parts["num_nodes"]
        joined: dict[str, Any] = {
            name: None if any(value is None for value in values) else torch.cat(values)
            for name, values in parts.items()
        }
        return Graph(num_nodes=first, **joined)

    @staticmethod
    def from_pyg(data: Data) -> Graph:
        """The graph of a PyG `Data` or `Batch`, or of anything with the same attributes; PyG is not needed.

        They are `edge_index` (2, E), src and dst; `rel_pos` (E, 3), or `pos` (N, 3) to make it from; of a batch also
        `ptr` (B + 1,) or `batch` (N,).

        Raises:
            TypeError, ValueError: see `Graph`; an `edge_index` of another shape, or a `batch` that is not sorted.
        """
        edges, positions, rel_pos = data.edge_index, getattr(data, "pos", None), getattr(data, "rel_pos", None)
        if not isinstance(edges, Tensor) or edges.ndim != 2 or len(edges) != 2:
            came = tuple(edges.shape) if isinstance(edges, Tensor) else type(edges).__name__
            raise ValueError(f"edge_index: expected an integer tensor (2, E), got {came}")
        sizes = MADE_HERE
        if (starts := getattr(data, "ptr", None)) is not None:
            sizes = starts.diff()
        elif (graphs := getattr(data, "batch", None)) is not None:
            if (graphs.diff() < 0).any():
                raise ValueError("batch: expected the nodes of each graph to follow each other, but it is not sorted")
            sizes = graphs.bincount(minlength=int(getattr(data, "num_graphs", None) or 0))  # the last may be empty
        src, dst = edges
        if rel_pos is None and positions is not None:
            return Graph.from_positions(positions, src, dst, sizes)
        return Graph(src, dst, rel_pos=rel_pos, num_nodes=data.num_nodes, batch_num_nodes=sizes)

    @staticmethod
    def from_dgl(graph: dgl.DGLGraph) -> Graph:
        """The graph of a `dgl.DGLGraph` (batched or not) with one node and one edge type; edata['rel_pos'] is kept."""
        src, dst = graph.edges()
        return Graph(
            src=src,
            dst=dst,
            rel_pos=graph.edata.get("rel_pos"),
            num_nodes=graph.num_nodes(),
            batch_num_nodes=graph.batch_num_nodes(),
            batch_num_edges=graph.batch_num_edges(),
        )

    def to_dgl(self) -> dgl.DGLGraph:
        """The same batch as a `dgl.DGLGraph` with edata['rel_pos'].

        Raises:
            ImportError: DGL is not installed.
            ValueError: a batch of several graphs without `batch_num_edges`.
        """
        import dgl

        if self.batch_num_edges is None:
            raise ValueError("Graph.to_dgl: batch_num_edges is needed for a batch of several graphs")
        graph = dgl.graph((self.src, self.dst), num_nodes=self.num_nodes)
        graph.set_batch_num_nodes(self.batch_num_nodes)
        graph.set_batch_num_edges(self.batch_num_edges)
        if self.rel_pos is not None:
            graph.edata["rel_pos"] = self.rel_pos
        return graph


def as_graph(graph: Graph | dgl.DGLGraph | Data) -> Graph:
    """What callers pass as a graph, as a `Graph`; neither DGL nor PyG is imported for that.

    Raises:
        TypeError: none of these.
    """
    if isinstance(graph, Graph):
        return graph
    if hasattr(graph, "batch_num_nodes") and hasattr(graph, "edges") and hasattr(graph, "edata"):
        return Graph.from_dgl(graph)
    if hasattr(graph, "edge_index"):
        return Graph.from_pyg(graph)
    raise TypeError(
        "graph: expected a dgl.DGLGraph, a PyG Data or Batch, or a se3_transformer.model.Graph (from tensors: "
        f"Graph.from_positions), got {type(graph).__name__}"
    )


def check_index(name: str, index: Tensor) -> None:
    """Raise unless index is an integer tensor with one axis."""
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: expected an integer tensor, got {type(index).__name__}")
    if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: expected an integer tensor with one axis, got {index.dtype} {tuple(index.shape)}")


def check_positions(positions: Tensor) -> None:
    """Raise TypeError unless positions are a tensor, ValueError unless it is a floating point one (N, 3)."""
    if not isinstance(positions, Tensor):
        raise TypeError(
            f"positions: expected a tensor (N, 3), got {type(positions).__name__}: torch.as_tensor makes one"
        )
    if positions.ndim != 2 or positions.shape[1] != 3 or not positions.is_floating_point():
        raise ValueError(
            f"positions: expected a floating point tensor (N, 3), got {positions.dtype} {tuple(positions.shape)}"
        )
