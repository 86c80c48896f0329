"""The FLOPs and bytes of a step over this machine's measured peaks."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from windfall import flops, models
from windfall.bench import step
from windfall.bench.crew import Crew, Talk
from windfall.bench.machine import machine, refuse, refuse_densities, shown, spread, table
from windfall.bench.networks import NETWORKS, Network, chosen
from windfall.bench.teams import Team, present
from windfall.spec import Json
from windfall.train import Adam, Sgd

SIDES = (256, 512, 1024, 2048)  # of the multiplied matrices; small ones do not reach the peak
CACHE_BYTES = {"L2": 2**20, "L3": 2**25}  # where the machine does not tell its own
SIDE = 1024  # where work is sustained
DRAM_BYTES = 2**29  # far above the last cache
FLOAT_BYTES, OFFSET_BYTES = 4, 4
CHAINS, LANES, TURNS = 12, 16, 100_000  # sums at once: more than a multiply-add's delay times two
PASSES = 3  # over the weights: forward, gradient of the inputs, gradient of the weights
GIGA = 1e9


# -- peaks, in a process of one thread -------------------------------------------------------------


def serve(talk: Talk) -> None:
    """Measure the peaks for so many seconds each."""
    message = talk(None)
    while True:
        message = talk(_peaks(message["seconds"]))


def _rate(work: float, call: Callable[[], Any], seconds: float) -> float:
    """The most work a second of any call in these seconds; short calls are timed together."""
    begun = time.perf_counter()
    call()
    together = max(1, math.ceil(1e-3 / (time.perf_counter() - begun)))  # a ms: the clock is exact
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or math.isinf(best):
        begun = time.perf_counter()
        for _ in range(together):
            call()
        best = min(best, (time.perf_counter() - begun) / together)
    return work / best


def products(seconds: float) -> dict[str, float]:
    """The most FLOP/s of a product of float32 matrices, by library, in so many seconds a size."""
    return {
        "torch": max(_rate(2 * side**3, _torch_product(side), seconds) for side in SIDES),
        "numpy": max(_rate(2 * side**3, _numpy_product(side), seconds) for side in SIDES),
    }


def sustained(work: float) -> float:
    """The mean FLOP/s of float32 products, of one size that is large enough, over about this work.

    On a machine that others share it is below the best call of `products`, as all other work is.
    """
    product, num = _torch_product(SIDE), max(1, round(work / (2 * SIDE**3)))
    begun = time.perf_counter()
    for _ in range(num):
        product()
    return num * 2 * SIDE**3 / (time.perf_counter() - begun)


def _peaks(seconds: float) -> Json:
    arithmetic = products(seconds)
    arithmetic["registers"] = _rate(2 * CHAINS * LANES * TURNS, _chained(), seconds)
    caches = cache_bytes()
    sizes = {  # half a cache: the rest of it is others'
        "L2": caches["L2"] // 2,
        "L3": max(caches["L3"] // 2, 2 * caches["L2"]),
        "DRAM": DRAM_BYTES,
    }
    return {
        "flops": max(arithmetic.values()),
        "flops_by": arithmetic,
        "bandwidth": {name: _read(size, seconds) for name, size in sizes.items()},
        "array_bytes": sizes,
    }


def _torch_product(side: int) -> Callable[[], Any]:
    a, b, out = torch.ones(3, side, side).unbind()
    return lambda: torch.mm(a, b, out=out)


def _numpy_product(side: int) -> Callable[[], Any]:
    # another library than torch's, whose choice of instructions depends on the processor's maker
    a, b, out = np.ones((3, side, side), np.float32)
    return lambda: np.matmul(a, b, out=out)


def _chained() -> Callable[[], Any]:
    """Multiply-adds that never leave the registers, compiled by the sparse engine."""
    from windfall.engines.sparse.emit import Pointer
    from windfall.engines.sparse.machine import Code

    code = Code("float32")
    with code.entry("chained", 1) as (k, table, (turns,)):
        numbers = Pointer(k, table.address(0), k.real)
        factor = numbers.vector(CHAINS * LANES)
        sums = [k.variable(numbers.vector(index * LANES)) for index in range(CHAINS)]
        with k.range(0, turns):
            for each in sums:
                each.set(k.fma(factor, each.get(), factor))
        for index, each in enumerate(sums):
            numbers.put(index * LANES, each.get())
    call = code.compiled().function("chained", 1)
    array = np.zeros((CHAINS + 1) * LANES, np.float32)
    address = np.array([array.ctypes.data], np.int64)
    return lambda: (call(address.ctypes.data, TURNS), array)


def _read(num_bytes: int, seconds: float) -> float:
    """Bytes a second of reading an array: the faster of a sum and of a scalar product."""
    array = torch.ones(num_bytes // FLOAT_BYTES)
    size = FLOAT_BYTES * len(array)
    return max(
        _rate(size, array.sum, seconds),
        _rate(size, lambda: torch.dot(array, array), seconds),
    )


def cache_bytes() -> dict[str, int]:
    """The sizes of the caches of the first core."""
    sizes = dict(CACHE_BYTES)
    for place in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level = f"L{(place / 'level').read_text().strip()}"
        size = (place / "size").read_text().strip()
        if level in sizes and size.endswith("K"):
            sizes[level] = 1024 * int(size[:-1])
    return sizes


# -- what a step needs -----------------------------------------------------------------------------


def needs(network: Network, density: float) -> Json:
    """The FLOPs and the least bytes of a step.

    FLOPs of `flops.training_flops`: 6 x kept multiply-adds x batch. `executed_flops` leaves out
    the gradient of the network's inputs, which no engine computes. Bytes: every kept weight's value
    and offset in three passes, and its update; the optimizer's state read and written; every
    layer's inputs and outputs in three passes, the gradient of the network's inputs left out.

    Returns:
        counts, integers: flops, executed_flops, weight_bytes, activation_bytes, kept.
    """
    module, batch = network.build(), network.recipe.batch_size
    dense = flops.multiply_adds(module, network.input_shape)
    masks = network.masks(density, seed=0)
    kept = flops.masked_multiply_adds(dense, masks)
    sizes = {name: param.numel() for name, param in module.named_parameters() if name in dense}
    entries = sum(int(masks[n].sum()) if n in masks else size for n, size in sizes.items())
    first = next(iter(kept))
    return {
        "flops": flops.training_flops(sum(kept.values()), batch, 1),
        "executed_flops": flops.training_flops(sum(kept.values()), batch, 1)
        - 2 * batch * kept[first],
        "kept": entries,
        "weight_bytes": entries * _bytes_per_weight(network, density),
        "activation_bytes": _activations(module, network) * batch * FLOAT_BYTES,
    }


def _bytes_per_weight(network: Network, density: float) -> int:
    offset = 0 if density == 1 else OFFSET_BYTES
    match network.recipe.optimizer:
        case Adam():
            kinds = 2
        case Sgd(momentum=momentum):
            kinds = int(momentum > 0)
    return PASSES * (FLOAT_BYTES + offset) + FLOAT_BYTES * (1 + 2 * kinds)


def _activations(module: nn.Module, network: Network) -> int:
    """Numbers read and written of the layers' inputs and outputs, for one image."""
    moved: list[int] = []

    def add(_: str, __: Any, given: torch.Tensor, made: torch.Tensor) -> None:
        passes = PASSES if moved else PASSES - 1  # the images have no gradient
        moved.append(passes * given.numel() + PASSES * made.numel())

    models.observe(module, network.input_shape, add, batch_size=1)
    return sum(moved)


