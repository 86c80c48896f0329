"""Evidence: what a criterion may look at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from windfall.masks import Params
from windfall.structure import Group


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
    """

    initial: Params
    trained: Params
    seed: int
    level: int
    groups: Mapping[str, Group] = field(default_factory=dict[str, Group])
    network: Callable[[], nn.Module] | None = None
    inputs: Callable[[int], Tensor] | None = None

    def seen(self, num_inputs: int) -> tuple[nn.Module, Tensor]:
        """The trained network, and inputs of the training part."""
        assert self.network is not None and self.inputs is not None, "evidence of weights alone"
        return self.network(), self.inputs(num_inputs)
