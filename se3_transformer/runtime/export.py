"""A trained model as one file that runs without this package, by `torch.export`.

    export_model(model, "model.pt2")                      # here
    model = torch.export.load("model.pt2").module()       # anywhere with torch, this package not installed
    out = model(src, dst, rel_pos, node_feats, edge_feats, batch_num_nodes)

The file holds weights and operations, for any number of nodes, edges and graphs; gradients flow to all inputs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from se3_transformer.model.fiber import Fiber, degree_to_dim
from se3_transformer.model.graph import Graph
from se3_transformer.model.layers import native
from se3_transformer.model.transformer import EquivariantNetwork, SE3TransformerPooled


class TensorInputs(nn.Module):
    """A model that takes tensors in place of a graph, as an exported program does.

    Args:
        model: `SE3Transformer`, `SE3TransformerPooled`, or another model that is called like these.
    """

    def __init__(self, model: EquivariantNetwork | SE3TransformerPooled):
        super().__init__()
        self.model = model

    def forward(
        self,
        src: Tensor,
        dst: Tensor,
        rel_pos: Tensor,
        node_feats: dict[str, Tensor],
        edge_feats: dict[str, Tensor],
        batch_num_nodes: Tensor,
    ) -> dict[str, Tensor] | Tensor:
        """What the model returns for these edges.

        Args:
            src, dst: (E,) int64 nodes that send and receive.
            rel_pos: (E, 3) pos[dst] - pos[src].
            node_feats: {'l': (N, C, 2l+1)}.
            edge_feats: {'l': (E, C, 2l+1)} without the distance; {} for a model without edge features.
            batch_num_nodes: (B,) int64 nodes of each graph.
        """
        num_nodes = next(iter(node_feats.values())).shape[0]
        graph = Graph(src, dst, rel_pos, num_nodes=num_nodes, batch_num_nodes=batch_num_nodes)
        return self.model(graph, node_feats, edge_feats)


def export_model(model: EquivariantNetwork | SE3TransformerPooled, path: str | Path) -> None:
    """Write a model to a file that `torch.export.load` reads; see the top of this file.

    What the model checks of its inputs' values (ids, finite positions) the exported program does not check.

    Args:
        model: on the device and of the dtype that the program will run with.
        path: the file, usually named `*.pt2`.
    """
    program = TensorInputs(model)
    inputs = _example(model)
    rows = {0: Dim.DYNAMIC}  # of every tensor any number
    sizes = (rows, rows, rows, dict.fromkeys(inputs[3], rows), dict.fromkeys(inputs[4], rows), rows)
    with native.switched_off():  # compiled code cannot be recorded, nor can the making of constants
        program(*inputs)
    exported = torch.export.export(program, inputs, dynamic_shapes=sizes, strict=False).run_decompositions({})
    torch.export.save(_without_commas(exported), path)


def _example(model: EquivariantNetwork | SE3TransformerPooled) -> tuple:
    """Inputs of `TensorInputs` that fit the model: two graphs of three nodes and four edges each."""
    transformer = model.transformer if isinstance(model, SE3TransformerPooled) else model
    parameter = next(model.parameters())

    def features(fiber: Fiber, rows: int) -> dict[str, Tensor]:
        return {str(degree): parameter.new_ones(rows, channels, degree_to_dim(degree)) for degree, channels in fiber}

    src = torch.tensor([0, 1, 1, 2, 3, 4, 4, 5], device=parameter.device)
    dst = torch.tensor([1, 0, 2, 1, 4, 3, 5, 4], device=parameter.device)
    rel_pos = torch.arange(24, device=parameter.device, dtype=parameter.dtype).view(8, 3)
    rel_pos[0] = 0  # of length zero, or the constant for such edges would not be made
    batch_num_nodes = torch.tensor([3, 3], device=parameter.device)
    return src, dst, rel_pos, features(transformer.fiber_in, 6), features(transformer.fiber_edge, 8), batch_num_nodes


def _without_commas(exported: ExportedProgram) -> ExportedProgram:
    """The program without commas in the names of modules ("conv.0,1"), at which `torch.export.load` stumbles."""
    for node in exported.graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {
                key.replace(",", "_"): (name.replace(",", "_"), kind) for key, (name, kind) in stack.items()
            }
    return exported
