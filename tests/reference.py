"""A deliberately slow SE(3)-Transformer that is easy to check against the papers, for holding the fast package against.

Functional: every function takes the parameters as a state dict (or a slice of one, see `sub`), fibers as anything that
`dict`-like maps degree -> channels, and plain tensors. Gradients are plain autograd through all of it, positions
included. Nothing here comes from `se3_transformer`.

Shapes: N nodes, E edges, C channels, M = 2l+1, H hidden width of the radial network, F = paths of one degree pair.
Node features {'l': (N, C, M)}, edge features {'l': (E, C, M)}; `edges` is the triple src (E,), dst (E,) and
rel_pos = pos[dst] - pos[src] (E, 3).
"""

import math
from functools import cache

import torch
from e3nn import o3
from torch.nn.functional import layer_norm, linear, relu

NORM_CLAMP = 2**-24  # lower bound of |x| in the norm layer


def as_dict(fiber):
    """{degree: channels} of a Fiber, a dict with int or str keys, or None."""
    return dict(sorted((int(degree), channels) for degree, channels in fiber.items())) if fiber else {}


def sub(state, prefix):
    """The part of a state dict under `prefix`, with the prefix taken off."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def paths(l_in, l_out):
    """All J that couple l_in to l_out, in the order of the radial weights' rows."""
    return range(abs(l_in - l_out), l_in + l_out + 1)


# ------------------------------------------------------------------------------------------------------------- kernel


@cache
def coupling(l_in, l_out, J):
    """Q_J (2 l_out + 1, 2 l_in + 1, 2 J + 1): e3nn's wigner_3j, whose norm is 1, with the axes turned around."""
    return o3.wigner_3j(J, l_in, l_out, dtype=torch.float64).permute(2, 1, 0)


def harmonics(J, rel_pos):
    """Y_J(r / |r|) (E, 2J+1), e3nn's order and `integral` normalisation. No direction (r = 0): only Y_0 is nonzero."""
    if J == 0:
        return rel_pos.new_full((len(rel_pos), 1), 1 / math.sqrt(4 * math.pi))
    nowhere = (rel_pos == 0).all(dim=1, keepdim=True)
    anywhere = torch.where(nowhere, rel_pos.new_tensor([0.0, 1.0, 0.0]), rel_pos)
    return torch.where(nowhere, 0.0, o3.spherical_harmonics(J, anywhere, normalize=True, normalization="integral"))


def bases(l_in, l_out, sphere):
    """Q_J Y_J(r / |r|) for every J: (E, F, 2 l_out + 1, 2 l_in + 1); sphere[J] is Y_J (E, 2J+1)."""
    return torch.stack(
        [torch.einsum("klm,em->ekl", coupling(l_in, l_out, J), sphere[J]) for J in paths(l_in, l_out)], dim=1
    )


def distance(rel_pos):
    """|r| (E,), with gradient 0 where r = 0."""
    nowhere = (rel_pos == 0).all(dim=1)
    anywhere = torch.where(nowhere[:, None], torch.ones_like(rel_pos), rel_pos)
    return torch.where(nowhere, 0.0, anywhere.norm(dim=1))


def with_distance(edge_feats, rel_pos):
    """Edge features with the distance as the last channel of degree 0, as the layers (not the models) expect them."""
    r = distance(rel_pos)[:, None, None]
    scalars = [edge_feats["0"], r] if edge_feats and "0" in edge_feats else [r]
    return {**(edge_feats or {}), "0": torch.cat(scalars, dim=1)}


# ---------------------------------------------------------------------------------------------------- radial networks


def radial_network(state, scalars):
    """(E, edge scalars) -> (E, C_out * C_in * F): Linear, [LayerNorm], ReLU, Linear, [LayerNorm], ReLU, Linear."""
    net = sub(state, "radial_func.net.")
    normed = "6.weight" in net
    hidden = scalars
    for k in (0, 3) if normed else (0, 2):
        hidden = linear(hidden, net[f"{k}.weight"], net[f"{k}.bias"])
        if normed:
            hidden = layer_norm(hidden, hidden.shape[-1:], net[f"{k + 1}.weight"], net[f"{k + 1}.bias"])
        hidden = relu(hidden)
    return linear(hidden, net["6.weight" if normed else "4.weight"])


