"""Schedules against torch's own, what a recipe refuses, and a state's way to a file and back."""

import json
import math

import pytest
import torch

from windfall import spec, train
from windfall.spec import SpecError, checked, decode
from windfall.train import (
    Adam,
    Constant,
    Cosine,
    Evaluation,
    Recipe,
    Sgd,
    State,
    StepDrops,
    early_stop,
)

STEPS, RATE = 40, 0.3


def recipe(schedule):
    return Recipe(schedule=schedule, steps=STEPS, learning_rate=RATE)


def look(step, validation_loss, train_loss=1.0, test_loss=1.0):
    return Evaluation(step, train_loss, validation_loss, 0.5, test_loss, 0.5)


# -- schedules -------------------------------------------------------------------------------------

BY_HAND = [
    (Constant(), {0: 1, 17: 1, 39: 1}),
    (Constant(warmup=1), {0: 1, 1: 1}),
    (Constant(warmup=4), {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 4: 1, 39: 1}),
    (StepDrops(at=(10, 20)), {0: 1, 9: 1, 10: 0.1, 19: 0.1, 20: 0.01, 39: 0.01}),
    (StepDrops(at=(10,), factor=0.5, warmup=20), {9: 0.5, 10: 0.5 * 11 / 20, 20: 0.5}),
    (StepDrops(), {0: 1, 39: 1}),
    (Cosine(), {0: 1, 10: (1 + math.sqrt(0.5)) / 2, 20: 0.5, 30: (1 - math.sqrt(0.5)) / 2}),
    (Cosine(warmup=20), {0: 0.05, 19: 1, 20: 1, 30: 0.5, 35: (1 - math.sqrt(0.5)) / 2}),
]


@pytest.mark.parametrize(("schedule", "factors"), BY_HAND, ids=lambda value: str(value)[:30])
def test_the_rate_of_a_step_is_as_by_hand(schedule, factors):
    rates = {step: recipe(schedule).rate(step) for step in factors}
    assert rates == pytest.approx({step: RATE * factor for step, factor in factors.items()})


def twin(schedule, optimizer):
    """The same schedule by torch's schedulers."""
    lr = torch.optim.lr_scheduler
    match schedule:
        case Constant():
            after = lr.LambdaLR(optimizer, lambda _: 1.0)
        case StepDrops():
            drops = [drop - schedule.warmup for drop in schedule.at]
            after = lr.MultiStepLR(optimizer, drops, gamma=schedule.factor)
        case Cosine():
            after = lr.CosineAnnealingLR(optimizer, T_max=STEPS - schedule.warmup)
    if schedule.warmup == 0:
        return after
    w = schedule.warmup
    rise = lr.LinearLR(optimizer, start_factor=1 / w, total_iters=w - 1)
    return lr.SequentialLR(optimizer, [rise, after], milestones=[w])


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(
    "schedule",
    [Constant(), StepDrops(at=(12, 25, 26), factor=0.2), Cosine()],
    ids=lambda schedule: spec.tag(type(schedule)),
)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch's SequentialLR on its own call
def test_every_schedule_gives_the_rates_of_its_torch_twin(schedule, warmup):
    schedule = schedule.model_copy(update={"warmup": warmup})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    scheduler = twin(schedule, optimizer)
    for step in range(STEPS):
        rate = recipe(schedule).rate(step)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15), step
        optimizer.step()
        scheduler.step()


def test_the_twins_are_of_every_schedule():
    assert set(spec.members(train.Schedule).values()) == {Constant, StepDrops, Cosine}


@pytest.mark.parametrize("schedule", [Constant(), StepDrops(at=(39,)), Cosine()])
def test_after_the_last_step_the_rate_stays_that_of_the_last(schedule):
    whole = recipe(schedule)
    assert whole.rate(STEPS) == whole.rate(10 * STEPS) == whole.rate(STEPS - 1) > 0


def test_a_warm_up_longer_than_the_training_rises_throughout():
    for schedule in (Constant(warmup=100), Cosine(warmup=100)):
        assert [recipe(schedule).rate(step) for step in (0, 39)] == [RATE * 0.01, RATE * 0.4]


