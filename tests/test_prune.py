"""Prune and Rewind: every criterion with every selection, and what cannot be."""

import itertools

import pytest
import torch
from networks import Tiny, outset

from windfall import masks, seeds, spec
from windfall.criteria import (
    Criterion,
    Evidence,
    LargeInit,
    Magnitude,
    MagnitudeIncrease,
    Movement,
    Random,
)
from windfall.prune import Continue, LearningRate, Prune, Rewind, ToStep
from windfall.saliency import Grasp, Snip, Synflow
from windfall.selection import Global, Layerwise, Ratios, SmartRatios
from windfall.spec import SpecError

SHAPES = {"conv.weight": (6, 3, 3, 3), "hidden.weight": (20, 12), "output.weight": (5, 20)}
KINDS = {"conv.weight": "convolution", "hidden.weight": "hidden", "output.weight": "output"}
LEVELS = 5
SMALLER = {"snip": Snip(batch_size=20), "synflow": Synflow(rounds=5)}
SELECTIONS = (Layerwise(), Global(), Ratios(removed=(0.1, 0.3, 0.05)), SmartRatios())
EVERY = [
    pytest.param(
        Prune(criterion=SMALLER.get(criterion, criterion), selection=selection),
        id=f"{criterion}-{selection}",
    )
    for criterion, member in spec.members(Criterion).items()
    if member.prunes == "weights"
    for selection in SELECTIONS
]


def weights(seed):
    draw = seeds.stream(seed, "init")
    return {name: torch.from_numpy(draw.standard_normal(shape)) for name, shape in SHAPES.items()}


def seen(trained, level, seed=0):
    shape = Tiny(SHAPES).input_shape
    begun = outset(lambda: Tiny(SHAPES), weights(0), shape, num_classes=5)
    return Evidence(weights(0), trained, seed, level, outset=begun)


def chain(prune, *, is_frozen=False):
    """The masks of a chain whose weights change from level to level, or not."""
    alive = masks.ones(weights(0), SHAPES)
    for level in range(1, LEVELS + 1):
        trained = masks.apply(alive, weights(1 if is_frozen else level))
        alive = prune.masks(seen(trained, level), alive, KINDS)
        yield alive


@pytest.mark.parametrize("prune", EVERY)
class TestEveryCriterionWithEverySelection:
    def test_every_level_keeps_the_exact_count(self, prune):
        for level, found in enumerate(chain(prune), start=1):
            counts = prune.selection.counts(masks.sizes(found), KINDS, level)
            assert sum(masks.kept(found).values()) == sum(counts.values())

    def test_every_level_is_nested_in_the_one_before(self, prune):
        for outer, inner in itertools.pairwise(chain(prune)):
            assert masks.escaped(inner, outer) == []
            assert inner.keys() == outer.keys() == SHAPES.keys()

    def test_it_survives_being_stored(self, prune):
        assert Prune.from_json(prune.to_json()) == prune


@pytest.mark.parametrize(
    "criterion", [Magnitude(), MagnitudeIncrease(), LargeInit(), Movement()], ids=str
)
@pytest.mark.parametrize("selection", [Layerwise(), Global()])
def test_at_once_and_level_by_level_agree_where_the_weights_do_not_change(criterion, selection):
    prune = Prune(criterion=criterion, selection=selection)
    for level, found in enumerate(chain(prune, is_frozen=True), start=1):
        at_once = prune.masks(seen(weights(1), level), masks.ones(weights(0), SHAPES), KINDS)
        assert all(torch.equal(found[name], at_once[name]) for name in SHAPES)


@pytest.mark.parametrize(
    "criterion", [Magnitude(), Random(), MagnitudeIncrease(), Snip(batch_size=20), Grasp()], ids=str
)
def test_at_rate_0_nothing_is_pruned(criterion):
    for selection in (Layerwise(hidden=0, convolution=0, output=0), Global(rate=0)):
        for found in chain(Prune(criterion=criterion, selection=selection)):
            assert masks.density(found) == 1.0


