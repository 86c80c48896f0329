"""Lifting: the forward pass of one network turned into that of a stack of replicas.

Networks of linear layers and ReLU become batched matrix products, any other runs under
`torch.vmap`. `examine` refuses what neither can run as it runs alone.

    run = forward(network, num_axes=3)
    run(params, buffers, counters, inputs, 0)  # logits [replica, batch, class]
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from windfall import seeds
from windfall.engines.contract import Task, Unsupported
from windfall.masks import Params

Visit = tuple[str, object, Params]  # to a layer: its name, and how things stood before

# -- the forward pass of a stack -------------------------------------------------------------------


class Forward(Protocol):
    """A forward pass of all replicas.

    Called with parameters and buffers [replica, ...], counters that all replicas share, and inputs
    [replica, batch, ...] or, for all the same, [batch, ...] with `axis` None. Returns logits
    [replica, batch, class]; buffers and counters are changed in place.
    """

    def __call__(
        self, params: Params, buffers: Params, counters: Params, inputs: Tensor, axis: int | None
    ) -> Tensor:
        """The logits."""
        ...


def forward(network: nn.Module, num_axes: int) -> Forward:
    """The forward pass of a stack of networks of this architecture.

    Args:
        network: one of them.
        num_axes: of one input.
    """
    parts = list(_parts(network))
    starts_flat = num_axes == 1 or (parts and type(parts[0]) is nn.Flatten)
    if starts_flat and all(map(_is_plain, parts)):
        return _products(network, parts)
    return _mapped(network)


def _parts(network: nn.Module) -> Iterator[nn.Module]:
    if type(network) is nn.Sequential and not _is_hooked(network):
        for part in network:
            yield from _parts(part)
    else:
        yield network


def _is_hooked(part: nn.Module) -> bool:
    return any(value for name, value in vars(part).items() if name.endswith("_hooks"))


def _is_plain(part: nn.Module) -> bool:
    if _is_hooked(part):
        return False
    if type(part) is nn.Flatten:
        return (part.start_dim, part.end_dim) == (1, -1)
    return type(part) in (nn.Linear, nn.ReLU)


def _products(network: nn.Module, parts: list[nn.Module]) -> Forward:
    names = {id(param): name for name, param in network.named_parameters()}
    linears = [part if isinstance(part, nn.Linear) else None for part in parts]
    is_active = [isinstance(part, nn.ReLU) for part in parts]

    def run(
        params: Params,
        buffers: Params,  # noqa: ARG001  linear layers have none
        counters: Params,  # noqa: ARG001
        inputs: Tensor,
        axis: int | None,
    ) -> Tensor:
        if axis is None:
            inputs = inputs.expand(len(next(iter(params.values()))), *inputs.shape)
        columns = inputs.flatten(
            2
        ).mT  # weights' gradients come out contiguous: 12 % of LeNet's step
        for linear, active in zip(linears, is_active, strict=True):
            if active:
                columns = columns.relu()
            elif linear is not None:
                weight = params[names[id(linear.weight)]]
                bias = params.get(names.get(id(linear.bias), ""))
                if bias is None:
                    columns = torch.bmm(weight, columns)
                else:
                    columns = torch.baddbmm(bias.unsqueeze(2), weight, columns)
        return columns.mT

    return run


def _mapped(network: nn.Module) -> Forward:
    def one(
        params: Params, buffers: Params, counters: Params, inputs: Tensor
    ) -> tuple[Tensor, Params, Params]:
        tensors = params | buffers | counters  # a forward pass may replace a buffer in it
        logits = functional_call(network, tensors, (inputs,))
        return logits, {n: tensors[n] for n in buffers}, {n: tensors[n] for n in counters}

    def run(
        params: Params, buffers: Params, counters: Params, inputs: Tensor, axis: int | None
    ) -> Tensor:
        # what is not stacked must be the same for all replicas on the way out as well
        out_dims: Any = (0, 0, None)
        mapped = vmap(one, in_dims=(0, 0, None, axis), out_dims=out_dims)
        # copies, as the gradient may read what it was given until the step's end
        logits, now, counts = mapped(params, _cloned(buffers), _cloned(counters), inputs)
        with torch.no_grad():
            for held, new in ((buffers, now), (counters, counts)):
                for name, tensor in held.items():
                    tensor.copy_(new[name])
        return logits

    return run


def _cloned(tensors: Params) -> Params:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def split(buffers: Sequence[Params]) -> tuple[Params, Params]:
    """Buffers stacked, and counters: integers equal in all replicas, which code may read.

    A vmapped program cannot read a number that may differ, as BatchNorm without momentum does.
    """
    stacks = {name: torch.stack([each[name] for each in buffers]) for name in buffers[0]}
    counters: Params = {}
    for name, stack in list(stacks.items()):
        is_number = stack.dim() == 1 and not stack.is_floating_point()
        if is_number and bool((stack == stack[0]).all()):
            counters[name] = stacks.pop(name)[0].clone()
    return stacks, counters


# -- networks that cannot be stacked ---------------------------------------------------------------


def examine(task: Task) -> None:
    """Refuse a network that cannot be trained in a stack, by a trial on two examples.

    Raises:
        Unsupported: when its forward pass draws random numbers, or `torch.vmap` cannot run it; the
            message names the layer.
    """
    for name, param in task.network.named_parameters():
        if getattr(param, "_backward_hooks", None):
            raise _unsupported(task.network, name, "its gradient has a hook")
    running: list[Visit] = []
    try:
        with seeds.isolated(task.seed, "examine"), warnings.catch_warnings():
            warnings.filterwarnings("error", ".*performance drop")  # a loop over the replicas
            _try(task, running)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        name = running[-1][0] if running else ""
        raise _unsupported(task.network, name, str(problem).partition("\n")[0]) from problem


def _unsupported(network: nn.Module, name: str, reason: str) -> Unsupported:
    kinds = {part: type(module).__name__ for part, module in network.named_modules()}
    where = f"layer `{name}` ({kinds.get(name, 'a parameter')})" if name else "the network"
    return Unsupported(
        f"`network` must be one that the stacked engine can train; {where} is not: "
        f"{reason.rstrip('.')}. Use the separate engine."
    )


def _try(task: Task, running: list[Visit]) -> None:
    """A training step and an evaluation of two replicas, without an update, on a copy."""
    data, dtype = task.data, task.recipe.torch_dtype
    device = data.train.labels.device
    network = copy.deepcopy(task.network).to(device=device, dtype=dtype).train()
    run = forward(network, len(data.input_shape))
    _watch(network, running)
    params = {n: torch.stack([p, p]).detach() for n, p in network.named_parameters()}
    for name, param in network.named_parameters():
        params[name].requires_grad_(param.requires_grad)
    buffers, counters = split([dict(network.named_buffers())] * 2)
    pair = torch.tensor([0, -1], device=device)
    inputs = data.prepare(data.train.inputs[pair], dtype)
    for _ in range(2):  # twice: what the first pass left behind must serve the second
        logits = run(params, buffers, counters, torch.stack([inputs, inputs]), 0)
        F.cross_entropy(logits.flatten(0, 1), data.train.labels[pair].repeat(2)).backward()
    network.eval()
    with torch.no_grad():
        run(params, buffers, counters, inputs, None)


def _watch(network: nn.Module, running: list[Visit]) -> None:
    """Keep in `running` the layers that are being run, the innermost last.

    Refuse those that would run, to wrong numbers: vmap sees neither the generators of Python and
    numpy nor what becomes of a tensor that is kept from step to step.
    """

    def enter(name: str) -> Callable[..., None]:
        return lambda part, *_: running.append((name, seeds.generators(), _kept(part)))

    def leave(part: nn.Module, *_: Any) -> None:
        drawn, before = running[-1][1:]
        if drawn != seeds.generators():
            raise RuntimeError("it draws from a global generator.")
        if any(before.get(name) is not tensor for name, tensor in _kept(part).items()):
            raise RuntimeError("it keeps a tensor that is no buffer.")
        running.pop()

    for name, part in network.named_modules():
        part.register_forward_pre_hook(enter(name))
        part.register_forward_hook(leave)


def _kept(part: nn.Module) -> Params:
    return {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
