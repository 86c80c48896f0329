"""Masked networks without the channels that do nothing, and the whole ones they came from."""

import pytest
import torch
from networks import NETWORKS, Detached, Shuffled
from test_structure import batch, drawn, tensors
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from windfall import compact, masks, models, seeds, structure


def masked(network, density, seed=0):
    """The tensors of a network all of whose weights but a few are 0."""
    stream = seeds.stream(seed, "test")
    own = tensors(network)
    kinds = models.kinds(network, network.shape)
    mask = {name: torch.from_numpy(stream.random(own[name].shape) < density) for name in kinds}
    return masks.apply(mask, own)


def outputs(network, values, inputs):
    with torch.no_grad():
        return functional_call(network, values, (inputs,))


def same(network, values, inputs, tolerance=1e-12):
    """What compaction finds, its outputs proved."""
    found = compact.compacted(network, tuple(inputs.shape[1:]), values)
    assert found.reason is None
    smaller = structure.given(network, found.tensors)
    expected = outputs(network.eval(), values, inputs)
    with torch.no_grad():
        torch.testing.assert_close(smaller(inputs), expected, rtol=tolerance, atol=tolerance)
    for name, tensor in found.tensors.items():
        assert tensor.dtype == values[name].dtype
        assert tensor.untyped_storage().data_ptr() != values[name].untyped_storage().data_ptr()
    return found


# -- counted by hand -------------------------------------------------------------------------------


def mlp(hidden1, bias1, hidden2, bias2, output):
    """Two inputs, hidden layers of ReLU, and as many outputs as are given."""
    rows = [torch.tensor(w, dtype=torch.float64) for w in (hidden1, hidden2, output)]
    network = nn.Sequential(
        nn.Linear(2, len(rows[0])), nn.ReLU(), nn.Linear(len(rows[0]), len(rows[1])), nn.ReLU(),
        nn.Linear(len(rows[1]), len(rows[2])),
    ).double()  # fmt: skip
    values = {
        "0.weight": rows[0], "0.bias": torch.tensor(bias1, dtype=torch.float64),
        "2.weight": rows[1], "2.bias": torch.tensor(bias2, dtype=torch.float64),
        "4.weight": rows[2], "4.bias": torch.tensor([0.5] * len(rows[2]), dtype=torch.float64),
    }  # fmt: skip
    return network, values


def points(*shape):
    return torch.from_numpy(seeds.stream(5, "test").standard_normal(shape))


def test_units_that_nothing_reads_and_units_that_nothing_makes_go():
    network, values = mlp(
        hidden1=[[1, 2], [0, 0], [3, 0], [0, 0], [1, 1]],
        bias1=[0, 2, 0, -1, 0],
        hidden2=[[1, 3, 0, 5, 0], [-1, 0, 0, 0, 0], [2, 2, 2, 2, 2]],
        bias2=[0.25, 0, 0],
        output=[[1, 1, 0], [2, 0, 0]],
    )
    found = same(network, values, points(20, 2))
    # of the first layer 1 is always 2, and 3 is 0; 2 and 4 feed only unit 2, which nothing reads
    assert found.channels["0.weight"].tolist() == [True, False, False, False, False]
    assert found.channels["2.weight"].tolist() == [True, True, False]
    assert found.removed == {"0.weight": 4, "2.weight": 1}
    assert found.tensors["2.bias"].tolist() == [0.25 + 3 * 2, 0]
    assert found.tensors["2.weight"].tolist() == [[1], [-1]]


def test_a_unit_left_without_inputs_by_another_is_a_constant_too():
    network, values = mlp(
        hidden1=[[0, 0], [1, 1]], bias1=[3, 0],
        hidden2=[[2, 0], [0, 1]], bias2=[-1, 0],
        output=[[7, 1]],
    )  # fmt: skip
    found = same(network, values, points(20, 2))
    assert found.removed == {"0.weight": 1, "2.weight": 1}
    assert found.tensors["4.bias"].tolist() == [0.5 + 7 * (2 * 3 - 1)]


