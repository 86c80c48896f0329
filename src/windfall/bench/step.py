"""The time of a training step against density, by every engine and by the plain loop.

Each engine and yardstick trains in processes of its own, without end; they take turns, lap by lap,
and wait while the others run. A lap begins in all processes of one team at once.
"""

import math
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from rich.table import Table

from windfall.bench.crew import Crew, Talk, elapsed_seconds
from windfall.bench.machine import (
    machine,
    ratios,
    refuse,
    refuse_densities,
    shown,
    spread,
    table,
)
from windfall.bench.networks import NETWORKS, Network, chosen, images
from windfall.bench.teams import ENGINES, Team, engine_teams, present, yardsticks
from windfall.data import Dataset
from windfall.engines import separate
from windfall.engines.contract import Unsupported
from windfall.masks import Params
from windfall.spec import Json
from windfall.train import State

DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
CHECKED = 2  # steps after which weights are compared: later, rounding grows into chaos (ResNet)
MICRO = 1e6


# -- in a process ----------------------------------------------------------------------------------


class _Another(Exception):
    """Another training is asked for."""

    def __init__(self, message: Json) -> None:
        super().__init__()
        self.message = message


def serve(talk: Talk) -> None:
    """Train what is asked for, and pause after every lap."""
    message = talk(None)
    while True:
        message = _train(message, talk)


def _train(message: Json, talk: Talk) -> Json:
    """Train until another training is asked for; returns that message."""
    team, network = Team.from_json(message["team"]), Network.from_json(message["network"])
    density, seeds = message["density"], team.seeds(message["process"])
    data = images(network)
    try:
        error = _error(team, network, data, density, seeds)
    except Unsupported as problem:
        return talk({"unsupported": str(problem)})
    answer: Json = {"error": error}
    left, began = 0, time.monotonic()

    def pulse(step: int) -> None:
        nonlocal left, began, answer
        if step % network.recipe.eval_every:
            return
        left -= 1
        if left > 0:
            return
        asked = talk(answer | {"began": began, "ended": time.monotonic()})
        if "network" in asked:
            raise _Another(asked)
        answer, left, began = {}, asked["intervals"], time.monotonic()

    try:
        tasks = [network.task(data, seed) for seed in seeds]
        team.train(tasks, [network.beginning(density, seed) for seed in seeds], pulse)
    except _Another as another:
        return another.message
    raise RuntimeError(f"{network.name} diverged with {team.name}")


def _error(
    team: Team, network: Network, data: Dataset, density: float, seeds: Sequence[int]
) -> float:
    """How far a team's weights are from those in float64 after `CHECKED` steps.

    |w - w_64| / |w_64 - w_0|, 2-norms over all parameters; the most of the replicas.
    """
    starts = [network.beginning(density, seed) for seed in seeds]
    tasks = [network.task(data, seed, CHECKED) for seed in seeds]
    finals = team.train(tasks, starts, lambda _: None)
    recipe = network.recipe.model_copy(update={"dtype": "float64"})
    exact = network.model_copy(update={"recipe": recipe})
    worst = 0.0
    for seed, start, final in zip(seeds, starts, finals, strict=True):
        expected = separate.train(exact.task(data, seed, CHECKED), _doubled(start))
        worst = max(worst, _distance(final, expected) / _distance(expected, start))
    return worst


def _doubled(state: State) -> State:
    def doubled(tensors: Params) -> Params:
        return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}

    return State(state.step, doubled(state.params), doubled(state.buffers), state.masks)


def _distance(a: State, b: State) -> float:
    def flat(params: Params) -> torch.Tensor:
        return torch.cat([params[name].flatten().double() for name in sorted(params)])

    return float((flat(a.params) - flat(b.params)).norm())


# -- the measurement -------------------------------------------------------------------------------


@dataclass
class Laps:
    """What was measured of one network at one density, by the names of the teams.

    Args:
        microseconds: per step of a replica, one for each round.
        error: of the weights after `CHECKED` steps, of the size of their update.
        unsupported: why a team's engine cannot train the network.
    """

    microseconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    error: dict[str, float] = field(default_factory=dict[str, float])
    unsupported: dict[str, str] = field(default_factory=dict[str, str])


@contextmanager
def crews(teams: Sequence[Team]) -> Generator[dict[str, Crew]]:
    """The processes of each team, by its name."""
    with ExitStack() as stack:
        yield {
            team.name: stack.enter_context(Crew("step", team.processes, team.threads))
            for team in teams
        }


def laps(
    at: Mapping[str, Crew],
    teams: Sequence[Team],
    network: Network,
    density: float,
    rounds: int,
    lap_seconds: float,
) -> Laps:
    """Let teams train in turn, round by round.

    Args:
        at: the processes of each team.
        teams: in the order of their turns.
        network: what is trained.
        density: of its masks.
        rounds: of one lap each.
        lap_seconds: that a lap takes at least; it is a multiple of the recipe's `eval_every` steps.
    """
    measured, intervals = Laps(), dict[str, int]()
    every = network.recipe.eval_every
    for team in teams:
        question = {"team": team.to_json(), "network": network.to_json(), "density": density}
        answers = at[team.name].ask(*(question | {"process": i} for i in range(team.processes)))
        if "unsupported" in answers[0]:
            measured.unsupported[team.name] = answers[0]["unsupported"]
            continue
        measured.error[team.name] = max(answer["error"] for answer in answers)
        at[team.name].ask({"intervals": 1})  # warms: allocations, caches
        elapsed = elapsed_seconds(at[team.name].ask({"intervals": 1}))
        intervals[team.name] = max(1, math.ceil(lap_seconds / elapsed))
        measured.microseconds[team.name] = []
    for _ in range(rounds):
        for team in teams:
            if (number := intervals.get(team.name)) is not None:
                elapsed = elapsed_seconds(at[team.name].ask({"intervals": number}))
                steps = number * every * team.num_replicas
                measured.microseconds[team.name].append(MICRO * elapsed / steps)
    return measured


