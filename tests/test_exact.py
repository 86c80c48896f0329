"""Networks of the papers' size without channels: they compute the same, and cost what is written.

The counts are closed formulas of the numbers of channels, written out below for each network.
"""

from typing import NamedTuple

import pytest
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from windfall import flops, models, seeds, spec, structure, tracing

CIFAR = (3, 32, 32)
PIXELS = (32 * 32, 16 * 16, 8 * 8)  # of an image in the three stages of a residual network
TOLERANCE = 1e-5  # of the outputs' scale, in float32


class Count(NamedTuple):
    parameters: int
    multiply_adds: int


class Sum:
    """Adds up layers: a convolution of so many channels, a normalization, the output."""

    def __init__(self):
        self.parameters = self.multiply_adds = 0

    def conv(self, given, made, side, pixels):
        self.parameters += side * side * given * made
        self.multiply_adds += side * side * given * made * pixels

    def norm(self, channels):
        self.parameters += 2 * channels

    def output(self, given):
        self.parameters += 10 * given + 10
        self.multiply_adds += 10 * given

    @property
    def count(self):
        return Count(self.parameters, self.multiply_adds)


def vgg_16(size):
    total, given = Sum(), 3
    pixels = [1024] * 2 + [256] * 2 + [64] * 3 + [16] * 3 + [4] * 3
    for index, area in enumerate(pixels, start=1):
        made = size(f"conv{index}")
        total.conv(given, made, 3, area)
        total.norm(made)
        given = made
    total.output(given)
    return total.count


def resnet_56(size):
    shared = [size(name) for name in ("conv1", "stage2.block1.conv2", "stage3.block1.conv2")]
    total, given = Sum(), shared[0]
    total.conv(3, given, 3, PIXELS[0])
    total.norm(given)
    for stage, (wide, pixels) in enumerate(zip(shared, PIXELS, strict=True), start=1):
        for block in range(1, 10):
            inner = size(f"stage{stage}.block{block}.conv1")
            total.conv(given, inner, 3, pixels)
            total.norm(inner)
            total.conv(inner, wide, 3, pixels)
            total.norm(wide)
            if block == 1 and stage > 1:
                total.conv(given, wide, 1, pixels)
                total.norm(wide)
            given = wide
    total.output(given)
    return total.count


def preresnet_164(size):
    total, given, came = Sum(), size("conv1"), PIXELS[0]
    total.conv(3, given, 3, came)
    for stage, pixels in enumerate(PIXELS, start=1):
        wide = size(f"stage{stage}.block1.conv3")
        for block in range(1, 19):
            home = f"stage{stage}.block{block}"
            first, second = size(f"{home}.conv1"), size(f"{home}.conv2")
            total.norm(given)
            total.conv(given, first, 1, came)  # before the stride
            total.norm(first)
            total.conv(first, second, 3, pixels)
            total.norm(second)
            total.conv(second, wide, 1, pixels)
            if block == 1:
                total.conv(given, wide, 1, pixels)
            given, came = wide, pixels
    total.norm(given)
    total.output(given)
    return total.count


def densenet_40(size):
    total, given = Sum(), size("conv1")
    total.conv(3, given, 3, PIXELS[0])
    for block, pixels in enumerate(PIXELS, start=1):
        for layer in range(1, 13):
            growth = size(f"block{block}.layer{layer}.branch.conv1")
            total.norm(given)
            total.conv(given, growth, 3, pixels)
            given += growth
        if block < 3:
            made = size(f"transition{block}.conv")
            total.norm(given)
            total.conv(given, made, 1, pixels)
            given = made
    total.norm(given)
    total.output(given)
    return total.count


