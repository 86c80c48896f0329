"""Sparsity training: penalties on scales and gates, and filters set to 0 again and again."""

import math
from dataclasses import replace

import numpy as np
import pytest
import small
import torch
from torch.nn import functional as F

from windfall import models, spec
from windfall.data import Digits, load
from windfall.engines import rule, separate, sparse, stacked
from windfall.engines.contract import Task, Unsupported
from windfall.initialize import GlorotNormal, initial_parameters
from windfall.sparsity import GatePenalty, ScalePenalty, SoftPruning
from windfall.spec import SpecError
from windfall.train import Constant, Recipe, Sgd, State, StepDrops

SHAPE = (1, 8, 8)
NETWORK = {"kind": "resnet-20", "width": 0.125}
PENALTY = {"kind": "scale-penalty", "strength": 0.01}
SLIM = {"criterion": "normalization-scale", "selection": {"kind": "global", "rate": 0.4},
        "structure": "channels"}  # fmt: skip


def build():
    return models.Resnet_20(width=0.125).build(SHAPE, 10)


def graph(engine="auto", **recipe):
    short = {"steps": 6, "eval_every": 3, "penalty": PENALTY} | recipe
    return small.graph(short, model=NETWORK, num_seeds=1, levels=1, prune=SLIM, engine=engine)


def task(penalty, steps=3):
    recipe = Recipe(
        optimizer=Sgd(momentum=0.9), learning_rate=0.1, steps=steps, batch_size=16, eval_every=10,
        dtype="float64", penalty=penalty,
    )  # fmt: skip
    return Task(build(), load(Digits()), recipe, 0, steps)


def beginning():
    params, buffers = initial_parameters(build, GlorotNormal(), 0)
    double = {n: b.double() if b.is_floating_point() else b for n, b in buffers.items()}
    return State(0, {name: param.double() for name, param in params.items()}, double)


@pytest.mark.slow
def test_its_gradient_is_that_of_the_loss_with_the_penalty_beside_it():
    """The twin differentiates loss + strength · sum |gamma|, and steps by hand."""
    strength, job = 0.05, task(ScalePenalty(strength=0.05))
    found = separate.train(job, beginning())
    network = build().double().train()
    state = beginning()
    network.load_state_dict(state.params | state.buffers)
    moments = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    scales = [name for name in moments if "norm" in name and name.endswith("weight")]
    assert len(scales) == 21
    for step in range(3):
        index = torch.from_numpy(job.order.batch(step))
        inputs = job.data.prepare(job.data.train.inputs[index], torch.float64)
        loss = F.cross_entropy(network(inputs), job.data.train.labels[index])
        params = dict(network.named_parameters())
        loss = loss + strength * sum(params[name].abs().sum() for name in scales)
        slopes = torch.autograd.grad(loss, list(params.values()))
        with torch.no_grad():
            for (name, param), slope in zip(params.items(), slopes, strict=True):
                moments[name].mul_(0.9).add_(slope)
                param.sub_(0.1 * moments[name])
    for name, param in network.named_parameters():
        torch.testing.assert_close(found.params[name], param.detach(), rtol=1e-10, atol=1e-12)


def test_it_makes_scales_smaller():
    ends = [separate.train(task(p, 40), beginning()) for p in (None, ScalePenalty(strength=0.01))]
    sizes = [
        sum(float(p.abs().sum()) for n, p in end.params.items() if "norm" in n and "weight" in n)
        for end in ends
    ]
    assert sizes[1] < 0.95 * sizes[0]


def test_only_the_dense_run_is_trained_with_it():
    of = graph()
    penalties = {node.arm: of.runs[node.address].recipe.penalty for node in of.nodes}
    assert penalties == {
        "dense": ScalePenalty(strength=0.01), "ticket": None, "reinit": None, "finetune": None
    }  # fmt: skip


@pytest.mark.slow
def test_a_study_of_network_slimming_runs(tmp_path):
    of = graph()
    lab = small.trained(of, tmp_path / "lab")
    engines = {lab.record(node.address).engine for node in of.nodes}
    assert engines == {"separate/cpu"}
    lab.close()


