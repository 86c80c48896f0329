"""Suites: cases that share a question, their settings, runs, tables and pages."""

import json

import pytest
from typer.testing import CliRunner

from windfall import cli, overview, settings, verbs, words
from windfall.graph import expand
from windfall.spec import SpecError
from windfall.suite import Suite

TOML = """
name = "two-rates"
title = "Two rates"
question = "Does the rate matter?"
num_seeds = 2
model = { kind = "mlp", hidden = [12, 8] }
data = "digits"
arms = ["dense", "ticket", "scratch-e", "scratch-b", "finetune"]
levels = 1
[recipe]
optimizer = { kind = "sgd", momentum = 0.9 }
learning_rate = 0.1
steps = 20
batch_size = 16
eval_every = 10
[axes.method.l1-norm.prune]
criterion = "filter-norm"
structure = "channels"
selection = { kind = "layerwise", hidden = 0.5 }
[axes.method.magnitude.prune]
selection = { kind = "global", rate = 0.5 }
[axes.rate.standard]
[axes.rate.small]
recipe.learning_rate = 0.01
"""
CASES = ["l1-norm-standard", "l1-norm-small", "magnitude-standard", "magnitude-small"]


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "two-rates.toml"
    path.write_text(TOML)
    return path


def load(path, changes=None) -> Suite:
    found = settings.load(path, changes)
    assert isinstance(found, Suite)
    return found


def test_a_suite_is_the_product_of_its_axes_in_their_order(toml):
    suite = load(toml)
    assert list(suite.cases) == CASES
    assert (suite.name, suite.title) == ("two-rates", "Two rates")
    rates = [study.recipe.learning_rate for study in suite.cases.values()]
    assert rates == [0.1, 0.01, 0.1, 0.01]
    assert [study.prune.is_structured for study in suite.cases.values()] == [True] * 2 + [False] * 2
    assert [study.name for study in suite.cases.values()] == [f"two-rates-{c}" for c in CASES]


def test_a_setting_changes_every_case_and_one_below_axes_changes_one(toml):
    suite = load(toml, {"num_seeds": 3, "model.hidden": [10, 7], "axes.method": "magnitude"})
    assert list(suite.cases) == CASES[2:]
    assert {s.num_seeds for s in suite.cases.values()} == {3}
    assert {s.model.hidden for s in suite.cases.values()} == {(10, 7)}
    suite = load(toml, {"axes.rate.small.recipe.learning_rate": 0.02, "axes.method": ["l1-norm"]})
    assert [s.recipe.learning_rate for s in suite.cases.values()] == [0.1, 0.02]
    assert load(toml, {"name": "other"}).cases[CASES[0]].name == f"other-{CASES[0]}"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"axes.methods": "magnitude"}, r"`axes` must have an axis `methods`.*Known: method, rate"),
        (
            {"axes.method": "magnitud"},
            r"`axes.method` must name its cases; got 'magnitud'.*Did you",
        ),
        ({"axes.rate.small": 3}, r"`axes.rate.small` must be changed field by field"),
        ({"axes": "small"}, r"`axes` must be set by axis, such as `axes.method`"),
        ({"axes.rate": [True]}, r"`axes.rate` must name its cases; got True"),
        ({"axes.rate.smal.levels": 2}, r"`axes.rate` must name its cases; got 'smal'"),
        ({"axes.rates.small.levels": 2}, r"`axes` must have an axis `rates`"),
        (
            {"recipe.learning_rate": 0.3},
            r"Case l1-norm-small: `recipe.learning_rate` must be set by",
        ),
        ({"prune.selection.rate": 0.3}, r"Case l1-norm-standard: `prune.selection.rate` must be"),
        (
            {"axes.rate.small.recipe.learning_rate": 0.1},
            r"`axes` must make its cases differ; l1-no",
        ),
        ({"axes.rate": 3}, r"`axes.rate` must name its cases; got 3"),
        ({"axes.rate.small.recipe.steps": 0}, r"Case l1-norm-small: `recipe.steps` must"),
    ],
)
def test_what_a_suite_cannot_be_is_told_by_name(toml, changes, told):
    with pytest.raises(SpecError, match=told):
        settings.load(toml, changes)


def test_a_case_that_cannot_be_expanded_is_named_and_nothing_is_started(toml, tmp_path):
    changes = {"axes.method.l1-norm.prune.selection.hidden": 0.99}
    with pytest.raises(SpecError, match=r"^Case l1-norm-standard: `prune` must leave every layer"):
        verbs.run(toml, changes, lab=tmp_path / "lab")
    assert not (tmp_path / "lab").exists()


