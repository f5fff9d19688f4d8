"""A data set of your own, (positions, features, target) for every point cloud, trained with this project's trainer.

python -m examples.own_dataset  # seconds; checkpoints and logs in runs/own_dataset; run again, it only reports
"""

import torch

from se3_transformer.model import Fiber, SE3TransformerPooled
from se3_transformer.model.neighbors import fully_connected
from se3_transformer.runtime.checkpoint import load_checkpoint
from se3_transformer.runtime.trainer import Trainer

SETTINGS = dict(epochs=5, learning_rate=1e-2, final_learning_rate=1e-4, warmup_steps=20, weight_decay=0.0)
SETTINGS |= dict(max_grad_norm=1.0, ema_decay=0.9, accumulate=1, precision="float32", validate_every=1)
TRAIN, VALIDATION, TEST = torch.arange(1400).split([1000, 200, 200])


def make_cloud(size):
    """Points (n, 3), their charges (n, 1), and their energy per point, to be learned. Put your own data here."""
    positions, charges = 1.5 * torch.randn(size, 3), 2.0 * torch.randint(2, (size, 1)) - 1
    return positions, charges, (charges * charges.T / (1 + torch.cdist(positions, positions))).sum() / size


class CloudTask:  # what its methods are for: `se3_transformer.runtime.trainer.Task`
    def __init__(self, sizes):
        self.clouds = [make_cloud(size) for size in sizes]

    def batches(self, epoch):
        return TRAIN[torch.randperm(len(TRAIN), generator=torch.Generator().manual_seed(epoch))].split(32)

    def load(self, examples):
        positions, features, targets = zip(*(self.clouds[i] for i in examples))
        graph = fully_connected(torch.cat(positions), sizes=[len(cloud) for cloud in positions])
        return graph, torch.cat(features).unsqueeze(-1), torch.stack(targets)  # (N, 1, 1) and (B,)

    def loss(self, model, batch):
        graph, features, targets = batch
        error = model(graph, {"0": features}) - targets
        return error.square().mean(), {"mae": error.abs().mean()}

    def validate(self, model, examples=VALIDATION):
        _, means = self.loss(model, self.load(examples))
        return {"mae": means["mae"].item(), "selection": means["mae"].item()}

    def figures(self, model):
        return {}


if __name__ == "__main__":
    torch.manual_seed(0)
    task = CloudTask(torch.randint(4, 9, (1400,)))
    layers = dict(num_layers=2, num_heads=2, channels_div=2, tensor_cores=True)
    model = SE3TransformerPooled(Fiber({0: 1}), Fiber({0: 16}), Fiber({}), 2, 8, output_dim=1, pooling="avg", **layers)
    last, best = "runs/own_dataset/last.pt", "runs/own_dataset/best.pt"
    Trainer(model, task, SETTINGS, last, best, log_dir="runs/own_dataset", describe={}).train()
    model.load_state_dict(load_checkpoint(best)["model"])
    mae, targets = task.validate(model, TEST)["mae"], task.load(TEST)[2]
    print(f"test error {mae:.3f}; of the mean of the test set {(targets - targets.mean()).abs().mean():.3f}")
