"""Biases: the signs of BatchNorm's biases, and how much of what they read ReLUs let pass.

Where a ReLU reads a BatchNorm layer, the layer's bias is the mean of what the ReLU reads, on the
data that the statistics were taken of: a negative one lets few inputs pass. Few that pass at once
is what the theory of teachers and students assumes of trained networks.

    found = biases.signs(structure.tensors(network))
    relus = biases.passed(network, inputs)
    biases.summary(found, relus)["negative/upper"]

Source: Tian et al. 2019 (1905.13405), the check of the assumption; luckmatters, `check_models`.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from windfall import seeds
from windfall.masks import Params
from windfall.spec import Json, SpecError

BATCH_SIZE = 256  # the shares do not depend on it, only the memory that a pass takes

T = TypeVar("T")


# -- biases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signs:
    """The signs of a layer's biases, or of several layers' together.

    Args:
        num_negative: biases below 0.
        num_zero: biases of exactly 0.
        num_biases: all, at least 1.
    """

    num_negative: int
    num_zero: int
    num_biases: int

    @property
    def share(self) -> float:
        """The share of negative biases, in [0, 1]."""
        return self.num_negative / self.num_biases


def signs(params: Params) -> dict[str, Signs]:
    """The signs of the biases of every BatchNorm layer, in the order of the parameters.

    A state dict does not say what a layer is: BatchNorm is what has `X.running_mean` and `X.bias`,
    which layers of instance normalization that keep statistics have too. Layers that have lost all
    of their channels are left out.

    Note:
        The source's script counts a bias of exactly 0, as every one is at the start, as negative;
        here it is counted apart, and is not negative.

    Source: luckmatters, `check_models`.

    Args:
        params: parameters and buffers by name, as of a state dict.

    Returns:
        By the layers' names; at least one.

    Raises:
        SpecError: when there is no BatchNorm layer, or one without biases or with such as are no
            finite numbers.
    """
    layers = [n.removesuffix("running_mean") for n in params if n.endswith("running_mean")]
    found = {
        layer.removesuffix("."): _signs(_bias(params, layer))
        for layer in layers
        if params[f"{layer}running_mean"].numel()
    }
    if not found:
        raise SpecError(
            "The network must have BatchNorm layers, `X.running_mean` beside `X.bias`; got"
            f" {len(params)} tensors without. Take one with BatchNorm."
        )
    return found


def _bias(params: Params, layer: str) -> Tensor:
    bias, told = params.get(f"{layer}bias"), f"The network's `{layer}bias` must be"
    if bias is None:
        raise SpecError(
            f"{told} there, for `{layer}running_mean` is; got BatchNorm without biases. Take a"
            " network whose BatchNorm has them (`affine=True`)."
        )
    mean = params[f"{layer}running_mean"]
    if bias.shape != mean.shape or not bias.is_floating_point() or bias.is_meta:
        raise SpecError(
            f"{told} floating numbers of the shape {list(mean.shape)} of `{layer}running_mean`; got"
            f" {bias.dtype} {list(bias.shape)}. Take a network of BatchNorm layers."
        )
    if not bool(bias.double().isfinite().all()):
        raise SpecError(f"{told} finite; got others. Take a network that has not diverged.")
    return bias.detach().double()


def _signs(bias: Tensor) -> Signs:
    return Signs(int((bias < 0).sum()), int((bias == 0).sum()), bias.numel())


def total(layers: Iterable[Signs]) -> Signs:
    """The signs of several layers' biases together."""
    counts = [(each.num_negative, each.num_zero, each.num_biases) for each in layers]
    return Signs(*map(sum, zip(*counts, strict=True)))


# -- what passes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relu:
    """One ReLU of a network, and what it lets pass.

    Args:
        name: of the module; of a functional ReLU that of the module that calls it, with `.relu`.
            A further call in the same pass has its number behind it: `layer1.0.relu[2]`.
        shares: of inputs, and of their positions, that are above 0: [channel], float64, in [0, 1].
        norm: the BatchNorm layer whose outputs it reads as they are; None where it reads something
            else, such as the sum of a residual block.
    """

    name: str
    shares: Tensor
    norm: str | None

    @property
    def share(self) -> float:
        """The mean over channels."""
        return float(self.shares.mean())


