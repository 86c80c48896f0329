import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import windfall
from windfall import courses, experiments, gallery, inputs, luck, portraits, verbs
from windfall.data import Digits
from windfall.laboratory import Laboratory, Training
from windfall.luck import LaboratoryStudy
from windfall.measures import Readings
from windfall.spec import SpecError
from windfall.store import Lab

EXPERIMENT = {
    "teacher": {"hidden": [2, 3]},
    "student": {"multi": 2},
    "inputs": {"dimension": 4, "num_train": 64, "num_evaluation": 60},
    "num_outputs": 3, "batch_size": 8, "steps": 24, "measure_every": 6,
}  # fmt: skip
WIDTH = {"effect": "width", "arm": "wide", "against": "narrow", "metric": "alignment"}
LUCK = {"effect": "luck", "arm": "wide", "against": "chance", "metric": "rank/hidden1"}


def study(num_seeds=2, **changes):
    return LaboratoryStudy(
        name="tiny",
        experiment=EXPERIMENT | changes,
        arms={"narrow": {}, "wide": {"student": {"multi": 3}}},
        contrasts=(WIDTH, LUCK | {"is_lower": True}),
        num_seeds=num_seeds,
    )


def quiet(_):
    pass


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("luck") / "lab"
    return folder, windfall.run(study(), lab=folder, workers=2, watch=quiet)


@pytest.mark.slow
def test_a_study_is_trained_once(found):
    folder, first = found
    assert first.runs == {"total": 4, "reused": 0, "trained": 4, "failed": 0, "diverged": 0}
    again = windfall.run(study(num_seeds=3), lab=folder, workers=1, watch=quiet)
    assert again.runs == {"total": 6, "reused": 4, "trained": 2, "failed": 0, "diverged": 0}


@pytest.mark.slow
def test_workers_train_what_this_process_would(found):
    folder, result = found
    lab, of = Lab(folder, readonly=True), study()
    for (arm, seed), name in of.places().items():
        course, facts = courses.stored(lab, name)
        own = of.experiments()[arm].course(seed).tensors()
        assert all(torch.equal(own[key], value) for key, value in course.tensors().items())
        assert (facts["seed"], facts["status"]) == (seed, "done")
    lab.close()
    assert result.verdicts[0]["num_seeds"] == 2


@pytest.mark.slow
def test_show_and_report_need_the_lab_alone(found, tmp_path):
    folder, first = found
    shown = verbs.show(study(), lab=folder)
    assert shown.verdicts == first.verdicts
    assert shown.arms == first.arms
    page = verbs.report(study(), tmp_path / "page.html", lab=folder).report
    text = page.read_text()
    for address in study().places().values():
        assert address in text
    assert "http" not in text.replace("https://arxiv.org/abs/", "")
    assert first.report.exists()


@pytest.mark.slow
def test_the_document_is_the_contract(found):
    document = json.loads(json.dumps(found[1].to_json(), allow_nan=False))
    assert set(document) == {
        "study", "runs", "arms", "verdicts", "comparisons", "failures", "winner", "notes",
        "answer", "seconds", "estimate", "lab", "report",
    }  # fmt: skip
    row = set(document["verdicts"][0])
    assert row >= {
        "effect", "arm", "against", "level", "density", "metric", "difference", "interval",
        "num_seeds", "p_value", "p_adjusted", "verdict",
    }  # fmt: skip


@pytest.mark.slow
def test_verbs_about_pruned_networks_refuse_it(found, tmp_path):
    folder, _ = found
    with pytest.raises(SpecError, match="STUDY must be one of pruned networks for `pattern`"):
        verbs.pattern(study(), lab=folder)
    with pytest.raises(SpecError, match="STUDY must be one of pruned networks for `export`"):
        verbs.export(study(), tmp_path / "x", lab=folder)
    with pytest.raises(SpecError, match="must have been run in the lab"):
        verbs.show(study(steps=25), lab=folder)


