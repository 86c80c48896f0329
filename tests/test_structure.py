"""Channels that live and die together, and networks without them."""

import math
import sys
import time

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from windfall import limits, models, seeds, structure, tracing
from windfall.spec import SpecError

CIFAR, SMALL = (3, 32, 32), (3, 6, 6)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 24, 3, padding=2, dilation=2, groups=4)
        self.norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, stride=2, groups=24, padding=1)
        self.last = nn.Conv2d(24, 8, 1)
        self.output = nn.Linear(8 * 9, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.grouped(self.first(x))))
        x = torch.sigmoid(self.last(F.relu(self.depthwise(x))))  # not 0 at 0
        return self.output(x.flatten(1))


class Gated(nn.Module):
    """An addition, and channels multiplied by what a linear layer makes of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.slopes = nn.Conv2d(8, 6, 3), nn.PReLU(6)
        self.gate, self.output = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = F.gelu(self.a(x))
        x = self.slopes(self.c(x + self.b(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return self.output(x.mean((2, 3)))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(9), nn.Conv2d(9, 6, 1)
        self.output = nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(torch.cat([self.a(x), self.b(x)], 1))
        return self.output(F.relu(self.c(x)).mean((2, 3)))


class Shuffled(nn.Module):
    """Channels that change places, which the proposed groups do not follow."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.output = nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.output(F.relu(self.b(x)).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.output = nn.Linear(16, 5)

    def forward(self, x):
        return self.output(self.block(self.embed(x)).mean(1))


class Softmaxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.output = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x):
        return self.output(self.b(torch.softmax(self.a(x), -1)))


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.output = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.output(torch.relu(self.b(self.a(x).data)))


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.c.weight, self.d, self.output = self.b.weight, nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x):
        return self.output(self.d(torch.relu(self.c(torch.relu(self.b(self.a(x)))))))


