"""Criteria for channels and what makes up for lost ones, each against its brute-force twin."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from windfall import adjust, models, reconstruction, seeds, spec, structure, tracing
from windfall.criteria import Criterion, Evidence
from windfall.filters import FeatureReconstruction, FilterNorm, NormalizationScale, Thinet
from windfall.spec import SpecError

SHAPE = (3, 7, 7)
MEMBERS = [m for m in spec.members(Criterion).values() if m.prunes == "channels"]


class Small(nn.Module):
    """A sum of two convolutions, strides, padding, a flattened head; normalized throughout."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.norm_b = nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5)
        self.c, self.norm_c = nn.Conv2d(5, 5, 3, padding="same"), nn.BatchNorm2d(5)
        self.d, self.norm_d = nn.Conv2d(5, 3, (1, 2), dilation=2), nn.BatchNorm2d(3)
        self.hidden, self.norm = nn.Linear(24, 6), nn.BatchNorm1d(6)
        self.output = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))))
        x = F.relu(x + self.norm_c(self.c(x)))
        x = F.relu(self.norm_d(self.d(x)))
        return self.output(F.relu(self.norm(self.hidden(x.flatten(1)))))


def network():
    with seeds.isolated(0, "test"):
        made = Small().double().eval()
        for tensor in [*made.parameters(), *made.buffers()]:
            if tensor.dim() == 1:
                tensor.data.uniform_(0.5, 1.5)
    return made


def inputs(num):
    with seeds.isolated(2, "test"):
        return torch.randn(num, *SHAPE, dtype=torch.float64)


def evidence(seed=0, level=1):
    made = network()
    params = {name: param.detach() for name, param in made.named_parameters()}
    groups = {group.name: group for group in tracing.trace(made, SHAPE)}
    return Evidence(params, params, seed, level, groups, network, inputs)


NAMES = ["a.weight", "b.weight", "d.weight", "hidden.weight"]


def test_the_small_network_has_the_groups_that_are_tested():
    groups = evidence().groups
    assert list(groups) == NAMES
    assert list(groups["b.weight"].makers) == ["b.weight", "c.weight"]
    assert groups["b.weight"].scales == ("norm_b.weight", "norm_c.weight")


@pytest.mark.parametrize("member", MEMBERS, ids=spec.tag)
class TestEveryCriterionForChannels:
    def test_it_gives_each_channel_a_finite_number(self, member):
        seen = evidence()
        scores = member().score(seen, NAMES)
        assert {name: len(score) for name, score in scores.items()} == {
            name: seen.groups[name].size for name in NAMES
        }
        assert all(bool(score.isfinite().all()) for score in scores.values())

    def test_a_group_has_the_same_scores_alone(self, member):
        everything, alone = (member().score(evidence(), n) for n in (NAMES, ["d.weight"]))
        assert torch.equal(everything["d.weight"], alone["d.weight"])

    def test_it_survives_being_stored(self, member):
        assert spec.decode(Criterion, member().to_json()) == member()

    def test_a_channel_of_zeros_is_the_first_to_go(self, member):
        seen = evidence()
        silent = network()
        with torch.no_grad():
            silent.a.weight[2], silent.a.bias[2] = 0, 0
            silent.norm_a.weight[2], silent.norm_a.bias[2] = 0, 0
        params = dict(silent.named_parameters())
        seen = Evidence(params, params, 0, 1, seen.groups, lambda: silent, inputs)
        scores = member().score(seen, ["a.weight"])["a.weight"]
        assert int(scores.argmin()) == 2


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
def test_a_filters_norm_is_that_of_all_its_weights_in_all_layers_that_make_it(order):
    made = network()
    found = FilterNorm(order=order).score(evidence(), NAMES)
    for channel in range(5):
        filters = torch.cat([layer.weight[channel].flatten() for layer in (made.b, made.c)])
        norm = sum(abs(v) ** order for v in filters.tolist()) ** (1 / order)
        assert float(found["b.weight"][channel]) == pytest.approx(norm, rel=1e-12)
    for channel in range(6):
        norm = sum(abs(v) ** order for v in made.hidden.weight[channel].tolist()) ** (1 / order)
        assert float(found["hidden.weight"][channel]) == pytest.approx(norm, rel=1e-12)


