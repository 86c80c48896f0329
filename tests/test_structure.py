"""Networks without some of their channels."""

import math

import pytest
import torch
from networks import NETWORKS, SMALL, Grouped
from torch import nn
from torch.func import functional_call

from windfall import seeds, structure, tracing


def drawn(build):
    """A network in evaluation with weights, biases and statistics that are not its first ones."""
    with seeds.isolated(0, "test"):
        network = build().double().eval()
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                scale = 1 / math.sqrt(tensor[0].numel()) if tensor.dim() > 1 else 1
                tensor.data.copy_(scale * (0.5 + torch.rand_like(tensor)))
                if tensor.dim() > 1:
                    tensor.data.mul_(torch.randn_like(tensor).sign())
    return network


def tensors(network):
    return dict(network.named_parameters()) | dict(network.named_buffers())


def half(groups):
    """Every second channel of every group."""
    return {group.name: torch.arange(group.size) % 2 == 0 for group in groups}


def batch(shape):
    with seeds.isolated(1, "test"):
        return torch.randn(4, *shape, dtype=torch.float64)


# -- removal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_without_channels_computes_what_it_does_with_them_masked(name):
    build, shape = NETWORKS[name]
    network, inputs = drawn(build), batch(shape)
    groups = tracing.trace(network, shape)
    whole, channels = tensors(network), half(groups)
    kept = structure.shrunk(whole, groups, channels)
    smaller = structure.resized(network, structure.shapes(kept))
    smaller.load_state_dict(kept)
    masks = structure.masks(groups, channels, whole)
    masked = {n: p * masks.get(n, 1) for n, p in network.named_parameters()}
    expected = functional_call(network, masked, (inputs,))
    torch.testing.assert_close(smaller(inputs), expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(expected, network(inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_kept_is_what_the_masks_say_and_nothing_shares_its_storage(name):
    build, shape = NETWORKS[name]
    network = drawn(build)
    groups = tracing.trace(network, shape)
    whole, channels = tensors(network), half(groups)
    kept, masks = (
        structure.shrunk(whole, groups, channels),
        structure.masks(groups, channels, whole),
    )
    for name, tensor in whole.items():
        flat = tensor[masks[name]] if name in masks else tensor.flatten()
        assert torch.equal(kept[name].flatten(), flat)
        assert kept[name].untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_that_all_stay_change_nothing(name):
    build, shape = NETWORKS[name]
    network = drawn(build)
    groups = tracing.trace(network, shape)
    everything = {group.name: torch.ones(group.size, dtype=torch.bool) for group in groups}
    kept = structure.shrunk(tensors(network), groups, everything)
    assert structure.masks(groups, everything, tensors(network)) == {}
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors(network).items())
    same = structure.resized(network, structure.shapes(kept))
    assert str(same) == str(network)


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_go_one_after_the_other_as_at_once(name):
    build, shape = NETWORKS[name]
    whole = tensors(drawn(build))
    groups = tracing.trace(build(), shape)
    first = half(groups)
    own = structure.restricted(groups, first, whole)
    then = {group.name: torch.arange(group.size) % 3 != 1 for group in own}
    twice = structure.shrunk(structure.shrunk(whole, groups, first), own, then)
    both = {name: stay.clone() for name, stay in first.items()}
    for name, stay in then.items():
        both[name][first[name]] = stay
    at_once = structure.shrunk(whole, groups, both)
    assert {group.name: group.size for group in own} == {n: int(s.sum()) for n, s in first.items()}
    assert all(torch.equal(twice[name], tensor) for name, tensor in at_once.items())


def test_a_resized_network_is_a_copy_whose_layers_know_their_sizes():
    network = drawn(Grouped)
    before = {name: tensor.clone() for name, tensor in tensors(network).items()}
    groups = tracing.trace(network, SMALL)
    kept = structure.shrunk(tensors(network), groups, half(groups))
    smaller = structure.resized(network, structure.shapes(kept))
    assert (smaller.first.in_channels, smaller.first.out_channels) == (3, 8)
    assert (smaller.grouped.in_channels, smaller.grouped.out_channels) == (8, 12)
    assert (smaller.grouped.groups, smaller.grouped.dilation) == (4, (2, 2))
    assert smaller.norm.num_features == 12
    depthwise = smaller.depthwise
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (12, 12, 12)
    assert (smaller.last.in_channels, smaller.output.in_features) == (12, 4 * 9)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(network).items())
    assert not smaller.training


def test_a_layer_of_another_kind_is_not_resized():
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    wanted = {"0.weight": (2, 3), "0.bias": (2,), "1.weight": (2,), "1.bias": (2,)}
    with pytest.raises(ValueError, match=r"`1` must be a linear layer.* got LayerNorm"):
        structure.resized(network, wanted)


def test_a_network_newly_made_without_channels_begins_as_its_constructors_make_it():
    """Normalization keeps its values where it stays; a layer's range is that of its own size."""
    with seeds.isolated(0, "test"):
        network = Grouped()
        network.norm.weight.data = torch.arange(1.0, 25.0)
        groups = tracing.trace(network, SMALL)
        channels = half(groups)
        made = structure.newly(network, groups, channels)
    kept = structure.shrunk(tensors(network), groups, channels)
    assert structure.shapes(tensors(made)) == structure.shapes(kept)
    assert torch.equal(made.norm.weight, kept["norm.weight"])
    assert bool((made.norm.running_var == 1).all())
    for layer, fan_in in ((made.first, 27), (made.grouped, 18), (made.output, 36)):
        assert 0.7 * fan_in**-0.5 < float(layer.weight.detach().abs().max()) <= fan_in**-0.5
    assert network.first.out_channels == 12
