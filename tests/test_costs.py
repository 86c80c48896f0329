"""What a study costs: the work that is counted, the pace that is fitted, and what `plan` says."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import small
import test_tables as filled
import torch
from torch import nn

from windfall import costs, display, models, pace, seeds, tables, trials, verbs, words
from windfall.engines.sparse import graph, pack
from windfall.engines.sparse.program import Program
from windfall.engines.sparse.training import rule
from windfall.graph import expand
from windfall.pace import Pace
from windfall.store import Lab
from windfall.train import Adam, Recipe, Sgd
from windfall.trials import Timing
from windfall.workload import Training, num_blocks

FLAT = Pace(
    0.0, {"separate": 0.0, "sparse": 0.0}, {"separate": {"step": 2.0}, "sparse": {"step": 1.0}}
)


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch, tmp_path):
    """No pace is known, and none is measured."""

    def refused(*_):
        raise AssertionError("this machine must not be measured here")

    monkeypatch.setenv("WINDFALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trials, "run", refused)


# -- the work --------------------------------------------------------------------------------------


def linear(*sizes: int) -> nn.Module:
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    parts = [part for layer in layers for part in (layer, nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *parts[:-1])


def recipe(**settings) -> Recipe:
    return Recipe(**{"batch_size": 32, "optimizer": Sgd(momentum=0.9)} | settings)


def test_the_sparse_work_of_a_linear_network_is_that_counted_by_hand():
    training = Training("sparse", linear(4, 8, 3), (1, 2, 2), recipe())
    work = training.workload({"1.weight": 10, "3.weight": 24})
    entries, back = (10 + 8) + (24 + 3), 24  # with biases; the input needs no gradient
    groups = 2  # of 16 samples: one tile of 2 vectors
    assert work.step == {
        "step": 1,
        "gathered": 4 * groups,
        "classed": 3 * groups,
        "product linear": (entries + back) * groups,
        "gradient linear": entries * groups,
        "entry linear": entries,
        "back linear": back,
        "row linear": (8 + 3 + 8) * groups,
        "sgd": entries,
    }
    assert {kind: 32 * n for kind, n in work.sample.items()} == {
        "gathered": 4 * groups,
        "classed": 3 * groups,
        "product linear": entries * groups,
        "entry linear": entries,
        "row linear": (8 + 3) * groups,
    }
    assert work.evaluation(64)["look"] == 1
    assert work.evaluation(64)["classed"] == 2 * 3 * groups


def test_the_sparse_work_of_a_convolution_is_that_counted_by_hand():
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8, 3, bias=False),
    )  # fmt: skip
    training = Training("sparse", module, (1, 4, 4), recipe(batch_size=16, optimizer=Adam()))
    step = training.workload({"0.weight": 7}).step
    assert step["product convolution"] == 7 * 16  # the 4 x 4 places are one tile of 16
    assert step["row convolution"] == 2 * 16
    assert step["gradient convolution"] == 7 * 16
    assert step["normalized"] == (3 + 6) * 2 * 16
    assert step["pooled"] == (2 * 16 + 2 * 4) + 3 * 2 * 16
    assert step["moved"] == (2 + 3) * 2 * 4
    assert step["adam"] == 7 + 2 * 2 + 24
    assert "far" not in step


def test_the_separate_work_is_that_counted_by_hand():
    module = linear(4, 8, 3)
    step = Training("separate", module, (1, 2, 2), recipe()).workload({}).step
    assert step["linear"] == 3 * 32 * (4 * 8 + 8 * 3)
    assert step["tensor"] == 4
    assert step["sgd"] == 4 * 8 + 8 + 8 * 3 + 3
    assert step["gathered"] == 4 * 32
    assert "masked" not in step
    kept = {"1.weight": 31.0, "3.weight": 24.0}
    masked = Training("separate", module, (1, 2, 2), recipe()).workload(kept).step
    assert masked == {**step, "masked": 32}


@pytest.mark.parametrize("engine", ["separate", "sparse"])
def test_numbers_of_twice_the_width_are_twice_the_work(engine):
    def step(dtype):
        return Training(engine, linear(4, 8, 3), (1, 2, 2), recipe(dtype=dtype)).workload({}).step

    single, double = step("float32"), step("float64")
    fixed = ("step", "tensor")
    assert double == {kind: n * (1 + (kind not in fixed)) for kind, n in single.items()}


@pytest.mark.parametrize("engine", ["separate", "sparse"])
def test_counting_leaves_the_network_as_it_was(engine):
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    ).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    drawn = torch.get_rng_state()
    Training(engine, module, (1, 4, 4), recipe()).workload({})
    assert all(torch.equal(before[name], now) for name, now in module.state_dict().items())
    assert all(param.grad is None for param in module.parameters())
    assert not module.training
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize(("hidden", "kept"), [((40, 8), 700), ((300, 4), 30_000), ((9, 9), 3)])
def test_the_number_of_blocks_is_that_of_the_lists(hidden, kept):
    module = linear(784, *hidden, 10)
    network = graph.read(module, (1, 28, 28))
    program = Program(network, 128, "float32", "uint8", rule(recipe()))
    made = program.connections[0]
    size = 784 * hidden[0]
    kept = min(kept, size)
    chosen = np.sort(seeds.stream(0, "test").choice(size, kept, replace=False))
    listed = pack.entries(made, chosen, 4)
    entries = kept + hidden[0]
    assert num_blocks(made.forward, entries, hidden[0], 785, 4) == listed.blocks


# -- the fit ---------------------------------------------------------------------------------------


def test_the_fit_recovers_the_pace_that_made_the_timings():
    planted = {"a": 2e-9, "b": 0.0, "c": 5e-4}
    draws = seeds.stream(0, "fit").integers(1, 1000, (6, 3)).astype(float)
    counts = [dict(zip(planted, row, strict=True)) for row in draws.tolist()]
    seconds = [sum(planted[kind] * n for kind, n in row.items()) for row in counts]
    assert pace.fit(counts, seconds) == pytest.approx(planted, rel=1e-6, abs=1e-15)


def test_what_the_timings_do_not_tell_apart_stays_in_typical_proportion():
    counts = [{"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 3.0}]
    found = pace.fit(counts, [8.0, 24.0], {"a": 1.0, "b": 3.0})
    assert found == pytest.approx({"a": 2.0, "b": 6.0})


def test_a_pace_is_fitted_from_trials_and_tells_their_time():
    timings = made_up()
    found = pace.fitted(1.5, trials.calibration(), timings)
    assert found.process == 1.5
    assert found.start == {"separate": 0.25, "sparse": 0.25}
    for trial, timing in zip(trials.calibration(), timings, strict=True):
        work = Training(trial.engine, trial.build(), trial.input_shape, trial.recipe)
        told = found.seconds(trial.engine, work.workload(trial.kept()).step)
        assert told == pytest.approx(timing.step, rel=1e-3)
    assert found.seconds("stacked", {"step": 2.0}) == found.seconds("separate", {"step": 2.0})


def made_up() -> list[Timing]:
    """Timings of a machine twice as fast as the typical one."""
    typical = Pace(0.0, {}, pace.TYPICAL)
    timings = []
    for trial in trials.calibration():
        work = Training(trial.engine, trial.build(), trial.input_shape, trial.recipe).workload(
            trial.kept()
        )
        step = typical.seconds(trial.engine, work.step) / 2
        look = typical.seconds(trial.engine, work.evaluation(trials.LOOK_SAMPLES)) / 2
        timings.append(Timing(0.25, step, step + look))
    return timings


def test_no_network_of_the_calibration_set_is_one_of_the_zoo_that_papers_use():
    for trial in trials.calibration():
        shapes = [tuple(p.shape) for p in trial.build().parameters()]
        for model in (models.Lenet_300_100(), models.Conv_2(), models.Resnet_20()):
            theirs = model.build(trial.input_shape, 10) if trial.input_shape[1] > 8 else None
            assert theirs is None or shapes != [tuple(p.shape) for p in theirs.parameters()]


# -- once per machine ------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """How often the machine was measured; made-up timings are returned."""
    calls = []

    def run(num_processes):
        calls.append(num_processes)
        return 2.0, []

    monkeypatch.setattr(trials, "run", run)
    monkeypatch.setattr(pace, "fitted", lambda process, *_: replace(FLAT, process=process))
    return calls


def test_a_pace_is_measured_once_and_said_on_standard_error(measured, capsys):
    assert pace.known() is None
    found = pace.measure()
    out, err = capsys.readouterr()
    assert out == ""
    assert "measuring this machine once" in err
    assert pace.known() == found
    assert len(measured) == 1


@pytest.mark.parametrize(
    "damaged",
    [b"", b"{", b"[]", b'{"pace": {"process": 1}}', b'{"pace": 3}', None],
)
def test_a_damaged_file_counts_as_none(damaged, measured, tmp_path):
    found = pace.measure()
    (path,) = (tmp_path / "cache" / "pace").iterdir()
    if damaged is None:  # a number that cannot be
        document = json.loads(path.read_bytes())
        document["pace"]["work"]["sparse"]["step"] = -1
        damaged = json.dumps(document).encode()
    path.write_bytes(damaged)
    assert pace.known() is None
    assert pace.measure() == found
    assert pace.known() == found


def test_another_machine_has_another_pace(measured, monkeypatch):
    pace.measure()
    monkeypatch.setattr(pace, "processor", lambda: "another")
    assert pace.known() is None


def test_a_folder_that_cannot_be_written_is_no_error(measured, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WINDFALL_CACHE", str(tmp_path / "file"))
    assert pace.measure() == replace(FLAT, process=2.0)
    assert pace.known() is None


@pytest.mark.slow
def test_trials_are_timed(monkeypatch):
    monkeypatch.setattr(trials, "DATA_BYTES", 1 << 14)
    chosen = [t for t in trials.calibration() if t.input_shape == trials.DIGITS]
    assert {trial.engine for trial in chosen} == {"separate", "sparse"}
    data = trials.images(trials.DIGITS)
    for trial in chosen:
        timing = trials.measure(trial, data, seconds=0.0)
        assert timing.start >= 0
        assert timing.step > 0
        assert timing.looked > 0


# -- what a study costs ----------------------------------------------------------------------------


def known(monkeypatch, found: Pace = FLAT) -> None:
    monkeypatch.setattr(pace, "known", lambda: found)


def test_a_row_names_its_engine(tmp_path):
    document = verbs.plan(small.study(), lab=tmp_path / "none", workers=1)
    assert {row["engine"] for row in document["rows"]} == {"sparse"}
    assert document["engine_reason"] is None
    document = verbs.plan(small.study(engine="separate"), lab=tmp_path / "none", workers=1)
    assert {row["engine"] for row in document["rows"]} == {"separate"}


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 10))


def test_a_plan_says_why_the_sparse_engine_cannot(tmp_path, capsys):
    plan = verbs.plan(small.study(model=with_dropout), lab=tmp_path / "none", workers=1)
    assert {row["engine"] for row in plan["rows"]} == {"separate"}
    assert "`2` (Dropout)" in plan["engine_reason"]
    display.show(display.plan(plan))
    assert "Dropout" in " ".join(capsys.readouterr().out.split())


def test_a_pace_that_is_known_tells_a_plans_seconds(tmp_path, monkeypatch):
    known(monkeypatch)
    graph_ = small.graph()
    document = verbs.plan(graph_.study, lab=tmp_path / "none", workers=1)
    assert document["estimate_from"] == "this machine's pace"
    steps = sum(last - first for first, last in (run.clock for run in graph_.runs.values()))
    assert document["total_seconds_estimate"] == pytest.approx(steps)  # 1 s each, on sparse
    assert document["seconds_estimate"] == pytest.approx(steps)
    assert sum(row["seconds_estimate"] for row in document["rows"]) == pytest.approx(steps)


def test_a_short_study_is_told_by_typical_figures_a_long_one_has_the_machine_measured(
    tmp_path, measured
):
    short = verbs.plan(small.study(), lab=tmp_path / "none", workers=1)
    assert short["estimate_from"] == "typical figures"
    assert measured == []
    long = small.study(recipe={"steps": 100_000})
    assert verbs.plan(long, lab=tmp_path / "none")["estimate_from"] == "this machine's pace"
    assert len(measured) == 1
    verbs.plan(long, lab=tmp_path / "none")
    assert len(measured) == 1


def stored(tmp_path, **changes):
    """A lab with made-up records of all runs: 1.5 s each, on the separate engine."""
    of = expand(filled.study(engine="separate", **changes))
    lab = Lab(tmp_path / "lab")
    filled.fill(lab, of, filled.noisy)
    return of, lab


def test_a_plan_of_what_is_stored_measures_nothing(tmp_path):
    long = {"steps": 10**6, "eval_every": 10**5}
    of, lab = stored(tmp_path, recipe=long, arms=("ticket", "reinit"))
    document = verbs.plan(of.study, lab=lab.folder)
    assert document["runs"]["missing"] == 0
    assert document["seconds_estimate"] == document["total_seconds_estimate"] == 0
    more = verbs.plan(filled.study(**vars(of.study) | {"num_seeds": 4}), lab=lab.folder, workers=1)
    assert more["estimate_from"] == "stored runs"
    assert more["total_seconds_estimate"] == pytest.approx(1.5 * more["runs"]["missing"])


def test_stored_runs_of_other_levels_set_the_pace_right(tmp_path, monkeypatch):
    known(monkeypatch)
    of, lab = stored(tmp_path)
    other = filled.study(engine="separate", levels=3)
    found = costs.costs(expand(other), lab, "cpu")
    deeper = [a for a in found.missing if found.graph.runs[a].start.level == 3]
    seconds, source = found.seconds(deeper[0])
    assert source == "this machine's pace"
    steps = found.steps(deeper[0])
    whole = next(address for address in of.runs if of.runs[address].parent is None)
    assert seconds == pytest.approx(1.5 * steps / found.steps(whole), rel=0.3)


def test_workers_share_what_can_be_done_at_once():
    of = small.graph(arms=["dense", "ticket"], num_seeds=2, levels=2)
    seconds = dict.fromkeys(of.runs, 1.0)
    assert [costs.wall_seconds(of, seconds, n) for n in (1, 2, 8)] == [6.0, 3.0, 3.0]
    chain = small.graph(arms=["dense", "ticket"], num_seeds=1, levels=2)
    assert costs.wall_seconds(chain, dict.fromkeys(chain.runs, 1.0), 2) == 3.0
    assert costs.wall_seconds(chain, {}, 2) == 0.0


@pytest.mark.parametrize(
    ("every", "clock", "number"),
    [(20, (0, 60), 4), (20, (0, 50), 4), (20, (15, 60), 4), (20, (20, 60), 3), (100, (0, 60), 2)],
)
def test_evaluations_are_counted(every, clock, number):
    assert costs.num_evaluations(Recipe(eval_every=every, steps=60), clock) == number


# -- estimate beside measured ----------------------------------------------------------------------


def test_a_short_study_has_no_forecast(tmp_path):
    assert costs.forecast(small.graph(), Lab(tmp_path / "lab"), 2, "cpu") is None


@pytest.mark.slow
def test_a_study_keeps_what_was_estimated_beside_what_was_measured(tmp_path, monkeypatch):
    known(monkeypatch)
    monkeypatch.setattr(costs, "WORTH_SECONDS", 0.0)
    lab = tmp_path / "lab"
    chosen = small.study({"steps": 4, "eval_every": 2}, num_seeds=1, levels=1, arms=["ticket"])
    result = verbs.run(chosen, lab=lab, workers=1, watch=lambda _: None)
    told = result.to_json()["estimate"]
    assert told["runs"] == 2
    assert told["total_seconds"] == 2 * 4
    assert told["from"] == "this machine's pace"
    records = Lab(lab).records(result.document["records"][i]["address"] for i in range(2))
    assert told["measured_total_seconds"] == sum(r.seconds for r in records.values())
    assert told["measured_seconds"] > 0
    assert verbs.show(chosen, lab=lab).to_json()["estimate"] == told
    again = verbs.run(chosen, lab=lab, workers=1, watch=lambda _: None)
    assert again.to_json()["estimate"] == told
    sentence = words.estimate(told)
    assert sentence in " ".join(result.report.read_text().split()).replace("&#39;", "'")


def test_a_study_cut_short_keeps_its_estimate_alone(tmp_path):
    of = expand(filled.study())
    told = {"runs": 3, "total_seconds": 9.0, "seconds": 5.0, "from": "stored runs",
            "measured_total_seconds": None, "measured_seconds": None}  # fmt: skip
    assert costs.measured(told, [], 4.0) == told
    lab = Lab(tmp_path / "lab")
    filled.fill(lab, of, filled.noisy)
    document = tables.summary({**tables.outline(of), "estimate": told}, lab)
    assert words.estimate(document["estimate"]) == (
        "Training 3 runs: all estimated 5 s; the runs' own times estimated 9 s (from stored runs)."
    )


def test_estimate_and_measured_stand_side_by_side():
    told = {"runs": 1200, "total_seconds": 100.0, "seconds": 50.0, "from": "this machine's pace",
            "measured_total_seconds": 110.0, "measured_seconds": 60.0}  # fmt: skip
    assert words.estimate(told) == (
        "Training 1,200 runs: all estimated 50 s, measured 1 min 00 s (1.20); the runs' own times"
        " estimated 1 min 40 s, measured 1 min 50 s (1.10) (from this machine's pace)."
    )
    assert words.estimate(None) is None
