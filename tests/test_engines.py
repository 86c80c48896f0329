"""The separate engine against training written out by hand, and against itself interrupted."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from windfall import masks as masking
from windfall import models, seeds
from windfall.batches import CropFlip
from windfall.data import Dataset
from windfall.engines import contract, separate
from windfall.engines.contract import Task
from windfall.initialize import TorchDefault, initial_parameters
from windfall.samples import Part
from windfall.spec import SpecError
from windfall.train import Adam, Constant, Cosine, Recipe, Sgd, State, StepDrops

SHAPE, CLASSES, NUM_TRAIN, BATCH, STEPS = (2, 4, 4), 3, 21, 8, 50


@pytest.fixture(autouse=True)
def one_thread():
    """As runs are trained; threads would also wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


# -- networks and data -----------------------------------------------------------------------------


def mlp():
    return models.Mlp(hidden=(6, 5)).build(SHAPE, CLASSES)


def conv():
    return models.Conv_2(width=0.03).build(SHAPE, CLASSES)


def normed():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False),  # its gradient would be rounding alone
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    )


def dropped():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Dropout(0.4), nn.Linear(6, CLASSES)
    )


def restless():
    """Everything that a pause could lose: statistics, their count, and draws."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3, momentum=None),
        nn.ReLU(),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Linear(48, 5),
        nn.Dropout(0.3),
        nn.Linear(5, CLASSES),
    )


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.output = nn.Linear(32, CLASSES)

    def forward(self, inputs):
        return self.output(self.second(self.first(inputs.flatten(1)).relu()).relu())


class Averaging(nn.Module):
    """Its forward pass replaces a buffer instead of changing it."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(32, CLASSES)
        self.register_buffer("average", torch.zeros(32))

    def forward(self, inputs):
        inputs = inputs.flatten(1)
        if self.training:
            self.average = 0.9 * self.average + 0.1 * inputs.mean(0)
        return self.output(inputs - self.average)


class Partly(nn.Module):
    """One layer is never used, one is frozen, and one is used at about every other step."""

    def __init__(self):
        super().__init__()
        self.unused, self.sometimes = nn.Linear(32, 32), nn.Linear(32, 32)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.output = nn.Linear(32, CLASSES)

    def forward(self, inputs):
        inputs = self.frozen(inputs.flatten(1))
        if self.training and torch.rand(()) < 0.5:
            inputs = inputs + self.sometimes(inputs)
        return self.output(inputs)


