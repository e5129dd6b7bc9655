"""What a check comes to: it passes, or what it asks for is refused in so many words; anything else is a failure."""

from __future__ import annotations

import torch

from benchmarks.support.features import DTYPES, WORDS, Feature
from benchmarks.support.places import Place

PASSED, REFUSED = "passed", "refused"
# How this library says that something cannot be done; an error without these words is a fault.
_REFUSALS = ("cannot run this call", "expected reverse-mode", "to_torch()", "expected a 'cpu' or 'reference'")


def outcomes(feature: Feature, place: Place, dtypes: tuple[torch.dtype, ...] = DTYPES) -> dict[str, str]:
    """By type: ``"passed"``, or ``"refused"`` where the library says so. Raises what a failed check raises."""
    own = [dtype for dtype in feature.dtypes if dtype in dtypes]
    found: dict[str, str] = {}
    with place.active():
        if feature.together is not None:
            able = [dtype for dtype in own if _allowed(place, dtype)]
            outcome = _outcome(lambda: feature.together(place, able)) if able else REFUSED  # type: ignore[misc]
            found = {WORDS[dtype]: outcome if dtype in able else REFUSED for dtype in own}
        elif feature.check is not None:
            found = {WORDS[dtype]: _outcome(lambda at=dtype: feature.check(place, at)) for dtype in own}  # type: ignore[misc]
    return found


def _allowed(place: Place, dtype: torch.dtype) -> bool:
    return (
        _outcome(lambda: place.module(1, 1, dtype=dtype)(torch.ones(1, 1, 1, dtype=dtype, device=place.device)))
        == PASSED
    )


def _outcome(check: object) -> str:
    try:
        check()  # type: ignore[operator]
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if any(words in _chain(error) for words in _REFUSALS):
            return REFUSED
        raise
    return PASSED


def _chain(error: BaseException) -> str:
    """What all errors of the chain say: torch wraps ours."""
    said, link = "", error
    while link is not None:
        said += str(link)
        link = link.__cause__  # type: ignore[assignment]
    return said
