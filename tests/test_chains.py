"""Chains: networks as parameters, fully connected or convolutional, and what becomes of nodes."""

import itertools

import pytest
import torch

from windfall import chains, seeds
from windfall.spec import SpecError
from windfall.students import SameSign, Student, Subset
from windfall.teachers import ConstantBias, Teacher

IMAGES = (2, 7, 8)
GOAL = Teacher(hidden=(3, 4), layers="convolutional", seed=1).parameters(IMAGES, 5)
FLAT = Teacher(hidden=(3, 4), seed=1).parameters((6,), 5)


def drawn(*shape, seed=0):
    return torch.from_numpy(seeds.stream(seed, "inputs").standard_normal(shape))


def test_a_convolutional_teacher_has_unit_kernels_and_reads_every_position():
    shapes = {name: tuple(value.shape) for name, value in GOAL.items()}
    assert shapes["hidden1.weight"] == (3, 2, 3, 3)
    assert shapes["hidden2.weight"] == (4, 3, 3, 3)
    assert shapes["output.weight"] == (5, 4 * 3 * 4)  # 7 x 8 pixels lose four on each axis
    assert chains.layer_sizes(GOAL) == (2, 3, 4, 5)
    for name in chains.layer_names(GOAL):
        norms = GOAL[f"{name}.weight"].flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_linear_teacher_is_as_it_was_before_there_were_convolutions():
    again = Teacher(hidden=(3, 4), layers="linear", seed=1).parameters((6,), 5)
    assert all(torch.equal(again[name], FLAT[name]) for name in FLAT)
    images = Teacher(hidden=(3, 4), seed=1).parameters((2, 3), 5)
    assert all(torch.equal(images[name], FLAT[name]) for name in FLAT)


def test_decay_weakens_a_channel_at_all_its_positions():
    teacher = Teacher(hidden=(2,), layers="convolutional", decay=1.0, seed=1)
    weak, even = (
        each.parameters((1, 5, 4), 3)["output.weight"].unflatten(1, (2, 6))
        for each in (teacher, teacher.model_copy(update={"decay": 0.0}))
    )
    torch.testing.assert_close(weak[:, 0], even[:, 0])
    torch.testing.assert_close(weak[:, 1], even[:, 1] / 2)


def test_convolutions_refuse_what_they_cannot_read():
    deep = Teacher(hidden=(2, 2, 2), layers="convolutional")
    with pytest.raises(SpecError, match="images of at least 7 x 7 pixels for 3 convolutions"):
        deep.parameters((1, 6, 9), 3)
    with pytest.raises(SpecError, match=r"got shape \(20,\)"):
        deep.parameters((20,), 3)


@pytest.mark.parametrize(("params", "shape"), [(GOAL, IMAGES), (FLAT, (6,))])
def test_outputs_are_those_of_the_network(params, shape):
    inputs = drawn(9, *shape)
    network = chains.build(params)
    torch.testing.assert_close(chains.outputs(params, inputs), network(inputs))
    assert {n: v.shape for n, v in network.named_parameters()} == {
        n: v.shape for n, v in params.items()
    }
    assert next(network.parameters()).dtype == torch.float64


def test_building_draws_from_no_generator():
    before = seeds.generators()
    chains.build(GOAL, "before")
    assert seeds.generators() == before


@pytest.mark.parametrize("norm", ["none", "before", "after"])
def test_nodes_of_convolutions_are_channels_at_every_position_of_every_sample(norm):
    begun = Student(multi=2, norm=norm).parameters(GOAL, 0)
    network = chains.build(begun, norm).eval()
    inputs = drawn(3, *IMAGES)
    found = chains.nodes(network, inputs)
    assert {name: tuple(v.shape) for name, v in found.items()} == {
        "hidden1": (3 * 5 * 6, 6),
        "hidden2": (3 * 3 * 4, 8),
    }
    values = inputs
    for name, part in network.named_children():
        if name == "flatten":
            break
        values = part(values)
    for sample, row, column in itertools.product(range(3), range(3), range(4)):
        place = (sample * 3 + row) * 4 + column
        assert torch.equal(found["hidden2"][place], values[sample, :, row, column])


