"""Studies: settings to a value, a value to its graph of runs, and what is refused before it."""

import itertools
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from windfall import flops, masks, models, settings, spec
from windfall.arms import Dense, Finetune, OtherInit, OtherOrder, Random, Reinit, Rewind, Shuffled
from windfall.arms import Ticket as TicketArm
from windfall.data import Data, Digits, Gaussian, tensors
from windfall.data import load as load_data
from windfall.graph import expand, root
from windfall.initialize import GlorotNormal, Orthogonal, TorchDefault
from windfall.luck import LaboratoryStudy
from windfall.models import Conv_2, Conv_4, Mlp
from windfall.prune import Continue, LearningRate, Prune, ToStep
from windfall.runs import Fresh, Pruned
from windfall.selection import Global, Layerwise, uniform
from windfall.settings import load
from windfall.spec import SpecError
from windfall.study import Study
from windfall.suite import Suite
from windfall.train import Adam, Cosine, Recipe, Sgd

DATA = Gaussian(dimension=6, num_train=40, num_validation=10, num_test=10, num_classes=3)
EVERY_ARM = (
    *(Dense(), TicketArm(), Rewind(to=ToStep(step=7)), Finetune(), Reinit(), Shuffled(), Random()),
    *(OtherOrder(), OtherInit()),
)


def small(**changes):
    settings = {"model": Mlp(hidden=(20, 10)), "data": DATA, "num_seeds": 2, "levels": 3}
    return Study(**settings | {"recipe": Recipe(steps=40, eval_every=10)} | changes)


def refused(**changes):
    with pytest.raises(SpecError) as caught:
        expand(spec.checked(lambda: small(**changes)))
    return str(caught.value)


