"""That the benchmark of the laboratory compares what is equal, and its arithmetic."""

import pytest
import torch
from test_bench import Threads, check, check_spreads

from windfall import bench
from windfall.bench import luck, roofline
from windfall.bench.luck import MEASURED, OURS, PLAIN, Course, Mark, Plain, Round
from windfall.inputs import Gaussian
from windfall.laboratory import Laboratory, Training
from windfall.spec import SpecError
from windfall.students import Student, Subset
from windfall.teachers import Teacher
from windfall.worker import quiet_machine

TINY = Laboratory(
    teacher=Teacher(hidden=(3, 4)),
    student=Student(multi=2),
    inputs=Gaussian(dimension=5, num_train=64, num_evaluation=32),
    num_outputs=6,
    batch_size=8,
    steps=100,
    measure_every=10,
    num_coupled=16,
)
WEIGHTS = 5 * 6 + 6 * 8 + 8 * 6


@pytest.fixture
def in_threads(monkeypatch):
    monkeypatch.setattr(luck, "Crew", Threads)
    monkeypatch.setattr(luck, "num_cores", lambda: 2)
    monkeypatch.setattr(roofline, "SIDES", (16,))
    with quiet_machine():
        yield


# -- both sides train the same ---------------------------------------------------------------------


def test_both_sides_train_the_same_student():
    assert 0 < luck.difference(TINY) < 1e-4


def test_a_side_that_trains_something_else_is_seen(monkeypatch):
    step = Plain.step
    monkeypatch.setattr(Plain, "step", lambda self, inputs: step(self, 1.5 * inputs))
    assert luck.difference(TINY) > 0.1


def test_the_plain_loop_begins_with_the_student_and_the_teacher_of_the_experiment():
    training = Training(TINY, 0)
    plain = Plain(TINY, training.state().params)
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        assert torch.allclose(plain.student(inputs), training.network(inputs), atol=1e-6)
    goal = TINY.goal(0)
    for own, given in zip(plain.teacher.parameters(), goal.values(), strict=True):
        assert torch.equal(own, given.to(own))


def test_the_plain_loop_goes_over_its_inputs_as_often_as_it_must(monkeypatch):
    seen = []
    monkeypatch.setattr(Plain, "step", lambda _, inputs: seen.append(inputs))
    inputs = torch.arange(20.0)[:, None].expand(-1, 5)
    Plain(TINY, Training(TINY, 0).state().params).run(inputs, 7)
    assert [len(batch) for batch in seen] == [8, 8, 4, 8, 8, 4, 8]
    first, second = (torch.cat(seen[at : at + 3])[:, 0] for at in (0, 3))
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(20))
    assert first.tolist() != second.tolist()


# -- arithmetic ------------------------------------------------------------------------------------


def test_a_training_tells_beginning_steps_and_looks_apart():
    # begun at 10; 3 s of beginning, steps of 2 s, looks of 1 s, those of steps 0 and 8 of 5 s
    times = [(0, 12.5, 17.5), (1, 20, 21), (2, 23, 24), (4, 28, 29), (8, 37, 42)]
    marks = [Mark(*time) for time in times]
    told = luck.told(10.0, marks, lambda step: step % 8 == 0)
    assert told == {"beginning": 3.0, "step": 2.0, "look": 1.0, "rare_look": 5.0}
    told = luck.told(10.0, marks, lambda _: False)
    assert told["look"] == told["rare_look"] == 1.0


def test_a_whole_training_is_counted():
    course = Course.of(TINY)
    # 0, 1, 2, 4, 8, then every tenth; couplings at the start, at 10 and at the end
    assert (course.steps, course.looks, course.rare_looks) == (100, 12, 3)
    assert course.flops == 6 * WEIGHTS * 8 * 100
    default = Course.of(luck.EXPERIMENT)
    assert 10 * default.flops == pytest.approx(29.28e12)
    assert default.looks + default.rare_looks == 52


