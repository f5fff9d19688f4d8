"""Any fiber, graph and option: as the slow implementation, equivariant, in compiled code as in PyTorch.

python -m pytest tests/test_properties.py                               # the same few examples every time
python -m pytest tests/test_properties.py --hypothesis-profile thorough # thousands of new ones
"""

from __future__ import annotations

import pytest
import reference
import test_layers
import test_transformer
import torch
from battery import varied
from helpers import (
    assert_equivariant,
    assert_same,
    batched,
    gradients,
    random_rotation,
    random_sample,
    sample_with_edges,
)
from hypothesis import given
from hypothesis import strategies as st
from test_options import ConvOptionsBattery, OptionsBattery, slow_block
from test_tfn import TFNBattery

from se3_transformer.model.layers import ConvSE3FuseLevel, convolution, native

# Normalisation of lengths that hardly differ makes rounding errors up to 300 times larger in every layer.
TOLERANCE = 1e-8
SINGLE_TOLERANCE = 1e-3
# In single precision a ReLU may open on one way and not on the other, of a unit that is zero up to rounding.
SINGLE_TOLERANCE_OF_GRADIENTS = 3e-2

SEEDS = st.integers(0, 2**16)

# ------------------------------------------------------------------------------------------------ what goes in and out


def fibers(top, channels):
    """Any degrees up to `top`, each with its own number of channels, or all of them with the same."""
    uneven = st.dictionaries(st.integers(0, top), channels, min_size=1)
    return uneven | channels.map(lambda c: dict.fromkeys(range(top + 1), c))


def edge_fibers(top):
    return st.dictionaries(st.integers(0, top), st.integers(1, 2), max_size=2)


