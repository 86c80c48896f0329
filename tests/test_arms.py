"""Arms: the run that stands for each at each level, and what two arms share."""

import itertools

import pytest

from windfall import architecture, spec
from windfall.arms import (
    DESIGNS,
    SHIFT,
    Arm,
    Dense,
    Family,
    Finetune,
    Guided,
    OtherInit,
    OtherOrder,
    Random,
    RandomConstant,
    Reinit,
    Rewind,
    Shuffled,
    SignedConstant,
    SignedReinit,
    Ticket,
    Transferred,
    UniformWidth,
    sized,
)
from windfall.data import Digits
from windfall.effects import EFFECTS
from windfall.initialize import KaimingNormal
from windfall.models import Vgg_11, Vgg_13
from windfall.prune import Continue, LearningRate, Prune, ToStep
from windfall.runs import Budget, Fresh, Pruned, Run
from windfall.selection import Layerwise
from windfall.sparsity import ScalePenalty
from windfall.spec import SpecError
from windfall.train import Recipe

STEPS = 400
BASE = Run(
    model=Vgg_11(width=0.1),
    data=Digits(),
    data_sha256="0" * 64,
    recipe=Recipe(steps=STEPS, eval_every=10),
    seed=0,
)
PRUNE = Prune(selection=Layerwise(hidden=0.4, output=0.2))
SEED = 3
THETA_0 = Fresh(initialization=KaimingNormal(), stream="init")
FRESH = Fresh(initialization=KaimingNormal(), stream="reinit")
BUDGETED = FRESH.model_copy(update={"budget": Budget()})
STAGES = (1.0, 0.5, 0.5, 0.25, 0.5)
REQUIRED = {name: {"stages": STAGES} for name in DESIGNS}
ARMS = [member(**REQUIRED.get(name, {})) for name, member in spec.members(Arm).items()]
CHAINS = (Ticket(), Rewind(), OtherOrder(), OtherInit())
CONTROLS = (Reinit(), Shuffled(), Random())


def family(seed=SEED, *, one_shot=False, base=BASE):
    return Family(
        base,
        PRUNE,
        KaimingNormal(),
        seed,
        one_shot=one_shot,
        input_shape=(3, 16, 16),
        num_classes=10,
    )


def run_of(arm, level, of=None):
    of = of or family()
    return of.runs[arm.run(of, level)]


def name_of(member):
    return spec.tag(type(member))


# -- the table of the design ------------------------------------------------------------------

# arm: (parent's arm, arrangement, where survivors start, clock)
TABLE = {
    "ticket": (Ticket(), "found", ToStep(step=0), (0, STEPS)),
    "rewind": (Rewind(), "found", ToStep(step=100), (100, STEPS)),
    "finetune": (Ticket(), "found", LearningRate(steps=100), (300, STEPS)),
    "finetune-small": (
        Ticket(),
        "found",
        Continue(steps=100, learning_rate=0.01 * BASE.recipe.learning_rate),
        (STEPS, STEPS + 100),
    ),
    "reinit": (Ticket(), "found", FRESH, (0, STEPS)),
    "scratch-e": (Ticket(), "found", FRESH, (0, STEPS)),
    "scratch-b": (Ticket(), "found", BUDGETED, (0, STEPS)),
    "scratch-b-plus": (
        Ticket(),
        "found",
        BUDGETED.model_copy(update={"budget": Budget(finetuning=100)}),
        (0, STEPS),
    ),
    "shuffled": (Ticket(), "shuffled", FRESH, (0, STEPS)),
    "shuffled-ticket": (Ticket(), "shuffled", ToStep(step=0), (0, STEPS)),
    "random": (Ticket(), "uniform", FRESH, (0, STEPS)),
    "signed-reinit": (
        Ticket(),
        "found",
        FRESH.model_copy(update={"signs": "init"}),
        (0, STEPS),
    ),
    "signed-constant": (
        Ticket(),
        "found",
        THETA_0.model_copy(update={"magnitudes": "constant"}),
        (0, STEPS),
    ),
    "random-constant": (
        Ticket(),
        "found",
        THETA_0.model_copy(update={"magnitudes": "constant", "signs": "reinit"}),
        (0, STEPS),
    ),
    "other-order": (OtherOrder(), "found", ToStep(step=0), (0, STEPS)),
    "other-init": (OtherInit(), "found", ToStep(step=0), (0, STEPS)),
}