def test_the_slowest_process_counts_and_measuring_is_added():
    course = Course(steps=10, looks=3, rare_looks=2, flops=600.0)
    slow = {"beginning": 1.0, "step": 2.0, "look": 1.0, "rare_look": 2.0}
    fast = {"beginning": 0.5, "step": 1.0, "look": 1.0, "rare_look": 2.0}
    found = Round(
        {"step": 4.0},
        [fast, slow],
        [
            {"flops": 60.0, "sustained": 50.0},
            {"flops": 40.0, "sustained": 30.0},
        ],
    )
    assert course.seconds(found) == {PLAIN: 40.0, OURS: 21.0, MEASURED: 28.0}
    told = luck.summary(course, 5, [found])
    rows = {row["side"]: row for row in told["rows"]}
    assert [row["at_once"] for row in told["rows"]] == [1, 2, 2]

    def medians(name):
        return [rows[side][name]["median"] for side in (PLAIN, OURS, MEASURED)]

    assert medians("step_seconds") == [4.0, 2.1, 2.8]
    assert medians("trainings_seconds") == [5 * 40.0, 3 * 21.0, 3 * 28.0]  # two at a time
    rates = [600 / 40, 2 * 600 / 21, 2 * 600 / 28]
    assert medians("flops_per_second") == pytest.approx(rates)
    assert told["peak_flops_per_second"]["median"] == 100.0
    assert medians("fraction_of_peak") == pytest.approx([rate / 100 for rate in rates])
    assert medians("fraction_of_sustained") == pytest.approx([rate / 80 for rate in rates])
    assert medians("speedup") == pytest.approx([1.0, 200 / 63, 200 / 84])
    assert told["measuring_share"]["median"] == pytest.approx(7 / 28)


def test_products_are_timed_by_library(monkeypatch):
    monkeypatch.setattr(roofline, "SIDES", (8, 16))
    monkeypatch.setattr(roofline, "_rate", lambda work, call, seconds: (call(), work + seconds)[1])
    with quiet_machine():
        assert roofline.products(0.5) == {"torch": 2 * 16**3 + 0.5, "numpy": 2 * 16**3 + 0.5}


def test_sustained_products_are_about_as_much_work(monkeypatch):
    monkeypatch.setattr(roofline, "SIDE", 8)
    calls = []
    monkeypatch.setattr(roofline, "_torch_product", lambda side: lambda: calls.append(side))
    assert roofline.sustained(5.2 * 2 * 8**3) > 0
    assert calls == [8] * 5


# -- the benchmark ---------------------------------------------------------------------------------


def test_the_sides_and_the_peak_are_measured_round_by_round(in_threads):
    result = bench.BENCHMARKS["luck"](TINY, trainings=3, num_steps=12, rounds=2, peak_seconds=1e-6)
    assert [row["side"] for row in result["rows"]] == [PLAIN, OURS, MEASURED]
    assert (result["trainings"], result["num_steps"], result["looks"]) == (3, 12, 12)
    assert result["flops_per_step"] == 6 * WEIGHTS * 8
    assert result["flops"] == 3 * 100 * result["flops_per_step"]
    assert 0 < result["difference"] < 1e-4
    assert 0 < result["measuring_share"]["median"] < 1
    assert Laboratory.from_json(result["experiment"]) == TINY
    check_spreads(result)
    check(result, *(PLAIN, OURS, MEASURED), "% of peak", "x plain PyTorch", "3 trainings of 100")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 1}, "`num_steps` must be at least 2; got 1."),
        ({"trainings": 0}, "`trainings` must be at least 1; got 0."),
        ({"rounds": 0}, "`rounds` must be at least 1; got 0."),
        ({"peak_seconds": 0.0}, "`peak_seconds` must be at least 1e-09; got 0.0."),
    ],
)
def test_too_little_to_measure_is_refused(settings, message):
    with pytest.raises(SpecError, match=message):
        luck.measure(TINY, **settings)


@pytest.mark.parametrize(
    "changed",
    [
        {"loss": "cross-entropy"},
        {"dtype": "float64"},
        {"student": Student(multi=2, norm="after")},
        {"subset": Subset()},
        {"inputs": Gaussian(dimension=5, num_train=None)},
    ],
)
def test_an_experiment_that_the_plain_loop_does_not_train_is_refused(changed):
    with pytest.raises(SpecError, match="`experiment` must be of squared errors in float32"):
        luck.measure(TINY.model_copy(update=changed))
