"""Checkups: what goes through a network of any origin, and what ails it.

A `Checkup` is a fresh network and a batch; a finished run of a lab has both of its own:

    document = examined(fresh(Checkup(model="vgg-11", shape=(3, 32, 32))))
    document["answer"][0]
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, PositiveInt, model_validator
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from windfall import data as data_sets
from windfall import diagnosis, exports, models, seeds, signals
from windfall.data import Data, Digits, UserData
from windfall.initialize import GlorotNormal, Initialization, TorchDefault, initial_parameters
from windfall.masks import Params
from windfall.models import Model, ModelField, UserModel
from windfall.spec import Json, Spec, SpecError, checked, members, merge, nearest, tag
from windfall.store import Lab

NUM_INPUTS = 64  # dead units and correlations of so many are known to a few percent

Shape = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
Number = Annotated[int, Field(ge=2)]  # of inputs: correlations are of pairs
Seed = Annotated[int, Field(ge=0)]


def zoo() -> list[str]:
    """The names of the zoo's networks."""
    return [name for name in members(Model) if name != tag(UserModel)]


def is_fresh(which: Any) -> bool:
    """Whether it is a network to be made; False if it may be the beginning of a run's address.

    Raises:
        SpecError: when it is neither.
    """
    if not isinstance(which, str) or ":" in which or which in zoo():
        return True
    if re.fullmatch(r"[0-9a-f]{1,64}", which):
        return False
    raise SpecError(
        "MODEL must be a network of the zoo, a function that makes one, `package.module:function`,"
        f" or the beginning of a finished run's address; got {which!r}.{nearest(which, zoo())}"
    )


def _named(data: Any) -> Any:
    return UserData(callable=data) if isinstance(data, str) and ":" in data else data


class Checkup(Spec):
    """A fresh network and the inputs that it is looked at with.

    Args:
        model: the network, or a callable that returns an `nn.Module`.
        data: of whose training part inputs and labels are.
        shape: of one input; then inputs are Gaussian, of deviation 1, and there are no labels.
        num_classes: of a network of the zoo where there are no labels.
        initialization: None is the Gaussian Glorot for the zoo, and what the constructor does for a
            user's own network, as in a study.
        num_inputs: of the batch, at least 2.
        seed: of the network's weights, of the batch and of all that is drawn.
    """

    model: ModelField
    data: Annotated[Data, BeforeValidator(_named)] = Digits()
    shape: Shape | None = None
    num_classes: PositiveInt = 10
    initialization: Initialization | None = None
    num_inputs: Number = NUM_INPUTS
    seed: Seed = 0

    @model_validator(mode="after")
    def _has_one_batch(self) -> "Checkup":
        given = self.model_fields_set
        if self.shape is not None and "data" in given:
            raise ValueError("`shape` must be left out where `data` is given: it has a shape")
        if self.shape is None and "num_classes" in given:
            raise ValueError("`num_classes` must be left out without `shape`: `data` says it")
        return self


