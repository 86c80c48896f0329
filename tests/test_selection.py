"""Selection: exact counts, ties by position, and the tables of the paper."""

import decimal
import itertools
from decimal import Decimal
from fractions import Fraction

import pytest
import torch

from windfall import masks, models, seeds, spec, tracing
from windfall.selection import (
    Global,
    Layerwise,
    Positive,
    Published,
    Ratios,
    Selection,
    SmartRatios,
    apportioned,
    best,
    eased,
    highest,
    remaining,
    uniform,
)
from windfall.spec import SpecError

KINDS = {"conv.weight": "convolution", "hidden.weight": "hidden", "output.weight": "output"}
SHAPES = {"conv.weight": (6, 3, 3, 3), "hidden.weight": (20, 12), "output.weight": (5, 20)}
SIZES = {"conv.weight": 162, "hidden.weight": 240, "output.weight": 100}
SELECTIONS = [
    Layerwise(),
    Layerwise(hidden=0.4, convolution=0.1, output=0.15),
    Layerwise(hidden=0.0, convolution=0.5, output=0.0),
    Global(),
    Global(rate=0.35),
    Global(rate=0.3, exclude=("output",)),
    Global(rate=0.3, exclude=("hidden", "output")),
    Ratios(removed=(0.25, 0.4, 0.1)),
    SmartRatios(),
    SmartRatios(rate=0.4, output=0.1, steep=True),
    SmartRatios(rate=0.02),
]


def scores(seed=0):
    draw = seeds.stream(seed, "prune")
    return {name: torch.from_numpy(draw.standard_normal(SHAPES[name])) for name in SHAPES}


def tied():
    """Scores of a few values, so that every threshold falls among equals."""
    return {name: score.round() for name, score in scores().items()}


def everything():
    return {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}


def level_by_level(selection, scored, levels):
    found = [everything()]
    for level in range(1, levels + 1):
        found.append(selection.select(scored, found[-1], KINDS, level))
    return found


def exactly(size, rate, level):
    """round(size (1 - rate)^level), halves to even, in exact decimals."""
    with decimal.localcontext(prec=400):
        value = Decimal(size) * (1 - Decimal(repr(rate))) ** level
        return int(value.to_integral_value(decimal.ROUND_HALF_EVEN))


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# -- counts -----------------------------------------------------------------------------------


def test_of_1000_weights_at_a_fifth_exactly_200_go():
    assert remaining(1000, 0.2, 1) == 800
    kept = highest(torch.randperm(1000).double(), torch.ones(1000, dtype=torch.bool), 800)
    assert int((~kept).sum()) == 200
    found = Layerwise(hidden=0.2).select(
        {"w": torch.arange(1000.0)}, {"w": torch.ones(1000, dtype=torch.bool)}, {"w": "hidden"}, 1
    )
    assert found["w"].tolist() == [False] * 200 + [True] * 800


@pytest.mark.parametrize(
    ("size", "rate", "level", "expected"),
    [
        (1000, 0.2, 1, 800),
        (1000, 0.2, 3, 512),
        (10, 0.25, 1, 8),  # 7.5
        (10, 0.15, 1, 8),  # 8.5
        (15, 0.9, 1, 2),  # 1.5, and 1.4999999999999998 in binary
        (500, 0.1, 3, 364),  # 364.5, and 364.50000000000006 in binary
        (7, 0.0, 9, 7),
        (1, 0.49, 1, 1),
        (1, 0.5, 1, 0),
        (235_200, 0.2, 24, 1111),
    ],
)
def test_the_count_is_the_rounded_product_halves_to_even(size, rate, level, expected):
    assert remaining(size, rate, level) == exactly(size, rate, level) == expected


def test_counts_are_those_of_exact_decimals():
    for size, rate in itertools.product(
        (1, 2, 5, 15, 64, 125, 1000, 4095, 266_200), range(0, 100, 5)
    ):
        for level in range(8):
            assert remaining(size, rate / 100, level) == exactly(size, rate / 100, level)


