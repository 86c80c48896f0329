"""Signs: beginnings that keep the signs of an initialization, or nothing else of it.

    constant(theta, ["hidden1.weight"])  # the sign of every weight, times its layer's deviation
    signed(other, theta, ["hidden1.weight"])  # other magnitudes with the signs of theta

Every function is pure; what is not named is copied.
"""

from collections.abc import Iterable

import torch

from windfall.masks import Params


def constant(params: Params, names: Iterable[str]) -> Params:
    """Every named weight replaced by its sign times sigma, its tensor's standard deviation.

    sigma is the population's, of the values given. A weight of exactly 0 counts as positive.

    Source: Zhou et al. 2019 (1905.01067), section 3.2 ("constant": the standard deviation of each
    layer's original initialization).
    """
    deviations = {name: params[name].std(correction=0).expand_as(params[name]) for name in names}
    return signed(params | deviations, params, deviations)


def signed(params: Params, like: Params, names: Iterable[str]) -> Params:
    """Every named weight with its own magnitude and the sign that it has in `like`.

    Source: Zhou et al. 2019 (1905.01067), section 3.2.

    Args:
        params: whose magnitudes are kept.
        like: tensors of the same shapes, whose signs are taken; exactly 0 counts as positive.
        names: of the weights.
    """
    changed = set(names)
    return {
        name: _with_sign(value, like[name]) if name in changed else value.clone()
        for name, value in params.items()
    }


def _with_sign(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    magnitude = value.abs()
    return torch.where(like < 0, -magnitude, magnitude)
