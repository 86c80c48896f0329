import pytest
import torch

from windfall import luck, measures, settings, stats
from windfall.course import Course
from windfall.laboratory import Laboratory
from windfall.luck import LaboratoryStudy
from windfall.simulation import Matrices
from windfall.spec import SpecError

TINY = {
    "teacher": {"hidden": [2]},
    "student": {"multi": 2},
    "inputs": {"dimension": 3, "num_train": 32, "num_evaluation": 50},
    "num_outputs": 2, "batch_size": 4, "steps": 8, "measure_every": 4,
}  # fmt: skip
WIDTH = {"effect": "width", "arm": "wide", "against": "narrow", "metric": "alignment"}
LUCK = {"effect": "luck", "arm": "wide", "against": "chance", "metric": "rank/hidden1"}


def study(*contrasts, num_seeds=2, **fields):
    arms = {"narrow": {"student": {"multi": 1}}, "wide": {"student": {"multi": 3}}}
    given = {"experiment": TINY, "arms": arms, "num_seeds": num_seeds} | fields
    return LaboratoryStudy(contrasts=contrasts or (WIDTH,), **given)


def course(first, last, outgoing=(1.0, 1.0), diverged=False, loss=0.5):
    """One hidden layer, measured at the start, at a quarter and at the end."""
    first, last = torch.tensor(first), torch.tensor(last)
    best = torch.stack([first.max(1).values, last.max(1).values / 2, last.max(1).values])
    norms = torch.tensor(outgoing)
    name = "hidden1"
    return Course(
        torch.tensor([0, 2, 8]),
        torch.tensor([[2.0] * 4, [1.0] * 4, [loss] * 4]),
        {name: best},
        {name: torch.stack([torch.ones_like(norms)] * 3)},
        {name: torch.stack([norms, norms, norms])},
        {},
        {name: first},
        {name: last},
        torch.stack([first, first, last]),
        {name: torch.zeros(len(first), dtype=torch.bool)},
        diverged=diverged,
    )


FIRST = [[0.1, 0.3, 0.2], [0.5, 0.1, 0.2]]
LAST = [[0.98, 0.1, 0.2], [0.1, 0.2, 0.92]]


def test_the_numbers_of_a_course_by_hand():
    found = course(FIRST, LAST, outgoing=(2.0, 0.5, 4.0))
    assert measures.measured(found, "alignment") == pytest.approx(0.95)
    assert measures.measured(found, "alignment/hidden1") == pytest.approx(0.95)
    assert measures.measured(found, "early-alignment") == pytest.approx(0.475)
    assert measures.measured(found, "covered/hidden1") == 0.5
    # the winners, 0 and 2, had two and one of the two others ahead of them
    assert measures.measured(found, "rank/hidden1") == pytest.approx((2 / 2 + 1 / 2) / 2)
    assert measures.measured(found, "fading/hidden1") == pytest.approx(0.5 / 2.0)
    assert measures.measured(found, "loss") == 0.5


def test_a_dead_teacher_node_has_no_rank_and_counts_in_the_mean():
    found = course([[0.1, 0.3, 0.2], [0.0, 0.0, 0.0]], [[0.98, 0.1, 0.2], [0.0, 0.0, 0.0]])
    found.dead["hidden1"][1] = True
    assert measures.measured(found, "rank/hidden1") == 1.0
    assert measures.measured(found, "alignment") == pytest.approx(0.49)
    assert luck.exceptions(study(), {("wide", 0): found}) == [
        "teacher nodes that give the same on all inputs: 1 of seed 0; they count in alignment and"
        " coverage with a correlation of 0, and not in ranks"
    ]


def test_what_diverged_counts_as_it_was_at_the_start():
    found = course(FIRST, [[float("nan")] * 3] * 2, (1.0, 1.0, 1.0), diverged=True, loss=torch.inf)
    assert measures.measured(found, "alignment") == pytest.approx(0.4)
    assert measures.measured(found, "loss") == 2.0
    assert measures.measured(found, "rank/hidden1") == 0.5
    assert measures.measured(found, "fading/hidden1") == 1.0
    assert luck.exceptions(study(), {("wide", 1): found}) == [
        "wide: seeds 1 diverged, and count as at the start, or by chance"
    ]


def test_fading_is_one_where_nothing_can_be_compared():
    assert measures.measured(course([[0.1, 0.2]], [[0.95, 0.96]]), "fading/hidden1") == 1.0
    assert measures.measured(course([[0.1, 0.2]], [[0.5, 0.6]]), "fading/hidden1") == 1.0


def scored(values, last=LAST):
    return {
        (arm, seed): course(FIRST, (torch.tensor(last) * value).tolist(), (1.0, 1.0, 1.0))
        for arm, each in values.items()
        for seed, value in enumerate(each)
    }


def test_contrasts_are_paired_and_one_family():
    of = study(WIDTH, LUCK | {"is_lower": True}, num_seeds=3)
    rows = luck.arms(of, scored({"narrow": (0.5, 0.6, 0.7), "wide": (0.8, 0.91, 1.0)}))
    width, rank = luck.verdicts(of, rows)
    assert width["difference"] == pytest.approx(0.95 * 0.3033, rel=1e-3)
    assert (width["num_seeds"], width["verdict"]) == (3, "supported")
    assert width["interval"][0] < width["difference"] < width["interval"][1]
    adjusted = stats.holm([width["p_value"], rank["p_value"]])
    assert [width["p_adjusted"], rank["p_adjusted"]] == adjusted
    # all ranks are .75: higher than chance in every seed, where lower is claimed
    assert rank["difference"] == pytest.approx(0.25)
    assert rank["verdict"] == "refuted"


