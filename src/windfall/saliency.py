"""Saliency: which weights matter before any training.

What these criteria look at is the network with theta_0, in float64, without what was pruned before;
two of them look at training examples too. Dead weights score 0.

    Snip().score(evidence, ["hidden1.weight", "output.weight"])
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from windfall.evidence import Evidence
from windfall.masks import Scores
from windfall.spec import Spec, SpecError, tag
from windfall.structure import Normalization, Unit

Batch = tuple[Tensor, Tensor]
_ADDED = ("bias", "running_mean")  # no part of any path from an input to an output


class Snip(Spec):
    """Keep the weights that the loss is most sensitive to at theta_0: s = |theta g|.

    With L the mean cross-entropy of the examples and g = dL/dtheta, this is |dL/dc| of the network
    of weights c theta at c = 1. The paper divides by the sum of all, which changes no order.
    Normalizations use the statistics of their batch, as in the first step; nothing is dropped out.

    Source: Lee, Ajanthan & Torr 2019 (1810.02340), section 4 and algorithm 1.

    Args:
        batch_size: examples of a batch, at least 1.
        num_batches: whose mean gradient is taken, at least 1.
    """

    prunes: ClassVar[Unit] = "weights"
    batch_size: int = Field(default=128, ge=1)
    num_batches: int = Field(default=1, ge=1)

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """Scores per weight name, at least 0.

        Raises:
            SpecError: when the training part has fewer examples than are asked for.
        """
        network, weights = _beginning(evidence, names)
        losses = [_loss(network, batch) for batch in self._batches(evidence)]
        slopes = torch.autograd.grad(torch.stack(losses).mean(), list(weights.values()))
        return {n: score.abs() for n, score in _products(weights, slopes).items()}

    def _batches(self, evidence: Evidence) -> Iterator[Batch]:
        order, needed = evidence.order(), self.batch_size * self.num_batches
        if needed > len(order):
            raise SpecError(
                f"`prune.criterion` {tag(type(self))} must ask for no more examples than the"
                f" training part has, {len(order):,}; got {needed:,}."
            )
        for places in order[:needed].split(self.batch_size):
            yield _examples(evidence, places)


class Grasp(Spec):
    """Keep the weights whose removal would weaken the gradient's flow most: s = theta * (H g).

    H and g are the Hessian and the gradient of L, by the weights that are left: the mean
    cross-entropy, its logits divided by a temperature, of as many examples of every class. To
    remove weight j changes g'g, to first order, by -2 theta_j (H g)_j; the paper's S = -theta (H g)
    is this score's negative, and its highest are removed. Normalizations as in `Snip`.

    Source: Wang, Zhang & Grosse 2020 (2002.07376), section 4.

    Note:
        The released code initializes the last layer anew before it scores; here it keeps theta_0.

    Args:
        per_class: examples of every class, or all of a class that has fewer; at least 1.
        temperature: above 0.
    """

    prunes: ClassVar[Unit] = "weights"
    per_class: int = Field(default=10, ge=1)
    temperature: float = Field(default=200.0, gt=0)

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """Scores per weight name."""
        network, weights = _beginning(evidence, names)
        parts = list(weights.values())
        loss = _loss(network, self._batch(evidence), self.temperature)
        slopes = torch.autograd.grad(loss, parts, create_graph=True)
        flow = [
            torch.where(evidence.alive[n], g, 0.0).detach() if n in evidence.alive else g.detach()
            for n, g in zip(weights, slopes, strict=True)
        ]
        # A slope on which no weight bears, such as a last layer's alone, has no graph.
        bending = torch.autograd.grad(
            slopes, parts, grad_outputs=flow, allow_unused=True, materialize_grads=True
        )
        return _products(weights, bending)

    def _batch(self, evidence: Evidence) -> Batch:
        assert evidence.outset is not None
        order = evidence.order()
        labels = evidence.outset.labels[order]
        chosen = [order[labels == each][: self.per_class] for each in labels.unique()]
        return _examples(evidence, torch.cat(chosen))


class Synflow(Spec):
    """Keep the weights that carry most of what flows through the network: s = |theta| dR/d|theta|.

    R = 1'(prod_l |theta_l|) 1 is the sum of the products of the weights along all paths from an
    input to an output. Weights go in rounds, and each round scores what the one before left: of
    rounds 1 ... n, round k keeps of N weights N rho^(k/n), rho being the density that the
    selection states. No example is looked at. The scores that enter a unit and those that leave it
    have one sum, and so have all layers of a chain: the fewer weights a layer has left, the higher
    they score.

    Source: Tanaka et al. 2020 (2006.05467), section 6 and algorithm 1.

    Note:
        R is of the paths alone: biases are left out, where the released code adds their absolute
        values. Both agree where biases begin at 0. Everything is in float64 and in evaluation mode.

    Args:
        rounds: n, at least 1.
    """

    prunes: ClassVar[Unit] = "weights"
    rounds: int = Field(default=100, ge=1)

    def score(self, evidence: Evidence, names: Iterable[str]) -> Scores:
        """Scores per weight name of one round, at least 0.

        Raises:
            SpecError: when R is beyond what float64 holds.
        """
        network, outset = evidence.begun()
        total = flow(network, outset.input_shape)
        if not bool(total.isfinite()):
            raise SpecError(
                "`prune.criterion` synflow must be used on a network whose flow float64 can hold;"
                f" got {total.item()}. Use an initialization of smaller weights."
            )
        params = dict(network.named_parameters())
        weights = {name: params[name] for name in names}
        slopes = torch.autograd.grad(total, list(weights.values()))
        return _products(weights, slopes)


def flow(network: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    """The sum R over all paths from an input to an output of the products of |weights| along them.

    It is 0 if, and but for underflow only if, no path is left: no input can move an output.

    Source: Tanaka et al. 2020 (2006.05467), section 6.

    Args:
        network: of ReLUs, sums and poolings, in evaluation mode; its tensors are replaced by their
            absolute values, and what it adds by 0.
        input_shape: of one input.

    Returns:
        A number of the dtype of the network's parameters, with its graph.
    """
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            tensor.zero_() if name.endswith(_ADDED) else tensor.abs_()
    dtype = next(network.parameters()).dtype
    return network(torch.ones(1, *input_shape, dtype=dtype)).sum()


Saliency = Snip | Grasp | Synflow


def _beginning(evidence: Evidence, names: Iterable[str]) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network as it takes its first step, dropout aside, and these of its weights."""
    network, _ = evidence.begun()
    for part in network.modules():
        if isinstance(part, Normalization):
            part.train()
    params = dict(network.named_parameters())
    return network, {name: params[name] for name in names}


def _products(weights: Mapping[str, Tensor], others: tuple[Tensor, ...]) -> Scores:
    pairs = zip(weights.items(), others, strict=True)
    return {name: (weight * other).detach() for (name, weight), other in pairs}


def _examples(evidence: Evidence, places: Tensor) -> Batch:
    assert evidence.outset is not None
    return evidence.outset.inputs(places), evidence.outset.labels[places]


def _loss(network: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
    inputs, labels = batch
    return cross_entropy(network(inputs) / temperature, labels)
