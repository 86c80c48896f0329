"""Norms of signals at initialization: against plain loops, and the values of the reference run."""

import math

import pytest
import torch

from windfall import propagation, seeds
from windfall.beginnings import Growth, Propagation


def points(num, dimension, seed=0):
    return torch.from_numpy(seeds.stream(seed, "points").standard_normal((num, dimension)))


@pytest.mark.parametrize("scaling", ["he", "glorot"])
def test_norms_are_those_of_a_network_point_by_point(scaling):
    """Brute force: the same weights in a torch network, gradients by autograd, one point a time."""
    width, depth, dimension, num_outputs = 19, 3, 5, 4
    inputs = points(6, dimension)
    found = propagation.propagate(width, depth, inputs, scaling, num_outputs, seed=2)
    std = math.sqrt({"he": 2, "glorot": 1}[scaling] / width)

    def drawn(layer, shape):
        return torch.from_numpy(seeds.stream(2, "propagation", layer).standard_normal(shape))

    sizes = [dimension, *[width] * depth]
    weights = [
        (std * drawn(layer + 1, (width, sizes[layer]))).requires_grad_() for layer in range(depth)
    ]
    output = drawn(0, (num_outputs, width))
    targets = torch.from_numpy(seeds.stream(2, "targets").uniform(size=(6, num_outputs)))
    for place, (x, target) in enumerate(zip(inputs, targets / targets.sum(1, True), strict=True)):
        values, made = x, []
        for weight in weights:
            values = (weight @ values).relu()
            values.retain_grad()
            made.append(values)
        for weight in weights:
            weight.grad = None
        loss = -(target * (output @ values).log_softmax(0)).sum()
        loss.backward()
        error = float((made[-1].grad * (made[-1] > 0)).norm())
        for layer in range(depth):
            ratio = float(made[layer].detach().norm() / x.norm())
            assert float(found.forward[layer, place]) == pytest.approx(ratio)
            norm = float(weights[layer].grad.norm()) / (float(x.norm()) * error)
            assert float(found.backward[layer, place]) == pytest.approx(norm)


def test_the_bound_and_the_width_that_it_needs_are_the_codes():
    widths = {100: 90.8, 500: 1.95, 1000: 0.743, 2000: 0.325, 4000: 0.152}
    for width, epsilon in widths.items():
        assert propagation.bound(width, 10, 2000) == pytest.approx(epsilon, rel=4e-3)
    for epsilon, width in {0.1: 5966, 0.15: 4060, 0.5: 1380, 1.0: 796}.items():
        needed = propagation.needed_width(epsilon, 10, 2000)
        assert abs(needed - width) <= 1  # the reference rounds down
        assert (
            propagation.bound(needed, 10, 2000) <= epsilon < propagation.bound(needed - 1, 10, 2000)
        )


def test_he_keeps_norms_and_glorot_halves_their_squares():
    ratios = {"he": [], "glorot": []}
    for scaling, found in ratios.items():
        for seed in range(5):
            readings = Propagation(width=300, num_points=100, scaling=scaling).run(seed)
            found.append(float(readings.values["forward-ratio"][0]))
    he, glorot = (sum(found) / len(found) for found in ratios.values())
    assert he == pytest.approx(1, abs=0.15)
    assert glorot == pytest.approx(2**-5, rel=0.15)


def test_wider_networks_keep_norms_better_and_means_lie_below_the_bound():
    narrow, wide = (
        [Propagation(width=width, num_points=100).run(seed).values for seed in range(4)]
        for width in (50, 800)
    )
    means = [sum(float(v["forward-deviation"][0]) for v in each) / 4 for each in (narrow, wide)]
    assert means[1] < means[0] / 2
    for values in (*narrow, *wide):
        assert float(values["forward-deviation"][0]) < float(values["bound"][0])


def test_readings_have_the_names_that_are_promised():
    probe = Propagation(width=20, depth=3, num_points=5, dimension=4)
    assert set(probe.run(0).values) == set(probe.metrics())
    again, other = probe.run(0), probe.run(1)
    assert again.values == probe.run(0).values
    assert again.values["forward-ratio"] != other.values["forward-ratio"]


# -- residual networks ------------------------------------------------------------------------


@pytest.mark.parametrize("gains", ["proposed", "one"])
def test_residual_growth_is_that_of_the_formula_layer_by_layer(gains):
    inputs = points(3, 4)
    found = propagation.residual_growth(4, 3, inputs, gains, seed=5)
    first, second = {"proposed": (2**0.5, 3**-0.5), "one": (1.0, 1.0)}[gains]

    def drawn(layer):
        q, r = torch.linalg.qr(
            torch.from_numpy(seeds.stream(5, "residual-growth", layer).standard_normal((4, 4)))
        )
        return q * r.diagonal().sign()

    for place, x in enumerate(inputs):
        values = x
        for block in range(3):
            inner = (first * drawn(2 * block) @ values).clamp(min=0)
            values = values + second * drawn(2 * block + 1) @ inner
        assert float(found[place]) == pytest.approx(float(values.norm() / x.norm()))


@pytest.mark.parametrize("blocks", [1, 2, 5, 10, 100])
def test_proposed_gains_grow_as_theory_within_five_percent(blocks):
    ratios = [Growth(blocks=blocks).run(seed).values["growth-ratio"] for seed in range(5)]
    assert float(sum(ratios) / 5) == pytest.approx(1, abs=0.05)
    assert propagation.residual_theory(100, "proposed") == pytest.approx(
        math.log10(1.645), abs=1e-3
    )


def test_what_overflows_is_a_finding_and_no_crash():
    found = Growth(blocks=600, width=20, num_points=5, gains="one").run(0).values
    assert float(found["overflows"]) == 1
    assert float(found["log-growth"]) == 38.5
    assert float(found["growth-ratio"]) == 0
    whole = Growth(blocks=40, gains="one").run(0).values
    assert float(whole["log-growth"]) == pytest.approx(math.log10(3325), abs=0.3)
    assert set(whole) == set(Growth().metrics())
