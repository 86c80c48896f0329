"""That the benchmarks run and compare what is equal; how long they take is the machine's affair."""

import dataclasses
import importlib
import io
import json
import queue
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from windfall import bench
from windfall.bench import (
    overhead,
    plain,
    process,
    replicas,
    roofline,
    shrink,
    step,
    study,
    teams,
)
from windfall.bench.crew import Crew, elapsed_seconds
from windfall.bench.networks import NETWORKS, Network, chosen, images
from windfall.bench.teams import Team
from windfall.bench.worker import JOBS
from windfall.cli import app
from windfall.engines import separate
from windfall.models import Mlp
from windfall.spec import SpecError
from windfall.train import Adam, Recipe, Sgd
from windfall.worker import quiet_machine

TINY = Network(
    name="tiny",
    model=Mlp(hidden=(16, 8)),
    input_shape=(1, 8, 8),
    num_train=256,
    recipe=Recipe(optimizer=Adam(), learning_rate=1e-3, batch_size=16, steps=10**9, eval_every=4),
)


class Over(BaseException):
    """Nobody asks any more."""


class Threads:
    """A crew whose members are threads of this process: its jobs without the seconds of imports."""

    def __init__(self, job, processes, threads, environment=None):
        self.pipes = [(queue.Queue(), queue.Queue()) for _ in range(processes)]
        serve = importlib.import_module(JOBS[job]).serve
        self.threads = [
            threading.Thread(target=self.work, args=(serve, *pipe), daemon=True)
            for pipe in self.pipes
        ]
        for thread in self.threads:
            thread.start()

    @staticmethod
    def work(serve, messages, answers):
        def talk(answer):
            if answer is not None:
                answers.put(json.dumps(answer))
            message = messages.get()
            if message is None:
                raise Over
            return json.loads(message)

        try:
            serve(talk)
        except Over:
            pass
        except Exception as problem:
            answers.put(problem)

    def ask(self, *messages):
        each = messages * len(self.pipes) if len(messages) == 1 else messages
        for (inbox, _), message in zip(self.pipes, each, strict=True):
            inbox.put(json.dumps(message))
        answers = [outbox.get(timeout=60) for _, outbox in self.pipes]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [json.loads(answer) for answer in answers]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for (inbox, _), thread in zip(self.pipes, self.threads, strict=True):
            inbox.put(None)
            thread.join(60)


@pytest.fixture
def in_threads(monkeypatch):
    for module in (step, study, replicas, process, roofline):
        monkeypatch.setattr(module, "Crew", Threads)
    for module in (teams, study, replicas):
        monkeypatch.setattr(module, "num_cores", lambda: 2)
    with quiet_machine():
        yield


def check(result, *words):
    """That a result is JSON, names its machine, and its table has these words."""
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert all(value for name, value in result["machine"].items() if name != "load")
    out = io.StringIO()
    Console(file=out, width=200).print(bench.render(result))
    for word in (result["benchmark"], "torch", *words):
        assert word in out.getvalue()


def spreads(value):
    """All spreads in a result."""
    if isinstance(value, dict) and set(value) == {"min", "median", "max"}:
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from spreads(item)


def check_spreads(result, least=0.0):
    found = list(spreads(result))
    assert found
    for each in found:
        assert least <= each["min"] <= each["median"] <= each["max"]


# -- the yardstick and what is trained -------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [Adam(), Sgd(momentum=0.9, weight_decay=1e-4)])
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_the_plain_loop_gives_the_training_of_the_separate_engine_bit_for_bit(optimizer, density):
    recipe = TINY.recipe.model_copy(update={"optimizer": optimizer, "eval_every": 7})
    network = TINY.model_copy(update={"recipe": recipe})
    data, start = images(network, 5, 6), network.beginning(density, seed=3)
    with quiet_machine():
        ours, theirs = (
            train(network.task(data, 3, 20), start, lambda *_: None)
            for train in (plain.train, separate.train)
        )
    for name, weight in theirs.params.items():
        assert torch.equal(weight, ours.params[name])
        assert not torch.equal(weight, start.params[name])
    assert [e.test_loss for e in ours.evaluations] == [e.test_loss for e in theirs.evaluations]
    assert [e.step for e in ours.evaluations] == [0, 7, 14, 20]


