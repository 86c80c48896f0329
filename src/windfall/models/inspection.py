"""What is asked of any network: which layers run on its inputs, their kinds, its outputs."""

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from windfall import initialize, seeds
from windfall.spec import SpecError

Kind = Literal["hidden", "convolution", "output"]
Watch = Callable[[str, initialize.Layer, Tensor, Tensor], None]


def observe(
    module: nn.Module,
    input_shape: tuple[int, ...],
    watch: Watch | None = None,
    *,
    batch_size: int = 2,
    name: str = "the network",
    gradients: bool = False,
) -> Any:
    """The outputs on zeros, while `watch` sees each layer run; the network is left as it was.

    One forward pass, in evaluation mode.

    Args:
        module: the network.
        input_shape: the shape of one input.
        watch: called with the weight's name, the layer, its input and its output.
        batch_size: how many inputs, at least 1.
        name: what an error calls the network.
        gradients: make the outputs ones that gradients can be taken of.

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
    with contextlib.ExitStack() as undo, seeds.isolated(0, "observe"):
        undo.enter_context(torch.set_grad_enabled(gradients))
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
        >>> kinds(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,))
        {'0.weight': 'hidden', '2.weight': 'output'}
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


def check_gradients(module: nn.Module, input_shape: tuple[int, ...], model_name: str) -> None:
    """Refuse, by a `SpecError`, a network from whose outputs no gradient reaches a parameter."""
    outputs = observe(module, input_shape, name=f"`{model_name}`", gradients=True)
    if not outputs.requires_grad:
        raise SpecError(
            f"model must have a gradient path from its outputs to its weights; `{model_name}` has"
            " none (`no_grad`, `detach`, `requires_grad=False`)."
        )