def test_a_scale_is_the_mean_of_those_of_all_normalizations():
    made, found = network(), NormalizationScale().score(evidence(), NAMES)
    expected = (made.norm_b.weight.abs() + made.norm_c.weight.abs()) / 2
    torch.testing.assert_close(found["b.weight"], expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        found["d.weight"], made.norm_d.weight.abs().detach(), rtol=1e-12, atol=0
    )


def test_a_network_without_normalization_has_no_scales():
    bare = models.Conv_2(width=0.1).build((3, 8, 8), 4)
    groups = tracing.trace(bare, (3, 8, 8))
    with pytest.raises(SpecError, match=r"normalization-scale must .* those of `conv1\.weight`"):
        NormalizationScale().refuse(bare, groups)
    NormalizationScale().refuse(network(), evidence().groups.values())


# -- contributions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b.weight", "c.weight", "d.weight", "hidden.weight"])
def test_the_patches_of_a_layer_times_its_weights_are_its_outputs(name):
    made = network()
    layer = made.get_submodule(name.removesuffix(".weight"))
    given = reconstruction.inputs_of(made, [name], inputs(3))[name]
    outputs = layer(given) if isinstance(layer, nn.Linear) else layer(given).movedim(1, 3)
    stream = seeds.stream(0, "test")
    places = reconstruction.sampled_places(layer, given, stream, 200)
    read = reconstruction.patches(layer, given, places)
    if isinstance(layer, nn.Linear):
        expected = outputs[places.images]
    else:
        expected = outputs[places.images, places.rows, places.columns]
        assert int(places.rows.max()) == outputs.shape[1] - 1
        assert int(places.columns.max()) == outputs.shape[2] - 1
    found = read.flatten(1) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(found, expected)


def test_contributions_are_what_outputs_lose_without_the_channel():
    """Of every reader; the twin runs the network with the channel's filters and norms at 0."""
    made, seen = network(), evidence()
    group, stream = seen.groups["d.weight"], seeds.stream(0, "test")
    sampled = reconstruction.contributions(made, group, inputs(4), stream, 50)
    again = seeds.stream(0, "test")
    given = reconstruction.inputs_of(made, ["hidden.weight"], inputs(4))["hidden.weight"]
    places = reconstruction.sampled_places(made.hidden, given, again, 50)
    out = again.integers(6, size=50)
    for channel in range(3):
        less = given.clone().reshape(4, 3, 8)
        less[:, channel] = 0
        lost = made.hidden(given) - made.hidden(less.reshape(4, 24))
        expected = lost[places.images, torch.from_numpy(out)].detach().numpy()
        np.testing.assert_allclose(sampled[:, channel], expected, rtol=1e-9, atol=1e-12)


def test_the_samples_of_all_readers_count():
    group = evidence().groups["b.weight"]
    assert reconstruction.readers(network(), group) == ["c.weight", "d.weight"]
    sampled = reconstruction.contributions(network(), group, inputs(2), seeds.stream(0, "t"), 30)
    assert sampled.shape == (60, 5)


def test_a_reader_with_groups_is_refused_by_name():
    parts = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1))
    model = nn.Sequential(parts, nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(1, *SHAPE))
    group = next(g for g in tracing.trace(model, SHAPE) if g.name == "0.0.weight")
    for member in (Thinet(), FeatureReconstruction()):
        with pytest.raises(SpecError, match=r"`0\.1\.weight` is of a Conv2d\. Use filter-norm"):
            member.refuse(model, [group])
    FilterNorm().refuse(model, [group])


# -- ThiNet ----------------------------------------------------------------------------------------


def drawn(samples, channels, seed=0):
    return seeds.stream(seed, "test").standard_normal((samples, channels))


