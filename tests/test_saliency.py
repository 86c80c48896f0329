"""Saliency: criteria at initialization, each against a brute-force twin and numbers by hand."""

import itertools
from dataclasses import replace

import pytest
import torch
from networks import Tiny, outset
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from windfall import masks, models, seeds, spec
from windfall.criteria import Evidence, LargeInit, Magnitude
from windfall.initialize import KaimingNormal, initial_parameters
from windfall.prune import Prune
from windfall.saliency import Grasp, Saliency, Snip, Synflow, flow
from windfall.selection import Global, Layerwise, best
from windfall.spec import SpecError

SHAPES = {
    "conv.weight": (3, 2, 2, 2),
    "conv.bias": (3,),
    "norm.weight": (3,),
    "norm.bias": (3,),
    "hidden.weight": (5, 6),
    "hidden.bias": (5,),
    "output.weight": (3, 5),
    "output.bias": (3,),
}
NAMES = ("conv.weight", "hidden.weight", "output.weight")
KINDS = dict(zip(NAMES, ("convolution", "hidden", "output"), strict=True))
BARE = {name: SHAPES[name] for name in NAMES}
NUM = 40
MEMBERS = [Snip(batch_size=8, num_batches=2), Grasp(per_class=4, temperature=2.0), Synflow()]


def weights(shapes, seed=0):
    draw = seeds.stream(seed, "init")
    return {name: torch.from_numpy(draw.standard_normal(shape)) for name, shape in shapes.items()}


def evidence(shapes=None, params=None, seed=0, level=1, **how):
    shapes = shapes or SHAPES
    params = params or weights(shapes)
    begun = outset(lambda: Tiny(shapes), params, Tiny(shapes).input_shape, 3, NUM)
    return Evidence(params, weights(shapes, 9), seed, level, outset=begun, **how)


def some(shapes=None, seed=4):
    """Masks of about half of the weights."""
    return {n: value > 0 for n, value in weights(shapes or BARE, seed).items() if n in NAMES}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in NAMES)


def name_of(member):
    return spec.tag(type(member))


def test_every_member_is_tested():
    assert {type(member) for member in MEMBERS} == set(spec.members(Saliency).values())


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
class TestEveryMember:
    def test_scores_are_finite_and_of_the_weights_shapes(self, member):
        scores = member.score(evidence(), NAMES)
        assert {name: tuple(score.shape) for name, score in scores.items()} == BARE
        assert all(bool(score.isfinite().all()) for score in scores.values())
        assert all(float(score.abs().max()) > 0 for score in scores.values())
        assert not any(score.requires_grad for score in scores.values())

    def test_only_the_named_weights_are_scored_in_the_order_of_the_names(self, member):
        assert list(member.score(evidence(), NAMES[::-2])) == list(NAMES[::-2])

    def test_the_trained_weights_do_not_matter(self, member):
        other = replace(evidence(), trained=weights(SHAPES, 5))
        assert same(member.score(evidence(), NAMES), member.score(other, NAMES))

    def test_the_level_does_not_matter(self, member):
        scores = [member.score(evidence(level=level), NAMES) for level in (1, 3)]
        assert same(*scores)

    def test_what_was_pruned_before_scores_0(self, member):
        alive = some()
        scores = member.score(evidence(alive=alive), NAMES)
        for name in NAMES:
            assert not bool(scores[name][~alive[name]].any())
            assert bool(scores[name][alive[name]].any())

    def test_a_network_that_was_pruned_is_scored_as_one_with_zeros(self, member):
        alive = some()
        zeroed = masks.apply(alive, weights(SHAPES))
        ours = member.score(evidence(alive=alive), NAMES)
        theirs = member.score(evidence(params=zeroed, alive=alive), NAMES)
        assert same(ours, theirs)

    def test_nothing_is_drawn_from_a_global_generator_and_nothing_is_changed(self, member):
        seen, before = evidence(), seeds.generators()
        for score in member.score(seen, NAMES).values():
            score.fill_(7)
        assert seeds.generators() == before
        assert same(seen.initial, weights(SHAPES))

    def test_float32_weights_are_scored_in_float64(self, member):
        single = {name: value.float() for name, value in weights(SHAPES).items()}
        double = {name: value.double() for name, value in single.items()}
        ours = member.score(evidence(params=single), NAMES)
        assert same(ours, member.score(evidence(params=double), NAMES))

    def test_dropout_drops_nothing(self, member):
        class Dropping(Tiny):
            def forward(self, x):
                return super().forward(nn.functional.dropout(x, 0.5, self.hidden.training))

        seen = evidence()
        begun = outset(lambda: Dropping(SHAPES), weights(SHAPES), seen.outset.input_shape, 3, NUM)
        ours = member.score(replace(seen, outset=begun), NAMES)
        assert same(ours, member.score(seen, NAMES))


