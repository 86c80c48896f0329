"""Runs: what one training is, its clock, its name."""

import pytest

from windfall import spec
from windfall.data import Digits
from windfall.models import Mlp
from windfall.prune import Continue, LearningRate, Prune, ToStep
from windfall.runs import Fresh, Pruned, Run
from windfall.selection import Global
from windfall.spec import SpecError
from windfall.train import Recipe

SHA = "0123456789abcdef" * 4


def run(**changes):
    settings = {"model": Mlp(), "data": Digits(), "data_sha256": SHA, "recipe": Recipe(steps=400)}
    return Run(**settings | {"seed": 0} | changes)


def pruned(**how):
    return Pruned(**{"parent": SHA, "level": 1} | how)


@pytest.mark.parametrize(
    ("start", "clock"),
    [
        (Fresh(), (0, 400)),
        (Fresh(stream="reinit"), (0, 400)),
        (pruned(), (0, 400)),
        (pruned(weights=Fresh(stream="reinit")), (0, 400)),
        (pruned(weights=ToStep(step=100)), (100, 400)),
        (pruned(weights=LearningRate(steps=100)), (300, 400)),
        (pruned(weights=LearningRate(steps=400)), (0, 400)),
        (pruned(weights=Continue(steps=100)), (400, 500)),
    ],
)
def test_the_clock_is_that_of_where_it_starts(start, clock):
    assert run(start=start).clock == clock


def test_a_fresh_run_has_no_parent_and_a_pruned_one_has():
    assert run().parent is None
    assert run(start=pruned()).parent == SHA


@pytest.mark.parametrize(
    "start",
    [
        Fresh(),
        Fresh(initialization="orthogonal", stream="reinit", seed=3),
        pruned(),
        pruned(weights=Fresh(stream="reinit"), arrange="shuffled"),
        pruned(weights=ToStep(step=7, optimizer="restored"), arrange="uniform"),
        pruned(weights=LearningRate(steps=5), level=3),
        pruned(weights=Continue(steps=5)),
        pruned(prune=Prune(criterion="random", selection=Global(density=0.1))),
    ],
    ids=lambda start: str(start)[:60],
)
class TestEveryStart:
    def test_it_is_what_its_json_says(self, start):
        assert Run.from_json(run(start=start).to_json(addressed=False)) == run(start=start)

    def test_its_address_is_no_other_starts(self, start):
        others = [Fresh(), pruned(), pruned(level=2), pruned(arrange="shuffled")]
        addresses = {run(start=other).address for other in others if other != start}
        assert run(start=start).address not in addresses

    def test_a_name_for_a_spec_means_the_same(self, start):
        document = run(start=start).to_json() | {"model": "mlp", "data": "digits"}
        assert Run.from_json(document).address == run(start=start).address


def test_an_address_stands_for_the_whole_chain_before_it():
    def chain(root):
        addresses = [root.address]
        for level in (1, 2, 3):
            start = pruned(parent=addresses[-1], level=level)
            addresses.append(run(start=start, seed=root.seed).address)
        return addresses

    first, second = chain(run()), chain(run(start=Fresh(initialization="orthogonal")))
    assert not set(first) & set(second)
    assert chain(run()) == first


def test_fresh_weights_of_the_runs_own_seed_are_not_named_by_another():
    """None says `the run's`; a number holds in a run of another seed too."""
    assert run(start=Fresh()).address != run(start=Fresh(seed=0)).address


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "`seed` must be greater than or equal to 0; got -1"),
        ({"seed": True}, "`seed` must be neither true nor false"),
        ({"data_sha256": "0" * 63}, "`data_sha256` must match pattern"),
        ({"data_sha256": "G" * 64}, "`data_sha256` must match pattern"),
        ({"start": {"kind": "pruned", "level": 1}}, "`start.parent` must be given"),
        ({"start": {"kind": "pruned", "parent": SHA}}, "`start.level` must be given"),
        ({"start": pruned().to_json() | {"level": 0}}, "`start.level` must be greater than or"),
        ({"start": pruned().to_json() | {"parent": "dense"}}, "`start.parent` must match pattern"),
        ({"start": pruned().to_json() | {"arrange": "any"}}, "`start.arrange` must be 'found', "),
        ({"start": pruned().to_json() | {"weights": "kept"}}, "`start.weights` must be one of"),
        ({"start": {"kind": "fresh", "stream": "x"}}, "`start.stream` must be 'init' or 'reinit'"),
        ({"start": "stale"}, "`start` must be one of the known names; got 'stale'"),
        ({"recipe": {"steps": 0}}, "`recipe.steps` must be greater than or equal to 1"),
        ({"epochs": 3}, "Has no field `epochs`"),
    ],
)
def test_runs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(SpecError, match=message):
        spec.checked(lambda: run(**changes))
