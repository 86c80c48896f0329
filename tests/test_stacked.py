"""The stacked engine against its twin, the separate one, and against itself interrupted."""

import copy
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_engines import (  # noqa: F401  the fixture is used by being here
    BATCH,
    NETWORKS,
    OPTIMIZERS,
    SCHEDULES,
    Averaging,
    Partly,
    Tied,
    assert_pruned,
    assert_same,
    beginning,
    conv,
    dataset,
    from_file,
    mlp,
    normed,
    one_thread,
    plain,
    restless,
    task,
)
from torch import nn

from windfall.batches import CropFlip
from windfall.engines import contract, lift, replay, separate, stacked
from windfall.spec import SpecError
from windfall.train import Adam, Cosine, Sgd, State, StepDrops

SEEDS = (0, 3, 4)


def averaged():
    """Statistics that are plain means over the steps: the forward pass reads their count."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3, momentum=None),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


def frozen():
    network = mlp()
    network[1].weight.requires_grad_(False)
    return network


class Unused(nn.Module):
    """One of its layers gets no gradient, so weight decay must not move it."""

    def __init__(self):
        super().__init__()
        self.unused, self.output = nn.Linear(32, 4), nn.Linear(32, 3)

    def forward(self, inputs):
        return self.output(inputs.flatten(1))


NODES = {
    "mlp": mlp,
    "linear, no bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 3, bias=False)),
    "nested": lambda: nn.Sequential(mlp(), nn.ReLU(), nn.Linear(3, 3)),
    "frozen": frozen,
    "conv": conv,
    "batch-norm": normed,
    "batch-norm means": averaged,
    "tied": Tied,
    "unused": Unused,
    "replaced buffer": Averaging,
}


def tasks_of(build, recipe, *, seeds=SEEDS, data=None, **settings):
    data = data or dataset()
    return [task(build, recipe, seed=seed, data=data, **settings) for seed in seeds]


def states_of(build, *, seeds=SEEDS, **settings):
    return [beginning(build, seed=seed, **settings) for seed in seeds]


def assert_close(one, other, tolerance=1e-10):
    """Two states are equal up to rounding, and what is not rounded exactly."""
    assert (one.step, one.diverged) == (other.step, other.diverged)
    mine, theirs = one.tensors(), other.tensors()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        expected = theirs[name]
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
        torch.testing.assert_close(
            tensor, expected, rtol=0, atol=tolerance, equal_nan=True, msg=lambda m, n=name: n + m
        )
    assert len(one.evaluations) == len(other.evaluations)
    for found, look in zip(one.evaluations, other.evaluations, strict=True):
        assert vars(found) == pytest.approx(vars(look), abs=10 * tolerance, nan_ok=True)
        accuracies = (look.validation_accuracy, look.test_accuracy)
        assert (found.validation_accuracy, found.test_accuracy) == accuracies


def assert_as_separate(build, recipe, *, states=None, tolerance=1e-10, **settings):
    """All replicas are as trained alone; returns them."""
    states = states or states_of(build)
    finals = stacked.train(tasks_of(build, recipe, **settings), states)
    assert len(finals) == len(states)
    alone = tasks_of(build, recipe, **settings)
    for run, state, final in zip(alone, states, finals, strict=True):
        assert_close(final, separate.train(run, state), tolerance)
    return finals


# -- the twin --------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("optimizer", ["nesterov-decay", "adam-decay"])
@pytest.mark.parametrize("network", NODES)
def test_every_replica_trains_as_it_would_alone(network, optimizer, masked):
    (method, rate), build = OPTIMIZERS[optimizer], NODES[network]
    recipe = plain(optimizer=method, learning_rate=rate, schedule=Cosine(warmup=3))
    states = states_of(build, masked=masked)
    finals = assert_as_separate(build, recipe, states=states, keep=[0, 3, 5])
    for state, final in zip(states, finals, strict=True):
        assert list(final.snapshots) == [0, 3, 5]
        moved = [(final.params[n] - start).abs().max() for n, start in state.params.items()]
        assert max(moved) > 1e-3
        if masked:
            assert_pruned(final)
    one, other = finals[0].params, finals[1].params
    assert all(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [
        *(("mlp", optimizer) for optimizer in OPTIMIZERS),
        ("batch-norm", "nesterov-decay"),
        ("batch-norm means", "adam-decay"),
    ],
)
def test_after_200_steps_the_replicas_are_still_as_alone(case, optimizer):
    method, rate = OPTIMIZERS[optimizer]
    recipe = plain(
        optimizer=method,
        learning_rate=rate,
        schedule=StepDrops(at=(90, 150), factor=0.2, warmup=20),
        steps=200,
        eval_every=40,
        augment=CropFlip(padding=1),
    )
    assert_as_separate(NODES[case], recipe, states=states_of(NODES[case], masked=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_followed(schedule):
    assert_as_separate(mlp, plain(schedule=SCHEDULES[schedule][0], steps=40))


@pytest.mark.parametrize("augment", [CropFlip(padding=1), CropFlip(padding=2, flip=False)])
def test_each_replica_is_augmented_by_its_own_draws(augment):
    finals = assert_as_separate(conv, plain(augment=augment))
    bare = stacked.train(tasks_of(conv, plain()), states_of(conv))
    for final, without in zip(finals, bare, strict=True):
        assert not torch.equal(final.params["conv1.weight"], without.params["conv1.weight"])


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov-decay", "adam-decay"])
@pytest.mark.parametrize("build", [mlp, conv, normed])
def test_in_float32_the_updates_are_as_alone_to_a_ten_thousandth(build, optimizer):
    method, rate = OPTIMIZERS[optimizer]
    recipe = plain(optimizer=method, learning_rate=rate, dtype="float32", steps=20)
    states = states_of(build)
    finals = stacked.train(tasks_of(build, recipe), states)
    for run, state, final in zip(tasks_of(build, recipe), states, finals, strict=True):
        alone = separate.train(run, state)
        for name, start in state.params.items():
            assert final.params[name].dtype == torch.float32
            update = alone.params[name].double() - start
            error = final.params[name].double() - alone.params[name]
            assert error.norm() <= 1e-4 * update.norm()


@pytest.mark.parametrize("build", [mlp, normed])
def test_a_stack_of_one_is_a_training(build):
    finals = assert_as_separate(build, plain(), seeds=[5], states=states_of(build, seeds=[5]))
    assert len(finals) == 1


@pytest.mark.parametrize("num", [1, 99, 100, 333, 334, 1001])
def test_evaluations_are_as_alone_whatever_the_number_of_examples(num):
    data = dataset(num_validation=num, num_test=17)
    assert_as_separate(normed, plain(steps=1), data=data)
    assert_as_separate(mlp, plain(steps=1), data=data)


@pytest.mark.parametrize(
    ("first", "last", "every"), [(0, 3, 100), (3, 10, 4), (4, 9, 4), (5, 5, 4)]
)
def test_the_same_steps_are_evaluated(first, last, every):
    recipe = plain(steps=10, eval_every=every)
    finals = assert_as_separate(mlp, recipe, states=states_of(mlp, step=first), last=last)
    assert {look.step for look in finals[0].evaluations} >= {first, last}


def test_flat_inputs_need_no_flattening_layer():
    build = lambda: nn.Sequential(nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 3))  # noqa: E731
    data = dataset()
    parts = {
        name: replace(getattr(data, name), inputs=getattr(data, name).inputs.flatten(1))
        for name in ("train", "validation", "test")
    }
    flat = replace(data, **parts, mean=torch.zeros(1).double(), std=torch.ones(1).double())
    assert_as_separate(build, plain(), data=flat)


# -- which forward pass ----------------------------------------------------------------------------


def hooked():
    network = mlp()
    network[1].register_forward_hook(lambda part, args, made: 2 * made)
    return network


@pytest.mark.parametrize(
    ("build", "has_products"),
    [
        (mlp, True),
        (NODES["nested"], True),
        (hooked, False),
        (conv, False),
        (normed, False),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Flatten()), False),
        (lambda: nn.Sequential(nn.Flatten(0, 2), nn.Linear(4, 3)), False),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 3)), False),
    ],
)
def test_products_are_for_linear_layers_and_relu_alone(monkeypatch, build, has_products):
    mapped = []
    monkeypatch.setattr(lift, "_mapped", lambda network: mapped.append(network))
    run = lift.forward(build(), 3)
    assert (run is not None) == has_products
    assert bool(mapped) != has_products


def test_products_and_vmap_are_the_same_forward_pass():
    network = mlp()
    params = {n: torch.stack([p, 2 * p]).detach() for n, p in network.named_parameters()}
    inputs = torch.rand(2, 5, 2, 4, 4)
    products, mapped = lift.forward(network, 3), lift._mapped(network)
    for args in ((inputs, 0), (inputs[0], None)):
        one, other = products(params, {}, {}, *args), mapped(params, {}, {}, *args)
        assert one.shape == (2, 5, 3)
        torch.testing.assert_close(one, other)


def test_a_layer_with_a_hook_trains_as_alone():
    assert_as_separate(hooked, plain())


# -- pruned weights and divergence -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["sgd-decay", "nesterov-decay", "adam-decay"])
@pytest.mark.parametrize("build", [mlp, normed])
def test_a_pruned_weight_is_exactly_zero_at_every_pulse(build, optimizer, dtype):
    method, rate = OPTIMIZERS[optimizer]
    recipe = plain(optimizer=method, learning_rate=rate, dtype=dtype, eval_every=1)
    seen = []

    def pulse(step, states):
        seen.append(step)
        for state in states():
            assert_pruned(state)

    starts = states_of(build, masked=True)
    finals = stacked.train(tasks_of(build, recipe), starts, pulse)
    assert seen == list(range(12))
    assert len({str(state.masks) for state in finals}) == len(SEEDS)  # each has its own
    for start, final in zip(starts, finals, strict=True):
        assert_pruned(final)
        for name, mask in final.masks.items():
            moved = final.params[name] != start.params[name].to(final.params[name].dtype)
            assert moved[mask].any()


def loud():
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.Linear(4, 3))


def test_a_gradient_that_overflows_does_not_reach_a_pruned_weight():
    data = dataset()
    data.mean.zero_()
    data.std[1] = 4e-39 * 1e3  # the second channel's pixels are up to 2.5e35
    states = states_of(loud)
    for state in states:
        state.params["2.weight"] *= 1e4
        state.masks = {"1.weight": (torch.arange(32) < 16).repeat(4, 1)}
        state.params["1.weight"] *= state.masks["1.weight"]
    dense = [State(0, state.params, {}) for state in states]
    recipe = plain(dtype="float32", learning_rate=1e-9, steps=1)
    for final in stacked.train(tasks_of(loud, recipe, data=data), dense):
        assert not final.params["1.weight"].isfinite().all()
    for start, final in zip(
        states, stacked.train(tasks_of(loud, recipe, data=data), states), strict=True
    ):
        assert_pruned(final)
        assert not final.diverged
        assert not torch.equal(final.params["1.weight"], start.params["1.weight"])


def with_outputs(states, factors):
    """The states, their last layer's weights multiplied: from 1e40 on they diverge."""
    for state, factor in zip(states, factors, strict=True):
        name = list(state.params)[-2]
        state.params[name] = state.params[name].double() * factor
    return states


