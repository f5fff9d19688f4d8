"""Refinement of a protein backbone inside a larger network: residues carry hidden states, and atoms move in rounds.

    python -m examples.refinement  # seconds

In every round the network sees hidden states and the atoms' places, updates the states, and moves the atoms of each
residue by vectors that it predicts. Gradients flow through all rounds and all geometry. Here it learns to restore
helices whose atoms have been displaced at random; put your own features, targets and loss in place of these.
"""

import torch
from torch import Tensor, nn

from se3_transformer.model import Fiber, SE3Transformer
from se3_transformer.model.neighbors import knn

NUM_RESIDUES, BATCH, NEIGHBORS, ROUNDS, CHANNELS, STEPS = 16, 4, 8, 3, 16, 31
NOISE = 0.7  # Å, of each coordinate of the first structure
ATOMS = torch.tensor([[1.58, -0.49, -0.86], [2.30, 0.0, 0.0], [1.66, 0.54, 1.06]])  # Å, N, CA, C about the helix axis z


class Refiner(nn.Module):
    """Moves the backbone atoms N, CA, C of residues in rounds; one SE(3)-Transformer for all rounds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, CHANNELS)  # types of residues
        self.along_chain = nn.Embedding(2 * NEIGHBORS + 1, CHANNELS)  # how far two residues are apart in the sequence
        self.transformer = SE3Transformer(
            num_layers=2,
            fiber_in=Fiber({0: CHANNELS, 1: 2}),  # hidden states; vectors from CA to N and to C
            fiber_hidden=Fiber.create(3, CHANNELS),
            fiber_out=Fiber({0: CHANNELS, 1: 3}),  # what is added to the states; how the three atoms move
            fiber_edge=Fiber({0: CHANNELS}),
            num_heads=4,
            channels_div=4,
        )
        nn.init.zeros_(self.transformer.graph_modules[-1].to_kernel_self["1"])  # the first moves are small
        self.norm = nn.LayerNorm(CHANNELS)

    def forward(self, residues: Tensor, atoms: Tensor, sizes: list[int]) -> Tensor:
        """Places of the atoms after each round.

        Args:
            residues: (N,) types.
            atoms: (N, 3, 3) places of N, CA, C in Å.
            sizes: residues of each protein.

        Returns:
            (ROUNDS, N, 3, 3)
        """
        hidden, path = self.embed(residues), []  # (N, C)
        for _ in range(ROUNDS):
            alpha = atoms[:, 1]  # (N, 3)
            graph = knn(alpha, NEIGHBORS, sizes)
            apart = (graph.dst - graph.src).clamp(-NEIGHBORS, NEIGHBORS) + NEIGHBORS
            node_feats = {"0": self.norm(hidden).unsqueeze(-1), "1": atoms[:, [0, 2]] - alpha[:, None]}
            out = self.transformer(graph, node_feats, {"0": self.along_chain(apart).unsqueeze(-1)})
            hidden, atoms = hidden + out["0"].squeeze(-1), atoms + out["1"]
            path.append(atoms)
        return torch.stack(path)


def helices(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Types (N,), displaced and true places (N, 3, 3) of ideal helices, each turned at random."""
    angle = torch.arange(NUM_RESIDUES) * torch.pi / 1.8  # 3.6 residues a turn
    cos, sin, rise = angle.cos(), angle.sin(), 1.5 * torch.arange(NUM_RESIDUES)  # Å
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    screw = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=1).view(-1, 3, 3)
    helix = ATOMS @ screw.mT + torch.stack([zero, zero, rise], dim=1)[:, None]  # (n, 3 atoms, 3)
    turns = torch.linalg.qr(torch.randn(number, 3, 3)).Q  # (B, 3, 3)
    turns = turns * torch.linalg.det(turns)[:, None, None]
    true = torch.einsum("nai,bji->bnaj", helix, turns).flatten(0, 1)
    return torch.randint(20, (len(true),)), true + NOISE * torch.randn_like(true), true


if __name__ == "__main__":
    torch.manual_seed(0)
    refiner, sizes = Refiner(), [NUM_RESIDUES] * BATCH
    optimizer = torch.optim.Adam(refiner.parameters(), lr=3e-3)
    for step in range(STEPS):
        residues, atoms, true = helices(BATCH)
        errors = (refiner(residues, atoms, sizes) - true).square().sum(dim=-1).mean(dim=(1, 2)).sqrt()  # (ROUNDS,)
        optimizer.zero_grad()
        errors.sum().backward()
        nn.utils.clip_grad_norm_(refiner.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            start = (atoms - true).square().sum(dim=-1).mean().sqrt()
            rounds = "  ".join(f"{error:.2f}" for error in errors.tolist())
            print(f"step {step:3}: RMSD at the start {start:.2f} Å, after each round {rounds} Å")
