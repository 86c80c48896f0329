"""Chains of pruning and rewinding, and children of their networks."""

import contextlib
import math

import pytest
import torch

from windfall import connectivity, courses, experiments, luck, measures, settings, tickets
from windfall import masks as masking
from windfall.arms import SHIFT
from windfall.batches import Order
from windfall.children import Stability
from windfall.data import Digits, load
from windfall.engines import separate
from windfall.engines.contract import Task
from windfall.levels import Chain
from windfall.luck import LaboratoryStudy
from windfall.measures import Readings
from windfall.spec import SpecError, checked
from windfall.store import Lab
from windfall.train import Recipe, State

FEW = {
    "model": {"kind": "mlp", "hidden": [16, 8]},
    "recipe": {"optimizer": "adam", "learning_rate": 5e-3, "steps": 40, "batch_size": 32,
               "eval_every": 40},
    "prune": {"selection": {"kind": "layerwise", "hidden": 0.5, "output": 0.2}},
    "engine": "separate",
}  # fmt: skip
NARROW = {
    "model": {"kind": "resnet-20", "width": 0.125},
    "recipe": {"steps": 4, "batch_size": 16, "eval_every": 4},
    "prune": {"selection": {"kind": "global", "rate": 0.3}},
    "engine": "separate",
}


def stability(mask="ticket", level=2, step=10, **changes):
    few = FEW | {"num_points": 5, "num_inputs": 100} | changes
    return checked(lambda: Stability(mask=mask, level=level, rewind={"step": step}, **few))


def chain(level=0, step=10, **changes):
    return checked(lambda: Chain(level=level, rewind={"step": step}, **FEW | changes))


def grown(experiment, seed=0):
    """What an experiment read, and all that it begins from."""
    parent = experiments.parent(experiment)
    before = grown(parent, seed) if parent else None
    return experiments.run(experiment, seed, grown=before)


def state(found, steps=40):
    return State.restored(found.kept, {"step": steps, "diverged": False, "evaluations": []})


def of_order(seed, data, num):
    return Order(seed, len(data.train), num).batch(0)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- chains -----------------------------------------------------------------------------------


def test_level_0_is_the_dense_network_and_keeps_step_k():
    found = grown(chain())
    data, of = load(Digits()), chain()
    recipe = Recipe(**FEW["recipe"])
    begun = of._initial(0)
    ended = separate.train(Task(of._network(0), data, recipe, 0, 40, frozenset({10})), begun)
    kept = state(found)
    assert same(kept.params, ended.params)
    assert same(kept.snapshots[10].params, ended.snapshots[10].params)
    assert measures.measured(found, "accuracy") == ended.evaluations[-1].test_accuracy
    assert measures.measured(found, "dense-accuracy") == ended.evaluations[-1].test_accuracy
    assert measures.measured(found, "density") == 1
    assert list(found.values) == chain().metrics()


def test_a_level_keeps_the_largest_weights_and_returns_them_to_step_k():
    dense, found, of = grown(chain()), grown(chain(1)), chain(1)
    before, after = state(dense), state(found)
    for name, share in (("hidden1.weight", 0.5), ("output.weight", 0.8)):
        size = before.params[name].numel()
        largest = before.params[name].abs().flatten().topk(round(size * share)).indices
        expected = torch.zeros(size, dtype=torch.bool).index_fill(0, largest, True)
        assert torch.equal(after.masks[name].flatten(), expected)
        assert not bool(after.params[name][~after.masks[name]].any())
    start = before.snapshots[10].copy()
    start.params = masking.apply(after.masks, start.params)
    start.step, start.masks, start.optimizer = 10, after.masks, {}
    task = Task(of._network(0), load(Digits()), Recipe(**FEW["recipe"]), 0, 40)
    assert same(after.params, separate.train(task, start).params)
    assert same(after.snapshots[10].params, before.snapshots[10].params)
    assert same(after.snapshots[40].params, before.params)


def test_levels_are_nested_and_remember_the_dense_network():
    first, second = grown(chain(1)), grown(chain(2))
    assert not masking.escaped(state(second).masks, state(first).masks)
    assert measures.measured(second, "dense-accuracy") == measures.measured(
        grown(chain()), "accuracy"
    )
    assert same(state(second).snapshots[40].params, state(grown(chain())).params)


def test_a_stopped_level_goes_on_bit_for_bit():
    before, states = grown(chain()), {}
    whole = chain(1).run(0, before, pulse=lambda step, now: states.update({step: now()}))
    held = states[40 + 7]  # the dense network's steps, and seven more
    assert held.step == 10 + 7
    resumed = experiments.restored(chain(1), held.tensors(), held.facts())
    again = chain(1).run(0, before, resumed)
    assert same(again.kept, whole.kept)
    assert same(again.values, whole.values)


# -- children ---------------------------------------------------------------------------------


def children(of, seed=0):
    """Both children of a seed, trained here: their start, and their ends."""
    before = state(grown(experiments.parent(of), seed))
    start = of._start(before, seed)
    data, recipe = load(Digits()), of.recipe
    return start, [
        separate.train(Task(of._network(seed), data, recipe, order, recipe.steps), start)
        for order in (seed, SHIFT + seed)
    ]