def passed(network: nn.Module, inputs: Tensor, *, batch_size: int = BATCH_SIZE) -> list[Relu]:
    """What every ReLU lets pass, in the order in which they run; none of a network without.

    Found are `nn.ReLU`, `F.relu`, `torch.relu` and their in-place forms. Not found are what is
    written otherwise (`clamp`, ReLU6) and what runs inside one fused or compiled call.

    Args:
        network: runs in evaluation mode and without gradients; left as it is.
        inputs: as the network is given them, [batch, *input_shape], at least one.
        batch_size: of a pass, at least 1.

    Raises:
        SpecError: when there are no inputs, or the network does not accept them.
    """
    if not len(inputs):
        raise SpecError("`inputs` must be at least one; got none.")
    if batch_size < 1:
        raise SpecError(f"`batch_size` must be at least 1; got {batch_size}.")
    watch = _Watch()
    with _watched(network, watch), torch.no_grad(), seeds.isolated(0, "biases"):
        for batch in inputs.split(batch_size):
            watch.begin()
            try:
                with watch:
                    network(batch)
            except Exception as problem:
                raise SpecError(
                    f"The network must accept inputs of shape {list(batch.shape)}; its forward pass"
                    f" raised {problem!r}."
                ) from problem
    return [each.relu(name) for name, each in watch.tallies.items()]


_RELUS: tuple[Callable[..., Tensor], ...] = (
    F.relu,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
)


@dataclass
class _Tally:
    """What was counted at a ReLU: per channel, and of how many positions; and what it reads."""

    num_passed: Tensor
    num_positions: int
    norm: str | None

    def relu(self, name: str) -> Relu:
        return Relu(name, self.num_passed.cpu().double() / self.num_positions, self.norm)


class _Watch(TorchFunctionMode):
    """Counts at every ReLU while a network runs.

    Args:
        tallies: by the ReLU's name.
        inside: the modules that are running, outermost first, and their names.
        normalized: what BatchNorm layers made and something still holds: its version, the layer.
        calls: how often each ReLU was called in this pass.
    """

    def __init__(self) -> None:
        self.tallies: dict[str, _Tally] = {}
        self.begin()

    def begin(self) -> None:
        """Begin a pass."""
        self.inside: list[tuple[str, nn.Module]] = []
        self.normalized: Any = WeakTensorKeyDictionary()
        self.calls = Counter[str]()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        is_relu = func in _RELUS
        norm = self._norm(args[0] if args else named["input"]) if is_relu else None
        made = func(*args, **named)
        if is_relu:
            self._count(made, norm)
        elif func is F.batch_norm:
            self.normalized[made] = _version(made), self.inside[-1][0]
        return made

    def _norm(self, read: Tensor) -> str | None:
        """The layer that made a tensor, if nothing was written into it since."""
        version, layer = self.normalized.get(read, (None, None))
        return layer if version == _version(read) else None

    def _count(self, made: Tensor, norm: str | None) -> None:
        if made.dim() < 2:  # made of parameters: inputs have a batch
            return
        above = (made > 0).movedim(1, 0).flatten(1)
        name, num_passed = self._name(), above.sum(1)
        if name in self.tallies:
            tally = self.tallies[name]
            tally.num_passed += num_passed
            tally.num_positions += above.shape[1]
        else:
            self.tallies[name] = _Tally(num_passed, above.shape[1], norm)

    def _name(self) -> str:
        path, part = self.inside[-1]
        name = path if path and isinstance(part, nn.ReLU) else f"{path}.relu".removeprefix(".")
        self.calls[name] += 1
        return name if self.calls[name] == 1 else f"{name}[{self.calls[name]}]"


def _version(tensor: Tensor) -> int:
    """How often a tensor was written into: `out += x` gives back the same tensor."""
    return tensor._version  # pyright: ignore[reportPrivateUsage]  torch documents it


