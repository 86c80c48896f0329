"""Dynamics against brute force: a sample at a time, autograd, numpy, and sorting by hand."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from windfall import chains, dynamics, models, seeds
from windfall.students import Perturbed, Student, TorchUniform
from windfall.teachers import Teacher

CLOSE = {"rtol": 0, "atol": 1e-10}
# Hidden layers of the teacher and of the student: two, three and four layers.
PAIRS = [((3,), (5,)), ((3, 4), (6, 5)), ((4, 2, 3), (3, 5, 4))]


def network(hidden, seed, num_inputs=4, num_outputs=3):
    sizes, params = (num_inputs, *hidden, num_outputs), {}
    names = [*(f"hidden{i}" for i in range(1, len(hidden) + 1)), "output"]
    draw = seeds.stream(seed, "init")
    for name, (fan_in, size) in zip(names, itertools.pairwise(sizes), strict=True):
        params[f"{name}.weight"] = torch.from_numpy(draw.standard_normal((size, fan_in)))
        params[f"{name}.bias"] = torch.from_numpy(0.5 * draw.standard_normal(size))
    return params


def gaussian(num=40, size=4, seed=0, std=1.0):
    return torch.from_numpy(std * seeds.stream(seed, "inputs").standard_normal((num, size)))


def pair(hidden=PAIRS[1]):
    return network(hidden[1], 0), network(hidden[0], 1)


# -- twins: one sample at a time, as the formulas are written ---------------------------------


def passed(params, sample):
    """Of one sample, what each layer reads and its gates, with bias nodes."""
    names = [name.removesuffix(".weight") for name in params if name.endswith("weight")]
    values, reads, gates, weights = np.append(sample.numpy(), 1.0), [], [], []
    for name in names:
        weight = np.column_stack([params[f"{name}.weight"], params[f"{name}.bias"]])
        if name != "output":
            weight = np.vstack([weight, [*[0.0] * (weight.shape[1] - 1), 1.0]])
        weights.append(weight)
        reads.append(values)
        values = weight @ values
        gate = np.array([1.0 if value > 0 else 0.0 for value in values])
        gates.append(np.ones_like(gate) if name == "output" else gate)
        values = values * gates[-1]
    return names, weights, reads, gates


def recursion(one, other, sample):
    """β_l = W_{l+1}ᵀ H_{l+1} W'_{l+1} and H_l = (g g'ᵀ) ⊙ β_l, down from the identity."""
    names, weights, _, gates = passed(one, sample)
    _, weights_other, _, gates_other = passed(other, sample)
    h = np.eye(len(gates[-1]))
    betas, hs = {names[-1]: h}, {names[-1]: h}
    for layer in range(len(names) - 2, -1, -1):
        beta = weights[layer + 1].T @ h @ weights_other[layer + 1]
        h = np.outer(gates[layer], gates_other[layer]) * beta
        betas[names[layer]], hs[names[layer]] = beta, h
    return betas, hs


def mean_of(make, inputs):
    found = [make(sample) for sample in inputs]
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def twin_update(student, teacher, inputs):
    """The mean over samples of H* W* f* fᵀ - H W f fᵀ, products of one sample's own matrices."""

    def of_one(sample):
        names, weights, reads, _ = passed(student, sample)
        _, goals, goal_reads, _ = passed(teacher, sample)
        _, own = recursion(student, student, sample)
        _, star = recursion(student, teacher, sample)
        return {
            name: star[name] @ goals[i] @ np.outer(goal_reads[i], reads[i])
            - own[name] @ weights[i] @ np.outer(reads[i], reads[i])
            for i, name in enumerate(names)
        }

    return mean_of(of_one, inputs)


def joined(update, name):
    return torch.cat([update[f"{name}.weight"], update[f"{name}.bias"][:, None]], dim=1)


