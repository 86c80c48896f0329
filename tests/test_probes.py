"""Probes and the experiments of the laboratory that are more than one training."""

import pytest
import torch

from windfall import chains, dynamics, experiments, flatness, measures, settings
from windfall.batches import CropFlip
from windfall.data import Digits, load
from windfall.experiments import Experiment
from windfall.inputs import Gaussian, Real
from windfall.laboratory import Laboratory, Training
from windfall.pretrained import Trained, pruned
from windfall.probes import Biases, Flatness, steps_at
from windfall.simulation import Matrices
from windfall.spec import SpecError, checked, decode, members
from windfall.students import Student, Subset
from windfall.teachers import Teacher
from windfall.train import Recipe

SMALL = {
    "teacher": Teacher(hidden=(3, 4)), "student": Student(multi=2),
    "inputs": Gaussian(dimension=5, num_train=64, num_evaluation=100),
    "num_outputs": 6, "batch_size": 8, "steps": 40, "measure_every": 10, "dtype": "float64",
}  # fmt: skip
DIGITS = {
    "teacher": Trained(hidden=(12, 10), removed=0.5, steps=200), "student": Student(multi=2),
    "inputs": Real(num_evaluation=50), "loss": "cross-entropy", "batch_size": 8, "steps": 20,
    "measure_every": 10,
}  # fmt: skip


def small(**changes):
    return Laboratory(**(SMALL | changes))


# -- couplings, scores and snapshots along a course -------------------------------------------


def test_couplings_are_those_of_dynamics_at_the_start_and_the_end():
    settings = small(num_coupled=30)
    course, training = settings.course(0), Training(settings, 0)
    assert course.coupling_steps.tolist() == [0, 10, 40]
    params = {name: value.detach() for name, value in training.params.items()}
    inputs = training.evaluation[:30]
    for step, each in ((0, params), (-1, course.params)):
        found = dynamics.couplings(each, training.goal, inputs)
        for kind in ("beta", "beta_star", "H", "H_star", "L", "L_star"):
            rows = getattr(found, kind)["hidden2"][:8].norm(dim=1)
            torch.testing.assert_close(course.couplings[f"{kind}/hidden2"][step], rows)
    assert not small(num_coupled=0).course(0).couplings


def test_scores_are_of_evaluation_and_of_training_inputs():
    course, training = small().course(1), Training(small(), 1)
    for place, inputs in ((0, training.evaluation), (1, training.training)):
        own, goal = (chains.outputs(p, inputs) for p in (course.params, training.goal))
        assert float(course.scores[-1, place]) == pytest.approx(float((own - goal).square().mean()))
        agreed = float((own.argmax(1) == goal.argmax(1)).double().mean())
        assert float(course.scores[-1, place + 2]) == pytest.approx(agreed)
    batch = next(training.inputs.batches(0))
    seen = {tuple(row) for row in training.training.tolist()}
    assert {tuple(row) for row in batch.double().tolist()} <= seen


@pytest.mark.parametrize("norm", ["none", "before"])
def test_gradients_are_of_the_loss_as_it_is(norm):
    settings = small(student=Student(multi=2, norm=norm), loss="cross-entropy")
    training = Training(settings, 0)
    look = training.look()
    network = training.network.eval()
    network.zero_grad()
    outputs = network(training.evaluation[:256])
    labels = training.answers[:256].argmax(1)
    (3 * torch.nn.functional.cross_entropy(outputs, labels)).backward()  # half of six outputs
    for name in ("hidden1", "output"):
        layer = getattr(network, name)
        norms = torch.cat([layer.weight.grad.flatten(), layer.bias.grad]).norm()
        torch.testing.assert_close(look.gradient[name], norms)


def test_snapshots_are_the_parameters_of_their_steps():
    states = {}
    course = small(snapshots=(0, 7, 40)).course(0, lambda step, state: states.update({step: state}))
    assert list(course.moments()) == [0, 7, 40]
    whole = small().course(0)
    assert all(torch.equal(whole.params[name], course.params[name]) for name in course.params)
    begun = small().student.parameters(small().goal(0), 0)
    for name, value in begun.items():
        assert torch.equal(course.moments()[0][name], value)
    shorter = small(steps=7).course(0)
    for name, value in shorter.params.items():
        assert torch.equal(course.moments()[7][name], value)