def test_a_layer_never_loses_its_last_unit():
    network, values = mlp([[0, 0], [0, 0]], [1, 2], [[0, 0], [0, 0]], [1, 1], [[0, 0], [0, 0]])
    found = same(network, values, points(4, 2))
    assert [int(stay.sum()) for stay in found.channels.values()] == [1, 1]


def test_a_network_that_uses_everything_keeps_everything():
    network, values = mlp([[1, 0], [0, 1]], [0, 0], [[1, 1], [1, -1]], [0, 0], [[1, 1]])
    found = same(network, values, points(4, 2))
    assert found.removed == {}
    assert all(torch.equal(found.tensors[name], value) for name, value in values.items())


def conv(padding, *, bias, normalized):
    """One input channel, three channels of which the last two have no weights, two channels."""
    norm = [nn.BatchNorm2d(3)] if normalized else []
    with seeds.isolated(0, "test"):
        network = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), *norm, nn.ReLU(),
            nn.Conv2d(3, 2, 3, padding=padding, bias=bias), nn.ReLU(), nn.Flatten(),
            nn.Linear(2 * (36 if padding else 16), 3),
        ).double().eval()  # fmt: skip
    values = {name: tensor.clone() for name, tensor in tensors(network).items()}
    values["0.weight"][1:] = 0
    values["0.bias"] = torch.tensor([0.1, 0.5, -0.5], dtype=torch.float64)
    if normalized:
        values["1.running_mean"] = torch.tensor([0.0, 0.4, 0.4], dtype=torch.float64)
        values["1.running_var"] = torch.tensor([1.0, 0.25, 0.25], dtype=torch.float64)
    return network, values


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    ("padding", "bias", "stay"),
    [
        (0, True, [True, False, False]),  # both constants go, 0.5 (or 0.2) into the bias
        (0, False, [True, True, False]),  # there is no bias; the other is 0 behind the ReLU
        (1, True, [True, True, False]),  # the border sees less of it
    ],
)
def test_a_constant_goes_only_where_it_is_exact(padding, bias, stay, normalized):
    network, values = conv(padding, bias=bias, normalized=normalized)
    found = same(network, values, points(4, 1, 6, 6))
    assert found.channels["0.weight"].tolist() == stay
    if padding == 0 and bias:
        constant = 0.1 / (0.25 + 1e-5) ** 0.5 if normalized else 0.5
        shift = constant * values[f"{3 if normalized else 2}.weight"][:, 1].sum((1, 2))
        before = values[f"{3 if normalized else 2}.bias"]
        after = found.tensors[f"{3 if normalized else 2}.bias"]
        torch.testing.assert_close(after, before + shift, rtol=1e-12, atol=1e-12)


def test_a_constant_that_the_padding_does_not_touch_goes():
    network, values = conv(1, bias=True, normalized=False)
    weight = values["2.weight"]
    weight[:, 1] = 0
    weight[:, 1, 1, 1] = torch.tensor([2.0, -3.0], dtype=torch.float64)
    found = same(network, values, points(4, 1, 6, 6))
    assert found.channels["0.weight"].tolist() == [True, False, False]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.inner, self.back = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 1)
        self.output = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = x + self.back(torch.relu(self.inner(x)))
        return self.output(x.mean((2, 3)))


def residual():
    with seeds.isolated(0, "test"):
        network = Residual().double().eval()
    return network, {name: tensor.clone() for name, tensor in tensors(network).items()}


def test_a_channel_that_only_its_own_block_reads_goes():
    network, values = residual()
    values["output.weight"][:, 2] = 0
    values["inner.weight"][:, 2] = 0
    values["inner.weight"][1, 2] = 1  # inner 1 reads channel 2 ...
    values["back.weight"][:, 1] = 0
    values["back.weight"][2, 1] = 1  # ... and makes nothing else
    found = same(network, values, points(4, 1, 5, 5))
    assert found.channels["first.weight"].tolist() == [True, True, False, True]
    assert found.channels["inner.weight"].tolist() == [True, False, True]


