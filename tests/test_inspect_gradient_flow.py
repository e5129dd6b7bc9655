"""The gradients that are shown, against an LSTM written out step by step with torch.autograd's ``retain_grad``."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from eager_layers import SEED, B, H, T, batch, eager_layer, module
from helpers import compiled
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fusedreg
from fusedreg.inspect import GradientFlow, States


def weights_of_loss(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 1.3, steps=torch.Size(shape).numel(), dtype=torch.float64).view(shape).sin()


def check(lstm: fusedreg.LSTM, lengths: list[int] | None = None, reset: Tensor | None = None) -> None:
    """All layers and directions at once; a loss that reads every result."""
    x = batch()
    ends = [["", "_reverse"][: lstm.num_directions] for _ in range(lstm.num_layers)]
    below, finals, expected = x, [], []
    for layer, directions in enumerate(ends):
        made = [eager_layer(lstm, below, f"_l{layer}{direction}", lengths, reset) for direction in directions]
        below = torch.cat([own[0] for own in made], -1)
        finals += [own[1:3] for own in made]
        expected += [own[3] for own in made]

    def loss(output: Tensor, h_n: Tensor, c_n: Tensor) -> Tensor:
        return sum((value * weights_of_loss(*value.shape)).sum() for value in (output, h_n, c_n))

    loss(below, torch.stack([own[0] for own in finals]), torch.stack([own[1] for own in finals])).backward()
    lstm.zero_grad()
    with GradientFlow(lstm) as flow:
        output, (h_n, c_n) = lstm(x, lengths=lengths, reset=reset, seed=SEED)
        loss(output, h_n, c_n).backward()
    torch.testing.assert_close(output, below)
    for shown, seen in zip(flow.layers, expected, strict=True):
        assert seen["hidden"].grad is not None and seen["cell"].grad is not None
        torch.testing.assert_close(shown.hidden, seen["hidden"].grad)
        torch.testing.assert_close(shown.cell, seen["cell"].grad)


def test_the_loop_itself_has_autograds_gradients() -> None:
    """What the loop adds to h and c has the gradient that ``retain_grad`` gives where nothing is regularised."""
    lstm, x = module(), batch()
    y, _, _, seen = eager_layer(lstm, x, "_l0")
    (y * weights_of_loss(*y.shape)).sum().backward()
    h, c = x.new_zeros(B, H), x.new_zeros(B, H)
    states = []
    for t in range(T):
        gates = x[t] @ lstm.weight_ih_l0.t() + h @ lstm.weight_hh_l0.t() + lstm.bias_ih_l0 + lstm.bias_hh_l0
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        h.retain_grad()
        c.retain_grad()
        states.append((h, c))
    output = torch.stack([own for own, _ in states])
    (output * weights_of_loss(*output.shape)).sum().backward()
    torch.testing.assert_close(seen["hidden"].grad, torch.stack([own.grad for own, _ in states]))
    torch.testing.assert_close(seen["cell"].grad, torch.stack([own.grad for _, own in states]))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers": {"num_layers": 2, "bidirectional": True},
    "zoneout": {"zoneout_hidden": 0.3, "zoneout_cell": 0.4},
    "candidate": {"zoneout_hidden": 0.3, "zoneout_output": "candidate"},
    "dropout": {"hidden_dropout": 0.3, "output_dropout": 0.3, "weight_dropout": 0.3},
    "layer_norm": {"norm": fusedreg.LayerNorm()},
    "batch_norm": {"norm": fusedreg.BatchNorm(max_steps=T)},
}


BACKENDS = ["reference", pytest.param("cpu", marks=compiled)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_autograd(backend: str, options: dict[str, Any]) -> None:
    check(module(backend=backend, **options))


@pytest.mark.parametrize("options", [OPTIONS["layers"], OPTIONS["zoneout"]], ids=["layers", "zoneout"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend: str, options: dict[str, Any]) -> None:
    check(module(backend=backend, **options), lengths=[4, T, 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_resets(backend: str) -> None:
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2, 0] = reset[4, 2] = True
    check(module(zoneout_cell=0.3, backend=backend), reset=reset)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_changes(backend: str) -> None:
    """Output, masks, parameter and input gradients, generator: bit for bit; the module is left as it was."""
    made = []
    for watched in (False, True):
        lstm = module(num_layers=2, zoneout_cell=0.3, hidden_dropout=0.2, dropout=0.2, backend=backend)
        x = batch().requires_grad_()
        torch.manual_seed(3)
        with GradientFlow(lstm) if watched else torch.enable_grad():
            output, (h_n, c_n) = lstm(x)
            (output.square().sum() + h_n.sum() + c_n.sum()).backward()
        assert "_recorder" not in lstm.__dict__ and lstm._recorder is None
        made.append([output, h_n, c_n, x.grad, *(own.grad for own in lstm.parameters()), torch.rand(1)])
    for plain, watched in zip(*made, strict=True):
        assert torch.equal(plain, watched)


def test_the_forward_takes_no_memory_for_it() -> None:
    lstm, made = module(), []
    with GradientFlow(lstm) as flow:
        recorders = lstm._recorder
        assert recorders is not None
        begin = recorders.begin

        def spy(layout: Any) -> Any:
            recording = begin(layout)
            probes = recording.probes
            recording.probes = lambda call: made.append(probes(call)) or made[-1]
            return recording

        recorders.begin = spy  # type: ignore[method-assign]
        lstm(batch())[0].sum().backward()
    for probe in made[0]:
        assert probe.shape[:2] == (T, B) and probe.untyped_storage().nbytes() == probe.element_size()
        assert probe.grad is None  # handed over, not kept
    assert flow.layers[0].hidden.abs().sum() > 0


@compiled
def test_recomputed_gates() -> None:
    check(module(backend="cpu", recompute=True, zoneout_cell=0.3))


def test_layouts() -> None:
    """Batch first, unbatched, packed: the same numbers, where the caller has them."""
    x, lengths = batch(), [4, T, 2]

    def seen(lstm: fusedreg.LSTM, input: Any, **call: Any) -> tuple[Any, Any]:
        with GradientFlow(lstm) as flow:
            output = lstm(input, **call)[0]
            (output.data if isinstance(output, PackedSequence) else output).square().sum().backward()
        return flow.layers[0].hidden, flow.layers[0].cell

    expected = seen(module(), x, lengths=lengths)
    for own, time_first in zip(
        seen(module(batch_first=True), x.transpose(0, 1), lengths=lengths), expected, strict=True
    ):
        torch.testing.assert_close(own, time_first.transpose(0, 1))
    for own, time_first in zip(seen(module(), x[:, 1]), expected, strict=True):
        torch.testing.assert_close(own, time_first[:, 1])
    for own, time_first in zip(
        seen(module(), pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)), expected, strict=True
    ):
        assert isinstance(own, PackedSequence)
        torch.testing.assert_close(pad_packed_sequence(own)[0], time_first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_projection_and_16_bits(backend: str) -> None:
    lstm = module(proj_size=2, dtype=torch.bfloat16, backend=backend)
    with GradientFlow(lstm) as flow:
        lstm(batch().bfloat16())[0].sum().backward()
    (layer,) = flow.layers
    assert layer.hidden.shape == (T, B, 2) and layer.hidden.dtype == torch.bfloat16
    assert layer.cell.shape == (T, B, H) and layer.cell.dtype == torch.float32


def test_under_autocast() -> None:
    """The types are those that the layer runs in."""
    lstm = module(dtype=torch.float32)
    with GradientFlow(lstm) as flow, States(lstm) as states, torch.autocast("cpu", torch.bfloat16):
        lstm(batch().float())[0].float().square().sum().backward()
    assert flow.layers[0].hidden.dtype == torch.bfloat16 and flow.layers[0].cell.dtype == torch.float32
    assert flow.layers[0].cell.abs().sum() > 0 and states.layers[0]["f"].dtype == torch.float32


def test_two_forwards_before_a_backward() -> None:
    lstm = module()
    with GradientFlow(lstm) as flow:
        first, second = lstm(batch(1))[0], lstm(batch(2))[0]
        (first.sum() + 2 * second.sum()).backward()
    assert [(call.index, call.backwards) for call in flow.calls] == [(0, 1), (1, 1)]
    for call, seed, factor in zip(flow.calls, (1, 2), (1, 2), strict=True):
        with GradientFlow(lstm) as alone:
            (factor * lstm(batch(seed))[0].sum()).backward()
        torch.testing.assert_close(call.layers[0].cell, alone.layers[0].cell)


def test_retained_graphs_add_up() -> None:
    lstm = module()
    with GradientFlow(lstm) as flow:
        output = lstm(batch())[0]
        output[-1].sum().backward(retain_graph=True)
        once = flow.layers[0].hidden.clone()
        output[-1].sum().backward()
    assert len(flow.calls) == 1 and flow.calls[0].backwards == 2
    torch.testing.assert_close(flow.layers[0].hidden, 2 * once)


def test_truncated_pieces() -> None:
    """Without detach the pieces show what the whole shows; with it, each piece its own."""
    lstm, x = module(), batch()
    with GradientFlow(lstm) as whole:
        lstm(x)[0][-1].sum().backward()
    with GradientFlow(lstm) as flow:
        state, outputs = None, []
        for piece in fusedreg.truncated.pieces(x, 2):
            output, state = lstm(piece.input, state)
            outputs.append(output)
        outputs[-1][-1].sum().backward()
    joined = torch.cat([call.layers[0].cell for call in flow.calls])
    torch.testing.assert_close(joined, whole.layers[0].cell)
    with GradientFlow(lstm, keep=2) as flow:
        state = None
        for piece in fusedreg.truncated.pieces(x, 2):
            output, state = lstm(piece.input, fusedreg.truncated.detach(state))
            output[-1].sum().backward()
    assert [call.index for call in flow.calls] == [1, 2]
    torch.testing.assert_close(flow.layers[0].cell, whole.layers[0].cell[-2:])
    flow.clear()
    assert flow.calls == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    lstm, x = module(), batch().requires_grad_()
    with GradientFlow(lstm) as plain:
        lstm(x)[0].square().sum().backward()
    with GradientFlow(lstm) as flow:
        checkpoint(lambda value: lstm(value)[0], x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(flow.layers[0].hidden, plain.layers[0].hidden)


def test_a_backward_after_the_block_still_arrives() -> None:
    lstm = module()
    with GradientFlow(lstm) as flow:
        output = lstm(batch())[0]
    output.sum().backward()
    assert flow.layers[0].hidden.abs().sum() > 0


def test_several_modules_and_watchers() -> None:
    model = nn.ModuleDict({"encoder": module(num_layers=2), "decoder": module()})
    with GradientFlow(model) as flow, GradientFlow(model["decoder"]) as inner, States(model):
        output, state = model["encoder"](batch())
        output, _ = model["decoder"](batch(2), (state[0][1:], state[1][1:]))
        output.sum().backward()
    assert [layer.place.label for layer in flow.layers] == ["encoder.l0", "encoder.l1", "decoder.l0"]
    assert torch.equal(inner.layers[0].hidden, flow.layers[2].hidden)
    assert model["encoder"]._recorder is None and model["decoder"]._recorder is None
    with GradientFlow(model, skip=["encoder"]) as flow:
        model["decoder"](batch())[0].sum().backward()
    assert [layer.place.module for layer in flow.layers] == ["decoder"]


def test_copies_of_a_watched_module_are_not_watched() -> None:
    lstm = module()
    with GradientFlow(lstm):
        assert copy.deepcopy(lstm)._recorder is None
        assert pickle.loads(pickle.dumps(lstm))._recorder is None


class TestRefusals:
    def test_nn_lstm_cannot_be_seen_into(self) -> None:
        with pytest.raises(ValueError, match=r"got nn.LSTM at 1, .*replace_lstms\(model\)"):
            GradientFlow(nn.Sequential(nn.Linear(2, 3), nn.LSTM(3, 4)))
        with pytest.raises(ValueError, match=r"the model itself.*from_torch"):
            GradientFlow(nn.LSTM(3, 4))

    def test_models_without_an_lstm(self) -> None:
        with pytest.raises(ValueError, match=r"model: expected a fusedreg.LSTM"):
            GradientFlow(nn.Linear(2, 3))
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
            GradientFlow(3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"skip: expected names of LSTMs, got \['x'\]"):
            GradientFlow(module(), skip="x")

    @pytest.mark.parametrize("keep", [0, True, 1.5])
    def test_keep(self, keep: Any) -> None:
        with pytest.raises(ValueError, match="keep: expected an int of at least 1"):
            GradientFlow(module(), keep=keep)

    def test_no_gradient_has_come(self) -> None:
        lstm = module()
        with GradientFlow(lstm) as flow:
            with torch.no_grad():
                lstm(batch())
            torch.autograd.grad(lstm(batch())[0].sum(), lstm.weight_hh_l0)
        with pytest.raises(RuntimeError, match=r"loss.backward\(\).*got 2 forwards and no gradient.*autograd.grad"):
            flow.layers  # noqa: B018

    def test_transforms(self) -> None:
        lstm = module()
        with GradientFlow(lstm), pytest.raises(RuntimeError, match=r"torch\.func transform"):
            torch.func.vmap(lambda x: lstm(x)[0])(batch().unsqueeze(0))

    def test_entered_twice(self) -> None:
        with GradientFlow(module()) as flow, pytest.raises(RuntimeError, match="active already"):
            flow.__enter__()

    @pytest.mark.compile
    def test_compiled_calls(self) -> None:
        """Whole graphs are refused; with graph breaks the call runs eagerly for the length of the block."""
        lstm, x = module(), batch()
        whole = torch.compile(lstm, backend="eager", fullgraph=True)
        whole(x)
        with GradientFlow(lstm), pytest.raises(Exception, match="expected a call in eager mode"):
            whole(x)
        torch._dynamo.reset()
        breaking = torch.compile(lstm, backend="eager")
        breaking(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with GradientFlow(lstm) as flow:
                breaking(x)[0].sum().backward()
        assert flow.layers[0].hidden.shape == (T, B, H)
        torch._dynamo.reset()


def test_norms_maps_and_histograms() -> None:
    """From their definitions, of rows of different length."""
    lengths = [4, 5, 2]
    with GradientFlow(lstm := module()) as flow:
        lstm(batch(), lengths=lengths)[0].square().sum().backward()
    layer, cell_map, cells = flow.layers[0], flow.maps()[1], flow.histograms()[1]
    assert cell_map.name == cells.name == "l0 dcell"
    for t in range(T):
        rows = [b for b in range(B) if t < lengths[b]]
        if not rows:
            assert layer.norm_over_time("cell")[t].isnan() and cell_map.values[0, :, t].isnan().all()
            continue
        gradients = layer.cell[t, rows]
        expected = sum(float(own.norm()) ** 2 for own in gradients) / len(rows)
        assert layer.norm_over_time("cell")[t].item() == pytest.approx(expected**0.5)
        torch.testing.assert_close(cell_map.values[0, :, t], gradients.square().mean(0).sqrt())
    assert cells.counts.sum() == sum(lengths) * H
    torch.testing.assert_close(layer.norms("cell"), layer.cell.norm(dim=-1))


class TestMarks:
    def test_where_it_vanishes(self) -> None:
        """Forget gates shut, no way back through W_hh: of a loss on the last step nothing reaches the one before."""
        lstm = module()
        with torch.no_grad():
            lstm.weight_hh_l0.zero_()
            lstm.bias_ih_l0[H : 2 * H] = -30.0
        with GradientFlow(lstm) as flow:
            lstm(batch())[0][-1].sum().backward()
        marks = flow.layers[0].marks("cell")
        assert marks.vanishing == tuple(range(T - 1)) and marks.exploding == ()
        assert marks.reference == pytest.approx(flow.layers[0].norm_over_time("cell")[-1].item())

    def test_where_it_explodes(self) -> None:
        lstm = module()
        with torch.no_grad():
            lstm.weight_hh_l0.fill_(20.0)
            lstm.weight_ih_l0.zero_()
            lstm.bias_ih_l0.zero_()
            lstm.bias_hh_l0.zero_()
        with GradientFlow(lstm) as flow:
            lstm(batch())[0][-1].sum().backward()
        assert (
            flow.layers[0].marks("hidden", exploding=1e3).exploding
            == tuple(
                step
                for step, norm in enumerate(flow.layers[0].norm_over_time().tolist())
                if norm > 1e3 * flow.layers[0].norm_over_time()[-1]
            )
            != ()
        )

    def test_bounds_may_be_absolute(self) -> None:
        with GradientFlow(lstm := module()) as flow:
            lstm(batch())[0].sum().backward()
        norms = flow.layers[0].norm_over_time("cell")
        middle = norms.median().item()
        marks = flow.layers[0].marks("cell", vanishing=1.0, exploding=1.0, relative_to=middle)
        assert len(marks.vanishing) + len(marks.exploding) == T - 1 and marks.reference == middle

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_what_is_not_finite_has_exploded(self, value: float) -> None:
        with GradientFlow(lstm := module()) as flow:
            (lstm(batch())[0][3].sum() * value).backward()
        assert set(flow.layers[0].marks().exploding) >= {3} and 3 not in flow.layers[0].marks().vanishing

    def test_what_no_gradient_reaches_has_vanished(self) -> None:
        with GradientFlow(lstm := module(bidirectional=True)) as flow:
            lstm(batch())[1][0][0].sum().backward()
        marks = flow.layers[1].marks("cell")
        assert marks.vanishing == tuple(range(T)) and marks.exploding == () and marks.reference == 0.0

    def test_steps_after_the_loss_are_not_marked(self) -> None:
        """Nothing has vanished where nothing was to arrive; before a reset it has."""
        reset = torch.zeros(T, B, dtype=torch.bool)
        reset[2] = True
        with GradientFlow(lstm := module()) as flow:
            lstm(batch(), reset=reset)[0][3].sum().backward()
        (layer,) = flow.layers
        assert not layer.norm_over_time()[4:].any()
        assert layer.marks().vanishing == (0, 1) and layer.marks(relative_to=1e-300).vanishing == (0, 1, 4, 5)
        assert layer.marks().reference == layer.norm_over_time()[3].item()

    def test_the_reverse_direction_begins_at_the_front(self) -> None:
        with GradientFlow(lstm := module(bidirectional=True)) as flow:
            lstm(batch())[1][0].sum().backward()
        norms = flow.layers[1].norm_over_time()
        assert flow.layers[1].marks().reference == norms[0].item() and norms[0] > norms[-1]

    def test_steps_that_no_row_has_are_not_marked(self) -> None:
        with GradientFlow(lstm := module()) as flow:
            lstm(batch(), lengths=[2, 3, 1])[0].sum().backward()
        layer = flow.layers[0]
        assert layer.norm_over_time()[3:].isnan().all() and layer.marks(vanishing=0.0).vanishing == ()
        assert layer.marks().reference == layer.norm_over_time()[2].item()

    def test_no_rows(self) -> None:
        with GradientFlow(lstm := module()) as flow:
            lstm(batch()[:, :0])[0].sum().backward()
        assert all(math.isnan(row["norm"]) and math.isnan(row["largest"]) and not row["mark"] for row in flow.rows())

    def test_bad_arguments(self) -> None:
        with GradientFlow(lstm := module()) as flow:
            lstm(batch())[0].sum().backward()
        with pytest.raises(ValueError, match="0 <= vanishing <= exploding"):
            flow.layers[0].marks(vanishing=2.0, exploding=1.0)
        with pytest.raises(ValueError, match="relative_to: expected 'last'"):
            flow.layers[0].marks(relative_to="first")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="state: expected 'hidden' or 'cell'"):
            flow.layers[0].norms("output")  # type: ignore[arg-type]
