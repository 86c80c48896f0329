import contextlib
import errno
import json
import math
import sqlite3
from dataclasses import replace

import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from windfall import arms, data, masks, tickets
from windfall.models import user_model
from windfall.runs import Fresh
from windfall.spec import SpecError, digest, members
from windfall.store import Lab
from windfall.worker import Job, Stopped, Workshop, ended

REWOUND = 20  # the step that `rewind` returns to
LEVELS = (1, 2)


def normalized() -> nn.Module:
    """A network with statistics and draws of its own."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(16, 10),
    )


class Wired(nn.Module):
    """A network whose constructor draws what is neither a parameter nor a buffer."""

    def __init__(self):
        super().__init__()
        self.wires = torch.randperm(64)[:32]
        self.hidden, self.output = nn.Linear(32, 12), nn.Linear(12, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.hidden(inputs.flatten(1)[:, self.wires]).relu())


def dense_job(engine: str = "separate", **recipe: object) -> Job:
    """By default on the engine that can be stopped at any step."""
    settings = {"num_seeds": 1, "arms": ["dense"], "levels": 1, "engine": engine}
    return small.jobs(small.graph(recipe, **settings))[0]


def until_step(last: int, seen: list[int] | None = None):
    """A pulse that asks to stop at a step."""

    def pulse(step: int) -> bool:
        if seen is not None:
            seen.append(step)
        return step >= last

    return pulse


# ---- every arm begins with what its definition says ----------------------------------------

# Designs have networks of their own: tests/test_design.py.
ARMS = [name for name in members(arms.Arm) if name not in arms.DESIGNS]


class Family:
    """A trained study of one seed and every arm, and its definitions in plain code."""

    def __init__(self, folder):
        rewind = {"kind": "rewind", "to": {"kind": "to-step", "step": REWOUND}}
        kinds = [rewind if kind == "rewind" else kind for kind in ARMS]
        self.graph = small.graph(num_seeds=1, arms=kinds)
        self.lab = small.trained(self.graph, folder)
        self.workshop = Workshop(self.lab, "cpu")
        self.places = {(n.arm, n.level): n.address for n in self.graph.nodes}

    def address(self, arm: str, level: int) -> str:
        """Of an arm at a level; level 0 is the dense run that the arm's chain begins with."""
        if level or arm == "dense":
            return self.places[arm, level]
        own = arm in ("other-order", "other-init")
        return self.graph.runs[self.places[arm, 1]].parent if own else self.places["dense", 0]

    def run(self, arm: str, level: int):
        return self.graph.runs[self.address(arm, level)]

    def initial(self, arm: str = "dense") -> dict[str, Tensor]:
        run = self.run(arm, 0)
        return self.workshop.initial(run, run.start).params

    def fresh(self) -> dict[str, Tensor]:
        """theta_0'."""
        run = self.run("dense", 0)
        start = Fresh(initialization=run.start.initialization, stream="reinit")
        return self.workshop.initial(run, start).params

    def signs(self, arm: str) -> dict[str, Tensor]:
        """What survivors start from in an arm that is about signs."""
        if arm == "signed-reinit":
            return self.signed(self.fresh(), self.initial())
        return self.constant(self.initial() if arm == "signed-constant" else self.fresh())

    def constant(self, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """The signs of some weights, times the deviation that theta_0 has in their layer."""
        deviations = {n: w.std(correction=0).expand_as(w) for n, w in self.initial().items()}
        return self.signed(self.initial() | deviations, like)

    def signed(self, sizes: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: w.copysign(like[n]) if w.ndim == 2 else w for n, w in sizes.items()}

    def trained(self, arm: str, level: int) -> dict[str, Tensor]:
        return self.lab.weights(self.address(arm, level)).params

    def found(self, arm: str, level: int) -> dict[str, Tensor]:
        """The survivors of greatest magnitude at the end of the level before, layer by layer."""
        alive = self.lab.masks(self.address(arm, level - 1))
        masks = {}
        for name, weight in self.trained(arm, level - 1).items():
            if weight.ndim < 2:
                continue
            rate = 0.1 if name.startswith("output") else 0.2
            count = round(weight.numel() * (1 - rate) ** level)
            size = weight.abs().flatten().tolist()
            there = alive[name].flatten().tolist() if alive else [True] * len(size)
            order = sorted((i for i in range(len(size)) if there[i]), key=lambda i: (-size[i], i))
            mask = torch.zeros(len(size), dtype=torch.bool)
            mask[order[:count]] = True
            masks[name] = mask.reshape(weight.shape)
        return masks

    def expected(self, arm: str, level: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The masks and what the survivors start from; None where the mask is any of its kind."""
        stored = self.lab.masks(self.address(arm, level))
        dense = self.lab.weights(self.address("dense", 0))
        match arm:
            case "dense":
                return {}, self.initial()
            case "ticket":
                return self.found("ticket", level), self.initial()
            case "rewind":
                return self.found("rewind", level), dense.snapshots[REWOUND].params
            case "finetune" | "finetune-small":
                return self.found("ticket", level), self.trained("ticket", level - 1)
            case "reinit" | "scratch-e" | "scratch-b" | "scratch-b-plus":
                return self.found("ticket", level), self.fresh()
            case "shuffled" | "random":
                return stored, self.fresh()
            case "shuffled-ticket":
                return stored, self.initial()
            case "signed-reinit" | "signed-constant" | "random-constant":
                return self.found("ticket", level), self.signs(arm)
            case "other-order" | "other-init":
                return self.found(arm, level), self.initial(arm)
        raise AssertionError(f"the definition of {arm} is to be written here")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return Family(tmp_path_factory.mktemp("family") / "lab")


PLACES = [("dense", 0)] + [(arm, level) for arm in ARMS if arm != "dense" for level in LEVELS]


@pytest.mark.parametrize(("arm", "level"), PLACES)
def test_an_arm_begins_and_ends_as_its_definition_says(arm, level, family):
    address, run = family.address(arm, level), family.run(arm, level)
    masks, source = family.expected(arm, level)
    start, end = family.workshop.beginning(run), family.lab.weights(address)
    assert (
        start.masks.keys() == end.masks.keys() == family.lab.masks(address).keys() == masks.keys()
    )
    for name, value in source.items():
        mask = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert small.is_same(start.params[name], torch.where(mask, value, 0.0))
        assert not bool(end.params[name][~mask].any())
        if name in masks:
            assert small.is_same(start.masks[name], mask)
            assert small.is_same(end.masks[name], mask)
    record = family.lab.record(address)
    assert record.kept == (sum(int(m.sum()) for m in masks.values()) if masks else -1)
    assert start.step == record.evaluations[0].step == run.clock[0]
    assert end.step == record.evaluations[-1].step == family.graph.clock(address)[1]


@pytest.mark.parametrize(("arm", "level"), PLACES)
def test_what_an_arm_begins_with_is_what_was_trained(arm, level, family):
    run = family.run(arm, level)
    dataset = family.workshop.data(run)
    network = run.model.build(dataset.input_shape, dataset.num_classes)
    start, end = family.workshop.beginning(run), family.lab.weights(family.address(arm, level))
    looks = family.lab.record(family.address(arm, level)).evaluations
    for state, look in ((start, looks[0]), (end, looks[-1])):
        outputs = functional_call(
            network, state.params, (dataset.prepare(dataset.test.inputs, torch.float32),)
        )
        loss = float(F.cross_entropy(outputs, dataset.test.labels))
        assert look.test_loss == pytest.approx(loss, rel=1e-5)
        correct = (outputs.argmax(1) == dataset.test.labels).double().mean()
        assert look.test_accuracy == pytest.approx(float(correct))


@pytest.mark.parametrize("level", LEVELS)
def test_controls_differ_in_their_masks_alone(level, family):
    found = family.found("ticket", level)
    shuffled, spread = (
        family.lab.masks(family.address(arm, level)) for arm in ("shuffled", "random")
    )
    total = sum(int(mask.sum()) for mask in found.values())
    whole = sum(mask.numel() for mask in found.values())
    for name, mask in found.items():
        assert int(shuffled[name].sum()) == int(mask.sum())
        assert not torch.equal(shuffled[name], mask)
        assert abs(int(spread[name].sum()) - total * mask.numel() / whole) < 1
        assert not torch.equal(spread[name], mask)
    assert sum(int(mask.sum()) for mask in spread.values()) == total


def test_the_other_chains_share_one_thing_each(family):
    initial, other, fresh = family.initial(), family.initial("other-init"), family.fresh()
    first = {arm: family.run(arm, 0) for arm in ("dense", "other-order", "other-init")}
    assert first["other-order"].seed != first["dense"].seed == first["other-init"].seed
    for name, weight in initial.items():
        assert small.is_same(family.initial("other-order")[name], weight)
        if weight.ndim == 2:
            assert not bool((weight == other[name]).any())
            assert not bool((weight == fresh[name]).any())
            assert not bool((other[name] == fresh[name]).any())
    looks = {
        arm: family.lab.record(family.address(arm, 0)).evaluations
        for arm in ("dense", "other-order", "other-init")
    }
    assert looks["other-order"][0] == looks["dense"][0] != looks["other-init"][0]
    assert looks["other-order"][-1] != looks["dense"][-1]


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow", "large-init"])
def test_masks_at_initialization_are_of_theta_0_and_their_controls_share_them(criterion, lab):
    prune = {"criterion": criterion, "selection": {"kind": "global", "rate": 0.6}}
    how = {"prune": prune, "one_shot": True, "num_seeds": 1}
    of = small.graph(arms=["ticket", "reinit", "shuffled", "signed-constant"], **how)
    small.train(of, lab)
    found = {(node.arm, node.level): lab.masks(node.address) for node in of.nodes}
    longer = small.graph({"steps": 80}, arms=["ticket"], **how)
    small.train(longer, lab)
    again = {(node.arm, node.level): lab.masks(node.address) for node in longer.nodes}
    for level in LEVELS:
        mask = found["ticket", level]
        kept = sum(int(each.sum()) for each in mask.values())
        assert kept == of.counts[level] == round(1232 * 0.4**level)
        for same in (found["reinit", level], found["signed-constant", level]):
            assert all(torch.equal(mask[name], same[name]) for name in mask)
        assert all(torch.equal(mask[name], again["ticket", level][name]) for name in mask)
        other = found["shuffled", level]
        assert [int(m.sum()) for m in mask.values()] == [int(m.sum()) for m in other.values()]
        assert not all(torch.equal(mask[name], other[name]) for name in mask)


def test_a_snapshot_is_the_dense_run_at_that_step(family, lab):
    run, address = family.run("dense", 0), family.address("dense", 0)
    with pytest.raises(Stopped):
        Workshop(lab, "cpu").perform(Job(run, address, frozenset()), until_step(REWOUND))
    paused, _ = lab.checkpoint(address)
    snapshot = family.lab.weights(address).snapshots[REWOUND]
    mine, theirs = paused.tensors(), snapshot.tensors()
    assert mine.keys() == theirs.keys()
    assert any(name.startswith("optimizer/") for name in mine)
    assert all(small.is_same(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "to",
    [
        {"kind": "to-step", "step": REWOUND, "optimizer": "restored"},
        {"kind": "learning-rate", "steps": 15},
        {"kind": "continue", "steps": 15},
    ],
    ids=lambda to: to["kind"],
)
def test_rewinding_elsewhere_starts_from_there(to, lab):
    of = small.graph(num_seeds=1, arms=["dense", {"kind": "rewind", "to": to}])
    small.train(of, lab)
    workshop, (dense, first, second) = Workshop(lab, "cpu"), list(of.runs)
    for parent, child in ((dense, first), (first, second)):
        state, run = workshop.beginning(of.runs[child]), of.runs[child]
        source = lab.weights(parent)
        if to["kind"] == "to-step":
            source = lab.weights(dense).snapshots[REWOUND]
        for name, value in source.params.items():
            mask = state.masks.get(name, torch.ones_like(value, dtype=torch.bool))
            assert small.is_same(state.params[name], torch.where(mask, value, 0.0))
            for kind, tensors in state.optimizer.items():
                kept = source.optimizer[kind][name]
                is_moment = kept.shape == mask.shape
                expected = torch.where(mask, kept, 0.0) if is_moment else kept
                assert small.is_same(tensors[name], expected)
        assert bool(state.optimizer) == (to["kind"] == "to-step")
        begun, ended = run.clock
        assert (begun, ended) == {
            "to-step": (REWOUND, 60),
            "learning-rate": (45, 60),
            "continue": (60, 75),
        }[to["kind"]]
        assert [look.step for look in lab.record(child).evaluations][:: len(run.clock) - 1][
            0
        ] == begun
        assert lab.record(child).evaluations[-1].step == ended


def test_a_network_is_rewound_with_its_statistics(lab):
    rewind = {"kind": "rewind", "to": {"kind": "to-step", "step": REWOUND}}
    of = small.graph(num_seeds=1, arms=["dense", rewind], levels=1, model=normalized)
    small.train(of, lab)
    dense, child = of.runs
    snapshot = lab.weights(dense).snapshots[REWOUND]
    assert float(snapshot.buffers["2.num_batches_tracked"]) == REWOUND
    for name, value in Workshop(lab, "cpu").beginning(of.runs[child]).buffers.items():
        assert small.is_same(value, snapshot.buffers[name])


# ---- from wherever a run stands to finished ------------------------------------------------


def test_a_run_is_trained_once_and_then_reused(lab):
    job, workshop, seen = dense_job(), Workshop(lab, "cpu"), []
    assert workshop.perform(job, until_step(1000, seen)) == "trained"
    assert seen == list(range(60))
    row = small.rows(lab.folder)
    assert workshop.perform(job, until_step(0, seen)) == "reused"
    assert seen == list(range(60))
    assert small.rows(lab.folder) == row
    record = lab.record(job.address)
    assert [look.step for look in record.evaluations] == [0, 20, 40, 60]
    assert digest(record.spec) == job.run.address == job.address
    assert record.versions.keys() == {"windfall", "torch", "numpy"}
    assert record.engine == "separate/cpu"
    assert record.seconds > 0
    assert list((lab.folder / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(("asked", "engine"), [("auto", "sparse"), ("stacked", "stacked")])
def test_a_run_is_recorded_with_the_engine_that_trained_it(asked, engine, lab):
    job = dense_job(asked)
    assert Workshop(lab, "cpu").perform(job) == "trained"
    assert lab.record(job.address).engine == f"{engine}/cpu"


def test_a_replay_is_by_the_engine_of_the_stored_run(lab):
    job = dense_job("sparse")
    Workshop(lab, "cpu").perform(job)
    asked = replace(job, keep=frozenset({30}), engine="separate")
    assert Workshop(lab, "cpu").perform(asked) == "reused"  # proved equal bit for bit
    assert lab.record(job.address).engine == "sparse/cpu"


def test_a_run_that_another_process_trains_is_left_to_it(lab):
    job = dense_job()
    with Lab(lab.folder).locked(job.address):
        assert Workshop(lab, "cpu").perform(job) == "busy"
    assert lab.record(job.address) is None
    assert Workshop(lab, "cpu").perform(job) == "trained"


VARIANTS = {
    "adam": {},
    "momentum": {"recipe": {"optimizer": {"kind": "sgd", "momentum": 0.9, "nesterov": True},
                            "learning_rate": 0.05}},
    "plain steps, double precision": {"recipe": {"optimizer": "sgd", "dtype": "float64"}},
    "normalization and dropout": {"model": normalized},
    "draws of the constructor": {"model": Wired},
    "cosine, pauses off the evaluations": {
        "recipe": {"schedule": {"kind": "cosine", "warmup": 5}, "eval_every": 7}
    },
    "sparse": {"engine": "sparse"},
    "sparse, momentum": {"engine": "sparse", "recipe": {"optimizer": {"kind": "sgd",
                         "momentum": 0.9}, "learning_rate": 0.05, "eval_every": 7}},
    "a stack of one": {"engine": "stacked", "recipe": {"eval_every": 7}},
}  # fmt: skip
BURSTS = [variant for variant in VARIANTS if "engine" in VARIANTS[variant]]
PAUSES = {
    "first step": [0],
    "after an evaluation": [20],
    "before one": [19],
    "last": [59],
    "often": list(range(0, 60, 7)),
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The contents of an unbroken lab, by variant; made once."""
    known = {}

    def find(variant: str):
        if variant not in known:
            rewind = {"kind": "rewind", "to": {"kind": "to-step", "step": REWOUND}}
            settings = {"num_seeds": 1, "arms": ["dense", rewind], "levels": 1}
            of = small.graph(**settings | {"engine": "separate"} | VARIANTS[variant])
            folder = tmp_path_factory.mktemp("unbroken") / "lab"
            small.trained(of, folder).close()
            known[variant] = of, small.contents(folder)
        return known[variant]

    return find


@pytest.mark.parametrize("variant", BURSTS)
def test_pause_and_resume_is_no_pause_where_steps_come_in_bursts(variant, unbroken, lab):
    of, expected = unbroken(variant)
    for job in small.jobs(of):
        bursts = 0
        for last in range(0, 60, 3):
            with contextlib.suppress(Stopped):
                Workshop(lab, "cpu").perform(job, until_step(last))
            found = lab.checkpoint(job.address)
            bursts += found is not None and found[0].step > job.run.clock[0]
        Workshop(lab, "cpu").perform(job)
        assert bursts > 2
    assert small.contents(lab.folder) == expected


@pytest.mark.parametrize("pauses", PAUSES)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in BURSTS])
def test_pause_and_resume_is_no_pause(variant, pauses, unbroken, lab):
    of, expected = unbroken(variant)
    for job in small.jobs(of):
        for last in PAUSES[pauses]:
            if last < job.run.clock[0]:
                continue
            with pytest.raises(Stopped):
                Workshop(lab, "cpu").perform(job, until_step(last))
            assert lab.record(job.address) is None
            state, _ = lab.checkpoint(job.address)
            assert state.step == last
        seen = []
        assert Workshop(lab, "cpu").perform(job, until_step(1000, seen)) == "trained"
        assert seen[0] == max(job.run.clock[0], *PAUSES[pauses])
        assert lab.checkpoint(job.address) is None
    assert small.contents(lab.folder) == expected


