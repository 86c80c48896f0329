"""VGG and the residual networks: their layers as the papers say, and what they compute."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from windfall import initialize, models, seeds
from windfall.models import kinds

CIFAR = (3, 32, 32)


def unlike_a_fresh_one(module):
    """The network in float64 and evaluation, no normalization of it the identity."""
    module = module.double().eval()
    with seeds.isolated(0, "test"), torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    value.uniform_(0.5, 1.5)
    return module


def inputs(input_shape):
    with seeds.isolated(1, "test"):
        return torch.randn(3, *input_shape, dtype=torch.float64)


def normalized(state, name, values):
    stats = (state[f"{name}.{part}"] for part in ("running_mean", "running_var"))
    return F.batch_norm(values, *stats, state[f"{name}.weight"], state[f"{name}.bias"])


def read(state, values):
    return values.mean((2, 3)) @ state["output.weight"].T + state["output.bias"]


def vgg_by_hand(state, lengths, values):
    index = 0
    for stage, length in enumerate(lengths):
        values = F.max_pool2d(values, 2) if stage else values
        for _ in range(length):
            index += 1
            values = F.conv2d(values, state[f"conv{index}.weight"], padding=1)
            values = normalized(state, f"norm{index}", values).relu()
    return read(state, values)


def resnet_by_hand(state, length, values):
    values = F.conv2d(values, state["conv1.weight"], padding=1)
    values = normalized(state, "norm1", values).relu()
    for stage in (1, 2, 3):
        for block in range(1, length + 1):
            home = f"stage{stage}.block{block}"
            stride = 2 if stage > 1 and block == 1 else 1
            added = F.conv2d(values, state[f"{home}.conv1.weight"], padding=1, stride=stride)
            added = normalized(state, f"{home}.norm1", added).relu()
            added = F.conv2d(added, state[f"{home}.conv2.weight"], padding=1)
            added = normalized(state, f"{home}.norm2", added)
            if stride == 2:
                values = F.conv2d(values, state[f"{home}.shortcut.conv.weight"], stride=2)
                values = normalized(state, f"{home}.shortcut.norm", values)
            values = (values + added).relu()
    return read(state, values)


def preresnet_by_hand(state, kernels, values):
    values = F.conv2d(values, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for block in range(1, 19):
            home, added = f"stage{stage}.block{block}", values
            for index, kernel in enumerate(kernels, start=1):
                strides = stage > 1 and block == 1 and index == kernels.index(3) + 1
                added = normalized(state, f"{home}.norm{index}", added).relu()
                weight = state[f"{home}.conv{index}.weight"]
                added = F.conv2d(added, weight, padding=kernel // 2, stride=2 if strides else 1)
            if f"{home}.shortcut.conv.weight" in state:
                stride = 2 if stage > 1 else 1
                values = F.conv2d(values, state[f"{home}.shortcut.conv.weight"], stride=stride)
            values = values + added
    return read(state, normalized(state, "norm", values).relu())


def densenet_by_hand(state, plan, values):
    num_layers, kernels = plan
    values = F.conv2d(values, state["conv1.weight"], padding=1)
    for block in (1, 2, 3):
        for layer in range(1, num_layers + 1):
            home, made = f"block{block}.layer{layer}.branch", values
            for index, kernel in enumerate(kernels, start=1):
                made = normalized(state, f"{home}.norm{index}", made).relu()
                made = F.conv2d(made, state[f"{home}.conv{index}.weight"], padding=kernel // 2)
            values = torch.cat([values, made], 1)
        if block < 3:
            values = normalized(state, f"transition{block}.norm", values).relu()
            values = F.conv2d(values, state[f"transition{block}.conv.weight"])
            values = F.avg_pool2d(values, 2)
    return read(state, normalized(state, "norm", values).relu())


VGG = [
    (models.Vgg_11, (1, 1, 2, 2, 2)),
    (models.Vgg_13, (2, 2, 2, 2, 2)),
    (models.Vgg_16, (2, 2, 3, 3, 3)),
    (models.Vgg_19, (2, 2, 4, 4, 4)),
]
PRERESNET = [(models.Preresnet_110, (3, 3)), (models.Preresnet_164, (1, 3, 1))]
DENSENET = [(models.Densenet_40, (12, (3,))), (models.Densenet_BC_100, (16, (1, 3)))]
RESNET = [(models.Resnet_20, 3), (models.Resnet_56, 9), (models.Resnet_110, 18)]


@pytest.mark.parametrize("input_shape", [CIFAR, (1, 16, 21)])
@pytest.mark.parametrize(
    ("member", "plan", "by_hand"),
    [(*row, vgg_by_hand) for row in VGG]
    + [(*row, resnet_by_hand) for row in RESNET]
    + [(*row, preresnet_by_hand) for row in PRERESNET]
    + [(*row, densenet_by_hand) for row in DENSENET],
)
def test_it_computes_what_its_formula_says(member, plan, by_hand, input_shape):
    module = unlike_a_fresh_one(member(width=0.125).build(input_shape, 4))
    found, values = module(inputs(input_shape)), inputs(input_shape)
    torch.testing.assert_close(found, by_hand(module.state_dict(), plan, values))


@pytest.mark.parametrize(("member", "lengths"), VGG)
def test_vgg_is_built_as_the_paper_says(member, lengths):
    with torch.device("meta"):
        parts = list(member().build(CIFAR, 10))
    expected = []
    for stage, length in enumerate(lengths):
        expected += [nn.MaxPool2d] * (stage > 0)
        expected += [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * length
    assert list(map(type, parts)) == [*expected, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    convs = [part for part in parts if isinstance(part, nn.Conv2d)]
    sizes = zip(lengths, (64, 128, 256, 512, 512), strict=True)
    assert [part.out_channels for part in convs] == [
        size for length, size in sizes for _ in range(length)
    ]


@pytest.mark.parametrize(("member", "length"), RESNET)
def test_a_residual_network_has_as_many_layers_as_its_name_says(member, length):
    with torch.device("meta"):
        module = member().build(CIFAR, 10)
    convs = {
        name: part.out_channels
        for name, part in module.named_modules()
        if isinstance(part, nn.Conv2d) and "shortcut" not in name
    }
    assert len(convs) + 1 == 6 * length + 2 == int(member.__name__.removeprefix("Resnet_"))
    assert list(convs.values()) == [16] + [size for size in (16, 32, 64) for _ in range(2 * length)]


@pytest.mark.parametrize(("member", "length"), RESNET)
def test_only_the_two_changes_of_stage_have_weights_in_their_shortcut(member, length):
    with torch.device("meta"):
        module = member().build(CIFAR, 10)
    found = kinds(module, CIFAR)
    names = [name for name in found if "shortcut" in name]
    shortcuts = {name: tuple(module.get_parameter(name).shape) for name in names}
    assert shortcuts == {
        "stage2.block1.shortcut.conv.weight": (32, 16, 1, 1),
        "stage3.block1.shortcut.conv.weight": (64, 32, 1, 1),
    }
    assert {found[name] for name in shortcuts} == {"convolution"}


@pytest.mark.parametrize("member", [models.Vgg_11, models.Resnet_20])
def test_every_convolution_is_normalized_and_has_no_bias(member):
    with torch.device("meta"):
        parts = list(member().build(CIFAR, 10).modules())
    convs = [part for part in parts if isinstance(part, nn.Conv2d)]
    norms = [part for part in parts if isinstance(part, nn.BatchNorm2d)]
    assert [part.out_channels for part in convs] == [part.num_features for part in norms]
    assert all(part.bias is None for part in convs)
    assert {(part.eps, part.momentum, part.affine) for part in norms} == {(1e-5, 0.1, True)}


def test_a_network_with_normalization_begins_with_it_as_the_identity():
    params, buffers = initialize.initial_parameters(
        lambda: models.Resnet_20(width=0.25).build(CIFAR, 10), initialize.GlorotNormal(), seed=0
    )
    for name, param in params.items():
        if "norm" in name:
            assert torch.all(param == (1 if name.endswith("weight") else 0))
    for name, buffer in buffers.items():
        assert torch.all(buffer == (1 if name.endswith("var") else 0))


def test_preactivated_networks_have_as_many_layers_as_their_names_say():
    for member, kernels in PRERESNET:
        with torch.device("meta"):
            module = member().build(CIFAR, 10)
        convs = [
            part
            for name, part in module.named_modules()
            if isinstance(part, nn.Conv2d) and "shortcut" not in name
        ]
        assert len(convs) + 1 == int(member.__name__.removeprefix("Preresnet_"))
        assert [part.kernel_size[0] for part in convs] == [3, *kernels * 54]


def test_only_changes_of_size_have_weights_in_the_shortcut_of_a_preactivated_network():
    with torch.device("meta"):
        found = {member: kinds(member().build(CIFAR, 10), CIFAR) for member, _ in PRERESNET}
    names = {m: [name for name in found[m] if "shortcut" in name] for m in found}
    later = [f"stage{stage}.block1.shortcut.conv.weight" for stage in (2, 3)]
    assert names == {
        models.Preresnet_110: later,
        models.Preresnet_164: ["stage1.block1.shortcut.conv.weight", *later],
    }


def test_densenets_grow_by_twelve_channels_a_layer():
    for member, num_convs, first, transitions in (
        (models.Densenet_40, 36, 16, [160, 304]),
        (models.Densenet_BC_100, 96, 24, [108, 150]),
    ):
        with torch.device("meta"):
            module = member().build(CIFAR, 10)
        convs = {n: p for n, p in module.named_modules() if isinstance(p, nn.Conv2d)}
        assert convs.pop("conv1").out_channels == first
        made = [convs.pop(f"transition{block}.conv").out_channels for block in (1, 2)]
        assert (len(convs), made) == (num_convs, transitions)
        last = [p for p in convs.values() if p.kernel_size == (3, 3)]
        assert {p.out_channels for p in last} == {12}