class Witness(nn.Module):
    """Notes what it is shown, and how."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(32, CLASSES)
        self.shown = []

    def forward(self, inputs):
        self.shown.append((self.training, torch.is_grad_enabled(), inputs.clone()))
        return self.output(inputs.flatten(1))

    def batches(self):
        return [inputs for is_training, _, inputs in self.shown if is_training]


def part(num, purpose):
    stream = seeds.stream(0, purpose)
    images = torch.from_numpy(stream.integers(0, 256, (num, *SHAPE), dtype=np.uint8))
    return Part(images, torch.from_numpy(stream.integers(0, CLASSES, num)))


def dataset(num_validation=7, num_test=9, num_train=NUM_TRAIN):
    train, validation, test = (
        part(num, purpose)
        for num, purpose in ((num_train, "train"), (num_validation, "val"), (num_test, "test"))
    )
    mean, std = torch.tensor([0.4, 0.5]).double(), torch.tensor([0.3, 0.2]).double()
    return Dataset(train, validation, test, mean, std, 255, CLASSES, "", None)


def beginning(build, *, masked=False, seed=0, step=0):
    params, buffers = initial_parameters(build, TorchDefault(), seed)
    mask = {}
    if masked:
        dense = masking.ones(params, models.kinds(build(), SHAPE))
        counts = {name: round(0.4 * size) for name, size in masking.sizes(dense).items()}
        mask = masking.scatter(counts, dense, seed)
    return State(step, masking.apply(mask, params), buffers, mask)


def task(build, recipe, *, seed=0, last=None, keep=(), data=None):
    last = recipe.steps if last is None else last
    return Task(build(), data or dataset(), recipe, seed, last, frozenset(keep))


def plain(**settings):
    """A short recipe in float64."""
    short = {"steps": 12, "batch_size": BATCH, "eval_every": 5, "dtype": "float64"}
    return Recipe(**short | settings)


def assert_same(one, other, *, but=()):
    """Two states are equal bit for bit, evaluations and all."""
    assert (one.step, one.diverged) == (other.step, other.diverged)
    mine, theirs = one.tensors(), other.tensors()
    assert mine.keys() == theirs.keys()
    for name in mine.keys() - set(but):
        assert mine[name].dtype == theirs[name].dtype, name
        assert torch.equal(mine[name], theirs[name]), name
    assert one.evaluations == other.evaluations


# -- a twin, by hand -------------------------------------------------------------------------------


def sgd_by_hand(settings, rate, weight, gradient, memory):
    gradient = gradient + settings.weight_decay * weight
    if settings.momentum:
        velocity = settings.momentum * memory.get("velocity", 0 * gradient) + gradient
        memory["velocity"] = velocity
        gradient = gradient + settings.momentum * velocity if settings.nesterov else velocity
    return weight - rate * gradient


def adam_by_hand(settings, rate, weight, gradient, memory):
    b1, b2 = settings.beta1, settings.beta2
    gradient = gradient + settings.weight_decay * weight
    t = memory["t"] = memory.get("t", 0) + 1
    m = memory["m"] = b1 * memory.get("m", 0 * gradient) + (1 - b1) * gradient
    v = memory["v"] = b2 * memory.get("v", 0 * gradient) + (1 - b2) * gradient**2
    return weight - rate * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + settings.eps)


@torch.no_grad()
def looks_by_hand(network, data):
    """Loss and accuracy on validation and test, an example at a time."""
    network.eval()
    numbers = []
    for each in (data.validation, data.test):
        loss, correct = 0.0, 0
        for image, label in zip(each.inputs, each.labels, strict=True):
            pixels = (image.double() / 255 - data.mean[:, None, None]) / data.std[:, None, None]
            logits = network(pixels[None])[0]
            loss += float(torch.logsumexp(logits, 0) - logits[label])
            correct += int(logits.argmax() == label)
        numbers += [loss / len(each), correct / len(each)]
    network.train()
    return numbers


def train_by_hand(network, data, state, settings, factor, *, seed=0):
    """Plain training in float64 from step 0, the mask multiplied into the weights after each step.

    Returns:
        parameters, and (step, train loss, validation and test numbers) of all evaluations.
    """
    update = sgd_by_hand if isinstance(settings.optimizer, Sgd) else adam_by_hand
    network = network.double()
    network.load_state_dict(state.params | state.buffers, strict=False)
    named, memories = dict(network.named_parameters()), {}
    epochs = [seeds.stream(seed, "order", e).permutation(NUM_TRAIN) for e in range(100)]
    line, looks, losses = np.concatenate(epochs), [(0, None, *looks_by_hand(network, data))], []
    with torch.random.fork_rng():
        for step in range(settings.steps):
            index = line[step * BATCH : (step + 1) * BATCH]
            images = data.train.inputs[index].double() / 255
            images = (images - data.mean[:, None, None]) / data.std[:, None, None]
            torch.manual_seed(seeds.key(seed, "forward", step) % 2**32)
            logits = network(images)
            picked = logits[torch.arange(BATCH), data.train.labels[index]]
            loss = (torch.logsumexp(logits, 1) - picked).mean()
            loss.backward()
            rate = settings.learning_rate * factor(step)
            for name, weight in named.items():
                gradient, weight.grad = weight.grad, None
                if gradient is not None:
                    memory = memories.setdefault(name, {})
                    new = update(settings.optimizer, rate, weight.detach(), gradient, memory)
                    weight.data = new * state.masks.get(name, 1)
            losses.append(loss.item())
            if (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps:
                looks.append((step + 1, np.mean(losses), *looks_by_hand(network, data)))
                losses = []
    return {name: weight.detach() for name, weight in named.items()}, looks


OPTIMIZERS = {
    "sgd": (Sgd(), 0.1),
    "sgd-decay": (Sgd(weight_decay=0.01), 0.1),
    "momentum-decay": (Sgd(momentum=0.9, weight_decay=0.01), 0.03),
    "nesterov-decay": (Sgd(momentum=0.8, nesterov=True, weight_decay=0.01), 0.03),
    "adam": (Adam(), 0.01),
    "adam-decay": (Adam(beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.1), 0.01),
}
SCHEDULES = {
    "constant": (Constant(), lambda t: 1),
    "warm-up": (Constant(warmup=20), lambda t: min(1, (t + 1) / 20)),
    "step-drops": (StepDrops(at=(15, 30), factor=0.2), lambda t: 0.2 ** ((t >= 15) + (t >= 30))),
    "cosine": (Cosine(), lambda t: (1 + math.cos(math.pi * t / STEPS)) / 2),
}
NETWORKS = {"mlp": mlp, "conv": conv, "batch-norm": normed, "dropout": dropped}


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_training_is_as_by_hand(network, optimizer, schedule, masked):
    (method, rate), (decay, factor) = OPTIMIZERS[optimizer], SCHEDULES[schedule]
    settings = plain(
        optimizer=method, learning_rate=rate, schedule=decay, steps=STEPS, eval_every=20
    )
    build, state = NETWORKS[network], beginning(NETWORKS[network], masked=masked)
    final = separate.train(task(build, settings), state)
    expected, looks = train_by_hand(build(), dataset(), state, settings, factor)
    moved = 0.0
    for name, weight in expected.items():
        torch.testing.assert_close(final.params[name], weight, rtol=0, atol=1e-10)
        moved = max(moved, float((weight - state.params[name]).abs().max()))
    assert moved > 1e-3  # the test would otherwise hold for an engine that does nothing
    for found, (step, train_loss, *numbers) in zip(final.evaluations, looks, strict=True):
        assert found.step == step
        assert found.train_loss == pytest.approx(train_loss, abs=1e-10)
        assert found.validation_loss == pytest.approx(numbers[0], abs=1e-9)
        assert found.test_loss == pytest.approx(numbers[2], abs=1e-9)
        assert [found.validation_accuracy, found.test_accuracy] == numbers[1::2]


@pytest.mark.parametrize("build", [Tied, Partly])
@pytest.mark.parametrize("optimizer", ["nesterov-decay", "adam-decay"])
def test_shared_unused_frozen_and_occasional_weights_train_as_by_hand(build, optimizer):
    method, rate = OPTIMIZERS[optimizer]
    settings = plain(optimizer=method, learning_rate=rate, steps=20)
    state = beginning(build, masked=True)
    final = separate.train(task(build, settings), state)
    expected, _ = train_by_hand(build(), dataset(), state, settings, lambda t: 1)
    for name, weight in expected.items():
        torch.testing.assert_close(final.params[name], weight, rtol=0, atol=1e-10)


# -- pruned weights --------------------------------------------------------------------------------


def assert_pruned(state):
    assert state.masks
    for name, mask in state.masks.items():
        for kind in [state.params, *state.optimizer.values()]:
            if name in kind and kind[name].shape == mask.shape:
                assert torch.equal(kind[name][~mask], torch.zeros_like(kind[name][~mask])), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("build", [normed, dropped, Partly, Tied])
def test_a_pruned_weight_is_exactly_zero_at_every_step_and_every_other_trains(
    build, optimizer, dtype
):
    method, rate = OPTIMIZERS[optimizer]
    settings = plain(optimizer=method, learning_rate=rate, dtype=dtype)
    start = beginning(build, masked=True)
    final = separate.train(task(build, settings), start, lambda step, state: assert_pruned(state()))
    assert_pruned(final)
    still = {"unused.weight", "frozen.weight"}
    for name in final.masks.keys() - still:
        alive, begun = final.masks[name], start.params[name].to(final.params[name].dtype)
        has_gradient = alive & (final.params[name] != begun)
        for sign in (-1, 1):  # a comparison without an absolute value would freeze one of them
            of_sign = alive & (begun.sign() == sign)
            assert has_gradient[of_sign].double().mean() > 0.5
    for name in final.masks.keys() & still:
        assert torch.equal(final.params[name].to(start.params[name].dtype), start.params[name])


@pytest.mark.parametrize("optimizer", ["nesterov-decay", "adam-decay"])
def test_a_pruned_weight_stays_zero_when_the_dense_optimizer_state_is_restored(optimizer):
    method, rate = OPTIMIZERS[optimizer]
    settings = plain(optimizer=method, learning_rate=rate)
    dense = separate.train(task(mlp, settings, keep=[4]), beginning(mlp)).snapshots[4]
    mask = beginning(mlp, masked=True).masks
    moments = {
        kind: masking.apply(mask, tensors) if kind != "step" else tensors
        for kind, tensors in dense.optimizer.items()
    }
    state = State(4, masking.apply(mask, dense.params), {}, mask, moments)
    assert any(bool(tensor.any()) for kind in moments.values() for tensor in kind.values())
    final = separate.train(task(mlp, settings), state, lambda step, now: assert_pruned(now()))
    assert_pruned(final)
    state.optimizer = {}
    assert not torch.equal(
        separate.train(task(mlp, settings), state).params["output.weight"],
        final.params["output.weight"],
    )


@pytest.mark.parametrize("kind", ["params", "momentum_buffer"])
def test_a_state_whose_pruned_weights_would_come_back_is_refused(kind):
    state = beginning(mlp, masked=True)
    weight = torch.ones_like(state.params["hidden1.weight"])
    if kind == "params":
        state.params["hidden1.weight"] = weight
    else:
        state.optimizer = {kind: {"hidden1.weight": weight}}
    with pytest.raises(SpecError, match=f"must be 0 .* got others in `hidden1.weight` of `{kind}`"):
        separate.train(task(mlp, plain(optimizer=Sgd(momentum=0.9))), state)


class Loud(nn.Module):
    """Its first weight's gradient overflows while everything else is moderate."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(2, CLASSES)
        self.register_buffer("scale", torch.tensor([3e38, 1.0]))

    def forward(self, inputs):
        return 100 * self.output(inputs.flatten(1)[:, :2].abs().clamp(0.5, 1) * self.scale)


