"""Patterns of what pruning keeps, counted another way, and the networks that are built by them."""

import itertools

import pytest
import torch
from torch import nn

from windfall import architecture, models, seeds, spec, structure, tracing
from windfall.models import stages
from windfall.models.stages import Residual, Staged
from windfall.spec import SpecError

CIFAR, SMALL = (3, 32, 32), (1, 16, 16)
STAGED = [m for m in spec.members(models.Model).values() if issubclass(m, Staged)]
RESIDUAL = [m for m in STAGED if issubclass(m, Residual)]
FACTORS = (0.5, 0.75, 0.25, 1.0, 0.5)


def named(member):
    return spec.tag(member)


def on_meta(model, shape=SMALL):
    with torch.device("meta"):
        return model.build(shape, 10)


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def factors(member):
    return FACTORS[: stages.num_stages(member())]


# -- stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", STAGED, ids=named)
class TestEveryNetworkWithStages:
    def test_factors_of_1_change_nothing(self, member):
        ones = (1.0,) * stages.num_stages(member())
        changed = {"stages": ones} | ({"shared": ones} if issubclass(member, Residual) else {})
        assert shapes(on_meta(member(width=0.3, **changed))) == shapes(on_meta(member(width=0.3)))

    def test_a_factor_changes_its_own_stage_alone(self, member):
        plain = shapes(on_meta(member()))
        for index in range(stages.num_stages(member())):
            own = [1.0] * stages.num_stages(member())
            own[index] = 0.5
            found = shapes(on_meta(member(stages=own)))
            made = {n for n, shape in found.items() if shape[:1] != plain[n][:1] and len(shape) > 1}
            assert made
            assert {stages.stage(member(), name) for name in made} <= {index, None}

    def test_another_number_of_factors_is_refused_with_the_stages(self, member):
        number = stages.num_stages(member())
        message = rf"`stages` must have {number} factors, one for each stage \(.*\); got 4"
        with pytest.raises(SpecError, match=message):
            spec.decode(models.Model, {"kind": named(member), "stages": [1, 1, 1, 1]})

    def test_no_factors_are_not_in_the_address(self, member):
        assert member().to_json() == {"kind": named(member), "width": 1.0}
        assert "stages" in member(stages=factors(member)).to_json()

    def test_it_computes_with_factors(self, member):
        with seeds.isolated(0, "test"):
            module = member(width=0.125, stages=factors(member)).build(SMALL, 7).eval()
        assert module(torch.ones(2, *SMALL)).shape == (2, 7)


def test_vggs_stages_are_what_stands_between_pools():
    module = on_meta(models.Vgg_16(stages=FACTORS), CIFAR)
    found = [part.out_channels for part in module if isinstance(part, nn.Conv2d)]
    assert found == [32] * 2 + [96] * 2 + [64] * 3 + [512] * 3 + [256] * 3


def test_residual_stages_are_the_channels_inside_their_blocks():
    kept = on_meta(models.Resnet_20(stages=(0.5, 0.75, 0.25)), CIFAR).state_dict()
    for stage, (inner, wide) in enumerate(((8, 16), (24, 32), (16, 64)), start=1):
        for block in (1, 2, 3):
            home = f"stage{stage}.block{block}"
            assert kept[f"{home}.conv1.weight"].shape[0] == inner
            assert kept[f"{home}.conv2.weight"].shape[:2] == (wide, inner)


def test_shared_factors_are_of_the_channels_that_blocks_add_to():
    kept = on_meta(models.Preresnet_164(shared=(0.25, 0.5, 1.0)), CIFAR).state_dict()
    assert kept["conv1.weight"].shape[0] == 16
    for stage, made in enumerate((16, 64, 256), start=1):
        for block in (1, 18):
            assert kept[f"stage{stage}.block{block}.conv3.weight"].shape[0] == made
        assert kept[f"stage{stage}.block1.shortcut.conv.weight"].shape[0] == made


def test_densenets_stages_are_what_their_layers_add():
    kept = on_meta(models.Densenet_40(stages=(0.5, 0.75, 0.25)), CIFAR).state_dict()
    for block, growth in ((1, 6), (2, 9), (3, 3)):
        assert kept[f"block{block}.layer12.branch.conv1.weight"].shape[0] == growth
    between = [kept[f"transition{index}.conv.weight"].shape[:2] for index in (1, 2)]
    assert between == [(16 + 12 * 6,) * 2, (16 + 12 * 6 + 12 * 9,) * 2]