@pytest.mark.parametrize(
    ("build", "factors"), [(mlp, [1e50, 1, 1e170]), (normed, [1e160, 1, 1e308])]
)
def test_a_replica_that_diverges_stops_as_alone_and_the_others_go_on(build, factors):
    recipe = plain(optimizer=Sgd(momentum=0.9), steps=15, eval_every=1)
    states = with_outputs(states_of(build), factors)
    tasks = tasks_of(build, recipe, keep=[0, 1, 5])
    finals = stacked.train(tasks, states)
    alone = [
        separate.train(run, state)
        for run, state in zip(tasks_of(build, recipe, keep=[0, 1, 5]), states, strict=True)
    ]
    assert_close(finals[1], alone[1])
    ends = [(final.step, final.diverged) for final in finals]
    assert ends == [(other.step, other.diverged) for other in alone]
    assert 0 < ends[2][0] <= ends[0][0] < ends[1][0] == 15
    assert [diverged for _, diverged in ends] == [True, False, True]
    for final, other in zip(finals, alone, strict=True):
        assert list(final.snapshots) == list(other.snapshots)
        assert [look.step for look in final.evaluations] == [
            look.step for look in other.evaluations
        ]


def test_a_replica_that_is_not_finite_diverges_before_its_first_step():
    states = states_of(mlp)
    states[0].params["output.bias"][0] = math.nan
    finals = assert_as_separate(mlp, plain(), states=states)
    assert [final.step for final in finals] == [0, 12, 12]


