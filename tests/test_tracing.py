"""Channels that live and die together: found, proved, or refused."""

import sys
import time

import pytest
import torch
from networks import (
    CIFAR,
    SMALL,
    Detached,
    Gated,
    Graphless,
    Grouped,
    Shuffled,
    Softmaxed,
    Tied,
    Transformer,
    zoo,
)
from torch import nn

from windfall import limits, models, tracing
from windfall.spec import SpecError


def tensors(network):
    return dict(network.named_parameters()) | dict(network.named_buffers())


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
        (Transformer, (3, 6), ["block.linear1.weight"]),
        (Tied, (6,), ["d.weight"]),
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