def test_an_engine_asked_for_trains_what_is_pruned(tmp_path):
    of = graph("sparse")
    lab = small.trained(of, tmp_path / "lab")
    engines = {node.level: lab.record(node.address).engine for node in of.nodes}
    assert engines == {0: "separate/cpu", 1: "sparse/cpu"}
    lab.close()


def test_without_it_addresses_are_as_before():
    assert "penalty" not in Recipe().to_json()
    assert Recipe(penalty=ScalePenalty()).address != Recipe().address


@pytest.mark.parametrize(
    ("name", "value"),
    [("penalty", ScalePenalty()), ("penalty", GatePenalty()), ("rhythm", SoftPruning())],
    ids=str,
)
def test_other_engines_refuse_it(name, value):
    recipe = Recipe(**{name: value})
    job = Task(build(), load(Digits()), recipe, 0, 3)
    message = rf"`engine` must be separate or auto where `recipe\.{name}` is set; got"
    for one in (
        lambda: sparse.train(job, beginning()),
        lambda: stacked.train([job], [beginning()]),
    ):
        with pytest.raises(Unsupported, match=message):
            one()
    alone = rule.Choice("separate", f"`recipe.{name}` is known to `separate` alone.")
    for asked in ("auto", "sparse", "stacked"):
        assert rule.choose(asked, build(), SHAPE, 0.1, "cpu", recipe) == alone


def test_a_network_without_normalization_is_refused_before_anything_is_trained():
    with pytest.raises(SpecError, match=r"`recipe\.penalty` scale-penalty must be used with a"):
        small.graph({"penalty": PENALTY})


def test_an_impossible_strength_is_refused():
    with pytest.raises(ValueError, match="greater than 0"):
        ScalePenalty(strength=0)


# -- gates -----------------------------------------------------------------------------------------

GATED = {"kind": "resnet-20", "width": 0.125, "gates": True}
BY_GATES = {"criterion": "gate", "selection": "positive", "structure": "blocks"}
MOMENTUM = {"kind": "sgd", "momentum": 0.5, "weight_decay": 0.01}


def gated_task(penalty, steps=6, momentum=0.9):
    recipe = Recipe(
        optimizer=Sgd(momentum=momentum, weight_decay=0.01), learning_rate=0.05, steps=steps,
        schedule=StepDrops(at=(4,)), batch_size=16, eval_every=2, dtype="float64", penalty=penalty,
    )  # fmt: skip
    return Task(gated(), load(Digits()), recipe, 0, steps)


def gated():
    return models.Resnet_20(width=0.125, gates=True).build(SHAPE, 10)


def begun(make):
    params, buffers = initial_parameters(make, GlorotNormal(), 0)
    double = {n: b.double() if b.is_floating_point() else b for n, b in buffers.items()}
    return State(0, {name: param.double() for name, param in params.items()}, double)


def gates_of(params):
    return {name: param for name, param in params.items() if name.endswith("gate.weight")}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gates_make_accelerated_proximal_gradient_steps(momentum):
    """The twin writes the formula for each gate in Python floats, and SGD for all else."""
    strength, job = 3.0, gated_task(GatePenalty(strength=3.0), momentum=momentum)
    found = separate.train(job, begun(gated))
    network, state = gated().double().train(), begun(gated)
    network.load_state_dict(state.params | state.buffers)
    moments = {name: torch.zeros_like(param) for name, param in network.named_parameters()}
    speeds = dict.fromkeys(gates_of(moments), 0.0)
    for step in range(6):
        rate = 0.05 if step < 4 else 0.005
        index = torch.from_numpy(job.order.batch(step))
        inputs = job.data.prepare(job.data.train.inputs[index], torch.float64)
        loss = F.cross_entropy(network(inputs), job.data.train.labels[index])
        params = dict(network.named_parameters())
        slopes = torch.autograd.grad(loss, list(params.values()))
        with torch.no_grad():
            for (name, param), slope in zip(params.items(), slopes, strict=True):
                if name in speeds:
                    ahead = float(param) - rate * float(slope) + momentum * speeds[name]
                    new = math.copysign(max(abs(ahead) - rate * strength, 0.0), ahead)
                    speeds[name] = new - float(param)
                    param.fill_(new)
                else:
                    moments[name].mul_(momentum).add_(slope + 0.01 * param)
                    param.sub_(rate * moments[name])
    for name, param in network.named_parameters():
        torch.testing.assert_close(found.params[name], param.detach(), rtol=1e-9, atol=1e-11)
    told = {name: float(value) for name, value in found.optimizer["velocity"].items()}
    assert told == pytest.approx(speeds, rel=1e-9, abs=1e-11)
    assert not set(speeds) & set(found.optimizer.get("momentum_buffer", {}))


