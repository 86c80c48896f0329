"""A run's network handed over: in files that compute what it did, or in none."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import small
import torch
from test_cli import call  # noqa: F401  a fixture
from torch import nn

import windfall
from windfall import (
    exports,
    flops,
    formats,
    latency,
    parcels,
    settings,
    structure,
    tables,
    tracing,
    verbs,
)
from windfall.graph import expand
from windfall.runs import Run
from windfall.spec import SpecError, digest
from windfall.store import Lab

SHORT = {"steps": 6, "eval_every": 3}
SPARSE = {"selection": {"hidden": 0.85, "convolution": 0.6, "output": 0.5}}
FILTERS = {
    "criterion": "filter-norm",
    "selection": {"convolution": 0.3, "output": 0.0},
    "structure": "channels",
}
STUDIES = {
    "weights": {"prune": SPARSE},
    "channels": {"prune": FILTERS, "model": {"kind": "resnet-20", "width": 0.25}},
    "blocks": {
        "prune": {
            "criterion": "gate",
            "structure": "blocks",
            "selection": {"kind": "ratios", "removed": [0.4]},
        },
        "model": {"kind": "resnet-20", "width": 0.25, "gates": True},
    },
    "double": {"prune": SPARSE, "levels": 1, "recipe": small.RECIPE | SHORT | {"dtype": "float64"}},
}


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    """A study and its lab; trained once."""
    known = {}

    def find(name, **changes):
        if name not in known:
            changed = {"num_seeds": 1, "arms": ["dense", "ticket", "reinit"]}
            changed |= STUDIES.get(name, {}) | changes
            of = expand(small.study(**({"recipe": small.RECIPE | SHORT} | changed)))
            lab = small.trained(of, tmp_path_factory.mktemp(name) / "lab")
            lab.remember(settings.key(of.study), of.study.name, tables.outline(of))
            known[name] = of, lab
        return known[name]

    return find


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(exports, "SECONDS", 1e-9)
    monkeypatch.setattr(latency, "ROUND_SECONDS", 1e-9)
    monkeypatch.setattr(exports, "BATCH_SIZES", (1, 3))


def at(of, arm, level):
    return next(n.address for n in of.nodes if (n.arm, n.level, n.seed) == (arm, level, 0))


def original(of, lab, address):
    """The run's network as it was trained, and inputs of its test part."""
    workshop = windfall.worker.Workshop(lab, "cpu")
    run, state = of.runs[address], lab.weights(address)
    network = structure.given(workshop.network(run), state.params | state.buffers)
    data = workshop.data(run)
    return network, data.prepare(data.test.inputs, run.recipe.torch_dtype)


def expected(of, lab, address):
    network, inputs = original(of, lab, address)
    with torch.no_grad():
        return inputs, network(inputs)


def load(path):
    """A file that was just written, as a function of inputs."""
    return formats.FORMATS[path.suffix].load(path, None)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arm", "level"), [
    ("weights", "ticket", 2), ("weights", "dense", 0), ("channels", "ticket", 2),
    ("channels", "reinit", 1), ("double", "ticket", 1),
])  # fmt: skip
def test_a_network_that_is_loaded_computes_what_was_trained(labs, tmp_path, name, arm, level):
    of, lab = labs(name)
    address = at(of, arm, level)
    found = verbs.export(address[:16], tmp_path / "net.safetensors", lab=lab.folder)
    assert left(tmp_path) == ["net.json", "net.safetensors"]
    inputs, wanted = expected(of, lab, address)
    for path in (*found.files, tmp_path / "net"):
        network = windfall.load_network(path)
        assert not network.training
        with torch.no_grad():
            outputs = network(inputs)
        bound = 1e-5 if wanted.dtype == torch.float32 else 1e-12
        assert outputs.dtype == wanted.dtype
        assert (outputs - wanted).abs().max() <= bound * max(1, wanted.abs().max())
    told = json.loads((tmp_path / "net.json").read_text())
    assert Run.from_json(told["run"]).address == told["address"] == address
    assert told["dtype"] == of.runs[address].recipe.dtype
    assert (told["input_shape"], told["num_classes"]) == ([1, 8, 8], 10)
    shapes = {name: list(tensor.shape) for name, tensor in structure.tensors(network).items()}
    assert told["shapes"] == shapes
    sizes = [each["before"] - len(each["kept"]) for each in told["channels"].values()]
    assert (sum(sizes) > 0) == (arm != "dense")
    raw = (of.runs[address].data, told["inputs"])
    assert raw[1]["peak"] == 16 and len(raw[1]["mean"]) == 1
    assert found.document["proofs"][0]["num_inputs"] == 256


