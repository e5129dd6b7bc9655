"""Everything that needs an NVIDIA GPU, in one command: build, tests, compute-sanitizer, benchmarks, one results file.

    make gpu                                        in the checkout's own environment
    make gpu SETUP=0 PYTHON=python3                 offline, with the torch that is installed
    python3 tools/gpu.py --phases build,tests       some of it
    python3 tools/gpu.py --phases machine,quick     with what is built already, every target's tests but the slow ones
    python3 tools/gpu.py --limit benchmarks=9       other limits of time, in minutes

Each phase runs in a process of its own, is ended when its time is up, and is reported whatever becomes of the others;
the tests have one process a target, so that a kernel that breaks the CUDA context spoils one target's tests alone.
``results.json`` in the output folder is written anew after each phase; logs lie beside it. The exit status is 0 where
every phase that could run passed, 1 where one did not, 2 where there is no GPU.

``benchmarks.report`` makes tables of the file; to keep a run, copy it to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1
TARGETS = ("cuda-step", "cuda-grid", "cuda-cluster", "cuda", "triton")
# The tests' workers: each has a CUDA context and computes its truths on the CPU.
MOST_WORKERS = 8
TAIL = 4000
GRACE = 20.0


@dataclass(frozen=True)
class Phase:
    """A command with its limit in minutes. ``needs`` is a program without which it is not run."""

    name: str
    command: tuple[str, ...]
    minutes: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    junit: str = ""
    results: str = ""


@dataclass
class Outcome:
    """What became of a phase. ``status``: passed, failed, timed out, or not run with a reason."""

    name: str
    status: str
    seconds: float
    command: str
    detail: str = ""
    tests: dict[str, Any] | None = None


def workers() -> tuple[str, ...]:
    """Arguments of pytest for several processes, where pytest-xdist is installed."""
    count = min(MOST_WORKERS, len(os.sched_getaffinity(0)) // 2)
    return ("-n", str(count)) if count > 1 and find_spec("xdist") is not None else ()


def cuda_tool(name: str) -> str:
    """A program of the CUDA toolkit: on the path, in ``CUDA_HOME``, or where the toolkit is installed by default."""
    places = [os.environ.get(variable, "") for variable in ("CUDA_HOME", "CUDA_PATH")]
    for place in (*places, "/usr/local/cuda"):
        found = shutil.which(name, path=f"{place}/bin") if place else None
        if shutil.which(name) is None and found is not None:
            return found
    return name


def phases(output: Path, preset: str) -> list[Phase]:
    """All phases in their order; those not in ``BY_DEFAULT`` are run only where they are asked for by name."""
    python = sys.executable
    # pytest-benchmark, where it is installed, complains of several processes.
    pytest = (python, "-m", "pytest", "-p", "no:benchmark")
    found = [
        Phase("machine", (python, "-m", "fusedreg.collect_env"), 2),
        Phase("build", (python, "setup.py", "--quiet", "build_ext", "--inplace"), 15, {"FUSEDREG_CUDA": "1"}),
    ]
    for target in TARGETS:
        junit = f"tests-{target}.xml"
        command = (*pytest, "-m", "gpu", "tests/gpu", "--durations=5", *workers(), f"--junitxml={output / junit}")
        found.append(Phase(f"tests-{target}", command, 10, {"FUSEDREG_GPU_TARGET": target}, junit=junit))
    # Of all targets in one session of pytest, whose truths are then computed once: for a short time with a GPU.
    command = (*pytest, "-m", "gpu and not slow", "tests/gpu", "--durations=5", *workers())
    found.append(Phase("quick", (*command, f"--junitxml={output / 'quick.xml'}"), 9, junit="quick.xml"))
    for tool in ("memcheck", "racecheck"):
        junit = f"{tool}.xml"
        # Without torch's cache of blocks each tensor is an allocation of its own, so that memcheck sees its ends.
        program = cuda_tool("compute-sanitizer")
        sanitizer = (program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
        command = (*sanitizer, *pytest, "-m", "sanitizer", "tests/gpu", f"--junitxml={output / junit}")
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(Phase(tool, command, 10, environment, needs=program, junit=junit))
    for name, chosen, minutes in (("benchmarks", preset, 40.0), ("sweep", "gpu-sweep", 40.0)):
        results = f"{name}.json"
        command = (python, "-m", "benchmarks.run", "--preset", chosen, "--json", str(output / results), "--minutes")
        found.append(Phase(name, command, minutes, results=results))
    return found


BY_DEFAULT = ("machine", "build", *(f"tests-{target}" for target in TARGETS), "memcheck", "racecheck", "benchmarks")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="tools/gpu.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", help="where results and logs go")
    parser.add_argument(
        "--phases", help=f"comma-separated, 'tests' for all tests-*: {', '.join(BY_DEFAULT)}, quick, sweep"
    )
    parser.add_argument("--limit", action="append", default=[], metavar="PHASE=MINUTES", help="other limits of time")
    parser.add_argument("--preset", default="gpu", help="of the benchmarks: gpu, or gpu-quick")
    return parser.parse_args(arguments)


def choose(names: str | None, limits: Sequence[str], every: Sequence[Phase]) -> list[Phase]:
    """The phases that are asked for, with their limits. Raises ``ValueError`` with the known names."""
    known = {phase.name: phase for phase in every}
    wanted: list[str] = []
    for name in names.split(",") if names else BY_DEFAULT:
        wanted += [one for one in known if one.startswith("tests-")] if name.strip() == "tests" else [name.strip()]
    minutes = {}
    for limit in limits:
        name, _, value = limit.partition("=")
        try:
            minutes[name] = float(value)
        except ValueError:
            raise ValueError(f"--limit: expected PHASE=MINUTES, got {limit!r}") from None
    for name in (*wanted, *minutes):
        if name not in known and name != "tests":
            raise ValueError(f"unknown phase {name!r}: expected some of {', '.join(known)}, tests")
    chosen = []
    for phase in every:
        if phase.name in wanted:
            family = "tests" if phase.name.startswith("tests-") else phase.name
            allowed = minutes.get(phase.name, minutes.get(family, phase.minutes))
            command = phase.command
            if command[-1] == "--minutes":
                # A measurement ends by itself, between two cases, before it is ended.
                command = (*command, f"{0.85 * allowed:g}")
            chosen.append(
                Phase(phase.name, command, allowed, phase.environment, phase.needs, phase.junit, phase.results)
            )
    return chosen


def run(phase: Phase, output: Path) -> Outcome:
    """Run a phase, its output into a log; interrupt it when its time is up, and kill it where that does not help."""
    shown = " ".join([*(f"{name}={value}" for name, value in phase.environment.items()), *phase.command])
    if phase.needs and shutil.which(phase.needs) is None:
        return Outcome(phase.name, "not run", 0.0, shown, f"{phase.needs} is not installed")
    log = output / f"{phase.name}.log"
    for left in (phase.junit, phase.results):
        if left:
            (output / left).unlink(missing_ok=True)
    begin = time.monotonic()
    environment = {**os.environ, **phase.environment, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            phase.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "passed" if process.wait(phase.minutes * 60.0) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
            _end(process)
        except KeyboardInterrupt:
            _end(process)
            raise
    seconds = time.monotonic() - begin
    detail = "" if status == "passed" and phase.name != "machine" else _tail(log)
    outcome = Outcome(phase.name, status, round(seconds, 1), shown, detail)
    if phase.junit and (output / phase.junit).exists():
        outcome.tests = read_junit(output / phase.junit)
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """The phase's own process group: first asked, so that pytest writes what it has, then ended."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _tail(log: Path) -> str:
    return log.read_bytes()[-TAIL:].decode(errors="replace")