BY_HAND = {
    models.Vgg_16: vgg_16,
    models.Resnet_56: resnet_56,
    models.Preresnet_164: preresnet_164,
    models.Densenet_40: densenet_40,
}
# The same with the papers' numbers of channels, as sums that can be checked by eye.
DENSE = {
    models.Vgg_16: 9 * (
        1024 * (3 * 64 + 64 * 64)
        + 256 * (64 * 128 + 128 * 128)
        + 64 * (128 * 256 + 2 * 256 * 256)
        + 16 * (256 * 512 + 2 * 512 * 512)
        + 4 * (3 * 512 * 512)
    ) + 512 * 10,
    models.Resnet_56: 9 * (
        1024 * (3 * 16 + 18 * 16 * 16)
        + 256 * (16 * 32 + 17 * 32 * 32)
        + 64 * (32 * 64 + 17 * 64 * 64)
    ) + 256 * 16 * 32 + 64 * 32 * 64 + 64 * 10,
    models.Preresnet_164: 9 * 1024 * 3 * 16
    + sum(18 * pixels * 9 * wide**2 for pixels, wide in zip(PIXELS, (16, 32, 64), strict=True))
    + sum(18 * pixels * 4 * wide**2 for pixels, wide in zip(PIXELS, (16, 32, 64), strict=True))
    + sum(17 * pixels * 4 * wide**2 for pixels, wide in zip(PIXELS, (16, 32, 64), strict=True))
    + 1024 * (16 * 16 + 16 * 64)  # what the first block is given: its first and its shortcut's
    + 1024 * 64 * 32 + 256 * 64 * 128
    + 256 * 128 * 64 + 64 * 128 * 256
    + 256 * 10,
    models.Densenet_40: 9 * 1024 * 3 * 16
    + 9 * 12 * sum(
        pixels * sum(first + 12 * layer for layer in range(12))
        for pixels, first in zip(PIXELS, (16, 160, 304), strict=True)
    )
    + 1024 * 160**2 + 256 * 304**2 + 448 * 10,
}  # fmt: skip


def named(member):
    return spec.tag(member)


# -- dense, on no device at all --------------------------------------------------------------------

ZOO = [m for m in spec.members(models.Model).values() if m is not models.UserModel]