@pytest.mark.slow
@pytest.mark.parametrize(("name", "level"), [("weights", 2), ("channels", 1)])
def test_without_a_suffix_every_format_is_written_and_computes_the_same(
    labs, tmp_path, name, level, capfd, recwarn
):
    of, lab = labs(name)
    address = at(of, "ticket", level)
    capfd.readouterr()
    found = verbs.export(address, tmp_path / "net", lab=lab.folder)
    assert capfd.readouterr() == ("", "")
    assert len(recwarn) == 0
    assert left(tmp_path) == ["net.json", "net.onnx", "net.pt2", "net.safetensors"]
    assert sorted(path.name for path in found.files) == left(tmp_path)
    assert found.document["left_out"] == []
    inputs, wanted = expected(of, lab, address)
    for suffix in formats.FORMATS:
        for some in (1, 2, 7, 300):
            outputs = load(tmp_path / f"net{suffix}")(inputs[:some])
            torch.testing.assert_close(outputs, wanted[:some], rtol=1e-4, atol=1e-5)
    for row in found.document["proofs"]:
        assert 0 <= row["difference"] <= row["tolerance"]


def test_channels_of_masks_go_and_those_of_a_smaller_network_are_gone(labs, tmp_path):
    for name in ("weights", "channels"):
        of, lab = labs(name)
        address = at(of, "ticket", 2)
        told = verbs.export(address, tmp_path / f"{name}.safetensors", lab=lab.folder).to_json()
        state = lab.weights(address)
        weights, costs = told["weights"], told["flops"]
        assert weights["before"] == sum(of.network.sizes.values()) > weights["after"]
        assert weights["after"] >= weights["nonzero"]
        assert costs["before"] > costs["after"] >= costs["nonzero"] > 0
        if name == "channels":
            rows = {row["group"]: row["after"] for row in told["channels"]}
            assert rows == {group: int(stay.sum()) for group, stay in state.channels.items()}
            assert weights["after"] == lab.record(address).kept
        else:
            assert weights["nonzero"] <= lab.record(address).kept
        network = windfall.load_network(tmp_path / name)
        before, after = told["memory"]["tensors"]["before"], told["memory"]["tensors"]["after"]
        assert latency.tensor_bytes(network) == after < before


@pytest.mark.slow
def test_what_was_measured_is_told(labs, tmp_path):
    of, lab = labs("weights")
    told = verbs.export(at(of, "ticket", 2), tmp_path / "a.safetensors", lab=lab.folder).to_json()
    assert told["threads"] == 1
    assert [row["batch_size"] for row in told["latency"]] == [1, 3]
    for row in told["latency"]:
        for side in ("before", "after"):
            low, high = row[side]["quartiles"]
            assert 0 < low <= row[side]["median"] <= high
        assert row["num_rounds"] >= 11
        assert row["after_is"] in ("faster", "same", "slower")
    for row in told["memory"]["activations"]:
        # the two hidden layers, and a ReLU beside the one it is of
        assert row["before"] == 4 * row["batch_size"] * (16 + 16)
        assert 0 < row["after"] < row["before"]
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize(("word", "after"), [("faster", 1.0), ("same", 2.005), ("slower", 4.0)])
def test_fewer_flops_are_not_called_faster_where_they_were_not(
    labs, tmp_path, monkeypatch, word, after
):
    def measured(networks, shape, sizes, *, seconds):
        rounds = [2e-3 + 1e-5 * (index % 2) for index in range(20)]
        others = [1e-3 * after for _ in range(20)]
        one = {"before": latency.Latency(tuple(rounds)), "after": latency.Latency(tuple(others))}
        return dict.fromkeys(sizes, one)

    monkeypatch.setattr(latency, "measured", measured)
    of, lab = labs("weights")
    told = verbs.export(at(of, "ticket", 2), tmp_path / "a.safetensors", lab=lab.folder).to_json()
    notes = [note for note in told["notes"] if "is not faster, although it has" in note]
    assert [row["after_is"] for row in told["latency"]] == [word] * 2
    if word == "faster":
        assert notes == []
        return
    assert len(notes) == 2 and "At a batch of 3 " in notes[1]
    assert ("no more than rounds differ" in notes[0]) == (word == "same")
    assert f"{after:.3g} ms against 2 ms" in notes[0]