@pytest.mark.parametrize(("mask", "level"), [("dense", 0), ("ticket", 2), ("random", 2)])
def test_readings_are_those_of_two_children(mask, level):
    of = stability(mask, level)
    found, (start, ends) = grown(of), children(of)
    first, second = (end.params for end in ends)
    read = {name: measures.measured(found, name) for name in found.values}
    assert set(of.metrics()) <= set(read)
    assert read["distance"] == pytest.approx(connectivity.distance(first, second))
    assert read["angle"] == pytest.approx(connectivity.angle(start.params, first, second))
    went = [connectivity.distance(start.params, end) for end in (first, second)]
    assert read["relative-distance"] == pytest.approx(read["distance"] / (sum(went) / 2))
    data = load(Digits())
    inputs, labels = data.prepare(data.test.inputs, torch.float32), data.test.labels
    line = connectivity.between(
        of._network(0), first, second, inputs[:100], labels[:100], num_points=5
    )
    assert read["barrier"] == line.barrier
    assert read["loss-barrier"] == line.loss_barrier
    assert read["stable"] == float(line.is_stable)
    on_line = [read[f"error/{share:.2f}"] for share in (0, 0.25, 0.5, 0.75, 1)]
    assert on_line == line.errors.tolist()
    each = [end.evaluations[-1].test_accuracy for end in ends]
    assert read["accuracy"] == pytest.approx(sum(each) / 2)
    assert read["dense-accuracy"] == measures.measured(grown(chain()), "accuracy")
    assert ("matching" in read) == (level > 0)


def test_a_ticket_is_the_chains_next_level():
    of = stability("ticket", 2)
    _, ends = children(of)
    assert same(ends[0].params, state(grown(chain(2))).params)
    assert experiments.parent(of) == chain(1)
    assert experiments.parent(stability("dense", 0)) == chain(0)


def test_a_random_mask_has_the_tickets_counts_at_other_places():
    before = state(grown(chain(1)))
    ticket, random = (stability(mask)._start(before, 0) for mask in ("ticket", "random"))
    assert masking.kept(ticket.masks) == masking.kept(random.masks)
    assert masking.escaped(random.masks, before.masks)
    source = before.snapshots[10]
    for found in (ticket, random):
        tickets.prove(found, source)
        assert found.step == 10
    other = stability("random")._start(state(grown(chain(1), 1)), 1)
    assert not torch.equal(other.masks["hidden1.weight"], random.masks["hidden1.weight"])


def test_the_distance_by_pruning_is_from_the_dense_end():
    of, dense = stability("ticket", 2), state(grown(chain()))
    _, ends = children(of)
    pruned = masking.apply(ends[0].masks, dense.params)
    expected = connectivity.distance(pruned, ends[0].params)
    assert measures.measured(grown(of), "pruning-distance") == pytest.approx(expected)