@st.composite
def graphs(draw, fiber_in, fiber_edge, max_edges):
    """One graph with any edges: also twice, from a node to itself, along the axes, of no length, to every node or none.

    In half of the graphs every edge is there both ways, with the same edge scalars.
    """
    num_nodes = draw(st.integers(1, 6))
    sample = random_sample(fiber_in, fiber_edge, nodes=(num_nodes,), edges=(0,), seed=draw(SEEDS))
    node = st.integers(0, num_nodes - 1)
    pairs = draw(st.lists(st.tuples(node, node), max_size=max_edges // 2))
    if both_ways := draw(st.booleans()):
        pairs += [(dst, src) for src, dst in pairs]
    if draw(st.booleans()):
        sample.pos = sample.pos.round()
    if draw(st.booleans()):
        for feature in sample.node_feats.values():
            feature[0] = 0
    sample = sample_with_edges(sample, pairs)
    if both_ways and 0 in fiber_edge:
        sample.edge_feats["0"] = sample.edge_feats["0"][: len(pairs) // 2].repeat(2, 1, 1)
    return sample


def samples(network, max_edges=8):
    one = graphs(network.fiber_in, network.fiber_edge, max_edges)
    return st.lists(one, min_size=1, max_size=3).map(batched)


# ------------------------------------------------------------------------------------------------------------ networks


class Drawn:
    """A battery (see tests/battery.py) with the attributes that were drawn."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in vars(self).items())})"


class Convolution(Drawn, ConvOptionsBattery):
    pass


class Block(Drawn, test_layers.AttentionBattery):
    def reference(self, state, sample):
        return slow_block(
            state,
            (self.fiber_in, self.fiber_out, self.fiber_edge),
            self.options["num_heads"],
            self.options["channels_div"],
            sample.node_feats,
            reference.with_distance(sample.edge_feats, sample.rel_pos),
            sample.edges,
            self.options,
            self.options["skip"],
            self.options["self_interaction"],
        )


class Transformer(Drawn, OptionsBattery):
    pass


class Pooled(Drawn, test_transformer.TestPooledModel):
    slow = OptionsBattery.slow


class TensorField(Drawn, TFNBattery):
    pass


def with_common_degree(draw, fiber, other, channels):
    """The fiber, with a degree of the other one if it has none of them."""
    return fiber if fiber.keys() & other.keys() else fiber | {draw(st.sampled_from(sorted(other))): draw(channels)}


def choices(draw, **names):
    """An option of each of the names."""
    return {option: draw(st.sampled_from(values)) for option, values in names.items()}


SELF_INTERACTION = ("linear", "attentive")
RELATIVE_POS = (None, "add", "cat")
CHANNELS = st.integers(1, 5)


def draw_fibers(draw, channels=CHANNELS, common=True):
    """Three fibers, of input, of a layer with these channels, of edges, and the highest degree that they may have."""
    top = draw(st.integers(0, 4))
    fiber_in, fiber_out = draw(fibers(top, CHANNELS)), draw(fibers(top, channels))
    if common:
        fiber_out = with_common_degree(draw, fiber_out, fiber_in, channels)
    return fiber_in, fiber_out, draw(edge_fibers(top)), top


@st.composite
def convolutions(draw):
    options = choices(
        draw,
        pool=(True, False),
        self_interaction=(False, *SELF_INTERACTION),
        use_layer_norm=(True, False),
        low_memory=(True, False),
        fuse_level=tuple(ConvSE3FuseLevel),
        relative_pos=RELATIVE_POS,
    )
    if options["pool"]:
        options |= choices(draw, aggregation=("sum", "mean"))
        if options["self_interaction"]:
            options |= choices(draw, self_interaction_per=("edge", "node"))
    fiber_in, fiber_out, fiber_edge, top = draw_fibers(draw, common=options["self_interaction"] == "attentive")
    return Convolution(
        fiber_in=fiber_in,
        fiber_out=fiber_out,
        fiber_edge=fiber_edge,
        max_degree=max(top, 1) if options["relative_pos"] else top,
        rows="nodes" if options["pool"] else "edges",
        options=options,
    )


@st.composite
def heads(draw):
    """num_heads, channels_div, and a strategy of channels that they fit, with a rest or without."""
    num_heads, channels_div = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rest = st.integers(0, channels_div - 1)
    channels = st.builds(lambda c, r: num_heads * channels_div * c + r, st.integers(1, 2), rest)
    return num_heads, channels_div, channels


def draw_skip(draw, fiber_in, fiber_out):
    """A skip connection for which there is room."""
    fits = all(fiber_in.get(degree, 0) <= channels for degree, channels in fiber_out.items())
    return draw(st.sampled_from(("cat", "sum") if fits else ("cat",)))


@st.composite
def blocks(draw):
    num_heads, channels_div, channels = draw(heads())
    options = choices(
        draw,
        use_layer_norm=(True, False),
        low_memory=(True, False),
        fuse_level=tuple(ConvSE3FuseLevel),
        relative_pos=RELATIVE_POS,
        self_interaction=SELF_INTERACTION,
    )
    fiber_in, fiber_out, fiber_edge, top = draw_fibers(draw, channels)
    options |= dict(num_heads=num_heads, channels_div=channels_div, skip=draw_skip(draw, fiber_in, fiber_out))
    return Block(
        fiber_in=fiber_in,
        fiber_out=fiber_out,
        fiber_edge=fiber_edge,
        max_degree=max(top, 1) if options["relative_pos"] else top,
        options=options,
    )


def model_options(draw):
    """Those that all models have."""
    options = choices(
        draw,
        norm=(True, False),
        use_layer_norm=(True, False),
        tensor_cores=(True, False),
        low_memory=(True, False),
        relative_pos=RELATIVE_POS,
        self_interaction=SELF_INTERACTION,
    )
    return (
        options | choices(draw, norm_type=("norm", "bias"), norm_softening=(0.0, 0.3)) if options["norm"] else options
    )


def last_convolution_options(draw):
    return choices(draw, aggregation=("sum", "mean"), self_interaction_per=("edge", "node"))


def transformer_options(draw):
    options = model_options(draw) | choices(
        draw,
        final_layer=("conv", "attention"),
        last_self_interaction=SELF_INTERACTION,
        populate_edge=("lin", "arcsin", "log", "zero"),
    )
    return options | last_convolution_options(draw) if options["final_layer"] == "conv" else options


def output_options(draw, fiber_out):
    """What is returned, and what its rows stand for."""
    options = choices(draw, return_type=(None, *fiber_out))
    if (degree := options["return_type"]) is None:
        return options, "nodes"
    options |= choices(draw, pooling=(None, "avg", "sum", *(("max",) if degree == 0 else ())))
    return options, "graphs" if options["pooling"] else "nodes"


def draw_model(draw, options, channels, common):
    """What a battery of models needs to know, with these options and channels of hidden layers.

    Args:
        common: whether input and hidden layers, and whether hidden layers and output, must have a degree in common.
    """
    fiber_in, fiber_hidden, fiber_edge, top = draw_fibers(draw, channels, common[0])
    fiber_out = draw(fibers(top, CHANNELS))
    if common[1]:
        fiber_out = with_common_degree(draw, fiber_out, fiber_hidden, CHANNELS)
    output, rows = output_options(draw, fiber_out)
    return dict(
        num_layers=draw(st.integers(1, 2)),
        fiber_in=fiber_in,
        fiber_hidden=fiber_hidden,
        fiber_out=fiber_out,
        fiber_edge=fiber_edge,
        options=options | output,
        rows=rows,
    )


@st.composite
def transformers(draw):
    num_heads, channels_div, channels = draw(heads())
    options = transformer_options(draw)
    keys_at_the_end = options["final_layer"] == "attention" or options["last_self_interaction"] == "attentive"
    model = draw_model(draw, options, channels, common=(True, keys_at_the_end))
    model["options"]["skip"] = draw_skip(draw, model["fiber_in"], model["fiber_hidden"])
    return Transformer(num_heads=num_heads, channels_div=channels_div, **model)


@st.composite
def pooled(draw):
    num_heads, channels_div, channels = draw(heads())
    top = draw(st.integers(0, 4))
    fiber_hidden = dict.fromkeys(range(top + 1), draw(channels))
    fiber_in = with_common_degree(draw, draw(fibers(top, CHANNELS)), fiber_hidden, CHANNELS)
    options = transformer_options(draw) | choices(draw, pooling=("max", "avg", "sum"))
    options["skip"] = draw_skip(draw, fiber_in, fiber_hidden)
    return Pooled(
        num_layers=1,
        fiber_in=fiber_in,
        fiber_hidden=fiber_hidden,
        fiber_out={0: draw(st.integers(1, 5))},
        fiber_edge=draw(edge_fibers(top)),
        num_heads=num_heads,
        channels_div=channels_div,
        output_dim=draw(st.integers(1, 3)),
        options=options,
    )


@st.composite
def tensor_fields(draw):
    options = model_options(draw) | last_convolution_options(draw)
    attentive = options["self_interaction"] == "attentive"
    return TensorField(**draw_model(draw, options, CHANNELS, common=(attentive, attentive)))


# --------------------------------------------------------------------------------------------------------------- tests


def built(network):
    torch.manual_seed(0)
    return varied(network.build())


def permutation(sizes, seed):
    """Of the rows of several graphs, within each graph."""
    generator = torch.Generator().manual_seed(seed)
    starts = (sizes.cumsum(0) - sizes).tolist()
    return torch.cat([torch.randperm(n, generator=generator) + start for n, start in zip(sizes.tolist(), starts)])


ALL = [convolutions, blocks, transformers, pooled, tensor_fields]


@pytest.mark.parametrize("networks", ALL)
@given(data=st.data(), max_edges=st.sampled_from([4, 2**14]))
def test_as_the_slow_implementation(networks, data, max_edges):
    """Values and gradients; in chunks of edges, and without gradients, when edges in pairs share radial weights."""
    network = data.draw(networks())
    sample, module = data.draw(samples(network)), built(network).double()
    state = {name: p.detach().clone().requires_grad_() for name, p in module.state_dict().items()}
    expected, expected_grads = gradients(lambda s: network.reference(state, s), sample, state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "MAX_EDGES", max_edges)
        patch.setattr(convolution, "MAX_EDGES_LOW_MEMORY", max_edges)
        found, found_grads = gradients(lambda s: network.call(module, s), sample, module.named_parameters())
        assert_same(found, expected, TOLERANCE, "values")
        if network.options.get("pooling") != "max":  # of equal numbers any may be the maximum
            assert_same(found_grads, expected_grads, TOLERANCE, "gradients")
        with torch.no_grad():
            assert_same(network.call(module, sample), expected, TOLERANCE, "values without gradients")


@pytest.mark.parametrize("networks", ALL)
@given(data=st.data(), seed=SEEDS)
def test_moved_and_in_another_order(networks, data, seed):
    """Rotated, shifted, nodes and edges permuted, all at once."""
    network = data.draw(networks())
    sample, module = data.draw(samples(network)), built(network).double()
    nodes, edges = permutation(sample.num_nodes, seed), permutation(sample.num_edges, seed)

    def call(sample):
        return network.call(module, sample)

    def call_permuted(sample):
        return call(sample.with_nodes_permuted(nodes).with_edges_permuted(edges))

    assert_same(call_permuted(sample), network.permuted(call(sample), nodes, edges), TOLERANCE, "permutation")
    shift = torch.tensor([1.0, -2.0, 0.5])
    assert_equivariant(call_permuted, sample, random_rotation(seed), shift, TOLERANCE)


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
@pytest.mark.parametrize("networks", [convolutions, transformers])
@given(data=st.data())
def test_compiled(networks, data):
    """The compiled code, with blocks of edges that are full and not, and with edges in pairs."""
    network = data.draw(networks())
    sample, module = data.draw(samples(network, max_edges=80)).to(torch.float32), built(network)

    def results():
        values, grads = gradients(lambda s: network.call(module, s), sample, module.named_parameters())
        with torch.no_grad():
            return values, grads, network.call(module, sample)

    found, found_grads, found_without = results()
    with native.switched_off():
        expected, expected_grads, expected_without = results()
    assert_same(found, expected, SINGLE_TOLERANCE, "values")
    assert_same(found_without, expected_without, SINGLE_TOLERANCE, "values without gradients")
    if network.options.get("pooling") != "max":
        assert_same(found_grads, expected_grads, SINGLE_TOLERANCE_OF_GRADIENTS, "gradients")
