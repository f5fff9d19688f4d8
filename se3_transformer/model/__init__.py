from se3_transformer.model.fiber import Fiber
from se3_transformer.model.graph import Graph
from se3_transformer.model.transformer import SE3Transformer, SE3TransformerPooled

__all__ = ["Fiber", "Graph", "SE3Transformer", "SE3TransformerPooled"]
