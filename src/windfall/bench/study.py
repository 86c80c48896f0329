"""A whole lottery chain, level by level, by every engine and by the plain loop.

Replicas are seeds: an engine trains one on each core, the plain loop one after another with all
threads. Every level is pruned and rewound in the same way on all sides.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from rich.table import Table

from windfall import data as data_sets
from windfall import files
from windfall import masks as masking
from windfall.bench.crew import Crew, Talk, elapsed_seconds
from windfall.bench.machine import machine, ratios, refuse, shown, spread, table
from windfall.bench.networks import MNIST, Network, chosen, images
from windfall.bench.teams import ENGINES, PLAIN, STACKED, Team, present
from windfall.criteria import Evidence
from windfall.data import Dataset
from windfall.engines.contract import AHEAD, Task, Unsupported
from windfall.execute import num_cores
from windfall.models import Kind
from windfall.prune import Prune
from windfall.spec import Json, SpecError
from windfall.train import State

LEVELS = 20  # to 1.2 % of the weights of LeNet-300-100
EVALUATED = (5_000, 10_000)  # images of validation and test part, MNIST's
PHASES = ("steps", "evaluation", "pruning", "packing")
MICRO = 1e6


# -- in a process ----------------------------------------------------------------------------------


@dataclass
class Clock:
    """Tells the seconds of a training apart by its pulses.

    An interval between two pulses holds steps, and may end with an evaluation. Those without give
    the time of a step; what is more in the others is their evaluations. What is left of the whole
    is packing: making the network, laying it out, and reading it back.

    Args:
        every: steps between evaluations.
        marks: step and time of each pulse.
    """

    every: int
    marks: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])

    def pulse(self, step: int) -> None:
        """Note a pulse."""
        self.marks.append((step, time.monotonic()))

    def seconds(self, whole: float, last_step: int) -> Json:
        """The seconds of steps, evaluations and packing.

        Args:
            whole: of the whole training.
            last_step: the number of its steps, a multiple of `every`.
        """
        spans = np.diff(np.array(self.marks), axis=0)
        is_clean = np.array([step % self.every != 0 for step, _ in self.marks[1:]])
        clean, looked = spans[is_clean], spans[~is_clean]
        per_step = clean[:, 1].sum() / clean[:, 0].sum()
        look = max(0.0, float((looked[:, 1] - per_step * looked[:, 0]).mean()))
        steps = clean[:, 1].sum() + per_step * (last_step - clean[:, 0].sum())
        evaluation = look * (1 + last_step // self.every)  # the first is before the first step
        packing = max(0.0, whole - steps - evaluation)
        return {"steps": float(steps), "evaluation": evaluation, "packing": packing}


def serve(talk: Talk) -> None:
    """Run the chains that are asked for."""
    message = talk(None)
    name, data = _data(Network.from_json(message["network"]), message["evaluated"])
    try:
        _chains(message, data, message["levels"][:2])  # kernels, caches
    except Unsupported as problem:
        talk({"unsupported": str(problem)})
    answer: Json = {"data": name}
    while True:
        talk(answer)
        began = time.monotonic()
        rows = _chains(message, data, message["levels"])
        answer = {"began": began, "ended": time.monotonic(), "rows": rows}


def _data(network: Network, evaluated: Sequence[int]) -> tuple[str, Dataset]:
    """The real MNIST, where it is, for a network that fits it; else random images of its shape."""
    fits = (network.input_shape, network.num_train, tuple(evaluated)) == (MNIST, 55_000, EVALUATED)
    if fits and (files.root(None) / files.MNIST.folder).exists():
        return "MNIST", data_sets.load(data_sets.Mnist())
    return "random images", images(network, *evaluated)


def _chains(message: Json, data: Dataset, levels: Sequence[int]) -> list[Json]:
    """The chains of a process's replicas; a row for each level, its seconds summed over them."""
    team, network = Team.from_json(message["team"]), Network.from_json(message["network"])
    steps = message["steps"]
    every = steps // message["evaluations"]
    recipe = network.recipe.model_copy(update={"steps": steps, "eval_every": every})
    network = network.model_copy(update={"recipe": recipe})
    rows: list[Json] = [{"level": level, **dict.fromkeys(PHASES, 0.0)} for level in levels]
    for row in rows:
        row["accuracies"], row["kept"] = [], []
    for group in team.groups(message["seeds"]):
        _chain(team, network, data, group, rows)
    return rows


