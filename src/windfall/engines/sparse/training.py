"""The sparse engine's `train`: packs a state into lists, runs the program, unpacks it again."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from windfall.data import Part
from windfall.engines import contract
from windfall.engines.contract import Pulse, Task, Unsupported
from windfall.engines.sparse import graph, pack
from windfall.engines.sparse.kernels import Moments, Momentum
from windfall.engines.sparse.layout import LANES, Layout
from windfall.engines.sparse.operations import INPUT, Connect, Network, Normalize
from windfall.engines.sparse.program import STORED, Program
from windfall.masks import Params
from windfall.train import Adam, Recipe, State

LINE = 64  # bytes of a cache line: vectors that lie across two cost twice
BURST_FLOPS = 4e9  # steps run without looking up: about a tenth of a second

Array = npt.NDArray[Any]


def rule(recipe: Recipe) -> Momentum | Moments:
    """The recipe's optimizer as the kernels know it."""
    optimizer = recipe.optimizer
    if isinstance(optimizer, Adam):
        return Moments(optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay)
    return Momentum(optimizer.momentum, optimizer.nesterov, optimizer.weight_decay)


def aligned(size: int, dtype: Any) -> Array:
    """Zeros that begin at a cache line."""
    itemsize = np.dtype(dtype).itemsize
    whole = np.zeros(size * itemsize + LINE, np.uint8)
    first = -whole.ctypes.data % LINE
    return whole[first : first + size * itemsize].view(dtype)


