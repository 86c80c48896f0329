"""Signals: what becomes of inputs on their way up a network, and of errors on their way down.

One pass each way over a batch, layer by layer: the lengths of activations beside the input's and of
gradients beside the outputs', units that are dead or always on, how alike the activations of
different inputs are, and of how many dimensions they are.

    found = measured(network, inputs, labels)
    [(layer.name, layer.norms.mean(), layer.dead) for layer in found.layers]

Masks multiply weights: a masked network is measured by `tensors=masks.apply(masks, params)`.

Source: Arpit & Bengio 2019 (1901.03611), its statistics |h_l|/|x| and |g_l|/|g_L|; Glorot & Bengio
2010, section 4.2; Schoenholz et al. 2017 (1611.01232) for correlations.
"""

import contextlib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from windfall import activations, jacobians, seeds
from windfall.activations import Nonfinite, Signal, Watch, finite
from windfall.jacobians import Jacobian
from windfall.masks import Params
from windfall.spec import Json, SpecError
from windfall.structure import Normalization

NUM_JACOBIANS = 16  # inputs whose Jacobians are taken: each costs a backward pass an output


@dataclass(frozen=True)
class Signals:
    """What goes through a network.

    Args:
        layers: in the order in which they run.
        norms: |x|, [sample], float64.
        scale: the root of the inputs' mean square.
        offset: the largest |mean| / deviation of a channel (images) or of all entries (vectors).
        spread: the deviation of the channel that is farthest from 1 as a factor, or of all entries.
        correlation: of the inputs.
        gradients: |g_L|, of the loss by the outputs, [sample].
        num_outputs: of one sample.
        output_scale: the root of the mean square of the outputs' deviations from their mean over a
            sample's outputs: what a softmax sees of them.
        output_nonfinite: of the outputs.
        loss: mean cross-entropy; None without labels, or where it is not finite.
        jacobian: of the first inputs; None where it is not finite.
    """

    layers: tuple[Signal, ...]
    norms: Tensor
    scale: float
    offset: float
    spread: float
    correlation: float | None
    gradients: Tensor
    num_outputs: int
    output_scale: float | None
    output_nonfinite: Nonfinite | None
    loss: float | None
    jacobian: Jacobian | None

    def forward(self, layer: Signal) -> Tensor:
        """|h_l| / |x|, [sample]."""
        return layer.norms / self.norms

    def backward(self, layer: Signal) -> Tensor | None:
        """|g_l| / |g_L|, [sample]; None where no gradient reaches the layer."""
        return None if layer.gradients is None else layer.gradients / self.gradients

    @property
    def hidden(self) -> list[Signal]:
        """The layers with weights but the last, which makes the outputs."""
        return [layer for layer in self.layers if layer.kind == "weights"][:-1]

    def forward_deviation(self) -> float | None:
        """The mean over activations and samples of |1 - |h_l| / |x||.

        Source: Arpit & Bengio 2019 (1901.03611), the statistic of its Figure 1.
        """
        ratios = [self.forward(each) for each in self.layers if each.kind == "activation"]
        return _deviation(ratios)

    def backward_deviation(self) -> float | None:
        """The mean over hidden layers and samples of |1 - |h_{l-1}| |g_l| / (|x| |δ|)|.

        |h_{l-1}| |g_l| is the norm of the gradient of a fully connected layer's weight, δ the
        gradient by the last hidden layer's pre-activations.

        Source: Arpit & Bengio 2019 (1901.03611), the statistic of its Figure 2.
        """
        last = self.hidden[-1].gradients if self.hidden else None
        parts = [
            each.reads * each.gradients / (self.norms * last)
            for each in self.hidden
            if each.reads is not None and each.gradients is not None and last is not None
        ]
        return _deviation(parts)

    def document(self) -> Json:
        """Everything as JSON, without NaN: null, and a word under `nonfinite`."""
        return {
            "inputs": {
                "num": len(self.norms),
                "norm": _mean(self.norms),
                "scale": self.scale,
                "offset": self.offset,
                "spread": self.spread,
                "correlation": self.correlation,
            },
            "layers": [self._row(layer) for layer in self.layers],
            "outputs": {
                "num": self.num_outputs,
                "scale": self.output_scale,
                "nonfinite": self.output_nonfinite,
                "gradient": _mean(self.gradients),
                "loss": self.loss,
                "chance_loss": None if self.loss is None else math.log(self.num_outputs),
            },
            "jacobian": self.jacobian and _told(self.jacobian),
            "deviation": {
                "forward": self.forward_deviation(),
                "backward": self.backward_deviation(),
            },
        }

    def _row(self, layer: Signal) -> Json:
        told = (
            "name",
            "kind",
            "scale",
            "variance",
            "nonfinite",
            "dead",
            "always_on",
            "correlation",
        )
        more = ("rank", "effective_rank", "gain", "norm", "has_bias", "weight_gradient")
        back = layer.gradients
        return {
            **{key: getattr(layer, key) for key in told},
            "norm_mean": _mean(layer.norms),
            "forward": _spread(self.forward(layer)),
            "gradient": None if back is None else _mean(back),
            "gradient_nonfinite": None if back is None else activations.nonfinite(back),
            "backward": _spread(self.backward(layer)),
            **{key: getattr(layer, key) for key in more},
        }


