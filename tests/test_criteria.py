"""Criteria: properties of every member, and one pinned row each."""

import pytest
import torch

from windfall import masks, seeds, spec
from windfall.criteria import (
    Criterion,
    Evidence,
    LargeFinalSameSign,
    LargeInit,
    Magnitude,
    MagnitudeIncrease,
    Movement,
    Random,
)
from windfall.prune import Prune
from windfall.saliency import Saliency
from windfall.selection import Global, Layerwise

# Those that look at weights alone; what looks at the network is in test_saliency.
MEMBERS = [
    member()
    for name, member in spec.members(Criterion).items()
    if member.prunes == "weights" and name not in spec.members(Saliency)
]
SHAPES = {"conv.weight": (4, 3, 3, 3), "hidden.weight": (7, 5), "output.weight": (3, 7)}
KINDS = {"conv.weight": "convolution", "hidden.weight": "hidden", "output.weight": "output"}


def name_of(member):
    return spec.tag(type(member))


def weights(seed, dtype=torch.float64):
    draw = seeds.stream(seed, "init")
    return {n: torch.from_numpy(draw.standard_normal(s)).to(dtype) for n, s in SHAPES.items()}


def evidence(initial=None, trained=None, seed=0, level=1):
    return Evidence(initial or weights(0), trained or weights(1), seed, level)


def scaled(params, **factors):
    return {name: value * factors.get(name.split(".")[0], 1) for name, value in params.items()}


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
class TestEveryMember:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_scores_are_finite_and_of_the_weights_shapes(self, member, dtype):
        seen = evidence(weights(0, dtype), weights(1, dtype))
        scores = member.score(seen, SHAPES)
        assert {name: tuple(score.shape) for name, score in scores.items()} == SHAPES
        assert all(bool(score.isfinite().all()) for score in scores.values())

    def test_only_the_named_weights_are_scored_in_the_order_of_the_names(self, member):
        names = ["output.weight", "conv.weight"]
        assert list(member.score(evidence(), names)) == names

    def test_the_same_evidence_gives_the_same_scores(self, member):
        first, again = member.score(evidence(), SHAPES), member.score(evidence(), SHAPES)
        assert all(torch.equal(first[name], again[name]) for name in SHAPES)

    def test_scores_share_no_storage_with_the_evidence(self, member):
        seen = evidence()
        for score in member.score(seen, SHAPES).values():
            score.fill_(7)
        assert all(torch.equal(seen.initial[name], weights(0)[name]) for name in SHAPES)
        assert all(torch.equal(seen.trained[name], weights(1)[name]) for name in SHAPES)

    def test_the_signs_of_the_weights_do_not_matter(self, member):
        """A released implementation without the absolute value froze every negative weight."""
        flipped = [{name: -value for name, value in weights(seed).items()} for seed in (0, 1)]
        first, second = (
            member.score(evidence(), SHAPES),
            member.score(evidence(*flipped), SHAPES),
        )
        assert all(torch.equal(first[name], second[name]) for name in SHAPES)

    def test_a_layers_scores_do_not_depend_on_another_layers_weights(self, member):
        first = member.score(evidence(), SHAPES)
        seen = evidence(scaled(weights(0), hidden=100), scaled(weights(1), hidden=100))
        second = member.score(seen, SHAPES)
        assert torch.equal(first["conv.weight"], second["conv.weight"])
        assert torch.equal(first["output.weight"], second["output.weight"])

    def test_a_mask_layer_by_layer_does_not_depend_on_the_layers_scales(self, member):
        factors = {"conv": 64, "hidden": 0.25, "output": 4}  # powers of 2: no rounding
        seen = evidence(scaled(weights(0), **factors), scaled(weights(1), **factors))
        prune, alive = (
            Prune(criterion=member, selection=Layerwise()),
            masks.ones(weights(1), SHAPES),
        )
        first, second = prune.masks(evidence(), alive, KINDS), prune.masks(seen, alive, KINDS)
        assert all(torch.equal(first[name], second[name]) for name in SHAPES)

    def test_a_global_mask_does_not_depend_on_the_networks_scale(self, member):
        factors = {"conv": 8, "hidden": 8, "output": 8}
        seen = evidence(scaled(weights(0), **factors), scaled(weights(1), **factors))
        prune, alive = Prune(criterion=member, selection=Global()), masks.ones(weights(1), SHAPES)
        first, second = prune.masks(evidence(), alive, KINDS), prune.masks(seen, alive, KINDS)
        assert all(torch.equal(first[name], second[name]) for name in SHAPES)


