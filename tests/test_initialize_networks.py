"""Initializations that look further than a layer: at blocks, at widths, at data."""

import itertools
import math

import pytest
import torch
from torch import nn

from windfall import initialize, models, seeds
from windfall.initialize import (
    DataDependent,
    Fixup,
    KaimingNormal,
    LecunNormal,
    Lsuv,
    Orthogonal,
    StageScaled,
    WeightNorm,
    initial_parameters,
)
from windfall.spec import SpecError
from windfall.weightnorm import WeightNormConv2d, WeightNormLinear, effective

CIFAR = (3, 32, 32)


def normals(*shape):
    return torch.from_numpy(seeds.stream(1, "normals").standard_normal(shape))


def begun(build, scheme, seed=0, inputs=None):
    """The network in float64, initialized."""
    given = None if inputs is None else lambda: inputs
    params, buffers = initial_parameters(lambda: build().double(), scheme, seed, inputs=given)
    module = build().double()
    module.load_state_dict(params | buffers)
    return module.requires_grad_(False)


class Block(nn.Module):
    def __init__(self, size, linear):
        super().__init__()
        self.first, self.second = linear(size, size), linear(size, size)
        self.shortcut = nn.Identity()

    def forward(self, inputs):
        return self.shortcut(inputs) + self.second(self.first(inputs).relu())


def residual(num_blocks, size=200, linear=WeightNormLinear):
    return lambda: nn.Sequential(*[Block(size, linear) for _ in range(num_blocks)])


def mlp(*widths, linear=WeightNormLinear):
    def build():
        parts = []
        for given, made in itertools.pairwise(widths):
            parts += [linear(given, made), nn.ReLU()]
        return nn.Sequential(*parts)

    return build


def growth(module, inputs):
    """The mean of |outputs| / |inputs|."""
    with torch.no_grad():
        return float((module(inputs).norm(dim=1) / inputs.norm(dim=1)).mean())


def outputs(module, inputs):
    """What each layer makes, by its weight's name, in the order they run, in training mode."""
    names = {id(layer.weight): name for name, layer in initialize.layers(module)}
    found = {}

    def ran(part, _, made):
        found[names[id(part.weight)]] = made

    for part in module.modules():
        if isinstance(part, initialize.Layer):
            part.register_forward_hook(ran)
    with torch.no_grad():
        module.train()(inputs)
    return found


# -- blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "sizes", "num_layers"),
    [
        (models.Resnet_20(), [3, 3, 3], 2),
        (models.Resnet_56(), [9, 9, 9], 2),
        (models.Preresnet_164(), [18, 18, 18], 3),
        (models.Vgg_11(), [], 0),
    ],
    ids=["resnet-20", "resnet-56", "preresnet-164", "vgg-11"],
)
def test_the_blocks_of_the_zoo_are_found_with_their_stages(model, sizes, num_layers):
    with torch.device("meta"):
        found = initialize.blocks(model.build(CIFAR, 10))
    assert [block.num_blocks for block in found] == [size for size in sizes for _ in range(size)]
    assert {len(block.branch) for block in found} <= {num_layers}


def test_a_blocks_branch_is_all_but_its_shortcut():
    found = initialize.blocks(models.Resnet_20(width=0.25).build(CIFAR, 10))
    assert found[3] == initialize.Block(
        ("stage2.block1.conv1.weight", "stage2.block1.conv2.weight"),
        ("stage2.block1.shortcut.conv.weight",),
        3,
    )


def test_a_stage_of_a_flat_network_begins_with_a_shortcut_that_has_layers():
    flat = residual(5, 4, nn.Linear)()
    for index in (0, 2):
        flat[index].shortcut = nn.Linear(4, 4)
    assert [block.num_blocks for block in initialize.blocks(flat)] == [2, 2, 3, 3, 3]


def test_torchvisions_blocks_are_found_by_their_downsample():
    class Basic(Block):
        def __init__(self, size):
            super().__init__(size, nn.Linear)
            del self.shortcut
            self.downsample = None

    found = initialize.blocks(nn.Sequential(Basic(3), Basic(3)))
    assert [block.branch for block in found] == [
        ("0.first.weight", "0.second.weight"),
        ("1.first.weight", "1.second.weight"),
    ]


# -- fixup -----------------------------------------------------------------------------------------


