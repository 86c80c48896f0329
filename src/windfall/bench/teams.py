"""Who is measured: engines and yardsticks, by name, each in so many processes and threads.

An engine is found when it is needed; one that cannot be imported is left out. All train by one
call:

    finals = Team(name="sparse", engine="sparse").train(tasks, states, lambda step: None)
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import Field

from windfall.bench import plain
from windfall.engines.contract import Task
from windfall.execute import num_cores
from windfall.spec import Spec, SpecError, nearest
from windfall.train import State

Pulse = Callable[[int], None]

PLAIN = "plain"
ENGINES = {  # by name, their modules
    "separate": "windfall.engines.separate",
    "sparse": "windfall.engines.sparse",
    "stacked": "windfall.engines.stacked",
}
STACKED = ("stacked",)  # those that train several replicas as one program
LAYOUT = "channels-last"


def _module(engine: str) -> Any:
    module = importlib.import_module(ENGINES[engine])
    if not hasattr(module, "train"):
        raise ImportError(f"{ENGINES[engine]} has no `train`")
    return module


def present(engines: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The engines that can be imported, and of the others the reasons.

    Raises:
        SpecError: when a name is of no engine.
    """
    found: list[str] = []
    missing: dict[str, str] = {}
    for engine in engines:
        if engine not in ENGINES:
            remedy = nearest(engine, list(ENGINES))
            raise SpecError(f"`engines` must be of known names; got {engine!r}.{remedy}")
        try:
            _module(engine)
            found.append(engine)
        except ImportError as problem:
            missing[engine] = str(problem)
    return found, missing


class Team(Spec):
    """One side of a comparison: replicas trained in the same way at once.

    Args:
        name: what tables call it.
        engine: `plain` or an engine's name.
        channels_last: the plain loop's layout.
        processes: that train at once.
        threads: of each process.
        replicas: of each process; at once where they are stacked, else in turn.
    """

    name: str
    engine: str
    channels_last: bool = False
    processes: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    replicas: int = Field(default=1, ge=1)

    @property
    def num_replicas(self) -> int:
        """Of all processes together."""
        return self.processes * self.replicas

    def seeds(self, process: int) -> list[int]:
        """The seeds of a process's replicas."""
        return list(range(process * self.replicas, (process + 1) * self.replicas))

    def groups(self, seeds: Sequence[int]) -> list[list[int]]:
        """The seeds as they are given to `train`: together where they are stacked."""
        return [list(seeds)] if self.engine in STACKED else [[seed] for seed in seeds]

    def train(self, tasks: Sequence[Task], states: Sequence[State], pulse: Pulse) -> list[State]:
        """Train replicas to their last step.

        Args:
            tasks: of the replicas; they differ in their seeds alone.
            states: their beginnings.
            pulse: called with the step, before every step or before some, and always before the
                first and after an evaluation, the last one excepted.
        """
        if self.engine == PLAIN:
            return [
                plain.train(task, state, pulse, channels_last=self.channels_last)
                for task, state in zip(tasks, states, strict=True)
            ]
        train = _module(self.engine).train

        def tick(step: int, _: Any) -> None:
            pulse(step)

        if self.engine in STACKED:
            return train(tasks, states, tick)
        return [train(task, state, tick) for task, state in zip(tasks, states, strict=True)]


def yardsticks(*, is_convolutional: bool) -> list[Team]:
    """The plain loop: one process with all threads, and a process of one thread for each core."""
    layouts = (False, True) if is_convolutional else (False,)
    return [
        Team(
            name=", ".join([PLAIN, *([LAYOUT] if layout else []), told]),
            engine=PLAIN,
            channels_last=layout,
            processes=processes,
            threads=threads,
        )
        for told, processes, threads in (
            ("all threads", 1, num_cores()),
            ("one a core", num_cores(), 1),
        )
        for layout in layouts
    ]


def engine_teams(engine: str) -> list[Team]:
    """An engine alone on a core and on every core; a stack of one replica a core as one program."""
    if engine in STACKED:
        return [Team(name=f"{engine}, all threads", engine=engine, threads=num_cores(),
                     replicas=num_cores())]  # fmt: skip
    return [
        Team(name=f"{engine}, alone", engine=engine),
        Team(name=f"{engine}, one a core", engine=engine, processes=num_cores()),
    ]