# -- which run -------------------------------------------------------------------------------------


def test_a_study_is_its_winner(labs, tmp_path):
    of, lab = labs("weights")
    told = verbs.export(of.study, tmp_path / "a.safetensors", lab=lab.folder).to_json()
    level = of.study.decided_level
    nodes = [n.address for n in of.nodes if n.level == level]
    last = {a: lab.record(a).evaluations[-1] for a in nodes}
    best = max(last.values(), key=lambda e: (e.validation_accuracy, -e.validation_loss))
    assert last[told["run"]["address"]] == best
    assert told["run"]["accuracy"]["validation"] == best.validation_accuracy
    assert told["run"]["level"] == level


@pytest.mark.parametrize(
    ("which", "settings", "message"),
    [
        ("", None, "RUN must be the beginning of a finished run's address"),
        ("zz", None, r"got 'zz'\. Known: .*lottery"),
        ("lotery", None, "Did you mean `lottery`"),
        ("no.toml", None, "STUDY must be a readable TOML file"),
        ("lottery", None, "STUDY must have been run in the lab"),
        ("0123", {"num_seeds": 2}, "`--set` must come with a STUDY"),
    ],
)
def test_a_run_or_study_that_is_not_there_is_refused(labs, tmp_path, which, settings, message):
    _, lab = labs("weights")
    with pytest.raises(SpecError, match=message):
        verbs.export(which, tmp_path / "a.safetensors", settings, lab=lab.folder)
    assert left(tmp_path) == []


def test_a_prefix_of_several_is_refused_and_names_them(labs, tmp_path, monkeypatch):
    of, lab = labs("weights")
    several = [at(of, "ticket", 1), at(of, "ticket", 2)]
    monkeypatch.setattr(Lab, "matching", lambda *_: several)
    with pytest.raises(SpecError, match=f"those of 2: {several[0][:12]}, {several[1][:12]}. Give"):
        verbs.export("ab", tmp_path / "a.safetensors", lab=lab.folder)


def test_a_study_without_a_finished_winner_is_refused(tmp_path):
    of = small.graph(SHORT)
    lab = Lab(tmp_path / "lab")
    lab.remember(settings.key(of.study), of.study.name, tables.outline(of))
    with pytest.raises(SpecError, match="STUDY must have a finished run at the level"):
        verbs.export(of.study, tmp_path / "a.safetensors", lab=lab.folder)
    lab.close()


def spoiled(lab, address, monkeypatch, **changes):
    """The run as its lab would have it, but for some changes."""
    record, state = lab.record(address), lab.weights(address)
    for name, value in changes.items():
        owner = record if hasattr(record, name) else state
        object.__setattr__(owner, name, value)
    monkeypatch.setattr(Lab, "record", lambda *_: record)
    monkeypatch.setattr(Lab, "weights", lambda *_: state)


def test_a_run_that_computes_nothing_is_refused(labs, tmp_path, monkeypatch):
    of, lab = labs("weights")
    address = at(of, "ticket", 1)
    with monkeypatch.context() as patch:
        spoiled(lab, address, patch, status="diverged")
        with pytest.raises(SpecError, match=r"the training of \w{12} diverged"):
            verbs.export(address, tmp_path / "a.safetensors", lab=lab.folder)
    with monkeypatch.context() as patch:
        params = lab.weights(address).params
        params["output.bias"][0] = math.nan
        spoiled(lab, address, patch, params=params)
        with pytest.raises(SpecError, match=r"finite weights; `output\.bias`"):
            verbs.export(address, tmp_path / "a.safetensors", lab=lab.folder)
    with monkeypatch.context() as patch:
        patch.setattr(Lab, "has_weights", lambda *_: False)
        with pytest.raises(SpecError, match="must have its weights in the lab"):
            verbs.export(address, tmp_path / "a.safetensors", lab=lab.folder)
    assert left(tmp_path) == []