def test_a_gradient_that_overflows_does_not_reach_a_pruned_weight():
    params, buffers = initial_parameters(Loud, TorchDefault(), 0)
    mask = {"output.weight": torch.tensor([[False, True]]).expand(CLASSES, 2).clone()}
    state = State(0, masking.apply(mask, params), buffers, mask)
    settings = plain(dtype="float32", learning_rate=1e-3)
    dense = separate.train(task(Loud, settings), State(0, state.params, buffers))
    assert not dense.params["output.weight"].isfinite().all()
    final = separate.train(task(Loud, settings), state)
    assert_pruned(final)
    assert not final.diverged
    assert not torch.equal(final.params["output.weight"], state.params["output.weight"])


# -- pauses and snapshots --------------------------------------------------------------------------


class Paused(Exception):
    """Carries the checkpoint."""


def paused_at(pause):
    def pulse(step, state):
        if step == pause:
            raise Paused(state())

    return pulse


def from_file(state):
    """The state as it comes back from a file."""
    tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
    return State.restored(tensors, json.loads(json.dumps(state.facts())))


RESTLESS = {
    "momentum": (restless, Sgd(momentum=0.9, nesterov=True, weight_decay=1e-3), True),
    "adam": (restless, Adam(weight_decay=1e-3), True),
    "sgd": (restless, Sgd(), False),
    "replaced buffer": (Averaging, Adam(), False),
    "tied": (Tied, Adam(), True),
    "partly": (Partly, Sgd(momentum=0.9), True),
}