def _mean(values: Tensor) -> float | None:
    return finite(float(values.mean()))


def _spread(values: Tensor | None) -> Json | None:
    """The mean over samples, and the values that a tenth of them are below and above."""
    if values is None or not len(values) or activations.nonfinite(values):
        return None
    low, high = values.quantile(torch.tensor([0.1, 0.9]).to(values)).tolist()
    return {"mean": float(values.mean()), "low": low, "high": high}


def _deviation(ratios: Sequence[Tensor]) -> float | None:
    return finite(float((1 - torch.stack([*ratios])).abs().mean())) if ratios else None


def _told(found: Jacobian) -> Json:
    return {
        "num_inputs": len(found.top),
        "top": found.top.mean(0).tolist(),
        "mean_square": float(found.mean_square.mean()),
        "is_exact": found.is_exact,
    }


def measured(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    tensors: Params | None = None,
    seed: int = 0,
    num_jacobians: int = NUM_JACOBIANS,
) -> Signals:
    """What goes through a network in evaluation mode; it is left as it is.

    A BatchNorm whose statistics are still those of its constructor, 0 and 1, normalizes by this
    batch's, as it would in training; they are held fixed while derivatives are taken, so that each
    sample is by itself. Others keep theirs.

    Args:
        network: of inputs [sample, ...] into outputs [sample, ...].
        inputs: as it is given them, at least one.
        labels: [sample], for the loss, cross-entropy. None: the gradients are of the outputs times
            a Gaussian vector of each sample, of stream (seed, "cotangent").
        tensors: parameters and buffers by name, to be used in place of the network's.
        seed: of that vector, and of what the Jacobian draws.
        num_jacobians: inputs whose Jacobians are taken; 0 for none.

    Raises:
        SpecError: when the network does not accept the inputs, cannot be differentiated, or gives
            no outputs of such a shape; when labels or tensors do not fit.
    """
    _check(network, inputs, labels, tensors or {})
    with _evaluating(network), seeds.isolated(seed, "signals"), torch.enable_grad():
        held = _held(network, tensors or {})
        given = _like(inputs, held)
        _calibrate(network, held, given)
        whole = _both_ways(network, held, given, labels, seed)
        top = None
        if num_jacobians and whole["output_nonfinite"] is None:
            top = _jacobian(network, held, given[:num_jacobians], seed)
    return Signals(**whole, jacobian=top)