@pytest.mark.parametrize("hidden", PAIRS, ids=str)
class TestAgainstBruteForce:
    def test_the_couplings_are_means_of_what_the_recursion_gives_per_sample(self, hidden):
        student, teacher = pair(hidden)
        inputs = gaussian()
        found = dynamics.couplings(student, teacher, inputs, num_at_once=7)
        expected = {
            "beta": mean_of(lambda x: recursion(student, student, x)[0], inputs),
            "H": mean_of(lambda x: recursion(student, student, x)[1], inputs),
            "beta_star": mean_of(lambda x: recursion(student, teacher, x)[0], inputs),
            "H_star": mean_of(lambda x: recursion(student, teacher, x)[1], inputs),
        }
        for key, by_layer in expected.items():
            assert list(getattr(found, key)) == list(reversed(by_layer))
            for name, value in by_layer.items():
                assert_close(getattr(found, key)[name], torch.from_numpy(value), **CLOSE)

    def test_what_layers_read_overlaps_as_the_products_per_sample_do(self, hidden):
        student, teacher = pair(hidden)
        inputs = gaussian()
        found = dynamics.couplings(student, teacher, inputs)
        for i, name in enumerate(found.L):
            reads = [passed(student, x)[2][i] for x in inputs]
            goals = [passed(teacher, x)[2][i] for x in inputs]
            own = sum(np.outer(f, f) for f in reads) / len(inputs)
            star = sum(np.outer(f, g) for f, g in zip(reads, goals, strict=True)) / len(inputs)
            assert_close(found.L[name], torch.from_numpy(own), **CLOSE)
            assert_close(found.L_star[name], torch.from_numpy(star), **CLOSE)

    def test_the_expected_update_is_the_mean_of_products_per_sample(self, hidden):
        student, teacher = pair(hidden)
        inputs = gaussian()
        update = dynamics.expected_update(student, teacher, inputs)
        for name, value in twin_update(student, teacher, inputs).items():
            rows = len(student[f"{name}.bias"])  # a bias node has no weights of its own
            assert_close(joined(update, name), torch.from_numpy(value[:rows]), **CLOSE)

    def test_the_expected_update_is_minus_autograds_gradient(self, hidden):
        student, teacher = pair(hidden)
        inputs = gaussian()
        leaves = {name: value.clone().requires_grad_() for name, value in student.items()}
        build = models.Mlp(hidden=hidden[1]).build((4,), 3).double()
        target = models.Mlp(hidden=hidden[0]).build((4,), 3).double()
        outputs = torch.func.functional_call(build, leaves, (inputs,))
        goal = torch.func.functional_call(target, teacher, (inputs,))
        loss = functional.mse_loss(outputs, goal.detach())
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        update = dynamics.expected_update(student, teacher, inputs)
        assert list(update) == list(student)
        for name, gradient in zip(leaves, gradients, strict=True):
            assert_close(update[name], -3 / 2 * gradient, **CLOSE)

    def test_pull_minus_push_is_the_update_and_each_is_its_own_product(self, hidden):
        student, teacher = pair(hidden)
        inputs = gaussian(5)
        pull, push = dynamics.pull_and_push(student, teacher, inputs)
        update = dynamics.expected_update(student, teacher, inputs)
        nobody = {name: torch.zeros_like(value) for name, value in teacher.items()}
        alone = twin_update(student, nobody, inputs)  # the teacher's bias nodes pull nothing
        for name in update:
            assert_close(pull[name] - push[name], update[name], **CLOSE)
        for name, value in alone.items():
            rows = len(student[f"{name}.bias"])
            assert_close(-joined(push, name), torch.from_numpy(value[:rows]), **CLOSE)

    def test_node_gradients_make_the_update(self, hidden):
        student, teacher = pair(hidden)
        inputs = gaussian()
        gradients = dynamics.node_gradients(student, teacher, inputs)
        reads = dynamics.signals(student, inputs).reads
        update = dynamics.expected_update(student, teacher, inputs)
        assert list(gradients) == list(reads)
        for name, gradient in gradients.items():
            assert gradient.shape == (40, len(student[f"{name}.bias"]))
            assert_close(gradient.T @ reads[name] / 40, joined(update, name), **CLOSE)

    def test_the_factored_update_is_the_papers_formula_transposed(self, hidden):
        student, teacher = pair(hidden)
        found = dynamics.couplings(student, teacher, gaussian())
        update = dynamics.factored_update(student, teacher, found)
        weights, goals = dynamics.augmented(student), dynamics.augmented(teacher)
        for name in weights:
            own, goal = weights[name].T, goals[name].T
            paper = found.L_star[name] @ goal @ found.H_star[name].T
            paper = paper - found.L[name] @ own @ found.H[name].T
            assert_close(joined(update, name).T, paper[:, : len(student[f"{name}.bias"])], **CLOSE)