# The scores of (theta_0, theta_T) = ((0.5, -2, 0, 1), (-1, 0.25, 3, -0.5)), seed 0, level 1.
INITIAL, TRAINED = (0.5, -2.0, 0.0, 1.0), (-1.0, 0.25, 3.0, -0.5)
KNOWN = {
    "magnitude": [1.0, 0.25, 3.0, 0.5],
    "random": [0.5897650845231592, 0.5190682828317723, 0.27811676095724003, 0.5427103342734798],
    "magnitude-increase": [0.5, -1.75, 3.0, -0.5],
    "large-init": [0.5, 2.0, 0.0, 1.0],
    "movement": [1.5, 2.25, 3.0, 1.5],
    "large-final-same-sign": [0.0, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_scores_of_four_weights_are_those_by_hand(member):
    initial = {"w": torch.tensor(INITIAL, dtype=torch.float64)}
    trained = {"w": torch.tensor(TRAINED, dtype=torch.float64)}
    scores = member.score(Evidence(initial, trained, seed=0, level=1), ["w"])
    assert scores["w"].tolist() == KNOWN[name_of(member)]


def test_large_negative_weights_are_kept():
    trained = {"hidden.weight": torch.tensor([[-5.0, 0.1], [4.0, -0.2]])}
    seen = Evidence(trained, trained, seed=0, level=1)
    kinds = {"hidden.weight": "hidden"}
    kept = Prune(selection=Layerwise(hidden=0.5)).masks(seen, masks.ones(trained, kinds), kinds)
    assert kept["hidden.weight"].tolist() == [[True, False], [True, False]]


class TestRandom:
    def test_it_sees_no_weight(self):
        first = Random().score(evidence(), SHAPES)
        second = Random().score(evidence(weights(5), weights(6)), SHAPES)
        assert all(torch.equal(first[name], second[name]) for name in SHAPES)

    @pytest.mark.parametrize("other", [{"seed": 1}, {"level": 2}])
    def test_another_seed_or_level_draws_others(self, other):
        first, second = (
            Random().score(evidence(), SHAPES),
            Random().score(evidence(**other), SHAPES),
        )
        assert not any(torch.equal(first[name], second[name]) for name in SHAPES)

    def test_two_tensors_of_one_shape_are_drawn_differently(self):
        same = {"a": torch.zeros(20), "b": torch.zeros(20)}
        scores = Random().score(Evidence(same, same, seed=0, level=1), same)
        assert not torch.equal(scores["a"], scores["b"])

    def test_scores_are_uniform(self):
        large = {"w": torch.zeros(200, 100)}
        score = Random().score(Evidence(large, large, seed=0, level=1), large)["w"]
        # The mean and the square's mean of 20,000 draws: standard deviations 0.0020 and 0.0021.
        assert abs(float(score.mean()) - 1 / 2) < 0.01
        assert abs(float((score**2).mean()) - 1 / 3) < 0.011
        assert 0 <= float(score.min()) < 0.001
        assert 0.999 < float(score.max()) < 1


@pytest.mark.parametrize(
    ("criterion", "is_blind_to_initial", "is_blind_to_trained"),
    [
        (Magnitude(), True, False),
        (LargeInit(), False, True),
        (MagnitudeIncrease(), False, False),
        (Movement(), False, False),
        (LargeFinalSameSign(), False, False),
    ],
    ids=str,
)
def test_a_criterion_sees_the_beginning_the_end_or_both(
    criterion, is_blind_to_initial, is_blind_to_trained
):
    first = criterion.score(evidence(), SHAPES)["conv.weight"]
    other_initial = criterion.score(evidence(initial=weights(7)), SHAPES)["conv.weight"]
    other_trained = criterion.score(evidence(trained=weights(7)), SHAPES)["conv.weight"]
    assert torch.equal(first, other_initial) == is_blind_to_initial
    assert torch.equal(first, other_trained) == is_blind_to_trained


def test_the_same_sign_keeps_the_large_among_those_that_kept_theirs():
    initial = {"w": torch.tensor([0.5, -2.0, 1.0, -0.1, 0.0])}
    trained = {"w": torch.tensor([0.25, -3.0, -4.0, 5.0, 6.0])}
    scores = LargeFinalSameSign().score(Evidence(initial, trained, seed=0, level=1), ["w"])
    assert scores["w"].tolist() == [0.25, 3.0, 0.0, 0.0, 0.0]


def test_from_zero_all_movement_is_increase():
    zero = {name: torch.zeros_like(value) for name, value in weights(0).items()}
    movement = Movement().score(evidence(initial=zero), SHAPES)
    increase = MagnitudeIncrease().score(evidence(initial=zero), SHAPES)
    assert all(torch.equal(movement[name], increase[name]) for name in SHAPES)


def test_large_init_before_training_is_magnitude():
    seen = evidence(trained=weights(0))
    ours, theirs = LargeInit().score(seen, SHAPES), Magnitude().score(seen, SHAPES)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def test_from_zero_the_increase_is_the_magnitude():
    zero = {name: torch.zeros_like(value) for name, value in weights(0).items()}
    increase = MagnitudeIncrease().score(evidence(initial=zero), SHAPES)
    magnitude = Magnitude().score(evidence(), SHAPES)
    assert all(torch.equal(increase[name], magnitude[name]) for name in SHAPES)
