"""Samples: inputs and labels as tensors, checked where they enter.

Whatever a data set comes from (files, a user's arrays, a `Dataset` of single items), it becomes one
`Decoded`: tensors of the right kind, named by the SHA-256 of their content.

    samples = decoded((inputs, labels), test=None, num_classes=None)
    samples.sha256, samples.num_classes
"""

import functools
import hashlib
import importlib
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from windfall.spec import SpecError, canonical, nearest

Array = Tensor | npt.NDArray[Any]
Pair = tuple[Array, Array]


@dataclass(frozen=True)
class Part:
    """One part of a data set.

    Args:
        inputs: as stored, uint8 or floating, [sample, channel, height, width] or
            [sample, feature].
        labels: int64, [sample], in 0 ... num_classes - 1.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Part":
        """The same part on `device`."""
        return Part(self.inputs.to(device), self.labels.to(device))

    def select(self, indices: npt.NDArray[np.int64]) -> "Part":
        """The samples at `indices`, in their order."""
        chosen = torch.from_numpy(indices)
        return Part(self.inputs[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Decoded:
    """A data set as it was read, before it is split.

    Args:
        train: the training samples, the validation part among them.
        test: the official test part; None if it is to be split off `train`.
        num_classes: the number of classes, at least 1.
        peak: the stored value that means 1: 255 for bytes, 16 for the digits, 1 for floats.
        note: printed beside every number, or None.
    """

    train: Part
    test: Part | None
    num_classes: int
    peak: float
    note: str | None = None

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 over dtype, shape and bytes of the inputs and labels of `train`, then `test`."""
        total = hashlib.sha256()
        for part in (self.train, self.test):
            for tensor in (part.inputs, part.labels) if part else ():
                kind = str(tensor.dtype).removeprefix("torch.")
                total.update(canonical([kind, list(tensor.shape)]).encode())
                total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()


def decoded(
    train: Pair,
    test: Pair | None,
    num_classes: int | None,
    *,
    peak: float | None = None,
    note: str | None = None,
) -> Decoded:
    """Checked samples, from inputs and labels of the training and of the test part.

    Args:
        train: inputs, uint8 or floating, [sample, ...], and integer labels, [sample].
        test: the same of the test part, or None.
        num_classes: default the largest label plus 1.
        peak: the stored value that means 1; default 255 for bytes, 1 for floats.
        note: printed beside every number, or None.

    Raises:
        SpecError: when they cannot be samples of one data set.
    """
    first = _part(train, "Training")
    second = _part(test, "Test") if test is not None else None
    if second and (first.inputs.shape[1:], first.inputs.dtype) != (
        second.inputs.shape[1:],
        second.inputs.dtype,
    ):
        raise SpecError(
            "Test inputs must be like training inputs, "
            f"{_kind(first.inputs)}; got {_kind(second.inputs)}."
        )
    parts = [part for part in (first, second) if part]
    if num_classes is not None and num_classes < 1:
        raise SpecError(f"`num_classes` must be at least 1; got {num_classes}.")
    classes = num_classes or 1 + max(0, *(int(part.labels.max()) for part in parts))
    for part in parts:
        if not (part.labels.min() >= 0 and part.labels.max() < classes):
            raise SpecError(
                f"Labels must lie in 0 ... {classes - 1} (`num_classes` is {classes}); "
                f"got {int(part.labels.min())} ... {int(part.labels.max())}."
            )
    if peak is None:
        peak = 255 if first.inputs.dtype == torch.uint8 else 1
    return Decoded(first, second, classes, peak, note)


def _kind(inputs: Tensor) -> str:
    return f"{str(inputs.dtype).removeprefix('torch.')} {tuple(inputs.shape[1:])}"


def _tensor(value: Any, what: str) -> Tensor:
    try:
        if isinstance(value, np.ndarray):  # torch warns about read-only and refuses strides < 0
            value = np.require(value, requirements=["C", "W"])
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as problem:
        raise SpecError(f"{what} must be a tensor or an array of numbers; got {problem}") from None


def _part(pair: Pair, which: str) -> Part:
    inputs, labels = (
        _tensor(value, f"{which} {what}")
        for value, what in zip(pair, ("inputs", "labels"), strict=True)
    )
    if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
        raise SpecError(
            f"{which} inputs must be uint8 or floating; got {inputs.dtype}. "
            "Convert them, e.g. with `.float()`."
        )
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise SpecError(
            f"{which} labels must be integers; got {labels.dtype}. "
            "Convert them, e.g. with `.long()`."
        )
    if inputs.dim() < 2 or labels.dim() != 1:
        raise SpecError(
            f"{which} inputs must be [sample, ...] and labels [sample]; got shapes "
            f"{tuple(inputs.shape)} and {tuple(labels.shape)}."
        )
    if len(inputs) != len(labels):
        raise SpecError(
            f"{which} inputs and labels must be equally many; got {len(inputs):,} and "
            f"{len(labels):,}."
        )
    if inputs.numel() == 0:
        raise SpecError(f"{which} inputs must not be empty; got shape {tuple(inputs.shape)}.")
    if inputs.is_floating_point() and not inputs.isfinite().all():
        worst = int((~inputs.isfinite()).flatten(1).any(1).nonzero()[0])
        raise SpecError(f"{which} inputs must be finite; got NaN or infinity in sample {worst}.")
    return Part(inputs, labels.long())


