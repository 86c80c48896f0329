"""Accelerating a step on CUDA: compiled, and replayed as one CUDA graph.

A step of small networks is hundreds of kernels that each take less time than their launch; a graph
launches them as one.

    program = Replayed(program, Cuda(optimizer))
    program(index)
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

Tell = Callable[[str], None]
Compute = Callable[[Tensor, Tensor], Tensor]

WARM_UP = 3  # steps before the recording, as torch's manual asks: first steps allocate


def compiled(
    function: Compute,
    tell: Tell,
    backend: str = "inductor",
) -> Compute:
    """A function compiled by torch, or itself where torch cannot, which `tell` is told."""
    torch.compiler.reset()  # past its limit of programs torch would stop compiling, unasked
    fast = torch.compile(function, dynamic=False, backend=backend)
    chosen: list[Compute] = []

    def call(inputs: Tensor, labels: Tensor) -> Tensor:
        if chosen:
            return chosen[0](inputs, labels)
        try:
            result = fast(inputs, labels)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            tell(f"torch.compile failed, the step runs uncompiled: {type(problem).__name__}")
            chosen.append(function)
            return function(inputs, labels)
        chosen.append(fast)
        return result

    return call


class Recorder(Protocol):
    """Runs programs, and records one to be run again and again."""

    def warm_up(self, program: Callable[[], None]) -> None:
        """Run a program that is about to be recorded."""
        ...

    def record(self, program: Callable[[], None]) -> Callable[[], None]:
        """A function that does what the program would now; nothing is done yet."""
        ...


class Cuda:
    """Records a program, a step of an optimizer included, as a CUDA graph."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def warm_up(self, program: Callable[[], None]) -> None:
        """Run it on another stream, as a graph is recorded on one."""
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            program()
        main.wait_stream(side)

    def record(self, program: Callable[[], None]) -> Callable[[], None]:
        """The graph's replay."""
        for group in self.optimizer.param_groups:
            group["capturable"] = True  # Adam asks; a fused one is
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            program()
        return graph.replay


class Replayed:
    """A program on tensors, recorded after `WARM_UP` calls and fed through the same tensors since.

    Args:
        program: changes what it changes in place, and waits for no device.
        recorder: of the device.
    """

    def __init__(self, program: Callable[..., None], recorder: Recorder) -> None:
        self.program, self.recorder = program, recorder
        self.num_calls = 0
        self.held: tuple[Tensor, ...] = ()
        self.replay: Callable[[], None] | None = None

    def __call__(self, *drawn: Tensor) -> None:
        """Run the program on these tensors, of the same shapes at every call."""
        self.num_calls += 1
        if self.num_calls <= WARM_UP:
            self.recorder.warm_up(lambda: self.program(*drawn))
            return
        if self.replay is None:
            self.held = tuple(each.clone() for each in drawn)
            self.replay = self.recorder.record(lambda: self.program(*self.held))
        for held, each in zip(self.held, drawn, strict=True):
            held.copy_(each)
        self.replay()


def reads_numbers(network: nn.Module) -> bool:
    """Whether a forward pass waits for the device, as BatchNorm's without momentum does."""
    return any(getattr(part, "momentum", 0.0) is None for part in network.modules())
