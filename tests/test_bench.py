"""That the benchmarks run and compare what is equal; how long they take is the machine's affair."""

import io
import json

import pytest
from rich.console import Console

from windfall import bench
from windfall.spec import SpecError
from windfall.worker import quiet_machine


@pytest.mark.slow
def test_both_loops_of_the_overhead_end_with_the_same_weights_and_the_result_is_json():
    result = bench.BENCHMARKS["overhead"](num_steps=bench.WARM + 2, rounds=2)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["is_equal"]
    assert (result["num_steps"], result["rounds"]) == (bench.WARM + 2, 2)
    assert result["machine"]["threads"] == 1
    assert all(result["machine"].values())
    for spread in (*result["microseconds_per_step"].values(), result["ratio"]):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    out = io.StringIO()
    Console(file=out, width=100).print(bench.render(result))
    for word in ("bare", "engine / bare", f"{result['ratio']['median']:.3f}", "n = 2", "torch"):
        assert word in out.getvalue()


@pytest.mark.slow
def test_the_bare_loop_trains_the_kept_weights_and_a_step_more_would_be_seen():
    data, start = bench._images(), bench._beginning()
    with quiet_machine():
        _, bare = bench._bare(data, start, bench.WARM + 1)
        _, longer = bench._bare(data, start, bench.WARM + 2)
    for name, weight in bare.items():
        assert not weight.equal(start.params[name])
        assert not weight.equal(longer[name])
    mask = start.masks["hidden1.weight"]
    assert int(mask.sum()) == round(0.2 * 784 * 300)
    assert not bare["hidden1.weight"][~mask].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": bench.WARM}, f"`num_steps` must be at least {bench.WARM + 1}; got 20."),
        ({"rounds": 0}, "`rounds` must be at least 1; got 0."),
    ],
)
def test_too_little_to_measure_is_refused(settings, message):
    with pytest.raises(SpecError, match=message):
        bench.overhead(**settings)


def test_run_gives_the_named_benchmark_or_all_and_refuses_another(monkeypatch):
    monkeypatch.setattr(bench, "BENCHMARKS", {"one": lambda: {"n": 1}, "two": lambda: {"n": 2}})
    assert list(bench.run()) == [{"n": 1}, {"n": 2}]
    assert list(bench.run("two")) == [{"n": 2}]
    with pytest.raises(SpecError, match=r"NAME must be a benchmark; got 'on'.*`one`.*one, two"):
        next(bench.run("on"))
