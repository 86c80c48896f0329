"""Weights: trained networks of any origin: a file, torchvision's by name, a run of a lab.

Files are of safetensors, or written by `torch.save` and read as tensors alone: one that needs code
to be read is refused. Nothing is downloaded.

    found = weights.named("resnet18.pth") or weights.trained(lab, address)
    found.tensors["bn1.bias"]
"""

import hashlib
import importlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from windfall import biases, exports, structure
from windfall.masks import Params
from windfall.spec import Json, SpecError, nearest
from windfall.store import Lab

SUFFIXES = (".safetensors", ".pt", ".pth")
PRETRAINED = (
    *("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
    *("resnet18", "resnet34", "resnet50", "resnet101"),
)
VERSION = "IMAGENET1K_V1"  # of torchvision's weights: those there were in 2019
WITHIN = ("state_dict", "model")  # where files of training keep a network's tensors
BY_NAME = (
    "A safetensors file keeps no order: the layers are in that of their names, numbers as numbers."
)


@dataclass(frozen=True)
class Found:
    """A network's tensors, and what is known of it beside.

    Args:
        tensors: parameters and buffers by name, in the network's order as far as it is known.
        told: what it is, JSON-able.
        notes: what is to be said of it.
        network: itself, in evaluation mode; None where only its tensors are known.
        inputs: those of its validation part, as it is given them; None where they are not known.
    """

    tensors: Params
    told: Json
    notes: tuple[str, ...] = ()
    network: nn.Module | None = None
    inputs: Tensor | None = None

    def document(self) -> Json:
        """What `biases.document` tells, what it is `of`, and `notes`.

        Raises:
            SpecError: when there are no BatchNorm biases.
        """
        signs, relus = biases.signs(self.tensors), list[biases.Relu]()
        if self.network is not None and self.inputs is not None:
            relus = biases.passed(self.network, self.inputs)
        return {"of": self.told, **biases.document(signs, relus), "notes": [*self.notes]}


def named(which: str | Path) -> Found | None:
    """The network of a file, or torchvision's of a name; None if it may be a run's address.

    Raises:
        SpecError: when it is none of these; when the file cannot be read as tensors alone, or is
            not where torchvision keeps it.
    """
    if str(which) in PRETRAINED:
        return pretrained(str(which))
    path = Path(which)
    if path.suffix in SUFFIXES or path.is_file():
        return read(path)
    if re.fullmatch(r"[0-9a-f]{1,64}", str(which)):
        return None
    raise SpecError(
        "A trained network must be a file of tensors, one that torchvision has trained, or the"
        f" beginning of a finished run's address; got {str(which)!r}."
        f"{nearest(str(which), [*PRETRAINED])}"
    )


def trained(lab: Lab, address: str) -> Found:
    """The network of a finished run, masked, by its whole address.

    Raises:
        SpecError: as `exports.rebuilt`.
    """
    run = exports.rebuilt(lab, address)
    why = "What its ReLUs pass is not known, for the run's data cannot be read:"
    notes = () if run.reason is None else (f"{why} {run.reason}",)
    told = {"from": "run", "address": address, "lab": str(lab.folder)}
    return Found(structure.tensors(run.network), told, notes, run.network, run.inputs)


def pretrained(name: str) -> Found:
    """The weights that torchvision names, from torch.hub's cache folder.

    Args:
        name: one of `PRETRAINED`.

    Raises:
        SpecError: when torchvision is not installed, or the file is not there and whole.
    """
    try:
        zoo: Any = importlib.import_module("torchvision.models")
        url = str(zoo.get_model_weights(name)[VERSION].url)
    except Exception as problem:  # one built for another torch raises what it likes
        raise SpecError(
            f"`{name}` must be looked up in torchvision 0.14 or newer, which must be installed; it"
            f" raised {problem!r}. Install the one for this torch, pip install torchvision, or name"
            " the weights' file."
        ) from problem
    path = Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(urlparse(url).path).name
    if not path.is_file():
        raise SpecError(
            f"`{name}` must be in torch.hub's folder, for nothing is downloaded; got no"
            f" {path.name} in {path.parent}. Fetch it from {url}."
        )
    _check_digest(path)
    told = {"from": "torchvision", "name": name, "version": VERSION, "file": str(path)}
    return Found(read(path).tensors, told)


def _check_digest(path: Path) -> None:
    """Torchvision's files are named by the beginning of their SHA-256."""
    wanted = re.search(r"-([0-9a-f]{8,})$", path.stem)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if wanted is not None and not found.startswith(wanted[1]):
        raise SpecError(
            f"{path} must be torchvision's, its SHA-256 beginning with {wanted[1]}; got"
            f" {found[:8]}. Fetch it again, or name another file."
        )


# -- files -----------------------------------------------------------------------------------------


def read(path: Path) -> Found:
    """The tensors of a network's file: its state dict, or where training has put that.

    Understood are state dicts, also in a table under `state_dict` or `model` and with `module.`
    before each name, and what a lab keeps of a run.

    Args:
        path: of safetensors if it ends so, else written by `torch.save`.

    Raises:
        SpecError: when it is not whole, holds no tensors by name, or needs code to be read.
    """
    try:
        is_safe = path.suffix == ".safetensors"
        held = _natural(safetensors.torch.load_file(path)) if is_safe else _loaded(path)
    except OSError as problem:
        raise _refused(path, problem.strerror or problem) from None
    except Exception as problem:  # whatever a reader raises of bytes that are no such file
        kind = type(problem).__name__
        said = str(problem) if kind == "UnpicklingError" else f"{kind}: {problem}"
        raise _refused(path, _needed(said)) from None
    tensors = _own(_within(held))
    if not tensors:
        raise _refused(path, "it holds no tensors by name")
    told = {"from": "file", "file": str(path)}
    return Found(tensors, told, (BY_NAME,) if is_safe else ())


def _loaded(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _refused(path: Path, why: object) -> SpecError:
    return SpecError(
        f"{path} must be a whole file of a network's tensors by name, which no code is needed to"
        f" read; {why}. Write one: torch.save(network.state_dict(), 'network.pt')."
    )


def _needed(problem: str) -> str:
    """Why a file was not read, in a line: the code that it needs, or what its reader said."""
    code = re.search(r"GLOBAL:? ([\w.]+)", problem, re.ASCII)
    if code is not None:
        return f"it needs code to be read, {code[1]}"
    if "TorchScript" in problem:
        return "it needs code to be read, of TorchScript"
    return f"it cannot be read ({problem.splitlines()[0].split('. ')[0].strip(' .:')})"


def _natural(tensors: Params) -> Params:
    """Tensors in the order of their names, the numbers in them as numbers."""

    def place(name: str) -> list[str | int]:
        parts = re.split(r"([0-9]+)", name)
        return [int(part) if index % 2 else part for index, part in enumerate(parts)]

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def _within(held: Any) -> Params:
    """The tensors of a table by name, or of the one in it that holds the network's."""
    for name in WITHIN * 2:  # a table may hold itself
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
    items = held.items() if isinstance(held, Mapping) else ()
    return {n: t.detach() for n, t in items if isinstance(n, str) and isinstance(t, Tensor)}


def _own(tensors: Params) -> Params:
    """The network's among a lab's tensors of a run, else all; without `module.` before them."""
    of_run = _under("params/", tensors)
    if of_run:
        return of_run | _under("buffers/", tensors)
    within = _under("module.", tensors)
    return within if len(within) == len(tensors) else tensors


def _under(prefix: str, tensors: Params) -> Params:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
