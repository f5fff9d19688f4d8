"""Weights of others: found wherever they lie in a file, in either convention of couplings, and written back."""

from __future__ import annotations

import re

import pytest
import reference
import torch
from battery import varied
from helpers import assert_same, random_sample, refused
from torch import nn

from se3_transformer.model import Fiber, SE3Transformer, SE3TransformerPooled
from se3_transformer.runtime.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from se3_transformer.runtime.weights import export_weights, load_weights


def build(seed=0, num_layers=1, fiber_hidden=None, **options):
    torch.manual_seed(seed)
    hidden = Fiber(fiber_hidden or {0: 4, 1: 4})
    return varied(
        SE3Transformer(num_layers, Fiber({0: 3}), hidden, Fiber({0: 2, 1: 2}), 2, 2, Fiber({0: 1}), **options)
    )


def build_pooled(seed=0):
    torch.manual_seed(seed)
    sizes = dict(num_degrees=2, num_channels=4, output_dim=1, num_layers=1, num_heads=2, channels_div=2)
    return varied(SE3TransformerPooled(Fiber({0: 3}), Fiber({0: 8}), Fiber({}), **sizes))


class Larger(nn.Module):
    """A network that holds others: a head of its own, and `number` SE(3)-Transformers."""

    def __init__(self, number=1):
        super().__init__()
        self.head = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"se3": build(seed=i)}) for i in range(number))


def renamed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def known_format(state):
    """The checkpoint of the known package after a step of Adam."""
    parameters = [nn.Parameter(torch.ones(2, 3))]
    optimizer = torch.optim.Adam(parameters)
    parameters[0].sum().backward()
    optimizer.step()
    return {"state_dict": state, "optimizer_state_dict": optimizer.state_dict(), "epoch": 99}


FORMATS = {
    "state dict": lambda state: state,
    "known format": known_format,
    "known format, from several processes": lambda state: known_format(renamed(state, "module.")),
    "ours": lambda state: {"model": state, "network": {"num_layers": 1}, "settings": {"seed": 0}, "epoch": 3},
    "other keys": lambda state: {"model_state_dict": state, "config": {"a": [1, 2]}, "loss": torch.tensor(0.5)},
    "within a larger network": lambda state: {
        "model": {"head.weight": torch.ones(4)} | renamed(state, "refine.1.se3.")
    },
    "within a compiled one": lambda state: renamed(state, "module._orig_mod.net."),
}


@pytest.mark.parametrize("as_file", [False, True], ids=["dict", "file"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, as_file, tmp_path):
    source = FORMATS[name](build(seed=1).state_dict())
    if as_file:
        torch.save(source, tmp_path / "weights.pt")
        source = tmp_path / "weights.pt"
    model = build(seed=2)
    load_weights(model, source)
    assert_same(model.state_dict(), build(seed=1).state_dict(), 1e-30)


def test_pooled_model_and_the_transformer_inside_it():
    trained = build_pooled(seed=1)
    for model, expected in [(build_pooled(seed=2), trained), (build_pooled(seed=3).transformer, trained.transformer)]:
        load_weights(model, known_format(trained.state_dict()))
        assert_same(model.state_dict(), expected.state_dict(), 1e-30)


def test_checkpoints_of_our_trainer(tmp_path):
    """The last state holds weights and their moving average; the prefix says which."""
    state = {"model": build(seed=1).state_dict(), "averaged": renamed(build(seed=2).state_dict(), "module.")}
    save_checkpoint(tmp_path / "last.pt", state)
    model = build()
    with refused("2 places", "model", "averaged.module", "prefix", error=CheckpointError):
        load_weights(model, tmp_path / "last.pt")
    load_weights(model, tmp_path / "last.pt", prefix="averaged.module")
    assert_same(model.state_dict(), build(seed=2).state_dict(), 1e-30)


def test_one_of_several_in_a_larger_network():
    state = {"model_state_dict": Larger(number=12).state_dict()}
    model = build(seed=99)
    with refused("12 places", r"model_state_dict\.blocks\.11\.se3\n?", "prefix", error=CheckpointError):
        load_weights(model, state)
    for prefix in ("blocks.1.se3", "blocks.1.se3.", "model_state_dict.blocks.1.se3"):  # not blocks.11.se3
        load_weights(model, state, prefix=prefix)
        assert_same(model.state_dict(), build(seed=1).state_dict(), 1e-30)
    with refused("blocks.12", "no weights of the model", error=CheckpointError):
        load_weights(model, state, prefix="blocks.12")


def test_the_place_where_shapes_fit_is_taken():
    fitting, other = build(seed=1), build(fiber_hidden={0: 8, 1: 8})
    model = build(seed=2)
    load_weights(model, renamed(other.state_dict(), "first.") | renamed(fitting.state_dict(), "second."))
    assert_same(model.state_dict(), fitting.state_dict(), 1e-30)


def test_dtype_of_the_model_stays():
    model = build(seed=2).double()
    load_weights(model, build(seed=1).half().state_dict())
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())


# -------------------------------------------------------------------------------------------------------------- errors


def misfit(model, state):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, {"state_dict": state})
    assert_same(model.state_dict(), before, 1e-30)
    return str(caught.value)


def test_other_shapes_are_listed():
    message = misfit(build(), build(fiber_hidden={0: 8, 1: 8}).state_dict())
    assert "graph_modules.0.to_query.weights.0: (4, 3) in the file, (2, 3) in the model" in message
    assert "graph_modules.2.to_kernel_self.1: (2, 8) in the file, (2, 4) in the model" in message
    assert "net.0.weight" not in message  # these fit
    assert "num_layers, fibers" in message


