"""Gates of residual blocks, and networks without blocks."""

import math

import pytest
import small
import torch
from torch import nn
from torch.func import functional_call

from windfall import data, flops, initialize, models, seeds, spec, structure, tracing
from windfall.criteria import Evidence
from windfall.engines import separate, stacked
from windfall.engines.contract import Task
from windfall.filters import Gate
from windfall.models import Preresnet_110, Preresnet_164, Resnet_20, Resnet_56, Resnet_110
from windfall.spec import SpecError
from windfall.train import Recipe, State
from windfall.units import Blocks

CIFAR, SHAPE = (3, 32, 32), (1, 8, 8)
BLOCKS = {Resnet_20: 9, Resnet_56: 27, Resnet_110: 54, Preresnet_110: 54, Preresnet_164: 54}
SMALL = [Resnet_20(width=0.25, gates=True), Preresnet_110(width=0.125, gates=True)]
BY_THRESHOLD = {"criterion": "gate", "selection": {"kind": "global", "rate": 0.4},
                "structure": "blocks"}  # fmt: skip
NETWORK = {"kind": "resnet-20", "width": 0.125, "gates": True}
SHORT = {"steps": 4, "eval_every": 2, "learning_rate": 1e-3}


def drawn(model):
    """The network in float64 and evaluation, its gates and normalizations not the identity."""
    with seeds.isolated(0, "test"), torch.no_grad():
        network = model.build(SHAPE, 10).double().eval()
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    return network


def tensors(network):
    return dict(network.named_parameters()) | dict(network.named_buffers())


def inputs():
    with seeds.isolated(1, "test"):
        return torch.randn(4, *SHAPE, dtype=torch.float64)


def without(network, keep):
    """The network and its smaller self, and the group of its blocks."""
    (group,) = Blocks().groups(network, SHAPE)
    kept = structure.shrunk(tensors(network), [group], {"blocks": keep})
    smaller = structure.resized(network, structure.shapes(kept))
    smaller.load_state_dict(kept)
    return smaller, group


def some(size):
    return torch.arange(size) % 3 == 1


# -- gates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", BLOCKS)
def test_a_gated_network_has_a_parameter_more_a_block_and_costs_nothing_more(member):
    plain, gated = (member(gates=gates).build(CIFAR, 10) for gates in (False, True))
    sizes = [sum(p.numel() for p in network.parameters()) for network in (plain, gated)]
    assert sizes[1] - sizes[0] == BLOCKS[member]
    assert models.kinds(gated, CIFAR) == models.kinds(plain, CIFAR)
    assert flops.multiply_adds(gated, CIFAR) == flops.multiply_adds(plain, CIFAR)


def test_the_parameters_of_a_gated_network_are_counted():
    network = Resnet_20(gates=True).build(CIFAR, 10)
    assert sum(param.numel() for param in network.parameters()) == 270_896 + 10 + 2 * 784 + 9


@pytest.mark.parametrize("initialization", [initialize.KaimingNormal(), initialize.TorchDefault()])
def test_gates_begin_at_1_whatever_the_initialization(initialization):
    build = lambda: SMALL[0].build(SHAPE, 10)  # noqa: E731
    params, _ = initialize.initial_parameters(build, initialization, seed=3)
    gates = {name: param.tolist() for name, param in params.items() if name.endswith("gate.weight")}
    assert list(gates.values()) == [[1.0]] * 9


@pytest.mark.parametrize("model", SMALL, ids=str)
def test_gates_at_1_change_nothing(model):
    gated, plain = drawn(model), model.model_copy(update={"gates": False}).build(SHAPE, 10)
    plain = plain.double().eval()
    plain.load_state_dict({n: t for n, t in tensors(gated).items() if "gate" not in n})
    for part in gated.modules():
        if isinstance(part, models.Gate):
            nn.init.ones_(part.weight)
    assert torch.equal(gated(inputs()), plain(inputs()))


