"""Suites: one question asked of several cases, each a study of its own.

A suite is the product of its axes: for each, what a case of that name changes of the rest. Cases
share every run that they have in common, and each has its own family of verdicts.

    suite = load("rethinking")
    suite.cases["slimming"].recipe.penalty
"""

import itertools
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from windfall.spec import Json, SpecError, digest, nearest
from windfall.study import Study


@dataclass(frozen=True)
class Suite:
    """Studies that ask one question.

    Args:
        name: names the page and the record.
        title: one line.
        question: what is asked, a sentence.
        cases: the studies, by what tells them apart.
    """

    name: str
    title: str
    question: str
    cases: Mapping[str, Study]

    @property
    def address(self) -> str:
        """SHA-256, 64 hexadecimal digits, of its cases' addresses by name."""
        return digest({"suite": {case: study.address for case, study in self.cases.items()}})


@contextmanager
def naming(case: str) -> Generator[None]:
    """Say of which case of a suite a `SpecError` is; a study is a case without a name."""
    try:
        yield
    except SpecError as problem:
        if not case:
            raise
        raise SpecError(f"Case {case}: {problem}") from None


def refuse_alike(cases: Mapping[str, Study]) -> None:
    """Refuse, by a `SpecError`, two cases that are one study: it would be counted twice."""
    known: dict[str, str] = {}
    for case, study in cases.items():
        document = {key: value for key, value in study.to_json().items() if key != "name"}
        other = known.setdefault(digest(document), case)
        if other != case:
            raise SpecError(f"`axes` must make its cases differ; {other} and {case} are alike.")


def narrowed(axes: Json, wanted: Mapping[str, Any]) -> Json:
    """The axes, those that `wanted` speaks of with the cases it names alone.

    Raises:
        SpecError: when there is no such axis, or no such case on it.
    """
    chosen = dict[str, list[Any]]()
    for axis, names in wanted.items():
        if axis not in axes:
            raise SpecError(f"`axes` must have an axis `{axis}`.{nearest(axis, list(axes))}")
        chosen[axis] = list(names) if isinstance(names, list | tuple) else [names]
        for name in chosen[axis]:
            if name not in axes[axis]:
                raise SpecError(
                    f"`axes.{axis}` must name its cases; got {name!r}."
                    f"{nearest(str(name), list(axes[axis]))}"
                )
    return {
        axis: {name: each for name, each in cases.items() if name in chosen.get(axis, cases)}
        for axis, cases in axes.items()
    }


def product(axes: Json) -> Iterator[tuple[str, list[Json]]]:
    """Every case's name and what it changes, an entry per axis, in the order of the axes.

    Raises:
        SpecError: when an axis is no table of tables, or two cases have one name.
    """
    for axis, cases in axes.items():
        if not isinstance(cases, dict) or not cases or not all(map(_is_table, cases.values())):
            raise SpecError(
                f"`axes.{axis}` must be a table of what each of its cases changes; got {cases!r}."
            )
    found: set[str] = set()
    for names in itertools.product(*axes.values()):
        case = "-".join(names)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", case):
            raise SpecError(
                f"`axes` must name cases by letters, digits, `-` and `_`; got {case!r}."
            )
        if case in found:
            raise SpecError(f"`axes` must give every case its own name; got {case} twice.")
        found.add(case)
        yield case, [axes[axis][name] for axis, name in zip(axes, names, strict=True)]


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)