def test_counts_never_grow_with_the_level():
    for size, rate in itertools.product((1, 3, 10, 999), (0.0, 0.01, 0.2, 0.99)):
        counts = [remaining(size, rate, level) for level in range(30)]
        assert counts[0] == size
        assert counts == sorted(counts, reverse=True)


# P_m in percent by level, as printed. Source: 1803.03635, figures 2 to 5; ResNet and VGG by the
# sizes in its appendix I, where the shortcuts' and the output's weights are never pruned.
PRINTED = {
    "lenet-300-100": "80.04 64.06 51.28 41.05 32.87 26.32 21.07 16.88 13.52 10.83 8.68 6.95 5.57"
    " 4.47 3.58 2.87 2.31 1.85 1.49 1.19 0.96 0.77 0.62 0.50",
    "conv-2": "80.10 64.16 51.41 41.20 33.02 26.47 21.23 17.03 13.66 10.97 8.81 7.08 5.69 4.57 3.68"
    " 2.97 2.39 1.93",
    "conv-4": "81.08 65.84 53.55 43.63 35.61 29.13 23.88 19.62 16.16 13.35 11.06 9.18 7.65 6.40"
    " 5.37 4.51",
    "conv-6": "82.54 68.20 56.39 46.68 38.67 32.07 26.61 22.11 18.38 15.29 12.74 10.62 8.86 7.39"
    " 6.18",
    "resnet-20": "80.24 64.43 51.78 41.66 33.56 27.09 21.91 17.76 14.44 11.79 9.67 7.97",
    "vgg-19": "80.01 64.01 51.21 40.98 32.79 26.23 20.99 16.80 13.44 10.76 8.61 6.90 5.52 4.42 3.54"
    " 2.84 2.28 1.83 1.47",
}
ZOO = {
    "lenet-300-100": ((1, 28, 28), Layerwise()),
    "conv-2": ((3, 32, 32), Layerwise(convolution=0.1)),
    "conv-4": ((3, 32, 32), Layerwise(convolution=0.1)),
    "conv-6": ((3, 32, 32), Layerwise(convolution=0.15)),
}
BY_SIZE = {
    "resnet-20": {"conv": 267_696, "shortcut": 2_560, "output": 640},
    "vgg-19": {"conv": 20_018_880, "output": 5_120},
}


def densities(selection, sizes, kinds, levels):
    for level in range(1, levels + 1):
        counts = selection.counts(sizes, kinds, level)
        yield 100 * sum(counts.values()) / sum(sizes.values())


@pytest.mark.parametrize("name", ZOO)
def test_the_papers_densities_are_met_to_the_printed_digit(name):
    shape, selection = ZOO[name]
    with torch.device("meta"):
        module = spec.decode(models.Model, name).build(shape, 10)
    sizes = {key: value.numel() for key, value in module.named_parameters() if "weight" in key}
    kinds = {key: "convolution" if "conv" in key else "hidden" for key in sizes}
    kinds["output.weight"] = "output"
    expected = PRINTED[name].split()
    found = [f"{value:.2f}" for value in densities(selection, sizes, kinds, len(expected))]
    assert found == expected


@pytest.mark.parametrize("name", BY_SIZE)
def test_the_papers_densities_are_met_by_the_sizes_of_networks_outside_the_zoo(name):
    sizes = BY_SIZE[name]
    kinds = {"conv": "convolution", "shortcut": "hidden", "output": "output"}
    kinds = {key: kinds[key] for key in sizes}
    expected = PRINTED[name].split()
    for selection in (Layerwise(hidden=0, output=0), Global(exclude=("hidden", "output"))):
        found = [f"{value:.2f}" for value in densities(selection, sizes, kinds, len(expected))]
        assert found == expected


def test_lenet_keeps_the_counts_of_the_papers_formula():
    sizes = {"hidden1": 235_200, "hidden2": 30_000, "output": 1_000}
    kinds = {"hidden1": "hidden", "hidden2": "hidden", "output": "output"}
    assert Layerwise().counts(sizes, kinds, 3) == {
        "hidden1": 120_422,
        "hidden2": 15_360,
        "output": 729,
    }