# -- symmetries -------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", PAIRS, ids=str)
def test_a_student_equal_to_the_teacher_is_not_moved(hidden):
    teacher = network(hidden[0], 1)
    inputs = gaussian()
    for value in dynamics.expected_update(teacher, teacher, inputs).values():
        assert (value == 0).all()
    found = dynamics.couplings(teacher, teacher, inputs)
    for name in found.H:
        assert torch.equal(found.H[name], found.H_star[name])
        assert torch.equal(found.L[name], found.L_star[name])
    for value in dynamics.factored_update(teacher, teacher, found).values():
        assert_close(value, torch.zeros_like(value), **CLOSE)


def permuted(params, order):
    """The same network with the nodes of `hidden1` in another order."""
    return params | {
        "hidden1.weight": params["hidden1.weight"][order],
        "hidden1.bias": params["hidden1.bias"][order],
        "hidden2.weight": params["hidden2.weight"][:, order],
    }


def test_permuting_student_nodes_permutes_everything():
    student, teacher = pair(((3, 4), (6, 5)))
    order, inputs = torch.tensor([4, 2, 0, 5, 1, 3]), gaussian()
    other = permuted(student, order)
    padded = torch.cat([order, torch.tensor([6])])
    before, after = (dynamics.couplings(s, teacher, inputs) for s in (student, other))
    assert_close(after.H["hidden1"], before.H["hidden1"][padded][:, padded], **CLOSE)
    assert_close(after.beta["hidden1"], before.beta["hidden1"][padded][:, padded], **CLOSE)
    assert_close(after.H_star["hidden1"], before.H_star["hidden1"][padded], **CLOSE)
    assert_close(after.L["hidden2"], before.L["hidden2"][padded][:, padded], **CLOSE)
    assert_close(after.L_star["hidden2"], before.L_star["hidden2"][padded], **CLOSE)
    assert_close(after.H["hidden2"], before.H["hidden2"], **CLOSE)
    for rule in (
        dynamics.expected_update,
        lambda s, t, x: dynamics.factored_update(s, t, dynamics.couplings(s, t, x)),
    ):
        moved, expected = (
            rule(other, teacher, inputs),
            permuted(rule(student, teacher, inputs), order),
        )
        for name in moved:
            assert_close(moved[name], expected[name], **CLOSE)
    goal = dynamics.activations(teacher, inputs)["hidden1"]
    rho, own = (
        dynamics.correlation(goal, dynamics.activations(s, inputs)["hidden1"])
        for s in (other, student)
    )
    assert_close(rho, own[:, order], **CLOSE)
    assert torch.equal(order[dynamics.winners(rho)], dynamics.winners(own))
    assert_close(
        chains.outgoing_norms(other)["hidden1"],
        chains.outgoing_norms(student)["hidden1"][order],
    )


def test_the_number_of_samples_at_once_changes_nothing():
    student, teacher = pair()
    inputs = gaussian(50)
    whole = dynamics.couplings(student, teacher, inputs, num_at_once=50)
    parts = dynamics.couplings(student, teacher, inputs, num_at_once=8)
    for key in ("beta", "beta_star", "H", "H_star", "L", "L_star"):
        for name, value in getattr(whole, key).items():
            assert_close(getattr(parts, key)[name], value, **CLOSE)


def test_h_and_l_are_positive_semidefinite():
    found = dynamics.couplings(*pair(PAIRS[2]), gaussian())
    for matrix in (*found.H.values(), *found.beta.values(), *found.L.values()):
        assert_close(matrix, matrix.T, **CLOSE)
        assert torch.linalg.eigvalsh(matrix).min() > -1e-10


# -- where products of means are the mean of products -----------------------------------------


def missed(student, teacher, inputs):
    """|factored - expected| / |expected| of each layer."""
    update = dynamics.expected_update(student, teacher, inputs)
    found = dynamics.couplings(student, teacher, inputs)
    factored = dynamics.factored_update(student, teacher, found)
    apart = dynamics.update_norms({name: factored[name] - update[name] for name in update})
    norms = dynamics.update_norms(update)
    return {name: apart[name] / norms[name] for name in norms}


@pytest.mark.parametrize("hidden", PAIRS, ids=str)
def test_products_of_means_are_exact_for_one_sample(hidden):
    assert max(missed(*pair(hidden), gaussian(1)).values()) < 1e-10


def test_products_of_means_are_exact_at_the_output():
    assert missed(*pair(), gaussian())["output"] < 1e-10


