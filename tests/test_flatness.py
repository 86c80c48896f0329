"""Flatness: moves by hand, symmetries of ReLU networks, students whose relevant nodes are known."""

import math

import numpy as np
import pytest
import torch
from test_curvature import gaussian, network
from torch.testing import assert_close

from windfall import chains, curvature, dynamics, flatness, seeds

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def stream(seed=0):
    return seeds.stream(seed, "directions")


def mask(*nodes, size=5):
    return torch.tensor([node in nodes for node in range(size)])


def apart(params, other, layer="hidden1"):
    return flatness.incoming(other, layer) - flatness.incoming(params, layer)


def grown(goal, num_more=3, outgoing=0.0):
    """A student that has the teacher's nodes first, and then others that are read by `outgoing`."""
    params, draw = {}, seeds.stream(7, "init")
    names, below = chains.layer_names(goal), 0
    for name in names:
        more = 0 if name == names[-1] else num_more
        size, fan_in = goal[f"{name}.weight"].shape
        weight = torch.from_numpy(draw.standard_normal((size + more, fan_in + below)))
        weight[:size, :fan_in] = goal[f"{name}.weight"]
        weight[:, fan_in:] = outgoing
        bias = torch.cat([goal[f"{name}.bias"], torch.zeros(more).double()])
        params |= {f"{name}.weight": weight, f"{name}.bias": bias}
        below = more
    return params


def rescaled(params, node, by):
    """The same function: what a node of `hidden1` reads times `by`, what reads it divided."""
    made = {name: value.clone() for name, value in params.items()}
    made["hidden1.weight"][node] *= by
    made["hidden1.bias"][node] *= by
    made["hidden2.weight"][:, node] /= by
    return made


# -- moves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["hidden1", "hidden2"])
def test_every_chosen_node_moves_by_the_norm_and_nothing_else_moves(layer):
    params, which = network((5, 5), 0), mask(1, 4)
    kept = {name: value.clone() for name, value in params.items()}
    absolute = flatness.moved(params, layer, which, 0.7, stream(), is_relative=False)
    relative = flatness.moved(params, layer, which, 0.7, stream())
    own = flatness.incoming(params, layer)[which].norm(dim=1)
    assert_close(
        apart(params, absolute, layer)[which].norm(dim=1), own.new_full((2,), 0.7), **CLOSE
    )
    assert_close(apart(params, relative, layer)[which].norm(dim=1), 0.7 * own, **CLOSE)
    for other in (absolute, relative):
        assert list(other) == list(params)
        assert not apart(params, other, layer)[~which].any()
        rest = [name for name in params if not name.startswith(layer)]
        assert all(torch.equal(other[name], params[name]) for name in rest)
        assert all(value.is_contiguous() for value in other.values())
    assert all(torch.equal(params[name], kept[name]) for name in params)


def test_masks_of_as_many_nodes_move_in_the_same_directions_at_every_norm():
    params = network((5, 5), 0)
    one = apart(params, flatness.moved(params, "hidden1", mask(0, 3), 2.0, stream()))
    two = apart(params, flatness.moved(params, "hidden1", mask(2, 4), 0.1, stream()))
    three = apart(params, flatness.moved(params, "hidden1", mask(0, 1, 2), 1.0, stream()))
    other = apart(params, flatness.moved(params, "hidden1", mask(0, 3), 2.0, stream(1)))

    def units(moves, *nodes):
        return moves[list(nodes)] / moves[list(nodes)].norm(dim=1, keepdim=True)

    assert_close(units(one, 0, 3), units(two, 2, 4), **CLOSE)
    assert_close(units(one, 0, 3), units(three, 0, 1), **CLOSE)
    assert not torch.allclose(units(one, 0, 3), units(other, 0, 3))


def test_directions_are_uniform_on_the_sphere_and_the_bias_is_among_them():
    params = network((20_000,), 0, num_inputs=2)
    every = torch.ones(20_000, dtype=torch.bool)
    moves = apart(params, flatness.moved(params, "hidden1", every, 1.0, stream(), is_relative=0))
    assert_close(moves.mean(0), torch.zeros(3).double(), rtol=0, atol=0.02)
    assert_close(moves.T @ moves / 20_000, torch.eye(3).double() / 3, rtol=0, atol=0.01)
    # Archimedes: on the sphere in three dimensions, every coordinate is uniform on [-1, 1].
    shares = [float((moves[:, 2] < at).double().mean()) for at in (-0.5, 0.0, 0.5)]
    assert shares == pytest.approx([0.25, 0.5, 0.75], abs=0.015)


