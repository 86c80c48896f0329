"""A user's own network: a callable without arguments that returns an `nn.Module`."""

import contextlib
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Generator, Mapping
from types import FunctionType, ModuleType
from typing import Any, cast

from pydantic import Field, ValidationInfo, model_validator
from torch import nn
from torch.nn.parameter import is_lazy

from windfall import seeds
from windfall.spec import Spec, SpecError, tag

Build = Callable[[], nn.Module]

# Callables that no fresh process can import by name, by (name, source).
_kept: dict[tuple[str, str], Build] = {}


class UserModel(Spec):
    """A user's own network: any callable without arguments that returns an `nn.Module`.

    Its address holds what the callable's module said and what the network's parameters were, so a
    network that has changed is another network. Given `callable` alone, the rest is looked up.

    Args:
        callable: `package.module:name`.
        source: SHA-256 of the source text of the callable's module.
        parameters: the shapes of the network's parameters by their names.
    """

    callable: str = Field(pattern=r"^[^:]+:[^:]+$")
    source: str
    parameters: dict[str, tuple[int, ...]]

    @model_validator(mode="before")
    @classmethod
    def _looked_up(cls, value: Any, info: ValidationInfo) -> Any:
        # Reading a stored record runs no user's code.
        if not isinstance(value, Mapping) or info.context == "stored":
            return value
        name = value.get("callable")
        if not isinstance(name, str) or {"source", "parameters"} & value.keys():
            return value
        with _as_field():
            return dict(value) | _described(name, resolve(name))

    def __hash__(self) -> int:
        return hash(self.address)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:  # noqa: ARG002
        """The network that the callable returns; its shapes are for `check_outputs` to check.

        Raises:
            SpecError: when the callable is not found, fails, or is no longer what it was.
        """
        function = _kept.get((self.callable, self.source)) or resolve(self.callable)
        network = _called(self.callable, function)
        for what, then, now in (
            ("source", self.source, _source(self.callable, function, network)),
            ("list of parameters", self.parameters, _shapes(network)),
        ):
            if now != then:
                raise SpecError(
                    f"`model` must be what it was; the {what} of `{self.callable}` has changed "
                    "since. Restore it, or name the model anew."
                )
        return network


def user_model(function: Build) -> UserModel:
    """A function or class that makes a network, called without arguments, as a `Model`.

    One that no fresh process can import by name is remembered, so that this process can build it.

    Raises:
        SpecError: when it makes something else, fails, or has no readable source.
    """
    if not isinstance(function, type | FunctionType):
        raise SpecError(
            "`model` must be a function or class that makes the network; got an instance of "
            f"{type(function).__name__}. Give its class, or a function that returns it."
        )
    name = f"{function.__module__}:{function.__qualname__}"
    model = UserModel(callable=name, **_described(name, function))
    has_file = _module_text(name, function) is not None
    if not (has_file and _is_plain(name) and resolve(name) is function):
        _kept[name, model.source] = function
    return model


def resolve(name: str) -> Build:
    """The callable called `package.module:name`, imported.

    Raises:
        SpecError: when there is none, or no other process would find it.
    """
    if not _is_plain(name):
        raise SpecError(
            f"`model` must be built in the process that was given it; `{name}` cannot be imported "
            "by name. Define it at the top of a module file."
        )
    home, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(home)
    except (Exception, SystemExit) as problem:
        raise SpecError(
            f"`model` must name a module that can be imported; importing `{home}` raised "
            f"{problem!r}. Install it, or add its folder to PYTHONPATH."
        ) from problem
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise SpecError(f"`model` must name a callable; `{path}` of `{home}` is {found!r}.")
    return cast(Build, found)


@contextlib.contextmanager
def _as_field() -> Generator[None]:
    # A field's error is prefixed with the field's own name.
    try:
        yield
    except SpecError as problem:
        raise ValueError(str(problem).removeprefix("`model` ")) from problem


def as_model(value: Any) -> Any:
    """A callable or its name as a `UserModel`; anything else as it is, for the family to judge."""
    if isinstance(value, str) and ":" in value:
        return {"kind": tag(UserModel), "callable": value}
    if callable(value) and not isinstance(value, Spec):
        with _as_field():
            return user_model(cast(Build, value))
    return value


def is_importable(model: Spec) -> bool:
    """Whether a fresh process can build the network, so that its runs can be sent to workers.

    False for a callable of a notebook, script or console, a lambda and a nested function.
    """
    if not isinstance(model, UserModel):
        return True
    return _is_plain(model.callable) and (model.callable, model.source) not in _kept


def _is_plain(name: str) -> bool:
    return "<" not in name and not name.startswith("__main__:")


def _called(name: str, function: Build) -> nn.Module:
    try:
        network: Any = function()
    except Exception as problem:
        raise SpecError(
            f"`model` must be made without arguments; calling `{name}` raised {problem!r}."
        ) from problem
    if not isinstance(network, nn.Module):
        raise SpecError(
            f"`model` must return an nn.Module; `{name}` returned {type(network).__name__}."
        )
    lazy = [key for key, param in network.named_parameters() if is_lazy(param)]
    if lazy:
        raise SpecError(
            f"`model` must know its parameters' shapes; `{lazy[0]}` of `{name}` is lazy. "
            "State its input size."
        )
    return network


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(param.shape) for name, param in network.named_parameters()}


def _described(name: str, function: Build) -> dict[str, Any]:
    with seeds.isolated(0, "describe"):
        network = _called(name, function)
    return {"source": _source(name, function, network), "parameters": _shapes(network)}


def _source(name: str, function: Build, network: nn.Module) -> str:
    text = _module_text(name, function)
    definitions = [function] if text is None or "<" in name else []
    if text is None:
        classes = {type(part) for part in network.modules()} - {function}
        definitions += sorted((part for part in classes if not _module_text(name, part)), key=repr)
    try:
        text = "".join([text or "", *map(_definition, definitions)])
    except (OSError, TypeError) as problem:
        raise SpecError(
            f"`model` must have source text that can be read; `{name}` has none. "
            "Define it in a module file and import it."
        ) from problem
    return hashlib.sha256(text.encode()).hexdigest()


def _module_text(name: str, function: Any) -> str | None:
    is_defined = isinstance(function, type | FunctionType)
    home = function.__module__ if is_defined else name.partition(":")[0]
    try:
        return inspect.getsource(sys.modules[home])
    except (OSError, TypeError, KeyError):
        return None


def _definition(value: Any) -> str:
    """What a function or class does, as far as it can be read: its text, and what it refers to."""
    if isinstance(value, type):
        methods = [part for part in vars(value).values() if isinstance(part, FunctionType)]
        return "".join([repr(value), *map(_definition, methods)])
    text, places = inspect.getsource(value), list(value.__code__.co_positions())
    variables = inspect.getclosurevars(value)
    seen = sorted({**variables.globals, **variables.nonlocals}.items())
    named = [(key, _mention(item)) for key, item in seen]
    return repr((text, places, str(inspect.signature(value)), named))


def _mention(value: Any) -> str:
    if isinstance(value, ModuleType):
        return value.__name__
    return inspect.getsource(value) if isinstance(value, FunctionType) else repr(value)
