"""Networks that lose channels: where they begin, what they are trained as, what is kept of them."""

import pytest
import small
import torch
from torch import nn
from torch.func import functional_call

from windfall import flops, initialize, models, structure, tickets, tracing
from windfall.initialize import GlorotNormal, TorchDefault, fans, initial_parameters
from windfall.spec import SpecError
from windfall.store import Lab
from windfall.train import Recipe, StepDrops
from windfall.worker import Stopped, Workshop

RESNET = {"kind": "resnet-20", "width": 0.25}
SHAPE = (1, 8, 8)
SLIM = {"criterion": "normalization-scale", "selection": {"kind": "global", "rate": 0.4},
        "structure": "channels"}  # fmt: skip
FILTERS = {
    "criterion": "filter-norm",
    "selection": {"convolution": 0.3, "output": 0.0},
    "structure": "channels",
}
METHODS = {
    "l1-norm": FILTERS,
    "l2-norm": FILTERS | {"criterion": {"kind": "filter-norm", "order": 2}},
    "slimming": SLIM,
    "thinet": FILTERS
    | {
        "criterion": {"kind": "thinet", "num_images": 40, "num_samples": 100},
        "adjust": {"kind": "rescale", "num_images": 40, "num_samples": 100},
        "structure": {"kind": "channels", "shared": False},
    },
    "regression": FILTERS
    | {
        "criterion": {"kind": "feature-reconstruction", "num_images": 40, "num_samples": 100},
        "adjust": {"kind": "refit", "num_images": 40, "num_samples": 100},
        "structure": {"kind": "channels", "shared": False},
    },
}
SHORT = {"steps": 4, "eval_every": 2, "learning_rate": 1e-3}


def graph(prune, **changes):
    return small.graph(SHORT, model=RESNET, prune=prune, **({"num_seeds": 1} | changes))


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    """A method's study and its lab; trained once."""
    known = {}

    def find(method):
        if method not in known:
            of = graph(METHODS[method])
            known[method] = of, small.trained(of, tmp_path_factory.mktemp(method) / "lab")
        return known[method]

    return find


def at(of, arm, level):
    return next(n.address for n in of.nodes if (n.arm, n.level, n.seed) == (arm, level, 0))


def whole():
    return models.Resnet_20(width=0.25).build(SHAPE, 10)


def start(of, lab, arm, level):
    address = at(of, arm, level)
    return Workshop(lab, "cpu").beginning(of.runs[address])


