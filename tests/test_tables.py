"""What a study found, against values that were put into the lab by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch

from windfall import masks as masking
from windfall import seeds, stats, tables
from windfall.findings import Table
from windfall.graph import Graph, expand
from windfall.store import Lab, Record, now
from windfall.study import Study
from windfall.train import Evaluation, State

ARMS = ("ticket", "reinit", "shuffled", "random", "finetune")


def study(**settings) -> Study:
    base = {
        "model": {"kind": "mlp", "hidden": [6]},
        "data": "digits",
        "arms": ARMS,
        "num_seeds": 3,
        "levels": 2,
        "verdict_level": 2,
        "recipe": {"steps": 40, "eval_every": 20},
    }
    return Study.model_validate(base | settings)


def looks(run, accuracy: float, best: int = 1) -> list[Evaluation]:
    """Three evaluations whose validation loss is least at the one numbered `best`."""
    first, last = run.clock
    steps = (first, (first + last) // 2, last)
    return [
        Evaluation(step, None, 1.0 + (i != best), 0.5, 1.0, accuracy - 0.01 * (2 - i))
        for i, step in enumerate(steps)
    ]


def fill(lab: Lab, graph: Graph, accuracy, *, status="done", best=1, skip=()) -> None:
    """Keep a made-up record of every node; `accuracy(node)` is its test accuracy at the end."""
    for node in graph.nodes:
        if node.address in skip or lab.record(node.address):
            continue
        run = graph.runs[node.address]
        seen = looks(run, accuracy(node), best)
        state = State(run.clock[1], {}, {}, made_up_masks(graph, node), evaluations=seen)
        record = Record(
            node.address,
            run.to_json(),
            status(node) if callable(status) else status,
            seen,
            [],
            graph.counts[node.level],
            1.5,
            "separate/cpu",
            {"windfall": "1", "torch": "2", "numpy": "3"},
            now(),
            budget={"steps": run.clock[1] - run.clock[0], "multiply_adds": 7 + node.level},
            distance=2.0 + node.seed,
        )
        lab.finish(record, state)


def made_up_masks(graph: Graph, node) -> dict:
    if node.level == 0 or graph.study.prune.is_structured:
        return {}
    shapes = {"hidden1.weight": (6, 64), "output.weight": (10, 6)}
    full = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    counts = graph.study.prune.selection.counts(
        graph.network.sizes, graph.network.kinds, node.level
    )
    return masking.scatter(counts, full, node.seed, node.arm)


def noisy(node) -> float:
    base = {"dense": 0.9, "ticket": 0.9, "finetune": 0.85, "reinit": 0.7}.get(node.arm, 0.6)
    return base + 0.01 * float(seeds.stream(node.seed, node.arm, node.level).normal())


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path / "lab")


def summed(graph: Graph, lab: Lab) -> dict:
    document = tables.summary(json.loads(json.dumps(tables.outline(graph))), lab)
    json.dumps(document, allow_nan=False)
    return document


def row(document: dict, table: str, **where) -> dict:
    found = [r for r in document[table] if all(r[k] == v for k, v in where.items())]
    assert len(found) == 1, (where, len(found))
    return found[0]


def test_every_mean_and_interval_is_that_of_the_runs_it_names(lab):
    graph = expand(study())
    fill(lab, graph, noisy)
    document = summed(graph, lab)
    for found in document["arms"]:
        values = [run["value"] for run in found["runs"]]
        assert found["mean"] == pytest.approx(math.fsum(values) / 3, abs=1e-15)
        assert found["interval"] == list(stats.mean_interval(values))
        for run in found["runs"]:
            evaluations = lab.record(run["address"]).evaluations
            first = graph.runs[run["address"]].clock[0]
            expected = {
                "test_accuracy": evaluations[-1].test_accuracy,
                "test_accuracy_at_early_stop": evaluations[1].test_accuracy,
                "early_stop_step": evaluations[1].step - first,
                "distance": 2.0 + run["seed"],
            }
            assert run["value"] == expected[found["metric"]]


@pytest.mark.parametrize("status", ["done", "diverged"])
def test_a_study_of_supermasks_is_about_the_accuracy_before_any_training(lab, status):
    graph = expand(study(metric="test_accuracy_at_start"))
    fill(lab, graph, noisy, status=status)
    document = summed(graph, lab)
    rows = [r for r in document["arms"] if r["metric"] == "test_accuracy_at_start"]
    assert {(r["arm"], r["level"]) for r in rows} == {(n.arm, n.level) for n in graph.nodes}
    for run in (run for row in rows for run in row["runs"]):
        first = lab.record(run["address"]).evaluations[0]
        assert run["value"] == first.test_accuracy
        assert first.step == graph.runs[run["address"]].clock[0]
    assert {r["metric"] for r in document["verdicts"]} == {"test_accuracy_at_start"}
    assert {"test_accuracy", "early_stop_step"} <= {r["metric"] for r in document["arms"]}


def test_other_studies_tell_no_accuracy_at_the_start(lab):
    graph = expand(study())
    fill(lab, graph, noisy)
    document = summed(graph, lab)
    assert "test_accuracy_at_start" not in {row["metric"] for row in document["arms"]}


def test_every_row_tells_the_budget_that_its_runs_were_granted(lab):
    graph = expand(study())
    fill(lab, graph, noisy)
    rows = summed(graph, lab)["arms"]
    for found in rows:
        first, last = graph.runs[found["runs"][0]["address"]].clock
        assert (found["steps"], found["multiply_adds"]) == (last - first, 7 + found["level"])
        batch_size = graph.study.recipe.batch_size
        assert found["flops"] == 2 * 3 * (7 + found["level"]) * batch_size * (last - first)


def test_until_they_are_trained_the_budget_is_the_planned_one(lab):
    graph = expand(study())
    rows = summed(graph, lab)["arms"]
    for found in rows:
        assert found["flops"] == pytest.approx(graph.flops(found["runs"][0]["address"]))


def test_a_comparison_tells_how_the_costs_compare(lab):
    graph = expand(study())
    fill(lab, graph, noisy)
    document = summed(graph, lab)
    cost = {(r["arm"], r["level"]): r["flops"] for r in document["arms"]}
    for row in [*document["verdicts"], *document["comparisons"]]:
        at = 0 if row["against"] == "dense" else row["level"]
        ratio = cost[row["arm"], row["level"]] / cost[row["against"], at]
        assert row["budget_ratio"] == pytest.approx(ratio)


def test_of_two_effects_that_compare_the_same_runs_there_is_one_row(lab):
    graph = expand(study(arms=("dense", "ticket", "reinit", "scratch-e", "finetune")))
    fill(lab, graph, noisy)
    names = [row["effect"] for row in summed(graph, lab)["verdicts"]]
    assert names == ["matching", "weights", "initialization"]
    graph = expand(study(arms=("dense", "ticket", "scratch-e", "finetune")))
    rows = summed(graph, lab)["verdicts"]
    assert [(row["effect"], row["against"]) for row in rows] == [
        ("matching", "dense"),
        ("weights-e", "scratch-e"),
        ("initialization", "scratch-e"),
    ]


def test_verdicts_are_paired_by_seed_and_decided_as_one_family(lab):
    graph = expand(study())
    fill(lab, graph, noisy)
    document = summed(graph, lab)
    by_place = {(n.arm, n.level, n.seed): noisy(n) for n in graph.nodes}
    names = [v["effect"] for v in document["verdicts"]]
    assert names == [
        "matching", "weights", "initialization", "connectivity", "allocation", "architecture",
    ]  # fmt: skip
    claims = [
        stats.Claim(
            [
                by_place[v["arm"], 2, s]
                - by_place[v["against"], 0 if v["against"] == "dense" else 2, s]
                for s in range(3)
            ],
            "non-inferior" if v["effect"] == "matching" else "superior",
        )
        for v in document["verdicts"]
    ]
    for found, expected in zip(document["verdicts"], stats.decide(claims, 0.005), strict=True):
        assert found["difference"] == pytest.approx(expected.difference)
        assert found["interval"] == pytest.approx(list(expected.interval))
        assert found["p_adjusted"] == pytest.approx(expected.p_adjusted)
        assert found["verdict"] == expected.word
        assert (found["level"], found["metric"], found["num_seeds"]) == (2, "test_accuracy", 3)


def test_other_levels_and_metrics_are_compared_without_a_verdict(lab):
    graph = expand(study())
    fill(lab, graph, noisy)
    document = summed(graph, lab)
    places = {(c["effect"], c["level"], c["metric"]) for c in document["comparisons"]}
    primary = {(v["effect"], 2, "test_accuracy") for v in document["verdicts"]}
    assert len(places) == len(document["comparisons"]) == 6 * 2 * 3 - 6
    assert not places & primary
    assert all("verdict" not in c for c in document["comparisons"])


def test_a_missing_run_makes_its_rows_null_and_their_verdicts_undecided(lab):
    graph = expand(study())
    (lost,) = [n.address for n in graph.nodes if (n.arm, n.level, n.seed) == ("reinit", 2, 1)]
    fill(lab, graph, noisy, skip={lost})
    lab.fail(lost, "killed")
    document = summed(graph, lab)
    found = row(document, "arms", arm="reinit", level=2, metric="test_accuracy")
    assert found["mean"] is None
    assert found["interval"] is None
    assert [r["value"] is None for r in found["runs"]] == [False, True, False]
    for verdict in document["verdicts"]:
        if "reinit" in (verdict["arm"], verdict["against"]):
            assert verdict["verdict"] == "undecided"
            assert verdict["difference"] is None
            assert verdict["p_value"] is None
    assert [f["address"] for f in document["failures"]] == [lost]
    assert row(document, "failures", arm="reinit")["reason"] == "killed"


def test_a_diverged_run_counts_with_the_accuracy_of_chance_and_never_stops(lab):
    graph = expand(study())
    is_bad = {n.address for n in graph.nodes if (n.arm, n.level, n.seed) == ("reinit", 2, 0)}
    status = lambda node: "diverged" if node.address in is_bad else "done"  # noqa: E731
    fill(lab, graph, noisy, status=status)
    document = summed(graph, lab)
    found = row(document, "arms", arm="reinit", level=2, metric="test_accuracy")
    assert found["num_diverged"] == 1
    assert found["runs"][0]["value"] == 1 / 10
    assert row(document, "verdicts", effect="initialization")["num_diverged"] == 1
    never = row(document, "arms", arm="reinit", level=2, metric="early_stop_step")
    assert never["runs"][0]["value"] == 40
    assert never["num_censored"] == 1
    assert any("1 runs diverged" in note for note in document["notes"])


def test_an_early_stop_at_the_last_evaluation_is_censored_and_said_so(lab):
    graph = expand(study(arms=["ticket"]))
    fill(lab, graph, noisy, best=2)
    document = summed(graph, lab)
    found = row(document, "arms", arm="ticket", level=1, metric="early_stop_step")
    assert found["num_censored"] == 3
    assert found["mean"] == 40
    assert any("censored" in note for note in document["notes"])


def test_steps_count_from_the_start_of_a_run(lab):
    graph = expand(study())
    fill(lab, graph, noisy)
    found = row(summed(graph, lab), "arms", arm="finetune", level=1, metric="early_stop_step")
    assert found["mean"] == 5  # half of a quarter of 40


def test_fewer_steps_are_better_when_a_verdict_is_about_them(lab):
    graph = expand(study(metric="early_stop_step", arms=["ticket", "reinit"]))
    for node in graph.nodes:
        run = graph.runs[node.address]
        best = 0 if node.arm == "ticket" else 1
        seen = looks(run, 0.9, best)
        state = State(40, {}, {}, made_up_masks(graph, node), evaluations=seen)
        parts = (seen, [], 1, 1.0, "e", {}, now())
        lab.finish(Record(node.address, run.to_json(), "done", *parts), state)
    document = summed(graph, lab)
    found = row(document, "verdicts", effect="initialization")
    assert found["difference"] == -20
    assert found["verdict"] == "supported"
    assert row(document, "verdicts", effect="matching")["verdict"] == "supported"


def test_the_overlap_of_masks_is_that_of_the_runs_it_names(lab):
    arms = ["ticket", "other-order", "other-init"]
    graph = expand(study(metric="mask_overlap", arms=arms))
    fill(lab, graph, noisy)
    document = summed(graph, lab)
    assert {r["arm"] for r in document["arms"]} == {"other-order", "other-init", "chance"}
    place = {(n.arm, n.level, n.seed): n.address for n in graph.nodes}
    for found in document["arms"]:
        layer = found["metric"].partition("/")[2]
        for run in found["runs"]:
            tickets = lab.masks(place["ticket", found["level"], run["seed"]])
            names = [layer] if layer else list(tickets)
            if found["arm"] == "chance":
                counts = [int(tickets[name].sum()) for name in names]
                sizes = [tickets[name].numel() for name in names]
                expected = masking.chance_overlap(sizes, counts, counts)
            else:
                other = lab.masks(run["address"])
                both = sum(int((tickets[n] & other[n]).sum()) for n in names)
                either = sum(int((tickets[n] | other[n]).sum()) for n in names)
                expected = both / either
            assert run["value"] == pytest.approx(expected, abs=1e-12)
    assert [v["effect"] for v in document["verdicts"]] == ["same-init", "above-chance"]


def test_the_winner_is_the_best_by_validation_accuracy_at_the_level_of_the_verdicts(lab):
    graph = expand(study())
    fill(lab, graph, noisy)
    document = summed(graph, lab)
    assert document["winner_record"]["level"] == 2
    assert document["winner"] in {n.address for n in graph.nodes if n.level == 2}


def test_numbers_of_different_versions_are_said_to_be_mixed(lab):
    graph = expand(study(arms=["ticket"]))
    fill(lab, graph, noisy)
    record = lab.record(graph.nodes[0].address)
    other = Record(**{**vars(record), "versions": {**record.versions, "torch": "9.9"}})
    lab.finish(other, State(40, {}, {}, evaluations=other.evaluations))
    assert any("9.9" in note for note in summed(graph, lab)["notes"])


def test_a_table_converts_to_pandas(lab):
    graph = expand(study())
    fill(lab, graph, noisy)
    frame = Table(summed(graph, lab)["verdicts"]).to_pandas()
    assert list(frame["effect"])[:2] == ["matching", "weights"]


def test_pictures_and_layers_are_those_of_the_first_seeds_masks(lab):
    graph = expand(study())
    state_masks = made_up_masks(graph, next(n for n in graph.nodes if n.arm == "ticket"))
    assert set(state_masks) == {"hidden1.weight", "output.weight"}
    fill(lab, graph, noisy)
    document = summed(graph, lab)
    assert {(r["level"], r["layer"]) for r in document["layers"]} == {
        (level, name) for level in (1, 2) for name in state_masks
    }
    assert all(r["total"] == graph.network.sizes[r["layer"]] for r in document["layers"])


def change(lab: Lab, node, **changes) -> None:
    """Keep a run's record with some of its facts changed."""
    record, state = lab.record(node.address), lab.weights(node.address)
    record = replace(record, **changes)
    state.evaluations, state.diverged = record.evaluations, record.status == "diverged"
    lab.finish(record, state)


