"""Weight-normalized layers: what they compute, how they begin, and that they can be pruned."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from windfall import flops, initialize, models, seeds
from windfall.engines import lift
from windfall.weightnorm import (
    WeightNormConv2d,
    WeightNormLinear,
    effective,
    multiplied,
    norms,
)

LAYERS = [
    (WeightNormLinear, nn.Linear, (5, 3), (5,)),
    (WeightNormConv2d, nn.Conv2d, (3, 4, 3, 2, 1), (3, 6, 6)),
]


def normals(*shape):
    return torch.from_numpy(seeds.stream(0, "normals").standard_normal(shape))


@pytest.mark.parametrize(("normed", "plain", "sizes", "shape"), LAYERS)
class TestEveryLayer:
    def test_it_begins_as_the_layer_without(self, normed, plain, sizes, shape):
        with seeds.isolated(0, "test"):
            layer = normed(*sizes, dtype=torch.float64)
        with seeds.isolated(0, "test"):
            other = plain(*sizes, dtype=torch.float64)
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "gain"]
        inputs = normals(2, *shape)
        torch.testing.assert_close(layer(inputs), other(inputs), rtol=1e-12, atol=1e-12)

    def test_it_computes_what_torchs_parametrization_computes(self, normed, plain, sizes, shape):
        layer, other = normed(*sizes).double(), parametrizations.weight_norm(plain(*sizes).double())
        gain, weight = normals(len(layer.gain)), normals(*layer.weight.shape)
        ours = {"gain": gain, "weight": weight, "bias": layer.bias.detach()}
        theirs = {
            "parametrizations.weight.original0": gain.reshape(-1, *(1,) * (weight.dim() - 1)),
            "parametrizations.weight.original1": weight,
            "bias": layer.bias.detach(),
        }
        layer.load_state_dict(ours)
        other.load_state_dict(theirs)
        inputs = normals(2, *shape)
        torch.testing.assert_close(layer(inputs), other(inputs), rtol=1e-12, atol=1e-12)
        layer(inputs).square().sum().backward()
        other(inputs).square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, other.parametrizations.weight.original1.grad)
        torch.testing.assert_close(
            layer.gain.grad, other.parametrizations.weight.original0.grad.flatten()
        )

    def test_a_filters_scale_is_its_gain_alone(self, normed, plain, sizes, shape):
        layer, inputs = normed(*sizes).double(), normals(2, *shape)
        larger = copy.deepcopy(layer)
        with torch.no_grad():
            larger.weight.mul_(7)
        torch.testing.assert_close(larger(inputs), layer(inputs))

    def test_a_pruned_weight_is_pruned_and_an_empty_filter_makes_its_bias(
        self, normed, plain, sizes, shape
    ):
        layer, inputs = normed(*sizes).double(), normals(2, *shape)
        with torch.no_grad():
            layer.weight[0] = 0
            layer.weight[1, 0] = 0
        weight = effective(layer)
        assert (weight[0] == 0).all()
        assert (weight[1, 0] == 0).all()
        torch.testing.assert_close(weight.flatten(1).norm(dim=1)[1:], layer.gain.abs()[1:])
        made = layer(inputs)
        made.sum().backward()
        assert all(param.grad.isfinite().all() for param in layer.parameters())
        assert (made.movedim(1, 0)[0] == layer.bias[0]).all()

    def test_it_is_a_layer_that_is_counted_and_pruned(self, normed, plain, sizes, shape):
        layer = normed(*sizes)
        assert [name for name, _ in initialize.layers(layer)] == ["weight"]
        assert models.kinds(layer, shape) == {"weight": "output"}
        assert flops.multiply_adds(layer, shape) == flops.multiply_adds(plain(*sizes), shape)


def test_norms_are_of_filters_and_1_of_an_empty_one():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
    assert norms(weight).tolist() == [5, 1, 2]


def test_a_stack_of_replicas_computes_what_each_does():
    networks = [
        nn.Sequential(WeightNormConv2d(1, 2, 3), nn.Flatten(), WeightNormLinear(8, 3)).double()
        for _ in range(2)
    ]
    params = {
        name: torch.stack([dict(net.named_parameters())[name].detach() for net in networks])
        for name, _ in networks[0].named_parameters()
    }
    inputs = normals(5, 1, 4, 4)
    made = lift.forward(networks[0], 3)(params, {}, {}, inputs, None)
    expected = torch.stack([net(inputs) for net in networks])
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


def test_what_inputs_multiply_is_told_of_all_layers_by_name():
    network = models.Conv_2(width=0.1, norm="weight").build((3, 8, 8), 4)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith("gain"):
                value.copy_(torch.linspace(-1, 3, len(value)))
    params = dict(network.named_parameters())
    told = multiplied(params)
    assert list(told) == list(params)
    for path, layer in network.named_modules():
        if isinstance(layer, WeightNormConv2d | WeightNormLinear):
            torch.testing.assert_close(told.pop(f"{path}.weight"), effective(layer))
    assert told
    assert all(told[name] is params[name] for name in told)  # the output, gains and biases