class Crash(BaseException):
    """The end of a process, as far as a run in training can tell."""


@pytest.mark.parametrize(("seconds", "resumed"), [(0.0, 36), (1e9, 0)])
def test_a_crash_costs_what_was_trained_since_the_last_checkpoint(seconds, resumed, lab):
    job, seen = replace(dense_job(), checkpoint_seconds=seconds), []

    def pulse(step: int) -> bool:
        if step == 37:
            raise Crash
        return False

    with pytest.raises(Crash):
        Workshop(lab, "cpu").perform(job, pulse)
    assert Workshop(lab, "cpu").perform(job, until_step(1000, seen)) == "trained"
    assert seen[0] == resumed


def test_the_seconds_of_a_run_are_those_of_all_its_parts(lab):
    job = dense_job()
    with pytest.raises(Stopped):
        Workshop(lab, "cpu").perform(job, until_step(30))
    state, facts = lab.checkpoint(job.address)
    assert facts["seconds"] > 0
    lab.save_checkpoint(job.address, state, facts | {"seconds": 1000.0})
    Workshop(lab, "cpu").perform(job)
    assert 1000 < lab.record(job.address).seconds < 1900


@pytest.mark.parametrize(
    "other",
    [
        {"engine": "separate/cuda"},
        {"engine": "sparse/cpu"},
        {"versions": {"torch": "1", "numpy": "1", "windfall": "0"}},
    ],
    ids=["device", "engine", "versions"],
)
def test_a_checkpoint_of_another_engine_is_not_resumed(other, lab):
    job, seen = dense_job(), []
    with pytest.raises(Stopped):
        Workshop(lab, "cpu").perform(job, until_step(30))
    state, facts = lab.checkpoint(job.address)
    lab.save_checkpoint(job.address, state, facts | {"made_by": facts["made_by"] | other})
    Workshop(lab, "cpu").perform(job, until_step(1000, seen))
    assert seen[0] == 0


