"""Dispatch: training one run, or a stack of them as one program, on an engine by name.

Every engine trains one run; the stacked one trains the same run of several seeds at once.

    finals = dispatch.train("stacked", tasks, states)
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from windfall import seeds
from windfall.engines import rule, separate
from windfall.engines.contract import Task, Unsupported
from windfall.engines.replay import Tell
from windfall.train import State

TRIED = 8  # samples on which networks must agree to be one program

Pulse = Callable[[int, Callable[[], list[State]]], None]


def train(
    engine: rule.Name,
    tasks: Sequence[Task],
    states: Sequence[State],
    pulse: Pulse = lambda *_: None,
    tell: Tell = lambda _: None,
) -> list[State]:
    """Train runs from their states to the last step.

    Args:
        engine: that trains them; all but the stacked one take one run.
        tasks: the trainings, with a network each; they differ in their seeds alone.
        states: where they start.
        pulse: see `engines.stacked.train`.
        tell: called with what a user should know.

    Raises:
        Unsupported: when the engine cannot train the networks, or not as one program.
    """
    if engine == "stacked":
        from windfall.engines import stacked

        if len(tasks) > 1:
            _check_alike(tasks, states[0])
        return stacked.train(tasks, states, pulse, tell)
    (task,), (state,) = tasks, states
    one = separate.train
    if engine == "sparse":
        from windfall.engines import sparse  # brings a compiler, which not every process needs

        one = sparse.train
    return [one(task, state, lambda step, now: pulse(step, lambda: [now()]))]


def _check_alike(tasks: Sequence[Task], state: State) -> None:
    """Refuse networks whose constructors draw what is neither a parameter nor a buffer.

    Raises:
        Unsupported: when, given the same tensors, they differ in their outputs.
    """
    first, *others = (_outputs(task, state) for task in tasks)
    if not all(first.equal(other) for other in others):
        raise Unsupported(
            "`engine` must be one that trains a run at a time, as the network's constructor draws"
            " what is neither a parameter nor a buffer; got stacked. Use separate."
        )


@torch.no_grad()
def _outputs(task: Task, state: State) -> Tensor:
    """The logits of a few samples, of a network given a state's tensors; NaN are 0."""
    inputs = task.data.prepare(task.data.train.inputs[:TRIED], task.recipe.torch_dtype)
    network, outputs = copy.deepcopy(task.network).to(inputs), list[Tensor]()
    own = dict(network.named_parameters()) | dict(network.named_buffers())
    for is_training in (True, False):
        given = {**state.params, **state.buffers}  # a forward pass changes buffers in place
        tensors = {name: given[name].to(tensor, copy=True) for name, tensor in own.items()}
        with seeds.isolated(0, "alike"):
            outputs.append(functional_call(network.train(is_training), tensors, (inputs,)))
    return torch.stack(outputs).nan_to_num()
