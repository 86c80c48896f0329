"""Multiply-adds against counts by hand and against torch's own counter."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from windfall import models, spec
from windfall.flops import masked_multiply_adds, multiply_adds, training_flops

ZOO = [
    member(width=0.25)
    for member in spec.members(models.Model).values()
    if member is not models.UserModel
]


class Twice(nn.Module):
    """Runs one layer twice, the second time by keyword, and another never."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.used = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.used(input=self.used(inputs))


BY_HAND = [
    (nn.Linear(7, 5), (7,), 35),
    (nn.Linear(7, 5), (3, 7), 3 * 35),
    (nn.Conv1d(2, 4, 3), (2, 10), (2 * 4 * 3) * 8),
    (nn.Conv2d(3, 8, 3, padding=1), (3, 6, 4), (3 * 8 * 9) * 24),
    (nn.Conv2d(3, 8, 3, stride=2), (3, 7, 9), (3 * 8 * 9) * (3 * 4)),
    (nn.Conv2d(4, 8, 3, dilation=2), (4, 7, 7), (4 * 8 * 9) * 9),
    (nn.Conv2d(4, 8, 3, groups=2), (4, 5, 5), (2 * 8 * 9) * 9),
    (nn.Conv2d(4, 4, 3, groups=4), (4, 5, 5), (4 * 9) * 9),
    (nn.Conv3d(1, 2, 2), (1, 3, 3, 3), 16 * 8),
    (nn.Conv1d(4, 6, 3, groups=2), (4, 9), (2 * 6 * 3) * 7),
    (nn.Conv2d(4, 12, 3, padding=1, groups=4), (4, 5, 6), (12 * 9) * 30),
    (nn.ConvTranspose2d(3, 5, 2, stride=2), (3, 4, 4), (3 * 5 * 4) * 16),
    (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), (4, 5, 7), (4 * 3 * 9) * 35),
    (nn.ConvTranspose2d(4, 4, 3, groups=4), (4, 5, 5), (4 * 9) * 25),
    (nn.ConvTranspose1d(2, 4, 3), (2, 10), (2 * 4 * 3) * 10),
    (nn.ConvTranspose3d(1, 2, 2), (1, 3, 3, 3), 16 * 27),
]


@pytest.mark.parametrize(("layer", "shape", "expected"), BY_HAND)
def test_a_layer_counts_as_by_hand(layer, shape, expected):
    assert multiply_adds(layer, shape) == {"weight": expected}


@pytest.mark.parametrize(("layer", "shape", "expected"), BY_HAND)
def test_a_layer_counts_as_torch_counts(layer, shape, expected):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.zeros(1, *shape))
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize("model", ZOO, ids=lambda model: spec.tag(type(model)))
class TestEveryModel:
    def test_the_counts_sum_to_what_torch_counts(self, model):
        module = model.build((3, 32, 32), 10)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.zeros(1, 3, 32, 32))
        assert counter.get_total_flops() == 2 * sum(multiply_adds(module, (3, 32, 32)).values())

    def test_a_training_step_costs_what_torch_counts_when_the_inputs_have_gradients(self, model):
        module, batch = model.build((3, 16, 16), 10), 2
        inputs = torch.zeros(batch, 3, 16, 16, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            module(inputs).sum().backward()
        macs = sum(multiply_adds(module, (3, 16, 16)).values())
        assert counter.get_total_flops() == training_flops(macs, batch, num_steps=1)

    def test_every_weight_is_counted_in_order(self, model):
        module = model.build((1, 16, 16), 10)
        assert list(multiply_adds(module, (1, 16, 16))) == list(models.kinds(module, (1, 16, 16)))

    def test_masks_of_ones_change_nothing_and_masks_of_zeros_leave_nothing(self, model):
        module = model.build((1, 16, 16), 10)
        dense = multiply_adds(module, (1, 16, 16))
        weights = {name: module.get_parameter(name) for name in dense}
        ones = {name: torch.ones_like(weight) for name, weight in weights.items()}
        zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        assert masked_multiply_adds(dense, ones) == dense
        assert masked_multiply_adds(dense, zeros) == dict.fromkeys(dense, 0)


def test_conv_2_on_cifar_counts_as_by_hand():
    assert multiply_adds(models.Conv_2().build((3, 32, 32), 10), (3, 32, 32)) == {
        "conv1.weight": 3 * 64 * 9 * 32 * 32,
        "conv2.weight": 64 * 64 * 9 * 32 * 32,
        "hidden1.weight": 64 * 16 * 16 * 256,
        "hidden2.weight": 256 * 256,
        "output.weight": 256 * 10,
    }


def test_a_layer_counts_each_time_it_runs_and_not_when_it_does_not():
    assert multiply_adds(Twice(), (4,)) == {"unused.weight": 0, "used.weight": 32}


def test_an_attention_blocks_output_layer_counts_once_for_each_token():
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert multiply_adds(module, (5, 8)) == {
        "self_attn.out_proj.weight": 5 * 64,
        "linear1.weight": 5 * 128,
        "linear2.weight": 5 * 128,
    }


def test_a_kept_weight_counts_as_often_as_it_is_used():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    conv = torch.zeros(2, 1, 3, 3)
    conv[0, 0, 1] = 1
    linear = torch.zeros(3, 8, dtype=torch.bool)
    linear[2, :5] = True
    dense = multiply_adds(module, (1, 4, 4))
    masked = masked_multiply_adds(dense, {"0.weight": conv, "2.weight": linear})
    assert masked == {"0.weight": 3 * 4, "2.weight": 5}


def test_a_weight_without_a_mask_stays_dense():
    dense = {"a.weight": 12, "b.weight": 8}
    assert masked_multiply_adds(dense, {"b.weight": torch.tensor([[1, 0], [0, 0]])}) == {
        "a.weight": 12,
        "b.weight": 2,
    }


def test_a_mask_costs_what_the_smaller_network_costs():
    """Removing whole output channels is the same as building the layer without them."""
    mask = torch.ones(8, 3, 3, 3)
    mask[5:] = 0
    dense = multiply_adds(nn.Conv2d(3, 8, 3), (3, 9, 9))
    small = multiply_adds(nn.Conv2d(3, 5, 3), (3, 9, 9))
    assert masked_multiply_adds(dense, {"weight": mask}) == small


def test_training_flops_are_exact_integers_beyond_float_precision():
    assert training_flops(153_881_088, 60, 30_000) == 6 * 153_881_088 * 60 * 30_000
    assert training_flops(10**18 + 1, 1, 1) == 6 * 10**18 + 6


def test_counting_leaves_the_network_as_it_was():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    module[2].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    multiply_adds(module, (4,))
    assert [part.training for part in module] == [True, True, False]
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks for part in module)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"c.weight": torch.ones(2)}, "`c.weight` is none of them"),
        ({"a.weight": torch.ones(5)}, r"mask of `a.weight` must have its shape; got \[5\]"),
        ({"a.weight": torch.ones(0)}, r"mask of `a.weight` must have its shape; got \[0\]"),
    ],
)
def test_masks_of_another_network_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        masked_multiply_adds({"a.weight": 12}, masks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 1, 1), "`macs_per_sample` must be at least 0; got -1"),
        ((1, 0, 1), "`batch_size` must be at least 1; got 0"),
        ((1, 1, -1), "`num_steps` must be at least 0; got -1"),
    ],
)
def test_impossible_trainings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        training_flops(*arguments)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(spec.SpecError, match=r"must accept inputs of shape \(1, 5\)"):
        multiply_adds(nn.Linear(4, 4), (5,))
