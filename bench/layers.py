"""One layer, forward and backward, by PyTorch (dense), SparseProp and Windfall's sparse kernels.

    OMP_NUM_THREADS=1 python bench/layers.py -o layers.json

One thread; the three take turns, round by round. Dense PyTorch is measured in both layouts of
images, SparseProp's convolution in both of its ways; the faster median counts. A network's layers
pass each other their own layout, so that Windfall's conversion to it is not in its time; PyTorch's
and SparseProp's autograd is in theirs, as that is how they are called.
"""

import argparse
import copy
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from windfall.bench.machine import machine, ratios, shown, spread

Call = Callable[[], None]
Results = tuple[Tensor, Tensor, Tensor]  # outputs, gradient of inputs, of kept weights

DENSITIES = (1.0, 0.8, 0.7, 0.6, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
SPARSEPROP_UP_TO = 0.2  # above, it is slower than dense by far
LINEAR = ((784, 300, 64), (784, 300, 128), (1024, 1024, 64), (1024, 1024, 128))
CONVOLUTIONS = ((16, 32, 64), (32, 16, 64), (64, 8, 64))  # channels, side, batch


@dataclass(frozen=True)
class Case:
    """A layer with its inputs and the gradient of its outputs.

    Args:
        name: what tables call it.
        layer: without bias.
        x: its inputs.
        dy: the gradient of its outputs.
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    x: Tensor
    dy: Tensor

    def masked(self, density: float) -> tuple[nn.Linear | nn.Conv2d, Tensor]:
        """The layer with random weights of this density, and their mask."""
        size = self.layer.weight.numel()
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(size, dtype=torch.bool)
        mask[order[: max(1, round(density * size))]] = True
        mask = mask.reshape(self.layer.weight.shape)
        with torch.no_grad():
            self.layer.weight.copy_(_normal(self.layer.weight.shape, 3) * mask)
        return self.layer, mask


def _normal(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cases(linear: Sequence[Sequence[int]], convolutions: Sequence[Sequence[int]]) -> Iterator[Case]:
    """The layers of these sizes, (inputs, outputs, batch) and (channels, side, batch)."""
    for inputs, outputs, batch in linear:
        layer = nn.Linear(inputs, outputs, bias=False)
        x, dy = _normal((batch, inputs), 1), _normal((batch, outputs), 2)
        yield Case(f"linear {inputs} x {outputs}, batch {batch}", layer, x, dy)
    for channels, side, batch in convolutions:
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        x = _normal((batch, channels, side, side), 1)
        yield Case(f"3x3, {channels} channels, {side} x {side}, batch {batch}", layer, x,
                   _normal(x.shape, 2))  # fmt: skip


# -- who is measured: each gives a call, and what it has computed --------------------------------


def _autograd(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Call, Callable[[], Results]]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    weight, held = next(module.parameters()), list[Tensor]()

    def call() -> None:
        x.grad = weight.grad = None
        y = module(x)
        y.backward(dy)
        held[:] = [y]

    def results() -> Results:
        assert x.grad is not None
        assert weight.grad is not None
        return held[0].detach(), x.grad, weight.grad

    return call, results


def dense(case: Case, density: float) -> dict[str, tuple[Call, Callable[[], Results]]]:
    """PyTorch, in each layout."""
    layer, _ = case.masked(density)
    found = {"torch": _autograd(copy.deepcopy(layer), case.x, case.dy)}
    if isinstance(layer, nn.Conv2d):
        last = torch.channels_last
        found["torch, channels-last"] = _autograd(
            copy.deepcopy(layer).to(memory_format=last),
            case.x.contiguous(memory_format=last),
            case.dy.contiguous(memory_format=last),
        )
    return found


def sparseprop(case: Case, density: float) -> dict[str, tuple[Call, Callable[[], Results]]]:
    """SparseProp, in each of its ways."""
    from sparseprop.modules.conv2d import SparseConv2d
    from sparseprop.modules.linear import SparseLinear

    layer, mask = case.masked(density)
    if isinstance(layer, nn.Linear):
        modules = {"sparseprop": SparseLinear.from_dense(layer)}
    else:
        modules = {
            "sparseprop": SparseConv2d.from_dense(layer, vectorizing_over_on=False),
            "sparseprop, over width": SparseConv2d.from_dense(layer, vectorizing_over_on=True),
        }
    return {n: _in_place(_autograd(each, case.x, case.dy), mask) for n, each in modules.items()}


def _in_place(
    pair: tuple[Call, Callable[[], Results]], mask: Tensor
) -> tuple[Call, Callable[[], Results]]:
    """Results whose gradient of the kept weights is put where the weights are."""
    call, results = pair

    def placed() -> Results:
        y, dx, dw = results()
        return y, dx, torch.zeros(mask.shape).masked_scatter(mask, dw)

    return call, placed


def windfall(case: Case, density: float) -> dict[str, tuple[Call, Callable[[], Results]]]:
    """Windfall's kernels."""
    import windfall_layer

    layer, mask = case.masked(density)
    ready = windfall_layer.prepare(layer, mask, case.x, case.dy)
    return {"windfall": (ready.run, ready.results)}


SIDES = {"torch": dense, "sparseprop": sparseprop, "windfall": windfall}


def present() -> dict[str, str]:
    """Why some of them cannot be measured here."""
    missing: dict[str, str] = {}
    case = next(cases([(16, 16, 16)], []))
    for side, make in SIDES.items():
        try:
            make(case, 0.5)
        except (ImportError, AttributeError) as problem:
            missing[side] = f"{type(problem).__name__}: {problem}"
    return missing


# -- the measurement -------------------------------------------------------------------------------


def _errors(results: dict[str, Results], mask: Tensor) -> dict[str, float]:
    """How far outputs and gradients are from dense PyTorch's, of their size; the most of three."""
    y, dx, dw = results["torch"]
    expected = (y, dx, dw * mask)
    return {
        name: max(
            float((a * (mask if i == 2 else 1) - b).norm() / b.norm())
            for i, (a, b) in enumerate(zip(found, expected, strict=True))
        )
        for name, found in results.items()
    }


def row(case: Case, density: float, sides: Sequence[str], rounds: int, seconds: float) -> dict:
    """The times of all sides at one density.

    Args:
        case: the layer.
        density: of its weights, in (0, 1].
        sides: of `SIDES`; `torch` must be among them.
        rounds: n.
        seconds: that a side runs in a round, at least.
    """
    ready = {
        name: pair
        for side in sides
        if side != "sparseprop" or density <= SPARSEPROP_UP_TO
        for name, pair in SIDES[side](case, density).items()
    }
    repeats: dict[str, int] = {}
    for name, (call, _) in ready.items():
        call()  # warms
        repeats[name] = math.ceil(seconds / _seconds(call, 1))
    errors = _errors({name: results() for name, (_, results) in ready.items()},
                     case.masked(density)[1])  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (call, _) in ready.items():
            times[name].append(1e6 * _seconds(call, repeats[name]))
    best = {side: _fastest(side, times) for side in sides}
    return {
        "layer": case.name,
        "density": density,
        "microseconds": {name: spread(each) for name, each in times.items()},
        "error": errors,
        "fastest": best,
        "speedup": {
            side: ratios(times[name], times["windfall"])
            for side, name in best.items()
            if name is not None and side != "windfall" and "windfall" in times
        },
    }


def _seconds(call: Call, repeats: int) -> float:
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begun) / repeats