def test_divergence_of_all_ends_the_training():
    recipe = plain(steps=40, learning_rate=1e300)
    finals = stacked.train(tasks_of(mlp, recipe), states_of(mlp))
    assert all(final.diverged for final in finals)
    pulses = []
    again = stacked.train(tasks_of(mlp, recipe), finals, lambda step, _: pulses.append(step))
    assert pulses == []
    for one, other in zip(again, finals, strict=True):
        assert one.step == other.step < 40
        assert len(one.evaluations) == len(other.evaluations)


# -- pauses, snapshots, pulses ---------------------------------------------------------------------


class Paused(Exception):
    """Carries the checkpoint."""


def paused_at(pause):
    def pulse(step, states):
        if step == pause:
            raise Paused(states())

    return pulse


RESUMED = {
    "momentum": (averaged, Sgd(momentum=0.9, nesterov=True, weight_decay=1e-3), True),
    "adam": (normed, Adam(weight_decay=1e-3), True),
    "products": (mlp, Adam(), True),
    "sgd": (mlp, Sgd(), False),
    "replaced buffer": (Averaging, Adam(), False),
    "tied": (Tied, Sgd(momentum=0.9), True),
    "unused": (Unused, Adam(), True),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_training_paused_at_any_pulse_ends_bit_for_bit_as_one_that_was_not(case):
    build, optimizer, masked = RESUMED[case]
    recipe = plain(
        optimizer=optimizer,
        learning_rate=0.02,
        schedule=Cosine(warmup=4),
        dtype="float32",
        augment=CropFlip(padding=1),
    )
    starts, seen = states_of(build, masked=masked), {}

    def begin():
        return tasks_of(build, recipe, keep=[3, 8])

    unbroken = stacked.train(begin(), starts, lambda step, states: seen.update({step: states()}))
    assert list(seen) == [0, 3, 5, 8, 10]
    for step, states in seen.items():
        torch.manual_seed(step)
        again = stacked.train(begin(), [from_file(state) for state in states])
        for one, other in zip(again, unbroken, strict=True):
            assert_same(one, other)
    for one, other in zip(stacked.train(begin(), starts), unbroken, strict=True):
        assert_same(one, other)  # looking changes nothing


def test_a_pause_after_a_divergence_ends_as_no_pause():
    recipe = plain(optimizer=Sgd(momentum=0.9), steps=15, eval_every=1, dtype="float64")
    starts = with_outputs(states_of(mlp), [1e50, 1, 1])

    def begin():
        return tasks_of(mlp, recipe)

    unbroken = stacked.train(begin(), starts)
    with pytest.raises(Paused) as pause:
        stacked.train(begin(), starts, paused_at(11))
    (paused,) = pause.value.args
    assert [state.diverged for state in paused] == [True, False, False]
    for one, other in zip(stacked.train(begin(), paused), unbroken, strict=True):
        assert repr(one.evaluations) == repr(other.evaluations)
        for name, weight in one.params.items():
            torch.testing.assert_close(weight, other.params[name], rtol=0, atol=0, equal_nan=True)


def test_pulses_come_before_snapshots_and_evaluations_and_often_enough():
    steps = []
    recipe = plain(steps=200, eval_every=90)
    stacked.train(tasks_of(mlp, recipe, keep=[70, 7]), states_of(mlp), lambda t, _: steps.append(t))
    assert steps == [0, 7, 70, 90, 154, 180]


def test_snapshots_are_the_states_at_their_steps_and_do_not_follow_the_training():
    recipe = plain(optimizer=Sgd(momentum=0.9))
    seen = {}
    settings = {"keep": [0, 3, 11, 12, 99]}
    finals = stacked.train(
        tasks_of(normed, recipe, **settings),
        states_of(normed),
        lambda step, states: seen.update({step: states()}),
    )
    for replica, final in enumerate(finals):
        assert list(final.snapshots) == [0, 3, 11]
        for step, snapshot in final.snapshots.items():
            state = seen[step][replica]
            state.evaluations, state.snapshots = [], {}
            assert_same(snapshot, state)


def test_the_given_states_are_not_changed_and_share_nothing_with_the_results():
    recipe = plain(optimizer=Sgd(momentum=0.9), learning_rate=0.1)
    dense = stacked.train(tasks_of(normed, recipe, keep=[2]), states_of(normed))
    for states in (states_of(normed, masked=True), [each.snapshots[2] for each in dense], dense):
        before = copy.deepcopy(states)
        finals = stacked.train(tasks_of(normed, recipe, last=17, keep=[4]), states)
        for final in finals:
            for tensor in [*final.params.values(), *final.buffers.values(), final.losses]:
                tensor.add_(1)
        for state, same in zip(states, before, strict=True):
            assert_same(state, same)
    assert len({tensor.data_ptr() for final in finals for tensor in final.params.values()}) == 15


@pytest.mark.parametrize("k", [1, 7])
def test_a_rewound_stack_goes_on_from_its_snapshots(k):
    recipe = plain(optimizer=Adam(), learning_rate=0.02)
    dense = stacked.train(tasks_of(normed, recipe, keep=[k]), states_of(normed))
    snapshots = [final.snapshots[k] for final in dense]
    again = assert_as_separate(normed, recipe, states=snapshots)
    for one, other in zip(again, dense, strict=True):
        assert torch.equal(one.params["4.weight"], other.params["4.weight"])


# -- memory ----------------------------------------------------------------------------------------


def with_memory_for(monkeypatch, num, after=0):
    """As if more than `num` replicas did not fit, which is found after some steps."""
    advance, sizes = stacked._Training.advance, []

    def limited(training):
        if training.step == 0:
            sizes.append(len(training.tasks))
        if len(training.tasks) > num and training.step >= after:
            raise torch.OutOfMemoryError("CUDA out of memory")
        advance(training)

    monkeypatch.setattr(stacked._Training, "advance", limited)
    return sizes


@pytest.mark.parametrize(
    ("num", "sizes"),
    [(9, [5]), (4, [5, 2, 3]), (2, [5, 2, 3, 1, 2]), (1, [5, 2, 1, 1, 3, 1, 2, 1, 1])],
)
def test_a_stack_that_does_not_fit_is_halved_until_it_does(monkeypatch, num, sizes):
    seeds, messages = range(5), []
    recipe = plain(optimizer=Adam(), learning_rate=0.01)
    starts = states_of(normed, seeds=seeds)
    expected = stacked.train(tasks_of(normed, recipe, seeds=seeds), starts)
    found = with_memory_for(monkeypatch, num, after=3)
    finals = stacked.train(tasks_of(normed, recipe, seeds=seeds), starts, tell=messages.append)
    assert found == sizes
    for final, other in zip(finals, expected, strict=True):
        assert_close(final, other)
    assert len(messages) == len(sizes) // 2
    if messages:
        assert messages[0] == (
            "5 runs did not fit in memory together; 2 and 3 are trained instead, from step 0."
        )


def test_one_replica_that_does_not_fit_is_an_error(monkeypatch):
    with_memory_for(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        stacked.train(tasks_of(mlp, plain()), states_of(mlp))


def test_a_pause_of_halves_ends_bit_for_bit_as_no_pause(monkeypatch):
    seeds, seen = range(3), []
    recipe = plain(optimizer=Adam(), learning_rate=0.01, dtype="float32")
    starts = states_of(normed, seeds=seeds)
    with_memory_for(monkeypatch, 2)
    unbroken = stacked.train(
        tasks_of(normed, recipe, seeds=seeds), starts, lambda _, states: seen.append(states())
    )
    assert len(seen) > 6
    for states in seen:
        assert len(states) == 3
        again = stacked.train(tasks_of(normed, recipe, seeds=seeds), states)
        for one, other in zip(again, unbroken, strict=True):
            assert_same(one, other)


# -- what cannot be stacked ------------------------------------------------------------------------


class Python(nn.Module):
    """Draws where torch does not see it."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, inputs):
        return inputs * (1 if self.draw() < 0.5 else 2)


class Reading(nn.Module):
    """Reads a number that differs from replica to replica."""

    def forward(self, inputs):
        return inputs / float(inputs.detach().abs().max())


class Forgetful(nn.Module):
    """Keeps a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(())

    def forward(self, inputs):
        self.mean = 0.9 * self.mean + inputs.detach().mean()
        return inputs - self.mean


class Waking(nn.Module):
    """Draws in evaluation mode alone."""

    def forward(self, inputs):
        return inputs if self.training else inputs * torch.rand(())


class Counted(nn.Module):
    """Counts what differs from replica to replica."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        self.count = self.count + (inputs > 1).sum()
        return inputs


def with_part(part):
    return lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 3), nn.Sequential(part()))


def weighted():
    """A layer that vmap would run a replica at a time."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(32, 3))
    return nn.Sequential(nn.Flatten(), layer)


def pythonic():
    return Python(lambda: random.random())


def numeric():
    return Python(lambda: np.random.random())  # noqa: NPY002


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (with_part(lambda: nn.Dropout(0.4)), r"layer `2.0` \(Dropout\) is not: .*random"),
        (with_part(lambda: nn.RReLU()), r"layer `2.0` \(RReLU\) is not"),
        (
            with_part(lambda: Python(lambda: random.random())),
            r"`2.0` \(Python\) is not: it draws from a glo",
        ),
        (with_part(numeric), r"layer `2.0` \(Python\) is not: it draws from a global generator"),
        (with_part(Reading), r"layer `2.0` \(Reading\) is not"),
        (with_part(Forgetful), r"layer `2.0` \(Forgetful\) is not: it keeps a tensor"),
        (with_part(Waking), r"layer `2.0` \(Waking\) is not: .*random"),
        (with_part(Counted), r"the network is not"),
        (weighted, r"\(_WeightNorm\) is not: There is a performance drop"),
        (Partly, r"the network is not: .*random"),
        (restless, r"layer `3` \(Dropout2d\) is not"),
    ],
)
def test_a_network_that_vmap_cannot_run_is_refused_by_its_layer(build, message):
    tasks, states = tasks_of(build, plain()), states_of(build)
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(contract.Unsupported, match=message):
        stacked.train(tasks, states)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    if build is not Partly:
        separate.train(tasks[0], states[0])  # the trial left the network as it was


