"""Beginnings: experiments on networks that are only begun, never trained.

readings = Propagation(width=1000).run(seed=0)
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from windfall import curvature, data, flops, models, propagation, seeds
from windfall.data import Data
from windfall.initialize import Initialization, KaimingNormal, initial_parameters
from windfall.inputs import loaded
from windfall.masks import Params
from windfall.measures import Readings
from windfall.models import ModelField
from windfall.probes import gathered
from windfall.propagation import Gains, Scaling
from windfall.spec import Spec
from windfall.structure import given

LAST = 38.5  # log10 of the largest float32
SMALLEST, LARGEST = -45.0, 308.0  # log10, of what is told of a Hessian in float64


class Propagation(Spec):
    """How a deep ReLU network of random weights keeps the norms of signals; see `propagation`.

    Nothing is trained. Read of one network, over all its layers and points:

    - `forward-deviation`: mean of |1 - |h_l| / |x||; `backward-deviation`: that of weight-gradient
      norms over |x| |δ|; `scaled-deviation`: the forward one times sqrt(width);
    - `forward-ratio`: mean of |h_L| / |x|, `forward-spread`: its standard deviation over points;
    - `worst`: the largest |1 - |h_l|² / |x|²|; `bound`: see `propagation.bound`;
    - `forward/LAYER`, `backward/LAYER`: mean ratios of each layer.

    Source: Arpit & Bengio 2019 (1901.03611), figures 1, 2 and 6.

    Args:
        width: m, of every hidden layer.
        depth: L, hidden layers.
        num_points: N, inputs x ~ N(0, I).
        dimension: of x.
        num_outputs: of the output layer.
        scaling: of weights: `he`, N(0, 2/m), or `glorot`, N(0, 1/m).
    """

    width: PositiveInt = 500
    depth: PositiveInt = 10
    num_points: PositiveInt = 2000
    dimension: PositiveInt = 500
    num_outputs: PositiveInt = 20
    scaling: Scaling = "he"

    def metrics(self) -> list[str]:
        """The names of what is read."""
        parts = ("forward", "backward")
        each = [f"{part}/layer{layer}" for part in parts for layer in range(1, self.depth + 1)]
        names = ["forward-deviation", "backward-deviation", "scaled-deviation"]
        return [*names, "forward-ratio", "forward-spread", "worst", "bound", *each]

    def check(self) -> None:
        """Nothing can be wrong that is not told by its fields."""

    def num_steps(self) -> int:
        """One: forward and backward through all points."""
        return 1

    def num_macs(self) -> int:
        """Multiply-adds of one point, forward."""
        inner = self.width * self.width * (self.depth - 1)
        return self.width * (self.dimension + self.num_outputs) + inner

    def run(self, seed: int) -> Readings:
        """The readings of a seed's network and points."""
        drawn = seeds.stream(seed, "points").standard_normal((self.num_points, self.dimension))
        inputs = torch.from_numpy(drawn).float()
        norms = propagation.propagate(
            self.width, self.depth, inputs, self.scaling, self.num_outputs, seed
        )
        forward, backward = norms.forward.double(), norms.backward.double()
        deviation = float((1 - forward).abs().mean())
        found = {
            "forward-deviation": deviation,
            "backward-deviation": float((1 - backward).abs().mean()),
            "scaled-deviation": deviation * math.sqrt(self.width),
            "forward-ratio": float(forward[-1].mean()),
            "forward-spread": float(forward[-1].std(correction=0)),
            "worst": float((1 - forward.square()).abs().max()),
            "bound": propagation.bound(self.width, self.depth, self.num_points),
        }
        for name, ratios in (("forward", forward), ("backward", backward)):
            means = enumerate(ratios.mean(1).tolist(), start=1)
            found |= {f"{name}/layer{layer}": mean for layer, mean in means}
        return gathered({0: found}, diverged=False)