def with_edge_channels(fiber_in, fiber_edge):
    """What an edge carries: the channels of its source node, then its own of degrees > 0."""
    fiber_in, fiber_edge = as_dict(fiber_in), as_dict(fiber_edge)
    degrees = sorted({*fiber_in, *(l for l in fiber_edge if l > 0)})
    return {l: fiber_in.get(l, 0) + (fiber_edge.get(l, 0) if l > 0 else 0) for l in degrees}


def expected_sharing(fiber_in, fiber_out, fiber_edge, fuse, max_degree):
    """Which degree pairs share a radial network: 'conv', 'conv_out', 'conv_in' or 'pair'. fuse: full, partial, none."""
    fiber_out = as_dict(fiber_out)
    fiber_in = with_edge_channels(fiber_in, fiber_edge)
    all_degrees = list(range(max_degree + 1))
    even_in = len(set(fiber_in.values())) == 1 and list(fiber_in) == all_degrees
    even_out = len(set(fiber_out.values())) == 1 and list(fiber_out) == all_degrees
    if fuse == "full" and even_in and even_out:
        return "conv"
    if fuse != "none" and even_in:
        return "conv_out"
    if fuse != "none" and even_out:
        return "conv_in"
    return "pair"


def sharing_of(state):
    """How the radial networks of a convolution are shared, read off its state dict."""
    kinds = {
        (
            "conv_out"
            if k.startswith("conv_out.")
            else "conv_in"
            if k.startswith("conv_in.")
            else "conv"
            if k.startswith("conv.radial_func.")
            else "pair"
        )
        for k in state
        if k.startswith("conv")
    }
    assert len(kinds) == 1, f"mixed or no radial networks: {sorted(state)}"
    return kinds.pop()


def radial_weights(state, fiber_in, fiber_out, scalars):
    """{(l_in, l_out): R_J (E, F, C_out, C_in)}, F over J, from whatever radial networks the state dict holds."""
    groups = {  # name of the network -> the pairs (l_in, l_out) that it serves, in the order of its rows
        "conv": {"conv": [(i, o) for o in fiber_out for i in fiber_in]},
        "conv_out": {f"conv_out.{o}": [(i, o) for i in fiber_in] for o in fiber_out},
        "conv_in": {f"conv_in.{i}": [(i, o) for o in fiber_out] for i in fiber_in},
        "pair": {f"conv.{i},{o}": [(i, o)] for o in fiber_out for i in fiber_in},
    }[sharing_of(state)]
    weights = {}
    for name, pairs in groups.items():
        (c_in,), (c_out,) = {fiber_in[i] for i, _ in pairs}, {fiber_out[o] for _, o in pairs}
        sizes = [len(paths(i, o)) for i, o in pairs]
        rows = radial_network(sub(state, name + "."), scalars).reshape(len(scalars), c_out, c_in, sum(sizes))
        for pair, part in zip(pairs, rows.split(sizes, dim=-1), strict=True):
            weights[pair] = part.permute(0, 3, 1, 2)
    return weights


# -------------------------------------------------------------------------------------------------------- convolution


