"""What a process costs: its peak memory, and the time from its start to the end of a first step."""

import contextlib
import sys
import tempfile
import time
from pathlib import Path

from rich.table import Table

from windfall.bench.crew import Crew, Talk
from windfall.bench.machine import machine, ratios, refuse, refuse_densities, shown, spread, table
from windfall.bench.networks import Network, chosen, images
from windfall.bench.teams import ENGINES, PLAIN, Team, present
from windfall.engines.contract import Unsupported
from windfall.spec import Json

DENSITIES = (1.0, 0.2, 0.02)
EVALUATED = (5_000, 10_000)  # images of validation and test part, as in a study
FEW = 1_000  # images of the first step: making more is not what is measured
MEBI = 2**20
STATUS = Path("/proc/self/status")  # on Linux
CACHES = ("WINDFALL_CACHE", "NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")  # of compiled kernels


# -- in a process ----------------------------------------------------------------------------------


def peak_bytes() -> int:
    """The most memory that this process has had at once, since it began or `forget_peak`."""
    if STATUS.exists():
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Make what this process has now its peak, where the system can: on Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def serve(talk: Talk) -> None:
    """Train once, and tell what it took."""
    message = talk(None)
    team, network = Team.from_json(message["team"]), Network.from_json(message["network"])
    steps = message["steps"]
    recipe = network.recipe.model_copy(update={"steps": steps, "eval_every": steps})
    network = network.model_copy(update={"recipe": recipe})
    data, start = images(network, *message["evaluated"]), network.beginning(message["density"], 0)
    peak = peak_bytes()
    forget_peak()
    before, begun = peak_bytes(), time.monotonic()
    try:
        team.train([network.task(data, 0, steps)], [start], lambda _: None)
    except Unsupported as problem:
        talk({"unsupported": str(problem)})
    ended = time.monotonic()
    told = {"seconds": ended - begun, "ended": ended, "before": before}
    training = max(0, peak_bytes() - before)  # the kernel's counts are off by some pages
    talk(told | {"training": training, "peak": max(peak, before + training)})


# -- the measurement -------------------------------------------------------------------------------


def _trained(
    team: Team,
    network: Network,
    density: float,
    steps: int,
    evaluated: tuple[int, int],
    cache: str | None = None,
) -> Json:
    """What a new process tells of a training, with the seconds since it was started."""
    environment: dict[str, str] = {name: cache for name in CACHES if cache is not None}
    begun = time.monotonic()
    with Crew("process", 1, team.threads, environment) as crew:
        message = {"team": team.to_json(), "network": network.to_json(), "density": density}
        (answer,) = crew.ask(message | {"steps": steps, "evaluated": list(evaluated)})
    return answer | {"since_start": answer.get("ended", begun) - begun}


def _memory(
    teams: list[Team], network: Network, densities: tuple[float, ...], steps: int, rounds: int,
    evaluated: tuple[int, int],
) -> list[Json]:  # fmt: skip
    peaks: dict[tuple[float, str], list[Json]] = {}
    for _ in range(rounds):
        for density in densities:
            for team in teams:
                told = _trained(team, network, density, steps, evaluated)
                if "unsupported" not in told:
                    peaks.setdefault((density, team.name), []).append(told)
    dense = [told["peak"] for told in peaks[densities[0], PLAIN]]
    return [
        {
            "network": network.name,
            "engine": name,
            "density": density,
            "peak_bytes": spread(told["peak"] for told in each),
            "training_bytes": spread(told["training"] for told in each),
            "ratio": ratios([told["peak"] for told in each], dense),
        }
        for (density, name), each in peaks.items()
    ]


def _first_steps(teams: list[Team], network: Network, density: float, rounds: int) -> list[Json]:
    times: dict[tuple[str, str], list[Json]] = {}
    network = network.model_copy(update={"num_train": min(FEW, network.num_train)})
    for _ in range(rounds):
        for team in teams:
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):  # the second process finds what the first has left
                    told = _trained(team, network, density, 1, (1, 1), cache)
                    if "unsupported" not in told:
                        times.setdefault((team.name, state), []).append(told)
    return [
        {
            "network": network.name,
            "engine": name,
            "density": density,
            "cache": state,
            "seconds": spread(told["since_start"] for told in each),
            "training_seconds": spread(told["seconds"] for told in each),
        }
        for (name, state), each in times.items()
    ]


def measure(
    networks: tuple[Network | str, ...] = ("lenet-300-100/60", "conv-4", "resnet-20"),
    densities: tuple[float, ...] = DENSITIES,
    engines: tuple[str, ...] = tuple(ENGINES),
    num_steps: int = 8,
    rounds: int = 3,
    evaluated: tuple[int, int] = EVALUATED,
) -> Json:
    """Peak memory of a training, and the seconds to the first step, each in a process of its own.

    Peak memory is of all that a worker holds: libraries, random images, the network and its dense
    masks, two evaluations. The first step is counted from the start of the process: imports,
    compilation, one step, two evaluations on two images; with an empty folder of compiled kernels
    (cold), and again with what the first process has left there (warm).

    Args:
        networks: of `networks.NETWORKS` by name, or others.
        densities: in (0, 1]; the first is what others are compared with.
        engines: of `teams.ENGINES`; what cannot be imported is left out, and said so.
        num_steps: of a training whose memory is measured, at least 1.
        rounds: n, at least 1.
        evaluated: images of the validation and of the test part.

    Returns:
        machine; settings; missing engines; `memory`, rows of network, engine, density, peak_bytes,
        training_bytes (that the training adds to what was held before it: libraries, images, the
        dense beginning) and ratio (of the peak to the plain loop's at the first density);
        `first_step`, rows of network, engine, density, cache, seconds since the start and
        training_seconds among them.
    """
    refuse(num_steps=(num_steps, 1), rounds=(rounds, 1))
    refuse_densities(densities)
    found, missing = present(engines)
    teams = [Team(name=engine, engine=engine) for engine in (PLAIN, *found)]
    memory: list[Json] = []
    first_step: list[Json] = []
    for network in chosen(networks):
        memory += _memory(teams, network, densities, num_steps, rounds, evaluated)
        first_step += _first_steps(teams, network, densities[-1], rounds)
    return {
        "benchmark": "process",
        "machine": machine(),
        "rounds": rounds,
        "num_steps": num_steps,
        "engines_missing": missing,
        "memory": memory,
        "first_step": first_step,
    }


def render(result: Json) -> Table:
    """A row for each network, engine and density, and one for each first step."""
    columns = ("network", "engine", "density", "what", "median (min - max)", "x dense plain loop",
               "training adds, MiB")  # fmt: skip
    title = f"peak memory and first step, n = {result['rounds']}"
    made = table(result, title, columns)
    for row in result["memory"]:
        whole, added = (
            {key: value / MEBI for key, value in row[name].items()}
            for name in ("peak_bytes", "training_bytes")
        )
        made.add_row(
            row["network"],
            row["engine"],
            f"{row['density']:g}",
            "peak memory, MiB",
            shown(whole),
            shown(row["ratio"], ".2f"),
            shown(added, ",.1f"),
        )
    made.add_section()
    for row in result["first_step"]:
        made.add_row(
            row["network"],
            row["engine"],
            f"{row['density']:g}",
            f"first step, {row['cache']} cache, s",
            shown(row["seconds"], ".2f"),
            "",
            "",
        )
    return made