def read_junit(path: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped; which failed and how, and why others were skipped."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: list[dict[str, str]] = []
    reasons: dict[str, int] = {}
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except ElementTree.ParseError:
        return {"unreadable": str(path.name)}
    for case in cases:
        problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        skipped = case.find("skipped")
        if problem is not None:
            counts["failed"] += 1
            failures.append({"test": str(case.get("name")), "message": str(problem.get("message"))[:500]})
        elif skipped is not None:
            counts["skipped"] += 1
            reason = str(skipped.get("message"))[:200]
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            counts["passed"] += 1
    return {**counts, "failures": failures[:100], "skipped_because": reasons}


def machine() -> dict[str, Any]:
    """Device, driver, versions, commit and date."""
    import torch

    sys.path.insert(0, str(ROOT))
    from benchmarks.machine import describe

    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        driver = f"unknown ({error})"
    properties = torch.cuda.get_device_properties(0)
    return {
        **describe("cuda"),
        "driver": driver,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def without_gpu() -> str | None:
    """Why nothing can be run here, or ``None``."""
    if find_spec("torch") is None:
        return f"torch is not installed for {sys.executable}: name another, make gpu SETUP=0 PYTHON=/path/to/python3"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch, 2.10 or newer"
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA device: run this on a machine with an NVIDIA GPU and its driver (nvidia-smi shows it)"
        )
    return None


def report(output: Path, facts: dict[str, Any], chosen: Sequence[Phase], outcomes: Sequence[Outcome]) -> None:
    """Write ``results.json``: facts, phases, and the results of the benchmarks that have been measured."""
    found: dict[str, Any] = {"format": FORMAT, "kind": "gpu", "machine": facts}
    found["phases"] = [asdict(outcome) for outcome in outcomes]
    for phase in chosen:
        if phase.results and (output / phase.results).exists():
            found[phase.name] = json.loads((output / phase.results).read_text())
    (output / "results.json").write_text(json.dumps(found, indent=1) + "\n")


def line(outcome: Outcome) -> str:
    """One line about a phase."""
    text = f"{outcome.name:20} {outcome.status:10} {outcome.seconds:7.1f} s"
    if outcome.tests is not None:
        counts = ", ".join(f"{outcome.tests.get(key, '?')} {key}" for key in ("passed", "failed", "skipped"))
        text += f"  {counts}"
    elif outcome.status == "not run":
        text += f"  {outcome.detail}"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    output = options.output.resolve()
    try:
        chosen = choose(options.phases, options.limit, phases(output, options.preset))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    reason = without_gpu()
    if reason is not None:
        print(f"error: make gpu needs an NVIDIA GPU. {reason}", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    facts = machine()
    print(f"{facts['device']}, driver {facts['driver']}, torch {facts['versions']['torch']}, commit {facts['commit']}")
    outcomes: list[Outcome] = []
    for phase in chosen:
        print(f"{phase.name}: at most {phase.minutes:g} minutes", flush=True)
        outcome = run(phase, output)
        outcomes.append(outcome)
        print(line(outcome), flush=True)
        if outcome.status in ("failed", "timed out"):
            print(outcome.detail, flush=True)
        report(output, facts, chosen, outcomes)
    print("\n".join(["", *(line(outcome) for outcome in outcomes), f"results: {output / 'results.json'}"]))
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