def test_the_defaults_are_the_papers():
    prune = Prune()
    assert prune == Prune(criterion="magnitude", selection="layerwise")
    assert prune.selection == Layerwise(hidden=0.2, convolution=0.2, output=0.1)


def test_four_weights_are_pruned_as_by_hand():
    trained = {"w": torch.tensor([0.3, -0.9, 0.1, -0.2])}
    evidence = Evidence(trained, trained, seed=0, level=1)
    found = Prune(selection=Layerwise(hidden=0.5)).masks(
        evidence, masks.ones(trained, trained), {"w": "hidden"}
    )
    assert found["w"].tolist() == [True, True, False, False]


def test_a_diverged_network_cannot_be_pruned():
    trained = {**weights(0), "hidden.weight": torch.full((20, 12), float("nan"))}
    with pytest.raises(SpecError, match=r"finite number; got NaN .* diverged"):
        Prune().masks(seen(trained, 1), masks.ones(trained, SHAPES), KINDS)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"criterion": "magnitud"}, r"`criterion` must be one of .* Did you mean `magnitude`\?"),
        ({"criterion": {"kind": "magnitude", "p": 1}}, "`criterion` has no field `p`"),
        ({"selection": {"hidden": 1.2}}, "`selection.hidden` must be less than 1; got 1.2"),
        ({"selection": {"kind": "global", "rate": "x"}}, "`selection.rate` must be a valid number"),
        ({"criterion": "thinet"}, r"`criterion` must judge what `structure` removes, weights; got"),
        ({"structure": "channels"}, r"removes, channels; got magnitude, which judges weights"),
        ({"adjust": "refit"}, r"`adjust` refit must go with structure channels; got weights"),
        (
            {"selection": {"kind": "published", "target": "vgg-16-a"}},
            r"`selection` published must go with structure channels; got weights",
        ),
        (
            {"criterion": "gate", "structure": "blocks"},
            r"`selection` layerwise must go with structure weights or channels; got blocks",
        ),
        (
            {"criterion": "filter-norm", "selection": "smart-ratios", "structure": "channels"},
            r"`selection` smart-ratios must go with structure weights; got channels",
        ),
        ({"selection": "positive"}, r"positive must go with structure channels or blocks; got wei"),
        ({"criterion": "gate", "structure": "channels"}, r"removes, channels; got gate, which"),
        (
            {"criterion": "gate", "selection": "global", "structure": "blocks", "adjust": "refit"},
            r"`adjust` refit must go with structure channels; got blocks",
        ),
        ({"method": "magnitude"}, "Has no field `method`. .*Known: criterion, selection"),
    ],
)
def test_prunings_that_cannot_be_are_refused(document, message):
    with pytest.raises(SpecError, match=message):
        spec.decode(Prune, document)


@pytest.mark.parametrize(
    ("document", "rewind"),
    [
        ("to-step", ToStep(step=0, optimizer="reset")),
        ({"kind": "to-step", "step": 100}, ToStep(step=100)),
        ({"kind": "learning-rate", "steps": 5}, LearningRate(steps=5)),
        ({"kind": "continue", "steps": 5}, Continue(steps=5)),
    ],
)
def test_rewinds_are_read_as_written(document, rewind):
    assert spec.decode(Rewind, document) == rewind


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("rewind", "Must be one of the known names; got 'rewind'"),
        ("continue", "`steps` must be given"),
        ({"kind": "to-step", "step": -1}, "`step` must be greater than or equal to 0; got -1"),
        ({"kind": "to-step", "step": 1.5}, "`step` must be a valid integer"),
        ({"kind": "to-step", "optimizer": "kept"}, "`optimizer` must be 'reset' or 'restored'"),
        ({"kind": "learning-rate", "steps": 0}, "`steps` must be greater than or equal to 1"),
        ({"kind": "continue", "steps": 0}, "`steps` must be greater than or equal to 1; got 0"),
    ],
)
def test_rewinds_that_cannot_be_are_refused(document, message):
    with pytest.raises(SpecError, match=message):
        spec.decode(Rewind, document)