@pytest.fixture
def written(tmp_path):
    """Writes a TOML file and returns its path."""

    def write(text, name="mine.toml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


# -- the graph --------------------------------------------------------------------------------


class TestTheGraph:
    def test_it_has_one_node_for_every_place_in_the_order_of_level_arm_seed(self):
        graph = expand(small(arms=EVERY_ARM))
        names = [spec.tag(type(arm)) for arm in EVERY_ARM]
        expected = [("dense", 0, seed) for seed in range(2)]
        expected += [
            (name, level, seed)
            for level, name, seed in itertools.product((1, 2, 3), names[1:], range(2))
        ]
        assert [(node.arm, node.level, node.seed) for node in graph.nodes] == expected

    def test_every_node_is_the_run_that_its_arm_says(self):
        graph = expand(small(arms=EVERY_ARM))
        at = {(node.arm, node.level, node.seed): node.address for node in graph.nodes}
        for seed in range(2):
            dense = at["dense", 0, seed]
            assert graph.runs[dense].start == Fresh(initialization=GlorotNormal())
            for level in (1, 2, 3):
                parent = dense if level == 1 else at["ticket", level - 1, seed]
                for arm in ("ticket", "finetune", "reinit", "shuffled", "random"):
                    assert graph.runs[at[arm, level, seed]].parent == parent
                own = dense if level == 1 else at["rewind", level - 1, seed]
                assert graph.runs[at["rewind", level, seed]].parent == own

    def test_every_run_is_there_once_and_after_its_parent(self):
        graph = expand(small(arms=EVERY_ARM))
        order = {address: place for place, address in enumerate(graph.runs)}
        for address, run in graph.runs.items():
            assert run.address == address
            assert run.parent is None or order[run.parent] < order[address]
        # Beside the nodes, the dense runs of the other order and the other initialization.
        assert len(graph.runs) == len(graph.nodes) + 2 * 2
        assert {node.address for node in graph.nodes} < graph.runs.keys()

    @pytest.mark.parametrize(
        ("arms", "each"),
        [
            ((), 1),
            ((Dense(),), 1),
            ((TicketArm(),), 1 + 3),
            ((Reinit(),), 1 + 2 + 3),  # the ticket chain to level 2, for its masks
            ((TicketArm(), Reinit()), 1 + 3 + 3),
            ((Reinit(), Shuffled(), Random(), Finetune()), 1 + 2 + 4 * 3),
            ((Rewind(to=ToStep(step=5)),), 1 + 3),
            ((Rewind(to=ToStep(step=0)), TicketArm()), 1 + 3),
            ((OtherOrder(), OtherInit()), 1 + 2 * (1 + 3)),
        ],
    )
    def test_the_number_of_runs_is_the_sum_of_its_chains_for_every_seed(self, arms, each):
        for num_seeds in (1, 4):
            graph = expand(small(arms=arms, num_seeds=num_seeds))
            assert len(graph.runs) == each * num_seeds

    def test_in_one_shot_every_level_is_pruned_from_the_dense_run(self):
        graph = expand(small(one_shot=True, arms=(TicketArm(), Reinit())))
        dense = {node.seed: node.address for node in graph.nodes if node.arm == "dense"}
        for node in graph.nodes:
            if node.level:
                assert graph.runs[node.address].parent == dense[node.seed]

    def test_the_dense_run_belongs_to_a_study_that_does_not_name_it(self):
        without, named = (
            expand(small(arms=(TicketArm(),))),
            expand(small(arms=(Dense(), TicketArm()))),
        )
        assert without.nodes == named.nodes
        assert [node.arm for node in without.nodes if node.level == 0] == ["dense"] * 2

    def test_runs_of_different_seeds_have_nothing_in_common(self):
        graph = expand(small(arms=EVERY_ARM))
        of = {seed: {n.address for n in graph.nodes if n.seed == seed} for seed in range(2)}
        assert not of[0] & of[1]

    def test_seeds_are_those_of_the_runs(self):
        graph = expand(small())
        assert all(graph.runs[node.address].seed == node.seed for node in graph.nodes)

    def test_expanding_draws_from_no_generator_and_gives_the_same_graph_again(self):
        before = torch.get_rng_state()
        first, again = expand(small(arms=EVERY_ARM)), expand(small(arms=EVERY_ARM))
        assert torch.equal(torch.get_rng_state(), before)
        assert first == again

    def test_counts_and_densities_are_those_of_the_selection(self):
        graph = expand(small())
        sizes = {"hidden1.weight": 120, "hidden2.weight": 200, "output.weight": 30}
        assert graph.network.sizes == sizes
        assert graph.counts == {0: 350, 1: 96 + 160 + 27, 2: 77 + 128 + 24, 3: 61 + 102 + 22}
        assert graph.density(0) == 1.0
        assert graph.density(3) == 185 / 350

    def test_the_network_is_described_before_it_is_trained(self):
        network = expand(small()).network
        assert network.kinds == {
            "hidden1.weight": "hidden",
            "hidden2.weight": "hidden",
            "output.weight": "output",
        }
        assert network.multiply_adds == network.sizes
        assert (network.input_shape, network.num_classes) == ((6,), 3)

    def test_a_note_on_the_data_is_carried_along(self):
        assert expand(small()).note is None
        mine = torch.rand(50, 4), torch.arange(50) % 2
        graph = expand(small(data=tensors(*mine, note="mine alone")))
        assert graph.note == "mine alone"


class TestRunsAreSharedBetweenStudies:
    @pytest.mark.parametrize(
        "changes",
        [
            {"arms": (Rewind(to=ToStep(step=5)),)},
            {"levels": 1},
            {"num_seeds": 5},
            {"one_shot": True},
            {"prune": Prune(criterion="random", selection=Global(rate=0.3))},
            {"name": "other", "title": "Other", "question": "Why?"},
            {"metric": "early_stop_step", "margin": 3, "intervals": "bca", "verdict_level": 1},
            {"engine": "separate"},
            {"initialization": "glorot-normal"},
        ],
        ids=str,
    )
    def test_the_dense_run_is_the_same_whatever_is_done_with_it(self, changes):
        def dense(graph):
            return [node.address for node in graph.nodes if node.arm == "dense"]

        assert dense(expand(small(**changes)))[:2] == dense(expand(small()))

    @pytest.mark.parametrize(
        "changes",
        [
            {"model": Mlp(hidden=(20, 11))},
            {"data": DATA.model_copy(update={"split_seed": 1})},
            {"recipe": Recipe(steps=41, eval_every=10)},
            {"initialization": Orthogonal()},
        ],
        ids=str,
    )
    def test_another_network_data_set_recipe_or_beginning_is_another_run(self, changes):
        assert not expand(small(**changes)).runs.keys() & expand(small()).runs.keys()

    def test_a_smaller_study_is_part_of_a_larger(self):
        large = expand(small(arms=EVERY_ARM, num_seeds=3, levels=4))
        for arms, num_seeds, levels in [((Reinit(),), 2, 3), ((OtherInit(), Random()), 1, 4)]:
            part = expand(small(arms=arms, num_seeds=num_seeds, levels=levels))
            assert part.runs.keys() < large.runs.keys()
            assert all(large.runs[address] == run for address, run in part.runs.items())

    def test_the_bundled_lottery_shares_its_dense_runs(self):
        lottery = expand(load("lottery", {"num_seeds": 2}))
        other = expand(
            load("lottery", {"num_seeds": 3, "arms": ["rewind"], "levels": 2, "verdict_level": 1})
        )
        dense = {node.address for node in lottery.nodes if node.arm == "dense"}
        assert lottery.runs.keys() & other.runs.keys() == dense


class TestSnapshots:
    def kept(self, **changes):
        graph = expand(small(**changes))
        assert graph.keep.keys() == graph.runs.keys()
        return graph, {address: steps for address, steps in graph.keep.items() if steps}

    def test_a_dense_run_keeps_the_step_that_its_chain_returns_to(self):
        graph, kept = self.kept(arms=EVERY_ARM)
        dense = {node.address for node in graph.nodes if node.arm == "dense"}
        assert kept == dict.fromkeys(dense, frozenset({7}))

    @pytest.mark.parametrize(
        "arms",
        [
            (TicketArm(), Reinit(), Finetune()),
            (OtherInit(), OtherOrder()),
            (Rewind(to=ToStep(step=0)),),
            (Rewind(to=LearningRate(steps=5)),),
            (Rewind(to=Continue(steps=5)),),
        ],
    )
    def test_what_starts_at_theta_0_or_theta_t_needs_none(self, arms):
        assert self.kept(arms=arms)[1] == {}

    def test_every_level_of_a_chain_returns_to_its_dense_run(self):
        graph, kept = self.kept(arms=(Rewind(to=ToStep(step=9)),))
        assert len(kept) == 2
        for address in graph.runs:
            assert graph.runs[root(graph.runs, address)].parent is None
            assert root(graph.runs, address) in kept


# -- what a run costs -------------------------------------------------------------------------


def by_hand(graph, address):
    """6 multiply-adds a weight's use, example and step, of the weights that are kept."""
    run, network = graph.runs[address], graph.network
    counts = dict(network.sizes)
    if isinstance(run.start, Pruned):
        counts = run.start.prune.selection.counts(network.sizes, network.kinds, run.start.level)
        if run.start.arrange == "uniform":
            counts = uniform(network.sizes, sum(counts.values()))
    kept = {name: torch.arange(size) < counts[name] for name, size in network.sizes.items()}
    used = flops.masked_multiply_adds(network.multiply_adds, kept)
    first, last = run.clock
    return 6 * sum(used.values()) * run.recipe.batch_size * (last - first)


def test_flops_are_those_of_the_weights_kept():
    graph = expand(
        small(
            model=Conv_2(width=0.05),
            data="digits",
            num_seeds=1,
            prune=Prune(selection=Layerwise(hidden=0.4, convolution=0.1, output=0.2)),
            arms=(
                TicketArm(),
                Finetune(),
                Reinit(),
                Shuffled(),
                Random(),
                Rewind(to=ToStep(step=10)),
            ),
        )
    )
    assert graph.network.multiply_adds != graph.network.sizes
    for address in graph.runs:
        assert graph.flops(address) == by_hand(graph, address)


def test_flops_of_a_uniform_control_are_the_dense_ones_times_its_density():
    graph = expand(small(model=Conv_2(width=0.05), data="digits", num_seeds=1, arms=(Random(),)))
    dense = graph.nodes[0].address
    for node in graph.nodes[1:]:
        share = graph.flops(node.address) / graph.flops(dense)
        assert share == pytest.approx(graph.density(node.level), rel=0.02)


def test_flops_under_a_global_threshold_take_it_to_fall_evenly_on_what_it_pools():
    selection = Global(rate=0.5, exclude=("output",))
    graph = expand(
        small(num_seeds=1, levels=1, arms=(TicketArm(),), prune=Prune(selection=selection))
    )
    dense, ticket = (node.address for node in graph.nodes)
    assert graph.flops(dense) == 6 * 350 * 64 * 40
    assert graph.flops(ticket) == 6 * (160 + 30) * 64 * 40


def test_fine_tuning_costs_a_quarter_and_rewinding_what_is_left():
    graph = expand(
        small(num_seeds=1, levels=1, arms=(TicketArm(), Finetune(), Rewind(to=ToStep(step=30))))
    )
    cost = {node.arm: graph.flops(node.address) for node in graph.nodes}
    assert cost["finetune"] == cost["rewind"] == cost["ticket"] / 4


# -- what is refused before anything is trained -----------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"levels": 30},
            "`prune` must leave every layer at least one weight; got 0 of `hidden1.weight` at level"
            " 25.",
        ),
        (
            {"prune": {"selection": {"output": 0.9}}, "levels": 2},
            "`prune` must leave every layer at least one weight; got 0 of `output.weight` at level"
            " 2.",
        ),
        (
            {"prune": {"selection": {"kind": "global", "rate": 0.9}}, "levels": 3},
            "`prune` must leave every layer at least one weight; got 0 for the layers"
            " `hidden1.weight`, `hidden2.weight`, `output.weight` at level 3.",
        ),
        (
            {
                "prune": {"selection": {"hidden": 0.9, "output": 0.75}},
                "levels": 2,
                "arms": ["random"],
            },
            "`arms` with `random` must leave every layer at least one weight; got 0 of"
            " `output.weight` when 5 are spread over 350.",
        ),
        ({"model": "conv-2"}, "model conv-2 must be given images"),
        (
            {"data": Digits(num_validation=1797)},
            "`data.num_validation` must leave training samples",
        ),
        ({"data": "cifar10"}, "cifar"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused_before_anything_is_trained(
    changes, message, tmp_path, monkeypatch
):
    monkeypatch.setenv("WINDFALL_DATA", str(tmp_path))
    assert message in refused(**changes)
    assert list(tmp_path.iterdir()) == []


def test_fine_counts_of_the_same_rates_are_not_refused():
    changes = {"prune": {"selection": {"hidden": 0.9, "output": 0.75}}, "levels": 2}
    assert expand(small(arms=(TicketArm(),), **changes)).counts[2] == 1 + 2 + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict_level": 4}, "`verdict_level` must be at most `levels`, 3; got 4."),
        ({"verdict_level": 0}, "`verdict_level` must be greater than or equal to 1; got 0."),
        ({"levels": 0}, "`levels` must be greater than or equal to 1; got 0."),
        ({"num_seeds": 0}, "`num_seeds` must be greater than or equal to 1; got 0."),
        ({"num_seeds": 100_000}, "`num_seeds` must be less than 100000; got 100000."),
        ({"margin": -0.1}, "`margin` must be greater than or equal to 0; got -0.1."),
        ({"arms": ["ticket", "reinit", "ticket"]}, "`arms` must differ; got `ticket` twice."),
        (
            {"arms": [{"kind": "rewind", "to": {"step": 40}}]},
            "`arms.rewind.to.step` must be less than `recipe.steps`, 40; got 40.",
        ),
        (
            {"arms": [{"kind": "rewind", "to": {"kind": "learning-rate", "steps": 41}}]},
            "`arms.rewind.to.steps` must be at most `recipe.steps`, 40; got 41.",
        ),
        (
            {"metric": "mask_overlap", "arms": ["other-order", "other-init"]},
            "`arms` must include `ticket` when `metric` is mask_overlap.",
        ),
        ({"name": "no spaces"}, "`name` must match pattern"),
        ({"name": "../elsewhere"}, "`name` must match pattern"),
        ({"name": "x" * 65}, "`name` must have at most 64 characters"),
    ],
    ids=str,
)
def test_studies_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(SpecError) as caught:
        spec.checked(lambda: small(**changes))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "changes",
    [
        {"arms": [{"kind": "rewind", "to": {"step": 39}}]},
        {"arms": [{"kind": "rewind", "to": {"kind": "learning-rate", "steps": 40}}]},
        {"arms": [{"kind": "rewind", "to": {"kind": "continue", "steps": 400}}]},
        {"verdict_level": 3},
        {"metric": "mask_overlap", "arms": ["ticket"]},
    ],
    ids=str,
)
def test_studies_at_the_edge_are_accepted(changes):
    for run in expand(small(**changes)).runs.values():
        first, last = run.clock
        assert 0 <= first < last


