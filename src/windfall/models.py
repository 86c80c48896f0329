"""The networks: the family `Model` and what is asked of any network.

Each member builds an `nn.Module` that maps inputs [batch, *input_shape] to logits
[batch, num_classes]. A user's own network is a callable without arguments that returns one:

    Conv_4(width=0.5).build((3, 32, 32), num_classes=10)
    decode(ModelField, make_network) == decode(ModelField, "package.module:make_network")
    kinds(module, (3, 32, 32)) == {"conv1.weight": "convolution", ..., "output.weight": "output"}
"""

import contextlib
import hashlib
import importlib
import inspect
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from types import FunctionType, ModuleType
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    ValidationInfo,
    model_validator,
)
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from windfall import initialize, seeds
from windfall.spec import FAMILY, Spec, SpecError, tag

# Multiplies the sizes of hidden layers and the numbers of channels, rounded and at least 1.
Width = Annotated[float, Field(gt=0)]
Kind = Literal["hidden", "convolution", "output"]
Build = Callable[[], nn.Module]
Watch = Callable[[str, initialize.Layer, Tensor, Tensor], None]


def _scaled(size: int, width: float) -> int:
    return max(1, round(size * width))


def _head(
    num_features: int, hidden: tuple[int, ...], width: float, num_classes: int
) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for index, size in enumerate(hidden, start=1):
        wide = _scaled(size, width)
        parts[f"hidden{index}"] = nn.Linear(num_features, wide)
        parts[f"hidden{index}_relu"] = nn.ReLU()
        num_features = wide
    return parts | {"output": nn.Linear(num_features, num_classes)}


def _conv(
    stages: tuple[int, ...], width: float, input_shape: tuple[int, ...], num_classes: int
) -> nn.Module:
    smallest = 2 ** len(stages)
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise SpecError(
            f"model conv-{2 * len(stages)} must be given images [channel, height, width] of at "
            f"least {smallest} x {smallest} pixels; got {tuple(input_shape)}."
        )
    channels, rows, columns = input_shape
    parts: dict[str, nn.Module] = {}
    for stage, size in enumerate(stages, start=1):
        for index in (2 * stage - 1, 2 * stage):
            wide = _scaled(size, width)
            parts[f"conv{index}"] = nn.Conv2d(channels, wide, kernel_size=3, padding=1)
            parts[f"conv{index}_relu"] = nn.ReLU()
            channels = wide
        parts[f"pool{stage}"] = nn.MaxPool2d(2)
        rows, columns = rows // 2, columns // 2
    head = _head(channels * rows * columns, (256, 256), width, num_classes)
    return nn.Sequential(OrderedDict(parts | head))


class Mlp(Spec):
    """A fully connected ReLU network on flattened inputs.

    Args:
        hidden: the sizes of the hidden layers, each at least 1; none for a linear classifier.
    """

    hidden: tuple[PositiveInt, ...] = (100, 50)
    width: Width = 1.0

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `hidden1`, ..., `output`."""
        parts = _head(math.prod(input_shape), self.hidden, self.width, num_classes)
        return nn.Sequential(OrderedDict(parts))


class Lenet_300_100(Spec):
    """Hidden layers of 300 and 100; 266,200 weights on MNIST. Source: 1803.03635, Fig. 2."""

    width: Width = 1.0

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `hidden1`, `hidden2`, `output`."""
        return Mlp(hidden=(300, 100), width=self.width).build(input_shape, num_classes)


class Conv_2(Spec):
    """Two 3 x 3 convolutions of 64 channels, a 2 x 2 max-pool, hidden layers of 256 and 256.

    It has 4,300,992 weights on CIFAR-10. Source: 1803.03635, Fig. 2.
    """

    width: Width = 1.0

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1`, `conv2`, `hidden1`, `hidden2`, `output`."""
        return _conv((64,), self.width, input_shape, num_classes)


class Conv_4(Spec):
    """`Conv_2` with two more convolutions, of 128 channels, and a max-pool; 2,425,024 weights.

    Source: 1803.03635, Fig. 2.
    """

    width: Width = 1.0

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1` to `conv4`, `hidden1`, `hidden2`, `output`."""
        return _conv((64, 128), self.width, input_shape, num_classes)


class Conv_6(Spec):
    """`Conv_4` with two more convolutions, of 256 channels, and a max-pool; 2,261,184 weights.

    Source: 1803.03635, Fig. 2, whose printed 1.7M weights do not fit its description.
    """

    width: Width = 1.0

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network, its layers `conv1` to `conv6`, `hidden1`, `hidden2`, `output`."""
        return _conv((64, 128, 256), self.width, input_shape, num_classes)


