"""This machine's benchmarks: each a function that returns its result as a JSON-able dictionary.

A result names the machine, the versions, n and the spread; `render` makes a table of it:

    result = BENCHMARKS["overhead"](num_steps=200, rounds=5)
    result["ratio"]["median"]  # engine / bare loop
"""

import os
import platform
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn

from windfall import masks as masking
from windfall import models, samples, seeds
from windfall.data import Dataset, Order
from windfall.engines import separate
from windfall.engines.contract import Task
from windfall.initialize import GlorotNormal, initial_parameters
from windfall.masks import Params
from windfall.samples import Part
from windfall.spec import Json, SpecError, nearest
from windfall.train import Adam, Recipe, State
from windfall.worker import quiet_machine

WARM = 20  # steps before the clock starts: allocations, caches, the optimizer's state
SHAPE, NUM_TRAIN, NUM_CLASSES = (1, 28, 28), 55_000, 10  # MNIST's
BATCH, RATE, DENSITY = 60, 1.2e-3, 0.2  # 1803.03635, Fig. 2; a density of its Fig. 3


def _images() -> Dataset:
    """Random images of MNIST's shape and number; one to evaluate on, which is not measured."""
    stream = seeds.stream(0, "bench")
    images = stream.integers(0, 256, (NUM_TRAIN, *SHAPE), dtype=np.uint8)
    labels = stream.integers(0, NUM_CLASSES, NUM_TRAIN)
    train = Part(torch.from_numpy(images), torch.from_numpy(labels))
    one = Part(train.inputs[:1], train.labels[:1])
    mean, std = samples.moments(train.inputs, 255)
    return Dataset(train, one, one, mean, std, 255, NUM_CLASSES, sha256="", note=None)


def _network() -> nn.Module:
    return models.Lenet_300_100().build(SHAPE, NUM_CLASSES)


def _beginning() -> State:
    """A new network, its weights pruned at random."""
    params, buffers = initial_parameters(_network, GlorotNormal(), seed=0)
    dense = masking.ones(params, models.kinds(_network(), SHAPE))
    counts = {name: round(DENSITY * size) for name, size in masking.sizes(dense).items()}
    mask = masking.scatter(counts, dense, seed=0)
    return State(0, masking.apply(mask, params), buffers, mask)


def _engine(data: Dataset, start: State, num_steps: int) -> tuple[float, Params]:
    """Seconds of the separate engine from step WARM to `num_steps`, and the weights a step later.

    The clock is read where the engine's pulse comes, before every step, so that the evaluations at
    the first and the last step are not in it.
    """
    steps = num_steps + 1
    recipe = Recipe(
        optimizer=Adam(), learning_rate=RATE, steps=steps, batch_size=BATCH, eval_every=steps
    )
    task = Task(_network(), data, recipe, seed=0, last_step=steps)
    times: list[float] = []
    final = separate.train(task, start, lambda *_: times.append(time.thread_time()))
    return times[num_steps] - times[WARM], final.params


def _bare(data: Dataset, start: State, num_steps: int) -> tuple[float, Params]:
    """The same by hand: the loop that a careful user writes for this one experiment."""
    order = Order(0, NUM_TRAIN, BATCH)
    batches = torch.from_numpy(np.stack([order.batch(step) for step in range(num_steps + 1)]))
    inputs, labels = data.train.inputs, data.train.labels
    scale, shift = (1 / (data.peak * data.std)).float(), (-data.mean / data.std).float()
    network = _network()
    network.load_state_dict(start.params)
    named = dict(network.named_parameters())
    masked = [(named[name], mask.float()) for name, mask in start.masks.items()]
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, fused=True)
    times: list[float] = []
    for index in batches:
        times.append(time.thread_time())
        batch = torch.addcmul(shift, inputs.index_select(0, index).float(), scale)
        optimizer.zero_grad()
        F.cross_entropy(network(batch), labels[index]).backward()
        for weight, mask in masked:
            assert weight.grad is not None
            weight.grad.mul_(mask)
        optimizer.step()
    return times[num_steps] - times[WARM], {n: p.detach() for n, p in named.items()}


LOOPS = {"bare": _bare, "engine": _engine}


def overhead(num_steps: int = 200, rounds: int = 51) -> Json:
    """What the separate engine costs beyond a bare in-memory PyTorch loop of the same steps.

    LeNet-300-100 on random images of MNIST's shape, batch 60, fused Adam at 1.2e-3, masks of 20 %
    density on the gradients, one thread. The two loops take turns, bare, engine, bare, ...; a
    round's ratio is of neighbours in time, and the clock is the thread's processor time, so a busy
    machine disturbs it little; short rounds, the less so. Evaluations, the making of the networks
    and the first WARM steps, which draw the data's permutation (1 ms an epoch), are not measured.

    Args:
        num_steps: per loop and round, above WARM.
        rounds: n, at least 1.

    Returns:
        machine; num_steps and rounds; processor microseconds per step, by loop, and their ratio
        engine / bare (1.1 is an overhead of 10 %), each with min, median and max over the rounds;
        is_equal, whether both loops ended with the same weights bit for bit.
    """
    for name, value, least in (("num_steps", num_steps, WARM + 1), ("rounds", rounds, 1)):
        if value < least:
            raise SpecError(f"`{name}` must be at least {least}; got {value}.")
    microseconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    weights: dict[str, Params] = {}
    data, start = _images(), _beginning()
    with quiet_machine():
        for _ in range(rounds):
            for name, loop in LOOPS.items():
                seconds, weights[name] = loop(data, start, num_steps)
                microseconds[name].append(1e6 * seconds / (num_steps - WARM))
        machine = _machine()
    bare, engine = microseconds["bare"], microseconds["engine"]
    return {
        "benchmark": "overhead",
        "machine": machine,
        "num_steps": num_steps,
        "rounds": rounds,
        "microseconds_per_step": {name: _spread(each) for name, each in microseconds.items()},
        "ratio": _spread([b / a for a, b in zip(bare, engine, strict=True)]),
        "is_equal": all(torch.equal(w, weights["engine"][n]) for n, w in weights["bare"].items()),
    }


def _spread(values: list[float]) -> Json:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _machine() -> Json:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "windfall": version("windfall"),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")  # elsewhere than on Linux, `platform` knows the model
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def render(result: Json) -> Table:
    """A benchmark's result as a table: one row per measured quantity."""
    machine = result["machine"]
    table = Table(
        title=f"{result['benchmark']}: {result['num_steps']:,} steps, n = {result['rounds']}",
        caption=f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread, "
        f"torch {machine['torch']}, windfall {machine['windfall']}",
    )
    table.add_column("")
    for column in ("min", "median", "max"):
        table.add_column(column, justify="right")
    for name, spread in result["microseconds_per_step"].items():
        table.add_row(f"{name}, µs per step", *(f"{value:,.0f}" for value in spread.values()))
    table.add_row("engine / bare", *(f"{value:.3f}" for value in result["ratio"].values()))
    return table


BENCHMARKS = {"overhead": overhead}


def run(name: str | None = None) -> Iterator[Json]:
    """The result of a benchmark, or of each of them.

    Args:
        name: of `BENCHMARKS`; None is all.

    Raises:
        SpecError: when there is no such benchmark.
    """
    if name is not None and name not in BENCHMARKS:
        raise SpecError(f"NAME must be a benchmark; got {name!r}.{nearest(name, list(BENCHMARKS))}")
    for benchmark in BENCHMARKS if name is None else (name,):
        yield BENCHMARKS[benchmark]()