def test_without_its_data_a_run_is_compared_on_random_inputs(labs, tmp_path, monkeypatch):
    def missing(*_):
        raise SpecError("the files are not there")

    of, lab = labs("weights")
    monkeypatch.setattr(windfall.worker.Workshop, "data", missing)
    told = verbs.export(at(of, "ticket", 2), tmp_path / "a.safetensors", lab=lab.folder).to_json()
    assert told["inputs"]["from"] == "random"
    assert any("random inputs" in n and "the files are not there" in n for n in told["notes"])
    assert json.loads((tmp_path / "a.json").read_text())["inputs"] is None
    monkeypatch.setattr(Lab, "recalled", lambda *_: None)
    with pytest.raises(SpecError, match="the files are not there"):
        verbs.export(at(of, "ticket", 2), tmp_path / "b.safetensors", lab=lab.folder)


def test_the_lab_is_only_read(labs, tmp_path):
    of, lab = labs("weights")
    before = {p: p.stat().st_mtime_ns for p in lab.folder.rglob("*")}
    verbs.export(at(of, "ticket", 2), tmp_path / "a.safetensors", lab=lab.folder)
    assert {p: p.stat().st_mtime_ns for p in lab.folder.rglob("*")} == before


# -- where to --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("net.pth", r"must be a file that ends in \.safetensors, \.pt2, \.onnx, or in nothing"),
        ("net.v2", r"must be a file that ends in"),
        ("missing/net.pt2", "must be a file in a folder that exists"),
        ("file/net.pt2", "must be a file in a folder that exists"),
        ("folder", "must be a file; got the folder"),
        ("folder.pt2", "must be a file; got the folder"),
    ],
)
def test_a_file_that_cannot_be_is_refused_before_anything_is_done(
    labs, tmp_path, monkeypatch, output, message
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "file").touch()
    before = left(tmp_path)
    of, lab = labs("weights")
    monkeypatch.setattr(Lab, "weights", None)
    with pytest.raises(SpecError, match=message):
        verbs.export(at(of, "ticket", 1), tmp_path / output, lab=lab.folder)
    assert left(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_refused(labs, tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    of, lab = labs("weights")
    monkeypatch.setattr(formats, "tempfile", SimpleNamespace(mkdtemp=denied))
    with pytest.raises(SpecError, match=r"`-o` must be a file to write; got .*: Permission denied"):
        verbs.export(at(of, "ticket", 1), tmp_path / "a.safetensors", lab=lab.folder)


def test_a_full_disk_is_no_wrong_setting(labs, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    of, lab = labs("weights")
    monkeypatch.setattr(formats, "write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        verbs.export(at(of, "ticket", 1), tmp_path / "a.safetensors", lab=lab.folder)
    assert left(tmp_path) == []


def test_a_name_that_is_taken_by_a_folder_leaves_nothing(labs, tmp_path):
    (tmp_path / "net.json").mkdir()
    of, lab = labs("weights")
    with pytest.raises(SpecError, match=r"`-o` must be a file to write; .*net\.json is a folder"):
        verbs.export(at(of, "ticket", 1), tmp_path / "net.safetensors", lab=lab.folder)
    assert left(tmp_path) == ["net.json"]


def test_a_file_that_computes_something_else_is_never_there(labs, tmp_path, monkeypatch):
    of, lab = labs("weights")
    (tmp_path / "net.safetensors").write_text("as it was")
    load = parcels.load_network
    monkeypatch.setattr(
        parcels, "load_network", lambda *a, **k: lambda inputs: 1.001 * load(*a, **k)(inputs)
    )
    with pytest.raises(SpecError, match="must give what the run's network does within"):
        verbs.export(at(of, "ticket", 1), tmp_path / "net.safetensors", lab=lab.folder)
    assert left(tmp_path) == ["net.safetensors"]
    assert (tmp_path / "net.safetensors").read_text() == "as it was"


@pytest.mark.parametrize("outputs", [
    torch.full((4, 10), math.nan), torch.zeros(4, 9), torch.zeros(4, 10, dtype=torch.float64),
    torch.full((4, 10), 1.1e-5),
])  # fmt: skip
def test_outputs_that_are_not_the_same_are_refused(outputs):
    prove = exports._proof(torch.zeros(4, 3), torch.zeros(1 + 4, 10))
    with pytest.raises(SpecError, match=r"must give what the run's network does"):
        prove(".onnx", lambda inputs: outputs[: len(inputs)])
    told = prove(".onnx", lambda inputs: torch.full((len(inputs), 10), 0.9e-5))
    assert told == {"difference": pytest.approx(0.9e-5), "tolerance": 1e-5, "num_inputs": 4}


def test_files_are_renamed_all_or_none(labs, tmp_path, monkeypatch):
    replace = formats.Path.replace

    def stopped(path, other):
        if other.name == "net.json" and not path.name.startswith("older"):
            raise OSError(5, "Input/output error")
        return replace(path, other)

    of, lab = labs("weights")
    monkeypatch.setattr(formats.Path, "replace", stopped)
    monkeypatch.setattr(formats, "write_whole", lambda path, content: path.write_bytes(content))
    with pytest.raises(SpecError, match="Input/output error"):
        verbs.export(at(of, "ticket", 1), tmp_path / "net.safetensors", lab=lab.folder)
    assert left(tmp_path) == []
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"net{suffix}").write_text("older")
    with pytest.raises(SpecError, match="Input/output error"):
        verbs.export(at(of, "ticket", 1), tmp_path / "net.safetensors", lab=lab.folder)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"] * 2


def test_an_interruption_leaves_nothing(labs, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    of, lab = labs("weights")
    monkeypatch.setattr(parcels, "_document", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verbs.export(at(of, "ticket", 1), tmp_path / "net.safetensors", lab=lab.folder)
    assert left(tmp_path) == []


# -- what a format cannot say ----------------------------------------------------------------------


def test_onnx_without_its_packages_is_refused_by_name(labs, tmp_path, monkeypatch):
    of, lab = labs("weights")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SpecError, match=r"pip install 'windfall\[onnx\]'"):
        verbs.export(at(of, "ticket", 1), tmp_path / "net.onnx", lab=lab.folder)
    assert left(tmp_path) == []


@pytest.mark.slow
def test_onnx_without_its_packages_is_left_out_of_all(labs, tmp_path, monkeypatch):
    of, lab = labs("weights")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    told = verbs.export(at(of, "ticket", 1), tmp_path / "net", lab=lab.folder).to_json()
    assert left(tmp_path) == ["net.json", "net.pt2", "net.safetensors"]
    assert [row["format"] for row in told["left_out"]] == [".onnx"]
    assert any("pip install 'windfall[onnx]'" in note for note in told["notes"])


def test_a_format_that_fails_only_when_it_runs_is_not_made_either(tmp_path):
    def refuse(*_):
        raise formats.NotMade("no kernel for it")

    one = formats.Format(".pt2", lambda *_: {".pt2": b"some"}, lambda *_: refuse)
    prove = exports._proof(torch.zeros(4, 3), torch.zeros(1 + 4, 10))
    everything = formats.Target(tmp_path / "net", (one,), is_open=True)
    written = formats.write(everything, nn.Linear(3, 10), {}, None, prove)
    assert (written.files, written.proved, written.left_out) == (
        [],
        {},
        {".pt2": "no kernel for it"},
    )
    with pytest.raises(SpecError, match=r"\.pt2 cannot: no kernel for it\. Write"):
        this = formats.Target(tmp_path / "net", (one,), is_open=False)
        formats.write(this, nn.Linear(3, 10), {}, None, prove)
    assert left(tmp_path) == []


def exponential():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), Exponential(), nn.Linear(9, 10))


class Exponential(nn.Module):
    def forward(self, x):
        return torch.linalg.matrix_exp(0.1 * x.reshape(-1, 3, 3)).reshape(-1, 9)


def counting():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), Counting(), nn.Linear(12, 10))