@pytest.mark.slow
def test_the_plain_loop_in_the_other_layout_gives_the_same_training_up_to_rounding():
    network = NETWORKS["conv-4"].model_copy(update={"num_train": 64})
    network = network.model_copy(update={"model": network.model.model_copy(update={"width": 0.1})})
    data, start = images(network), network.beginning(0.3, seed=0)
    one, other = (
        plain.train(network.task(data, 0, 2), start, lambda _: None, channels_last=layout)
        for layout in (False, True)
    )
    assert 0 < step._distance(one, other) < 1e-3 * step._distance(one, start)
    assert other.params["conv2.weight"].is_contiguous(memory_format=torch.channels_last)
    assert not other.params["conv2.weight"][~start.masks["conv2.weight"]].any()


def test_masks_are_of_one_density_and_of_twice_that_in_the_output_layer():
    sizes = {"hidden1.weight": 64 * 16, "hidden2.weight": 16 * 8, "output.weight": 80}
    masks = TINY.masks(0.25, seed=0)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "hidden1.weight": sizes["hidden1.weight"] // 4,
        "hidden2.weight": sizes["hidden2.weight"] // 4,
        "output.weight": sizes["output.weight"] // 2,
    }
    assert bool(TINY.masks(0.9, seed=0)["output.weight"].all())
    assert TINY.masks(1.0, seed=0) == {}


def test_every_network_says_what_its_recipe_trains():
    assert [(n.recipe.batch_size, n.recipe.learning_rate) for n in NETWORKS.values()] == [
        (60, 1.2e-3),
        (128, 0.1),
        (60, 3e-4),
        (128, 0.1),
    ]
    assert [n.is_convolutional for n in NETWORKS.values()] == [False, False, True, True]


def test_a_missing_engine_is_left_out_and_said_and_an_unknown_one_refused(monkeypatch):
    monkeypatch.setitem(teams.ENGINES, "stacked", "windfall.engines.none")
    found, missing = teams.present(["separate", "stacked"])
    assert found == ["separate"]
    assert "windfall.engines.none" in missing["stacked"]
    with pytest.raises(SpecError, match=r"`engines` must be of known names; got 'sparce'.*`sparse"):
        teams.present(["sparce"])


# -- processes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_crew_of_processes_trains_at_once_and_a_failure_is_told():
    team = Team(name="separate", engine="separate", processes=2)
    asked = {"team": team.to_json(), "network": TINY.to_json(), "density": 0.2}
    with Crew("step", 2, 1) as crew:
        ready = crew.ask(*(asked | {"process": place} for place in range(2)))
        assert all(0 < answer["error"] < 1e-4 for answer in ready)
        answers = crew.ask({"intervals": 20})
        spans = [(answer["began"], answer["ended"]) for answer in answers]
        assert max(began for began, _ in spans) < min(ended for _, ended in spans)
        assert elapsed_seconds(answers) >= max(ended - began for began, ended in spans)
        with pytest.raises(RuntimeError, match="KeyError: 'intervals'"):
            crew.ask({"none": 1})


# -- the benchmarks --------------------------------------------------------------------------------


def test_both_loops_of_the_overhead_end_with_the_same_weights():
    result = overhead.measure(num_steps=overhead.WARM + 2, rounds=2, network=TINY)
    assert result["is_equal"]
    assert (result["num_steps"], result["rounds"]) == (overhead.WARM + 2, 2)
    assert result["machine"]["threads"] == 1
    check_spreads(result)
    check(result, "bare", "engine / bare", f"{result['ratio']['median']:.3f}", "n = 2")


def test_the_step_is_timed_by_every_team_against_the_plain_loop(in_threads):
    result = step.measure((TINY,), (1.0, 0.1), ("separate",), rounds=1, lap_seconds=1e-4)
    names = ["plain, all threads", "plain, one a core", "separate, alone", "separate, one a core"]
    for row in result["rows"]:
        micro = row["microseconds_per_step"]
        assert list(micro) == names
        assert all(0 < error < 1e-4 for error in row["error"].values())
        assert row["error"][names[0]] == row["error"][names[2]]  # equal bit for bit
        assert list(row["speedup"]) == names[:2]
        for gauge, gains in row["speedup"].items():
            assert list(gains) == [name for name in names if name != gauge]
            for name, gain in gains.items():  # of one round: the ratio of the numbers shown
                expected = micro[gauge]["median"] / micro[name]["median"]
                assert gain["median"] == pytest.approx(expected)
    kept = [round(0.1 * 64 * 16) + round(0.1 * 16 * 8) + round(0.2 * 80)]
    assert [row["kept"] for row in result["rows"]] == [64 * 16 + 16 * 8 + 80, *kept]
    check_spreads(result)
    check(result, "tiny", *names)