class Batch(Spec):
    """Of a run, how much of its own validation part it is looked at with.

    Args:
        shape: of Gaussian inputs in its stead, without labels.
        num_inputs: as of `Checkup`.
        seed: as of `Checkup`.
    """

    shape: Shape | None = None
    num_inputs: Number = NUM_INPUTS
    seed: Seed = 0


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Args:
        told: what it is, JSON-able.
        settings: of the checkup.
        network: itself.
        inputs: [sample, ...].
        labels: [sample]; None where there are none.
        tensors: that stand for the network's, by name.
        seed: of what is drawn.
        notes: what is to be said of it.
    """

    told: Json
    settings: Json
    network: nn.Module
    inputs: Tensor
    labels: Tensor | None
    tensors: Params
    seed: int
    notes: tuple[str, ...] = ()


def _nested(base: Json, settings: Mapping[str, Any]) -> Json:
    """Settings with some changed by path, such as `model.width`."""
    for path, value in settings.items():
        parts = reversed(path.split("."))
        base = merge(base, functools.reduce(lambda inner, part: {part: inner}, parts, value))
    return base


def checkup(model: Any, settings: Mapping[str, Any]) -> Checkup:
    """A checkup of a fresh network, from settings by path.

    Raises:
        SpecError: when there is no such setting, or it cannot be.
    """
    if any(path.partition(".")[0] == "model" and "." not in path for path in settings):
        raise SpecError("`model` must be left out of `--set`: MODEL names it.")
    return checked(lambda: Checkup.model_validate(_nested({"model": model}, settings)))


def fresh(chosen: Checkup) -> Subject:
    """A network as its training would begin.

    Raises:
        SpecError: when the model cannot be built, called, or does not fit the data.
    """
    inputs, labels, num_classes, notes = _batch(chosen)
    shape = tuple(inputs.shape[1:])
    is_own = isinstance(chosen.model, UserModel)
    begun_by = chosen.initialization or (TorchDefault() if is_own else GlorotNormal())
    name = chosen.model.callable if isinstance(chosen.model, UserModel) else tag(type(chosen.model))

    def build() -> nn.Module:
        return chosen.model.build(shape, num_classes)

    with seeds.isolated(chosen.seed, "build"):
        network = build()
    if labels is not None:
        models.check_outputs(network, shape, num_classes, name)
        models.check_gradients(network, shape, name)
    params, buffers = initial_parameters(build, begun_by, chosen.seed, inputs=lambda: inputs)
    told = {"from": "user" if is_own else "zoo", "name": name, "begun_by": begun_by.to_json()}
    other = ("data",) if labels is None else ("shape", "num_classes")
    settings = {k: v for k, v in chosen.to_json(addressed=False).items() if k not in other}
    return Subject(
        told, settings, network, inputs, labels, params | buffers, chosen.seed, (*notes,)
    )


def _batch(chosen: Checkup) -> tuple[Tensor, Tensor | None, int, list[str]]:
    if chosen.shape is not None:
        inputs = _gaussian(chosen.shape, chosen.num_inputs, chosen.seed)
        return inputs, None, chosen.num_classes, []
    loaded = data_sets.load(chosen.data)
    some = _some(len(loaded.train), chosen.num_inputs, chosen.seed)
    inputs = loaded.prepare(loaded.train.inputs[some], torch.float32)
    notes = [] if loaded.note is None else [loaded.note]
    return inputs, loaded.train.labels[some], loaded.num_classes, notes


def _gaussian(shape: tuple[int, ...], num: int, seed: int) -> Tensor:
    return torch.from_numpy(
        seeds.stream(seed, "check-inputs").standard_normal((num, *shape))
    ).float()


def _some(num_all: int, num: int, seed: int) -> Tensor:
    return torch.from_numpy(seeds.stream(seed, "check-batch").permutation(num_all)[:num])


def of_run(lab: Lab, address: str, settings: Mapping[str, Any]) -> Subject:
    """The network of a finished run, masked, with inputs of its validation part.

    Args:
        lab: where the run is; only read.
        address: of the run, whole.
        settings: of `Batch`, by name.

    Raises:
        SpecError: as `exports.rebuilt`; when its data cannot be read and no shape is given.
    """
    batch = checked(lambda: Batch.model_validate(dict(settings)))
    run = exports.rebuilt(lab, address)
    told = {"from": "run", "name": address[:12], "address": address, "lab": str(lab.folder)}
    if batch.shape is not None:
        inputs, labels = _gaussian(batch.shape, batch.num_inputs, batch.seed), None
    elif run.inputs is None:
        raise SpecError(
            f"RUN must have data that can be read; {run.reason} Or take random inputs of its shape:"
            " `--set shape=[3,32,32]`."
        )
    else:
        some = _some(len(run.inputs), batch.num_inputs, batch.seed)
        inputs, labels = run.inputs[some], None if run.labels is None else run.labels[some]
    return Subject(told, batch.to_json(), run.network, inputs, labels, {}, batch.seed)


def examined(subject: Subject) -> Json:
    """What goes through a network and what ails it, as one document without NaN.

    Returns:
        `of`, `settings`, what `signals.Signals.document` tells, the findings under `diagnosis`, the
        `answer` in words, and `notes`.
    """
    found = signals.measured(
        subject.network,
        subject.inputs,
        subject.labels,
        tensors=subject.tensors,
        seed=subject.seed,
    )
    document = found.document()
    findings = diagnosis.diagnosed(document)
    return {
        "of": subject.told,
        "settings": subject.settings,
        "diagnosis": [each.to_json() for each in findings],
        "answer": diagnosis.answer(document, findings),
        **document,
        "notes": [*subject.notes],
    }


# -- in a terminal ---------------------------------------------------------------------------------

_COLUMNS = ("|h|/|x|", "|g|/|g_L|", "variance", "dead, %", "on, %", "alike", "rank", "gain")


def table(document: Json) -> RenderableType:
    """The diagnosis, and a row for every layer."""
    lead, *more = document["answer"]
    rows = Table("layer", title=Text(f"Signals of {document['of']['name']}"), caption=_caption)
    for column in _COLUMNS:
        rows.add_column(column, justify="right")
    for row in document["layers"]:
        rows.add_row(*map(escape, _cells(row)))
    notes = [Text(f"Note: {note}", style="dim") for note in document["notes"]]
    told = [Text(line) for line in (*more, *_sums(document))]
    return Group(Text(lead, style="bold"), *told, Text(), rows, *notes)


_caption = Text("means over inputs; rank: effective; gain: of a layer, scale out over scale in")


def _cells(row: Json) -> list[str]:
    if row["nonfinite"]:
        return [row["name"], *(row["nonfinite"] if i == 0 else "-" for i in range(len(_COLUMNS)))]
    ratios = [None if row[way] is None else row[way]["mean"] for way in ("forward", "backward")]
    shares = [None if row[key] is None else 100 * row[key] for key in ("dead", "always_on")]
    own = [row[key] for key in ("correlation", "effective_rank", "gain")]
    cells = [_cell(value) for value in (*ratios, row["variance"], *shares, *own)]
    cells[1] = row["gradient_nonfinite"] or cells[1]
    return [row["name"], *cells]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _sums(document: Json) -> list[str]:
    """What is told of the whole: the inputs, the loss, the Jacobian."""
    inputs, outputs, found = (document[name] for name in ("inputs", "outputs", "jacobian"))
    told = [f"{inputs['num']} inputs of scale {_cell(inputs['scale'])}"]
    if outputs["scale"] is not None:
        told.append(f"outputs of deviation {_cell(outputs['scale'])}")
    if outputs["loss"] is not None:
        told.append(f"loss {_cell(outputs['loss'])} (chance {_cell(outputs['chance_loss'])})")
    if found is not None:
        values = ", ".join(map(_cell, found["top"]))
        how = "" if found["is_exact"] else ", estimated"
        told.append(
            f"largest singular values of the input-output Jacobian {values}, mean square"
            f" {_cell(found['mean_square'])}{how}"
        )
    return [f"{'; '.join(told)}."]