def test_gates_become_exactly_0_and_some_do_not():
    job = gated_task(GatePenalty(strength=0.35), 30, momentum=0.5)
    job = replace(job, recipe=job.recipe.model_copy(update={"schedule": Constant()}))
    gates = gates_of(separate.train(job, begun(gated)).params)
    num_gone = sum(float(gate) == 0 for gate in gates.values())
    assert 0 < num_gone < 9


@pytest.mark.parametrize(
    ("make", "recipe"),
    [
        (gated, {"penalty": GatePenalty(strength=1.0)}),
        (gated, {"rhythm": SoftPruning(every=3)}),
        (gated, {"penalty": ScalePenalty(), "rhythm": SoftPruning(every=2)}),
    ],
    ids=["gates", "rhythm", "both"],
)
def test_a_checkpoint_is_all_that_its_future_depends_on(make, recipe):
    job = gated_task(None)
    job = replace(job, recipe=job.recipe.model_copy(update=recipe))
    saved = {}
    unbroken = separate.train(job, begun(make), lambda step, now: saved.update({step: now()}))
    for step in (1, 3, 4):
        stored = State.restored(saved[step].tensors(), saved[step].facts())
        again = separate.train(replace(job, network=make()), stored)
        theirs = unbroken.tensors()
        assert again.evaluations == unbroken.evaluations
        assert again.tensors().keys() == theirs.keys()
        assert all(small.is_same(value, theirs[n]) for n, value in again.tensors().items())


@pytest.mark.slow
def test_a_study_of_sparse_structure_selection_keeps_the_blocks_with_gates(tmp_path):
    recipe = {
        "optimizer": MOMENTUM, "learning_rate": 0.05, "steps": 30, "eval_every": 15,
        "penalty": {"kind": "gate-penalty", "strength": 0.35},
    }  # fmt: skip
    of = small.graph(recipe, model=GATED, num_seeds=1, levels=1, prune=BY_GATES)
    assert of.counts[1] == of.counts[0]
    lab = small.trained(of, tmp_path / "lab")
    address = {node.arm: node.address for node in of.nodes}
    gates = gates_of(lab.weights(address["dense"]).params)
    stays = [float(gate) != 0 for gate in gates.values()]
    assert 0 < sum(stays) < 9
    for arm in ("ticket", "reinit", "finetune"):
        state = lab.weights(address[arm])
        assert state.channels["blocks"].tolist() == stays
        assert [gate.numel() for gate in gates_of(state.params).values()] == stays
        assert "velocity" not in state.optimizer
        assert of.runs[address[arm]].recipe.penalty is None
    lab.close()


@pytest.mark.parametrize(
    "model", [{"kind": "resnet-20", "width": 0.125}, {"kind": "conv-2", "width": 0.1}], ids=str
)
def test_a_network_without_gates_is_refused_before_anything_is_trained(model):
    with pytest.raises(SpecError, match=r"`recipe\.penalty` gate-penalty must be used with a netw"):
        small.graph({"optimizer": "sgd", "penalty": "gate-penalty"}, model=model)


def test_gates_need_an_optimizer_with_momentum():
    with pytest.raises(ValueError, match=r"`penalty` gate-penalty must go with `optimizer` sgd"):
        Recipe(optimizer="adam", penalty="gate-penalty")
    with pytest.raises(ValueError, match="greater than 0"):
        GatePenalty(strength=0)


def test_gates_steps_are_not_restored_as_the_optimizers():
    arms = [{"kind": "rewind", "to": {"kind": "to-step", "step": 2, "optimizer": "restored"}}]
    recipe = {"optimizer": MOMENTUM, "steps": 6, "penalty": "gate-penalty"}
    with pytest.raises(ValueError, match=r"`arms\.rewind\.to\.optimizer` must be reset where"):
        small.study(recipe, model=GATED, prune=BY_GATES, arms=arms)


