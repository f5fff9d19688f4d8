"""The slow reference and the package against outputs and gradients of the widely used implementation.

The golden files lie outside the project, in the folder that SE3_SHARED names (by default ../shared).
"""

import json
import os
from pathlib import Path

import pytest
import reference
import torch
from helpers import Sample, assert_same
from reference import bases, coupling, harmonics, paths

from se3_transformer.model import Fiber, SE3Transformer, SE3TransformerPooled
from se3_transformer.model.basis import edge_frames, wigner_blocks

SHARED = Path(os.environ.get("SE3_SHARED", Path(__file__).parent.parent.parent / "shared"))
GOLDEN = SHARED / "golden"
CASES = (
    "partial_norm_ln",
    "partial_nonorm_noln",
    "partial_pooledmodel_qm9like",
    "full_norm_ln",
    "full_norm_ln_edge01_in01",
    "none_norm_ln",
    "full_allfused_out8",
    "partial_poolavg_rt1",
    "full_uneven_norm_FIXED",
)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
LAYERS = dict(num_layers=2, num_heads=2, channels_div=2)

pytestmark = needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden files: {GOLDEN} is not there (set SE3_SHARED)"
)


def under(data, prefix):
    return {name[len(prefix) :]: value for name, value in data.items() if name.startswith(prefix)}


class Golden:
    """One golden file: settings, inputs, and everything that was expected."""

    def __init__(self, name):
        data = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
        self.config = json.loads(data["cfg"])
        self.fibers = {key: Fiber(self.config[key]) for key in ("fiber_in", "fiber_hidden", "fiber_out", "fiber_edge")}
        self.state = under(data, "state/")
        self.sample = Sample(
            data["pos"],
            data["src"],
            data["dst"],
            data["batch_num_nodes"],
            data["batch_num_edges"],
            under(data, "node_feats/"),
            under(data, "edge_feats/"),
        )
        self.outputs = {f"out/{l}": x for l, x in under(data, "out/").items()}
        self.outputs |= {f"inter/{name}": x for name, x in under(data, "inter/").items()}
        self.gradients = {f"param/{name}": g for name, g in under(data, "grad/param/").items()}
        self.gradients |= {
            f"{kind}_feats/{l}": g for kind in ("node", "edge") for l, g in under(data, f"grad/{kind}_feats/").items()
        }
        self.gradients["pos"] = data["grad/pos_full"]

    def model(self):
        config, fibers = self.config, self.fibers
        options = dict(
            norm=config["norm"],
            use_layer_norm=config["layer_norm"],
            pooling=config["pooling"],
            tensor_cores=config["fuse"] == "full",
            low_memory=config["fuse"] == "none",
            **LAYERS,
        )
        if config.get("pooled_model"):
            hidden = fibers["fiber_hidden"]
            model = SE3TransformerPooled(
                fibers["fiber_in"],
                fibers["fiber_out"],
                fibers["fiber_edge"],
                num_degrees=len(hidden.degrees),
                num_channels=hidden[0],
                output_dim=config["output_dim"],
                **options,
            )
        else:
            model = SE3Transformer(**fibers, return_type=config["return_type"], **options)
        model.load_state_dict(self.state)  # strict: exactly the known names and shapes
        return model


def loss_gradients(outputs, inputs, parameters):
    """Gradients of the sum of squares of the outputs."""
    wanted = {**inputs, **{f"param/{name}": p for name, p in parameters.items()}}
    loss = sum((x**2).sum() for x in outputs)
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {k: torch.zeros_like(x) if g is None else g for (k, x), g in zip(wanted.items(), found, strict=True)}


def assert_each_same(actual, expected, tolerance, what):
    """Every tensor held to its own norm, unless that is zero up to rounding."""
    assert actual.keys() == expected.keys()
    for name, should in expected.items():
        if should.norm() > 1e-9:
            assert_same({name: actual[name]}, {name: should}, tolerance, what)
        else:
            assert actual[name].norm() < tolerance, f"{what}: {name} should be 0, has norm {actual[name].norm():.1e}"