def test_missing_and_superfluous_names_are_listed():
    lines = misfit(build(use_layer_norm=True), build(use_layer_norm=False).state_dict()).splitlines()
    network = "  graph_modules.0.to_key_value.conv.0,0.radial_func.net"
    assert f"{network}.6.weight: nothing in the file, (12, 32) in the model" in lines
    assert f"{network}.4.weight: (12, 32) in the file, (32,) in the model" in lines
    more_layers = build(num_layers=2).state_dict()
    assert "graph_modules.4.to_kernel_self.0: (2, 4) in the file, nothing in the model" in misfit(build(), more_layers)
    fewer = {name: tensor for name, tensor in build().state_dict().items() if "group_norm" not in name}
    assert "graph_modules.1.group_norm.bias: nothing in the file, (8,) in the model" in misfit(build(), fewer)


def test_nothing_of_the_model():
    message = misfit(build(), {"head.weight": torch.ones(2, 2)})
    assert re.search(r"no weights of the model.*graph_modules\.0\..*state_dict\.head\.weight", message), message
    with refused("no weights of the model", "no tensors", error=CheckpointError):
        load_weights(build(), {"epoch": 3})


class Harm:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({"state_dict": build().state_dict(), "callback": Harm()}, tmp_path / "harm.pt")
    with refused("harm.pt", error=CheckpointError):
        load_weights(build(), tmp_path / "harm.pt")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_weights(build(), tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("weights")
    with refused("text.pt", "not a readable checkpoint", error=CheckpointError):
        load_weights(build(), str(tmp_path / "text.pt"))


# ------------------------------------------------------------------------------------------------------- old couplings

# (J, l_in, l_out) of the couplings whose sign changed with e3nn 0.4, up to degree 3, then with degree 4.
OLD_SIGNS = {(2, 1, 2), (2, 2, 1), (1, 2, 2), (3, 1, 3), (3, 3, 1), (1, 3, 3)}
OLD_SIGNS |= {(4, 1, 4), (4, 4, 1), (1, 4, 4), (5, 4, 4), (6, 3, 4), (6, 4, 3)}


@pytest.mark.parametrize("options", [{}, {"tensor_cores": True}, {"low_memory": True}], ids=str)
@pytest.mark.parametrize("fiber_in", [Fiber({0: 3}), Fiber.create(4, 4), Fiber.create(5, 4)], ids=str)
def test_weights_of_old_e3nn(monkeypatch, fiber_in, options):
    """With couplings of the old signs, weights mean what they mean here once they are loaded with old_couplings."""
    hidden = Fiber.create(max(4, len(fiber_in)), 4)

    def build():
        return SE3Transformer(1, fiber_in, hidden, hidden, 2, 2, use_layer_norm=False, **options).double()

    trained, model = build(), build()
    sample = random_sample(fiber_in, nodes=(4,), edges=(7,))
    now = reference.coupling
    monkeypatch.setattr(
        reference, "coupling", lambda i, o, J: -now(i, o, J) if (J, i, o) in OLD_SIGNS else now(i, o, J)
    )
    fibers = [fiber_in, hidden, hidden, Fiber({})]
    expected = reference.transformer(
        trained.state_dict(), fibers, (1, 2, 2), True, sample.node_feats, {}, sample.edges
    )[-1]
    load_weights(model, trained.state_dict(), old_couplings=True)
    assert_same(model(sample.graph, sample.node_feats), expected)
    load_weights(model, trained.state_dict())
    difference = model(sample.graph, sample.node_feats)["2"] - expected["2"]
    assert difference.norm() > 1e-2 * expected["2"].norm()  # the option does something


def test_old_couplings_of_high_degrees():
    model = SE3Transformer(0, Fiber({5: 1}), Fiber({0: 1}), Fiber({5: 1}), 1, 1)
    with refused("old_couplings", "degree 4", "5 to 5"):
        load_weights(model, model.state_dict(), old_couplings=True)


# -------------------------------------------------------------------------------------------------------------- export


def test_export_is_what_the_known_package_reads(tmp_path):
    model = build()
    optimizer = torch.optim.Adam(model.parameters())
    model(*inputs())["0"].sum().backward()
    optimizer.step()
    export_weights(model, tmp_path / "deep" / "known.pth", optimizer, epoch=7)
    content = torch.load(tmp_path / "deep" / "known.pth", weights_only=True)
    assert list(content) == ["state_dict", "optimizer_state_dict", "epoch"] and content["epoch"] == 7
    other = build(seed=1)
    other.load_state_dict(content["state_dict"])
    torch.optim.Adam(other.parameters()).load_state_dict(content["optimizer_state_dict"])
    assert_same(other(*inputs()), model(*inputs()), 1e-15)
    assert not list((tmp_path / "deep").glob(".*")), "a temporary file was left"


def inputs():
    torch.manual_seed(0)
    sample = random_sample({0: 3}, {0: 1}, dtype=torch.float32)
    return sample.graph, sample.node_feats, sample.edge_feats


def test_export_for_old_e3nn_and_back(tmp_path):
    model, other = build(fiber_hidden={0: 4, 1: 4, 2: 4}), build(seed=1, fiber_hidden={0: 4, 1: 4, 2: 4})
    export_weights(model, tmp_path / "old.pt", old_couplings=True)
    state = load_checkpoint(tmp_path / "old.pt")["state_dict"]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed and all(name.endswith("net.6.weight") for name in changed)
    load_weights(other, tmp_path / "old.pt", old_couplings=True)
    assert_same(other.state_dict(), model.state_dict(), 1e-30)