def test_fixup_scales_branches_and_begins_with_every_block_as_its_shortcut():
    build = lambda: nn.Sequential(nn.Linear(3, 4), *residual(16, 4, nn.Linear)(), nn.Linear(4, 2))  # noqa: E731
    module, drawn = begun(build, Fixup()), begun(build, KaimingNormal())
    assert torch.equal(module[0].weight, drawn[0].weight)
    for index in range(1, 17):
        # L = 16 branches of m = 2 layers: 16^(-1/2)
        torch.testing.assert_close(module[index].first.weight, drawn[index].first.weight / 4)
        assert not module[index].second.weight.any()
    assert not module[17].weight.any()
    inputs = normals(5, 3)
    assert torch.equal(module[:-1](inputs), module[0](inputs))


def test_fixup_of_branches_of_three_layers_takes_the_fourth_root():
    build = lambda: models.Preresnet_164(width=0.25, norm="none").build((3, 8, 8), 10)  # noqa: E731
    scales = Fixup().scales(build())
    assert scales["stage1.block1.conv1.weight"] == pytest.approx(54 ** (-1 / 4))
    assert scales["stage3.block18.conv2.weight"] == pytest.approx(54 ** (-1 / 4))
    assert scales["stage2.block4.conv3.weight"] == scales["output.weight"] == 0
    assert scales["stage2.block1.shortcut.conv.weight"] == scales["conv1.weight"] == 1


def test_fixup_of_a_weight_normalized_network_is_0_by_its_gains():
    module = begun(lambda: models.Resnet_20(width=0.25, norm="weight").build(CIFAR, 10), Fixup())
    last = module.stage1.block2.conv2
    assert not last.gain.any()
    assert last.weight.any()
    block = module.stage1.block2
    inputs = normals(2, 4, 8, 8)
    assert torch.equal(block(inputs), inputs)


@pytest.mark.slow
def test_fixup_gives_a_deep_network_an_update_of_a_shallow_ones_size():
    changes = []
    for model in (models.Resnet_20, models.Resnet_110):
        spec = model(norm="none", gates=True)
        module = begun(lambda spec=spec: spec.build(CIFAR, 10), Fixup()).requires_grad_()
        inputs, labels = normals(16, *CIFAR), torch.arange(16) % 10
        for _ in range(3):
            nn.functional.cross_entropy(module(inputs), labels).backward()
            with torch.no_grad():
                for param in module.parameters():
                    param.add_(param.grad, alpha=-0.1)
                    param.grad = None
        changes.append(float(module(inputs).detach().norm()))
    assert 0.3 < changes[1] / changes[0] < 3


# -- stages and weight normalization ---------------------------------------------------------------


# A norm of 200 Gaussian coordinates is within 5 % of its mean; of 500 of them, well within.
@pytest.mark.parametrize("num_blocks", [1, 2, 5, 10, 40, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("scheme", "linear"), [(WeightNorm(), WeightNormLinear), (StageScaled(), nn.Linear)]
)
def test_a_residual_stage_of_b_blocks_grows_as_the_formula(num_blocks, scheme, linear):
    module = begun(residual(num_blocks, linear=linear), scheme)
    expected = (1 + 1 / num_blocks) ** (num_blocks / 2)
    tolerance = 0.05 if isinstance(scheme, WeightNorm) else 0.15  # Gaussian weights vary more
    assert growth(module, normals(500, 200)) == pytest.approx(expected, rel=tolerance)


def test_a_residual_stage_of_gains_of_1_explodes():
    module = begun(residual(40), WeightNorm(preserve="one"))
    assert growth(module, normals(500, 200)) == pytest.approx(1.5**20, rel=0.15)


@pytest.mark.slow
def test_twenty_layers_of_gain_1_lose_the_signal_and_the_proposed_gains_keep_it():
    build, inputs = mlp(*[1000] * 21), normals(200, 1000)
    lost = growth(begun(build, WeightNorm(preserve="one")), inputs)
    assert lost == pytest.approx(2**-10, rel=0.2)
    assert lost == pytest.approx(1e-3, rel=0.2)
    assert growth(begun(build, WeightNorm()), inputs) == pytest.approx(1, abs=0.15)


def test_forward_gains_keep_activations_where_widths_differ_and_backward_gains_gradients():
    build, inputs = mlp(800, 200, 800, 200, 800), normals(300, 800)
    kept = {which: begun(build, WeightNorm(preserve=which)) for which in ("forward", "backward")}
    assert growth(kept["forward"][:2], inputs) == pytest.approx(1, abs=0.1)
    assert growth(kept["backward"][:2], inputs) == pytest.approx(math.sqrt(200 / 800), rel=0.1)
    gains = {which: float(module[0].gain[0]) for which, module in kept.items()}
    assert gains == pytest.approx({"forward": math.sqrt(2 * 800 / 200), "backward": math.sqrt(2)})
    for which, expected in (("forward", math.sqrt(800 / 200)), ("backward", 1)):
        module, given = kept[which][:2], inputs.clone().requires_grad_()
        error = normals(300, 200)
        (slope,) = torch.autograd.grad(module(given), given, error)
        ratio = float((slope.norm(dim=1) / error.norm(dim=1)).mean())
        assert ratio == pytest.approx(expected, rel=0.1)


def test_directions_are_orthonormal_and_gains_are_the_filters_norms():
    module = begun(mlp(30, 20), WeightNorm())
    weight = module[0].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(20, dtype=torch.float64))
    wide = math.sqrt(2 * 30 / 20)
    torch.testing.assert_close(
        effective(module[0]).norm(dim=1), torch.full((20,), wide, dtype=torch.float64)
    )