# -- numbers by hand ---------------------------------------------------------------------------


class Line(nn.Module):
    """Two inputs, two classes, one layer."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(2, 2, bias=False)

    def forward(self, x):
        return self.output(x)


class Chain(nn.Module):
    """Two inputs, two units, one output."""

    def __init__(self):
        super().__init__()
        self.hidden, self.output = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.output(torch.relu(self.hidden(x)))


def of_one_example():
    """Logits (2, -2) of the input (1, 2), whose class is the first: p = (0.9820, 0.0180)."""
    params = {"output.weight": torch.tensor([[1.0, 0.5], [-2.0, 0.0]], dtype=torch.float64)}
    begun = outset(Line, params, (2,), 1, 1)
    begun = replace(begun, inputs=lambda _: torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    return Evidence(params, params, 0, 1, outset=begun)


def test_snip_is_the_number_by_hand():
    # g = (p - y) x' = 0.017986 [[-1, -2], [1, 2]]
    scores = Snip(batch_size=1).score(of_one_example(), ["output.weight"])["output.weight"]
    assert scores.flatten().tolist() == pytest.approx([0.017986, 0.017986, 0.035972, 0], abs=1e-6)


def test_grasp_is_the_number_by_hand():
    # H g = |x|² (diag p - pp') (p - y) x' = 5 (0.017663)(0.035972) [[-1, -2], [1, 2]]
    grasp = Grasp(per_class=1, temperature=1.0)
    scores = grasp.score(of_one_example(), ["output.weight"])["output.weight"]
    expected = [-0.0031769, -0.0031769, -0.0063538, 0]
    assert scores.flatten().tolist() == pytest.approx(expected, abs=1e-7)


def test_synflow_is_the_number_by_hand():
    params = {
        "hidden.weight": torch.tensor([[1.0, -2.0], [3.0, 0.0]], dtype=torch.float64),
        "output.weight": torch.tensor([[-5.0, 7.0]], dtype=torch.float64),
    }
    seen = Evidence(params, params, 0, 1, outset=outset(Chain, params, (2,), 1))
    scores = Synflow().score(seen, params)
    assert scores["hidden.weight"].tolist() == [[5.0, 10.0], [21.0, 0.0]]
    assert scores["output.weight"].tolist() == [[15.0, 21.0]]


# -- brute-force twins -------------------------------------------------------------------------


def losses_of(params, alive, batches, temperature=1.0):
    """The mean loss of batches as a function of a multiple of every weight, one loop at a time."""

    def loss(gates):
        scaled = {n: params[n] * alive[n] * gates[n] if n in gates else params[n] for n in params}
        network = Tiny(SHAPES).double()
        total = torch.zeros((), dtype=torch.float64)
        for inputs, labels in batches:
            logits = functional_call(network, scaled, (inputs,)) / temperature
            total = total + cross_entropy(logits, labels)
        return total / len(batches)

    return loss


def examples(places):
    begun = evidence().outset
    return begun.inputs(places), begun.labels[places]


@pytest.mark.parametrize("alive", [masks.ones(weights(BARE), NAMES), some()], ids=["all", "half"])
def test_snip_is_the_change_of_the_loss_when_one_connection_fades(alive):
    order = torch.from_numpy(seeds.stream(0, "examples").permutation(NUM))
    loss = losses_of(weights(SHAPES), alive, [examples(order[:8]), examples(order[8:16])])
    scores = Snip(batch_size=8, num_batches=2).score(evidence(alive=alive), NAMES)
    gates = {name: torch.ones(shape, dtype=torch.float64) for name, shape in BARE.items()}
    width = 1e-6
    for name, gate in gates.items():
        for place in itertools.product(*map(range, gate.shape)):
            found = []
            for step in (width, -width):
                moved = gate.clone()
                moved[place] += step
                found.append(float(loss(gates | {name: moved})))
            slope = abs(found[0] - found[1]) / (2 * width)
            assert float(scores[name][place]) == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("alive", [masks.ones(weights(BARE), NAMES), some()], ids=["all", "half"])
def test_grasp_is_theta_times_the_explicit_hessian_times_the_gradient(alive):
    order = torch.from_numpy(seeds.stream(0, "examples").permutation(NUM))
    labels = evidence().outset.labels
    places = [[p for p in order.tolist() if labels[p] == each][:4] for each in range(3)]
    params = weights(SHAPES)
    ones = {name: torch.ones(shape, dtype=torch.float64) for name, shape in BARE.items()}
    loss = losses_of(
        params, alive, [examples(torch.tensor([*places[0], *places[1], *places[2]]))], 2.0
    )
    theta = torch.cat([(params[n] * alive[n]).flatten() for n in NAMES])
    is_alive = masks.flat(alive)

    def by_weights(vector):
        parts = vector.split([ones[n].numel() for n in NAMES])
        pairs = zip(NAMES, parts, strict=True)
        return loss({n: part.reshape(BARE[n]) / params[n] for n, part in pairs})

    hessian = torch.autograd.functional.hessian(by_weights, theta)
    gradient = torch.autograd.functional.jacobian(by_weights, theta)
    assert not bool(gradient[~is_alive].any())
    expected = theta * torch.mv(hessian, gradient)
    scores = Grasp(per_class=4, temperature=2.0).score(evidence(alive=alive), NAMES)
    found = torch.cat([scores[name].flatten() for name in NAMES])
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-14)

    def strength(vector):
        slope = torch.autograd.functional.jacobian(by_weights, vector)
        return float((slope**2)[is_alive].sum())

    place, width = int(is_alive.nonzero()[3]), 1e-5
    fading = torch.zeros_like(theta)
    fading[place] = theta[place] * width
    lost = (strength(theta + fading) - strength(theta - fading)) / (2 * width)
    assert lost == pytest.approx(2 * float(found[place]), rel=1e-6)


class Deep(nn.Module):
    """Linear layers with ReLUs between."""

    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)
        )

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


WIDTHS = (3, 4, 5, 2)


def deep(widths=WIDTHS, seed=0):
    """Evidence of a deep network of small whole weights, so that sums are exact; and these."""
    draw = seeds.stream(seed, "init")
    params = {
        name: torch.from_numpy(draw.integers(-9, 10, tuple(param.shape))).double()
        for name, param in Deep(*widths).named_parameters()
    }
    begun = outset(lambda: Deep(*widths), params, widths[:1], widths[-1])
    return Evidence(params, params, 0, 1, outset=begun), params


def by_paths(params):
    """For every weight the sum over the paths through it of the products of |weights|, and R."""
    layers = list(params.values())
    scores, total = {name: torch.zeros_like(value) for name, value in params.items()}, 0.0
    sizes = [layers[0].shape[1], *(layer.shape[0] for layer in layers)]
    for path in itertools.product(*map(range, sizes)):
        product = 1.0
        for layer, (a, b) in zip(layers, itertools.pairwise(path), strict=True):
            product *= abs(float(layer[b, a]))
        total += product
        for name, (a, b) in zip(params, itertools.pairwise(path), strict=True):
            scores[name][b, a] += product
    return scores, total


def test_synflow_is_the_sum_over_all_paths_through_a_weight():
    seen, params = deep()
    expected, total = by_paths(params)
    scores = Synflow().score(seen, params)
    for name in params:
        assert torch.equal(scores[name], expected[name])
    assert flow(seen.outset.network(), (3,)).item() == total


@pytest.mark.parametrize("rounds", [1, 4, 9])
def test_rounds_score_what_the_one_before_left_on_the_exponential_schedule(rounds):
    seen, params = deep()
    whole = sum(value.numel() for value in params.values())
    assert whole == 42
    alive = masks.ones(params, params)
    for index in range(1, rounds + 1):
        kept = round(whole * (10 / whole) ** (index / rounds))
        scores, _ = by_paths(masks.apply(alive, params))
        ranked = sorted(
            (-float(scores[name][place]), name, place)
            for name, mask in alive.items()
            for place in map(tuple, mask.nonzero().tolist())
        )
        alive = {name: torch.zeros_like(mask) for name, mask in alive.items()}
        for _, name, place in ranked[:kept]:
            alive[name][place] = True
    prune = Prune(criterion=Synflow(rounds=rounds), selection=Global(density=10 / whole))
    found = prune.masks(seen, masks.ones(params, params), dict.fromkeys(params, "hidden"))
    assert sum(masks.kept(found).values()) == kept
    assert all(torch.equal(found[name], alive[name]) for name in params)


def test_synflows_layers_and_units_have_one_sum():
    seen, params = deep((6, 9, 4, 7, 3))
    scores = Synflow().score(seen, params)
    sums = [float(score.sum()) for score in scores.values()]
    assert sums == pytest.approx([sums[0]] * len(sums))
    for below, above in itertools.pairwise(scores.values()):
        assert torch.allclose(below.sum(1), above.sum(0))


# -- what each looks at ------------------------------------------------------------------------


def watched(member, **how):
    """The places of the training part that a criterion looks at."""
    seen, looked = evidence(**how), []

    def inputs(places):
        looked.append(places.tolist())
        return seen.outset.inputs(places)

    member.score(replace(seen, outset=replace(seen.outset, inputs=inputs)), NAMES)
    return looked


def test_snip_looks_at_batches_of_distinct_examples_of_the_seed():
    first, again, other = (watched(MEMBERS[0], seed=seed) for seed in (0, 0, 1))
    assert [len(batch) for batch in first] == [8, 8]
    assert len({*first[0], *first[1]}) == 16
    assert first == again != other


def test_grasp_looks_at_as_many_examples_of_every_class_or_at_all_of_them():
    labels = evidence().outset.labels
    (looked,) = watched(Grasp(per_class=4))
    assert torch.bincount(labels[looked]).tolist() == [4, 4, 4]
    (looked,) = watched(Grasp(per_class=1_000))
    assert sorted(looked) == list(range(NUM))


def test_synflow_looks_at_no_example():
    assert watched(Synflow()) == []


def test_more_examples_than_there_are_are_refused():
    with pytest.raises(SpecError, match=r"snip must ask for no more examples .* 40; got 48"):
        Snip(batch_size=16, num_batches=3).score(evidence(), NAMES)


def test_batch_normalization_takes_its_batchs_statistics():
    """Its scale does not matter then: a filter's signed products theta g add up to 0."""
    seen = evidence()
    network, begun = seen.begun()
    network.norm.train()
    order = seen.order()[:8]
    loss = cross_entropy(network(begun.inputs(order)), begun.labels[order])
    product = network.conv.weight * torch.autograd.grad(loss, network.conv.weight)[0]
    scores = Snip(batch_size=8).score(seen, ["conv.weight"])["conv.weight"]
    assert torch.allclose(scores, product.abs())
    # all but for the epsilon of the normalization
    assert bool((product.sum((1, 2, 3)).abs() <= 1e-4 * scores.sum((1, 2, 3))).all())
    assert bool(product.any())