def test_the_table_names_every_arm_that_is_pruned():
    assert {*TABLE, *DESIGNS, "dense"} == spec.members(Arm).keys()


@pytest.mark.parametrize("level", [1, 2, 5])
@pytest.mark.parametrize("name", TABLE)
def test_an_arm_is_the_run_that_the_table_says(name, level):
    of = family()
    parent, arrange, weights, clock = TABLE[name]
    run = run_of(spec.decode(Arm, name), level, of)
    root = {
        "other-order": {"init": SEED, "order": SHIFT + SEED},
        "other-init": {"init": SHIFT + SEED},
    }
    above = of.dense(**root.get(name, {})) if level == 1 else parent.run(of, level - 1)
    assert run.start == Pruned(
        parent=above, prune=PRUNE, level=level, arrange=arrange, weights=weights
    )
    assert run.clock == clock
    assert run.seed == of.runs[above].seed
    assert (run.model, run.data, run.recipe) == (BASE.model, BASE.data, BASE.recipe)


@pytest.mark.parametrize("level", [1, 2, 5])
def test_the_dense_run_is_the_same_at_every_level(level):
    run = run_of(Dense(), level)
    assert run == BASE.model_copy(update={"start": THETA_0, "seed": SEED})
    assert run.clock == (0, STEPS)


@pytest.mark.parametrize("arm", ARMS, ids=name_of)
class TestEveryArm:
    def test_its_run_is_in_the_family_after_its_parent(self, arm):
        of = family()
        arm.run(of, 4)
        order = list(of.runs)
        for address, run in of.runs.items():
            assert run.address == address
            assert run.parent is None or order.index(run.parent) < order.index(address)

    def test_its_runs_do_not_depend_on_which_arms_were_asked_before(self, arm):
        alone, together = family(), family()
        for other, level in itertools.product(reversed(ARMS), (3, 1, 2)):
            other.run(together, level)
        for level in (1, 2, 3):
            assert arm.run(alone, level) == arm.run(together, level)

    def test_another_seed_is_another_run(self, arm):
        addresses = {arm.run(family(seed), 2) for seed in range(5)}
        assert len(addresses) == 5

    def test_every_level_is_another_run_where_it_is_pruned(self, arm):
        of = family()
        addresses = {arm.run(of, level) for level in range(1, 6)}
        assert len(addresses) == (1 if name_of(arm) in ("dense", *DESIGNS) else 5)

    def test_in_one_shot_every_level_is_pruned_from_the_dense_run(self, arm):
        of = family(one_shot=True)
        for level in (1, 2, 3):
            run = run_of(arm, level, of)
            if name_of(arm) not in ("dense", *DESIGNS):
                assert of.runs[run.parent].parent is None
                assert run.start.level == level

    def test_at_level_1_one_shot_and_level_by_level_are_the_same_run(self, arm):
        assert arm.run(family(one_shot=True), 1) == arm.run(family(), 1)


# -- what arms share --------------------------------------------------------------------------


def test_controls_differ_in_the_arrangement_alone():
    runs = [run_of(arm, 3) for arm in CONTROLS]
    for one, other in itertools.combinations(runs, 2):
        start = one.start.model_copy(update={"arrange": other.start.arrange})
        assert one.model_copy(update={"start": start}) == other
        assert one.start.arrange != other.start.arrange
    assert {run.start.weights for run in runs} == {FRESH}


def test_ticket_reinit_and_finetune_have_one_mask_and_differ_in_the_weights_alone():
    ticket, *others = (run_of(arm, 3) for arm in (Ticket(), Reinit(), Finetune()))
    for other in others:
        start = other.start.model_copy(update={"weights": ToStep()})
        assert other.model_copy(update={"start": start}) == ticket


def test_signed_arms_differ_from_what_they_are_compared_with_in_one_thing():
    signed, fresh = run_of(SignedReinit(), 3), run_of(Reinit(), 3)
    start = signed.start.model_copy(update={"weights": FRESH})
    assert signed.model_copy(update={"start": start}) == fresh
    assert signed.start.weights == FRESH.model_copy(update={"signs": "init"})
    constant, random = run_of(SignedConstant(), 3), run_of(RandomConstant(), 3)
    begun = random.start.weights.model_copy(update={"signs": None})
    assert constant.start.weights == begun
    assert constant.parent == random.parent == signed.parent


def test_a_start_that_is_not_signed_keeps_its_address():
    assert not {"signs", "magnitudes"} & FRESH.to_json().keys()


