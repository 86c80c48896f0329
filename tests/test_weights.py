"""Trained networks of any origin, what is told of their biases, and the files that are refused."""

import hashlib
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import small
import torch
from test_cli import call  # noqa: F401  a fixture
from torch import nn

from windfall import biases, verbs, weights
from windfall.graph import expand
from windfall.spec import SpecError
from windfall.store import Lab


def network(number=12):
    """Layers whose names are in another order as texts: 1, 10, 2."""
    made = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(number)))
    for index, part in enumerate(made):
        part.bias.data[:] = -1.0 if index % 3 else 0.5
    return made


NORMS = [str(index) for index in range(12)]


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "within",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"module.{n}": t for n, t in state.items()}, "best": 0.9},
    ],
)
@pytest.mark.parametrize("is_new", [True, False])
def test_a_state_dict_is_read_wherever_training_has_put_it(within, is_new, tmp_path):
    state, path = network().state_dict(), tmp_path / "network.pth"
    torch.save(within(state), path, _use_new_zipfile_serialization=is_new)
    found = weights.read(path)
    assert list(found.tensors) == list(state)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.items())
    assert (found.told, found.notes) == ({"from": "file", "file": str(path)}, ())


def test_a_safetensors_file_is_read_in_the_order_of_numbers(tmp_path):
    path = tmp_path / "network.safetensors"
    safetensors.torch.save_file(network().state_dict(), path)
    found = weights.read(path)
    assert list(biases.signs(found.tensors)) == NORMS
    assert found.notes == (weights.BY_NAME,)
    assert biases.signs(found.tensors) == biases.signs(network().state_dict())


def test_a_table_that_holds_itself_ends(tmp_path):
    held = {}
    held["model"] = held
    torch.save(held, tmp_path / "network.pt")
    with pytest.raises(SpecError, match="holds no tensors by name"):
        weights.read(tmp_path / "network.pt")


class Net(nn.Module):
    pass


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def cut(path, number):
    path.write_bytes(path.read_bytes()[:number])


REFUSED = {
    "module": (lambda p: torch.save(Net(), p), r"needs code to be read, test_weights\.Net\."),
    "harm": (lambda p: torch.save({"x": Harmful()}, p), r"needs code to be read, posix\.mkdir\."),
    "old": (
        lambda p: torch.save({"x": Harmful()}, p, _use_new_zipfile_serialization=False),
        r"needs code to be read, posix\.mkdir\.",
    ),
    "cut": (lambda p: (torch.save(network().state_dict(), p), cut(p, 900)), "cannot be read"),
    "text": (lambda p: p.write_text("hello\n"), "cannot be read"),
    "empty": (lambda p: p.touch(), "cannot be read"),
    "missing": (lambda p: None, "No such file"),
    "folder": (lambda p: p.mkdir(), "Is a directory"),
    "tensor": (lambda p: torch.save(torch.ones(3), p), "holds no tensors by name"),
    "list": (lambda p: torch.save([1, {"a": 2}], p), "holds no tensors by name"),
}


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("name", REFUSED)
def test_another_file_is_refused_by_one_line_and_runs_nothing(name, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = REFUSED[name]
    make(tmp_path / f"file{suffix}")
    with pytest.raises(SpecError, match=message) as refused:
        weights.read(tmp_path / f"file{suffix}")
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path}/file{suffix} must be a whole file")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_of_torchscript_is_refused(tmp_path):
    script_file = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.ReLU()), script_file)
    with pytest.raises(SpecError, match="needs code to be read, of TorchScript"):
        weights.read(script_file)


@pytest.mark.parametrize("name", ["cut", "text", "empty", "missing", "folder"])
def test_another_safetensors_file_is_refused(name, tmp_path):
    path = tmp_path / "file.safetensors"
    if name == "cut":
        safetensors.torch.save_file(network().state_dict(), path)
        cut(path, 900)
    else:
        REFUSED[name][0](path)
    with pytest.raises(SpecError, match="must be a whole file") as refused:
        weights.read(path)
    assert "\n" not in str(refused.value)


# -- torchvision's ---------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Torchvision as far as it is asked, and torch.hub's folder with one file."""
    content = tmp_path / "content"
    torch.save(network().state_dict(), content)
    name = f"vgg11_bn-{hashlib.sha256(content.read_bytes()).hexdigest()[:8]}.pth"
    urls = {"vgg11_bn": f"https://download.example/models/{name}"}

    def get_model_weights(name):
        return {
            "IMAGENET1K_V1": SimpleNamespace(url=urls.get(name, f"https://x/{name}-0123abcd.pth"))
        }

    models = SimpleNamespace(get_model_weights=get_model_weights)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    content.rename(folder / name)
    return folder


def test_torchvisions_weights_are_read_from_the_cache(hub):
    found = verbs.biases("vgg11_bn")
    (path,) = hub.iterdir()
    assert found["of"] == {
        "from": "torchvision", "name": "vgg11_bn", "version": "IMAGENET1K_V1", "file": str(path),
    }  # fmt: skip
    assert [row["layer"] for row in found["layers"]] == NORMS
    assert found["all"] == {
        "num_biases": 24, "num_negative": 16, "num_zero": 0, "negative": pytest.approx(2 / 3),
    }  # fmt: skip


