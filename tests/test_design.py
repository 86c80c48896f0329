"""From pruned networks to designed ones: the pattern of a study, and a study of its design."""

import dataclasses
import json

import pytest
import small
import torch
from torch.func import functional_call
from typer.testing import CliRunner

from windfall import (
    architecture,
    costs,
    flops,
    models,
    page,
    patterns,
    schedule,
    spec,
    tables,
    verbs,
)
from windfall.cli import app
from windfall.findings import Findings
from windfall.graph import expand
from windfall.initialize import GlorotNormal, initial_parameters
from windfall.pace import Pace
from windfall.sparsity import ScalePenalty
from windfall.spec import SpecError
from windfall.store import Lab
from windfall.worker import Workshop

SHORT = {"steps": 4, "eval_every": 2, "learning_rate": 1e-3}
SHAPE = (1, 16, 16)
SLIM = {"criterion": "normalization-scale", "selection": {"kind": "global", "rate": 0.4},
        "structure": "channels"}  # fmt: skip
FACTORS = (0.75, 0.5, 0.25, 0.5, 0.25)
DESIGN = ["dense", {"kind": "guided", "stages": FACTORS}, "uniform-width"]


def digits(num_classes=10):
    """The digits in twice their size, which five stages need."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    inputs = torch.from_numpy(bundled.images).float().repeat_interleave(2, 1)
    labels = torch.from_numpy(bundled.target).long() % num_classes
    return inputs.repeat_interleave(2, 2)[:, None], labels


def study(model, num_classes=10, **changes):
    settings = {"data": digits(num_classes), "levels": 1, "model": model}
    return small.study(SHORT, **(settings | changes))


def found(graph, lab):
    return tables.summary(tables.outline(graph), lab)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A study that removes channels of a narrow VGG-11, and the lab of its runs."""
    graph = expand(study({"kind": "vgg-11", "width": 0.125}, arms=["dense", "ticket"], prune=SLIM))
    return graph, small.trained(graph, tmp_path_factory.mktemp("pruned") / "lab")


@pytest.fixture(scope="module")
def designed():
    return expand(study({"kind": "vgg-13", "width": 0.125}, arms=DESIGN))


# -- the pattern of a study ------------------------------------------------------------------------


def test_the_pattern_of_a_study_is_that_of_its_tickets(pruned):
    graph, lab = pruned
    told = found(graph, lab)["pattern"]
    tickets = [n for n in graph.nodes if n.arm == "ticket"]
    assert told["runs"] == [{"seed": n.seed, "address": n.address} for n in tickets]
    assert (told["unit"], told["level"], told["arm"]) == ("channels", 1, "ticket")
    each = [lab.weights(n.address).channels for n in tickets]
    layers = ([1], [2], [3, 4], [5, 6], [7, 8])
    for row, own in zip(told["stages"], layers, strict=True):
        kept = [
            sum(int(stay[f"conv{i}.weight"].sum()) for i in own)
            / sum(stay[f"conv{i}.weight"].numel() for i in own)
            for stay in each
        ]
        assert row["mean"] == pytest.approx(sum(kept) / 2)
        assert (row["low"], row["high"]) == (min(kept), max(kept))
    assert [row["layer"] for row in told["layers"]] == [f"conv{i}.weight" for i in range(1, 9)]
    for row in told["layers"]:
        assert row["kept"] == [float(stay[row["layer"]].double().mean()) for stay in each]


def test_every_arm_on_the_tickets_masks_has_its_pattern(pruned, tmp_path):
    graph, lab = pruned
    other = expand(graph.study.model_copy(update={"arms": (graph.study.arms[0],)}))
    alone = Findings(tables.outline(other), lab)
    assert not patterns.is_known(alone)
    assert found(other, lab)["pattern"] is None
    with pytest.raises(SpecError, match=r"must have pruned runs .* verdicts, 1; got none"):
        patterns.pattern(alone)


