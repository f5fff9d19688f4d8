"""Ours against the dense-basis yardstick (benchmarks/yardstick.py) on the CPU: time, memory, accuracy.

    python -m benchmarks.step                                            # everything
    python -m benchmarks.step --parts convolution,nbody --rounds 3       # some of it
    python -m benchmarks.step --parts bonded --tensor_cores true         # one radial network for all pairs of degrees

Parts:
    convolution  forward and backward of one convolution, 1,184 edges, C = 32, degrees 0 … 3
    bonded       training step of the QM9 network, 32 molecules of 18 atoms, 1,184 edges
    directed     the same with other edge features for i -> j than for j -> i, so that the two share no radial weights
    complete     as bonded, but on 16 molecules, fully connected, 4,896 edges
    large        training step of the QM9 network on one graph of 4,000 nodes, 32 neighbours each; ours alone
    nbody        training step of an N-body network, 128 × 5 particles, 2,560 edges
    protein      training step of a network as protein design programs have it, 300 residues, 19,200 edges
    scaling      forward and backward of the convolution on 1,024 … 65,536 edges: time and memory per edge
    accuracy     errors of values and gradients against float64, on as many random graphs as there are rounds

All implementations of a part take turns, A B A B …, and medians are compared. Memory is the most that lives in a step
above parameters, gradients and optimiser state.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from easydict import EasyDict
from torch import Tensor, nn

from benchmarks.measure import header, interleaved, peak_bytes, precision, table
from benchmarks.molecules import equal_molecules, synthetic_dataset
from benchmarks.yardstick import dense, dense_bases
from se3_transformer.model import Fiber, Graph, SE3Transformer, SE3TransformerPooled
from se3_transformer.model.basis import get_basis
from se3_transformer.model.graph import as_graph
from se3_transformer.model.layers import ConvSE3, ConvSE3FuseLevel
from se3_transformer.model.neighbors import knn
from se3_transformer.model.transformer import get_populated_edge_features
from se3_transformer.runtime.settings import parse_settings, require

if TYPE_CHECKING:
    import dgl

CPU = torch.device("cpu")
NODE_DEGREE = 2  # edges per node of the convolution, as in molecules with bonds as edges
NEIGHBOURS = 32  # edges per node of the large graph
RESIDUE_NEIGHBOURS = 64  # edges per residue of the protein
DESIGN_STEPS = 10  # training steps of the protein network, beside those that are timed

SETTINGS = EasyDict(
    parts="convolution,bonded,directed,complete,large,nbody,protein,scaling,accuracy",  # what to measure
    precisions="float32,bf16",  # of both implementations
    threads=2,  # CPU threads
    rounds=5,  # of which the median counts, after one that does not
    tensor_cores=False,  # let all pairs of degrees share one radial network
    num_layers=7,  # of the QM9 network
    num_channels=32,  # of the QM9 network and of the convolution
    num_heads=8,  # of the QM9 network
    molecules=32,  # bonded; half as many fully connected
    nodes=4000,  # of the large graph
    simulations=128,  # of five particles
    residues=300,  # of a protein, with 64 neighbours each
    edges="1024,4096,16384,65536",  # of the convolution, part scaling
    max_gib=8.0,  # part scaling leaves the yardstick out where it would need more memory
)


def main() -> None:
    settings = parse_settings(SETTINGS, {}, __doc__, check)
    torch.set_num_threads(settings.threads)
    print(f"{header(CPU)}\n")
    for part in settings.parts.split(","):
        torch.manual_seed(0)
        print(f"{PARTS[part](settings)}\n", flush=True)


def check(settings: EasyDict) -> None:
    """Raise ValueError for settings that make no sense."""
    positive = ("threads", "nodes", "rounds", "num_layers", "num_channels", "num_heads", "molecules", "simulations")
    require(settings, dict.fromkeys(positive, 1) | {"residues": 2, "max_gib": 0})
    for part in settings.parts.split(","):
        if part not in PARTS:
            raise ValueError(f"parts: expected some of {', '.join(PARTS)}, got {part!r}")


# ------------------------------------------------------------------------------------------------------------- parts


def convolution(settings: EasyDict) -> str:
    title = f"Convolution, forward + backward, 1,184 edges, C = {settings.num_channels}, degrees 0 … 3"
    return comparison(title, settings, convolution_steps(settings, 1184))


def bonded(settings: EasyDict) -> str:
    return qm9_comparison(settings, settings.molecules, "bonds")


def directed(settings: EasyDict) -> str:
    return qm9_comparison(settings, settings.molecules, "bonds", directed=True)


def complete(settings: EasyDict) -> str:
    return qm9_comparison(settings, max(1, settings.molecules // 2), "complete")


def large(settings: EasyDict) -> str:
    """Time and memory of one step, with and without low_memory, after one that does not count."""
    positions = torch.randn(settings.nodes, 3)
    graph = knn(positions, NEIGHBOURS)
    inputs = (
        graph,
        {"0": torch.randn(graph.num_nodes, 6, 1)},
        {"0": torch.randn(graph.num_edges, 4, 1)},
    )
    rows, kind = [], settings.precisions.split(",")[0]
    for low_memory in (False, True):
        step = training_steps(qm9_network(settings, low_memory), inputs, settings)[f"ours {kind}"]
        (seconds,) = interleaved({"step": step}, 1)["step"]
        rows.append([f"ours, low_memory={low_memory}", f"{seconds:.1f}", f"{peak_bytes(step, CPU) / 2**30:.2f}"])
    title = f"QM9 network, training step, {graph.num_nodes:,} nodes, {graph.num_edges:,} edges"
    return f"### {title}\n\n{table(['', 's', 'peak GiB'], rows)}"


def nbody(settings: EasyDict) -> str:
    """Four layers, 8 channels of four degrees, channels_div 4, on fully connected particles with charge, velocity."""
    network = SE3Transformer(
        num_layers=4,
        fiber_in=Fiber({0: 1, 1: 1}),
        fiber_hidden=Fiber.create(4, 8),
        fiber_out=Fiber({1: 2}),
        num_heads=2,
        channels_div=4,
        fiber_edge=Fiber({0: 1}),
        tensor_cores=settings.tensor_cores,
    )
    inputs = nbody_inputs(settings.simulations)
    title = f"N-body network, training step, {settings.simulations} × 5 particles, {inputs[0].num_edges:,} edges"
    return comparison(title, settings, training_steps(network, inputs, settings))


def protein(settings: EasyDict) -> str:
    """Two layers, 32 channels of three degrees, weights by name, a DGL graph; and the loss over ten steps."""
    inputs = protein_inputs(settings.residues)
    targets = torch.randn(settings.residues, 32, 1), torch.randn(settings.residues, 2, 3)
    steps = training_steps(
        ProteinDesign(), inputs, settings, lambda out: mean_square([x - y for x, y in zip(out, targets, strict=True)])
    )
    rows, kind = [], settings.precisions.split(",")[0]
    for name in ("ours", "yardstick"):
        losses = [steps[f"{name} {kind}"]() for _ in range(DESIGN_STEPS)]
        rows.append([f"{name} {kind}", f"{losses[0]:.6f}", f"{losses[-1]:.6f}"])
    title = f"Protein design network, training step, {settings.residues} residues, {len(inputs[2]['0']):,} edges"
    learned = table(["loss", "step 1", f"step {DESIGN_STEPS}"], rows)
    return f"{comparison(title, settings, steps)}\n\n{learned}"


def scaling(settings: EasyDict) -> str:
    """Time and memory of the convolution per edge; the yardstick in float32 alone."""
    rows, bytes_per_edge = [], 0.0
    for num_edges in map(int, settings.edges.split(",")):
        steps = convolution_steps(settings, num_edges)
        steps.pop("yardstick bf16", None)
        if bytes_per_edge * num_edges > settings.max_gib * 2**30:
            steps.pop("yardstick float32")
        seconds = interleaved(steps, settings.rounds)
        for name, step in steps.items():
            memory = peak_bytes(step, CPU) / num_edges
            if name.startswith("yardstick"):
                bytes_per_edge = memory
            microseconds = statistics.median(seconds[name]) / num_edges * 1e6
            rows.append([name, f"{num_edges:,}", f"{microseconds:.0f}", f"{memory / 1024:.1f}"])
    title = f"Convolution, forward + backward, C = {settings.num_channels}, degrees 0 … 3"
    return f"### {title}\n\n{table(['', 'edges', 'µs per edge', 'KiB per edge'], rows)}"


def accuracy(settings: EasyDict) -> str:
    """Relative errors ‖x - x64‖ / ‖x64‖ of values and gradients, x64 by ours in float64, and how ours compare."""
    errors: dict[str, list[list[float]]] = {}  # of an implementation: for each graph that of values, gradients …
    for _ in range(settings.rounds):
        network, inputs = qm9_network(settings), qm9_inputs(4, "bonds")
        conv, conv_inputs = build_convolution(settings), convolution_inputs(settings.num_channels, 256)
        for what, model, arguments, call in (
            ("convolution", conv, conv_inputs, call_convolution),
            ("QM9 network", network, inputs, call_network),
        ):
            exact = values_and_gradients(model.double(), [to_double(x) for x in arguments], call, "float32")
            for name, implementation in implementations(model.float()).items():
                for kind in settings.precisions.split(","):
                    found = values_and_gradients(implementation, arguments, call, kind)
                    of_graph = [relative_error(found[key], exact[key]) for key in exact]
                    errors.setdefault(f"{what}, {name} {kind}", []).append(of_graph)
    rows = []
    for name, of_graphs in errors.items():
        rows.append([name, *(f"{statistics.median(of_kind):.1e}" for of_kind in zip(*of_graphs, strict=True))])
    for name in [name for name in errors if "ours" in name]:
        pairs = zip(errors[name], errors[name.replace("ours", "yardstick")], strict=True)
        ratios = zip(*([a / b for a, b in zip(*pair, strict=True)] for pair in pairs), strict=True)  # of each column
        cells = (f"{statistics.median(of_kind):.2f}, {sum(r < 1 for r in of_kind)} below 1" for of_kind in ratios)
        rows.append([name.replace("ours", "ours / yardstick"), *cells])
    columns = ["relative error", "values", "gradient: features", "positions", "parameters"]
    title = f"Accuracy against float64, median of {settings.rounds} random graphs and weights"
    return f"### {title}\n\n{table(columns, rows)}"


PARTS = {
    part.__name__: part for part in (convolution, bonded, directed, complete, large, nbody, protein, scaling, accuracy)
}


# ------------------------------------------------------------------------------------------------ networks and inputs


def qm9_network(settings: EasyDict, low_memory: bool = False) -> SE3TransformerPooled:
    channels = settings.num_channels
    return SE3TransformerPooled(
        fiber_in=Fiber({0: 6}),
        fiber_out=Fiber({0: 4 * channels}),
        fiber_edge=Fiber({0: 4}),
        num_degrees=4,
        num_channels=channels,
        output_dim=1,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        channels_div=2,
        tensor_cores=settings.tensor_cores,
        low_memory=low_memory,
    )


def qm9_inputs(num_molecules: int, graph: str) -> tuple[Graph, dict, dict]:
    """Graph, node features, edge features."""
    batch = synthetic_dataset(equal_molecules(num_molecules), graph).batch(torch.arange(num_molecules))
    return batch.graph, batch.node_feats, batch.edge_feats


def nbody_inputs(simulations: int, particles: int = 5) -> tuple[Graph, dict, dict]:
    N = simulations * particles
    pairs = (~torch.eye(particles, dtype=torch.bool)).nonzero()  # (20, 2)
    src, dst = (pairs + particles * torch.arange(simulations)[:, None, None]).flatten(0, 1).T
    positions, charges = torch.randn(N, 3), torch.randn(N, 1, 1).sign()
    sizes = torch.full((simulations,), particles)
    graph = Graph(src, dst, positions[dst] - positions[src], batch_num_nodes=sizes)
    return graph, {"0": charges, "1": torch.randn(N, 1, 3)}, {"0": charges[src] * charges[dst]}


class ProteinDesign(nn.Module):
    """How protein design programs hold the model: they initialise weights by name, outputs with zeros."""

    def __init__(self):
        super().__init__()
        self.se3 = SE3Transformer(
            num_layers=2,
            fiber_in=Fiber({0: 32, 1: 3}),
            fiber_hidden=Fiber.create(3, 32),
            fiber_out=Fiber({0: 32, 1: 2}),
            num_heads=4,
            channels_div=4,
            fiber_edge=Fiber({0: 32}),
            use_layer_norm=True,
        )
        for name, parameter in self.se3.named_parameters():
            if "bias" in name or "radial_func.net.6" in name or "to_kernel_self" in name:
                nn.init.zeros_(parameter)
            elif "radial_func" in name and parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")

    def forward(self, graph: Graph | dgl.DGLGraph, node_feats: dict, edge_feats: dict) -> dict[str, Tensor]:
        return self.se3(as_graph(graph), node_feats, edge_feats)  # the yardstick takes no other


def protein_inputs(residues: int) -> tuple[Graph | dgl.DGLGraph, dict, dict]:
    """A random chain, a residue every 3.8 Å, each joined to its nearest; a DGL graph where DGL is installed."""
    positions = 3.8 * nn.functional.normalize(torch.randn(residues, 3), dim=1).cumsum(dim=0)
    graph = knn(positions, RESIDUE_NEIGHBOURS)
    node_feats = {"0": torch.randn(residues, 32, 1), "1": torch.randn(residues, 3, 3)}
    edge_feats = {"0": torch.randn(graph.num_edges, 32, 1)}
    return graph.to_dgl() if find_spec("dgl") else graph, node_feats, edge_feats


def build_convolution(settings: EasyDict) -> ConvSE3:
    fiber = Fiber.create(4, settings.num_channels)
    fuse_level = ConvSE3FuseLevel.FULL if settings.tensor_cores else ConvSE3FuseLevel.PARTIAL
    return ConvSE3(fiber, fiber, Fiber({0: 4}), pool=False, use_layer_norm=True, max_degree=3, fuse_level=fuse_level)


def convolution_inputs(channels: int, num_edges: int) -> tuple[Graph, dict, dict]:
    N = num_edges // NODE_DEGREE
    src, shift = torch.randint(N, (num_edges,)), torch.randint(1, N, (num_edges,))
    graph = Graph(src, (src + shift) % N, torch.randn(num_edges, 3), num_nodes=N)
    return graph, {str(l): torch.randn(N, channels, 2 * l + 1) for l in range(4)}, {"0": torch.randn(num_edges, 4, 1)}


# -------------------------------------------------------------------------------------------------------------- steps


def implementations(model: nn.Module) -> dict[str, nn.Module]:
    return {"ours": model, "yardstick": dense(model)}


def call_network(model: nn.Module, graph: Graph, node_feats: dict, edge_feats: dict) -> list[Tensor]:
    out = model(graph, node_feats, edge_feats)
    return list(out.values()) if isinstance(out, dict) else [out]


def call_convolution(conv: ConvSE3, graph: Graph, node_feats: dict, edge_feats: dict, basis=None) -> list[Tensor]:
    basis = basis_of(conv, graph.rel_pos) if basis is None else basis
    edge_feats = get_populated_edge_features(graph.rel_pos, edge_feats)
    return list(conv(node_feats, edge_feats, graph, basis).values())


def basis_of(conv: ConvSE3, relative_pos: Tensor) -> object:
    """The basis that an implementation of the convolution takes."""
    return (get_basis if type(conv) is ConvSE3 else dense_bases)(relative_pos, conv.max_degree)


def convolution_steps(settings: EasyDict, num_edges: int) -> dict[str, Callable[[], None]]:
    """Forward and backward, with gradients of parameters and node features; the basis is there already."""
    graph, node_feats, edge_feats = convolution_inputs(settings.num_channels, num_edges)
    node_feats = {l: x.requires_grad_() for l, x in node_feats.items()}
    steps = {}
    for name, conv in implementations(build_convolution(settings)).items():
        for kind in settings.precisions.split(","):
            with precision(kind, CPU.type):
                basis = basis_of(conv, graph.rel_pos)
            leaves = [*conv.parameters(), *node_feats.values()]

            def step(conv=conv, kind=kind, basis=basis, leaves=leaves) -> None:
                with precision(kind, CPU.type):
                    out = call_convolution(conv, graph, node_feats, edge_feats, basis)
                torch.autograd.backward(mean_square(out), inputs=leaves)

            steps[f"{name} {kind}"] = step
    return steps


def mean_square(tensors: list[Tensor]) -> Tensor:
    return torch.stack([x.float().square().mean() for x in tensors]).sum()


def training_steps(
    network: nn.Module, inputs: tuple, settings: EasyDict, loss_of: Callable[[list[Tensor]], Tensor] = mean_square
) -> dict[str, Callable[[], float]]:
    """Forward, backward and AdamW, which return the loss; each implementation has its own copy of the network."""
    steps = {}
    for name, model in implementations(network).items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        for kind in settings.precisions.split(","):

            def step(model=model, optimizer=optimizer, kind=kind) -> float:
                optimizer.zero_grad(set_to_none=False)  # gradients are not part of the memory that is measured
                with precision(kind, CPU.type):
                    out = call_network(model, *inputs)
                loss = loss_of(out)
                loss.backward()
                optimizer.step()
                return loss.item()

            steps[f"{name} {kind}"] = step
    return steps


def qm9_comparison(settings: EasyDict, num_molecules: int, graph: str, directed: bool = False) -> str:
    inputs = qm9_inputs(num_molecules, graph)
    if directed:
        inputs[2]["0"] += torch.rand_like(inputs[2]["0"])
    title = (
        f"QM9 network ({settings.num_layers} layers, {settings.num_channels} channels), training step, "
        f"{num_molecules} molecules, {graph}, {inputs[0].num_edges:,} {'directed ' if directed else ''}edges"
    )
    return comparison(title, settings, training_steps(qm9_network(settings), inputs, settings))


def comparison(title: str, settings: EasyDict, steps: dict[str, Callable[[], None]]) -> str:
    """Table of time and memory of every step, beside the yardstick in the same precision and in the first one."""
    seconds = {name: statistics.median(values) for name, values in interleaved(steps, settings.rounds).items()}
    memory = {name: peak_bytes(step, CPU) for name, step in steps.items()}
    first = settings.precisions.split(",")[0]
    rows = []
    for name in steps:
        same, base = f"yardstick {name.split()[1]}", f"yardstick {first}"
        rows.append(
            [
                name,
                f"{1e3 * seconds[name]:.0f}",
                f"{seconds[same] / seconds[name]:.2f}",
                f"{seconds[base] / seconds[name]:.2f}",
                f"{memory[name] / 2**20:.1f}",
                f"{memory[same] / memory[name]:.1f}",
            ]
        )
    columns = ["", "ms", "× yardstick", f"× yardstick {first}", "peak MiB", "of the yardstick 1 /"]
    return f"### {title}\n\n{table(columns, rows)}"


# ----------------------------------------------------------------------------------------------------------- accuracy


def to_double(value):
    """Graph or features in float64."""
    if isinstance(value, Graph):
        return replace(value, rel_pos=value.rel_pos.double())
    return {key: x.double() for key, x in value.items()}


def values_and_gradients(model: nn.Module, inputs: tuple, call: Callable, kind: str) -> dict[str, list[Tensor]]:
    """Outputs, and gradients of a fixed function of them with respect to features, positions and parameters."""
    graph, node_feats, edge_feats = inputs
    graph = replace(graph, rel_pos=graph.rel_pos.detach().clone().requires_grad_())
    node_feats = {l: x.detach().clone().requires_grad_() for l, x in node_feats.items()}
    with precision(kind, CPU.type):
        out = call(model, graph, node_feats, edge_feats)
    generator = torch.Generator().manual_seed(0)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in out)
    leaves = {"features": list(node_feats.values()), "positions": [graph.rel_pos], "parameters": [*model.parameters()]}
    gradients = iter(torch.autograd.grad(loss, sum(leaves.values(), []), materialize_grads=True))
    found = {name: [next(gradients) for _ in tensors] for name, tensors in leaves.items()}
    return {"values": [x.detach() for x in out]} | found


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    found, exact = (torch.cat([x.double().flatten() for x in tensors]) for tensors in (found, exact))
    return ((found - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
