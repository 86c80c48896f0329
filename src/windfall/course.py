"""Courses: what happened to a student's nodes on the way.

A `Look` is one measurement, a `Course` all of them. Both hold tensors alone, so a file of named
tensors keeps them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from windfall import dynamics
from windfall.masks import Params

SCORES = ("loss", "train_loss", "agreement", "train_agreement")
COUPLINGS = ("beta", "beta_star", "H", "H_star", "L", "L_star")


@dataclass(frozen=True)
class Look:
    """One measurement.

    Args:
        step: after which.
        scores: of `SCORES`, [4], float64; NaN where an experiment has none.
        rho: by hidden layer, [teacher node, student node].
        incoming: by hidden layer, [student node]; see `Course`.
        outgoing: likewise.
        gradient: by layer, a scalar.
        couplings: by matrix and layer, `H/hidden1`, [student node]; empty where not measured.
        params: the student's; empty where they are not kept.
    """

    step: int
    scores: Tensor
    rho: Params
    incoming: Params = field(default_factory=Params)
    outgoing: Params = field(default_factory=Params)
    gradient: Params = field(default_factory=Params)
    couplings: Params = field(default_factory=Params)
    params: Params = field(default_factory=Params)

    def tensors(self) -> Params:
        """Everything but the step, under one flat set of names."""
        return {"scores": self.scores} | _flat(self, _LOOKED)

    @classmethod
    def restored(cls, step: int, tensors: Params) -> "Look":
        """The measurement that `tensors` describe."""
        return cls(step, tensors["scores"], **_parts(tensors, _LOOKED))


_LOOKED = ("rho", "incoming", "outgoing", "gradient", "couplings", "params")
_BY_NAME = (
    "best", "incoming", "outgoing", "gradient", "first", "last", "dead", "couplings", "params",
    "snapshots", "heirs",
)  # fmt: skip


@dataclass(frozen=True)
class Course:
    """What an experiment went through, at every step that was measured.

    Args:
        steps: [time], int64, from 0.
        scores: [time, 4]: the loss on the evaluation inputs, in the experiment's unit; that on
            training inputs; the share of evaluation inputs on which student and teacher have the
            same largest output; that of training inputs. NaN where an experiment has none.
        best: by hidden layer, each teacher node's highest correlation, [time, teacher node].
        incoming: by hidden layer, the L2 norms of the weights of each student node,
            [time, student node].
        outgoing: by hidden layer, those of the weights that read each student node.
        gradient: by layer, the L2 norm of its expected update, [time]; empty in the matrix form.
        first: by hidden layer, rho at the start, [teacher node, student node].
        last: the same at the last step.
        frames: rho of the lowest hidden layer, [time, teacher node, student node].
        dead: by hidden layer, which teacher nodes give the same on all inputs, [teacher node].
        coupling_steps: [time'], when the couplings were measured.
        couplings: by matrix and layer, `H/hidden1`, `L_star/hidden2`: the L2 norm of each student
            node's row of H, H*, beta, beta*, L or L*, [time', student node].
        params: the student's parameters at the last step.
        snapshots: those of earlier steps, by `STEP/NAME`.
        heirs: of a student that is a subset of another, by hidden layer, the node that won each
            teacher node there, [teacher node]; -1 where it was not kept. Else empty.
        diverged: True when the loss was NaN or infinite at the last step measured.
    """

    steps: Tensor
    scores: Tensor
    best: Params
    incoming: Params
    outgoing: Params
    gradient: Params
    first: Params
    last: Params
    frames: Tensor
    dead: Params
    coupling_steps: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    couplings: Params = field(default_factory=Params)
    params: Params = field(default_factory=Params)
    snapshots: Params = field(default_factory=Params)
    heirs: Params = field(default_factory=Params)
    diverged: bool = False

    @property
    def layers(self) -> list[str]:
        """The hidden layers, the lowest first."""
        return list(self.best)

    @property
    def loss(self) -> Tensor:
        """On the evaluation inputs, [time]."""
        return self.scores[:, 0]

    def alignment(self, layer: str, *, living: bool = False) -> Tensor:
        """The mean over teacher nodes of the best student node's correlation, [time].

        Source: 1905.13405; luckmatters, `recon_multilayer.getCorrs`.

        Args:
            layer: a hidden layer.
            living: leave dead teacher nodes out; if not, they count with their correlation of 0.
        """
        return self._bests(layer, living=living).mean(1)

    def covered(self, layer: str, threshold: float, *, living: bool = False) -> Tensor:
        """The share of teacher nodes whose best correlation is above the threshold, [time]."""
        return (self._bests(layer, living=living) > threshold).double().mean(1)

    def _bests(self, layer: str, *, living: bool) -> Tensor:
        alive = ~self.dead[layer]
        return self.best[layer][:, alive] if living and bool(alive.any()) else self.best[layer]

    def winners(self, layer: str) -> Tensor:
        """The student node that each teacher node ends best correlated with, living ones alone."""
        return dynamics.winners(self.last[layer])[~self.dead[layer]]

    def again(self, layer: str) -> Tensor:
        """Which living teacher nodes the same node won as before the student was pruned."""
        same = dynamics.winners(self.last[layer]) == self.heirs[layer]
        return same[~self.dead[layer]]

    def ranks(self, layer: str) -> Tensor:
        """The winners' places at the start, [teacher node that is alive]; see `dynamics.ranks`."""
        found = dynamics.ranks(self.first[layer], dynamics.winners(self.last[layer]))
        return found[~self.dead[layer]]

    def matched(self, layer: str, threshold: float = 0.9) -> Tensor:
        """Which student nodes end above the threshold with some teacher node, [student node]."""
        return dynamics.is_matched(self.last[layer], threshold)

    def moments(self) -> dict[int, Params]:
        """The parameters that were kept, by step, the last ones among them."""
        found: dict[int, Params] = {}
        for path, value in self.snapshots.items():
            step, _, name = path.partition("/")
            found.setdefault(int(step), {})[name] = value
        return dict(sorted(found.items())) | {int(self.steps[-1]): self.params}

    def tensors(self) -> Params:
        """Everything under one flat set of names, for a file."""
        whole = {name: getattr(self, name) for name in _WHOLE}
        return whole | _flat(self, _BY_NAME)

    @classmethod
    def restored(cls, tensors: Params, *, diverged: bool) -> "Course":
        """The course that `tensors` describe."""
        parts: dict[str, Any] = dict(_parts(tensors, _BY_NAME))
        parts |= {name: tensors[name] for name in _WHOLE}
        return cls(**parts, diverged=diverged)