@pytest.mark.parametrize(("params", "shape"), [(GOAL, IMAGES), (FLAT, (6,))])
@pytest.mark.parametrize("norm", ["none", "before"])
def test_a_chain_without_dead_nodes_gives_the_same(params, shape, norm):
    """Brute force: the nodes that go are silenced in the whole network instead."""
    begun = Student(multi=2, norm=norm).parameters(params, 0)
    kept = {"hidden1": torch.tensor([0, 2, 5]), "hidden2": torch.tensor([1, 6])}
    whole = chains.build(begun, norm).eval()
    small = chains.build(chains.restricted(begun, kept), norm).eval()
    silent = {name: value.clone() for name, value in begun.items()}
    for name, above in (("hidden1", "hidden2"), ("hidden2", "output")):
        size = len(silent[f"{name}.weight"])
        gone = [node for node in range(size) if node not in kept[name].tolist()]
        silent[f"{above}.weight"].unflatten(1, (size, -1))[:, gone] = 0
    whole.load_state_dict(silent, strict=False)
    inputs = drawn(7, *shape)
    torch.testing.assert_close(small(inputs), whole(inputs))
    assert chains.layer_sizes(small.state_dict())[1:-1] == (3, 2)


def test_outgoing_norms_are_of_all_weights_that_read_a_node():
    norms = chains.outgoing_norms(GOAL)
    for channel in range(3):
        expected = GOAL["hidden2.weight"][:, channel].norm()
        torch.testing.assert_close(norms["hidden1"][channel], expected)
    for channel in range(4):
        expected = GOAL["output.weight"][:, channel * 12 : (channel + 1) * 12].norm()
        torch.testing.assert_close(norms["hidden2"][channel], expected)


def test_layers_that_do_not_chain_are_refused():
    for name, shape in (("hidden2.weight", (6, 9)), ("output.weight", (5, 7))):
        with pytest.raises(ValueError, match=r"must read the [34] nodes below it"):
            chains.layer_sizes(FLAT | {name: torch.zeros(shape)})
    with pytest.raises(ValueError, match="`hidden2` must read the 3 nodes below it"):
        chains.layer_sizes(GOAL | {"hidden2.weight": torch.zeros(4, 6, 3, 3)})
    with pytest.raises(ValueError, match="`output` must read the 4 nodes below it"):
        chains.layer_sizes(GOAL | {"output.weight": torch.zeros(5, 47)})


# -- convolutional students, and subsets ------------------------------------------------------


def test_a_convolutional_student_is_as_wide_as_said_and_starts_as_torch():
    begun = Student(multi=3).parameters(GOAL, 0)
    assert tuple(begun["hidden2.weight"].shape) == (12, 9, 3, 3)
    assert tuple(begun["output.weight"].shape) == (5, 12 * 12)
    assert float(begun["hidden2.weight"].abs().max()) <= 1 / 81**0.5
    signed = Student(multi=3, start=SameSign()).parameters(GOAL, 0)
    assert bool((signed["output.weight"][:, :48] * GOAL["output.weight"] >= 0).all())


def test_another_draw_is_of_the_same_law_and_other_values():
    one, again = (Student(multi=2).parameters(FLAT, 0, redrawn=r) for r in (False, True))
    assert not any(torch.equal(one[name], again[name]) for name in one)
    assert all(value.abs().max() <= 6**-0.5 for n, value in again.items() if "hidden1" in n)


def test_a_students_own_sizes_stand_whatever_multi_says():
    begun = Student(multi=7, hidden=(2, 9)).parameters(FLAT, 0)
    assert chains.layer_sizes(begun) == (6, 2, 9, 5)


def test_winners_are_kept_once_and_others_are_as_many():
    won = {"hidden1": torch.tensor([4, 1, 4]), "hidden2": torch.tensor([0, 7, 2, 3])}
    sizes = {"hidden1": 6, "hidden2": 8}
    kept = Subset(keep="winners").kept(won, sizes, seed=0)
    assert {name: found.tolist() for name, found in kept.items()} == {
        "hidden1": [1, 4],
        "hidden2": [0, 2, 3, 7],
    }
    seen = set()
    for seed in range(40):
        other = Subset(keep="random").kept(won, sizes, seed)
        assert [len(found.unique()) for found in other.values()] == [2, 4]
        assert all(found.tolist() == sorted(found.tolist()) for found in other.values())
        seen |= set(other["hidden1"].tolist())
    assert seen == set(range(6))
    again = Subset(keep="random").kept(won, sizes, 3)
    assert torch.equal(again["hidden1"], Subset(keep="random").kept(won, sizes, 3)["hidden1"])


def test_a_constant_bias_is_that_of_convolutions_too():
    teacher = Teacher(hidden=(2,), layers="convolutional", bias=ConstantBias(value=-0.5))
    assert teacher.parameters((1, 4, 4), 3)["hidden1.bias"].tolist() == [-0.5, -0.5]