@pytest.mark.parametrize(("margin", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_matching_is_within_the_margin(margin, expected):
    of = stability("random", 4, margin=margin)
    found = grown(of)
    assert measures.measured(found, "accuracy") < measures.measured(found, "dense-accuracy")
    assert measures.measured(found, "matching") == expected


@pytest.mark.parametrize("step", [40 + 30 + 3, 40 + 30 + 30 + 3])
def test_stopped_children_go_on_bit_for_bit(step):
    of, states = stability(), {}
    before = grown(experiments.parent(of))
    whole = of.run(0, before, pulse=lambda step, now: states.update({step: now()}))
    held = states[step]
    resumed = experiments.restored(of, held.tensors(), held.facts())
    assert same(of.run(0, before, resumed).values, whole.values)
    assert min(states) == 40 + 30
    assert max(states) == experiments.num_steps(of) - 1


def test_children_of_a_network_with_batch_norm_have_statistics_of_their_own():
    of = checked(lambda: Stability(level=1, num_points=3, num_inputs=50, **NARROW))
    found = grown(of)
    assert 0 <= measures.measured(found, "barrier") <= 1
    assert measures.measured(found, "density") == pytest.approx(0.7, abs=0.01)
    seen, data = of._training(0), load(Digits())
    first = data.train.inputs[torch.from_numpy(of_order(0, data, 16))]
    assert seen.shape == (1000, 1, 8, 8)
    assert torch.equal(seen[:16], data.prepare(first, torch.float32))


def test_children_that_diverge_tell_by_chance():
    recipe = FEW["recipe"] | {"optimizer": "sgd", "learning_rate": 0.1}
    of = stability("dense", 0, recipe=recipe)
    before = grown(experiments.parent(of))
    wild = of.model_copy(update={"recipe": of.recipe.model_copy(update={"learning_rate": 1e30})})
    found = wild.run(0, before)
    assert found.diverged
    for name, value in {"barrier": 0.9, "stable": 0, "accuracy": 0.1, "disagreement": 0.9}.items():
        assert measures.measured(found, name) == pytest.approx(value)
    assert math.isnan(measures.measured(found, "distance"))


def test_what_diverged_is_not_pruned():
    recipe = FEW["recipe"] | {"optimizer": "sgd", "learning_rate": 1e30}
    dense = grown(chain(recipe=recipe))
    assert dense.diverged
    assert measures.measured(dense, "accuracy") == pytest.approx(0.1)
    with pytest.raises(SpecError, match=r"`recipe\.learning_rate` must be one that the network"):
        chain(1, recipe=recipe).run(0, dense)


# -- the family -------------------------------------------------------------------------------


def test_costs_are_those_of_all_trainings():
    uses = {"hidden1.weight": 1024, "hidden2.weight": 128, "output.weight": 80}
    level = [sum(uses.values())]
    level += [(1024 + 128) * 0.5**each + 80 * 0.8**each for each in (1, 2)]
    kept = [level[0], 512 + 64 + 64, 256 + 32 + 51]  # counts are whole
    assert level[2] == pytest.approx(kept[2], abs=1)
    of = stability()
    assert experiments.num_steps(of) == 40 + 30 + 2 * 30
    total = 40 * kept[0] + 30 * kept[1] + 60 * kept[2]
    assert experiments.num_macs(of) == round(total / 130)
    assert experiments.num_steps(chain(2)) == 40 + 30 + 30
    assert experiments.trial(of) == chain(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stability(step=40), r"`rewind\.step` must be less than .*, 40; got 40"),
        (lambda: stability("dense", 2), "`level` must be 0 for `mask` dense; got 2 and dense"),
        (lambda: stability("ticket", 0), "`level` must be at least 1 for a mask; got 0 and ticket"),
        (lambda: stability("other"), "`mask` must be 'dense', 'ticket' or 'random'"),
        (lambda: stability(num_points=1), "`num_points` must be greater than or equal to 2"),
        (
            lambda: stability(prune={"structure": "channels", "criterion": "filter-norm"}),
            r"`prune\.structure` must be weights, which have masks; got channels",
        ),
        (lambda: stability(level=20).check(), "must leave every layer at least one weight"),
        (
            lambda: stability(recipe=FEW["recipe"] | {"penalty": "scale-penalty"}),
            r"`recipe\.penalty` must be left out",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_trained(make, message):
    with pytest.raises(SpecError, match=message):
        make()


def test_the_engine_is_not_part_of_the_address():
    assert stability(engine="sparse").address == stability().address
    assert stability(margin=0.1).parent().address == stability().parent().address


@pytest.mark.parametrize(
    "name", ["stability", "stability-mnist", "rewinding", "rewinding-cifar10"]
)  # fmt: skip
def test_bundled_studies_are_whole(name):
    found = settings.load(name)
    assert found.name == name
    assert len(found.places()) == len(found.arms) * found.num_seeds
    if "-" not in name:
        for experiment in found.experiments().values():
            experiments.check(experiment)


# -- in a lab ---------------------------------------------------------------------------------


def test_arms_share_their_chain_and_readings_come_back_from_files(tmp_path):
    with contextlib.closing(Lab(tmp_path / "lab")) as lab:
        for mask in ("ticket", "random"):
            assert courses.train(lab, stability(mask), 0)
        for level in (0, 1):
            assert courses.is_stored(lab, luck.address(chain(level), 0))
        assert not courses.is_stored(lab, luck.address(chain(2), 0))
        kept, _ = courses.stored(lab, luck.address(chain(1), 0))
        assert isinstance(kept, Readings)
        assert same(kept.kept, grown(chain(1)).kept)
        found, _ = courses.stored(lab, luck.address(stability("random"), 0))
        assert same(found.values, grown(stability("random")).values)
        assert found.kept == {}


@pytest.mark.slow
def test_workers_are_told_what_an_address_leaves_out(tmp_path):
    gated = NARROW | {"model": {"kind": "resnet-20", "width": 0.125, "gates": True}}
    of = checked(lambda: Chain(**gated | {"engine": "sparse"}))  # which knows no gates
    name = luck.address(of, 0)
    with contextlib.closing(Lab(tmp_path / "lab")) as lab:
        _, failures = courses.execute(lab, {name: (of, 0)}, workers=1, watch=lambda _: None)
    assert failures[name].startswith("Unsupported")
    with pytest.raises(SpecError, match="sparse cannot"):
        of.check()


def test_a_study_tells_whether_matching_is_stable():
    from windfall import exhibit

    of = checked(
        lambda: LaboratoryStudy(
            num_seeds=2,
            experiment=stability(),
            arms={"ticket": {}, "random": {"mask": "random"}},
            contrasts=({"effect": "b", "arm": "ticket", "against": "random", "metric": "barrier"},),
        )
    )
    found = {
        luck.address(experiment, seed): (
            grown(experiment, seed),
            {"seconds": 1.0, "versions": {"windfall": "0"}},
        )
        for experiment in of.experiments().values()
        for seed in range(2)
    }
    told = exhibit.document(of, found, {}, "0" * 64)
    assert told["answer"][-1].startswith("Is matching the same as stable? Of 4 pruned networks")
    metrics = {row["metric"] for row in told["arms"]}
    assert {"barrier", "matching", "error/0.00", "error/1.00"} <= metrics