@pytest.mark.parametrize("seed", range(5))
def test_thinet_removes_what_changes_the_sum_least_each_time(seed):
    sampled = drawn(40, 7, seed) + 0.3
    removed = []
    while len(removed) < 7:
        left = [c for c in range(7) if c not in removed]
        costs = [float((sampled[:, [*removed, c]].sum(1) ** 2).sum()) for c in left]
        removed.append(left[int(np.argmin(costs))])
    assert reconstruction.greedy_removal(sampled) == removed


def test_channels_that_cancel_go_together():
    sampled = drawn(50, 4)
    sampled[:, 3] = -sampled[:, 1] * 1.0001
    assert set(reconstruction.greedy_removal(sampled)[:2]) != {0, 2}
    assert reconstruction.greedy_removal(sampled * [1, 0.01, 1, 0.01])[:2] in ([1, 3], [3, 1])


def test_thinets_numbers_are_the_places_in_its_order():
    seen, thinet = evidence(), Thinet(num_images=3, num_samples=40)
    found = thinet.score(seen, ["a.weight"])["a.weight"]
    stream = seeds.stream(0, "prune", 1, 0)
    sampled = reconstruction.contributions(
        network(), seen.groups["a.weight"], inputs(3), stream, 40
    )
    order = reconstruction.greedy_removal(sampled)
    assert [int(found[channel]) for channel in order] == [0, 1, 2, 3]


def test_rescaling_gives_the_least_squares():
    kept, target = drawn(30, 3), drawn(30, 1, 1)[:, 0]
    found = reconstruction.rescaled(kept, target)
    best = ((target - kept @ found) ** 2).sum()
    for delta in itertools.product((-1e-3, 0, 1e-3), repeat=3):
        assert ((target - kept @ (found + delta)) ** 2).sum() >= best - 1e-12


# -- regression ------------------------------------------------------------------------------------


def lasso(sampled, penalty, rounds=20_000):
    """Coordinate descent on ½ |y - Z b|² + penalty |b|_1, y the sum of the contributions."""
    target, coefficients = sampled.sum(1), np.zeros(sampled.shape[1])
    for _ in range(rounds):
        before = coefficients.copy()
        for c in range(len(coefficients)):
            rest = target - sampled @ coefficients + sampled[:, c] * coefficients[c]
            slope = sampled[:, c] @ rest
            shrunk = np.sign(slope) * max(abs(slope) - penalty, 0)
            coefficients[c] = shrunk / (sampled[:, c] @ sampled[:, c])
        if np.abs(coefficients - before).max() < 1e-12:
            break
    return coefficients


@pytest.mark.parametrize("seed", range(4))
def test_the_strongest_channels_are_those_that_a_lasso_keeps(seed):
    sampled = drawn(40, 6, seed) * [1, 0.3, 2, 0.1, 0.7, 1.4]
    strengths = reconstruction.lasso_strengths(sampled)
    for penalty in sorted(strengths)[1:]:
        just_below, just_above = (lasso(sampled, penalty * f) for f in (0.999, 1.001))
        assert set(np.flatnonzero(just_above)) == set(np.flatnonzero(strengths > penalty * 1.001))
        assert set(np.flatnonzero(just_below)) == set(np.flatnonzero(strengths > penalty * 0.999))


def test_equal_channels_do_not_confuse_the_regression():
    sampled = drawn(30, 4)
    sampled[:, 3] = sampled[:, 0]
    assert np.isfinite(reconstruction.lasso_strengths(sampled)).all()
    silent = np.concatenate([sampled[:, :3], np.zeros((30, 1))], 1)
    assert reconstruction.lasso_strengths(silent)[3] == 0


def test_feature_reconstruction_scores_by_the_path():
    seen = evidence()
    found = FeatureReconstruction(num_images=3, num_samples=40).score(seen, ["a.weight"])
    stream = seeds.stream(0, "prune", 1, 0)
    sampled = reconstruction.contributions(
        network(), seen.groups["a.weight"], inputs(3), stream, 40
    )
    assert found["a.weight"].tolist() == reconstruction.lasso_strengths(sampled).tolist()