def test_a_network_with_nothing_to_prune_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bare_networks.py").write_text(
        "from torch import nn\n"
        "def pooled(): return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(3))\n"
        "def wide(): return nn.Linear(6, 4)\n"
        "def fitting(): return nn.Linear(6, 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "`model` must have a Linear or Conv layer to prune" in refused(
        model="bare_networks:pooled"
    )
    assert "model must return 3 classes; got 4" in refused(model="bare_networks:wide")
    assert len(expand(small(model="bare_networks:fitting")).runs) == 2 * (1 + 3 * 3)


# -- what a study decides ---------------------------------------------------------------------


def test_a_study_decides_at_its_last_level_with_half_a_percentage_point():
    assert small().decided_level == 3
    assert small(verdict_level=2).decided_level == 2
    assert small().decided_margin == 0.005
    assert small(metric="early_stop_step").decided_margin == 10.0
    assert small(margin=0).decided_margin == 0


def test_the_zoo_begins_as_in_the_paper_and_a_users_network_as_constructed(tmp_path, monkeypatch):
    (tmp_path / "plain_networks.py").write_text(
        "from torch import nn\ndef make(): return nn.Linear(6, 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert small().begun_by == GlorotNormal()
    assert small(model="plain_networks:make").begun_by == TorchDefault()
    for model in (Mlp(), "plain_networks:make"):
        assert small(model=model, initialization="orthogonal").begun_by == Orthogonal()


def test_what_is_only_told_is_not_in_a_studys_address():
    told = small(title="A title", question="Why?", engine="separate")
    assert told.address == small().address
    assert small(num_seeds=3).address != small().address


def test_a_study_is_what_its_json_says():
    for made in (small(arms=EVERY_ARM), load("lottery"), load("same-init")):
        assert Study.from_json(made.to_json(addressed=False)) == made


# -- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", settings.bundled())
class TestEveryBundledStudy:
    def test_it_says_what_it_is(self, name):
        made = load(name)
        assert made.name == name
        assert made.title
        assert made.question.endswith("?")

    def test_it_can_be_expanded_on_data_that_is_always_there(self, name):
        images = tensors(torch.arange(300.0 * 3072).reshape(300, 3, 32, 32), torch.arange(300) % 10)
        data = images if name.endswith("cifar10") else "digits"
        if isinstance(load(name), LaboratoryStudy):  # it draws its own data
            alone = load(name, {"num_seeds": 1})
            assert {arm for arm, _ in alone.places()} == set(alone.arms)
            return
        made = load(name, {"data": data, "num_seeds": 1})
        for each in made.cases.values() if isinstance(made, Suite) else [made]:
            graph = expand(each)
            assert max(node.level for node in graph.nodes) == graph.study.levels

    def test_its_words_are_its_own(self, name):
        others = [load(other) for other in settings.bundled() if other != name]
        assert load(name).title not in [other.title for other in others]


def test_settings_by_path_mean_what_python_and_toml_mean(written):
    path = written(
        """
        extends = "lottery"
        name = "lottery"
        num_seeds = 3
        model = "conv-4"
        data = { kind = "cifar10", split_seed = 5 }
        arms = ["dense", { kind = "rewind", to = { kind = "to-step", step = 5 } }]
        levels = 2
        verdict_level = 1
        engine = "separate"
        [recipe]
        steps = 100
        batch_size = 10
        learning_rate = 0.5
        eval_every = 7
        optimizer = { kind = "sgd", momentum = 0.9 }
        schedule = { kind = "cosine", warmup = 3 }
        [prune.selection]
        kind = "global"
        rate = 0.3
        """
    )
    by_path = {
        "num_seeds": 3,
        "model": "conv-4",
        "data": "cifar10",
        "data.split_seed": 5,
        "arms": ["dense", "rewind"],
        "arms.rewind.to.step": 5,
        "levels": 2,
        "verdict_level": 1,
        "engine": "separate",
        "recipe.steps": 100,
        "recipe.batch_size": 10,
        "recipe.learning_rate": 0.5,
        "recipe.eval_every": 7,
        "recipe.optimizer": "sgd",
        "recipe.optimizer.momentum": 0.9,
        "recipe.schedule": "cosine",
        "recipe.schedule.warmup": 3,
        "prune.selection": "global",
        "prune.selection.rate": 0.3,
    }
    lottery = load("lottery")
    in_python = lottery.model_copy(
        update={
            "num_seeds": 3,
            "model": Conv_4(),
            "data": spec.decode(Data, {"kind": "cifar10", "split_seed": 5}),
            "arms": (Dense(), Rewind(to=ToStep(step=5))),
            "levels": 2,
            "verdict_level": 1,
            "recipe": Recipe(
                optimizer=Sgd(momentum=0.9),
                schedule=Cosine(warmup=3),
                steps=100,
                batch_size=10,
                learning_rate=0.5,
                eval_every=7,
            ),
            "prune": Prune(selection=Global(rate=0.3)),
        }
    )
    assert load(path).address == load("lottery", by_path).address == in_python.address
    assert load("lottery", by_path).engine == "separate"


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ({"recipe.optimizer.beta1": 0.8}, "recipe", {"optimizer": Adam(beta1=0.8)}),
        ({"recipe.schedule.warmup": 5}, "recipe", {"schedule": {"kind": "constant", "warmup": 5}}),
        ({"recipe.augment": "crop-flip"}, "recipe", {"augment": {"padding": 4}}),
        ({"recipe.augment.padding": 2}, "recipe", {"augment": {"padding": 2}}),
    ],
    ids=str,
)
def test_a_path_changes_one_field_and_leaves_the_rest(settings, field, value):
    before = dict(getattr(load("lottery"), field))
    expected = type(getattr(load("lottery"), field))(**before | value)
    assert getattr(load("lottery", settings), field) == expected


