"""The stacked engine: all seeds of one node trained as one program.

The seeds' parameters, buffers and moments are stacked, [replica, ...], and every step is one pass
over the stack: batched matrix products for networks of linear layers and ReLU, `torch.vmap` for
any other. The sum of the replicas' losses gives each its own gradient, and the optimizers work
element by element, so a replica's training is that of `engines.separate` up to rounding.

    finals = stacked.train(tasks, states)  # tasks that differ in the seed alone
"""

import gc
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from windfall.data import Part
from windfall.engines import contract, lift, replay
from windfall.engines.contract import AHEAD, CHUNK, Task, refuse_sparsity
from windfall.engines.replay import Tell
from windfall.engines.separate import BITS
from windfall.masks import Params
from windfall.spec import SpecError
from windfall.train import State

SMALLEST_CHUNK = 100  # examples a forward pass of an evaluation, as fast as `CHUNK`
COUNT = "step"  # the optimizers' one tensor that is no parameter's: one for the whole stack

Pulse = Callable[[int, Callable[[], list[State]]], None]


# -- stacks ----------------------------------------------------------------------------------------


def _draws(tasks: Sequence[Task], step: int) -> Iterator[tuple[Tensor, ...]]:
    """What is drawn for this step and every later one, on the data's device.

    Yields:
        indices of the samples, [replica, batch], and with augmentation its draws, of all images.
    """
    recipe, device = tasks[0].recipe, tasks[0].data.train.labels.device
    for indices in zip(*(contract.batches(task.order, step) for task in tasks), strict=True):
        drawn = [torch.from_numpy(np.stack(indices, 1))]
        if recipe.augment is not None:
            moves = [
                [recipe.augment.draw(task.seed, later, recipe.batch_size) for task in tasks]
                for later in range(step, step + AHEAD)
            ]
            drawn.append(torch.stack([torch.cat(move) for move in moves]))
        step += AHEAD
        yield from zip(*(each.to(device).unbind() for each in drawn), strict=True)


