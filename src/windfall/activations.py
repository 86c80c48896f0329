"""Activations: what is seen of a network's layers while it runs forward, and then back.

Numbers of one tensor of activations, [sample, ...], and a watch that takes them of every linear
layer, convolution and activation function that runs:

    with watched(network, num=len(inputs)) as watch:
        outputs = network(inputs)
    watch.seen["conv1"].correlation
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from windfall.initialize import Layer

Nonfinite = Literal["inf", "nan"]
Call = Callable[..., Any]

_RELUS: tuple[Call, ...] = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6)
_OTHERS: tuple[Call, ...] = (
    *(F.leaky_relu, F.prelu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus),
    *(F.hardswish, F.hardtanh, F.hardsigmoid, F.softsign, F.tanh, F.sigmoid, F.logsigmoid),
    *(torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_),
    *(torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_),
)


# -- of one tensor ---------------------------------------------------------------------------------


def norms(activations: Tensor) -> Tensor:
    """The length of each sample's activations, [sample, ...] to [sample], float64."""
    return activations.detach().flatten(1).double().norm(dim=1)


def correlation(activations: Tensor) -> float | None:
    """The mean over pairs of samples of h_i · h_j / (|h_i| |h_j|), in [-1, 1].

    Samples of only zeros are left out; None where fewer than two are left.

    Source: Schoenholz et al. 2017 (1611.01232), eq. 4, c_ab.

    Args:
        activations: finite, [sample, ...].
    """
    flat = activations.detach().flatten(1).double()
    lengths = flat.norm(dim=1)
    units = flat[lengths > 0] / lengths[lengths > 0, None]
    num = len(units)
    if num < 2:
        return None
    mean = (float(units.sum(0).square().sum()) - num) / (num * (num - 1))
    return min(1.0, max(-1.0, mean))


def ranks(activations: Tensor) -> tuple[int, float]:
    """Of how many dimensions the activations of all samples are, as a matrix [sample, entry].

    The numerical rank counts singular values above max(samples, entries) · ε times the largest, ε
    that of the dtype. The effective rank is exp(-sum_i p_i log p_i), p_i the i-th singular value
    over the sum of them: in [1, rank], 0 of zeros.

    Source: Roy & Vetterli 2007, The effective rank.

    Args:
        activations: finite, floating, [sample, ...].
    """
    flat = activations.detach().flatten(1)
    values = torch.linalg.svdvals(flat.double())
    bound = max(flat.shape) * torch.finfo(flat.dtype).eps * float(values.max())
    shares = values[values > bound] / values[values > bound].sum()
    rank = len(shares)
    return rank, float((-shares * shares.log()).sum().exp()) if rank else 0.0


def units(activations: Tensor, axis: int = 1) -> tuple[float, float]:
    """The shares of dead units, never above 0, and of those always above 0; in [0, 1].

    Args:
        activations: of a ReLU, [sample, ...].
        axis: of the units; what is at other axes are samples and positions.
    """
    above = (activations.detach() > 0).movedim(axis, 0).flatten(1)
    return float((~above.any(1)).double().mean()), float(above.all(1).double().mean())


def scale(activations: Tensor) -> float:
    """The root of the mean square of all entries."""
    return float(activations.detach().double().square().mean().sqrt())


def finite(number: float) -> float | None:
    """The number, None where it is not finite."""
    return number if math.isfinite(number) else None


def nonfinite(tensor: Tensor) -> Nonfinite | None:
    """What a tensor has that is no finite number, if anything: `nan` before `inf`."""
    if bool(tensor.isfinite().all()):
        return None
    return "nan" if bool(tensor.isnan().any()) else "inf"


# -- of a network ----------------------------------------------------------------------------------


@dataclass
class Signal:
    """What goes through one layer, or one activation, of a network.

    Numbers are None where something is not finite, or there is no such thing.

    Args:
        name: of the module, or, of a function, of the module that calls it with the function's
            name; a further call in the same pass has its number behind it: `relu[2]`.
        kind: `weights` are linear layers and convolutions, whose outputs are pre-activations.
        norms: |h_l|, of its outputs, [sample], float64.
        scale: the root of their mean square over samples and entries.
        variance: over samples and entries.
        nonfinite: of its outputs.
        dead: of a ReLU, the share of units that no sample turns on.
        always_on: of a ReLU, the share of units that all samples turn on.
        correlation: as `correlation`.
        rank: as `ranks`.
        effective_rank: as `ranks`.
        reads: of a layer, the norms of what it reads, [sample].
        gain: of a layer, `scale` over that of what it reads.
        norm: of a layer, the BatchNorm that reads its outputs as they are.
        has_bias: of a layer.
        gradients: |g_l|, of the derivative of the loss of each sample by its outputs, [sample],
            float64; None where none reaches it.
        weight_gradient: the norm of the derivative of the mean loss by a layer's weight.
    """

    name: str
    kind: Literal["weights", "activation"]
    norms: Tensor
    scale: float | None = None
    variance: float | None = None
    nonfinite: Nonfinite | None = None
    dead: float | None = None
    always_on: float | None = None
    correlation: float | None = None
    rank: int | None = None
    effective_rank: float | None = None
    reads: Tensor | None = None
    gain: float | None = None
    norm: str | None = None
    has_bias: bool = False
    gradients: Tensor | None = None
    weight_gradient: float | None = None