@pytest.mark.parametrize(
    ("member", "layers"),
    [
        (models.Vgg_11, {"conv1": 0, "conv2": 1, "conv4": 2, "conv8": 4, "output": None}),
        (models.Vgg_19, {"conv2": 0, "conv4": 1, "conv8": 2, "conv12": 3, "conv16": 4}),
        (models.Resnet_56, {"conv1": None, "stage1.block9.conv2": 0, "stage3.block1.conv1": 2}),
        (models.Densenet_40, {"block2.layer3.branch.conv1": 1, "transition1.conv": None}),
    ],
)
def test_layers_are_in_their_stages(member, layers):
    found = {name: stages.stage(member(), f"{name}.weight") for name in layers}
    assert found == layers


@pytest.mark.slow
@pytest.mark.parametrize(
    "member",
    [
        models.Vgg_13,
        models.Resnet_20,
        models.Preresnet_110,
        models.Preresnet_164,
        models.Densenet_40,
    ],
    ids=named,
)
def test_channels_are_shared_where_several_layers_make_them(member):
    model = member(width=0.25)
    for group in tracing.trace(model.build(CIFAR, 10), CIFAR):
        shared = stages.shared_stage(model, group.name)
        makers = {stages.stage(model, name) for name in group.makers} - {None}
        if len(group.makers) > 1:
            assert makers == {shared}
            assert stages.inner_stage(model, group.name) is None
        else:
            assert shared is None
            assert {stages.inner_stage(model, group.name)} - {None} == makers


# -- patterns --------------------------------------------------------------------------------------


def some(size, count, seed):
    order = torch.from_numpy(seeds.stream(seed, "test").permutation(size))
    return order < count


