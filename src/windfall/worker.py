"""Training in a lab: one run, or several as one program.

`Workshop.perform` takes a job from wherever it stands (stored, checkpointed, or not begun) to
finished. Runs trained together are checkpointed and finished as a unit, and a run that was trained
so is replayed with all of its stack: bits may depend on who is in it.
"""

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import cast

import torch
from torch import Tensor, nn

from windfall import data as datasets
from windfall import flops, initialize, models, seeds, signs, structure, tickets
from windfall.data import Dataset
from windfall.engines import dispatch, rule
from windfall.engines.contract import Task
from windfall.engines.replay import Tell
from windfall.evidence import Outset
from windfall.initialize import initial_parameters
from windfall.masks import Masks, Params
from windfall.prune import Continue, ToStep
from windfall.runs import Fresh, Pruned, Run
from windfall.spec import Json, SpecError, digest, tag
from windfall.store import FULL, Lab, Record, now
from windfall.structure import Group
from windfall.train import State
from windfall.units import Weights

CHECKPOINT_SECONDS = 30.0  # at most this much training is lost to a crash

Lose = Callable[[str, Exception], None]


class Stopped(Exception):
    """Training was stopped on request, its checkpoint saved."""


@dataclass(frozen=True)
class Job:
    """What is asked of a worker.

    Args:
        run: to be trained.
        address: of the run.
        keep: steps whose snapshots must be stored.
        checkpoint_seconds: of training between two checkpoints, at least 0.
        engine: that is asked for; `auto` is the fixed rule's.
        companions: runs to be trained with it as one program, by address.
    """

    run: Run
    address: str
    keep: frozenset[int]
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    engine: rule.Asked = "auto"
    companions: dict[str, Run] = field(default_factory=dict[str, Run])

    @property
    def runs(self) -> dict[str, Run]:
        """All runs that are asked for, by address, in order."""
        return {self.address: self.run, **self.companions}

    def to_json(self) -> Json:
        """The job as JSON, where the data lies included."""
        run = self.run.to_json(addressed=False)
        return {
            "run": run,
            "address": self.address,
            "keep": sorted(self.keep),
            "checkpoint_seconds": self.checkpoint_seconds,
            "engine": self.engine,
            # a list: canonical JSON would sort the names of a table
            "companions": [[a, r.to_json(addressed=False)] for a, r in self.companions.items()],
        }

    @classmethod
    def from_json(cls, job: Json) -> "Job":
        """The job that `to_json` wrote."""
        run, seconds = Run.from_json(job["run"]), job.get("checkpoint_seconds", CHECKPOINT_SECONDS)
        keep, engine = frozenset(job["keep"]), job.get("engine", "auto")
        companions = {address: Run.from_json(run) for address, run in job.get("companions", [])}
        return cls(run, job["address"], keep, seconds, engine, companions)


@dataclass(frozen=True)
class _Program:
    """The runs that one program trains: a job's, or all that a replay needs.

    Args:
        runs: by address, in their order in the program.
        keep: steps whose snapshots are kept.
        engine: that is asked for.
        is_replay: they were stored before, and must all take part again.
    """

    runs: dict[str, Run]
    keep: frozenset[int]
    engine: rule.Asked
    is_replay: bool


@dataclass(frozen=True)
class _Trained:
    """What came of a program: final states by address, seconds of them all, engine and device.

    `measures` are what a record holds of each beside: what it kept, its budget, its distance.
    """

    finals: dict[str, State]
    seconds: float
    engine: str
    measures: dict[str, Json]


def versions() -> dict[str, str]:
    """Versions that are recorded with every run."""
    return {name: version(name) for name in ("windfall", "torch", "numpy")}


def ended(problem: Exception) -> tuple[str, str]:
    """What an exception makes of a run, `failed` or `full`, and why, in text any file takes."""
    is_full = isinstance(problem, OSError) and problem.errno in FULL
    reason = f"{type(problem).__name__}: {problem}".encode(errors="replace").decode()
    return "full" if is_full else "failed", reason