def test_flow_is_of_the_paths_alone():
    network = Tiny(SHAPES).double().eval()
    network.load_state_dict(weights(SHAPES), strict=False)
    plain = Tiny(SHAPES).double().eval()
    plain.load_state_dict({**weights(SHAPES), **{n: torch.zeros(s) for n, s in SHAPES.items()
                                                 if n.endswith("bias")}}, strict=False)  # fmt: skip
    network.norm.running_mean.fill_(3.0)
    shape = Tiny(SHAPES).input_shape
    assert torch.equal(flow(network, shape), flow(plain, shape))


def test_flow_is_0_where_no_path_is_left():
    seen, params = deep()
    cut = {name: torch.ones_like(value, dtype=torch.bool) for name, value in params.items()}
    cut["layers.1.weight"] = torch.zeros_like(cut["layers.1.weight"])
    cut["layers.1.weight"][2, 1] = True
    assert flow(replace(seen, alive=cut).begun()[0], (3,)).item() > 0
    cut["layers.2.weight"][:, 2] = False
    assert flow(replace(seen, alive=cut).begun()[0], (3,)).item() == 0


def test_a_flow_that_float64_cannot_hold_is_refused():
    seen, params = deep()
    huge = {name: value * 1e150 for name, value in params.items()}
    begun = replace(seen.outset, network=outset(lambda: Deep(*WIDTHS), huge, (3,), 2).network)
    with pytest.raises(SpecError, match="whose flow float64 can hold; got inf"):
        Synflow().score(replace(seen, outset=begun), params)


