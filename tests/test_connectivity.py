"""What is measured on the line between two networks, against what it is by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from windfall import connectivity
from windfall.connectivity import Line, angle, barrier, between, disagreement, distance, point
from windfall.spec import SpecError


def tensors(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def linear(*rows):
    return {"weight": torch.tensor(rows)}


def net(seed, norm=False):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(5)] if norm else []
    return nn.Sequential(nn.Linear(4, 5), *middle, nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(40, 4, generator=generator), torch.arange(40) % 3


# -- on the line ------------------------------------------------------------------------------


def test_a_barrier_by_hand():
    assert barrier(torch.tensor([0.1, 0.5, 0.2, 0.3])) == pytest.approx(0.5 - 0.2)
    assert barrier(torch.tensor([0.3, 0.1, 0.1])) == pytest.approx(0.3 - 0.2)
    assert barrier(torch.tensor([0.2, 0.2])) == 0


@pytest.mark.parametrize(("height", "is_stable"), [(0.0199, True), (0.02, False), (0.3, False)])
def test_stable_is_a_barrier_below_two_percent(height, is_stable):
    errors = torch.tensor([0.0, height, 0.0], dtype=torch.float64)
    assert Line(torch.linspace(0, 1, 3), errors, errors).is_stable == is_stable


def test_a_line_is_the_mean_network_at_each_point(sample):
    inputs, labels = sample
    one, other, between_them = net(0), net(1), net(2)
    line = between(net(3), tensors(one), tensors(other), inputs, labels, num_points=7)
    for place, share in enumerate(torch.linspace(0, 1, 7).tolist()):
        with torch.no_grad():
            for mean, a, b in zip(
                between_them.parameters(), one.parameters(), other.parameters(), strict=True
            ):
                mean.copy_((1 - share) * a + share * b)
            outputs = between_them.eval()(inputs)
        assert float(line.losses[place]) == pytest.approx(float(cross_entropy(outputs, labels)))
        wrong = (outputs.argmax(1) != labels).double().mean()
        assert float(line.errors[place]) == pytest.approx(float(wrong))
    assert line.shares.tolist() == pytest.approx(torch.linspace(0, 1, 7).tolist())
    assert len(between(net(3), tensors(one), tensors(other), inputs, labels).errors) == 30


def test_opposite_networks_are_parted_by_a_barrier_of_a_half():
    network, inputs = nn.Linear(1, 2, bias=False), torch.tensor([[1.0], [-1.0]] * 10)
    labels = torch.tensor([0, 1] * 10)
    # both tell the labels, by differences of 1 and of 3; between them that of 2
    same = between(network, linear([1.0], [0.0]), linear([3.0], [0.0]), inputs, labels)
    assert same.barrier == 0
    assert same.is_stable
    flat = between(
        network, linear([1.0], [0.0]), linear([-1.0], [0.0]), inputs, labels, num_points=3
    )
    assert flat.errors.tolist() == [0, 0.5, 1]
    assert float(flat.losses[1]) == pytest.approx(math.log(2))


def test_the_ends_of_a_line_are_exact():
    a = {"w": torch.tensor([0.1, 1e8]), "n": torch.tensor(3)}
    b = {"w": torch.tensor([0.7, -1.0]), "n": torch.tensor(9)}
    assert torch.equal(point(a, b, 0.0)["w"], a["w"])
    assert torch.equal(point(a, b, 1.0)["w"], b["w"])
    assert int(point(a, b, 0.5)["n"]) == 3


def test_nothing_of_the_network_changes(sample):
    network = net(0, norm=True)
    before, modes = tensors(network), [m.training for m in network.modules()]
    between(network, tensors(net(1, norm=True)), tensors(net(2, norm=True)), *sample, num_points=2)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [m.training for m in network.modules()] == modes


def test_statistics_are_the_means_over_batches(sample):
    network, (inputs, _) = net(0, norm=True), sample
    batches = [inputs[:16], 3 * inputs[16:] + 1]
    before = tensors(network)
    connectivity.estimate_statistics(network, batches)
    given = [network[0](batch).detach() for batch in batches]
    mean = torch.stack([each.mean(0) for each in given]).mean(0)
    var = torch.stack([each.var(0) for each in given]).mean(0)
    torch.testing.assert_close(network[1].running_mean, mean)
    torch.testing.assert_close(network[1].running_var, var)
    assert network[1].momentum == 0.1
    for name in ("0.weight", "1.weight", "1.bias", "4.weight"):
        assert torch.equal(network.state_dict()[name], before[name])


def test_statistics_are_estimated_at_every_point(sample):
    inputs, labels = sample
    a, b = tensors(net(0, norm=True)), tensors(net(1, norm=True))
    b["1.running_mean"] += 100  # what no training input gives
    training = [inputs[:20], inputs[20:]]
    line = between(net(2, norm=True), a, b, inputs, labels, training=training, num_points=4)
    stale = between(net(2, norm=True), a, b, inputs, labels, num_points=4)
    for place, share in enumerate(line.shares.tolist()):
        own = net(3, norm=True)
        own.load_state_dict(point(a, b, share))
        connectivity.estimate_statistics(own, training)
        expected = cross_entropy(own.eval()(inputs).detach(), labels)
        assert float(line.losses[place]) == pytest.approx(float(expected))
    assert float(stale.losses[-1]) != pytest.approx(float(line.losses[-1]))


def test_what_is_not_finite_is_told_wrong():
    outputs = torch.tensor([[math.nan, 0.0], [0.0, 1.0], [math.inf, 0.0]])
    _, error = connectivity.scores(outputs, torch.tensor([0, 1, 0]))
    assert error == pytest.approx(2 / 3)


# -- among weights ----------------------------------------------------------------------------


def test_distance_and_angle_by_hand():
    start = {"w": torch.zeros(2, 2), "b": torch.zeros(1)}
    a = {"w": torch.tensor([[3.0, 0.0], [9.0, 0.0]]), "b": torch.tensor([0.0])}
    b = {"w": torch.tensor([[0.0, 3.0], [0.0, 9.0]]), "b": torch.tensor([4.0])}
    assert distance(a, b) == pytest.approx(math.sqrt(9 + 9 + 81 + 81 + 16))
    masks = {"w": torch.tensor([[True, True], [False, False]])}
    assert distance(a, b, masks) == pytest.approx(math.sqrt(9 + 9 + 16))
    assert angle(start, a, a) == pytest.approx(0, abs=1e-5)
    assert angle(start, a, {name: -value for name, value in a.items()}) == pytest.approx(180)
    assert angle(start, a, b, masks) == pytest.approx(90)
    assert angle({n: v + 1 for n, v in start.items()}, a, b) != pytest.approx(90, abs=1)
    assert math.isnan(angle(start, start, b))


def test_disagreement_is_of_classes_not_of_errors():
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    other = torch.tensor([[0.0, 1.0], [5.0, 0.0], [0.0, 0.1], [0.5, 1.0]])
    assert disagreement(one, other) == 0.25


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "told"),
    [
        ({"w": torch.zeros(3)}, r"got `w` of shape \[3\] where that of `a` is \[2\]"),
        ({}, r"got `w` of shape none where that of `a` is \[2\]"),
        ({"w": torch.zeros(2), "v": torch.zeros(1)}, "got `v` of shape .1. where that .* is none"),
    ],
)
@pytest.mark.parametrize(
    "measure",
    [
        lambda a, b: point(a, b, 0.5),
        distance,
        lambda a, b: angle(a, a, b),
        lambda a, b: between(nn.Identity(), a, b, torch.zeros(1, 2), torch.zeros(1).long()),
    ],
)
def test_networks_of_other_shapes_are_refused(measure, b, told):
    with pytest.raises(SpecError, match=f"`b` must have the tensors of `a`; {told}"):
        measure({"w": torch.zeros(2)}, b)


def test_tensors_of_another_network_are_refused():
    with pytest.raises(SpecError, match="`tensors` must have the tensors of `network`; got"):
        connectivity.outputs(nn.Linear(2, 2), {"w": torch.zeros(2)}, torch.zeros(1, 2))


def test_a_line_of_one_point_is_refused(sample):
    with pytest.raises(SpecError, match="`num_points` must be at least 2"):
        between(net(0), tensors(net(0)), tensors(net(1)), *sample, num_points=1)
