"""The signs of BatchNorm's biases and what ReLUs pass, beside what a loop over samples finds."""

import networks
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from windfall import biases, models, seeds, structure
from windfall.biases import Signs
from windfall.spec import SpecError


def drawn(network, seed=0):
    """A network all of whose tensors are random, so that its ReLUs pass some of everything."""
    draws = seeds.stream(seed, "test-biases")
    for name, tensor in structure.tensors(network).items():
        if tensor.is_floating_point():
            values = torch.from_numpy(draws.normal(0, 0.5, tuple(tensor.shape)))
            tensor.data = values.abs() + 0.5 if name.endswith("running_var") else values
    return network.double()


def images(number=5, shape=(3, 8, 8), seed=0):
    return torch.from_numpy(seeds.stream(seed, "test-images").normal(size=(number, *shape)))


class Block(nn.Module):
    """As torchvision's: one ReLU module called twice, in place, the sum written into a norm's."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Functional(nn.Module):
    """ReLUs in every spelling."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Sequential(nn.ReLU())
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = F.relu(self.a(x)) * F.relu(self.gate)
        x = torch.relu(x - 0.2)
        x = (x - 0.1).relu_()
        x = F.relu(F.dropout(self.b(x), training=self.training), inplace=True)
        return self.act(F.max_pool2d(self.b(x), 2))


def loop(network, inputs, module):
    """What a module's outputs have above 0, one input, channel and position at a time."""
    made = []
    handle = module.register_forward_hook(lambda part, args, out: made.append(out.clone()))
    with torch.no_grad():
        for one in inputs:
            network.eval()(one[None])
    handle.remove()
    num_calls = len(made) // len(inputs)
    found = []
    for call in range(num_calls):
        outputs = torch.cat(made[call::num_calls])
        channels = range(outputs.shape[1])
        counts = [sum(v > 0 for v in outputs[:, c].flatten().tolist()) for c in channels]
        found.append([count / outputs[:, 0].numel() for count in counts])
    return found


# -- the signs of biases ---------------------------------------------------------------------------


def test_signs_are_counted_layer_by_layer_and_zeros_apart():
    network = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2))
    network[0].bias.data = torch.tensor([-1.0, 0.0, -0.0, 2.0])
    network[3].bias.data = torch.tensor([-1e-30, -3.0])
    found = biases.signs(network.state_dict())
    assert found == {"0": Signs(1, 2, 4), "3": Signs(2, 0, 2)}
    assert found["0"].share == 0.25
    assert biases.total(found.values()) == Signs(3, 2, 6)


def test_only_batchnorm_counts_and_in_the_order_of_the_network():
    network = models.Resnet_20(width=0.25).build((3, 8, 8), 4)
    names = [n for n, part in network.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert list(biases.signs(structure.tensors(network))) == names
    assert all(each.share == 0 and each.num_zero == each.num_biases for each in
               biases.signs(network.state_dict()).values())  # fmt: skip
    assert biases.signs(nn.BatchNorm1d(3).state_dict()) == {"": Signs(0, 3, 3)}


def test_a_layer_without_channels_is_left_out():
    params = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).state_dict()
    params |= {"1.bias": torch.ones(0), "1.running_mean": torch.ones(0)}
    assert list(biases.signs(params)) == ["0"]


NORM = nn.BatchNorm1d(2).state_dict()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (nn.Linear(2, 2).state_dict(), "must have BatchNorm layers.* got 2 tensors without"),
        ({}, "got 0 tensors"),
        (nn.LayerNorm(2).state_dict(), "must have BatchNorm layers"),
        (nn.BatchNorm1d(2, affine=False).state_dict(), "`bias` must be there.*without biases"),
        ({**NORM, "bias": torch.ones(3)}, r"floating numbers of the shape \[2\].* \[3\]"),
        ({**NORM, "bias": torch.ones(2, dtype=torch.int64)}, "torch.int64"),
        ({**NORM, "bias": torch.ones(2, device="meta")}, "floating numbers"),
        ({**NORM, "bias": torch.tensor([1.0, float("nan")])}, "finite.*diverged"),
    ],
)
def test_other_params_are_refused(params, message):
    with pytest.raises(SpecError, match=message):
        biases.signs(params)


# -- what passes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_what_passes_is_what_a_loop_over_samples_counts(batch_size):
    network, inputs = drawn(models.Resnet_20(width=0.25).build((3, 8, 8), 4)), images()
    found = {each.name: each for each in biases.passed(network, inputs, batch_size=batch_size)}
    parts = {name: part for name, part in network.named_modules() if isinstance(part, nn.ReLU)}
    assert list(found) == list(parts)  # every one ran once, in this order
    for name, part in parts.items():
        assert [found[name].shares.tolist()] == loop(network, inputs, part)
    shares = torch.cat([each.shares for each in found.values()])
    assert 0 < shares.mean() < 1
    assert found["relu1"].share == pytest.approx(float(found["relu1"].shares.mean()))


def test_two_calls_of_one_module_are_told_apart():
    network, inputs = drawn(Block()), images()
    first, second = biases.passed(network, inputs, batch_size=2)
    assert (first.name, second.name) == ("relu", "relu[2]")
    assert [first.shares.tolist(), second.shares.tolist()] == loop(network, inputs, network.relu)
    assert first.shares.tolist() != second.shares.tolist()


