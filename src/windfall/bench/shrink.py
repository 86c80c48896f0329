"""What channels that are gone save: Windfall's smaller network beside Torch-Pruning's own."""

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from scipy.stats import binom
from torch import Tensor, nn

from windfall import flops, models, seeds, structure, tracing
from windfall.bench.machine import machine, refuse, table
from windfall.bench.networks import CIFAR, NUM_CLASSES
from windfall.masks import Masks, Params
from windfall.models import Model
from windfall.spec import Json, SpecError, nearest
from windfall.structure import Group
from windfall.worker import quiet_machine

SHRUNK: Mapping[str, Callable[[float], Model]] = {
    "vgg-16": lambda width: models.Vgg_16(width=width),
    "resnet-56": lambda width: models.Resnet_56(width=width),
    "densenet-40": lambda width: models.Densenet_40(width=width),
    "preresnet-164": lambda width: models.Preresnet_164(width=width),
}
WHOLE, OURS, THEIRS = "whole", "windfall", "torch-pruning"
CONFIDENCE = 0.95


# -- the networks ----------------------------------------------------------------------------------


def _drawn(model: Model) -> nn.Module:
    """A network in evaluation whose normalizations are not the identity."""
    with seeds.isolated(0, "shrink"):
        network = model.build(CIFAR, NUM_CLASSES).eval()
    stream = seeds.stream(0, "shrink")
    for name, tensor in _tensors(network).items():
        if tensor.dim() == 1 and not name.startswith("output"):
            drawn = stream.uniform(0.5, 1.5, len(tensor)).astype(np.float32)
            tensor.data.copy_(torch.from_numpy(drawn))
    return network


def _tensors(network: nn.Module) -> Params:
    return dict(network.named_parameters()) | dict(network.named_buffers())


def stay(groups: Sequence[Group], removed: float) -> Masks:
    """The channels that stay of each group, drawn at random, one at least."""
    stream = seeds.stream(0, "shrink")
    found: Masks = {}
    for group in groups:
        number = max(1, group.size - round(removed * group.size))
        order = torch.from_numpy(stream.permutation(group.size))
        found[group.name] = order < number
    return found


def ours(network: nn.Module, groups: Sequence[Group], channels: Masks) -> nn.Module:
    """The network without the other channels, by Windfall."""
    kept = structure.shrunk(_tensors(network), groups, channels)
    smaller = structure.resized(network, structure.shapes(kept))
    smaller.load_state_dict(kept)
    return smaller


def theirs(network: nn.Module, groups: Sequence[Group], channels: Masks) -> nn.Module:
    """The same by Torch-Pruning alone: its graph, its pruning functions, the same channels."""
    import torch_pruning  # here: it takes a while

    smaller = copy.deepcopy(network)
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph.build_dependency(smaller, example_inputs=torch.zeros(1, *CIFAR), verbose=False)
        for group in groups:
            layer = smaller.get_submodule(group.name.rpartition(".")[0])
            made = next(s for s in group.slots if (s.tensor, s.axis) == (group.name, 0))
            gone = (~channels[group.name]).nonzero().flatten().tolist()
            places = sorted(place for channel in gone for place in made.places[channel])
            prune: Any = torch_pruning.prune_conv_out_channels
            if places:
                graph.get_pruning_group(layer, prune, idxs=places).prune()
    return smaller.eval()


def _check_equal(a: nn.Module, b: nn.Module) -> float:
    """The greatest difference of two networks' outputs beside their greatest output.

    Raises:
        RuntimeError: when a tensor of theirs has another shape.
    """
    one, other = structure.shapes(_tensors(a)), structure.shapes(_tensors(b))
    if one != other:
        names = [name for name in one if one[name] != other.get(name)]
        raise RuntimeError(f"networks of the same channels differ in shape: {', '.join(names)}")
    with torch.inference_mode():
        found, expected = a(_inputs(4)), b(_inputs(4))
    return float((found - expected).abs().max() / expected.abs().max())


def _inputs(batch_size: int) -> Tensor:
    drawn = seeds.stream(1, "shrink").standard_normal((batch_size, *CIFAR), dtype=np.float32)
    return torch.from_numpy(drawn)


# -- the measurement -------------------------------------------------------------------------------


def _milliseconds(
    networks: Mapping[str, nn.Module], inputs: Tensor, rounds: int, lap_seconds: float
) -> dict[str, list[float]]:
    """Of a forward pass of each network, round by round, who is first changing with the round."""
    found: dict[str, list[float]] = {name: [] for name in networks}
    names = list(networks)
    together = {n: max(1, math.ceil(lap_seconds / _lap(networks[n], inputs, 2))) for n in names}
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            found[name].append(1e3 * _lap(networks[name], inputs, together[name]))
    return found


def _lap(network: nn.Module, inputs: Tensor, times: int) -> float:
    with torch.inference_mode():
        begun = time.thread_time()
        for _ in range(times):
            network(inputs)
        return (time.thread_time() - begun) / times


def quartiles(values: Sequence[float]) -> Json:
    """Lower quartile, median and upper quartile of two numbers or more."""
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"lower": lower, "median": middle, "upper": upper}


