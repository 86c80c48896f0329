"""A checkup as a user meets it: what it prints, its page, and what it refuses."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
import small
import torch
from typer.testing import CliRunner

from windfall import checkup, cli, depths, initialize, models, seeds, verbs
from windfall import data as data_sets
from windfall.spec import SpecError

DEEP = "model.hidden=[30,30,30,30,30,30,30,30,30,30,30,30,30,30,30,30,30,30,30,30,30,30,30,30,30,30,30,30]"  # fmt: skip  # noqa: E501
MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))

def seven():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))

def broken():
    raise RuntimeError("no such thing")

def number():
    return 3

def fails():
    return nn.Linear(63, 10)

class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()
    def forward(self, x):
        with torch.no_grad():
            return self.inner(x)

class Pair(Cut):
    def forward(self, x):
        return self.inner(x), 1

class Coin(Cut):
    def forward(self, x):
        return self.inner(x) + torch.rand(())

def hot():
    made = net()
    made[1].weight.data *= 1e30
    made[3].weight.data *= 1e30
    return made

def points():
    return torch.zeros(50, 3) + torch.arange(50)[:, None], torch.arange(50) % 2
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WINDFALL_LAB", raising=False)
    (tmp_path / "mine_to_check.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def invoke(*arguments, exit_code=0):
        result = CliRunner().invoke(cli.app, ["check", *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == exit_code, (result.exit_code, result.stdout, result.stderr)
        return result

    return invoke


def test_a_healthy_network_of_the_zoo_is_told_well(call):
    document = json.loads(call("lenet-300-100", "--json").stdout)
    assert document["answer"][0].startswith("All is well: ")
    assert document["diagnosis"] == []
    assert document["of"] == {
        "from": "zoo", "name": "lenet-300-100", "begun_by": {"kind": "glorot-normal"},
    }  # fmt: skip
    assert [row["name"] for row in document["layers"]] == [
        "hidden1", "hidden1_relu", "hidden2", "hidden2_relu", "output",
    ]  # fmt: skip
    assert document["inputs"]["num"] == document["settings"]["num_inputs"] == 64
    assert document["outputs"]["loss"] is not None


def test_settings_change_the_network_its_data_and_its_weights(call):
    ill = json.loads(call("mlp", "--set", DEEP, "--json").stdout)
    kinds = [each["kind"] for each in ill["diagnosis"]]
    assert kinds == ["vanishing-forward", "vanishing-backward"]
    cure = "initialization=kaiming-normal"
    assert cure in ill["diagnosis"][0]["remedy"]
    assert json.loads(call("mlp", "--set", DEEP, "--set", cure, "--json").stdout)["diagnosis"] == []
    raw = json.loads(call("lenet-300-100", "--set", "data.normalize=false", "--json").stdout)
    assert [each["kind"] for each in raw["diagnosis"]] == ["inputs"]
    assert raw["settings"]["data"]["normalize"] is False


def test_a_shape_gives_random_inputs_without_labels(call):
    arguments = ("vgg-11", "--set", "shape=[3,16,16]", "--set", "model.width=0.1",
                 "--set", "num_classes=5", "--set", "num_inputs=9", "--json")  # fmt: skip
    document = json.loads(call(*arguments).stdout)
    assert document["outputs"]["loss"] is None
    assert document["outputs"]["num"] == 5
    assert document["inputs"]["num"] == 9
    assert document["diagnosis"] == []
    assert document == json.loads(call(*arguments).stdout)
    other = json.loads(call(*arguments, "--set", "seed=1").stdout)
    assert other["layers"] != document["layers"]


def test_the_weights_are_those_of_a_training_of_that_seed():
    subject = checkup.fresh(checkup.checkup("mlp", {"seed": 2}))
    data = data_sets.load(data_sets.Digits())
    params, _ = initialize.initial_parameters(
        lambda: models.Mlp().build(data.input_shape, 10), initialize.GlorotNormal(), 2
    )
    assert torch.equal(subject.tensors["hidden1.weight"], params["hidden1.weight"])
    train = data.prepare(data.train.inputs, torch.float32)
    for one, label in zip(subject.inputs, subject.labels, strict=True):
        places = [i for i in range(len(train)) if torch.equal(train[i], one)]
        assert label in data.train.labels[places]


def test_a_users_network_is_looked_at_as_its_constructor_makes_it(call):
    document = json.loads(call("mine_to_check:net", "--json").stdout)
    assert document["of"]["begun_by"] == {"kind": "torch-default"}
    assert document["of"]["name"] == "mine_to_check:net"
    drawn = call("mine_to_check:net", "--set", "initialization=orthogonal", "--json").stdout
    assert json.loads(drawn)["layers"] != document["layers"]
    two = call("mlp", "--set", "data=mine_to_check:points", "--json").stdout
    assert json.loads(two)["outputs"]["num"] == 2


def test_an_overflow_is_a_finding(call):
    told = call("mine_to_check:hot", "--json").stdout
    document = json.loads(told)
    assert [each["kind"] for each in document["diagnosis"]] == ["overflow"]
    assert document["diagnosis"][0]["layers"] == ["3"]
    assert not re.search(r"\bNaN\b|\bInfinity\b", told)
    assert "overflows at `3`" in call("mine_to_check:hot").stdout


def test_it_prints_the_diagnosis_and_a_row_for_every_layer(call):
    told = call("lenet-300-100").stdout
    assert told.startswith("All is well: ")
    assert "Signals of lenet-300-100" in told
    for word in ("hidden1_relu", "|g|/|g_L|", "largest singular values of the input-output Jac"):
        assert word in told


def test_a_page_is_written_whole_and_loads_nothing(call, tmp_path):
    told = call("mlp", "--set", DEEP, "-o", "page.html").stdout
    assert told.rstrip().endswith("Page: page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!#|https://arxiv\.org)', html)
    assert "<script" not in html
    for name in ("forward", "backward", "units", "variance", "alike"):
        assert f'id="figure-{name}"' in html
    assert "<code>initialization=kaiming-normal</code>" in html
    assert "Activations vanish on their way up" in html
    for drawing in re.findall(r"<svg stroke.*?</svg>", html, re.DOTALL):
        ET.fromstring(drawing)


def test_a_page_of_a_network_that_overflows_has_what_is_known(call, tmp_path):
    call("mine_to_check:hot", "-o", "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "overflows at <code>3</code>" in html
    assert '<b class="flag">inf</b>' in html
    assert not re.search(r"<svg[^>]*>(?:(?!</svg>).)*\bnan\b", html, re.DOTALL)


def test_text_in_a_page_is_escaped():
    document = checkup.examined(checkup.fresh(checkup.checkup("mlp", {"num_inputs": 4})))
    document["of"] = document["of"] | {"name": "<b>mine</b>"}
    document["diagnosis"] = [
        {"kind": "dead", "told": "<i>`<x>`", "remedy": "-", "layers": [], "is_serious": True}
    ]
    html = depths.render(document)
    assert "<b>mine" not in html
    assert "&lt;i&gt;<code>&lt;x&gt;</code>" in html


# -- a run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    of = small.graph({"steps": 20, "eval_every": 10}, num_seeds=1, levels=1)
    lab = small.trained(of, tmp_path_factory.mktemp("check") / "lab")
    folder, addresses = lab.folder, list(of.runs)
    lab.close()
    return folder, addresses


def test_a_finished_run_is_looked_at_masked_on_its_own_validation_part(trained, call):
    folder, addresses = trained
    address = addresses[-1]
    document = json.loads(call(address[:10], "--lab", folder, "--json").stdout)
    assert document["of"]["address"] == address
    assert document["outputs"]["loss"] is not None
    assert document["settings"]["num_inputs"] == 64
    again = verbs.check(address[:10], {"num_inputs": 8}, lab=folder)
    assert again["inputs"]["num"] == 8
    blind = verbs.check(address[:10], {"shape": [1, 8, 8]}, lab=folder)
    assert blind["outputs"]["loss"] is None


# -- refusals --------------------------------------------------------------------------------------

REFUSED = {
    "an unknown network": (["lenet-300"], "got 'lenet-300'. Did you mean `lenet-300-100`? Known: "),
    "no lab": (["abc123"], "`--lab` must be a lab; there is none in lab"),
    "no such module": (["nowhere_at_all:net"], "`model` must name a module that can be imported"),
    "no such function": (["mine_to_check:nett"], "`model` must name a callable"),
    "one that raises": (["mine_to_check:broken"], "calling `mine_to_check:broken` raised"),
    "no module": (["mine_to_check:number"], "must return an nn.Module"),
    "other inputs": (["mine_to_check:fails"], "the forward pass of `mine_to_check:fails` raised"),
    "other inputs, random": (
        ["mine_to_check:fails", "--set", "shape=[5]"],
        "must accept inputs of shape [64, 5]",
    ),
    "other classes": (["mine_to_check:seven"], "must return 10 classes; got 7"),
    "no gradient": (["mine_to_check:Cut"], "must have a gradient path"),
    "no gradient, random": (
        ["mine_to_check:Cut", "--set", "shape=[1,8,8]"],
        "must have a gradient path",
    ),
    "a pair": (["mine_to_check:Pair"], "must return logits"),
    "a pair, random": (
        ["mine_to_check:Pair", "--set", "shape=[1,8,8]"],
        "must return outputs of shape",
    ),
    "an unknown setting": (["mlp", "--set", "shap=[3]"], "`shap`. Did you mean `shape`?"),
    "an unknown field": (["mlp", "--set", "model.widht=2"], "Did you mean `width`"),
    "the model twice": (["mlp", "--set", "model=vgg-11"], "`model` must be left out of `--set`"),
    "one input": (["mlp", "--set", "num_inputs=1"], "`num_inputs` must be greater than or equal"),
    "shape and data": (
        ["mlp", "--set", "shape=[3]", "--set", "data=digits"],
        "`shape` must be left out where `data` is given",
    ),
    "classes of data": (["mlp", "--set", "num_classes=3"], "`num_classes` must be left out"),
    "an empty shape": (["mlp", "--set", "shape=[]"], "`shape` must"),
    "images too small": (["vgg-11"], "must"),
    "data that is not there": (["mlp", "--set", "data=mnist"], "windfall data get mnist"),
    "a page in no folder": (["mlp", "-o", "/proc/nowhere/page.html"], "`-o` must be a file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_message_and_exit_code_2(case, call, tmp_path, monkeypatch):
    monkeypatch.setenv("WINDFALL_DATA", str(tmp_path / "data"))
    arguments, message = REFUSED[case]
    told = call(*arguments, exit_code=2)
    assert message in told.stderr
    assert "Traceback" not in told.stderr
    assert told.stderr.startswith("windfall: ")
    assert told.stdout == ""


def test_an_address_must_begin_that_of_a_run(trained, call):
    told = call("0123456789", "--lab", trained[0], exit_code=2).stderr
    assert "RUN must be the beginning of a finished run's address in the lab" in told


def test_a_runs_settings_are_few(trained, call):
    folder, addresses = trained
    told = call(addresses[0][:10], "--lab", folder, "--set", "data=digits", exit_code=2).stderr
    assert "`data`" in told


def test_nothing_is_drawn_from_the_global_generators(call):
    before = seeds.generators()
    call("mine_to_check:Coin", "--json")
    assert seeds.generators() == before


def test_callables_and_models_are_taken_as_they_are():
    assert verbs.check(models.Mlp(hidden=(5,)), {"num_inputs": 4})["of"]["from"] == "zoo"
    with pytest.raises(SpecError, match="`model` must be a function or class"):
        verbs.check(models.Mlp().build((4,), 2), {"shape": (4,)})
