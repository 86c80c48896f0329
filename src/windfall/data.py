"""Data sets as tensors: loaded whole, split by a seed, normalized by their training part.

A member of the family is a `Spec` that says which data; its `decoded` reads them. `load` turns any
member into `Dataset`: three parts whose inputs stay as stored (bytes for images), on one device,
normalized a batch at a time. Batches are a pure function of (seed, step):

    loaded = load(Digits())
    order = Order(seed=0, num_train=len(loaded.train), batch_size=64)
    batch = loaded.train.inputs[order.batch(step=0)]
    inputs = loaded.prepare(batch, torch.float32)
"""

import dataclasses
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from windfall import files, samples, seeds
from windfall.batches import CropFlip as CropFlip
from windfall.batches import Order as Order
from windfall.batches import batch_indices as batch_indices
from windfall.samples import Array, Decoded, Pair, Part
from windfall.spec import FAMILY, Spec, SpecError, checked, decode, nearest, unaddressed

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Dataset:
    """A data set as tensors, split.

    Args:
        train: what networks are trained on.
        validation: what chooses among them: early stops, winners.
        test: what is reported.
        mean: per channel, [channel], of x / peak over the training part; 0 if not normalized.
        std: the same's population standard deviation; 1 where it is 0 or if not normalized.
        peak: the stored value that means 1 (255 for bytes, 16 for the digits, 1 for floats).
        num_classes: the number of classes.
        sha256: of the decoded tensors before the split, wherever their files lie.
        note: printed beside every number, or None.
    """

    train: Part
    validation: Part
    test: Part
    mean: Tensor
    std: Tensor
    peak: float
    num_classes: int
    sha256: str
    note: str | None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.train.inputs.shape[1:])

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on `device`."""
        return dataclasses.replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
        )

    @functools.cached_property
    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        shape = (-1, *(1,) * (len(self.input_shape) - 1))
        return (1 / (self.peak * self.std)).reshape(shape), (-self.mean / self.std).reshape(shape)

    def prepare(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Stored inputs as a network sees them, (x / peak - mean) / std, per channel.

        Args:
            inputs: as stored, [..., *input_shape], any number of leading axes.
            dtype: floating, of the result.

        Returns:
            The same shape, computed as one multiply-add x * scale + shift.
        """
        scale, shift = self._scale_and_shift
        return torch.addcmul(shift.to(dtype), inputs.to(dtype), scale.to(dtype))

    def first(self, seed: int, num: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a seed trains on first in batches of so many, at most all there are, on the CPU.

        The inputs as a network sees them, and their labels.
        """
        places = torch.from_numpy(Order(seed, len(self.train), min(num, len(self.train))).batch(0))
        places = places.to(self.train.labels.device)
        inputs = self.prepare(self.train.inputs[places], dtype)
        return inputs.cpu(), self.train.labels[places].cpu()


# -- the family ------------------------------------------------------------------------------------


class Digits(Spec):
    """The 1,797 handwritten digits bundled with scikit-learn: 8x8 pixels of 0 ... 16, ten classes.

    Stored as bytes, [sample, 1, 8, 8]; scaled by 1/16. By default 1,197 / 300 / 300 samples.

    Source: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI (1998), test part.

    Args:
        num_validation: samples of the validation part.
        num_test: samples of the test part; the rest is the training part.
        split_seed: which samples are in which part; not the run's seed.
        normalize: by the training part's per-channel mean and standard deviation.
    """

    num_validation: Count = 300
    num_test: Count = 300
    split_seed: Seed = 0
    normalize: bool = True

    def decoded(self) -> Decoded:
        """The digits in scikit-learn's order."""
        from sklearn.datasets import load_digits

        bundled: Any = load_digits()
        images = bundled.images.astype(np.uint8)[:, None]
        return samples.decoded((images, bundled.target), None, 10, peak=16)


class Mnist(Spec):
    """MNIST: 28x28 grey pixels, ten digits; by default 55,000 / 5,000 / 10,000 samples.

    Source: LeCun, Cortes & Burges, http://yann.lecun.com/exdb/mnist; the four IDX files, gzipped,
    in `<root>/mnist/`.

    Args:
        num_validation: samples split off the official training part.
        split_seed: which; not the run's seed.
        normalize: by the training part's per-channel mean and standard deviation.
        root: the folder of data sets; default WINDFALL_DATA, else the user's cache folder.
        verify: by checksum; false accepts other files of the same layout.
        note: printed beside every number; unverified files always have one.
    """

    num_validation: Count = 5000
    split_seed: Seed = 0
    normalize: bool = True
    root: str | None = unaddressed(None)
    verify: bool = unaddressed(True)
    note: str | None = unaddressed(None)

    def decoded(self) -> Decoded:
        """The official training and test parts."""
        return _read(self, files.MNIST)


class FashionMnist(Spec):
    """Fashion-MNIST: MNIST's layout with ten kinds of clothes; 55,000 / 5,000 / 10,000 samples.

    Source: Xiao, Rasul & Vollgraf, 1708.07747 (2017); the four IDX files, gzipped, in
    `<root>/fashion-mnist/`. Arguments as of `Mnist`.
    """

    num_validation: Count = 5000
    split_seed: Seed = 0
    normalize: bool = True
    root: str | None = unaddressed(None)
    verify: bool = unaddressed(True)
    note: str | None = unaddressed(None)

    def decoded(self) -> Decoded:
        """The official training and test parts."""
        return _read(self, files.FASHION_MNIST)


class Cifar10(Spec):
    """CIFAR-10: 32x32 colour pixels, ten classes; by default 45,000 / 5,000 / 10,000 samples.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009); the binary
    version, in `<root>/cifar-10-batches-bin/`. Arguments as of `Mnist`.
    """

    num_validation: Count = 5000
    split_seed: Seed = 0
    normalize: bool = True
    root: str | None = unaddressed(None)
    verify: bool = unaddressed(True)
    note: str | None = unaddressed(None)

    def decoded(self) -> Decoded:
        """The official training and test parts."""
        return _read(self, files.CIFAR10)


class Cifar100(Spec):
    """CIFAR-100 with its fine labels: 32x32 colour pixels, 100 classes; 45,000 / 5,000 / 10,000.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009); the binary
    version, in `<root>/cifar-100-binary/`. Arguments as of `Mnist`.
    """

    num_validation: Count = 5000
    split_seed: Seed = 0
    normalize: bool = True
    root: str | None = unaddressed(None)
    verify: bool = unaddressed(True)
    note: str | None = unaddressed(None)

    def decoded(self) -> Decoded:
        """The official training and test parts."""
        return _read(self, files.CIFAR100)


class Gaussian(Spec):
    """Gaussian inputs, x ~ N(0, std^2 I), labelled by a fixed random linear teacher.

    y = argmax_c (W x)_c with W ~ N(0, 1), [num_classes, dimension]. Labels of any other teacher
    come from elsewhere; they replace these.

    Args:
        dimension: of x, at least 1.
        num_train: samples of the training part.
        num_validation: samples of the validation part.
        num_test: samples of the test part.
        std: standard deviation of each coordinate, above 0.
        num_classes: the number of classes, at least 1.
        split_seed: draws inputs and teacher; not the run's seed.
        normalize: by the training part's statistics, which undoes `std`: off by default.
    """

    dimension: Count = 20
    num_train: Count = 10_000
    num_validation: Count = 1000
    num_test: Count = 1000
    std: float = Field(1.0, gt=0)
    num_classes: Count = 10
    split_seed: Seed = 0
    normalize: bool = False

    def decoded(self) -> Decoded:
        """The drawn samples, validation among the training samples, as float32."""
        teacher = seeds.stream(self.split_seed, "gaussian-teacher").standard_normal(
            (self.num_classes, self.dimension)
        )

        def drawn(purpose: str, num: int) -> Pair:
            draw = seeds.stream(self.split_seed, purpose).standard_normal((num, self.dimension))
            inputs = (self.std * draw).astype(np.float32)
            return inputs, (inputs @ teacher.T).argmax(1)

        train = drawn("gaussian-train", self.num_train + self.num_validation)
        return samples.decoded(
            train, drawn("gaussian-test", self.num_test), self.num_classes, peak=1
        )


class Tensors(Spec):
    """Tensors in this process's memory, named by their content; made by `tensors`.

    Args:
        name: what tables call them.
        sha256: of the tensors, 64 hexadecimal digits.
        num_classes: the number of classes.
        num_validation: samples split off the training samples; default a tenth.
        num_test: samples split off where no test part was given; default a tenth.
        split_seed: which; not the run's seed.
        normalize: by the training part's per-channel mean and standard deviation.
        note: printed beside every number, or None.
    """

    name: str = "tensors"
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    num_classes: Count
    num_validation: Count | None = None
    num_test: Count | None = None
    split_seed: Seed = 0
    normalize: bool = True
    note: str | None = unaddressed(None)

    def decoded(self) -> Decoded:
        """The tensors, if this process was given them and they are unchanged."""
        held = _HELD.get(self.sha256)
        if held is None:
            raise SpecError(
                f"`data` must be in this process's memory; got {self.name!r}, sha256 "
                f"{self.sha256[:12]}..., which is not. Call `tensors` with it in this process, or "
                "name a function that returns it: kind `user-data`."
            )
        whole = samples.decoded(*held, self.num_classes)
        if whole.sha256 != self.sha256:
            raise SpecError(
                f"`data` {self.name!r} must not be changed in place after `tensors` was given it; "
                f"its sha256 was {self.sha256[:12]}..., got {whole.sha256[:12]}.... Give a copy."
            )
        return _given(self, whole)


_HELD: dict[str, tuple[Pair, Pair | None]] = {}


def tensors(
    inputs: Array,
    labels: Array,
    test: Pair | None = None,
    *,
    num_classes: int | None = None,
    **settings: Any,
) -> Tensors:
    """Your own tensors as data. They are held, not copied, until the process ends.

    Args:
        inputs: uint8 (scaled by 1/255) or floating, [sample, channel, height, width] or
            [sample, feature].
        labels: integers, [sample], in 0 ... num_classes - 1.
        test: inputs and labels of the test part; if None it is split off.
        num_classes: default the largest label plus 1.
        **settings: the other fields of `Tensors`.

    Example:
        >>> spec = tensors(torch.eye(100), torch.arange(100) % 2, name="corners")
        >>> len(load(spec).train)
        80
    """
    whole = samples.decoded((inputs, labels), test, num_classes)
    spec = checked(lambda: Tensors(sha256=whole.sha256, num_classes=whole.num_classes, **settings))
    _HELD[spec.sha256] = (inputs, labels), test
    return spec


class UserData(Spec):
    """Your own data, from a function that can be imported by name.

    Args:
        callable: `package.module:function`, called without arguments. It returns inputs and
            labels, or a map-style `Dataset` of (input, label), or a pair (train, test) of either.
        num_classes: default the largest label plus 1.
        num_validation: samples split off the training samples; default a tenth.
        num_test: samples split off where the function returns no test part; default a tenth.
        split_seed: which; not the run's seed.
        normalize: by the training part's per-channel mean and standard deviation.
        note: printed beside every number, or None.
    """

    callable: str
    num_classes: Count | None = None
    num_validation: Count | None = None
    num_test: Count | None = None
    split_seed: Seed = 0
    normalize: bool = True
    note: str | None = unaddressed(None)

    @field_validator("callable")
    @classmethod
    def _names_a_function(cls, path: str) -> str:
        if not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", path):
            raise ValueError(f"must be `package.module:function`; got {path!r}.")
        return path

    def decoded(self) -> Decoded:
        """What the function returns, as tensors."""
        train, test = samples.stacked(samples.called(self.callable))
        return _given(self, samples.decoded(train, test, self.num_classes))


def _given(data: Tensors | UserData, whole: Decoded) -> Decoded:
    if whole.test and data.num_test:
        raise SpecError(
            "`data.num_test` must be left out where a test part of its own is given; "
            f"got {data.num_test:,}."
        )
    return dataclasses.replace(whole, note=data.note)


Data = Annotated[
    Digits | Mnist | FashionMnist | Cifar10 | Cifar100 | Gaussian | Tensors | UserData, FAMILY
]


def _read(data: Mnist | FashionMnist | Cifar10 | Cifar100, source: files.Source) -> Decoded:
    root = files.root(data.root)
    train, test = source.read(root, verify=data.verify)
    note = data.note or (None if data.verify else f"{source.name}: files not verified")
    try:
        return samples.decoded(train, test, source.num_classes, note=note)
    except SpecError as problem:
        raise SpecError(f"{root / source.folder}: {problem}") from None


# -- loading ---------------------------------------------------------------------------------------


def load(data: Data) -> Dataset:
    """The data set on the CPU: read, verified, split and measured.

    The validation part (and the test part, where there is no official one) is drawn from stream
    (split_seed, "split"); the statistics are those of the training part that is left.

    Raises:
        SpecError: when files are missing, altered or malformed, or the parts are too large.
    """
    whole = data.decoded()
    train, validation, test = _split(data, whole)
    mean, std = samples.moments(train.inputs, whole.peak)
    if not data.normalize:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    return Dataset(
        train, validation, test, mean, std, whole.peak, whole.num_classes, whole.sha256, whole.note
    )


def _split(data: Data, whole: Decoded) -> tuple[Part, Part, Part]:
    num = len(whole.train)
    default = max(num // 10, 1)
    num_validation = data.num_validation or default
    num_test = 0 if whole.test else getattr(data, "num_test", None) or default
    if num_validation + num_test >= num:
        also = f" and `data.num_test` {num_test:,}" if num_test else ""
        raise SpecError(
            f"`data.num_validation` must leave training samples of the {num:,} there are; "
            f"got {num_validation:,}{also}."
        )
    order = seeds.stream(data.split_seed, "split").permutation(num)
    test, validation, train = (
        whole.train.select(np.sort(indices))
        for indices in np.split(order, [num_test, num_test + num_validation])
    )
    return train, validation, whole.test or test


def get(name: str, root: str | None = None) -> Path:
    """Download a data set's official files and verify them; what is there already is only verified.

    Args:
        name: `mnist`, `fashion-mnist`, `cifar10` or `cifar100`.
        root: the folder of data sets; default WINDFALL_DATA, else the user's cache folder.

    Returns:
        The folder of its files.
    """
    if name not in files.SOURCES:
        raise SpecError(
            f"A data set to download must be a known one; got {name!r}."
            f"{nearest(name, list(files.SOURCES))}"
        )
    folder = files.SOURCES[name].fetch(files.root(root))
    decode(Data, {"kind": name, "root": root}).decoded()
    return folder