def test_of_two_layouts_the_faster_is_the_yardstick():
    gauges = teams.yardsticks(is_convolutional=True)
    names = [team.name for team in gauges]
    assert len(names) == len(set(names)) == 4
    times = dict(zip(names, ([3.0, 3.0], [2.0, 9.0], [1.0, 1.0], [0.5, 0.6]), strict=True))
    fastest = step._fastest(gauges, step.Laps(times))
    assert [names.index(name) for name in fastest] == [0, 3]


def test_an_engine_that_trains_something_else_is_seen(monkeypatch):
    class Other:
        @staticmethod
        def train(task, state, pulse):
            return separate.train(dataclasses.replace(task, seed=1), state, pulse)

    team, data = Team(name="separate", engine="separate"), images(TINY)
    assert 0 < step._error(team, TINY, data, 0.2, [0]) < 1e-4
    monkeypatch.setattr(teams, "_module", lambda _: Other)
    assert step._error(team, TINY, data, 0.2, [0]) > 0.1


@pytest.mark.parametrize("engine", teams.ENGINES)
def test_every_engine_gives_the_training_of_the_plain_loop_up_to_rounding(engine):
    found, missing = teams.present([engine])
    if not found:
        pytest.skip(missing[engine])
    for team in teams.engine_teams(engine):
        assert step._error(team, TINY, images(TINY), 0.2, team.seeds(0)) < 1e-4


@pytest.mark.slow
def test_a_study_is_a_chain_of_exact_counts_on_every_side(in_threads):
    result = study.measure(
        (TINY,), ("separate",), epochs=16, levels=2, rounds=1, evaluations=2, evaluated=(20, 30)
    )
    (each,) = result["networks"]
    assert (each["data"], each["steps_per_level"]) == ("random images", 256)
    assert each["plain_steps_per_level"] == 256
    expected = [64 * 16 + 16 * 8 + 80]
    expected += [
        round(64 * 16 * 0.8**level) + round(16 * 8 * 0.8**level) + round(80 * 0.9**level)
        for level in (1, 2)
    ]
    for rows in each["levels"].values():
        assert [row["kept"] for row in rows] == [[count] for count in expected]
    accuracies = [[row["test_accuracy"] for row in rows] for rows in each["levels"].values()]
    assert accuracies[0] == accuracies[1]  # as many steps: the same training
    for phase in ("steps", "wall"):
        plain_seconds, own = (each["seconds"][n][phase]["median"] for n in ("plain", "separate"))
        assert each["speedup"]["separate"][phase]["median"] == pytest.approx(plain_seconds / own)
    check_spreads(result)
    check(result, "random images", "256 steps a level", "separate")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 1}, r"`epochs` must be so many .* every 128 steps or more of tiny; got 1"),
        ({"evaluations": 1}, "`evaluations` must be at least 2; got 1."),
        ({"epochs": 16, "evaluations": 2, "plain_steps": 2}, "`plain_steps` must be at least 256"),
        ({"levels": 0}, "`levels` must be at least 1; got 0."),
    ],
)
def test_a_study_too_short_to_be_told_apart_is_refused(settings, message):
    with pytest.raises(SpecError, match=message):
        study.measure((TINY,), ("separate",), **settings)


def test_the_clock_tells_steps_evaluations_and_packing_apart():
    # steps of 1 s, evaluations of 5 s every 4 steps, 3 s of packing before and 2 s after
    times = [0 + 3 + 5, 10, 17, 19, 26]
    clock = study.Clock(4, list(zip([0, 2, 4, 6, 8], times, strict=True)))
    whole = 26 + 4 + 5 + 2
    assert clock.seconds(whole, 12) == {"steps": 12, "evaluation": 20, "packing": 5}