def test_a_checkpoint_keeps_what_an_earlier_study_wanted_kept(lab, tmp_path):
    plain, keeping = dense_job(), replace(dense_job(), keep=frozenset({30}))
    for job, last in ((keeping, 20), (plain, 40)):
        with pytest.raises(Stopped):
            Workshop(lab, "cpu").perform(job, until_step(last))
    assert Workshop(lab, "cpu").perform(keeping) == "trained"
    assert lab.record(plain.address).snapshots == [30]
    other = Lab(tmp_path / "other")
    Workshop(other, "cpu").perform(keeping)
    assert small.contents(lab.folder) == small.contents(other.folder)
    other.close()


def test_a_checkpoint_without_a_snapshot_that_is_wanted_starts_again(lab):
    plain, keeping, seen = dense_job(), replace(dense_job(), keep=frozenset({30})), []
    with pytest.raises(Stopped):
        Workshop(lab, "cpu").perform(plain, until_step(40))
    assert Workshop(lab, "cpu").perform(keeping, until_step(1000, seen)) == "trained"
    assert seen[0] == 0
    assert lab.weights(plain.address).snapshots[30].step == 30


# ---- replays -------------------------------------------------------------------------------


def clocks(lab: Lab, address: str) -> tuple[object, ...]:
    record = lab.record(address)
    return record.created, record.seconds, record.versions, record.engine


