import functools
import hashlib
import html
import html.parser
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from windfall import drawing, page
from windfall.arms import Arm
from windfall.page import render
from windfall.spec import members

ARMS = ("ticket", "rewind", "finetune", "reinit", "shuffled", "random")
SAGS = {
    "ticket": 0.1,
    "rewind": 0.12,
    "finetune": 0.2,
    "reinit": 0.6,
    "shuffled": 1.0,
    "random": 1.3,
}
EFFECTS = (
    ("matching", "ticket", "dense"),
    ("weights", "finetune", "reinit"),
    ("initialization", "ticket", "reinit"),
    ("connectivity", "reinit", "shuffled"),
    ("allocation", "shuffled", "random"),
    ("architecture", "reinit", "random"),
)
VERSIONS = {"windfall": "0.1.0", "torch": "2.9.0", "numpy": "2.4.6"}


def address(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def arm_row(
    arm: str, level: int, metric: str, values: list[float | None], density: float, kind: str = ""
) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    mean = float(np.mean(known)) if whole else None
    half = 2.3 * float(np.std(known)) / len(known) ** 0.5 if len(known) > 1 else 0.0
    return {
        "arm": arm,
        "level": level,
        "density": density,
        "metric": metric,
        "mean": mean,
        "interval": [mean - half, mean + half] if mean is not None and len(known) > 1 else None,
        "num_seeds": len(values),
        "num_diverged": 0,
        "num_censored": int(metric == "early_stop_step" and arm == "random" and level > 3),
        "steps": 1000 * (level + 1),
        "multiply_adds": 100_000 * density,
        "flops": 6e9 * density * (level + 1),
        "runs": [
            {"seed": seed, "address": address(kind, arm, level, seed), "value": value}
            for seed, value in enumerate(values)
        ],
    }


def arm_rows(rng: np.random.Generator, num_seeds: int, levels: int) -> list[dict[str, Any]]:
    rows = []
    for arm, level in [
        ("dense", 0),
        *((arm, level) for level in range(1, levels + 1) for arm in ARMS),
    ]:
        density = 0.8**level if level < 3 else 0.8**2 * 0.55 ** (level - 2)
        loss = SAGS.get(arm, 0) * 0.004 * level**1.3 - 0.0012 * level * (
            arm in {"ticket", "rewind"}
        )
        accuracy = 0.979 - loss + 0.0012 * rng.standard_normal(num_seeds)
        steps = 5600 * (1 + 8 * loss) + 250 * rng.standard_normal(num_seeds)
        for metric, values in (
            ("test_accuracy", accuracy),
            ("test_accuracy_at_early_stop", accuracy + 0.0008),
            ("early_stop_step", np.round(steps, -2)),
        ):
            rows.append(arm_row(arm, level, metric, values.tolist(), density))
    return rows


def effect_row(
    rows: list[dict[str, Any]], effect: str, arm: str, against: str, level: int, metric: str
) -> dict[str, Any]:
    found = {(row["arm"], row["level"]): row for row in rows if row["metric"] == metric}
    one, other = found[arm, level], found[against, 0 if against == "dense" else level]
    row = {
        "effect": effect,
        "arm": arm,
        "against": against,
        "level": level,
        "density": one["density"],
        "metric": metric,
        "difference": None,
        "interval": None,
        "num_seeds": one["num_seeds"],
        "p_value": None,
        "num_diverged": 0,
        "seeds_needed": None,
        "budget_ratio": one["flops"] / other["flops"],
    }
    pairs = [(a["value"], b["value"]) for a, b in zip(one["runs"], other["runs"], strict=True)]
    if any(None in pair for pair in pairs):
        return row
    differences = np.array([a - b for a, b in pairs])
    mean = float(differences.mean())
    if len(pairs) == 1:
        return row | {"difference": mean}
    half = 2.6 * float(differences.std(ddof=1)) / len(pairs) ** 0.5
    p_value = float(min(1, np.exp(-6 * abs(mean) / half)))
    return row | {"difference": mean, "interval": [mean - half, mean + half], "p_value": p_value}


def with_word(row: dict[str, Any]) -> dict[str, Any]:
    interval, margin = row["interval"], 0.005
    word = "undecided"
    if interval and interval[0] > (-margin if row["effect"] == "matching" else 0):
        word = "supported"
    elif interval and interval[1] < margin:
        word = "refuted"
    adjusted = None if row["p_value"] is None else min(1.0, 3 * row["p_value"])
    needed = 24 if word == "undecided" and interval else None
    return row | {
        "verdict": word,
        "p_adjusted": adjusted,
        "confidence": 0.9917,
        "seeds_needed": needed,
    }


def curve(rng: np.random.Generator, arm: str, level: int, density: float) -> dict[str, Any]:
    steps = np.arange(0, 12001, 200)
    rate = 900 * (1 + 0.12 * level * SAGS.get(arm, 0.5))
    loss = (
        0.075
        + 0.01 * level * SAGS.get(arm, 0.3)
        + 2.2 * np.exp(-steps / rate)
        + 4e-6 * np.maximum(steps - 5000, 0)
    )
    loss += 0.002 * rng.standard_normal(len(steps))
    accuracy = 0.979 - 0.002 * level * SAGS.get(arm, 0.3) - 0.87 * np.exp(-steps / rate)

    def sides(values: np.ndarray, half: float) -> dict[str, list[float]]:
        return {
            "mean": values.tolist(),
            "low": (values - half).tolist(),
            "high": (values + half).tolist(),
        }

    return {
        "arm": arm,
        "level": level,
        "density": density,
        "steps": steps.tolist(),
        "validation_loss": sides(loss, 0.004),
        "test_accuracy": sides(accuracy, 0.0007),
    }


def picture(rng: np.random.Generator, level: int, density: float) -> dict[str, Any]:
    row, column = np.mgrid[:28, :28]
    likely = density * np.exp(-((row - 13.5) ** 2 + (column - 13.5) ** 2) / 110)
    counts = rng.binomial(300, np.clip(1.6 * likely, 0, 1))
    return {
        "level": level,
        "density": density,
        "layer": "fc1.weight",
        "address": address("", "ticket", level, 0),
        "counts": counts.tolist(),
    }


def records(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = {}
    for row in rows:
        for run in row["runs"]:
            made[run["address"]] = {
                "address": run["address"],
                "arm": row["arm"],
                "level": row["level"],
                "seed": run["seed"],
                "status": "finished",
                "steps": 12000,
                "seconds": 31.4,
                "flops": 9.6e12,
                "engine": "stacked",
                "versions": VERSIONS,
            }
    return list(made.values())


def lottery(num_seeds: int = 3, levels: int = 4) -> dict[str, Any]:
    """A document as a study of tickets makes it, with invented but plausible values."""
    rng = np.random.default_rng(0)
    rows = arm_rows(rng, num_seeds, levels)
    densities = {row["level"]: row["density"] for row in rows}
    middle = (levels + 1) // 2
    compared = [
        effect_row(rows, *effect, level, metric)
        for metric in ("test_accuracy", "test_accuracy_at_early_stop", "early_stop_step")
        for level in range(1, levels + 1)
        for effect in EFFECTS
    ]
    primary = [
        row for row in compared if row["level"] == middle and row["metric"] == "test_accuracy"
    ]
    made = records(rows)
    return {
        "study": {
            "name": "lottery-mnist",
            "address": address("study"),
            "title": "The lottery ticket hypothesis on MNIST.",
            "question": "Is a pruned network good for its weights, its architecture, or its luck?",
        },
        "answer": [
            "It is luck: with fresh weights, the ticket loses its advantage.",
            "The ticket matches the dense network within the margin, and stops earlier.",
            "Which connections are kept matters less than how many are kept in which layer.",
        ],
        "settings": {
            "model": {"type": "lenet-300-100", "initialize": {"type": "glorot-normal"}},
            "data": {"type": "mnist", "split_seed": 0, "verify": True, "validation_size": 5000},
            "recipe": {
                "steps": 12000,
                "batch_size": 60,
                "eval_every": 200,
                "optimizer": {"type": "adam", "learning_rate": 0.0012},
            },
            "prune": {
                "criterion": "magnitude",
                "selection": {"type": "layerwise", "hidden": 0.2, "output": 0.1},
            },
            "arms": ["dense", *ARMS],
            "levels": levels,
            "verdict_level": middle,
            "metric": "test_accuracy",
            "margin": 0.005,
            "num_seeds": num_seeds,
        },
        "runs": {
            "total": len(made),
            "reused": 3,
            "trained": len(made) - 3,
            "failed": 0,
            "diverged": 0,
        },
        "arms": rows,
        "verdicts": [with_word(row) for row in primary],
        "comparisons": [row for row in compared if row not in primary],
        "failures": [],
        "curves": [
            curve(rng, arm, level, densities[level])
            for level in (0, 2, middle, levels)
            for arm in (ARMS if level else ("dense",))
        ],
        "layers": [
            {"level": level, "layer": layer, "kept": round(total * keep**level), "total": total}
            for level in range(levels + 1)
            for layer, total, keep in (
                ("fc1.weight", 235200, 0.62),
                ("fc2.weight", 30000, 0.65),
                ("fc3.weight", 1000, 0.8),
            )
        ],
        "pictures": [picture(rng, level, densities[level]) for level in range(1, levels + 1)],
        "records": made,
        "notes": [],
        "winner": address("", "ticket", 2, 1),
        "winner_record": {
            "arm": "ticket",
            "level": 2,
            "seed": 1,
            "validation_accuracy": 0.9832,
            "test_accuracy": 0.9821,
            "density": 0.64,
        },
        "seconds": 6123.4,
        "flops": 2.1e15,
        "versions": VERSIONS,
        "created": "2026-11-22 21:00 UTC",
    }


def with_failure() -> dict[str, Any]:
    """One crashed and one diverged run, so rows without numbers and numbers with a remark."""
    document = lottery() | {"curves": [], "layers": [], "pictures": []}
    level = document["settings"]["verdict_level"]
    gone, astray = address("", "reinit", level, 2), address("", "random", level + 1, 0)
    for row in document["arms"]:
        addresses = [run["address"] for run in row["runs"]]
        if gone in addresses:
            row |= {"mean": None, "interval": None}
            row["runs"][addresses.index(gone)]["value"] = None
        if astray in addresses:
            row["num_diverged"] = 1
            if row["metric"] == "early_stop_step":
                row |= {"mean": None, "interval": None}
                row["runs"][addresses.index(astray)]["value"] = None
    for row in document["verdicts"] + document["comparisons"]:
        if row["level"] == level and "reinit" in {row["arm"], row["against"]}:
            row |= {"difference": None, "interval": None, "p_value": None}
    document["verdicts"] = [
        row if row["difference"] is not None else with_word(row) for row in document["verdicts"]
    ]
    document["failures"] = [
        {
            "address": gone,
            "arm": "reinit",
            "level": level,
            "seed": 2,
            "reason": "the worker was killed",
        }
    ]
    for record in document["records"]:
        if record["address"] == gone:
            record |= {"status": "failed", "steps": None, "seconds": None, "flops": None}
        if record["address"] == astray:
            record |= {"status": "diverged", "versions": VERSIONS | {"torch": "2.8.0"}}
    document["runs"] |= {"failed": 1, "diverged": 1}
    document["winner"] = document["winner_record"] = None
    return document


def overlap_study() -> dict[str, Any]:
    """A document as a study of masks makes it: overlaps of all layers and of each, three arms."""
    rng = np.random.default_rng(1)
    document = lottery()
    rows = [
        arm_row(
            arm,
            level,
            metric,
            (floor + lift * (1 - 0.5**level) * rng.uniform(0.9, 1, 5)).tolist(),
            0.8**level,
        )
        for level in range(1, 9)
        for metric in ("mask_overlap", "mask_overlap/fc1.weight", "mask_overlap/fc2.weight")
        for arm, lift in (("other-order", 0.35), ("other-init", 0.06), ("chance", 0.0))
        for floor in (0.8**level / (2 - 0.8**level),)
    ]
    verdict = effect_row(rows, "initialization", "other-order", "other-init", 5, "mask_overlap")
    empty = ("comparisons", "curves", "layers", "pictures")
    return (
        document
        | {key: [] for key in empty}
        | {
            "arms": rows,
            "verdicts": [with_word(verdict)],
            "records": records(rows),
            "winner": None,
            "winner_record": None,
        }
    )


def dense_only() -> dict[str, Any]:
    """A study with nothing pruned, so nothing to compare."""
    document = lottery()
    rows = [row for row in document["arms"] if row["arm"] == "dense"]
    empty = ("verdicts", "comparisons", "layers", "pictures")
    return (
        document
        | {key: [] for key in empty}
        | {
            "arms": rows,
            "curves": [row for row in document["curves"] if row["arm"] == "dense"],
            "records": records(rows),
            "winner": rows[0]["runs"][0]["address"],
            "winner_record": None,
        }
    )


def hostile() -> dict[str, Any]:
    """Markup, mathematics and quotation marks wherever a user may write."""
    text = "<script>alert('$x^{')</script>\"&$"
    document = with_failure() | {key: lottery()[key] for key in ("curves", "layers", "pictures")}
    document["study"] |= {"name": text, "title": text, "question": text}
    document["answer"] = [text]
    document["notes"] = [text]
    document["settings"] = {text: {text: [text, {text: None}]}}
    document["failures"][0]["reason"] = text
    for table in ("arms", "verdicts", "comparisons", "curves", "records"):
        for row in document[table]:
            row |= {
                side: text for side in ("arm", "against", "effect") if row.get(side) == "random"
            }
    for row in document["layers"] + document["pictures"]:
        row["layer"] = text
    document["pictures"][0]["layer"] = "another"
    return document


def single_seed() -> dict[str, Any]:
    return lottery(num_seeds=1, levels=3) | {"curves": [], "pictures": []}


def nothing() -> dict[str, Any]:
    """A study of which no run has been made yet."""
    empty = ("answer", "arms", "verdicts", "comparisons", "curves", "layers", "pictures", "records")
    none = ("winner", "winner_record", "seconds", "flops")
    return lottery() | {key: [] for key in empty} | dict.fromkeys(none)


DOCUMENTS = (lottery, single_seed, with_failure, overlap_study, dense_only, hostile, nothing)


@functools.cache
def page_of(make: Callable[[], dict[str, Any]]) -> str:
    return render(make())


@functools.cache
def words_of(make: Callable[[], dict[str, Any]]) -> str:
    """The text of the page as a reader sees it, figures and style aside."""
    page = re.sub(r"<(style|svg).*?</\1>", "", page_of(make), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


class Outline(html.parser.HTMLParser):
    """Elements and attributes of a page; refuses what is not balanced."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input", "source"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


@functools.cache
def outline_of(make: Callable[[], dict[str, Any]]) -> Outline:
    outline = Outline()
    outline.feed(page_of(make))
    outline.close()
    return outline


@pytest.mark.parametrize("make", DOCUMENTS)
def test_the_page_is_balanced_and_its_identifiers_are_unique(make):
    outline = outline_of(make)
    assert outline.open == []
    names = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("make", DOCUMENTS)
def test_the_page_leads_nowhere_but_into_itself_and_to_papers(make):
    outline = outline_of(make)
    names = {attributes.get("id") for _, attributes in outline.elements}
    for tag, attributes in outline.elements:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed", "base"}
        assert not any(name.startswith("on") or name in {"src", "srcset"} for name in attributes)
        target = attributes.get("href") or "#"
        if tag == "a" and target.startswith("https://arxiv.org/abs/"):
            continue
        assert target.startswith("data:image/png;base64,") or target[1:] in {"", *names}
    assert page_of(make).count("://") == page_of(make).count('<a href="https://arxiv.org/abs/')
    assert "@import" not in page_of(make)


@pytest.mark.parametrize("make", DOCUMENTS)
def test_every_address_is_in_the_page_in_full(make):
    document = make()
    addresses = {document["study"]["address"]} | {each["address"] for each in document["records"]}
    addresses |= {run["address"] for row in document["arms"] for run in row["runs"]}
    addresses |= {each["address"] for each in document["failures"] + document["pictures"]}
    missing = [each for each in addresses if each not in page_of(make)]
    assert missing == []


def test_every_value_stands_beside_the_address_of_its_run():
    document = lottery()
    items = re.findall(r"<li>(.*?)</li>", page_of(lottery), flags=re.DOTALL)
    text = [" ".join(re.sub(r"<[^>]*>", " ", item).split()) for item in items]
    for row in document["arms"]:
        for run in row["runs"]:
            if row["metric"] == "test_accuracy":
                assert f"seed {run['seed']} {100 * run['value']:.2f}% {run['address']}" in text
            if row["metric"] == "early_stop_step":
                assert f"seed {run['seed']} {run['value']:,.0f} {run['address']}" in text


def test_the_page_is_the_same_for_the_same_document_which_is_left_as_it_was():
    document = single_seed()
    assert render(document) == page_of(single_seed)
    assert document == single_seed()


def test_the_answer_comes_first_and_the_sections_in_their_order():
    page, document = page_of(lottery), lottery()
    parts = [
        document["study"]["title"],
        document["study"]["question"],
        *document["answer"],
        *(f'<section id="{name}"' for name in ("verdicts", "accuracy", "early-stop", "curves")),
        *(f'<section id="{name}"' for name in ("masks", "arms", "comparisons", "made", "papers")),
    ]
    places = [page.index(part, page.index("<body>")) for part in parts]
    assert places == sorted(places)


def test_a_verdict_says_what_is_compared_by_how_much_and_how_sure():
    words = words_of(lottery)
    row = next(row for row in lottery()["verdicts"] if row["effect"] == "initialization")
    assert "Initialization: is it luck? ticket \N{MINUS SIGN} reinit" in words
    low, high = (f"{100 * end:+.2f}" for end in row["interval"])
    assert f"{100 * row['difference']:+.2f} pp [{low}, {high}] at 99.2%, n = 3" in words
    assert words.count(" supported") >= 5


def test_an_undecided_verdict_says_how_many_seeds_would_be_needed():
    document = single_seed() | {"arms": [], "layers": [], "comparisons": []}
    document["verdicts"] = [with_word(lottery()["verdicts"][0] | {"interval": [-0.1, 0.1]})]
    page = " ".join(re.sub(r"<[^>]*>", " ", render(document)).split())
    assert "undecided about 24 seeds would be needed" in page


def test_what_is_missing_is_a_dash_with_its_reason():
    words = words_of(single_seed)
    assert "no interval: one seed, n = 1" in words
    assert "undecided seeds needed: \N{EN DASH} one seed" in words
    words = words_of(with_failure)
    assert "\N{EN DASH} a run failed" in words
    assert "\N{EN DASH} failed: the worker was killed" in words
    assert "\N{EN DASH} a diverged run never stops" in words
    assert "None" not in words and "nan" not in words.split()


def test_failures_are_named_at_the_top_and_listed_in_a_box():
    words = words_of(with_failure)
    assert "1 run failed. The rows that rest on it have no number." in words
    assert "the worker was killed" in words
    assert 'id="failures"' not in page_of(lottery)


def test_runs_of_mixed_versions_are_noted_everywhere():
    note = "These runs were made with different versions: torch 2.8.0 and 2.9.0."
    page = page_of(with_failure)
    assert page.count(note) == 1 + page.count("<figcaption>") + page.count('<p class="caption">')
    assert note not in page_of(lottery)


def test_every_caption_carries_the_notes_the_sample_and_the_kind_of_interval():
    captions = re.findall(r"<figcaption>.*?</figcaption>", page_of(hostile), flags=re.DOTALL)
    assert len(captions) == 5
    for caption in captions:
        assert "Note" not in caption and "&lt;script&gt;" in caption
        assert "n = " in caption
        assert "Made from" in caption
    assert "95% intervals of the mean over seeds" in captions[0]


def test_markup_in_a_document_is_shown_and_never_obeyed():
    page = page_of(hostile)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 20
    assert all(tag != "script" for tag, _ in outline_of(hostile).elements)


def test_overlaps_are_plain_numbers_with_a_figure_of_their_own():
    words = words_of(overlap_study)
    mean = next(row["mean"] for row in overlap_study()["arms"] if row["metric"] == "mask_overlap")
    assert f" {mean:.3f} " in words
    assert 'id="figure-overlap"' in page_of(overlap_study)
    assert 'id="figure-accuracy"' not in page_of(overlap_study)
    assert "Mask overlap, fc1.weight" in words


def test_a_censored_mean_is_marked_as_a_lower_bound():
    row = next(row for row in lottery()["arms"] if row["num_censored"])
    assert f"random 1 censored \u2265 {row['mean']:,.0f}" in words_of(lottery)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(31.44, "31.4 s"), (754, "13 min"), (6123, "1 h 42 min"), (9e4, "25 h 0 min")],
)
def test_a_duration_is_said_in_two_units_at_most(seconds, text):
    document = nothing() | {"seconds": seconds, "flops": 2.1e15}
    assert f"2.1 PFLOPs in {text}" in " ".join(re.sub(r"<[^>]*>", " ", render(document)).split())


def test_every_row_of_an_arm_tells_what_its_training_cost():
    row = next(row for row in lottery()["arms"] if row["level"] == 2)
    assert f" {row['steps']:,} " in words_of(lottery)
    assert f" {row['flops'] / 1e9:.3g} GFLOPs " in words_of(lottery)


def test_every_verdict_tells_how_the_costs_compare():
    row = lottery()["verdicts"][0]
    assert f"training FLOPs {row['budget_ratio']:.3g} to 1" in words_of(lottery)


def test_a_study_of_supermasks_has_a_figure_of_the_accuracy_before_any_training():
    document = lottery()
    assert 'id="figure-start"' not in render(document)
    document["arms"] += [
        row | {"metric": "test_accuracy_at_start"}
        for row in document["arms"]
        if row["metric"] == "test_accuracy"
    ]
    made = render(document)
    assert 'id="figure-start"' in made
    assert "Test accuracy before any training (%)" in made


def test_every_arm_has_a_look_a_mark_and_words():
    assert set(members(Arm)) <= set(drawing.LOOKS)
    assert set(members(Arm)) <= set(page.ARMS)
    assert {look.marker for look in drawing.LOOKS.values()} <= set(page.MARKS)