def test_a_path_into_a_default_that_no_file_names(written):
    path = written('model = "mlp"\ndata = "digits"')
    made = load(path, {"prune.selection.hidden": 0.3, "recipe.optimizer.momentum": 0.9})
    assert made.prune.selection == Layerwise(hidden=0.3)
    assert made.recipe.optimizer == Sgd(momentum=0.9)
    assert load(path).arms == Study.model_fields["arms"].default
    assert Finetune(fraction=0.5) in load(path, {"arms.finetune.fraction": 0.5}).arms


def test_one_arm_needs_no_list():
    assert load("lottery", {"arms": "ticket"}) == load("lottery", {"arms": ["ticket"]})


def test_settings_are_applied_in_order():
    made = load("lottery", {"model": "conv-4", "model.width": 0.5})
    assert made.model == Conv_4(width=0.5)
    assert load("lottery", {"model.width": 0.5, "model": "conv-4"}).model == Conv_4()


def test_loading_twice_gives_the_same_study_whatever_was_set_between():
    before = load("lottery")
    load("lottery", {"recipe.steps": 7, "arms": ["rewind"], "arms.rewind.to.step": 3})
    assert load("lottery") == before


# -- files ------------------------------------------------------------------------------------

BARE = 'model = "mlp"\ndata = "digits"\n'