def test_single_precision_stays_and_its_norms_are_exact_up_to_rounding():
    params = {name: value.float() for name, value in network((5, 5), 0).items()}
    other = flatness.moved(params, "hidden2", mask(0, 1), 0.5, stream(), is_relative=False)
    assert {value.dtype for value in other.values()} == {torch.float32}
    norms = apart(params, other, "hidden2")[:2].double().norm(dim=1)
    assert_close(norms, torch.full((2,), 0.5).double(), rtol=1e-6, atol=0)


def test_no_node_and_a_node_of_no_weights_stay():
    params = network((5, 5), 0)
    params["hidden1.weight"][2], params["hidden1.bias"][2] = 0, 0
    for which in (mask(), mask(2)):
        other = flatness.moved(params, "hidden1", which, 1.0, stream())
        assert all(torch.equal(other[name], params[name]) for name in params)
    other = flatness.moved(params, "hidden1", mask(2), 1.0, stream(), is_relative=False)
    assert apart(params, other)[2].norm() == pytest.approx(1)


# -- what they change -------------------------------------------------------------------------


def test_the_change_is_known_for_outputs_known_by_hand():
    eye = {"output.weight": torch.eye(2).double(), "output.bias": torch.zeros(2).double()}
    shifted = eye | {"output.bias": torch.tensor([3.0, 4.0]).double()}
    inputs = torch.tensor([[1.0, 7.0], [-1.0, 7.0]]).double()
    assert flatness.output_change(eye, eye, inputs) == 0
    # |y' - y|² = 2 · 25, and the deviations are ±1 of the first output alone.
    assert flatness.output_change(eye, shifted, inputs) == pytest.approx(math.sqrt(50 / 2))


def test_the_change_is_in_units_of_the_outputs_own_deviation():
    params, inputs = network((5, 5), 0), gaussian()
    other = flatness.moved(params, "hidden1", mask(1), 0.5, stream())
    found = flatness.output_change(params, other, inputs)
    before, after = (chains.outputs(p, inputs).numpy() for p in (params, other))
    rms = [np.sqrt(np.mean(d**2)) for d in (after - before, before - before.mean(0))]
    assert found == pytest.approx(rms[0] / rms[1])
    for name in ("output.weight", "output.bias"):
        params, other = (p | {name: 100 * p[name]} for p in (params, other))
    assert flatness.output_change(params, other, inputs) == pytest.approx(found)


def test_outputs_that_never_change_change_by_nothing_or_infinitely():
    params, inputs = network((5, 5), 0), gaussian()
    constant = params | {"output.weight": torch.zeros(4, 5).double()}
    assert flatness.output_change(constant, constant, inputs) == 0
    assert flatness.output_change(constant, params, inputs) == math.inf


def test_a_relative_move_does_not_see_how_a_node_is_scaled_but_one_of_a_given_length_does():
    params, inputs = network((5, 5), 0), gaussian()
    small = rescaled(params, 1, 0.01)
    assert_close(chains.outputs(small, inputs), chains.outputs(params, inputs), **CLOSE)

    def change(network, is_relative):
        other = flatness.moved(network, "hidden1", mask(1), 0.3, stream(), is_relative=is_relative)
        return flatness.output_change(network, other, inputs)

    assert change(small, True) == pytest.approx(change(params, True))
    assert change(small, False) > 20 * change(params, False)


# -- which nodes are relevant -----------------------------------------------------------------


def test_the_nodes_that_a_student_has_of_its_teacher_are_the_relevant_ones():
    goal = network((3, 4), 1)
    student, inputs = grown(goal), gaussian(200)
    found = flatness.relevant(student, goal, inputs, threshold=0.999)
    assert found["hidden1"].tolist() == [True] * 3 + [False] * 3
    assert found["hidden2"].tolist() == [True] * 4 + [False] * 3
    loose = flatness.relevant(student, goal, inputs, threshold=-1)
    assert all(nodes.all() for nodes in loose.values())


def test_as_many_nodes_with_the_largest_outgoing_norms_are_the_other_choice():
    goal, inputs = network((3, 4), 1), gaussian(200)
    student = grown(goal)
    student["hidden2.weight"][:, :3] = 0  # matched nodes that nothing reads
    student["hidden2.weight"][:, 3:] = torch.tensor([1.0, 3.0, 2.0])
    matched = flatness.relevant(student, goal, inputs, threshold=0.999)
    outgoing = flatness.relevant(student, goal, inputs, threshold=0.999, relevance="outgoing")
    assert matched["hidden1"].tolist() == [True] * 3 + [False] * 3
    assert outgoing["hidden1"].tolist() == [False] * 3 + [True] * 3
    assert [int(outgoing[name].sum()) for name in outgoing] == [
        int(matched[name].sum()) for name in matched
    ]


