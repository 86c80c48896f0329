"""Masks: which weights of a network are kept.

A mask is a boolean tensor of its weight's shape, True where the weight is kept; `Masks` holds one
for every prunable weight by name. Every function is pure: it returns new tensors and changes none.

    kept = masks.ones(params, names)
    pruned = masks.apply(kept, params)
    masks.density(kept)  # 1.0
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from scipy.stats import hypergeom
from torch import Tensor

from windfall import seeds

Params = dict[str, Tensor]
Masks = dict[str, Tensor]
Scores = dict[str, Tensor]


def ones(params: Params, names: Iterable[str]) -> Masks:
    """Masks that keep everything, for the weights of these names."""
    return {name: torch.ones_like(params[name], dtype=torch.bool) for name in names}


def apply(masks: Masks, params: Params) -> Params:
    """A copy of `params` whose pruned weights are exactly 0; those without a mask are equal."""
    zeroed = {
        name: torch.where(mask, params[name], torch.zeros((), dtype=params[name].dtype))
        for name, mask in masks.items()
    }
    return {name: zeroed.get(name, value.clone()) for name, value in params.items()}


def kept(masks: Masks) -> dict[str, int]:
    """Number of weights kept, per weight tensor."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def sizes(masks: Masks) -> dict[str, int]:
    """Number of weights there are, per weight tensor."""
    return {name: mask.numel() for name, mask in masks.items()}


def density(masks: Masks) -> float:
    """Fraction of the weights kept, in [0, 1], all tensors together."""
    return sum(kept(masks).values()) / sum(sizes(masks).values())


def compose(a: Masks, b: Masks) -> Masks:
    """Masks that keep what both keep."""
    return {name: a[name] & b[name] for name in a}


def escaped(inner: Masks, outer: Masks) -> list[str]:
    """Names of the tensors where `inner` keeps a weight that `outer` does not; none if nested."""
    return [name for name in inner if bool((inner[name] & ~outer[name]).any())]


def shuffle(masks: Masks, seed: int, purpose: str = "shuffle") -> Masks:
    """Masks of the same count in every tensor, their positions permuted inside each tensor.

    Tensor i is permuted by the stream (seed, purpose, i), so its permutation depends on no other.
    """
    return {
        name: _permuted(mask, seed, purpose, index)
        for index, (name, mask) in enumerate(masks.items())
    }


def _permuted(mask: Tensor, seed: int, purpose: str, index: int) -> Tensor:
    order = torch.from_numpy(seeds.stream(seed, purpose, index).permutation(mask.numel()))
    return mask.flatten()[order].reshape(mask.shape)


def scatter(counts: dict[str, int], like: Masks, seed: int, purpose: str = "shuffle") -> Masks:
    """Masks that keep `counts[name]` weights of each tensor at uniformly random positions."""
    filled = {
        name: (torch.arange(mask.numel()) < counts[name]).reshape(mask.shape)
        for name, mask in like.items()
    }
    return shuffle(filled, seed, purpose)


def overlap(a: Tensor, b: Tensor) -> float:
    """Jaccard overlap |a and b| / |a or b| of two masks, in [0, 1]; 1 for two empty masks."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def flat(masks: Masks) -> Tensor:
    """All masks as one vector, in the order of the dictionary."""
    return torch.cat([mask.flatten() for mask in masks.values()])


def chance_overlap(size: list[int], a: list[int], b: list[int]) -> float:
    """Expected Jaccard overlap of independent uniform masks of given counts per tensor.

    The common count of tensor i is hypergeometric, h_i of (size_i, a_i, b_i); the value is
    E[h / (sum a + sum b - h)] with h = sum h_i, summed over all h of probability above 1e-30.

    Args:
        size: number of weights of each tensor.
        a: number kept by the one mask, per tensor.
        b: number kept by the other.
    """
    total, law, start = sum(a) + sum(b), np.ones(1), 0
    if total == 0:
        return 1.0
    for n, kept_a, kept_b in zip(size, a, b, strict=True):
        mean = kept_a * kept_b / n
        variance = mean * (n - kept_a) * (n - kept_b) / n / max(1, n - 1)
        reach = 12 * math.sqrt(variance) + 12  # standard deviations: beyond lies less than 1e-30
        low = max(0, kept_a + kept_b - n, int(mean - reach))
        high = min(kept_a, kept_b, int(mean + reach) + 1)
        pmf: Any = hypergeom.pmf(np.arange(low, high + 1), n, kept_a, kept_b)
        law, start = np.convolve(law, pmf), start + low
    h = start + np.arange(len(law))
    return float((law * h / (total - h)).sum())
