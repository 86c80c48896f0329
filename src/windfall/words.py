"""Words: a study's answer as sentences, from its tables alone.

answer(plan, document)[0]
"At 5.57 % of the weights, the pruned network is good because of its lucky initialization ..."
"""

from collections.abc import Iterable, Sequence

from windfall.spec import Json

_CAUSES = {
    "initialization": "its lucky initialization",
    "weights": "the weights it inherited",
    "weights-e": "the weights it inherited, against scratch for as many steps",
    "weights-b": "the weights it inherited, against scratch at the dense network's budget",
    "signs": "the signs it began with",
    "connectivity": "which connections were kept",
    "allocation": "how many each layer kept",
}
_LEADS = {  # what heads the answer of a suite, the first that it has
    "weights-b": "Fine-tuning what was inherited beats training from scratch at the dense budget",
    "weights-e": "Fine-tuning what was inherited beats training from scratch",
    "initialization": "The original initialization beats a fresh one",
}
_METRICS = {
    "test_accuracy": "test accuracy at the last step",
    "test_accuracy_at_early_stop": "test accuracy at the early stop",
    "test_accuracy_at_start": "test accuracy before any training",
    "early_stop_step": "steps to the early stop",
    "distance": "distance of the weights from where they began (L2)",
    "mask_overlap": "overlap of the masks (Jaccard)",
}


def percent(fraction: float) -> str:
    """A fraction as a percentage of three significant digits."""
    return f"{100 * fraction:.3g} %"


def duration(seconds: float) -> str:
    """Seconds as `12 s`, `3 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def estimate(told: Json | None) -> str | None:
    """What was estimated of a study's training beside what was measured, as a sentence."""
    if told is None:
        return None
    each = "; ".join(
        f"{what} {_beside(told[name], told[f'measured_{name}'])}"
        for what, name in (("all", "seconds"), ("the runs' own times", "total_seconds"))
    )
    return f"Training {told['runs']:,} runs: {each} (from {told['from']})."


def _beside(estimated: float, taken: float | None) -> str:
    told = f"estimated {duration(estimated)}"
    if taken is None or not estimated:
        return told
    return f"{told}, measured {duration(taken)} ({taken / estimated:.2f})"


def biases(document: Json) -> list[str]:
    """What a network's BatchNorm biases are, and what its ReLUs pass, as sentences."""
    whole, shares, layers = document["all"], document["summary"], len(document["layers"])
    most = "Most" if whole["negative"] > 0.5 else "At most half of the"
    zero = f", {whole['num_zero']:,} of exactly 0 not among them" if whole["num_zero"] else ""
    told = [
        f"{most} BatchNorm biases are negative: {percent(whole['negative'])} of"
        f" {whole['num_biases']:,}{_in_halves(shares, 'negative', layers, 'layers')}{zero}."
    ]
    if "passes" in shares:
        halves = _in_halves(shares, "passes", len(document["relus"]), "ReLUs")
        told.append(f"Its ReLUs pass {percent(shares['passes'])} of what they read{halves}.")
    return told


def _in_halves(shares: Json, name: str, number: int, what: str) -> str:
    if f"{name}/upper" not in shares:
        return ""
    lower, upper = (percent(shares[f"{name}/{half}"]) for half in ("lower", "upper"))
    return f", {lower} in the lower half of its {number} {what} and {upper} in the upper"


def metric_name(metric: str) -> str:
    """What a metric is called in sentences."""
    name, _, layer = metric.partition("/")
    return f"{_METRICS[name]} in {layer}" if layer else _METRICS[name]


def difference(value: float, metric: str) -> str:
    """A difference with its sign and unit: percentage points, steps, or a plain number."""
    if metric.startswith("test_accuracy"):
        return f"{100 * value:+.2f} pp"
    return f"{value:+,.0f} steps" if metric == "early_stop_step" else f"{value:+.3f}"


def interval(row: Json) -> str:
    """A row's difference and interval, such as `+2.31 pp [1.10, 3.52], n = 10`."""
    if row["difference"] is None:
        return "not known"
    told = difference(row["difference"], row["metric"])
    if row["interval"] is not None:
        ends = [difference(end, row["metric"]).split()[0] for end in row["interval"]]
        told += f" [{ends[0]}, {ends[1]}]"
    return f"{told}, n = {row['num_seeds']}"