@contextmanager
def quiet_machine() -> Generator[None]:
    """One torch thread and denormals as zero: bits and speed do not depend on the caller."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def _refuse(_: str, problem: Exception) -> None:
    raise problem


@dataclass(frozen=True)
class Workshop:
    """Where runs are trained: a lab, a device, and the data sets already read.

    Args:
        lab: where runs are kept.
        device: `cpu` or `cuda`.
    """

    lab: Lab
    device: str
    _data: dict[str, Dataset] = field(default_factory=dict[str, Dataset], repr=False)
    _groups: dict[str, tuple[Group, ...]] = field(
        default_factory=dict[str, tuple[Group, ...]], repr=False
    )

    def data(self, run: Run) -> Dataset:
        """The run's data set on the device, its hash checked against the run's.

        Raises:
            SpecError: when the data is not what the run was made for.
        """
        name = digest([run.data.to_json(), run.data_sha256])  # the hash alone knows no split
        if name not in self._data:
            self.lab.lend_data(run.data)
            data = datasets.load(run.data)
            if data.sha256 != run.data_sha256:
                raise SpecError(
                    f"`data` must be what the run was made for, sha256 {run.data_sha256[:12]};"
                    f" got {data.sha256[:12]}. The files have changed since; run the study again."
                )
            self._data[name] = data.to(self.device)
        return self._data[name]

    def network(self, run: Run, state: State | None = None) -> nn.Module:
        """The run's network, to be given a state; what else its constructor draws is the seed's.

        Args:
            run: whose network.
            state: that it is to be given, if it may have lost channels; None is a whole one.
        """
        data = self.data(run)
        with seeds.isolated(run.seed, "build"):
            whole = run.model.build(data.input_shape, data.num_classes)
        if state is None or not state.channels:
            return whole
        return structure.resized(whole, structure.shapes(state.params | state.buffers))

    def initial(
        self,
        run: Run,
        fresh: Fresh,
        made_smaller: Callable[[nn.Module], nn.Module] = lambda whole: whole,
    ) -> State:
        """The state of the run's network newly initialized, after it was made smaller."""
        data = self.data(run)
        seed = run.seed if fresh.seed is None else fresh.seed

        def build() -> nn.Module:
            return made_smaller(run.model.build(data.input_shape, data.num_classes))

        def batch() -> Tensor:
            return data.first(seed, run.recipe.batch_size, torch.float64)[0]

        def drawn(stream: str) -> tuple[Params, Params]:
            return initial_parameters(build, fresh.initialization, seed, stream, batch)

        params, buffers = drawn(fresh.stream)
        names = [name for name, _ in initialize.layers(self.network(run))]
        if fresh.magnitudes == "constant":
            params = signs.constant(params, names)
        if fresh.signs is not None:
            params = signs.signed(params, drawn(fresh.signs)[0], names)
        return State(0, params, buffers)

    def beginning(self, run: Run) -> State:
        """The state at the first step of a run, made from its ancestors in the lab and proved.

        Raises:
            SpecError: when pruning would empty a layer, or its chain diverged.
            BrokenTicket: when the ticket is not what it says.
        """
        if isinstance(run.start, Fresh):
            return self.initial(run, run.start)
        network = self.network(run)
        kinds = models.kinds(network, self.data(run).input_shape)
        origin_address, origin = self._origin(run.start.parent)
        assert isinstance(origin.start, Fresh)
        initial = self.initial(origin, origin.start)
        parent = self.lab.weights(run.start.parent)
        match run.start.weights:
            case ToStep(step=0):
                source = initial
            case ToStep(step=step):
                source = self.lab.weights(origin_address).snapshots.get(step)
            case Fresh() as fresh:
                is_smaller = run.start.prune.is_structured  # it is then drawn at its own size
                source = initial if is_smaller else self.initial(run, fresh)
            case _:
                source = parent
        if source is None:
            raise SpecError(
                f"`start.weights.step` must be one that run {origin_address[:12]} came by; got"
                f" {run.clock[0]}, and it had diverged before."
            )
        lineage = tickets.Lineage(initial, parent, source, self._outset(run, network, initial))
        if run.start.prune.is_structured:
            around = self._surroundings(run, run.start)
            state = tickets.begin_smaller(run.start, lineage, around, kinds, run.seed)
        else:
            state = tickets.begin(run.start, lineage, kinds, run.seed)
        state.step = run.clock[0]
        return state

    def _outset(self, run: Run, network: nn.Module, initial: State) -> Outset:
        """The network of a run's chain before its training, to be made when it is looked at."""
        data = self.data(run)
        return Outset(
            lambda: structure.given(network, initial.params | initial.buffers),
            data.input_shape,
            data.train.labels.cpu(),
            lambda at: data.prepare(data.train.inputs[at], torch.float64).cpu(),
        )

    def _surroundings(self, run: Run, start: Pruned) -> tickets.Surroundings:
        data, dtype, fresh = self.data(run), run.recipe.torch_dtype, start.weights
        make = None
        if isinstance(fresh, Fresh):
            make = lambda made_smaller: self.initial(run, fresh, made_smaller)  # noqa: E731
        network = self.network(run)
        return tickets.Surroundings(
            network,
            self._groups_of(run, start, network),
            lambda num: data.prepare(data.train.inputs[:num], dtype).cpu(),
            make,
        )

    def _groups_of(self, run: Run, start: Pruned, network: nn.Module) -> tuple[Group, ...]:
        """A network's groups, found once: to follow a deep one takes a second."""
        removed, shape = start.prune.structure, self.data(run).input_shape
        assert not isinstance(removed, Weights)
        name = digest([run.model.to_json(), tag(type(removed)), list(shape)])
        if name not in self._groups:
            self._groups[name] = removed.groups(network, shape)
        return self._groups[name]

    def _origin(self, address: str) -> tuple[str, Run]:
        while True:
            record = self.lab.record(address)
            assert record is not None, address
            run = Run.from_json(record.spec)
            if run.parent is None:
                return address, run
            address = run.parent

    def perform(
        self,
        job: Job,
        pulse: Callable[[int], bool] = lambda _: False,
        tell: Tell = lambda _: None,
        lose: Lose = _refuse,
    ) -> str:
        """Bring the runs of a job from wherever they stand to finished, all or none.

        Args:
            job: the runs and what they must keep.
            pulse: called with every step, or with those between two bursts of steps; True asks to
                stop.
            tell: called with what a user should know.
            lose: called with the address of a run that cannot begin, and why; if it returns, the
                others go on without it. Where none can begin, the last one's reason is raised.

        Returns:
            `trained`, `reused`, or `busy` when another process is training one of them, or stored
            some of them since the job was made.

        Raises:
            Stopped: when `pulse` asked for it; the checkpoint is saved.
        """
        with self.lab.locked(*job.runs) as is_held:
            records = self.lab.records(job.runs) if is_held else {}
            if not is_held or 0 < len(records) < len(job.runs):
                return "busy"
            lacking = [r for r in records.values() if not self.lab.holds(r, job.keep)]
            if records and not lacking:
                return "reused"
            if len({record.unit for record in records.values()}) > 1:
                return "busy"
            with quiet_machine():
                trained = self._train(job, self._program(job, lacking), pulse, tell, lose)
            if lacking:
                self._add(lacking, trained.finals)
                return "reused"
            self.lab.finish_all(_recorded(job, trained))
            return "trained"

    def _program(self, job: Job, lacking: list[Record]) -> _Program:
        """Of new runs, the job's; else all that were trained with them, by the same engine."""
        if not lacking:
            return _Program(job.runs, job.keep, job.engine, is_replay=False)
        runs, known = job.runs, self.lab.records(lacking[0].unit)
        same = {"model": job.run.model, "data": job.run.data}  # as this process can make them
        again = {
            address: runs.get(address) or Run.from_json(record.spec).model_copy(update=same)
            for address, record in known.items()
        }
        engine = cast(rule.Name, lacking[0].engine.partition("/")[0])
        keep = job.keep.union(*(record.snapshots for record in lacking))
        return _Program(again, keep, engine, is_replay=True)

    def _add(self, lacking: list[Record], finals: dict[str, State]) -> None:
        """Add to stored runs what a replay came by, once it is proved."""
        again = [(record, finals[record.address]) for record in lacking]
        for record, final in again:
            self._prove_replay(record, final)
        self.lab.finish_all([(replace(r, snapshots=sorted(f.snapshots)), f) for r, f in again])

    def _prove_replay(self, record: Record, final: State) -> None:
        """Check that a run trained again, for what its stored one lacks, is the same bit for bit.

        Raises:
            RuntimeError: when it is not.
        """
        is_same = repr(final.evaluations) == repr(record.evaluations)  # NaN equals itself
        if is_same and self.lab.has_weights(record.address):
            stored, now_trained = self.lab.weights(record.address).tensors(), final.tensors()
            is_same = all(
                _bits(tensor) == _bits(now_trained[name])
                for name, tensor in stored.items()
                if name != "losses"  # of the steps since the last evaluation: not stored
            )
        if not is_same:
            raise RuntimeError(
                "a replay for its snapshots ended with other metrics or weights than the stored"
                " run's; was it stored on another machine or by other versions?"
            )

    def _train(
        self, job: Job, program: _Program, pulse: Callable[[int], bool], tell: Tell, lose: Lose
    ) -> _Trained:
        states, facts, begun_with = self._resumed(program, lose)
        runs = [program.runs[address] for address in facts["stack"]]
        keep = frozenset(facts["keep"])  # a checkpoint's too: its next one will claim them
        begun = saved = time.monotonic()

        def tick(step: int, states_now: Callable[[], list[State]]) -> None:
            nonlocal saved
            is_stopping, clock = pulse(step), time.monotonic()
            if is_stopping or clock - saved > job.checkpoint_seconds:
                facts["seconds"] += clock - saved
                current = states_now()
                _give_channels(current, channels)
                self.lab.save_checkpoints(facts["stack"][0], current, facts)
                saved = time.monotonic()
            if is_stopping:
                raise Stopped

        tasks = [self._task(run, state, keep) for run, state in zip(runs, states, strict=True)]
        spent, engine = facts["seconds"], facts["made_by"]["engine"]
        channels = [state.channels for state in states]
        finals = dispatch.train(engine.partition("/")[0], tasks, states, tick, tell)
        _give_channels(finals, channels)
        named = dict(zip(facts["stack"], finals, strict=True))
        seconds = spent + time.monotonic() - begun
        measures = {
            address: {
                "kept": self._kept(run, final),
                "budget": _budget(task, run, final),
                "distance": _distance(begun_with[address], final),
            }
            for (address, final), run, task in zip(named.items(), runs, tasks, strict=True)
        }
        return _Trained(named, seconds, engine, measures)

    def _kept(self, run: Run, final: State) -> int:
        """The number of prunable weights that a mask keeps or that are left; -1 if all are."""
        if not final.channels:
            return sum(int(mask.sum()) for mask in final.masks.values()) if final.masks else -1
        kinds = models.kinds(self.network(run), self.data(run).input_shape)
        return sum(final.params[name].numel() for name in kinds)

    def _task(self, run: Run, state: State, keep: frozenset[int]) -> Task:
        data, network = self.data(run), self.network(run, state)
        recipe, last = run.recipe, run.clock[1]
        if run.budget is not None:
            whole = flops.multiply_adds(self.network(run), data.input_shape)
            own = flops.multiply_adds(network, data.input_shape)
            kept = flops.masked_multiply_adds(own, state.masks)
            recipe = run.trained_by(sum(whole.values()), sum(kept.values()))
            last = recipe.steps
        elif isinstance(run.weights, Continue):
            recipe = run.trained_by(1, 1)
        return Task(network, data, recipe, run.seed, last, keep)

    def _resumed(self, program: _Program, lose: Lose) -> tuple[list[State], Json, dict[str, State]]:
        """The states to train on from, and those at the first step.

        The former are the checkpoint's, if this worker would have written it.
        """
        begun = self._begun(program, lose)
        first, state = next(iter(begun.items()))
        made_by = self._made_by(program, first, state)
        keep = sorted(program.keep)
        new: Json = {"made_by": made_by, "stack": list(begun), "keep": keep, "seconds": 0.0}
        found = self.lab.checkpoints(first)
        if found is not None:
            states, facts = found[0], {**new, "stack": [first], **found[1]}
            is_ours = all(facts[name] == new[name] for name in ("made_by", "stack"))
            if is_ours and program.keep <= set(facts["keep"]):
                return states, facts, begun
        return list(begun.values()), new, begun

    def _begun(self, program: _Program, lose: Lose) -> dict[str, State]:
        """The first states of the runs that can begin, by address."""
        begun, lost = dict[str, State](), dict[str, Exception]()
        for address, run in program.runs.items():
            try:
                begun[address] = self.beginning(run)
            except (SpecError, tickets.BrokenTicket) as problem:
                if program.is_replay:
                    raise
                lost[address] = problem
        last = None if begun else lost.popitem()[1]
        for address, problem in lost.items():
            lose(address, problem)
        if last is not None:
            raise last
        return begun

    def _made_by(self, program: _Program, address: str, state: State) -> Json:
        """The engine and versions of a training, chosen by one of its runs."""
        run = program.runs[address]
        shape, density = self.data(run).input_shape, rule.kept(state)
        network = self.network(run, state)
        choice = rule.choose(program.engine, network, shape, density, self.device, run.recipe)
        engine = choice.engine
        return {"engine": f"{engine}/{self.device}", "versions": versions()}