class Counting(nn.Module):
    """It looks at its values, which no graph can say."""

    def forward(self, x):
        return x + 1 if float(x.detach().sum()) > 1e9 else x


@pytest.mark.slow
def test_an_operator_that_onnx_lacks_is_named_and_leaves_nothing(labs, tmp_path):
    of, lab = labs("exponential", model=exponential)
    address = at(of, "ticket", 1)
    with pytest.raises(SpecError, match=r"\.onnx cannot: .*matrix_exp.*Write \.safetensors"):
        verbs.export(address, tmp_path / "net.onnx", lab=lab.folder)
    assert left(tmp_path) == []
    told = verbs.export(address, tmp_path / "net", lab=lab.folder).to_json()
    assert left(tmp_path) == ["net.json", "net.pt2", "net.safetensors"]
    assert "matrix_exp" in told["left_out"][0]["reason"]


@pytest.mark.slow
def test_a_network_that_looks_at_its_values_is_no_program(labs, tmp_path):
    of, lab = labs("counting", model=counting)
    address = at(of, "ticket", 1)
    with pytest.raises(SpecError, match=r"\.pt2 cannot: "):
        verbs.export(address, tmp_path / "net.pt2", lab=lab.folder)
    assert left(tmp_path) == []
    told = verbs.export(address, tmp_path / "net", lab=lab.folder).to_json()
    assert left(tmp_path) == ["net.json", "net.safetensors"]
    assert [row["format"] for row in told["left_out"]] == [".pt2", ".onnx"]


