"""Parcels: a network as two files that hold no code, `.safetensors` and `.json`.

The one holds the tensors. The other says what network they are of: its model and the shapes that
are left of it, what it computes of one drawn input, and whatever else its writer tells. It knows
the other's SHA-256, and its own. To load them nothing is unpickled, no graph is traced, and no code
runs that a file names; what was built must compute the same again.

    for suffix, content in contents(network, document).items(): ...
    network = load_network("small.safetensors")
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from windfall import models, seeds, structure
from windfall.masks import Params
from windfall.models import UserModel
from windfall.spec import Json, SpecError, canonical, checked, digest, members, tag

FORMAT = 1
NEEDED = {"model", "input_shape", "num_classes", "outputs", "weights_sha256"}
TOLERANCE = 1e-4  # of the largest output, or of 1: other machines round otherwise, and no more

Build = Callable[[], nn.Module]


def contents(network: nn.Module, document: Json) -> dict[str, bytes]:
    """The contents of the two files, by suffix.

    Args:
        network: whose parameters and buffers they hold; in evaluation mode.
        document: what is told of it: `address`, `model`, `input_shape`, `num_classes`, and more.
    """
    own = structure.tensors(network)
    tensors = {name: tensor.detach().contiguous() for name, tensor in own.items()}
    content = safetensors.torch.save(tensors, {"address": document["address"]})
    told: Json = {
        "windfall-network": FORMAT,
        **document,
        "shapes": {name: list(shape) for name, shape in structure.shapes(tensors).items()},
        "outputs": _outputs(network, document["input_shape"]).tolist(),
        "weights_sha256": hashlib.sha256(content).hexdigest(),
    }
    told["sha256"] = digest(told)
    text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False)
    return {".safetensors": content, ".json": text.encode()}


def _outputs(network: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """What a network computes of an input drawn from the stream (0, "parcel"), in float64."""
    like = next(network.parameters(), torch.zeros(()))
    drawn = torch.from_numpy(seeds.stream(0, "parcel").standard_normal((1, *input_shape)))
    with seeds.isolated(0, "parcel"), torch.no_grad():
        return network(drawn.to(like.dtype)).double().flatten()


def load_network(path: str | Path, *, network: Build | None = None) -> nn.Module:
    """The network that `windfall export` wrote as `.safetensors` and `.json`, in evaluation mode.

    Its inputs are (x / peak - mean) / std, per channel, with what its document calls `inputs`.

    Args:
        path: of either file, or of both without their suffix.
        network: makes the whole network, of which the file's may be a smaller one. It must be given
            where that is your own: no file decides which code runs.

    Raises:
        SpecError: when the files are not whole and unchanged, or do not fit the network.
    """
    given = Path(path)
    if given.suffix not in (".json", ".safetensors"):
        given = given.with_name(f"{given.name}.safetensors")
    document = _document(given.with_suffix(".json"))
    tensors = _content(given.with_suffix(".safetensors"), document)
    whole = _whole(document, network, given)
    odd = structure.tensors(whole).keys() ^ tensors.keys()
    if odd:
        raise _misfit(given, f"`{min(odd)}` is in one of them alone")
    wanted = torch.tensor(document["outputs"], dtype=torch.float64)
    try:
        made = structure.given(whole, tensors)
        outputs = _outputs(made, document["input_shape"])
    except Exception as problem:  # a network that does not fit may do anything
        raise _misfit(given, f"the one made raised {problem!r}") from problem
    scale = max(1.0, float(wanted.abs().max()))
    if outputs.shape != wanted.shape or not (outputs - wanted).abs().max() <= TOLERANCE * scale:
        raise _misfit(given, "the one made computes something else")
    return made


def _misfit(path: Path, why: str) -> SpecError:
    return SpecError(f"`network` must make the network that {path} was made of; {why}.")


def _spoiled(path: Path, why: object) -> SpecError:
    return SpecError(
        f"{path} must be a file that `windfall export` wrote, whole and unchanged; {why}."
        " Export the run again."
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise _spoiled(path, problem.strerror) from None


def _document(path: Path) -> Json:
    content = _read(path)
    try:
        document: Any = json.loads(content)
        said, version = document.pop("sha256"), document["windfall-network"]
        is_same = digest(document) == said
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _spoiled(path, "it is no such document") from None
    if isinstance(version, int) and version > FORMAT:
        raise SpecError(
            f"{path} must be of format {FORMAT} or older; it was written by a newer windfall"
            f" (format {version}). Upgrade windfall."
        )
    if not is_same or not document.keys() >= NEEDED:
        raise _spoiled(path, "its text is not what was written")
    return document


def _content(path: Path, document: Json) -> Params:
    content = _read(path)
    if hashlib.sha256(content).hexdigest() != document["weights_sha256"]:
        raise _spoiled(path, "it is not the file that its .json was written with")
    return safetensors.torch.load(content)


def _whole(document: Json, network: Build | None, path: Path) -> nn.Module:
    if network is not None:
        made: Any = network()
        if not isinstance(made, nn.Module):
            raise SpecError(
                f"`network` must return an nn.Module; it returned {type(made).__name__}."
            )
        return made
    model, known = document["model"], members(models.Model)
    if model["kind"] == tag(UserModel):
        raise SpecError(
            f"`network` must be given: {path} is of your own network, {model['callable']}, and no"
            " file decides which code runs. Give the function: load_network(path, network=...)."
        )
    if model["kind"] not in known:
        raise _spoiled(path, f"this windfall has no network {canonical(model['kind'])}")
    spec: Any = checked(lambda: known[model["kind"]].from_json(model))
    with seeds.isolated(0, "build"):
        return spec.build(tuple(document["input_shape"]), document["num_classes"])
