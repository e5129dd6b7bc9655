"""The README's table, from a results file."""

from __future__ import annotations

from typing import Any

from benchmarks.support.features import DTYPES, FEATURES, WORDS, Feature
from benchmarks.support.outcomes import PASSED

BEGIN, END = "<!-- support -->", "<!-- /support -->"
COLUMNS = ("cpu", "cuda", "triton", "reference")
RAN = {
    "": "on a GPU",
    "emulated": "on the emulated device: not yet on a GPU",
    "interpreter": "in Triton's interpreter: not yet on a GPU",
}


def markdown(results: dict[str, Any]) -> str:
    """Everything between the markers."""
    names = " | ".join(f'`"{name}"`' for name in COLUMNS)
    lines = [f"| feature | {names} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for feature in FEATURES:
        cells = [_cell(feature, results["places"].get(name, {}).get(feature.key, {})) for name in COLUMNS]
        lines.append(f"| {feature.text} | {' | '.join(cells)} |")
    ran = [f'`"{name}"` {RAN[results["stand_ins"].get(name, "")]}' for name in ("cuda", "triton")]
    lines += ["", f"What passed, by type; what raises, which names the remedy; –: not tested there. {'; '.join(ran)}."]
    return "\n".join(lines)


def _cell(feature: Feature, found: dict[str, str]) -> str:
    if feature.only and not found:
        return feature.elsewhere
    if feature.evidence:
        return "yes" if found.get("all") == PASSED else "not run"
    if not found:
        return "not run"
    own = [WORDS[dtype] for dtype in feature.dtypes]
    passed = [word for word in own if found.get(word) == PASSED]
    missing = [word for word in own if word not in passed]
    if not passed:
        return "raises"
    everywhere = len(feature.dtypes) == len(DTYPES)
    if not missing:
        return "yes" if everywhere else f"yes, {', '.join(own)}"
    return f"all but {', '.join(missing)}" if everywhere else f"yes, {', '.join(passed)}"