def test_a_missing_snapshot_is_added_by_a_replay(lab, tmp_path):
    job = dense_job()
    Workshop(lab, "cpu").perform(job)
    with sqlite3.connect(lab.folder / "lab.sqlite") as database:
        database.execute("UPDATE runs SET created = '2001-01-01T00:00:00+00:00', seconds = 0.125")
    before, looks = clocks(lab, job.address), lab.record(job.address).evaluations
    for keep, stored in (({30}, [30]), ({10, 50}, [10, 30, 50]), ({10}, [10, 30, 50])):
        assert Workshop(lab, "cpu").perform(replace(job, keep=frozenset(keep))) == "reused"
        assert lab.record(job.address).snapshots == stored
        assert list(lab.weights(job.address).snapshots) == stored
    assert lab.record(job.address).evaluations == looks
    assert clocks(lab, job.address) == before  # they are of the training that is stored
    other = Lab(tmp_path / "other")
    Workshop(other, "cpu").perform(replace(job, keep=frozenset({10, 30, 50})))
    assert small.contents(lab.folder) == small.contents(other.folder)
    other.close()


def test_a_replay_may_be_paused(lab):
    job, seen = dense_job(), []
    Workshop(lab, "cpu").perform(job)
    keeping = replace(job, keep=frozenset({30}))
    with pytest.raises(Stopped):
        Workshop(lab, "cpu").perform(keeping, until_step(40))
    assert lab.record(job.address).snapshots == []
    assert Workshop(lab, "cpu").perform(keeping, until_step(1000, seen)) == "reused"
    assert seen[0] == 40
    assert lab.record(job.address).snapshots == [30]


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_deleted_weights_are_made_again(damage, lab):
    of = small.graph(num_seeds=1, arms=["dense", "ticket"], levels=1)
    dense, ticket = small.jobs(of)
    workshop = Workshop(lab, "cpu")
    workshop.perform(dense)
    before, row = small.contents(lab.folder), clocks(lab, dense.address)
    path = lab.folder / "weights" / f"{dense.address}.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
        assert workshop.perform(dense) == "reused"
        with pytest.raises(SpecError, match="Delete it"):
            workshop.perform(ticket)
    path.unlink()
    assert workshop.perform(dense) == "reused"
    assert small.contents(lab.folder) == before
    assert clocks(lab, dense.address) == row
    assert workshop.perform(ticket) == "trained"


