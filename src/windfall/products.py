"""Products: a step of a plain student, written out.

The twin is automatic differentiation, `Training.descend`, which students with BatchNorm and
convolutions use.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from windfall.chains import layer_names
from windfall.masks import Params

# Of ReLU's derivative and what comes from above, in place: a multiplication by 0 or 1 takes two.
_gated = torch.ops.aten.threshold_backward.grad_input


class Products:
    """Steps of a fully connected student without normalization: three products a layer.

    Activations stand as [node, sample], with a row of ones below them, and the weights of a layer
    as [in + 1, out] with its biases as last row. So a layer's forward pass is one product, and its
    update another that is added in place, biases included.

    Args:
        params: the student's, which the steps change; they become views of those matrices.
        rate: the factor of every update.
        batch_size: inputs of a step.
        error: minus the loss's gradient by the outputs, up to the scale of `rate`, from outputs and
            answers; None for the mean over the batch of their differences.
    """

    def __init__(
        self,
        params: Params,
        rate: float,
        batch_size: int,
        error: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        names = layer_names(params)
        pairs = [(params[f"{name}.weight"], params[f"{name}.bias"]) for name in names]
        self.joined = [torch.cat([w.detach().t(), b.detach()[None]]) for w, b in pairs]
        for joined, (weight, bias) in zip(self.joined, pairs, strict=True):
            weight.data, bias.data = joined[:-1].t(), joined[-1]
        like = self.joined[0]
        self.reads = [like.new_ones(len(joined), batch_size) for joined in self.joined]
        outputs = like.new_empty(self.joined[-1].shape[1], batch_size)
        self.values = [*(reads[:-1] for reads in self.reads[1:]), outputs]
        self.pulled = [torch.empty_like(values) for values in self.values]
        self.weights = [joined[:-1] for joined in self.joined]
        self.turned = [joined.t() for joined in self.joined]
        self.errors = [pulled.t() for pulled in self.pulled]
        self.error = error
        self.rate = rate if error else rate / batch_size

    @torch.no_grad()
    def advance(self, inputs: Tensor, answers: Tensor) -> None:
        """One step of the training, on inputs [batch, ...] and answers [batch, output]."""
        self.reads[0][:-1].copy_(inputs.flatten(1).t())
        for turned, reads, made in zip(self.turned, self.reads, self.values, strict=True):
            torch.mm(turned, reads, out=made)
            if made is not self.values[-1]:
                made.relu_()
        outputs = self.values[-1]
        if self.error is None:
            torch.sub(answers.t(), outputs, out=self.pulled[-1])
        else:
            self.errors[-1].copy_(self.error(outputs.t(), answers))
        for place in reversed(range(len(self.joined))):
            if place:
                below = self.pulled[place - 1]
                torch.mm(self.weights[place], self.pulled[place], out=below)
                _gated(below, self.values[place - 1], 0, grad_input=below)
            self.joined[place].addmm_(self.reads[place], self.errors[place], alpha=self.rate)