@pytest.mark.parametrize("case", RESTLESS)
def test_a_training_paused_at_any_step_ends_bit_for_bit_as_one_that_was_not(case):
    build, optimizer, masked = RESTLESS[case]
    settings = plain(
        optimizer=optimizer,
        learning_rate=0.02,
        schedule=Cosine(warmup=4),
        dtype="float32",
        augment=CropFlip(padding=1),
    )
    start, seen = beginning(build, masked=masked), []

    def begin():
        return task(build, settings, keep=[3, 8])

    unbroken = separate.train(begin(), start, lambda _, state: seen.append(state()))
    assert [look.step for look in unbroken.evaluations] == [0, 5, 10, 12]
    assert_same(separate.train(begin(), start), unbroken)  # looking changes nothing
    for step in range(settings.steps - 1):  # so, by induction, whatever the pauses
        torch.manual_seed(step)
        with pytest.raises(Paused) as pause:
            separate.train(begin(), from_file(seen[step]), paused_at(step + 1))
        assert_same(pause.value.args[0], seen[step + 1])
    for step in (0, 3, 4, 7, 11):
        torch.manual_seed(step)
        assert_same(separate.train(begin(), from_file(seen[step])), unbroken)


@pytest.mark.parametrize("k", [0, 1, 5, 7, 11])
@pytest.mark.parametrize("optimizer", [Sgd(momentum=0.9), Adam()], ids=["momentum", "adam"])
def test_a_run_from_a_snapshot_with_its_optimizer_ends_bit_for_bit_as_the_unbroken_one(
    optimizer, k
):
    settings = plain(optimizer=optimizer, learning_rate=0.02, dtype="float32", schedule=Cosine())
    unbroken = separate.train(task(restless, settings, keep=[k]), beginning(restless))
    kept = from_file(unbroken).snapshots[k]
    assert (kept.step, kept.evaluations, kept.snapshots) == (k, [], {})
    again = separate.train(task(restless, settings), kept)
    unbroken.snapshots = {}
    later = {look.step: look for look in unbroken.evaluations}
    first, *rest = again.evaluations
    assert (first.step, first.train_loss) == (k, None)
    for look in rest:
        expected = later[look.step]
        assert (look.test_loss, look.validation_loss) == (
            expected.test_loss,
            expected.validation_loss,
        )
    again.evaluations = unbroken.evaluations
    assert_same(again, unbroken)
    kept.optimizer = {}
    without = separate.train(task(restless, settings), kept)
    is_same = torch.equal(without.params["0.weight"], unbroken.params["0.weight"])
    assert is_same == (k == 0)  # from there on the optimizer's memory matters