# -- recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "`steps` must be greater than or equal to 1; got 0."),
        ({"batch_size": 0}, "`batch_size` must be greater than or equal to 1; got 0."),
        ({"eval_every": 0}, "`eval_every` must be greater than or equal to 1; got 0."),
        ({"steps": 1.5}, "`steps` must be a valid integer, .*; got 1.5."),
        ({"learning_rate": 0}, "`learning_rate` must be greater than 0; got 0."),
        ({"learning_rate": -0.1}, "`learning_rate` must be greater than 0; got -0.1."),
        ({"learning_rate": math.nan}, "`learning_rate` must be a finite number; got nan."),
        ({"learning_rate": math.inf}, "`learning_rate` must be a finite number; got inf."),
        ({"dtype": "float16"}, "`dtype` must be 'float32' or 'float64'; got 'float16'."),
        ({"learnig_rate": 1}, "no field `learnig_rate`. Did you mean `learning_rate`"),
        ({"optimizer": "adamw"}, "`optimizer` must be one of the known names; got 'adamw'.*adam"),
        ({"schedule": "linear"}, "`schedule` must be one .* got 'linear'.*step-drops, cosine"),
        ({"optimizer": {"kind": "sgd", "momentum": 1}}, "`optimizer.momentum` must be less than 1"),
        (
            {"optimizer": {"kind": "sgd", "momentum": -0.1}},
            "`optimizer.momentum` must be greater than or equal to 0; got -0.1.",
        ),
        (
            {"optimizer": {"kind": "sgd", "nesterov": True}},
            "^`optimizer` must have `momentum` above 0 where `nesterov` is true; got 0.$",
        ),
        (
            {"optimizer": {"kind": "sgd", "weight_decay": -1}},
            "`optimizer.weight_decay` must be greater than or equal to 0; got -1.",
        ),
        ({"optimizer": {"kind": "adam", "beta1": 1.0}}, "`optimizer.beta1` must be less than 1"),
        ({"optimizer": {"kind": "adam", "beta2": 2}}, "`optimizer.beta2` must be less than 1"),
        ({"optimizer": {"kind": "adam", "eps": 0}}, "`optimizer.eps` must be greater than 0"),
        ({"optimizer": {"kind": "adam", "momentum": 0.9}}, "no field `momentum`"),
        ({"schedule": {"kind": "constant", "warmup": -1}}, "`schedule.warmup` must be greater"),
        (
            {"schedule": {"kind": "step-drops", "at": [5, 5]}},
            r"^`schedule` must have increasing steps above 0 in `at`; got \[5, 5\].$",
        ),
        ({"schedule": {"kind": "step-drops", "at": [0, 5]}}, r"got \[0, 5\]"),
        ({"schedule": {"kind": "step-drops", "at": [9, 5]}}, r"got \[9, 5\]"),
        ({"schedule": {"kind": "step-drops", "factor": 0}}, "`schedule.factor` must be greater"),
        ({"schedule": {"kind": "step-drops", "factor": 1.5}}, "`schedule.factor` must be less"),
        ({"augment": {"kind": "crop-flip", "padding": -1}}, "`augment.padding` must be greater"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_is_refused(settings, message):
    with pytest.raises(SpecError, match=message):
        decode(Recipe, settings)
    with pytest.raises(SpecError, match=message):
        checked(lambda: Recipe(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adam", "schedule": "cosine", "dtype": "float64"},
        {"optimizer": Sgd(momentum=0.9, nesterov=True, weight_decay=1e-4)},
        {"optimizer": Adam(weight_decay=0.1), "schedule": StepDrops(at=(1, 3), factor=1)},
        {"augment": {"padding": 0}},
    ],
    ids=str,
)
def test_a_recipe_is_the_same_after_json(settings):
    whole = Recipe(**settings)
    again = Recipe.from_json(json.loads(json.dumps(whole.to_json())))
    assert again == whole
    assert again.address == whole.address


def test_the_evaluation_clock_strikes_at_multiples():
    whole = Recipe(eval_every=7)
    assert [step for step in range(30) if whole.evaluates(step)] == [0, 7, 14, 21, 28]


# -- evaluations -----------------------------------------------------------------------------------


def test_the_early_stop_is_the_earliest_of_least_validation_loss():
    losses = [3.0, 0.5, 2.0, 0.5, 0.6]
    looks = [look(100 * i, loss) for i, loss in enumerate(losses)]
    assert early_stop(looks).step == 100
    assert early_stop(looks[::-1]).step == 100
    assert early_stop(looks[:1]).step == 0


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_an_evaluation_that_is_not_finite_is_no_early_stop(odd):
    looks = [look(0, 2.0), look(1, 1.0), look(2, odd)]
    assert early_stop(looks).step == 1
    assert early_stop(looks[::-1]).step == 1


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_an_evaluation_is_finite_when_all_its_losses_are(odd):
    assert look(0, 1.0).is_finite
    assert look(0, 1.0, train_loss=None).is_finite
    assert not look(0, odd).is_finite
    assert not look(0, 1.0, train_loss=odd).is_finite
    assert not look(0, 1.0, test_loss=odd).is_finite


# -- states ----------------------------------------------------------------------------------------


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def small_state(step=7, **more):
    params = {"a.weight": drawn(3, 2), "a.bias": drawn(3), "odd/name": drawn(1)}
    buffers = {"norm.mean": drawn(4), "norm.count": torch.tensor(5)}
    mask = {"a.weight": drawn(3, 2) > 0}
    optimizer = {
        "exp_avg": {name: 2 * param for name, param in params.items()},
        "step": {"a.bias": torch.tensor(4.0), "odd/name": torch.tensor(3.0)},
    }
    losses = torch.tensor(math.pi, dtype=torch.float64)
    return State(step, params, buffers, mask, optimizer, losses=losses, **more)


def whole_state():
    snapshots = {0: State(0, {"p": drawn(2)}, {}), 3: small_state(3), 12: small_state(12)}
    return small_state(evaluations=[look(0, 1.0, None), look(5, 0.1 + 0.2)], snapshots=snapshots)


def assert_equal(one, other):
    assert (one.step, one.diverged) == (other.step, other.diverged)
    mine, theirs = one.tensors(), other.tensors()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def test_a_state_is_the_same_after_tensors_and_facts():
    state = whole_state()
    again = State.restored(state.tensors(), json.loads(json.dumps(state.facts())))
    assert_equal(again, state)
    assert again.evaluations == state.evaluations
    assert again.optimizer.keys() == state.optimizer.keys()
    assert again.optimizer["step"].keys() == {"a.bias", "odd/name"}
    assert list(again.snapshots) == [0, 3, 12]
    for step, snapshot in state.snapshots.items():
        assert_equal(again.snapshots[step], snapshot)


@pytest.mark.parametrize("diverged", [False, True])
def test_divergence_is_kept(diverged):
    state = small_state(diverged=diverged)
    assert State.restored(state.tensors(), state.facts()).diverged is diverged
    assert state.copy().diverged is diverged


def test_a_dense_state_without_an_optimizer_is_the_same_after_tensors_and_facts():
    state = State(0, {"w": drawn(2)}, {})
    again = State.restored(state.tensors(), state.facts())
    assert_equal(again, state)
    assert (again.masks, again.optimizer, again.snapshots, again.buffers) == ({}, {}, {}, {})


def test_a_copy_is_equal_and_shares_no_storage():
    state = whole_state()
    copy = state.copy()
    assert (copy.evaluations, copy.snapshots) == ([], {})
    assert len(state.evaluations) == 2
    assert len(state.snapshots) == 3
    state.snapshots = {}
    assert_equal(copy, state)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    for tensor in copy.tensors().values():
        tensor.copy_(~tensor if tensor.dtype == torch.bool else tensor + 1)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before[name]), name


def test_a_copy_of_live_parameters_does_not_follow_them():
    weight = torch.nn.Parameter(drawn(3))
    copy = State(0, {"w": weight}, {}).copy()
    assert not copy.params["w"].requires_grad
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(copy.params["w"], drawn(3))


def test_new_states_share_nothing():
    one, other = State(0, {}, {}), State(0, {}, {})
    one.losses += 1
    one.evaluations.append(look(0, 1.0))
    assert other.losses == 0
    assert other.evaluations == []
