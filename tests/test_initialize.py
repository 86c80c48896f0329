"""The family `Initialization`: its distributions, its streams, and what it leaves alone.

What looks further than a layer has its known answers in `test_initialize_networks.py`.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from windfall import initialize, seeds, spec
from windfall.initialize import (
    DataDependent,
    DeltaOrthogonal,
    Fixup,
    GlorotNormal,
    GlorotUniform,
    Initialization,
    KaimingNormal,
    KaimingUniform,
    LecunNormal,
    LecunUniform,
    Orthogonal,
    TorchDefault,
    WeightNorm,
    initial_parameters,
)
from windfall.weightnorm import WeightNormConv2d, WeightNormLinear

MEMBERS = [member() for member in spec.members(Initialization).values()]
INITIALIZED = [member for member in MEMBERS if not isinstance(member, TorchDefault)]
NORM = nn.BatchNorm2d
DRAWN = [member() for member in spec.members(initialize.Drawn).values()]


def name_of(member):
    return spec.tag(type(member))


class Residual(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)
        self.shortcut = nn.Identity()

    def forward(self, inputs):
        return self.shortcut(inputs) + self.second(self.first(inputs).relu())


def network(member, dtype=torch.float64, hidden=5):
    """One that the member is defined for."""
    is_normed, is_fixup = isinstance(member, WeightNorm), isinstance(member, Fixup)
    conv = WeightNormConv2d if is_normed else nn.Conv2d
    linear = WeightNormLinear if is_normed else nn.Linear
    return nn.Sequential(
        conv(2, 4, 3),
        nn.Identity() if is_fixup else nn.BatchNorm2d(4),
        nn.Flatten(),
        linear(16, hidden),
        Residual(hidden) if is_fixup else nn.LayerNorm(hidden),
        nn.Linear(hidden, 3, bias=isinstance(member, DataDependent)),
    ).to(dtype)


def random_weights(member):
    """The names of the network's weights that differ from seed to seed."""
    last = "4.first.weight" if isinstance(member, Fixup) else "5.weight"
    return "0.weight", "3.weight", last


def batch():
    return torch.from_numpy(seeds.stream(0, "batch").standard_normal((8, 2, 4, 4)))


def begun(member, seed=0, stream="init", **how):
    return initial_parameters(lambda: network(member, **how), member, seed, stream, batch)


def weight_of(layer, member, seed=0):
    return initial_parameters(lambda: layer, member, seed)[0]["weight"]


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
class TestEveryMember:
    def test_the_same_seed_and_stream_give_the_same_parameters(self, member):
        first, _ = begun(member, 3)
        again, _ = begun(member, 3)
        assert list(first) == [name for name, _ in network(member).named_parameters()]
        assert all(torch.equal(first[name], again[name]) for name in first)

    @pytest.mark.parametrize("other", [{"seed": 4}, {"seed": 3, "stream": "reinit"}])
    def test_another_seed_or_stream_gives_other_weights(self, member, other):
        first, _ = begun(member, 3)
        second, _ = begun(member, **other)
        for name in random_weights(member):
            assert not torch.equal(first[name], second[name])

    def test_what_is_no_layer_begins_as_constructed(self, member):
        params, buffers = begun(member)
        module = network(member)
        for name, param in module.named_parameters():
            if isinstance(module.get_submodule(name.rpartition(".")[0]), nn.LayerNorm | NORM):
                assert torch.equal(params[name], param)
        assert list(buffers) == [name for name, _ in module.named_buffers()]
        for name, buffer in module.named_buffers():
            assert torch.equal(buffers[name], buffer)

    def test_parameters_and_buffers_are_detached_and_share_no_storage(self, member):
        module = network(member)
        params, buffers = initial_parameters(lambda: module, member, 0, inputs=batch)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        for value in (*params.values(), *buffers.values()):
            assert not value.requires_grad
            value.add_(1)
        after = module.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_global_generators_are_left_as_they_were(self, member):
        before = torch.get_rng_state()
        begun(member)
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_weights_are_finite_and_of_the_networks_dtype(self, member):
        params, _ = begun(member, dtype=torch.float32)
        for param in params.values():
            assert param.dtype == torch.float32
            assert param.isfinite().all()


