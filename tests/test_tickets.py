"""Tickets: what every pruned run begins with, and the proof of it."""

import itertools
from dataclasses import replace

import pytest
import torch
from networks import Tiny, outset

from windfall import masks, seeds, spec, tickets
from windfall.criteria import Criterion
from windfall.prune import Continue, LearningRate, Prune, Rewind, ToStep
from windfall.runs import Fresh, Pruned
from windfall.saliency import Saliency
from windfall.selection import Global, Layerwise, uniform
from windfall.spec import SpecError
from windfall.tickets import BrokenTicket, Lineage, begin, prove
from windfall.train import Evaluation, State

SHAPES = {
    "conv.weight": (4, 2, 3, 3),
    "conv.bias": (4,),
    "norm.weight": (4,),
    "norm.bias": (4,),
    "hidden.weight": (8, 12),
    "hidden.bias": (8,),
    "output.weight": (3, 8),
    "output.bias": (3,),
}
KINDS = {"conv.weight": "convolution", "hidden.weight": "hidden", "output.weight": "output"}
PRUNED = tuple(KINDS)
SPARED = tuple(name for name in SHAPES if name not in KINDS)
WEIGHTS = {
    "ticket": ToStep(),
    "rewind": ToStep(step=5),
    "rewind-restored": ToStep(step=5, optimizer="restored"),
    "learning-rate": LearningRate(steps=5),
    "continue": Continue(steps=5),
    "fresh": Fresh(stream="reinit"),
}
ARRANGED = ("found", "shuffled", "uniform")
EVERY = [
    pytest.param(arrange, weights, id=f"{arrange}-{name}")
    for arrange in ARRANGED
    for name, weights in WEIGHTS.items()
]


def state(seed, *, masked=None, optimizer="adam"):
    """A network after some training: weights, statistics, and an optimizer with its moments."""
    draw = seeds.stream(seed, "init")

    def tensors():
        return {n: torch.from_numpy(draw.standard_normal(shape)) for n, shape in SHAPES.items()}

    made = State(
        step=seed,
        params=masks.apply(masked or {}, tensors()),
        buffers={
            "norm.running_mean": torch.from_numpy(draw.standard_normal(4)),
            "norm.num_batches_tracked": torch.tensor(seed),
        },
        masks=masked or {},
        evaluations=[Evaluation(0, None, 1.0, 0.5, 1.0, 0.5)],
    )
    if optimizer == "adam":
        steps = {name: torch.tensor(float(seed)) for name in SHAPES}
        made.optimizer = {"exp_avg": tensors(), "exp_avg_sq": tensors(), "step": steps}
    if optimizer == "sgd":
        made.optimizer = {"momentum_buffer": tensors()}
    return made


def parent_masks():
    everything = {name: torch.ones(SHAPES[name], dtype=torch.bool) for name in PRUNED}
    draw = {n: torch.from_numpy(seeds.stream(9, n).standard_normal(SHAPES[n])) for n in PRUNED}
    return Layerwise().select(draw, everything, KINDS, 1)


def start(weights=None, arrange="found", level=2, **how):
    weights = weights or ToStep()
    return Pruned(parent="0" * 64, level=level, weights=weights, arrange=arrange, **how)


def lineage(weights=None, optimizer="adam", **dense):
    """theta_0, a parent at level 1, and the state that these weights start from."""
    initial = state(0, optimizer=None)
    parent = state(50, masked=dense.get("masked", parent_masks()), optimizer=optimizer)
    match weights:
        case None | ToStep(step=0):
            source = initial
        case ToStep():
            source = state(5, optimizer=optimizer)
        case Fresh():
            source = state(77, optimizer=None)
        case _:
            source = parent
    shape = Tiny(SHAPES).input_shape
    begun = outset(lambda: Tiny(SHAPES), initial.params, shape, 3, num_examples=150)
    return Lineage(initial, parent, source, begun)


def every_tensor(of):
    parts = {"params": of.params, "buffers": of.buffers, "masks": of.masks, **of.optimizer}
    return {f"{part}/{name}": value for part, held in parts.items() for name, value in held.items()}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def test_every_way_to_rewind_is_tested():
    kinds = {type(weights) for weights in WEIGHTS.values()}
    assert kinds == {*spec.members(Rewind).values(), Fresh}


