"""Findings: a study's values by place and metric, and the comparisons between its arms.

findings = Findings(plan, lab)
findings.verdicts().to_pandas()
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from windfall import flops, seeds, stats
from windfall import masks as masking
from windfall.effects import EFFECTS, Effect
from windfall.graph import Node
from windfall.masks import Masks
from windfall.spec import Json
from windfall.store import Lab
from windfall.train import early_stop

TRAINING = ("test_accuracy", "test_accuracy_at_early_stop", "early_stop_step")
AT_START = "test_accuracy_at_start"  # told where a study is about it: of supermasks
DESCRIBED = ("distance",)  # told of every arm, compared in no table
FEWER_IS_BETTER = "early_stop_step"


class Table(list[dict[str, Any]]):
    """Rows of one kind; a list of dictionaries with the same keys."""

    def to_pandas(self) -> Any:
        """The table as a pandas DataFrame; needs pandas (`pip install windfall[pandas]`)."""
        try:
            import pandas
        except ImportError:
            raise ImportError("a DataFrame needs pandas: pip install windfall[pandas]") from None
        return pandas.DataFrame(self)


class Findings:
    """A study's values by place and metric, from the lab's records.

    Args:
        plan: the study's outline.
        lab: where its runs are.
    """

    def __init__(self, plan: Json, lab: Lab) -> None:
        self.lab = lab
        self.nodes = [Node(*node) for node in plan["nodes"]]
        self.records = lab.records(dict.fromkeys(node.address for node in self.nodes))
        self.failures = lab.failures(node.address for node in self.nodes)
        self.is_overlap = plan["metric"] == "mask_overlap"
        self.designs: dict[str, Json] = plan.get("designs", {})
        self.is_structured = "structure" in plan["study"]["prune"]
        structure = plan["study"]["prune"].get("structure", {"kind": "weights"})
        self.unit: str = structure["kind"]
        self._measured = self._measured_densities(plan)
        told = {str(level): density for (_, level), density in reversed(self._measured.items())}
        self.plan = {**plan, "densities": plan["densities"] | told}  # the first arm's: a ticket's
        self._places = {(node.arm, node.level, node.seed): node for node in self.nodes}
        self._masks: dict[str, Masks] = {}
        self.rows = self._rows()

    # ---- budgets ----

    def _measured_densities(self, plan: Json) -> dict[tuple[str, int], float]:
        """Of arms whose networks lost channels, how many only training tells: means over seeds."""
        found: dict[tuple[str, int], list[int]] = {}
        for node in self.nodes if self.is_structured else ():
            record = self.records.get(node.address)
            if record is not None and record.kept >= 0:
                found.setdefault((node.arm, node.level), []).append(record.kept)
        whole = sum(plan["sizes"].values())
        return {place: fmean(kept) / whole for place, kept in found.items()}

    def budget(self, node: Node) -> dict[str, float]:
        """The `steps`, `multiply_adds` of an example, and training `flops` that a run was granted.

        Until it is trained, or if an older version trained it, as they were planned.
        """
        record, batch_size = self.records.get(node.address), self._batch_size
        if record is not None and record.budget:
            steps, macs = record.budget["steps"], record.budget["multiply_adds"]
            cost = flops.training_flops(macs, batch_size, steps)
            return {"steps": steps, "multiply_adds": macs, "flops": cost}
        first, last = self.plan["clocks"][node.address]
        cost = self.plan["flops"][node.address]
        each = flops.training_flops(1, batch_size, last - first)
        return {"steps": last - first, "multiply_adds": cost / each, "flops": cost}

    @property
    def _batch_size(self) -> int:
        return self.plan["study"]["recipe"]["batch_size"]

    # ---- values ----

    def place(self, arm: str, level: int, seed: int) -> Node | None:
        """The node of an arm at a level; level 0 of every arm is the dense one."""
        return self._places.get(("dense", 0, seed) if level == 0 else (arm, level, seed))

    def density(self, arm: str, level: int) -> float:
        """Of an arm at a level: what is kept, or the weights of a design beside the dense ones."""
        found = self.designs.get(arm)
        planned: float = found["density"] if found else self.plan["densities"][str(level)]
        return self._measured.get((arm, level), planned)

    def masks(self, address: str) -> Masks:
        """A stored run's masks, read once."""
        if address not in self._masks:
            self._masks[address] = self.lab.masks(address)
        return self._masks[address]

    def _training_value(self, node: Node, metric: str) -> float | None:
        record = self.records.get(node.address)
        if record is None:
            return None
        first = self.plan["clocks"][node.address][0]
        if metric == AT_START:
            return record.evaluations[0].test_accuracy
        if record.status == "diverged" and metric not in DESCRIBED:
            never = metric == FEWER_IS_BETTER
            return float(self.budget(node)["steps"]) if never else 1 / self.plan["num_classes"]
        stop = early_stop(record.evaluations)
        match metric:
            case "distance":
                return record.distance
            case "test_accuracy":
                return record.evaluations[-1].test_accuracy
            case "test_accuracy_at_early_stop":
                return stop.test_accuracy
            case _:
                return float(stop.step - first)

    def _is_censored(self, node: Node) -> bool:
        record = self.records.get(node.address)
        if record is None or record.status == "diverged":
            return record is not None
        return early_stop(record.evaluations).step == record.evaluations[-1].step

    def _overlap_value(self, node: Node, metric: str) -> float | None:
        ticket = self.place("ticket", node.level, node.seed)
        against = self.place("other-init", node.level, node.seed) if node.arm == "chance" else node
        addresses = [place.address for place in (ticket, against) if place is not None]
        if len(addresses) < 2 or any(address not in self.records for address in addresses):
            return None
        a, b = map(self.masks, addresses)
        _, _, layer = metric.partition("/")
        a, b = ({layer: m[layer]} if layer else m for m in (a, b))
        if node.arm == "chance":
            counts = [list(masking.kept(m).values()) for m in (a, b)]
            return masking.chance_overlap(list(masking.sizes(a).values()), *counts)
        return masking.overlap(masking.flat(a), masking.flat(b))

    # ---- the table of arms ----

    def _metrics(self) -> list[str]:
        layers = [f"mask_overlap/{name}" for name in self.plan["sizes"]]
        if self.is_overlap:
            return ["mask_overlap", *layers]
        return list(dict.fromkeys([*TRAINING, self.plan["metric"]]))

    def _told(self) -> list[str]:
        return self._metrics() + ([] if self.is_overlap else list(DESCRIBED))

    def _columns(self) -> dict[tuple[str, int], list[Node]]:
        columns: dict[tuple[str, int], list[Node]] = {}
        for node in self.nodes:
            columns.setdefault((node.arm, node.level), []).append(node)
        if not self.is_overlap:
            return columns
        pairs = {k: v for k, v in columns.items() if k[0] in ("other-order", "other-init")}
        for (arm, level), nodes in list(pairs.items()):
            if arm == "other-init":
                tickets = [self.place("ticket", level, node.seed) or node for node in nodes]
                chance = [Node("chance", level, t.seed, t.address) for t in tickets]
                pairs["chance", level] = chance
        return pairs

    def _rows(self) -> Table:
        value = self._overlap_value if self.is_overlap else self._training_value
        return Table(
            self._row(nodes, metric, value)
            for metric in self._told()
            for _, nodes in sorted(self._columns().items(), key=lambda item: item[0][1])
        )

    def _row(
        self, nodes: list[Node], metric: str, value: Callable[[Node, str], float | None]
    ) -> Json:
        arm, level = nodes[0].arm, nodes[0].level
        values = [value(node, metric) for node in nodes]
        runs = [
            {"seed": node.seed, "address": node.address, "value": found}
            for node, found in zip(nodes, values, strict=True)
        ]
        whole = [v for v in values if v is not None]
        is_whole = len(whole) == len(values)
        interval = stats.mean_interval(whole) if is_whole else None
        censored = metric == FEWER_IS_BETTER and sum(map(self._is_censored, nodes))
        return {
            "arm": arm,
            "level": level,
            "density": self.density(arm, level),
            "metric": metric,
            "mean": fmean(whole) if is_whole else None,
            "interval": None if interval is None else list(interval),
            "num_seeds": len(whole),
            "num_diverged": self._num_diverged(nodes),
            "num_censored": int(censored),
            **self._mean_budget(nodes),
            "runs": runs,
        }

    def _mean_budget(self, nodes: Sequence[Node]) -> dict[str, float]:
        known = [self.budget(node) for node in nodes if node.address in self.plan["flops"]]
        return {name: fmean(budget[name] for budget in known) for name in known[0]}

    def _num_diverged(self, nodes: Iterable[Node]) -> int:
        found = (self.records.get(node.address) for node in nodes)
        return sum(record is not None and record.status == "diverged" for record in found)

    # ---- comparisons ----

    def _differences(self, effect: Effect, level: int, metric: str) -> list[float] | None:
        """Paired differences over seeds; None if a run is missing, [] if there is no such pair."""
        sides = [self._side(arm, level, metric) for arm in (effect.arm, effect.against)]
        if any(side is None for side in sides):
            return []
        left, right = (
            {run["seed"]: run["value"] for run in side["runs"]} for side in sides if side
        )
        pairs = [(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]
        if any(value is None for pair in pairs for value in pair):
            return None
        return [a - b for a, b in pairs]

    def _side(self, arm: str, level: int, metric: str) -> Json | None:
        at = 0 if arm == "dense" else level
        return next(
            (r for r in self.rows if (r["arm"], r["level"], r["metric"]) == (arm, at, metric)), None
        )

    def _common(self, effect: Effect, level: int, metric: str) -> Json:
        sides = [self._side(arm, level, metric) for arm in (effect.arm, effect.against)]
        return {
            "effect": effect.name,
            "arm": effect.arm,
            "against": effect.against,
            "level": level,
            "density": self.density(effect.arm, level),
            "metric": metric,
            "num_diverged": sum(side["num_diverged"] for side in sides if side),
            "num_censored": sum(side["num_censored"] for side in sides if side),
            "budget_ratio": _quotient(*(_cost(side) for side in sides)),
        }

    def _effects(self, level: int) -> list[Effect]:
        """What is compared at a level; of two that compare the same runs, the first."""
        kind = "overlap" if self.is_overlap else "training"
        found: dict[Any, Effect] = {}
        for effect in EFFECTS:
            if effect.measures == kind:
                pair = self._addresses(effect.arm, level), self._addresses(effect.against, level)
                found.setdefault((pair, effect.claim) if all(pair) else effect, effect)
        return list(found.values())

    def _addresses(self, arm: str, level: int) -> tuple[str, ...]:
        at = 0 if arm == "dense" else level
        return tuple(n.address for n in self.nodes if (n.arm, n.level) == (arm, at))

    def verdicts(self) -> Table:
        """One decided row per effect: the study's level and metric, Holm-adjusted."""
        level, metric = self.plan["verdict_level"], self.plan["metric"]
        found = [(e, self._differences(e, level, metric)) for e in self._effects(level)]
        family = [(effect, d) for effect, d in found if d != []]
        sign = -1.0 if metric == FEWER_IS_BETTER else 1.0
        claims = [
            stats.Claim(None if d is None else [sign * x for x in d], effect.claim)
            for effect, d in family
        ]
        decided = stats.decide(
            claims,
            float(self.plan["margin"]),
            method=self.plan["study"]["intervals"],
            generator=seeds.stream(0, "bootstrap"),
        )
        return Table(
            {**self._common(effect, level, metric), **_verdict(verdict, sign)}
            for (effect, _), verdict in zip(family, decided, strict=True)
        )

    def comparisons(self) -> Table:
        """Every other effect, level and metric, with plain 95 % intervals and no verdict."""
        primary = (self.plan["verdict_level"], self.plan["metric"])
        levels = sorted({node.level for node in self.nodes if node.level})
        return Table(
            {**self._common(effect, level, metric), **_plain(differences)}
            for metric in self._metrics()
            for level in levels
            for effect in self._effects(level)
            if (level, metric) != primary
            and (differences := self._differences(effect, level, metric)) != []
        )


def _cost(side: Json | None) -> float | None:
    """The FLOPs of a row all of whose runs are there: planned ones are not compared."""
    return side["flops"] if side and side["mean"] is not None else None


def _quotient(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _verdict(verdict: stats.Verdict, sign: float) -> Json:
    interval, difference = verdict.interval, verdict.difference
    return {
        "difference": None if difference is None else sign * difference,
        "interval": None if interval is None else sorted(sign * end for end in interval),
        "confidence": verdict.level,
        "num_seeds": verdict.num_seeds or 0,
        "p_value": verdict.p_value,
        "p_adjusted": verdict.p_adjusted,
        "verdict": verdict.word,
        "seeds_needed": verdict.seeds_needed,
    }


def _plain(differences: list[float] | None) -> Json:
    if differences is None:
        return dict.fromkeys(("difference", "interval", "p_value"), None) | {"num_seeds": 0}
    paired = stats.Paired(tuple(differences))
    interval = paired.interval()
    return {
        "difference": paired.mean,
        "interval": None if interval is None else list(interval),
        "num_seeds": paired.num_seeds,
        "p_value": paired.p_value(),
    }