def _recorded(job: Job, trained: _Trained) -> list[tuple[Record, State]]:
    """The records of runs that were trained together, with their final states."""
    share, together = trained.seconds / len(trained.finals), list(trained.finals)
    stack, runs = together if len(together) > 1 else [], job.runs
    return [
        (
            Record(
                address,
                runs[address].to_json(),
                "diverged" if final.diverged else "done",
                final.evaluations,
                sorted(final.snapshots),
                seconds=share,
                engine=trained.engine,
                versions=versions(),
                created=now(),
                stack=stack,
                **trained.measures[address],
            ),
            final,
        )
        for address, final in trained.finals.items()
    ]


def _give_channels(states: Sequence[State], channels: Sequence[Masks]) -> None:
    """What engines do not know: which channels of the whole network a network has."""
    for state, stay in zip(states, channels, strict=True):
        state.channels = stay
        for snapshot in state.snapshots.values():
            snapshot.channels = stay


def _budget(task: Task, run: Run, final: State) -> dict[str, int]:
    """The steps that a run was granted, and the multiply-adds of an example in what it kept."""
    whole = flops.multiply_adds(task.network, task.data.input_shape)
    kept = flops.masked_multiply_adds(whole, final.masks)
    return {"steps": task.last_step - run.clock[0], "multiply_adds": sum(kept.values())}


def _distance(begun: State, final: State) -> float | None:
    """L2, between the weights of layers at a run's first step and at its last; None if infinite."""
    squares = sum(
        float((final.params[name].detach().cpu().double() - value.cpu().double()).square().sum())
        for name, value in begun.params.items()
        if value.dim() > 1
    )
    return math.sqrt(squares) if math.isfinite(squares) else None


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
