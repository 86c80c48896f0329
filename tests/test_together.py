"""All seeds of a node, trained as one program: by the stacked engine, through queue and worker."""

import contextlib
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch
from test_worker import DIVERGES, Crash, Wired
from torch import nn

from windfall import execute as executor
from windfall.engines import stacked
from windfall.engines.contract import Unsupported
from windfall.execute import execute
from windfall.graph import Graph
from windfall.schedule import Outcome, Progress, Queue, Unit, engines
from windfall.spec import SpecError
from windfall.store import Lab
from windfall.worker import Job, Stopped, Workshop

REWIND = {"kind": "rewind", "to": {"kind": "to-step", "step": 20}}
KILLS = 10  # of a study of some fifty moments at which it can be killed


def normalized() -> nn.Module:
    """A network with statistics, which is no batched matrix product."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)
    )


def graph(num_seeds: int = 3, levels: int = 1, **changes: object) -> Graph:
    """By default four nodes: dense, ticket, reinit and finetune."""
    return small.graph(engine="stacked", num_seeds=num_seeds, levels=levels, **changes)


def queued(of: Graph, lab: Lab) -> Queue:
    return Queue(of, lab, engines(of, "cpu"))


def units(of: Graph, lab: Lab) -> Iterator[tuple[Unit, Job]]:
    """What is handed out, each unit when the one before is stored."""
    queue = queued(of, lab)
    while unit := queue.take():
        yield unit, queue.job(unit, 0.0)
        queue.settle(unit, "trained" if unit[0] not in queue.stored else "reused")
    assert not queue.waiting


def train(of: Graph, lab: Lab, pulse: Callable[[int], bool] = lambda _: False) -> list[Unit]:
    """Train what is lacking in this process; the units it was done in."""
    found = []
    for unit, job in units(of, lab):
        assert Workshop(lab, "cpu").perform(job, pulse) in ("trained", "reused")
        found.append(unit)
    return found


def trained(of: Graph, folder: Path) -> dict[str, tuple[object, ...]]:
    """The contents of a lab where a graph was trained unbroken."""
    opened = Lab(folder)
    train(of, opened)
    opened.close()
    return small.contents(folder)


def node(of: Graph, arm: str, level: int) -> Unit:
    return tuple(n.address for n in of.nodes if (n.arm, n.level) == (arm, level))


def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of runs in the stacks that are trained from now on."""
    real, found = stacked.train, []

    def count(tasks: list[object], *arguments: object) -> object:
        found.append(len(tasks))
        return real(tasks, *arguments)

    monkeypatch.setattr(stacked, "train", count)
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The default graph, and its contents when it is trained unbroken."""
    of = graph()
    return of, trained(of, tmp_path_factory.mktemp("unbroken") / "lab")


# ---- all seeds of a node are one program ---------------------------------------------------


@pytest.mark.slow
def test_every_node_is_one_program_of_all_seeds(lab, monkeypatch):
    of, found = graph(levels=2), sizes(monkeypatch)
    assert sorted(train(of, lab)) == sorted(
        [node(of, "dense", 0)]
        + [node(of, arm, level) for arm in ("ticket", "reinit", "finetune") for level in (1, 2)]
    )
    assert found == [3] * 7
    assert train(of, lab) == []
    for address, record in lab.records(of.runs).items():
        assert record.engine == "stacked/cpu"
        assert address in record.stack
        assert [lab.record(other).stack for other in record.stack] == [record.stack] * 3
        assert [lab.record(other).seconds for other in record.stack] == [record.seconds] * 3
    assert list((lab.folder / "checkpoints").iterdir()) == []
    assert small.held(lab.folder) == []


@pytest.mark.slow
def test_the_engines_agree_up_to_rounding_on_the_same_addresses(tmp_path):
    arms = ["dense", "ticket", "reinit", "finetune", "shuffled", REWIND]
    recipe = {"dtype": "float64"}
    together, alone = (graph(2, arms=arms, recipe=recipe), small.graph(recipe, arms=arms, levels=1))
    assert list(together.runs) == list(alone.runs)
    labs = Lab(tmp_path / "together"), Lab(tmp_path / "alone")
    train(together, labs[0])
    small.train(alone, labs[1])
    for address in alone.runs:
        states = [opened.weights(address) for opened in labs]
        looks = [opened.record(address).evaluations for opened in labs]
        for name, mask in states[1].masks.items():
            assert torch.equal(states[0].masks[name], mask)
        for name, value in states[1].params.items():
            torch.testing.assert_close(states[0].params[name], value, rtol=1e-9, atol=1e-11)
        for one, other in zip(*looks, strict=True):
            assert one.step == other.step
            assert one.test_loss == pytest.approx(other.test_loss, rel=1e-9)
            assert one.test_accuracy == other.test_accuracy
    for opened in labs:
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["separate", "sparse"])
def test_other_engines_train_a_run_at_a_time(engine, lab):
    of = small.graph(engine=engine, num_seeds=3, levels=1, arms=["ticket"])
    assert sorted(map(len, train(of, lab))) == [1] * 6
    assert all(record.stack == [] for record in lab.records(of.runs).values())
    assert all('"stack"' not in row[2] for row in small.contents(lab.folder).values())


def test_a_run_of_two_arms_is_trained_once(lab, monkeypatch):
    same = {"kind": "rewind", "to": {"kind": "to-step", "step": 0}}
    of, found = graph(arms=["ticket", same]), sizes(monkeypatch)
    assert node(of, "ticket", 1) == node(of, "rewind", 1)
    assert train(of, lab) == [node(of, "dense", 0), node(of, "ticket", 1)]
    assert found == [3, 3]


@pytest.mark.slow
def test_runs_that_no_arm_shows_are_programs_too(lab, monkeypatch):
    of, found = graph(2, arms=["other-order", "reinit"], levels=2), sizes(monkeypatch)
    assert len(of.runs) > len({n.address for n in of.nodes})
    assert sum(map(len, train(of, lab))) == len(of.runs)
    assert found == [2] * (len(of.runs) // 2)


def test_a_job_of_several_comes_back_from_json_in_order(lab):
    _, job = next(units(graph(6), lab))
    assert len(job.runs) == 6
    again = Job.from_json(json.loads(json.dumps(job.to_json())))
    assert again == job
    assert list(again.runs) == list(job.runs) != sorted(job.runs)


# ---- checkpointed and finished as a unit ---------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pauses", [[0], [20], [1, 21, 41], list(range(0, 60, 7))])
@pytest.mark.parametrize("changes", [{}, {"model": normalized}], ids=["products", "mapped"])
def test_pause_and_resume_is_no_pause(changes, pauses, lab, tmp_path):
    of = graph(2, arms=["ticket", REWIND], **changes)
    expected = trained(of, tmp_path / "unbroken")
    for unit, job in units(of, lab):
        for last in pauses:
            with contextlib.suppress(Stopped):
                Workshop(lab, "cpu").perform(job, lambda step, last=last: step >= last)
            assert len(lab.records(unit)) in (0, 2)
        Workshop(lab, "cpu").perform(job)
    assert small.contents(lab.folder) == expected
    assert list((lab.folder / "checkpoints").iterdir()) == []


def test_a_crash_costs_what_was_trained_since_the_last_checkpoint(lab, unbroken):
    of, (_, expected) = graph(arms=["ticket"]), unbroken
    for unit, job in units(of, lab):

        def pulse(step: int) -> bool:
            if step >= 40:
                raise Crash
            return False

        with contextlib.suppress(Crash):
            Workshop(lab, "cpu").perform(job, pulse)
        states, facts = lab.checkpoints(unit[0])
        assert facts["stack"] == list(unit)
        assert len(states) == 3
        seen = []
        Workshop(lab, "cpu").perform(job, lambda step, to=seen: to.append(step))
        assert seen[0] == states[0].step > 0
    assert small.contents(lab.folder) == {address: expected[address] for address in of.runs}


def test_the_seconds_of_a_stack_are_shared_by_its_runs(lab):
    (unit, job), *_ = units(graph(), lab)
    with pytest.raises(Stopped):
        Workshop(lab, "cpu").perform(job, lambda step: step >= 20)
    states, facts = lab.checkpoints(unit[0])
    lab.save_checkpoints(unit[0], states, facts | {"seconds": 3000.0})
    Workshop(lab, "cpu").perform(job)
    assert all(1000 < record.seconds < 1300 for record in lab.records(unit).values())


@pytest.mark.parametrize("what", ["another stack", "a run alone", "another engine"])
def test_a_checkpoint_of_others_is_not_resumed(what, lab, unbroken):
    of, expected = unbroken
    unit, job = next(units(of, lab))
    other = {
        "another stack": next(units(graph(2), lab))[1],
        "a run alone": replace(job, companions={}),
        "another engine": replace(job, companions={}, engine="separate"),
    }[what]
    with pytest.raises(Stopped):
        Workshop(lab, "cpu").perform(other, lambda step: step >= 20)
    assert lab.checkpoint(unit[0])[0].step >= 20
    seen = []
    Workshop(lab, "cpu").perform(job, lambda step: seen.append(step))
    assert seen[0] == 0
    assert small.contents(lab.folder) == {address: expected[address] for address in unit}
    assert list((lab.folder / "checkpoints").iterdir()) == []


# Forks a process that trains the study, and is killed when so many files or rows were written.
KILLED = """
import os, signal, sqlite3, sys
sys.path[:] = {paths!r}
import test_together as own
from windfall.store import Lab

