"""Each illness in a network that has exactly it, and not in one that has not."""

import itertools
import math
import re

import pytest
import torch
from torch import nn

from windfall import diagnosis, seeds, signals

NUM_CLASSES, WIDTH = 4, 60


def normal(*shape, seed=0):
    draws = seeds.stream(seed, "test-diagnosis").standard_normal(shape)
    return torch.from_numpy(draws).float()


def layer(size, wide, seed, factor=1.0, variance=2.0, bias=0.0):
    """A layer of variance `variance` / fan_in, times a factor."""
    made = nn.Linear(size, wide)
    made.weight.data = factor * math.sqrt(variance / size) * normal(wide, size, seed=seed)
    made.bias.data.fill_(bias)
    return made


def network(depth=6, factor=1.0, variance=2.0, head=0.5, act=nn.ReLU, norm=False, width=WIDTH):
    """Fully connected, He's weights by default, an output layer of half their variance."""
    parts, size = [], 20
    for index in range(depth):
        parts += [layer(size, width, index + 1, factor, variance), act()]
        if norm:
            parts[-2].bias = None
            parts.insert(-1, nn.BatchNorm1d(width))
        size = width
    return nn.Sequential(*parts, layer(size, NUM_CLASSES, depth + 1, head))


def document(made, inputs=None, *, labels=True, number=64):
    inputs = normal(number, 20) if inputs is None else inputs
    given = torch.arange(len(inputs)) % NUM_CLASSES if labels else None
    return signals.measured(made, inputs, given, num_jacobians=0).document()


def found(made, inputs=None, **options):
    return {each.kind: each for each in diagnosis.diagnosed(document(made, inputs, **options))}


def one_layer(place, **changes):
    """A healthy network one of whose layers is changed."""
    made = network()
    for name, change in changes.items():
        getattr(made[place], name).data = change(getattr(made[place], name).data)
    return made


def biased_before_norm():
    made = network(norm=True)
    made[3].bias = nn.Parameter(torch.zeros(WIDTH))
    return made


def scaled_before_norm(factor):
    made = network(norm=True)
    made[3].weight.data *= factor
    return made


def biased(depth):
    """The constructor's own weights, of a third of 1 / fan_in, and biases: inputs become alike."""
    with seeds.isolated(0, "test"):
        sizes = [20, *[WIDTH] * depth]
        parts = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    layers = [part for one in parts for part in (one, nn.ReLU())]
    return nn.Sequential(*layers, layer(WIDTH, NUM_CLASSES, 99, 0.5))