def test_a_relu_is_paired_with_the_norm_that_it_reads_as_it_is():
    found = biases.passed(drawn(Block()), images())
    assert [each.norm for each in found] == ["bn1", None]  # the sum was written into bn2's outputs
    pairs = biases.pairs(("bn1", "bn2"), found)
    assert pairs == {"bn1": found[0], "bn2": None}


def test_every_spelling_of_a_relu_is_found():
    network, inputs = drawn(Functional()), images()
    network.train()
    found = biases.passed(network, inputs, batch_size=2)
    names = ["relu", "relu[2]", "relu[3]", "relu[4]", "act.0"]
    assert [(each.name, each.norm) for each in found] == [
        *zip(names, ["a", None, None, "b", None], strict=True)
    ]
    assert [found[-1].shares.tolist()] == loop(network, inputs, network.act)
    with torch.no_grad():
        first = (network.a(inputs) > 0).double().mean((0, 2, 3))
    torch.testing.assert_close(found[0].shares, first)


def test_the_network_is_left_as_it_was():
    network, inputs = drawn(Functional()), images()
    network.train()
    network.b.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    drawn_from = seeds.generators()
    biases.passed(network, inputs)
    assert seeds.generators() == drawn_from
    assert [part.training for part in (network, network.a, network.b)] == [True, True, False]
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_linear_layers_have_a_position_for_each_input():
    network = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()).double()
    network[0].bias.data = torch.tensor([-1.0, 0.5], dtype=torch.float64)
    inputs = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.5, -1.0], [3.0, 9.0]])
    (relu,) = biases.passed(network, inputs.double())
    assert (relu.name, relu.norm) == ("1", "0")
    assert relu.shares.tolist() == [0.5, 0.75]


@pytest.mark.parametrize("name", ["vgg-16", "resnet-20", "preresnet-164", "densenet-40", "grouped"])
def test_the_networks_of_the_zoo_say_who_reads_whom(name):
    build, shape = networks.NETWORKS[name]
    network = build()
    found = biases.passed(network, torch.zeros(1, *shape))
    pairs = biases.pairs(biases.signs(structure.tensors(network)), found)
    alone = {layer for layer, relu in pairs.items() if relu is None}
    inner = "norm2", "shortcut.norm"  # a residual block's, before its sum
    assert alone == {n for n in pairs if name == "resnet-20" and n.endswith(inner)}


def test_a_network_without_relus_has_none_and_bad_inputs_are_refused():
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Tanh())
    assert biases.passed(network, torch.zeros(3, 2)) == []
    with pytest.raises(SpecError, match=r"accept inputs of shape \[3, 5\].*raised"):
        biases.passed(network, torch.zeros(3, 5))
    with pytest.raises(SpecError, match="at least one; got none"):
        biases.passed(network, torch.zeros(0, 2))
    with pytest.raises(SpecError, match="`batch_size` must be at least 1; got 0"):
        biases.passed(network, torch.zeros(3, 2), batch_size=0)


# -- side by side ----------------------------------------------------------------------------------


def relu(name, shares, norm=None):
    return biases.Relu(name, torch.tensor(shares, dtype=torch.float64), norm)


def test_of_several_relus_that_read_a_layer_the_first_is_its_pair():
    first, second = relu("r", [0.5], "a"), relu("s", [0.1], "a")
    assert biases.pairs(["a", "b"], [relu("q", [0.3]), first, second]) == {"a": first, "b": None}


def test_the_summary_by_hand_its_middle_layer_in_the_lower_half():
    found = {"a": Signs(1, 1, 2), "b": Signs(0, 0, 2), "c": Signs(3, 0, 4)}
    relus = [relu("r", [0.5, 0.7], "a"), relu("s", [0.1, 0.2, 0.3, 0.4], "c")]
    assert biases.summary(found, relus) == pytest.approx({
        "negative": 4 / 8, "negative/lower": 1 / 4, "negative/upper": 3 / 4,
        "negative/a": 1 / 2, "negative/b": 0.0, "negative/c": 3 / 4,
        "passes": 2.2 / 6, "passes/lower": 0.6, "passes/upper": 0.25,
        "passes/r": 0.6, "passes/s": 0.25,
    })  # fmt: skip


def test_a_summary_has_no_number_that_is_not_known():
    found = biases.summary({"upper": Signs(1, 0, 4)})
    assert found == {"negative": 0.25, "negative/lower": 0.25, "negative/upper": 0.25}
    assert biases.summary({"a": Signs(1, 0, 4)}).keys() == {
        "negative", "negative/lower", "negative/a",
    }  # fmt: skip


def test_the_document_has_bias_signs_and_what_passes_side_by_side():
    found = {"a": Signs(1, 1, 2), "b": Signs(0, 0, 2)}
    told = biases.document(found, [relu("r", [0.5, 0.7], "a"), relu("s", [0.5])])
    first, second = told["layers"]
    assert first == {
        "layer": "a", "num_biases": 2, "num_negative": 1, "num_zero": 1, "negative": 0.5,
        "relu": "r", "passes": pytest.approx(0.6),
    }  # fmt: skip
    assert (second["relu"], second["passes"]) == (None, None)
    assert told["relus"][1] == {"relu": "s", "norm": None, "passes": 0.5}
    assert (told["all"]["num_negative"], told["all"]["negative"]) == (1, 0.25)