def convolution(
    state, fiber_in, fiber_out, fiber_edge, node_feats, edge_feats, edges, pool=True, self_interaction=False
):
    """The TFN convolution, edge by edge: {'l': (N, C_out, M)}, or (E, C_out, M) per edge when pool is False.

    edge_feats['0'] holds the distance as its last channel (`with_distance`). The sum over incoming edges includes the
    self-interaction term once per edge.
    """
    src, dst, rel_pos = edges
    fiber_in, fiber_out, fiber_edge = as_dict(fiber_in), as_dict(fiber_out), as_dict(fiber_edge)
    carried = with_edge_channels(fiber_in, fiber_edge)
    weights = radial_weights(state, carried, fiber_out, edge_feats["0"].squeeze(-1))
    sphere = [harmonics(J, rel_pos) for J in range(max(carried) + max(fiber_out) + 1)]
    basis = {(i, o): bases(i, o, sphere) for i in carried for o in fiber_out}
    if sharing_of(state) == "pair" and (0, 0) in basis:
        basis[0, 0] = torch.ones_like(basis[0, 0])  # the quirk: this kernel is 1, not Y_0 times the coupling
    num_nodes = len(next(iter(node_feats.values())))
    # One tensor per edge or node from here on.
    weights, basis, node_feats, edge_feats = (
        {key: rows.unbind(0) for key, rows in x.items()} for x in (weights, basis, node_feats, edge_feats)
    )
    out = {l: [] for l in fiber_out}
    for e, (j, i) in enumerate(zip(src.tolist(), dst.tolist(), strict=True)):
        for l_out, c_out in fiber_out.items():
            message = rel_pos.new_zeros(c_out, 2 * l_out + 1)
            for l_in in carried:
                x = [node_feats[str(l_in)][j]] if l_in in fiber_in else []
                x = torch.cat(x + [edge_feats[str(l_in)][e]] if l_in > 0 and l_in in fiber_edge else x)
                kernel = torch.tensordot(weights[l_in, l_out][e], basis[l_in, l_out][e], ([0], [0]))  # (o, i, k, l)
                message = message + torch.tensordot(kernel, x, ([1, 3], [0, 1]))
            if self_interaction and l_out in fiber_in:
                message = message + state[f"to_kernel_self.{l_out}"] @ node_feats[str(l_out)][i]
            out[l_out].append(message)
    empty = {l: rel_pos.new_zeros(0, c, 2 * l + 1) for l, c in fiber_out.items()}
    out = {str(l): torch.stack(messages) if messages else empty[l] for l, messages in out.items()}
    return {l: sum_incoming(messages, dst, num_nodes) for l, messages in out.items()} if pool else out


def sum_incoming(messages, dst, num_nodes):
    """(E, …) -> (N, …), node by node."""
    return torch.stack([messages[dst == node].sum(dim=0) for node in range(num_nodes)])


# ------------------------------------------------------------------------------------------- attention, linear, norm


def linear_se3(state, features):
    """{'l': (…, C_in, M)} -> {'l': (…, C_out, M)} with one matrix per degree."""
    return {
        key.removeprefix("weights."): weight @ features[key.removeprefix("weights.")] for key, weight in state.items()
    }


def attention(value, key, query, num_heads, dst):
    """Softmax over the incoming edges of each node, per head; heads split the channels.

    value, key {'l': (E, C, M)}, query {'l': (N, C, M)} -> {'l': (N, C, M)}.
    """
    num_nodes = len(next(iter(query.values())))
    size = math.sqrt(sum(k.shape[1] * k.shape[2] for k in key.values()))
    heads = []
    for head in range(num_heads):
        k, v, q = (head_of(features, head, num_heads) for features in (key, value, query))
        out = {l: [] for l in value}
        for node in range(num_nodes):
            incoming = dst == node
            logits = sum((k[l][incoming] * q[l][node]).sum(dim=(1, 2)) for l in key) / size
            alpha = logits.softmax(dim=0)[:, None, None]
            for l in value:
                out[l].append((alpha * v[l][incoming]).sum(dim=0))  # 0 without incoming edges
        heads.append({l: torch.stack(nodes) for l, nodes in out.items()})
    return {l: torch.cat([nodes[l] for nodes in heads], dim=1) for l in value}


def head_of(features, head, num_heads):
    """The channels of one head: {'l': (…, C / num_heads, M)}."""
    return {l: x.chunk(num_heads, dim=1)[head] for l, x in features.items()}


