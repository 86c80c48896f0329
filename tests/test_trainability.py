"""Whether a network trains: at the best of its rates, from one start, and told when it does not."""

import pytest
import torch

from windfall import experiments, models
from windfall.initialize import KaimingNormal, TorchDefault, WeightNorm
from windfall.spec import SpecError, checked
from windfall.train import Recipe
from windfall.trainability import Trainability

SHORT = Recipe(steps=150, eval_every=150, batch_size=64)


def mlp(depth, units, norm="none"):
    return models.Mlp(hidden=(units,), repeat=depth, norm=norm)


def probe(**changes):
    return Trainability(**{"model": mlp(2, 16), "recipe": SHORT} | changes)


def test_a_shallow_network_trains_and_the_best_rate_counts():
    found = probe(learning_rates=(0.05, 1e-9)).run(0).values
    assert float(found["trains@0.05"]) == 1
    assert float(found["trains@1e-09"]) == 0
    assert float(found["accuracy"]) == float(found["accuracy@0.05"])
    assert float(found["trains"]) == 1
    assert set(found) == set(probe(learning_rates=(0.05, 1e-9)).metrics())


def test_every_rate_begins_at_the_same_weights():
    one = probe(learning_rates=(0.05, 0.01)).run(1).values
    other = probe(learning_rates=(0.01,)).run(1).values
    assert torch.equal(one["accuracy@0.01"], other["accuracy@0.01"])


def test_what_diverges_counts_as_at_the_start():
    found = probe(learning_rates=(1e9,), initialization=KaimingNormal()).run(0).values
    assert float(found["trains"]) == 0
    assert 0 <= float(found["accuracy"]) < 0.5


def test_the_signal_is_what_reaches_the_outputs_of_deep_networks():
    normed = mlp(30, 64, "weight")
    kept = probe(model=normed, initialization=WeightNorm(), learning_rates=(1e-9,))
    lost = probe(model=mlp(30, 64), initialization=TorchDefault(), learning_rates=(1e-9,))
    assert float(kept.run(0).values["signal"]) > -2
    assert float(lost.run(0).values["signal"]) < -6


def test_a_scheme_that_does_not_fit_is_refused_before_the_start():
    with pytest.raises(SpecError, match="weight-normalized"):
        experiments.check(probe(initialization=WeightNorm()))
    with pytest.raises(SpecError, match="`learning_rates"):
        checked(lambda: probe(learning_rates=()))


def test_its_steps_are_told_over_all_rates():
    steps = []
    probe(learning_rates=(0.01, 0.02)).run(0, steps.append)
    assert steps == list(range(300))
    assert probe(learning_rates=(0.01, 0.02)).num_steps() == 300


def test_a_deep_residual_network_without_batch_normalization_trains_where_gains_are_scaled():
    deep = models.Preresnet_110(width=0.25, norm="weight", blocks=24)
    recipe = SHORT.model_copy(update={"steps": 30, "eval_every": 30, "batch_size": 16})
    fit, lost = (
        probe(model=deep, recipe=recipe, initialization=scheme, learning_rates=(0.1,)).run(0)
        for scheme in (WeightNorm(), WeightNorm(preserve="one"))
    )
    assert -2 < float(fit.values["signal"]) < 0  # the mean over places takes some
    assert float(lost.values["signal"]) > 3 + float(fit.values["signal"])
    assert float(fit.values["accuracy"]) > 0.3 + float(lost.values["accuracy"])
