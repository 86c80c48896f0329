"""Studies whose networks begin by schemes that look further than a layer."""

import pytest
import small
import torch
from torch import nn

from windfall import initialize, spec, verbs
from windfall.data import Order, load
from windfall.levels import Chain
from windfall.runs import Fresh
from windfall.spec import SpecError
from windfall.worker import Workshop

SHORT = {"steps": 10, "eval_every": 5}
WITHOUT_DATA = [*spec.members(initialize.Drawn), "stage-scaled", "weight-norm"]


def graph(**changes):
    settings = {"num_seeds": 1, "levels": 1, "arms": ["ticket", "reinit"]} | changes
    return small.graph(SHORT, **settings)


def variances(module, inputs):
    """Of what each linear layer makes, in the order they run."""
    found = []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda *told: found.append(float(told[2].var(correction=0))))
    with torch.no_grad():
        module(inputs)
    return found


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_a_study_of_pruned_networks_begins_by_it(name, tmp_path):
    norm = "weight" if name == "weight-norm" else "none"
    model = {"kind": "mlp", "hidden": [16, 8], "norm": norm}
    of = graph(model=model, initialization=name)
    lab = small.trained(of, tmp_path)
    for address, run in of.runs.items():
        kept = lab.masks(address)
        trained = lab.weights(address)
        assert not trained.diverged
        if run.parent is not None:
            assert sum(int(mask.sum()) for mask in kept.values()) > 0
        for mask_name, mask in kept.items():
            assert not trained.params[mask_name][~mask].any()


@pytest.mark.slow
def test_a_residual_study_begins_by_fixup(tmp_path):
    model = {"kind": "resnet-20", "width": 0.125, "norm": "none", "gates": True}
    of = graph(model=model, initialization="fixup")
    lab = small.trained(of, tmp_path)
    assert all(not lab.weights(address).diverged for address in of.runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lsuv", "data-dependent", "weight-norm"])
def test_a_smaller_network_newly_initialized_is_begun_at_its_own_size(name, tmp_path):
    of = graph(
        model={"kind": "conv-2", "width": 0.1, "norm": "weight"},
        initialization=name,
        prune={
            "criterion": "filter-norm",
            "selection": {"convolution": 0.3, "hidden": 0.3, "output": 0.0},
            "structure": "channels",
        },
        arms=["finetune", "scratch-e"],
    )
    lab = small.trained(of, tmp_path)
    whole, *smaller = (lab.weights(address).params["conv2.gain"].numel() for address in of.runs)
    assert (whole, set(smaller)) == (6, {4})
    assert all(not lab.weights(address).diverged for address in of.runs)


def test_a_run_is_calibrated_on_the_batch_that_its_training_begins_with(tmp_path):
    of = graph(initialization="lsuv")
    workshop = Workshop(small.trained(of, tmp_path), "cpu")
    run = next(run for run in of.runs.values() if run.parent is None)
    data, state = workshop.data(run), workshop.initial(run, run.start)
    module = workshop.network(run).double()
    module.load_state_dict(state.params | state.buffers)
    order = Order(run.seed, len(data.train), run.recipe.batch_size)
    inputs = data.prepare(data.train.inputs[torch.from_numpy(order.batch(0))], torch.float64)
    assert variances(module, inputs) == pytest.approx([1, 1, 1], rel=1e-5)  # float32 rounds
    other = data.prepare(data.train.inputs[torch.from_numpy(order.batch(1))], torch.float64)
    assert variances(module, other) != pytest.approx([1, 1, 1], rel=1e-3)


def test_one_initialization_is_one_whatever_the_order_of_the_data(tmp_path):
    of = graph(initialization="data-dependent")
    workshop = Workshop(small.trained(of, tmp_path), "cpu")
    run = next(run for run in of.runs.values() if run.parent is None)
    fixed = Fresh(initialization=run.start.initialization, seed=run.seed)
    reordered = run.model_copy(update={"seed": run.seed + 1})
    one, other = workshop.initial(run, run.start), workshop.initial(reordered, fixed)
    assert all(torch.equal(one.params[name], other.params[name]) for name in one.params)
    assert one.params["hidden1.bias"].any()


def test_a_network_that_a_scheme_is_not_for_says_so_before_it_is_trained(tmp_path):
    with pytest.raises(SpecError, match=r"^`initialization` weight-norm must be given"):
        small.trained(graph(initialization="weight-norm"), tmp_path)


UNFIT = {
    "lottery": ("initialization", "fixup"),
    "rethinking": ("initialization", "weight-norm"),
    "stability": ("experiment.initialization", "weight-norm"),
    "bn-bias": ("experiment.initialization", "weight-norm"),
    "depth": ("experiment.initialization", "fixup"),
}


@pytest.mark.parametrize(("name", "field", "scheme"), [(n, *of) for n, of in UNFIT.items()])
def test_one_that_is_not_defined_for_the_network_is_refused_before_the_start(
    name, field, scheme, tmp_path
):
    settings = {field: scheme} | ({"arms": ["he-20"]} if name == "depth" else {})
    with pytest.raises(SpecError, match=r"`initialization` (fixup|weight-norm) must be given"):
        verbs.run(name, settings, lab=tmp_path / "lab", workers=1)
    assert not list((tmp_path / "lab").glob("**/*.safetensors"))


def test_a_chain_begins_by_a_scheme_that_looks_at_its_first_batch():
    of = Chain(initialization="lsuv", recipe=SHORT | {"batch_size": 50})
    whole = load(of.data)
    begun = of._initial(3)
    network = of._built().double()
    network.load_state_dict(begun.params | begun.buffers)
    first = Order(3, len(whole.train), 50).batch(0)
    inputs = whole.prepare(whole.train.inputs[torch.from_numpy(first)], torch.float64)
    assert variances(network, inputs) == pytest.approx([1, 1, 1], abs=1e-5)
