"""Layers: the parts of a network whose weights are initialized, and pruned, by name."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch import nn

Draws = npt.NDArray[np.float64]
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | Transposed


def layers(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers whose weights can be pruned, by the names of their weights, in order.

    These are `nn.Linear` and the convolutions. A weight that several layers share is named once,
    by its first owner; one that is shared with another kind of module (an embedding) or is computed
    from other parameters (a parametrization of torch's) is not among them.
    """
    owners = [child for child in module.modules() if not isinstance(child, Layer)]
    shared = {id(param) for child in owners for param in child.parameters(recurse=False)}
    named = {id(param): name for name, param in module.named_parameters()}
    for path, child in module.named_modules():
        name = f"{path}.weight" if path else "weight"
        if not isinstance(child, Layer) or id(child.weight) in shared:
            continue
        if named.get(id(child.weight)) == name:
            yield name, child


def fans(layer: Layer) -> tuple[int, int]:
    """How many inputs an output of the layer reads, and how many outputs an input reaches.

    A convolution with a kernel of k x k counts k² positions for every channel, and only the
    channels of one group.

    Note:
        `torch.nn.init` reads the same numbers off the weight's shape, which counts all groups'
        outputs and takes a transposed convolution's inputs for outputs.

    Returns:
        (fan_in, fan_out).
    """
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        return weight.shape[1], weight.shape[0]
    kernel = math.prod(weight.shape[2:])
    fan_in = layer.in_channels // layer.groups * kernel
    return fan_in, layer.out_channels // layer.groups * kernel