def test_a_block_is_its_shortcut_and_its_branch_times_the_gate():
    block = drawn(SMALL[0]).stage2.block1
    given = torch.rand(2, 4, 8, 8, dtype=torch.float64)
    branch = block.norm2(block.conv2(block.norm1(block.conv1(given)).relu()))
    expected = (block.gate.weight * branch + block.shortcut(given)).relu()
    torch.testing.assert_close(block(given), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_channels_of_a_gated_network_are_those_of_the_plain_one():
    for model in SMALL:
        plain = model.model_copy(update={"gates": False})
        both = [tracing.trace(each.build(SHAPE, 10), SHAPE) for each in (model, plain)]
        assert both[0] == both[1]


# -- blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", SMALL, ids=str)
def test_a_network_without_blocks_computes_what_it_does_with_their_gates_at_0(model):
    network = drawn(model)
    keep = some(BLOCKS[type(model)])
    smaller, group = without(network, keep)
    zeros = {
        name: torch.zeros(1, dtype=torch.float64)
        for name, stays in zip(group.scales, keep.tolist(), strict=True)
        if not stays
    }
    expected = functional_call(network, zeros, (inputs(),))
    torch.testing.assert_close(smaller(inputs()), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(smaller(inputs()), expected)
    assert not torch.allclose(expected, network(inputs()))


def test_the_group_is_all_branches_and_no_shortcut():
    network = drawn(SMALL[0])
    (group,) = tracing.gated(network, SHAPE)
    assert (group.name, group.size, group.makers) == ("blocks", 9, {})
    blocks = [f"stage{s}.block{b}" for s in (1, 2, 3) for b in (1, 2, 3)]
    assert list(group.scales) == [f"{block}.gate.weight" for block in blocks]
    inside = {
        name for name, tensor in tensors(network).items()
        if name.startswith("stage") and "shortcut" not in name and tensor.dim()
    }  # fmt: skip
    assert {slot.tensor for slot in group.slots} == inside
    for slot in group.slots:
        lies = [bool(at) for at in slot.places]
        assert lies == [slot.tensor.startswith(f"{block}.") for block in blocks]


def test_of_a_removed_block_no_weight_is_left_but_its_shortcut():
    network = drawn(SMALL[0])
    smaller, _ = without(network, torch.arange(9) == 0)
    left = {name: param.numel() for name, param in smaller.named_parameters()}
    gone = [n for n in left if n.startswith(("stage1.block2.", "stage2.", "stage3."))]
    assert {n for n in gone if left[n]} == {
        f"stage{s}.block1.shortcut.{n}" for s in (2, 3)
        for n in ("conv.weight", "norm.weight", "norm.bias")
    }  # fmt: skip
    block = smaller.stage2.block1
    assert (block.conv1.out_channels, block.norm1.num_features, block.gate.size) == (0, 0, 0)
    given = torch.rand(2, 4, 8, 8, dtype=torch.float64)
    assert torch.equal(block(given), block.shortcut(given).relu())


def test_blocks_go_one_after_the_other_as_at_once():
    whole = tensors(drawn(SMALL[0]))
    groups = tracing.gated(drawn(SMALL[0]), SHAPE)
    first = {"blocks": torch.arange(9) % 4 != 2}
    own = structure.restricted(groups, first, whole)
    then = {"blocks": torch.arange(own[0].size) % 2 == 0}
    both = first["blocks"].clone()
    both[first["blocks"]] = then["blocks"]
    twice = structure.shrunk(structure.shrunk(whole, groups, first), own, then)
    at_once = structure.shrunk(whole, groups, {"blocks": both})
    assert all(torch.equal(twice[name], tensor) for name, tensor in at_once.items())


def test_what_a_removed_block_would_cost_is_not_counted():
    """By hand: 4, 8 and 16 channels on 64, 16 and 4 positions; convolutions of 3 x 3."""
    first, output, shortcuts = 9 * 4 * 64, 160, 4 * 8 * 16 + 8 * 16 * 4
    blocks = [
        *[2 * 9 * 4 * 4 * 64] * 3,
        9 * (4 * 8 + 8 * 8) * 16, *[2 * 9 * 8 * 8 * 16] * 2,
        9 * (8 * 16 + 16 * 16) * 4, *[2 * 9 * 16 * 16 * 4] * 2,
    ]  # fmt: skip
    network = drawn(SMALL[0])
    for keep in (torch.ones(9, dtype=torch.bool), some(9)):
        smaller, _ = without(network, keep)
        counted = flops.multiply_adds(smaller, SHAPE)
        stays = sum(cost for cost, here in zip(blocks, keep.tolist(), strict=True) if here)
        assert sum(counted.values()) == first + output + shortcuts + stays
    assert counted["stage1.block1.conv1.weight"] == 0


@pytest.mark.parametrize(
    "member",
    [*spec.members(initialize.Drawn).values(), initialize.TorchDefault],  # others look further
    ids=spec.tag,
)
def test_what_is_left_is_newly_initialized(member):
    network = SMALL[0].build(SHAPE, 10)
    keep = {"blocks": some(9)}
    groups = tracing.gated(network, SHAPE)
    build = lambda: structure.newly(SMALL[0].build(SHAPE, 10), groups, keep)  # noqa: E731
    params, buffers = initialize.initial_parameters(build, member(), 0)
    whole, _ = initialize.initial_parameters(lambda: SMALL[0].build(SHAPE, 10), member(), 0)
    wanted = structure.shapes(structure.shrunk(tensors(network), groups, keep))
    assert structure.shapes(params | buffers) == wanted
    for key, param in params.items():
        if param.numel():
            assert torch.equal(param, whole[key])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_engines_train_a_network_without_blocks(optimizer):
    smaller, _ = without(drawn(SMALL[0]), some(9))
    recipe = Recipe(optimizer=optimizer, steps=3, batch_size=16, eval_every=3, dtype="float64")
    start = {name: tensor.detach().clone() for name, tensor in tensors(smaller).items()}
    names = [name for name, _ in smaller.named_parameters()]
    state = State(
        0, {n: start[n] for n in names}, {n: t for n, t in start.items() if n not in names}
    )
    job = Task(smaller, data.load(data.Digits()), recipe, 0, 3)
    alone = separate.train(job, state)
    (together,) = stacked.train([job], [state])
    for name in names:
        torch.testing.assert_close(alone.params[name], together.params[name], rtol=1e-7, atol=1e-9)
        if start[name].numel():
            assert not torch.equal(alone.params[name], start[name])


# -- the criterion ---------------------------------------------------------------------------------


def test_a_blocks_score_is_the_size_of_its_gate():
    network = drawn(SMALL[0])
    groups = tracing.gated(network, SHAPE)
    trained = {name: param.detach() for name, param in network.named_parameters()}
    values = [0.5, -2.0, 0.0, 1.0, -0.0, 3.0, -0.25, 4.0, 0.125]
    for name, value in zip(groups[0].scales, values, strict=True):
        trained[name] = torch.tensor([value], dtype=torch.float64)
    found = Gate().score(Evidence({}, trained, 0, 1, {"blocks": groups[0]}), ["blocks"])
    assert found["blocks"].tolist() == [abs(value) for value in values]
    keep = {"blocks": torch.arange(9) > 4}
    (own,) = structure.restricted(groups, keep, tensors(network))
    left = structure.shrunk(trained, groups, keep)
    found = Gate().score(Evidence({}, left, 0, 2, {"blocks": own}), ["blocks"])
    assert found["blocks"].tolist() == [3.0, 0.25, 4.0, 0.125]


# -- what is refused -------------------------------------------------------------------------------


class Deaf(nn.Module):
    """Blocks whose `forward` does not ask whether they were removed."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch, self.gate = nn.Linear(4, 4), models.Gate()

        def forward(self, x):
            return x + self.gate(self.branch(x))

    def __init__(self):
        super().__init__()
        self.blocks, self.output = nn.Sequential(self.Block(), self.Block()), nn.Linear(4, 3)

    def forward(self, x):
        return self.output(self.blocks(x))


class Listening(Deaf):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
            self.gate = models.Gate()

        def forward(self, x):
            return x if self.gate.is_removed else x + self.gate(self.branch(x))


def test_a_network_that_runs_a_removed_block_is_refused_by_name():
    with pytest.raises(SpecError, match=r"without a block what .*; Deaf does not\. Let each"):
        Blocks().groups(Deaf(), (4,))


def test_blocks_of_ones_own_may_hold_any_layer():
    (group,) = Blocks().groups(Listening(), (4,))
    assert [slot.tensor for slot in group.slots if slot.places[0]] == [
        "blocks.0.branch.0.weight", "blocks.0.branch.0.bias",
        "blocks.0.branch.1.weight", "blocks.0.branch.1.bias", "blocks.0.gate.weight",
    ]  # fmt: skip
    network, given = Listening(), torch.rand(3, 4)
    kept = structure.shrunk(tensors(network), [group], {"blocks": torch.tensor([False, True])})
    smaller = structure.resized(network, structure.shapes(kept))
    smaller.load_state_dict(kept)
    assert smaller.blocks[0].branch[0].weight.shape == (0,)
    nn.init.zeros_(network.blocks[0].gate.weight)
    assert torch.equal(smaller(given), network(given))


def test_a_network_without_gates_is_refused_before_anything_is_trained():
    for model in ({"kind": "resnet-20", "width": 0.125}, {"kind": "vgg-11", "width": 0.05}):
        data = torch.zeros(300, 1, 16, 16, dtype=torch.uint8), torch.arange(300) % 10
        with pytest.raises(SpecError, match=r"`prune\.structure` blocks must be used with a netwo"):
            small.graph(SHORT, model=model, data=data, prune=BY_THRESHOLD)


# -- studies ---------------------------------------------------------------------------------------


def test_a_studys_costs_are_those_of_blocks_spread_evenly():
    of = small.graph(SHORT, model=NETWORK, prune=BY_THRESHOLD, num_seeds=1)
    network = structure.resized(
        Resnet_20(width=0.125, gates=True).build(SHAPE, 10), _spread_shapes(of, [5, 3])
    )
    assert of.counts[1] == sum(p.numel() for p in network.parameters() if p.dim() > 1)
    address = next(n.address for n in of.nodes if (n.arm, n.level) == ("ticket", 1))
    macs = sum(flops.multiply_adds(network, SHAPE).values())
    assert of.flops(address) == flops.training_flops(macs, 32, 4)


def _spread_shapes(of, counts):
    """Of nine blocks at level 1, the 2nd, 4th, 6th, 8th and 9th stay."""
    assert counts[0] == round(9 * 0.6)
    keep = torch.tensor([math.floor((i + 1) * 5 / 9) > math.floor(i * 5 / 9) for i in range(9)])
    assert keep.tolist() == [False, True, False, True, False, True, False, True, True]
    groups = of.network.groups
    like = {name: torch.zeros(shape) for name, shape in of.network.shapes.items()}
    return structure.shapes(structure.shrunk(like, groups, {"blocks": keep}))
