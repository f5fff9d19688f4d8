from se3_transformer.model.layers.attention import AttentionBlockSE3, AttentionSE3
from se3_transformer.model.layers.convolution import ConvSE3, ConvSE3FuseLevel
from se3_transformer.model.layers.linear import LinearSE3
from se3_transformer.model.layers.norm import NormBiasSE3, NormSE3
from se3_transformer.model.layers.pooling import GPooling
from se3_transformer.model.layers.self_interaction import AttentiveSelfInteractionSE3

__all__ = [
    "AttentionBlockSE3",
    "AttentionSE3",
    "AttentiveSelfInteractionSE3",
    "ConvSE3",
    "ConvSE3FuseLevel",
    "GPooling",
    "LinearSE3",
    "NormBiasSE3",
    "NormSE3",
]
