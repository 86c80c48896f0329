"""Settings: studies from TOML files and from changes by path.

A TOML file may say `extends`, a study to start from. With `axes` it stands for a suite:

    load("lottery", {"num_seeds": 5, "model.hidden": [100, 50]})
    load("rethinking", {"axes.method": "slimming"})
"""

import copy
import functools
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from windfall.luck import CONSTANTS, LaboratoryStudy
from windfall.models import UserModel
from windfall.spec import Json, SpecError, checked, digest, merge, nearest, tag
from windfall.study import Study
from windfall.suite import Suite, naming, narrowed, product, refuse_alike

_TOLD = ("name", "title", "question")  # of a suite itself


def bundled() -> list[str]:
    """Names of the studies that come with the package."""
    folder = resources.files("windfall") / "studies"
    names = [item.name for item in folder.iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load(
    study: str | Path, settings: Mapping[str, Any] | None = None, *, code: bool = True
) -> Study | Suite | LaboratoryStudy:
    """The study, or suite, of a bundled name or a TOML file, with settings changed by path.

    Args:
        study: a bundled study's name, or the path of a TOML file.
        settings: values by path, such as `{"recipe.steps": 500, "model": "conv-4"}`. Of a suite
            they change every case, but for those below `axes`: `{"axes.method": ["thinet"]}` names
            the cases of an axis that are wanted, `axes.method.thinet.levels` changes one.
        code: look up a user's own network by importing it; if not, the study can be found in a lab
            (see `key`) but not run.

    Raises:
        SpecError: when there is no such study or setting, or a value cannot be.
    """
    document, given = read(study), dict(settings or {})
    if "experiment" in document:
        return _experimental(document, given)
    axes = _axes(document.pop("axes", None), given)
    if axes is None:
        return _settled(_assigned(document, given), code=code)
    told = {name: given.pop(name, document.get(name, "")) for name in _TOLD}
    cases: dict[str, Study] = {}
    for case, changes in product(axes):
        with naming(case):
            _refuse_overruled(given, changes)
            whole = functools.reduce(merge, changes, _assigned(document, given))
            whole |= {"name": f"{told['name']}-{case}"}
            whole |= {"title": f"{told['title'] or told['name']}: {case}"}
            cases[case] = _settled(whole, code=code)
    refuse_alike(cases)
    name, title, question = (str(told[each]) for each in _TOLD)
    return Suite(name, title, question, cases)


def _experimental(document: Json, given: dict[str, Any]) -> LaboratoryStudy:
    """A study of the laboratory; `arms` may name those of its arms that are wanted."""
    whole, wanted = copy.deepcopy(document), given.pop("arms", None)
    if wanted is not None:
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        for name in names:
            if name not in whole["arms"]:
                known = nearest(str(name), list(whole["arms"]))
                raise SpecError(f"`arms` must be some of the study's; got {name!r}.{known}")
        whole["arms"] = {name: whole["arms"][name] for name in names}
        whole["contrasts"] = [
            contrast
            for contrast in whole.get("contrasts", [])
            if contrast["arm"] in names and contrast["against"] in (*names, *CONSTANTS)
        ]
    for path, value in given.items():
        _assign(whole, path, value)
    return checked(lambda: LaboratoryStudy.model_validate(whole))


def _axes(axes: Any, given: dict[str, Any]) -> Json | None:
    """The axes of a suite as they were changed; their settings are taken out of those given."""
    paths = [path for path in given if path.split(".")[0] == "axes"]
    if axes is None and not paths:
        return None
    if not isinstance(axes, dict) or not axes:
        got = paths[0] if axes is None else repr(axes)
        raise SpecError(f"`axes` must be a suite's tables of cases, by axis; got {got}.")
    axes, wanted = copy.deepcopy(axes), dict[str, Any]()
    for path in paths:
        value, (_, *parts) = given.pop(path), path.split(".")
        if len(parts) == 1:
            wanted[parts[0]] = value
            continue
        if not parts:
            raise SpecError(f"`axes` must be set by axis, such as `axes.{next(iter(axes))}`.")
        narrowed(axes, {parts[0]: parts[1]})  # both must be there
        if len(parts) == 2:
            raise SpecError(
                f"`{path}` must be changed field by field, such as `{path}.num_seeds`; got"
                f" {value!r}."
            )
        _assign({"axes": axes}, path, value)
    return narrowed(axes, wanted)


def _refuse_overruled(given: Mapping[str, Any], changes: list[Json]) -> None:
    """Refuse a setting for all cases where this one sets the same, or what it is a part of."""
    for path in given:
        parts = path.split(".")
        for change in changes:
            place: Any = change
            while parts and isinstance(place, dict) and parts[0] in place:
                place = place[parts.pop(0)]
            is_whole = not isinstance(place, dict) or "kind" in place
            if is_whole and place is not change:
                raise SpecError(
                    f"`{path}` must be set by case, for this one sets it itself:"
                    f" `axes.AXIS.CASE.{path}`."
                )
            parts = path.split(".")


def _assigned(document: Json, settings: Mapping[str, Any]) -> Json:
    """The settings, some of them changed by path."""
    arms = [arm.to_json() for arm in Study.model_fields["arms"].default]
    whole = {"arms": arms} | copy.deepcopy(document)  # a path into the arms needs them there
    for path, value in settings.items():
        _assign(whole, path, value)
    return whole


def _settled(document: Json, *, code: bool) -> Study:
    if not code:
        document["model"] = _unresolved(document.get("model"))
    return checked(lambda: Study.model_validate(document))


def _unresolved(model: Any) -> Any:
    name = model.get("callable") if isinstance(model, dict) else model
    if not isinstance(name, str) or ":" not in name:
        return model
    return {"kind": tag(UserModel), "callable": name, "source": "", "parameters": {}}


def key(study: Study | LaboratoryStudy) -> str:
    """What a lab knows a study by: the digest of its settings, a user's network by its name."""
    document = study.to_json()
    if isinstance(study, LaboratoryStudy):
        return digest(document)
    for name in ("source", "parameters"):
        document["model"].pop(name, None)
    return digest(document)


def read(study: str | Path, seen: tuple[str, ...] = ()) -> Json:
    """The settings in a study's TOML, those it extends included."""
    name, text = _source(study)
    here = name if name in bundled() else str(Path(name).resolve())
    if here in seen:
        raise SpecError(
            f"`extends` must not lead back to itself; got {' -> '.join((*seen, here))}."
        )
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise SpecError(f"{name} must be TOML; {problem}.") from None
    if Path(study).suffix == ".toml":
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(study).stem)
        document.setdefault("name", stem.strip("-_"))
    base = document.pop("extends", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise SpecError(f"`extends` must be the name or path of a study; got {base!r}.")
    nearby = Path(study).parent / base
    extended = read(nearby if nearby.suffix == ".toml" and nearby.exists() else base, (*seen, here))
    for told in _TOLD[1:]:  # a study's own words do not fit another
        extended.pop(told, None)
    axes = document.get("axes", {})
    wanted = {a: axes.pop(a) for a in list(axes) if isinstance(axes[a], str | list)}
    if wanted:
        extended["axes"] = narrowed(extended.get("axes", {}), wanted)
    return merge(extended, document)


def _source(study: str | Path) -> tuple[str, str]:
    path = Path(study)
    if str(study) in bundled():
        file = resources.files("windfall") / "studies" / f"{study}.toml"
        return str(study), file.read_text(encoding="utf-8")
    try:
        if path.suffix == ".toml" or path.exists():
            return str(path), path.read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise SpecError(f"STUDY must be a readable TOML file; got {path}: {problem}.") from None
    raise SpecError(
        f"STUDY must be a bundled study or the path of a .toml file; got {str(study)!r}."
        f"{nearest(str(study), bundled())}"
    )


def _assign(document: Json, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    place: Any = document
    for index, part in enumerate(parents):
        here = ".".join(parents[: index + 1])
        place = _inside(place, part, here)
    if isinstance(place, list):
        raise SpecError(
            f"`{path}` must name a field of a member of its list; got no field."
            f" Set the whole list: `{'.'.join(parents)}`."
        )
    place[last] = value


def _inside(place: Any, part: str, here: str) -> Any:
    """The settings at one step of a path; a bare name becomes a table that can have fields."""
    if isinstance(place, list):
        for index, item in enumerate(place):
            if item == part or (isinstance(item, dict) and item.get("kind") == part):
                place[index] = {"kind": part} if isinstance(item, str) else item
                return place[index]
        names = [str(item.get("kind") if isinstance(item, dict) else item) for item in place]
        raise SpecError(f"`{here}` must name one of its list.{nearest(part, names)}")
    item = place.setdefault(part, {})
    if isinstance(item, str):
        item = place[part] = {"kind": item}
    if not isinstance(item, dict | list):
        raise SpecError(f"`{here}` must have fields to be set by path; got {item!r}.")
    return item
