"""Whether it would pay to remove channels: told before anything is trained."""

import json
import math

import pytest
import small
from typer.testing import CliRunner

from windfall import cli, display, flops, latency, models, prospects, structure, verbs

FILTERS = {"criterion": "filter-norm", "structure": "channels", "selection": {"convolution": 0.5}}
SHAPE = (1, 8, 8)


def graph(**changes):
    settings = {"model": {"kind": "conv-2", "width": 0.25}, "prune": FILTERS, "levels": 3}
    return small.graph(arms=["dense", "scratch-e"], **(settings | changes))


def test_the_shapes_that_are_timed_are_those_that_stay(monkeypatch):
    seen = {}

    def measured(networks, shape, batch_sizes, *, seconds):
        seen.update(networks)
        return {1: {name: latency.Latency((1.0, 2.0 + float(name))) for name in networks}}

    monkeypatch.setattr(latency, "measured", measured)
    of = graph(verdict_level=2)
    rows = prospects.prospects(of)
    assert [row["level"] for row in rows] == [1, 2, 3]
    whole = models.Conv_2(width=0.25).build(SHAPE, 10)
    assert structure.shapes(structure.tensors(seen["0"])) == structure.shapes(
        structure.tensors(whole)
    )
    for level in (1, 2, 3):
        first, second = (seen[str(level)].get_parameter(f"conv{i}.weight") for i in (1, 2))
        kept = round(16 * 0.5**level)
        assert first.shape == (kept, 1, 3, 3) and second.shape == (kept, kept, 3, 3)
        own = flops.multiply_adds(seen[str(level)], SHAPE)
        ratio = sum(own.values()) / sum(flops.multiply_adds(whole, SHAPE).values())
        assert rows[level - 1]["flops_ratio"] == ratio


def test_what_stays_is_as_many_weights_as_are_planned():
    of = graph()
    for level in (1, 2, 3):
        shapes = of.network.smaller(of.study.prune, level)
        kept = of.network.kept(of.study.prune, level)
        assert all(math.prod(shapes[name]) == kept[name] for name in kept)


def test_where_single_weights_go_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(latency, "measured", None)
    assert prospects.prospects(small.graph()) == []


@pytest.mark.parametrize(
    "model",
    [{"kind": "resnet-20", "width": 0.125}, {"kind": "densenet-40", "width": 0.34}],
)
def test_networks_that_add_and_concatenate_are_timed_too(model):
    of = graph(model=model, levels=1)
    rows = prospects.prospects(of)
    assert [row["batch_size"] for row in rows] == [1, 64]
    assert all(row["before"]["median"] > 0 < row["after"]["median"] for row in rows)
    assert all(row["after_is"] in ("faster", "same", "slower") for row in rows)


def test_blocks_that_may_go_are_planned_to_stay():
    gates = {"criterion": "gate", "structure": "blocks", "selection": "positive"}
    model = {"kind": "resnet-20", "width": 0.125, "gates": True}
    rows = prospects.prospects(graph(model=model, prune=gates, levels=1))
    assert {row["flops_ratio"] for row in rows} == {1.0}


def test_plan_tells_it_in_json_and_in_words(tmp_path):
    settings = {"prune.criterion": "filter-norm", "prune.structure": "channels", "levels": 1,
                "arms": ["dense", "scratch-e"], "verdict_level": 1}  # fmt: skip
    document = verbs.plan("lottery", settings, lab=tmp_path / "lab")
    assert {row["batch_size"] for row in document["latency"]} == {1, 64}
    json.dumps(document, allow_nan=False)
    pairs = [f"{path}={value if isinstance(value, (str, int)) else ','.join(value)}"
             for path, value in settings.items()]  # fmt: skip
    told = CliRunner().invoke(
        cli.app,
        ["plan", "lottery", "--lab", str(tmp_path / "lab")]
        + [each for pair in pairs for each in ("--set", pair)],
    )
    assert told.exit_code == 0
    assert "A pass through what would stay, untrained" in told.stdout
    assert not (tmp_path / "lab").exists()


def test_what_takes_seconds_is_told_beforehand(monkeypatch, capsys):
    monkeypatch.setattr(prospects, "TELL_FLOPS", 0.0)
    prospects.prospects(graph(levels=1))
    assert "timing the network with and without what is to go" in capsys.readouterr().err


def test_a_row_that_is_no_faster_says_so():
    times = latency.Latency((1.0, 1.0, 1.0))
    row = {"level": 1, "flops_ratio": 0.5, **latency.compared(1, times, times)}
    table = display._prospects({"latency": [row]})[0]
    assert "not faster" in [cell for column in table.columns for cell in column.cells]