def _chain(team: Team, network: Network, data: Dataset, seeds: list[int], rows: list[Json]) -> None:
    """Train replicas level by level, adding to the rows."""
    recipe, kinds = network.recipe, network.kinds()
    starts = [network.beginning(1.0, seed) for seed in seeds]
    states = starts
    for index, row in enumerate(rows):
        if index or row["level"]:
            begun = time.monotonic()
            states = [
                _pruned(start, state, seed, row["level"], kinds)
                for start, state, seed in zip(starts, states, seeds, strict=True)
            ]
            row["pruning"] += time.monotonic() - begun
        clock, begun = Clock(recipe.eval_every), time.monotonic()
        tasks: list[Task] = [network.task(data, seed, recipe.steps) for seed in seeds]
        states = team.train(tasks, states, clock.pulse)
        seconds = clock.seconds(time.monotonic() - begun, recipe.steps)
        for phase, value in seconds.items():
            row[phase] += value
        row["accuracies"] += [state.evaluations[-1].test_accuracy for state in states]
        masks = [state.masks or masking.ones(state.params, kinds) for state in states]
        row["kept"] += [sum(masking.kept(each).values()) for each in masks]


def _pruned(start: State, trained: State, seed: int, level: int, kinds: dict[str, Kind]) -> State:
    """The ticket of a level: the largest trained weights, at their values of the beginning."""
    alive = trained.masks or masking.ones(trained.params, kinds)
    evidence = Evidence(start.params, trained.params, seed, level)
    mask = Prune().masks(evidence, alive, kinds)
    source = start.copy()
    return State(0, masking.apply(mask, source.params), source.buffers, mask)


# -- the measurement -------------------------------------------------------------------------------


def _teams(engines: Sequence[str], replicas: int) -> list[Team]:
    """The plain loop, and each engine with its replicas spread over the cores."""
    teams = [Team(name=PLAIN, engine=PLAIN, threads=num_cores(), replicas=replicas)]
    for engine in engines:
        is_one = engine in STACKED
        processes = 1 if is_one else min(num_cores(), replicas)
        teams.append(
            Team(
                name=engine,
                engine=engine,
                processes=processes,
                threads=num_cores() if is_one else 1,
            )
        )
    return teams


@dataclass(frozen=True)
class _Size:
    """How much is trained: levels and steps of the engines, and of the plain loop."""

    levels: list[int]
    steps: int
    plain_levels: list[int]
    plain_steps: int
    evaluations: int
    evaluated: tuple[int, int]

    def asked(self, team: Team) -> Json:
        """What a process of a team is told."""
        is_plain = team.engine == PLAIN
        return {
            "team": team.to_json(),
            "steps": self.plain_steps if is_plain else self.steps,
            "levels": self.plain_levels if is_plain else self.levels,
            "evaluations": self.evaluations,
            "evaluated": list(self.evaluated),
        }

    def times(self, answers: Sequence[Json], team: Team) -> Json:
        """A chain's seconds: of its phases, and wall; the plain loop's for all steps and levels.

        Each phase is of the process that took longest over it.
        """
        phases = {p: max(sum(row[p] for row in a["rows"]) for a in answers) for p in PHASES}
        wall = elapsed_seconds(answers)
        if team.engine == PLAIN:
            share = len(self.levels) / len(self.plain_levels)
            whole = {p: share * value for p, value in phases.items()}
            whole["steps"] *= self.steps / self.plain_steps
            wall = share * (wall - sum(phases.values())) + sum(whole.values())
            phases = whole
        return phases | {"wall": wall}