@pytest.mark.slow
def test_a_plan_tells_what_is_stored_and_what_it_costs(found, tmp_path):
    folder, _ = found
    plan = verbs.plan(study(num_seeds=3), lab=folder, workers=2)
    rows = plan["laboratory"]
    missing = [(row["runs"] - row["stored"]) * row["seconds"] for row in rows]
    assert plan["seconds"] == pytest.approx(sum(missing) / 2)
    assert [(row["arm"], row["runs"], row["steps"]) for row in rows] == [
        ("narrow", 3, 24), ("wide", 3, 24),
    ]  # fmt: skip
    assert all(row["stored"] >= 2 for row in rows)
    weights = 4 * 4 + 4 * 6 + 6 * 3
    assert rows[0]["flops"] == 6 * weights * 8 * 24
    assert verbs.plan(study(), lab=tmp_path / "none")["laboratory"][0]["stored"] == 0


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_leaves_its_rows_null(tmp_path):
    lab = Lab(tmp_path / "lab")
    (lab.folder / "courses").touch()  # a file, where their folder should be
    lab.close()
    result = windfall.run(study(), lab=tmp_path / "lab", workers=1, watch=quiet)
    assert result.runs["failed"] == 4
    assert "FileExistsError" in result.failures[0]["reason"]
    assert all(row["mean"] is None for row in result.arms)
    assert {row["verdict"] for row in result.verdicts} == {"undecided"}
    assert result.report.exists()