def test_a_gradient_hook_on_a_parameter_is_refused():
    tasks = tasks_of(mlp, plain())
    tasks[0].network[1].weight.register_hook(lambda gradient: 0 * gradient)
    with pytest.raises(contract.Unsupported, match=r"layer `hidden1.weight` .* has a hook"):
        stacked.train(tasks, states_of(mlp))


@pytest.mark.parametrize("build", [averaged, conv, Tied])
def test_the_global_generators_are_untouched(build):
    tasks, states = tasks_of(build, plain(steps=2)), states_of(build)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    stacked.train(tasks, states)
    assert torch.equal(torch.get_rng_state(), before)


def test_counts_that_differ_are_counted_apart():
    states = states_of(normed)
    states[1].buffers["1.num_batches_tracked"] += 5
    finals = assert_as_separate(normed, plain(), states=states)
    assert [int(final.buffers["1.num_batches_tracked"]) for final in finals] == [12, 17, 12]


def other_recipe(tasks, states):
    tasks[1] = task(mlp, plain(learning_rate=0.2), data=tasks[0].data)


def other_data(tasks, states):
    tasks[1] = task(mlp, plain(), data=dataset())


def other_end(tasks, states):
    tasks[1] = task(mlp, plain(), data=tasks[0].data, last=3)