@pytest.mark.parametrize("name", weights.PRETRAINED[1:])
def test_a_file_that_is_not_in_the_cache_is_named_and_not_fetched(hub, name, monkeypatch):
    def fetch(*_, **__):
        raise AssertionError("downloads")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(SpecError, match=rf"got no {name}-0123abcd.pth in {hub}. Fetch it from"):
        verbs.biases(name)


def test_a_file_of_another_content_is_refused(hub):
    (path,) = hub.iterdir()
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(SpecError, match="SHA-256 beginning with"):
        verbs.biases("vgg11_bn")


def test_torchvision_must_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(SpecError, match=r"must be installed.*pip install torchvision"):
        verbs.biases("resnet18")


# -- runs, and the command -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small residual network's run on the digits."""
    of = expand(
        small.study(
            num_seeds=1,
            levels=1,
            arms=["dense", "ticket"],
            model={"kind": "resnet-20", "width": 0.25},
            recipe=small.RECIPE | {"steps": 4, "eval_every": 2},
        )
    )
    lab = small.trained(of, tmp_path_factory.mktemp("biases") / "lab")
    yield lab.folder, next(iter(of.runs))
    lab.close()


@pytest.mark.slow
def test_of_a_run_what_its_relus_pass_of_the_validation_part_is_told(trained):
    folder, address = trained
    told = verbs.biases(address[:10], lab=folder)
    most = "Most" if told["all"]["negative"] > 0.5 else "At most half of the"
    assert told["answer"][0].startswith(f"{most} BatchNorm biases are negative: ")
    assert told["of"] == {"from": "run", "address": address, "lab": str(folder)}
    found = weights.trained(Lab(folder, readonly=True), address)
    assert len(found.inputs) == 300
    relus = biases.passed(found.network, found.inputs, batch_size=7)
    assert told["summary"] == biases.summary(biases.signs(found.tensors), relus)
    paired = {row["layer"]: row["relu"] for row in told["layers"]}
    assert (paired["norm1"], paired["stage2.block1.norm2"]) == ("relu1", None)
    assert {row["relu"] for row in told["relus"] if row["norm"] is None} == {
        f"stage{stage}.block{block}.relu2" for stage in (1, 2, 3) for block in (1, 2, 3)
    }
    assert told["answer"][1].startswith("Its ReLUs pass ")


@pytest.mark.slow
def test_the_file_that_a_lab_keeps_of_a_run_says_the_same(trained):
    folder, address = trained
    of_run = verbs.biases(address, lab=folder)
    of_file = verbs.biases(folder / "weights" / f"{address}.safetensors")
    assert of_file["all"] == of_run["all"]
    assert [row["layer"] for row in of_file["layers"]] == [row["layer"] for row in of_run["layers"]]
    assert of_file["relus"] == []


@pytest.mark.slow
def test_a_run_without_its_data_tells_its_biases_alone(trained, monkeypatch):
    folder, address = trained

    def lost(*_):
        raise SpecError("`data` must be there; got nothing.")

    monkeypatch.setattr("windfall.worker.datasets.load", lost)
    lab = Lab(folder)
    lab.remember("0" * 64, "small", {"flops": [address], "input_shape": [1, 8, 8],
                                     "num_classes": 10})  # fmt: skip
    lab.close()
    told = verbs.biases(address, lab=folder)
    assert (told["relus"], told["layers"][0]["passes"]) == ([], None)
    assert "the run's data cannot be read: `data` must be there" in told["notes"][0]


@pytest.mark.slow
def test_the_command_prints_the_table_or_the_document(trained, call):  # noqa: F811
    folder, address = trained
    document = json.loads(call("biases", address[:12], "--lab", folder, "--json").stdout)
    assert document == json.loads(json.dumps(verbs.biases(address, lab=folder)))
    told = call("biases", address[:12], "--lab", folder).stdout
    assert "stage3.block3.norm2" in told
    assert "read by ReLU" in told
    assert document["answer"][0].partition(",")[0] in " ".join(told.split())


def test_the_command_prints_what_a_file_has(call, tmp_path):  # noqa: F811
    held = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(1)).state_dict()
    held |= {"[red]x.running_mean": torch.ones(3), "[red]x.bias": -torch.ones(3)}
    held["0.bias"] = torch.tensor([-1.0, 2.0])
    torch.save(held, tmp_path / "net.pth.tar")
    told = " ".join(call("biases", "net.pth.tar").stdout.split())
    assert "[red]x │ 3 │ 3 │ 0 │ 100.0" in told
    assert "BatchNorm biases of net.pth.tar" in told
    assert "read by" not in told
    assert (
        "Most BatchNorm biases are negative: 66.7 % of 6, 33.3 % in the lower half of its 3 layers"
        " and 100 % in the upper, 1 of exactly 0 not among them." in told
    )


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("nowhere.pt", "nowhere.pt must be a whole file"),
        ("vgg11", "A trained network must be .*; got 'vgg11'. Did you mean `vgg11_bn`?"),
        ("lottery", "beginning of a finished run's address; got 'lottery'"),
        ("", "got ''"),
        ("abc", "in the lab .*, or a file of tensors, .* has trained; got 'abc'. .*resnet101"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(which, message, lab, call):  # noqa: F811
    told = call("biases", which, "--lab", lab.folder, exit_code=2).stderr
    assert re.search(message.replace("?", r"\?"), told)
    assert told.startswith("windfall: ")
    assert told.count("\n") == 1
