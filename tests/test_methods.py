"""The seven methods of "Rethinking the Value of Network Pruning": one conformance test.

Each is a study built of values, criterion x selection x structure x adjust x recipe, and must do
what all do.

Source: Liu et al. 2019 (1810.05270), section 4.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import small
import torch
from torch import nn

from windfall import flops, masks, structure
from windfall.spec import SpecError
from windfall.store import Lab
from windfall.worker import Stopped, Workshop

SHAPE, STEPS = (1, 8, 8), 24
ARMS = ["dense", "finetune", "scratch-e", "scratch-b"]
ADAM = {"optimizer": "adam", "learning_rate": 5e-3}
SGD = {"optimizer": {"kind": "sgd", "momentum": 0.5}, "learning_rate": 0.05}
CONV = {"kind": "conv-2", "width": 0.1}
RESNET = {"kind": "resnet-20", "width": 0.125}
THIRD = {"convolution": 0.3, "hidden": 0.3, "output": 0.0}
FEW = {"num_images": 30, "num_samples": 60}


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def grouped():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def scaleless():
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.AdaptiveAvgPool1d(10))


@dataclass(frozen=True)
class Method:
    """A method, and a network that is unfit for it."""

    prune: dict[str, Any]
    unfit: dict[str, Any]
    message: str
    model: dict[str, Any] = field(default_factory=lambda: CONV)
    recipe: dict[str, Any] = field(default_factory=lambda: ADAM)
    levels: int = 2

    def graph(self, **changes: Any):
        settings = {"model": self.model, "prune": self.prune, "levels": self.levels, "arms": ARMS}
        recipe = {"steps": STEPS, "batch_size": 16, "eval_every": 8} | self.recipe
        recipe |= changes.pop("recipe", {})
        return small.graph(recipe, num_seeds=1, engine="separate", **(settings | changes))


METHODS = {
    "l1-norm": Method(
        {"criterion": "filter-norm", "selection": THIRD, "structure": "channels"},
        {"model": linear},
        "`model` must be a network whose channels can be followed",
    ),
    "thinet": Method(
        {
            "criterion": {"kind": "thinet"} | FEW,
            "selection": THIRD,
            "structure": "channels",
            "adjust": {"kind": "rescale"} | FEW,
        },
        {"model": grouped},
        r"`prune\.criterion` must be one that looks at no layer's inputs",
    ),
    "feature-reconstruction": Method(
        {
            "criterion": {"kind": "feature-reconstruction"} | FEW,
            "selection": THIRD,
            "structure": "channels",
            "adjust": {"kind": "refit"} | FEW,
        },
        {"model": grouped},
        r"`prune\.criterion` must be one that looks at no layer's inputs",
    ),
    "network-slimming": Method(
        {
            "criterion": "normalization-scale",
            "selection": {"kind": "global", "rate": 0.4},
            "structure": "channels",
        },
        {"model": CONV, "recipe": {"penalty": None}},
        r"`prune\.criterion` normalization-scale must be used where all channels",
        model=RESNET,
        recipe=SGD | {"steps": 12, "penalty": {"kind": "scale-penalty", "strength": 0.01}},
    ),
    "sparse-structure-selection": Method(
        {"criterion": "gate", "selection": "positive", "structure": "blocks"},
        {"model": RESNET},
        r"`prune\.structure` blocks must be used with a network whose blocks have gates",
        model=RESNET | {"gates": True},
        recipe=SGD | {"penalty": {"kind": "gate-penalty", "strength": 0.45}},
        levels=1,
    ),
    "soft-filter-pruning": Method(
        {
            "criterion": {"kind": "filter-norm", "order": 2},
            "selection": THIRD,
            "structure": "channels",
        },
        {"recipe": {"rhythm": {"kind": "soft-pruning", "selection": {"convolution": 0.99}}}},
        r"`recipe\.rhythm` must fit the network",
        recipe=ADAM | {"rhythm": {"kind": "soft-pruning", "every": 5, "selection": THIRD}},
    ),
    "unstructured": Method(
        {"criterion": "magnitude", "selection": {"kind": "global", "rate": 0.5}},
        {"model": scaleless},
        "`model` must have a Linear or Conv layer to prune",
        model={"kind": "mlp", "hidden": [16, 8]},
    ),
}
pytestmark = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A method's graph and its lab, trained once."""
    known = {}

    def find(name):
        if name not in known:
            of, folder = METHODS[name].graph(), tmp_path_factory.mktemp(name) / "lab"
            known[name] = of, small.trained(of, folder), folder
        return known[name]

    return find


def levels(name):
    return range(1, METHODS[name].levels + 1)


def at(of, arm, level):
    return next(n.address for n in of.nodes if (n.arm, n.level) == (arm, level))


def whole(of):
    return of.study.model.build(SHAPE, 10)


def kept(state):
    """What stays, by tensor or group: masks, or channels."""
    return state.channels or state.masks


def network(of, state):
    """A run's network, of its own size."""
    return structure.resized(whole(of), structure.shapes(state.params | state.buffers))


def stated(of, lab, level):
    """The counts that the selection states; of what is positive, those that training left so."""
    prune, sizes = of.study.prune, of.network.sizes
    if prune.is_structured:
        found = prune.structure.of(of.network.groups)
        sizes = {name: group.size for name, group in found.items()}
    if of.study.prune.to_json()["selection"]["kind"] != "positive":
        return prune.selection.counts(sizes, of.network.kinds, level)
    params = lab.weights(at(of, "dense", 0)).params
    gates = [float(param) for n, param in params.items() if n.endswith("gate.weight")]
    assert 0 < sum(gate != 0 for gate in gates) < len(gates)
    return {"blocks": sum(gate != 0 for gate in gates)}