def test_a_claim_of_less_is_supported_by_less():
    of = study(LUCK | {"is_lower": True}, WIDTH, num_seeds=3)
    lucky = [[0.9, 0.1, 0.2], [0.1, 0.2, 0.9]]
    courses = {
        (arm, seed): course(lucky, LAST, (1.0, 1.0, 1.0)) for arm in of.arms for seed in range(3)
    }
    rank, width = luck.verdicts(of, luck.arms(of, courses))
    assert (rank["difference"], rank["verdict"]) == (-0.5, "supported")
    assert (width["difference"], width["p_value"]) == (0, 1)


def test_a_seed_that_is_missing_makes_its_rows_null():
    of = study(num_seeds=2)
    courses = scored({"narrow": (0.5, 0.6), "wide": (0.8, 0.9)})
    del courses["wide", 1]
    rows = luck.arms(of, courses)
    gone = [row for row in rows if row["arm"] == "wide"]
    assert all(row["mean"] is None and row["interval"] is None for row in gone)
    (width,) = luck.verdicts(of, rows)
    assert (width["difference"], width["verdict"], width["num_seeds"]) == (None, "undecided", 0)
    assert luck.answer(of, [width])[1] == "width Undecided: a run failed."


def test_every_number_names_its_run():
    of = study()
    rows = luck.arms(of, scored({"narrow": (0.5, 0.6), "wide": (0.8, 0.9)}))
    addresses = {run["address"] for row in rows for run in row["runs"]}
    assert addresses == set(of.places().values())


def test_arms_change_fields_and_the_rest_stays():
    experiments = LaboratoryStudy(
        experiment=TINY,
        arms={"a": {}, "b": {"student": {"norm": "after"}, "steps": 9}},
        contrasts=(),
    )
    one, other = experiments.experiments().values()
    assert one == Laboratory(**TINY)
    assert (other.student.norm, other.student.multi, other.steps) == ("after", 2, 9)


def test_an_arm_may_be_another_member():
    start = {"kind": "perturbed", "std": 0.2}
    of = LaboratoryStudy(experiment=TINY, arms={"near": {"student": {"start": start}}})
    assert of.experiments()["near"].student.start.std == 0.2


def test_a_run_is_named_by_experiment_and_seed():
    of = study()
    assert luck.address(Laboratory(**TINY), 0) == luck.address(Laboratory(**TINY), 0)
    assert len(set(of.places().values())) == 4
    again = study(num_seeds=1, name="other")
    assert set(again.places().values()) < set(of.places().values())


def test_addresses_are_as_they_were():
    assert luck.address(Laboratory(), 0)[:16] == "2cad6b5d56fd8778"
    assert luck.address(Matrices(), 0)[:16] == "ebe436730b4e28d0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {}}, "at least 1"),
        ({"arms": {"chance": {}}, "contrasts": ()}, "must not be named `chance`"),
        (
            {"contrasts": (WIDTH | {"metric": "luck"},)},
            "`metric` must be one of the arm wide; got 'luck'",
        ),
        ({"contrasts": (WIDTH | {"against": "wider"},)}, "`contrasts` must compare arms"),
        ({"contrasts": (WIDTH | {"against": "chance"},)}, "`contrasts` must compare arms"),
        (
            {"contrasts": (WIDTH | {"metric": "rank/hidden2"},)},
            "`metric` must be one of the arm wide; got 'rank/hidden2'",
        ),
        ({"arms": {"a": {"student": {"multy": 2}}}, "contrasts": ()}, "has no field `multy`"),
        ({"contrasts": (WIDTH | {"margin": -1},)}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    given = {"experiment": TINY, "arms": {"narrow": {}, "wide": {}}, "contrasts": ()} | change
    with pytest.raises(ValueError, match=message):
        LaboratoryStudy(**given)


def test_arms_are_chosen_by_name_and_their_contrasts_stay():
    found = settings.load("luck", {"arms": ["multi-1", "multi-10"], "experiment.steps": 10})
    assert list(found.arms) == ["multi-1", "multi-10"]
    assert {contrast.against for contrast in found.contrasts} == {"multi-1", "chance"}
    assert found.experiment.steps == 10
    with pytest.raises(SpecError, match=r"`arms` must be some of the study's; got 'multi-3'"):
        settings.load("luck", {"arms": "multi-3"})


def test_a_wrong_setting_names_its_field():
    with pytest.raises(SpecError, match=r"learning_rate.* greater than 0"):
        settings.load("luck", {"experiment.learning_rate": -1})
    with pytest.raises(SpecError, match="has no field `stepz`"):
        settings.load("luck", {"experiment.stepz": 1})


def test_a_share_of_networks_has_an_interval_within_what_shares_can_be():
    study = LaboratoryStudy(
        name="shares",
        num_seeds=5,
        experiment={"kind": "trainability"},
        arms={"deep": {}},
        contrasts=[],
    )
    values = dict(zip(study.places(), (1.0, 1.0, 1.0, 0.0, 1.0), strict=True))
    step, names = torch.tensor([9]), study.experiment.metrics()
    read = {v: dict.fromkeys(names, torch.tensor([v]).double()) for v in (0.0, 1.0)}
    found = {place: measures.Readings(step, read[v]) for place, v in values.items()}
    rows = {row["metric"]: row for row in luck.arms(study, found)}
    for name in ("trains", "trains@0.1"):
        assert rows[name]["interval"] == list(stats.share_interval(4, 5))
    assert rows["accuracy"]["interval"] == list(stats.mean_interval([*values.values()]))
