"""Which samples are in a batch, and how they are augmented: pure functions of (seed, step).

The clock is the step alone. Every draw is from a stream named by the run's seed, so two arms of one
seed see the same batches, and resuming at a step needs nothing but the step.

    order = Order(seed=0, num_train=1197, batch_size=64)
    indices = order.batch(step=20)
    inputs = CropFlip(padding=1).apply(images[indices], seed=0, step=20)
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from windfall import seeds
from windfall.spec import Spec, SpecError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """Endless seeded permutations of the training samples, cut into batches.

    Epoch e is the permutation of stream (seed, "order", e); batch t is the positions t b to
    t b + b - 1 of their concatenation. Every batch has exactly b samples, and one that crosses the
    end of an epoch takes the rest from the next. The result depends on the arguments alone: the
    permutations kept from the last call only save time.

    Args:
        seed: the run's seed.
        num_train: samples of the training part, at least 1.
        batch_size: b, at least 1; may exceed `num_train`.

    Example:
        >>> order = Order(seed=0, num_train=5, batch_size=3)
        >>> sorted(np.concatenate([order.batch(0), order.batch(1)])[:5].tolist())
        [0, 1, 2, 3, 4]
    """

    seed: int
    num_train: int
    batch_size: int
    _permutations: dict[int, Indices] = field(
        default_factory=dict[int, Indices], init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("num_train", "batch_size"):
            if getattr(self, name) < 1:
                raise SpecError(f"`{name}` must be at least 1; got {getattr(self, name)}.")

    def batch(self, step: int) -> Indices:
        """The indices of the batch at `step` (from 0), [batch]."""
        return self.batches(step, 1)[0]

    def batches(self, step: int, num: int) -> Indices:
        """The indices of `num` batches from `step` on, [num, batch]."""
        if step < 0:
            raise SpecError(f"`step` must be at least 0; got {step}.")
        start, end = step * self.batch_size, (step + num) * self.batch_size
        epochs = range(start // self.num_train, (end - 1) // self.num_train + 1)
        for epoch in [known for known in self._permutations if known not in epochs]:
            del self._permutations[epoch]
        firsts = [epoch * self.num_train for epoch in epochs]
        drawn = [
            self._permutation(epoch)[max(start - first, 0) : end - first]
            for epoch, first in zip(epochs, firsts, strict=True)
        ]
        return np.concatenate(drawn).reshape(num, self.batch_size)

    def _permutation(self, epoch: int) -> Indices:
        if epoch not in self._permutations:
            draw = seeds.stream(self.seed, "order", epoch)
            self._permutations[epoch] = draw.permutation(self.num_train).astype(np.int64)
        return self._permutations[epoch]


def batch_indices(seed: int, num_train: int, batch_size: int, step: int) -> Indices:
    """The indices of one batch, [batch]; see `Order`, which is faster for many."""
    return Order(seed, num_train, batch_size).batch(step)


class CropFlip(Spec):
    """Random crops of the zero-padded image, and mirror images: the usual CIFAR augmentation.

    Each image is padded by p pixels on every side, cut back to its size at an offset uniform in
    {0 ... 2p}^2, and mirrored left to right with probability 1/2. Images are augmented as stored,
    before they are normalized, so the padding is black (stored value 0), not the mean.

    Source: He et al., 1512.03385 (2015), section 4.2.

    Args:
        padding: p, pixels, at least 0.
        flip: whether to mirror; the crops are the same either way.
    """

    padding: int = Field(4, ge=0)
    flip: bool = True

    def draw(self, seed: int, step: int, num: int) -> Tensor:
        """The draws of stream (seed, "augment", step): down, right and mirrored; int64, [num, 3].

        Args:
            seed: the run's seed.
            step: the training step, from 0.
            num: images in the batch.
        """
        stream = seeds.stream(seed, "augment", step)
        offsets = stream.integers(0, 2 * self.padding + 1, size=(num, 2))
        mirrored = stream.integers(0, 2, size=(num, 1)) * int(self.flip)
        return torch.from_numpy(np.concatenate([offsets, mirrored], axis=1))

    def move(self, inputs: Tensor, draws: Tensor) -> Tensor:
        """The images as `draws` says, in one gather; for batches of many seeds at once.

        Args:
            inputs: as stored, [batch, channel, height, width].
            draws: [batch, 3], of `draw`.

        Returns:
            The same shape, dtype and device.
        """
        if inputs.dim() != 4 or len(inputs) != len(draws):
            raise SpecError(
                f"`augment` must be given {len(draws)} images [batch, channel, height, width]; "
                f"got shape {tuple(inputs.shape)}."
            )
        height, width = inputs.shape[2:]
        padded = pad(inputs, (self.padding,) * 4)
        down, right, mirrored = draws.to(inputs.device).unsqueeze(-1).unbind(1)
        columns = torch.arange(width, device=inputs.device)
        columns = right + torch.where(mirrored == 1, width - 1 - columns, columns)
        rows = down + torch.arange(height, device=inputs.device)
        index = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
        index = index.flatten(1)[:, None].expand(-1, inputs.shape[1], -1)
        return padded.flatten(2).gather(2, index).view_as(inputs)

    def apply(self, inputs: Tensor, seed: int, step: int) -> Tensor:
        """The batch of `step` augmented; the draws do not depend on what is in it.

        Args:
            inputs: as stored, [batch, channel, height, width].
            seed: the run's seed.
            step: the training step, from 0.

        Returns:
            The same shape, dtype and device.
        """
        return self.move(inputs, self.draw(seed, step, len(inputs)))
