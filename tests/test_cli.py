"""The command line as a user meets it: what it prints, what it refuses, and how it ends."""

import gzip
import json
import sqlite3

import pytest
from typer.testing import CliRunner

from windfall import cli, settings, verbs
from windfall.spec import SpecError

TINY = (
    "--set", "num_seeds=2", "--set", "levels=1", "--set", "verdict_level=1",
    "--set", "recipe.steps=4", "--set", "recipe.eval_every=2", "--set", "model.hidden=[6]",
    "--set", "arms=ticket,reinit",
)  # fmt: skip


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WINDFALL_DATA", raising=False)
    monkeypatch.delenv("WINDFALL_LAB", raising=False)

    def invoke(*arguments, exit_code=0):
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == exit_code, (result.exit_code, result.stdout, result.stderr)
        return result

    return invoke


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    lab = tmp_path_factory.mktemp("trained") / "lab"
    result = CliRunner().invoke(cli.app, ["run", "lottery", *TINY, "--lab", str(lab), "--json"])
    assert result.exit_code == 0, result.stderr
    return lab, json.loads(result.stdout)


@pytest.mark.slow
def test_run_prints_exactly_the_document_of_the_contract(trained):
    lab, document = trained
    assert {"study", "runs", "arms", "verdicts", "comparisons", "failures", "winner", "seconds",
            "lab", "report"} <= document.keys()  # fmt: skip
    assert document["study"].keys() == {"name", "address"}
    total = 2 * 3
    assert document["runs"] == {
        "total": total, "reused": 0, "trained": total, "failed": 0, "diverged": 0,
    }  # fmt: skip
    arm = document["arms"][0]
    assert {"arm", "level", "density", "metric", "mean", "interval", "num_seeds", "runs"} <= (
        arm.keys()
    )
    assert arm["runs"][0].keys() == {"seed", "address", "value"}
    verdict = document["verdicts"][0]
    assert {"effect", "arm", "against", "level", "density", "metric", "difference", "interval",
            "num_seeds", "p_value", "p_adjusted", "verdict"} <= verdict.keys()  # fmt: skip
    assert document["lab"] == str(lab)
    assert (lab / "lottery.html").read_text().startswith("<!")


@pytest.mark.slow
def test_a_second_run_trains_nothing_and_says_the_same(trained, call):
    lab, first = trained
    second = json.loads(call("run", "lottery", *TINY, "--lab", lab, "--json").stdout)
    assert second["runs"] == {**first["runs"], "reused": 6, "trained": 0}
    for name in ("study", "arms", "verdicts", "comparisons", "winner"):
        assert second[name] == first[name]


@pytest.mark.slow
def test_show_and_report_read_the_lab_alone(trained, call, tmp_path):
    lab, first = trained
    shown = json.loads(call("show", "lottery", *TINY, "--lab", lab, "--json").stdout)
    assert shown["verdicts"] == first["verdicts"]
    assert shown["report"] is None
    told = call("show", "lottery", *TINY, "--lab", lab).stdout
    assert "initialization" in told
    assert "ticket - reinit" in told
    page = tmp_path / "page.html"
    call("report", "lottery", *TINY, "--lab", lab, "-o", page)
    assert first["winner"] in page.read_text()


@pytest.mark.slow
def test_show_refuses_a_study_that_was_not_run_here(trained, call):
    lab, _ = trained
    told = call("show", "same-init", "--lab", lab, exit_code=2).stderr
    assert "must have been run" in told
    assert "windfall run same-init" in told


@pytest.mark.slow
def test_plan_counts_what_is_stored_and_starts_nothing(trained, call, tmp_path):
    lab, _ = trained
    document = json.loads(call("plan", "lottery", *TINY, "--lab", lab, "--json").stdout)
    assert document["runs"] == {"total": 6, "stored": 6, "missing": 0}
    assert document["seconds_estimate"] == 0
    more = json.loads(
        call("plan", "lottery", *TINY, "--set", "num_seeds=3", "--lab", lab, "--json").stdout
    )
    assert more["runs"] == {"total": 9, "stored": 6, "missing": 3}
    assert more["estimate_from"] == "stored runs"
    fresh = tmp_path / "nothing"
    told = call("plan", "lottery", *TINY, "--lab", fresh).stdout
    assert "6 runs to train" in told
    assert not fresh.exists()