# -- every selection --------------------------------------------------------------------------


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
class TestEverySelection:
    @pytest.mark.parametrize("scored", [scores(), tied()], ids=["distinct", "tied"])
    def test_each_level_keeps_exactly_what_it_states(self, selection, scored):
        for level, found in enumerate(level_by_level(selection, scored, 6)):
            counts = selection.counts(SIZES, KINDS, level)
            kept = masks.kept(found)
            pooled = sum(count for name, count in kept.items() if name not in counts)
            assert {name: kept[name] for name in counts if name} == {
                name: count for name, count in counts.items() if name
            }
            assert pooled == counts.get("", 0)

    def test_masks_are_nested_and_new(self, selection):
        found = level_by_level(selection, scores(), 6)
        for outer, inner in itertools.pairwise(found):
            assert masks.escaped(inner, outer) == []
            assert list(inner) == list(outer) == list(SHAPES)
            assert {name: tuple(mask.shape) for name, mask in inner.items()} == SHAPES
            for name, mask in inner.items():
                assert mask.dtype == torch.bool
                assert mask.data_ptr() != outer[name].data_ptr()

    @pytest.mark.parametrize("scored", [scores(), tied()], ids=["distinct", "tied"])
    def test_at_once_and_level_by_level_agree_to_the_weight(self, selection, scored):
        for level, found in enumerate(level_by_level(selection, scored, 6)):
            assert same(found, selection.select(scored, everything(), KINDS, level))

    def test_every_weight_kept_scores_at_least_as_much_as_one_removed(self, selection):
        scored = scores()
        found = selection.select(scored, everything(), KINDS, 2)
        pools = [[name] for name in SHAPES]
        if isinstance(selection, Global):
            pools = [[name for name in SHAPES if KINDS[name] not in selection.exclude]]
        for pool in pools:
            values = torch.cat([scored[name].flatten() for name in pool])
            kept = torch.cat([found[name].flatten() for name in pool])
            if not bool(kept.all()):
                assert values[kept].min() > values[~kept].max()

    def test_what_is_pruned_never_returns_whatever_it_scores(self, selection):
        alive = selection.select(scores(), everything(), KINDS, 1)
        reversed_scores = {name: -score for name, score in scores().items()}
        assert masks.escaped(selection.select(reversed_scores, alive, KINDS, 2), alive) == []

    def test_what_it_is_given_stays_as_it_was(self, selection):
        scored, alive = scores(), everything()
        selection.select(scored, alive, KINDS, 3)
        assert same(scored, scores())
        assert same(alive, everything())

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
    def test_a_score_that_is_no_number_is_refused(self, selection, wrong):
        scored = scores()
        scored["conv.weight"][0, 0, 0, 0] = wrong
        with pytest.raises(SpecError, match="must score every weight by a finite number"):
            selection.select(scored, everything(), KINDS, 1)

    def test_a_score_that_is_no_number_does_not_matter_where_the_weight_is_gone(self, selection):
        scored, alive = scores(), selection.select(scores(), everything(), KINDS, 1)
        for name in scored:
            scored[name][~alive[name]] = float("nan")
        found = selection.select(scored, alive, KINDS, 2)
        assert same(found, selection.select(scores(), alive, KINDS, 2))

    def test_it_survives_being_stored(self, selection):
        assert spec.decode(Selection, selection.to_json()) == selection


def test_every_member_is_tested():
    tested = {type(selection) for selection in SELECTIONS}
    assert tested | {Published, Positive} == set(spec.members(Selection).values())


# -- smart ratios -------------------------------------------------------------------------------