def _check(
    network: nn.Module, inputs: Tensor, labels: Tensor | None, tensors: Mapping[str, Tensor]
) -> None:
    if inputs.dim() < 2 or not len(inputs):
        raise SpecError(
            f"`inputs` must be at least one, [sample, ...]; got shape {list(inputs.shape)}."
        )
    if not bool(inputs.isfinite().all()):
        raise SpecError("`inputs` must be finite; got NaN or infinity.")
    if labels is not None and labels.shape != inputs.shape[:1]:
        raise SpecError(
            f"`labels` must be {len(inputs)}, one an input; got shape {list(labels.shape)}."
        )
    known = {*dict(network.named_parameters()), *dict(network.named_buffers())}
    unknown = sorted(tensors.keys() - known)
    if unknown:
        raise SpecError(f"`tensors` must be of the network; it has no `{unknown[0]}`.")


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Generator[None]:
    with contextlib.ExitStack() as undo:
        for part in network.modules():
            undo.callback(setattr, part, "training", part.training)
        network.eval()
        yield


def _held(network: nn.Module, tensors: Mapping[str, Tensor]) -> Params:
    """Copies of a network's parameters and buffers, or of those that stand for them."""
    named = [*network.named_parameters(), *network.named_buffers()]
    return {name: tensors.get(name, own).detach().clone() for name, own in named}


def _like(inputs: Tensor, held: Params) -> Tensor:
    """Inputs on the device, and if floating of the dtype, of a network's tensors."""
    like = next((each for each in held.values() if each.is_floating_point()), inputs)
    return inputs.detach().to(like if inputs.is_floating_point() else like.device)


def _calibrate(network: nn.Module, held: Params, inputs: Tensor) -> None:
    """Give every BatchNorm that has seen nothing the statistics of this batch, in place."""

    def take(part: Any, args: tuple[Tensor, ...]) -> None:
        axes = [axis for axis in range(args[0].dim()) if axis != 1]
        part.running_mean.copy_(args[0].mean(axes))
        part.running_var.copy_(args[0].var(axes, correction=0))

    fresh = [
        part
        for path, part in network.named_modules()
        if isinstance(part, Normalization) and _is_fresh(held, f"{path}." if path else "")
    ]
    if fresh:
        with contextlib.ExitStack() as undo, torch.no_grad():
            for part in fresh:
                undo.callback(part.register_forward_pre_hook(take).remove)
            _called(network, held, inputs)


def _is_fresh(held: Params, prefix: str) -> bool:
    mean, variance = held.get(f"{prefix}running_mean"), held.get(f"{prefix}running_var")
    if mean is None or variance is None:
        return False
    return bool((mean == 0).all()) and bool((variance == 1).all())


def _called(network: nn.Module, held: Params, inputs: Tensor) -> Tensor:
    try:
        return functional_call(network, held, (inputs,))
    except Exception as problem:
        raise SpecError(
            f"The network must accept inputs of shape {list(inputs.shape)}; its forward pass raised"
            f" {problem!r}."
        ) from problem


def _both_ways(
    network: nn.Module, held: Params, inputs: Tensor, labels: Tensor | None, seed: int
) -> dict[str, Any]:
    """A pass forward and one back: the fields of `Signals` but the Jacobian."""
    for name, _ in network.named_parameters():
        held[name].requires_grad_(held[name].is_floating_point())
    begun = inputs.detach().requires_grad_(inputs.is_floating_point())
    with activations.watched(network, len(inputs)) as watch:
        # A network may write into its inputs, which it could not into a leaf.
        outputs = _called(network, held, begun.clone())
    _check_outputs(outputs, inputs)
    losses, back = _losses(outputs, labels, seed), list[Tensor]()
    outputs.register_hook(lambda gradient: back.append(activations.norms(gradient).cpu()))
    weights = {name: held[name] for name in watch.weights if name in held}
    wanted = [*weights.values(), begun] if begun.requires_grad else [*weights.values()]
    for name, slope in zip(weights, _slopes(losses.sum(), wanted), strict=False):
        if slope is not None:
            watch.weights[name].weight_gradient = finite(float(slope.double().norm()) / len(inputs))
    loss = None if labels is None else finite(float(losses.detach().double().mean()))
    gradients = back[0] if back else torch.full((len(inputs),), math.nan).double()
    return _whole(watch, inputs.detach(), outputs.detach()) | {"loss": loss, "gradients": gradients}


