"""Signals along a training, beside what is measured of the same networks by hand."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from test_children import FEW, NARROW, grown
from torch import nn

from windfall import (
    connectivity,
    courses,
    exhibit,
    experiments,
    gallery,
    measures,
    settings,
    signals,
)
from windfall import masks as masking
from windfall import transmission as own
from windfall.data import Digits, load
from windfall.engines import separate
from windfall.engines.contract import Task
from windfall.levels import Chain
from windfall.luck import LaboratoryStudy
from windfall.measures import Readings
from windfall.spec import SpecError, checked
from windfall.store import Lab
from windfall.train import State
from windfall.transmission import Transmission

WILD = {"optimizer": "sgd", "learning_rate": 1e30}


def transmission(mask="ticket", level=2, step=10, **changes):
    few = FEW | {"moments": [0, 0.1, 0.5], "num_inputs": 60} | changes
    return checked(lambda: Transmission(mask=mask, level=level, rewind={"step": step}, **few))


def start(of, seed=0):
    found = grown(of.parent(), seed)
    facts = {"step": of.recipe.steps, "diverged": False, "evaluations": []}
    return of._start(State.restored(found.kept, facts), seed)


def ended(of, steps, seed=0):
    """The states of a training at some of its steps, made here."""
    task = Task(of._network(seed), load(Digits()), of.recipe, seed, of.recipe.steps, {*steps})
    found = separate.train(task, start(of, seed))
    return found.snapshots | {found.step: found}


def at(found, place):
    return {name: float(values[place]) for name, values in found.values.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "level"), [("dense", 0), ("ticket", 2), ("random", 2)])
def test_readings_are_those_of_the_training_moment_by_moment(mask, level):
    of, data = transmission(mask, level), load(Digits())
    found = grown(of)
    assert found.steps.tolist() == [10, 13, 25, 40]
    assert set(of.metrics()) == {
        *(name for name in found.values if "/" not in name),
        *(f"{name}@start" for name in own.UNITS),
    }
    inputs = data.prepare(data.validation.inputs[:60], torch.float32)
    test = data.prepare(data.test.inputs, torch.float32)
    for place, (step, state) in enumerate(ended(of, [10, 13, 25]).items()):
        assert found.steps[place] == step
        network = of._network(0)
        outputs = connectivity.outputs(network, state.params, test)
        by_hand = signals.measured(
            network, inputs, data.validation.labels[:60], tensors=state.params, num_jacobians=8
        )
        expected = own.summary(by_hand) | {
            "accuracy": float((outputs.argmax(1) == data.test.labels).double().mean()),
            "dense-accuracy": measures.measured(grown(Chain(**FEW)), "accuracy"),
            "density": masking.density(state.masks) if level else 1.0,
        }
        assert at(found, place) == pytest.approx(expected)


def test_signals_are_those_of_a_plain_pass():
    of, data = transmission(), load(Digits())
    state, network = start(of), of._network(0)
    for name, param in network.named_parameters():
        param.data = state.params[name]
    x = data.prepare(data.validation.inputs[:60], torch.float32).requires_grad_()
    first = network.hidden1(x.flatten(1))
    low = F.relu(first)
    high = F.relu(network.hidden2(low))
    outputs = network.output(high)
    loss = F.cross_entropy(outputs, data.validation.labels[:60], reduction="sum")
    down, up = torch.autograd.grad(loss, [first, outputs], retain_graph=True)
    rows = [torch.autograd.grad(outputs[i, j], x, retain_graph=True)[0][i].flatten()
            for i in range(8) for j in range(10)]  # fmt: skip
    x, low, high, loss = x.detach(), low.detach(), high.detach(), float(loss.detach())
    found, lengths = at(grown(of), 0), x.flatten(1).norm(dim=1)

    def log_mean(values):
        return pytest.approx(math.log10(float(values.mean())), abs=1e-5)

    assert found["forward"] == log_mean(high.norm(dim=1) / lengths)
    assert found["forward/hidden1_relu"] == log_mean(low.norm(dim=1) / lengths)
    assert found["forward/hidden2_relu"] == found["forward"]
    assert found["backward"] == log_mean(down.norm(dim=1) / up.norm(dim=1))
    top = torch.linalg.svdvals(torch.stack(rows).reshape(8, 10, -1))[:, 0]
    assert found["jacobian"] == log_mean(top)
    shares = [float((~(each > 0).any(0)).double().mean()) for each in (low, high)]
    assert [found["dead/hidden1_relu"], found["dead/hidden2_relu"]] == pytest.approx(shares)
    assert found["dead"] == pytest.approx(sum(shares) / 2)
    assert found["loss"] == pytest.approx(loss / 60, rel=1e-5)
    live = high[high.norm(dim=1) > 0]
    cosines = F.cosine_similarity(live[:, None], live[None], dim=2)
    pairs = cosines[~torch.eye(len(live), dtype=torch.bool)]
    assert found["correlation"] == pytest.approx(float(pairs.mean()), abs=1e-5)


def test_the_dense_network_from_its_initial_weights_ends_as_it_did():
    of = transmission("dense", 0, step=0)
    found = grown(of)
    assert found.steps.tolist() == [0, 4, 20, 40]
    assert measures.measured(found, "accuracy") == measures.measured(found, "dense-accuracy")
    assert measures.measured(found, "density") == 1


def test_a_random_mask_has_as_many_weights_in_every_layer():
    ticket, random = (start(transmission(mask)) for mask in ("ticket", "random"))
    assert masking.kept(ticket.masks) == masking.kept(random.masks)
    assert masking.escaped(random.masks, ticket.masks)
    read = {mask: grown(transmission(mask)) for mask in ("ticket", "random")}
    for found in read.values():
        assert measures.measured(found, "density") == masking.density(ticket.masks)
    assert not torch.equal(read["ticket"].values["forward"], read["random"].values["forward"])


@pytest.mark.parametrize(
    ("moments", "step", "expected"),
    [((), 0, [0, 40]), ((1.0,), 30, [30, 40]), ((0.5, 0.1, 0.1), 20, [20, 22, 30, 40])],
)
def test_the_start_and_the_end_are_always_moments(moments, step, expected):
    assert transmission(step=step, moments=moments)._read_at() == expected


def test_a_stopped_training_goes_on_bit_for_bit():
    of, states = transmission(), {}
    before = grown(of.parent())
    whole = of.run(0, before, pulse=lambda step, now: states.update({step: now()}))
    assert min(states) == 40 + 30
    assert max(states) == experiments.num_steps(of) - 1
    for step in (40 + 30 + 1, 40 + 30 + 17):
        held = states[step]
        resumed = experiments.restored(of, held.tensors(), held.facts())
        again = of.run(0, before, resumed)
        assert torch.equal(again.steps, whole.steps)
        assert same(again.values, whole.values)


def test_a_network_with_batch_norm_is_read_at_its_start_by_the_inputs_statistics():
    of = checked(lambda: Transmission(level=1, num_inputs=20, moments=(0.5,), **NARROW))
    experiments.check(of)
    found = grown(of)
    assert found.steps.tolist() == [0, 2, 4]
    assert all(bool(values.isfinite().all()) for values in found.values.values())
    assert measures.measured(found, "density") == pytest.approx(0.7, abs=0.01)
    depth = sum(name.startswith("forward/") for name in found.values)
    assert depth == sum(name.startswith("dead/") for name in found.values) == 19
    data, state = load(Digits()), start(of)
    inputs = data.prepare(data.validation.inputs[:20], torch.float32)
    by_hand = signals.measured(
        of._network(0),
        inputs,
        data.validation.labels[:20],
        tensors=state.params | state.buffers,
        num_jacobians=8,
    )
    expected = own.summary(by_hand)
    assert {name: at(found, 0)[name] for name in expected} == pytest.approx(expected)


# -- what is not finite, or is not there ------------------------------------------------------


def test_what_diverges_is_as_good_as_chance_and_keeps_its_finite_moments():
    of = transmission("dense", 0)
    before = grown(of.parent())
    wild = of.model_copy(update={"recipe": of.recipe.model_copy(update={"learning_rate": 1e30})})
    found = wild.run(0, before)
    assert found.diverged
    assert found.steps[0] == 10
    for name in of.metrics():
        assert math.isfinite(measures.measured(found, name))
    assert measures.measured(found, "accuracy") == pytest.approx(0.1)
    tame = of.run(0, before)
    assert measures.measured(found, "forward") == measures.measured(tame, "forward@start")


def test_what_the_parent_lost_is_refused():
    of = transmission(recipe=FEW["recipe"] | WILD)
    with pytest.raises(SpecError, match=r"`recipe\.learning_rate` must be one that the network"):
        of.run(0, grown(Chain(rewind={"step": 10}, **FEW | {"recipe": FEW["recipe"] | WILD})))


def net(*scales, act=nn.ReLU):
    """Identities of 3 units times a number each, an activation between them."""
    layers = []
    for scale in scales:
        layers += [nn.Linear(3, 3, bias=False), act()]
        layers[-2].weight.data = scale * torch.eye(3, dtype=torch.float32)
    return nn.Sequential(*layers[:-1])


def summary(network):
    inputs = torch.tensor([[1.0, 2, 2], [2, 1, 2], [4, 3, 0.5]])
    return own.summary(signals.measured(network, inputs, torch.tensor([0, 1, 2])))


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ((10.0, 0.1), {"forward": 1, "jacobian": 0, "backward": -1, "dead": 0, "always-on": 1}),
        ((-1.0, 1.0), {"forward": -45, "jacobian": -45, "backward": -45, "dead": 1, "rank": 0}),
        ((1e30, 1e30, 1e-30), {"forward": 38.5, "jacobian": 38.5, "loss": 10**38.5}),
        ((1e-30, 1e30, 1e30, 1e-30), {"forward": 30}),
    ],
)
def test_what_cannot_be_told_in_a_float_ends_where_float32_does(scales, expected):
    found = summary(net(*scales))
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert not any(math.isinf(value) for value in found.values())
    assert math.isnan(found["correlation"]) == (found["forward"] in (-45, 38.5))


def test_shares_of_units_are_of_relus_alone():
    found = summary(net(1.0, 1.0, act=nn.Tanh))
    assert math.isnan(found["dead"])
    assert math.isnan(found["dead/1"])
    assert math.isfinite(found["forward"])


def test_ratios_are_over_what_is_not_0():
    given = torch.tensor([[0.0, 0, 0], [3, 4, 0]])
    found = own.summary(signals.measured(net(10.0, 1.0), given, torch.tensor([0, 1])))
    assert found["forward"] == pytest.approx(1)
    found = own.summary(signals.measured(net(10.0, 1.0), given[:1], torch.tensor([0])))
    assert math.isnan(found["forward"])


# -- the family -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transmission("dense", 2), "`level` must be 0 for `mask` dense; got 2 and dense"),
        (lambda: transmission("ticket", 0), "`level` must be at least 1 for a mask; got 0"),
        (lambda: transmission(step=40), r"`rewind\.step` must be less than .*, 40; got 40"),
        (lambda: transmission(moments=[1.5]), "`moments.* must be less than or equal to 1"),
        (lambda: transmission(num_inputs=0), "`num_inputs` must be greater than 0"),
        (lambda: transmission(level=20).check(), "must leave every layer at least one weight"),
        (
            lambda: transmission(model={"kind": "mlp", "hidden": []}).check(),
            "`model` must have an activation before its last layer",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(make, message):
    with pytest.raises(SpecError, match=message):
        make()


def test_costs_are_those_of_one_child_and_its_chain():
    of = transmission()
    uses = [1024 + 128 + 80, 512 + 64 + 64, 256 + 32 + 51]
    assert experiments.num_steps(of) == 40 + 30 + 30
    total = 40 * uses[0] + 30 * uses[1] + 30 * uses[2]
    assert experiments.num_macs(of) == round(total / 100)
    assert experiments.trial(of) == Chain(rewind={"step": 10}, **FEW)
    assert experiments.parent(of) == Chain(level=1, rewind={"step": 10}, **FEW)


def test_a_start_is_the_first_reading_unless_one_has_its_whole_name():
    series = {"a": torch.tensor([1.0, 2, 3]), "b": torch.tensor([4.0, 5, 6])}
    series["b@start"] = torch.tensor([7.0, 8, 9])
    found, lost = (Readings(torch.arange(3), series, diverged=each) for each in (False, True))
    assert measures.measured(found, "a") == 3
    assert measures.measured(found, "a@start") == 1
    assert measures.measured(found, "b@start") == 9
    assert measures.measured(lost, "a") == measures.measured(lost, "a@start") == 1
    with pytest.raises(KeyError):
        measures.measured(found, "a@0.5")


def test_the_bundled_study_is_whole():
    found = settings.load("signals")
    assert len(found.places()) == len(found.arms) * found.num_seeds == 90
    for experiment in found.experiments().values():
        experiments.check(experiment)
    stability = settings.load("stability").experiments()["ticket"]
    assert stability._chain(7) == found.experiments()["ticket-8"].parent()


def test_a_page_tells_units_and_draws_what_moves(tmp_path):
    arms = {
        "dense": {"mask": "dense", "level": 0},
        "ticket": {},
        "random": {"mask": "random"},
    }
    contrast = {"effect": "f", "arm": "ticket", "against": "random", "metric": "forward@start"}
    of = checked(
        lambda: LaboratoryStudy(
            num_seeds=2, experiment=transmission(), arms=arms, contrasts=(contrast,)
        )
    )
    with contextlib.closing(Lab(tmp_path / "lab")) as lab:
        for arm, seed in of.places():
            assert courses.train(lab, of.experiments()[arm], seed)
        found = courses.read(lab, of.places().values())
    document = exhibit.document(of, found, {}, "0" * 64)
    assert document["verdicts"][0]["difference"] is not None
    told = [line for line in document["answer"] if line.startswith("forward@start: ")]
    assert "within arms" in told[0]
    document |= {"created": "", "runs": {"total": 6, "trained": 6, "reused": 0, "diverged": 0}}
    html = gallery.render(document, of, found)
    assert 'forward@start<br><small class="quiet">log10 |h| / |x|</small>' in html
    drawn = html.partition('id="figure-readings"')[2].partition("</figure>")[0]
    for word in ("log10 of singular value", "forward/hidden1_relu", "correlation"):
        assert word in drawn
    assert ">density<" not in drawn