# -- rhythms ---------------------------------------------------------------------------------------

SOFT = {"kind": "soft-pruning", "every": 4, "selection": {"convolution": 0.5, "hidden": 0.25}}
FILTERS = {
    "criterion": {"kind": "filter-norm", "order": 2},
    "selection": SOFT["selection"],
    "structure": "channels",
}


def plain():
    return models.Conv_2(width=0.05).build(SHAPE, 10)


def soft_task(rhythm, steps=9):
    recipe = Recipe(
        optimizer=Sgd(momentum=0.9, weight_decay=0.01), learning_rate=0.05, steps=steps,
        batch_size=16, eval_every=3, dtype="float64", rhythm=rhythm,
    )  # fmt: skip
    return Task(plain(), load(Digits()), recipe, 0, steps)


def soft(**changes):
    return SoftPruning(every=4, selection={"convolution": 0.5, "hidden": 0.25}, **changes)


def test_filters_are_set_to_0_and_train_on_as_in_a_loop_by_hand():
    """The twin trains with autograd, and ranks and clears rows of the weights in numpy."""
    job = soft_task(soft())
    found = separate.train(job, begun(plain))
    network, state = plain().double().train(), begun(plain)
    network.load_state_dict(state.params)
    moments = {name: torch.zeros_like(param) for name, param in network.named_parameters()}
    cleared = []
    for step in range(9):
        index = torch.from_numpy(job.order.batch(step))
        inputs = job.data.prepare(job.data.train.inputs[index], torch.float64)
        loss = F.cross_entropy(network(inputs), job.data.train.labels[index])
        params = dict(network.named_parameters())
        slopes = torch.autograd.grad(loss, list(params.values()))
        with torch.no_grad():
            for (name, param), slope in zip(params.items(), slopes, strict=True):
                moments[name].mul_(0.9).add_(slope + 0.01 * param)
                param.sub_(0.05 * moments[name])
        if step + 1 in (4, 8, 9):
            cleared.append(clear({name: param.detach().numpy() for name, param in params.items()}))
    for name, param in network.named_parameters():
        torch.testing.assert_close(found.params[name], param.detach(), rtol=1e-9, atol=1e-12)
    assert len(cleared) == 3
    assert len(cleared[-1]["conv1"]) == 1  # of 3: 1.5 rounds to 2 that stay


def clear(params):
    """Of each layer the rows of least norm set to 0 in place; which they were."""
    gone = {}
    for layer, rate in (("conv1", 0.5), ("conv2", 0.5), ("hidden1", 0.25), ("hidden2", 0.25)):
        weight = params[f"{layer}.weight"]
        norms = np.sqrt((weight.reshape(len(weight), -1) ** 2).sum(1))
        kept = round(len(weight) * (1 - rate))
        gone[layer] = sorted(np.argsort(norms)[: len(weight) - kept].tolist())
        weight[gone[layer]] = 0
    return gone


def test_what_was_set_to_0_trains_on_and_may_come_back():
    job, gone, alive = soft_task(soft().model_copy(update={"every": 10}), 60), [], []
    job = replace(job, recipe=job.recipe.model_copy(update={"learning_rate": 0.2}))

    def look(step, now):
        zeros = (now().params["hidden1.weight"] == 0).all(1).nonzero().flatten().tolist()
        if step and step % 10 == 0:
            gone.append(zeros)
        elif step > 10:
            alive.append(not zeros)

    separate.train(job, begun(plain), look)
    assert [len(zeros) for zeros in gone] == [3] * 5  # of 13: 9.75 rounds to 10 that stay
    assert set(gone[0]) - set(gone[-1])
    assert any(alive)