def test_a_study_of_another_network_has_no_pattern(tmp_path):
    graph = small.graph({"steps": 2, "eval_every": 1}, num_seeds=1, levels=1, arms=["ticket"])
    lab = small.trained(graph, tmp_path / "lab")
    assert found(graph, lab)["pattern"] is None
    with pytest.raises(SpecError, match=r"`model` must have stages .* got mlp"):
        patterns.pattern(Findings(tables.outline(graph), lab))


def test_single_weights_have_a_pattern_of_kernels_and_no_design(tmp_path):
    model = {"kind": "resnet-20", "width": 0.25}
    graph = small.graph(SHORT, model=model, num_seeds=1, levels=1, arms=["ticket"])
    lab = small.trained(graph, tmp_path / "lab")
    document = found(graph, lab)
    masks = lab.masks(next(n.address for n in graph.nodes if n.level == 1))
    told = document["pattern"]
    own = [mask for name, mask in masks.items() if name.startswith("stage2.")]
    kept, size = sum(int(m.sum()) for m in own), sum(m.numel() for m in own)
    assert told["stages"][1]["mean"] == kept / size
    assert told["settings"] is None
    of_three = [m for m in own if m.shape[-1] == 3]
    corner = sum(int(m[:, :, 0, 0].sum()) for m in of_three)
    corners = sum(m.shape[0] * m.shape[1] for m in of_three)
    assert told["stages"][1]["kernel"][0][0] == pytest.approx(corner / corners)
    counts = dict.fromkeys(("total", "trained", "reused", "diverged", "failed"), 0)
    html = page.render(document | {"runs": counts, "seconds": 1.0, "created": ""})
    assert 'id="figure-pattern"' in html
    assert 'id="figure-kernels"' in html


# -- a study of a design ---------------------------------------------------------------------------


def test_a_design_stands_at_the_level_of_the_verdicts_alone():
    model = {"kind": "vgg-13", "width": 0.0625}
    graph = expand(study(model, levels=3, verdict_level=2, arms=[*DESIGN, "ticket"]))
    places = {(n.arm, n.level) for n in graph.nodes}
    assert {level for arm, level in places if arm in ("guided", "uniform-width")} == {2}
    assert {level for arm, level in places if arm == "ticket"} == {1, 2, 3}


def test_a_designs_counts_are_those_of_its_own_network(designed):
    graph = designed
    whole = sum(graph.network.sizes.values())
    outline = tables.outline(graph)
    for arm in ("guided", "uniform-width"):
        nodes = [n for n in graph.nodes if n.arm == arm]
        assert len({n.address for n in nodes}) == len(nodes) == 2
        node = nodes[0]
        run = graph.runs[node.address]
        module = run.model.build(SHAPE, 10)
        weights = {n: module.get_parameter(n).numel() for n in models.kinds(module, SHAPE)}
        macs = sum(flops.multiply_adds(module, SHAPE).values())
        assert graph.kept(node.address) == weights
        assert graph.weights(node) == sum(weights.values())
        assert graph.clock(node.address) == (0, 4)
        assert graph.flops(node.address) == flops.training_flops(macs, 32, 4)
        told = outline["designs"][arm]
        assert told["density"] == sum(weights.values()) / whole
        assert told["num_parameters"] == sum(p.numel() for p in module.parameters())
        assert told["model"] == run.model.to_json()
    dense = next(n for n in graph.nodes if n.arm == "dense")
    assert graph.weights(dense) == whole


def test_a_designs_costs_are_those_of_its_own_network(designed):
    graph = designed
    rows = {row["arm"]: row for row in costs.estimate(graph, None, 1)["rows"]}
    for arm in ("guided", "uniform-width"):
        node = next(n for n in graph.nodes if n.arm == arm)
        assert rows[arm]["weights"] == graph.weights(node) < rows["dense"]["weights"]
        assert rows[arm]["density"] == rows[arm]["weights"] / rows["dense"]["weights"]
        assert rows[arm]["flops"] == 2 * graph.flops(node.address)
    choices = schedule.engines(graph, "cpu")
    typical = costs.Costs(graph, choices, {})
    each = {n.arm: typical.typical(n.address) for n in graph.nodes}
    assert each["guided"] < each["dense"]