def median_interval(above: Sequence[float], below: Sequence[float]) -> Json:
    """The median of the quotients, round by round, and its interval from order statistics.

    Its confidence is at least 95 %, whatever their distribution; with fewer than six rounds, where
    none has so much, it is from the least to the greatest.
    """
    sorted_ = sorted(a / b for a, b in zip(above, below, strict=True))
    number = len(sorted_)
    lowest = max(0, int(binom.ppf((1 - CONFIDENCE) / 2, number, 0.5)) - 1)
    return {
        "median": statistics.median(sorted_),
        "interval": [sorted_[lowest], sorted_[number - 1 - lowest]],
    }


def _rows(
    name: str, width: float, removed: float, batch_sizes: Sequence[int], rounds: int,
    lap_seconds: float,
) -> list[Json]:  # fmt: skip
    network = _drawn(SHRUNK[name](width))
    groups = tracing.trace(network, CIFAR)
    channels = stay(groups, removed)
    networks = {WHOLE: network, OURS: ours(network, groups, channels)}
    networks[THEIRS] = theirs(network, groups, channels)
    difference = _check_equal(networks[OURS], networks[THEIRS])
    macs = {n: sum(flops.multiply_adds(each, CIFAR).values()) for n, each in networks.items()}
    rows: list[Json] = []
    for batch_size in batch_sizes:
        times = _milliseconds(networks, _inputs(batch_size), rounds, lap_seconds)
        rows.append(
            {
                "network": name,
                "batch_size": batch_size,
                "milliseconds": {n: quartiles(each) for n, each in times.items()},
                "ratio": median_interval(times[OURS], times[THEIRS]),
                "speedup": median_interval(times[WHOLE], times[OURS]),
                "flop_ratio": macs[WHOLE] / macs[OURS],
                "multiply_adds": macs,
                "num_parameters": {
                    n: sum(p.numel() for p in each.parameters()) for n, each in networks.items()
                },
                "output_difference": difference,
            }
        )
    return rows


def measure(
    networks: tuple[str, ...] = tuple(SHRUNK),
    removed: float = 0.5,
    batch_sizes: tuple[int, ...] = (1, 64),
    rounds: int = 21,
    lap_seconds: float = 0.02,
    width: float = 1.0,
) -> Json:
    """Forward passes of networks without half of their channels, on one thread.

    Three networks take turns in one process: the whole one, Windfall's smaller one, and the one
    that Torch-Pruning alone gives for the same channels, whose shapes are first checked to be the
    same. Images are random, of CIFAR's shape; the channels of each group are drawn at random. The
    clock is the thread's processor time, so a busy machine disturbs it little.

    Args:
        networks: of `SHRUNK` by name.
        removed: fraction of each group's channels, in (0, 1).
        batch_sizes: each at least 1.
        rounds: n, at least 2.
        lap_seconds: passes are timed together for so long, above 0.
        width: of the networks.

    Returns:
        machine; settings; `rows` of network, batch_size, milliseconds of a pass (quartiles),
        ratio windfall / torch-pruning and speedup whole / windfall (medians over rounds, with 95 %
        intervals), flop_ratio whole / windfall, multiply_adds, num_parameters, and
        output_difference, windfall's to torch-pruning's, relative to the greatest output.

    Raises:
        SpecError: when a setting cannot be.
        RuntimeError: when the two smaller networks have not the same shapes.
    """
    refuse(rounds=(rounds, 2), lap_seconds=(lap_seconds, 1e-9), batch_sizes=(min(batch_sizes), 1))
    if not 0 < removed < 1:
        raise SpecError(f"`removed` must lie in (0, 1); got {removed}.")
    for name in networks:
        if name not in SHRUNK:
            known = nearest(name, list(SHRUNK))
            raise SpecError(f"`networks` must be of known names; got {name!r}.{known}")
    rows: list[Json] = []
    with quiet_machine():
        for name in networks:
            rows += _rows(name, width, removed, batch_sizes, rounds, lap_seconds)
        about = machine()
    return {
        "benchmark": "shrink",
        "machine": about,
        "rounds": rounds,
        "removed": removed,
        "width": width,
        "rows": rows,
    }


def render(result: Json) -> Table:
    """A row for each network and batch size."""
    columns = ("network", "batch", "whole, ms", "windfall, ms", "torch-pruning, ms",
               "windfall / torch-pruning", "times faster", "times fewer FLOPs")  # fmt: skip
    title = f"{100 * result['removed']:g} % of channels removed, n = {result['rounds']}"
    made = table(result, title, columns, "Medians: (quartiles), [95 % interval]")
    for row in result["rows"]:
        made.add_row(
            row["network"],
            str(row["batch_size"]),
            *(_quartiles(row["milliseconds"][name]) for name in (WHOLE, OURS, THEIRS)),
            _interval(row["ratio"]),
            _interval(row["speedup"]),
            f"{row['flop_ratio']:.2f}",
        )
    return made


def _quartiles(values: Json) -> str:
    return f"{values['median']:,.2f} ({values['lower']:,.2f} - {values['upper']:,.2f})"


def _interval(values: Json) -> str:
    low, high = values["interval"]
    return f"{values['median']:.2f} [{low:.2f}, {high:.2f}]"
