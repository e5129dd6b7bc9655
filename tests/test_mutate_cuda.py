"""``make mutate`` without its runs: what it finds to remove, and that its list speaks of what is there."""

from __future__ import annotations

import os
import time

import cuda_build
import mutate_cuda
import pytest

# From Python 3.12 on, where a library's threads run beside.
forks = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

SOURCE = """// sync_block() in a comment stays
  sync_block();  // and so does the second half: sync_block()
  if (tile > 0) sync_block();
  while (load_acquire(flag) < 3) {
  sync_block();
  resync_block();
"""


def test_every_call_gets_a_switch_of_its_own() -> None:
    sites, text = mutate_cuda.find_sites("one.cuh", SOURCE, 7)
    assert [(site.number, site.line, site.operation, site.occurrence) for site in sites] == [
        (7, 2, "sync_block", 1),
        (8, 3, "sync_block", 1),
        (9, 4, "load_acquire", 1),
        (10, 5, "sync_block", 2),
    ]
    assert text == (
        SOURCE.replace("  sync_block();  //", "  mutation::sync_block<7>();  //")
        .replace("0) sync_block()", "0) mutation::sync_block<8>()")
        .replace("load_acquire(", "mutation::load_acquire<9>(")
        .replace("\n  sync_block();\n", "\n  mutation::sync_block<10>();\n")
    )


def test_what_is_listed_as_unnoticed_is_there_and_has_a_reason() -> None:
    keys = set()
    for path in sorted(cuda_build.SOURCES.glob("*.cu*")):
        keys |= {site.key for site in mutate_cuda.find_sites(path.name, path.read_text(), 1)[0]}
    listed = mutate_cuda.listed()
    assert len(keys) > 20
    assert set(listed) <= keys
    assert all(len(reason) > 20 for reason in listed.values())


def test_a_removal_is_as_listed_or_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    sites, _ = mutate_cuda.find_sites("one.cuh", SOURCE, 1)
    first, second, third, fourth = sites
    known = {second.key: "the reason", third.key: "another reason"}
    outcomes = [(first, "other results"), (second, None), (third, "other results"), (fourth, None)]
    assert mutate_cuda.report(iter(outcomes), known) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "noticed    one.cuh:2: sync_block();"
    assert lines[2] == "known      one.cuh:3: if (tile > 0) sync_block();"
    assert "take it off" in lines[6]
    assert lines[7] == "UNNOTICED  one.cuh:5: sync_block(); (#2)"


@forks
@pytest.mark.parametrize(("task", "said"), [(lambda: "what it saw", "what it saw"), (lambda: None, None)])
def test_a_child_says_what_it_saw(task: object, said: str | None) -> None:
    assert mutate_cuda.in_child(task, 60) == said  # type: ignore[arg-type]


@forks
def test_a_child_that_dies_or_hangs_is_noticed() -> None:
    assert mutate_cuda.in_child(lambda: os._exit(3), 60) == f"the process ended with status {3 << 8}"  # type: ignore[func-returns-value]
    assert mutate_cuda.in_child(lambda: time.sleep(60), 0.2) == "nothing more happened within 0 s"  # type: ignore[func-returns-value]
