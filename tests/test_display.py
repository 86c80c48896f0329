"""What a terminal shows."""

import io

import pytest
from rich.console import Console
from test_tables import fill, noisy
from test_tables import study as small

from windfall import display, tables, verbs
from windfall.graph import expand
from windfall.schedule import Progress
from windfall.store import Lab


def printed(renderable) -> str:
    file = io.StringIO()
    Console(width=160, file=file).print(renderable)
    return file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "told"), [(12.4, "12 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_a_duration_reads_naturally(seconds, told):
    assert display.duration(seconds) == told


def test_the_tables_show_what_the_document_holds(tmp_path):
    graph, lab = expand(small()), Lab(tmp_path / "lab")
    fill(lab, graph, noisy)
    document = tables.summary(tables.outline(graph), lab)
    told = printed(display.result(document))
    assert document["answer"][0] in " ".join(told.split())
    for row in document["verdicts"]:
        assert f"{row['arm']} - {row['against']}" in told
        assert row["verdict"] in told
    mean = next(r for r in document["arms"] if r["arm"] == "ticket" and r["level"] == 2)["mean"]
    assert f"{100 * mean:.2f}" in told


def test_a_plan_lists_every_arm_and_level(tmp_path, monkeypatch):
    monkeypatch.setenv("WINDFALL_CACHE", str(tmp_path / "cache"))
    told = printed(display.plan(verbs.plan(small(), lab=tmp_path / "none", workers=1)))
    for arm in ("dense", "ticket", "reinit", "shuffled", "random", "finetune"):
        assert arm in told
    assert "an estimate from typical figures" in told


def test_progress_estimates_from_the_work_done():
    assert Progress(4).remaining_seconds is None
    assert Progress(4, work=100, worked=25, seconds=10.0).remaining_seconds == 30


def test_progress_without_a_terminal_is_lines_on_standard_error(capsys, monkeypatch):
    monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
    with display.watching("mine") as update:
        update(Progress(4, finished=1, work=8, worked=2, seconds=3.0, message="said once"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "mine: said once\nmine: 1 of 4 runs, about 9 s left\n"
