import math

import pytest
import torch
from torch import nn

from windfall import chains, dynamics, simulation, students
from windfall.course import Course
from windfall.experiments import matrix_course, num_macs, training_flops
from windfall.inputs import Gaussian
from windfall.laboratory import Laboratory, Training
from windfall.simulation import Matrices
from windfall.students import Student
from windfall.teachers import Teacher

HIDDEN = (3, 4)


def small(**changes):
    settings = {
        "teacher": Teacher(hidden=HIDDEN),
        "student": Student(multi=2),
        "inputs": Gaussian(dimension=5, num_train=64, num_evaluation=200),
        "num_outputs": 6, "batch_size": 8, "steps": 40, "measure_every": 10, "dtype": "float64",
    }  # fmt: skip
    return Laboratory(**(settings | changes))


def wide(norm="none", **changes):
    return small(student=Student(multi=2, norm=norm), **changes)


def same(one, other):
    ones, others = one.tensors(), other.tensors()
    assert ones.keys() == others.keys()
    assert all(torch.equal(ones[name], others[name]) for name in ones)


@pytest.mark.parametrize("loss", ["squared-error", "cross-entropy"])
@pytest.mark.parametrize("norm", ["none", "before", "after"])
def test_a_step_is_that_of_torch(loss, norm):
    settings = wide(norm, loss=loss)
    training, twin = Training(settings, 3), Training(settings, 3).network
    optimizer = torch.optim.SGD(twin.parameters(), lr=settings.learning_rate)
    batches = settings.inputs.drawn(3, settings.batch_size).batches(0)
    for _ in range(5):
        inputs = next(batches).double()
        answers = dynamics.signals(training.goal, inputs).outputs
        training.advance(inputs, answers.clone())
        optimizer.zero_grad()
        if loss == "squared-error":
            nn.MSELoss()(twin(inputs), answers).backward()
        else:
            nn.CrossEntropyLoss()(twin(inputs), answers.argmax(1)).backward()
        optimizer.step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(training.params[name], value, rtol=1e-10, atol=1e-12)
    begun = Training(settings, 3).params
    assert not torch.equal(begun["output.weight"], training.params["output.weight"])


@pytest.mark.parametrize("num_train", [64, None])
@pytest.mark.parametrize("norm", ["none", "before"])
def test_a_training_that_was_paused_ends_bit_for_bit(num_train, norm):
    inputs = Gaussian(dimension=5, num_train=num_train, num_evaluation=200)
    settings, kept = wide(norm, inputs=inputs, dtype="float32"), {}
    whole = settings.course(1, lambda step, state: kept.setdefault(step, state()))
    for step in (4, 20):
        same(Training(settings, 1, kept[step]).run(), whole)


def test_what_is_measured_is_what_dynamics_says():
    settings = small()
    states = []
    course = settings.course(2, lambda _, state: states.append(state()))
    training = Training(settings, 2)
    seen = training.inputs.evaluation.double()
    ends = states[-1].params
    goal, own = (dynamics.activations(params, seen) for params in (training.goal, ends))
    for layer in ("hidden1", "hidden2"):
        rho = dynamics.correlation(goal[layer], own[layer])
        torch.testing.assert_close(course.last[layer], rho)
        assert course.alignment(layer)[-1] == pytest.approx(float(rho.max(1).values.mean()))
        norms = chains.outgoing_norms(ends)[layer]
        torch.testing.assert_close(course.outgoing[layer][-1], norms)
        live = ~dynamics.dead(goal[layer])
        ranks = dynamics.ranks(course.first[layer], dynamics.winners(rho))[live]
        assert torch.equal(course.ranks(layer), ranks)
    error = dynamics.signals(training.goal, seen).outputs - dynamics.signals(ends, seen).outputs
    assert float(course.loss[-1]) == pytest.approx(float(error.square().mean()))
    update = dynamics.expected_update(ends, training.goal, seen[:256])
    assert {n: float(v[-1]) for n, v in course.gradient.items()} == pytest.approx(
        dynamics.update_norms(update)
    )
    assert torch.equal(course.frames[-1], course.last["hidden1"])


def test_a_student_with_normalization_is_measured_behind_it():
    settings = wide("after")
    training = Training(settings, 0)
    with torch.no_grad():
        training.network.hidden1_norm.weight[0] = 0
    assert float(training.look().rho["hidden1"][:, 0].abs().max()) == 0