def test_a_flow_that_float32_cannot_hold_is_scored():
    seen, params = deep()
    large = {name: (value * 1e20).float() for name, value in params.items()}
    begun = replace(seen.outset, network=outset(lambda: Deep(*WIDTHS), large, (3,), 2).network)
    scores = Synflow().score(replace(seen, outset=begun), params)
    assert all(bool(score.isfinite().all()) for score in scores.values())


# -- layer collapse ----------------------------------------------------------------------------

VGG, SHAPE = models.Vgg_11(width=0.125), (3, 32, 32)


def vgg():
    """Evidence of a VGG of 144,856 weights, as `kaiming-normal` begins it, and their kinds."""

    def build():
        return VGG.build(SHAPE, 10)

    params, _ = initial_parameters(build, KaimingNormal(), 0)
    begun = outset(build, params, SHAPE, 10, num_examples=64)
    return Evidence(params, params, 0, 1, outset=begun), models.kinds(build(), SHAPE)


def collapsed(criterion, compression):
    """Layers that the best scores alone would empty; R of what `Global` keeps; least of a layer."""
    seen, kinds = vgg()
    alive = masks.ones(seen.initial, kinds)
    prune = Prune(criterion=criterion, selection=Global(density=1 / compression))
    found = prune.masks(seen, alive, kinds)
    left = prune._eased(seen, alive, prune.selection.counts(masks.sizes(alive), kinds, 1),
                        getattr(criterion, "rounds", 1))  # fmt: skip
    scores = criterion.score(replace(seen, alive=left), left)
    joined = torch.cat([scores[name].flatten() for name in kinds])
    top = torch.zeros_like(joined, dtype=torch.bool)
    top[joined.topk(sum(masks.kept(found).values())).indices] = True
    parts = top.split([alive[name].numel() for name in kinds])
    empty = [name for name, part in zip(kinds, parts, strict=True) if not bool(part.any())]
    remaining = flow(replace(seen, alive=found).begun()[0], SHAPE).item()
    return empty, remaining, min(masks.kept(found).values())


