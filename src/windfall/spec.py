"""Specs: immutable, validated values that are their own configuration, record and address.

Everything that describes an experiment is a `Spec`: it is checked when it is made, it cannot
change, it is written as JSON, and the SHA-256 of its canonical JSON is its address. A *family* is a
union of specs; each member is known by its tag, the kebab-case name of its class, and a name alone
stands for the member with its defaults:

    Shape = Annotated[Circle | Square, FAMILY]
    decode(Shape, "circle") == decode(Shape, {"kind": "circle", "radius": 1.0}) == Circle()
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Self, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

Json = dict[str, Any]
T = TypeVar("T")


class SpecError(ValueError):
    """A setting that cannot be; says which field, what it must be, what it got, the remedy."""


def tag(member: type) -> str:
    """The name of a member of a family: its class name in kebab case (`Conv_2` is `conv-2`)."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", member.__name__)
    return spaced.replace("_", "-").lower()


def unaddressed(default: Any, **constraints: Any) -> Any:
    """A field that does not change what a run is (where its files lie): not in the address."""
    return Field(default, json_schema_extra={"unaddressed": True}, **constraints)


def later(default: Any, *, absent: Any, **constraints: Any) -> Any:
    """A field that was added after runs had been stored.

    Args:
        default: what a new spec gets.
        absent: the value that means "as before the field existed". It is left out of the JSON, so
            old addresses stand, and it is what a stored JSON without the field means, so changing
            `default` does not lie.
        **constraints: as of `pydantic.Field`.
    """
    return Field(default, json_schema_extra={"absent": absent}, **constraints)


def merge(base: Json, changes: Mapping[str, Any]) -> Json:
    """A document with some of its fields changed, tables field by field.

    A table that names another `kind` replaces the old one; a bare name is a table of that kind.
    """
    whole = dict(base)
    for name, value in changes.items():
        old = whole.get(name)
        old = {"kind": old} if isinstance(old, str) else old
        if isinstance(old, dict) and isinstance(value, Mapping) and _is_like(old, value):
            whole[name] = merge(old, value)
        else:
            whole[name] = value
    return whole


def _is_like(old: Json, new: Mapping[str, Any]) -> bool:
    """Whether a table changes fields of the old one, rather than naming another member."""
    return new.get("kind", old.get("kind")) == old.get("kind")


def _marks(model: type[BaseModel], name: str) -> Json:
    extra = model.model_fields[name].json_schema_extra
    return dict(extra) if isinstance(extra, Mapping) else {}


def _document(value: Any, *, addressed: bool) -> Any:
    if isinstance(value, Spec):
        return value.to_json(addressed=addressed)
    if isinstance(value, tuple | list):
        return [_document(item, addressed=addressed) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _document(item, addressed=addressed) for key, item in value.items()}
    return value + 0.0 if isinstance(value, float) else value  # -0.0 equals 0.0: one text


class Spec(BaseModel):
    """An immutable, validated value with a JSON form and an address."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _from_document(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and value == tag(cls):
            return {}
        if not isinstance(value, Mapping):
            return value
        fields = {str(key): item for key, item in value.items()}
        kind = fields.pop("kind", tag(cls))
        if kind != tag(cls):
            told = {"kind": tag(cls), "got": repr(kind)}
            raise PydanticCustomError("kind", "must be of kind {kind}; got {got}", told)
        for name in [name for name in fields if name not in cls.model_fields]:
            remedy = nearest(name, list(cls.model_fields))
            raise PydanticCustomError(
                "kind", "has no field `{name}`.{remedy}", {"name": name, "remedy": remedy}
            )
        if info.context == "stored":
            absent = {name: _marks(cls, name) for name in cls.model_fields}
            return {n: marks["absent"] for n, marks in absent.items() if "absent" in marks} | fields
        return {name: cls._completed(name, item) for name, item in fields.items()}

    @classmethod
    def _completed(cls, name: str, value: Any) -> Any:
        """A table that does not say its `kind` changes fields of the field's default."""
        if isinstance(value, bool) and cls.model_fields[name].annotation is not bool:
            problem = "`{name}` must be neither true nor false; got {got}"
            raise PydanticCustomError("kind", problem, {"name": name, "got": repr(value)})
        default = cls.model_fields[name].default
        if isinstance(default, Spec) and isinstance(value, Mapping) and "kind" not in value:
            return default.to_json(addressed=False) | dict(value)
        return value

    def to_json(self, *, addressed: bool = True) -> Json:
        """The spec as a JSON-able dictionary, its tag under `kind`.

        Args:
            addressed: leave out the fields that do not belong to the address.
        """
        document: Json = {"kind": tag(type(self))}
        for name in type(self).model_fields:
            value, marks = getattr(self, name), _marks(type(self), name)
            if (addressed and marks.get("unaddressed")) or (
                "absent" in marks and value == marks["absent"]
            ):
                continue
            document[name] = _document(value, addressed=addressed)
        return document

    @classmethod
    def from_json(cls, document: Json) -> Self:
        """The spec that `to_json` wrote, whenever it was written (see `later`)."""
        return cls.model_validate(document, context="stored")

    @property
    def address(self) -> str:
        """SHA-256, 64 hexadecimal digits, of the canonical JSON."""
        return digest(self.to_json())