@pytest.mark.parametrize(("arrange", "weights"), EVERY)
class TestEveryBeginning:
    def test_survivors_are_their_source_bit_for_bit_and_the_rest_is_0(self, arrange, weights):
        family = lineage(weights)
        begun = begin(start(weights, arrange), family, KINDS, seed=0)
        assert list(begun.params) == list(SHAPES)
        for name, mask in begun.masks.items():
            kept, source = begun.params[name], family.source.params[name]
            assert torch.equal(bits(kept[mask]), bits(source[mask]))
            assert torch.equal(bits(kept[~mask]), bits(torch.zeros_like(kept[~mask])))

    def test_biases_and_normalization_are_not_pruned_and_return_to_the_source(
        self, arrange, weights
    ):
        family = lineage(weights)
        begun = begin(start(weights, arrange), family, KINDS, seed=0)
        assert tuple(begun.masks) == PRUNED
        for name in SPARED:
            assert torch.equal(begun.params[name], family.source.params[name])

    def test_the_statistics_are_those_of_the_rewind_point(self, arrange, weights):
        family = lineage(weights)
        begun = begin(start(weights, arrange), family, KINDS, seed=0)
        assert begun.buffers.keys() == family.source.buffers.keys()
        for name, value in family.source.buffers.items():
            assert torch.equal(begun.buffers[name], value)

    def test_the_count_of_the_level_is_exact(self, arrange, weights):
        begun = begin(start(weights, arrange), lineage(weights), KINDS, seed=0)
        counts = Layerwise().counts(masks.sizes(begun.masks), KINDS, 2)
        if arrange == "uniform":
            counts = uniform(masks.sizes(begun.masks), sum(counts.values()))
        assert masks.kept(begun.masks) == counts

    def test_it_shares_no_storage_with_what_it_is_made_from(self, arrange, weights):
        """theta_0 that shares storage with the live weights makes every later rewind a no-op."""
        family = lineage(weights)
        before = [every_tensor(made) for made in (family.initial, family.parent, family.source)]
        copies = [{name: value.clone() for name, value in made.items()} for made in before]
        for value in every_tensor(begin(start(weights, arrange), family, KINDS, seed=0)).values():
            value.logical_not_() if value.dtype == torch.bool else value.add_(1)
        for made, copied in zip(before, copies, strict=True):
            assert all(torch.equal(made[name], copied[name]) for name in made)

    def test_it_carries_no_past(self, arrange, weights):
        begun = begin(start(weights, arrange), lineage(weights), KINDS, seed=0)
        assert (begun.step, begun.evaluations, begun.snapshots) == (0, [], {})
        assert float(begun.losses) == 0
        assert not begun.diverged

    def test_the_optimizer_is_empty_unless_it_is_restored(self, arrange, weights):
        begun = begin(start(weights, arrange), lineage(weights), KINDS, seed=0)
        is_restored = isinstance(weights, ToStep) and weights.optimizer == "restored"
        assert bool(begun.optimizer) == is_restored

    def test_the_same_seed_gives_the_same_beginning(self, arrange, weights):
        first = begin(start(weights, arrange), lineage(weights), KINDS, seed=3)
        again = begin(start(weights, arrange), lineage(weights), KINDS, seed=3)
        ours, theirs = every_tensor(first), every_tensor(again)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_the_mask_found_does_not_depend_on_where_survivors_return(weights):
    ticket = begin(start(), lineage(), KINDS, seed=0)
    other = begin(start(weights), lineage(weights), KINDS, seed=0)
    assert all(torch.equal(ticket.masks[name], other.masks[name]) for name in PRUNED)


def test_the_mask_found_is_nested_in_the_parents_and_keeps_its_largest():
    family = lineage()
    begun = begin(start(), family, KINDS, seed=0)
    assert masks.escaped(begun.masks, family.parent.masks) == []
    for name, mask in begun.masks.items():
        trained, alive = family.parent.params[name].abs(), family.parent.masks[name]
        assert trained[mask].min() > trained[alive & ~mask].max()


def test_weights_of_weight_normalized_layers_are_scored_as_what_inputs_multiply():
    draw = seeds.stream(3, "init").standard_normal((6, 10))
    v = torch.from_numpy(draw) * torch.logspace(-3, 3, 6)[:, None]  # a scale that means nothing
    gain = torch.tensor([1.0, 2.0, -3.0, 1.0, 2.0, 3.0]).double()
    trained = State(9, {"hidden.weight": v, "hidden.gain": gain}, {})
    family = Lineage(trained, trained, trained)
    begun = begin(start(level=1), family, {"hidden.weight": "hidden"}, seed=0)
    w = (v / v.norm(dim=1, keepdim=True) * gain[:, None]).abs()
    mask = begun.masks["hidden.weight"]
    assert w[mask].min() > w[~mask].max()


@pytest.mark.parametrize(
    "criterion", [n for n, m in spec.members(Criterion).items() if m.prunes == "weights"]
)
def test_what_the_parent_had_lost_is_not_found_again_by_any_criterion(criterion):
    prune, family = Prune(criterion=criterion), lineage()
    begun = begin(start(prune=prune), family, KINDS, seed=0)
    assert masks.escaped(begun.masks, family.parent.masks) == []


