"""A study that is killed again and again ends as if nothing had happened."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import small

from windfall.store import Lab

KILLS = 22  # of a study in the making; and then
MORE_KILLS = 3  # of one that has only to sum up what there is
RUNS, RECIPE = 14, {"steps": 2500, "eval_every": 250}

# A fork of a process that has a pool of threads may wait for them for ever.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

# `windfall run` with checkpoints many times a second, forked from one process that has imported
# all that takes long to import: a start costs what the study itself costs, and its workers.
STARTER = """
import functools, os, sys
from windfall import cli, execute, settings, verbs
from windfall.graph import expand

verbs.execute = functools.partial(execute.execute, checkpoint_seconds=0.05)
expand(settings.load("small.toml"))
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            with open("told", "w") as told, open("out", "w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(told.fileno(), 2)
            sys.argv = line.split()
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    try:
        os.setpgid(pid, pid)
    except OSError:
        pass
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Starter:
    """Starts the study again and again, each time as a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ONE_THREAD},
        )

    def start(self, lab: Path) -> int:
        assert self.process.stdin and self.process.stdout
        line = f"windfall run small.toml --lab {lab.name} --workers 2 --json\n"
        self.process.stdin.write(line)
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def status(self) -> int:
        """Of the process started last, when it has ended: its exit code, or minus its signal."""
        assert self.process.stdout
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def kill(self, pid: int) -> int:
        """Kill the group, see that all of it is gone, and say how its leader ended."""
        group = [pid, *small.children(pid)]
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.killpg(pid, signal.SIGKILL)
        status = self.status()
        small.until(lambda: not any(map(small.is_running, group)), "all processes are gone", 60)
        return status

    def told(self) -> str:
        return (self.folder / "told").read_text()


@pytest.fixture
def starter(tmp_path) -> Iterator[Starter]:
    text = small.TOML.format(num_seeds=2, levels=2, **RECIPE)
    (tmp_path / "small.toml").write_text(text)
    started = Starter(tmp_path)
    yield started
    started.process.kill()
    started.process.communicate()


def moments(draw: random.Random) -> Iterator[tuple[str, float]]:
    """Where to kill, and how many seconds later: mostly in training, where most can go wrong."""
    while True:
        yield "started", draw.uniform(0, 0.6)
        yield "hired", draw.uniform(0, 1.5)
        for _ in range(5):
            yield "training", draw.uniform(0, 0.2)


def reached(moment: str, pid: int, lab: Path) -> bool:
    match moment:
        case "started":
            return True
        case "hired":
            return len(small.children(pid)) == 2 or not small.is_running(pid)
        case _:
            return bool(small.held(lab)) or not small.is_running(pid)


def rows(lab: Path) -> dict[str, tuple[object, ...]]:
    if not (lab / "lab.sqlite").exists():
        return {}
    Lab(lab).close()  # undoes what was half written
    return small.rows(lab)


@pytest.mark.slow
def test_a_study_killed_at_random_moments_ends_bit_for_bit_as_if_it_had_not(starter, tmp_path):
    draw, kills, seen = random.Random(0), 0, dict[str, tuple[object, ...]]()
    labs = [tmp_path / "lab0"]
    for moment, seconds in moments(draw):
        pid = starter.start(labs[-1])
        small.until(lambda m=moment, p=pid: reached(m, p, labs[-1]), moment)
        time.sleep(seconds)
        status = starter.kill(pid) if small.is_running(pid) else starter.status()
        assert status in (-signal.SIGKILL, 0), starter.told()
        found = rows(labs[-1])
        assert {address: found.get(address) for address in seen} == seen  # not trained again
        kills, seen = kills + (status != 0), found
        if kills == KILLS:
            break
        if status == 0:  # on a fast machine it may end before it has been killed that often
            labs.append(tmp_path / f"lab{len(labs)}")
            seen = {}

    starter.start(labs[-1])
    assert starter.status() == 0, starter.told()
    document = json.loads((tmp_path / "out").read_text())
    counts = {"reused": len(seen), "trained": RUNS - len(seen), "failed": 0, "diverged": 0}
    assert document["runs"] == {"total": RUNS, **counts}
    found = rows(labs[-1])
    assert {address: found[address] for address in seen} == seen
    for _ in range(MORE_KILLS):
        pid = starter.start(labs[-1])
        time.sleep(draw.uniform(0, 1))
        assert (starter.kill(pid) if small.is_running(pid) else starter.status()) in (-9, 0)
    assert rows(labs[-1]) == found

    small.trained(small.graph(RECIPE), tmp_path / "unbroken").close()
    for lab in labs:
        assert small.contents(lab) == small.contents(tmp_path / "unbroken")