# -- the measurement -------------------------------------------------------------------------------


def measure(
    networks: tuple[Network | str, ...] = tuple(NETWORKS),
    densities: tuple[float, ...] = step.DENSITIES,
    engines: tuple[str, ...] = ("sparse", "separate"),
    rounds: int = 3,
    lap_seconds: float = 0.5,
) -> Json:
    """The FLOPs and bytes of a step over the peaks that one core reaches alone.

    Peak arithmetic, float32, is the most of a matrix product by torch, one by numpy, and
    multiply-adds in registers alone (where the sparse engine is); peak bandwidths are of reading
    arrays of half of the L2 cache, half of the L3 cache (but above L2) and 512 MiB. A step's
    bandwidth is that of the smallest memory which holds its bytes; its bound is the longer of
    FLOPs / peak and bytes / bandwidth.

    Args:
        networks: of `networks.NETWORKS` by name, or others.
        densities: in (0, 1].
        engines: one replica alone on a core; what cannot be imported is left out, and said so.
        rounds: n, at least 1.
        lap_seconds: of a lap and of each measurement of a peak, above 0.

    Returns:
        machine; settings; peaks (FLOP/s, bytes/s); missing engines; and rows: network, density,
        engine, what `needs` says, memory, bound_seconds, seconds, flops_per_second (executed),
        fraction_of_peak and fraction_of_bound.
    """
    refuse(rounds=(rounds, 1), lap_seconds=(lap_seconds, 1e-9))
    refuse_densities(densities)
    found, missing = present(engines)
    teams = [Team(name=engine, engine=engine) for engine in found]
    with Crew("peaks", 1, 1) as crew:
        (peaks,) = crew.ask({"seconds": lap_seconds})
    rows: list[Json] = []
    with step.crews(teams) as at:
        for network in chosen(networks):
            for density in densities:
                laps = step.laps(at, teams, network, density, rounds, lap_seconds)
                need = needs(network, density)
                for engine, micro in laps.microseconds.items():
                    row = {"network": network.name, "density": density, "engine": engine}
                    rows.append(row | need | reached(need, peaks, [m / step.MICRO for m in micro]))
    return {
        "benchmark": "roofline",
        "machine": machine(),
        "rounds": rounds,
        "peaks": peaks,
        "engines_missing": missing,
        "rows": rows,
    }