def run_model(golden, dtype, as_graph, device="cpu"):
    """Outputs, intermediate ones among them, and gradients, on the CPU."""
    model, sample = golden.model().to(device, dtype), golden.sample.to(dtype).on(device).leaves()
    transformer = model.transformer if golden.config.get("pooled_model") else model
    outputs = {}
    for i, module in enumerate(transformer.graph_modules):
        module.register_forward_hook(
            lambda module, _, features, i=i: outputs.update({f"inter/{i}/{l}": x for l, x in features.items()})
        )
    result = model(as_graph(sample), sample.node_feats, sample.edge_feats)
    final = result if isinstance(result, dict) else {"tensor": result}
    outputs |= {f"out/{l}": x for l, x in final.items()}
    gradients = loss_gradients(final.values(), sample.inputs, dict(model.named_parameters()))
    return ({name: x.cpu() for name, x in found.items()} for found in (outputs, gradients))


def to_dgl(sample):
    dgl = pytest.importorskip("dgl", reason="DGL is not installed")
    graph = dgl.graph((sample.src, sample.dst), num_nodes=len(sample.pos))
    graph.set_batch_num_nodes(sample.num_nodes)
    graph.set_batch_num_edges(sample.num_edges)
    graph.edata["rel_pos"] = sample.rel_pos
    return graph


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("as_graph", [lambda sample: sample.graph, to_dgl], ids=["Graph", "dgl"])
@pytest.mark.parametrize("case", CASES)
def test_model(case, as_graph, dtype):
    golden = Golden(case)
    outputs, gradients = run_model(golden, dtype, as_graph)
    assert_each_same(outputs, golden.outputs, TOLERANCE[dtype], "outputs")
    assert_each_same(gradients, golden.gradients, TOLERANCE[dtype], "gradients")


@pytest.mark.parametrize("case", CASES)
def test_reference(case):
    """The slow reference that all other tests rely on is itself the known function."""
    golden = Golden(case)
    config, sample = golden.config, golden.sample.leaves()
    state = {name: p.double().requires_grad_() for name, p in golden.state.items()}
    outputs = reference.transformer(
        reference.sub(state, "transformer.") or state,
        golden.fibers.values(),
        LAYERS.values(),
        config["norm"],
        sample.node_feats,
        sample.edge_feats,
        sample.edges,
    )
    final = outputs[-1]
    if config["return_type"] is not None:
        final = final[str(config["return_type"])]
        if config["pooling"]:
            final = reference.pooled(final, sample.num_nodes, config["pooling"])
        if config.get("pooled_model"):
            final = reference.mlp(state, final)
        final = {"tensor": final}
    every = {f"inter/{i}/{l}": x for i, features in enumerate(outputs) for l, x in features.items()}
    every |= {f"out/{l}": x for l, x in final.items()}
    assert_each_same(every, golden.outputs, 1e-12, "outputs")
    assert_each_same(loss_gradients(final.values(), sample.inputs, state), golden.gradients, 1e-12, "gradients")


def test_constants():
    """e3nn's harmonics and couplings of today are those that the known weights were trained with."""
    data = torch.load(GOLDEN / "constants_basis.pt", weights_only=True)
    rel_pos = data["rel_pos"]
    sphere = [harmonics(J, rel_pos) for J in range(7)]
    for degree, expected in under(data, "sh/").items():
        assert_same(harmonics(int(degree), rel_pos), expected, 1e-13, f"harmonics of degree {degree}")
    for i in range(4):
        for o in range(4):
            for J in paths(i, o):
                assert_same(coupling(i, o, J), data[f"cg/in{i}_out{o}_J{J}"], 1e-13, f"coupling {i},{o},{J}")
            assert_same(bases(i, o, sphere).permute(0, 3, 1, 2), data[f"basis/{i},{o}"], 1e-13, f"basis {i},{o}")


def test_wigner_blocks_rebuild_the_dense_bases():
    data = torch.load(GOLDEN / "constants_basis.pt", weights_only=True)
    rel_pos, pole = data["rel_pos"], torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    blocks = {int(l): b for l, b in wigner_blocks(edge_frames(rel_pos), 3).items()}
    for i in range(4):
        for o in range(4):
            frame = torch.stack([coupling(i, o, J) @ harmonics(J, pole)[0] for J in paths(i, o)])  # (F, M_out, M_in)
            dense = torch.einsum("ekp,fpq,elq->elfk", blocks[o], frame, blocks[i])
            assert_same(dense, data[f"basis/{i},{o}"], 1e-12, f"{i},{o}")
