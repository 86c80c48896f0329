"""The yardstick: the training loop that a careful user of torch writes for one experiment.

The data are bytes in memory, gathered and normalized a batch at a time; the optimizer is fused; the
gradients are multiplied by the masks. It draws what the engines draw and gives their training, but
keeps neither checkpoints nor training losses nor snapshots.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from windfall.data import Part
from windfall.engines.contract import CHUNK, Task, batches
from windfall.train import Evaluation, State


@torch.no_grad()
def _evaluate(network: nn.Module, part: Part, prepared: Tensor) -> tuple[float, float]:
    loss, correct = 0.0, 0
    for inputs, labels in zip(prepared.split(CHUNK), part.labels.split(CHUNK), strict=True):
        outputs = network(inputs)
        loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        correct += int((outputs.argmax(1) == labels).sum())
    return loss / len(part), correct / len(part)


class _Loop:
    """A network, its optimizer and its masks in one layout."""

    def __init__(self, task: Task, state: State, *, channels_last: bool) -> None:
        self.task, self.data, self.network = task, task.data, task.network
        self.images = torch.channels_last if channels_last else torch.contiguous_format
        self.network.load_state_dict(state.params | state.buffers)
        self.network.to(memory_format=self.images)  # pyright: ignore[reportCallIssue]
        self.network.train()
        self.named = dict(self.network.named_parameters())
        masks = {name: mask.float() for name, mask in state.masks.items()}
        for name, mask in masks.items():
            if mask.dim() == 4:
                masks[name] = mask.contiguous(memory_format=self.images)
        self.masked = [(self.named[name], mask) for name, mask in masks.items()]
        rate = task.recipe.learning_rate
        self.optimizer = task.recipe.optimizer.build(list(self.named.values()), rate)
        self.looks = [
            (part, self.laid(self.data.prepare(part.inputs, torch.float32)))
            for part in (self.data.validation, self.data.test)
        ]
        self.evaluations: list[Evaluation] = []

    def laid(self, inputs: Tensor) -> Tensor:
        """Images in the layout of the loop."""
        return inputs.contiguous(memory_format=self.images) if inputs.dim() == 4 else inputs

    def run(self, pulse: Callable[[int], None]) -> None:
        """All steps."""
        data, recipe, network = self.data, self.task.recipe, self.network
        inputs, labels = data.train.inputs, data.train.labels
        drawn = batches(self.task.order, 0)
        indices = (index for ahead in drawn for index in torch.from_numpy(ahead).unbind())
        shape = (-1, *(1,) * (inputs.dim() - 2))
        scale = (1 / (data.peak * data.std)).float().view(shape)
        shift = (-data.mean / data.std).float().view(shape)
        self.evaluate(0)
        for step in range(self.task.last_step):
            pulse(step)
            index = next(indices)
            batch = self.laid(inputs.index_select(0, index)).float()
            self.optimizer.zero_grad()
            logits = network(torch.addcmul(shift, batch, scale))
            F.cross_entropy(logits, labels[index]).backward()
            for weight, mask in self.masked:
                assert weight.grad is not None
                weight.grad.mul_(mask)
            self.optimizer.step()
            if recipe.evaluates(step + 1) or step + 1 == self.task.last_step:
                self.evaluate(step + 1)

    def evaluate(self, step: int) -> None:
        self.network.eval()
        validation, test = (_evaluate(self.network, *look) for look in self.looks)
        self.network.train()
        self.evaluations.append(Evaluation(step, None, *validation, *test))


def train(
    task: Task, state: State, pulse: Callable[[int], None], *, channels_last: bool = False
) -> State:
    """Train as the engines do.

    Args:
        task: in float32, at a constant learning rate, without augmentation.
        state: a beginning; it is not changed.
        pulse: called before every step with the step.
        channels_last: lay images and filters out with the channels innermost.

    Returns:
        The parameters, buffers and evaluations at the end.
    """
    loop = _Loop(task, state, channels_last=channels_last)
    loop.run(pulse)
    params = {name: param.detach() for name, param in loop.named.items()}
    buffers = dict(loop.network.named_buffers())
    return State(task.last_step, params, buffers, state.masks, evaluations=loop.evaluations)
