import itertools
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from windfall import drawing, plots

Row = dict[str, Any]
WIDTHS = (drawing.WIDE, drawing.NARROW)


def arm_rows(
    metric: str, *, arms: tuple[str, ...] = ("ticket", "reinit"), levels: int = 4
) -> list[Row]:
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for arm, level in [("dense", 0), *itertools.product(arms, range(1, levels + 1))]:
        mean = rng.uniform(2000, 9000) if metric == "early_stop_step" else rng.uniform(0.5, 0.99)
        rows.append(
            {
                "arm": arm,
                "level": level,
                "density": 0.8**level,
                "metric": metric,
                "mean": mean,
                "interval": [0.99 * mean, 1.01 * mean],
                "num_seeds": 5,
                "num_censored": 0,
            }
        )
    return rows


def curve_rows(levels: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> list[Row]:
    steps = np.arange(0, 1001, 50)
    rows: list[Row] = []
    for level, arm in itertools.product(levels, ("ticket", "reinit")):
        loss = 0.1 + 0.02 * level + 2 * np.exp(-steps / 80)
        sides = {
            "mean": loss.tolist(),
            "low": (loss - 0.01).tolist(),
            "high": (loss + 0.01).tolist(),
        }
        accuracy = {side: [1 - value / 3 for value in values] for side, values in sides.items()}
        rows.append(
            {
                "arm": arm if level else "dense",
                "level": level,
                "density": 0.8**level,
                "steps": steps.tolist(),
                "validation_loss": sides,
                "test_accuracy": accuracy,
            }
        )
    return rows


def layer_rows(levels: int, names: tuple[str, ...] = ("conv1.weight", "fc1.weight")) -> list[Row]:
    return [
        {"level": level, "layer": layer, "kept": round(1000 * 0.7**level) - index, "total": 1000}
        for level in range(levels + 1)
        for index, layer in enumerate(names)
    ]


def picture_rows(count: int, layers: tuple[str, ...] = ("fc1.weight",)) -> list[Row]:
    rng = np.random.default_rng(0)
    return [
        {
            "level": level,
            "density": 0.8**level,
            "layer": layers[level % len(layers)],
            "counts": rng.integers(0, 300, (6, 8)).tolist(),
        }
        for level in range(1, count + 1)
    ]


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    named = ((str(line.get_label()), line) for line in axes.get_lines())
    return {
        name: (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for name, line in named
        if not name.startswith("_")
    }


at_start = partial(plots.accuracy, metric="test_accuracy_at_start")


def texts(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize("width_inches", WIDTHS)
@pytest.mark.parametrize(
    ("draw", "metric", "scale"),
    [
        (plots.accuracy, "test_accuracy", 100),
        (at_start, "test_accuracy_at_start", 100),
        (plots.early_stop, "early_stop_step", 1),
        (plots.overlap, "mask_overlap", 1),
    ],
)
def test_a_line_is_the_dense_point_and_then_the_rows_of_its_arm(draw, metric, scale, width_inches):
    rows = arm_rows(metric)
    figure = draw(rows[::-1], width_inches=width_inches)
    drawn = lines(figure.axes[0])
    assert set(drawn) == {"dense", "ticket", "reinit"}
    for arm, (density, mean) in drawn.items():
        points = [row for row in rows if row["arm"] in {"dense", arm}]
        assert density == [row["density"] for row in points]
        np.testing.assert_allclose(mean, [scale * row["mean"] for row in points], rtol=1e-12)
    assert isinstance(figure, Figure)
    assert figure.get_size_inches()[0] == width_inches
    drawing.svg(figure)


def test_an_interval_is_drawn_from_its_lower_to_its_upper_end():
    rows = arm_rows("test_accuracy", arms=("ticket",))
    bars = plots.accuracy(rows).axes[0].collections[1]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, [[100 * end for end in row["interval"]] for row in rows])


def test_the_density_axis_runs_from_everything_to_little_in_percent():
    axes = plots.accuracy(arm_rows("test_accuracy", levels=20)).axes[0]
    left, right = axes.get_xlim()
    assert axes.get_xscale() == "log"
    assert left > 1 > right > 0
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[0] == "100"
    assert 3 < len(labels) < 15
    assert set(labels) <= {f"{100 * 0.8**level:.3g}" for level in range(21)}


def test_a_mean_with_censored_runs_is_hollow_and_a_footnote_says_why():
    rows = arm_rows("early_stop_step")
    assert "lower bound" not in texts(plots.early_stop(rows))
    rows[-1]["num_censored"] = 2
    figure = plots.early_stop(rows)
    hollow = [
        line
        for line in figure.axes[0].get_lines()
        if line.get_markerfacecolor() == drawing.COLORS["paper"]
    ]
    assert [line.get_xydata().tolist() for line in hollow] == [
        [[rows[-1]["density"], rows[-1]["mean"]]]
    ]
    assert "lower bound" in texts(figure)


def test_a_missing_value_leaves_a_gap_in_the_line():
    rows = arm_rows("test_accuracy")
    rows[2] |= {"mean": None, "interval": None}
    density, mean = lines(plots.accuracy(rows).axes[0])["ticket"]
    assert np.isnan(mean).tolist() == [False, False, True, False, False]
    assert density == [0.8**level for level in range(5)]


def test_an_arm_has_the_same_color_and_marker_in_every_figure():
    drawn = [
        plots.accuracy(arm_rows("test_accuracy")),
        plots.early_stop(arm_rows("early_stop_step")),
        plots.learning_curves(curve_rows()),
    ]
    for figure in drawn:
        for line in figure.axes[0].get_lines():
            if str(line.get_label()) in {"ticket", "reinit"}:
                assert line.get_color() == drawing.COLORS[drawing.look(str(line.get_label())).color]


def test_arms_that_meet_in_one_study_differ_in_color_and_in_marker():
    arms = ("dense", "ticket", "rewind", "finetune", "reinit", "shuffled", "random", "scratch-e")
    assert len({drawing.LOOKS[arm].color for arm in arms}) == len(arms)
    assert len({drawing.LOOKS[arm].marker for arm in arms if arm != "dense"}) == len(arms) - 1


def kept_rows(num_layers: int = 6, num_seeds: int = 3) -> list[Row]:
    return [
        {
            "layer": f"conv{index}.weight",
            "stage": 1 + 2 * index // num_layers,
            "is_shared": index == 1,
            "kept": [0.1 * (index % 7 + 1) + 0.01 * seed for seed in range(num_seeds)],
        }
        for index in range(num_layers)
    ]


STAGES = [
    {
        "stage": stage,
        "mean": 0.25 * stage,
        "kernel": [[0.1 * stage] * 3, [0.2, 0.9, 0.2], [0.0] * 3],
    }
    for stage in (1, 2)
]


@pytest.mark.parametrize("width_inches", WIDTHS)
def test_a_pattern_has_a_bar_for_each_layer_and_a_line_for_each_stage(width_inches):
    rows = kept_rows()
    axes = plots.pattern(rows, stages=STAGES, width_inches=width_inches).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    np.testing.assert_allclose(heights, [100 * np.mean(row["kept"]) for row in rows])
    points = [line.get_ydata() for line in axes.get_lines()]
    np.testing.assert_allclose(points, [100 * np.array(row["kept"]) for row in rows])
    lines_at = [float(part.get_segments()[0][0, 1]) for part in axes.collections]
    assert lines_at == [25, 50]
    assert [text.get_text() for text in axes.texts] == ["25%", "50%"]
    assert not plots.pattern(kept_rows(41), stages=STAGES).axes[0].get_lines()


@pytest.mark.parametrize("width_inches", WIDTHS)
def test_kernels_are_grids_of_percentages_on_one_scale(width_inches):
    figure = plots.kernels(STAGES, width_inches=width_inches)
    shown = figure.axes[:2]
    assert [axes.get_title(loc="left") for axes in shown] == ["Stage 1", "Stage 2"]
    assert [text.get_text() for text in shown[1].texts] == [
        "20", "20", "20", "20", "90", "20", "0", "0", "0"
    ]  # fmt: skip
    assert {axes.images[0].get_clim() for axes in shown} == {(0, 0.9)}


def test_designed_networks_have_no_line_from_the_dense_one():
    rows = arm_rows("test_accuracy", arms=("ticket", "guided"), levels=1)
    drawn = lines(plots.accuracy(rows).axes[0])
    assert len(drawn["ticket"][0]) == 2
    assert len(drawn["guided"][0]) == 1


@pytest.mark.parametrize("width_inches", WIDTHS)
def test_learning_curves_are_those_of_the_table_at_three_of_its_levels(width_inches):
    curves = curve_rows()
    figure = plots.learning_curves(curves, width_inches=width_inches)
    assert len(figure.axes) == 6
    for level, (loss, test) in zip(
        (1, 3, 5), zip(figure.axes[::2], figure.axes[1::2], strict=True), strict=True
    ):
        row = next(row for row in curves if (row["arm"], row["level"]) == ("reinit", level))
        assert lines(loss)["reinit"] == (row["steps"], row["validation_loss"]["mean"])
        np.testing.assert_allclose(
            lines(test)["reinit"][1], [100 * value for value in row["test_accuracy"]["mean"]]
        )
        assert set(lines(loss)) == {"dense", "ticket", "reinit"}
    drawing.svg(figure)


def test_learning_curves_with_holes_and_without_intervals_are_drawn():
    curves = curve_rows((0, 1))
    for row in curves:
        row["validation_loss"]["mean"][-1] = None
        row["validation_loss"] |= {side: [None] * len(row["steps"]) for side in ("low", "high")}
    figure = plots.learning_curves(curves)
    assert np.isnan(lines(figure.axes[0])["ticket"][1][-1])
    drawing.svg(figure)


@pytest.mark.parametrize(
    ("width_inches", "levels"), [(drawing.WIDE, [1, 3, 6, 8]), (drawing.NARROW, [1, 8])]
)
def test_a_bar_is_the_share_of_a_layer_that_is_kept(width_inches, levels):
    figure = plots.layer_densities(layer_rows(8), width_inches=width_inches)
    for level, axes in zip(levels, figure.axes, strict=True):
        shares = [bar.get_width() for bar in axes.patches]
        np.testing.assert_allclose(
            shares, [round(1000 * 0.7**level) / 10, (round(1000 * 0.7**level) - 1) / 10]
        )
        assert f"Level {level}" in axes.get_title(loc="left")
    drawing.svg(figure)


@pytest.mark.parametrize(
    ("width_inches", "levels"), [(drawing.WIDE, [1, 3, 4, 5, 7]), (drawing.NARROW, [1, 4, 7])]
)
def test_a_picture_is_its_counts(width_inches, levels):
    pictures = picture_rows(7)
    figure = plots.mask_pictures(pictures, width_inches=width_inches)
    for level, axes in zip(levels, figure.axes, strict=True):
        counts = np.array(pictures[level - 1]["counts"])
        np.testing.assert_array_equal(axes.get_images()[0].get_array(), counts)
        assert axes.get_images()[0].get_clim() == (0, counts.max())
    drawing.svg(figure)


def test_overlap_has_a_panel_for_the_network_and_for_each_layer():
    arms = ("other-order", "other-init", "chance")
    metrics = ("mask_overlap", "mask_overlap/fc1.weight", "mask_overlap/fc2.weight")
    rows = [
        row for metric in metrics for row in arm_rows(metric, arms=arms) if row["arm"] != "dense"
    ]
    figure = plots.overlap(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Overlap, whole network",
        "Overlap, fc1.weight",
        "Overlap, fc2.weight",
    ]
    for metric, axes in zip(metrics, figure.axes, strict=True):
        expected = [
            row["mean"] for row in rows if (row["metric"], row["arm"]) == (metric, "chance")
        ]
        assert lines(axes)["chance"] == ([0.8, 0.8**2, 0.8**3, 0.8**4], expected)


DEGENERATE = {
    "nothing": lambda: plots.accuracy([]),
    "no early stop": lambda: plots.early_stop([]),
    "no overlap": lambda: plots.overlap([]),
    "no curves": lambda: plots.learning_curves([]),
    "no layers": lambda: plots.layer_densities([]),
    "no layers of a pattern": lambda: plots.pattern([]),
    "a pattern": lambda: plots.pattern(kept_rows(100), stages=STAGES),
    "no kernels": lambda: plots.kernels([]),
    "kernels of nothing": lambda: plots.kernels(
        [{"stage": 1, "mean": 0, "kernel": [[0, 0, 0]] * 3}]
    ),
    "no pictures": lambda: plots.mask_pictures([]),
    "only dense": lambda: plots.accuracy(arm_rows("test_accuracy", arms=())),
    "no dense": lambda: plots.accuracy(arm_rows("test_accuracy")[1:]),
    "one point": lambda: plots.accuracy(arm_rows("test_accuracy", levels=1)[1:2]),
    "unknown arm": lambda: plots.accuracy(arm_rows("test_accuracy", arms=("$x^{" * 30,))),
    "only dense curves": lambda: plots.learning_curves(curve_rows((0,))),
    "one picture": lambda: plots.mask_pictures(picture_rows(1)),
    "an empty mask": lambda: plots.mask_pictures(
        [picture_rows(1)[0] | {"counts": [[0, 0], [0, 0]]}]
    ),
    "layers": lambda: plots.mask_pictures(
        picture_rows(9, ("$a$", "$" * 99)), width_inches=drawing.NARROW
    ),
    "long names": lambda: plots.layer_densities(
        layer_rows(9, ("$x^{" * 30, "fc")), width_inches=drawing.NARROW
    ),
}


@pytest.mark.parametrize("draw", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_a_degenerate_table_is_drawn_without_a_warning(draw):
    assert drawing.svg(draw()).startswith("<svg")


@pytest.mark.parametrize("side", ["mean", "interval"])
def test_rows_without_any_number_are_drawn_without_a_warning(side):
    rows = [
        row | {side: None, "interval": None, "num_censored": 1}
        for row in arm_rows("early_stop_step")
    ]
    assert drawing.svg(plots.early_stop(rows)).startswith("<svg")


def test_svg_is_the_same_text_for_the_same_table():
    first, second = (drawing.svg(plots.accuracy(arm_rows("test_accuracy"))) for _ in range(2))
    assert first == second
    assert first != drawing.svg(plots.accuracy(arm_rows("test_accuracy", levels=3)))


def test_svg_can_be_put_into_a_page():
    text = drawing.svg(plots.accuracy(arm_rows("test_accuracy")))
    assert text.startswith("<svg") and text.endswith("</svg>")
    assert "<style" not in text and "<metadata" not in text and "<script" not in text
    assert "var(--figure-blue, #0072b2)" in text
    assert ">ticket</text>" in text


def test_names_are_text_and_never_markup_or_formulas():
    text = drawing.svg(plots.accuracy(arm_rows("test_accuracy", arms=("<script>$x^{",))))
    assert "<script" not in text
    assert "&lt;script&gt;$x^{" in text


def test_drawing_changes_no_global_setting():
    before = dict(matplotlib.rcParams)
    drawing.svg(plots.accuracy(arm_rows("test_accuracy")))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("fraction", "text"), [(1, "100%"), (0.5125, "51.2%"), (0.0115, "1.15%"), (0.00003, "0.003%")]
)
def test_percent_has_three_digits(fraction, text):
    assert drawing.percent(fraction) == text