def _fastest(side: str, times: dict[str, list[float]]) -> str | None:
    medians = {n: spread(each)["median"] for n, each in times.items() if n.startswith(side)}
    return min(medians, key=medians.__getitem__) if medians else None


def break_even(rows: Sequence[dict]) -> dict[str, float | None]:
    """By layer, the density at which Windfall is as fast as dense PyTorch, interpolated.

    The highest density of those measured where it is faster at all of them; None where at none.
    """
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(each["layer"] for each in rows):
        of_it = [each for each in rows if each["layer"] == name and "torch" in each["speedup"]]
        points = sorted((each["density"], each["speedup"]["torch"]["median"]) for each in of_it)
        if points:
            found[name] = _crossing(points)
    return found


def _crossing(points: Sequence[tuple[float, float]]) -> float | None:
    """Where the speed-up falls to 1; its inverse, the time, is linear in the density."""
    for (low, above), (high, below) in itertools.pairwise(points):
        if above >= 1 > below:
            a, b = 1 / above, 1 / below
            return low + (high - low) * (1 - a) / (b - a)
    return points[-1][0] if points[-1][1] >= 1 else None


def measure(
    linear: Sequence[Sequence[int]] = LINEAR,
    convolutions: Sequence[Sequence[int]] = CONVOLUTIONS,
    densities: Sequence[float] = DENSITIES,
    rounds: int = 7,
    seconds: float = 0.1,
) -> dict:
    """All layers at all densities; a JSON-able dictionary."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    missing = present()
    sides = [side for side in SIDES if side not in missing]
    rows = [
        row(case, density, sides, rounds, seconds)
        for case in cases(linear, convolutions)
        for density in densities
    ]
    return {
        "benchmark": "layers",
        "machine": machine(),
        "rounds": rounds,
        "missing": missing,
        "rows": rows,
        "break_even_density": break_even(rows),
    }


def render(result: dict) -> Table:
    """A row for each layer and density."""
    table = Table(
        title=f"layers: forward and backward, one thread, n = {result['rounds']}",
        caption=". ".join(
            [f"{result['machine']['cpu']}, torch {result['machine']['torch']}"]
            + [f"{side} is missing: {why}" for side, why in result["missing"].items()]
        ),
    )
    table.add_column("layer")
    for column in ("density", *(f"{s}, µs" for s in SIDES), "x torch", "x sparseprop", "error"):
        table.add_column(column, justify="right")
    for each in result["rows"]:
        best, micro = each["fastest"], each["microseconds"]
        table.add_row(
            each["layer"],
            f"{each['density']:g}",
            *(shown(micro.get(best.get(side) or "")) for side in SIDES),
            *(shown(each["speedup"].get(side), ".2f") for side in ("torch", "sparseprop")),
            f"{each['error'].get('windfall', math.nan):.0e}",
        )
    for name, density in result["break_even_density"].items():
        table.add_row(name, "-" if density is None else f"{density:.2f}", "break-even")
    return table


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, help="a JSON file")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two tiny layers")
    given = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # SparseProp reads it alone, when it is loaded
        parser.error("OMP_NUM_THREADS must be 1 in the environment")
    if given.quick:
        result = measure([(64, 32, 16)], [(16, 8, 16)], (1.0, 0.5, 0.1), 2, 1e-3)
    else:
        result = measure()
    Console(width=160).print(render(result))
    if given.output:
        given.output.write_text(json.dumps(result, allow_nan=False, indent=1))


if __name__ == "__main__":
    main()
