"""A study small enough to be trained many times in a test, and ways to look at what a lab holds."""

import os
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from windfall import worker
from windfall.graph import Graph, expand
from windfall.store import Lab
from windfall.study import Study

RECIPE: dict[str, Any] = {
    "optimizer": "adam",
    "learning_rate": 5e-3,
    "steps": 60,
    "batch_size": 32,
    "eval_every": 20,
}
TOML = """
name = "small"
num_seeds = {num_seeds}
model = {{ kind = "mlp", hidden = [16, 8] }}
data = "digits"
arms = ["dense", "ticket", "reinit", "finetune"]
levels = {levels}
[recipe]
optimizer = "adam"
learning_rate = 5e-3
steps = {steps}
batch_size = 32
eval_every = {eval_every}
"""


def study(recipe: dict[str, Any] | None = None, **changes: Any) -> Study:
    """Two seeds of a network of 1,232 weights on the digits, two levels, four arms: 14 runs."""
    settings: dict[str, Any] = {
        "name": "small",
        "num_seeds": 2,
        "model": {"kind": "mlp", "hidden": [16, 8]},
        "data": "digits",
        "arms": ["dense", "ticket", "reinit", "finetune"],
        "levels": 2,
        "recipe": RECIPE | (recipe or {}),
    }
    return Study(**(settings | changes))


def graph(recipe: dict[str, Any] | None = None, **changes: Any) -> Graph:
    return expand(study(recipe, **changes))


def jobs(of: Graph) -> list[worker.Job]:
    """Parents before children."""
    engine = of.study.engine
    return [
        worker.Job(run, address, of.keep[address], engine=engine)
        for address, run in of.runs.items()
    ]


def train(of: Graph, lab: Lab) -> None:
    """Train a graph in this process, unbroken."""
    workshop = worker.Workshop(lab, "cpu")
    for job in jobs(of):
        assert workshop.perform(job) in ("trained", "reused")


def trained(of: Graph, folder: Path) -> Lab:
    lab = Lab(folder)
    train(of, lab)
    return lab


def rows(folder: Path) -> dict[str, tuple[Any, ...]]:
    """The rows of the finished runs as they lie on disk, rowid first, in the order of their end."""
    database = sqlite3.connect(f"{folder.resolve().as_uri()}/lab.sqlite?mode=ro", uri=True)
    try:
        found = database.execute("SELECT rowid, * FROM runs ORDER BY rowid").fetchall()
    finally:
        database.close()
    return {row[1]: row for row in found}


def contents(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What a run is and has become, to the bit: no clock, no machine; by address."""
    weights = folder / "weights"
    return {
        address: (spec, status, facts, kept, (weights / f"{address}.safetensors").read_bytes())
        for address, (_, _, spec, status, facts, kept, *_) in rows(folder).items()
    }


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit; NaN equals itself, and 0 is not -0."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and bits(a) == bits(b)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def command(*arguments: Any, before: str = "") -> list[str]:
    """The command line `windfall ARGUMENTS`, after the Python statements `before`."""
    code = f"{before}\nfrom windfall.cli import main\nmain()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def start(line: list[str], folder: Path, **options: Any) -> subprocess.Popen[str]:
    """A process that leads a group of its own, its output kept in two pipes."""
    return subprocess.Popen(
        line,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def until(is_so: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
    """Wait until something is so, and return it; the limit is for machines that are busy."""
    end = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < end, f"{what}: not after {seconds} s"
        time.sleep(0.01)
    return found


def held(folder: Path) -> list[str]:
    """The addresses of the runs that are being trained."""
    locks = folder / "locks"
    return [path.name for path in locks.glob("?" * 64)] if locks.exists() else []


def children(pid: int) -> list[int]:
    """The processes that a process has started and that have not ended."""
    return [child for child, parent in _parents() if parent == pid]


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if state not in "ZX":
            yield int(entry.name), int(parent)


def is_running(pid: int) -> bool:
    return any(pid == known for known, _ in _parents())


def forked(work: Callable[[], Any]) -> int:
    """A copy of this process that does its work and ends, with exit code 0 if all was well."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def together(*works: Callable[[], Any]) -> None:
    """Do works at once, each in a copy of this process, and see that all went well."""
    pids = [forked(work) for work in works]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * len(works)
