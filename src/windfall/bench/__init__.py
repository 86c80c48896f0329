"""This machine's benchmarks: each a function that returns its result as a JSON-able dictionary.

A result names the machine, the versions, n and the spread; `render` makes a table of it:

    result = BENCHMARKS["overhead"](num_steps=200, rounds=5)
    result["ratio"]["median"]  # engine / bare loop

In the order of reading: `machine`, `networks`, `plain` (the yardstick), `teams`; `crew` and
`worker` (processes that measure at once); the benchmarks.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import validate_call
from rich.table import Table

from windfall.bench import luck, overhead, process, replicas, roofline, shrink, step, study
from windfall.spec import Json, SpecError, checked, nearest

BENCHMARKS: dict[str, Callable[..., Json]] = {
    "overhead": overhead.measure,
    "step": step.measure,
    "study": study.measure,
    "replicas": replicas.measure,
    "roofline": roofline.measure,
    "process": process.measure,
    "shrink": shrink.measure,
    "luck": luck.measure,
}
TABLES: dict[str, Callable[[Json], Table]] = {
    "overhead": overhead.render,
    "step": step.render,
    "study": study.render,
    "replicas": replicas.render,
    "roofline": roofline.render,
    "process": process.render,
    "shrink": shrink.render,
    "luck": luck.render,
}


def render(result: Json) -> Table:
    """A benchmark's result as a table: one row per measured quantity."""
    return TABLES[result["benchmark"]](result)


def run(name: str | None = None, settings: dict[str, Any] | None = None) -> Iterator[Json]:
    """The result of a benchmark, or of each of them.

    Args:
        name: of `BENCHMARKS`; None is all.
        settings: of the named benchmark; its function's arguments.

    Raises:
        SpecError: when there is no such benchmark, or a setting is none of its.
    """
    if name is not None and name not in BENCHMARKS:
        raise SpecError(f"NAME must be a benchmark; got {name!r}.{nearest(name, list(BENCHMARKS))}")
    if settings and name is None:
        raise SpecError("`--set` must be given with the NAME of one benchmark; got none.")
    for benchmark in BENCHMARKS if name is None else (name,):
        yield _measured(BENCHMARKS[benchmark], settings or {})


def _measured(benchmark: Callable[..., Json], settings: dict[str, Any]) -> Json:
    known = list(inspect.signature(benchmark).parameters)
    for name in settings:
        if name not in known:
            raise SpecError(f"The benchmark has no setting `{name}`.{nearest(name, known)}")
    return checked(lambda: validate_call(benchmark)(**settings))