def test_snapshots_are_kept_at_the_beginning_of_their_steps_and_do_not_follow_the_training():
    settings = plain(optimizer=Sgd(momentum=0.9))
    seen = {}

    def pulse(step, state):
        seen[step] = state()

    kept = task(normed, settings, keep=[0, 3, 11, 12, 99])
    final = separate.train(kept, beginning(normed), pulse)
    assert list(seen) == list(range(12))
    assert list(final.snapshots) == [0, 3, 11]
    for step, snapshot in final.snapshots.items():
        assert_same(State.restored(snapshot.tensors(), snapshot.facts()), snapshot)
        seen[step].snapshots, seen[step].evaluations = {}, []
        assert_same(snapshot, seen[step])


def test_the_given_state_is_not_changed_and_shares_nothing_with_the_result():
    settings = plain(optimizer=Sgd(momentum=0.9), dtype="float64", learning_rate=0.1)
    dense = separate.train(task(normed, settings, keep=[2]), beginning(normed))
    for state in (beginning(normed, masked=True), dense.snapshots[2], dense):
        before = copy.deepcopy(state)
        final = separate.train(task(normed, settings, last=17, keep=[4]), state)
        assert_same(state, before)
        final.masks = {name: mask.clone() for name, mask in final.masks.items()}
        for tensor in [*final.params.values(), *final.buffers.values(), final.losses]:
            tensor.add_(1)
        assert_same(state, before)


