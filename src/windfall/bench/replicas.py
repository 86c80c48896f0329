"""Networks trained a second against their number, by each engine."""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from rich.table import Table

from windfall.bench.crew import Crew, Talk, elapsed_seconds
from windfall.bench.machine import (
    machine,
    refuse,
    refuse_densities,
    shown,
    spread,
    table,
)
from windfall.bench.networks import Network, chosen, images
from windfall.bench.teams import ENGINES, PLAIN, STACKED, Team, present
from windfall.engines.contract import Unsupported
from windfall.execute import num_cores
from windfall.spec import Json

COUNTS, DENSITIES = (1, 2, 4, 8, 16), (1.0, 0.2, 0.02)
FEW = 256  # steps of the first training, from which the steps of the others are reckoned


def serve(talk: Talk) -> None:
    """Train the replicas that are asked for, from the beginning to the last step."""
    message, data = talk(None), None
    while True:
        team, network = Team.from_json(message["team"]), Network.from_json(message["network"])
        steps = message["steps"]
        recipe = network.recipe.model_copy(update={"steps": steps, "eval_every": steps})
        network = network.model_copy(update={"recipe": recipe})
        data = images(network) if data is None else data
        groups = team.groups(message["seeds"])
        starts = {seed: network.beginning(message["density"], seed) for seed in message["seeds"]}
        asked = talk({"ready": True})
        began = time.monotonic()
        try:
            for group in groups:
                tasks = [network.task(data, seed, steps) for seed in group]
                team.train(tasks, [starts[seed] for seed in group], lambda _: None)
        except Unsupported as problem:
            message = talk({"unsupported": str(problem)})
            continue
        assert asked == {"go": True}
        message = talk({"began": began, "ended": time.monotonic()})


@dataclass(frozen=True)
class _Side:
    """A team's processes, one a core or one in all."""

    team: Team
    crew: Crew
    network: Network
    density: float

    def seconds(self, replicas: int, steps: int) -> float | None:
        """Seconds in which so many replicas are trained; None if the engine cannot."""
        shares = [
            list(range(place, replicas, self.team.processes))
            for place in range(self.team.processes)
        ]
        question = {
            "team": self.team.to_json(),
            "network": self.network.to_json(),
            "density": self.density,
            "steps": steps,
        }
        self.crew.ask(*(question | {"seeds": share} for share in shares))
        answers = self.crew.ask({"go": True})
        busy = [answer for answer, share in zip(answers, shares, strict=True) if share]
        return None if "unsupported" in busy[0] else elapsed_seconds(busy)

    def steps(self, seconds: float) -> int | None:
        """Steps of one replica in so many seconds, a multiple of FEW; None if it cannot."""
        self.seconds(self.team.processes, FEW)  # kernels, caches
        elapsed = self.seconds(1, FEW)
        return None if elapsed is None else FEW * math.ceil(seconds / elapsed)


def _teams(engines: Sequence[str]) -> list[Team]:
    teams = [Team(name=PLAIN, engine=PLAIN, processes=num_cores())]
    for engine in engines:
        is_one = engine in STACKED
        threads, processes = (num_cores(), 1) if is_one else (1, num_cores())
        teams.append(Team(name=engine, engine=engine, processes=processes, threads=threads))
    return teams


def measure(
    network: Network | str = "lenet-300-100/60",
    densities: tuple[float, ...] = DENSITIES,
    counts: tuple[int, ...] = COUNTS,
    engines: tuple[str, ...] = tuple(ENGINES),
    rounds: int = 3,
    seconds: float = 2.0,
) -> Json:
    """Steps of replicas a second, by the number of replicas.

    An engine that trains one replica at a time has a process of one thread for each core, and they
    take the replicas in turn; a stack is one program with all threads; the plain loop is run as
    the engines are. A training is whole: laying the network out and two evaluations on two images
    are in it. All train in turn, round by round.

    Args:
        network: of `networks.NETWORKS` by name, or another.
        densities: in (0, 1].
        counts: numbers of replicas, each at least 1.
        engines: of `teams.ENGINES`; what cannot be imported is left out, and said so.
        rounds: n, at least 1.
        seconds: that the training of one replica takes at least, above 0; this sets its steps.

    Returns:
        machine; settings; missing engines; and rows: engine, density, replicas, steps of each, and
        the spread of replica-steps a second.
    """
    refuse(rounds=(rounds, 1), seconds=(seconds, 1e-9), counts=(min(counts, default=0), 1))
    refuse_densities(densities)
    found, missing = present(engines)
    rows: list[Json] = []
    with ExitStack() as stack:
        teams = _teams(found)
        at = [stack.enter_context(Crew("replicas", t.processes, t.threads)) for t in teams]
        for density in densities:
            sides = [
                _Side(team, crew, chosen([network])[0], density)
                for team, crew in zip(teams, at, strict=True)
            ]
            rows += _rows(sides, counts, rounds, seconds)
    return {
        "benchmark": "replicas",
        "machine": machine(),
        "network": chosen([network])[0].name,
        "rounds": rounds,
        "engines_missing": missing,
        "rows": rows,
    }


def _rows(sides: Sequence[_Side], counts: Sequence[int], rounds: int, seconds: float) -> list[Json]:
    steps = {side.team.name: side.steps(seconds) for side in sides}
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for count in counts:
            for side in sides:
                number = steps[side.team.name]
                elapsed = None if number is None else side.seconds(count, number)
                if elapsed is not None and number is not None:
                    key = side.team.name, count
                    rates.setdefault(key, []).append(count * number / elapsed)
    return [
        {
            "engine": name,
            "density": sides[0].density,
            "replicas": count,
            "steps": steps[name],
            "replica_steps_per_second": spread(values),
        }
        for (name, count), values in sorted(rates.items())
    ]


def render(result: Json) -> Table:
    """A row for each density, engine and number of replicas."""
    columns = ("engine", "density", "replicas", "steps each", "replica-steps a second")
    title = f"{result['network']}, n = {result['rounds']}"
    made = table(result, title, columns, "median (min - max)")
    for row in result["rows"]:
        made.add_row(
            row["engine"],
            f"{row['density']:g}",
            str(row["replicas"]),
            f"{row['steps']:,}",
            shown(row["replica_steps_per_second"]),
        )
    return made