# -- what makes up for lost channels ---------------------------------------------------------------


def removal(kept):
    made = network()
    groups = tracing.trace(made, SHAPE)
    channels = {g.name: torch.ones(g.size, dtype=torch.bool) for g in groups}
    for name, stay in kept.items():
        channels[name] = torch.tensor(stay, dtype=torch.bool)
    whole = dict(made.named_parameters()) | dict(made.named_buffers())
    tensors = structure.shrunk(whole, groups, channels)
    smaller = structure.resized(made, structure.shapes(tensors))
    smaller.load_state_dict(tensors)
    return adjust.Removal(made, smaller, groups, channels, inputs(40))


KEPT = {"b.weight": [1, 0, 1, 1, 0], "d.weight": [0, 1, 1]}


def error(removal):
    """Of the first layer that lost inputs, which are the only ones that have not changed since."""
    loss = next(removal.readers())
    networks = removal.whole, removal.smaller
    before, now = (loss.layer(each)(loss.given(each)).movedim(1, -1) for each in networks)
    return float(((before[..., loss.outputs] - now) ** 2).mean().detach())


def test_the_layers_that_lost_inputs_are_found_in_order():
    found = [loss.name for loss in removal(KEPT).readers()]
    assert found == ["c.weight", "d.weight", "hidden.weight"]
    assert list(removal({}).readers()) == []


@pytest.mark.parametrize("member", spec.members(adjust.Adjust).values(), ids=spec.tag)
class TestEveryAdjustment:
    def test_outputs_come_nearer_to_what_they_were(self, member):
        before, after = removal(KEPT), removal(KEPT)
        member(num_images=40, num_samples=3000).adjust(after, seeds.stream(0, "test"))
        assert error(after) < error(before)

    def test_nothing_but_weights_of_layers_that_lost_inputs_changes(self, member):
        before, after = removal(KEPT), removal(KEPT)
        member(num_samples=500).adjust(after, seeds.stream(0, "test"))
        changed = {
            name
            for name, tensor in after.smaller.state_dict().items()
            if not torch.equal(tensor, before.smaller.state_dict()[name])
        }
        assert changed == {"c.weight", "d.weight", "hidden.weight"}
        for name, tensor in after.whole.state_dict().items():
            assert torch.equal(tensor, before.whole.state_dict()[name])

    def test_it_survives_being_stored(self, member):
        assert spec.decode(adjust.Adjust, member().to_json()) == member()


def test_without_the_silent_channels_a_refit_is_exact():
    made = removal({})
    with torch.no_grad():
        made.whole.norm_a.weight[1], made.whole.norm_a.bias[1] = 0, 0
    channels = made.channels | {"a.weight": torch.tensor([True, False, True, True])}
    whole = dict(made.whole.named_parameters()) | dict(made.whole.named_buffers())
    tensors = structure.shrunk(whole, made.groups, channels)
    smaller = structure.resized(made.whole, structure.shapes(tensors))
    smaller.load_state_dict(tensors)
    with torch.no_grad():
        smaller.b.weight.mul_(3.0)  # to be found again
    exact = adjust.Removal(made.whole, smaller, made.groups, channels, inputs(40))
    adjust.Refit(num_samples=2000).adjust(exact, seeds.stream(0, "test"))
    torch.testing.assert_close(smaller(inputs(5)), made.whole(inputs(5)))


def test_a_rescaling_is_one_factor_a_channel():
    before, after = removal(KEPT), removal(KEPT)
    adjust.Rescale(num_samples=500).adjust(after, seeds.stream(0, "test"))
    ratio = after.smaller.hidden.weight / before.smaller.hidden.weight
    by_channel = ratio.reshape(6, 2, 8)
    torch.testing.assert_close(by_channel, by_channel[:1, :, :1].expand_as(by_channel))
    assert not torch.allclose(ratio, torch.ones_like(ratio))
