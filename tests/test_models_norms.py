"""Networks of the zoo without batch normalization: by their weights, or by nothing."""

import pytest
import torch
from torch import nn

from windfall import flops, models, spec, structure, tracing
from windfall.engines.sparse import graph
from windfall.models import kinds
from windfall.weightnorm import WeightNormed

CIFAR, SMALL = (3, 32, 32), (1, 16, 16)
NORMED = [member for member in spec.members(models.Model).values() if "norm" in member.model_fields]
PLAIN = [models.Mlp, models.Lenet_300_100, models.Conv_2, models.Conv_4, models.Conv_6]
WITHOUT_BATCH = [(member, norm) for member in NORMED for norm in ("weight", "none")]


def built(member, norm, input_shape=SMALL, width=0.25):
    return member(width=width, norm=norm).build(input_shape, 10)


def test_all_networks_but_densenets_have_the_option():
    names = {spec.tag(member) for member in spec.members(models.Model).values()}
    assert names - {spec.tag(member) for member in NORMED} == {
        "densenet-40",
        "densenet-bc-100",
        "user-model",
    }


@pytest.mark.parametrize("member", NORMED, ids=spec.tag)
class TestEveryNetworkWithTheOption:
    def test_the_default_is_what_it_was_and_is_not_in_its_address(self, member):
        default = "none" if member in PLAIN else "batch"
        assert member().norm == default
        assert "norm" not in member().to_json()
        assert member(norm=default).address == member().address
        assert member(norm="weight").address != member().address
        assert member.from_json(member(norm="weight").to_json()).norm == "weight"

    def test_an_unknown_one_is_refused(self, member):
        with pytest.raises(spec.SpecError, match=r"`norm` must be .*; got 'layer'"):
            spec.decode(models.Model, {"kind": spec.tag(member), "norm": "layer"})
        if member in PLAIN:
            with pytest.raises(spec.SpecError, match=r"`norm` must be .*; got 'batch'"):
                spec.decode(models.Model, {"kind": spec.tag(member), "norm": "batch"})

    def test_weights_keep_their_names_shapes_kinds_and_cost(self, member):
        with torch.device("meta"):
            usual, other = member().build(CIFAR, 10), member(norm="weight").build(CIFAR, 10)
        assert kinds(other, CIFAR) == kinds(usual, CIFAR)
        assert flops.multiply_adds(other, CIFAR) == flops.multiply_adds(usual, CIFAR)

    def test_by_its_weights_every_layer_but_the_output_is_normalized_and_has_biases(self, member):
        module = built(member, "weight")
        layers = dict(module.named_modules())
        for name in kinds(module, SMALL):
            layer = layers[name.removesuffix(".weight")]
            assert isinstance(layer, WeightNormed) == (name != "output.weight")
            assert layer.bias is not None
        assert list(module.buffers()) == []


@pytest.mark.parametrize(("member", "norm"), WITHOUT_BATCH)
def test_a_gradient_reaches_every_parameter_without_batch_normalization(member, norm):
    module = built(member, norm)
    inputs = torch.linspace(-1, 1, 4 * 256).reshape(4, *SMALL)
    nn.functional.cross_entropy(module(inputs), torch.arange(4)).backward()
    missing = [name for name, param in module.named_parameters() if param.grad is None]
    assert missing == []
    assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


@pytest.mark.parametrize("norm", ["weight", "none"])
def test_a_block_without_batch_normalization_adds_a_branch_of_one_relu(norm):
    inputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for member in (models.Resnet_20, models.Preresnet_110):
        block = built(member, norm).stage2.block1
        branch = block.conv2(block.conv1(inputs).relu())
        torch.testing.assert_close(block(inputs), branch + block.shortcut.conv(inputs))
    block = built(models.Preresnet_164, norm).stage1.block2
    given = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    branch = block.conv3(block.conv2(block.conv1(given).relu()).relu())
    torch.testing.assert_close(block(given), branch + given)


@pytest.mark.parametrize("norm", ["weight", "none"])
@pytest.mark.parametrize("member", [models.Resnet_20, models.Vgg_11])
def test_channels_without_batch_normalization_can_be_removed(member, norm):
    module = built(member, norm)
    usual = tracing.trace(built(member, "batch"), SMALL)
    groups = tracing.trace(module, SMALL)
    assert [(g.name, g.size) for g in groups] == [(g.name, g.size) for g in usual]
    channels = {g.name: torch.arange(g.size) % 2 == 0 for g in groups}
    whole = structure.tensors(module)
    shrunk = structure.shrunk(whole, groups, channels)
    smaller = structure.given(structure.resized(module, structure.shapes(shrunk)), shrunk)
    masks = structure.masks(groups, channels, whole)
    zeroed = {n: torch.where(masks[n], t, 0) if n in masks else t for n, t in whole.items()}
    inputs = torch.randn(2, *SMALL, generator=torch.Generator().manual_seed(0))
    masked = torch.func.functional_call(module, zeroed, (inputs,))
    torch.testing.assert_close(smaller(inputs), masked, rtol=1e-4, atol=1e-5)


def test_the_sparse_engine_trains_networks_of_nothing_and_leaves_weight_normalized_ones():
    graph.read(built(models.Resnet_20, "none"), SMALL)
    with pytest.raises(graph.Unsupported, match="sparse cannot"):
        graph.read(built(models.Resnet_20, "weight"), SMALL)