@contextlib.contextmanager
def _watched(network: nn.Module, watch: _Watch) -> Generator[None]:
    """The network in evaluation mode, telling a watch which of its modules are running."""
    with contextlib.ExitStack() as undo:
        for path, part in network.named_modules():
            undo.callback(setattr, part, "training", part.training)
            for handle in _hooks(path, part, watch):
                undo.callback(handle.remove)
        network.eval()
        yield


def _hooks(path: str, part: nn.Module, watch: _Watch) -> list[Any]:
    def enter(*_: Any) -> None:
        watch.inside.append((path, part))

    def leave(*_: Any) -> None:
        watch.inside.pop()

    return [
        part.register_forward_pre_hook(enter),
        part.register_forward_hook(leave, always_call=True),
    ]


# -- side by side ----------------------------------------------------------------------------------


def pairs(layers: Iterable[str], relus: Iterable[Relu]) -> dict[str, Relu | None]:
    """For every BatchNorm layer, the ReLU that reads it, the first if there are several.

    None is a layer that no ReLU reads as it is: before the sum of a residual block.
    """
    readers: dict[str, Relu] = {}
    for relu in relus:
        if relu.norm is not None:
            readers.setdefault(relu.norm, relu)
    return {layer: readers.get(layer) for layer in layers}


def summary(found: Mapping[str, Signs], relus: Sequence[Relu] = ()) -> dict[str, float]:
    """The shares of one network at one moment, by name, all in [0, 1].

    - `negative`, `negative/lower`, `negative/upper`, `negative/LAYER`: of biases, those below 0;
    - `passes`, `passes/lower`, `passes/upper`, `passes/RELU`: what ReLUs let pass, the mean over
      channels.

    Halves are of the BatchNorm layers, or ReLUs, in their order; the middle one is of the lower. An
    upper half without layers is left out, and so is what passes where there are no ReLUs.

    Args:
        found: as `signs` finds them.
        relus: as `passed` finds them.
    """
    layers = {f"negative/{name}": each.share for name, each in found.items()}
    layers |= {f"passes/{relu.name}": relu.share for relu in relus}
    parts = {f"negative{half}": total(some).share for half, some in _halves([*found.values()])}
    for half, some in _halves(relus):
        parts[f"passes{half}"] = float(torch.cat([relu.shares for relu in some]).mean())
    return parts | {name: share for name, share in layers.items() if name not in parts}


def _halves(items: Sequence[T]) -> list[tuple[str, Sequence[T]]]:
    """All items, the lower and the upper half, those that there are."""
    middle = (len(items) + 1) // 2
    parts = ("", items), ("/lower", items[:middle]), ("/upper", items[middle:])
    return [(name, some) for name, some in parts if some]


def document(found: Mapping[str, Signs], relus: Sequence[Relu] = ()) -> Json:
    """Layer by layer, the signs of its biases and what the ReLU that reads it lets pass, as JSON.

    Args:
        found: as `signs` finds them.
        relus: as `passed` finds them; none where it is not known.

    Returns:
        `layers`, the BatchNorm layers; `relus`, all of them; `all`, the sums over layers; and
        `summary`. Shares are in [0, 1].
    """
    readers = pairs(found, relus)
    rows = [_row(name, each, readers[name]) for name, each in found.items()]
    each = [{"relu": r.name, "norm": r.norm, "passes": r.share} for r in relus]
    whole = _counts(total(found.values()))
    return {"layers": rows, "relus": each, "all": whole, "summary": summary(found, relus)}


def _row(layer: str, found: Signs, relu: Relu | None) -> Json:
    passes = None if relu is None else relu.share
    name = None if relu is None else relu.name
    return {"layer": layer, **_counts(found), "relu": name, "passes": passes}


def _counts(found: Signs) -> Json:
    return {
        "num_biases": found.num_biases,
        "num_negative": found.num_negative,
        "num_zero": found.num_zero,
        "negative": found.share,
    }
