"""Chains: ReLU networks of one layer after another, as dictionaries of parameters.

Hidden layers are fully connected, or 3x3 convolutions without padding; the output layer is linear.
Names are those of `models.Mlp`: `hidden1.weight`, `hidden1.bias`, ..., `output.bias`, and with
BatchNorm `hidden1_norm.weight` and so on. A *node* is a unit of a hidden layer, or a channel, which
then has an activation at every position of every sample:

    network = build(params, norm="before")
    found = nodes(network, inputs)         # [sample · position, node] by hidden layer
"""

import itertools
from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from windfall.masks import Params

KERNEL = 3  # of convolutions, both sides
Norm = Literal["none", "before", "after"]  # BatchNorm of hidden layers, where the ReLU stands


def layer_names(params: Params) -> list[str]:
    """The layers with a weight matrix or kernel, in order: `hidden1`, ..., `output`."""
    return [
        name.removesuffix(".weight")
        for name, value in params.items()
        if name.endswith(".weight") and value.ndim >= 2
    ]


def layer_sizes(params: Params) -> tuple[int, ...]:
    """The number of inputs (or input channels), of nodes in each hidden layer, and of outputs.

    Raises:
        ValueError: when a layer does not read as many numbers as the one below has nodes.
    """
    names = layer_names(params)
    weights = [params[f"{name}.weight"] for name in names]
    for name, below, above in zip(names[1:], weights, weights[1:], strict=False):
        per_node, rest = divmod(above.shape[1], below.shape[0])
        is_flattening = below.ndim > above.ndim  # it reads every position of every channel
        if rest or per_node < 1 or (per_node > 1 and not is_flattening):
            raise ValueError(
                f"`{name}` must read the {below.shape[0]} nodes below it; got a weight of shape "
                f"{tuple(above.shape)}."
            )
    return weights[0].shape[1], *(weight.shape[0] for weight in weights)


def layer_name(layer: int, num_layers: int) -> str:
    """The name of a layer, counted from 0."""
    return "output" if layer == num_layers - 1 else f"hidden{layer + 1}"


def is_convolutional(params: Params) -> bool:
    """Whether the hidden layers are convolutions."""
    return any(value.ndim == 4 for value in params.values())


def is_normalized(params: Params) -> bool:
    """Whether hidden layers have BatchNorm."""
    return any(name.endswith("_norm.weight") for name in params)


def per_node(params: Params, name: str) -> list[Tensor]:
    """What belongs to the nodes of a hidden layer, with an axis over nodes first; views.

    Args:
        params: of a chain.
        name: of a hidden layer.

    Returns:
        Its weight, bias and BatchNorm, and the weights that read it, [node, ...].
    """
    names = layer_names(params)
    above = params[f"{names[names.index(name) + 1]}.weight"]
    size = len(params[f"{name}.weight"])
    own = [
        value
        for key, value in params.items()
        if key.rpartition(".")[0] in (name, f"{name}_norm") and value.ndim
    ]
    return [*own, above.unflatten(1, (size, -1)).movedim(1, 0)]


def outgoing_norms(params: Params) -> dict[str, Tensor]:
    """By hidden layer, the L2 norms [node] of the weights that read each node."""
    return {
        name: per_node(params, name)[-1].flatten(1).norm(dim=1) for name in layer_names(params)[:-1]
    }


def restricted(params: Params, kept: dict[str, Tensor]) -> Params:
    """The chain without some nodes: theirs go, and the weights that read them.

    Args:
        params: of a chain, BatchNorm's too.
        kept: by hidden layer, the indices of the nodes that stay, in order.
    """
    found, names = dict(params), layer_names(params)
    for name, above in itertools.pairwise(names):
        indices, size = kept[name], len(params[f"{name}.weight"])
        for key, value in found.items():
            if key.rpartition(".")[0] in (name, f"{name}_norm") and value.ndim:
                found[key] = value[indices]
        reads = found[f"{above}.weight"]
        split = reads.unflatten(1, (size, -1))[:, indices]
        found[f"{above}.weight"] = split.flatten(1, 2).contiguous()
    return found


# -- as functions ----------------------------------------------------------------------------------


def outputs(params: Params, inputs: Tensor) -> Tensor:
    """What a chain without BatchNorm gives, [sample, output]."""
    values, names = inputs, layer_names(params)
    for name in names:
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        if weight.ndim == 4:
            values = F.conv2d(values, weight, bias)
        else:
            values = torch.addmm(bias, values.flatten(1), weight.t())
        if name != names[-1]:
            values = values.relu_()
    return values


def positions(input_shape: tuple[int, ...], num_layers: int) -> int:
    """The positions that are left of an image after so many convolutions, at least 1.

    Raises:
        ValueError: when the inputs are no images, or too small.
    """
    lost = num_layers * (KERNEL - 1)
    if len(input_shape) != 3 or min(input_shape[1:]) <= lost:
        raise ValueError(
            f"`inputs` must be images of at least {lost + 1} x {lost + 1} pixels for {num_layers}"
            f" convolutions without padding; got shape {input_shape}."
        )
    return (input_shape[1] - lost) * (input_shape[2] - lost)


# -- as networks -----------------------------------------------------------------------------------


def build(params: Params, norm: Norm = "none") -> nn.Module:
    """The network of these parameters, in their dtype; it shares no storage with them.

    Its parts are `flatten`, `hidden1`, `hidden1_norm`, `hidden1_relu`, ..., `output`. What
    BatchNorm lacks of its statistics begins as torch has it.
    """
    names, flatten = layer_names(params), nn.Flatten()
    is_conv = is_convolutional(params)
    parts: dict[str, nn.Module] = {} if is_conv else {"flatten": flatten}
    for name in names[:-1]:
        parts |= _hidden(name, params[f"{name}.weight"], norm)
    if is_conv:
        parts["flatten"] = flatten
    parts["output"] = _empty(params["output.weight"])
    network = nn.Sequential(OrderedDict(parts)).to(params["output.weight"].dtype)
    network.load_state_dict(dict(params), strict=False)
    return network


def _hidden(name: str, weight: Tensor, norm: Norm) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {name: _empty(weight)}
    width = len(weight)
    made = nn.BatchNorm2d(width) if weight.ndim == 4 else nn.BatchNorm1d(width)
    if norm == "before":
        parts[f"{name}_norm"] = made
    parts[f"{name}_relu"] = nn.ReLU()
    if norm == "after":
        parts[f"{name}_norm"] = made
    return parts


def _empty(weight: Tensor) -> nn.Module:
    """A layer whose weights are yet to be set: it draws from no generator."""
    made, reads = weight.shape[:2]
    if weight.ndim == 4:
        return nn.utils.skip_init(nn.Conv2d, reads, made, KERNEL)
    return nn.utils.skip_init(nn.Linear, reads, made)


def nodes(network: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """What the nodes of every hidden layer give to the layer above, with BatchNorm where it is.

    One forward pass without gradients, in the mode that the network is in.

    Args:
        network: as `build` makes it.
        inputs: [sample, ...].

    Returns:
        [sample · position, node] by the hidden layer's name.
    """
    found: dict[str, Tensor] = {}
    values, parts = inputs, dict(network.named_children())
    with torch.no_grad():
        for name, part in parts.items():
            values = part(values)
            if name.startswith("hidden"):
                found[name.partition("_")[0]] = values
    return {name: value.movedim(1, -1).flatten(0, -2) for name, value in found.items()}