class Graphless(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.output = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        with torch.no_grad():
            return self.output(self.a(x))


def zoo(member, width):
    return lambda: member(width=width).build(CIFAR, 10)


NETWORKS = {
    "lenet": (zoo(models.Lenet_300_100, 0.1), CIFAR),
    "conv-4": (zoo(models.Conv_4, 0.125), CIFAR),
    "vgg-16": (zoo(models.Vgg_16, 0.0625), CIFAR),
    "resnet-20": (zoo(models.Resnet_20, 0.5), CIFAR),
    "preresnet-164": (zoo(models.Preresnet_164, 0.25), CIFAR),
    "densenet-40": (zoo(models.Densenet_40, 0.34), CIFAR),
    "grouped": (Grouped, SMALL),
    "gated": (Gated, SMALL),
    "concatenated": (Concatenated, SMALL),
    "transformer": (Transformer, (3, 6)),
}


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


# -- the groups ------------------------------------------------------------------------------------


def groups_of(build, shape):
    return {group.name: group for group in tracing.trace(build(), shape)}


def test_the_blocks_of_a_stage_lose_channels_together():
    found = groups_of(zoo(models.Resnet_20, 1.0), CIFAR)
    first = [f"stage{s}.block{b}.conv1.weight" for s in (1, 2, 3) for b in (1, 2, 3)]
    assert set(found) == {
        "conv1.weight", "stage2.block1.conv2.weight", "stage3.block1.conv2.weight", *first
    }  # fmt: skip
    assert [found[name].makers for name in first] == [{name: 0} for name in first]
    assert tuple(found["conv1.weight"].makers) == (
        "conv1.weight", *(f"stage1.block{b}.conv2.weight" for b in (1, 2, 3))
    )  # fmt: skip
    assert tuple(found["stage2.block1.conv2.weight"].makers) == (
        "stage2.block1.conv2.weight",
        "stage2.block1.shortcut.conv.weight",
        "stage2.block2.conv2.weight",
        "stage2.block3.conv2.weight",
    )
    assert [found[name].size for name in ("conv1.weight", "stage3.block1.conv1.weight")] == [16, 64]


def test_groups_come_in_the_order_of_their_layers():
    network = models.Resnet_20().build(CIFAR, 10)
    place = {name: index for index, (name, _) in enumerate(network.named_parameters())}
    names = [group.name for group in tracing.trace(network, CIFAR)]
    assert names == sorted(names, key=place.__getitem__)


def test_every_later_layer_of_a_dense_block_loses_what_it_is_given():
    found = groups_of(zoo(models.Densenet_40, 1.0), CIFAR)
    assert [found[f"block1.layer{i}.branch.conv1.weight"].size for i in (1, 12)] == [12, 12]
    readers = [slot.tensor for slot in found["conv1.weight"].slots if slot.axis == 1]
    layers = [f"block1.layer{i}.branch.conv1.weight" for i in range(1, 13)]
    assert sorted(readers) == sorted([*layers, "transition1.conv.weight"])


def test_channels_of_a_grouped_convolution_go_with_those_of_its_other_groups():
    found = groups_of(Grouped, SMALL)
    assert {name: group.size for name, group in found.items()} == {
        "first.weight": 3, "grouped.weight": 6, "last.weight": 8
    }  # fmt: skip
    made = next(s for s in found["first.weight"].slots if s.tensor == "first.weight")
    assert made.places == ((0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11))
    read = next(s for s in found["first.weight"].slots if s.tensor == "grouped.weight")
    assert (read.axis, read.places) == (1, ((0,), (1,), (2,)))


def test_a_flattened_channel_is_all_its_pixels():
    found = groups_of(Grouped, SMALL)["last.weight"]
    read = next(slot for slot in found.slots if slot.tensor == "output.weight")
    assert read.places[2] == tuple(range(18, 27))


def test_a_channel_that_a_gate_multiplies_goes_with_the_gates():
    assert groups_of(Gated, SMALL)["c.weight"].makers == {"c.weight": 0, "gate.weight": 0}


@pytest.mark.parametrize(
    ("build", "shape", "names"),
    [
        (Shuffled, SMALL, ["b.weight"]),
        (Softmaxed, (6,), ["b.weight"]),
        (Tied, (6,), ["d.weight"]),
        (Transformer, (3, 6), ["block.linear1.weight"]),
    ],
)
def test_what_cannot_be_removed_is_left_out(build, shape, names):
    assert list(groups_of(build, shape)) == names


def test_the_network_is_left_as_it_was():
    network = models.Resnet_20(width=0.25).build(CIFAR, 10).train()
    before = {name: tensor.clone() for name, tensor in tensors(network).items()}
    network.conv1.weight.requires_grad_(False)
    tracing.trace(network, CIFAR)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(network).items())
    assert network.training
    assert not network.conv1.weight.requires_grad


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (Graphless, r"Graphless is not: no gradient reaches anything from its outputs"),
        (Detached, r"Detached is not: `a.weight` is used, but no gradient reaches it"),
        (lambda: nn.Sequential(nn.Linear(6, 5)), r"none of its layers has channels"),
        (lambda: nn.Linear(6, 5), r"Linear is not: none of its layers has channels"),
    ],
)
def test_a_network_that_cannot_be_followed_is_refused_by_name(build, why):
    with pytest.raises(SpecError, match=why):
        tracing.trace(build(), (6,))


def test_following_a_network_is_not_hung_on(monkeypatch):
    def endless(*_, **__):
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(tracing, "TRACE_SECONDS", 0.2)
    monkeypatch.setattr("torch_pruning.DependencyGraph.build_dependency", endless)
    with pytest.raises(SpecError, match=r"following it took more than 0\.2 seconds"):
        tracing.trace(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), (6,))


def test_following_a_network_takes_a_bounded_amount_of_memory(monkeypatch):
    def greedy(*_, **__):
        held = []
        while True:
            held.append(bytearray(2**20))

    monkeypatch.setattr(tracing, "TRACE_BYTES", 2**28)
    monkeypatch.setattr("torch_pruning.DependencyGraph.build_dependency", greedy)
    with pytest.raises(SpecError, match=r"following it took more than 0\.25 GiB of memory"):
        tracing.trace(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), (6,))


def test_what_is_within_its_limits_is_left_alone():
    with limits.within(60, 2**30):
        pass
    with pytest.raises(ZeroDivisionError), limits.within(60, 2**30):
        raise ZeroDivisionError


def test_one_long_call_is_told_when_it_returns():
    late = pytest.raises(limits.OverLimit, match=r"took more than 0\.1 seconds")
    with late, limits.within(0.1, 2**30):
        time.sleep(0.3)


def test_a_torch_pruning_that_cannot_be_imported_is_told_in_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(SpecError, match="torch-pruning, which must be importable; it raised"):
        tracing.trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (4,))