def test_a_study_without_axes_has_none_to_narrow():
    with pytest.raises(SpecError, match=r"`axes` must be a suite's tables.*got axes\.method"):
        settings.load("lottery", {"axes.method": "magnitude"})


def test_a_file_that_extends_a_suite_names_the_cases_it_takes(toml):
    other = toml.with_name("other.toml")
    other.write_text('extends = "two-rates.toml"\n[axes]\nmethod = ["magnitude"]\n')
    assert list(load(other).cases) == CASES[2:]
    other.write_text('extends = "two-rates.toml"\n[axes]\nmethod = ["magnitud"]\n')
    with pytest.raises(SpecError, match=r"`axes.method` must name its cases"):
        load(other)


def test_a_setting_that_holds_what_a_case_changes_a_part_of_goes_before_it(toml):
    changes = {"axes.rate.small.model.hidden": [9, 9], "model": "lenet-300-100"}
    with pytest.raises(SpecError, match=r"Case l1-norm-small: `model` has no field `hidden`"):
        load(toml, changes)
    suite = load(toml, changes | {"model": {"kind": "mlp", "hidden": [5, 5]}})
    assert [s.model.hidden for s in suite.cases.values()] == [(5, 5), (9, 9)] * 2


def test_a_case_is_named_by_letters_and_digits(tmp_path):
    path = tmp_path / "named.toml"
    path.write_text('model = "conv-2"\ndata = "digits"\n[axes.a."x y"]\n')
    with pytest.raises(SpecError, match=r"`axes` must name cases by letters.*got 'x y'"):
        settings.load(path)


def test_two_cases_of_one_name_are_refused(tmp_path):
    path = tmp_path / "twice.toml"
    tables = '[axes.a.x-y]\n[axes.a.x]\n[axes.b."y-z"]\n[axes.b.z]\n'
    path.write_text(f'model = "conv-2"\ndata = "digits"\n{tables}')
    with pytest.raises(SpecError, match=r"`axes` must give every case its own name; got x-y-z"):
        settings.load(path)


def test_cases_share_the_runs_that_they_have_in_common(toml):
    graphs = {case: expand(study) for case, study in load(toml).cases.items()}
    dense = {c: {n.address for n in g.nodes if n.arm == "dense"} for c, g in graphs.items()}
    assert dense["l1-norm-standard"] == dense["magnitude-standard"]
    assert dense["l1-norm-standard"].isdisjoint(dense["l1-norm-small"])
    plan = verbs.plan(toml)
    union = set().union(*(graph.runs for graph in graphs.values()))
    assert plan["runs"] == {"total": len(union), "stored": 0, "missing": len(union)}
    assert plan["flops"] == pytest.approx(
        sum({a: g.flops(a) for g in graphs.values() for a in g.runs}.values())
    )
    assert list(plan["cases"]) == CASES


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    toml = folder / "two-rates.toml"
    toml.write_text(TOML)
    told = CliRunner().invoke(
        cli.app, ["run", str(toml), "--lab", str(folder / "lab"), "--json", "--workers", "1"]
    )
    assert told.exit_code == 0, told.output
    return folder, json.loads(told.stdout)


@pytest.mark.slow
def test_a_suite_trains_each_run_once_and_tells_every_row_its_case(found):
    _, document = found
    runs = document["runs"]
    assert runs["total"] == runs["trained"] == 4 * 8 + 4 and runs["reused"] == runs["failed"] == 0
    for name in ("arms", "verdicts", "comparisons"):
        assert list(dict.fromkeys(row["case"] for row in document[name])) == CASES
    effects = {row["effect"] for row in document["verdicts"]}
    assert effects == {
        *("matching", "weights-e", "weights-b", "scratch", "initialization"),
    }
    assert document["winner"] in {run["address"] for r in document["arms"] for run in r["runs"]}


@pytest.mark.slow
def test_each_case_is_decided_as_it_is_alone(found):
    folder, document = found
    suite = load(folder / "two-rates.toml")
    for case, study in suite.cases.items():
        alone = verbs.show(study, lab=folder / "lab")
        rows = [row for row in document["verdicts"] if row["case"] == case]
        told = [{k: v for k, v in r.items() if k not in ("case", "margin")} for r in rows]
        assert told == list(alone.verdicts)


