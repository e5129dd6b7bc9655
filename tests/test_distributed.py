"""Two processes with gloo on a CPU: data parallel, sharded, and a batch norm that shares its statistics."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from distributed_program import CHECKS, RANKS
from helpers import compiled

PROGRAM = Path(__file__).with_name("distributed_program.py")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the ranks printed: all checks in one pair of processes, for starting one costs more than a check."""
    rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
    commands = [[sys.executable, str(PROGRAM), str(rank), str(rendezvous), *CHECKS] for rank in range(RANKS)]
    checkout = PROGRAM.parent.parent
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": checkout}
    environment = {**os.environ, "PYTHONPATH": str(checkout)}  # which need not be installed
    ranks = [subprocess.Popen(command, env=environment, **options) for command in commands]
    try:
        return [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@compiled
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, outputs: list[str]) -> None:
    for rank, output in enumerate(outputs):
        assert f"{name}: passed on rank {rank}" in output, output
