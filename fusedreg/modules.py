"""``LSTM``: the module that replaces ``torch.nn.LSTM``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedreg import backends, conversion, functional, hyperparameters, running_statistics, validation
from fusedreg.functional import LSTMResult, LSTMResultWithCells, Plan
from fusedreg.layer import LayerParameters
from fusedreg.parameters import Architecture, suffix
from fusedreg.recording import Recorder
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


class LSTM(RegularizedModule):
    """A multi-layer LSTM with its regularisers inside: :class:`torch.nn.LSTM`'s signature, and more.

    With every rate zero and no norm it is exactly ``nn.LSTM``, and parameters carry its names, so that a
    ``state_dict`` of one loads into the other, both ways. The step's equations stand in :mod:`fusedreg.reference`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as
            in :class:`torch.nn.LSTM`, in its order. ``dropout`` is below 1, and may be one rate a layer.
        regularization: a :class:`~fusedreg.Regularization`; or pass its fields themselves, as the arguments from
            ``input_dropout`` to ``norm``, which are described there.
        recompute: keep only states for the backward, about a third of the memory, and recompute the gates there.
        backend: ``"auto"``, or one by name, which then either runs or raises: ``"cpu"``, ``"cuda"``, ``"triton"``,
            ``"reference"``. See :func:`fusedreg.backends.explain`.

    Attributes:
        regularization: what is in force; may be replaced at any time by one with the same ``norm``.
        dropout: its between-layer dropout, as ``nn.LSTM``'s attribute; may be assigned.
        last_seed: the seed of the last call that drew masks, to replay it with ``seed=``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came, and the remedy.

    Example:
        >>> import torch, fusedreg
        >>> lstm = fusedreg.LSTM(10, 20, num_layers=2, zoneout_cell=0.5, zoneout_hidden=0.05, hidden_dropout=0.25)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    __constants__ = nn.LSTM.__constants__

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    proj_size: int
    _derived = ("_plans", "_groups", "_buffer_groups")
    _recorder: Recorder | None = None  # who watches the calls: see fusedreg.inspect

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: Rate = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
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
        hyperparameters.check_dropout(dropout)
        hyperparameters.check_dtype(dtype)
        fields = Regularization(
            dropout,
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
        bidirectional = bool(bidirectional)
        architecture = Architecture(input_size, hidden_size, num_layers, bias, bidirectional, proj_size, chosen.norm)
        hyperparameters.check_architecture(architecture, batch_first)
        validation.check_flag("recompute", recompute)
        backends.check_name(backend)
        chosen.check_layers(num_layers)
        if num_layers == 1 and chosen.dropout not in (0.0, (), (0.0,)):
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={chosen.dropout} and num_layers={num_layers}",
                stacklevel=2,
            )
        self.mode = "LSTM"
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self.recompute = recompute
        self.backend = backend
        self._regularization = chosen
        self._prepare()

        for name, shape in architecture.parameter_shapes().items():
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        if isinstance(chosen.norm, BatchNorm):
            for name, value in running_statistics.initial_buffers(architecture, device, dtype).items():
                self.register_buffer(name, value)
        self.reset_parameters()

    def _prepare(self) -> None:
        """What a call looks up: derived from the hyperparameters, so that it is neither pickled nor kept in step."""
        architecture = self.architecture
        self._groups = architecture.group_names()
        norm = self._regularization.norm
        self._buffer_groups: tuple[dict[str, str], ...] = ()
        if isinstance(norm, BatchNorm):
            fields = running_statistics.buffer_shapes(norm, self.hidden_size)
            self._buffer_groups = tuple(
                {field: field + suffix(*place) for field in fields} for place in architecture.places()
            )
        self._plans: dict[tuple[bool, bool, bool], Plan] = {
            (training, recompute, return_cells): functional.make_plan(
                architecture,
                self._regularization,
                training=training,
                recompute=recompute,
                return_cells=return_cells,
                batch_first=self.batch_first,
            )
            for training in (False, True)
            for recompute in (False, True)
            for return_cells in (False, True)
        }

    @property
    def architecture(self) -> Architecture:
        """The sizes, and which parameters there are."""
        return Architecture(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.bias,
            self.bidirectional,
            self.proj_size,
            self._regularization.norm,
        )

    def _check(self, regularization: Regularization) -> None:
        regularization.check_layers(self.num_layers)

    @property
    def dropout(self) -> Any:
        """Between-layer dropout, as ``nn.LSTM``'s attribute: a float, or a tuple with one a layer."""
        return self._regularization.dropout

    @dropout.setter
    def dropout(self, value: Rate) -> None:
        self.regularization = dataclasses.replace(self._regularization, dropout=value)

    @property
    def num_directions(self) -> int:
        """2 with ``bidirectional``, else 1."""
        return 2 if self.bidirectional else 1

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_cell_states: bool = False,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> LSTMResult | LSTMResultWithCells:
        """Run the layers over a batch of sequences.

        Args:
            input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)`` unbatched, or a ``PackedSequence``.
            hx: ``(h_0, c_0)`` of shapes ``(L * D, B, P)`` and ``(L * D, B, H)``, without ``B`` where unbatched;
                ``None`` for zeros. ``c_0`` may be float32 beside 16-bit inputs, and is carried unrounded.
            lengths: ``(B,)`` integers on any device, in any order. A row past its length keeps its state, its output
                is 0, and its padding may hold anything. Out of ``[0, T]`` they raise on the host and are clamped on
                another device, and in compiled code.
            reset: bool, the input's shape without its features. Where true, the row's state becomes zero *before*
                the step. Not with ``bidirectional``.
            return_cell_states: add ``cell_states``, every cell of the last layer in the output's layout, ``D * H``
                wide, float32 at least.
            seed: decides the masks: an int or a 0-dimensional int64 tensor. Default: drawn from torch's generator of
                the input's device, if some rate is active.
            generator: draws the seed instead. In eager mode only.

        Returns:
            ``output, (h_n, c_n)`` as ``nn.LSTM`` has them, and ``cell_states`` where asked for.

        Raises:
            ValueError, TypeError: naming the argument, what was expected, what came, and the remedy. Parameters and
                running statistics are then as before.
        """
        plan = self._plans[self.training, self.recompute, bool(return_cell_states)]
        if plan.batch_first is not self.batch_first:  # assigned after construction, as nn.LSTM allows
            validation.check_flag("batch_first", self.batch_first)
            self._prepare()
            plan = self._plans[self.training, self.recompute, bool(return_cell_states)]
        running = self._layer_buffers() if self._buffer_groups else None
        layers, recorder = self._layer_parameters(), self._recorder
        call = functional.run(plan, input, hx, layers, running, lengths, reset, seed, generator, self.backend, recorder)
        if plan.draws:
            self._remember_seed(call.seed, given=seed)
        norm = self._regularization.norm
        if running is not None and plan.training and isinstance(norm, BatchNorm):
            running_statistics.check_samples(running, call.statistics, call.lengths)
            sizes = {"steps": call.steps, "rows": call.rows}
            for buffers, statistics in zip(running, call.statistics, strict=True):
                assert statistics is not None
                running_statistics.update_running(buffers, statistics, norm, **sizes, lengths=call.lengths)
        return call.result

    def _layer_parameters(self) -> list[LayerParameters]:
        """Read by name at each call, since they may be swapped, parametrised or plain tensors by then."""
        own = self._parameters
        layers = []
        for names in self._groups:
            layers.append(
                LayerParameters(
                    *[None if name is None else own[name] if name in own else getattr(self, name) for name in names]  # type: ignore[arg-type]
                )
            )
        return layers

    def _layer_buffers(self) -> list[dict[str, Tensor]]:
        """The running statistics of each layer and direction, read by name as the parameters are."""
        return [{field: getattr(self, name) for field, name in names.items()} for names in self._buffer_groups]

    def flatten_parameters(self) -> None:
        """Do nothing: ``nn.LSTM`` needs it for cuDNN, and programs call it."""

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self._all_weights for name in names]

    @property
    def _all_weights(self) -> list[list[str]]:
        architecture = self.architecture
        return [
            [field + suffix(layer, direction) for field in architecture.torch_shapes(layer)]
            for layer, direction in architecture.places()
        ]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights and biases by layer and direction, as ``nn.LSTM`` lists them; without a norm's parameters."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @classmethod
    def from_torch(cls, module: nn.LSTM, **options: Any) -> LSTM:
        """An LSTM with the hyperparameters, the mode and copies of the weights of an ``nn.LSTM``.

        Args:
            module: to be copied; it is left as it is.
            **options: keyword arguments of :class:`LSTM` that ``nn.LSTM`` does not have: the regularisers,
                ``recompute`` and ``backend``. ``dropout`` comes from ``module`` unless it is given here.

        Raises:
            TypeError: not an ``nn.LSTM``. ValueError: its weights are parametrised; make them plain first with
                ``torch.nn.utils.parametrize.remove_parametrizations``.

        Example:
            >>> import torch, fusedreg
            >>> lstm = fusedreg.LSTM.from_torch(torch.nn.LSTM(3, 4), zoneout_cell=0.5)
            >>> lstm
            LSTM(3, 4, zoneout_cell=0.5)
        """
        return conversion.from_torch(cls, module, options)

    def to_torch(self) -> nn.LSTM:
        """An ``nn.LSTM`` with copies of the weights, which computes what this module computes in evaluation.

        Regularisers that act in training only are left behind, but for ``dropout``.

        Raises:
            ValueError: ``nn.LSTM`` cannot compute it: there is a norm, zoneout or cell dropout (which act in
                evaluation too; assign a ``regularization`` without them first), a dropout that differs between
                layers, or a parametrised weight.

        Example:
            >>> import fusedreg
            >>> fusedreg.LSTM(3, 4, hidden_dropout=0.25).to_torch()
            LSTM(3, 4)
        """
        return conversion.to_torch(self)

    def extra_repr(self) -> str:
        """What differs from the defaults, in ``nn.LSTM``'s manner."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {"proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False}
        parts += [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        changed = self._regularization.changed()
        if "dropout" in changed:
            parts.append(f"dropout={changed.pop('dropout')}")
        if self.bidirectional:
            parts.append(f"bidirectional={self.bidirectional}")
        parts += [f"{name}={value!r}" for name, value in changed.items()]
        parts += [f"recompute={self.recompute}"] if self.recompute else []
        parts += [f"backend={self.backend!r}"] if self.backend != "auto" else []
        return ", ".join(parts)
