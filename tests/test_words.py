"""The answer says what the tables say, and nothing more."""

import pytest

from windfall import words


def row(effect, arm, against, word="supported", difference=0.02, **more):
    interval = None if difference is None else [difference - 0.01, difference + 0.01]
    return {
        "effect": effect,
        "arm": arm,
        "against": against,
        "level": 4,
        "density": 0.13,
        "metric": "test_accuracy",
        "difference": difference,
        "interval": interval,
        "num_seeds": 5,
        "verdict": word,
        "seeds_needed": None,
    } | more


PLAN = {
    "metric": "test_accuracy",
    "margin": 0.005,
    "verdict_level": 4,
    "densities": {"4": 0.13},
    "num_classes": 10,
    "note": None,
    "nodes": [["dense", 0, 0, "a"]],
}


def document(*verdicts, comparisons=(), **more):
    base = {"verdicts": list(verdicts), "comparisons": list(comparisons), "winner_record": None}
    return base | {"records": [{"status": "done"}], "arms": [], "failures": []} | more


def test_the_headline_names_the_supported_causes_the_largest_first():
    rows = [
        row("weights", "finetune", "reinit", difference=0.02),
        row("initialization", "ticket", "reinit", difference=0.05),
        row("connectivity", "reinit", "shuffled", "refuted", difference=-0.001),
    ]
    headline, numbers, refuted, *_ = words.answer(PLAN, document(*rows))
    assert headline == (
        "At 13 % of its weights, the network owes its accuracy to its lucky initialization and the"
        " weights it inherited."
    )
    assert "ticket - reinit +5.00 pp [+4.00, +6.00], n = 5" in numbers
    assert refuted.startswith("It is not which connections were kept (-0.10 pp")


def test_a_designs_verdict_is_a_sentence_of_its_own():
    rows = [
        row("guided", "guided", "uniform-width", "refuted", difference=-0.002),
        row("transferred", "transferred", "uniform-width"),
    ]
    assert words.answer(PLAN, document(*rows)) == [
        "Beside one width of nearly as many parameters, the widths that pruning found for each"
        " stage are no better.",
        "In numbers: guided - uniform-width -0.20 pp [-1.20, +0.80], n = 5.",
        "Beside one width of nearly as many parameters, the widths found elsewhere are better.",
        "In numbers: transferred - uniform-width +2.00 pp [+1.00, +3.00], n = 5.",
    ]


def test_the_sizes_of_designs_are_noted_with_their_difference():
    sizes = (("guided", 1_000, 0.1), ("uniform-width", 998, 0.0995))
    designs = {arm: {"num_parameters": n, "density": d} for arm, n, d in sizes}
    (told,) = words.notes(PLAN | {"designs": designs}, document(), [])
    assert told == (
        "Networks that are not pruned: guided has 1,000 parameters and 10 % of the dense network's"
        " weights and uniform-width has 998 parameters and 9.95 % of the dense network's weights,"
        " 2 fewer than its design."
    )


def test_an_undecided_cause_says_how_many_seeds_it_needs():
    undecided = row("weights", "finetune", "reinit", "undecided", seeds_needed=1234)
    headline, told = words.answer(PLAN, document(undecided))
    assert headline == "At 13 % of its weights, no single cause is shown."
    assert "about 1,234 seeds would decide it" in told


def test_a_row_without_numbers_is_said_to_lack_a_run():
    lost = row("initialization", "ticket", "reinit", "undecided", None)
    assert "a run failed or is missing" in " ".join(words.answer(PLAN, document(lost)))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("supported", "The ticket matches the dense network"),
        ("refuted", "The ticket does not match the dense network"),
        ("undecided", "The ticket may or may not match the dense network"),
    ],
)
def test_matching_is_told_by_its_verdict(word, told):
    assert told in " ".join(words.answer(PLAN, document(row("matching", "ticket", "dense", word))))


def test_the_smallest_matching_ticket_is_the_smallest_whose_interval_is_within_the_margin():
    levels = [
        row("matching", "ticket", "dense", difference=0.01, density=0.5),
        row("matching", "ticket", "dense", difference=0.006, density=0.2),
        row("matching", "ticket", "dense", difference=0.0, density=0.1),
    ]
    told = " ".join(words.answer(PLAN, document(levels[0], comparisons=levels[1:])))
    assert "stays within 0.5 pp of the dense network keeps 20 % of the weights" in told


def test_a_study_without_a_pair_of_arms_says_so():
    assert "nothing to decide" in words.answer(PLAN, document())[0]


def test_overlap_is_told_by_its_verdicts():
    plan = PLAN | {"metric": "mask_overlap"}
    rows = [
        row("same-init", "other-order", "other-init", metric="mask_overlap", difference=0.3),
        row("above-chance", "other-init", "chance", "refuted", metric="mask_overlap"),
    ]
    same, chance = words.answer(plan, document(*rows))
    assert same.startswith("The initialization fixes part of the mask")
    assert "+0.300 [+0.290, +0.310], n = 5" in same
    assert "no more than chance" in chance


def test_the_note_of_the_data_stands_first():
    plan = PLAN | {"note": "mnist: files not verified"}
    assert words.notes(plan, document(), [{"torch": "2"}])[0] == "mnist: files not verified"


def test_unfinished_runs_are_counted():
    plan = PLAN | {"nodes": [["dense", 0, 0, "a"], ["ticket", 1, 0, "b"]]}
    assert words.notes(plan, document(), [])[-1].startswith("1 of 2 runs are not finished")


@pytest.mark.parametrize(
    ("value", "metric", "told"),
    [
        (0.0123, "test_accuracy", "+1.23 pp"),
        (-1234.4, "early_stop_step", "-1,234 steps"),
        (0.25, "mask_overlap/output.weight", "+0.250"),
    ],
)
def test_a_difference_has_its_sign_and_unit(value, metric, told):
    assert words.difference(value, metric) == told