class Anything(dict):
    """A pace at which a unit of any work takes a second."""

    def get(self, *_):
        return 1.0


def test_a_design_is_predicted_to_take_what_it_does_as_a_studys_own_network(designed):
    pace = Pace(0.0, Anything(), {"separate": Anything(), "sparse": Anything()})
    pace = dataclasses.replace(pace, start={"separate": 0.0, "sparse": 0.0})
    here = costs.Predictor(designed, pace)
    seconds = {n.arm: here.seconds(n.address, "separate") for n in designed.nodes}
    for arm in ("guided", "uniform-width"):
        run = next(designed.runs[n.address] for n in designed.nodes if n.arm == arm)
        alone = expand(study(run.model.to_json(), arms=["dense"]))
        own = costs.Predictor(alone, pace).seconds(alone.nodes[0].address, "separate")
        assert seconds[arm] == own != seconds["dense"]


def test_the_seeds_of_a_design_are_trained_together(tmp_path):
    graph = expand(study({"kind": "vgg-13", "width": 0.0625}, arms=DESIGN, engine="stacked"))
    queue = schedule.Queue(graph, Lab(tmp_path / "lab"), schedule.engines(graph, "cpu"))
    for arm in ("dense", "guided", "uniform-width"):
        unit = tuple(n.address for n in graph.nodes if n.arm == arm)
        assert [queue.together[address] for address in unit] == [unit] * 2


def test_one_width_is_compared_at_the_designs_number_of_parameters(designed):
    graph = designed
    by_arm = {n.arm: graph.runs[n.address].model for n in graph.nodes}
    numbers = {arm: architecture.num_parameters(m, SHAPE, 10) for arm, m in by_arm.items()}
    assert by_arm["guided"] == models.Vgg_13(width=0.125, stages=FACTORS)
    assert by_arm["uniform-width"].stages is None
    assert abs(numbers["uniform-width"] - numbers["guided"]) < 0.02 * numbers["guided"]


def test_designs_are_refused_before_training_where_they_do_not_fit():
    with pytest.raises(SpecError, match=r"`arms.guided` must fit .* got mlp"):
        spec.checked(lambda: small.study(arms=DESIGN))
    with pytest.raises(SpecError, match=r"`arms.guided` must fit .* must have 3 factors"):
        spec.checked(lambda: small.study(model="resnet-20", arms=DESIGN))
    with pytest.raises(SpecError, match=r"`arms.uniform-width` must fit .* got mlp"):
        spec.checked(lambda: small.study(arms=[{"kind": "uniform-width", "stages": [1.0]}]))
    with pytest.raises(SpecError, match=r"`arms` must have one design, .*; got 0"):
        spec.checked(lambda: small.study(model="resnet-20", arms=["uniform-width"]))


# -- from the one to the other ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_design_begins_as_its_own_network_newly_initialized(designed, tmp_path):
    lab = small.trained(designed, tmp_path / "lab")
    for node in (n for n in designed.nodes if n.arm != "dense"):
        run, record = designed.runs[node.address], lab.record(node.address)
        module = run.model.build(SHAPE, 10)
        params, _ = initial_parameters(lambda m=module: m, GlorotNormal(), node.seed, "reinit")
        begun, ended = Workshop(lab, "cpu").beginning(run), lab.weights(node.address)
        assert all(torch.equal(begun.params[name], value) for name, value in params.items())
        assert (begun.step, begun.masks, begun.channels, ended.masks) == (0, {}, {}, {})
        assert record.kept == -1
        data = Workshop(lab, "cpu").data(run)
        inputs = data.prepare(data.test.inputs, torch.float32)
        with torch.no_grad():
            made = functional_call(module.eval(), ended.params | ended.buffers, (inputs,))
        correct = (made.argmax(1) == data.test.labels).double().mean()
        assert record.evaluations[-1].test_accuracy == pytest.approx(float(correct))