of = own.graph(arms=["ticket"])
for line in sys.stdin:
    folder, left = line.rsplit(" ", 1)
    pid = os.fork()
    if pid == 0:
        count, synced, opened = int(left), os.fsync, Lab._opened
        def tick(*_):
            global count
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        def sync(descriptor):
            tick()
            synced(descriptor)
        def traced(self, **how):
            database = opened(self, **how)
            database.set_trace_callback(tick)
            return database
        os.fsync, Lab._opened = sync, traced
        own.train(of, Lab(folder))
        os._exit(0)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture
def killed():
    """Trains the study in a folder, to be killed after so many writes; returns how it ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(paths=[str(Path(__file__).parent), *sys.path])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )

    def run(folder: Path, num_writes: int) -> int:
        process.stdin.write(f"{folder} {num_writes}\n")
        process.stdin.flush()
        return os.waitstatus_to_exitcode(int(process.stdout.readline()))

    yield run
    process.communicate()


@pytest.mark.slow
def test_a_study_killed_again_and_again_ends_bit_for_bit_as_if_it_had_not(
    killed, unbroken, tmp_path
):
    of, (_, whole) = graph(arms=["ticket"]), unbroken
    expected = {address: whole[address] for address in of.runs}
    draw, kills, code, folder = random.Random(0), 0, None, tmp_path / "lab0"
    while kills < KILLS or code != 0:
        code = killed(folder, draw.randint(1, 45))
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        opened = Lab(folder)
        for unit in {record.unit for record in opened.records(of.runs).values()}:
            assert len(unit) == len(opened.records(unit)) == 3
        opened.close()
        if code == 0:
            assert small.contents(folder) == expected
            assert list((folder / "checkpoints").glob("*.safetensors")) == []
            folder = tmp_path / f"lab{kills}"


# ---- some of the runs are stored, or elsewhere ---------------------------------------------


def test_the_runs_that_are_not_stored_are_a_stack_of_their_own(lab):
    first, second = small.graph(num_seeds=1, levels=1), graph(4)
    small.train(first, lab)  # by another engine
    rows = small.rows(lab.folder)
    for unit in train(second, lab):
        assert len(unit) == 3
        assert not set(unit) & set(first.runs)
        assert lab.record(unit[0]).stack == list(unit)
    after = small.rows(lab.folder)
    assert {address: after[address] for address in rows} == rows
    assert set(after) == set(second.runs)


@pytest.mark.slow
def test_more_seeds_leave_the_runs_there_are_alone(lab, unbroken, tmp_path):
    of, expected = unbroken
    more = graph(5)
    trained(of, lab.folder)
    assert [len(unit) for unit in train(more, lab)] == [2] * 4
    found = small.contents(lab.folder)
    assert {address: found[address] for address in of.runs} == expected
    assert found == trained(of, tmp_path / "b") | trained(more, tmp_path / "b")


def test_a_stack_waits_for_a_run_that_another_process_trains(lab, tmp_path):
    of = graph(arms=["ticket"])
    queue = queued(of, lab)
    unit = queue.take()
    job, workshop = queue.job(unit, 0.0), Workshop(lab, "cpu")
    for busy in unit:
        with Lab(lab.folder).locked(busy):
            assert workshop.perform(job) == "busy"
            assert small.held(lab.folder) == [busy]
    assert lab.records(unit) == {}
    queue.put_back(unit, wait_seconds=1000)
    assert queue.take() == ()
    assert len(queue.waiting) == len(of.runs)
    queue.put_back((), 0)
    queue.busy_until.clear()
    assert queue.take() == unit
    small.train(small.graph(num_seeds=1, levels=1, arms=["dense"]), lab)  # the other has stored it
    assert workshop.perform(job) == "busy"
    queue.put_back(unit)
    assert [queue.take(), queue.take()] == [unit[:1], unit[1:]]
    assert workshop.perform(queue.job(unit[:1], 0.0)) == "reused"
    assert workshop.perform(queue.job(unit[1:], 0.0)) == "trained"
    assert lab.record(unit[1]).stack == list(unit[1:])


# ---- replays -------------------------------------------------------------------------------


def snapshots(lab: Lab, addresses: Unit) -> list[list[int]]:
    return [lab.record(address).snapshots for address in addresses]


def test_a_missing_snapshot_is_added_by_training_the_whole_stack_again(lab, tmp_path, monkeypatch):
    first, second = graph(arms=["ticket"]), graph(arms=["ticket", REWIND])
    train(first, lab)
    with sqlite3.connect(lab.folder / "lab.sqlite") as database:
        database.execute("UPDATE runs SET created = '2001-01-01T00:00:00+00:00'")
    dense, found = node(second, "dense", 0), sizes(monkeypatch)
    assert train(second, lab) == [dense, node(second, "rewind", 1)]
    assert found == [3, 3]
    assert snapshots(lab, dense) == [[20]] * 3
    assert {lab.record(address).created[:4] for address in dense} == {"2001"}
    assert small.contents(lab.folder) == trained(second, tmp_path / "unbroken")


def test_a_replay_of_some_seeds_trains_all_of_their_stack(lab, tmp_path, monkeypatch):
    first, fewer = graph(3, arms=["ticket"]), graph(1, arms=["ticket", REWIND])
    train(first, lab)
    before, found = small.contents(lab.folder), sizes(monkeypatch)
    dense = node(first, "dense", 0)
    train(fewer, lab)
    assert found == [3, 1]  # the rewound run is new, and alone
    assert snapshots(lab, dense) == [[20], [], []]
    assert lab.record(dense[0]).stack == list(dense)
    after = small.contents(lab.folder)
    assert {a: after[a] for a in dense[1:]} == {a: before[a] for a in dense[1:]}
    state = lab.weights(dense[0])
    trained(graph(3, arms=[REWIND]), tmp_path / "keeping")
    other = Lab(tmp_path / "keeping").weights(dense[0])
    assert small.is_same(
        state.snapshots[20].params["hidden1.weight"], other.snapshots[20].params["hidden1.weight"]
    )


def test_deleted_weights_are_made_again(lab, unbroken):
    of, expected = unbroken
    train(of, lab)
    ticket = node(of, "ticket", 1)
    for address in ticket[1:]:
        (lab.folder / "weights" / f"{address}.safetensors").unlink()
    assert train(of, lab) == [ticket[1:]]
    assert small.contents(lab.folder) == expected


def test_a_replay_that_may_be_paused_and_ends_elsewhere_is_refused(lab, monkeypatch):
    first = graph(arms=["dense"])
    train(first, lab)
    dense = node(first, "dense", 0)
    state, record = lab.weights(dense[1]), lab.record(dense[1])
    state.params["hidden1.weight"].view(torch.int32)[0, 0] ^= 1
    state.evaluations = record.evaluations
    lab.finish(record, state)
    before = small.contents(lab.folder)
    _, job = next(units(graph(arms=[REWIND]), lab))
    with pytest.raises(Stopped):
        Workshop(lab, "cpu").perform(job, lambda step: step >= 40)
    seen = []
    with pytest.raises(RuntimeError, match="other metrics or weights than the stored"):
        Workshop(lab, "cpu").perform(job, lambda step: seen.append(step))
    assert seen[0] >= 40
    assert small.contents(lab.folder) == before


# ---- failures, divergence, memory ----------------------------------------------------------


def unlucky(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Runs that cannot begin."""
    real, specs = Workshop.beginning, set(addresses)

    def beginning(self: Workshop, run: object) -> object:
        if run.address in specs:
            raise SpecError("bad luck")
        return real(self, run)

    monkeypatch.setattr(Workshop, "beginning", beginning)


