"""Latency: how long forward passes of networks take on this machine, and the memory they hold.

Networks are timed side by side: every round runs each of them on the same inputs, so that what
else the machine does in a round meets them all, and the order turns round from one to the next. All
in one process, on the CPU, on one torch thread, in evaluation and inference mode.

    found = measured({"before": whole, "after": smaller}, (1, 28, 28), (1, 64))
    found[64]["after"].median  # seconds of a forward pass of 64 inputs
    found[64]["after"].over(found[64]["before"]).word  # faster, same or slower
"""

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from windfall import seeds
from windfall.spec import Json

ROUND_SECONDS = 2e-3  # of one network in a round, at least: a look at the clock takes 1e-7
MIN_ROUNDS, MAX_ROUNDS = 11, 101  # an interval of fewer says little; of more, no more
LOG_LEVEL = "KINETO_LOG_LEVEL"  # the profiler's own, without which it writes to standard error


@dataclass(frozen=True)
class Latency:
    """How long a network's forward pass takes.

    Args:
        rounds: seconds of a pass in each round, in their order; networks measured together have
            the same rounds.
    """

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over rounds, seconds."""
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile over rounds, seconds."""
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    def over(self, other: "Latency") -> "Ratio":
        """This one's seconds over another's of the same measurement, round by round."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        ratios = sorted(one / two for one, two in pairs)
        depth = max(_depth(len(ratios)), 1)
        return Ratio(statistics.median(ratios), ratios[depth - 1], ratios[-depth])


@dataclass(frozen=True)
class Ratio:
    """How many times as long one network takes as another.

    Args:
        median: over rounds.
        low: of its 95 % interval, from the order of the rounds alone (the sign test's).
        high: of the same.
    """

    median: float
    low: float
    high: float

    @property
    def word(self) -> Literal["faster", "same", "slower"]:
        """What the interval says of the one: the same where it holds 1."""
        return "faster" if self.high < 1 else "slower" if self.low > 1 else "same"


def _depth(count: int) -> int:
    """The most k such that fewer than k of so many tosses are heads with probability 2.5 %."""
    tail, depth = 1, 0
    while tail <= 0.025 * 2**count:
        depth += 1
        tail += math.comb(count, depth)
    return depth


@contextmanager
def one_thread() -> Generator[None]:
    """One torch thread inside; outside, as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measured(
    networks: Mapping[str, nn.Module],
    input_shape: tuple[int, ...],
    batch_sizes: Sequence[int],
    *,
    seconds: float = 2.0,
) -> dict[int, dict[str, Latency]]:
    """How long forward passes of networks take, by batch size and by name.

    Args:
        networks: by name, on the CPU; left as they are, but in evaluation mode.
        input_shape: the shape of one input.
        batch_sizes: numbers of inputs of a pass, each at least 1.
        seconds: to spend on a batch size, above 0; 11 rounds are made however long they take.
    """
    with one_thread(), torch.inference_mode():
        passes = {size: _passes(networks, input_shape, size) for size in batch_sizes}
        return {size: _timed(each, seconds) for size, each in passes.items()}


def _inputs(network: nn.Module, input_shape: tuple[int, ...], batch_size: int) -> Tensor:
    drawn = seeds.stream(0, "latency").standard_normal((batch_size, *input_shape))
    like = next(network.parameters(), torch.zeros(()))
    return torch.from_numpy(drawn).to(like.dtype)


def _passes(
    networks: Mapping[str, nn.Module], input_shape: tuple[int, ...], batch_size: int
) -> dict[str, Callable[[], Any]]:
    def one(network: nn.Module) -> Callable[[], Any]:
        inputs = _inputs(network.eval(), input_shape, batch_size)
        return lambda: network(inputs)

    return {name: one(network) for name, network in networks.items()}


def _timed(passes: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Latency]:
    calls = {name: _calls(run) for name, run in passes.items()}
    rounds: dict[str, list[float]] = {name: [] for name in passes}
    order, end = list(passes), time.monotonic() + seconds
    for index in range(MAX_ROUNDS):
        if index >= MIN_ROUNDS and time.monotonic() > end:
            break
        for name in order:
            rounds[name].append(_seconds(passes[name], calls[name]) / calls[name])
        order.reverse()
    return {name: Latency(tuple(each)) for name, each in rounds.items()}


def _calls(run: Callable[[], Any]) -> int:
    """How many passes take as long as a network's part of a round should; it warms up besides."""
    run()  # the first pass makes what later ones find made
    calls = 1
    while _seconds(run, calls) < ROUND_SECONDS:
        calls *= 2
    return calls


def _seconds(run: Callable[[], Any], calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - begun


def compared(batch_size: int, before: Latency, after: Latency) -> Json:
    """What two networks of one measurement take, as a JSON-able row.

    Returns:
        batch_size; of `before` and `after` each the median and quartiles, seconds; num_rounds;
        ratio, of the latter over the former, with its median and 95 % interval; after_is, `faster`,
        `same` or `slower`.
    """
    ratio = after.over(before)
    times = {"before": before, "after": after}
    return {
        "batch_size": batch_size,
        **{
            name: {"median": each.median, "quartiles": list(each.quartiles)}
            for name, each in times.items()
        },
        "num_rounds": len(before.rounds),
        "ratio": {"median": ratio.median, "interval": [ratio.low, ratio.high]},
        "after_is": ratio.word,
    }


# -- memory ----------------------------------------------------------------------------------------


def tensor_bytes(network: nn.Module) -> int:
    """The bytes of a network's parameters and buffers."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def activation_bytes(
    network: nn.Module, input_shape: tuple[int, ...], batch_size: int
) -> int | None:
    """The most bytes that a forward pass holds at a time beside its network and its inputs.

    Every allocation and release of torch's CPU allocator during one pass, as its profiler records
    them; what a library allocates by itself is not seen.

    Args:
        network: on the CPU; left as it is, but in evaluation mode.
        input_shape: the shape of one input.
        batch_size: inputs of the pass, at least 1.

    Returns:
        Bytes; None where torch was built without its profiler.
    """
    if not torch.profiler.kineto_available():
        return None
    (run,) = _passes({"": network}, input_shape, batch_size).values()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with one_thread(), torch.inference_mode(), _hushed():
        run()  # what is made once, at the first pass, is not of every pass
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            made = run()
        del made
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return _peak(events)


def _peak(events: Sequence[Mapping[str, Any]]) -> int:
    held = most = 0
    recorded = [event for event in events if event.get("name") == "[memory]"]
    for event in sorted(recorded, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


@contextmanager
def _hushed() -> Generator[None]:
    before = os.environ.get(LOG_LEVEL)
    os.environ[LOG_LEVEL] = "99"
    try:
        yield
    finally:
        os.environ.pop(LOG_LEVEL)
        if before is not None:
            os.environ[LOG_LEVEL] = before