class Growth(Spec):
    """How far a residual network of random weights makes signals grow; see `propagation`.

    Nothing is trained. Read of one network, in float32: `log-growth`, the mean over points of
    log10(|h_B| / |x|), at most 38.5, where float32 ends; `log-theory`; `growth-ratio`, the mean of
    |h_B| / |x| over what theory gives, 0 where it overflows; `overflows`, 1 where it does.

    Source: Arpit et al. 2019 (1906.02341).

    Args:
        blocks: B, residual blocks of two layers.
        width: of every layer.
        num_points: inputs x ~ N(0, I).
        gains: `proposed`, sqrt(2) and sqrt(1/B), or `one`.
    """

    blocks: PositiveInt = 40
    width: PositiveInt = 100
    num_points: PositiveInt = 200
    gains: Gains = "proposed"

    def metrics(self) -> list[str]:
        """The names of what is read."""
        return ["log-growth", "log-theory", "growth-ratio", "overflows"]

    def check(self) -> None:
        """Nothing can be wrong that is not told by its fields."""

    def num_steps(self) -> int:
        """One: forward through all points."""
        return 1

    def num_macs(self) -> int:
        """Multiply-adds of one point."""
        return 2 * self.blocks * self.width * self.width

    def run(self, seed: int) -> Readings:
        """The readings of a seed's network and points."""
        drawn = seeds.stream(seed, "points").standard_normal((self.num_points, self.width))
        inputs = torch.from_numpy(drawn).float()
        ratios = propagation.residual_growth(self.width, self.blocks, inputs, self.gains, seed)
        theory = propagation.residual_theory(self.blocks, self.gains)
        is_finite = bool(ratios.isfinite().all())
        grown = ratios.double().log10().clamp(max=LAST)
        found = {
            "log-growth": float(grown.mean()),
            "log-theory": theory,
            "growth-ratio": float(ratios.double().mean()) / 10**theory if is_finite else 0.0,
            "overflows": float(not is_finite),
        }
        return gathered({0: found}, diverged=False)


class Start(Spec):
    """What experiments on a network's first weights share.

    Args:
        model: the network.
        initialization: of its weights.
        data: whose training part it is given.
    """

    model: ModelField = Field(default=models.Mlp(hidden=(64,), repeat=20), validate_default=True)
    initialization: Initialization = KaimingNormal()
    data: Data = data.Digits()

    def check(self) -> None:
        """Refuse, by a `SpecError`, data that are missing and schemes that do not fit."""
        self._begun(0)

    def num_macs(self) -> int:
        """Multiply-adds of a forward pass of one input; this reads the data."""
        return sum(flops.multiply_adds(self._built(), loaded(self.data).input_shape).values())

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def _num_seen(self) -> int:
        """The inputs of a first batch."""
        raise NotImplementedError

    def _built(self) -> nn.Module:
        whole = loaded(self.data)
        return self.model.build(whole.input_shape, whole.num_classes).to(self._dtype)

    def _batch(self, seed: int) -> tuple[Tensor, Tensor]:
        """The inputs that a seed trains on first, and their labels."""
        return loaded(self.data).first(seed, self._num_seen, self._dtype)

    def _begun(self, seed: int) -> tuple[Params, Params]:
        """The parameters and buffers of a seed."""

        def inputs() -> Tensor:
            return self._batch(seed)[0]

        return initial_parameters(self._built, self.initialization, seed, inputs=inputs)


class Sharpness(Start):
    """How sharply the loss bends where a network begins, by the Hessian over all its weights.

    Nothing is trained. Read of one network: `sharpness`, log10 of the largest absolute eigenvalue
    of the Hessian of the mean cross-entropy (see `curvature.spectral_norm`), at least -45; where it
    overflows float64, 308. `loss`, log10 of the mean cross-entropy in nats, alike.

    Source: Arpit et al. 2019 (1906.02341), the log spectral norms of its appendix.

    Args:
        model: the network.
        initialization: of its weights.
        data: whose training part it is given.
        num_inputs: of the first batch, on which the loss is.
    """

    num_inputs: PositiveInt = 256

    @property
    def _num_seen(self) -> int:
        return self.num_inputs

    def metrics(self) -> list[str]:
        """The names of what is read."""
        return ["sharpness", "loss"]

    def units(self) -> dict[str, str]:
        """The units of what is read, by name."""
        return {"sharpness": "log10 of an eigenvalue", "loss": "log10 of nats"}

    def num_steps(self) -> int:
        """One."""
        return 1

    def run(self, seed: int) -> Readings:
        """The readings of a seed's network and inputs."""
        params, buffers = self._begun(seed)
        network = given(self._built(), params | buffers).double().train()
        inputs, labels = self._batch(seed)
        with torch.no_grad():
            loss = float(F.cross_entropy(network(inputs.double()), labels))
        bent = curvature.spectral_norm(network, inputs, labels)
        return gathered({0: {"sharpness": _log(bent), "loss": _log(loss)}}, diverged=False)


def _log(value: float) -> float:
    """log10 within what is told."""
    if not math.isfinite(value):
        return LARGEST
    return max(SMALLEST, math.log10(value)) if value > 0 else SMALLEST