def here(**changes: object) -> Graph:
    """Of a network that trains in this process."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    return graph(model=make, **changes)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_runs_that_cannot_begin_fail_and_the_others_go_on(num, lab, monkeypatch):
    of = here()
    ticket = node(of, "ticket", 1)
    unlucky(monkeypatch, *ticket[:num])
    outcome = execute(of, lab)
    assert outcome == Outcome(
        trained=12 - num, failures=dict.fromkeys(ticket[:num], "SpecError: bad luck")
    )
    assert lab.failures(of.runs) == outcome.failures
    left = ticket[num:]
    assert [lab.record(a).unit for a in left] == [left] * len(left)
    assert execute(of, lab) == Outcome(reused=12 - num, failures=outcome.failures)


def test_a_run_that_cannot_begin_is_an_error_to_whom_does_not_take_it(lab, monkeypatch):
    unit, job = next(units(graph(), lab))
    unlucky(monkeypatch, unit[1])
    with pytest.raises(SpecError, match="bad luck"):
        Workshop(lab, "cpu").perform(job)
    assert lab.records(unit) == {}


def test_a_failure_in_training_is_that_of_all_in_the_stack(lab, monkeypatch):
    of, real, calls = here(arms=["ticket", "reinit"]), stacked.train, itertools.count()

    def train(*arguments: object) -> object:
        if next(calls) == 1:
            raise ValueError("bad luck")
        return real(*arguments)

    monkeypatch.setattr(stacked, "train", train)
    outcome = execute(of, lab)
    assert outcome.trained == 6
    assert set(outcome.failures) in ({*node(of, "ticket", 1)}, {*node(of, "reinit", 1)})
    assert set(outcome.failures.values()) == {"ValueError: bad luck"}


def test_a_failed_dense_stack_takes_its_descendants_along(lab, monkeypatch):
    of = here(levels=2, arms=["ticket"])
    dense = node(of, "dense", 0)
    unlucky(monkeypatch, dense[0])
    outcome = execute(of, lab)
    assert (outcome.trained, len(outcome.failures)) == (6, 3)
    assert outcome.failures.keys() == {n.address for n in of.nodes if n.seed == 0}


def test_children_of_diverged_runs_say_so(lab):
    of = here(recipe=DIVERGES, arms=["ticket"])
    outcome = execute(of, lab)
    dense, ticket = node(of, "dense", 0), node(of, "ticket", 1)
    assert {lab.record(address).status for address in dense} == {"diverged"}
    assert outcome.trained == 3
    assert outcome.failures.keys() == set(ticket)
    assert all("diverged" in reason for reason in outcome.failures.values())


def test_one_that_diverges_leaves_the_others_as_they_are(lab, tmp_path, monkeypatch):
    of, real = graph(arms=["dense"]), Workshop.beginning
    unit = node(of, "dense", 0)

    def beginning(self: Workshop, run: object) -> object:
        state = real(self, run)
        if run.address == unit[1]:
            state.params["hidden1.weight"][0, 0] = float("nan")
        return state

    monkeypatch.setattr(Workshop, "beginning", beginning)
    expected = trained(of, tmp_path / "unbroken")
    status = [json.loads(expected[address][2])["evaluations"][-1]["step"] for address in unit]
    assert status == [60, 0, 60]
    for _, job in units(of, lab):
        for last in (0, 1, 40):
            with contextlib.suppress(Stopped):
                Workshop(lab, "cpu").perform(job, lambda step, last=last: step >= last)
        Workshop(lab, "cpu").perform(job)
    assert small.contents(lab.folder) == expected


def test_networks_that_differ_in_more_than_their_tensors_are_no_program(lab):
    of = graph(2, model=Wired, arms=["dense"])
    _, job = next(units(of, lab))
    with pytest.raises(Unsupported, match="the network's constructor draws what is neither"):
        Workshop(lab, "cpu").perform(job)
    assert Workshop(lab, "cpu").perform(replace(job, companions={})) == "trained"


def test_runs_that_do_not_fit_in_memory_together_are_halved_and_it_is_said(
    lab, tmp_path, monkeypatch
):
    of, real = here(), stacked._Training.advance
    messages, worked = list[str](), list[int]()
    trained(of, tmp_path / "unbroken")

    def advance(training: stacked._Training) -> None:
        if len(training.tasks) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(training)

    def watch(progress: Progress) -> None:
        messages.extend((progress.message or "").splitlines())
        worked.append(progress.worked)

    monkeypatch.setattr(stacked._Training, "advance", advance)
    assert execute(of, lab, watch=watch) == Outcome(trained=12)
    told = "3 runs did not fit in memory together; 1 and 2 are trained instead, from step 0."
    assert messages.count(told) == 3
    assert worked == sorted(worked)
    assert worked[-1] == sum(run.clock[1] - run.clock[0] for run in of.runs.values())
    whole = Lab(tmp_path / "unbroken")
    for address in of.runs:
        for name, value in whole.weights(address).params.items():
            torch.testing.assert_close(
                lab.weights(address).params[name], value, rtol=1e-3, atol=1e-5
            )
    whole.close()


def test_ctrl_c_stops_a_stack_and_a_checkpoint_continues(lab, tmp_path):
    of = here(arms=["ticket"])
    expected = trained(of, tmp_path / "unbroken")
    for last in (60, 180, 60):  # of what is left to do
        calls = itertools.count()

        def watch(progress: Progress, last: int = last, calls: Iterator[int] = calls) -> None:
            if progress.worked >= last and next(calls) == 0:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(executor.Interrupted):
            execute(of, lab, watch=watch)
    assert list((lab.folder / "checkpoints").iterdir())
    execute(of, lab)
    assert small.contents(lab.folder) == expected


# ---- worker processes ----------------------------------------------------------------------

SCARCE = """
import os, signal
from pathlib import Path
import torch
from torch import nn
from windfall.engines import stacked
from windfall.spec import SpecError
from windfall.worker import Workshop

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))

