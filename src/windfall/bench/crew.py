"""Processes that measure at the same time: they wait for a message, work, and answer.

with Crew("laps", processes=2, threads=1) as crew:
    crew.ask({"team": ..., "network": ...})  # both get ready
    answers = crew.ask({"intervals": 4})     # both start at once
elapsed_seconds(answers)
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from windfall.spec import Json

PATIENCE_SECONDS = 10.0  # for a process to end by itself, once its pipe is closed
THREADS = (  # what libraries read when they are loaded
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


class Talk(Protocol):
    """Sends an answer, if it is one, and returns the next message."""

    def __call__(self, answer: Json | None, /) -> Json:
        """Wait for the next message."""
        ...


class Crew:
    """Processes of `windfall.bench.worker`, spoken to all at once.

    Args:
        job: what they do, of the worker's `JOBS`.
        processes: how many.
        threads: of each.
        environment: variables that they are given beside this process's.
    """

    def __init__(
        self, job: str, processes: int, threads: int, environment: Mapping[str, str] | None = None
    ) -> None:
        limits = dict.fromkeys(THREADS, str(threads))
        self.errors = [tempfile.TemporaryFile() for _ in range(processes)]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "windfall.bench.worker", job, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | limits | dict(environment or {}),
            )
            for errors in self.errors
        ]

    def ask(self, *messages: Json) -> list[Json]:
        """The answers to a message, or to one for each process; they work at the same time.

        Raises:
            RuntimeError: when a process fails; with what it said last.
        """
        each = messages * len(self.processes) if len(messages) == 1 else messages
        for process, message in zip(self.processes, each, strict=True):
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its answer, which is none, tells
                process.stdin.write(json.dumps(message).encode() + b"\n")
                process.stdin.flush()
        return [self._answer(place) for place in range(len(self.processes))]

    def _answer(self, place: int) -> Json:
        stdout = self.processes[place].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            self.errors[place].seek(0)
            told = self.errors[place].read().decode(errors="replace").strip()[-2000:]
            raise RuntimeError(f"a measuring process ended before its answer; it said:\n{told}")
        return json.loads(line)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        for process in self.processes:
            try:
                process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for errors in self.errors:
            errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:  # what they were doing is of no use any more
            for process in self.processes:
                process.kill()
        self.close()


def elapsed_seconds(answers: Sequence[Json]) -> float:
    """From the first `began` to the last `ended`: the clock is the same in all processes."""
    return max(a["ended"] for a in answers) - min(a["began"] for a in answers)
