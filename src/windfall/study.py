"""Studies: many networks that differ in exactly one thing, as a value.

A study is expanded into its graph of runs, which can be listed and costed before anything is
trained. Settings come from Python or from TOML, where `extends` names a study to start from.

    study = load("lottery", {"num_seeds": 5, "model.hidden": [100, 50]})
    graph = expand(study)
    len(graph.runs)
"""

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator, model_validator
from torch import nn

from windfall import flops, seeds, structure
from windfall import models as zoo
from windfall import prune as pruning
from windfall.arms import (
    DESIGNS,
    SHIFT,
    Arm,
    Dense,
    Design,
    Family,
    Finetune,
    Random,
    Reinit,
    Rewind,
    Ticket,
    sized,
)
from windfall.data import Data, Dataset, UserData, tensors
from windfall.data import load as load_data
from windfall.engines.rule import Asked
from windfall.filters import ChannelCriterion
from windfall.initialize import GlorotNormal, Initialization, TorchDefault
from windfall.models import Kind, Model, ModelField, UserModel
from windfall.prune import LearningRate, Prune, ToStep
from windfall.runs import Fresh, Pruned, Run
from windfall.samples import stacked
from windfall.selection import uniform
from windfall.spec import Json, Spec, SpecError, checked, digest, nearest, tag, unaddressed
from windfall.structure import Channels, Group
from windfall.train import Recipe

Metric = Literal["test_accuracy", "test_accuracy_at_early_stop", "early_stop_step", "mask_overlap"]


def _given(data: Any) -> Any:
    """Data as a user gives it: a spec, a name, a function's name, tensors, or a `Dataset`."""
    if isinstance(data, str) and ":" in data:
        return UserData(callable=data)
    if data is None or isinstance(data, Spec | Mapping | str | int | float):
        return data
    try:
        train, test = stacked(data)
        return tensors(*train, test)
    except SpecError as problem:
        raise ValueError(f"must be tensors or a Dataset; {problem}") from None