def advance(training, real=stacked._Training.advance):
    mark = Path(os.environ["MARK"])
    if mark.exists() and training.step == 25:
        mark.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if "SCARCE" in os.environ and len(training.tasks) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory")
    real(training)

def beginning(workshop, run, real=Workshop.beginning):
    if run.parent and str(run.seed) == os.environ.get("UNLUCKY"):
        raise SpecError("bad luck")
    return real(workshop, run)

if os.getpid() != int(os.environ["CALLER"]):
    stacked._Training.advance, Workshop.beginning = advance, beginning
"""


@pytest.fixture
def scarce(tmp_path, monkeypatch):
    """The folder of a module whose networks have trouble in a worker, as the environment says."""
    (tmp_path / "scarce.py").write_text(SCARCE)
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in {"CALLER": os.getpid(), "MARK": tmp_path / "mark"}.items():
        monkeypatch.setenv(name, str(value))
    yield tmp_path
    sys.modules.pop("scarce", None)


@pytest.mark.slow
@pytest.mark.parametrize("is_scarce", [False, True])
def test_a_worker_says_what_happened_to_its_stack(is_scarce, scarce, lab, monkeypatch):
    (scarce / "mark").touch()
    if is_scarce:
        monkeypatch.setenv("SCARCE", "")
    of, messages, worked = graph(model="scarce:make", arms=["ticket"]), list[str](), list[int]()

    def watch(progress: Progress) -> None:
        messages.extend((progress.message or "").splitlines())
        worked.append(progress.worked)

    assert execute(of, lab, workers=1, watch=watch) == Outcome(trained=6)
    (killed,) = (told for told in messages if "killed" in told)
    assert " (in a stack of 3): its worker was killed by SIGKILL, " in killed
    assert killed.endswith("; it is tried once more")
    halved = [told for told in messages if "did not fit in memory" in told]
    assert len(halved) == (2 + 1 if is_scarce else 0)
    assert worked[-1] == 360
    if not is_scarce:
        assert small.contents(lab.folder) == trained(of, scarce / "here")


@pytest.mark.slow
def test_two_processes_share_one_lab(unbroken, tmp_path):
    of, expected = unbroken
    text = small.TOML.format(num_seeds=3, levels=1, steps=60, eval_every=20)
    (tmp_path / "small.toml").write_text(text.replace("levels", 'engine = "stacked"\nlevels'))
    line = small.command("run", "small.toml", "--lab", "lab", "--workers", 1, "--json")
    processes = [small.start(line, tmp_path) for _ in range(2)]
    told = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    counts = [json.loads(out)["runs"] for out, _ in told]
    assert sum(count["trained"] for count in counts) == len(of.runs) == 12
    assert all(count["trained"] + count["reused"] == 12 for count in counts)
    assert small.contents(tmp_path / "lab") == expected
    assert sorted(row[0] for row in small.rows(tmp_path / "lab").values()) == list(range(1, 13))


@pytest.mark.slow
def test_a_worker_says_which_run_cannot_begin(scarce, lab, monkeypatch):
    monkeypatch.setenv("UNLUCKY", "1")
    of = graph(model="scarce:make", arms=["ticket"])
    unlucky = node(of, "ticket", 1)[1]
    expected = Outcome(trained=5, failures={unlucky: "SpecError: bad luck"})
    assert execute(of, lab, workers=1) == expected
    assert lab.failures(of.runs) == expected.failures