@pytest.mark.slow
def test_what_diverges_is_a_result(tmp_path):
    result = windfall.run(
        study(learning_rate=1e9, steps=600), lab=tmp_path / "lab", workers=2, watch=quiet
    )
    assert result.runs["diverged"] == 4
    assert any("diverged" in note for note in result.document["notes"])
    assert result.failures == []


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(courses, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(courses, "TELL_SECONDS", 0)
    lab, experiment = Lab(tmp_path / "lab"), Laboratory(**EXPERIMENT)

    def stop(step):
        if step == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        courses.train(lab, experiment, 0, stop)
    name = luck.address(experiment, 0)
    assert not courses.is_stored(lab, name)
    begun = []
    init = Training.__init__

    def watched(self, settings, seed, state=None, parent=None):
        begun.append(state.looks[-1].step if state else 0)
        init(self, settings, seed, state, parent)

    monkeypatch.setattr(Training, "__init__", watched)
    assert courses.train(lab, experiment, 0)
    assert begun == [12]
    course, _ = courses.stored(lab, name)
    own = experiment.course(0).tensors()
    assert all(torch.equal(own[key], value) for key, value in course.tensors().items())
    assert list((lab.folder / "checkpoints").iterdir()) == []
    assert not courses.train(lab, experiment, 0)
    lab.close()


def test_a_file_that_is_not_whole_is_refused(tmp_path):
    lab = Lab(tmp_path / "lab")
    (lab.folder / "courses").mkdir()
    (lab.folder / "courses" / "abc.safetensors").write_bytes(b"half")
    with pytest.raises(SpecError, match="must be a safetensors file that windfall wrote"):
        courses.stored(lab, "abc")
    lab.close()


@pytest.mark.slow
def test_killed_in_the_middle_its_workers_end_and_it_goes_on(tmp_path):
    toml = tmp_path / "long.toml"
    toml.write_text(
        'extends = "luck"\nnum_seeds = 1\n[experiment]\nsteps = 400000\nmeasure_every = 50\n'
    )
    command = [sys.executable, "-c", "from windfall.cli import main; main()"]
    command += ["run", str(toml), "--lab", str(tmp_path / "lab"), "--set", "arms=multi-1"]
    with (tmp_path / "told").open("w") as told:
        process = subprocess.Popen(command, stderr=told, stdout=subprocess.DEVNULL)
    locks = tmp_path / "lab" / "locks"
    deadline = time.monotonic() + 120
    while not (locks.exists() and any(len(p.name) == 64 for p in locks.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = _children(process.pid)
    assert children
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(_is_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not list((tmp_path / "lab").glob("courses/*"))
    assert "Traceback" not in (tmp_path / "told").read_text()


def _children(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- the page --------------------------------------------------------------------------------------


def test_a_student_that_equals_a_teacher_sits_on_it():
    rho = torch.eye(4)[:, :3]
    circle = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(gallery.positions(rho), circle, atol=1e-6, rtol=0)
    middle = gallery.positions(torch.full((4, 1), 0.5))
    torch.testing.assert_close(middle, torch.zeros(1, 2), atol=1e-6, rtol=0)
    nothing = gallery.positions(torch.tensor([[float("nan")], [-1.0]]))
    torch.testing.assert_close(nothing, torch.zeros(1, 2))


def test_students_stand_in_the_order_of_what_they_won():
    rho = torch.tensor([[0.1, 0.9, 0.2], [0.8, 0.3, 0.1]])
    ordered = portraits.by_winner(rho, torch.tensor([1, 0]))
    assert torch.equal(ordered, rho[:, [1, 0, 2]])


def test_profiles_show_every_arm_over_its_own_layers():
    def readings(kind, num):
        values = {f"negative/{kind}{i}": torch.tensor([0.0, 0.1 * i]) for i in range(num)}
        return Readings(torch.tensor([0, 4]), values)

    found = {"deep": [readings("a", 8)] * 2, "other": [readings("b", 6)] * 2}
    names = [name for each in found.values() for name in each[0].values]
    (axes,) = portraits.profiles(found, {"negative": names}).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["deep"].get_xdata().tolist() == list(range(1, 9))
    assert lines["other"].get_ydata().tolist() == pytest.approx([0.1 * i for i in range(6)])


def test_profiles_over_a_way_stand_at_its_shares():
    values = {f"error/{share:.2f}": torch.tensor([share / 10]) for share in (0, 0.25, 0.5, 0.75, 1)}
    found = {"ticket": [Readings(torch.tensor([4]), values)] * 2}
    (axes,) = portraits.profiles(found, {"error": list(values)}).axes
    assert list(axes.lines[0].get_xdata()) == [0, 0.25, 0.5, 0.75, 1]
    assert axes.get_xlabel() == "Share of the way"


def test_standings_have_a_place_for_each_arm_and_a_dot_for_each_seed():
    one, other = (Readings(torch.tensor([4]), {"barrier": torch.tensor([v])}) for v in (0.1, 0.3))
    (axes,) = portraits.readings({"a": [one, other], "b": [one]}, ["barrier"]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    dots = axes.lines[0]
    assert dots.get_ydata() == pytest.approx([0.1, 0.3])
    assert axes.lines[1].get_ydata() == pytest.approx([0.2])


def test_readings_have_units_and_gaps_where_a_seed_has_none():
    series = [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, float("nan"), 6.0])]
    found = {"a": [Readings(torch.tensor([0, 1, 2]), {"rank": each}) for each in series]}
    (axes,) = portraits.readings(found, ["rank"], {"rank": "dimensions"}).axes
    assert axes.get_ylabel() == "dimensions"
    assert axes.lines[0].get_xdata().tolist() == [0.7, 2]
    assert axes.lines[0].get_ydata().tolist() == [2, 5]


def test_a_profile_of_logarithms_is_not_cut_at_0():
    for sign in (-1.0, 1.0):
        values = {f"forward/layer{i}": torch.tensor([sign * i]) for i in range(1, 7)}
        found = {"a": [Readings(torch.tensor([4]), values)]}
        (axes,) = portraits.profiles(found, {"forward": list(values)}).axes
        assert (axes.get_ylim()[0] == 0) == (sign > 0)
        assert axes.get_ylim()[0] < sign


def test_figures_are_drawn_of_what_diverged_too():
    experiment = Laboratory(**EXPERIMENT | {"learning_rate": 1e9, "steps": 600})
    course = experiment.course(0)
    assert course.diverged
    each = {"wild": [course, experiment.course(1)]}
    for figure in (
        portraits.alignments(each),
        portraits.outgoing(each),
        portraits.rank_histograms(each["wild"]),
        portraits.heat_maps(course),
    ):
        assert figure.axes


def test_what_is_said_of_the_data_is_told_beside_the_numbers(tmp_path, monkeypatch):
    noted = dataclasses.replace(inputs.loaded(Digits()), note="digits: scribbled on")
    monkeypatch.setattr(experiments, "loaded", lambda data: noted)
    of = study(1, inputs={"kind": "real", "num_evaluation": 20})
    lab = Lab(tmp_path / "lab")
    for arm, seed in of.places():
        courses.train(lab, of.experiments()[arm], seed)
    lab.close()
    notes = windfall.show(of, lab=tmp_path / "lab").document["notes"]
    assert "digits: scribbled on" in notes
    assert experiments.data_note(Laboratory()) is None