@pytest.mark.parametrize("what", ["metrics", "weights"])
def test_a_replay_that_ends_elsewhere_is_refused(what, lab):
    job = dense_job()
    Workshop(lab, "cpu").perform(job)
    record, state = lab.record(job.address), lab.weights(job.address)
    if what == "metrics":
        last = record.evaluations[-1]
        changed = replace(last, test_loss=math.nextafter(last.test_loss, 9))
        record = replace(record, evaluations=[*record.evaluations[:-1], changed])
    else:
        state.params["hidden1.weight"].view(torch.int32)[0, 0] ^= 1
    state.evaluations = record.evaluations
    lab.finish(record, state)
    before, row = small.contents(lab.folder), small.rows(lab.folder)
    with pytest.raises(RuntimeError, match="other metrics or weights than the stored"):
        Workshop(lab, "cpu").perform(replace(job, keep=frozenset({30})))
    assert small.contents(lab.folder) == before
    assert small.rows(lab.folder) == row


# ---- diverged and broken ancestors ---------------------------------------------------------

DIVERGES = {"optimizer": "sgd", "learning_rate": 1e18}  # NaN within a few steps


def test_a_diverged_run_is_a_result(lab):
    job, workshop = dense_job(**DIVERGES), Workshop(lab, "cpu")
    assert workshop.perform(job) == "trained"
    record = lab.record(job.address)
    assert record.status == "diverged"
    assert [look.step for look in record.evaluations] == [0, 20]
    assert not record.evaluations[-1].is_finite
    assert workshop.perform(job) == "reused"
    assert workshop.perform(replace(job, keep=frozenset({5, 30}))) == "reused"
    assert lab.record(job.address).snapshots == [5]  # it never came by step 30
    row, seen = small.rows(lab.folder), []
    assert workshop.perform(replace(job, keep=frozenset({5, 30})), until_step(0, seen)) == "reused"
    assert small.rows(lab.folder) == row
    assert not seen


