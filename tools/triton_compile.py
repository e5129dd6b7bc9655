"""Every Triton kernel, in every configuration of the tables, compiled to machine code without a GPU.

What is compiled are the layers of tests/triton_cases.py, each forward and backward, for each of the targets. Written is
a table of registers, spills, shared memory and compile times, a line a kernel; printed is its summary. Fails where a
kernel does not compile, asks for more shared memory than there is, or is compiled again for a call of another size.

    python tools/triton_compile.py                      all of it: twenty minutes of one core
    python tools/triton_compile.py --targets 90 --only layer_norm
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
TABLE = ROOT / "docs" / "triton_kernels.csv"
SHARED_BYTES = {"80": 163 * 1024, "90": 227 * 1024, "gfx942": 64 * 1024}
COLUMNS = ("target", "case", "module", "name", "registers", "spilled_bytes", "shared_bytes", "warps", "seconds")


def compiled(target: str, cases: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The kernels that the cases need, as they get compiled in a process without the interpreter."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(TESTS)])
    command = [sys.executable, str(TESTS / "triton_pretended.py"), target, *cases]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found = json.loads(line)
            if "name" in found:
                yield {**found, "module": found["module"].rpartition(".")[2]}
    if process.returncode:
        raise SystemExit(f"tools/triton_compile.py: target {target}: the compiler failed (exit {process.returncode})")


def faults(kernel: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a kernel."""
    where = f"{kernel['target']} {kernel['case']} {kernel['module']}.{kernel['name']}"
    if kernel["again"]:
        yield f"{where}: compiled again for a call of another size, rate or address"
    if kernel["shared_bytes"] > SHARED_BYTES[kernel["target"]]:
        yield f"{where}: {kernel['shared_bytes']} bytes of shared memory"


def summary(kernels: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each kernel and target: the most that any case takes; and the longest first call."""
    places = dict.fromkeys((one["module"], one["name"], one["target"]) for one in kernels)
    for module, name, target in sorted(places):
        same = [one for one in kernels if (one["module"], one["name"], one["target"]) == (module, name, target)]
        most = [max(one[key] for one in same) for key in ("registers", "spilled_bytes", "shared_bytes", "seconds")]
        spilling = sum(one["spilled_bytes"] > 0 for one in same)
        yield (
            f"{target:7} {module}.{name:24} {len(same):3} compiled, at most {most[0]:3} registers, {most[1]:4} bytes "
            f"spilled (in {spilling}), {most[2]:6} shared, {most[3]:5.1f} s"
        )
    for target in dict.fromkeys(one["target"] for one in kernels):
        calls: dict[str, float] = {}
        for one in kernels:
            if one["target"] == target:
                calls[one["case"]] = calls.get(one["case"], 0.0) + one["seconds"]
        longest = max(calls, key=lambda case: calls[case])
        yield f"{target:7} a first call, both ways: at most {calls[longest]:.1f} s ({longest})"


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="80,90", help="compute capabilities, AMD architectures: 80,90,gfx942")
    parser.add_argument("--only", default="", help="cases whose text contains this")
    parser.add_argument("--table", type=Path, default=TABLE, help="where the table is written")
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from triton_cases import MANY

    cases = [case for case in MANY if options.only in case]
    kernels, wrong = [], []
    for target in options.targets.split(","):
        for kernel in compiled(target, cases):
            wrong += faults(kernel)
            kernels.append(kernel)
            print(*(kernel[column] for column in COLUMNS), flush=True)
    options.table.parent.mkdir(parents=True, exist_ok=True)
    with options.table.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(kernels)
    print(*summary(kernels), *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