def test_it_is_expanded_and_costed_before_anything_is_trained(name):
    of = METHODS[name].graph()
    assert type(of.study).from_json(of.study.to_json(addressed=False)) == of.study
    for address in of.runs:
        first, last = of.clock(address)
        assert last > first >= 0
        assert of.flops(address) > 0
    counts = [of.counts[level] for level in range(METHODS[name].levels + 1)]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.slow
class TestTrained:
    def test_every_arm_is_trained_to_its_end(self, name, trained):
        of, lab, _ = trained(name)
        for address, run in of.runs.items():
            record = lab.record(address)
            assert record.status == "done"
            if run.budget is None:
                assert record.evaluations[-1].step == run.clock[1]

    def test_the_network_is_smaller_by_exactly_what_the_selection_states(self, name, trained):
        of, lab, _ = trained(name)
        for level in levels(name):
            counts = stated(of, lab, level)
            for arm in ARMS[1:]:
                state = lab.weights(at(of, arm, level))
                found = masks.kept(kept(state))
                pooled = sum(num for n, num in found.items() if n not in counts)
                spared = found.keys() - counts.keys() if "" not in counts else set()
                assert all(bool(kept(state)[n].all()) for n in spared)
                assert {n: found[n] for n in counts if n} == {n: c for n, c in counts.items() if n}
                assert pooled == counts.get("", pooled)
                assert sum(found.values()) < sum(masks.sizes(kept(state)).values())

    def test_what_is_stored_has_really_lost_it(self, name, trained):
        of, lab, _ = trained(name)
        dense = sum(p.numel() for p in lab.weights(at(of, "dense", 0)).params.values())
        for arm in ARMS[1:]:
            state = lab.weights(at(of, arm, 1))
            numbers = sum(p.numel() for p in state.params.values())
            if of.study.prune.is_structured:
                assert (numbers < dense, state.masks) == (True, {})
                inputs = torch.zeros(2, *SHAPE)
                made = network(of, state).eval()
                made.load_state_dict(state.params | state.buffers)
                assert made(inputs).shape == (2, 10)
            else:
                assert numbers == dense
                gone = (state.params[n][~mask] for n, mask in state.masks.items())
                assert not any(bool(weights.any()) for weights in gone)

    def test_levels_are_nested_and_no_layer_is_emptied(self, name, trained):
        of, lab, _ = trained(name)
        for arm in ARMS[1:]:
            chain = [kept(lab.weights(at(of, arm, level))) for level in levels(name)]
            for found in chain:
                assert all(bool(stay.any()) for stay in found.values())
            for outer, inner in itertools.pairwise(chain):
                assert masks.escaped(inner, outer) == []
                assert sum(masks.kept(inner).values()) < sum(masks.kept(outer).values())

    def test_all_arms_of_a_level_keep_the_same(self, name, trained):
        of, lab, _ = trained(name)
        for level in levels(name):
            first, *others = (kept(lab.weights(at(of, arm, level))) for arm in ARMS[1:])
            for other in others:
                assert all(torch.equal(other[n], stay) for n, stay in first.items())

    def test_scratch_b_takes_the_steps_that_follow_from_what_was_kept(self, name, trained):
        of, lab, _ = trained(name)
        dense = sum(flops.multiply_adds(whole(of), SHAPE).values())
        for level in levels(name):
            address = at(of, "scratch-b", level)
            state = lab.weights(address)
            each = flops.multiply_adds(network(of, state), SHAPE)
            cost = sum(flops.masked_multiply_adds(each, state.masks).values())
            steps = lab.record(address).evaluations[-1].step
            total = of.study.recipe.steps
            assert steps == total * dense // cost > total

    def test_scratch_networks_begin_alive(self, name, trained):
        """Normalization begins as its constructor makes it, also where channels were lost."""
        of, lab, _ = trained(name)
        state = Workshop(lab, "cpu").beginning(of.runs[at(of, "scratch-e", METHODS[name].levels)])
        scales = [p for n, p in state.params.items() if "norm" in n and n.endswith("weight")]
        assert all(bool((scale == 1).all()) for scale in scales)
        assert all(bool(p.any()) for n, p in state.params.items() if p.dim() > 1 and p.numel())

    def test_the_dense_run_alone_has_sparsity_training(self, name, trained):
        of, _, _ = trained(name)
        asked = tuple(n for n in ("penalty", "rhythm") if METHODS[name].recipe.get(n))
        for address, run in of.runs.items():
            is_dense = address == at(of, "dense", 0)
            assert run.recipe.sparsity == (asked if is_dense else ())
            assert run.recipe.plain() == of.study.recipe.plain()

    def test_trained_again_it_is_the_same_to_the_bit(self, name, trained, tmp_path):
        _, _, folder = trained(name)
        small.trained(METHODS[name].graph(), tmp_path / "lab").close()
        assert small.contents(tmp_path / "lab") == small.contents(folder)

    def test_stopped_and_resumed_it_is_the_same_to_the_bit(self, name, trained, tmp_path):
        of, _, folder = trained(name)
        lab = Lab(tmp_path / "lab")
        for job in small.jobs(of):
            middle = sum(of.clock(job.address)) // 2
            with pytest.raises(Stopped):
                Workshop(lab, "cpu").perform(job, lambda step, middle=middle: step >= middle)
            assert Workshop(lab, "cpu").perform(job) == "trained"
        lab.close()
        assert small.contents(tmp_path / "lab") == small.contents(folder)


def test_a_network_that_is_unfit_is_refused_before_anything_is_trained(name):
    method = METHODS[name]
    with pytest.raises(SpecError, match=method.message):
        method.graph(**method.unfit)