# -- one kind against the other ---------------------------------------------------------------


def test_changes_are_means_over_draws_of_as_many_nodes_of_each_kind():
    params, inputs, relevant = network((5, 5), 0), gaussian(), mask(1, 3)
    found = flatness.changes(params, "hidden2", relevant, 0.3, inputs, seed=4, num_draws=6)
    for value, kind in zip(found, (relevant, ~relevant), strict=True):
        total = 0.0
        for draw in range(6):
            order = seeds.stream(4, "flatness-nodes", 1, draw).permutation(kind.nonzero().numpy())
            directions = seeds.stream(4, "flatness-directions", 1, draw)
            which = mask(*order.flatten().tolist()[:2])
            other = flatness.moved(params, "hidden2", which, 0.3, directions)
            total += flatness.output_change(params, other, inputs)
        assert value == pytest.approx(total / 6)
    swapped = flatness.changes(params, "hidden2", ~relevant, 0.3, inputs, seed=4, num_draws=6)
    assert swapped == found[::-1]


def test_every_choice_of_nodes_is_drawn():
    chosen = {tuple(flatness._some(mask(0, 2, 4), 2, stream(draw)).tolist()) for draw in range(50)}
    assert chosen == {tuple(mask(*pair).tolist()) for pair in ((0, 2), (0, 4), (2, 4))}


def test_nodes_that_nothing_reads_move_freely_and_those_of_the_teacher_do_not():
    goal, inputs = network((3, 4), 1), gaussian(200)
    for layer, relevant in flatness.relevant(grown(goal), goal, inputs, threshold=0.999).items():
        one, rest = flatness.changes(grown(goal), layer, relevant, 1.0, inputs, seed=0)
        assert rest == 0 < one
        _, read = flatness.changes(grown(goal, 3, 1e-3), layer, relevant, 1.0, inputs, seed=0)
        assert 0 < read < 0.1 * one


def test_small_moves_change_outputs_in_proportion():
    params, inputs, relevant = network((5, 5), 0), gaussian(200), mask(0, 1)
    one, two = (
        flatness.changes(params, "hidden1", relevant, norm, inputs, seed=0) for norm in (1e-6, 2e-6)
    )
    assert two == pytest.approx([2 * value for value in one], rel=1e-3)


# -- at one moment ----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["squared-error", "cross-entropy"])
def test_the_measures_are_those_of_the_parts(loss):
    goal, inputs = network((3, 4), 1), gaussian(100)
    student = grown(goal, 2, 0.1)
    options = {"threshold": 0.99, "relevance": "outgoing"}
    rest = {"seed": 5, "is_relative": False, "num_draws": 3}
    found = flatness.measure(student, goal, inputs, loss=loss, norms=(0.5, 2), **options, **rest)
    top = float(curvature.hessian_top(student, goal, inputs, loss)[0])
    whole = curvature.trace(student, inputs, loss)
    assert found.pop("sharpness") == pytest.approx(top)
    assert found.pop("trace") == pytest.approx(whole)
    size = sum(value.numel() for value in student.values())
    assert found.pop("trace-per-parameter") == pytest.approx(whole / size)
    assert found.pop("effective") == pytest.approx(whole / top)
    for layer, nodes in flatness.relevant(student, goal, inputs, **options).items():
        assert found.pop(f"relevant/{layer}") == pytest.approx(float(nodes.double().mean()))
        for norm, text in ((0.5, "0.5"), (2, "2")):
            one, other = flatness.changes(student, layer, nodes, norm, inputs, **rest)
            assert found.pop(f"moved-relevant@{text}/{layer}") == pytest.approx(one)
            assert found.pop(f"moved-irrelevant@{text}/{layer}") == pytest.approx(other)
            assert found.pop(f"moved-ratio@{text}/{layer}") == pytest.approx(other / one)
    assert found == {}