# -- evaluations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "every", "expected"),
    [
        (0, 10, 4, [0, 4, 8, 10]),
        (0, 8, 4, [0, 4, 8]),
        (0, 3, 100, [0, 3]),
        (0, 3, 1, [0, 1, 2, 3]),
        (3, 10, 4, [3, 4, 8, 10]),
        (4, 9, 4, [4, 8, 9]),
        (10, 13, 4, [10, 12, 13]),
        (5, 5, 4, [5]),
    ],
)
def test_the_first_and_the_last_step_and_all_multiples_are_evaluated(first, last, every, expected):
    settings = plain(steps=10, eval_every=every)
    final = separate.train(task(mlp, settings, last=last), beginning(mlp, step=first))
    assert [look.step for look in final.evaluations] == expected
    assert final.step == last
    assert float(final.losses) == 0


@pytest.mark.parametrize("num", [1, 999, 1000, 1001, 2003])
def test_evaluations_are_as_by_hand_whatever_the_number_of_examples(num):
    data = dataset(num_validation=num, num_test=17)
    state = beginning(normed)
    final = separate.train(task(normed, plain(steps=1), last=0, data=data), state)
    network = normed().double()
    network.load_state_dict(state.params | state.buffers)
    with torch.no_grad():
        val_loss, val_accuracy, test_loss, test_accuracy = looks_by_hand(network, data)
    (look,) = final.evaluations
    assert look.train_loss is None
    assert look.validation_loss == pytest.approx(val_loss, rel=1e-12)
    assert look.test_loss == pytest.approx(test_loss, rel=1e-12)
    assert (look.validation_accuracy, look.test_accuracy) == (val_accuracy, test_accuracy)
    assert look.validation_accuracy * num == pytest.approx(round(val_accuracy * num), abs=1e-9)


def test_the_network_trains_in_training_mode_and_is_evaluated_in_evaluation_mode():
    witness = Witness()
    settings = plain(steps=3, eval_every=2)
    run = Task(witness, dataset(), settings, 0, 3)
    separate.train(run, beginning(Witness))
    modes = [(is_training, has_gradient) for is_training, has_gradient, _ in witness.shown]
    look, step = [(False, False)] * 2, [(True, True)]
    assert modes == [*look, *step, *step, *look, *step, *look]
    data = dataset()
    whole = data.prepare(data.validation.inputs, torch.float64)
    assert torch.equal(witness.shown[0][2], whole)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_divergence_is_a_result(dtype, masked):
    settings = plain(steps=40, learning_rate=1e300 if dtype == "float64" else 1e30, dtype=dtype)
    final = separate.train(task(mlp, settings, keep=[2]), beginning(mlp, masked=masked))
    assert final.diverged
    assert final.step < settings.steps
    assert final.evaluations[-1].step == final.step
    assert not final.evaluations[-1].is_finite
    assert all(look.is_finite for look in final.evaluations[:-1])
    assert 0 <= final.evaluations[-1].test_accuracy <= 1
    if masked:
        assert_pruned(final)
    pulses = []
    again = separate.train(task(mlp, settings), final, lambda step, _: pulses.append(step))
    assert pulses == []
    assert again.diverged
    assert len(again.evaluations) == len(final.evaluations)


def test_a_state_that_is_not_finite_diverges_before_its_first_step():
    state = beginning(mlp)
    state.params["output.bias"][0] = math.nan
    final = separate.train(task(mlp, plain()), state)
    assert (final.step, final.diverged, len(final.evaluations)) == (0, True, 1)


# -- randomness and order --------------------------------------------------------------------------