def test_smart_ratios_are_the_numbers_by_hand():
    # Of L = 4 layers p = 20, 12, 6 beside the output's 300: 100 - 30 are spread as 20 : 12 : 6.
    totals = {"a": 100, "b": 100, "c": 100, "output": 100}
    kinds = {**dict.fromkeys("abc", "convolution"), "output": "output"}
    found = SmartRatios(rate=0.75).counts(totals, kinds, 1)
    assert found == {"a": 37, "b": 22, "c": 11, "output": 30}  # 36.8, 22.1, 11.05
    # steep: p = 20, 3, 2/3; the first takes 59.2, 8.9, 2.0
    found = SmartRatios(rate=0.75, steep=True).counts(totals, kinds, 1)
    assert found == {"a": 60, "b": 9, "c": 1, "output": 30}


def test_what_a_full_layer_cannot_take_goes_to_the_others_and_last_to_the_output():
    totals = {"a": 10, "b": 100, "c": 100, "output": 10}
    kinds = {**dict.fromkeys("abc", "convolution"), "output": "output"}
    found = SmartRatios(rate=0.4).counts(totals, kinds, 1)  # 132 - 3 - 10 as 12 : 6
    assert found == {"a": 10, "b": 80, "c": 39, "output": 3}
    found = SmartRatios(rate=0.01).counts(totals, kinds, 1)  # 218 of 220
    assert found == {"a": 10, "b": 100, "c": 100, "output": 8}


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.9])
def test_smart_ratios_keep_the_total_exactly(rate):
    counts = SmartRatios(rate=rate).counts(SIZES, KINDS, 1)
    assert sum(counts.values()) == remaining(sum(SIZES.values()), rate, 1)


def test_smart_ratios_that_would_empty_a_layer_are_refused():
    with pytest.raises(SpecError, match=r"got 0 of `conv\.weight` at level 3"):
        SmartRatios(rate=0.7).counts(SIZES, KINDS, 3)  # 14 are left; the output has 30


def test_one_more_to_spread_is_one_more_for_one_tensor():
    """Largest remainders would take from one to give to another (the Alabama paradox)."""
    totals = {"a": 7, "b": 30, "c": 12, "d": 1}
    weights = {"a": Fraction(5), "b": Fraction(2), "c": Fraction(3), "d": Fraction(1, 7)}
    before = dict.fromkeys(totals, 0)
    for count in range(1, 51):
        found = apportioned(totals, weights, count)
        assert sum(found.values()) == count
        assert sorted(found[name] - before[name] for name in totals) == [0, 0, 0, 1]
        before = found
    assert apportioned(totals, weights, 99) == totals


# -- a part of the way --------------------------------------------------------------------------


def test_counts_are_eased_from_all_to_those_stated_geometrically():
    counts = {"": 4, "output.weight": 25}
    pool = SIZES["conv.weight"] + SIZES["hidden.weight"]
    assert eased(counts, everything(), 0) == {"": pool, "output.weight": 100}
    assert eased(counts, everything(), 1) == counts
    middle = eased(counts, everything(), 0.5)
    assert middle == {"": round((pool * 4) ** 0.5), "output.weight": 50}


def test_no_eased_count_exceeds_what_is_alive():
    alive = everything()
    alive["output.weight"][1:] = False
    assert eased({"": 4, "output.weight": 10}, alive, 0.1)["output.weight"] == 20


def test_the_best_of_stated_counts_are_a_selections():
    for selection in SELECTIONS:
        counts = selection.counts(SIZES, KINDS, 2)
        found = best(scores(), everything(), counts)
        assert same(found, selection.select(scores(), everything(), KINDS, 2))
        assert list(found) == list(SHAPES)


# -- all above 0 --------------------------------------------------------------------------------


def test_of_positive_scores_all_stay_and_of_others_none():
    scored = {"a": torch.tensor([0.5, 0.0, -1.0, 1e-30]), "b": torch.tensor([0.0, 2.0])}
    alive = {"a": torch.tensor([True, True, True, False]), "b": torch.tensor([True, True])}
    for level in (1, 2):
        found = Positive().select(scored, alive, {}, level)
        assert found["a"].tolist() == [True, False, False, False]
        assert found["b"].tolist() == [False, True]
        assert same(found, Positive().select(scored, found, {}, level))