def initial():
    params, buffers = initial_parameters(whole, GlorotNormal(), 0)
    return params | buffers


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    def test_every_level_keeps_the_counts_that_were_stated(self, labs, method):
        of, lab = labs(method)
        prune = of.study.prune
        groups = tracing.trace(whole(), SHAPE)
        sizes = {name: group.size for name, group in prune.structure.of(groups).items()}
        for level in (1, 2):
            counts = prune.selection.counts(sizes, of.network.kinds, level)
            for arm in ("ticket", "reinit", "finetune"):
                channels = lab.weights(at(of, arm, level)).channels
                assert list(channels) == [group.name for group in groups]
                kept = {name: int(stay.sum()) for name, stay in channels.items()}
                if "" in counts:
                    assert sum(kept[name] for name in sizes) == counts[""]
                else:
                    assert {name: kept[name] for name in counts} == counts
                assert all(kept.values())
                spared = channels.keys() - sizes.keys()
                assert all(bool(channels[name].all()) for name in spared)

    def test_channels_of_a_level_are_among_those_of_the_one_before(self, labs, method):
        of, lab = labs(method)
        first, second = (lab.weights(at(of, "ticket", level)).channels for level in (1, 2))
        for name, stay in second.items():
            assert not bool((stay & ~first[name]).any())
        assert any(int(second[name].sum()) < int(first[name].sum()) for name in first)

    def test_all_arms_of_a_mask_have_the_same_channels(self, labs, method):
        of, lab = labs(method)
        found = [lab.weights(at(of, a, 2)).channels for a in ("ticket", "reinit", "finetune")]
        for other in found[1:]:
            assert all(torch.equal(other[name], stay) for name, stay in found[0].items())

    def test_a_tickets_weights_are_those_of_the_initialization(self, labs, method):
        of, lab = labs(method)
        groups, values = tracing.trace(whole(), SHAPE), initial()
        for level in (1, 2):
            state = start(of, lab, "ticket", level)
            masks = structure.masks(groups, state.channels, values)
            for name, tensor in (state.params | state.buffers).items():
                flat = values[name][masks[name]] if name in masks else values[name].flatten()
                assert torch.equal(tensor.flatten(), flat)
            assert (state.step, state.optimizer, state.masks) == (0, {}, {})

    def test_fine_tuning_begins_with_what_was_trained(self, labs, method):
        of, lab = labs(method)
        parent = lab.weights(at(of, "dense", 0))
        state = start(of, lab, "finetune", 1)
        groups, values = tracing.trace(whole(), SHAPE), parent.params | parent.buffers
        masks = structure.masks(groups, state.channels, values)
        changed = set()
        for name, tensor in (state.params | state.buffers).items():
            flat = values[name][masks[name]] if name in masks else values[name].flatten()
            if not torch.equal(tensor.flatten(), flat):
                changed.add(name)
        if of.study.prune.adjust is None:
            assert changed == set()
        else:  # the second convolution of each block read what the first one lost
            assert changed == {name for name in state.params if "conv2.weight" in name}

    def test_a_fresh_network_is_drawn_as_the_smaller_network_it_is(self, labs, method):
        of, lab = labs(method)
        state = start(of, lab, "reinit", 2)
        wanted = structure.shapes(state.params | state.buffers)
        smaller = structure.resized(whole(), wanted)
        params, buffers = initial_parameters(lambda: smaller, GlorotNormal(), 0, "reinit")
        for name, value in params.items():
            is_scale = "norm" in name and name.endswith("weight")
            assert torch.equal(state.params[name], torch.ones_like(value) if is_scale else value)
        for name, value in buffers.items():
            is_variance = name.endswith("running_var")
            expected = torch.ones_like(value) if is_variance else value
            assert torch.equal(state.buffers[name], expected)

    def test_what_is_stored_is_what_was_trained(self, labs, method):
        of, lab = labs(method)
        for arm in ("ticket", "reinit", "finetune"):
            address = at(of, arm, 2)
            state, record = lab.weights(address), lab.record(address)
            wide = [p.numel() for p in state.params.values() if p.dim() > 1]
            assert record.kept == sum(wide)
            if "" not in of.study.prune.selection.counts({"a": 9}, {"a": "convolution"}, 1):
                assert record.kept == of.counts[2]
            assert record.status == "done"
            assert record.evaluations[-1].step == of.runs[address].clock[1]


def test_a_network_begun_by_its_constructor_is_begun_so_at_its_smaller_size(labs):
    """Fresh weights are of the stream `reinit`, and of the range of a layer of that size."""
    of, lab = labs("l1-norm")
    address = at(of, "reinit", 1)
    run = of.runs[address]
    fresh = run.start.weights.model_copy(update={"initialization": TorchDefault()})
    begun = run.start.model_copy(update={"weights": fresh})
    state = Workshop(lab, "cpu").beginning(run.model_copy(update={"start": begun}))
    smaller = structure.resized(whole(), structure.shapes(state.params | state.buffers))
    for name, layer in initialize.layers(smaller):
        drawn, bound = state.params[name], fans(layer)[0] ** -0.5
        assert 0.7 * bound < float(drawn.abs().max()) <= bound
    assert bool((state.params["norm1.weight"] == 1).all())
    other = initial_parameters(whole, TorchDefault(), 0)[0]["output.bias"]
    assert not torch.equal(state.params["output.bias"], other)


def test_a_smaller_network_computes_what_the_masked_one_does(labs):
    of, lab = labs("l1-norm")
    parent, state = lab.weights(at(of, "dense", 0)), start(of, lab, "finetune", 1)
    groups, values = tracing.trace(whole(), SHAPE), parent.params | parent.buffers
    masks = structure.masks(groups, state.channels, values)
    masked = {
        n: t * masks[n] if n in masks and n in parent.params else t for n, t in values.items()
    }
    inputs = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = functional_call(whole().eval(), masked, (inputs,))
        tensors = state.params | state.buffers
        smaller = structure.resized(whole().eval(), structure.shapes(tensors))
        found = functional_call(smaller, tensors, (inputs,))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_stopped_run_goes_on_to_the_same_bits(labs, tmp_path):
    of, unbroken = labs("l1-norm")
    lab, stopped = Lab(tmp_path / "lab"), set()
    for job in small.jobs(of):
        try:
            Workshop(lab, "cpu").perform(job, lambda step, job=job: step > job.run.clock[0])
        except Stopped:
            stopped.add(job.address)
            assert Workshop(lab, "cpu").perform(job) == "trained"
    assert {at(of, arm, 2) for arm in ("ticket", "reinit")} <= stopped
    for address in of.runs:
        ours, theirs = lab.weights(address).tensors(), unbroken.weights(address).tensors()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lab.close()