@pytest.mark.parametrize("member", INITIALIZED, ids=name_of)
class TestEveryMemberThatInitializes:
    def test_biases_of_layers_are_zero(self, member):
        params, _ = begun(member)
        if not isinstance(member, DataDependent):
            assert (params["0.bias"] == 0).all()
            assert (params["3.bias"] == 0).all()

    def test_float32_begins_as_float64_rounded(self, member):
        wide, _ = begun(member, 1)
        narrow, _ = begun(member, 1, dtype=torch.float32)
        for name in wide:
            assert torch.equal(wide[name].float(), narrow[name])

    def test_a_layers_draws_do_not_depend_on_another_layers_shape(self, member):
        first, _ = begun(member, hidden=5)
        second, _ = begun(member, hidden=9)
        assert torch.equal(first["0.weight"], second["0.weight"])
        assert first["3.weight"].shape != second["3.weight"].shape

    def test_it_does_not_depend_on_the_number_of_threads(self, member):
        num_threads = torch.get_num_threads()
        try:
            found = []
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(begun(member, hidden=200)[0])
                assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(num_threads)
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("member", DRAWN, ids=name_of)
class TestEveryMemberThatDraws:
    def test_two_layers_of_one_shape_get_different_draws(self, member):
        params, _ = initial_parameters(
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), member, 0
        )
        assert not torch.equal(params["0.weight"], params["1.weight"])

    def test_the_mean_is_zero(self, member):
        weight = weight_of(nn.Linear(600, 400), member)  # 240,000 draws
        assert abs(float(weight.mean())) < 5 * float(weight.std()) / math.sqrt(weight.numel())

    def test_a_weight_normalized_layer_has_the_weight_of_one_without(self, member):
        plain, normed = nn.Linear(30, 20).double(), WeightNormLinear(30, 20).double()
        params, _ = initial_parameters(lambda: normed, member, 0)
        assert torch.equal(params["weight"], weight_of(plain, member))
        norms = params["weight"].norm(dim=1)
        torch.testing.assert_close(params["gain"], norms, rtol=1e-12, atol=0)


FIRST_DRAWS = {
    "glorot-normal": [
        -0.3678475642476034,
        -0.08702119801096841,
        -0.2007362954087972,
        -0.7390309972694318,
    ],
    "kaiming-normal": [
        -0.4748891634246436,
        -0.11234388355449955,
        -0.25914944303254794,
        -0.9540849149185228,
    ],
    "kaiming-uniform": [
        0.8973114791428485,
        1.1288675338360885,
        0.1498084273345912,
        -0.15714931053293157,
    ],
    "glorot-uniform": [
        0.6950544830161991,
        0.8744170317242816,
        0.11604110883767915,
        -0.12172733251240442,
    ],
    "lecun-normal": [
        -0.33579734776957204,
        -0.07943912188621848,
        -0.18324632850903155,
        -0.6746399131666776,
    ],
    "lecun-uniform": [
        0.6344950317384395,
        0.7982298882368326,
        0.10593055484718161,
        -0.11112134313662647,
    ],
    "orthogonal": [
        -0.8594672954636933,
        -0.20332300923475483,
        -0.46901569477369165,
        -0.38029781403657115,
    ],
    "delta-orthogonal": [
        -0.8594672954636933,
        -0.20332300923475483,
        -0.46901569477369165,
        -0.38029781403657115,
    ],
}


@pytest.mark.parametrize("member", DRAWN, ids=name_of)
def test_the_first_draws_of_seed_0_are_pinned(member):
    weight = weight_of(nn.Linear(3, 2, dtype=torch.float64), member)
    assert weight.flatten()[:4].tolist() == pytest.approx(
        FIRST_DRAWS[name_of(member)], rel=1e-12, abs=0
    )


