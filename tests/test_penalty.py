"""Sparsity training: the penalty on the scales of normalizations."""

import pytest
import small
import torch
from torch.nn import functional as F

from windfall import models, train
from windfall.data import Digits, load
from windfall.engines import rule, separate, sparse, stacked
from windfall.engines.contract import Task, Unsupported
from windfall.initialize import GlorotNormal, initial_parameters
from windfall.spec import SpecError
from windfall.train import Recipe, ScalePenalty, Sgd, State

SHAPE = (1, 8, 8)
NETWORK = {"kind": "resnet-20", "width": 0.125}
PENALTY = {"kind": "scale-penalty", "strength": 0.01}
SLIM = {"criterion": "normalization-scale", "selection": {"kind": "global", "rate": 0.4},
        "structure": "channels"}  # fmt: skip


def build():
    return models.Resnet_20(width=0.125).build(SHAPE, 10)


def graph(**recipe):
    short = {"steps": 6, "eval_every": 3, "penalty": PENALTY} | recipe
    return small.graph(short, model=NETWORK, num_seeds=1, levels=1, prune=SLIM)


def task(penalty, steps=3):
    recipe = Recipe(
        optimizer=Sgd(momentum=0.9), learning_rate=0.1, steps=steps, batch_size=16, eval_every=10,
        dtype="float64", penalty=penalty,
    )  # fmt: skip
    return Task(build(), load(Digits()), recipe, 0, steps)


def beginning():
    params, buffers = initial_parameters(build, GlorotNormal(), 0)
    double = {n: b.double() if b.is_floating_point() else b for n, b in buffers.items()}
    return State(0, {name: param.double() for name, param in params.items()}, double)


def test_its_gradient_is_that_of_the_loss_with_the_penalty_beside_it():
    """The twin differentiates loss + strength · sum |gamma|, and steps by hand."""
    strength, job = 0.05, task(ScalePenalty(strength=0.05))
    found = separate.train(job, beginning())
    network = build().double().train()
    state = beginning()
    network.load_state_dict(state.params | state.buffers)
    moments = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    scales = [name for name in moments if "norm" in name and name.endswith("weight")]
    assert len(scales) == 21
    for step in range(3):
        index = torch.from_numpy(job.order.batch(step))
        inputs = job.data.prepare(job.data.train.inputs[index], torch.float64)
        loss = F.cross_entropy(network(inputs), job.data.train.labels[index])
        params = dict(network.named_parameters())
        loss = loss + strength * sum(params[name].abs().sum() for name in scales)
        slopes = torch.autograd.grad(loss, list(params.values()))
        with torch.no_grad():
            for (name, param), slope in zip(params.items(), slopes, strict=True):
                moments[name].mul_(0.9).add_(slope)
                param.sub_(0.1 * moments[name])
    for name, param in network.named_parameters():
        torch.testing.assert_close(found.params[name], param.detach(), rtol=1e-10, atol=1e-12)


def test_it_makes_scales_smaller():
    ends = [separate.train(task(p, 40), beginning()) for p in (None, ScalePenalty(strength=0.01))]
    sizes = [
        sum(float(p.abs().sum()) for n, p in end.params.items() if "norm" in n and "weight" in n)
        for end in ends
    ]
    assert sizes[1] < 0.95 * sizes[0]


def test_only_the_dense_run_is_trained_with_it():
    of = graph()
    penalties = {node.arm: of.runs[node.address].recipe.penalty for node in of.nodes}
    assert penalties == {
        "dense": ScalePenalty(strength=0.01), "ticket": None, "reinit": None, "finetune": None
    }  # fmt: skip


def test_a_study_of_network_slimming_runs(tmp_path):
    of = graph()
    lab = small.trained(of, tmp_path / "lab")
    engines = {lab.record(node.address).engine for node in of.nodes}
    assert engines == {"separate/cpu"}
    lab.close()


def test_without_it_addresses_are_as_before():
    assert "penalty" not in Recipe().to_json()
    assert Recipe(penalty=ScalePenalty()).address != Recipe().address


def test_other_engines_refuse_it():
    job, recipe = task(ScalePenalty()), Recipe(penalty=ScalePenalty())
    message = r"`engine` must be separate or auto where `recipe\.penalty` is set; got"
    for one in (
        lambda: sparse.train(job, beginning()),
        lambda: stacked.train([job], [beginning()]),
        lambda: rule.choose("sparse", build(), SHAPE, 0.1, "cpu", recipe),
        lambda: rule.choose("stacked", build(), SHAPE, 0.1, "cpu", recipe),
    ):
        with pytest.raises(Unsupported, match=message):
            one()
    choice = rule.choose("auto", build(), SHAPE, 0.1, "cpu", recipe)
    assert choice == rule.Choice("separate", "`recipe.penalty` is known to `separate` alone.")


def test_a_network_without_normalization_is_refused_before_anything_is_trained():
    with pytest.raises(SpecError, match=r"`recipe\.penalty` scale-penalty must be used with a"):
        small.graph({"penalty": PENALTY})


def test_an_impossible_strength_is_refused():
    with pytest.raises(ValueError, match="greater than 0"):
        train.ScalePenalty(strength=0)