@pytest.mark.parametrize("threshold", [-1, 1])
def test_where_a_kind_has_no_nodes_nothing_moves_and_the_ratio_is_1(threshold):
    student, goal = network((5, 5), 0), network((3, 4), 1)
    found = flatness.measure(
        student, goal, gaussian(), loss="squared-error", seed=0, threshold=threshold
    )
    assert {v for name, v in found.items() if name.startswith("moved-ratio")} == {1.0}
    assert {v for n, v in found.items() if n.startswith(("moved-rel", "moved-irr"))} == {0.0}
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("dead", ["output.weight", "hidden1.weight"])
def test_a_dead_student_has_measures_that_are_numbers(dead):
    student, goal = network((5, 5), 0), network((3, 4), 1)
    student = student | {dead: torch.zeros_like(student[dead])}
    found = flatness.measure(student, goal, gaussian(), loss="cross-entropy", seed=0)
    assert not any(math.isnan(value) for value in found.values())


def test_a_seed_names_its_measures_and_global_generators_are_left_alone():
    student, goal = network((5, 5), 0), network((3, 4), 1)
    single = [{n: v.float() for n, v in params.items()} for params in (student, goal)]
    before = seeds.generators()

    def measured(seed, params=(student, goal), dtype=torch.float64):
        return flatness.measure(
            *params,
            gaussian(100).to(dtype),
            loss="squared-error",
            seed=seed,
            threshold=0.5,
            num_draws=2,
        )

    found, again, other = measured(0), measured(0), measured(1)
    assert found == again
    assert measured(0, single, torch.float32) == pytest.approx(found, rel=1e-4)
    drawn = {name for name, value in found.items() if value != other[name]}
    assert drawn
    assert all(name.startswith("moved") for name in drawn)
    assert seeds.generators() == before


def test_rho_of_the_measures_is_that_of_the_dynamics():
    student, goal, inputs = network((5, 5), 0), network((3, 4), 1), gaussian(100)
    found = flatness.relevant(student, goal, inputs, threshold=0.5)
    seen, aims = (dynamics.activations(params, inputs) for params in (student, goal))
    for layer, nodes in found.items():
        rho = np.corrcoef(aims[layer].T, seen[layer].T)[: aims[layer].shape[1], -5:]
        assert nodes.tolist() == (rho.max(0) > 0.5).tolist()


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": "output"}, r"one of \['hidden1', 'hidden2'\]; got 'output'"),
        ({"layer": "hidden3"}, "`layer` must be a hidden layer, .*; got 'hidden3'"),
        ({"norm": 0.0}, "`norm` must be above 0 and finite; got 0"),
        ({"norm": -1.0}, "`norm` must be above 0 and finite; got -1"),
        ({"norm": math.inf}, "`norm` must be above 0 and finite; got inf"),
        ({"norm": math.nan}, "`norm` must be above 0 and finite; got nan"),
        ({"which": mask(0, size=4)}, r"of `hidden1` must be bool \[5\].*; got torch.bool \[4\]"),
        ({"which": mask(0).long()}, r"of `hidden1` must be bool \[5\].*; got torch.int64 \[5\]"),
        ({"params": {"output.weight": torch.ones(1, 1)}}, "`params` must be weights and biases"),
    ],
)
def test_moves_that_cannot_be_are_refused(changed, message):
    good = {"params": network((5, 5), 0), "layer": "hidden1", "which": mask(0), "norm": 1.0}
    flatness.moved(**good, stream=stream())
    with pytest.raises(ValueError, match=message):
        flatness.moved(**(good | changed), stream=stream())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"goal": network((3, 4), 1, num_outputs=2)}, "`goal` must have the network's 4 outputs"),
        ({"goal": network((3, 4), 1, num_inputs=2)}, "`goal` must have the network's 3 inputs"),
        ({"goal": network((3,), 1)}, r"student's layers, \['hidden1', 'hidden2', .*; got \['hid"),
        ({"threshold": 1.5}, r"`threshold` must lie in \[-1, 1\]; got 1.5"),
        ({"relevance": "luck"}, r"`relevance` must be one of \['matched', .*; got 'luck'"),
        ({"num_draws": 0}, "`num_draws` must be at least 1; got 0"),
        ({"norms": (0.1, -2)}, "`norm` must be above 0 and finite; got -2"),
        ({"loss": "hinge"}, "`loss` must be one of"),
    ],
)
def test_measures_that_cannot_be_are_refused(changed, message):
    good = {"params": network((5, 5), 0), "goal": network((3, 4), 1), "inputs": gaussian()}
    with pytest.raises(ValueError, match=message):
        flatness.measure(**(good | {"loss": "squared-error", "seed": 0} | changed))


def test_another_network_of_other_outputs_is_no_change():
    with pytest.raises(ValueError, match="`other` must have the network's 4 outputs; got 2"):
        flatness.output_change(network((5,), 0), network((5,), 0, num_outputs=2), gaussian())
