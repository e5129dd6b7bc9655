"""AWD-LSTM: a language model whose layers differ in width, with everything the paper regularises it by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fusedreg.modules import LSTM
from fusedreg.regularization import RATE_NAMES, Regularization
from fusedreg.training.embedding import embedding_dropout as dropped_embedding
from fusedreg.training.locked_dropout import LockedDropout, check_rate
from fusedreg.validation import check_size

States = list[tuple[Tensor, Tensor]]


class LanguageModelResult(NamedTuple):
    """What :class:`AWDLSTM` returns.

    ``logits`` ``(T, B, V)``; ``state``, one ``(h, c)`` a layer; the last layer's output ``dropped`` and
    ``undropped``, ``(T, B, F)``: what AR and TAR are taken of.
    """

    logits: Tensor
    state: States
    dropped: Tensor
    undropped: Tensor


class AWDLSTM(nn.Module):
    """The language model of Merity, Keskar and Socher 2018 (arXiv:1708.02182).

    Words are embedded with embedding dropout by word type, run through LSTMs of ``embedding_size → hidden_size → … →
    embedding_size`` with dropped recurrent weights and locked dropout around each, and scored by a linear layer tied
    to the embedding. With the defaults these are the paper's 400-1150-1150-400 and its rates for the Penn Treebank.

    Any other :class:`~fusedreg.Regularization` can take the place of the paper's: zoneout, norms and the rest act in
    each layer as they do in :class:`~fusedreg.LSTM`. Only the last layer's ``output_dropout`` acts outside of it, so
    that its undropped output is at hand for TAR.

    Args:
        vocabulary_size: number of words ``V``.
        embedding_size: of a word's vector, and of the last layer where ``tied``.
        hidden_size: of the layers between.
        num_layers: at least 1.
        embedding_dropout: rate at which word types are dropped.
        regularization: rates by layer; default: ``Regularization.awd_lstm(num_layers)``.
        tied: one table for the embedding and the output layer (Press and Wolf 2017).
        backend, recompute: as in :class:`~fusedreg.LSTM`.
        device, dtype: of the parameters.

    Attributes:
        encoder: the embedding. lstms: the layers. locked_dropout: after the last. decoder: the output layer.

    Shapes:
        ``words`` ``(T, B)``, or ``(T,)`` unbatched; see :class:`LanguageModelResult`.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, fusedreg
        >>> from fusedreg import training
        >>> model = training.AWDLSTM(50, 8, 16)
        >>> words = torch.randint(50, (6, 2))
        >>> result = model(words[:-1])
        >>> loss = torch.nn.functional.cross_entropy(result.logits.flatten(0, 1), words[1:].flatten())
        >>> loss = loss + training.activation_regularization(result.dropped, 2.0)
        >>> loss = loss + training.temporal_activation_regularization(result.undropped, 1.0)
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int = 400,
        hidden_size: int = 1150,
        num_layers: int = 3,
        *,
        embedding_dropout: float = 0.1,
        regularization: Regularization | None = None,
        tied: bool = True,
        backend: str = "auto",
        recompute: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("vocabulary_size", vocabulary_size),
            ("embedding_size", embedding_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ):
            check_size(name, value, 1)
        if regularization is None:
            regularization = Regularization.awd_lstm(num_layers)
        regularization.check_layers(num_layers)
        self.embedding_dropout = check_rate("embedding_dropout", embedding_dropout)
        self.tied = tied
        widths = [embedding_size, *[hidden_size] * (num_layers - 1), embedding_size if tied else hidden_size]
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.encoder = nn.Embedding(vocabulary_size, embedding_size, **made)
        self.lstms = nn.ModuleList(
            LSTM(
                widths[layer],
                widths[layer + 1],
                regularization=_of_layer(regularization, layer, num_layers),
                backend=backend,
                recompute=recompute,
                **made,
            )
            for layer in range(num_layers)
        )
        # Between-layer dropout is no layer's own.
        self.between = [regularization.layer_rate("dropout", layer, num_layers) for layer in range(num_layers)]
        self.locked_dropout = LockedDropout(regularization.layer_rate("output_dropout", num_layers - 1, num_layers))
        self.decoder = nn.Linear(widths[-1], vocabulary_size, **made)
        if tied:
            self.decoder.weight = self.encoder.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as the paper does: words uniformly in ±0.1, ``W`` in ±1/√H, no output bias."""
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        if not self.tied:
            nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        for lstm in self._layers():
            lstm.reset_parameters()

    def _layers(self) -> list[LSTM]:
        return list(self.lstms)  # type: ignore[arg-type]

    def forward(
        self,
        words: Tensor,
        state: Sequence[tuple[Tensor, Tensor]] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
    ) -> LanguageModelResult:
        """Score every word of the vocabulary as the next one, after each step.

        Args:
            words: ``(T, B)`` indices, or ``(T,)``.
            state: one ``(h, c)`` a layer, as an earlier call returned them; ``None`` for zeros. Detach it with
                :func:`fusedreg.truncated.detach`.
            lengths, reset: as in :meth:`fusedreg.LSTM.forward`.
        """
        if state is not None and len(state) != len(self.lstms):
            raise ValueError(f"state: expected one (h, c) a layer, {len(self.lstms)} of them, got {len(state)}")
        output = dropped_embedding(self.encoder, words, self.embedding_dropout)
        states: States = []
        for layer, (lstm, rate) in enumerate(zip(self._layers(), self.between, strict=True)):
            result = lstm(output, None if state is None else state[layer], lengths=lengths, reset=reset)
            output = F.dropout(result.output, rate, self.training) if rate else result.output
            states.append(result.state)
        dropped = self.locked_dropout(output)
        return LanguageModelResult(self.decoder(dropped), states, dropped, output)


def _of_layer(regularization: Regularization, layer: int, num_layers: int) -> Regularization:
    """One layer's own rates, without what acts outside of it."""
    rates: dict[str, Any] = {name: regularization.layer_rate(name, layer, num_layers) for name in RATE_NAMES}
    rates["dropout"] = 0.0
    if layer == num_layers - 1:
        rates["output_dropout"] = 0.0
    return dataclasses.replace(regularization, **rates)