@dataclass(eq=False)
class Watch(TorchFunctionMode):
    """Sees layers and activations while a network runs forward, and again while it runs back.

    Args:
        num: of samples.
        seen: by name.
        weights: the layers by the names of their weights.
        inside: the modules that are running, outermost first, and their names.
        calls: how often each name was called.
        made: what layers made and something still holds: its version, and the layer's.
        axis: of the units of activations, that of the layer before.
    """

    num: int
    seen: dict[str, Signal] = field(default_factory=dict[str, Signal])
    weights: dict[str, Signal] = field(default_factory=dict[str, Signal])
    inside: list[tuple[str, nn.Module]] = field(default_factory=list[tuple[str, nn.Module]])
    calls: Counter[str] = field(default_factory=Counter[str])
    made: Any = field(default_factory=WeakTensorKeyDictionary)
    axis: int = 1

    def __torch_function__(
        self,
        func: Call,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is F.batch_norm:
            self.normalized(args[0] if args else named["input"])
        made = func(*args, **named)
        if func in _RELUS or func in _OTHERS:
            self.activated(func, made)
        return made

    def normalized(self, read: Tensor) -> None:
        """A BatchNorm is about to read something."""
        version, signal = self.made.get(read, (None, None))
        if signal is not None and version == _version(read) and self.inside:
            signal.norm = self.inside[-1][0]

    def activated(self, func: Call, made: Any) -> None:
        """An activation has run."""
        path, part = self.inside[-1]
        is_module = type(part).__module__ == "torch.nn.modules.activation"
        word = getattr(func, "__name__", "activation").strip("_")
        name = path if path and is_module else f"{path}.{word}".removeprefix(".")
        signal = self._seen(name, "activation", made)
        if signal is not None and func in _RELUS and signal.nonfinite is None:
            axis = self.axis if made.dim() > 2 else 1
            signal.dead, signal.always_on = units(made, axis)

    def layer(self, path: str, layer: Layer, read: Any, made: Any) -> None:
        """A layer has run."""
        signal = self._seen(path, "weights", made)
        if signal is None:
            return
        self.axis = -1 if isinstance(layer, nn.Linear) else 1
        self.made[made] = _version(made), signal
        self.weights[f"{path}.weight".removeprefix(".")] = signal
        signal.has_bias = layer.bias is not None
        if isinstance(read, Tensor) and read.dim() and not len(read) % self.num:
            signal.reads = norms(read.reshape(self.num, -1)).cpu()
            below = scale(read)
            signal.gain = (
                finite(signal.scale / below) if signal.scale is not None and below else None
            )

    def _seen(self, name: str, kind: Literal["weights", "activation"], made: Any) -> Signal | None:
        """What can be told of a tensor at once; None of one that has no samples."""
        if not isinstance(made, Tensor) or made.dim() < 2 or len(made) % self.num:
            return None
        self.calls[name] += 1
        name = name if self.calls[name] == 1 else f"{name}[{self.calls[name]}]"
        flat = made.detach().reshape(self.num, -1)
        signal = self.seen[name] = Signal(name, kind, norms(flat).cpu(), nonfinite=nonfinite(flat))
        if signal.nonfinite is None:
            signal.scale, signal.variance = scale(flat), float(flat.double().var(correction=0))
            signal.correlation = correlation(flat)
            signal.rank, signal.effective_rank = ranks(flat)
        if made.requires_grad:
            # A hook sees the gradient by what the tensor is now, whatever is written into it later.
            made.register_hook(lambda gradient: self._back(signal, gradient))
        return signal

    def _back(self, signal: Signal, gradient: Tensor) -> None:
        signal.gradients = norms(gradient.reshape(self.num, -1)).cpu()


def _version(tensor: Tensor) -> int:
    """How often a tensor was written into: `out += x` gives back the same tensor."""
    return tensor._version  # pyright: ignore[reportPrivateUsage]  torch documents it


@contextlib.contextmanager
def watched(network: nn.Module, num: int) -> Generator[Watch]:
    """Watch a network that is run once on so many samples; its hooks are taken off again."""
    watch = Watch(num)
    with contextlib.ExitStack() as undo, watch:
        for path, part in network.named_modules():
            for handle in _hooks(path, part, watch):
                undo.callback(handle.remove)
        yield watch


def _hooks(path: str, part: nn.Module, watch: Watch) -> list[Any]:
    def enter(*_: Any) -> None:
        watch.inside.append((path, part))

    def leave(_: Any, args: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
        watch.inside.pop()
        read = next(iter([*args, *named.values()]), None)
        if isinstance(part, Layer):
            watch.layer(path, part, read, made)
        elif isinstance(part, nn.MultiheadAttention) and made is not None:
            # It uses its output layer's weight without running the layer.
            watch.layer(f"{path}.out_proj".removeprefix("."), part.out_proj, None, made[0])

    return [
        part.register_forward_pre_hook(enter),
        part.register_forward_hook(leave, with_kwargs=True, always_call=True),
    ]