def test_a_file_extends_a_bundled_study_or_a_file_beside_it(written, monkeypatch):
    written(BARE + "num_seeds = 3\nlevels = 2\ntitle = 'Base'\nquestion = 'Q?'", "sub/base.toml")
    middle = written('extends = "base.toml"\nlevels = 4', "sub/middle.toml")
    last = written('extends = "sub/middle.toml"\nnum_seeds = 7', "last.toml")
    assert (load(middle).levels, load(middle).num_seeds) == (4, 3)
    assert (load(last).levels, load(last).num_seeds) == (4, 7)
    assert load(last).model == Mlp()
    monkeypatch.chdir(last.parent)
    assert load("last.toml") == load(last) == load("sub/../last.toml")
    assert load(written('extends = "lottery"')).recipe == load("lottery").recipe


def test_a_file_has_its_own_words_and_its_own_name(written):
    written(BARE + "title = 'Base'\nquestion = 'Q?'\nname = 'first'", "base.toml")
    made = load(written('extends = "base.toml"', "other.toml"))
    assert (made.name, made.title, made.question) == ("other", "", "")
    assert load(written(BARE, "my first study.toml")).name == "my-first-study"
    assert load(written(BARE, "ünï_1.toml")).name == "n-_1"
    assert load(written(BARE + "name = 'given'", "other.toml")).name == "given"


