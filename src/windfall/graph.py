"""Graphs: a study expanded into its runs, which can be listed and costed before any is trained.

graph = expand(Study(model="lenet-300-100", data="mnist"))
len(graph.runs)
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from windfall import flops, seeds, structure
from windfall import models as zoo
from windfall.arms import (
    DESIGNS,
    Dense,
    Design,
    Family,
    Random,
)
from windfall.data import Dataset
from windfall.data import load as load_data
from windfall.filters import GroupCriterion
from windfall.initialize import initial_parameters
from windfall.models import Kind, Model
from windfall.prune import Prune, ToStep
from windfall.runs import Fresh, Pruned, Run
from windfall.selection import uniform
from windfall.spec import SpecError, tag
from windfall.structure import Group
from windfall.study import Study
from windfall.train import Recipe
from windfall.units import Weights


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
        groups: its groups of channels, or of blocks, where these are pruned.
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

        How a global threshold falls on what it pools, and which blocks stay, is only known after
        training; both are taken to be even.

        Raises:
            SpecError: when a tensor would be emptied; the message names it.
        """
        sizes = self.sizes
        if prune.is_structured:
            return self._beside_channels(prune, level)
        counts = prune.selection.counts(sizes, self.kinds, level)
        return counts | _evenly(counts, sizes)

    def _beside_channels(self, prune: Prune, level: int) -> dict[str, int | Fraction]:
        left = self.smaller(prune, level)
        return {name: math.prod(left[name]) for name in self.sizes}

    def smaller(self, prune: Prune, level: int) -> dict[str, tuple[int, ...]]:
        """The shapes that a level leaves of all tensors, where channels or blocks are pruned.

        What only training tells is taken to be even, as in `kept`.

        Raises:
            SpecError: when a group would be emptied; the message names it.
        """
        assert not isinstance(prune.structure, Weights)
        sizes = {name: group.size for name, group in prune.structure.of(self.groups).items()}
        counts = prune.selection.counts(sizes, self.kinds, level)
        even = {name: max(1, round(count)) for name, count in _evenly(counts, sizes).items()}
        stay = {group.name: group.size for group in self.groups} | counts | even
        channels = {group.name: _spread(group.size, stay[group.name]) for group in self.groups}
        like = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        alive = structure.alive(self.groups, channels, like)
        return {
            name: tuple(
                int(alive[name][axis].sum()) if axis in alive.get(name, {}) else size
                for axis, size in enumerate(shape)
            )
            for name, shape in self.shapes.items()
        }


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


def _spread(size: int, count: int) -> Tensor:
    """Of so many places, a number of them spread evenly: True for those."""
    ends = torch.arange(size + 1) * count // size
    return ends[1:] > ends[:-1]


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
    groups = _groups(study, module, data.input_shape)
    _check_sparsity(study.recipe, module, data.input_shape)
    _check_initialization(study, data)
    return replace(network, groups=groups)


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
    zoo.check_gradients(module, shape, tag(type(model)))
    params = dict(module.named_parameters())
    sizes = {name: params[name].numel() for name in kinds}
    multiply_adds = flops.multiply_adds(module, shape)
    shapes = structure.shapes(params | dict(module.named_buffers()))
    return module, Network(sizes, kinds, multiply_adds, shape, data.num_classes, shapes)


def _check_initialization(study: Study, data: Dataset) -> None:
    """Refuse, by a `SpecError`, a scheme that is not defined for the network."""
    initial_parameters(
        lambda: study.model.build(data.input_shape, data.num_classes),
        study.begun_by,
        seed=0,
        inputs=lambda: data.first(0, study.recipe.batch_size, torch.float64)[0],
    )


def _check_sparsity(recipe: Recipe, module: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse, by a `SpecError`, sparsity training that the network is not fit for."""
    if recipe.penalty is not None:
        recipe.penalty.targets(module)
    if recipe.rhythm is not None:
        recipe.rhythm.begun(module, shape)


def _groups(study: Study, module: nn.Module, shape: tuple[int, ...]) -> tuple[Group, ...]:
    prune = study.prune
    if isinstance(prune.structure, Weights):
        return ()
    groups = prune.structure.groups(module, shape)
    assert isinstance(prune.criterion, GroupCriterion)
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
