"""Curvature against the whole Hessian of tiny networks, by autograd in float64."""

import copy
import itertools
import math

import pytest
import torch
from torch.func import functional_call, hessian
from torch.nn import functional
from torch.testing import assert_close

from windfall import curvature, models, seeds

LOSSES = ("squared-error", "cross-entropy")
HIDDEN = [(), (5,), (4, 3), (3, 4, 2)]
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def network(hidden, seed, num_inputs=3, num_outputs=4):
    sizes, params = (num_inputs, *hidden, num_outputs), {}
    names = [*(f"hidden{i}" for i in range(1, len(hidden) + 1)), "output"]
    draw = seeds.stream(seed, "init")
    for name, (fan_in, size) in zip(names, itertools.pairwise(sizes), strict=True):
        params[f"{name}.weight"] = torch.from_numpy(draw.standard_normal((size, fan_in)))
        params[f"{name}.bias"] = torch.from_numpy(0.5 * draw.standard_normal(size))
    return params


def gaussian(num=30, size=3, seed=0):
    return torch.from_numpy(seeds.stream(seed, "inputs").standard_normal((num, size)))


def case(hidden=(4, 3)):
    return network(hidden, 0), network((2,), 1), gaussian()


def whole(params, goal, inputs, loss):
    """The Hessian [parameter, parameter], an entry at a time."""
    module = models.Mlp(hidden=tuple(len(v) for n, v in params.items() if "bias" in n)[:-1])
    aim = models.Mlp(hidden=tuple(len(v) for n, v in goal.items() if "bias" in n)[:-1])
    module, aim = (mlp.build((3,), 4).double() for mlp in (module, aim))
    answers = functional_call(aim, goal, (inputs,)).detach()
    shapes = {name: value.shape for name, value in params.items()}

    def loss_of(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        made = {n: part.reshape(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}
        outputs = functional_call(module, made, (inputs,))
        if loss == "squared-error":
            return (outputs - answers).square().mean()
        return functional.cross_entropy(outputs, answers.argmax(1))

    return hessian(loss_of)(torch.cat([value.flatten() for value in params.values()]))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
class TestAgainstTheWholeHessian:
    def test_the_top_eigenvalues_are_those_of_the_matrix(self, hidden, loss):
        params, goal, inputs = case(hidden)
        expected = torch.linalg.eigvalsh(whole(params, goal, inputs, loss)).flip(0)[:5]
        assert_close(curvature.hessian_top(params, goal, inputs, loss), expected, **CLOSE)

    def test_the_trace_is_the_sum_of_the_diagonal(self, hidden, loss, monkeypatch):
        params, goal, inputs = case(hidden)
        expected = float(whole(params, goal, inputs, loss).trace())
        assert curvature.trace(params, inputs, loss) == pytest.approx(expected, rel=1e-8)
        monkeypatch.setattr(curvature, "NUM_AT_ONCE", 7)
        assert curvature.trace(params, inputs, loss) == pytest.approx(expected, rel=1e-8)


def test_a_linear_network_bends_as_its_inputs_are_long():
    params = {"output.weight": torch.tensor([[1.0, -2.0]]), "output.bias": torch.tensor([0.5])}
    inputs = torch.tensor([[3.0, 4.0]])
    top = curvature.hessian_top(params, params, inputs, "squared-error", num=2)
    assert_close(top, torch.tensor([52.0, 0.0]).double(), rtol=0, atol=1e-10)  # 2 (9 + 16 + 1)
    assert curvature.trace(params, inputs, "squared-error") == pytest.approx(52)


def test_nothing_is_drawn_from_global_generators_and_all_is_the_same_again():
    params, goal, inputs = case()
    before = seeds.generators()
    pair = [curvature.hessian_top(params, goal, inputs, "squared-error") for _ in range(2)]
    assert torch.equal(*pair)
    # Products span one dimension of nine: the method has to go on from random vectors.
    line = {"output.weight": torch.ones(1, 8).double(), "output.bias": torch.ones(1).double()}
    inputs = torch.arange(8.0).double()[None]
    one, other = (curvature.hessian_top(line, line, inputs, "squared-error") for _ in range(2))
    assert one[0] == pytest.approx(2 * 141)
    assert torch.equal(one, other)
    assert seeds.generators() == before


def test_single_precision_and_gradients_are_taken_to_double_precision_without():
    params, goal, inputs = case()
    single = {name: value.float() for name, value in params.items()}
    double = {name: value.double() for name, value in single.items()}
    leaves = {name: value.requires_grad_() for name, value in single.items()}
    for made in ("hessian_top", "trace"):
        rest = (goal, inputs) if made == "hessian_top" else (inputs,)
        found, expected = (
            getattr(curvature, made)(p, *rest, "squared-error") for p in (leaves, double)
        )
        assert_close(found, expected, rtol=0, atol=0)


# -- what is refused --------------------------------------------------------------------------


def broken(**changed):
    return network((4, 3), 0) | changed


@pytest.mark.parametrize(
    ("params", "goal", "options", "message"),
    [
        ({}, network((2,), 1, num_outputs=5), {}, "`goal` must have the network's 4 outputs; got"),
        ({}, network((2,), 1, num_inputs=2), {}, "`goal` must have the network's 3 inputs; got 2"),
        ({"hidden1_norm.weight": torch.ones(4)}, None, {}, "`params` must be weights and biases"),
        ({"hidden1.weight": torch.ones(4, 3, 3, 3)}, None, {}, "fully connected layers alone"),
        ({"output.bias": torch.full((4,), math.nan)}, None, {}, "finite; got nan or inf in `outp"),
        ({}, None, {"loss": "hinge"}, r"`loss` must be one of \['squared-error', .*; got 'hinge'"),
        ({}, None, {"num": 0}, r"`num` must lie in \[1, 46\], below the parameters; got 0"),
        ({}, None, {"num": 47}, r"`num` must lie in \[1, 46\], below the parameters; got 47"),
    ],
)
def test_what_the_hessian_does_not_fit_is_refused(params, goal, options, message):
    goal = goal or network((2,), 1)
    with pytest.raises(ValueError, match=message):
        curvature.hessian_top(
            broken(**params), goal, gaussian(), **({"loss": "squared-error"} | options)
        )


def test_a_trace_is_refused_where_it_cannot_be():
    params, _, inputs = case()
    with pytest.raises(ValueError, match="`loss` must be one of"):
        curvature.trace(params, inputs, "hinge")
    with pytest.raises(ValueError, match="nan or inf in `output"):
        curvature.trace(broken(**{"output.bias": torch.full((4,), math.inf)}), inputs, LOSSES[0])


def flat_hessian(network, inputs, labels):
    """The Hessian [parameter, parameter] of any network's mean cross-entropy."""
    named = dict(network.named_parameters())
    sizes = {name: value.shape for name, value in named.items()}

    def loss_of(flat):
        parts = flat.split([size.numel() for size in sizes.values()])
        made = {n: part.reshape(s) for (n, s), part in zip(sizes.items(), parts, strict=True)}
        return functional.cross_entropy(functional_call(network, made, (inputs,)), labels)

    return hessian(loss_of)(torch.cat([value.detach().flatten() for value in named.values()]))


class ByHand(torch.nn.Module):
    """A BatchNorm of elementary operations, whose forward derivatives are right."""

    def __init__(self, other):
        super().__init__()
        self.weight, self.bias, self.eps = other.weight, other.bias, other.eps

    def forward(self, inputs):
        away = inputs - inputs.mean((0, 2, 3), keepdim=True)
        scaled = away / (away.square().mean((0, 2, 3), keepdim=True) + self.eps).sqrt()
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]


def by_hand(network):
    made = copy.deepcopy(network)
    for path, part in network.named_modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            made.set_submodule(path, ByHand(made.get_submodule(path)))
    return made


class TestSpectralNorm:
    @pytest.mark.parametrize("norm", ["none", "weight", "batch"])
    def test_it_is_the_largest_size_of_an_eigenvalue_of_the_matrix(self, norm):
        model = models.Preresnet_110(width=1 / 16, blocks=1, norm=norm)
        with seeds.isolated(0, "init"):
            network = model.build((1, 4, 4), 3).double().train()
        inputs = gaussian(40, 16).reshape(40, 1, 4, 4)
        labels = torch.arange(40) % 3
        values = torch.linalg.eigvalsh(flat_hessian(by_hand(network), inputs, labels))
        before = {name: value.clone() for name, value in network.state_dict().items()}
        found = curvature.spectral_norm(network, inputs, labels)
        assert found == pytest.approx(float(values.abs().max()), rel=1e-5)
        for name, value in before.items():
            assert torch.equal(network.state_dict()[name], value)

    def test_a_negative_eigenvalue_counts_by_its_size(self):
        network = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 2, bias=False))
        with torch.no_grad():
            for weight, value in zip(network.parameters(), (1e-6, 0.0, 1e-6), strict=True):
                weight.fill_(value)
        network = network.double()
        inputs, labels = torch.tensor([[9.0], [3.0]]).double(), torch.tensor([0, 0])
        values = torch.linalg.eigvalsh(flat_hessian(network, inputs, labels))
        found = curvature.spectral_norm(network, inputs, labels)
        assert found == pytest.approx(float(-values.min()), rel=1e-4)
        assert found > 0

    def test_a_loss_that_does_not_bend_has_none_and_one_that_overflows_is_told(self):
        network = torch.nn.Linear(2, 1).double()  # one class: the loss is 0 everywhere
        inputs, labels = torch.ones(3, 2), torch.zeros(3).long()
        assert curvature.spectral_norm(network, inputs, labels) == 0
        huge = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(9)])
        with torch.no_grad():
            for weight in huge.parameters():
                weight.fill_(1e38)
        assert curvature.spectral_norm(huge, 1e38 * inputs, labels) == math.inf
