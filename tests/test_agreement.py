"""A study's tables do not depend on the engine that trained it."""

import pytest
import small

from windfall import tables

ENGINES = ("separate", "sparse", "stacked")
TABLES = ("arms", "verdicts", "comparisons")


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    """What a study found, by dtype and engine; made once."""
    known = {}

    def find(dtype: str, engine: str):
        if (dtype, engine) not in known:
            of = small.graph({"dtype": dtype}, num_seeds=3, engine=engine)
            lab = small.trained(of, tmp_path_factory.mktemp("agreement") / "lab")
            engines = {record.engine for record in lab.records(of.runs).values()}
            assert engines == {f"{engine}/cpu"}
            known[dtype, engine] = tables.summary(tables.outline(of), lab)
            lab.close()
        return known[dtype, engine]

    return find


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("table", TABLES)
def test_in_double_precision_the_tables_are_the_same_to_the_bit(summaries, table, engine):
    rows, others = (summaries("float64", name)[table] for name in (engine, "separate"))
    counted = [row for row in rows if row["metric"] != "distance"]
    assert counted == [row for row in others if row["metric"] != "distance"]
    assert counted


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_in_double_precision_the_distances_are_the_same_up_to_rounding(summaries, engine):
    ours, theirs = (summaries("float64", name)["arms"] for name in (engine, "separate"))
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a["metric"] == "distance"]
    assert pairs
    for one, other in pairs:
        values = [run["value"] for run in one["runs"]]
        assert values == pytest.approx([run["value"] for run in other["runs"]], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_in_single_precision_the_verdicts_are_the_same(summaries, engine):
    ours, theirs = (summaries("float32", name)["verdicts"] for name in (engine, "separate"))
    assert [(row["effect"], row["verdict"]) for row in ours] == [
        (row["effect"], row["verdict"]) for row in theirs
    ]
