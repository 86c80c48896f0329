"""Experiments: everything that a study of the laboratory can train, by one name each.

outcome = run(decode(Experiment, "laboratory"), seed=0)
"""

from collections.abc import Callable
from typing import Annotated

import torch

from windfall import laboratory, measures, simulation, train
from windfall.beginnings import Growth, Propagation, Sharpness
from windfall.children import Stability
from windfall.course import SCORES, Course
from windfall.inputs import loaded
from windfall.laboratory import Laboratory, Training
from windfall.levels import Chain
from windfall.masks import Params
from windfall.measures import Outcome, Readings
from windfall.probes import Biases, Flatness
from windfall.simulation import Matrices
from windfall.spec import FAMILY, Json
from windfall.trainability import Trainability
from windfall.transmission import Transmission

Begun = Propagation | Growth | Sharpness  # networks that are only begun, never trained
Chained = Chain | Stability | Transmission  # of a chain of pruning and rewinding
AnyExperiment = Laboratory | Matrices | Flatness | Biases | Chained | Begun | Trainability
Experiment = Annotated[AnyExperiment, FAMILY]
AnyState = laboratory.State | train.State
Pulse = Callable[[int, Callable[[], AnyState]], None]


_TRAINED = Biases | Chained | Trainability  # by an engine, on a recipe
_ALONE = Matrices | Biases | Begun | Trainability  # they begin from nothing else


def parent(experiment: AnyExperiment) -> AnyExperiment | None:
    """The experiment that it begins from, of the same seed; most have none."""
    return None if isinstance(experiment, _ALONE) else experiment.parent()


def trial(experiment: AnyExperiment) -> AnyExperiment:
    """An experiment without a parent whose steps take as long, or longer where it is pruned."""
    if isinstance(experiment, Chained):
        return experiment.trial()
    if isinstance(experiment, Flatness):
        experiment = experiment.parent()
    if isinstance(experiment, Laboratory) and experiment.subset:
        student = experiment.student.model_copy(update={"multi": 1, "hidden": None})
        return experiment.model_copy(update={"subset": None, "student": student})
    return experiment


def check(experiment: AnyExperiment) -> None:
    """Refuse, by a `SpecError`, what cannot be trained; this reads real data."""
    if not isinstance(experiment, Matrices):
        experiment.check()


def data_note(experiment: AnyExperiment) -> str | None:
    """What must be told beside every number of an experiment on real data; this reads them."""
    within = experiment.laboratory if isinstance(experiment, Flatness) else experiment
    inputs = within.inputs if isinstance(within, Laboratory) else within
    data = getattr(inputs, "data", None)
    return None if data is None else loaded(data).note


def restored(experiment: AnyExperiment, tensors: Params, facts: Json) -> AnyState:
    """The state of a training that was stopped."""
    kind = train.State if isinstance(experiment, _TRAINED) else laboratory.State
    return kind.restored(tensors, facts)


def run(
    experiment: AnyExperiment,
    seed: int,
    *,
    grown: Outcome | None = None,
    state: AnyState | None = None,
    pulse: Pulse = lambda *_: None,
) -> Outcome:
    """Train, and measure.

    Args:
        experiment: what.
        seed: of it, at least 0.
        grown: what its parent found, or None for one without.
        state: where a training goes on, or None for the beginning.
        pulse: called now and then with the step and a function that gives the state; it may raise
            to stop.
    """
    if isinstance(experiment, Matrices):
        return matrix_course(experiment, seed)
    if isinstance(experiment, Begun):
        return experiment.run(seed)
    if isinstance(experiment, Trainability):  # several trainings: a stopped one begins again
        return experiment.run(seed, lambda step: pulse(step, lambda: train.State(step, {}, {})))
    if isinstance(experiment, Biases):
        assert not isinstance(state, laboratory.State)
        return experiment.run(seed, state, pulse)
    if isinstance(experiment, Chained):
        assert not isinstance(state, laboratory.State)
        assert grown is None or isinstance(grown, Readings)
        return experiment.run(seed, grown, state, pulse)
    assert grown is None or isinstance(grown, Course)
    if isinstance(experiment, Flatness):
        assert grown is not None
        return experiment.read(grown, seed)
    assert not isinstance(state, train.State)
    return Training(experiment, seed, state, grown).run(pulse)


def matrix_course(settings: Matrices, seed: int) -> Course:
    """The course of the paper's matrix form; its correlations and loss are over all inputs."""
    series, tensor = simulation.simulate(settings, seed), torch.from_numpy
    layer, loss = "hidden1", torch.from_numpy(series.loss)
    return Course(
        steps=tensor(series.steps),
        scores=torch.stack([loss, *[torch.full_like(loss, torch.nan)] * (len(SCORES) - 1)], dim=1),
        best={layer: tensor(series.best)},
        incoming={},
        outgoing={layer: tensor(series.outgoing[:, :-1])},
        gradient={},
        first={layer: tensor(series.first)},
        last={layer: tensor(series.last)},
        frames=torch.stack([tensor(series.first), tensor(series.last)]),
        dead={layer: torch.zeros(len(series.first)).bool()},
    )


def metrics(experiment: AnyExperiment) -> list[str]:
    """The names of all that is measured of it; where it has many layers, not of each."""
    if isinstance(experiment, Laboratory):
        return measures.metrics(experiment.layers, is_subset=experiment.subset is not None)
    if not isinstance(experiment, Matrices):
        return experiment.metrics()
    return [name for name in measures.metrics(["hidden1"]) if name not in measures.SCORED[1:]]


def units(experiment: AnyExperiment) -> dict[str, str]:
    """The units of metrics by name, where they must be told; those of `NAME/LAYER` are NAME's."""
    return experiment.units() if isinstance(experiment, Transmission | Sharpness) else {}


def num_steps(experiment: AnyExperiment) -> int:
    """The steps of one training; of a chain and of children, those that they begin from too."""
    if isinstance(experiment, Chained | Begun | Trainability):
        return experiment.num_steps()
    if isinstance(experiment, Biases):
        return experiment.recipe.steps
    if isinstance(experiment, Flatness):
        return experiment.laboratory.steps
    return experiment.steps if isinstance(experiment, Laboratory) else experiment.num_steps


def num_macs(experiment: AnyExperiment) -> int:
    """Multiply-adds of its network for one input; of a subset, those of its most nodes."""
    if isinstance(experiment, Flatness):
        return experiment.laboratory.num_macs()
    if not isinstance(experiment, Matrices):
        return experiment.num_macs()
    num_inputs, num_nodes, num_outputs = experiment.sizes
    return experiment.multi * num_nodes * (num_inputs + num_outputs)


def _batch_size(experiment: AnyExperiment) -> int:
    if isinstance(experiment, _TRAINED):
        return experiment.recipe.batch_size
    if isinstance(experiment, Propagation | Growth):
        return experiment.num_points
    if isinstance(experiment, Sharpness):
        return experiment.num_inputs
    within = experiment.laboratory if isinstance(experiment, Flatness) else experiment
    return within.batch_size


def training_flops(experiment: AnyExperiment) -> float:
    """FLOPs of one training: 6 for each multiply-add, forward, backward and update."""
    return 6.0 * num_macs(experiment) * _batch_size(experiment) * num_steps(experiment)