@pytest.mark.parametrize("arm", ["ticket", "finetune", "reinit", "rewind"])
def test_a_child_of_a_diverged_run_says_so(arm, lab):
    rewind = {"kind": "rewind", "to": {"kind": "to-step", "step": 30}}
    of = small.graph(DIVERGES, num_seeds=1, arms=[rewind if arm == "rewind" else arm], levels=1)
    dense, child = small.jobs(of)
    Workshop(lab, "cpu").perform(dense)
    with pytest.raises(SpecError, match="diverged"):
        Workshop(lab, "cpu").perform(child)
    assert lab.record(child.address) is None


def test_a_ticket_that_cannot_be_proved_is_refused_by_its_tensor(lab, monkeypatch):
    dense, child = small.jobs(small.graph(num_seeds=1, arms=["finetune"], levels=1))
    workshop, real = Workshop(lab, "cpu"), masks.apply
    workshop.perform(dense)

    def careless(mask: masks.Masks, params: masks.Params) -> masks.Params:
        return real(mask, params) | {"hidden2.bias": params["hidden2.bias"] + 1e-6}

    with monkeypatch.context() as patch:
        patch.setattr(masks, "apply", careless)
        with pytest.raises(tickets.BrokenTicket, match=r"`hidden2\.bias` differ from") as broken:
            workshop.perform(child)
    assert ended(broken.value) == ("failed", f"BrokenTicket: {broken.value}")
    assert lab.record(child.address) is None
    assert workshop.perform(child) == "trained"