def test_products_of_means_are_exact_where_no_gate_changes():
    student, teacher = pair()
    for params in (student, teacher):
        for layer in ("hidden1", "hidden2"):
            params[f"{layer}.bias"] = params[f"{layer}.bias"] + 1_000 * (-1) ** torch.arange(
                len(params[f"{layer}.bias"])
            )
    gates = dynamics.signals(student, gaussian()).gates["hidden1"]
    assert torch.equal(gates, gates[:1].expand_as(gates))
    assert 0 < gates.mean() < 1
    assert max(missed(student, teacher, gaussian()).values()) < 1e-8


@pytest.mark.parametrize(
    ("hidden", "num_outputs", "start", "std", "low", "high"),
    [
        ((20,), 30, Perturbed(std=0.1), 1.0, 0.4, 0.7),
        ((20,), 30, TorchUniform(), 1.0, 0.5, 0.8),
        ((10, 15, 20, 25), 100, TorchUniform(), 10.0, 0.8, 1.4),
    ],
    ids=["near", "far", "deep"],
)
def test_products_of_means_miss_half_or_all_of_a_hidden_layers_update(
    hidden, num_outputs, start, std, low, high
):
    goal = Teacher(hidden=hidden, seed=1).parameters((20,), num_outputs)
    student = Student(multi=2, start=start).parameters(goal, 0)
    apart = missed(student, goal, gaussian(400, 20, std=std))
    assert low < apart["hidden1"] < high
    assert apart["output"] < 1e-10


# -- norms and refusals -----------------------------------------------------------------------


def test_update_norms_take_weights_and_biases_together():
    update = {"hidden1.weight": torch.tensor([[3.0, 0.0]]), "hidden1.bias": torch.tensor([4.0])}
    assert dynamics.update_norms(update) == {"hidden1": 5.0}


def test_a_network_without_biases_is_one_whose_biases_are_0():
    student, teacher = pair()
    zeros = {n: torch.zeros_like(v) if n.endswith("bias") else v for n, v in student.items()}
    without = {name: value for name, value in student.items() if name.endswith("weight")}
    inputs = gaussian()
    update = dynamics.expected_update(without, teacher, inputs)
    assert list(update) == list(without)
    expected = dynamics.expected_update(zeros, teacher, inputs)
    assert all(torch.equal(update[name], expected[name]) for name in update)
    found = dynamics.couplings(without, teacher, inputs)
    assert list(dynamics.factored_update(without, teacher, found)) == list(without)
    assert list(dynamics.update_norms(update)) == ["hidden1", "hidden2", "output"]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (network((3,), 1), r"the student's layers, \['hidden1', 'hidden2', 'output'\]"),
        (network((3, 4), 1, num_outputs=2), "the student's 3 outputs; got 2"),
    ],
)
def test_networks_that_are_no_pair_are_refused(teacher, message):
    with pytest.raises(ValueError, match=message):
        dynamics.couplings(network((6, 5), 0), teacher, gaussian())


# -- correlation ------------------------------------------------------------------------------


def nodes(num, seed, num_samples=60):
    draw = seeds.stream(seed, "nodes").standard_normal((num_samples, num))
    return torch.from_numpy(draw).clamp(min=0)


def test_correlation_is_numpys():
    one, other = nodes(3, 0), nodes(5, 1)
    expected = np.corrcoef(one.T.numpy(), other.T.numpy())[:3, 3:]
    assert_close(dynamics.correlation(one, other), torch.from_numpy(expected), **CLOSE)


def test_correlation_is_of_the_kind_that_scale_and_shift_do_not_change():
    one, other = nodes(3, 0), nodes(5, 1)
    scaled = 7 * other + 3
    assert_close(dynamics.correlation(one, scaled), dynamics.correlation(one, other), **CLOSE)
    assert_close(dynamics.correlation(one, -other), -dynamics.correlation(one, other), **CLOSE)
    assert_close(dynamics.correlation(one, one).diag(), torch.ones(3).double(), **CLOSE)


def test_a_dead_node_correlates_with_nothing_and_is_counted():
    one, other = nodes(3, 0), nodes(5, 1)
    one[:, 1], other[:, 0], other[:, 4] = 0, 0, 0.1  # constant, if not 0, behind a BatchNorm
    rho = dynamics.correlation(one, other)
    assert (rho[1] == 0).all()
    assert (rho[:, [0, 4]] == 0).all()
    assert (rho[0, [1, 2, 3]] != 0).all()
    assert dynamics.dead(one).tolist() == [False, True, False]
    assert int(dynamics.dead(other).sum()) == 2
    assert dynamics.best(rho)[1] == 0