@pytest.mark.parametrize("criterion", [*spec.members(Saliency), "large-init"])
def test_a_mask_at_initialization_does_not_depend_on_the_training(criterion):
    prune = Prune(criterion=criterion)
    family = lineage(masked={})
    other = replace(family, parent=state(51))
    found = [begin(start(prune=prune, level=1), each, KINDS, 0).masks for each in (family, other)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in PRUNED)


def test_the_children_of_a_dense_network_are_pruned_from_all_of_it():
    family = lineage(masked={})
    begun = begin(start(level=1), family, KINDS, seed=0)
    sizes = {name: mask.numel() for name, mask in begun.masks.items()}
    assert masks.kept(begun.masks) == Layerwise().counts(sizes, KINDS, 1)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_restored_optimizer_is_the_rewind_points_with_what_is_pruned_at_0(optimizer):
    weights = ToStep(step=5, optimizer="restored")
    family = lineage(weights, optimizer)
    begun = begin(start(weights), family, KINDS, seed=0)
    assert begun.optimizer.keys() == family.source.optimizer.keys()
    for kind, tensors in family.source.optimizer.items():
        assert begun.optimizer[kind].keys() == tensors.keys()
        for name, value in tensors.items():
            alive = torch.ones_like(value, dtype=torch.bool)
            if value.dim() and name in KINDS:
                alive = begun.masks[name]
                assert not bool(alive.all())
            restored = begun.optimizer[kind][name]
            assert torch.equal(restored[alive], value[alive])
            assert not bool(restored[~alive].any())


# -- the controls -----------------------------------------------------------------------------


def test_controls_share_their_fresh_weights_and_differ_in_the_mask_alone():
    fresh = WEIGHTS["fresh"]
    family = lineage(fresh)
    begun = {name: begin(start(fresh, name), family, KINDS, seed=0) for name in ARRANGED}
    for one, other in itertools.combinations(begun.values(), 2):
        for name in SPARED:
            assert torch.equal(one.params[name], other.params[name])
        for name in PRUNED:
            both = one.masks[name] & other.masks[name]
            assert torch.equal(one.params[name][both], other.params[name][both])
            assert not torch.equal(one.masks[name], other.masks[name])


def test_a_shuffled_mask_keeps_every_layers_count_and_is_of_the_seed():
    found = begin(start(), lineage(), KINDS, seed=0)
    first = begin(start(arrange="shuffled"), lineage(), KINDS, seed=0)
    other = begin(start(arrange="shuffled"), lineage(), KINDS, seed=1)
    assert masks.kept(first.masks) == masks.kept(found.masks)
    for name, mask in masks.shuffle(found.masks, seed=0).items():
        assert torch.equal(first.masks[name], mask)
        assert not torch.equal(first.masks[name], other.masks[name])


def test_a_uniform_mask_keeps_the_whole_count_at_one_density():
    found = begin(start(), lineage(), KINDS, seed=0)
    spread = begin(start(arrange="uniform"), lineage(), KINDS, seed=0)
    total = sum(masks.kept(found.masks).values())
    assert sum(masks.kept(spread.masks).values()) == total
    assert masks.kept(spread.masks) != masks.kept(found.masks)
    for name, count in masks.kept(spread.masks).items():
        size = spread.masks[name].numel()
        assert abs(count - size * total / sum(masks.sizes(spread.masks).values())) < 1


# -- what is refused --------------------------------------------------------------------------


def test_a_level_that_empties_a_layer_is_refused_by_its_name():
    prune = Prune(selection=Layerwise(output=0.99))
    with pytest.raises(SpecError, match=r"got 0 of `output\.weight` at level 2"):
        begin(start(prune=prune), lineage(), KINDS, seed=0)


def test_a_uniform_control_that_empties_a_layer_is_refused_by_its_name():
    prune = Prune(selection=Layerwise(hidden=0.89, convolution=0.89, output=0.79))
    with pytest.raises(SpecError, match=r"`random` .*; got 0 of `output\.weight`"):
        begin(start(prune=prune, arrange="uniform"), lineage(), KINDS, seed=0)


def test_a_mask_that_is_not_nested_breaks_the_ticket(monkeypatch):
    everything = {name: torch.ones(SHAPES[name], dtype=torch.bool) for name in PRUNED}
    monkeypatch.setattr(tickets, "found", lambda *_: everything)
    with pytest.raises(BrokenTicket, match=r"mask of `conv\.weight` is not nested in its parent's"):
        begin(start(), lineage(), KINDS, seed=0)