class Study(Spec):
    """A study: arms x levels x seeds of one network, data set and recipe.

    Args:
        name: names the page and the record; letters, digits, `-` and `_`.
        title: one line.
        question: what is asked, a sentence.
        num_seeds: number of paired seeds, 0 to num_seeds - 1.
        model: the network, or a callable that returns an `nn.Module`.
        data: the data set; or a pair of tensors (inputs, labels), a map-style `Dataset`, or a pair
            (train, test) of either.
        initialization: of the weights; None is the paper's Gaussian Glorot for the zoo, and what
            the constructor does for a user's own network.
        recipe: how every network is trained.
        prune: how masks are found.
        one_shot: prune the dense run to every level at once, not level by level.
        arms: what is compared; the dense run belongs to every study.
        levels: number of levels, 1 to `levels`, beside the dense level 0.
        verdict_level: the level whose comparisons get a verdict; None is the last.
        metric: what verdicts are about.
        margin: of equivalence, in the metric's unit; None is 0.005 (half a percentage point), or
            `recipe.eval_every` steps for `early_stop_step`.
        intervals: Student's t, or BCa bootstrap.
        engine: which engine trains; `auto` is the fixed rule.
    """

    name: str = Field(default="study", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)
    title: str = unaddressed("")
    question: str = unaddressed("")
    num_seeds: int = Field(default=10, ge=1, lt=SHIFT)
    model: ModelField
    data: Annotated[Data, BeforeValidator(_given)]
    initialization: Initialization | None = None
    recipe: Recipe = Recipe()
    prune: Prune = Prune()
    one_shot: bool = False
    arms: tuple[Arm, ...] = (Dense(), Ticket(), Reinit(), Finetune())
    levels: int = Field(default=8, ge=1)
    verdict_level: int | None = Field(default=None, ge=1)
    metric: Metric = "test_accuracy"
    margin: float | None = Field(default=None, ge=0)
    intervals: Literal["t", "bca"] = "t"
    engine: Asked = unaddressed("auto")

    @field_validator("arms", mode="before")
    @classmethod
    def _one_arm(cls, arms: Any) -> Any:
        return (arms,) if isinstance(arms, str) else arms

    @field_validator("arms")
    @classmethod
    def _sized(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        return sized(arms)

    @model_validator(mode="after")
    def _is_consistent(self) -> "Study":
        if self.verdict_level is not None and self.verdict_level > self.levels:
            raise ValueError(
                f"`verdict_level` must be at most `levels`, {self.levels}; got {self.verdict_level}"
            )
        kinds = [tag(type(arm)) for arm in self.arms]
        twice = {kind for kind in kinds if kinds.count(kind) > 1}
        if twice:
            raise ValueError(f"`arms` must differ; got `{min(twice)}` twice")
        for arm in self.arms:
            if isinstance(arm, Rewind):
                _fits(arm.to, self.recipe.steps)
            if isinstance(arm, Design):
                _fits_stages(arm, self.model)
        if self.metric == "mask_overlap" and "ticket" not in kinds:
            raise ValueError("`arms` must include `ticket` when `metric` is mask_overlap")
        if self.prune.is_structured:
            self._fits_channels(kinds)
        return self

    def _fits_channels(self, kinds: list[str]) -> None:
        for kind in kinds:
            if kind in ("shuffled", "random"):
                raise ValueError(
                    f"`arms` must not include `{kind}` where `prune.structure` is channels: it"
                    " arranges masks"
                )
        if self.metric == "mask_overlap":
            raise ValueError("`metric` must be of a training where `prune.structure` is channels")

    @property
    def decided_level(self) -> int:
        """The level whose comparisons get a verdict."""
        return self.levels if self.verdict_level is None else self.verdict_level

    @property
    def decided_margin(self) -> float:
        """The margin in the metric's unit."""
        if self.margin is not None:
            return self.margin
        return float(self.recipe.eval_every) if self.metric == "early_stop_step" else 0.005

    @property
    def begun_by(self) -> Initialization:
        """The initialization of every fresh network."""
        if self.initialization is not None:
            return self.initialization
        return TorchDefault() if isinstance(self.model, UserModel) else GlorotNormal()


def _fits(to: pruning.Rewind, steps: int) -> None:
    match to:
        case ToStep(step=step) if step >= steps:
            problem = f"step` must be less than `recipe.steps`, {steps}; got {step}"
        case LearningRate(steps=replayed) if replayed > steps:
            problem = f"steps` must be at most `recipe.steps`, {steps}; got {replayed}"
        case _:
            return
    raise ValueError(f"`arms.rewind.to.{problem}")


def _fits_stages(arm: Design, model: Model) -> None:
    try:
        arm.design(model)
    except SpecError as problem:
        raise ValueError(f"`arms.{tag(type(arm))}` must fit the network: {problem}") from None


@dataclass(frozen=True)
class Node:
    """One place in a study: an arm at a level with a seed, and the address of its run."""

    arm: str
    level: int
    seed: int
    address: str


@dataclass(frozen=True)
class Network:
    """What is known of a study's network before it is trained.

    Args:
        sizes: number of weights of every prunable tensor.
        kinds: its kind of layer.
        multiply_adds: per example, of the dense network, per tensor.
        input_shape: of one example.
        num_classes: of its output.
        shapes: of its parameters and buffers.
        groups: its groups of channels, where channels are pruned.
    """

    sizes: dict[str, int]
    kinds: dict[str, Kind]
    multiply_adds: dict[str, int]
    input_shape: tuple[int, ...]
    num_classes: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    groups: tuple[Group, ...] = ()

    def kept(self, prune: Prune, level: int) -> dict[str, int | Fraction]:
        """The number of weights that a level keeps of every tensor.

        How a global threshold falls on what it pools is only known after training; it is taken to
        be even.

        Raises:
            SpecError: when a tensor would be emptied; the message names it.
        """
        sizes = self.sizes
        if prune.is_structured:
            return self._beside_channels(prune, level)
        counts = prune.selection.counts(sizes, self.kinds, level)
        return counts | _evenly(counts, sizes)

    def _beside_channels(self, prune: Prune, level: int) -> dict[str, int | Fraction]:
        assert isinstance(prune.structure, Channels)
        sizes = {name: group.size for name, group in prune.structure.of(self.groups).items()}
        counts = prune.selection.counts(sizes, self.kinds, level)
        even = {name: max(1, round(count)) for name, count in _evenly(counts, sizes).items()}
        stay = {group.name: group.size for group in self.groups} | counts | even
        channels = {g.name: torch.arange(g.size) < stay[g.name] for g in self.groups}
        like = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        left = {
            name: math.prod(int(positions.sum()) for positions in axes.values())
            * math.prod(n for axis, n in enumerate(self.shapes[name]) if axis not in axes)
            for name, axes in structure.alive(self.groups, channels, like).items()
        }
        return {name: left.get(name, size) for name, size in self.sizes.items()}


@dataclass(frozen=True)
class Graph:
    """A study's runs.

    Args:
        study: whose they are.
        nodes: every place in the study, in order of level, arm, seed.
        runs: every run once, by address, parents before children.
        keep: the steps at which a run keeps a snapshot for its children.
        network: of the study.
        counts: number of prunable weights kept, by level.
        note: on the data, printed beside every number; or None.
        designs: other networks than the study's, by their models.
    """

    study: Study
    nodes: tuple[Node, ...]
    runs: dict[str, Run]
    keep: dict[str, frozenset[int]]
    network: Network
    counts: dict[int, int]
    note: str | None
    designs: Mapping[Model, Network] = field(default_factory=dict[Model, Network])

    def network_of(self, address: str) -> Network:
        """The network that a run trains, whole."""
        return self.designs.get(self.runs[address].model, self.network)

    def weights(self, node: Node) -> int:
        """The number of prunable weights of an arm at a level: kept, or a design's own."""
        if node.arm in DESIGNS:
            return sum(self.network_of(node.address).sizes.values())
        return self.counts[node.level]

    def density(self, level: int) -> float:
        """Fraction of the prunable weights kept at a level."""
        return self.counts[level] / sum(self.network.sizes.values())

    def flops(self, address: str) -> float:
        """Training FLOPs of a run, counted on surviving weights (see `windfall.flops`).

        How a global threshold falls on the layers it pools is only known after training; it is
        taken to be even.
        """
        run, (first, last) = self.runs[address], self.clock(address)
        macs = self._multiply_adds(address)
        return flops.training_flops(macs, run.recipe.batch_size, last - first)

    def clock(self, address: str) -> tuple[int, int]:
        """The first step of a run's training and the one after the last; see `flops`."""
        run = self.runs[address]
        if run.budget is None:
            return run.clock
        whole = sum(self.network_of(address).multiply_adds.values())
        return 0, run.trained_by(whole, max(1, self._multiply_adds(address))).steps

    def _multiply_adds(self, address: str) -> int:
        network, kept = self.network_of(address), self.kept(address)
        uses, sizes = network.multiply_adds, network.sizes
        return round(sum(Fraction(uses[name]) * kept[name] / sizes[name] for name in uses))

    def kept(self, address: str) -> Mapping[str, int | Fraction]:
        """The number of weights that a run keeps of every tensor; see `flops`."""
        sizes, start = self.network_of(address).sizes, self.runs[address].start
        if isinstance(start, Fresh):
            return sizes
        if start.arrange == "uniform":
            return uniform(sizes, self.counts[start.level])
        return self.network.kept(start.prune, start.level)


def _evenly(counts: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, Fraction]:
    """What a pool counted under "" keeps of each tensor that is not counted by itself."""
    pool = {name: size for name, size in sizes.items() if name not in counts}
    even = Fraction(counts.get("", 0), sum(pool.values()) or 1)
    return {name: size * even for name, size in pool.items()}


def expand(study: Study) -> Graph:
    """The study's graph of runs.

    Raises:
        SpecError: when data, network and pruning do not fit together; nothing has been trained.
    """
    data = load_data(study.data)
    network = _inspect(study, data)
    counts = {level: _num_kept(study.prune, network, level) for level in range(1, study.levels + 1)}
    if any(isinstance(arm, Random) for arm in study.arms):
        for count in counts.values():
            uniform(network.sizes, count)
    base = Run(
        model=study.model, data=study.data, data_sha256=data.sha256, recipe=study.recipe, seed=0
    )
    nodes, runs = [], dict[str, Run]()
    for seed in range(study.num_seeds):
        family = Family(
            base,
            study.prune,
            study.begun_by,
            seed,
            one_shot=study.one_shot,
            input_shape=data.input_shape,
            num_classes=data.num_classes,
        )
        nodes += [Node(arm, level, seed, run) for arm, level, run in _places(study, family)]
        runs |= family.runs
    place = {tag(type(arm)): index for index, arm in enumerate((Dense(), *study.arms))}
    nodes.sort(key=lambda node: (node.level, place[node.arm]))
    totals = {0: sum(network.sizes.values()), **counts}
    others = dict.fromkeys(run.model for run in runs.values() if run.model != study.model)
    designs = {model: _looked_at(model, data)[1] for model in others}
    return Graph(study, tuple(nodes), runs, _snapshots(runs), network, totals, data.note, designs)


def _num_kept(prune: Prune, network: Network, level: int) -> int:
    """The number of weights that a level keeps: exact, but where channels share a threshold."""
    if prune.is_structured:
        return round(sum(network.kept(prune, level).values()))
    return sum(prune.selection.counts(network.sizes, network.kinds, level).values())


def _places(study: Study, family: Family) -> Iterator[tuple[str, int, str]]:
    yield "dense", 0, family.dense()
    for level in range(1, study.levels + 1):
        for arm in study.arms:
            is_here = level == study.decided_level or not isinstance(arm, Design)
            if is_here and not isinstance(arm, Dense):
                yield tag(type(arm)), level, arm.run(family, level)


def _inspect(study: Study, data: Dataset) -> Network:
    module, network = _looked_at(study.model, data)
    if study.recipe.penalty is not None:
        study.recipe.penalty.scales(module)
    return replace(network, groups=_groups(study, module, data.input_shape))


def _looked_at(model: Model, data: Dataset) -> tuple[nn.Module, Network]:
    shape = data.input_shape
    with seeds.isolated(0, "inspect"):
        module = model.build(shape, data.num_classes)
    zoo.check_outputs(module, shape, data.num_classes, tag(type(model)))
    kinds = zoo.kinds(module, shape)
    if not kinds:
        raise SpecError(
            f"`model` must have a Linear or Conv layer to prune; got {type(module).__name__}."
        )
    params = dict(module.named_parameters())
    sizes = {name: params[name].numel() for name in kinds}
    multiply_adds = flops.multiply_adds(module, shape)
    shapes = structure.shapes(params | dict(module.named_buffers()))
    return module, Network(sizes, kinds, multiply_adds, shape, data.num_classes, shapes)


def _groups(study: Study, module: nn.Module, shape: tuple[int, ...]) -> tuple[Group, ...]:
    prune = study.prune
    if not isinstance(prune.structure, Channels):
        return ()
    groups = structure.trace(module, shape)
    assert isinstance(prune.criterion, ChannelCriterion)
    prune.criterion.refuse(module, prune.structure.of(groups).values())
    return groups


def _snapshots(runs: dict[str, Run]) -> dict[str, frozenset[int]]:
    keep = dict.fromkeys(runs, frozenset[int]())
    for address, run in runs.items():
        weights = run.start.weights if isinstance(run.start, Pruned) else None
        if isinstance(weights, ToStep) and weights.step > 0:
            keep[root(runs, address)] |= {weights.step}
    return keep


def root(runs: Mapping[str, Run], address: str) -> str:
    """The address of the dense run that a run's chain begins with."""
    while (parent := runs[address].parent) is not None:
        address = parent
    return address


# ---- settings: TOML and --set --------------------------------------------------------------


def bundled() -> list[str]:
    """Names of the studies that come with the package."""
    folder = resources.files("windfall") / "studies"
    names = [item.name for item in folder.iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load(
    study: str | Path, settings: Mapping[str, Any] | None = None, *, code: bool = True
) -> Study:
    """The study of a bundled name or a TOML file, with settings changed by path.

    Args:
        study: a bundled study's name, or the path of a TOML file.
        settings: values by path, such as `{"recipe.steps": 500, "model": "conv-4"}`.
        code: look up a user's own network by importing it; if not, the study can be found in a lab
            (see `key`) but not run.

    Raises:
        SpecError: when there is no such study or setting, or a value cannot be.
    """
    arms = [arm.to_json() for arm in Study.model_fields["arms"].default]
    document = {"arms": arms} | read(study)  # a path into the arms needs them there
    for path, value in (settings or {}).items():
        _assign(document, path, value)
    if not code:
        document["model"] = _unresolved(document.get("model"))
    return checked(lambda: Study.model_validate(document))


def _unresolved(model: Any) -> Any:
    name = model.get("callable") if isinstance(model, dict) else model
    if not isinstance(name, str) or ":" not in name:
        return model
    return {"kind": tag(UserModel), "callable": name, "source": "", "parameters": {}}


def key(study: Study) -> str:
    """What a lab knows a study by: the digest of its settings, a user's network by its name."""
    document = study.to_json()
    for name in ("source", "parameters"):
        document["model"].pop(name, None)
    return digest(document)


def read(study: str | Path, seen: tuple[str, ...] = ()) -> Json:
    """The settings in a study's TOML, those it extends included."""
    name, text = _source(study)
    here = name if name in bundled() else str(Path(name).resolve())
    if here in seen:
        raise SpecError(
            f"`extends` must not lead back to itself; got {' -> '.join((*seen, here))}."
        )
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise SpecError(f"{name} must be TOML; {problem}.") from None
    if Path(study).suffix == ".toml":
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(study).stem)
        document.setdefault("name", stem.strip("-_"))
    base = document.pop("extends", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise SpecError(f"`extends` must be the name or path of a study; got {base!r}.")
    nearby = Path(study).parent / base
    extended = read(nearby if nearby.suffix == ".toml" and nearby.exists() else base, (*seen, here))
    for told in ("title", "question"):  # a study's own words do not fit another
        extended.pop(told, None)
    return _merged(extended, document)


def _source(study: str | Path) -> tuple[str, str]:
    path = Path(study)
    if str(study) in bundled():
        file = resources.files("windfall") / "studies" / f"{study}.toml"
        return str(study), file.read_text(encoding="utf-8")
    try:
        if path.suffix == ".toml" or path.exists():
            return str(path), path.read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise SpecError(f"STUDY must be a readable TOML file; got {path}: {problem}.") from None
    raise SpecError(
        f"STUDY must be a bundled study or the path of a .toml file; got {str(study)!r}."
        f"{nearest(str(study), bundled())}"
    )


def _merged(base: Json, changes: Json) -> Json:
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        old = {"kind": old} if isinstance(old, str) else old
        if isinstance(old, dict) and isinstance(value, dict) and _is_like(old, value):
            merged[name] = _merged(old, value)
        else:
            merged[name] = value
    return merged


def _is_like(old: Json, new: Json) -> bool:
    """Whether a table changes fields of the old one, rather than naming another member."""
    return new.get("kind", old.get("kind")) == old.get("kind")


def _assign(document: Json, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    place: Any = document
    for index, part in enumerate(parents):
        here = ".".join(parents[: index + 1])
        place = _inside(place, part, here)
    if isinstance(place, list):
        raise SpecError(
            f"`{path}` must name a field of a member of its list; got no field."
            f" Set the whole list: `{'.'.join(parents)}`."
        )
    place[last] = value


def _inside(place: Any, part: str, here: str) -> Any:
    """The settings at one step of a path; a bare name becomes a table that can have fields."""
    if isinstance(place, list):
        for index, item in enumerate(place):
            if item == part or (isinstance(item, dict) and item.get("kind") == part):
                place[index] = {"kind": part} if isinstance(item, str) else item
                return place[index]
        names = [str(item.get("kind") if isinstance(item, dict) else item) for item in place]
        raise SpecError(f"`{here}` must name one of its list.{nearest(part, names)}")
    item = place.setdefault(part, {})
    if isinstance(item, str):
        item = place[part] = {"kind": item}
    if not isinstance(item, dict | list):
        raise SpecError(f"`{here}` must have fields to be set by path; got {item!r}.")
    return item