def moments(inputs: Tensor, peak: float) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of x / peak, channel by channel.

    numpy sums in one thread, so the result does not depend on how many there are; and in chunks,
    so that there is never a second copy of the data.

    Args:
        inputs: uint8 or floating, [sample, channel, ...], on the CPU.
        peak: the stored value that means 1.

    Returns:
        Both float64, [channel]; the deviation of a constant channel is given as 1, for it divides.
    """
    axes = tuple(axis for axis in range(inputs.dim()) if axis != 1)
    count, chunks = inputs.numel() // inputs.shape[1], inputs.split(1024)
    if inputs.dtype == torch.uint8:  # counting values is exact, and ten times as fast
        shares = sum(_histogram(chunk) for chunk in chunks) / count
        values = np.arange(256) / peak
        mean = shares @ values
        variance = (shares * (values - mean[:, None]) ** 2).sum(1)
    else:
        mean = sum(x.double().numpy().sum(axes) for x in chunks) / (count * peak)
        center = np.reshape(mean, (-1, *(1,) * (inputs.dim() - 2)))
        variance = sum(np.square(x.double().numpy() / peak - center).sum(axes) for x in chunks)
        variance = variance / count
    std = torch.from_numpy(np.sqrt(variance))
    return torch.from_numpy(mean), std.where(inputs.amin(axes) < inputs.amax(axes), 1.0)


def _histogram(inputs: Tensor) -> npt.NDArray[np.int64]:
    """How often each byte occurs, [channel, 256]."""
    channels = inputs.numpy().swapaxes(0, 1)
    return np.stack([np.bincount(channel.ravel(), minlength=256) for channel in channels])


def _is_pair(value: Any) -> TypeGuard[tuple[Any, Any]]:
    return isinstance(value, tuple | list) and len(cast("list[Any]", value)) == 2


def _is_array(value: Any) -> TypeGuard[Array]:
    return isinstance(value, Tensor | np.ndarray)


def _is_arrays(value: Any) -> TypeGuard[Pair]:
    """Whether it is a pair of whole arrays; a list of two is a sequence of two items."""
    return isinstance(value, tuple) and _is_pair(value) and all(map(_is_array, value))


def stacked(value: Any) -> tuple[Pair, Pair | None]:
    """The training and the test part of a user's value, each as one pair of arrays.

    Args:
        value: inputs and labels, or a map-style `Dataset` of (input, label), or a pair (train,
            test) of either.

    Raises:
        SpecError: when it is none of them, or empty.
    """
    if isinstance(value, tuple) and _is_pair(value) and not _is_arrays(value):
        return _stack(value[0]), _stack(value[1])
    return _stack(value), None


def _stack(value: Any) -> Pair:
    if _is_arrays(value):
        return value
    if _is_array(value) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise SpecError(
            "Data must be inputs and labels, or a map-style Dataset of (input, label), or a pair "
            f"(train, test) of either; got {type(value).__name__}."
        )
    items = [value[index] for index in range(len(value))]
    if not items:
        raise SpecError(f"A Dataset must not be empty; got {type(value).__name__} of length 0.")
    for index, item in enumerate(items):
        if not _is_pair(item):
            raise SpecError(
                f"Every item of a Dataset must be a pair (input, label); got "
                f"{type(item).__name__} at {index}."
            )
    inputs = [_tensor(item[0], f"Input {index}") for index, item in enumerate(items)]
    labels = [_tensor(item[1], f"Label {index}") for index, item in enumerate(items)]
    shapes = sorted({tuple(tensor.shape) for tensor in inputs})
    if len(shapes) > 1 or any(label.dim() for label in labels):
        raise SpecError(
            "Inputs of a Dataset must be of one shape and labels single numbers; got inputs of "
            f"shapes {shapes[:4]} and labels of {sorted({tuple(y.shape) for y in labels})[:4]}."
        )
    return torch.stack(inputs), torch.stack(labels)


def called(path: str) -> Any:
    """What a user's function returns, called without arguments.

    Args:
        path: `package.module:function`.

    Raises:
        SpecError: when it cannot be imported, is no function, or fails.
    """
    home, _, name = path.partition(":")
    try:
        module = importlib.import_module(home)
    except Exception as problem:
        raise SpecError(
            f"`data.callable` must name a module that can be imported; got {path}, whose import "
            f"raised {type(problem).__name__}: {problem}. Install it, or add its folder to "
            "PYTHONPATH."
        ) from problem
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise SpecError(
            f"`data.callable` must name a function of {home}; got `{name}`.{nearest(name, known)}"
        )
    try:
        return function()
    except Exception as problem:
        raise SpecError(
            f"`data.callable` must return data; {path} raised {type(problem).__name__}: {problem}."
        ) from problem