HEALTHY = {
    "He's": (network(), None),
    "He's, deep": (network(40), None),
    "He's, narrow to wide": (network(3, width=400), None),
    "a linear classifier": (nn.Linear(20, NUM_CLASSES), None),
    "a linear classifier of inputs that are random": (layer(20, NUM_CLASSES, 1), None),
    "twenty layers by Glorot": (network(20, variance=1.0), None),
    "BatchNorm": (network(10, norm=True), None),
    "BatchNorm with scales of ten": (scaled_before_norm(10.0), None),
    "tanh": (network(6, variance=1.0, act=nn.Tanh), None),
    "half the units dead": (
        one_layer(4, bias=lambda b: torch.where(torch.arange(WIDTH) < WIDTH // 2, -50.0, b)), None
    ),
    "inputs a little off": (network(), 0.2 + 1.3 * normal(64, 20)),
}  # fmt: skip

ILL = {
    "exploding both ways": (
        network(20, factor=3.0),
        None,
        {"exploding-forward", "exploding-backward"},
    ),
    "one exploding layer": (
        one_layer(4, weight=lambda w: 1e5 * w),
        None,
        {"exploding-forward", "exploding-backward"},
    ),
    "vanishing both ways": (
        network(40, variance=1.0),
        None,
        {"vanishing-forward", "vanishing-backward"},
    ),
    "gradients that explode through BatchNorm": (
        network(70, norm=True),
        None,
        {"exploding-backward"},
    ),
    "gradients that vanish, and differences with them": (
        network(10, act=nn.Sigmoid),
        None,
        {"vanishing-backward", "alike"},
    ),
    "a layer of zeros": (
        one_layer(4, weight=torch.zeros_like),
        None,
        {"vanishing-forward", "vanishing-backward"},
    ),
    "dead units": (one_layer(4, bias=lambda b: b - 50), None, {"dead"}),
    "nine tenths dead": (
        one_layer(4, bias=lambda b: torch.where(torch.arange(WIDTH) < 54, -50.0, b)),
        None,
        {"dead"},
    ),
    "a large head": (network(head=20.0), None, {"head"}),
    "a small head": (network(head=1e-4), None, {"head"}),
    "a head of zeros": (network(head=0.0), None, {"head"}),
    "inputs with a mean": (network(), 3 + normal(64, 20), {"inputs"}),
    "inputs as bytes": (network(), 255 * normal(64, 20).abs().clamp(max=1), {"inputs"}),
    "inputs of small deviation": (network(), 0.1 * normal(64, 20), {"inputs"}),
    "a bias before BatchNorm": (biased_before_norm(), None, {"bias-before-norm"}),
    "large weights before BatchNorm": (scaled_before_norm(1e3), None, {"scale-before-norm"}),
    "small weights before BatchNorm": (scaled_before_norm(1e-3), None, {"scale-before-norm"}),
    "inputs that become alike": (biased(9), None, {"alike"}),
    "an overflow": (network(30, factor=1e3), None, {"overflow"}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_network_has_nothing(name):
    made, inputs = HEALTHY[name]
    told = document(made, inputs)
    assert diagnosis.diagnosed(told) == []
    (lead,) = diagnosis.answer(told, [])
    assert lead.startswith("All is well: ")
    assert "the loss is" in lead


@pytest.mark.parametrize("name", ILL)
def test_an_illness_is_found_and_nothing_else(name):
    made, inputs, kinds = ILL[name]
    assert set(found(made, inputs)) == kinds


def test_it_is_told_where_it_begins_and_what_its_numbers_ask_for():
    made = network(20, factor=3.0)
    each = found(made)
    first = document(made)
    at = next(r["name"] for r in first["layers"] if r["scale"] > 1e4 * first["inputs"]["scale"])
    assert each["exploding-forward"].layers == (at,)
    told = re.search(r"multiplies the scale by ([\d.]+): divide", each["exploding-forward"].remedy)
    assert float(told[1]) == pytest.approx(3.0, rel=0.1)
    lone = found(one_layer(4, weight=lambda w: 1e5 * w))["exploding-forward"]
    assert lone.remedy.startswith("Divide the weights of `4` by 14")
    halved = found(network(40, variance=1.0))
    told = re.search(r"the scale by ([\d.]+): divide", halved["vanishing-forward"].remedy)
    assert float(told[1]) == pytest.approx(2**-0.5, rel=0.05)
    told = re.search(r"the gradient by ([\d.]+)", halved["vanishing-backward"].remedy)
    assert float(told[1]) == pytest.approx(2**-0.5, rel=0.05)


def test_a_remedy_that_is_followed_cures():
    made = network(20, factor=3.0)
    for part in made[:-1]:
        if isinstance(part, nn.Linear):
            part.weight.data /= 3.0
    assert found(made) == {}
    made = network(head=20.0)
    gain = document(made)["layers"][-1]["gain"]
    made[-1].weight.data /= gain
    assert found(made) == {}
    made = scaled_before_norm(1e3)
    made[3].weight.data /= next(r["gain"] for r in document(made)["layers"] if r["name"] == "3")
    assert found(made) == {}


def test_an_overflow_names_its_layer_and_hides_what_follows_from_it():
    (each,) = diagnosis.diagnosed(told := document(network(30, factor=1e3)))
    first = next(row for row in told["layers"] if row["nonfinite"])
    assert each.layers == (first["name"],)
    assert f"`{first['name']}`: its outputs are {first['nonfinite']}" in each.told
    assert "multiplies the scale by" in each.remedy


def test_a_trained_network_may_have_large_outputs():
    made, inputs = nn.Linear(20, NUM_CLASSES), normal(64, 20)
    labels = inputs[:, :NUM_CLASSES].argmax(1)
    made.weight.data = 20 * torch.eye(NUM_CLASSES, 20)
    made.bias.data.zero_()
    told = signals.measured(made, inputs, labels).document()
    assert diagnosis.diagnosed(told) == []
    assert [each.kind for each in diagnosis.diagnosed(document(made, inputs, labels=False))] == [
        "head"
    ]


def test_what_is_only_useless_leaves_a_network_well():
    told = document(biased_before_norm())
    each = diagnosis.diagnosed(told)
    assert [one.is_serious for one in each] == [False]
    lead, more = diagnosis.answer(told, each)
    assert lead.startswith("All is well: ")
    assert "bias=False" in more
    assert each[0].to_json()["layers"] == ["3"]


def test_the_headline_lists_what_ails_and_a_remedy_is_told_once():
    made = network(head=20.0)
    told = document(made, 3 + normal(64, 20))
    each = diagnosis.diagnosed(told)
    lead, *more = diagnosis.answer(told, each)
    assert lead == (
        "This network is ill: its inputs are not normalized and its output layer is scaled badly."
    )
    assert len(more) == len(each) == 2
    same = diagnosis.answer(told, [each[0], each[0]])
    assert same[1].endswith(each[0].remedy)
    assert not same[2].endswith(each[0].remedy)


def test_only_the_relu_that_dies_is_named_and_its_biases_cure_it():
    made = one_layer(4, bias=lambda b: b - 50)
    assert found(made)["dead"].layers == ("5",)
    assert "`5` 100 %" in found(made)["dead"].told
    made[4].bias.data += 50
    assert found(made) == {}