def test_a_chain_is_pruned_from_its_own_level_before():
    of = family()
    for arm in CHAINS:
        for level in (2, 3):
            assert run_of(arm, level, of).parent == arm.run(of, level - 1)


def test_all_chains_of_one_theta_0_and_order_begin_with_one_dense_run():
    of = family()
    for arm in (Ticket(), Rewind(), Rewind(to=Continue(steps=5)), *CONTROLS, Finetune()):
        assert run_of(arm, 1, of).parent == of.dense()


def test_other_order_shares_theta_0_and_not_the_order():
    of = family()
    dense, other = of.runs[of.dense()], of.runs[run_of(OtherOrder(), 1, of).parent]
    assert other.start.initialization == dense.start.initialization
    assert other.start.stream == dense.start.stream == "init"
    assert other.start.seed == dense.seed == SEED
    assert other.seed == SHIFT + SEED


def test_other_init_shares_the_order_and_not_theta_0():
    of = family()
    dense, other = of.runs[of.dense()], of.runs[run_of(OtherInit(), 1, of).parent]
    assert other.seed == dense.seed == SEED
    assert dense.start.seed is None
    assert other.start.seed == SHIFT + SEED


def test_other_orders_and_inits_are_nobody_elses():
    """A study's seeds lie below the shift, so no other seed's dense run is among them."""
    roots = {of.dense() for of in map(family, range(20))}
    shifted = {run_of(arm, 1, family(s)).parent for s in range(20) for arm in CHAINS[2:]}
    assert len(roots) == 20
    assert len(shifted) == 40
    assert not roots & shifted


def test_a_chain_that_returns_to_step_0_is_the_ticket():
    of = family()
    for level in (1, 2, 3):
        assert Rewind(to=ToStep(step=0)).run(of, level) == Ticket().run(of, level)
    assert Rewind(to=ToStep(step=1)).run(of, 1) != Ticket().run(of, 1)


@pytest.mark.parametrize(
    ("to", "clock"),
    [
        (ToStep(step=7), (7, STEPS)),
        (LearningRate(steps=STEPS), (0, STEPS)),
        (Continue(steps=50), (STEPS, STEPS + 50)),
    ],
)
def test_a_chain_keeps_its_own_clock_at_every_level(to, clock):
    of = family()
    assert [run_of(Rewind(to=to), level, of).clock for level in (1, 2, 3)] == [clock] * 3


@pytest.mark.parametrize(
    ("arm", "steps", "weights", "clock"),
    [
        (Finetune(), 400, LearningRate(steps=100), (300, 400)),
        (Finetune(fraction=1), 400, LearningRate(steps=400), (0, 400)),
        (Finetune(fraction=0.1), 7, LearningRate(steps=1), (6, 7)),
        (Finetune(fraction=0.001), 7, LearningRate(steps=1), (6, 7)),
        (Finetune(replay=False), 400, Continue(steps=100), (400, 500)),
        (Finetune(fraction=0.5, replay=False), 10, Continue(steps=5), (10, 15)),
    ],
)
def test_fine_tuning_takes_its_fraction_of_the_steps(arm, steps, weights, clock):
    base = BASE.model_copy(update={"recipe": Recipe(steps=steps)})
    run = run_of(arm, 2, family(base=base))
    assert run.start.weights == weights
    assert run.clock == clock


def test_nothing_is_made_twice():
    of = family()
    for _ in range(2):
        for arm, level in itertools.product(ARMS, (1, 2, 3)):
            arm.run(of, level)
    # Three dense runs, four chains of three levels, and eleven arms on the ticket's masks:
    # scratch-e is reinit. The two designs are one.
    assert len(of.runs) == 3 + 4 * 3 + 11 * 3 + 2


# -- designs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", [Guided(stages=STAGES), Transferred(stages=STAGES)], ids=name_of)
def test_a_design_is_the_studys_network_with_its_stages_from_theta_0_prime(arm):
    run = run_of(arm, 3)
    model = Vgg_11(width=0.1, stages=STAGES)
    assert run == BASE.model_copy(update={"model": model, "start": FRESH, "seed": SEED})
    assert run.clock == (0, STEPS)


def test_one_width_has_the_parameters_of_the_design_as_nearly_as_channels_allow():
    run = run_of(UniformWidth(stages=STAGES), 1)
    assert run.model.stages is None
    assert run == BASE.model_copy(update={"model": run.model, "start": FRESH, "seed": SEED})
    of = (3, 16, 16), 10
    wanted = architecture.num_parameters(Vgg_11(width=0.1, stages=STAGES), *of)
    assert run.model == architecture.uniform(Vgg_11(), wanted, *of).model


