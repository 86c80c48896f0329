"""The singular values of Jacobians, beside finite differences and whole decompositions."""

import networks
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from windfall import jacobians, seeds


def stream(seed=0):
    return seeds.stream(seed, "test-jacobians")


def drawn(*shape, seed=0):
    return torch.from_numpy(stream(seed).standard_normal(shape))


def tanh(x):
    weight = drawn(7, 12, seed=1)
    return torch.tanh(F.linear(x.flatten(1), weight)) ** 2 + x.flatten(1)[:, :7]


def differences(function, inputs, step=1e-6):
    """The Jacobians, one input, output and entry at a time, [sample, output, entry]."""
    found = []
    for one in inputs:
        rows = []
        for place in range(one.numel()):
            shift = torch.zeros(one.numel(), dtype=torch.float64)
            shift[place] = step
            up, down = (function((one + s * shift.reshape(one.shape))[None]) for s in (1, -1))
            rows.append(((up - down) / (2 * step)).flatten())
        found.append(torch.stack(rows, 1))
    return torch.stack(found)


def test_exact_values_are_those_of_finite_differences():
    inputs = drawn(3, 2, 6)
    found = jacobians.jacobian(tanh, inputs, stream(), num_top=4)
    values = torch.linalg.svdvals(differences(tanh, inputs))
    assert found.is_exact
    torch.testing.assert_close(found.top, values[:, :4], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.mean_square, values.square().mean(1), rtol=1e-6, atol=1e-8)


def test_of_a_linear_map_they_are_the_weights_and_fewer_where_there_are_fewer():
    weight = drawn(3, 5)
    found = jacobians.jacobian(lambda x: x @ weight.T, drawn(2, 5, seed=2), stream(), num_top=9)
    values = torch.linalg.svdvals(weight)
    for one in found.top:
        torch.testing.assert_close(one, values)
    assert found.mean_square.tolist() == pytest.approx([float(weight.square().sum()) / 3] * 2)


@pytest.mark.parametrize("size", [4, 40])
def test_the_power_iteration_and_projections_find_what_the_whole_matrix_has(size):
    weight = drawn(size, 30, seed=5)

    def function(x):
        return torch.tanh(x @ weight.T / 5)

    inputs = drawn(3, 30, seed=6)
    whole = jacobians.jacobian(function, inputs, stream())
    found = jacobians.jacobian(function, inputs, stream(), most_exact=0)
    assert not found.is_exact
    assert found.top.shape == whole.top.shape
    torch.testing.assert_close(found.top[:, :2], whole.top[:, :2], rtol=1e-3, atol=0)
    torch.testing.assert_close(found.top, whole.top, rtol=2e-2, atol=0)
    torch.testing.assert_close(found.mean_square, whole.mean_square, rtol=0.4, atol=0)


def test_what_is_estimated_depends_on_the_stream_alone():
    inputs = drawn(2, 2, 6)
    same = [jacobians.jacobian(tanh, inputs, stream(), most_exact=0) for _ in range(2)]
    other = jacobians.jacobian(tanh, inputs, stream(9), most_exact=0)
    assert torch.equal(same[0].mean_square, same[1].mean_square)
    assert not torch.equal(same[0].mean_square, other.mean_square)


def test_projections_are_right_on_average():
    inputs = drawn(1, 2, 6)
    whole = float(jacobians.jacobian(tanh, inputs, stream()).mean_square)
    found = [
        float(jacobians.jacobian(tanh, inputs, stream(s), most_exact=0).mean_square)
        for s in range(20)
    ]
    assert sum(found) / len(found) == pytest.approx(whole, rel=0.08)


def test_a_convolutional_network_with_pools_and_writes_into_its_input():
    network = nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    inputs = drawn(2, *networks.SMALL)
    before = inputs.clone()
    found = jacobians.jacobian(network, inputs, stream())
    estimated = jacobians.jacobian(network, inputs, stream(), most_exact=0)
    torch.testing.assert_close(found.top, torch.linalg.svdvals(differences(network, inputs)))
    torch.testing.assert_close(estimated.top, found.top, rtol=1e-3, atol=0)
    assert torch.equal(inputs, before)


def test_outputs_without_a_gradient_are_refused_by_torch():
    with pytest.raises(RuntimeError, match="does not require grad"):
        jacobians.jacobian(lambda x: x.detach(), drawn(2, 3), stream())