def test_gains_of_convolutions_count_the_kernel():
    build = lambda: nn.Sequential(WeightNormConv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))  # noqa: E731
    params, _ = initial_parameters(build, WeightNorm(), 0)
    assert params["0.gain"].tolist() == pytest.approx([math.sqrt(2 * 27 / 72)] * 8)
    bound = 1 / math.sqrt(8)
    assert 0.5 * bound < float(params["2.weight"].abs().max()) <= bound


def test_gains_of_the_zoos_residual_networks_are_those_of_their_stages():
    build = lambda: models.Resnet_56(norm="weight").build(CIFAR, 10)  # noqa: E731
    gains = WeightNorm(preserve="backward").gains(build())
    assert gains["conv1.weight"] == 1
    assert gains["stage2.block1.shortcut.conv.weight"] == 1
    assert gains["stage2.block1.conv1.weight"] == pytest.approx(math.sqrt(2))
    assert gains["stage2.block1.conv2.weight"] == pytest.approx(math.sqrt(1 / 9))
    assert "output.weight" not in gains


@pytest.mark.slow
@pytest.mark.parametrize("model", [models.Resnet_20, models.Resnet_110])
def test_a_weight_normalized_residual_network_keeps_the_scale_of_images_at_any_depth(model):
    build = lambda: model(norm="weight").build(CIFAR, 10)  # noqa: E731
    module, inputs = begun(build, WeightNorm()), normals(8, *CIFAR)
    made = nn.Sequential(module.conv1, module.stage1)(inputs)
    first = module.conv1(inputs)
    num_blocks = len(module.stage1)
    ratio = float((made.flatten(1).norm(dim=1) / first.flatten(1).norm(dim=1)).mean())
    # 16 channels are few, and zeros around images lose a little at every convolution
    assert ratio == pytest.approx((1 + 1 / num_blocks) ** (num_blocks / 2), rel=0.15)


# -- data ------------------------------------------------------------------------------------------

NETWORKS = [
    (mlp(30, 50, 20, 10, linear=nn.Linear), (30,)),
    (mlp(30, 50, 20, 10), (30,)),
    (lambda: models.Conv_4(width=0.1).build(CIFAR, 10), CIFAR),
    (lambda: models.Vgg_11(width=0.1, norm="weight").build(CIFAR, 10), CIFAR),
    (lambda: models.Resnet_20(width=0.25, norm="weight").build(CIFAR, 10), CIFAR),
    (lambda: models.Preresnet_110(width=0.25, norm="none").build(CIFAR, 10), CIFAR),
    (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, groups=2),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, groups=2),
            nn.Flatten(),
            nn.Linear(8 * 36, 5),
        ),
        (4, 6, 6),
    ),
]
NAMES = ["plain", "mlp", "conv-4", "vgg-11", "resnet-20", "preresnet-110", "transposed"]


@pytest.mark.parametrize(("build", "shape"), NETWORKS, ids=NAMES)
def test_lsuv_gives_every_layer_a_variance_of_1(build, shape):
    inputs = 3 * normals(32, *shape) + 1
    module = begun(build, Lsuv(), inputs=inputs)
    found = outputs(module, inputs)
    assert set(found) == {name for name, _ in initialize.layers(module)}
    for made in found.values():
        assert float(made.var(correction=0)) == pytest.approx(1, rel=1e-9)


def test_lsuv_scales_orthonormal_weights_alone():
    build, inputs = mlp(30, 20, linear=nn.Linear), 5 * normals(64, 30)
    scaled, drawn = begun(build, Lsuv(), inputs=inputs), begun(build, Orthogonal())
    ratio = scaled[0].weight / drawn[0].weight
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
    assert float(ratio[0, 0]) == pytest.approx(1 / 5, rel=0.1)