def canonical(document: Any) -> str:
    """JSON with sorted keys, no white space, no NaN: equal values give equal text."""
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest(document: Any) -> str:
    """SHA-256, 64 hexadecimal digits, of a document's canonical JSON."""
    return hashlib.sha256(canonical(document).encode()).hexdigest()


def nearest(name: str, known: list[str]) -> str:
    """The remedy for an unknown name: the nearest known one, if any is near, and all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return f"{hint} Known: {', '.join(known)}."


def _members(union: Any) -> Iterator[type["Spec"]]:
    """The classes of a union, those of the families inside it included."""
    if get_origin(union) is Annotated:
        union = get_args(union)[0]
    for member in get_args(union) or (union,):
        if get_origin(member) is None:
            yield member
        else:
            yield from _members(member)


class _Family:
    """Marks a union of specs as a family: decodes an instance, a name, or a JSON object."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        members = {tag(member): member for member in _members(source)}

        def named(value: Any) -> Any:
            if isinstance(value, tuple(members.values())):
                return value
            document = {"kind": value} if isinstance(value, str) else value
            kind = document.get("kind", value) if isinstance(document, Mapping) else value
            if isinstance(kind, str) and kind in members:
                return document
            name = kind if isinstance(kind, str) else ""
            raise PydanticCustomError(
                "kind",
                "must be one of the known names; got {got}.{remedy}",
                {"got": repr(kind), "remedy": nearest(name, list(members))},
            )

        def kind_of(value: Any) -> str:
            kind = value["kind"] if isinstance(value, Mapping) else tag(type(value))
            return f"<{kind}>"

        tagged = core_schema.tagged_union_schema(
            {f"<{name}>": handler.generate_schema(member) for name, member in members.items()},
            discriminator=kind_of,
        )
        return core_schema.no_info_before_validator_function(named, tagged)


FAMILY = _Family()


def members(family: Any) -> dict[str, type[Spec]]:
    """The members of a family by their tags, in the order of its union."""
    return {tag(member): member for member in _members(family)}


def decode(family: Any, value: Any) -> Any:
    """A member of `family` from an instance, a name or a JSON object.

    Raises:
        SpecError: when it is none; the message names the field.
    """
    return checked(lambda: TypeAdapter(family).validate_python(value))


def _path(location: tuple[int | str, ...]) -> str:
    """Where an error is, as settings are named by path: a member of a list by its kind."""
    parts: list[str] = []
    for before, part in zip((None, *location), location, strict=False):
        is_kind = isinstance(part, str) and part.startswith("<")  # put there by `_Family`
        if is_kind and isinstance(before, int):
            parts[-1] = str(part).strip("<>")
        elif not is_kind:
            parts.append(str(part))
    return ".".join(parts)


def _sentence(error: ErrorDetails) -> str:
    path, message = _path(error["loc"]), error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"`{path}` must be given."
    if error["type"] not in ("kind", "value_error"):
        must = re.sub(r"^\w+ should ", "must ", message).replace("valid tuple", "list")
        message = f"{must}; got {error['input']!r}"
    message = message.rstrip(".") + "."
    if not path:
        return message[0].upper() + message[1:]
    return f"`{path}.{message[1:]}" if message.startswith("`") else f"`{path}` {message}"


def checked(make: Callable[[], T]) -> T:
    """Call `make`, turning a validation error into a `SpecError` of one message."""
    try:
        return make()
    except ValidationError as problem:
        sentences = [_sentence(error) for error in problem.errors(include_url=False)]
        raise SpecError(" ".join(dict.fromkeys(sentences))) from None