def other_keep(tasks, states):
    tasks[2] = task(mlp, plain(), data=tasks[0].data, keep=[3])


def no_states(tasks, states):
    states.clear()


def other_shape(tasks, states):
    states[2].params["output.bias"] = torch.zeros(2)


def returned(tasks, states):
    states[1].masks = {"output.bias": torch.tensor([True, False, True])}


def other_masks(tasks, states):
    states[1].masks = {"output.bias": torch.ones(3, dtype=torch.bool)}


def other_memory(tasks, states):
    states[1].optimizer = {"momentum_buffer": {"output.bias": torch.zeros(3)}}


def other_count(tasks, states):
    for k, state in enumerate(states):
        state.optimizer = {"step": {"output.bias": torch.tensor(float(k))}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_recipe, "`tasks` must differ in their seeds alone; they differ in `recipe`"),
        (other_data, "they differ in `data`"),
        (other_end, "they differ in `last_step`"),
        (other_keep, "they differ in `keep`"),
        (no_states, "`states` must be one for each task, and one at least; got 0 for 3"),
        (other_shape, "parameter `output.bias`"),
        (returned, "`state` must be 0 where its masks prune"),
        (other_masks, "`states` at one step must .* they differ in `masks`"),
        (other_memory, "they differ in `optimizer`"),
        (other_count, "they differ in `optimizer.step`"),
    ],
)
def test_tasks_and_states_that_are_no_stack_are_refused(change, message):
    tasks, states = tasks_of(mlp, plain()), states_of(mlp)
    change(tasks, states)
    with pytest.raises(SpecError, match=message):
        stacked.train(tasks, states)