def channel_study(**changes):
    channels = {"criterion": "filter-norm", "structure": "channels", "selection": "global"}
    rewind = {"kind": "rewind", "to": {"kind": "to-step", "step": 20}}
    return study(prune=channels, arms=["ticket", rewind], **changes)


def test_where_only_training_tells_what_stays_each_arm_has_its_own_density(lab):
    graph = expand(channel_study(levels=1, verdict_level=1))
    kept = {"ticket": 100, "rewind": 60, "dense": -1}
    fill(lab, graph, noisy)
    for node in graph.nodes:
        change(lab, node, kept=kept[node.arm] + 2 * node.seed * (node.level > 0))
    document, whole = summed(graph, lab), sum(graph.network.sizes.values())
    for found in document["arms"]:
        expected = 1.0 if found["level"] == 0 else (kept[found["arm"]] + 2) / whole
        assert found["density"] == pytest.approx(expected)
    won = document["winner_record"]
    assert won["density"] == (kept[won["arm"]] + 2 * won["seed"]) / whole


def test_a_diverged_run_never_stops_in_the_steps_that_it_was_granted(lab):
    graph = expand(study())
    fill(lab, graph, noisy, status=lambda node: "diverged" if node.arm == "reinit" else "done")
    for node in graph.nodes:
        change(lab, node, budget={"steps": 77, "multiply_adds": 5})
    rows = summed(graph, lab)["arms"]
    found = [r for r in rows if (r["arm"], r["metric"]) == ("reinit", "early_stop_step")]
    assert {run["value"] for each in found for run in each["runs"]} == {77.0}


def test_curves_are_of_the_steps_that_all_seeds_were_looked_at(lab):
    graph = expand(study())
    fill(lab, graph, noisy)
    ends = {}
    for node in graph.nodes:
        *others, last = lab.record(node.address).evaluations
        last = replace(last, step=last.step + 5 * node.seed)
        ends.setdefault((node.arm, node.level), []).append(last.step)
        change(lab, node, evaluations=[*others, last])
    for curve in summed(graph, lab)["curves"]:
        assert not set(curve["steps"]) & set(ends[curve["arm"], curve["level"]][1:])
        assert len(curve["steps"]) == len(curve["test_accuracy"]["mean"]) >= 2


def test_what_was_planned_alone_is_not_compared(lab):
    graph = expand(study())
    rows = summed(graph, lab)["verdicts"]
    assert {row["budget_ratio"] for row in rows} == {None}