class _Training:
    """The mutable heart of one stack: everything [replica, ...], and the states it came from."""

    def __init__(self, tasks: Sequence[Task], states: Sequence[State], tell: Tell) -> None:
        first = tasks[0]
        self.tasks, self.data, self.recipe = tasks, first.data, first.recipe
        self.dtype, self.device = self.recipe.torch_dtype, self.data.train.labels.device
        self.network = first.network.to(device=self.device, dtype=self.dtype).train()
        own = dict(self.network.named_parameters())
        self.params = {n: self._stack([s.params[n] for s in states], own[n]) for n in own}
        for name, param in own.items():
            self.params[name].requires_grad_(param.requires_grad)
        like = dict(self.network.named_buffers())
        given = [{n: s.buffers[n].to(like[n]) for n in like} for s in states]
        self.buffers, self.counters = lift.split(given)
        self.optimizer = self._restored([state.optimizer for state in states])
        self.masks = [{n: mask.to(self.device) for n, mask in s.masks.items()} for s in states]
        self.masked = [
            (self.params[n], -torch.stack([m[n] for m in self.masks]).to(BITS[self.dtype]))
            for n in states[0].masks
        ]
        self.forward = lift.forward(self.network, len(self.data.input_shape))
        self.draws, self.step = _draws(tasks, states[0].step), states[0].step
        self.looks = [
            (part, self.data.prepare(part.inputs, self.dtype))
            for part in (self.data.validation, self.data.test)
        ]
        self.losses = torch.stack([state.losses for state in states]).to(self.device)
        self.evaluations = [list(state.evaluations) for state in states]
        self.snapshots = [dict(state.snapshots) for state in states]
        self.compute, self.program = self._losses, self._update
        if self.device.type == "cuda":
            self.accelerate(tell)

    def _stack(self, tensors: Sequence[Tensor], like: Tensor) -> Tensor:
        return torch.stack([tensor.to(like) for tensor in tensors]).detach()

    def _restored(self, states: Sequence[dict[str, Params]]) -> torch.optim.Optimizer:
        optimizer = self.recipe.optimizer.build(list(self.params.values()), 0.0)
        for kind, tensors in states[0].items():
            for name in tensors:
                values = [state[kind][name].to(self.device) for state in states]
                whole = values[0].clone() if kind == COUNT else torch.stack(values)
                optimizer.state[self.params[name]][kind] = whole
        return optimizer

    def accelerate(self, tell: Tell) -> None:
        """Compile the step and replay it as a CUDA graph: tiny kernels cost their launch."""
        if replay.reads_numbers(self.network):
            return
        self.compute = replay.compiled(self._losses, tell)
        if self.dtype == torch.float32:
            for group in self.optimizer.param_groups:  # read by the graph; torch's are float32
                group["lr"] = torch.zeros((), device=self.device)
            self.program = replay.Replayed(self._update, replay.Cuda(self.optimizer))

    # -- a step --

    def advance(self) -> None:
        """One step of all replicas."""
        rate = self.recipe.rate(self.step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.program(*next(self.draws))
        self.step += 1

    def _update(self, index: Tensor, *moves: Tensor) -> None:
        """A step, given what was drawn for it: nothing in it waits for the device."""
        inputs = self.data.train.inputs.index_select(0, index.flatten())
        if self.recipe.augment is not None:
            inputs = self.recipe.augment.move(inputs, *moves)
        inputs = self.data.prepare(inputs, self.dtype).unflatten(0, index.shape)
        self.optimizer.zero_grad()
        losses = self.compute(inputs, self.data.train.labels[index])
        losses.sum().backward()
        for weight, bits in self.masked:
            if weight.grad is not None:  # a product would leave NaN where a gradient overflowed
                weight.grad.view(bits.dtype).bitwise_and_(bits)
        self.optimizer.step()
        self.losses += losses.detach()

    def _losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = self.forward(self.params, self.buffers, self.counters, inputs, 0)
        return _cross_entropies(logits, labels).mean(1)

    # -- looking --

    def evaluate(self) -> None:
        """Evaluate all replicas."""
        self.network.eval()
        looks = [self._look(*look) for look in self.looks]
        self.network.train()
        sums = self.losses.cpu()
        for replica, (validation, test) in enumerate(zip(*looks, strict=True)):
            before = self.evaluations[replica]
            now = State(self.step, {}, {}, losses=sums[replica], evaluations=before)
            before.append(contract.evaluation(now, validation, test))
        self.losses.zero_()

    @torch.no_grad()
    def _look(self, part: Part, prepared: Tensor) -> list[tuple[float, float]]:
        """Loss and accuracy of every replica."""
        num = len(self.tasks)
        chunk = max(SMALLEST_CHUNK, CHUNK // num)  # as much memory as for one replica
        loss = torch.zeros(num, dtype=torch.float64, device=self.device)
        correct = torch.zeros_like(loss)
        for inputs, labels in zip(prepared.split(chunk), part.labels.split(chunk), strict=True):
            logits = self.forward(self.params, self.buffers, self.counters, inputs, None)
            loss += _cross_entropies(logits, labels.expand(num, -1)).sum(1)
            correct += (logits.argmax(2) == labels).sum(1)
        return list(zip(*(torch.stack([loss, correct]) / len(part)).tolist(), strict=True))

    @property
    def has_diverged(self) -> list[bool]:
        """Of every replica: whether its last evaluation was not finite."""
        return [not looks[-1].is_finite for looks in self.evaluations]

    def states(self) -> list[State]:
        """The states now, of all replicas; they share no storage with the training."""
        return [self._state(replica) for replica in range(len(self.tasks))]

    def _state(self, replica: int) -> State:
        optimizer: dict[str, Params] = {}
        for name, param in self.params.items():
            for kind, value in self.optimizer.state.get(param, {}).items():
                assert value is None or isinstance(value, Tensor), kind  # others would be lost
                if value is not None:
                    own = value if kind == COUNT else value[replica]
                    optimizer.setdefault(kind, {})[name] = own
        params = {name: stack[replica] for name, stack in self.params.items()}
        buffers = {
            name: self.counters[name] if name in self.counters else self.buffers[name][replica]
            for name, _ in self.network.named_buffers()
        }
        now = State(self.step, params, buffers, self.masks[replica], optimizer)
        now.losses, now.diverged = self.losses[replica], self.has_diverged[replica]
        now.evaluations, now.snapshots = self.evaluations[replica], self.snapshots[replica]
        return _kept(now)

    def keep_snapshots(self) -> None:
        """Add the states now to the snapshots."""
        for state, snapshots in zip(self.states(), self.snapshots, strict=True):
            state.evaluations, state.snapshots = [], {}
            snapshots.setdefault(self.step, state)


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return flat.view(labels.shape)


def _kept(state: State) -> State:
    """A copy, evaluations and snapshots included."""
    kept = state.copy()
    kept.evaluations, kept.snapshots = list(state.evaluations), dict(state.snapshots)
    return kept


# -- training --------------------------------------------------------------------------------------


def train(
    tasks: Sequence[Task],
    states: Sequence[State],
    pulse: Pulse = lambda *_: None,
    tell: Tell = lambda _: None,
) -> list[State]:
    """Train the seeds of one node from their states to the last step, or until each diverges.

    The replicas that are at the same step make one stack; one that diverges leaves it. When a stack
    does not fit in memory, its halves are trained one after the other, from their states.

    Args:
        tasks: the trainings; they differ in their seeds alone.
        states: where they start, or a checkpoint of them; they are not changed.
        pulse: called with the step and a function that makes a checkpoint, a list of states: at
            least every `AHEAD` steps, and before each step of `keep` and after each evaluation but
            the last; it may save one, and may raise to stop the training.
        tell: called with what a user should know.

    Returns:
        The states after the last step, with all evaluations and snapshots.

    Raises:
        Unsupported: when the network cannot be trained in a stack; the message names the layer.
        SpecError: when the tasks differ in more than their seeds, or the states do not fit.
        torch.OutOfMemoryError: when not even one replica fits in memory.
    """
    _check(tasks, states)
    refuse_sparsity(tasks[0].recipe, "stacked")
    lift.examine(tasks[0])
    now = [_kept(state) for state in states]
    waiting = _stacks(now, tasks[0].last_step)
    while waiting:
        group, rest = waiting.pop(0), None
        try:
            rest = _train_stack(tasks, now, group, pulse, tell)
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
        if rest is None:  # not in the handler, where the exception still holds the tensors
            _free()
            half = len(group) // 2
            rest = [group[:half], group[half:]]
            tell(
                f"{len(group)} runs did not fit in memory together; {half} and {len(group) - half}"
                f" are trained instead, from step {now[group[0]].step}."
            )
        waiting = rest + waiting
    return now


def _check(tasks: Sequence[Task], states: Sequence[State]) -> None:
    if len(tasks) != len(states) or not tasks:
        raise SpecError(
            "`states` must be one for each task, and one at least; got "
            f"{len(states)} for {len(tasks)} tasks."
        )
    for name in ("recipe", "last_step", "keep", "data"):
        first, *others = (getattr(task, name) for task in tasks)
        if any(other is not first and (name == "data" or other != first) for other in others):
            raise SpecError(f"`tasks` must differ in their seeds alone; they differ in `{name}`.")
    for state in states:
        contract.check(tasks[0].network, state)


def _check_alike(states: Sequence[State]) -> None:
    """Refuse states at one step that no stack of one program can go on from."""
    for name, values in (
        ("masks", [set(state.masks) for state in states]),
        ("optimizer", [{k: set(each) for k, each in state.optimizer.items()} for state in states]),
        (f"optimizer.{COUNT}", [_numbers(state.optimizer.get(COUNT, {})) for state in states]),
    ):
        if any(value != values[0] for value in values):
            raise SpecError(
                f"`states` at one step must have come by the same way; they differ in `{name}`."
            )


def _numbers(tensors: Params) -> dict[str, float]:
    return {name: float(tensor) for name, tensor in tensors.items()}


def _stacks(states: Sequence[State], last_step: int) -> list[list[int]]:
    """The places of the states still to be trained, together where they are at the same step."""
    stacks: dict[tuple[int, bool], list[int]] = {}
    for place, state in enumerate(states):
        is_seen = bool(state.evaluations)  # unlike a half that is still to begin at this step
        if not (state.diverged or (is_seen and state.step >= last_step)):
            stacks.setdefault((state.step, is_seen), []).append(place)
    return list(stacks.values())


def _train_stack(
    tasks: Sequence[Task], now: list[State], stack: list[int], pulse: Pulse, tell: Tell
) -> list[list[int]]:
    """Train a stack to the end, or until one of it diverges.

    Args:
        tasks: of all replicas.
        now: their states; the stack's are replaced by what they become.
        stack: the places of its replicas.
        pulse: as of `train`.
        tell: as of `train`.

    Returns:
        the stack that is left to be trained, if any.
    """
    task, begun = tasks[0], [now[place] for place in stack]
    _check_alike(begun)
    training = _Training([tasks[place] for place in stack], begun, tell)

    def states() -> list[State]:
        latest = dict(zip(stack, training.states(), strict=True))
        return [latest.get(place) or _kept(state) for place, state in enumerate(now)]

    if not begun[0].evaluations:
        training.evaluate()
    while training.step < task.last_step and not any(training.has_diverged):
        pulse(training.step, states)
        if training.step in task.keep:
            training.keep_snapshots()
        for _ in range(training.step, _next_pause(task, training.step)):
            training.advance()
        if _evaluates(task, training.step):
            training.evaluate()
    for place, state in zip(stack, training.states(), strict=True):
        now[place] = state
    rest = [place for place in stack if not now[place].diverged]
    return [rest] if rest and training.step < task.last_step else []


def _evaluates(task: Task, step: int) -> bool:
    return task.recipe.evaluates(step) or step == task.last_step


def _next_pause(task: Task, step: int) -> int:
    """The next step that begins with a pulse."""
    steps = range(step + 1, step + AHEAD)
    stops = (later for later in steps if later in task.keep or _evaluates(task, later))
    return next(stops, step + AHEAD)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