def _check_outputs(outputs: Any, inputs: Tensor) -> None:
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or len(outputs) != len(inputs):
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise SpecError(
            f"The network must return outputs of shape [{len(inputs)}, ...] for as many inputs; got"
            f" {got}."
        )
    if not outputs.requires_grad:
        raise SpecError(
            "The network must have a gradient path from its outputs to its weights; it has none"
            " (`no_grad`, `detach`)."
        )


def _losses(outputs: Tensor, labels: Tensor | None, seed: int) -> Tensor:
    """The loss of each sample, [sample]: cross-entropy, or a Gaussian sum of its outputs."""
    if labels is None:
        draws = seeds.stream(seed, "cotangent").standard_normal(tuple(outputs.shape))
        return (outputs * torch.from_numpy(draws).to(outputs)).flatten(1).sum(1)
    if outputs.dim() != 2 or not 0 <= int(labels.min()) <= int(labels.max()) < outputs.shape[1]:
        raise SpecError(
            f"The network must return logits [{len(labels)}, classes] of at least"
            f" {int(labels.max()) + 1} classes, as the labels have; got {list(outputs.shape)}."
        )
    return F.cross_entropy(outputs, labels.to(outputs.device), reduction="none")


def _slopes(loss: Tensor, wanted: Sequence[Tensor]) -> list[Tensor | None]:
    try:
        return [*torch.autograd.grad(loss, wanted, allow_unused=True)]
    except RuntimeError as problem:
        raise SpecError(
            f"The network must be differentiable; its backward pass raised {problem!r}."
        ) from problem


def _whole(watch: Watch, inputs: Tensor, outputs: Tensor) -> dict[str, Any]:
    wrong, flat = activations.nonfinite(outputs), outputs.flatten(1).double()
    centered = flat - flat.mean(1, keepdim=True) if flat.shape[1] > 1 else flat
    offset, spread = _channels(inputs)
    return {
        "layers": tuple(watch.seen.values()),
        "norms": activations.norms(inputs).cpu(),
        "scale": activations.scale(inputs),
        "offset": offset,
        "spread": spread,
        "correlation": activations.correlation(inputs),
        "num_outputs": flat.shape[1],
        "output_scale": None if wrong else activations.scale(centered),
        "output_nonfinite": wrong,
    }


def _channels(inputs: Tensor) -> tuple[float, float]:
    """`offset` and `spread` of `Signals`; a constant channel counts by its mean alone."""
    values = inputs.double().flatten(2).movedim(1, 0).flatten(1) if inputs.dim() > 2 else None
    values = inputs.double().reshape(1, -1) if values is None else values
    means, deviations = values.mean(1), values.std(1, correction=0)
    kept = deviations.where(deviations > 0, 1.0)
    farthest = int(kept.log().abs().argmax())
    return float((means / kept).abs().max()), float(kept[farthest])


def _jacobian(network: nn.Module, held: Params, inputs: Tensor, seed: int) -> Jacobian | None:
    if not inputs.is_floating_point():
        return None
    fixed = {name: tensor.detach() for name, tensor in held.items()}
    try:
        found = jacobians.jacobian(
            lambda given: functional_call(network, fixed, (given,)),
            inputs,
            seeds.stream(seed, "jacobian"),
        )
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]  torch documents it
        return None  # singular values are of finite matrices
    except RuntimeError as problem:
        raise SpecError(
            f"The network must be differentiable by its inputs; its Jacobian raised {problem!r}."
        ) from problem
    return found if bool(found.mean_square.isfinite().all()) else None