# ---- data ----------------------------------------------------------------------------------


def test_data_that_has_changed_is_refused(lab, tmp_path, monkeypatch):
    (tmp_path / "changing.py").write_text(
        "import torch\n"
        "shift = 0\n"
        "def data():\n"
        "    draw = torch.Generator().manual_seed(shift)\n"
        "    return torch.randn(300, 1, 4, 4, generator=draw), torch.arange(300) % 10\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    of = small.graph(num_seeds=1, data={"kind": "user-data", "callable": "changing:data"}, levels=1)
    dense, *others = small.jobs(of)
    assert Workshop(lab, "cpu").perform(dense) == "trained"
    import changing

    changing.shift = 1
    for job in others:
        with pytest.raises(SpecError, match="must be what the run was made for"):
            Workshop(lab, "cpu").perform(job)
    assert list(small.rows(lab.folder)) == [dense.address]
    changing.shift = 0
    assert Workshop(lab, "cpu").perform(others[0]) == "trained"


def test_two_splits_of_one_data_set_are_two(lab, tmp_path):
    first, second = (
        small.jobs(small.graph(num_seeds=1, arms=["dense"], levels=1, data=spec))[0]
        for spec in (data.Digits(), data.Digits(split_seed=1))
    )
    assert first.run.data_sha256 == second.run.data_sha256
    workshop = Workshop(lab, "cpu")
    workshop.perform(first), workshop.perform(second)
    other = Lab(tmp_path / "other")
    Workshop(other, "cpu").perform(second)
    mine, theirs = small.contents(lab.folder), small.contents(other.folder)
    assert mine[second.address] == theirs[second.address] != mine[first.address]
    other.close()


def test_a_worker_trains_on_tensors_that_the_lab_lends(lab, tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    given = data.tensors(torch.randn(300, 6, generator=draw), torch.arange(300) % 3)
    of = small.graph(num_seeds=1, arms=["dense"], levels=1, data=given)
    small.trained(of, tmp_path / "other").close()
    lab.keep_data(given)
    monkeypatch.setattr(data, "_HELD", {})
    small.train(of, lab)
    assert small.contents(lab.folder) == small.contents(tmp_path / "other")


def test_a_job_comes_back_from_json_with_where_its_data_lies():
    job = replace(dense_job(), keep=frozenset({3, 20}), checkpoint_seconds=1.5)
    mnist = data.Mnist(root="/elsewhere/ü", verify=False)
    for run in (
        job.run,
        job.run.model_copy(update={"data": mnist, "model": user_model(normalized)}),
    ):
        sent = json.dumps(replace(job, run=run).to_json(), allow_nan=False)
        assert Job.from_json(json.loads(sent)) == replace(job, run=run)


def test_training_leaves_the_callers_torch_as_it_was(lab):
    job, before = dense_job(), (torch.get_num_threads(), torch.get_rng_state())
    torch.set_num_threads(2)
    try:
        Workshop(lab, "cpu").perform(job)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert float(torch.tensor(1e-40) * 1) != 0  # denormals are numbers again


def test_what_ends_a_run_is_told_in_text_that_any_file_takes():
    assert ended(ValueError("odd \udcff")) == ("failed", "ValueError: odd ?")
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert ended(OSError(number, "told")) == ("full", f"OSError: [Errno {number}] told")
    assert ended(OSError(errno.EIO, "told"))[0] == "failed"
