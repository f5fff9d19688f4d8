"""The graph that the model works on: index tensors, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import dgl


@dataclass
class Graph:
    """A batch of directed graphs; messages run src -> dst.

    Node ids of the graphs of a batch follow each other, as do their edges; within a graph edges come in any order.
    """

    src: Tensor  # (E,) int64 node that sends
    dst: Tensor  # (E,) int64 node that receives
    rel_pos: Tensor | None = None  # (E, 3) pos[dst] - pos[src]
    num_nodes: int | None = None  # N; by default the sum of batch_num_nodes, else the highest id + 1
    batch_num_nodes: Tensor | None = None  # (B,) int64 nodes of each graph; by default one graph
    batch_num_edges: Tensor | None = None  # (B,) int64 edges of each graph; by default one graph

    def __post_init__(self):
        for name in ("src", "dst"):
            index = getattr(self, name)
            if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
                raise ValueError(
                    f"Graph.{name}: expected an integer tensor (E,), got {index.dtype} {tuple(index.shape)}"
                )
        if len(self.src) != len(self.dst):
            raise ValueError(f"Graph: src and dst differ in length, {len(self.src)} and {len(self.dst)}")
        if self.rel_pos is not None and len(self.rel_pos) != len(self.src):
            raise ValueError(f"Graph.rel_pos: expected {len(self.src)} rows, one per edge, got {len(self.rel_pos)}")
        if self.num_nodes is None:
            if self.batch_num_nodes is not None:
                self.num_nodes = int(self.batch_num_nodes.sum())
            else:
                self.num_nodes = max((int(ends.max()) for ends in (self.src, self.dst) if len(ends)), default=-1) + 1
        if self.batch_num_nodes is None:
            self.batch_num_nodes = torch.tensor([self.num_nodes], device=self.src.device)
        if self.batch_num_edges is None and len(self.batch_num_nodes) == 1:
            self.batch_num_edges = torch.tensor([len(self.src)], device=self.src.device)
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
        return len(self.src)

    @property
    def num_graphs(self) -> int:
        return len(self.batch_num_nodes)

    @property
    def device(self) -> torch.device:
        return self.src.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Graph:
        """The same graph with its tensors on another device."""
        moved = {
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
    def from_dgl(graph: dgl.DGLGraph) -> Graph:
        """The graph of a `dgl.DGLGraph` (batched or not) with one node and one edge type; edata['rel_pos'] is kept."""
        src, dst = graph.edges()
        return Graph(
            src=src.long(),
            dst=dst.long(),
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


def as_graph(graph: Graph | dgl.DGLGraph) -> Graph:
    """What callers pass as a graph, as a `Graph`.

    Raises:
        TypeError: neither a `Graph` nor a `dgl.DGLGraph`.
    """
    if isinstance(graph, Graph):
        return graph
    if (
        hasattr(graph, "batch_num_nodes") and hasattr(graph, "edges") and hasattr(graph, "edata")
    ):  # without importing DGL
        return Graph.from_dgl(graph)
    raise TypeError(f"graph: expected a dgl.DGLGraph or se3_transformer.model.Graph, got {type(graph).__name__}")