def listed(items: Iterable[str]) -> str:
    """`a, b and c`."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def answer(plan: Json, document: Json) -> list[str]:
    """The study's answer, the headline first.

    Args:
        plan: the study's outline.
        document: its tables (`windfall.tables.summary`).
    """
    rows = {row["effect"]: row for row in document["verdicts"]}
    if not rows:
        return ["No comparison of this study has both of its arms: there is nothing to decide."]
    overlap = plan["metric"] == "mask_overlap"
    sentences = _overlap(rows) if overlap else _causes(plan, rows) + _designs(rows)
    sentences += [] if overlap else _matching(plan, document, rows)
    return sentences if overlap else sentences + _winner(document)


def across(verdicts: Sequence[Json], num_cases: int) -> list[str]:
    """The answer of a suite: for each effect, in which cases it was found and in which not.

    Args:
        verdicts: rows of all cases, each with its `case`.
        num_cases: of the suite.
    """
    effects = dict.fromkeys((row["effect"], row["arm"], row["against"]) for row in verdicts)
    if not effects:
        return ["No case has both arms of a comparison: there is nothing to decide."]
    sentences = _lead(verdicts)
    for effect, arm, against in effects:
        same = (effect, arm, against)
        rows = [r for r in verdicts if (r["effect"], r["arm"], r["against"]) == same]
        told = [_in_cases(word, rows) for word in ("supported", "refuted", "undecided")]
        more = f", of {len(rows)} that have both" if len(rows) < num_cases else ""
        found = "; ".join(part for part in told if part)
        sentences.append(f"{effect} ({arm} - {against}{more}): {found}.")
    return sentences


def _lead(verdicts: Sequence[Json]) -> list[str]:
    """The headline: in how many cases the question that most would ask is answered, and how."""
    for effect, claim in _LEADS.items():
        found = [row["verdict"] for row in verdicts if row["effect"] == effect]
        if found:
            num = {word: found.count(word) for word in ("supported", "refuted", "undecided")}
            return [
                f"{claim} in {num['supported']} of {len(found)} cases; in {num['refuted']} it does"
                f" not, and {num['undecided']} are undecided."
            ]
    return []


def _in_cases(word: str, rows: Sequence[Json]) -> str:
    found = [row["case"] for row in rows if row["verdict"] == word]
    if not found:
        return ""
    return f"{word} in {'all cases' if len(found) == len(rows) > 1 else listed(found)}"


def _causes(plan: Json, rows: dict[str, Json]) -> list[str]:
    causes = [row for effect, row in rows.items() if effect in _CAUSES]
    density = percent(plan["densities"][str(plan["verdict_level"])])
    supported = [row for row in causes if row["verdict"] == "supported"]
    supported.sort(key=lambda row: -abs(row["difference"]))
    sentences: list[str] = []
    if supported:
        told = listed(_CAUSES[row["effect"]] for row in supported)
        sentences.append(f"At {density} of its weights, the network owes its accuracy to {told}.")
        numbers = "; ".join(f"{_compares(row)} {interval(row)}" for row in supported)
        sentences.append(f"In numbers: {numbers}.")
    elif causes:
        sentences.append(f"At {density} of its weights, no single cause is shown.")
    for word, lead in (("refuted", "It is not"), ("undecided", "Undecided:")):
        found = [row for row in causes if row["verdict"] == word]
        if found:
            told = listed(f"{_CAUSES[row['effect']]} ({_what_more(row)})" for row in found)
            sentences.append(f"{lead} {told}.")
    return sentences


def _designs(rows: dict[str, Json]) -> list[str]:
    """Of networks that pruning only designed: what their widths, stage by stage, are worth."""
    told = {
        "supported": "are better",
        "refuted": "are no better",
        "undecided": "may or may not be better",
    }
    where = {"guided": "that pruning found for each stage", "transferred": "found elsewhere"}
    chosen = {effect: rows[effect] for effect in where if effect in rows}
    sentences = (
        (
            "Beside one width of nearly as many parameters, the widths"
            f" {where[effect]} {told[row['verdict']]}.",
            f"In numbers: {_compares(row)} {_what_more(row)}.",
        )
        for effect, row in chosen.items()
    )
    return [sentence for pair in sentences for sentence in pair]


def _compares(row: Json) -> str:
    return f"{row['arm']} - {row['against']}"


def _what_more(row: Json) -> str:
    if row["difference"] is None:
        return "a run failed or is missing"
    needed = row["seeds_needed"]
    more = f"; about {needed:,} seeds would decide it" if needed else ""
    return interval(row) + (more if row["verdict"] == "undecided" else "")


def _matching(plan: Json, document: Json, rows: dict[str, Json]) -> list[str]:
    sentences: list[str] = []
    row = rows.get("matching")
    if row is not None:
        told = {
            "supported": "matches the dense network",
            "refuted": "does not match the dense network",
            "undecided": "may or may not match the dense network",
        }[row["verdict"]]
        sentences.append(f"The ticket {told} in {metric_name(row['metric'])}: {_what_more(row)}.")
    sentences += _stays(plan, document) + _speed(plan, document)
    return sentences


def _stays(plan: Json, document: Json) -> list[str]:
    margin, metric = plan["margin"], plan["metric"]
    if metric == "early_stop_step":
        return []
    rows = [*document["verdicts"], *document["comparisons"]]
    within = [
        row["density"]
        for row in rows
        if row["effect"] == "matching"
        and row["metric"] == metric
        and row["interval"] is not None
        and row["interval"][0] > -margin
    ]
    if not within:
        return []
    return [
        f"The smallest ticket whose interval stays within {100 * margin:.2g} pp of the dense"
        f" network keeps {percent(min(within))} of the weights."
    ]


def _speed(plan: Json, document: Json) -> list[str]:
    found = [
        row
        for row in document["comparisons"]
        if row["effect"] == "matching"
        and row["metric"] == "early_stop_step"
        and row["level"] == plan["verdict_level"]
        and row["difference"] is not None
    ]
    return [f"To the early stop, ticket - dense: {interval(row)}." for row in found]


def _overlap(rows: dict[str, Json]) -> list[str]:
    same, chance = rows.get("same-init"), rows.get("above-chance")
    sentences: list[str] = []
    if same is not None:
        told = {
            "supported": "The initialization fixes part of the mask",
            "refuted": "The initialization does not fix the mask",
            "undecided": "Whether the initialization fixes the mask is undecided",
        }[same["verdict"]]
        sentences.append(
            f"{told}: masks of one theta_0 under two data orders overlap more than masks of two"
            f" theta_0 by {_what_more(same)}."
        )
    if chance is not None:
        told = {
            "supported": "more than",
            "refuted": "no more than",
            "undecided": "perhaps as much as",
        }
        sentences.append(
            f"Masks of different theta_0 overlap {told[chance['verdict']]} chance:"
            f" {_what_more(chance)}."
        )
    return sentences


def _winner(document: Json) -> list[str]:
    winner = document["winner_record"]
    if winner is None:
        return []
    return [
        f"The best pruned network by validation accuracy is {winner['arm']}, seed"
        f" {winner['seed']}: {percent(winner['test_accuracy'])} on test at"
        f" {percent(winner['density'])} of the weights (run {document['winner'][:12]})."
    ]


def notes(plan: Json, document: Json, versions: list[dict[str, str]]) -> list[str]:
    """What a reader must know beside the numbers: data, versions, divergence, censoring."""
    told = [plan["note"]] if plan["note"] else []
    if len(versions) > 1:
        each = "; ".join(", ".join(f"{k} {v}" for k, v in one.items()) for one in versions)
        told.append(f"The runs were trained by different versions: {each}.")
    diverged = sum(record["status"] == "diverged" for record in document["records"])
    if diverged:
        told.append(
            f"{diverged} runs diverged: they count with accuracy 1/{plan['num_classes']}, early"
            " stop never."
        )
    return told + _sizes(plan) + censored(document) + _unfinished(plan, document)


def _sizes(plan: Json) -> list[str]:
    """How large the networks are that were designed, the one of uniform width beside its design."""
    designs = plan.get("designs", {})
    told = [
        f"{arm} has {found['num_parameters']:,} parameters and {percent(found['density'])} of the"
        " dense network's weights"
        for arm, found in designs.items()
    ]
    if not told:
        return []
    others = [found["num_parameters"] for arm, found in designs.items() if arm != "uniform-width"]
    if others and len(told) > len(others):
        more = designs["uniform-width"]["num_parameters"] - others[0]
        told[-1] += f", {abs(more):,} {'more' if more > 0 else 'fewer'} than its design"
    return [f"Networks that are not pruned: {listed(told)}."]


def censored(document: Json) -> list[str]:
    """What a reader must know of early stops that may be later."""
    rows = [row for row in document["arms"] if row["metric"] == "early_stop_step"]
    censored, runs = (sum(row[name] for row in rows) for name in ("num_censored", "num_seeds"))
    if not censored:
        return []
    return [
        f"{censored} of {runs} early stops are censored (their rows are marked): they fall on the"
        " last evaluation or never come, so the true step may be later."
    ]


def _unfinished(plan: Json, document: Json) -> list[str]:
    wanted = {address for *_, address in plan["nodes"]}
    failed = {failure["address"] for failure in document["failures"]}
    missing = len(wanted) - len(document["records"]) - len(failed)
    if missing <= 0:
        return []
    return [f"{missing} of {len(wanted)} runs are not finished: their rows are empty."]
