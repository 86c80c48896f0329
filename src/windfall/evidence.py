"""Evidence: what a criterion may look at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from windfall import masks, seeds
from windfall.masks import Masks, Params
from windfall.structure import Group


@dataclass(frozen=True)
class Outset:
    """A network before its training, and the examples that it is to learn.

    Args:
        network: makes the network with theta_0, in evaluation mode.
        input_shape: of one input.
        labels: of the training part, [sample].
        inputs: those at these places of the training part, float64, as the network is given them.
    """

    network: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    labels: Tensor
    inputs: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evidence:
    """A network that was trained, and what a criterion may see of it.

    Args:
        initial: theta_0, the parameters the network was initialized with.
        trained: theta_T, the parameters at the end of training.
        seed: the run's seed.
        level: the level whose mask is sought, at least 1.
        groups: where channels are pruned, those of the trained network by name.
        network: where channels are pruned, makes the network with theta_T.
        inputs: where channels are pruned, gives so many inputs of the training part, as the network
            is given them.
        outset: where weights are pruned, the network before its training.
        alive: the masks of the weights that were not pruned before; those without one are whole.
    """

    initial: Params
    trained: Params
    seed: int
    level: int
    groups: Mapping[str, Group] = field(default_factory=dict[str, Group])
    network: Callable[[], nn.Module] | None = None
    inputs: Callable[[int], Tensor] | None = None
    outset: Outset | None = None
    alive: Masks = field(default_factory=dict[str, Tensor])

    def seen(self, num_inputs: int) -> tuple[nn.Module, Tensor]:
        """The trained network, and inputs of the training part."""
        assert self.network is not None and self.inputs is not None, "evidence of weights alone"
        return self.network(), self.inputs(num_inputs)

    def begun(self) -> tuple[nn.Module, Outset]:
        """The network with theta_0 in float64, what was pruned before at 0; and its outset."""
        assert self.outset is not None, "evidence of weights alone"
        network = self.outset.network().double()
        params = dict(network.named_parameters())
        with torch.no_grad():
            for name, value in masks.apply(self.alive, {n: params[n] for n in self.alive}).items():
                params[name].copy_(value)
        return network, self.outset

    def order(self) -> Tensor:
        """The places of the training part in the order of the seed's stream `examples`."""
        assert self.outset is not None, "evidence of weights alone"
        stream = seeds.stream(self.seed, "examples")
        return torch.from_numpy(stream.permutation(len(self.outset.labels)))