def block_fibers(fiber_in, fiber_out, channels_div):
    """Fibers of the values and of the keys of an attention block."""
    value = {l: c // channels_div for l, c in as_dict(fiber_out).items()}
    return value, {l: c for l, c in value.items() if l in as_dict(fiber_in)}


def attention_block(state, fiber_in, fiber_out, fiber_edge, num_heads, channels_div, node_feats, edge_feats, edges):
    """Values and keys from one convolution (per degree: first half value, second half key), then attention, then a
    projection of (attended values, inputs)."""
    fiber_value, fiber_key = block_fibers(fiber_in, fiber_out, channels_div)
    both = {l: c + fiber_key.get(l, 0) for l, c in fiber_value.items()}
    fused = convolution(
        sub(state, "to_key_value."), fiber_in, both, fiber_edge, node_feats, edge_feats, edges, pool=False
    )
    value = {str(l): fused[str(l)][:, :c] for l, c in fiber_value.items()}
    key = {str(l): fused[str(l)][:, fiber_value[l] :] for l in fiber_key}
    query = linear_se3(sub(state, "to_query."), node_feats)
    attended = attention(value, key, query, num_heads, edges[1])
    joined = {l: torch.cat([z, node_feats[l]], dim=1) if l in node_feats else z for l, z in attended.items()}
    return linear_se3(sub(state, "project."), joined)


def norm(state, features, softening=0.0):
    """x * ReLU(normalise(|x|)) / |x| with |x| >= NORM_CLAMP: over all channels of a degree, degrees in order."""
    sizes = {l: x.norm(dim=-1).clamp(min=NORM_CLAMP).square().add(softening**2).sqrt() for l, x in features.items()}
    degrees = sorted(features, key=int)
    if "group_norm.weight" in state:
        together = torch.cat([sizes[l] for l in degrees], dim=1)
        together = torch.group_norm(together, len(degrees), state["group_norm.weight"], state["group_norm.bias"])
        new = dict(zip(degrees, together.chunk(len(degrees), dim=1)))
    else:
        new = {
            l: layer_norm(
                sizes[l], sizes[l].shape[-1:], state[f"layer_norms.{l}.weight"], state[f"layer_norms.{l}.bias"]
            )
            for l in degrees
        }
    return {l: x * (relu(new[l]) / sizes[l])[..., None] for l, x in features.items()}


# -------------------------------------------------------------------------------------------------------- whole model


def transformer(state, fibers, layers, norm_layers, node_feats, edge_feats, edges):
    """Outputs of every entry of `graph_modules`, the last one being the model's (before return_type and pooling).

    Args:
        fibers: of input, hidden layers, output, edges.
        layers: (num_layers, num_heads, channels_div).
        edge_feats: without the distance.
    """
    fiber, fiber_hidden, fiber_out, fiber_edge = fibers
    num_layers, num_heads, channels_div = layers
    edge_feats = with_distance(edge_feats, edges[2])
    outputs, x = [], node_feats

    def parameters():
        return sub(state, f"graph_modules.{len(outputs)}.")

    for _ in range(num_layers):
        x = attention_block(
            parameters(), fiber, fiber_hidden, fiber_edge, num_heads, channels_div, x, edge_feats, edges
        )
        outputs.append(x)
        fiber = fiber_hidden
        if norm_layers:
            x = norm(parameters(), x)
            outputs.append(x)
    x = convolution(parameters(), fiber, fiber_out, fiber_edge, x, edge_feats, edges, self_interaction=True)
    return [*outputs, x]


def pooled(features, batch_num_nodes, how):
    """(N, C, M) -> (B, C, M), or (B, C) for degree 0: maximum, mean or sum over the nodes of each graph."""
    reduce = {"max": lambda x: x.max(dim=0).values, "avg": lambda x: x.mean(dim=0), "sum": lambda x: x.sum(dim=0)}[how]
    graphs = torch.stack([reduce(x) for x in features.split(batch_num_nodes.tolist())])
    return graphs.squeeze(-1)


def mlp(state, scalars):
    """The head of the pooled model: Linear, ReLU, Linear; (B, C) -> (B, output_dim), or (B,) for one output."""
    hidden = relu(linear(scalars, state["mlp.0.weight"], state["mlp.0.bias"]))
    return linear(hidden, state["mlp.2.weight"], state["mlp.2.bias"]).squeeze(-1)
