"""The Tensor Field Network (Thomas et al. 2018): convolutions without attention, for comparison."""

from __future__ import annotations

from torch import nn

from se3_transformer.model.fiber import Fiber
from se3_transformer.model.layers import ConvSE3
from se3_transformer.model.layers.convolution import Aggregation, SelfInteractionPer
from se3_transformer.model.layers.norm import NormType
from se3_transformer.model.layers.pooling import Pooling
from se3_transformer.model.layers.relative_position import RelativePosition
from se3_transformer.model.layers.self_interaction import SelfInteraction
from se3_transformer.model.transformer import EquivariantNetwork, Sequential, fuse_level, nonlinearity


class TensorFieldNetwork(EquivariantNetwork):
    """Tensor Field Network on a 3D graph: what `SE3Transformer` is without attention, called in the same way.

    A layer is a convolution with self-interaction and, except for the last, a nonlinearity. Arguments mean what they
    mean for `SE3Transformer`, but `self_interaction`, `aggregation` and `self_interaction_per` are those of all layers.

    Args:
        num_layers: hidden layers.
        self_interaction_per: 'node' by default, as in the paper.

    Raises:
        ValueError: options that do not fit each other.
    """

    def __init__(
        self,
        num_layers: int,
        fiber_in: Fiber,
        fiber_hidden: Fiber,
        fiber_out: Fiber,
        fiber_edge: Fiber = Fiber({}),  # noqa: B008 (a Fiber is never modified)
        return_type: int | None = None,
        pooling: Pooling | None = None,
        norm: bool = True,
        use_layer_norm: bool = True,
        tensor_cores: bool = False,
        low_memory: bool = False,
        *,
        norm_type: NormType = "norm",
        norm_softening: float = 0.0,
        self_interaction: SelfInteraction = "linear",
        relative_pos: RelativePosition | None = None,
        aggregation: Aggregation = "sum",
        self_interaction_per: SelfInteractionPer = "node",
    ):
        super().__init__(num_layers, fiber_in, fiber_hidden, fiber_out, fiber_edge, return_type, pooling, relative_pos)
        fibers = [fiber_in, *[fiber_hidden] * num_layers, fiber_out]
        modules: list[nn.Module] = []
        for fiber, fiber_next in zip(fibers, fibers[1:]):
            modules.append(
                ConvSE3(
                    fiber,
                    fiber_next,
                    fiber_edge,
                    use_layer_norm=use_layer_norm,
                    self_interaction=self_interaction,
                    max_degree=self.max_degree,
                    fuse_level=fuse_level(tensor_cores, low_memory),
                    low_memory=low_memory,
                    relative_pos=relative_pos,
                    aggregation=aggregation,
                    self_interaction_per=self_interaction_per,
                )
            )
            modules += nonlinearity(norm, norm_type, norm_softening, fiber_next)
        self.graph_modules = Sequential(*modules[: len(modules) - norm])