# Relative error of a standard deviation estimated from n Gaussian draws: 1/sqrt(2n). With
# n = 240,000 that is 0.0014; the bound is five of them. Uniform draws vary less.
@pytest.mark.parametrize(
    ("member", "layer", "expected"),
    [
        (GlorotNormal(), nn.Linear(600, 400), math.sqrt(2 / 1000)),
        (KaimingNormal(), nn.Linear(600, 400), math.sqrt(2 / 600)),
        (KaimingUniform(), nn.Linear(600, 400), math.sqrt(2 / 600)),
        (GlorotUniform(), nn.Linear(600, 400), math.sqrt(2 / 1000)),
        (LecunNormal(), nn.Linear(600, 400), math.sqrt(1 / 600)),
        (LecunUniform(), nn.Linear(600, 400), math.sqrt(1 / 600)),
        (GlorotNormal(), nn.Conv2d(100, 96, 5), math.sqrt(2 / (2500 + 2400))),
        (KaimingNormal(), nn.Conv2d(100, 96, 5), math.sqrt(2 / 2500)),
        (KaimingUniform(), nn.Conv2d(100, 96, 5), math.sqrt(2 / 2500)),
        (GlorotUniform(), nn.Conv2d(100, 96, 5), math.sqrt(2 / (2500 + 2400))),
        (LecunNormal(), nn.Conv2d(100, 96, 5), math.sqrt(1 / 2500)),
        (LecunUniform(), nn.Conv2d(100, 96, 5), math.sqrt(1 / 2500)),
        (Orthogonal(), nn.Linear(600, 400), math.sqrt(1 / 600)),
    ],
)
def test_the_standard_deviation_is_that_of_the_formula(member, layer, expected):
    weight = weight_of(layer, member)
    assert weight.numel() == 240_000
    assert float(weight.double().std()) == pytest.approx(expected, rel=0.007)


@pytest.mark.parametrize("member", [GlorotNormal(), KaimingNormal(), LecunNormal()], ids=name_of)
def test_gaussian_weights_are_not_truncated(member):
    weight = weight_of(nn.Linear(600, 400), member).double()
    sigmas = (weight / weight.std()).abs()
    # P(|z| > 2) = 0.0455; its estimate from 240,000 draws has standard deviation 0.0004.
    assert float((sigmas > 2).double().mean()) == pytest.approx(0.0455, abs=0.002)
    assert float((sigmas**4).mean()) == pytest.approx(3, abs=0.05)
    assert float(sigmas.max()) > 4


@pytest.mark.parametrize(
    ("member", "bound"),
    [
        (KaimingUniform(), math.sqrt(6 / 600)),
        (GlorotUniform(), math.sqrt(6 / 1000)),
        (LecunUniform(), math.sqrt(3 / 600)),
    ],
    ids=["kaiming", "glorot", "lecun"],
)
def test_uniform_weights_fill_their_interval_and_do_not_leave_it(member, bound):
    weight = weight_of(nn.Linear(600, 400).double(), member)
    assert 0.999 * bound < float(weight.abs().max()) <= bound


def test_glorot_is_kaiming_where_a_layer_is_square():
    layer = nn.Linear(7, 7, dtype=torch.float64)
    ratio = weight_of(layer, KaimingNormal()) / weight_of(layer, GlorotNormal())
    torch.testing.assert_close(ratio, torch.full((7, 7), math.sqrt(2), dtype=torch.float64))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(5, 3), (5, 3)),
        (nn.Conv1d(2, 4, 3), (6, 12)),
        (nn.Conv2d(2, 4, (3, 5)), (30, 60)),
        (nn.Conv3d(1, 2, 2), (8, 16)),
        (nn.Conv2d(6, 12, 3, groups=3), (18, 36)),
        (nn.Conv2d(8, 8, 3, groups=8), (9, 9)),
        (nn.ConvTranspose2d(2, 4, 3), (18, 36)),
        (nn.ConvTranspose2d(6, 12, 3, groups=3), (18, 36)),
    ],
)
def test_fans_count_the_inputs_read_and_the_outputs_reached(layer, expected):
    assert initialize.fans(layer) == expected


@pytest.mark.parametrize(
    ("layer", "num_rows"),
    [(nn.Linear(9, 4), 4), (nn.Linear(4, 4), 4), (nn.Conv2d(3, 5, 3), 5), (nn.Conv1d(2, 3, 2), 3)],
)
def test_wide_orthogonal_weights_have_orthonormal_rows(layer, num_rows):
    weight = weight_of(layer.double(), Orthogonal()).flatten(1)
    torch.testing.assert_close(weight @ weight.T, torch.eye(num_rows, dtype=torch.float64))


