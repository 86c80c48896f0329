"""Prospects: whether a network would be faster without what a study removes, before any training.

The shapes that would be left are timed, untrained, beside the whole network: the values of weights
do not change what a pass takes.

    prospects(expand(study))[0]["after_is"]  # faster, same or slower
"""

import sys

from windfall import flops, latency, seeds, structure
from windfall.graph import Graph
from windfall.spec import Json

BATCH_SIZES = (1, 64)
SECONDS = 1.0  # of measuring a batch size
TELL_FLOPS = 2e9  # of a round of all networks: from here on it takes seconds, and that is told


def prospects(graph: Graph) -> list[Json]:
    """What a forward pass would take at the levels of a study that removes channels or blocks.

    On one thread of this machine's CPU, at the first level, that of the verdicts and the last.

    Returns:
        A row for every level and batch size: `level`, `flops_ratio` (of what stays, over the whole)
        and what `latency.compared` tells; none where single weights are pruned, whose network keeps
        its size.
    """
    study, network = graph.study, graph.network
    if not study.prune.is_structured:
        return []
    shape = network.input_shape
    with seeds.isolated(0, "inspect"):
        built = study.model.build(shape, network.num_classes).to(study.recipe.torch_dtype)
    left = {
        level: structure.resized(built, network.smaller(study.prune, level))
        for level in sorted({1, study.decided_level, study.levels})
    }
    networks = {0: built, **left}
    costs = {at: sum(flops.multiply_adds(each, shape).values()) for at, each in networks.items()}
    if sum(costs.values()) * max(BATCH_SIZES) > TELL_FLOPS:
        told = f"{study.name}: timing the network with and without what is to go, some seconds ..."
        print(told, file=sys.stderr, flush=True)
    named = {str(level): each for level, each in networks.items()}
    times = latency.measured(named, shape, BATCH_SIZES, seconds=SECONDS)
    return [
        {
            "level": level,
            "flops_ratio": costs[level] / costs[0],
            **latency.compared(size, each["0"], each[str(level)]),
        }
        for level in left
        for size, each in times.items()
    ]