_WHOLE = ("steps", "scores", "frames", "coupling_steps")


def _flat(of: Look | Course, kinds: Iterable[str]) -> Params:
    return {f"{kind}/{name}": value for kind in kinds for name, value in getattr(of, kind).items()}


def ordered(tensors: Params) -> Params:
    """The tensors by name, numbers in names by value: a file does not keep their order."""

    def place(name: str) -> list[tuple[int, str]]:
        return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def _parts(tensors: Params, kinds: Iterable[str]) -> dict[str, Params]:
    parts: dict[str, Params] = {kind: {} for kind in kinds}
    for path, tensor in ordered(tensors).items():
        kind, slash, name = path.partition("/")
        if slash and kind in parts:
            parts[kind][name] = tensor
    return parts


def gathered(
    looks: list[Look], dead: Params, params: Params, heirs: Params, *, diverged: bool
) -> Course:
    """The course of these measurements.

    Args:
        looks: in their order, one or more.
        dead: see `Course`.
        params: see `Course`.
        heirs: see `Course`.
        diverged: see `Course`.
    """
    first, last = looks[0], looks[-1]
    lowest = next(iter(first.rho))
    coupled = [look for look in looks if look.couplings]
    return Course(
        steps=torch.tensor([look.step for look in looks]),
        scores=torch.stack([look.scores for look in looks]),
        best={n: torch.stack([dynamics.best(look.rho[n]) for look in looks]) for n in first.rho},
        **{
            kind: {
                n: torch.stack([getattr(look, kind)[n] for look in looks])
                for n in getattr(first, kind)
            }
            for kind in ("incoming", "outgoing", "gradient")
        },
        first=first.rho,
        last=last.rho,
        frames=torch.stack([look.rho[lowest] for look in looks]),
        dead=dead,
        coupling_steps=torch.tensor([look.step for look in coupled], dtype=torch.int64),
        couplings={
            name: torch.stack([look.couplings[name] for look in coupled])
            for name in (coupled[0].couplings if coupled else ())
        },
        params=params,
        snapshots={
            f"{look.step}/{name}": value for look in looks for name, value in look.params.items()
        },
        heirs=heirs,
        diverged=diverged,
    )


assert {f.name for f in fields(Course)} == {*_WHOLE, *_BY_NAME, "diverged"}