@pytest.mark.parametrize("compression", [10**2.5, 1000])
def test_where_magnitude_collapses_a_layer_synflow_keeps_all_alive(compression):
    """The best weight of a layer stays by rule; without paths through it the network is dead."""
    empty, remaining, least = collapsed(LargeInit(), compression)
    assert empty
    assert remaining == 0
    assert least == 1
    empty, remaining, least = collapsed(Synflow(rounds=20), compression)
    assert empty == []
    assert remaining > 0
    assert least > 10


def test_at_once_synflow_collapses_too():
    assert collapsed(Synflow(rounds=1), 100)[0]
    assert collapsed(Synflow(rounds=20), 100)[0] == []


@pytest.mark.slow
@pytest.mark.parametrize("member", [Snip(batch_size=64), Grasp(per_class=5), LargeInit()], ids=str)
def test_at_a_thousandth_only_synflow_leaves_a_path(member):
    assert collapsed(member, 1000)[1] == 0
    assert collapsed(Synflow(), 1000)[1] > 0


# -- in a chain --------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", [Layerwise(), Global(rate=0.3)], ids=str)
def test_synflows_rounds_are_the_selections_own(selection):
    """Layer by layer each is thinned to its own count; in one round it is the plain selection."""
    seen = evidence()
    alive = masks.ones(seen.initial, NAMES)
    counts = selection.counts(masks.sizes(alive), KINDS, 1)
    found = Prune(criterion=Synflow(rounds=3), selection=selection).masks(seen, alive, KINDS)
    kept = masks.kept(found)
    assert {n: kept[n] for n in counts if n} == {n: c for n, c in counts.items() if n}
    once = Prune(criterion=Synflow(rounds=1), selection=selection).masks(seen, alive, KINDS)
    assert same(once, best(Synflow().score(seen, NAMES), alive, counts))


def test_masks_at_initialization_are_not_those_after_training():
    seen = evidence()
    alive = masks.ones(seen.initial, NAMES)
    found = [
        Prune(criterion=member, selection=Global(rate=0.5)).masks(seen, alive, KINDS)
        for member in (*MEMBERS, LargeInit(), Magnitude())
    ]
    for one, other in itertools.combinations(found, 2):
        assert not same(one, other)