def test_it_is_measured_early_often_and_at_the_last_step():
    course = small(steps=45).course(0)
    assert course.steps.tolist() == [0, 1, 2, 4, 8, 10, 20, 30, 40, 45]


def test_a_student_learns():
    course = small(steps=400, learning_rate=0.5, inputs=Gaussian(dimension=5, std=2.0)).course(0)
    assert course.loss[-1] < 0.2 * course.loss[0]
    assert course.alignment("hidden1")[-1] > course.alignment("hidden1")[0] + 0.05


def test_a_seed_names_teacher_and_inputs_whatever_the_student():
    one, other = Training(small(), 4), Training(small(student=Student(multi=5)), 4)
    assert all(torch.equal(one.goal[name], other.goal[name]) for name in one.goal)
    assert torch.equal(one.evaluation, other.evaluation)
    assert one.params["hidden1.weight"].shape != other.params["hidden1.weight"].shape
    again = Training(small(), 5)
    assert not torch.equal(one.goal["hidden1.weight"], again.goal["hidden1.weight"])
    assert not torch.equal(one.evaluation, again.evaluation)


@pytest.mark.parametrize("num_train", [50, None])
def test_batches_do_not_depend_on_where_they_begin(num_train):
    inputs = Gaussian(dimension=2, num_train=num_train)
    whole = inputs.drawn(0, 8).batches(0)
    batches = [next(whole) for _ in range(140)]
    for step in (1, 63, 64, 130):
        assert torch.equal(next(inputs.drawn(0, 8).batches(step)), batches[step])


def test_fixed_inputs_come_again_and_fresh_ones_do_not():
    fixed = Gaussian(dimension=1, num_train=8).drawn(0, 8).batches(0)
    one, other = next(fixed), next(fixed)
    assert torch.equal(one.sort(0).values, other.sort(0).values)
    fresh = Gaussian(dimension=1, num_train=None).drawn(0, 8).batches(0)
    assert not set(next(fresh).flatten().tolist()) & set(next(fresh).flatten().tolist())


def test_inputs_have_the_standard_deviation_asked_for():
    drawn = Gaussian(dimension=50, std=3.0, num_evaluation=2000).drawn(0, 1).evaluation
    assert float(drawn.std()) == pytest.approx(3.0, rel=0.02)


def test_a_learning_rate_that_is_too_high_diverges_and_keeps_what_was_measured():
    course = small(learning_rate=1e6, steps=2000).course(0)
    assert course.diverged
    assert bool(course.loss[:-1].isfinite().all())
    assert not bool(course.loss[-1].isfinite())
    assert course.steps[-1] < 2000


def test_a_course_comes_back_from_its_tensors():
    course = small().course(0)
    same(Course.restored(course.tensors(), diverged=False), course)


def test_layers_that_do_not_chain_are_refused():
    with pytest.raises(
        ValueError, match=r"sizes of 2 hidden layers, as the teacher's \[3, 4\]; got \[3\]"
    ):
        small(student=Student(hidden=(3,)))


def test_values_too_few_for_different_rows_are_refused():
    with pytest.raises(ValueError, match=r"`teacher\.values` must make 3 different nonzero"):
        small(teacher=Teacher(hidden=HIDDEN, values=(0.5,)))


def test_the_matrix_form_gives_a_course():
    settings = Matrices(sizes=(4, 3, 5), num_steps=200, measure_every=50)
    course, series = matrix_course(settings, 0), simulation.simulate(settings, 0)
    assert course.steps.tolist() == [0, 50, 100, 150, 200]
    assert course.alignment("hidden1").tolist() == pytest.approx(series.best.mean(1).tolist())
    assert course.outgoing["hidden1"].shape == (5, 6)
    assert torch.equal(course.first["hidden1"], torch.from_numpy(series.first))


def test_the_default_is_the_papers_and_its_cost_is_counted():
    settings = Laboratory()
    assert num_macs(settings) == 20 * 100 + 100 * 150 + 150 * 200 + 200 * 250 + 250 * 100
    assert settings.num_epochs == 40
    assert training_flops(settings) == pytest.approx(2.93e12, rel=0.01)
    assert num_macs(Matrices()) == 10 * 40 + 40 * 30
    assert math.isnan(small(inputs=Gaussian(num_train=None)).num_epochs)


def test_a_perturbed_student_begins_near_its_teacher():
    near = Student(multi=2, start=students.Perturbed(std=0.01))
    course = small(student=near).course(0)
    dead = course.dead["hidden1"]
    assert bool((course.best["hidden1"][0][~dead] > 0.98).all())
