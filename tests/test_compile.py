"""``torch.compile(fullgraph=True)``: forward and backward, a second length without a second compilation, torch.func."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers import compiled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedreg
from fusedreg import BatchNorm, LayerNorm, Regularization

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("fresh_compiler"), compiled]


def make(**options: Any) -> fusedreg.LSTM:
    torch.manual_seed(0)
    return fusedreg.LSTM(3, 4, **{"backend": "cpu", **options})


Call = Callable[[nn.Module, Tensor], Tensor]
OUTPUT: Call = lambda module, x: module(x, seed=3)[0]  # noqa: E731


def _lengths(input: Tensor) -> Tensor:
    """As many as there are rows, made in the graph."""
    return torch.arange(input.shape[1]) % 5


def _everything(module: nn.Module, input: Tensor) -> Tensor:
    rows = input.shape[1]
    hx = (torch.ones(1, rows, 4), torch.ones(1, rows, 4))
    reset = torch.zeros(input.shape[:2], dtype=torch.bool)
    result = module(input, hx, lengths=_lengths(input), reset=reset, seed=3, return_cell_states=True)
    output, (hidden, cell), cells = result
    total: Tensor = output.sum() + hidden.sum() + cell.pow(2).sum() + cells.sum()
    return total


def _ragged(module: nn.Module, input: Tensor) -> Tensor:
    rows = input.shape[1]
    state = (torch.ones(4, rows, 4), torch.ones(4, rows, 4))
    output, (hidden, cell) = module(input, state, lengths=_lengths(input), seed=3)
    total: Tensor = output.sum() + hidden.pow(2).sum() + cell.sum()
    return total


CASES: dict[str, tuple[dict[str, Any], Call]] = {
    "plain": ({}, OUTPUT),
    "layers": ({"num_layers": 2, "bidirectional": True, "dropout": 0.3, "zoneout_cell": 0.2}, OUTPUT),
    "batch_norm": ({"norm": BatchNorm(max_steps=20)}, OUTPUT),
    "layer_norm": ({"norm": LayerNorm(), "recompute": True, "batch_first": True}, OUTPUT),
    "everything": ({"hidden_dropout": 0.5, "output_dropout": 0.2}, _everything),
    "ragged layers": ({"num_layers": 2, "bidirectional": True, "hidden_dropout": 0.3}, _ragged),
    "projection": ({"num_layers": 2, "proj_size": 2, "zoneout_cell": 0.2}, OUTPUT),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_shapes_share_one_compilation(case: str, requires_grad: bool) -> None:
    """Another number of steps, and of rows: sizes that no other dimension has, which the compiler would take as one."""
    options, call = CASES[case]
    module = make(**options)
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled_call = torch.compile(lambda x: call(module, x), backend=count, fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(requires_grad):
        counts = []
        for steps, rows in ((5, 6), (7, 9), (11, 8)):
            if "batch_first" in options:
                steps, rows = rows, steps
            input = torch.randn(steps, rows, 3, requires_grad=requires_grad)
            output, expected = compiled_call(input), call(module, input)
            torch.testing.assert_close(output, expected)
            counts.append(len(graphs))
            if requires_grad:
                leaves = [input, *module.parameters()]
                ours = torch.autograd.grad(output.pow(2).sum(), leaves)
                for gradient, right in zip(ours, torch.autograd.grad(expected.pow(2).sum(), leaves), strict=True):
                    torch.testing.assert_close(gradient, right)
    assert counts == counts[:1] * 3


def test_a_model_with_inductor() -> None:
    """The real compiler, once: embedding, two regularised layers, head, loss, backward, a second length.

    In the mode that uses CUDA graphs; a CPU has none, and there it must make no difference.
    """

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 3)
            self.lstm = make(num_layers=2, zoneout_cell=0.3, dropout=0.2, hidden_dropout=0.2)
            self.head = nn.Linear(4, 11)

        def forward(self, tokens: Tensor, seed: Tensor) -> Tensor:
            output, _ = self.lstm(self.embedding(tokens), seed=seed)
            return nn.functional.cross_entropy(self.head(output).flatten(0, 1), tokens.flatten())

    model = Model()
    whole = torch.compile(model, fullgraph=True, dynamic=True, mode="reduce-overhead")
    for steps in (6, 9):
        tokens, seed = torch.randint(11, (steps, 4)), torch.tensor(steps)
        ours, right = whole(tokens, seed), model(tokens, seed)
        torch.testing.assert_close(ours, right)
        parameters = list(model.parameters())
        for gradient, expected in zip(
            torch.autograd.grad(ours, parameters), torch.autograd.grad(right, parameters), strict=True
        ):
            torch.testing.assert_close(gradient, expected)


def test_the_seed_drawn_is_eagers() -> None:
    module = make(zoneout_cell=0.4)
    whole = torch.compile(lambda x: module(x)[0], backend="aot_eager", fullgraph=True)
    input = torch.randn(5, 2, 3)
    torch.manual_seed(9)
    first, second = whole(input), whole(input)
    torch.manual_seed(9)
    assert torch.equal(first, module(input)[0])
    assert torch.equal(second, module(input)[0])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_draws_in_a_graph_with_a_backward_are_as_many_as_in_eager_code(backend: str) -> None:
    """The compiler makes one of calls that look the same: not of these."""
    module, cell, weight = make(zoneout_cell=0.4), fusedreg.LSTMCell(3, 4, update_dropout=0.5), torch.ones(3)
    weight.requires_grad_()

    def draws(x: Tensor) -> tuple[Tensor, ...]:
        thrice = torch.stack([module(x * weight)[0] for _ in range(3)])
        steps = torch.stack([cell(x[0] * weight)[0] for _ in range(3)])
        own = torch.vmap(lambda x: module(x)[0], randomness="different")((x * weight).expand(3, *x.shape))
        return thrice, steps, own

    input = torch.randn(5, 2, 3)
    torch.manual_seed(9)
    found = torch.compile(draws, backend=backend, fullgraph=True)(input)
    torch.manual_seed(9)
    for ours, expected in zip(found, draws(input), strict=True):
        torch.testing.assert_close(ours, expected)
        assert not any(torch.equal(ours[one], ours[two]) for one, two in ((0, 1), (1, 2), (0, 2)))
        ours.sum().backward(retain_graph=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_checkpointing_inside_draws_the_same_masks_again(backend: str) -> None:
    """The compiler keeps the generator's state of the draw; a module's ``last_seed`` is what it has to be told of."""
    module = make(zoneout_cell=0.4, weight_dropout=0.3)

    def function(x: Tensor) -> Tensor:
        output: Tensor = checkpoint(lambda x: module(x)[0], x, use_reentrant=False)
        return output

    input = torch.randn(5, 2, 3, requires_grad=True)
    torch.manual_seed(9)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        output = torch.compile(function, backend=backend, fullgraph=True)(input)
    torch.manual_seed(9)
    expected = module(input)[0]
    torch.testing.assert_close(output, expected)
    leaves = [input, *module.parameters()]
    gradients = (torch.autograd.grad(value.sum(), leaves) for value in (output, expected))
    for ours, own in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, own)


def test_seeds_that_are_ints() -> None:
    """A new int each call does not compile anew each time."""
    module = make(zoneout_cell=0.4)
    whole = torch.compile(lambda x, seed: module(x, seed=seed)[0], backend="aot_eager", fullgraph=True)
    input = torch.randn(5, 2, 3)
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for seed in (2, 3, 5, 7, 2**40, 2**63 - 1):
            assert torch.equal(whole(input, seed), module(input, seed=seed)[0])
    assert torch.equal(whole(input, -5), module(input, seed=-5)[0])


def test_running_statistics_are_updated() -> None:
    module, eager = make(norm=BatchNorm(max_steps=6)), make(norm=BatchNorm(max_steps=6))
    whole = torch.compile(lambda x: module(x)[0], backend="aot_eager", fullgraph=True)
    for _ in range(2):
        input = torch.randn(5, 4, 3)
        torch.testing.assert_close(whole(input), eager(input)[0])
    for name, value in module.named_buffers():
        torch.testing.assert_close(value, eager.get_buffer(name))


def test_changes_of_the_module_are_seen() -> None:
    """Rates, mode and recompute are guarded, not baked in."""
    module = make(zoneout_cell=0.4)
    whole = torch.compile(lambda x: module(x, seed=3)[0], backend="aot_eager", fullgraph=True)
    input = torch.randn(5, 2, 3)

    def agree() -> Tensor:
        output: Tensor = whole(input)
        torch.testing.assert_close(output, module(input, seed=3)[0])
        return output

    first = agree()
    module.regularization = dataclasses.replace(module.regularization, zoneout_cell=0.9)
    assert not torch.equal(agree(), first)
    module.eval()
    agree()
    module.train()
    module.recompute = True
    agree()
    module.regularization = Regularization()
    agree()


def test_the_reference_compiles_too() -> None:
    module = make(backend="reference", zoneout_cell=0.4, num_layers=2, dropout=0.3)
    input = torch.randn(3, 2, 3)
    whole = torch.compile(lambda x: module(x, seed=3)[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(input), module(input, seed=3)[0])


@pytest.mark.parametrize("name", ["grad", "vmap", "vmap_of_grad", "grad_of_vmap", "grad_of_grad"])
def test_torch_func_inside(name: str) -> None:
    """Traced naively these give zeros: see fusedreg.differentiation.allow_in_graph."""
    module = make(zoneout_cell=0.4)
    loss = lambda x: module(x, seed=3)[0].square().sum()  # noqa: E731
    row = lambda x: loss(x.unsqueeze(1))  # noqa: E731
    grad, vmap = torch.func.grad, torch.vmap
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "grad": grad(loss),
        "vmap": vmap(row, in_dims=1),
        "vmap_of_grad": vmap(grad(row), in_dims=1),
        "grad_of_vmap": grad(lambda x: vmap(row, in_dims=1)(x).sum()),
        "grad_of_grad": grad(lambda x: grad(loss)(x).square().sum()),
    }
    function = functions[name]
    input = torch.randn(5, 3, 3)
    whole = torch.compile(lambda x: function(x), backend="aot_eager", fullgraph=True)
    expected = function(input)
    assert expected.any()
    torch.testing.assert_close(whole(input), expected)


def test_second_derivatives_through_a_compiled_region_are_refused() -> None:
    """torch has none there, and says so; what it must not do is to give wrong ones."""
    module = make(zoneout_cell=0.4)
    whole = torch.compile(lambda x: module(x, seed=3)[0], backend="aot_eager", fullgraph=True)
    input = torch.randn(5, 2, 3, requires_grad=True)
    (first,) = torch.autograd.grad(whole(input).square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.square().sum().backward()


def test_importing_the_package_does_not_import_the_compiler() -> None:
    """It takes seconds, and most programs never compile."""
    import subprocess
    import sys

    code = "import sys, torch; before = 'torch._dynamo' in sys.modules; import fusedreg; "
    code += "fusedreg.LSTM(3, 4)(torch.ones(2, 2, 3))[0].sum().backward(); "
    code += "assert before or 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_export() -> None:
    """torch.export with a dynamic length, in evaluation."""
    module = make(zoneout_cell=0.4, num_layers=2, bidirectional=True).eval()
    input = torch.randn(5, 2, 3)
    steps = torch.export.Dim("steps", min=2, max=50)
    program = torch.export.export(module, (input,), dynamic_shapes={"input": {0: steps}})
    longer = torch.randn(9, 2, 3)
    output, state = program.module()(longer)
    torch.testing.assert_close(output, module(longer)[0])
    torch.testing.assert_close(tuple(state), module(longer)[1])