@pytest.mark.parametrize(
    ("base", "changes", "model"),
    [
        (
            "{ kind = 'mlp', hidden = [5], width = 2 }",
            "{ hidden = [7] }",
            Mlp(hidden=(7,), width=2),
        ),
        (
            "{ kind = 'mlp', hidden = [5] }",
            "{ kind = 'mlp', width = 3 }",
            Mlp(hidden=(5,), width=3),
        ),
        ("{ kind = 'mlp', hidden = [5] }", "{ kind = 'conv-2', width = 3 }", Conv_2(width=3)),
        ("{ kind = 'mlp', hidden = [5] }", "'mlp'", Mlp()),
        ("'mlp'", "{ width = 2 }", Mlp(width=2)),
        ("'mlp'", "{ kind = 'conv-2' }", Conv_2()),
        ("{ kind = 'mlp', hidden = [5, 6] }", "{ hidden = [7] }", Mlp(hidden=(7,))),
    ],
)
def test_a_table_changes_fields_and_another_kind_replaces_the_member(written, base, changes, model):
    written(f"data = 'digits'\nmodel = {base}", "base.toml")
    assert load(written(f"extends = 'base.toml'\nmodel = {changes}")).model == model


@pytest.mark.parametrize(
    "files",
    [
        {"a": "a.toml"},
        {"a": "b.toml", "b": "a.toml"},
        {"a": "b.toml", "b": "c.toml", "c": "b.toml"},
        {"a": "sub/b.toml", "sub/b": "../a.toml"},
    ],
    ids=str,
)
def test_files_that_extend_each_other_are_refused(written, files):
    for name, base in files.items():
        written(f'extends = "{base}"', f"{name}.toml")
    with pytest.raises(
        SpecError, match=r"`extends` must not lead back to itself; got .*a\.toml -> "
    ):
        load(written(f'extends = "{files["a"]}"', "a.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("levels = \n", r"mine\.toml must be TOML; .*line 1"),
        ("levels = 3\nlevels = 4\n", r"must be TOML; .*line 2"),
        ("[recipe\nsteps = 3", r"must be TOML; .*line 1"),
        ("extends = 3", "`extends` must be the name or path of a study; got 3"),
        ('extends = "lotery"', r"got 'lotery'\. Did you mean `lottery`\?"),
        ('extends = "absent.toml"', "must be a readable TOML file; got absent.toml"),
        ("", r"`model` must be given\. `data` must be given\."),
        ('model = "mlp"', r"^`data` must be given\.$"),
        (BARE + "colour = 3", "Has no field `colour`"),
        (BARE + "name = 2020-01-01", r"`name` must be a valid string; got datetime\.date"),
        (BARE + "[recipe]\nstepz = 3", r"`recipe` has no field `stepz`\. Did you mean `steps`\?"),
        (BARE + "[recipe]\nsteps = 2.5", r"`recipe\.steps` must be a valid integer"),
        (BARE + "[recipe]\nlearning_rate = nan", "`recipe.learning_rate` must be a finite number"),
        (
            BARE + "[recipe.optimizer]\nkind = 'adamw'",
            r"`recipe\.optimizer` must .*'adamw'.*`adam`",
        ),
        (BARE + "[[arms]]\nkind = 'ticket'\nlevel = 3", r"`arms\.ticket` has no field `level`"),
    ],
)
def test_files_that_cannot_be_are_refused(written, text, message):
    with pytest.raises(SpecError, match=message):
        load(written(text))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lotery", r"got 'lotery'\. Did you mean `lottery`\? Known: .*lottery"),
        ("nonesuch.toml", "must be a readable TOML file; got nonesuch.toml"),
        ("", "must be a readable TOML file"),
        (".", "must be a readable TOML file"),
        ("x" * 5000, "must be a readable TOML file"),
        ("a\0b.toml", "must be a readable TOML file"),
        ("a\0b", "must be a bundled study"),
        ("../lottery", "must be a bundled study"),
        ("folder.toml", "must be a readable TOML file"),
        ("latin.toml", "must be a readable TOML file"),
    ],
)
def test_what_is_no_study_is_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes("title = 'caf\xe9'".encode("latin-1"))
    with pytest.raises(SpecError, match=message):
        load(name)


