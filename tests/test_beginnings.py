"""Where networks begin: how sharply the loss bends there."""

import math

import pytest
import torch

from windfall import beginnings, curvature, experiments, models
from windfall.beginnings import Sharpness
from windfall.initialize import StageScaled, WeightNorm
from windfall.spec import SpecError


def probe(depth, units=16, norm="weight", **changes):
    model = models.Mlp(hidden=(units,), repeat=depth, norm=norm)
    return Sharpness(**{"model": model, "num_inputs": 64} | changes)


def found(experiment, seed=0):
    return {name: float(value) for name, value in experiment.run(seed).values.items()}


def test_it_is_the_norm_of_the_hessian_at_the_first_weights_on_the_first_batch():
    asked = probe(2, initialization=WeightNorm())
    read = found(asked, 3)
    assert set(read) == set(asked.metrics())
    params, buffers = asked._begun(3)
    network = asked._built()
    network.load_state_dict(params | buffers)
    inputs, labels = asked._batch(3)
    assert len(inputs) == 64
    whole = curvature.spectral_norm(network, inputs, labels)
    assert read["sharpness"] == pytest.approx(math.log10(whole), abs=1e-9)
    loss = torch.nn.functional.cross_entropy(network.double()(inputs.double()), labels).detach()
    assert read["loss"] == pytest.approx(math.log10(float(loss)), abs=1e-9)


def test_gains_of_one_in_many_residual_blocks_bend_the_loss_far_more():
    deep = models.Preresnet_110(width=1 / 16, norm="weight", blocks=8)
    fit, one = (
        found(Sharpness(model=deep, initialization=scheme, num_inputs=16))["sharpness"]
        for scheme in (WeightNorm(), WeightNorm(preserve="one"))
    )
    assert one > fit + 1


def test_what_overflows_is_told_as_a_number_and_so_is_nothing():
    assert beginnings._log(math.inf) == 308
    assert beginnings._log(math.nan) == 308
    assert beginnings._log(0.0) == -45
    assert beginnings._log(100.0) == pytest.approx(2)


def test_schemes_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match="weight-normalized"):
        experiments.check(probe(2, norm="none", initialization=WeightNorm()))
    experiments.check(probe(2, initialization=StageScaled()))