@pytest.mark.slow
def test_reading_a_lab_imports_no_users_code(call, tmp_path, monkeypatch):
    (tmp_path / "userlib.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    (tmp_path / "own.toml").write_text('extends = "lottery"\nmodel = "userlib:net"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny = [a for a in TINY if "hidden" not in a]
    tiny = [
        a for i, a in enumerate(tiny) if not (a == "--set" and tiny[i + 1 : i + 2] == ["--set"])
    ]
    ran = json.loads(call("run", "own.toml", *tiny, "--json").stdout)
    (tmp_path / "userlib.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.delitem(__import__("sys").modules, "userlib", raising=False)
    shown = json.loads(call("show", "own.toml", *tiny, "--json").stdout)
    assert shown["verdicts"] == ran["verdicts"]


def test_a_value_is_toml_a_word_or_words_by_commas():
    pairs = ["a=1", "b=1.2e-3", "c=[1, 2]", "d=mlp", "e=ticket,reinit", "f=true", 'g="x=y"']
    assert cli.settings(pairs) == {
        "a": 1, "b": 1.2e-3, "c": [1, 2], "d": "mlp", "e": ["ticket", "reinit"], "f": True,
        "g": "x=y",
    }  # fmt: skip
    with pytest.raises(SpecError, match=r"`--set` must be PATH=VALUE; got 'levels'"):
        cli.settings(["levels"])


REFUSED = {
    "an unknown study": (["lotery"], "got 'lotery'. Did you mean `lottery`? Known: "),
    "an unknown field": (
        ["lottery", "--set", "num_seed=3"],
        "`num_seed`. Did you mean `num_seeds`",
    ),
    "an unknown nested field": (
        ["lottery", "--set", "recipe.batchsize=3"],
        "`batchsize`. Did you mean `batch_size`",
    ),
    "an unknown model": (["lottery", "--set", "model=conv-5"], "got 'conv-5'. Did you mean `conv-"),
    "an unknown data set": (
        ["lottery", "--set", "data=mnits"],
        "got 'mnits'. Did you mean `mnist`",
    ),
    "an unknown criterion": (
        ["lottery", "--set", "prune.criterion=magnitud"],
        "got 'magnitud'. Did you mean `magnitude`",
    ),
    "an unknown arm": (["lottery", "--set", "arms=tickets"], "Did you mean `ticket`"),
    "a density above 1": (
        ["lottery", "--set", "prune.selection=global", "--set", "prune.selection.density=1.2"],
        "`prune.selection.density` must be less than or equal to 1; got 1.2",
    ),
    "a density of 0": (
        ["lottery", "--set", "prune.selection=global", "--set", "prune.selection.density=0"],
        "`prune.selection.density` must be greater than 0; got 0",
    ),
    "zero seeds": (
        ["lottery", "--set", "num_seeds=0"],
        "`num_seeds` must be greater than or equal",
    ),
    "a rate that empties a layer": (
        ["lottery", "--set", "prune.selection.output=0.9"],
        "`prune` must leave every layer at least one weight; got 0 of `output.weight` at level",
    ),
    "a rate of 1": (["lottery", "--set", "prune.selection.hidden=1.0"], "must be less than 1"),
    "no workers": (["lottery", "--workers", "0"], "`--workers` must be at least 1; got 0"),
    "an unknown device": (["lottery", "--device", "tpu"], "`--device` must be auto, cpu or cuda"),
    "a data set that is not there": (["lottery-mnist"], "windfall data get mnist"),
    "a user's model that is not there": (
        ["lottery", "--set", "model=nowhere_at_all:net"],
        "`model` must name a module that can be imported",
    ),
    "a wrong type": (["lottery", "--set", "recipe=3"], "`recipe` must"),
    "a level that is not there": (["lottery", "--set", "verdict_level=9"], "`verdict_level` must"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_message_and_exit_code_2_and_starts_nothing(case, call, tmp_path):
    arguments, message = REFUSED[case]
    told = call("run", *arguments, exit_code=2)
    assert message in told.stderr
    assert "Traceback" not in told.stderr
    assert told.stderr.startswith("windfall: ")
    assert told.stdout == ""
    assert not (tmp_path / "lab").exists()


def test_a_toml_that_does_not_parse_is_refused_with_its_line(call, tmp_path):
    (tmp_path / "bad.toml").write_text('extends = "lottery"\nnum_seeds = = 3\n')
    assert "line 2" in call("run", "bad.toml", exit_code=2).stderr


def test_data_files_that_are_truncated_or_altered_are_named_with_checksums(call, tmp_path):
    folder = tmp_path / "sets" / "mnist"
    folder.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(b"not the official file"))
    told = call("run", "lottery-mnist", "--set", f"data.root={tmp_path / 'sets'}", exit_code=2)
    assert "train-images-idx3-ubyte.gz" in told.stderr
    assert "f68b3c2dcbeaaa9fbdd348bbdeb94873" in told.stderr


def test_a_folder_that_is_no_lab_is_left_alone(call, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    told = call("run", "lottery", *TINY, "--lab", folder, exit_code=2)
    assert "has no lab.json" in told.stderr
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_lab_of_a_newer_version_is_refused(call, tmp_path):
    folder = tmp_path / "lab"
    folder.mkdir()
    (folder / "lab.json").write_text('{"windfall-lab": 99}')
    assert "newer" in call("run", "lottery", *TINY, exit_code=2).stderr
    assert "newer" in call("show", "lottery", *TINY, exit_code=2).stderr


def test_a_model_of_the_wrong_number_of_classes_is_refused(call, tmp_path, monkeypatch):
    (tmp_path / "seven.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    told = call("run", "lottery", "--set", "model=seven:net", exit_code=2).stderr
    assert "must return 10 classes; got 7" in told


def test_labels_out_of_range_are_refused(call, tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(
        "import torch\ndef points():\n    return torch.zeros(50, 3), torch.arange(50) - 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    told = call("run", "lottery", "--set", "data=odd:points", exit_code=2).stderr
    assert "Labels must lie in" in told


def test_a_full_disk_ends_with_exit_code_1(call, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verbs, "execute", full)
    told = call("run", "lottery", *TINY, exit_code=1)
    assert "no space is left" in told.stderr
    assert sqlite3.connect("lab/lab.sqlite").execute("SELECT COUNT(*) FROM runs").fetchone() == (0,)


@pytest.mark.parametrize("name", settings.bundled())
def test_every_bundled_study_is_a_valid_study_of_its_own_name(name):
    assert settings.load(name).name == name
