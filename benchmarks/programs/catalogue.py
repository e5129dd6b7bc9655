"""The programs: what is installed, which of its own tests run, which example, and what explains a difference."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    """A published package.

    Args:
        name: on PyPI.
        version: the version that is installed, and whose source distribution holds the tests.
        uses: what it does with an LSTM, for the page.
        tests: pytest's arguments; ``{source}`` is the unpacked source distribution. None of them downloads anything.
        example: the module in this folder.
        differences: why a test or a figure differs between the two.
        gives_its_model: whether the example has the model in its hands before it is trained.
    """

    name: str
    version: str
    uses: str
    example: str
    tests: tuple[str, ...] = ()
    differences: str = ""
    gives_its_model: bool = True

    @property
    def requirement(self) -> str:
        """For pip."""
        return f"{self.name}=={self.version}"


# What the packages need pinned together: the newest pandas has dropped a frequency that neuralforecast's data has.
ALSO = ("pandas==2.3.3", "pytest")

PROGRAMS = (
    Program(
        "pytorch-forecasting",
        "1.8.0",
        "the temporal fusion transformer; and a class of its own derived from `nn.LSTM` for rows of length zero",
        "fusion_transformer",
        ("{source}/tests/test_models/test_tft_v2.py", "{source}/tests/test_models/test_nn/test_rnn.py"),
        "The three tests that fail are about a class that derives from `nn.RNNBase` and `nn.LSTM` at once and calls "
        "the first one's constructor. It cannot be changed by an import: `fusedreg.LSTM` is no `nn.RNNBase`, and "
        "`replace_lstms` refuses such a class by name, since what it adds is unknown. What this one adds, rows of "
        "length zero, `fusedreg.LSTM(...)(input, lengths=lengths)` does by itself. "
        "The error after training depends on rounding, as `nn.LSTM` with its weights changed by a millionth shows.",
    ),
    Program(
        "sb3-contrib",
        "2.9.2",
        "`RecurrentPPO`: one step at a time while it acts, sequences cut at episodes' ends while it learns",
        "recurrent_ppo",
        ("{source}/tests/test_lstm.py", "-m", "not slow"),
    ),
    Program(
        "neuralforecast",
        "3.3.0",
        "the models `LSTM` (with `proj_size` where it is recurrent), `DeepAR` and `TFT`",
        "forecasts",
    ),
    Program(
        "stanza",
        "1.15.0",
        "part-of-speech tagger and tokeniser: packed sequences, both directions, highway layers",
        "tagger",
        (
            "{source}/stanza/tests/pos/test_tagger.py",
            "{source}/stanza/tests/tokenization/test_tokenizer_training.py",
            "-k",
            # Those that download nothing, and of the tagger's a few, since each trains a tagger.
            "Tokenizer and not charlm or test_missing_column or test_share_hid_extra or test_train_zero",
        ),
        gives_its_model=False,
    ),
)