def test_where_no_score_is_positive_the_best_stays():
    scored = {"a": torch.tensor([-3.0, -1.0, -2.0]), "b": torch.zeros(3)}
    alive = {name: torch.ones(3, dtype=torch.bool) for name in scored}
    found = Positive().select(scored, alive, {}, 1)
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "a": [False, True, False], "b": [True, False, False]
    }  # fmt: skip


def test_how_many_scores_are_positive_is_not_known_before():
    assert Positive().counts({"blocks": 9}, {}, 3) == {"blocks": 9}


@pytest.mark.parametrize(
    "selection",
    [Layerwise(hidden=0, convolution=0, output=0), Global(rate=0), Global(density=1)],
    ids=str,
)
def test_at_density_1_nothing_is_pruned(selection):
    for level in (1, 5):
        found = selection.select(scores(), everything(), KINDS, level)
        assert same(found, everything())
    assert masks.density(found) == 1.0


# -- two spellings, one meaning ---------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.35])
@pytest.mark.parametrize("scored", [scores(), tied()], ids=["distinct", "tied"])
def test_global_on_one_layer_is_layerwise_on_it(rate, scored):
    name, kinds = "hidden.weight", {"hidden.weight": "hidden"}
    alive = {name: everything()[name]}
    for level in (1, 2, 3):
        one = Global(rate=rate).select(scored, alive, kinds, level)
        other = Layerwise(hidden=rate).select(scored, alive, kinds, level)
        assert same(one, other)
        alive = one


def test_global_with_all_other_kinds_excluded_is_layerwise_on_that_kind():
    one = Global(rate=0.3, exclude=("hidden", "output"))
    other = Layerwise(hidden=0, convolution=0.3, output=0)
    for a, b in zip(
        level_by_level(one, scores(), 4), level_by_level(other, scores(), 4), strict=True
    ):
        assert same(a, b)


@pytest.mark.parametrize("rate", [0.2, 0.75])
def test_a_density_is_the_rate_of_one_level(rate):
    one = Global(density=1 - rate).select(scores(), everything(), KINDS, 1)
    other = Global(rate=rate).select(scores(), everything(), KINDS, 1)
    assert same(one, other)


def test_a_density_is_reached_at_once_and_stays():
    found = level_by_level(Global(density=0.15), scores(), 3)
    total = sum(SIZES.values())
    assert [sum(masks.kept(level).values()) for level in found[1:]] == [round(total * 0.15)] * 3
    assert same(found[1], found[3])


def test_a_density_is_read_as_it_is_written():
    """150 · 0.35 is 52.5, which 0.35 in binary misses."""
    for pooled, density in itertools.product(range(1, 300), (0.05, 0.15, 0.35, 0.55, 0.95)):
        count = Decimal(pooled) * Decimal(repr(density))
        expected = int(count.to_integral_value(decimal.ROUND_HALF_EVEN))
        if expected:
            assert Global(density=density).counts({"w": pooled}, {"w": "hidden"}, 1) == {
                "": expected
            }


# -- the highest scores -----------------------------------------------------------------------


def brute_force(values, alive, count):
    ranked = sorted(
        (index for index, lives in enumerate(alive) if lives),
        key=lambda index: (-values[index], index),
    )
    chosen = set(ranked[:count])
    return [index in chosen for index in range(len(values))]


def test_the_highest_scores_are_those_of_a_sort():
    draw = seeds.stream(0, "prune")
    for _ in range(200):
        size = int(draw.integers(1, 12))
        values = draw.integers(-2, 3, size).astype(float)
        alive = draw.random(size) < 0.7
        for count in range(int(alive.sum()) + 1):
            found = highest(torch.from_numpy(values), torch.from_numpy(alive), count)
            assert found.tolist() == brute_force(values.tolist(), alive.tolist(), count)


@pytest.mark.parametrize("count", range(11))
def test_of_equal_scores_the_earlier_positions_stay(count):
    found = highest(torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.bool), count)
    assert found.flatten().tolist() == [True] * count + [False] * (10 - count)


