"""The matrix form: closed forms against sampling and differences, and the paper's simulation."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from windfall import dynamics, seeds, simulation, spec, students
from windfall.simulation import Batch, Expectation, Factored, Matrices, Network
from windfall.spec import SpecError

EXPECTATIONS = [member() for member in spec.members(Expectation).values()]
SMALL = Matrices(sizes=(3, 4, 5), batch_size=8, num_steps=30, measure_every=10)


def name_of(member):
    return spec.tag(type(member))


def rows(num, size, seed, *, bias=True):
    drawn = seeds.stream(seed, "rows").standard_normal((num, size + 1))
    drawn[:, -1] *= bias
    return drawn


def pair(*, bias=True):
    """A student of four nodes and a teacher of three; one node of each is the same."""
    student = Network(rows(4, 3, 0, bias=bias), rows(2, 4, 1, bias=bias))
    teacher = Network(rows(3, 3, 2, bias=bias), rows(2, 3, 3, bias=bias))
    teacher.hidden[0] = student.hidden[1]
    teacher.hidden[1] = -2 * student.hidden[2]
    return student, teacher


def inputs(num, size=3, seed=0):
    return np.column_stack(
        [seeds.stream(seed, "inputs").standard_normal((num, size)), np.ones(num)]
    )


def as_params(network):
    layers = {"hidden1": network.hidden, "output": network.output}
    return {
        f"{name}.{kind}": torch.from_numpy(np.ascontiguousarray(part))
        for name, matrix in layers.items()
        for kind, part in (("weight", matrix[:, :-1]), ("bias", matrix[:, -1]))
    }


def as_network(params):
    return Network(
        *(
            np.column_stack([params[f"{name}.weight"], params[f"{name}.bias"]])
            for name in ("hidden1", "output")
        )
    )


def assert_equal(one, other, tolerance=1e-10):
    np.testing.assert_allclose(one.hidden, other.hidden, rtol=0, atol=tolerance)
    np.testing.assert_allclose(one.output, other.output, rtol=0, atol=tolerance)


# -- closed forms -----------------------------------------------------------------------------

THRESHOLDS = [-1.2, -0.0, 0.0, 0.3, 2.0]
CORRELATIONS = [-1.0, -0.999, -0.4, 0.0, 0.6, 1.0]


@pytest.mark.parametrize(("h", "k"), [*itertools.product(THRESHOLDS, THRESHOLDS)])
def test_an_orthant_is_what_scipy_integrates(h, k):
    for r in CORRELATIONS:
        found = simulation.orthant(*(np.array([value]) for value in (h, k, r)))[0]
        law = multivariate_normal([0, 0], [[1, r], [r, 1]], allow_singular=True)
        assert found == pytest.approx(float(law.cdf([h, k])), abs=1e-8)


@pytest.mark.parametrize("bias", [False, True])
def test_overlaps_are_what_sampling_gives_within_its_error(bias):
    student, teacher = pair(bias=bias)
    x = inputs(200_000)
    u, v = x @ student.hidden.T, x @ teacher.hidden.T
    found = simulation.overlaps(student.hidden, teacher.hidden)
    for j, k in itertools.product(range(4), range(3)):
        gate, other = u[:, j] > 0, np.maximum(v[:, k], 0)
        both, gated, product = gate & (v[:, k] > 0), gate * other, np.maximum(u[:, j], 0) * other
        for name, samples in (("both", both), ("gated", gated), ("product", product)):
            error = samples.std() / math.sqrt(len(x))
            assert abs(getattr(found, name)[j, k] - samples.mean()) < 5 * error + 1e-8
        expected = gated[:, None] * x[:, :-1]
        stein = found.boundary[j, k] * student.hidden[j] + found.both[j, k] * teacher.hidden[k]
        errors = expected.std(0) / math.sqrt(len(x))
        assert (abs(stein[:-1] - expected.mean(0)) < 5 * errors + 1e-8).all()


def test_without_biases_overlaps_are_arc_cosine_kernels():
    ones, others = rows(4, 3, 0, bias=False), rows(5, 3, 1, bias=False)
    found = simulation.overlaps(ones, others)
    for j, k in itertools.product(range(4), range(5)):
        a, c = ones[j, :-1], others[k, :-1]
        size = np.linalg.norm(a) * np.linalg.norm(c)
        angle = math.acos(a @ c / size)
        degree_0 = (math.pi - angle) / (2 * math.pi)
        degree_1 = size * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
        assert found.both[j, k] == pytest.approx(degree_0, abs=1e-12)
        assert found.product[j, k] == pytest.approx(degree_1, abs=1e-12)


def test_a_node_overlaps_itself_as_one_variable_does():
    own = rows(5, 3, 0)
    found = simulation.overlaps(own, own)
    np.testing.assert_allclose(np.diag(found.both), simulation.firing(own), atol=1e-8)
    np.testing.assert_allclose(np.diag(found.gated), simulation.rectified_means(own), atol=1e-8)
    x = inputs(200_000)
    squares = np.maximum(x @ own.T, 0) ** 2
    errors = squares.std(0) / math.sqrt(len(x))
    assert (abs(np.diag(found.product) - squares.mean(0)) < 5 * errors).all()


def test_the_loss_is_what_sampling_gives_within_its_error():
    student, teacher = pair()
    x = torch.from_numpy(inputs(200_000)[:, :-1])
    outputs, goals = (
        dynamics.signals(as_params(network), x).outputs for network in (student, teacher)
    )
    losses = 0.5 * (goals - outputs).square().sum(1)
    error = float(losses.std()) / math.sqrt(len(x))
    assert abs(simulation.exact_loss(student, teacher) - float(losses.mean())) < 5 * error


def test_the_update_over_all_inputs_is_minus_the_losss_gradient():
    student, teacher = pair()
    update = simulation.gaussian_update(student, teacher)
    for field in ("hidden", "output"):
        matrix = getattr(student, field)
        for place in np.ndindex(matrix.shape):
            losses = []
            for sign in (1, -1):
                moved = {"hidden": student.hidden.copy(), "output": student.output.copy()}
                moved[field][place] += sign * 1e-3
                losses.append(simulation.exact_loss(Network(**moved), teacher))
            slope = (losses[0] - losses[1]) / 2e-3
            assert getattr(update, field)[place] == pytest.approx(-slope, abs=2e-5)


def test_the_update_over_all_inputs_is_what_batches_give_within_their_error():
    student, teacher = pair()
    update = simulation.gaussian_update(student, teacher)
    batches = [Batch().update(student, teacher, inputs(5_000, seed=seed)) for seed in range(60)]
    for field in ("hidden", "output"):
        found = np.array([getattr(batch, field) for batch in batches])
        error = found.std(0, ddof=1) / math.sqrt(len(batches))
        # Of 22 entries the largest of Student's t of 59 degrees is below 5 with p > .9998.
        assert (abs(found.mean(0) - getattr(update, field)) < 5 * error).all()


def test_correlation_over_all_inputs_is_what_a_sample_estimates():
    student, teacher = pair()
    exact = simulation.exact_correlation(teacher.hidden, student.hidden)
    x = inputs(200_000)
    found = np.corrcoef(np.maximum(x @ np.vstack([teacher.hidden, student.hidden]).T, 0).T)[:3, 3:]
    np.testing.assert_allclose(exact, found, atol=0.02)
    assert exact[0, 1] == pytest.approx(1, abs=1e-7)  # the node that both have


def test_a_node_that_never_fires_correlates_with_nothing():
    student, teacher = pair()
    student.hidden[0, -1] = -1_000
    exact = simulation.exact_correlation(teacher.hidden, student.hidden)
    assert abs(exact[:, 0]).max() < 1e-6
    assert np.isfinite(exact).all()


# -- the family of expectations ---------------------------------------------------------------


@pytest.mark.parametrize("expectation", EXPECTATIONS, ids=name_of)
class TestEveryExpectation:
    def test_a_student_equal_to_the_teacher_is_not_moved(self, expectation):
        _, teacher = pair()
        update = expectation.update(teacher, teacher, inputs(50))
        assert_equal(update, Network(0 * teacher.hidden, 0 * teacher.output), 1e-12)

    def test_permuting_student_nodes_permutes_the_update(self, expectation):
        student, teacher = pair()
        order = [2, 0, 3, 1]
        other = Network(student.hidden[order], student.output[:, [*order, 4]])
        before = expectation.update(student, teacher, inputs(50))
        after = expectation.update(other, teacher, inputs(50))
        assert_equal(after, Network(before.hidden[order], before.output[:, [*order, 4]]))

    def test_the_networks_are_left_as_they_are(self, expectation):
        student, teacher = pair()
        copies = pair()
        expectation.update(student, teacher, inputs(50))
        for network, copy in zip((student, teacher), copies, strict=True):
            assert np.array_equal(network.hidden, copy.hidden)
            assert np.array_equal(network.output, copy.output)

    def test_a_simulation_learns_and_repeats_itself(self, expectation):
        settings = SMALL.model_copy(update={"expectation": expectation})
        series, again = (simulation.simulate(settings, 0) for _ in range(2))
        assert series.steps.tolist() == [0, 10, 20, 30]
        assert series.best.shape == (4, 4)
        assert series.outgoing.shape == (4, 9)
        assert series.first.shape == series.last.shape == (4, 8)
        assert series.loss[-1] < series.loss[0]
        assert np.array_equal(series.best, again.best)
        assert np.array_equal(series.best[0], series.first.max(1))
        assert np.array_equal(series.best[-1], series.last.max(1))
        other = simulation.simulate(settings, 1)
        assert not np.array_equal(series.first, other.first)

    def test_it_survives_json(self, expectation):
        settings = Matrices(expectation=expectation)
        assert Matrices.from_json(settings.to_json()) == settings


def test_a_batch_is_the_expected_update_of_dynamics():
    student, teacher = pair()
    x = inputs(50)
    found = dynamics.expected_update(
        as_params(student), as_params(teacher), torch.from_numpy(x[:, :-1])
    )
    assert_equal(Batch().update(student, teacher, x), as_network(found))


def test_factored_is_that_of_dynamics_where_the_outputs_biases_agree():
    student, teacher = pair()
    student.output[:, -1] = teacher.output[:, -1]
    x = inputs(50)
    params = as_params(student), as_params(teacher)
    found = dynamics.couplings(*params, torch.from_numpy(x[:, :-1]))
    assert_equal(
        Factored().update(student, teacher, x),
        as_network(dynamics.factored_update(*params, found)),
    )


def test_factored_lets_no_bias_of_the_output_pull_a_hidden_node():
    student, teacher = pair()
    before = Factored().update(student, teacher, inputs(50)).hidden
    teacher.output[:, -1] += 5
    assert np.array_equal(Factored().update(student, teacher, inputs(50)).hidden, before)
    assert not np.array_equal(Batch().update(student, teacher, inputs(50)).hidden, before)


# -- simulate ---------------------------------------------------------------------------------


def test_a_simulation_begins_at_the_teacher_with_noise_and_unit_rows():
    student, teacher = simulation.begin(Matrices(), 0)
    assert student.hidden.shape == (40, 11)
    assert student.output.shape == (30, 41)
    assert teacher.hidden.shape == (20, 11)
    assert teacher.output.shape == (30, 21)
    for matrix in (student.hidden, student.output, teacher.hidden, teacher.output):
        np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1)
    assert (teacher.hidden[:, -1] == 0).all()
    assert (teacher.output[:, -1] == 0).all()
    assert (student.hidden[:20] * teacher.hidden).sum(1).min() > 0.8


def test_a_step_moves_by_the_learning_rate_and_divides_by_the_norms():
    student, teacher = simulation.begin(SMALL, 0)
    x = inputs(8)
    settings = SMALL.model_copy(update={"learning_rate": 0.5, "expectation": Batch()})
    moved = simulation.advance(student, teacher, x, settings)
    update = Batch().update(student, teacher, x)
    for field in ("hidden", "output"):
        expected = getattr(student, field) + 0.5 * getattr(update, field)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(getattr(moved, field), expected, atol=1e-14)


def test_the_inputs_of_a_step_are_those_of_one_unbroken_stream(monkeypatch):
    whole = simulation.simulate(SMALL, 0)
    monkeypatch.setattr(simulation, "_BLOCK", 7)
    assert np.array_equal(simulation.simulate(SMALL, 0).best, whole.best)
    drawn = seeds.stream(0, "inputs").standard_normal((30, 8, 3))
    student, teacher = simulation.begin(SMALL, 0)
    for x in drawn:
        full = np.concatenate([x, np.ones((8, 1))], axis=1)
        student = simulation.advance(student, teacher, full, SMALL)
    assert np.array_equal(student.hidden, whole.student.hidden)


def test_how_often_it_is_measured_changes_nothing():
    often, seldom = (
        simulation.simulate(SMALL.model_copy(update={"measure_every": every}), 0)
        for every in (1, 1_000)
    )
    assert seldom.steps.tolist() == [0, 30]
    assert np.array_equal(often.best[[0, -1]], seldom.best)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multi": 0}, "`multi` must"),
        ({"learning_rate": 0}, "`learning_rate` must"),
        ({"sizes": (10, 20)}, "`sizes"),
        ({"expectation": "exact"}, "`expectation` must be one of the known names"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(SpecError, match=message):
        spec.checked(lambda: Matrices(**settings))


# -- the paper's simulation -------------------------------------------------------------------

# At step 20,000: the least and greatest outgoing norm of a winner, the median and the greatest of
# the other nodes. Where a norm is below 1, or the greatest above .01, two nodes share a teacher's.
LAST = {
    0: (1.049, 1.397, 2.7e-4, 3.7e-3),
    1: (1.040, 1.448, 6.3e-4, 2.9e-2),
    2: (1.049, 1.375, 1.9e-4, 3.7e-4),
    3: (0.967, 1.422, 1.3e-3, 0.181),
    4: (1.074, 1.432, 1.1e-4, 1.8e-4),
    5: (0.923, 1.427, 1.4e-4, 2.4e-4),
    6: (1.001, 1.575, 1.8e-4, 2.7e-4),
    7: (0.992, 1.421, 1.6e-3, 0.190),
    8: (1.090, 1.447, 1.7e-4, 4.3e-4),
    9: (0.890, 1.396, 6.0e-4, 8.0e-2),
}


@pytest.mark.parametrize("seed", range(3))
def test_after_1000_steps_every_teacher_node_has_been_found(seed):
    series = simulation.simulate(Matrices(num_steps=1_000, measure_every=100), seed)
    means = series.best.mean(1)
    assert 0.92 < means[0] < 0.96
    assert 0.99 < means[1] < 0.995
    assert means[-1] >= 0.999
    won = dynamics.winners(torch.from_numpy(series.last))
    assert sorted(won.tolist()) == list(range(20))  # the node that began near it
    assert (dynamics.ranks(torch.from_numpy(series.first), won) == 0).all()


def last_of(seed):
    series = simulation.simulate(Matrices(measure_every=1_000), seed)
    assert series.best[1].mean() >= 0.999
    assert series.best[-1].min() > 0.9999
    won = dynamics.winners(torch.from_numpy(series.last))
    is_won = dynamics.is_winner(won, 40).numpy()
    norms, rest = series.outgoing[-1, :-1][is_won], series.outgoing[-1, :-1][~is_won]
    assert series.outgoing[-1, -1] < 1e-3  # of the biases
    return norms.min(), norms.max(), np.median(rest), rest.max()


@pytest.mark.slow
def test_after_20000_steps_what_won_no_teacher_node_is_not_read():
    assert last_of(0) == pytest.approx(LAST[0], rel=0.05)


@pytest.mark.paper
@pytest.mark.parametrize("seed", range(1, 10))
def test_the_papers_simulation_ends_as_it_was_measured(seed):
    assert last_of(seed) == pytest.approx(LAST[seed], rel=0.05)


@pytest.mark.slow
def test_far_from_the_teacher_student_nodes_share_teacher_nodes():
    settings = Matrices(
        multi=5, start=students.TorchUniform(), num_steps=5_000, measure_every=1_000
    )
    series = simulation.simulate(settings, 0)
    means = series.best.mean(1)
    assert 0.6 < means[0] < 0.72
    assert 0.8 < means[1] < 0.95
    assert means[-1] > 0.97
    is_matched = dynamics.is_matched(torch.from_numpy(series.last), 0.9).numpy()
    assert is_matched.sum() > 30  # of 100, for 20 teacher nodes
    assert np.median(series.outgoing[-1, :-1][is_matched]) < 1