def test_a_pattern_is_the_mean_over_networks_of_what_each_stage_keeps():
    model, counts = models.Vgg_11(width=0.0625), (4, 8, 16, 16, 32, 32, 32, 32)
    networks = [
        {f"conv{i}.weight": some(size, size // part, i) for i, size in enumerate(counts, start=1)}
        for part in (2, 4)
    ]
    networks[1]["conv4.weight"] = torch.ones(16, dtype=torch.bool)
    found = architecture.of_channels(model, networks)
    assert found.networks == ((0.5,) * 5, (0.25, 0.25, (4 + 16) / 32, 0.25, 0.25))
    assert found.stages == pytest.approx((0.375, 0.375, 0.5625, 0.375, 0.375))
    assert found.ranges[2] == (0.5, 0.625)
    assert (found.unit, found.num_networks, found.shared_stages) == ("channels", 2, None)


def test_a_pattern_is_relative_to_the_network_without_factors():
    model = models.Resnet_20(stages=(0.5, 1, 1), shared=(1, 0.5, 1))
    channels = {
        "conv1.weight": some(16, 8, 0),
        "stage1.block1.conv1.weight": some(8, 4, 1),
        "stage2.block1.conv2.weight": some(16, 8, 2),
    }
    found = architecture.of_channels(model, [channels])
    assert found.networks == ((0.25, 1.0, 1.0),)
    assert found.shared_stages == (0.5, 0.25, 1.0)


def test_a_pattern_of_weights_counts_each_position_of_the_kernels():
    model = models.Resnet_20(width=0.25)
    weights = {n: p for n, p in on_meta(model).named_parameters() if p.dim() > 1}
    networks = []
    for seed in (0, 1):
        stream = seeds.stream(seed, "test")
        draw = {n: torch.from_numpy(stream.random(tuple(w.shape))) for n, w in weights.items()}
        networks.append({name: drawn < 0.3 + 0.2 * seed for name, drawn in draw.items()})
    found = architecture.of_masks(model, networks)
    for stage, network in itertools.product(range(3), (0, 1)):
        own = [m for n, m in networks[network].items() if n.startswith(f"stage{stage + 1}.")]
        kept, size = sum(int(m.sum()) for m in own), sum(m.numel() for m in own)
        assert found.networks[network][stage] == kept / size
    for stage, row, column in itertools.product(range(3), range(3), range(3)):
        means = []
        for masks in networks:
            kept = size = 0
            for name, mask in masks.items():
                if name.startswith(f"stage{stage + 1}.") and mask.shape[-1] == 3:
                    kept += int(mask[:, :, row, column].sum())
                    size += mask.shape[0] * mask.shape[1]
            means.append(kept / size)
        assert found.kernels[stage][row][column] == pytest.approx(sum(means) / 2)


def test_layers_have_their_stage_and_what_is_kept():
    channels = {"conv1.weight": some(64, 16, 0), "conv3.weight": some(256, 64, 1)}
    found = architecture.of_layers(models.Vgg_11(), channels, "channels")
    assert found == {"conv1.weight": (0, False, 0.25), "conv3.weight": (2, False, 0.25)}
    first = {"conv1.weight": some(16, 8, 0), "stage2.block1.conv2.weight": some(32, 8, 0)}
    assert architecture.of_layers(models.Resnet_20(), first, "channels") == {
        "conv1.weight": (0, True, 0.5),
        "stage2.block1.conv2.weight": (1, True, 0.25),
    }
    assert architecture.of_layers(models.Resnet_20(), first, "weights") == {
        "stage2.block1.conv2.weight": (1, False, 0.25)
    }


def test_a_network_without_stages_has_no_pattern():
    with pytest.raises(SpecError, match=r"`model` must have stages .* got mlp\. Known: vgg-11,"):
        architecture.of_channels(models.Mlp(), [])
    with pytest.raises(SpecError, match=r"got conv-4"):
        architecture.guided(models.Conv_4(), (1.0,))


# -- new networks ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "member", [models.Vgg_16, models.Resnet_56, models.Preresnet_110, models.Preresnet_164],
    ids=named,
)  # fmt: skip
def test_a_guided_network_is_the_pruned_one_where_every_layer_lost_its_stages_share(member):
    model = member(width=0.5)
    network = model.build(CIFAR, 10)
    groups = tracing.trace(network, CIFAR)
    channels = {}
    for seed, group in enumerate(groups):
        inner = stages.inner_stage(model, group.name)
        shared = stages.shared_stage(model, group.name)
        place = inner if inner is not None else shared
        share = 1.0 if place is None else FACTORS[place + (shared is not None)]
        channels[group.name] = some(group.size, round(share * group.size), seed)
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    pruned = structure.shapes(structure.shrunk(tensors, groups, channels))
    found = architecture.of_channels(model, [channels])
    made = architecture.guided(model, found.stages, found.shared_stages)
    assert found.stages == FACTORS[: len(found.stages)]
    assert shapes(on_meta(made, CIFAR)) == pruned


def test_a_guided_network_may_have_another_width_depth_and_number_of_classes():
    made = architecture.guided(models.Vgg_13(width=0.5, stages=(1,) * 5), FACTORS)
    assert made == models.Vgg_13(width=0.5, stages=FACTORS)
    module = made.build(SMALL, 3)
    assert module.conv1.out_channels == 16
    assert module.output.out_features == 3
    with pytest.raises(SpecError, match=r"`stages` must have 3 factors"):
        architecture.guided(models.Resnet_20(), FACTORS)
    with pytest.raises(SpecError, match=r"no field `shared`"):
        architecture.guided(models.Vgg_11(), FACTORS, FACTORS)


def count(model, shape=SMALL, num_classes=10):
    return sum(param.numel() for param in model.build(shape, num_classes).parameters())


def test_parameters_are_those_of_the_built_network():
    for model in (models.Vgg_11(width=0.1), models.Densenet_40(width=0.5)):
        assert architecture.num_parameters(model, SMALL, 10) == count(model)


@pytest.mark.parametrize("wanted", [1, 5_000, 20_011, 131_071])
def test_one_width_gives_the_nearest_number_of_parameters_there_is(wanted):
    found = architecture.uniform(models.Vgg_11(stages=FACTORS), wanted, SMALL, 10)
    near = round(found.model.width * architecture.GRID)
    tried = {k: count(models.Vgg_11(width=k / architecture.GRID))
             for k in range(max(1, near - 40), near + 41)}  # fmt: skip
    assert found.num_parameters == tried[near] == count(found.model)
    assert abs(found.difference) == min(abs(number - wanted) for number in tried.values())
    assert found.difference == found.num_parameters - wanted
    assert found.model.stages is None


def test_one_width_is_found_above_1_and_leaves_no_factor():
    found = architecture.uniform(models.Resnet_20(shared=(2, 2, 2)), 1_000_000, SMALL, 10)
    assert found.model == models.Resnet_20(width=found.model.width)
    assert found.model.width > 1
    assert abs(found.difference) < 20_000
