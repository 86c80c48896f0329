"""Gates: learned numbers times residual branches, so that whole blocks can be removed."""

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """What it is given times a learned number, 1 at first: shortcut(x) + gate · branch(x).

    A block that may be removed whole is a module with a gate among its own parts. All its other
    parts are the branch, but for one named `shortcut`. A removed block has a gate of size 0, whose
    `is_removed` its `forward` asks, and computes what it does with the gate at 0.

    Source: Huang & Wang 2018 (1707.01213), section 3.2 (the λ of a residual block).
    """

    def __init__(self) -> None:
        super().__init__()
        self.size = 1
        self.weight = nn.Parameter(torch.ones(self.size))

    @property
    def is_removed(self) -> bool:
        """Whether its block was removed."""
        return self.size == 0

    def forward(self, inputs: Tensor) -> Tensor:
        """The inputs times the gate."""
        return inputs * self.weight

    def extra_repr(self) -> str:
        """Its size, in the text of a network."""
        return str(self.size)