def test_the_cost_of_a_level_is_that_of_its_smaller_network(labs):
    of, lab = labs("l1-norm")
    address = at(of, "ticket", 2)
    state, run = lab.weights(address), of.runs[address]
    smaller = structure.resized(whole(), structure.shapes(state.params | state.buffers))
    counted = sum(flops.multiply_adds(smaller, SHAPE).values())
    assert of.flops(address) == flops.training_flops(counted, run.recipe.batch_size, 4)


SCRATCH = ["dense", "scratch-e", "scratch-b", "scratch-b-plus", "finetune", "finetune-small"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Arms at different budgets, of smaller and of masked networks."""
    layerwise = {"hidden": 0.5, "convolution": 0.5, "output": 0.0}
    recipe = SHORT | {"steps": 8, "schedule": {"kind": "step-drops", "at": [4, 6]}}
    made = {}
    for name, prune in (("channels", FILTERS), ("weights", {"selection": layerwise})):
        of = small.graph(recipe, model=RESNET, prune=prune, num_seeds=1, arms=SCRATCH, levels=1)
        made[name] = of, small.trained(of, tmp_path_factory.mktemp(name) / "lab")
    return made


@pytest.mark.parametrize("name", ["channels", "weights"])
class TestScratch:
    def test_scratch_b_costs_what_the_dense_network_does(self, scratch, name):
        of, lab = scratch[name]
        dense = sum(flops.multiply_adds(whole(), SHAPE).values())
        for arm, more in (("scratch-b", 0), ("scratch-b-plus", 2)):
            address = at(of, arm, 1)
            state = lab.weights(address)
            network = structure.resized(whole(), structure.shapes(state.params | state.buffers))
            each = flops.multiply_adds(network, SHAPE)
            kept = sum(flops.masked_multiply_adds(each, state.masks).values())
            steps = lab.record(address).evaluations[-1].step
            assert steps == 8 * dense // kept + more > 8
            assert of.clock(address) == (0, steps)
            spent = flops.training_flops(kept, of.study.recipe.batch_size, steps)
            assert of.flops(address) == spent

    def test_scratch_e_takes_the_recipes_steps(self, scratch, name):
        of, lab = scratch[name]
        assert lab.record(at(of, "scratch-e", 1)).evaluations[-1].step == 8

    def test_the_rates_drops_are_stretched_with_it(self, scratch, name):
        of, _ = scratch[name]
        address = at(of, "scratch-b", 1)
        run, (_, last) = of.runs[address], of.clock(address)
        dense = sum(flops.multiply_adds(whole(), SHAPE).values())
        kept = of.flops(address) // (6 * run.recipe.batch_size * last)
        recipe = run.trained_by(dense, kept)
        assert recipe.schedule.at == (last // 2, last * 3 // 4)

    def test_fine_tuning_at_a_small_rate_has_that_rate_throughout(self, scratch, name):
        of, _ = scratch[name]
        run = of.runs[at(of, "finetune-small", 1)]
        recipe = run.trained_by(1, 1)
        assert run.clock == (8, 10)
        rates = [recipe.rate(step) for step in range(8, 10)]
        assert rates == [pytest.approx(0.01 * run.recipe.learning_rate)] * 2
        assert of.runs[at(of, "finetune", 1)].clock == (6, 8)


def test_a_small_rate_is_what_it_is_trained_at(scratch):
    """A step of Adam moves a weight by about its rate; there are two."""
    of, lab = scratch["channels"]
    begun = start(of, lab, "finetune-small", 1).params
    after = lab.weights(at(of, "finetune-small", 1)).params
    furthest = max(float((after[name] - begun[name]).abs().max()) for name in begun)
    assert 0 < furthest < 2 * 2 * 0.01 * of.study.recipe.learning_rate


def test_scratch_e_of_weights_is_reinit():
    of = small.graph(SHORT, arms=["dense", "reinit", "scratch-e"])
    assert at(of, "reinit", 1) == at(of, "scratch-e", 1)


EPOCHS = {"resnet-56-a": 178, "resnet-56-b": 220, "resnet-110-a": 190, "resnet-110-b": 260}


@pytest.mark.parametrize(("target", "epochs"), [*EPOCHS.items(), ("vgg-16-a", 243)])
def test_scratch_b_takes_the_papers_epochs(target, epochs):
    """Of 160: 1810.05270's code, cifar/l1-norm-pruning."""
    model = target.rpartition("-")[0]
    prune = FILTERS | {"selection": {"kind": "published", "target": target}}
    data = torch.zeros(200, 3, 32, 32, dtype=torch.uint8), torch.arange(200) % 10
    of = small.graph(
        SHORT | {"steps": 160}, model=model, prune=prune, num_seeds=1, data=data, levels=1,
        arms=["dense", "scratch-b"],
    )  # fmt: skip
    assert of.clock(at(of, "scratch-b", 1)) == (0, epochs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["dense", "shuffled"]}, "`arms` must not include `shuffled` where"),
        ({"arms": ["dense", "random"]}, "`arms` must not include `random` where"),
        ({"arms": ["signed-constant"]}, "not include `signed-constant` .* of single weights' sign"),
        ({"arms": ["dense", "ticket"], "metric": "mask_overlap"}, "`metric` must be of a training"),
    ],
)
def test_what_arranges_masks_needs_masks(changes, message):
    with pytest.raises(ValueError, match=message):
        graph(FILTERS, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": {"kind": "ratios", "removed": [0.5]}}, "a fraction for each of 12; got 1"),
        (
            {"selection": {"kind": "published", "target": "vgg-16-a"}},
            "vgg-16-a must prune channels",
        ),
        ({"selection": {"convolution": 0.95, "output": 0.0}}, "got 0 of `conv1.weight` at level 1"),
        ({"structure": {"kind": "channels", "exclude": ["convx"]}}, "`convx` fits none"),
        ({"structure": {"kind": "channels", "exclude": ["*"]}}, "must leave a group of channels"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(changes, message):
    with pytest.raises(SpecError, match=message):
        graph(FILTERS | changes)


def test_a_method_for_normalized_networks_is_refused_without():
    with pytest.raises(SpecError, match=r"those of `conv1\.weight` are not"):
        small.graph(SHORT, model={"kind": "conv-2", "width": 0.1}, prune=SLIM)


def test_a_stretched_recipe_drops_its_rate_at_the_same_fractions():
    recipe = Recipe(steps=160, schedule=StepDrops(at=(80, 120)))
    longer = recipe.stretched(243)
    assert (longer.steps, longer.schedule.at) == (243, (121, 182))
    assert recipe.stretched(160) == recipe
    assert Recipe(steps=10).stretched(25) == Recipe(steps=25)


@pytest.mark.parametrize("name", ["norm1.running_mean", "stage2.block1.conv1.weight"])
def test_a_smaller_network_that_is_not_what_it_says_is_never_trained(labs, monkeypatch, name):
    of, lab = labs("l1-norm")
    honest = structure.shrunk

    def wrong(tensors, groups, channels):
        kept = honest(tensors, groups, channels)
        kept[name] = kept[name].flip(0)
        return kept

    monkeypatch.setattr(structure, "shrunk", wrong)
    with pytest.raises(tickets.BrokenTicket, match=f"what stays of `{name}` differs"):
        start(of, lab, "finetune", 1)


class Embedded(nn.Module):
    """Channels, and a parameter of two axes that is no layer's."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(64, 64))
        self.first, self.second = nn.Linear(64, 12), nn.Linear(12, 10)

    def forward(self, inputs):
        return self.second(torch.relu(self.first(inputs.flatten(1) @ self.table)))


def test_weights_that_cannot_be_pruned_are_not_counted_as_kept(tmp_path):
    prune = {"criterion": "filter-norm", "structure": "channels", "selection": {"hidden": 0.5}}
    of = small.graph(SHORT, model=Embedded, prune=prune, levels=1, num_seeds=1)
    lab = small.trained(of, tmp_path / "lab")
    assert lab.record(at(of, "ticket", 1)).kept == 64 * 6 + 6 * 10
    lab.close()