def measure(
    networks: tuple[Network | str, ...] = tuple(NETWORKS),
    densities: tuple[float, ...] = DENSITIES,
    engines: tuple[str, ...] = tuple(ENGINES),
    rounds: int = 5,
    lap_seconds: float = 1.0,
) -> Json:
    """The time of a training step, by network, density and team.

    Random images, random masks. A step is everything: batch, forward, backward, update; a lap also
    holds an evaluation on two images every `eval_every` steps, by engines and yardsticks alike. The
    time of a step of a replica is the elapsed time of all processes over the steps of all replicas.
    The yardsticks are the plain loop in one process with all threads, and in one process of one
    thread for each core; of the two layouts of images the faster is chosen at the first density,
    in each form, and named.

    Args:
        networks: of `networks.NETWORKS` by name, or others.
        densities: in (0, 1]; 1 is the dense network, without masks.
        engines: of `teams.ENGINES`; what cannot be imported is left out, and said so.
        rounds: n, at least 1.
        lap_seconds: that a lap takes at least, above 0.

    Returns:
        machine; settings; missing engines; and rows: network, density, kept weights, microseconds
        per replica-step by team, speedup by yardstick and team (the yardstick's time over the
        team's, round by round), error (of the weights after a few steps from the same training in
        float64, of the size of their update: that all have trained the same), unsupported.
    """
    refuse(rounds=(rounds, 1), lap_seconds=(lap_seconds, 1e-9))
    refuse_densities(densities)
    found, missing = present(engines)
    others = [team for engine in found for team in engine_teams(engine)]
    rows: list[Json] = []
    for network in chosen(networks):
        gauges = yardsticks(is_convolutional=network.is_convolutional)
        with crews([*gauges, *others]) as at:
            for density in densities:
                measured = laps(at, [*gauges, *others], network, density, rounds, lap_seconds)
                fastest = _fastest(gauges, measured)
                rows.append(_row(network, density, measured, fastest))
                gauges = [team for team in gauges if team.name in fastest]
    return {
        "benchmark": "step",
        "machine": machine(),
        "rounds": rounds,
        "lap_seconds": lap_seconds,
        "engines_missing": missing,
        "rows": rows,
    }


def _fastest(gauges: Sequence[Team], measured: Laps) -> list[str]:
    """The faster layout of the plain loop in each of its forms."""
    best: dict[int, str] = {}
    for team in gauges:
        other = best.setdefault(team.processes, team.name)
        medians = {n: spread(measured.microseconds[n])["median"] for n in (other, team.name)}
        best[team.processes] = min(medians, key=medians.__getitem__)
    return list(best.values())


def _row(network: Network, density: float, measured: Laps, fastest: Sequence[str]) -> Json:
    masks, micro = network.masks(density, seed=0), measured.microseconds
    sizes = {n: p.numel() for n, p in network.build().named_parameters() if n in network.kinds()}
    return {
        "network": network.name,
        "density": density,
        "weights": sum(sizes.values()),
        "kept": sum(int(masks[n].sum()) if n in masks else size for n, size in sizes.items()),
        "microseconds_per_step": {name: spread(values) for name, values in micro.items()},
        "speedup": {
            gauge: {name: ratios(micro[gauge], micro[name]) for name in micro if name != gauge}
            for gauge in fastest
        },
        "error": measured.error,
        "unsupported": measured.unsupported,
    }


def render(result: Json) -> Table:
    """A row for each network, density and team."""
    columns = (
        "network",
        "density",
        "team",
        "µs per step",
        "x plain, all threads",
        "x plain, one a core",
        "error",
    )
    notes = [f"{name}: {told}" for name, told in result["engines_missing"].items()]
    told = (
        "median (min - max) of a replica's step; x: times as fast as the plain loop",
        f"error: of the weights' update after {CHECKED} steps, against float64",
    )
    made = table(result, f"n = {result['rounds']}", columns, *told, *notes)
    for row in result["rows"]:
        gauges = list(row["speedup"])
        for name, micro in row["microseconds_per_step"].items():
            gains = [shown(row["speedup"][gauge].get(name), ".2f") for gauge in gauges]
            made.add_row(
                row["network"],
                f"{row['density']:g}",
                name,
                shown(micro, ",.0f" if micro["median"] > 100 else ",.1f"),
                *gains,
                f"{row['error'][name]:.0e}",
            )
        for name, told in row["unsupported"].items():
            made.add_row(row["network"], f"{row['density']:g}", name, "-", "", "", told)
        made.add_section()
    return made
