"""Masks: exact zeros, true permutations, overlaps against brute force."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from windfall import masks, seeds

NAMES = ("conv.weight", "hidden.weight", "output.weight")
SHAPES = {"conv.weight": (4, 3, 3, 3), "hidden.weight": (7, 5), "output.weight": (3, 7)}


def params():
    draw = seeds.stream(0, "init")
    weights = {name: torch.from_numpy(draw.standard_normal(SHAPES[name])) for name in NAMES}
    return {**weights, "hidden.bias": torch.arange(7.0)}


def some_masks(seed=0, density=0.4):
    draw = seeds.stream(seed, "prune")
    return {name: torch.from_numpy(draw.random(SHAPES[name]) < density) for name in NAMES}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# -- making and applying ----------------------------------------------------------------------


def test_ones_keep_everything_of_the_named_weights_alone():
    made = masks.ones(params(), NAMES)
    assert list(made) == list(NAMES)
    assert all(mask.dtype == torch.bool and bool(mask.all()) for mask in made.values())
    assert masks.density(made) == 1.0


def test_a_pruned_weight_is_0_and_a_kept_one_is_what_it_was_bit_for_bit():
    weights, some = params(), some_masks()
    applied = masks.apply(some, weights)
    assert list(applied) == list(weights)
    for name, mask in some.items():
        assert torch.equal(bits(applied[name][mask]), bits(weights[name][mask]))
        assert torch.equal(bits(applied[name][~mask]), bits(torch.zeros_like(weights[name][~mask])))
    assert torch.equal(applied["hidden.bias"], weights["hidden.bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_pruned_is_plus_0_whatever_it_was(dtype):
    weight = tensor(-0.0, -1.0, math.nan, math.inf, -math.inf, 1e-320).to(dtype)
    applied = masks.apply({"w": torch.zeros(6, dtype=torch.bool)}, {"w": weight})["w"]
    assert applied.dtype == dtype
    assert applied.tolist() == [0.0] * 6
    assert not torch.signbit(applied).any()


def test_what_is_kept_is_kept_even_where_it_is_no_number():
    weight = tensor(-0.0, math.nan, math.inf, -math.inf)
    applied = masks.apply({"w": torch.ones(4, dtype=torch.bool)}, {"w": weight})["w"]
    assert torch.equal(bits(applied), bits(weight))


def test_applying_changes_nothing_it_is_given_and_shares_nothing_with_it():
    weights, some = params(), some_masks()
    before = {name: weight.clone() for name, weight in weights.items()}
    for applied in masks.apply(some, weights).values():
        applied.add_(1)
    assert all(torch.equal(before[name], weights[name]) for name in before)


def test_applying_twice_is_applying_once():
    once = masks.apply(some_masks(), params())
    twice = masks.apply(some_masks(), once)
    assert all(torch.equal(once[name], twice[name]) for name in once)


# -- counting ---------------------------------------------------------------------------------


def test_counts_are_those_of_python():
    some = some_masks()
    lists = {name: mask.flatten().tolist() for name, mask in some.items()}
    assert masks.kept(some) == {name: sum(values) for name, values in lists.items()}
    assert masks.sizes(some) == {name: len(values) for name, values in lists.items()}
    together = [value for values in lists.values() for value in values]
    assert masks.density(some) == sum(together) / len(together)
    assert masks.flat(some).tolist() == together


def test_composed_masks_keep_what_both_keep():
    a, b = some_masks(1), some_masks(2)
    for name, mask in masks.compose(a, b).items():
        pairs = zip(a[name].flatten().tolist(), b[name].flatten().tolist(), strict=True)
        assert mask.flatten().tolist() == [x and y for x, y in pairs]


def test_an_escape_is_told_by_the_tensors_name():
    outer = some_masks()
    assert masks.escaped(outer, outer) == []
    assert masks.escaped(masks.compose(outer, some_masks(1)), outer) == []
    inner = {name: mask.clone() for name, mask in outer.items()}
    position = (~outer["hidden.weight"]).nonzero()[0]
    inner["hidden.weight"][tuple(position)] = True
    assert masks.escaped(inner, outer) == ["hidden.weight"]
    assert masks.escaped(outer, inner) == []


# -- shuffling --------------------------------------------------------------------------------


class TestShuffling:
    def test_it_permutes_every_tensor_and_keeps_every_count(self):
        some = some_masks()
        shuffled = masks.shuffle(some, seed=0)
        assert masks.kept(shuffled) == masks.kept(some)
        for name, mask in some.items():
            assert shuffled[name].shape == mask.shape
            assert not torch.equal(shuffled[name], mask)

    def test_it_leaves_what_it_is_given_as_it_was(self):
        some = some_masks()
        for shuffled in masks.shuffle(some, seed=0).values():
            shuffled.logical_not_()
        assert all(torch.equal(some[name], mask) for name, mask in some_masks().items())

    def test_the_same_name_gives_the_same_permutation_and_another_another(self):
        some = some_masks()
        first = masks.flat(masks.shuffle(some, seed=0))
        assert torch.equal(masks.flat(masks.shuffle(some, seed=0)), first)
        assert not torch.equal(masks.flat(masks.shuffle(some, seed=1)), first)
        assert not torch.equal(masks.flat(masks.shuffle(some, seed=0, purpose="uniform")), first)

    def test_a_tensors_permutation_depends_on_no_other_tensor(self):
        one, other = some_masks(), some_masks()
        other["conv.weight"] = torch.zeros(2, 2, dtype=torch.bool)
        a, b = masks.shuffle(one, seed=0), masks.shuffle(other, seed=0)
        assert torch.equal(a["hidden.weight"], b["hidden.weight"])
        assert torch.equal(a["output.weight"], b["output.weight"])

    def test_two_tensors_of_one_shape_are_permuted_differently(self):
        mask = torch.arange(40) < 20
        shuffled = masks.shuffle({"a": mask, "b": mask.clone()}, seed=0)
        assert not torch.equal(shuffled["a"], shuffled["b"])

    def test_every_position_is_kept_equally_often(self):
        mask = {"a": (torch.arange(10) < 3).reshape(2, 5)}
        kept = sum(masks.shuffle(mask, seed)["a"].double() for seed in range(2000)) / 2000
        # Of 2,000 draws of probability 0.3: standard deviation 0.0102.
        assert float((kept - 0.3).abs().max()) < 5 * math.sqrt(0.3 * 0.7 / 2000)

    def test_a_full_and_an_empty_mask_stay_what_they_are(self):
        for value in (True, False):
            full = {"a": torch.full((3, 4), value)}
            assert torch.equal(masks.shuffle(full, seed=0)["a"], full["a"])


def test_scattered_masks_keep_the_counts_asked_for_wherever_others_were_kept():
    like, counts = some_masks(), {"conv.weight": 17, "hidden.weight": 1, "output.weight": 21}
    scattered = masks.scatter(counts, like, seed=0)
    assert masks.kept(scattered) == counts
    again = masks.scatter(counts, masks.ones(params(), NAMES), seed=0)
    assert all(torch.equal(scattered[name], again[name]) for name in NAMES)
    assert not torch.equal(masks.flat(masks.scatter(counts, like, seed=1)), masks.flat(scattered))


# -- overlap ----------------------------------------------------------------------------------


def jaccard(a, b):
    return Fraction(len(a & b), len(a | b)) if a | b else Fraction(1)


def positions(mask):
    return {index for index, value in enumerate(mask.flatten().tolist()) if value}


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_overlap_is_the_jaccard_index_of_the_positions(density):
    for seed in range(10):
        a = masks.flat(some_masks(seed, density))
        b = masks.flat(some_masks(seed + 100, 0.3))
        expected = float(jaccard(positions(a), positions(b)))
        assert masks.overlap(a, b) == masks.overlap(b, a) == expected


def test_overlap_at_its_ends():
    mask = torch.tensor([True, False, True])
    empty = torch.zeros(3, dtype=torch.bool)
    assert masks.overlap(mask, mask) == 1.0
    assert masks.overlap(mask, ~mask) == 0.0
    assert masks.overlap(empty, empty) == 1.0
    assert masks.overlap(empty, mask) == 0.0


def every_mask(sizes, counts):
    """Every choice of `counts[i]` positions of tensor i, as sets of (tensor, position)."""
    choices = [
        [
            {(index, position) for position in chosen}
            for chosen in itertools.combinations(range(n), k)
        ]
        for index, (n, k) in enumerate(zip(sizes, counts, strict=True))
    ]
    for parts in itertools.product(*choices):
        yield set().union(*parts)


@pytest.mark.parametrize(
    ("sizes", "a", "b"),
    [
        ([4], [2], [2]),
        ([5], [2], [4]),
        ([1], [1], [1]),
        ([1], [1], [0]),
        ([3], [3], [3]),
        ([3], [0], [2]),
        ([3], [0], [0]),
        ([4, 3], [2, 1], [2, 1]),
        ([4, 3], [1, 3], [3, 0]),
        ([2, 1, 4], [1, 1, 2], [1, 0, 3]),
        ([1, 1], [1, 0], [1, 1]),
    ],
)
def test_chance_overlap_is_the_mean_over_all_masks(sizes, a, b):
    one = next(every_mask(sizes, a))  # by symmetry, any
    values = [jaccard(one, other) for other in every_mask(sizes, b)]
    assert masks.chance_overlap(sizes, a, b) == pytest.approx(float(sum(values) / len(values)))
    assert masks.chance_overlap(sizes, b, a) == pytest.approx(masks.chance_overlap(sizes, a, b))


def test_chance_overlap_is_what_random_masks_have():
    sizes, a, b = [300, 40], [90, 30], [60, 8]
    values = []
    for seed in range(400):
        like = {str(index): torch.ones(size, dtype=torch.bool) for index, size in enumerate(sizes)}
        one = masks.scatter(dict(zip(like, a, strict=True)), like, seed)
        other = masks.scatter(dict(zip(like, b, strict=True)), like, seed, "prune")
        values.append(masks.overlap(masks.flat(one), masks.flat(other)))
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    assert abs(mean - masks.chance_overlap(sizes, a, b)) < 5 * spread / math.sqrt(len(values))


def test_chance_overlap_of_large_masks_is_near_that_of_their_densities():
    """With densities p and q in every tensor it tends to pq / (p + q - pq)."""
    sizes = [235_200, 30_000, 1_000]
    p, q = 0.2, 0.5
    a, b = [round(size * p) for size in sizes], [round(size * q) for size in sizes]
    expected = p * q / (p + q - p * q)
    assert masks.chance_overlap(sizes, a, b) == pytest.approx(expected, rel=1e-4)


def test_equal_counts_of_everything_overlap_wholly():
    assert masks.chance_overlap([7, 5], [7, 5], [7, 5]) == pytest.approx(1.0, abs=1e-12)