def test_zeros_of_either_sign_are_equal():
    scored = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    found = highest(scored, torch.ones(4, dtype=torch.bool), 2)
    assert found.tolist() == [True, True, False, False]


def test_ties_over_layers_go_to_the_earlier_layer():
    equal = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    found = Global(rate=0.1).select(equal, everything(), KINDS, 1)
    assert masks.kept(found) == {"conv.weight": 162, "hidden.weight": 240, "output.weight": 50}
    assert found["output.weight"].flatten().tolist() == [True] * 50 + [False] * 50


# -- what must not be -------------------------------------------------------------------------


def test_a_rate_that_empties_a_layer_is_refused_by_the_layers_name():
    with pytest.raises(SpecError, match=r"got 0 of `output\.weight` at level 8\. Lower the rate"):
        Layerwise(output=0.5).counts(SIZES, KINDS, 8)
    with pytest.raises(SpecError, match=r"got 0 of `output\.weight` at level 8"):
        Layerwise(output=0.5).select(scores(), everything(), KINDS, 8)


def test_a_global_threshold_leaves_the_best_of_every_layer():
    scored = scores()
    scored["hidden.weight"] -= 100
    selection = Global(rate=0.5)
    found = selection.select(scored, everything(), KINDS, 3)
    assert masks.kept(found)["hidden.weight"] == 1
    assert bool(found["hidden.weight"].flatten()[scored["hidden.weight"].argmax()])
    assert sum(masks.kept(found).values()) == selection.counts(SIZES, KINDS, 3)[""]


# -- channels ---------------------------------------------------------------------------------


def test_a_list_of_the_wrong_length_is_refused_with_the_names_of_what_it_is_for():
    message = (
        r"`prune\.selection\.removed` must have a fraction for each of 3; got 2\. They are, in"
        r" order: conv\.weight, hidden\.weight, output\.weight\."
    )
    with pytest.raises(SpecError, match=message):
        Ratios(removed=(0.5, 0.5)).counts(SIZES, KINDS, 1)


def test_a_ratio_that_empties_a_layer_is_refused_by_its_name():
    with pytest.raises(SpecError, match=r"got 0 of `output\.weight` at level 1"):
        Ratios(removed=(0.5, 0.5, 0.999)).counts(SIZES, KINDS, 1)


def groups_of(model):
    return {g.name: g.size for g in tracing.trace(model.build((3, 32, 32), 10), (3, 32, 32))}


def test_vgg_16_a_is_the_papers():
    sizes = groups_of(models.Vgg_16())
    counts = Published(target="vgg-16-a").counts(sizes, dict.fromkeys(sizes, "convolution"), 1)
    assert list(counts.values()) == [32, 64, 128, 128, 256, 256, 256] + [256] * 6


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        # 1608.08710's fractions of 16, 32 and 64 channels, rounded down; sensitive blocks whole
        ("resnet-56-a", [14] * 7 + [16, 14, 32] + [28] * 8 + [64] + [57] * 7 + [64]),
        ("resnet-56-b", [6] * 7 + [16, 16, 32] + [22] * 6 + [32, 22, 64] + [57] * 7 + [64]),
        ("resnet-110-a", [8] * 17 + [16] + [32] * 18 + [64] * 18),
        ("resnet-110-b", [8] * 17 + [16, 32] + [19] * 17 + [64] + [44] * 17),
    ],
)
def test_the_residual_networks_are_the_papers(target, kept):
    model = models.Resnet_56() if "56" in target else models.Resnet_110()
    sizes = groups_of(model)
    counts = Published(target=target).counts(sizes, dict.fromkeys(sizes, "convolution"), 1)
    assert [count for name, count in counts.items() if ".conv1." in name] == kept
    shared = {name: count for name, count in counts.items() if ".conv1." not in name}
    assert shared == {name: sizes[name] for name in shared}


def test_a_published_network_of_another_is_refused():
    sizes = groups_of(models.Vgg_11(width=0.125))
    with pytest.raises(SpecError, match=r"`prune\.selection` resnet-56-a must prune channels of"):
        Published(target="resnet-56-a").counts(sizes, {}, 1)