def test_the_seconds_of_a_shorter_plain_loop_are_multiplied_but_its_evaluations_are_not():
    rows = [{"steps": 1.0, "evaluation": 0.5, "pruning": 0.25, "packing": 0.125}] * 2
    answers = [{"began": 0.0, "ended": 4.0, "rows": rows}]
    size = study._Size([0, 1, 2, 3], 100, [0, 3], 25, 2, (1, 1))
    times = size.times(answers, Team(name="plain", engine="plain"))
    assert times == {
        "steps": 2 * 8.0,
        "evaluation": 2.0,
        "pruning": 1.0,
        "packing": 0.5,
        "wall": 16 + 2 + 1 + 0.5 + 2 * (4 - 3.75),
    }
    engine = size.times(answers, Team(name="separate", engine="separate"))
    assert engine == {"steps": 2.0, "evaluation": 1, "pruning": 0.5, "packing": 0.25, "wall": 4}


def test_networks_a_second_are_counted_by_their_number(in_threads, monkeypatch):
    monkeypatch.setattr(replicas, "FEW", 4)
    result = replicas.measure(TINY, (1.0, 0.1), (1, 3), ("separate",), rounds=1, seconds=1e-6)
    seen = [(row["engine"], row["density"], row["replicas"]) for row in result["rows"]]
    engines = [("plain", 1), ("plain", 3), ("separate", 1), ("separate", 3)]
    assert seen == [(name, density, count) for density in (1.0, 0.1) for name, count in engines]
    assert all(row["steps"] == 4 for row in result["rows"])
    check_spreads(result)
    check(result, "tiny", "replica-steps a second")


def test_the_needs_of_a_step_are_counted():
    need = roofline.needs(TINY, 0.25)
    kept = [256, 32, 40]
    assert need["kept"] == sum(kept)
    assert need["flops"] == 6 * 16 * sum(kept)
    assert need["executed_flops"] == 6 * 16 * sum(kept) - 2 * 16 * 256
    assert need["weight_bytes"] == sum(kept) * (3 * 8 + 4 * 5)  # Adam: two moments, read, written
    moved = 2 * 64 + 3 * 16 + 3 * (16 + 8) + 3 * (8 + 10)
    assert need["activation_bytes"] == 4 * 16 * moved


def test_the_roofline_is_the_share_of_the_peaks_that_are_shown(in_threads, monkeypatch):
    monkeypatch.setattr(roofline, "SIDES", (32,))
    monkeypatch.setattr(roofline, "DRAM_BYTES", 2**20)
    result = roofline.measure((TINY,), (0.25,), ("separate",), rounds=1, lap_seconds=1e-4)
    (row,), peaks = result["rows"], result["peaks"]
    rate = row["executed_flops"] / row["seconds"]["median"]
    assert row["flops_per_second"]["median"] == pytest.approx(rate)
    assert row["fraction_of_peak"]["median"] == pytest.approx(rate / peaks["flops"])
    assert row["memory"] == "L2"
    check_spreads(result)
    check(result, "tiny", "GFLOP/s", "L2")


@pytest.mark.parametrize(
    ("size", "memory", "bound_by", "bound"),
    [
        (2_000, "L2", "arithmetic", 4.0),
        (6_000, "L3", "bandwidth", 6.0),
        (2**40, "DRAM", None, None),
    ],
)
def test_the_bound_is_the_longer_of_arithmetic_and_bandwidth(size, memory, bound_by, bound):
    peaks = {
        "flops": 1_000.0,
        "bandwidth": {"L2": 10_000.0, "L3": 1_000.0, "DRAM": 100.0},
        "array_bytes": {"L2": 1_000, "L3": 4_000, "DRAM": 16_000},
    }
    need = {"executed_flops": 4_000, "weight_bytes": size - 1, "activation_bytes": 1}
    told = roofline.reached(need, peaks, [8.0])
    assert told["memory"] == memory
    if bound is not None:
        assert (told["bound_by"], told["bound_seconds"]) == (bound_by, bound)
        assert told["fraction_of_bound"]["median"] == bound / 8
        assert told["fraction_of_peak"]["median"] == 0.5


