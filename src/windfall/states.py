"""States in files: tensors and plain facts, written whole or not at all, read without code.

A file is safetensors: the tensors of `State.tensors`, and as its metadata the rest as JSON. Several
states lie in one file when they are of runs that are trained together.

    states.write(path, [state], {"seconds": 1.5})
    (state,), facts = states.read(path)
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from windfall.masks import Params
from windfall.spec import Json, SpecError, canonical
from windfall.train import State


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash.

    Several processes may write one file at once: the last one's stays.
    """
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it would keep what space is left
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_tensors(path: Path, tensors: Params, facts: Json) -> None:
    """Write tensors by name, and facts that are JSON."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, safetensors.torch.save(own, {"facts": canonical(facts)}))


def read_tensors(path: Path, prefix: str = "") -> tuple[Params, Json]:
    """The tensors of a file whose names begin with `prefix`, and its facts.

    Raises:
        SpecError: when it is not a whole file that `write_tensors` wrote.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            # a clone lies aligned in memory, which the mapped file may not, and bits depend on it
            tensors: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in names}
            return tensors, json.loads(file.metadata()["facts"])
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as problem:
        raise SpecError(
            f"{path} must be a safetensors file that windfall wrote; got {problem}. Delete it, and"
            " the study's next run makes it again."
        ) from None


def write(path: Path, states: Sequence[State], facts: Json) -> None:
    """Write states, one at least, and what is to be given back with them."""
    tensors = {
        _prefix(place) + name: tensor
        for place, state in enumerate(states)
        for name, tensor in state.tensors().items()
    }
    first, *others = (finite(state.facts()) for state in states)
    write_tensors(path, tensors, {**first, "others": others, "extra": facts})


def read(path: Path) -> tuple[list[State], Json]:
    """The states of a file, and what was given with them, if anything was.

    Raises:
        SpecError: when it is not a whole file that holds states.
    """
    tensors, facts = read_tensors(path)
    try:
        each = [facts, *facts.get("others", [])]
        states = [
            State.restored(_under(_prefix(place), tensors), infinite(known))
            for place, known in enumerate(each)
        ]
        return states, facts.get("extra", {})
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise SpecError(
            f"{path} must hold a network's state; got {problem!r}. Delete it, and the study's next"
            " run makes it again."
        ) from None


def _prefix(place: int) -> str:
    """Of the names of a state's tensors; the first state is as it would be alone."""
    return f"others/{place}/" if place else ""


def _under(prefix: str, tensors: Params) -> Params:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def finite(facts: Json) -> Json:
    """Losses that are not finite as strings: the lab's JSON knows no NaN."""

    def safe(value: Any) -> Any:
        is_odd = isinstance(value, float) and value - value != 0
        return repr(value) if is_odd else value

    looks = [{key: safe(v) for key, v in look.items()} for look in facts["evaluations"]]
    return {**facts, "evaluations": looks}


def infinite(facts: Json) -> Json:
    """The facts that `finite` was given."""
    looks = [
        {key: float(v) if isinstance(v, str) else v for key, v in look.items()}
        for look in facts["evaluations"]
    ]
    return {**facts, "evaluations": looks}