# -- what is read ----------------------------------------------------------------------------------


@pytest.fixture
def parcel(labs, tmp_path):
    of, lab = labs("weights")
    verbs.export(at(of, "ticket", 2), tmp_path / "net.safetensors", lab=lab.folder)
    return tmp_path / "net.json", tmp_path / "net.safetensors"


def test_the_files_hold_no_pickle(parcel):
    described, weights = parcel
    json.loads(described.read_bytes())
    size = int.from_bytes(weights.read_bytes()[:8], "little")
    assert weights.read_bytes()[8 : 8 + size].startswith(b"{")
    assert all(isinstance(t, torch.Tensor) for t in safetensors.torch.load_file(weights).values())
    assert (
        safetensors.torch.load_file(weights).keys()
        == json.loads(described.read_text())["shapes"].keys()
    )


@pytest.mark.slow
def test_loading_needs_no_torch_pruning_and_unpickles_nothing(parcel):
    code = (
        "import sys, pickle; sys.modules['torch_pruning'] = None\n"
        "import windfall, torch\n"
        "def refuse(*_, **__): raise AssertionError('unpickled')\n"
        "pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse\n"
        f"network = windfall.load_network({str(parcel[1])!r})\n"
        "print(*network(torch.zeros(3, 1, 8, 8)).shape)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300
    )
    assert told.stdout.split() == ["3", "10"]


def rewritten(path, change):
    """The document with a change, as if it had been written so."""
    document = json.loads(path.read_text())
    document.pop("sha256")
    change(document)
    document["sha256"] = digest(document)
    path.write_text(json.dumps(document))


ALTERED = {
    "half the weights": lambda d, w: w.write_bytes(w.read_bytes()[:-100]),
    "a changed weight": lambda d, w: w.write_bytes(w.read_bytes()[:-1] + b"\x7f"),
    "no weights": lambda d, w: w.unlink(),
    "no document": lambda d, w: d.unlink(),
    "half the document": lambda d, w: d.write_bytes(d.read_bytes()[:-100]),
    "a changed document": lambda d, w: d.write_text(d.read_text().replace('"mlp"', '"conv-2"')),
    "another's document": lambda d, w: d.write_text('{"some": "json"}'),
    "a list": lambda d, w: d.write_text("[1, 2]"),
    "no text": lambda d, w: d.write_bytes(b"\xff\xfe\x00"),
    "not a number": lambda d, w: d.write_text(d.read_text().replace("[\n  1,", "[\n  NaN,", 1)),
    "a folder": lambda d, w: (d.unlink(), d.mkdir()),
    "missing fields": lambda d, w: rewritten(d, lambda t: t.pop("model")),
    "an unknown network": lambda d, w: rewritten(d, lambda t: t.update(model={"kind": "no-net"})),
}