@pytest.mark.parametrize("name", SHAPES)
def test_careless_masking_breaks_the_ticket_by_the_tensors_name(monkeypatch, name):
    real = masks.apply

    def careless(mask, params):
        applied = real(mask, params)
        applied[name].flatten()[int(applied[name].abs().argmax())] += 1e-12
        return applied

    monkeypatch.setattr(masks, "apply", careless)
    with pytest.raises(BrokenTicket, match=f"surviving weights of `{name}` differ"):
        begin(start(), lineage(), KINDS, seed=0)


def test_a_shared_storage_breaks_the_ticket(monkeypatch):
    monkeypatch.setattr(masks, "apply", lambda mask, params: params)
    monkeypatch.setattr(State, "copy", lambda self: self)
    monkeypatch.setattr(
        tickets,
        "found",
        lambda *_: {name: torch.ones(SHAPES[name], dtype=torch.bool) for name in PRUNED},
    )
    with pytest.raises(BrokenTicket, match=r"`conv\.weight` shares its storage with its source"):
        begin(start(), lineage(masked={}), KINDS, seed=0)


def test_a_shared_statistic_breaks_the_ticket(monkeypatch):
    monkeypatch.setattr(State, "copy", lambda self: self)
    with pytest.raises(BrokenTicket, match=r"`norm\.running_mean` shares its storage"):
        begin(start(), lineage(), KINDS, seed=0)


def proved():
    source = state(1)
    ticket = begin(start(), Lineage(source, state(50, masked=parent_masks()), source), KINDS, 0)
    prove(ticket, source)
    return ticket, source


def first(mask, *, kept):
    return tuple((mask == kept).nonzero()[0].tolist())


class TestTheProof:
    def test_a_survivor_that_was_changed_is_found(self):
        ticket, source = proved()
        ticket.params["hidden.weight"][first(ticket.masks["hidden.weight"], kept=True)] += 1e-15
        with pytest.raises(BrokenTicket, match=r"surviving weights of `hidden\.weight` differ"):
            prove(ticket, source)

    def test_a_survivors_sign_of_zero_counts(self):
        ticket, source = proved()
        place = first(ticket.masks["hidden.weight"], kept=True)
        source.params["hidden.weight"][place] = 0.0
        ticket.params["hidden.weight"][place] = -0.0
        with pytest.raises(BrokenTicket, match=r"surviving weights of `hidden\.weight` differ"):
            prove(ticket, source)

    @pytest.mark.parametrize("value", [1e-300, -1.0, float("nan")])
    def test_a_pruned_weight_that_is_not_0_is_found(self, value):
        ticket, source = proved()
        ticket.params["output.weight"][first(ticket.masks["output.weight"], kept=False)] = value
        with pytest.raises(BrokenTicket, match=r"a pruned weight of `output\.weight` is not 0"):
            prove(ticket, source)

    def test_a_pruned_weight_that_came_back_is_found(self):
        ticket, source = proved()
        ticket.params["conv.weight"] = source.params["conv.weight"].clone()
        with pytest.raises(BrokenTicket, match=r"a pruned weight of `conv\.weight` is not 0"):
            prove(ticket, source)

    def test_a_bias_that_was_not_rewound_is_found(self):
        ticket, source = proved()
        ticket.params["conv.bias"] = state(50).params["conv.bias"]
        with pytest.raises(BrokenTicket, match=r"`conv\.bias` differ from their source"):
            prove(ticket, source)

    def test_a_statistic_that_was_not_rewound_is_found(self):
        ticket, source = proved()
        ticket.buffers["norm.num_batches_tracked"] += 1
        with pytest.raises(BrokenTicket, match=r"`norm\.num_batches_tracked` differ"):
            prove(ticket, source)

    def test_a_view_of_the_source_shares_its_storage(self):
        ticket, source = proved()
        joined = torch.cat([torch.zeros(4, dtype=torch.float64), source.params["conv.bias"]])
        source.params["conv.bias"], ticket.params["conv.bias"] = joined[4:], joined[4:].view(4)
        with pytest.raises(BrokenTicket, match=r"`conv\.bias` shares its storage"):
            prove(ticket, source)

    def test_tensors_of_no_elements_share_nothing(self):
        ticket, source = proved()
        ticket.params["none"], source.params["none"] = torch.zeros(0), torch.zeros(0)
        prove(ticket, source)


def test_a_global_ticket_is_proved_alike():
    prune = Prune(selection=Global(rate=0.5))
    begun = begin(start(prune=prune, level=1), lineage(masked={}), KINDS, seed=0)
    assert sum(masks.kept(begun.masks).values()) == 96  # half of 72 + 96 + 24