def test_a_bundled_study_is_not_hidden_by_a_file_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lottery").write_text(BARE)
    assert load("lottery").name == "lottery"
    assert load("lottery").model != Mlp()


# -- bad settings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("arms", 3, "`arms` must be a list; got 3."),
        ("arms", "tickit", "`arms.0` must be one of the known names; got 'tickit'. Did"),
        (
            "arms",
            ["ticket", "tickit"],
            "`arms.1` must be one of the known names; got 'tickit'. Did",
        ),
        ("recipe", "x", "`recipe` must be "),
        ("recipe", None, "`recipe` must be "),
        ("levels", "eight", "`levels` must be a valid integer"),
        ("levels", True, "`levels` must be neither true nor false; got True."),
        ("num_seeds", 0, "`num_seeds` must be greater than or equal to 1; got 0."),
        ("num_seeds", 2.5, "`num_seeds` must be a valid integer"),
        ("prune.selection.hidden", 1.2, "`prune.selection.hidden` must be less than 1; got 1.2."),
        (
            "prune.selection",
            {"kind": "global", "density": 1.2},
            "`prune.selection.density` must be",
        ),
        ("data", 5, "`data` must be one of the known names; got 5. Known: digits, mnist"),
        (
            "data",
            "digit",
            "`data` must be one of the known names; got 'digit'. Did you mean `digits`?",
        ),
        ("data.verify", False, "`data` has no field `verify`. Known: num_validation"),
        ("model", {"width": 2}, "`model` must be one of the known names; got {'width': 2}."),
        ("model", {"kind": ["mlp"]}, "`model` must be one of the known names; got ['mlp']."),
        ("model.hidden", [0], "`model.hidden.0` must be greater than 0; got 0."),
        ("model.hiden", [5], "`model` has no field `hiden`. Did you mean `hidden`?"),
        ("recip.steps", 3, "Has no field `recip`. Did you mean `recipe`?"),
        ("recipe.stepz", 3, "`recipe` has no field `stepz`. Did you mean `steps`?"),
        ("recipe.steps.x", 3, "`recipe.steps` must have fields to be set by path; got 1200."),
        ("recipe.optimizer.gamma", 1, "`recipe.optimizer` has no field `gamma`."),
        (
            "arms.rewind.to.step",
            3,
            "`arms.rewind` must name one of its list. Did you mean `reinit`?",
        ),
        ("arms.finetune.fraction", 2, "`arms.finetune.fraction` must be less than or equal to 1;"),
        (
            "arms.finetune",
            2,
            "`arms.finetune` must name a field of a member of its list; got no field.",
        ),
        ("model.hidden.0", 5, "`model.hidden.0` must name a field of a member of its list;"),
        ("model.hidden.300.x", 5, "`model.hidden.300` must name one of its list."),
        ("", 5, "Has no field ``."),
        ("recipe.", 5, "`recipe` has no field ``."),
        ("extends", "lottery", "Has no field `extends`."),
        ("kind", "recipe", "Must be of kind study; got 'recipe'."),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_path(path, value, message):
    settings = {"recipe.steps": 1200, "model.hidden": [300, 100]} | {path: value}
    with pytest.raises(SpecError) as caught:
        load("lottery", settings)
    assert str(caught.value).startswith(message)