def reached(need: Mapping[str, int], peaks: Json, seconds: list[float]) -> Json:
    """What a step reaches of the peaks.

    Args:
        need: of `needs`.
        peaks: `flops`, a second; `bandwidth`, bytes a second by memory; `array_bytes`, by memory.
        seconds: of a step, round by round.
    """
    size = need["weight_bytes"] + need["activation_bytes"]
    holds = [name for name, array in peaks["array_bytes"].items() if size <= 2 * array]
    memory = holds[0] if holds else "DRAM"
    arithmetic = need["executed_flops"] / peaks["flops"]
    bound = max(arithmetic, size / peaks["bandwidth"][memory])
    rates = [need["executed_flops"] / each for each in seconds]
    return {
        "memory": memory,
        "bound_by": "arithmetic" if bound == arithmetic else "bandwidth",
        "bound_seconds": bound,
        "seconds": spread(seconds),
        "flops_per_second": spread(rates),
        "fraction_of_peak": spread(rate / peaks["flops"] for rate in rates),
        "fraction_of_bound": spread(bound / each for each in seconds),
    }


def render(result: Json) -> Table:
    """A row for each network, density and engine."""
    columns = ("network", "density", "engine", "MFLOP", "MB", "bound, µs", "µs", "GFLOP/s",
               "% of peak", "% of bound")  # fmt: skip
    peaks = result["peaks"]
    told = [f"{name} {rate / GIGA:,.0f} GB/s" for name, rate in peaks["bandwidth"].items()]
    rates = [f"{name} {rate / GIGA:,.0f} GFLOP/s" for name, rate in peaks["flops_by"].items()]
    note = f"peaks of one core: {', '.join([*rates, *told])}"
    made = table(result, f"n = {result['rounds']}", columns, note)
    for row in result["rows"]:
        made.add_row(
            row["network"],
            f"{row['density']:g}",
            row["engine"],
            f"{row['executed_flops'] / 1e6:,.1f}",
            f"{(row['weight_bytes'] + row['activation_bytes']) / 1e6:,.2f}",
            f"{step.MICRO * row['bound_seconds']:,.1f} {row['bound_by']}, {row['memory']}",
            f"{step.MICRO * row['seconds']['median']:,.1f}",
            shown({k: v / GIGA for k, v in row["flops_per_second"].items()}, ",.1f"),
            f"{100 * row['fraction_of_peak']['median']:.1f}",
            f"{100 * row['fraction_of_bound']['median']:.1f}",
        )
    return made