def measure(
    networks: tuple[Network | str, ...] = ("lenet-300-100/60", "lenet-300-100/128"),
    engines: tuple[str, ...] = tuple(ENGINES),
    epochs: float = 4,
    levels: int = LEVELS,
    replicas: int = 2,
    rounds: int = 3,
    evaluations: int = 4,
    evaluated: tuple[int, int] = EVALUATED,
    plain_levels: tuple[int, ...] | None = None,
    plain_steps: int | None = None,
) -> Json:
    """A lottery chain, levels 0 to `levels`, rewound to the beginning; steps only, and wall.

    Layer by layer the smallest trained weights are pruned, 20 % a level, 10 % in the output layer.
    The steps of the plain loop do not depend on the level: it is run with fewer steps a level, and
    its seconds of steps are multiplied; with `plain_levels`, on these alone, and all its seconds
    are. Evaluations, as many in both, and pruning are never fewer than with all steps.

    Args:
        networks: of `networks.NETWORKS` by name, or others; on MNIST where it is found, else on
            random images.
        engines: of `teams.ENGINES`; what cannot be imported is left out, and said so.
        epochs: of each level, above 0.
        levels: the last level, at least 1.
        replicas: seeds, at least 1.
        rounds: n, at least 1; in each, every engine and the plain loop run their chains once.
        evaluations: of a level, besides the first; at least 2.
        evaluated: images of the validation and of the test part.
        plain_levels: of the plain loop, increasing; default all.
        plain_steps: of each of its levels; default a quarter, or so many that a step can be told
            from an evaluation.

    Returns:
        machine; settings; and for each network: data, steps and seconds by engine and phase, the
        ratios plain / engine of steps and of wall, round by round; and by level the weights kept,
        microseconds of a step and test accuracy.
    """
    refuse(epochs=(epochs, 1e-9), levels=(levels, 1), replicas=(replicas, 1), rounds=(rounds, 1),
           evaluations=(evaluations, 2))  # fmt: skip
    found, missing = present(engines)
    teams = _teams(found, replicas)
    results: list[Json] = []
    for network in chosen(networks):
        every = round(epochs * network.num_train / network.recipe.batch_size / evaluations)
        least = 2 * AHEAD  # an engine's pulses are so far apart: fewer, and no interval is clean
        if every < least:
            raise SpecError(
                f"`epochs` must be so many that an evaluation comes every {least} steps or more of "
                f"{network.name}; got {epochs:g}, every {every} steps."
            )
        few = max(least, every // 4) * evaluations if plain_steps is None else plain_steps
        refuse(plain_steps=(few, least * evaluations))
        size = _Size(
            list(range(levels + 1)),
            every * evaluations,
            list(range(levels + 1) if plain_levels is None else plain_levels),
            few // evaluations * evaluations,
            evaluations,
            evaluated,
        )
        results.append(_chained(network, teams, size, list(range(replicas)), rounds))
    return {
        "benchmark": "study",
        "machine": machine(),
        "rounds": rounds,
        "engines_missing": missing,
        "replicas": replicas,
        "networks": results,
    }


def _chained(
    network: Network, teams: Sequence[Team], size: _Size, seeds: list[int], rounds: int
) -> Json:
    seconds: dict[str, list[Json]] = {}
    answers: dict[str, list[Json]] = {}
    unsupported: dict[str, str] = {}
    data = ""
    with ExitStack() as stack:
        at = {t.name: stack.enter_context(Crew("study", t.processes, t.threads)) for t in teams}
        for team in teams:
            asked = size.asked(team) | {"network": network.to_json()}
            shares = (seeds[place :: team.processes] for place in range(team.processes))
            told = at[team.name].ask(*(asked | {"seeds": share} for share in shares))
            data = told[0].get("data", data)
            if "unsupported" in told[0]:
                unsupported[team.name] = told[0]["unsupported"]
        running = [team for team in teams if team.name not in unsupported]
        for _ in range(rounds):
            for team in running:
                answers[team.name] = at[team.name].ask({"go": True})
                seconds.setdefault(team.name, []).append(size.times(answers[team.name], team))
    return _result(network, data, size, seconds, answers) | {"unsupported": unsupported}


def _result(
    network: Network,
    name: str,
    size: _Size,
    seconds: dict[str, list[Json]],
    answers: dict[str, list[Json]],
) -> Json:
    plain = seconds[PLAIN]

    def ratio(each: list[Json], phase: str) -> Json:
        return ratios([s[phase] for s in plain], [s[phase] for s in each])

    return {
        "network": network.name,
        "data": name,
        "steps_per_level": size.steps,
        "plain_steps_per_level": size.plain_steps,
        "plain_levels": size.plain_levels,
        "evaluations_per_level": 1 + size.evaluations,
        "evaluated_images": sum(size.evaluated),
        "seconds": {
            engine: {phase: spread(s[phase] for s in each) for phase in (*PHASES, "wall")}
            for engine, each in seconds.items()
        },
        "speedup": {
            engine: {phase: ratio(each, phase) for phase in ("steps", "wall")}
            for engine, each in seconds.items()
            if engine != PLAIN
        },
        "levels": {engine: _levels(size, told, engine) for engine, told in answers.items()},
    }


def _levels(size: _Size, answers: Sequence[Json], name: str) -> list[Json]:
    """By level of the last round: weights kept, microseconds of a replica's step, accuracy."""
    steps = size.plain_steps if name == PLAIN else size.steps
    rows: list[Json] = []
    for place in zip(*(answer["rows"] for answer in answers), strict=True):
        accuracies = [value for row in place for value in row["accuracies"]]
        rows.append(
            {
                "level": place[0]["level"],
                "kept": sorted({kept for row in place for kept in row["kept"]}),
                "microseconds_per_step": MICRO
                * max(row["steps"] for row in place)
                / (steps * len(accuracies)),
                "test_accuracy": sum(accuracies) / len(accuracies),
            }
        )
    return rows


def render(result: Json) -> Table:
    """A row for each network and engine."""
    columns = ("network", "engine", *(f"{phase}, s" for phase in PHASES), "wall, s", "x steps",
               "x wall")  # fmt: skip
    notes = [
        f"{each['network']}: {each['data']}, {each['steps_per_level']:,} steps a level; the plain "
        f"loop's seconds are of {each['plain_steps_per_level']:,}, multiplied, at "
        f"{len(each['plain_levels'])} levels"
        for each in result["networks"]
    ]
    title = f"a chain of {result['replicas']} replicas, n = {result['rounds']}"
    made = table(result, title, columns, *notes)
    for each in result["networks"]:
        for name, seconds in each["seconds"].items():
            gains = each["speedup"].get(name, {})
            made.add_row(
                each["network"],
                name,
                *(f"{seconds[phase]['median']:,.2f}" for phase in PHASES),
                shown(seconds["wall"], ",.1f"),
                *(shown(gains.get(phase), ".2f") for phase in ("steps", "wall")),
            )
        made.add_section()
    return made