def test_a_step_that_never_comes_is_refused():
    with pytest.raises(SpecError, match=r"`snapshots` must be steps of the training, 0 to 40"):
        checked(lambda: small(snapshots=(41,)))


# -- real inputs and trained teachers ---------------------------------------------------------


def test_real_inputs_are_the_data_in_the_order_of_the_seed():
    seen, data = Real(num_evaluation=20).drawn(0, 8), load(Digits())
    assert torch.equal(seen.evaluation, data.prepare(data.validation.inputs[:20], torch.float32))
    batches = seen.batches(0)
    epoch = torch.cat([next(batches) for _ in range(1197 // 8)])
    whole = {
        tuple(row) for row in data.prepare(data.train.inputs, torch.float32).flatten(1).tolist()
    }
    assert {tuple(row) for row in epoch.flatten(1).tolist()} <= whole
    later = next(Real().drawn(0, 8).batches(3))
    assert torch.equal(later, epoch[24:32])
    other = next(Real().drawn(1, 8).batches(0))
    assert not torch.equal(other, epoch[:8])


def test_augmented_inputs_do_not_depend_on_where_they_begin():
    inputs = Real(augment=CropFlip(padding=1))
    whole = inputs.drawn(0, 8).batches(0)
    batches = [next(whole) for _ in range(70)]
    assert torch.equal(next(inputs.drawn(0, 8).batches(66)), batches[66])
    plain = next(Real().drawn(0, 8).batches(0))
    assert not torch.equal(plain, batches[0])


def test_a_trained_teacher_has_learned_and_keeps_its_most_read_nodes():
    data = load(Digits())
    teacher = Trained(hidden=(30, 20), removed=0.0, steps=600)
    params = teacher.parameters(data)
    inputs = data.prepare(data.test.inputs, torch.float64)
    right = chains.outputs(params, inputs).argmax(1) == data.test.labels
    assert float(right.double().mean()) > 0.85
    few = teacher.model_copy(update={"removed": 0.35})
    assert few.active == (20, 13)
    kept = few.parameters(data)
    assert chains.layer_sizes(kept) == (64, 20, 13, 10)
    strength = params["hidden2.weight"].abs().mean(0)
    order = strength.sort(descending=True).indices[:20].sort().values
    assert torch.equal(kept["hidden1.weight"], params["hidden1.weight"][order])
    assert torch.equal(kept["hidden1.bias"], params["hidden1.bias"][order])


def test_among_equal_nodes_the_first_stay():
    params = {
        "hidden1.weight": torch.eye(3), "hidden1.bias": torch.zeros(3),
        "output.weight": torch.tensor([[1.0, 2.0, -1.0]]), "output.bias": torch.zeros(1),
    }  # fmt: skip
    assert torch.equal(pruned(params, (2,))["output.weight"], torch.tensor([[1.0, 2.0]]))


@pytest.mark.parametrize("layers", ["linear", "convolutional"])
def test_a_student_learns_a_trained_teacher_of_real_data(layers):
    hidden = {"linear": (12, 10), "convolutional": (4, 4)}[layers]
    teacher = Trained(hidden=hidden, layers=layers, removed=0.5, steps=100)
    settings = Laboratory(**DIGITS | {"teacher": teacher, "steps": 300, "learning_rate": 0.1})
    course = settings.course(0)
    assert float(course.scores[-1, 0]) < 0.8 * float(course.scores[0, 0])
    assert float(course.scores[-1, 2]) > float(course.scores[0, 2])
    assert course.best["hidden1"].shape[1] == hidden[0] // 2
    assert course.outgoing["hidden2"].shape[1] == hidden[1]
    assert bool(course.gradient["output"].isfinite().all())
    assert bool(course.couplings) == (layers == "linear")
    state = {}
    settings.course(0, lambda step, held: state.setdefault(step, held()))
    again = Training(settings, 0, state[10]).run()
    assert all(torch.equal(again.params[name], course.params[name]) for name in course.params)


def test_multiply_adds_count_positions():
    teacher = Teacher(hidden=(2, 3), layers="convolutional")
    settings = Laboratory(
        teacher=teacher, student=Student(multi=2), inputs=Real(), num_outputs=5, steps=1
    )
    expected = 36 * 4 * 1 * 9 + 16 * 6 * 4 * 9 + 5 * 6 * 16  # 8 x 8 pixels: 6 x 6, then 4 x 4
    assert experiments.num_macs(settings) == expected
    few = settings.model_copy(update={"subset": Subset()})
    assert experiments.num_macs(few) == 36 * 2 * 9 + 16 * 3 * 2 * 9 + 5 * 3 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": Gaussian()}, "`inputs` must be real data for a trained teacher"),
        ({"num_outputs": 7}, "`num_outputs` must be left out for a trained teacher"),
        ({"student": Student(hidden=(4,))}, r"sizes of 2 hidden layers, as the teacher's \[6, 5\]"),
    ],
)
def test_a_trained_teacher_that_cannot_be_is_refused(change, message):
    with pytest.raises(SpecError, match=message):
        checked(lambda: Laboratory(**DIGITS | change))


def test_convolutions_on_too_small_images_are_refused_before_the_start():
    teacher = Teacher(hidden=(2,) * 4, layers="convolutional")
    settings = Laboratory(teacher=teacher, inputs=Real(), num_outputs=3)
    with pytest.raises(SpecError, match="at least 9 x 9 pixels for 4 convolutions"):
        experiments.check(settings)


def test_a_teachers_training_that_diverges_is_told():
    teacher = Trained(hidden=(6,), steps=200, learning_rate=1e30)
    with pytest.raises(SpecError, match=r"`teacher\.learning_rate` must be one that"):
        teacher.parameters(load(Digits()))


# -- subsets ----------------------------------------------------------------------------------


def test_a_ticket_has_its_winners_initial_weights_and_others_other_ones():
    whole, seed = small(steps=200, learning_rate=0.5), 2
    grown = whole.course(seed)
    won = {layer: grown.winners(layer).unique() for layer in grown.layers}
    begun = whole.student.parameters(whole.goal(seed), seed)
    expected = {
        "initial": chains.restricted(begun, won),
        "final": chains.restricted(grown.params, won),
        "redrawn": chains.restricted(
            whole.student.parameters(whole.goal(seed), seed, redrawn=True), won
        ),
    }
    for weights, params in expected.items():
        pruned = whole.model_copy(update={"subset": Subset(weights=weights)})
        training = Training(pruned, seed, parent=grown)
        assert all(torch.equal(training.params[name].detach(), params[name]) for name in params)
    ticket = whole.model_copy(update={"subset": Subset()})
    assert experiments.parent(ticket) == whole
    course = ticket.course(seed)
    for layer, found in won.items():
        before = dynamics.winners(grown.last[layer])
        assert torch.equal(found[course.heirs[layer]], before)
        same = found[dynamics.winners(course.last[layer])] == before
        expected = float(same[~course.dead[layer]].double().mean())
        assert measures.measured(course, f"again/{layer}") == pytest.approx(expected)
        assert f"again/{layer}" in experiments.metrics(ticket)
        assert f"again/{layer}" not in experiments.metrics(whole)
    sizes = {layer: rho.shape[1] for layer, rho in course.last.items()}
    assert sizes == {layer: len(found) for layer, found in won.items()}


def test_a_winner_that_is_not_kept_has_no_heir():
    whole, other = small(steps=20), small(steps=20, subset=Subset(keep="random"))
    grown, course = whole.course(0), other.course(0)
    kept = other.subset.kept(
        {n: grown.winners(n) for n in grown.layers}, {"hidden1": 6, "hidden2": 8}, 0
    )
    for layer in grown.layers:
        places = {node: place for place, node in enumerate(kept[layer].tolist())}
        expected = [places.get(int(node), -1) for node in dynamics.winners(grown.last[layer])]
        assert course.heirs[layer].tolist() == expected


def test_dead_teacher_nodes_win_nobody():
    course = small().course(0)
    course.dead["hidden1"][:] = torch.tensor([True, False, True])
    assert course.winners("hidden1").tolist() == [int(course.last["hidden1"][1].argmax())]


def test_what_diverged_is_pruned_by_nobody():
    whole = small(learning_rate=1e6, steps=500)
    grown = whole.course(0)
    ticket = whole.model_copy(update={"subset": Subset()})
    with pytest.raises(SpecError, match="`learning_rate` must be one that the student to prune"):
        Training(ticket, 0, parent=grown)


# -- flatness ---------------------------------------------------------------------------------


def test_flatness_is_read_at_its_moments():
    probe = Flatness(laboratory=small(), moments=(0, 0.25), norms=(0.5,), num_inputs=40)
    parent = experiments.parent(probe)
    assert parent.snapshots == (0, 10, 40)
    grown = parent.course(0)
    found = experiments.run(probe, 0, grown=grown)
    assert found.steps.tolist() == [0, 10, 40]
    assert list(found.values) == experiments.metrics(probe)
    inputs = probe.laboratory.inputs.drawn(0, 1).evaluation[:40]
    expected = flatness.measure(
        grown.params, probe.laboratory.goal(0), inputs, loss="squared-error", seed=0, norms=(0.5,)
    )
    for name, value in expected.items():
        assert measures.measured(found, name) == pytest.approx(value)
    again = measures.outcome(found.tensors(), diverged=False)
    assert all(torch.equal(again.values[name], found.values[name]) for name in found.values)


def test_flatness_of_what_it_cannot_read_is_refused():
    normed = small(student=Student(norm="before"))
    with pytest.raises(SpecError, match="`laboratory` must have fully connected layers without"):
        checked(lambda: Flatness(laboratory=normed))


def test_moments_are_steps_and_the_last_one_besides():
    assert steps_at((0.5, 0.0, 0.501), 10) == (0, 5, 10)
    assert steps_at((), 7) == (7,)


# -- biases -----------------------------------------------------------------------------------

FEW = {"model": {"kind": "resnet-20", "width": 0.125}, "num_inputs": 40, "moments": (0, 0.5)}
SHORT = Recipe(steps=4, eval_every=4, batch_size=16)


def test_biases_are_read_of_a_network_that_learns():
    probe = Biases(**FEW, recipe=SHORT)
    states = {}
    found = experiments.run(probe, 0, pulse=lambda step, state: states.update({step: state()}))
    assert found.steps.tolist() == [0, 2, 4]
    assert measures.measured(found, "negative") > 0
    assert float(found.values["negative"][0]) == 0  # all begin at exactly 0
    assert set(experiments.metrics(probe)) <= set(found.values)
    assert any(name.startswith("passes/") and "stage" in name for name in found.values) or any(
        name.startswith("negative/") and "norm" in name for name in found.values
    )
    kept = states[3]
    state = experiments.restored(probe, kept.tensors(), kept.facts())
    again = experiments.run(probe, 0, state=state)
    assert all(torch.equal(again.values[name], found.values[name]) for name in found.values)


def test_a_network_without_batch_norm_is_refused_before_the_start():
    with pytest.raises(SpecError, match="BatchNorm"):
        experiments.check(Biases(model="lenet-300-100"))


# -- the family -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(members(Experiment)))
def test_every_experiment_has_a_name_costs_and_metrics(kind):
    experiment = decode(Experiment, kind)
    assert experiments.num_steps(experiment) > 0
    assert experiments.training_flops(experiment) > 0
    names = experiments.metrics(experiment)
    assert len(set(names)) == len(names) > 1
    experiments.check(experiment)


LABORATORY = ["winners", "winners-shallow", "structured-or-random", "flatness", "bn-bias", "luck"]
BEGUN = ["luck-matrices", "stability", "rewinding", "width-at-init", "depth", "residual-depth"]


@pytest.mark.parametrize("name", LABORATORY + BEGUN)
def test_bundled_studies_are_whole(name):
    found = settings.load(name)
    assert found.name == name
    assert found.question
    assert len(found.places()) == len(found.arms) * found.num_seeds
    for experiment in found.experiments().values():
        experiments.check(experiment)


def test_costs_of_what_has_a_parent_are_those_of_a_plain_training():
    ticket = small(subset=Subset())
    tried = experiments.trial(ticket)
    assert tried.subset is None
    assert tried.student.sizes(tried.hidden) == (3, 4)
    assert experiments.trial(Flatness(laboratory=small())) == Flatness(laboratory=small()).parent()
    assert experiments.trial(Matrices()) == Matrices()