def _padded(values: Array) -> Array:
    """The values and, after them, at least 16 zeros: a vector may begin at the last of them."""
    whole = aligned(-(-len(values) // LANES) * LANES + LANES, values.dtype)
    whole[: len(values)] = values
    return whole


@dataclass(frozen=True)
class _Parameter:
    """Where a parameter's numbers are: `array[positions]` are its kept `entries` (all if None)."""

    kind: str
    positions: Array
    entries: Array


class _Memory:
    """The buffers that the program works on, by name.

    Args:
        program: that is run.
        state: whose masks say which weights exist.
    """

    def __init__(self, program: Program, state: State) -> None:
        self.program, self.arrays = program, dict[str, Array]()
        self.parameters: dict[str, _Parameter] = {}
        self.real = np.dtype(program.dtype)
        for tensor, layout in program.layouts.items():
            self.arrays[f"x{tensor}"] = self._ones(layout)
            if tensor in program.sloped:
                self.arrays[f"d{tensor}"] = aligned(layout.size, self.real)
        for i, op in enumerate(program.network.ops):
            if isinstance(op, Connect):
                self._connect(i, op, state)
            elif isinstance(op, Normalize):
                self._normalize(i, op, state)
        self.arrays["classes"] = aligned(program.width, np.int32)
        self.arrays["totals"] = aligned(2 * contract.AHEAD, np.float64)
        self.arrays["rates"] = aligned(2, np.float64)
        self.arrays["present"] = aligned(program.width, self.real)
        self.arrays["present"][: program.batch_size] = 1

    def _ones(self, layout: Layout) -> Array:
        array = aligned(layout.size, self.real)
        if layout.is_flat:
            array[layout.channels * layout.channel :] = 1
        else:
            array.reshape(layout.groups, -1)[:, layout.channels * layout.channel :] = 1
        return array

    def _connect(self, i: int, op: Connect, state: State) -> None:
        weight, bias = f"{op.name}.weight", f"{op.name}.bias"
        mask = state.masks.get(weight)
        size = int(np.prod(op.shape))
        kept = np.arange(size) if mask is None else np.flatnonzero(mask.numpy().ravel())
        connection, itemsize = self.program.connections[i], self.real.itemsize
        listed = pack.entries(connection, kept, itemsize)
        self._list(f"{i}", listed)
        if self.program.wants(op.x):
            for number, residue in enumerate(connection.residues):
                back = pack.transposed(connection, listed, residue, itemsize)
                self._list(f"{i}.{number}", back)
        for kind in ("w", "g", "m", "v"):
            self.arrays[f"{kind}{i}"] = _padded(np.zeros(len(listed.sources), self.real))
        self.arrays[f"count{i}"] = np.array([len(self.arrays[f"w{i}"])], np.int64)
        is_weight = listed.sources < size
        for name, ours, first in ((weight, is_weight, 0), (bias, ~is_weight, size)):
            positions = np.flatnonzero(ours)
            if name in state.params:
                self.parameters[name] = _Parameter(
                    f"{i}", positions, listed.sources[positions] - first
                )

    def _list(self, name: str, listed: pack.Entries) -> None:
        self.arrays[f"blocks{name}"] = np.array([listed.blocks], np.int64)
        self.arrays[f"starts{name}"] = listed.starts
        self.arrays[f"offsets{name}"] = _padded(listed.offsets)
        self.arrays[f"sources{name}"] = listed.sources

    def _normalize(self, i: int, op: Normalize, state: State) -> None:
        channels = self.program.layouts[op.x].channels
        every = np.arange(channels)
        for name in ("weight", "bias"):
            for kind in ("w", "g", "m", "v"):
                self.arrays[f"{kind}{i}.{name}"] = _padded(np.zeros(channels, self.real))
            self.parameters[f"{op.name}.{name}"] = _Parameter(f"{i}.{name}", every, every)
        for name in ("mean", "scale", "running_scale"):
            self.arrays[f"{i}.{name}"] = aligned(channels, self.real)
        for name in ("running_mean", "running_var"):
            given = state.buffers[f"{op.name}.{name}"].numpy().astype(self.real)
            self.arrays[f"{i}.{name}"] = given.copy()

    def load(self, kind: str, tensors: Params) -> None:
        """Take parameters, or an optimizer's tensors, from dense ones by name."""
        for name, tensor in tensors.items():
            place = self.parameters[name]
            dense = tensor.detach().cpu().numpy().ravel()
            self.arrays[f"{kind}{place.kind}"][place.positions] = dense[place.entries]

    def dense(self, kind: str, like: Params) -> Params:
        """The same as dense tensors, 0 where no weight is."""
        made: Params = {}
        for name, param in like.items():
            place = self.parameters[name]
            whole = np.zeros(param.numel(), self.real)
            whole[place.entries] = self.arrays[f"{kind}{place.kind}"][place.positions]
            made[name] = torch.from_numpy(whole).reshape(param.shape)
        return made

    def run(self, entry: str, count: int, **others: Array) -> Array:
        """Run an entry point of the program with some buffers replaced.

        Returns:
            sums of losses and right answers, [step, 2]; of an evaluation in the first row.
        """
        arrays = self.arrays | others  # alive while the program reads them
        table = np.array([arrays[n].ctypes.data for n in self.program.compiled.places], np.int64)
        totals = arrays["totals"]
        totals[:] = 0
        getattr(self.program.compiled, entry)(table.ctypes.data, count)
        return totals.reshape(-1, 2)


def _stored(inputs: Tensor) -> str:
    """The dtype in which the program reads the inputs: half precision as single, which is exact."""
    name = str(inputs.dtype).removeprefix("torch.")
    return name if name in STORED else "float32"


class _Source:
    """A part of the data, as the program reads it."""

    def __init__(self, part: Part) -> None:
        dtype = getattr(torch, _stored(part.inputs))
        self.data = part.inputs.contiguous().to(dtype).numpy()
        self.labels = part.labels.contiguous().numpy().astype(np.int64, copy=False)

    def arrays(self, indices: Array) -> dict[str, Array]:
        return {"data": self.data, "labels": self.labels, "indices": indices}


class _Training:
    """The heart of one training: the program, its memory, and the clock."""

    def __init__(self, task: Task, state: State) -> None:
        contract.check(task.network, state)
        self.task, self.recipe, self.given = task, task.recipe, state
        network = graph.read(task.network, task.data.input_shape)
        self.program = compiled_program(network, task)
        _check(self.program, state)
        self.memory = _Memory(self.program, state)
        self.memory.load("w", state.params)
        self._load_optimizer(state)
        self._load_data()
        self.step, self.diverged = state.step, state.diverged
        self.losses = float(state.losses)
        self.evaluations, self.snapshots = list(state.evaluations), dict(state.snapshots)
        self.batches = contract.batches(task.order, state.step)
        self.drawn, self.first = next(self.batches), state.step
        flops = 6.0 * self.program.batch_size * sum(self._multiply_adds())
        self.burst = int(max(1, min(contract.AHEAD, BURST_FLOPS // max(flops, 1))))

    def _multiply_adds(self) -> list[int]:
        made = self.program.connections
        return [
            len(self.memory.arrays[f"w{i}"]) * c.out.height * c.out.width for i, c in made.items()
        ]

    def _load_optimizer(self, state: State) -> None:
        kinds = {"exp_avg": "m", "exp_avg_sq": "v", "momentum_buffer": "m"}
        for name, tensors in state.optimizer.items():
            if name in kinds:
                self.memory.load(kinds[name], tensors)
        counts = {float(t) for t in state.optimizer.get("step", {}).values()} or {0.0}
        assert len(counts) == 1, counts
        self.updates = int(counts.pop())
        self.has_moments = bool(state.optimizer)

    def _load_data(self) -> None:
        data, layout = self.task.data, self.program.layouts[INPUT]
        zeros, ones = torch.zeros(data.input_shape), torch.ones(data.input_shape)
        double = torch.float64
        shift = data.prepare(zeros, double)
        scale = data.prepare(ones, double) - shift
        place = _feature_places(layout, self.program.network.shapes[INPUT])
        real = self.memory.real
        self.memory.arrays |= {
            "scale": scale.numpy().ravel().astype(real),
            "shift": shift.numpy().ravel().astype(real),
            "places": place.astype(np.int32),
        }
        self.train = _Source(data.train)
        self.looks = [_Source(part) for part in (data.validation, data.test)]

    # -- the state

    def state(self) -> State:
        like = dict(self.given.params)
        real = self.recipe.torch_dtype
        buffers = {
            name: tensor.to(real if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in self.given.buffers.items()
        }
        done = self.step - self.given.step
        for i, op in enumerate(self.program.network.ops):
            if isinstance(op, Normalize):
                for name in ("running_mean", "running_var"):
                    array = self.memory.arrays[f"{i}.{name}"].copy()
                    buffers[f"{op.name}.{name}"] = torch.from_numpy(array)
                buffers[f"{op.name}.num_batches_tracked"] += done
        return State(
            self.step,
            self.memory.dense("w", like),
            buffers,
            {name: mask.clone() for name, mask in self.given.masks.items()},
            self._optimizer(like),
            list(self.evaluations),
            torch.tensor(self.losses, dtype=torch.float64),
            self.diverged,
            dict(self.snapshots),
        )

    def _optimizer(self, like: Params) -> dict[str, Params]:
        if not (self.has_moments or self.updates):
            return {}
        if isinstance(self.program.rule, Moments):
            steps = {name: torch.tensor(float(self.updates)) for name in like}
            moments = {
                k: self.memory.dense(v, like) for k, v in (("exp_avg", "m"), ("exp_avg_sq", "v"))
            }
            return {"step": steps, **moments}
        has_buffer = self.program.rule.momentum > 0
        return {"momentum_buffer": self.memory.dense("m", like)} if has_buffer else {}

    def keep_snapshot(self) -> None:
        snapshot = self.state()
        snapshot.snapshots, snapshot.evaluations = {}, []
        self.snapshots[self.step] = snapshot

    # -- steps

    def advance(self, stop: int) -> None:
        """Train to a step; at most to the end of the batches that are drawn."""
        num = stop - self.step
        at = self.step - self.first
        indices = np.ascontiguousarray(self.drawn[at : at + num])
        source, indices = self._augmented(indices)
        rates = np.array([self._rate(self.step + i, self.updates + i + 1) for i in range(num)])
        totals = self.memory.run("train", num, rates=rates, **source.arrays(indices))
        for loss in totals[:num, 0]:  # one by one: the sum does not depend on where a burst ends
            self.losses += float(loss) / self.program.batch_size
        self.step, self.updates = stop, self.updates + num
        if self.step == self.first + len(self.drawn):
            self.drawn, self.first = next(self.batches), self.step

    def _rate(self, step: int, update: int) -> tuple[float, float]:
        rate, by = self.recipe.rate(step), self.program.rule
        if isinstance(by, Momentum):
            return rate, 1.0
        return rate / (1 - by.beta1**update), (1 - by.beta2**update) ** -0.5

    def _augmented(self, indices: Array) -> tuple[_Source, Array]:
        augment = self.recipe.augment
        if augment is None:
            return self.train, indices
        inputs, labels = self.task.data.train.inputs, self.task.data.train.labels
        moved = [
            augment.apply(inputs[torch.from_numpy(index)], self.task.seed, self.step + i)
            for i, index in enumerate(indices)
        ]
        flat = torch.from_numpy(indices.ravel())
        return _Source(Part(torch.cat(moved), labels[flat])), np.arange(indices.size)

    def next_stop(self) -> int:
        """The step to train to without looking up."""
        every = self.recipe.eval_every
        stops = [
            self.task.last_step,
            (self.step // every + 1) * every,
            self.step + self.burst,
            self.first + len(self.drawn),
            *(step for step in self.task.keep if step > self.step),
        ]
        return min(stops)

    def evaluate(self) -> None:
        looks: list[tuple[float, float]] = []
        for source in self.looks:
            num = len(source.labels)
            totals = self.memory.run("evaluate", num, **source.arrays(np.arange(num)))
            looks.append((float(totals[0, 0]) / num, int(totals[0, 1]) / num))
        losses = torch.tensor(self.losses, dtype=torch.float64)
        now = State(self.step, {}, {}, losses=losses, evaluations=self.evaluations)
        self.evaluations.append(contract.evaluation(now, looks[0], looks[1]))
        self.losses = 0.0
        self.diverged = not self.evaluations[-1].is_finite


def _check(program: Program, state: State) -> None:
    """Refuse what no list of entries and no batch of one can do."""
    connects = [op for op in program.network.ops if isinstance(op, Connect)]
    for name in set(state.masks) - {f"{op.name}.weight" for op in connects}:
        raise Unsupported(
            f"`state` must have masks of weights of layers alone for the sparse engine; got one of "
            f"`{name}`. Use separate."
        )
    for i, op in enumerate(program.network.ops):
        if isinstance(op, Normalize) and program.norm(i).number == 1:
            raise Unsupported(
                f"`recipe.batch_size` must give `{op.name}` more than 1 number a channel to "
                "normalize; got 1."
            )


def _feature_places(layout: Layout, shape: tuple[int, ...]) -> Array:
    """Where each number of a sample lies, from its group's first place."""
    if len(shape) != 3:
        return np.arange(int(np.prod(shape))) * layout.channel
    c, y, x = np.indices(shape)
    return (layout.origin + c * layout.channel + y * layout.row + x * layout.column).ravel()


NUM_PROGRAMS = 16  # that are kept: a study has a few recipes at most
_programs: dict[str, Program] = {}


def compiled_program(network: Network, task: Task) -> Program:
    """The program of a network and task; the last ones are kept."""
    inputs = task.data.train.inputs
    if inputs.device.type != "cpu":
        raise Unsupported("`engine` must be one for this device; sparse is for the CPU.")
    recipe = task.recipe
    contract.refuse_sparsity(recipe, "sparse")
    made = Program(network, recipe.batch_size, recipe.dtype, _stored(inputs), rule(recipe))
    largest = max(layout.channel * (layout.channels + 1) for layout in made.layouts.values())
    if largest > np.iinfo(np.int32).max:
        raise Unsupported(
            f"`recipe.batch_size` must let a group of samples of every layer have at most 2^31 - 1 "
            f"numbers in the sparse engine; got {largest:,}. Use auto or separate."
        )
    if str(made) not in _programs:
        while len(_programs) >= NUM_PROGRAMS:
            del _programs[next(iter(_programs))]
        _programs[str(made)] = made
    return _programs[str(made)]


def train(task: Task, state: State, pulse: Pulse = lambda *_: None) -> State:
    """Train from a state to the task's last step, or until it diverges.

    Args:
        task: the training.
        state: where it starts, or a checkpoint of it; it is not changed.
        pulse: called before every burst of at most `contract.AHEAD` steps, with the step and a
            function that makes a checkpoint; it may save one, and may raise to stop the training.

    Returns:
        The state after the last step, with all evaluations and snapshots.

    Raises:
        Unsupported: when the network has a layer that the engine does not know; it is named.
    """
    training = _Training(task, state)
    if not training.evaluations:
        training.evaluate()
    while training.step < task.last_step and not training.diverged:
        pulse(training.step, training.state)
        if training.step in task.keep and training.step not in training.snapshots:
            training.keep_snapshot()
        training.advance(training.next_stop())
        if task.recipe.evaluates(training.step) or training.step == task.last_step:
            training.evaluate()
    return training.state()
