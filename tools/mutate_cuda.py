"""``make mutate``: every barrier and every fence of the CUDA kernels, removed in turn under the emulator.

``sync_block``, ``sync_warp``, ``fence_device`` and ``wait_for_fetched`` are left out; ``store_release``,
``load_acquire`` and ``cluster_arrive`` no longer order anything; ``cluster_wait`` does not wait. A copy of the sources
is compiled once, with a switch at each of these sites. A child process for each site then runs small layers through
every tier under several schedules, and compares with what the kernels gave with all switches on: bit for bit, since no
result depends on the order of threads. A difference, an error and a wait that never ends are what a test would notice.

What no test can notice is listed in ``tests/native/unnoticed_removals.json``, each with the reason it is needed all
the same. A removal that goes unnoticed and is not listed fails, and so does a listed one that is noticed or gone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cuda_build
import native_build
from native_build import ROOT, Plan, Unit

FOLDER = ROOT / "build" / "cuda_mutation"
NATIVE = ROOT / "tests" / "native"
LISTED = NATIVE / "unnoticed_removals.json"
OPERATORS = "fusedreg_emulated::lstm_layer"
OPERATIONS = (
    "sync_block",
    "sync_warp",
    "fence_device",
    "cluster_arrive",
    "cluster_wait",
    "store_release",
    "load_acquire",
    "wait_for_fetched",
)
CALL = re.compile(rf"\b({'|'.join(OPERATIONS)})\(")
# The files that define the operations.
DEFINITIONS = ("device.h", "hardware.h", "hardware_cluster.h")


@dataclass(frozen=True)
class Site:
    """One call that is removed. Known by its line's text, which outlives the line's number."""

    number: int
    file: str
    line: int
    operation: str
    code: str
    occurrence: int  # among the calls with this code in this file, from 1

    @property
    def key(self) -> tuple[str, str, int]:
        """What the list of the unnoticed names it by."""
        return self.file, self.code, self.occurrence

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.code}" + (f" (#{self.occurrence})" if self.occurrence > 1 else "")


def find_sites(name: str, text: str, first: int) -> tuple[list[Site], str]:
    """The calls in a file, numbered from ``first``, and the text with a switch at each."""
    sites: list[Site] = []
    lines = text.split("\n")
    for index, line in enumerate(lines):
        code, slashes, comment = line.partition("//")

        def switch(match: re.Match[str], line: int = index + 1, code: str = code) -> str:
            number, stripped = first + len(sites), code.strip()
            occurrence = 1 + sum(site.code == stripped for site in sites)
            sites.append(Site(number, name, line, match[1], stripped, occurrence))
            return f"mutation::{match[1]}<{number}>("

        lines[index] = CALL.sub(switch, code) + slashes + comment
    return sites, "\n".join(lines)


def write_sources() -> list[Site]:
    """Copies csrc into :data:`FOLDER` with a switch at every site; files that stay the same keep their times."""
    sites: list[Site] = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        if not path.is_file():
            continue
        target = FOLDER / "csrc" / path.relative_to(ROOT / "csrc")
        text = path.read_text()
        if path.parent == cuda_build.SOURCES and path.name not in DEFINITIONS and path.suffix != ".cpp":
            found, text = find_sites(path.name, text, len(sites) + 1)
            sites += found
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    return sites


def build() -> Path:
    """Compiles the copy, with all switches on."""
    compiler, torch = native_build.find_compiler(), native_build.find_torch()
    plan = cuda_build.emulation_plan(torch)

    def moved(unit: Unit) -> Unit:
        flags = unit.flags
        if unit.source.suffix == ".cu":
            flags += (f"-I{FOLDER / 'csrc'}", "-include", str(NATIVE / "mutation_sites.h"))
        return replace(unit, source=FOLDER / unit.source.relative_to(ROOT), flags=flags)

    switches = Unit(NATIVE / "mutation_sites.cpp", "mutation_sites", (f"-I{FOLDER / 'csrc'}",))
    copied = Plan(plan.title, plan.details, (*map(moved, plan.units), switches), plan.flags, plan.link_flags)
    library = FOLDER / "libfusedreg_cuda_mutation.so"
    native_build.build(copied, compiler, FOLDER / "objects", library)
    return library


@dataclass(frozen=True)
class Run:
    """One layer through one tier, forward and backward: a name, and what computes its results."""

    name: str
    results: Callable[[int], dict[str, object]]  # of a schedule


def make_runs() -> list[Run]:
    """Small layers that between them pass every line of every tier, the quickest to notice something first."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import functools

    import torch
    from test_parity import case_of

    from fusedreg import ops
    from fusedreg.testing import LayerCase, make_arguments, run_layer

    layer = functools.partial(ops.lstm_layer, operators=OPERATORS)
    cases = [
        case_of("everything_untied", "reverse", steps=4, rows=5, hidden_size=37, resets=True),
        case_of("everything_layer_norm", "lengths", steps=3, rows=5, hidden_size=40),
        case_of("everything_batch_norm", "lengths", steps=3, rows=12, hidden_size=37),
        case_of("none", "plain", steps=4, rows=20, hidden_size=70),
        case_of("everything", "recompute", steps=3, rows=33, hidden_size=40, dtype=torch.bfloat16),
        case_of("everything_untied_batch_norm", "plain", steps=3, rows=20, hidden_size=20),
        case_of("everything_tied_layer_norm", "plain", steps=3, rows=20, hidden_size=70, dtype=torch.float16),
    ]
    # More rows than the sums of one pass have room for, on a device on which a cluster has to take them all.
    many_rows = [
        case_of("none", steps=3, rows=70, hidden_size=60),
        case_of("none", steps=3, rows=70, hidden_size=40, dtype=torch.bfloat16),
    ]

    def results(tier: str, multiprocessors: int, case: LayerCase, schedule: int) -> dict[str, object]:
        library = torch.ops.fusedreg_emulated
        library._set_device([multiprocessors, 227 * 1024, 9, 0])
        library._set_schedule(schedule)
        library._set_tier(tier)
        return dict(run_layer(layer, case, make_arguments(case, 3)))

    runs = [(tier, 16, case) for case in cases for tier in ("grid", "cluster", "step")]
    runs += [("cluster", 2, case) for case in many_rows]
    return [Run(f"{tier} {case.id}", functools.partial(results, tier, count, case)) for tier, count, case in runs]