def counted_by_torch(network, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("member", ZOO, ids=named)
def test_a_network_of_the_papers_size_costs_what_torch_counts(member):
    with torch.device("meta"):
        network, inputs = member().build(CIFAR, 10).eval(), torch.zeros(1, *CIFAR)
    assert counted_by_torch(network, inputs) == 2 * sum(
        flops.multiply_adds(network, CIFAR).values()
    )


@pytest.mark.parametrize("member", BY_HAND, ids=named)
def test_a_network_of_the_papers_size_counts_as_by_hand(member):
    with torch.device("meta"):
        network = member().build(CIFAR, 10)

    def size(name):
        return network.get_submodule(name).out_channels

    expected = BY_HAND[member](size)
    assert sum(flops.multiply_adds(network, CIFAR).values()) == expected.multiply_adds
    assert sum(p.numel() for p in network.parameters()) == expected.parameters
    assert expected.multiply_adds == DENSE[member]


def test_lenet_on_mnist_counts_as_by_hand():
    with torch.device("meta"):
        network = models.Lenet_300_100().build((1, 28, 28), 10)
    expected = {"hidden1.weight": 784 * 300, "hidden2.weight": 30_000, "output.weight": 1_000}
    assert flops.multiply_adds(network, (1, 28, 28)) == expected


# -- without channels ------------------------------------------------------------------------------


class Whole:
    """A network whose normalizations are not the identity, and its groups of channels."""

    def __init__(self, member):
        with seeds.isolated(0, "test"), torch.no_grad():
            self.network = member().build(CIFAR, 10).eval()
            found = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
            self.tensors = {name: tensor.detach() for name, tensor in found.items()}
            for name, tensor in self.tensors.items():
                if name.endswith("running_mean") or (tensor.dim() == 1 and "bias" in name):
                    tensor.normal_(std=0.2)
                elif tensor.dim() == 1:  # scales and variances
                    tensor.uniform_(0.5, 1.5)
        self.groups = tracing.trace(self.network, CIFAR)


@pytest.fixture(scope="module")
def wholes():
    known = {}

    def find(member):
        if member not in known:
            known[member] = Whole(member)
        return known[member]

    return find


def halves(groups):
    """Of each group, half of its channels, at random."""
    drawn = {g.name: torch.from_numpy(seeds.stream(1, g.name).permutation(g.size)) for g in groups}
    return {name: order < len(order) // 2 for name, order in drawn.items()}


def uneven(groups):
    """Of each group a random number of channels, from one to all."""
    found = {}
    for group in groups:
        stream = seeds.stream(2, group.name)
        order, number = stream.permutation(group.size), stream.integers(1, group.size + 1)
        found[group.name] = torch.from_numpy(order < number)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("choose", [halves, uneven])
@pytest.mark.parametrize("member", BY_HAND, ids=named)
class TestANetworkOfThePapersSize:
    def pruned(self, wholes, member, choose):
        whole = wholes(member)
        channels = choose(whole.groups)
        kept = structure.shrunk(whole.tensors, whole.groups, channels)
        smaller = structure.resized(whole.network, structure.shapes(kept))
        smaller.load_state_dict(kept)
        return whole, channels, kept, smaller

    def test_computes_without_channels_what_it_does_with_them_at_0(self, wholes, member, choose):
        whole, channels, _, smaller = self.pruned(wholes, member, choose)
        masks = structure.masks(whole.groups, channels, whole.tensors)
        masked = {n: p * masks.get(n, 1) for n, p in whole.network.named_parameters()}
        with seeds.isolated(3, "test"), torch.no_grad():
            inputs = torch.randn(4, *CIFAR)
            expected = functional_call(whole.network, masked, (inputs,))
            found, plain = smaller(inputs), whole.network(inputs)
        scale = float(expected.std())
        assert scale > 0
        assert float((found - expected).abs().max()) <= TOLERANCE * scale
        assert float((plain - expected).abs().max()) > 100 * TOLERANCE * scale

    def test_keeps_every_layer_and_its_channels_statistics(self, wholes, member, choose):
        whole, channels, kept, smaller = self.pruned(wholes, member, choose)
        assert list(kept) == list(whole.tensors)
        assert all(min(tensor.shape, default=1) > 0 for tensor in kept.values())
        seen = set()
        for group in whole.groups:
            stay = channels[group.name].nonzero().flatten().tolist()
            for slot in group.slots:
                own = whole.tensors[slot.tensor]
                if own.dim() == 1 and len(own) == group.size:
                    places = [p for channel in stay for p in slot.places[channel]]
                    assert torch.equal(kept[slot.tensor], own[sorted(places)])
                    seen.add(slot.tensor.rpartition(".")[2])
        assert seen >= {"weight", "bias", "running_mean", "running_var"}
        for name, part in smaller.named_modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                assert part.num_features == len(kept[f"{name}.running_var"])

    def test_counts_as_by_hand_as_torch_and_as_its_masks(self, wholes, member, choose):
        whole, channels, _, smaller = self.pruned(wholes, member, choose)
        expected = BY_HAND[member](lambda name: int(channels[f"{name}.weight"].sum()))
        own = sum(flops.multiply_adds(smaller, CIFAR).values())
        assert own == expected.multiply_adds
        assert sum(p.numel() for p in smaller.parameters()) == expected.parameters
        assert counted_by_torch(smaller, torch.zeros(1, *CIFAR)) == 2 * own
        dense = flops.multiply_adds(whole.network, CIFAR)
        masks = structure.masks(whole.groups, channels, whole.tensors)
        masked = flops.masked_multiply_adds(dense, {n: masks[n] for n in dense if n in masks})
        assert masked == flops.multiply_adds(smaller, CIFAR)