def test_lsuv_gives_a_network_with_batch_normalization_unit_variances_as_it_trains():
    inputs = normals(16, *CIFAR)
    module = begun(lambda: models.Resnet_20(width=0.25).build(CIFAR, 10), Lsuv(), inputs=inputs)
    for made in outputs(module, inputs).values():
        assert float(made.var(correction=0)) == pytest.approx(1, rel=1e-9)
    assert int(initial_parameters(
        lambda: models.Resnet_20(width=0.25).build(CIFAR, 10), Lsuv(), 0, inputs=lambda: inputs
    )[1]["norm1.num_batches_tracked"]) == 0  # fmt: skip


@pytest.mark.parametrize(("build", "shape"), NETWORKS, ids=NAMES)
def test_a_data_dependent_network_has_units_of_mean_0_and_variance_1(build, shape):
    inputs = 3 * normals(32, *shape) + 1
    module = begun(build, DataDependent(), inputs=inputs)
    for made in outputs(module, inputs).values():
        units = made.movedim(1, 0).flatten(1)
        torch.testing.assert_close(units.mean(1), torch.zeros(len(units), dtype=torch.float64))
        torch.testing.assert_close(
            units.var(1, correction=0), torch.ones(len(units), dtype=torch.float64)
        )


def test_a_data_dependent_layer_is_as_by_hand():
    inputs = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    layer = begun(lambda: WeightNormLinear(2, 1), DataDependent(), inputs=inputs)
    direction = layer.weight[0, 0] / layer.weight.norm()  # t = v x / |v| is it, or three times it
    assert float(layer.gain) == pytest.approx(float(1 / direction.abs()))  # g = 1 / sigma[t]
    assert float(layer.bias) == pytest.approx(float(-2 * direction / direction.abs()))


def test_the_scale_of_a_data_dependent_networks_draws_cancels():
    build, inputs = mlp(6, 5, 4, linear=nn.Linear), normals(20, 6)
    one, other = (
        begun(build, DataDependent(draws=draws), inputs=inputs)
        for draws in (KaimingNormal(), LecunNormal())
    )
    for name, param in one.named_parameters():
        torch.testing.assert_close(param, other.get_parameter(name))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.layer(self.layer(inputs).relu())


def test_a_layer_that_runs_twice_is_adjusted_the_first_time():
    inputs = normals(10, 4)
    module = begun(Twice, Lsuv(), inputs=inputs)
    assert float(module.layer(inputs).var(correction=0)) == pytest.approx(1)


def test_the_batch_is_made_for_schemes_that_look_at_it_alone():
    initial_parameters(mlp(3, 2), KaimingNormal(), 0, inputs=lambda: pytest.fail("made"))
    with pytest.raises(pytest.fail.Exception, match="made"):
        initial_parameters(mlp(3, 2), Lsuv(), 0, inputs=lambda: pytest.fail("made"))


# -- refusals --------------------------------------------------------------------------------------


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.used(inputs)


@pytest.mark.parametrize(
    ("build", "scheme", "shape", "message"),
    [
        (mlp(4, 3), Fixup(), None, r"fixup must be given a network with residual blocks; got none"),
        (
            lambda: models.Resnet_20(width=0.25).build(CIFAR, 10),
            Fixup(),
            None,
            r"fixup must be given a network without normalization; got `norm1`, a BatchNorm2d",
        ),
        (
            mlp(4, 3, linear=nn.Linear),
            WeightNorm(),
            None,
            r"weight-norm must be given a network with weight-normalized layers; got none in",
        ),
        (mlp(4, 3), Lsuv(), None, r"lsuv must be given a batch of inputs, and there is none here"),
        (
            lambda: nn.Linear(4, 3, bias=False),
            DataDependent(),
            (5, 4),
            r"data-dependent must be given layers with biases; got `weight`, of a Linear without",
        ),
        (mlp(4, 3), Lsuv(), (5, 7), r"lsuv must be given a network that runs on its inputs"),
        (Unused, Lsuv(), (5, 4), r"layers all run as modules on its inputs; `unused.weight` does"),
        (mlp(4, 3), DataDependent(), (1, 4), r"every layer's outputs vary; those of `0.weight`"),
    ],
)
def test_networks_that_a_scheme_is_not_defined_for_are_refused(build, scheme, shape, message):
    inputs = None if shape is None else (lambda: normals(*shape))
    with pytest.raises(SpecError, match=rf"^`initialization` .*{message}"):
        initial_parameters(build, scheme, 0, inputs=inputs)