VALUES = [
    *(None, True, False, 0, 1, -1, 3, 10**400, 0.5, -0.0, math.nan, math.inf, 1e-320),
    *("", "x", "adam", "ticket", "a:b", ":", "a:", "kind", "\ud800", "5", "nan"),
    *([], [[]], [1], ["ticket"], [{}], [None], ["ticket", 3], [{"kind": []}], [{"kind": "rewind"}]),
    *({}, {"kind": None}, {"kind": {}}, {"kind": "mlp"}, {"kind": "rewind", "to": 3}, {1: 2}),
    *({"x": {"kind": "adam"}}, {"callable": 3}, {"kind": "user-model", "callable": ":"}),
    *({"kind": "user-data", "callable": "a"}, {"kind": "tensors"}, object(), (), set(), b"x", Mlp),
]
PATHS = [
    *("name", "title", "num_seeds", "model", "data", "initialization", "recipe", "prune", "arms"),
    *("one_shot", "levels", "verdict_level", "metric", "margin", "intervals", "engine", "kind"),
    *("model.hidden", "model.kind", "model.width", "data.split_seed", "data.kind", "recipe.steps"),
    *("recipe.optimizer", "recipe.optimizer.beta1", "recipe.schedule", "recipe.schedule.at"),
    *(
        "recipe.augment",
        "recipe.dtype",
        "prune.selection",
        "prune.selection.exclude",
        "arms.ticket",
    ),
    *("arms.finetune.fraction", "arms.0.x", "nonesuch", "nonesuch.x", "recipe.learning_rate"),
    *("prune.criterion.kind", "model.hidden.0.x", "initialization.x", "", ".", "a..b"),
]


def outcome(settings):
    """None when the settings are accepted; the message when they are refused."""
    try:
        assert isinstance(load("lottery", settings), Study)
    except SpecError as problem:
        return str(problem)
    return None


@pytest.mark.parametrize("path", PATHS)
def test_any_value_anywhere_is_accepted_or_refused_in_a_sentence(path):
    messages = [outcome({path: value}) for value in VALUES]
    assert any(messages)
    for message in filter(None, messages):
        assert message.endswith(".")
        assert message[0] in "`HMD"
        assert "Traceback" not in message


def test_any_two_settings_are_accepted_or_refused():
    draw = random.Random(0)
    for _ in range(300):
        settings = {draw.choice(PATHS): draw.choice(VALUES) for _ in range(2)}
        outcome(settings)


# -- studies of a user's own network ----------------------------------------------------------


@pytest.fixture
def networks(tmp_path, monkeypatch):
    path = tmp_path / "keyed_networks.py"
    path.write_text("from torch import nn\ndef make(): return nn.Linear(6, 3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "keyed_networks", raising=False)
    return path


def test_a_study_can_be_named_without_running_its_networks_code(networks, written):
    path = written('model = "keyed_networks:make"\ndata = "digits"')
    known = settings.key(load(path))
    networks.write_text("raise RuntimeError('was run')")
    sys.modules.pop("keyed_networks")
    assert settings.key(load(path, code=False)) == known
    with pytest.raises(SpecError, match="was run"):
        load(path)


def test_a_studys_key_is_of_all_its_settings():
    assert settings.key(load("lottery")) != settings.key(load("lottery", {"recipe.steps": 5}))
    assert settings.key(load("lottery")) == settings.key(load("lottery", {"title": "told"}))


def test_data_may_be_tensors_and_a_study_of_them_is_of_their_content():
    inputs, labels = torch.arange(300.0).reshape(60, 5), torch.arange(60) % 3
    one, same = small(data=(inputs, labels)), small(data=(inputs.clone(), labels.clone()))
    other = small(data=(inputs + 1, labels))
    assert one.address == same.address != other.address
    assert expand(one).network.input_shape == (5,)
    assert load_data(one.data).num_classes == 3


def test_masks_and_models_agree_on_what_can_be_pruned():
    graph = expand(small())
    module = graph.study.model.build((6,), 3)
    params = dict(module.named_parameters())
    assert list(masks.ones(params, graph.network.kinds)) == list(models.kinds(module, (6,)))


def test_a_network_without_a_gradient_path_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "cut_networks.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Cut(nn.Linear):\n"
        "    def forward(self, inputs): return super().forward(inputs).detach()\n"
        "def cut(): return Cut(6, 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = tensors(torch.arange(300.0 * 6).reshape(300, 6), torch.arange(300) % 3)
    with pytest.raises(SpecError, match="model must have a gradient path from its outputs"):
        expand(small(model="cut_networks:cut", data=data))