def test_designs_are_trained_without_the_dense_runs_penalty():
    recipe = BASE.recipe.model_copy(update={"penalty": ScalePenalty()})
    base = BASE.model_copy(update={"recipe": recipe})
    assert run_of(Dense(), 1, family(base=base)).recipe.penalty == ScalePenalty()
    assert run_of(Guided(stages=STAGES), 1, family(base=base)).recipe == BASE.recipe


def test_one_width_is_as_large_as_the_studys_design():
    others = (0.5,) * 5
    plain = UniformWidth()
    for design in (Guided(stages=STAGES), Transferred(stages=STAGES)):
        assert sized((design, plain)) == (design, UniformWidth(stages=STAGES))
    both = (Guided(stages=STAGES), Transferred(stages=STAGES))
    assert sized((*both, plain))[2] == UniformWidth(stages=STAGES)
    given = (Dense(), UniformWidth(stages=others))
    assert sized(given) == given
    for refused, number in (
        ((plain,), 0),
        ((Guided(stages=STAGES), Transferred(stages=others), plain), 2),
        ((Guided(stages=STAGES), UniformWidth(stages=others)), 2),
    ):
        with pytest.raises(ValueError, match=f"one design.*`uniform-width` has; got {number}"):
            sized(refused)


def test_a_design_of_another_depth_has_its_own_layers():
    base = BASE.model_copy(update={"model": Vgg_13(width=0.1)})
    assert run_of(Guided(stages=STAGES), 1, family(base=base)).model == Vgg_13(
        width=0.1, stages=STAGES
    )


# -- effects and settings ---------------------------------------------------------------------


def test_effects_are_the_comparisons_of_the_design():
    named = {effect.name: (effect.arm, effect.against) for effect in reversed(EFFECTS)}
    assert named == {
        "matching": ("ticket", "dense"),
        "weights": ("finetune", "reinit"),
        "weights-e": ("finetune", "scratch-e"),
        "weights-b": ("finetune", "scratch-b"),
        "weights-small-e": ("finetune-small", "scratch-e"),
        "weights-small-b": ("finetune-small", "scratch-b"),
        "weights-b-plus": ("finetune", "scratch-b-plus"),
        "scratch": ("scratch-b", "finetune"),
        "initialization": ("ticket", "reinit"),
        "connectivity": ("reinit", "shuffled"),
        "placement": ("ticket", "shuffled-ticket"),
        "allocation": ("shuffled", "random"),
        "architecture": ("reinit", "random"),
        "guided": ("guided", "uniform-width"),
        "transferred": ("transferred", "uniform-width"),
        "signs": ("signed-reinit", "reinit"),
        "constant": ("signed-constant", "random-constant"),
        "signs-alone": ("signed-constant", "ticket"),
        "rewinding": ("rewind", "ticket"),
        "same-init": ("other-order", "other-init"),
        "above-chance": ("other-init", "chance"),
    }
    claims = {effect.name for effect in EFFECTS if effect.claim == "non-inferior"}
    assert claims == {"matching", "scratch", "signs-alone"}
    overlaps = {effect.name for effect in EFFECTS if effect.measures == "overlap"}
    assert overlaps == {"same-init", "above-chance"}


def test_effects_compare_known_arms():
    known = {*spec.members(Arm), "chance"}
    assert all({effect.arm, effect.against} <= known for effect in EFFECTS)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("tickets", r"Must be one of the known names; got 'tickets'. Did you mean `ticket`\?"),
        ({"kind": "finetune", "fraction": 0}, "`fraction` must be greater than 0; got 0"),
        ({"kind": "finetune", "fraction": 1.1}, "`fraction` must be less than or equal to 1"),
        ({"kind": "finetune", "replay": 3}, "`replay` must be a valid boolean"),
        ({"kind": "rewind", "to": "nowhere"}, "`to` must be one of the known names"),
        ({"kind": "rewind", "to": {"step": -1}}, "`to.step` must be greater than or equal to 0"),
        ("guided", "`stages` must be given"),
        ({"kind": "guided", "stages": [1, 0]}, "`stages.1` must be greater than 0; got 0"),
        ({"kind": "ticket", "level": 3}, "Has no field `level`"),
    ],
)
def test_arms_that_cannot_be_are_refused(document, message):
    with pytest.raises(SpecError, match=message):
        spec.decode(Arm, document)