# -- the way of CUDA -------------------------------------------------------------------------------


class Recording:
    """Stands in for a CUDA graph: what it records is run again as it was."""

    def __init__(self, optimizer=None):
        self.told = []

    def warm_up(self, program):
        self.told.append("warm up")
        program()

    def record(self, program):
        self.told.append("record")
        return program


def test_a_recorded_program_is_given_the_tensors_of_every_call():
    total, recorder = torch.zeros(2), Recording()
    held = set()

    def program(index, move):
        held.add(index.data_ptr())
        total.add_(index * move)

    replayed = replay.Replayed(program, recorder)
    for step in range(1, 9):
        total.zero_()
        held.clear()
        replayed(torch.full((2,), float(step)), torch.tensor([1.0, 2.0]))
        assert total.tolist() == [step, 2 * step]
    assert recorder.told == ["warm up"] * replay.WARM_UP + ["record"]
    only = held.copy()
    replayed(torch.ones(2), torch.ones(2))
    assert held == only  # the same memory at every replay


@pytest.mark.parametrize("optimizer", ["nesterov-decay", "adam-decay"])
@pytest.mark.parametrize("build", [mlp, normed, conv])
def test_the_step_as_cuda_runs_it_is_the_same_training(monkeypatch, build, optimizer):
    """The rate in a tensor, the step replayed on held tensors: all but the device."""
    method, rate = OPTIMIZERS[optimizer]
    recipe = plain(
        optimizer=method,
        learning_rate=rate,
        schedule=Cosine(warmup=3),
        dtype="float32",
        augment=CropFlip(padding=1),
    )
    expected = stacked.train(tasks_of(build, recipe), states_of(build))
    make, recorders = stacked._Training.__init__, []

    def accelerated(training, *args):
        make(training, *args)
        training.accelerate(lambda message: None)

    def recorder(optimizer):
        recorders.append(Recording())
        return recorders[-1]

    monkeypatch.setattr(stacked._Training, "__init__", accelerated)
    monkeypatch.setattr(replay, "compiled", lambda function, tell: function)
    monkeypatch.setattr(replay, "Cuda", recorder)
    finals = stacked.train(tasks_of(build, recipe), states_of(build))
    assert [each.told[-1] for each in recorders] == ["record"]
    for final, other in zip(finals, expected, strict=True):
        assert_close(final, other, 1e-6)