def test_an_added_channel_is_a_constant_when_no_layer_makes_it():
    network, values = residual()
    values["first.weight"][1:3] = 0
    values["back.weight"][2] = 0  # of 1 and 2, which one layer does not make, the other makes 1
    found = same(network, values, points(4, 1, 5, 5))
    assert found.removed == {"first.weight": 1}
    assert found.channels["first.weight"].tolist() == [True, True, False, True]


class Normed(nn.Module):
    """Channels that all others see: by their norm."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.output = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x):
        return self.output(torch.relu(self.b(F.normalize(self.a(x), dim=-1))))


class Shifted(nn.Module):
    """Channels that are the input beside what a layer makes."""

    def __init__(self):
        super().__init__()
        self.a, self.output = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.output(torch.relu(self.a(x) + x.sum(-1, keepdim=True)))


@pytest.mark.parametrize(("build", "kept"), [(Normed, {"b.weight"}), (Shifted, set())])
def test_what_others_see_or_make_is_left_alone(build, kept):
    network = build().double().eval()
    values = {name: tensor.clone() for name, tensor in tensors(network).items()}
    for name, value in values.items():
        if name.endswith("weight"):
            value[:2], value[:, 2:4] = 0, 0
    found = same(network, values, points(4, 6))
    assert "a.weight" not in found.removed
    assert found.removed.keys() == kept


def test_a_layer_that_runs_twice_keeps_a_constant_it_does_not_always_get():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.output = nn.Linear(6, 4), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = self.a(x)
            return self.output(torch.relu(self.b(x)) + torch.relu(self.b(2 * x)))

    network = Twice().double().eval()
    values = {name: tensor.clone() for name, tensor in tensors(network).items()}
    values["a.weight"][:2] = 0
    values["a.bias"][:2] = torch.tensor([0.0, 1.0])
    found = same(network, values, points(4, 6))
    assert found.channels.get("a.weight", torch.ones(4)).tolist()[1:] == [1, 1, 1]


# -- the brute-force twin --------------------------------------------------------------------------


SLOW = ("preresnet-164", "densenet-40")
CASES = [
    pytest.param(name, density, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in NETWORKS
    for density in (0.3, 0.03)
    if density < 0.1 or name not in SLOW
]


@pytest.mark.parametrize(("name", "density"), CASES)
def test_a_compacted_network_computes_what_the_masked_one_does(name, density):
    build, shape = NETWORKS[name]
    network = drawn(build)
    network.shape = shape
    for precision, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        network = network.to(precision)
        values = masked(network, density)
        inputs = batch(shape).to(precision)
        found = compact.compacted(network, shape, values)
        expected = outputs(network, values, inputs)
        smaller = structure.given(network, found.tensors)
        with torch.no_grad():
            difference = (smaller(inputs) - expected).abs().max()
        assert difference <= tolerance * max(1, float(expected.abs().max()))
        if density < 0.1:
            assert sum(found.removed.values()) > 0
        again = compact.compacted(smaller, shape, found.tensors) if found.removed else found
        assert again.reason or again.removed == {} or again is found, "it is no fixpoint"


@pytest.mark.parametrize(("build", "shape"), [(Detached, (6,)), (lambda: nn.Linear(6, 5), (6,))])
def test_a_network_that_cannot_be_followed_stays_whole(build, shape):
    network = build()
    found = compact.compacted(network, shape, tensors(network))
    assert "`model` must be a network whose channels can be followed" in found.reason
    assert (found.channels, found.removed) == ({}, {})
    assert all(torch.equal(found.tensors[n], tensor) for n, tensor in tensors(network).items())


def test_channels_that_change_places_are_left_where_they_are():
    network = drawn(Shuffled)
    network.shape = (3, 6, 6)
    found = same(network, masked(network, 0.05), batch((3, 6, 6)), 1e-11)
    assert set(found.channels) == {"b.weight"}