@pytest.mark.slow
def test_a_pattern_makes_a_design_of_another_depth_and_number_of_classes(pruned, tmp_path):
    graph, lab = pruned
    settings = found(graph, lab)["pattern"]["settings"]
    stages = json.loads(settings[1].partition("=")[2])
    arms = ["dense", {"kind": "guided", "stages": stages}, "uniform-width"]
    model = {"kind": "vgg-13", "width": 0.0625}
    other = expand(study(model, 5, arms=arms))
    made = other.runs[next(n.address for n in other.nodes if n.arm == "guided")].model
    assert made == models.Vgg_13(width=0.0625, stages=stages)
    document = found(other, small.trained(other, tmp_path / "lab"))
    (row,) = document["verdicts"]
    assert (row["effect"], row["arm"], row["against"]) == ("guided", "guided", "uniform-width")
    assert row["num_seeds"] == 2
    assert row["difference"] is not None
    assert row["density"] == tables.outline(other)["designs"]["guided"]["density"]
    assert "Beside one width of nearly as many parameters, the widths that" in document["answer"][0]
    assert any("its design" in note for note in document["notes"])
    assert document["winner"] is None
    curves = {curve["arm"]: curve["density"] for curve in document["curves"]}
    assert curves["guided"] == row["density"]
    again = expand(
        study(model, 5, arms=["dense", {"kind": "transferred", "stages": stages}, "uniform-width"])
    )
    assert {n.address for n in again.nodes} == {n.address for n in other.nodes}


def test_a_channels_penalty_is_the_dense_runs_alone():
    recipe = {"penalty": ScalePenalty().to_json()}
    graph = expand(
        small.study(SHORT | recipe, model={"kind": "vgg-11", "width": 0.0625}, data=digits(),
                    levels=1, arms=DESIGN)
    )  # fmt: skip
    for node in graph.nodes:
        has_penalty = graph.runs[node.address].recipe.penalty is not None
        assert has_penalty == (node.arm == "dense")


@pytest.mark.slow
def test_the_verb_prints_a_pattern_whose_settings_can_be_pasted(tmp_path):
    toml = tmp_path / "tiny.toml"
    toml.write_text(
        'extends = "lottery"\nnum_seeds = 2\nlevels = 1\nverdict_level = 1\n'
        'arms = ["dense", "ticket"]\n[model]\nkind = "resnet-20"\nwidth = 0.25\n'
        "[recipe]\nsteps = 4\neval_every = 2\n[prune]\n"
        'criterion = "filter-norm"\nstructure = "channels"\n'
        'selection = { kind = "layerwise", convolution = 0.5 }\n'
    )
    lab = str(tmp_path / "lab")
    verbs.run(toml, lab=lab, workers=1, watch=lambda _: None)
    runner = CliRunner()
    told = json.loads(runner.invoke(app, ["pattern", str(toml), "--lab", lab, "--json"]).stdout)
    assert [row["mean"] for row in told["stages"]] == [0.5] * 3
    assert [row["mean"] for row in told["shared"]] == [0.5] * 3
    assert told["settings"] == [
        "arms=dense,guided,uniform-width",
        "arms.guided.stages=[0.5,0.5,0.5]",
        "arms.guided.shared=[0.5,0.5,0.5]",
    ]
    text = runner.invoke(app, ["pattern", str(toml), "--lab", lab]).stdout
    assert "--set 'arms.guided.stages=[0.5,0.5,0.5]'" in text
    pasted = [part for pair in told["settings"] for part in ("--set", pair)]
    plan = runner.invoke(app, ["plan", str(toml), "--lab", lab, "--json", *pasted])
    rows = {row["arm"]: row for row in json.loads(plan.stdout)["rows"]}
    assert rows["guided"]["runs"] == rows["uniform-width"]["runs"] == 2
    assert rows["dense"]["stored"] == 2
    refused = runner.invoke(app, ["pattern", "lottery", "--lab", lab])
    assert refused.exit_code == 2