def load(library: Path) -> ctypes.c_int:
    """Loads the library and returns its switch. Memory that nobody has written holds NaN from here on."""
    import torch
    import torch.utils.deterministic

    sys.path[:0] = [str(ROOT)]
    from fusedreg import ops

    torch.set_num_threads(1)  # children are forked, and threads do not survive that
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.ops.load_library(str(library))
    ops.register_operators(OPERATORS)
    return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "fusedreg_mutation")


def differs(results: dict[str, object], expected: dict[str, object]) -> bool:
    """Whether any bit of the results differs."""
    import torch

    def bits(value: object) -> torch.Tensor:
        assert isinstance(value, torch.Tensor)
        return value.detach().contiguous().reshape(-1).view(torch.uint8)

    return any(not torch.equal(bits(value), bits(results[name])) for name, value in expected.items())


def notice(runs: list[tuple[Run, dict[str, object]]], schedules: int) -> str | None:
    """The first run that comes out otherwise than expected, or fails; ``None`` where none does."""
    for schedule in range(2, 2 + schedules):
        for run, expected in runs:
            try:
                if differs(run.results(schedule), expected):
                    return f"other results: {run.name}, schedule {schedule}"
            except RuntimeError as error:
                return f"{run.name}, schedule {schedule}: {str(error).splitlines()[0][:200]}"
    return None


def in_child(task: Callable[[], str | None], limit: float) -> str | None:
    """What ``task`` says in a forked process, or how that process ended; ``None`` where it had nothing to say."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.write(writer, (task() or "").encode())
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with os.fdopen(reader) as pipe:
                said = pipe.read()
            return said or (None if status == 0 else f"the process ended with status {status}")
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    return f"nothing more happened within {limit:.0f} s"


def listed() -> dict[tuple[str, str, int], str]:
    """What is known to go unnoticed, with the reason it is needed."""
    entries = json.loads(LISTED.read_text()) if LISTED.exists() else []
    return {(entry["file"], entry["code"], entry.get("occurrence", 1)): entry["reason"] for entry in entries}


def report(found: Iterator[tuple[Site, str | None]], known: dict[tuple[str, str, int], str]) -> int:
    """Prints what was noticed of each site; how many are not as the list has them."""
    wrong = 0
    for site, noticed in found:
        reason = known.get(site.key)
        if noticed is not None:
            print(f"noticed    {site}\n             {noticed}", flush=True)
            if reason is not None:
                wrong += 1
                print(f"             BUT {LISTED.name} lists it as one that cannot be noticed; take it off", flush=True)
        elif reason is not None:
            print(f"known      {site}\n             {reason}", flush=True)
        else:
            wrong += 1
            print(
                f"UNNOTICED  {site}\n             add a test, or the reason it is needed to {LISTED.name}", flush=True
            )
    return wrong


def main() -> int:
    """Runs the mutants; 0 where each was noticed, or is known to go unnoticed."""
    parser = argparse.ArgumentParser(description="Removes each barrier and fence of the CUDA kernels in turn.")
    parser.add_argument("--only", default="", help="sites whose file or code contains this")
    parser.add_argument("--schedules", type=int, default=3, help="orders of threads that each is run under")
    parser.add_argument("--clean", action="store_true", help="begin with a new build")
    options = parser.parse_args()
    if options.clean:
        shutil.rmtree(FOLDER, ignore_errors=True)
    try:
        sites = write_sources()
        switch = load(build())
    except native_build.BuildError as error:
        print(f"\nfusedreg: {error}\n", file=sys.stderr)
        return 1

    begin = time.monotonic()
    runs = [(run, run.results(1)) for run in make_runs()]
    if complaint := notice(runs, options.schedules):
        print(f"With nothing removed: {complaint}", file=sys.stderr)
        return 1
    limit = 60 + 20 * (time.monotonic() - begin)
    chosen = [site for site in sites if options.only in site.file or options.only in site.code]
    print(f"{len(chosen)} sites, {len(runs)} runs under {options.schedules} schedules each", flush=True)

    def outcomes() -> Iterator[tuple[Site, str | None]]:
        for site in chosen:
            switch.value = site.number
            # What an operation belongs to comes first: most are noticed at once.
            first = "step" if site.file.startswith("step_") else "cluster" if "cluster" in site.operation else ""
            ordered = sorted(runs, key=lambda pair: first not in pair[0].name)
            yield site, in_child(lambda ordered=ordered: notice(ordered, options.schedules), limit)  # type: ignore[misc]

    known = listed()
    wrong = report(outcomes(), known)
    gone = [] if options.only else sorted(set(known) - {site.key for site in sites})
    for key in gone:
        print(f"GONE       {key}: take it off {LISTED.name}")
    minutes = (time.monotonic() - begin) / 60
    print(f"{len(chosen)} removals in {minutes:.1f} minutes: {wrong + len(gone)} not as {LISTED.name} has them")
    return 1 if wrong or gone else 0


if __name__ == "__main__":
    sys.exit(main())
