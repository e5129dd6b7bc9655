"""``LSTMCell``: one step at a time, with masks that stay fixed over a sequence where they are to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedreg import backends, cell_checks, conversion, functional, hyperparameters, running_statistics, validation
from fusedreg.autocast import autocast
from fusedreg.functional import Plan
from fusedreg.layer import LayerParameters
from fusedreg.parameters import Architecture
from fusedreg.regularization import (
    BatchNorm,
    GateMasks,
    LayerNorm,
    Rate,
    Regularization,
    UpdateMask,
    WeightMask,
    ZoneoutOutput,
)
from fusedreg.regularized import RegularizedModule
from fusedreg.seeds import as_seed, draw_seed

_SUFFIX = "_l0"  # of the same parameters and buffers in an LSTM


class CellSequence(NamedTuple):
    """Which sequence a step of a cell belongs to, and which step of it that is: what decides the step's masks.

    Attributes:
        seed: 0-dimensional int64, or ``None`` where no mask is drawn.
        step: the step's number, from 0.
    """

    seed: Tensor | None
    step: int = 0

    def at(self, step: int) -> CellSequence:
        """The same sequence at another step."""
        return CellSequence(self.seed, step)

    def next(self) -> CellSequence:
        """The same sequence, one step on."""
        return CellSequence(self.seed, self.step + 1)


class LSTMCell(RegularizedModule):
    """One step of an LSTM with its regularisers inside: :class:`torch.nn.LSTMCell`'s signature, and more.

    The step is that of :mod:`fusedreg.reference`, of one layer. Without a norm, with ``W̃`` the masked weights::

        z      = (m_x ⊙ x) W_ihᵀ + (m_h ⊙ h) W̃_hhᵀ + (b_ih + b_hh)
        c̃      = m_c ⊙ (σ(z_f) ⊙ c + m_u ⊙ σ(z_i) ⊙ tanh(z_g));   h̃ = σ(z_o) ⊙ tanh(c̃)
        c', h' = ζ_c ⊙ c + (1 - ζ_c) ⊙ c̃,   ζ_h ⊙ h + (1 - ζ_h) ⊙ h̃;   y = m_y ⊙ h'

    Parameters carry ``nn.LSTMCell``'s names, so that a ``state_dict`` of one loads into the other, both ways.

    Called plainly, each step draws masks of its own. Within a sequence from :meth:`begin` it draws what
    :class:`fusedreg.LSTM` draws with the same seed: masks that last a sequence stay, the others follow the step's
    number. Masks are by row, so rows keep their places in the batch.

    Args:
        input_size, hidden_size, bias, device, dtype: as in :class:`torch.nn.LSTMCell`, in its order.
        regularization: a :class:`~fusedreg.Regularization`; or pass its fields themselves, as the arguments from
            ``input_dropout`` to ``norm``, which are described there. ``dropout``, which acts between layers, is
            refused, and so is a ``BatchNorm`` with ``input_statistics="sequence"``, which needs all steps at once.
            A ``BatchNorm`` takes the statistics of each step over the batch and updates its running ones at each
            call: those of the step, or with ``statistics="shared"`` the only ones.
        recompute, backend: as in :class:`fusedreg.LSTM`.

    Attributes:
        regularization: what is in force; may be replaced at any time by one with the same ``norm``.
        last_seed: the seed of the last call that drew masks, to replay it with ``seed=``.

    Shapes:
        - input ``(B, I)`` or ``(I,)``; ``h`` and ``c`` ``(B, H)`` or ``(H,)``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came, and the remedy.

    Example:
        >>> import torch, fusedreg
        >>> cell = fusedreg.LSTMCell(10, 20, zoneout_cell=0.5, hidden_dropout=0.25)
        >>> state, sequence = None, cell.begin()
        >>> for step, input in enumerate(torch.randn(6, 3, 10)):
        ...     state = cell(input, state, sequence.at(step))
        >>> state[0].shape
        torch.Size([3, 20])
    """

    __constants__ = nn.LSTMCell.__constants__

    input_size: int
    bias: bool
    weight_ih: nn.Parameter
    weight_hh: nn.Parameter
    bias_ih: nn.Parameter | None
    bias_hh: nn.Parameter | None
    _derived = ("_plans", "_parameter_names", "_buffer_names")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        regularization: Regularization | None = None,
        recompute: bool = False,
        backend: str = "auto",
        input_dropout: Rate = 0.0,
        hidden_dropout: Rate = 0.0,
        output_dropout: Rate = 0.0,
        update_dropout: Rate = 0.0,
        cell_dropout: Rate = 0.0,
        weight_dropout: Rate = 0.0,
        zoneout_hidden: Rate = 0.0,
        zoneout_cell: Rate = 0.0,
        gate_masks: GateMasks = "tied",
        update_mask: UpdateMask = "step",
        weight_mask: WeightMask = "element",
        zoneout_output: ZoneoutOutput = "state",
        norm: BatchNorm | LayerNorm | None = None,
    ) -> None:
        super().__init__()
        hyperparameters.check_dtype(dtype)
        fields = Regularization(
            0.0,
            input_dropout,
            hidden_dropout,
            output_dropout,
            update_dropout,
            cell_dropout,
            weight_dropout,
            zoneout_hidden,
            zoneout_cell,
            gate_masks,
            update_mask,
            weight_mask,
            zoneout_output,
            norm,
        )
        chosen = hyperparameters.merge_regularization(regularization, fields)
        architecture = Architecture(input_size, hidden_size, bias=bias, norm=chosen.norm)
        hyperparameters.check_architecture(architecture, batch_first=False)
        validation.check_flag("recompute", recompute)
        backends.check_name(backend)
        self._check(chosen)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.recompute = recompute
        self.backend = backend
        self._regularization = chosen
        self._prepare()

        for name, shape in architecture.parameter_shapes().items():
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name.removesuffix(_SUFFIX), parameter)
        for name in () if bias else ("bias_ih", "bias_hh"):
            self.register_parameter(name, None)
        for name, value in running_statistics.initial_buffers(architecture, device, dtype).items():
            self.register_buffer(name.removesuffix(_SUFFIX), value)
        self.reset_parameters()

    def _check(self, regularization: Regularization) -> None:
        regularization.check_layers(1)
        cell_checks.check_regularization(regularization)

    def _prepare(self) -> None:
        architecture = self._architecture
        (names,) = architecture.group_names()
        self._parameter_names = tuple(None if name is None else name.removesuffix(_SUFFIX) for name in names)
        norm = self._regularization.norm
        self._buffer_names: tuple[str, ...] = ()
        if isinstance(norm, BatchNorm):
            self._buffer_names = tuple(running_statistics.buffer_shapes(norm, self.hidden_size))
        self._plans: dict[tuple[bool, bool], Plan] = {
            (training, recompute): functional.make_plan(
                architecture, self._regularization, training=training, recompute=recompute
            )
            for training in (False, True)
            for recompute in (False, True)
        }

    @property
    def _architecture(self) -> Architecture:
        return Architecture(self.input_size, self.hidden_size, bias=self.bias, norm=self._regularization.norm)

    def begin(self, seed: int | Tensor | None = None, *, generator: torch.Generator | None = None) -> CellSequence:
        """Begin a sequence: what the steps of it are given, so that they draw what belongs together.

        Args:
            seed: decides the masks: an int or a 0-dimensional int64 tensor. Default: drawn from torch's generator of
                the parameters' device, if some rate is active.
            generator: draws the seed instead. In eager mode only.

        Returns:
            The sequence at step 0: a small immutable value. Pass ``sequence.at(step)`` to each step, or
            ``sequence.next()`` from one to the next.

        Raises:
            ValueError, TypeError: of a seed or a generator that is none.

        Example:
            >>> import torch, fusedreg
            >>> cell, lstm = fusedreg.LSTMCell(3, 4, zoneout_cell=0.5), fusedreg.LSTM(3, 4, zoneout_cell=0.5)
            >>> _ = cell.load_state_dict({name[:-3]: value for name, value in lstm.state_dict().items()})
            >>> input, sequence = torch.randn(2, 5, 3), cell.begin(seed=7)
            >>> state = cell(input[1], cell(input[0], None, sequence), sequence.next())
            >>> torch.allclose(state[0], lstm(input, seed=7).output[1])
            True
        """
        device = self.weight_ih.device
        draws = self._plans[self.training, self.recompute].draws
        return CellSequence(self._seed(seed, generator, device) if draws or seed is not None else None)

    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        sequence: CellSequence | None = None,
        *,
        reset: Tensor | None = None,
        return_output: bool = False,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Run one step.

        Args:
            input: ``(B, I)``, or ``(I,)`` unbatched.
            hx: ``(h, c)``, each ``(B, H)``, or ``(H,)`` unbatched; ``None`` for zeros. ``c`` may be float32 beside
                16-bit inputs, and then comes back unrounded.
            sequence: from :meth:`begin`, at this step. Default: a step by itself, with masks of its own.
            reset: bool, ``(B,)``, or without dimensions unbatched. Where true, the row's state becomes zero before
                the step.
            return_output: return the output ``y`` too, which ``output_dropout`` and ``zoneout_output="candidate"``
                make differ from ``h``; with these it has to be asked for.
            seed, generator: as in :meth:`begin`, for a step by itself.

        Returns:
            ``(h, c)``, as ``nn.LSTMCell`` has them; with ``return_output`` the pair ``output, (h, c)``.

        Raises:
            ValueError, TypeError: naming the argument, what was expected, what came, and the remedy. Running
                statistics are then as before.
        """
        own = self._parameters
        parameters = LayerParameters(
            *[
                None if name is None else own[name] if name in own else getattr(self, name)  # type: ignore[arg-type]
                for name in self._parameter_names
            ]
        )
        cast = autocast(input, hx, [parameters], of_cell=True) if torch._C._is_any_autocast_enabled() else None
        if cast is not None:
            input, hx, (parameters,) = cast[:3]
        plan = self._plans[self.training, self.recompute]
        options = plan.options[0]
        if not return_output:
            cell_checks.check_output_is_asked_for(options)
        shape = cell_checks.check_input(input, self.input_size, parameters.weight_ih)
        hidden, cell = (None, None) if hx is None else cell_checks.check_state(hx, shape, self.hidden_size, input)
        if reset is not None:
            reset = cell_checks.check_reset(reset, input).view(1, -1)
        batched = len(shape) == 2
        if not batched:
            input = input[None]
            hidden, cell = (None if state is None else state[None] for state in (hidden, cell))
        if plan.batch_statistics:
            validation.check_batch_norm_rows(input.shape[0])

        place = None
        if plan.draws or sequence is not None or seed is not None or generator is not None:
            place = self._place(plan.draws, sequence, seed, generator, input.device)
        layer = functional.LAYER_FUNCTIONS[
            backends.resolve(self.backend, input.device, input.dtype, process_group=plan.process_group)
        ]
        buffers, running, step = None, None, 0 if place is None else place.step
        if self._buffer_names:
            buffers = {name: getattr(self, name) for name in self._buffer_names}
            running = running_statistics.read_step(buffers, options, step, input.dtype)
        seed_of_step = None if place is None else _seed_of_step(place)
        output, new_hidden, new_cell, _, statistics = layer(
            input[None], hidden, cell, parameters, options, reset=reset, seed=seed_of_step, running=running
        )
        if plan.draws and place is not None:
            self._remember_seed(place.seed, given=seed)
        norm = options.norm
        if statistics is not None and buffers is not None and isinstance(norm, BatchNorm):
            running_statistics.check_samples([buffers], [statistics], None)
            running_statistics.update_step(buffers, statistics, norm, step=step, rows=input.shape[0])
        wanted = input.dtype if cell is None else cell.dtype
        if cast is not None:
            wanted = cast.cell_type
            output, new_hidden = output.to(cast.hidden_type), new_hidden.to(cast.hidden_type)
        if new_cell.dtype != wanted:
            new_cell = new_cell.to(wanted)
        if not batched:
            new_hidden, new_cell = new_hidden[0], new_cell[0]
        if not return_output:
            return new_hidden, new_cell
        return functional.LSTMResult(output[0] if batched else output[0, 0], (new_hidden, new_cell))

    def _place(
        self, draws: bool, sequence: CellSequence | None, seed: Any, generator: Any, device: torch.device
    ) -> CellSequence:
        """The sequence and step that decide this step's masks and statistics."""
        if sequence is None:
            return CellSequence(self._seed(seed, generator, device) if draws or seed is not None else None)
        cell_checks.check_sequence(sequence, seed, generator, draws)
        return sequence if sequence.seed is None else CellSequence(as_seed(sequence.seed, device), sequence.step)

    @staticmethod
    def _seed(seed: Any, generator: Any, device: torch.device) -> Tensor:
        if generator is not None:
            validation.check_generator(generator, seed)
        return draw_seed(device, generator=generator) if seed is None else as_seed(seed, device)

    @classmethod
    def from_torch(cls, module: nn.LSTMCell, **options: Any) -> LSTMCell:
        """A cell with the sizes, the mode and copies of the weights of an ``nn.LSTMCell``.

        Args:
            module: to be copied; it is left as it is.
            **options: keyword arguments of :class:`LSTMCell` that ``nn.LSTMCell`` does not have.

        Raises:
            TypeError: not an ``nn.LSTMCell``. ValueError: its weights are parametrised.

        Example:
            >>> import torch, fusedreg
            >>> fusedreg.LSTMCell.from_torch(torch.nn.LSTMCell(3, 4), zoneout_cell=0.5)
            LSTMCell(3, 4, zoneout_cell=0.5)
        """
        return conversion.cell_from_torch(cls, module, options)

    def to_torch(self) -> nn.LSTMCell:
        """An ``nn.LSTMCell`` with copies of the weights, which computes what this one computes in evaluation.

        Raises:
            ValueError: ``nn.LSTMCell`` cannot compute it: there is a norm, zoneout or cell dropout (which act in
                evaluation too), or a parametrised weight.
        """
        return conversion.cell_to_torch(self)

    def extra_repr(self) -> str:
        """What differs from the defaults, in ``nn.LSTMCell``'s manner."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        parts += [] if self.bias else ["bias=False"]
        parts += [f"{name}={value!r}" for name, value in self._regularization.changed().items()]
        parts += [f"recompute={self.recompute}"] if self.recompute else []
        parts += [f"backend={self.backend!r}"] if self.backend != "auto" else []
        return ", ".join(parts)


def _seed_of_step(place: CellSequence) -> Tensor | None:
    """The operator's seed: that of the sequence, with the step from which it counts."""
    if place.seed is None or (isinstance(place.step, int) and place.step == 0):
        return place.seed
    return torch.stack((place.seed, torch.full_like(place.seed, place.step))).unsqueeze(0)
