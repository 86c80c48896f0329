"""Which engine trains what: the rule in full."""

import pytest
import torch
from torch import nn

from windfall import models
from windfall.engines import rule
from windfall.engines.contract import Unsupported
from windfall.train import State

LINEAR, IMAGE = (1, 8, 8), (3, 8, 8)


def mlp():
    return models.Mlp(hidden=(6,)).build(LINEAR, 10)


def conv():
    return models.Conv_2(width=0.05).build(IMAGE, 10)


def dropped():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 10))


def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 50_000), nn.ReLU(), nn.Linear(50_000, 10))


@pytest.mark.parametrize(
    ("build", "density", "device", "engine"),
    [
        (mlp, 1.0, "cpu", "sparse"),
        (mlp, 0.01, "cpu", "sparse"),
        (conv, 1.0, "cpu", "separate"),
        (conv, 0.71, "cpu", "separate"),
        (conv, 0.7, "cpu", "sparse"),
        (conv, 0.02, "cpu", "sparse"),
        (dropped, 0.02, "cpu", "separate"),
        (mlp, 1.0, "cuda", "stacked"),
        (conv, 0.02, "cuda", "stacked"),
        (dropped, 1.0, "cuda", "separate"),
        (wide, 1.0, "cuda", "separate"),
    ],
)
def test_the_rule(build, density, device, engine):
    shape = IMAGE if build is conv else LINEAR
    assert rule.choose("auto", build(), shape, density, device).engine == engine


@pytest.mark.parametrize("asked", rule.NAMES)
def test_an_engine_that_is_asked_for_trains(asked):
    assert rule.choose(asked, conv(), IMAGE, 1.0, "cpu") == rule.Choice(asked)


@pytest.mark.parametrize("asked", ["sparse", "stacked"])
def test_an_engine_that_is_asked_for_and_cannot_is_an_error_that_names_the_layer(asked):
    with pytest.raises(Unsupported, match=r"`2` \(Dropout\)"):
        rule.choose(asked, dropped(), LINEAR, 1.0, "cpu")


def test_the_sparse_engine_is_not_for_a_gpu():
    with pytest.raises(Unsupported, match="`engine` must be one for a GPU; sparse is for the CPU"):
        rule.choose("sparse", mlp(), LINEAR, 1.0, "cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_keeps_a_faster_engine_away_is_told(device):
    assert "`2` (Dropout)" in (rule.choose("auto", dropped(), LINEAR, 1.0, device).reason or "")
    assert rule.choose("auto", mlp(), LINEAR, 1.0, device).reason is None


def test_choosing_leaves_the_network_as_it_was():
    network = models.Resnet_20(width=0.25).build(IMAGE, 10)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    drawn = torch.get_rng_state()
    for device in ("cpu", "cuda"):
        rule.choose("auto", network.train(), IMAGE, 0.5, device)
    assert network.training
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_density_of_a_state_is_of_all_its_masked_weights():
    masks = {"a": torch.tensor([True, False, False, False]), "b": torch.tensor([True, True])}
    assert rule.kept(State(0, {}, {}, masks)) == 0.5
    assert rule.kept(State(0, {}, {})) == 1.0