def test_zeros_are_there_when_their_step_is_evaluated():
    """A network evaluated at steps 3, 6, 8 with and without a rhythm of 8 steps."""
    every = {"every": 8, "selection": SOFT["selection"]}
    ends = [separate.train(soft_task(r, 8), begun(plain)) for r in (None, SoftPruning(**every))]
    before, after = ([e.validation_loss for e in end.evaluations] for end in ends)
    assert before[:-1] == after[:-1]
    network = plain().double().eval()
    network.load_state_dict(ends[1].params)
    job = soft_task(None)
    part = job.data.validation
    with torch.no_grad():
        outputs = network(job.data.prepare(part.inputs, torch.float64))
    assert after[-1] == pytest.approx(float(F.cross_entropy(outputs, part.labels)), rel=1e-12)
    assert after[-1] != before[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "structure"),
    [
        ({"kind": "conv-2", "width": 0.1}, "channels"),
        ({"kind": "resnet-20", "width": 0.25}, "channels"),
        ({"kind": "resnet-20", "width": 0.25}, {"kind": "channels", "shared": False}),
    ],
    ids=["conv-2", "resnet-20", "resnet-20-unshared"],
)
@pytest.mark.parametrize("selection", [SOFT["selection"], {"kind": "global", "rate": 0.3}])
def test_the_channels_set_to_0_last_are_those_that_are_removed(
    tmp_path, model, structure, selection
):
    shape = structure if isinstance(structure, dict) else {"kind": structure}
    rhythm = SOFT | {"selection": selection, "structure": shape}
    recipe = {"steps": 6, "eval_every": 3, "rhythm": rhythm}
    prune = FILTERS | {"selection": selection, "structure": structure}
    of = small.graph(recipe, model=model, num_seeds=1, levels=1, prune=prune)
    lab = small.trained(of, tmp_path / "lab")
    address = {node.arm: node.address for node in of.nodes}
    params = lab.weights(address["dense"]).params
    channels = lab.weights(address["finetune"]).channels
    groups = {group.name: group for group in of.network.groups}
    for name, stay in channels.items():
        rows = torch.cat([params[maker].flatten(1) for maker in groups[name].makers], 1)
        may_go = name in of.study.prune.structure.of(groups.values())
        assert torch.equal((rows == 0).all(1), ~stay) or not may_go
        assert bool(stay.all()) or may_go
    assert any(not bool(stay.all()) for stay in channels.values())
    rhythms = {arm: of.runs[at].recipe.rhythm is not None for arm, at in address.items()}
    assert rhythms == {"dense": True, "ticket": False, "reinit": False, "finetune": False}
    assert lab.record(address["dense"]).engine == "separate/cpu"
    lab.close()


def test_a_diverged_run_has_no_filters_to_rank():
    zeroing = soft().begun(plain(), SHAPE)
    params = {n: p.detach().clone() for n, p in plain().named_parameters()}
    params["conv1.weight"][0, 0, 0, 0] = float("nan")
    before = {name: param.clone() for name, param in params.items()}
    assert all(bool(stay.all()) for stay in zeroing.zero(params).values())
    assert all(small.is_same(param, before[name]) for name, param in params.items())


@pytest.mark.parametrize(
    ("rhythm", "message"),
    [
        (
            {"kind": "soft-pruning", "selection": {"convolution": 0.99}},
            r"`recipe\.rhythm` must fit the ne.* got 0",
        ),
        (
            {"kind": "soft-pruning", "structure": {"exclude": ["x"]}},
            r"`recipe\.rhythm` must fit the network\. .*`x` fits n",
        ),
    ],
)
def test_a_rhythm_that_does_not_fit_is_refused_before_anything_is_trained(rhythm, message):
    with pytest.raises(SpecError, match=message):
        small.graph({"rhythm": rhythm}, model={"kind": "conv-2", "width": 0.1})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"every": 0}, "`every` must be greater than or equal to 1; got 0"),
        ({"selection": "positive"}, "`selection` must be one of the known names; got 'positive'"),
    ],
)
def test_rhythms_that_cannot_be_are_refused(document, message):
    with pytest.raises(SpecError, match=message):
        spec.decode(SoftPruning, document)


def test_without_a_rhythm_addresses_are_as_before():
    assert "rhythm" not in Recipe().to_json()
    assert Recipe(rhythm="soft-pruning").address != Recipe().address
    recipe = Recipe(rhythm=SoftPruning(), penalty=ScalePenalty())
    assert recipe.sparsity == ("penalty", "rhythm")
    assert recipe.plain() == Recipe()