# -- a user's own network ---------------------------------------------------------------------

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


def is_importable(model: "Model") -> bool:
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


# -- what is asked of any network -------------------------------------------------------------


def observe(
    module: nn.Module,
    input_shape: tuple[int, ...],
    watch: Watch | None = None,
    *,
    batch_size: int = 2,
    name: str = "the network",
) -> Any:
    """The outputs on zeros, while `watch` sees each layer run; the network is left as it was.

    One forward pass, in evaluation mode and without gradients.

    Args:
        module: the network.
        input_shape: the shape of one input.
        watch: called with the weight's name, the layer, its input and its output.
        batch_size: how many inputs, at least 1.
        name: what an error calls the network.

    Raises:
        SpecError: when the network does not accept such inputs.
    """
    names = {id(layer.weight): weight for weight, layer in initialize.layers(module)}
    like = next(module.parameters(), torch.zeros(()))
    inputs = torch.zeros(batch_size, *input_shape, dtype=like.dtype, device=like.device)

    def ran(part: nn.Module, args: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
        # An attention block uses its output layer's weight without running the layer.
        is_attention = isinstance(part, nn.MultiheadAttention)
        layer, output = (part.out_proj, made[0]) if is_attention else (part, made)
        if watch is not None and isinstance(layer, initialize.Layer) and id(layer.weight) in names:
            watch(names[id(layer.weight)], layer, [*args, *named.values()][0], output)

    modes = [(part, part.training) for part in module.modules()]
    with contextlib.ExitStack() as undo, seeds.isolated(0, "observe"), torch.no_grad():
        for part, _ in modes:
            undo.callback(part.register_forward_hook(ran, with_kwargs=True).remove)
        for part, mode in modes:
            undo.callback(setattr, part, "training", mode)
        try:
            return module.eval()(inputs)
        except Exception as problem:
            raise SpecError(
                f"model must accept inputs of shape {tuple(inputs.shape)}; the forward pass of "
                f"{name} raised {problem!r}."
            ) from problem


def kinds(module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, Kind]:
    """The kind of layer of every weight that can be pruned, in the order of the parameters.

    The output layer is the one that runs last on inputs [batch, *input_shape], wherever it was
    registered.

    Example:
        >>> kinds(Mlp(hidden=(5,)).build((1, 2, 2), 3), (1, 2, 2))
        {'hidden1.weight': 'hidden', 'output.weight': 'output'}
    """
    order: list[str] = []
    observe(module, input_shape, lambda name, *_: order.append(name))
    found: dict[str, Kind] = {
        name: "hidden" if isinstance(layer, nn.Linear) else "convolution"
        for name, layer in initialize.layers(module)
    }
    if order:
        found[order[-1]] = "output"
    return found


def check_outputs(
    module: nn.Module, input_shape: tuple[int, ...], num_classes: int, model_name: str
) -> None:
    """Refuse, by a `SpecError`, a network whose outputs are not [batch, num_classes]."""
    output = observe(module, input_shape, name=f"`{model_name}`")
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if shape == (2, num_classes):
        return
    if isinstance(shape, tuple) and len(shape) == 2 and shape[0] == 2:
        raise SpecError(
            f"model must return {num_classes} classes; got {shape[1]}, from `{model_name}`."
        )
    raise SpecError(
        f"model must return logits of shape {(2, num_classes)} for inputs of shape "
        f"{(2, *input_shape)}; got {shape}, from `{model_name}`."
    )


Model = Annotated[Mlp | Lenet_300_100 | Conv_2 | Conv_4 | Conv_6 | UserModel, FAMILY]


def _given(value: Any) -> Any:
    if isinstance(value, str) and ":" in value:
        return {"kind": tag(UserModel), "callable": value}
    if callable(value) and not isinstance(value, Spec):
        with _as_field():
            return user_model(cast(Build, value))
    return value


ModelField = Annotated[Model, BeforeValidator(_given)]
