"""A point cloud goes in, a vector for every point comes out, and turns as the cloud does.

python -m examples.point_cloud
"""

import torch

from se3_transformer.model import Fiber, SE3Transformer
from se3_transformer.model.neighbors import knn

torch.manual_seed(0)
positions, charges = torch.randn(200, 3), torch.randn(200, 1, 1)
layers = dict(num_layers=2, num_heads=2, channels_div=2)
model = SE3Transformer(
    fiber_in=Fiber({0: 1}), fiber_hidden=Fiber.create(3, 8), fiber_out=Fiber({1: 1}), return_type=1, **layers
)
vectors = model(knn(positions, k=8), {"0": charges}).squeeze(1)  # (200, 3)
turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # by 90 degrees about z
turned = model(knn(positions @ turn.T, k=8), {"0": charges}).squeeze(1)
error = (turned - vectors @ turn.T).norm() / vectors.norm()
print(f"vectors {tuple(vectors.shape)}; turning the cloud turns them, but for rounding: {error:.0e}")
