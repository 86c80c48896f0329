"""Teachers and students: rows that differ, sizes that chain, and starts that are what they say."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from windfall import chains, models, seeds, spec, teachers
from windfall.spec import SpecError
from windfall.students import (
    Gaussian,
    Perturbed,
    SameDirection,
    SameSign,
    Start,
    Student,
    TorchUniform,
)
from windfall.teachers import ConstantBias, Teacher, UniformBias

STARTS = [member() for member in spec.members(Start).values()]
TEACHER = Teacher(hidden=(4, 6), seed=3)
GOAL = TEACHER.parameters((5,), 3)


def name_of(member):
    return spec.tag(type(member))


def begun(start, multi=2, seed=0, norm="none"):
    student = Student(multi=multi, start=start, norm=norm)
    return student.parameters(GOAL, seed)


# -- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "size", "values"),
    [(25, 20, teachers.VALUES), (24, 2, teachers.VALUES), (3, 2, (0.0, 1.0)), (4, 2, (1.0, 2.0))],
)
def test_rows_differ_are_not_zero_and_are_made_of_the_values(num_rows, size, values):
    rows = teachers.distinct_rows(num_rows, size, values, seeds.stream(0, "teacher"))
    assert rows.shape == (num_rows, size)
    assert len(set(map(tuple, rows.tolist()))) == num_rows
    assert set(rows.flatten().tolist()) <= set(values)
    assert rows.any(axis=1).all()


def test_every_choice_of_rows_is_equally_likely():
    drawn = [
        tuple(map(tuple, teachers.distinct_rows(2, 2, (0, 1), seeds.stream(seed, "t")).tolist()))
        for seed in range(1200)
    ]
    pairs = list(itertools.permutations([(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)], 2))
    # Of 1200 draws, 200 of each of six pairs, with a standard deviation of 13.
    assert all(140 < drawn.count(pair) < 260 for pair in pairs)


@pytest.mark.parametrize(
    ("num_rows", "size", "values", "message"),
    [
        (25, 2, teachers.VALUES, "25 different nonzero rows of 2 entries; 5 values make 24"),
        (5, 2, (1.0, 2.0), "2 values make 4. Give more values, or fewer nodes"),
        (1, 3, (0.0,), "1 values make 0"),
    ],
)
def test_more_rows_than_there_are_are_refused(num_rows, size, values, message):
    with pytest.raises(ValueError, match=message):
        teachers.distinct_rows(num_rows, size, values, seeds.stream(0, "teacher"))


# -- teachers ---------------------------------------------------------------------------------


def test_a_teachers_names_and_shapes_are_those_of_the_zoos_mlp():
    expected = models.Mlp(hidden=(4, 6)).build((5,), 3).state_dict()
    assert {n: v.shape for n, v in GOAL.items()} == {n: v.shape for n, v in expected.items()}
    assert all(value.dtype == torch.float64 for value in GOAL.values())
    assert chains.layer_names(GOAL) == ["hidden1", "hidden2", "output"]
    assert chains.layer_sizes(GOAL) == (5, 4, 6, 3)


def test_rows_have_norm_1_and_stand_as_the_values_do_to_each_other():
    for name in chains.layer_names(GOAL):
        weight = GOAL[f"{name}.weight"]
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)).double())
        for row in weight:  # every entry is a value over the row's norm: a multiple of 1/4 over it
            smallest = row[row != 0].abs().min()
            ratios = row / smallest
            halves = torch.stack([ratios * k for k in (1, 2)])
            assert any(torch.allclose(r, r.round(), atol=1e-12) for r in halves)


def test_a_bias_is_divided_by_its_rows_norm_unless_it_is_constant():
    goal = Teacher(hidden=(4,), seed=3).parameters((5,), 3)
    rows = teachers.distinct_rows(4, 5, teachers.VALUES, seeds.stream(3, "teacher", 0))
    drawn = seeds.stream(3, "teacher", 1).uniform(-0.5, 0.5, 4)
    expected = torch.from_numpy(drawn / np.linalg.norm(rows, axis=1))
    torch.testing.assert_close(goal["hidden1.bias"], expected)
    constant = Teacher(hidden=(4,), bias=ConstantBias(value=-0.1), seed=3).parameters((5,), 3)
    assert constant["hidden1.bias"].tolist() == [-0.1] * 4
    assert constant["output.bias"].tolist() == [-0.1] * 3
    assert torch.equal(constant["hidden1.weight"], goal["hidden1.weight"])


def test_strength_decays_out_of_later_nodes_of_every_hidden_layer():
    weak = Teacher(hidden=(4, 6), seed=3, decay=1.5).parameters((5,), 3)
    assert torch.equal(weak["hidden1.weight"], GOAL["hidden1.weight"])
    for name, size in (("hidden2", 4), ("output", 6)):
        factors = torch.tensor([(i + 1) ** 1.5 for i in range(size)]).double()
        torch.testing.assert_close(weak[f"{name}.weight"] * factors, GOAL[f"{name}.weight"])
        assert torch.equal(weak[f"{name}.bias"], GOAL[f"{name}.bias"])


def test_the_outputs_rows_may_stay_as_drawn():
    goal = Teacher(hidden=(4,), is_output_unit=False).parameters((5,), 3)
    assert set(goal["output.weight"].flatten().tolist()) <= set(teachers.VALUES)
    assert (goal["output.bias"].abs() <= 0.5).all()


def test_another_seed_is_another_teacher_and_the_same_seed_the_same():
    again, other = TEACHER.parameters((5,), 3), Teacher(hidden=(4, 6), seed=4).parameters((5,), 3)
    assert all(torch.equal(again[name], GOAL[name]) for name in GOAL)
    assert not any(torch.equal(other[name], GOAL[name]) for name in GOAL)


def test_a_built_teacher_has_its_parameters_and_draws_from_no_global_generator():
    before = seeds.generators()
    with seeds.isolated(0, "test"):
        network = TEACHER.build((5,), 3)
    assert seeds.generators() == before
    for name, value in network.state_dict().items():
        assert torch.equal(value, GOAL[name].float())
    assert models.kinds(network, (5,))["output.weight"] == "output"


def test_the_teachers_own_spec_survives_json():
    teacher = Teacher(hidden=(3,), bias=ConstantBias(value=0), decay=2, seed=7)
    assert Teacher.from_json(teacher.to_json()) == teacher


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Teacher(values=(1, 1)), "`values` must all be different"),
        (lambda: Teacher(values=()), "`values` must"),
        (lambda: Teacher(hidden=(0,)), "`hidden.0` must"),
        (lambda: Teacher(decay=-1), "`decay` must"),
        (lambda: UniformBias(low=1, high=0), "`high` must be at least `low`, 1; got 0"),
        (lambda: Student(multi=0), "`multi` must"),
        (lambda: Student(norm="beside"), "`norm` must"),
        (lambda: Perturbed(std=-1), "`std` must"),
        (lambda: Teacher(hidden=(9,)).parameters((1,), 3), r"make 4. .* \(layer `hidden1`\)"),
        (lambda: Student(hidden=(4,)).parameters(GOAL, 0), r"teacher's \[4, 6\]; got \[4\]"),
        (
            lambda: Student(hidden=(4, 5), start=Perturbed()).parameters(GOAL, 0),
            r"at least the teacher's, \[4, 6\], for a start of its nodes; got \[4, 5\]",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(SpecError, match=message):
        spec.checked(make)


def test_layers_that_do_not_chain_are_refused():
    broken = GOAL | {"hidden2.weight": torch.zeros(6, 9)}
    with pytest.raises(ValueError, match="`hidden2` must read the 4 nodes below it"):
        chains.layer_sizes(broken)


# -- students ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS, ids=name_of)
class TestEveryStart:
    @pytest.mark.parametrize("norm", ["none", "before", "after"])
    def test_parameters_are_those_of_the_built_network(self, start, norm):
        student = Student(multi=3, start=start, norm=norm)
        params = student.parameters(GOAL, 0)
        expected = dict(chains.build(params, norm).named_parameters())
        assert {n: v.shape for n, v in params.items()} == {n: v.shape for n, v in expected.items()}
        assert chains.layer_sizes(params) == (5, 12, 18, 3)
        assert all(value.dtype == torch.float64 for value in params.values())

    def test_the_same_seed_gives_the_same_start_and_another_another(self, start):
        first, again, other = begun(start), begun(start), begun(start, seed=1)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["hidden1.weight"], other["hidden1.weight"])

    def test_the_teacher_is_left_as_it_is_and_nothing_is_shared(self, start):
        before = {name: value.clone() for name, value in GOAL.items()}
        for value in begun(start, multi=1).values():
            value.add_(1)
        assert all(torch.equal(before[name], GOAL[name]) for name in GOAL)

    def test_the_start_is_part_of_the_students_json(self, start):
        student = Student(start=start)
        assert Student.from_json(student.to_json()) == student


def test_torch_uniform_is_nn_linears_distribution():
    goal = Teacher(hidden=(40,)).parameters((25,), 30)
    student = Student(multi=10, start=TorchUniform()).parameters(goal, 0)
    with seeds.isolated(0, "test"):
        layer = nn.Linear(25, 400)
    for kind in ("weight", "bias"):
        own = student[f"hidden1.{kind}"]
        assert own.abs().max() <= 1 / 5
        expected = getattr(layer, kind).detach().std()
        assert float(own.std()) == pytest.approx(float(expected), rel=0.15)
    assert float(student["hidden1.weight"].std()) == pytest.approx(0.2 / math.sqrt(3), rel=0.02)


def test_gaussian_weights_have_their_deviation_and_no_biases():
    student = Student(multi=10, start=Gaussian(std=0.005))
    params = student.parameters(Teacher(hidden=(40,)).parameters((25,), 30), 0)
    assert float(params["hidden1.weight"].std()) == pytest.approx(0.005, rel=0.03)
    assert (params["hidden1.bias"] == 0).all()
    assert (params["output.bias"] == 0).all()


def test_perturbed_by_nothing_is_the_teacher_among_zeros():
    params = begun(Perturbed(std=0))
    for name, value in GOAL.items():
        block = tuple(slice(0, size) for size in value.shape)
        assert torch.equal(params[name][block], value)
        rest = params[name].clone()
        rest[block] = 0
        assert (rest == 0).all()


def test_perturbed_is_the_teacher_plus_one_noise_everywhere():
    near, far = begun(Perturbed(std=0.1)), begun(Perturbed(std=0.2))
    clean = begun(Perturbed(std=0))
    for name in clean:
        torch.testing.assert_close(far[name] - clean[name], 2 * (near[name] - clean[name]))


@pytest.mark.parametrize("start", [SameDirection(), SameSign()], ids=name_of)
def test_other_nodes_are_as_torch_begins(start):
    params, plain = begun(start), begun(TorchUniform())
    for name, value in GOAL.items():
        block = tuple(slice(0, size) for size in value.shape)
        if name.endswith(".weight"):
            assert not torch.equal(params[name][block], plain[name][block])
        plain[name][block] = params[name][block]
        assert torch.equal(params[name], plain[name])


def test_the_same_direction_keeps_the_norm_that_was_drawn():
    params, plain = begun(SameDirection(), multi=1), begun(TorchUniform(), multi=1)
    for name in chains.layer_names(GOAL):
        own, goal = params[f"{name}.weight"], GOAL[f"{name}.weight"]
        torch.testing.assert_close(own.norm(), plain[f"{name}.weight"].norm())
        factor = own.norm() / goal.norm()
        torch.testing.assert_close(own, goal * factor)
        torch.testing.assert_close(params[f"{name}.bias"], GOAL[f"{name}.bias"] * factor)


def test_the_same_sign_keeps_sizes_and_never_disagrees():
    params, plain = begun(SameSign()), begun(TorchUniform())
    for name, value in GOAL.items():
        block = tuple(slice(0, size) for size in value.shape)
        assert torch.equal(params[name].abs(), plain[name].abs())
        assert (params[name][block] * value >= 0).all()
        is_free = value == 0
        assert torch.equal(params[name][block][is_free], plain[name][block][is_free])


@pytest.mark.parametrize(
    ("norm", "order"),
    [
        ("none", ["hidden1", "hidden1_relu"]),
        ("before", ["hidden1", "hidden1_norm", "hidden1_relu"]),
        ("after", ["hidden1", "hidden1_relu", "hidden1_norm"]),
    ],
)
def test_normalization_stands_where_it_is_said(norm, order):
    goal = Teacher(hidden=(4,)).parameters((5,), 3)
    begun = Student(multi=2, norm=norm).parameters(goal, 0)
    network = chains.build({name: value.float() for name, value in begun.items()}, norm)
    assert [name for name, _ in network.named_children()] == ["flatten", *order, "output"]
    inputs = torch.from_numpy(seeds.stream(0, "inputs").standard_normal((64, 5))).float()
    found = chains.nodes(network, inputs)["hidden1"]
    assert found.shape == (64, 8)
    assert bool((found < 0).any()) == (norm == "after")
    values = inputs
    for name in order:
        values = getattr(network, name)(values)
    torch.testing.assert_close(network.output(found), network.output(values))


def test_nodes_are_found_for_every_hidden_layer():
    network = TEACHER.build((5,), 3).double()
    inputs = torch.from_numpy(seeds.stream(0, "inputs").standard_normal((7, 5)))
    found = chains.nodes(network, inputs)
    assert {name: tuple(v.shape) for name, v in found.items()} == {
        "hidden1": (7, 4),
        "hidden2": (7, 6),
    }
    torch.testing.assert_close(network.output(found["hidden2"]), network(inputs))