def test_the_memory_and_the_first_step_of_a_process_are_told(in_threads):
    result = process.measure(
        (TINY,), (1.0, 0.1), ("separate",), num_steps=2, rounds=1, evaluated=(4, 4)
    )
    seen = [(row["density"], row["engine"]) for row in result["memory"]]
    assert seen == [(density, name) for density in (1.0, 0.1) for name in ("plain", "separate")]
    dense = result["memory"][0]["peak_bytes"]["median"]
    for row in result["memory"]:
        assert 0 <= row["training_bytes"]["min"] <= row["training_bytes"]["max"]
        assert row["training_bytes"]["median"] + 2**25 < row["peak_bytes"]["median"] < 2**36
        assert row["ratio"]["median"] == pytest.approx(row["peak_bytes"]["median"] / dense)
    told = [(row["engine"], row["cache"]) for row in result["first_step"]]
    assert told == [(n, cache) for n in ("plain", "separate") for cache in ("cold", "warm")]
    for row in result["first_step"]:
        assert 0 < row["training_seconds"]["median"] < row["seconds"]["median"]
    check(result, "peak memory, MiB", "cold cache")


@pytest.mark.slow
def test_a_first_step_is_counted_from_the_start_of_its_process():
    told = process._trained(Team(name="plain", engine="plain"), TINY, 0.1, 1, (1, 1), "nowhere")
    assert told["since_start"] > told["seconds"] > 0
    assert 2**25 < told["before"] <= told["before"] + told["training"] <= told["peak"] < 2**33


@pytest.mark.skipif(not process.STATUS.exists(), reason="needs /proc")
def test_the_peak_of_a_process_is_that_since_the_last_was_forgotten():
    process.forget_peak()
    before = process.peak_bytes()
    held = torch.ones(2**27, dtype=torch.uint8)
    assert process.peak_bytes() >= before + 0.9 * len(held)
    del held
    process.forget_peak()
    assert process.peak_bytes() < before + 2**26


# -- the yardsticks of the folder `bench` ----------------------------------------------------------


@pytest.fixture
def layers(monkeypatch):
    pytest.importorskip("windfall.engines.sparse")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    return importlib.import_module("layers")


def test_a_layer_by_the_sparse_kernels_is_the_dense_one(layers):
    with quiet_machine():
        for case in layers.cases([(40, 24, 32)], [(8, 6, 16)]):
            for density in (1.0, 0.3):
                row = layers.row(case, density, ["torch", "windfall"], rounds=1, seconds=1e-5)
                assert 0 < row["error"]["windfall"] < 1e-5
                micro = {n: s["median"] for n, s in row["microseconds"].items()}
                fastest = min(value for name, value in micro.items() if name != "windfall")
                speedup = row["speedup"]["torch"]["median"]
                assert speedup == pytest.approx(fastest / micro["windfall"])


def test_the_break_even_is_where_the_times_cross(layers):
    def rows(*pairs):
        return [{"layer": "a", "density": d, "speedup": {"torch": {"median": x}}} for d, x in pairs]

    assert layers.break_even(rows((1.0, 0.5), (0.5, 2.0), (0.1, 9.0))) == {
        "a": pytest.approx(0.5 + 0.5 * (1 - 0.5) / (2 - 0.5))
    }
    assert layers.break_even(rows((1.0, 1.5), (0.5, 2.0))) == {"a": 1.0}
    assert layers.break_even(rows((1.0, 0.5), (0.5, 0.9))) == {"a": None}


