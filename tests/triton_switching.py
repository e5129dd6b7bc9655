"""Programs of a persistent Triton kernel that wait for each other, under Triton's interpreter.

The interpreter runs one program after another, so that a barrier over the grid would wait for ever. Here each program
is a thread, of which one at a time runs; at every atomic operation the turn passes to one drawn at random. What is
found are barriers that are missing or that count wrongly, and reads of what has not been written yet; what is not
found is a missing fence, since memory is always consistent here.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import threading
from collections.abc import Iterator
from typing import Any

import triton_support  # noqa: F401  # before Triton
from triton.runtime import interpreter

_MOST_TURNS = 100_000


class Stopped(BaseException):
    """Another program has failed: this one need not go on."""


class Turns:
    """Whose turn it is among the programs of a launch."""

    def __init__(self, programs: list[tuple[int, int, int]], seed: int) -> None:
        self.alive = list(programs)
        self.random = random.Random(seed)
        self.condition = threading.Condition()
        self.current = self.random.choice(self.alive)
        self.failure: BaseException | None = None
        self.turns = 0

    def wait(self, program: tuple[int, int, int]) -> None:
        """Sleep until it is this program's turn."""
        with self.condition:
            self.condition.wait_for(lambda: self.failure is not None or self.current == program)
            if self.failure is not None:
                raise Stopped
        interpreter.interpreter_builder.set_grid_idx(*program)

    def switch(self) -> None:
        """Pass the turn on, and sleep until it comes back."""
        program = self.current
        with self.condition:
            self.turns += 1
            if self.turns > _MOST_TURNS:
                raise AssertionError(f"{_MOST_TURNS} turns, and programs {self.alive} still wait for each other")
            self.current = self.random.choice(self.alive)
            self.condition.notify_all()
        self.wait(program)

    def end(self, program: tuple[int, int, int], failure: BaseException | None) -> None:
        """This program is through, or has failed and takes all others with it."""
        with self.condition:
            self.alive.remove(program)
            if failure is not None and self.failure is None:
                self.failure = failure
            if self.alive:
                self.current = self.random.choice(self.alive)
            self.condition.notify_all()


class SwitchingExecutor(interpreter.GridExecutor):  # type: ignore[misc]
    """Runs the programs of kernels whose name says that they are persistent side by side."""

    seed = 0
    largest_grid = 0

    def __call__(self, *args_dev: Any, **kwargs: Any) -> None:
        if "persistent" not in self.fn.__name__:
            super().__call__(*args_dev, **kwargs)
            return
        kwargs = {name: value for name, value in kwargs.items() if name in self.arg_names}
        args_hst, kwargs_hst = self._init_args_hst(args_dev, kwargs)
        patched = interpreter._patch_lang(self.fn)
        try:
            args = inspect.getcallargs(self.fn, *args_hst, **kwargs_hst)
            args = {
                name: value if name in self.constexprs else interpreter._implicit_cvt(value)
                for name, value in args.items()
            }
            grid = (*self.grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            self._run_programs(args, grid)
        finally:
            patched.restore()
        self._restore_args_dev(args_dev, args_hst, kwargs, kwargs_hst)

    def _run_programs(self, args: dict[str, Any], grid: tuple[int, ...]) -> None:
        programs = list(itertools.product(*(range(size) for size in grid)))
        SwitchingExecutor.largest_grid = max(SwitchingExecutor.largest_grid, len(programs))
        turns = Turns(programs, self.seed)
        builder = interpreter.interpreter_builder
        atomic = type(builder).create_atomic_rmw

        def switching_atomic(*arguments: Any, **options: Any) -> Any:
            turns.switch()
            return atomic(builder, *arguments, **options)

        def run(program: tuple[int, int, int]) -> None:
            failure: BaseException | None = None
            try:
                turns.wait(program)
                self.fn(**args)
            except Stopped:
                pass
            except BaseException as error:
                failure = error
            turns.end(program, failure)

        builder.create_atomic_rmw = switching_atomic
        try:
            threads = [threading.Thread(target=run, args=(program,), daemon=True) for program in programs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            del builder.create_atomic_rmw
        if turns.failure is not None:
            raise turns.failure


@contextlib.contextmanager
def switching_programs(seed: int) -> Iterator[type[SwitchingExecutor]]:
    """Within the block, persistent kernels of any grid run under the interpreter."""
    original = interpreter.GridExecutor
    SwitchingExecutor.seed, SwitchingExecutor.largest_grid = seed, 0
    interpreter.GridExecutor = SwitchingExecutor
    try:
        yield SwitchingExecutor
    finally:
        interpreter.GridExecutor = original
