"""Published settings of :class:`~fusedreg.Regularization`, each with its paper and task.

What a paper does outside the LSTM (embedding dropout, dropout before the output layer's softmax, weight decay,
clipping) is said beside the preset; :mod:`fusedreg.training` has it. Rates that were found for one task are where to
begin on another, no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class Presets:
    """Class methods that :class:`~fusedreg.Regularization` inherits; each returns a new value."""

    @classmethod
    def _made(cls, **options: Any) -> Self:
        make: Any = cls  # the dataclass derived from this has the fields
        preset: Self = make(**options)
        return preset

    @classmethod
    def awd_lstm(cls, num_layers: int = 3) -> Self:
        """Merity, Keskar and Socher 2018 (arXiv:1708.02182), AWD-LSTM on the word-level Penn Treebank.

        Locked dropout of .4 on the embedded words, .25 between layers and .4 on the last output; half of ``W_hh``'s
        weights dropped. Outside the LSTM: embedding dropout .1, AR 2, TAR 1, gradient norm .25, weight decay 1.2e-6,
        NT-ASGD with a learning rate of 30, back-propagation over about 70 steps; three layers of 1150, 1150 and 400
        (:class:`fusedreg.training.AWDLSTM` is all of the model). The authors' code gives perplexities of 61.2 / 58.8
        (validation / test), and 58.8 / 56.5 finetuned. On WikiText-2 it has .65 on the embedded words and .2 between
        layers.

        Args:
            num_layers: of the LSTM that this is for; the paper's has three.

        Example:
            >>> import fusedreg
            >>> fusedreg.Regularization.awd_lstm().output_dropout
            (0.25, 0.25, 0.4)
        """
        return cls._made(
            input_dropout=(0.4, *[0.0] * (num_layers - 1)),
            output_dropout=(*[0.25] * (num_layers - 1), 0.4),
            weight_dropout=0.5,
        )

    @classmethod
    def gal(cls, num_layers: int = 2) -> Self:
        """Gal and Ghahramani 2016 (arXiv:1512.05287), the untied large model on the word-level Penn Treebank: 75.2.

        One mask a sequence and gate: .5 on each layer's input, .3 on ``h``, .5 on the last output. Outside the LSTM:
        embedding dropout .3, weight decay 1e-7, gradient norm 10, SGD, 35 steps, two layers of 1500. Averaging
        predictions over 100 draws of the masks gives 73.4.

        Args:
            num_layers: of the LSTM that this is for; the paper's has two.

        Example:
            >>> import fusedreg
            >>> fusedreg.Regularization.gal().gate_masks
            'untied'
        """
        return cls._made(
            input_dropout=0.5,
            hidden_dropout=0.3,
            output_dropout=(*[0.0] * (num_layers - 1), 0.5),
            gate_masks="untied",
        )

    @classmethod
    def zaremba(cls, size: str = "medium") -> Self:
        """Zaremba, Sutskever and Vinyals 2014 (arXiv:1409.2329), word-level Penn Treebank: 82.7, or 78.4 the large.

        Dropout of what goes from layer to layer, never of the recurrence: .5 in the medium model (two layers of 650),
        .65 in the large (of 1500). Outside the LSTM: the same dropout of the embedded words and of the last output,
        by :class:`torch.nn.Dropout`; gradient norm 5 (medium) or 10, SGD, 35 steps.

        Args:
            size: ``"medium"`` or ``"large"``.

        Raises:
            ValueError: another size.

        Example:
            >>> import fusedreg
            >>> fusedreg.Regularization.zaremba("large").dropout
            0.65
        """
        rates = {"medium": 0.5, "large": 0.65}
        if size not in rates:
            raise ValueError(
                f"size: expected 'medium' or 'large', got {size!r}; the paper's small model has no dropout"
            )
        return cls._made(dropout=rates[size])

    @classmethod
    def zoneout_char_lm(cls) -> Self:
        """Krueger et al. 2017 (arXiv:1606.01305), character-level Penn Treebank: 1.27 bits a character.

        Zoneout of .5 on the cell and .05 on ``h``. Around it: one layer of 1000, Adam with .002, 100 steps, gradient
        norm 1.

        Example:
            >>> import fusedreg
            >>> fusedreg.Regularization.zoneout_char_lm().changed()
            {'zoneout_hidden': 0.05, 'zoneout_cell': 0.5}
        """
        return cls._made(zoneout_hidden=0.05, zoneout_cell=0.5)

    @classmethod
    def zoneout_text8(cls) -> Self:
        """Krueger et al. 2017 (arXiv:1606.01305), characters of Text8: 1.36 bits a character by the authors' code.

        Zoneout of .2 on both states.

        Example:
            >>> import fusedreg
            >>> fusedreg.Regularization.zoneout_text8().changed()
            {'zoneout_hidden': 0.2, 'zoneout_cell': 0.2}
        """
        return cls._made(zoneout_hidden=0.2, zoneout_cell=0.2)

    @classmethod
    def zoneout_permuted_mnist(cls, *, batch_norm: bool = False, max_steps: int = 784) -> Self:
        """Krueger et al. 2017 (arXiv:1606.01305), permuted sequential MNIST: 93.1%, and 95.9% with batch norm.

        Zoneout of .15 on both states; one layer of 100, RMSProp with 1e-3 and a momentum of .9, batches of 100,
        gradient norm 1. (The authors' released code draws its "permutation" with replacement.)

        Args:
            batch_norm: add :meth:`recurrent_batch_norm`.
            max_steps: its longest step.

        Example:
            >>> import fusedreg
            >>> fusedreg.Regularization.zoneout_permuted_mnist(batch_norm=True).norm.max_steps
            784
        """
        norm = _batch_norm(max_steps) if batch_norm else None
        return cls._made(zoneout_hidden=0.15, zoneout_cell=0.15, norm=norm)

    @classmethod
    def recurrent_batch_norm(cls, max_steps: int) -> Self:
        """Cooijmans et al. 2017 (arXiv:1603.09025): 1.32 bits on the character-level Penn Treebank; 99.0% and 95.4%
        on sequential and permuted MNIST.

        Input, recurrence and cell normalised with statistics of each step, gains of .1 to begin with. Around it: on
        the Penn Treebank one layer of 1000, Adam with .002, 100 steps, batches of 64, gradient norm 1; on MNIST one
        of 100, RMSProp with 1e-3 and a momentum of .9, batches of 100, gradient norm 1.

        Args:
            max_steps: the longest step that keeps statistics of its own: the length you train on.

        Example:
            >>> import fusedreg
            >>> fusedreg.Regularization.recurrent_batch_norm(100).norm.weight_init
            0.1
        """
        return cls._made(norm=_batch_norm(max_steps))

    @classmethod
    def input_batch_norm(cls) -> Self:
        """Laurent et al. 2016 (arXiv:1510.01378): only the input's term is normalised, over all steps at once.

        "Sequence-wise": one mean and variance over batch and time. It trains faster, and in the paper generalises no
        better.

        Example:
            >>> import fusedreg
            >>> fusedreg.Regularization.input_batch_norm().norm.recurrent
            False
        """
        from fusedreg.regularization import BatchNorm  # here, because fusedreg.regularization imports this module

        norm = BatchNorm(statistics="shared", input_statistics="sequence", recurrent=False, cell=False, weight_init=1.0)
        return cls._made(norm=norm)

    @classmethod
    def layer_norm(cls) -> Self:
        """Ba, Kiros and Hinton 2016 (arXiv:1607.06450): layer normalisation of input, recurrence and cell.

        Example:
            >>> import fusedreg
            >>> fusedreg.Regularization.layer_norm().norm.eps
            1e-05
        """
        from fusedreg.regularization import LayerNorm  # here, because fusedreg.regularization imports this module

        return cls._made(norm=LayerNorm())


def _batch_norm(max_steps: int) -> Any:
    from fusedreg.regularization import BatchNorm  # here, because fusedreg.regularization imports this module

    return BatchNorm(max_steps=max_steps, weight_init=0.1)