# -- shrink ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", shrink.SHRUNK)
def test_a_smaller_network_is_that_of_torch_pruning_for_the_same_channels(name):
    result = shrink.measure(networks=(name,), batch_sizes=(1, 2), rounds=3, lap_seconds=1e-6,
                            width=0.25)  # fmt: skip
    assert [row["batch_size"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        macs, sizes = row["multiply_adds"], row["num_parameters"]
        assert macs["windfall"] == macs["torch-pruning"] < macs["whole"]
        assert sizes["windfall"] == sizes["torch-pruning"] < sizes["whole"]
        assert row["flop_ratio"] == macs["whole"] / macs["windfall"]
        assert row["output_difference"] < 1e-5
        times = row["milliseconds"]
        assert all(0 < t["lower"] <= t["median"] <= t["upper"] for t in times.values())
    check(result, name, f"{result['rows'][1]['flop_ratio']:.2f}")


def test_networks_of_other_shapes_are_not_compared():
    one, other = (torch.nn.Conv2d(3, channels, 3) for channels in (4, 5))
    with pytest.raises(RuntimeError, match="differ in shape: weight, bias"):
        shrink._check_equal(one, other)


def test_the_interval_of_a_median_is_of_order_statistics():
    found = shrink.median_interval([float(i) for i in range(1, 22)], [1.0] * 21)
    assert found == {"median": 11.0, "interval": [6.0, 16.0]}  # Conover 1999, table A3, n = 21
    assert shrink.median_interval([1.0, 4.0], [2.0, 2.0]) == {"median": 1.25, "interval": [0.5, 2]}


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("overhead", {"num_steps": overhead.WARM}, "`num_steps` must be at least 21; got 20."),
        ("overhead", {"rounds": 0}, "`rounds` must be at least 1; got 0."),
        ("step", {"densities": (0.0,)}, r"`densities` must lie in \(0, 1\], .* got \[0.0\]"),
        ("step", {"densities": ()}, r"`densities` must lie in \(0, 1\], one at least; got \[\]"),
        ("step", {"lap_seconds": float("nan")}, "`lap_seconds` must be at least 1e-09; got nan."),
        ("step", {"networks": ("lenet",)}, "`networks` must be of known names; got 'lenet'"),
        ("replicas", {"counts": (2, 0)}, "`counts` must be at least 1; got 0."),
        ("process", {"num_steps": 0}, "`num_steps` must be at least 1; got 0."),
        ("shrink", {"rounds": 1}, "`rounds` must be at least 2; got 1."),
        ("shrink", {"removed": 1.0}, r"`removed` must lie in \(0, 1\); got 1.0."),
        ("shrink", {"networks": ("vgg",)}, "`networks` must be of known names; got 'vgg'.*vgg-16"),
    ],
)
def test_too_little_to_measure_is_refused(name, settings, message):
    with pytest.raises(SpecError, match=message):
        bench.BENCHMARKS[name](**settings)


def test_networks_are_chosen_by_name_or_given():
    assert chosen(["conv-4", TINY]) == [NETWORKS["conv-4"], TINY]
    with pytest.raises(SpecError, match="`networks` must name one at least"):
        chosen([])


def test_run_gives_the_named_benchmark_or_all_and_refuses_another(monkeypatch):
    benchmarks = {"one": lambda: {"n": 1}, "two": lambda: {"n": 2}}
    monkeypatch.setattr(bench, "BENCHMARKS", benchmarks)
    assert list(bench.run()) == [{"n": 1}, {"n": 2}]
    assert list(bench.run("two")) == [{"n": 2}]
    with pytest.raises(SpecError, match=r"NAME must be a benchmark; got 'on'.*`one`.*one, two"):
        next(bench.run("on"))


def test_run_takes_settings_and_refuses_those_that_are_none(monkeypatch):
    def one(rounds: int = 3, sizes: tuple[float, ...] = ()) -> dict:
        return {"rounds": rounds, "sizes": list(sizes)}

    monkeypatch.setattr(bench, "BENCHMARKS", {"one": one})
    assert list(bench.run("one", {"rounds": 5, "sizes": [1, 2]})) == [
        {"rounds": 5, "sizes": [1.0, 2.0]}
    ]
    with pytest.raises(SpecError, match=r"no setting `round`. Did you mean `rounds`\?"):
        next(bench.run("one", {"round": 5}))
    with pytest.raises(SpecError, match="`rounds` must be a valid integer"):
        next(bench.run("one", {"rounds": "many"}))
    with pytest.raises(SpecError, match="`--set` must be given with the NAME"):
        next(bench.run(None, {"rounds": 5}))


def test_the_verb_prints_a_table_and_writes_json(tmp_path, monkeypatch):
    def short(rounds: int = 3) -> dict:
        return overhead.measure(num_steps=overhead.WARM + 1, rounds=rounds, network=TINY)

    monkeypatch.setattr(bench, "BENCHMARKS", {"overhead": short})
    path = tmp_path / "result.json"
    called = CliRunner().invoke(app, ["bench", "overhead", "--set", "rounds=2", "-o", str(path)])
    assert called.exit_code == 0, called.output
    (result,) = json.loads(path.read_text())["benchmarks"]
    assert result["rounds"] == 2
    assert f"{result['ratio']['median']:.3f}" in called.stdout
    called = CliRunner().invoke(app, ["bench", "overhead", "--json"])
    assert json.loads(called.stdout)["benchmarks"][0]["rounds"] == 3