def test_tall_orthogonal_weights_have_orthonormal_columns():
    weight = weight_of(nn.Linear(4, 9, dtype=torch.float64), Orthogonal())
    torch.testing.assert_close(weight.T @ weight, torch.eye(4, dtype=torch.float64))


def test_orthogonal_weights_are_uniform_among_the_orthonormal():
    layer = nn.Linear(3, 3, dtype=torch.float64)
    drawn = torch.stack([weight_of(layer, Orthogonal(), seed) for seed in range(400)])
    # Every entry of a uniform 3 x 3 rotation or reflection is uniform on [-1, 1].
    assert drawn.mean(0).abs().max() < 5 * math.sqrt(1 / 3 / 400)
    torch.testing.assert_close(
        drawn.square().mean(0),
        torch.full((3, 3), 1 / 3, dtype=torch.float64),
        atol=5 * math.sqrt(4 / 45 / 400),
        rtol=0,
    )
    assert 150 < int((torch.linalg.det(drawn) > 0).sum()) < 250


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 5, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(3, 8, (1, 5), padding=(0, 2)),
        nn.Conv2d(6, 12, 3, padding=1, groups=3),
        nn.Conv3d(1, 2, 3, padding=1),
    ],
    ids=str,
)
def test_a_delta_orthogonal_convolution_keeps_the_norm_of_every_image(layer):
    layer = layer.double()
    weight = weight_of(layer, DeltaOrthogonal())
    inputs = torch.from_numpy(
        seeds.stream(1, "images").standard_normal(
            (4, layer.in_channels, *(6,) * (weight.dim() - 2))
        )
    )
    made = torch.func.functional_call(layer, {"weight": weight, "bias": 0 * layer.bias}, (inputs,))
    torch.testing.assert_close(made.flatten(1).norm(dim=1), inputs.flatten(1).norm(dim=1))


def test_a_delta_orthogonal_weight_is_zero_beside_the_middle():
    weight = weight_of(nn.Conv2d(3, 5, 3).double(), DeltaOrthogonal())
    middle = weight[:, :, 1, 1]
    torch.testing.assert_close(middle.T @ middle, torch.eye(3, dtype=torch.float64))
    assert int(weight.count_nonzero()) == int(middle.count_nonzero()) == 15


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(5, 3, 3), nn.Conv2d(3, 5, 2), nn.ConvTranspose2d(3, 5, 3)], ids=str
)
def test_delta_orthogonal_weights_of_other_convolutions_are_refused(layer):
    with pytest.raises(
        spec.SpecError,
        match=r"^`initialization` delta-orthogonal must be given .*; got Conv.* Use orthogonal\.$",
    ):
        weight_of(layer, DeltaOrthogonal())


def test_torch_default_is_the_constructor_at_the_beginning_of_its_stream():
    params, _ = begun(TorchDefault(), 5, "reinit")
    with seeds.isolated(5, "reinit"):
        expected = dict(network(TorchDefault()).named_parameters())
    assert all(torch.equal(params[name], expected[name]) for name in expected)


class TestLayers:
    def test_norms_embeddings_and_biases_are_not_among_them(self):
        module = nn.Sequential(
            nn.Embedding(5, 4), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ConvTranspose1d(3, 2, 2)
        )
        assert [name for name, _ in initialize.layers(module)] == ["1.weight", "3.weight"]

    def test_a_bare_layer_is_named_weight(self):
        assert [name for name, _ in initialize.layers(nn.Linear(2, 2))] == ["weight"]

    def test_a_weight_shared_by_layers_is_named_once(self):
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        module = nn.Sequential(first, second)
        assert [name for name, _ in initialize.layers(module)] == ["0.weight"]

    @pytest.mark.parametrize("embedding_first", [True, False])
    def test_a_weight_shared_with_an_embedding_is_not_among_them(self, embedding_first):
        embedding, decoder = nn.Embedding(5, 4), nn.Linear(4, 5)
        decoder.weight = embedding.weight
        pair = [embedding, decoder] if embedding_first else [decoder, embedding]
        assert list(initialize.layers(nn.Sequential(*pair))) == []

    def test_a_computed_weight_is_not_among_them(self):
        module = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
        assert [name for name, _ in initialize.layers(module)] == ["1.weight"]
