"""What every result says: on which machine, how spread; and the table that shows it."""

import math
import os
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version

import torch
from rich.table import Table

from windfall.execute import num_cores
from windfall.pace import processor
from windfall.spec import Json, SpecError


def machine() -> Json:
    """The machine and the versions.

    `threads` are those of the process that measures; `load` is the average number of running
    processes in the last minute: more than the benchmark's own have disturbed it.
    """
    return {
        "cpu": processor(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "windfall": version("windfall"),
    }


def spread(values: Iterable[float]) -> Json:
    """Min, median and max of at least one number."""
    values = list(values)
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(above: Sequence[float], below: Sequence[float]) -> Json:
    """The spread of the quotients of two measurements, round by round."""
    return spread(a / b for a, b in zip(above, below, strict=True))


def refuse(**limits: tuple[float, float]) -> None:
    """Check settings.

    Args:
        **limits: by the setting's name, its value and the least it may be.

    Raises:
        SpecError: when there is too little to measure.
    """
    for name, (value, least) in limits.items():
        if not (math.isfinite(value) and value >= least):
            raise SpecError(f"`{name}` must be at least {least}; got {value}.")


def refuse_densities(densities: Sequence[float]) -> None:
    """Check densities.

    Raises:
        SpecError: when there is none, or one is not in (0, 1].
    """
    if not densities or any(not 0 < density <= 1 for density in densities):
        raise SpecError(f"`densities` must lie in (0, 1], one at least; got {list(densities)}.")


def table(result: Json, title: str, columns: Sequence[str], *notes: str) -> Table:
    """An empty table with a caption that names the machine.

    Args:
        result: of a benchmark.
        title: of the table, after the benchmark's name.
        columns: their heads; the first is of words, the others of numbers.
        *notes: added to the caption.
    """
    about = result["machine"]
    told = f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}"
    load = "" if about["load"] is None else f", load {about['load']:.1f}"
    caption = ". ".join([f"{told}, windfall {about['windfall']}{load}", *notes])
    made = Table(title=f"{result['benchmark']}: {title}", caption=caption)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    return made


def shown(values: Json | None, form: str = ",.0f") -> str:
    """A spread as `median (min - max)`; nothing where there is none."""
    if values is None:
        return ""
    low, middle, high = (format(values[key], form) for key in ("min", "median", "max"))
    return f"{middle} ({low} - {high})"