@pytest.mark.parametrize("what", ALTERED)
def test_files_that_are_not_as_they_were_written_are_refused(parcel, what):
    ALTERED[what](*parcel)
    with pytest.raises(SpecError, match=r"must be a file that `windfall export` wrote, whole and"):
        windfall.load_network(parcel[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"kind": "mlp", "hidden": [16]}}, r"`network` must make the network that .*hid"),
        ({"model": {"kind": "mlp", "hidden": "x"}}, "`hidden` must"),
        ({"windfall-network": 2}, "written by a newer windfall"),
    ],
)
def test_a_document_that_does_not_fit_is_refused(parcel, change, message):
    rewritten(parcel[0], lambda document: document.update(change))
    with pytest.raises(SpecError, match=message):
        windfall.load_network(parcel[1])


def own():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))


def test_ones_own_network_is_loaded_by_its_function_alone(labs, tmp_path, monkeypatch):
    of, lab = labs("own", model=own, prune=SPARSE)
    address = at(of, "ticket", 2)
    verbs.export(address, tmp_path / "net.safetensors", lab=lab.folder)
    told = json.loads((tmp_path / "net.json").read_text())
    assert told["model"]["callable"] == f"{own.__module__}:own"
    with monkeypatch.context() as patch:
        patch.setattr("windfall.models.user.resolve", None)  # nothing is imported
        with pytest.raises(SpecError, match=r"`network` must be given: .* is of your own network"):
            windfall.load_network(tmp_path / "net.safetensors")
        network = windfall.load_network(tmp_path / "net.safetensors", network=own)
    assert network[1].out_features < 20
    inputs, wanted = expected(of, lab, address)
    with torch.no_grad():
        torch.testing.assert_close(network(inputs), wanted, rtol=1e-5, atol=1e-5)
    for make, message in (
        (lambda: nn.Linear(2, 3), r"`network` must make the network that .*; `1\.bias` is in one"),
        (lambda: 3, "`network` must return an nn.Module; it returned int"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(20, 10)),
         r"`network` must make the network that .*; the one made raised"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10)),
         r"`network` must make the network that .*; the one made computes something else"),
    ):  # fmt: skip
        with pytest.raises(SpecError, match=message):
            windfall.load_network(tmp_path / "net.safetensors", network=make)


def test_a_network_that_cannot_be_followed_is_exported_whole_and_says_so(
    labs, tmp_path, monkeypatch
):
    def refused(*_):
        raise SpecError("`model` must be a network whose channels can be followed")

    of, lab = labs("weights")
    monkeypatch.setattr(tracing, "trace", refused)
    told = verbs.export(at(of, "ticket", 2), tmp_path / "net.safetensors", lab=lab.folder).to_json()
    assert told["weights"]["after"] == told["weights"]["before"]
    assert told["channels"] == []
    assert any("exported at full size: `model` must be" in note for note in told["notes"])


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_prints_a_table_or_one_document(labs, call, tmp_path):  # noqa: F811
    of, lab = labs("weights")
    address = at(of, "ticket", 2)
    shown = call("export", address[:20], "-o", tmp_path / "a.safetensors", "--lab", lab.folder)
    for text in (
        "dense",
        "exported",
        "FLOPs",
        "[quartiles]",
        "a pass of 3",
        "a.json",
        address[:12],
    ):
        assert text in shown.stdout
    assert shown.stderr == ""
    line = ("export", address[:20], "-o", tmp_path / "b.safetensors", "--lab", lab.folder, "--json")
    told = json.loads(call(*line).stdout)
    assert told["files"] == [str(tmp_path / name) for name in ("b.safetensors", "b.json")]
    assert told["run"]["address"] == address
    refused = call("export", "zz", "-o", tmp_path / "c.pt2", "--lab", lab.folder, exit_code=2)
    assert refused.stderr.startswith("windfall: RUN must be")
    assert refused.stdout == ""


def test_a_network_that_lost_blocks_is_handed_over(labs, tmp_path):
    of, lab = labs("blocks")
    found = exports.export(lab, at(of, "ticket", 2), tmp_path / "blocks.safetensors")
    told, macs = found.document["flops"], flops.multiply_adds
    network = windfall.load_network(tmp_path / "blocks.safetensors")
    assert told["after"] == 2 * sum(macs(network, (1, 8, 8)).values()) < told["before"]