@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_global_generators_are_untouched(is_stopped):
    def generators():
        numeric = np.random.get_state()  # noqa: NPY002
        return random.getstate(), numeric[1].tolist(), torch.get_rng_state().tolist()

    def pulse(step, state):
        state()
        random.random()
        np.random.random()  # noqa: NPY002
        torch.rand(1)
        if is_stopped and step == 3:
            raise Paused

    run, state = task(restless, plain(augment=CropFlip(padding=1))), beginning(restless)
    before = generators()
    if is_stopped:
        with pytest.raises(Paused):
            separate.train(run, state, pulse)
    else:
        separate.train(run, state, pulse)
    assert generators() == before


def batches(settings, *, seed=0, first=0, last=None, masked=False, num_eval=7):
    witness, state = Witness(), beginning(Witness, masked=masked, seed=seed, step=first)
    last = settings.steps if last is None else last
    data = dataset(num_validation=num_eval)
    separate.train(Task(witness, data, settings, seed, last), state)
    return torch.stack(witness.batches())


def test_every_arm_of_a_seed_sees_the_same_batches():
    reference = batches(plain())
    assert reference.shape == (12, BATCH, *SHAPE)
    for other in (
        batches(plain(optimizer=Adam(), learning_rate=1e-3, schedule=Cosine(warmup=3))),
        batches(plain(), masked=True),
        batches(plain(eval_every=1), num_eval=30),
        batches(plain(steps=30), last=12),
    ):
        assert torch.equal(other, reference)
    for first in (1, 5, 11):
        assert torch.equal(batches(plain(), first=first), reference[first:])
    assert not torch.equal(batches(plain(), seed=1), reference)


def test_every_arm_of_a_seed_sees_the_same_augmented_batches():
    settings = plain(augment=CropFlip(padding=1))
    reference = batches(settings)
    assert torch.equal(batches(settings, masked=True), reference)
    assert torch.equal(batches(settings, first=5), reference[5:])
    assert not torch.equal(reference, batches(plain()))


def test_batches_go_on_past_those_drawn_at_once():
    settings = plain(steps=2 * contract.AHEAD + 3, eval_every=1000)
    line = batches(settings)
    assert torch.equal(line[contract.AHEAD - 1 :], batches(settings, first=contract.AHEAD - 1))
    assert len(line) == 2 * contract.AHEAD + 3


def test_dropout_draws_the_same_whatever_was_trained_or_drawn_before():
    settings, state = plain(), beginning(dropped)
    first = separate.train(task(dropped, settings), state)
    torch.manual_seed(1234)
    assert_same(separate.train(task(dropped, settings), state), first)
    other = separate.train(task(dropped, settings, seed=1), state)
    assert not torch.equal(other.params["4.weight"], first.params["4.weight"])


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.params.pop("4.bias"), r"parameter `4.bias` of shape \[3\] where .* is none"),
        (lambda s: s.params.update(new=torch.zeros(2)), r"`new` of shape none .* is \[2\]"),
        (lambda s: s.params.update({"4.bias": torch.zeros(1)}), r"`4.bias` .* \[3\] .* is \[1\]"),
        (lambda s: s.buffers.pop("1.running_mean"), r"buffer `1.running_mean` .* is none"),
        (lambda s: s.buffers.update(new=torch.zeros(())), r"buffer `new` of shape none .* is \[\]"),
    ],
)
def test_a_state_of_another_network_is_refused(change, message):
    state = beginning(normed)
    change(state)
    with pytest.raises(SpecError, match=message):
        separate.train(task(normed, plain()), state)


class Counting(torch.optim.SGD):
    """An optimizer that remembers a number that is no tensor."""

    def step(self, closure=None):
        super().step(closure)
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["count"] = self.state[weight].get("count", 0) + 1


class Odd(Sgd):
    """Its recipe."""

    def build(self, params, rate):
        return Counting(params, lr=rate)


def test_an_optimizer_whose_state_could_not_be_resumed_is_refused():
    settings = plain().model_copy(update={"optimizer": Odd()})
    with pytest.raises(AssertionError, match="count"):
        separate.train(task(mlp, settings, last=1), beginning(mlp))