def test_a_global_count_below_the_number_of_layers_is_refused_before_any_score_is_known():
    with pytest.raises(SpecError, match=r"got 2 for the layers `conv.weight`, .* at level 8"):
        Global(rate=0.5).counts(SIZES, KINDS, 8)
    with pytest.raises(SpecError, match=r"got 2 for the layers `hidden\.weight`, `output\.weight`"):
        Global(density=0.005, exclude=("convolution",)).counts(
            SIZES | {"more.weight": 60}, KINDS | {"more.weight": "hidden"}, 1
        )


def test_excluding_everything_is_refused():
    everywhere = Global(exclude=("hidden", "convolution", "output"))
    with pytest.raises(SpecError, match=r"`prune\.selection\.exclude` must leave a layer to prune"):
        everywhere.counts(SIZES, KINDS, 1)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"kind": "layerwise", "hidden": 1}, "`hidden` must be less than 1; got 1"),
        ({"kind": "layerwise", "output": -0.1}, "`output` must be greater than or equal to 0"),
        ({"kind": "layerwise", "rate": 0.2}, "Has no field `rate`. .*Known: hidden, convolution"),
        ({"kind": "global", "rate": 1}, "`rate` must be less than 1; got 1"),
        ({"kind": "global", "density": 0}, "`density` must be greater than 0; got 0"),
        ({"kind": "global", "density": 1.2}, "`density` must be less than or equal to 1; got 1.2"),
        ({"kind": "global", "density": 0.5, "rate": 0.3}, "Must have one of `rate` and `density`"),
        ({"kind": "global", "exclude": ["outputs"]}, "`exclude.0` must be 'hidden', "),
        ("uniform", "Must be one of the known names; got 'uniform'"),
    ],
)
def test_selections_that_cannot_be_are_refused(document, message):
    with pytest.raises(SpecError, match=message):
        spec.decode(Selection, document)


# -- one density everywhere -------------------------------------------------------------------


def largest_remainders(sizes, count):
    """Give every tensor its quota's whole part, then one each to the largest remainders."""
    quotas = {name: Fraction(size * count, sum(sizes.values())) for name, size in sizes.items()}
    counts = {name: int(quota) for name, quota in quotas.items()}
    while sum(counts.values()) < count:
        name = max(quotas, key=lambda name: quotas[name] - counts[name])
        counts[name] += 1
    return counts


def test_a_uniform_count_is_exact_and_by_largest_remainders():
    draw = seeds.stream(0, "uniform")
    for _ in range(300):
        sizes = {
            str(i): int(size) for i, size in enumerate(draw.integers(1, 30, draw.integers(1, 6)))
        }
        for count in range(sum(sizes.values()) + 1):
            expected = largest_remainders(sizes, count)
            if min(expected.values()) < 1:
                with pytest.raises(SpecError, match="got 0 of"):
                    uniform(sizes, count)
                continue
            found = uniform(sizes, count)
            assert found == expected
            assert sum(found.values()) == count
            assert all(found[name] <= size for name, size in sizes.items())


def test_a_uniform_count_is_within_one_of_its_quota():
    sizes = {"hidden1": 235_200, "hidden2": 30_000, "output": 1_000}
    found = uniform(sizes, 136_511)
    assert sum(found.values()) == 136_511
    for name, size in sizes.items():
        assert abs(found[name] - size * 136_511 / 266_200) < 1


def test_equal_remainders_go_to_the_earlier_tensor():
    assert uniform({"a": 3, "b": 3, "c": 3}, 4) == {"a": 2, "b": 1, "c": 1}
    assert uniform({"a": 3, "b": 3, "c": 3}, 5) == {"a": 2, "b": 2, "c": 1}


def test_a_uniform_count_that_empties_a_layer_is_refused_by_its_name():
    with pytest.raises(SpecError, match=r"got 0 of `output` when 20 are spread over 10,010"):
        uniform({"hidden": 10_000, "output": 10}, 20)