@pytest.mark.slow
def test_scratch_b_is_granted_what_the_dense_network_costs(found):
    _, document = found
    for row in (r for r in document["arms"] if r["arm"] == "scratch-b"):
        dense = next(
            r
            for r in document["arms"]
            if (r["case"], r["arm"], r["metric"]) == (row["case"], "dense", row["metric"])
        )
        step = row["flops"] / row["steps"]
        assert dense["flops"] - step < row["flops"] <= dense["flops"]
        assert row["steps"] > dense["steps"]


@pytest.mark.slow
def test_a_suite_again_trains_nothing_and_a_part_of_it_can_be_shown(found):
    folder, document = found
    again = verbs.run(folder / "two-rates.toml", lab=folder / "lab", watch=lambda _: None)
    assert (again.runs["trained"], again.runs["reused"]) == (0, document["runs"]["total"])
    assert again.verdicts == document["verdicts"]
    part = verbs.show(folder / "two-rates.toml", {"axes.rate": "small"}, lab=folder / "lab")
    assert {row["case"] for row in part.verdicts} == {CASES[1], CASES[3]}
    with pytest.raises(SpecError, match="STUDY must have been run in the lab"):
        verbs.show(folder / "two-rates.toml", {"num_seeds": 3}, lab=folder / "lab")


@pytest.mark.slow
def test_a_suites_page_leads_to_its_cases_pages(found):
    folder, document = found
    html = (folder / "lab" / "two-rates.html").read_text()
    assert document["report"] == str(folder / "lab" / "two-rates.html")
    for case in CASES:
        assert f'href="two-rates-{case}.html"' in html
        assert (folder / "lab" / f"two-rates-{case}.html").exists()
    assert html.count('class="badge"') == len(document["verdicts"])
    output = folder / "told.html"
    verbs.report(folder / "two-rates.toml", output, lab=folder / "lab")
    assert (folder / f"told-{CASES[0]}.html").exists()
    assert f'href="told-{CASES[0]}.html"' in output.read_text()


@pytest.mark.slow
def test_a_suite_is_shown_with_its_tables(found):
    folder, _ = found
    told = CliRunner().invoke(
        cli.app, ["show", str(folder / "two-rates.toml"), "--lab", str(folder / "lab")]
    )
    assert told.exit_code == 0
    assert told.stdout.count("Budgets: what was granted") == 4
    plan = CliRunner().invoke(
        cli.app, ["plan", str(folder / "two-rates.toml"), "--lab", str(folder / "lab")]
    )
    assert "0 runs to train" in plan.stdout


def row(case, verdict, effect="weights"):
    return {"case": case, "verdict": verdict, "effect": effect, "arm": "a", "against": "b"}


def test_the_answer_of_a_suite_names_the_cases_of_each_word():
    rows = [row("x", "supported"), row("y", "refuted"), row("z", "supported")]
    assert words.across(rows, 3) == ["weights (a - b): supported in x and z; refuted in y."]
    assert words.across(rows, 4) == [
        "weights (a - b, of 3 that have both): supported in x and z; refuted in y."
    ]
    alike = [row("x", "undecided"), row("y", "undecided")]
    assert words.across(alike, 2) == ["weights (a - b): undecided in all cases."]
    assert words.across([], 2) == [
        "No case has both arms of a comparison: there is nothing to decide."
    ]


def test_the_answer_keeps_apart_what_an_effect_is_measured_against():
    rows = [row("x", "supported"), row("y", "refuted") | {"against": "c"}]
    assert words.across(rows, 2) == [
        "weights (a - b, of 1 that have both): supported in x.",
        "weights (a - c, of 1 that have both): refuted in y.",
    ]


def test_the_headline_counts_the_cases_of_the_main_effect():
    rows = [row("x", "supported"), row("x", "refuted", "weights-b")]
    rows += [row(case, "undecided", "weights-b") for case in "yz"]
    assert words.across(rows, 3)[0] == (
        "Fine-tuning what was inherited beats training from scratch at the dense budget in 0 of 3"
        " cases; in 1 it does not, and 2 are undecided."
    )


def test_a_winner_is_named_where_the_cases_share_their_data(toml):
    def won(address, accuracy):
        names = ("arms", "verdicts", "comparisons", "failures", "notes")
        empty = {name: [] for name in names}
        record = {"validation_accuracy": accuracy}
        return {**empty, "records": [], "winner": address, "winner_record": record}

    suite = load(toml, {"axes.rate": "small"})
    documents = dict(zip(suite.cases, (won("a", 0.7), won("b", 0.8)), strict=True))
    assert overview.combined(suite, documents)["winner"] == "b"
    other = load(toml, {"axes.rate": "small", "axes.method.magnitude.data.split_seed": 5})
    assert overview.combined(other, documents)["winner"] is None
