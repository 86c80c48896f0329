"""What the separate engine costs beyond the plain loop, in one process."""

import time

import torch
from rich.table import Table

from windfall.bench import plain
from windfall.bench.machine import machine, ratios, refuse, shown, spread, table
from windfall.bench.networks import NETWORKS, Network, images
from windfall.data import Dataset
from windfall.engines import separate
from windfall.masks import Params
from windfall.spec import Json
from windfall.train import State
from windfall.worker import quiet_machine

WARM = 20  # steps before the clock starts: allocations, caches, the optimizer's state
DENSITY = 0.2  # one of 1803.03635, Fig. 3
NETWORK = NETWORKS["lenet-300-100/60"]
LOOPS = ("bare", "engine")


def _seconds(
    loop: str, network: Network, data: Dataset, start: State, num_steps: int
) -> tuple[float, Params]:
    """Seconds of a loop from step WARM to `num_steps`, and the weights a step later.

    The clock is read before every step, so that the evaluations at the first and the last step are
    not in it.
    """
    steps = num_steps + 1
    recipe = network.recipe.model_copy(update={"steps": steps, "eval_every": steps})
    task = network.model_copy(update={"recipe": recipe}).task(data, seed=0, last_step=steps)
    times: list[float] = []

    def tick(*_: object) -> None:
        times.append(time.thread_time())

    train = plain.train if loop == "bare" else separate.train
    final = train(task, start, tick)
    return times[num_steps] - times[WARM], final.params


def measure(num_steps: int = 200, rounds: int = 51, network: Network = NETWORK) -> Json:
    """What the separate engine costs beyond a bare in-memory PyTorch loop of the same steps.

    LeNet-300-100 on random images of MNIST's shape, batch 60, fused Adam at 1.2e-3, masks of 20 %
    density on the gradients, one thread. The two loops take turns, bare, engine, bare, ...; a
    round's ratio is of neighbours in time, and the clock is the thread's processor time, so a busy
    machine disturbs it little; short rounds, the less so. Evaluations, the making of the networks
    and the first WARM steps, which draw the data's permutation (1 ms an epoch), are not measured.

    Args:
        num_steps: per loop and round, above WARM.
        rounds: n, at least 1.
        network: another one.

    Returns:
        machine; num_steps and rounds; processor microseconds per step, by loop, and their ratio
        engine / bare (1.1 is an overhead of 10 %), each with min, median and max over the rounds;
        is_equal, whether both loops ended with the same weights bit for bit.
    """
    refuse(num_steps=(num_steps, WARM + 1), rounds=(rounds, 1))
    microseconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    weights: dict[str, Params] = {}
    data, start = images(network), network.beginning(DENSITY, seed=0)
    with quiet_machine():
        for _ in range(rounds):
            for loop in LOOPS:
                seconds, weights[loop] = _seconds(loop, network, data, start, num_steps)
                microseconds[loop].append(1e6 * seconds / (num_steps - WARM))
        about = machine()
    return {
        "benchmark": "overhead",
        "machine": about,
        "num_steps": num_steps,
        "rounds": rounds,
        "microseconds_per_step": {name: spread(each) for name, each in microseconds.items()},
        "ratio": ratios(microseconds["engine"], microseconds["bare"]),
        "is_equal": all(torch.equal(w, weights["engine"][n]) for n, w in weights["bare"].items()),
    }


def render(result: Json) -> Table:
    """One row per measured quantity."""
    title = f"{result['num_steps']:,} steps, n = {result['rounds']}"
    made = table(result, title, ("", "median (min - max)"))
    for name, values in result["microseconds_per_step"].items():
        made.add_row(f"{name}, µs per step", shown(values))
    made.add_row("engine / bare", shown(result["ratio"], ".3f"))
    return made
