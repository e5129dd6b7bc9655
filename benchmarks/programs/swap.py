"""Puts another class where programs look for ``torch.nn.LSTM``: the one changed import. Also a plugin of pytest.

The environment variable ``PROGRAMS_LSTM`` names the variant; ``replaced`` is for examples, which call :func:`replace`.
"""

from __future__ import annotations

import os
from typing import Any

import torch

VARIANTS = ("nn.LSTM", "perturbed", "fusedreg", "replaced", "regularised")
VARIANT = os.environ.get("PROGRAMS_LSTM", "nn.LSTM")


def _class() -> Any:
    if VARIANT == "perturbed":

        class Perturbed(torch.nn.LSTM):
            """Its initial weights changed by a millionth: what the order of sums alone can do to a program."""

            def reset_parameters(self) -> None:
                super().reset_parameters()
                with torch.no_grad():
                    for parameter in self.parameters():
                        parameter.mul_(1 + 1e-6)

        return Perturbed
    import fusedreg

    class Regularised(fusedreg.LSTM):
        """What a user would try first: a little of three regularisers."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, zoneout_cell=0.05, hidden_dropout=0.1, weight_dropout=0.1)

    return Regularised if VARIANT == "regularised" else fusedreg.LSTM


if VARIANT in ("perturbed", "fusedreg", "regularised"):
    torch.nn.LSTM = _class()


def replace(model: torch.nn.Module) -> None:
    """Replace the LSTMs inside a model, where that is the variant."""
    if VARIANT == "replaced":
        import fusedreg

        done = fusedreg.replace_lstms(model)
        assert done.replaced, "the example's model has no nn.LSTM"
