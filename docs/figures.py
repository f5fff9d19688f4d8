"""Draws the figures of the documentation that show no results.

python -m docs.figures  # docs/architecture.svg, docs/kernel.svg
"""

from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # made without pyplot: needs no display, nothing to close
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from se3_transformer.model.basis import clebsch_gordan, get_basis

NODES, EDGES, LEARNED, PLAIN = "#dbe9f6", "#fde5cf", "#dcefdc", "#f2f2f2"
DEGREES = range(4)


def main(directory: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "se3"  # the same figure is the same file
    for name, figure in (("architecture", architecture()), ("kernel", kernel())):
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None})


def architecture() -> Figure:
    """The network above, what a convolution does on each edge below."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-1, 111), ylim=(-2, 58))
    axes.axis("off")

    title(axes, 56, "Network")
    box(axes, 0, 27, 15, 24, "node features\n{l: (N, C, 2l+1)}", NODES)
    frame(axes, 20, 25.5, 58, 28, "attention block, num_layers times")
    box(axes, 22, 42, 15, 8, "ConvSE3\nkeys, values", LEARNED)
    box(axes, 22, 32, 15, 8, "LinearSE3\nqueries", LEARNED)
    box(axes, 41, 36, 13, 10, "softmax over\nincoming edges,\nsum", PLAIN)
    box(axes, 57, 36, 9, 10, "LinearSE3", LEARNED)
    box(axes, 68, 36, 8.5, 10, "NormSE3", LEARNED)
    box(axes, 82, 36, 11, 10, "last ConvSE3,\nsum", LEARNED)
    box(axes, 97, 36, 12, 10, "outputs, or\npooled per\ngraph", NODES)
    for start, end in (
        ((15, 46), (22, 46)), ((15, 36), (22, 36)), ((37, 46), (41, 43)), ((37, 36), (41, 39)),
        ((54, 41), (57, 41)), ((66, 41), (68, 41)), ((76.5, 41), (82, 41)), ((93, 41), (97, 41)),
    ):  # fmt: skip
        arrow(axes, start, end)
    arrow(axes, (15, 28.5), (61.5, 36), "angle,angleA=0,angleB=90,rad=8")
    axes.text(48, 29.8, "inputs, concatenated", ha="center", va="center", fontsize=8, color="0.3")

    title(axes, 22, "A convolution, on each edge")
    box(axes, 0, 9, 15, 8, "features of\nthe source", NODES)
    box(axes, 20, 9, 15, 8, "rotate into the\nedge frame", PLAIN)
    frame(axes, 40, 7.5, 33, 13, "for every |m|, all degrees and channels at once")
    box(axes, 44, 9, 25, 8, "coefficients × hidden layer × x$_m$", LEARNED)
    box(axes, 78, 9, 13, 8, "rotate back", PLAIN)
    box(axes, 96, 9, 13, 8, "message", EDGES)
    box(axes, 0, -1, 15, 6, "pos[dst] - pos[src]", EDGES)
    box(axes, 20, -1, 15, 6, "Wigner blocks,\nonce per graph", PLAIN)
    box(axes, 44, -1, 25, 6, "radial network of\ndistance and edge scalars", LEARNED)
    for start, end in (
        ((15, 13), (20, 13)), ((35, 13), (44, 13)), ((69, 13), (78, 13)), ((91, 13), (96, 13)), ((15, 2), (20, 2)),
        ((27.5, 5), (27.5, 9)), ((56.5, 5), (56.5, 9)),
    ):  # fmt: skip
        arrow(axes, start, end)
    return figure


def title(axes: Axes, y: float, text: str) -> None:
    axes.text(0, y, text, fontsize=13, weight="bold", va="center")


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    patch = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1", fc=color, ec="0.35", lw=0.9)
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def frame(axes: Axes, x: float, y: float, width: float, height: float, text: str) -> None:
    patch = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1", fc="none", ec="0.5", ls="--")
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height - 1.8, text, ha="center", va="center", fontsize=9, color="0.3")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: str = "arc3") -> None:
    patch = FancyArrowPatch(start, end, connectionstyle=bend, arrowstyle="-|>", mutation_scale=11, color="0.25")
    axes.add_patch(patch)


def kernel() -> Figure:
    """Which entries of the kernel between degrees 0 … 3 are not zero, in any direction and along the polar axis."""
    torch.manual_seed(0)
    directions = {"an edge in any direction": torch.randn(1, 3), "the same in the frame of the edge": torch.eye(3)[1:2]}
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    labels = [f"{m:+d}" if m else "0" for degree in DEGREES for m in range(-degree, degree + 1)]
    kernels = {
        name: torch.cat([torch.cat([pair(direction, i, o) for i in DEGREES], dim=1) for o in DEGREES])  # (16, 16)
        for name, direction in directions.items()
    }
    limit = max(values.abs().max().item() for values in kernels.values())
    for axes, (name, values) in zip(figure.subplots(1, 2), kernels.items()):
        axes.imshow(values.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
        axes.set(title=f"{name}: {int((values.abs() > 1e-6).sum())} numbers", xlabel="m in", ylabel="m out")
        axes.set_xticks(range(16), labels, fontsize=7)
        axes.set_yticks(range(16), labels, fontsize=7)
        for edge in (0.5, 3.5, 8.5):
            axes.axhline(edge, color="0.4", lw=0.7)
            axes.axvline(edge, color="0.4", lw=0.7)
    return figure


def pair(direction: torch.Tensor, degree_in: int, degree_out: int) -> torch.Tensor:
    """(M_out, M_in) kernel of a pair of degrees, with radial weights 1, for a direction (1, 3)."""
    total = torch.zeros(2 * degree_out + 1, 2 * degree_in + 1, dtype=torch.float64)
    for J in range(abs(degree_in - degree_out), degree_in + degree_out + 1):
        harmonics = get_basis(direction.double(), J)[str(J)][0, :, J]  # D_J of the polar axis: Y_J up to a factor
        total += (2 * J + 1) ** 0.5 * torch.einsum("m,mio->oi", harmonics, clebsch_gordan(J, degree_in, degree_out))
    return total


if __name__ == "__main__":
    main(Path(__file__).parent)