def test_networks_that_read_numbers_from_the_device_are_not_recorded():
    assert replay.reads_numbers(averaged())
    assert not replay.reads_numbers(normed())
    assert not replay.reads_numbers(mlp())


@pytest.mark.slow
@pytest.mark.parametrize("build", [mlp, normed])
def test_a_compiled_step_is_the_same_training(monkeypatch, build):
    recipe, messages = plain(steps=6, optimizer=Sgd(momentum=0.9), learning_rate=0.03), []
    expected = stacked.train(tasks_of(build, recipe), states_of(build))
    make = stacked._Training.__init__

    def accelerated(training, *args):
        make(training, *args)
        training.compute = replay.compiled(training.compute, messages.append, "aot_eager")

    monkeypatch.setattr(stacked._Training, "__init__", accelerated)
    finals = stacked.train(tasks_of(build, recipe), states_of(build))
    assert messages == []
    for final, other in zip(finals, expected, strict=True):
        assert_close(final, other)


def test_what_torch_cannot_compile_runs_uncompiled_and_says_so():
    def broken(graph, inputs):
        raise ValueError("no")

    messages = []
    call = replay.compiled(lambda a, b: a + b, messages.append, broken)
    for _ in range(2):
        assert call(torch.ones(2), torch.ones(2)).tolist() == [2, 2]
    (message,) = messages
    assert message.startswith("torch.compile failed, the step runs uncompiled: ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov-decay", "adam-decay"])
@pytest.mark.parametrize("build", [mlp, conv, normed, averaged])
def test_on_cuda_a_stack_trains_as_alone_and_resumes_bit_for_bit(build, optimizer):
    torch.use_deterministic_algorithms(False)
    method, rate = OPTIMIZERS[optimizer]
    recipe = plain(
        optimizer=method,
        learning_rate=rate,
        dtype="float32",
        augment=CropFlip(padding=1),
    )
    data, seen, messages = dataset().to("cuda"), {}, []
    starts = states_of(build, masked=True)
    finals = stacked.train(
        tasks_of(build, recipe, data=data, keep=[3]),
        starts,
        lambda step, states: seen.update({step: states()}),
        messages.append,
    )
    assert messages == []
    for run, state, final in zip(tasks_of(build, recipe, data=data), starts, finals, strict=True):
        assert_pruned(final)
        alone = separate.train(run, state)
        for name, weight in final.params.items():
            torch.testing.assert_close(weight, alone.params[name], rtol=1e-3, atol=1e-4)
    for states in seen.values():
        again = stacked.train(tasks_of(build, recipe, data=data, keep=[3]), states)
        for one, other in zip(again, finals, strict=True):
            assert_same(one, other)