def test_a_node_that_hardly_varies_hardly_correlates():
    one = nodes(1, 0)
    faint = 1e-8 * one  # of a squared norm far below 1e-10
    assert 0 < float(dynamics.correlation(one, faint)) < 0.01


def test_correlations_of_other_inputs_are_refused():
    with pytest.raises(ValueError, match="same inputs; got 60 and 59 samples"):
        dynamics.correlation(nodes(3, 0), nodes(3, 0)[1:])


def test_a_node_at_exactly_0_does_not_fire():
    params = network((2,), 0)
    params["hidden1.weight"] = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.float64)
    params["hidden1.bias"] = torch.zeros(2, dtype=torch.float64)
    gates = dynamics.signals(params, torch.ones(1, 4, dtype=torch.float64)).gates["hidden1"]
    assert gates.tolist() == [[0, 1, 1]]  # the last is the bias node


def test_activations_are_what_the_zoos_network_computes():
    student, _ = pair()
    inputs = gaussian()
    network = models.Mlp(hidden=(6, 5)).build((4,), 3).double()
    network.load_state_dict(student)
    found = dynamics.activations(student, inputs)
    with torch.no_grad():
        first = network.hidden1_relu(network.hidden1(inputs))
        second = network.hidden2_relu(network.hidden2(first))
        assert_close(dynamics.signals(student, inputs).outputs, network(inputs), **CLOSE)
    assert_close(found, {"hidden1": first, "hidden2": second}, **CLOSE)


# -- winners and ranks ------------------------------------------------------------------------

RHO = torch.tensor([[0.1, 0.95, 0.3, 0.95], [0.7, 0.6, 0.2, -0.9]], dtype=torch.float64)


def test_the_best_the_winners_and_the_covered_are_known():
    assert dynamics.best(RHO).tolist() == [0.95, 0.7]
    assert dynamics.winners(RHO).tolist() == [1, 0]
    assert dynamics.covered(RHO) == {0.5: 2, 0.6: 2, 0.7: 1, 0.8: 1, 0.9: 1, 0.95: 0}
    assert dynamics.is_winner(torch.tensor([1, 1, 3]), 4).tolist() == [False, True, False, True]
    assert dynamics.is_matched(RHO, 0.65).tolist() == [True, True, False, True]


def test_ranks_are_places_in_a_list_sorted_by_hand():
    rho = torch.from_numpy(seeds.stream(0, "rho").integers(0, 6, size=(5, 9)) / 6)  # with ties
    won = torch.tensor([0, 3, 8, 5, 5])
    expected = []
    for row, winner in zip(rho.tolist(), won.tolist(), strict=True):
        order = sorted(range(9), key=lambda node, row=row: (-row[node], node))
        expected.append(order.index(winner))
    assert dynamics.ranks(rho, won).tolist() == expected
    assert dynamics.ranks(rho, dynamics.winners(rho)).tolist() == [0] * 5


def test_chance_is_uniform_and_its_mean_is_half_of_what_it_can_be():
    assert dynamics.chance_mean_rank(250) == 124.5
    for num_nodes, num_winners in ((5, 1), (4, 3), (1, 2), (3, 0)):
        law = dynamics.chance_rank_sum(num_nodes, num_winners)
        sums = [sum(p) for p in itertools.product(range(num_nodes), repeat=num_winners)]
        counts = np.bincount(sums, minlength=len(law))
        np.testing.assert_allclose(law, counts / len(sums), atol=1e-15)
        mean = float(law @ np.arange(len(law)))
        assert mean == pytest.approx(num_winners * dynamics.chance_mean_rank(num_nodes))


@pytest.mark.parametrize(
    ("found", "num_nodes", "expected"),
    [([0], 4, 1 / 4), ([3], 4, 1), ([0, 0], 10, 1 / 100), ([1, 0], 10, 3 / 100), ([9, 9], 10, 1)],
)
def test_the_chance_of_ranks_is_counted(found, num_nodes, expected):
    assert dynamics.chance_of_ranks(torch.tensor(found), num_nodes) == pytest.approx(expected)


def test_outgoing_norms_are_of_the_weights_that_read_a_node():
    params = network((2, 2), 0)
    params["hidden2.weight"] = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).double()
    assert chains.outgoing_norms(params)["hidden1"].tolist() == [5.0, 1.0]
    assert list(chains.outgoing_norms(params)) == ["hidden1", "hidden2"]
    split = dynamics.outgoing_split(params, {"hidden1": torch.tensor([False, True])})
    assert [part.tolist() for part in split["hidden1"]] == [[1.0], [5.0]]
