"""Simulation: the matrix form of learning with one hidden layer, on Gaussian inputs.

Inputs are N(0, I). Student and teacher are matrices of rows, one row for each node with its bias
last, W1 [node, in + 1] and W2 [out, node + 1]. A step adds the learning rate times an expected
update and divides every row by its L2 norm, bias included. The family `Expectation` says what is
expected: the paper's products of means over a batch, the batch's own mean, or the mean over all
inputs, which has a closed form.

    series = simulate(Matrices(num_steps=1_000), seed=0)
    series.best[-1].mean()            # of the teacher nodes' highest correlations
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import PositiveFloat, PositiveInt
from scipy.special import ndtr, owens_t

from windfall import chains, seeds, students, teachers
from windfall.masks import Params
from windfall.spec import FAMILY, Spec
from windfall.students import Start

Rows = npt.NDArray[np.float64]
_BLOCK = 256  # steps whose inputs are drawn at once; it does not change the draws
_NEARLY_1 = 1 - 2.0**-53  # the largest correlation whose sqrt(1 - r²) is not 0
_TINY = 1e-150  # of a row of zeros; its inverse squared is still finite
_VARIANCE = 1e-12  # of a node as good as dead: far above rounding, far below that of a node alive


@dataclass(frozen=True)
class Network:
    """One hidden layer as rows.

    Args:
        hidden: W1, [node, in + 1], the bias last.
        output: W2, [out, node + 1], the bias last.
    """

    hidden: Rows
    output: Rows


def unit(rows: Rows) -> Rows:
    """Rows divided by their L2 norms, the bias being an entry like any other."""
    return rows / np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]


# -- Gaussian inputs: closed forms -----------------------------------------------------------------


def firing(rows: Rows) -> Rows:
    """P(u > 0) = Φ(b / |a|) of u = a·x + b for each row (a, b), [node]."""
    return ndtr(rows[:, -1] / _scales(rows))


def rectified_means(rows: Rows) -> Rows:
    """E[max(u, 0)] = b Φ(b / |a|) + |a| φ(b / |a|) for each row (a, b), [node]."""
    return _rectified(rows[:, -1], _scales(rows))


def orthant(h: Rows, k: Rows, r: Rows) -> Rows:
    """P(z < h, z' < k) of standard Gaussians of correlation r, entry by entry.

        ½ [Φ(h) + Φ(k)] - T(h, (k - r h) / (h q)) - T(k, (h - r k) / (k q)) - δ,  q = sqrt(1 - r²),

    T being Owen's function and δ ½ where hk < 0 or hk = 0 and h + k < 0, else 0. For h = k = 0 it
    is 1/4 + asin(r) / 2π.

    Source: Owen 1956, Ann. Math. Statist. 27, eq. 2.1 and 3.1.

    Args:
        h: thresholds.
        k: thresholds.
        r: correlations, in [-1, 1].
    """
    r = np.clip(r, -_NEARLY_1, _NEARLY_1)
    flat = 0.25 + np.arcsin(r) / (2 * math.pi)
    if not h.any() and not k.any():
        return flat
    h, k = h + 0.0, k + 0.0  # no -0: the sign of a quotient by 0 is that of the numerator
    q = _complement(r)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is where both are 0: not used
        terms = owens_t(h, (k - r * h) / (h * q)) + owens_t(k, (h - r * k) / (k * q))
    is_opposite = (h * k < 0) | ((h * k == 0) & (h + k < 0))
    found = 0.5 * (ndtr(h) + ndtr(k)) - terms - 0.5 * is_opposite
    return np.where((h == 0) & (k == 0), flat, found)


@dataclass(frozen=True)
class Overlaps:
    """Expectations over x ~ N(0, I) for rows u = a·x + b and v = c·x + d, all [u's, v's].

    By Stein's lemma, E[h(x) x] = E[∇h(x)], all follow from `both` and Gaussians in one variable;
    with zero biases `product` is the arc-cosine kernel of degree 1 and `both` that of degree 0.

        E[1(u > 0) max(v, 0) x] = boundary · a + both · c

    Source: Cho & Saul 2009, eq. 3 and 6, for zero biases; derived for others.

    Args:
        both: P(u > 0, v > 0).
        boundary: E[δ(u) max(v, 0)], δ Dirac's.
        gated: E[1(u > 0) max(v, 0)].
        product: E[max(u, 0) max(v, 0)].
    """

    both: Rows
    boundary: Rows
    gated: Rows
    product: Rows


def overlaps(ones: Rows, others: Rows) -> Overlaps:
    """The expectations for every pair of two layers' rows, [node, in + 1] each."""
    scale, other_scale = _scales(ones)[:, None], _scales(others)
    bias, other_bias = ones[:, -1:], others[:, -1]
    dots = ones[:, :-1] @ others[:, :-1].T
    r = np.clip(dots / (scale * other_scale), -_NEARLY_1, _NEARLY_1)
    q = _complement(r)
    density, other_density = _density(bias, scale), _density(other_bias, other_scale)
    # Of v where u = 0, and of u where v = 0.
    mean, spread = other_bias - r * other_scale * bias / scale, other_scale * q
    other_mean, other_spread = bias - r * scale * other_bias / other_scale, scale * q
    both = orthant(bias / scale, other_bias / other_scale + 0 * scale, r)
    at_one = density * ndtr(mean / spread)
    at_other = other_density * ndtr(other_mean / other_spread)
    gated = other_bias * both + dots * at_one + other_scale**2 * at_other
    flipped = bias * both + dots * at_other + scale**2 * at_one  # E[max(u, 0) 1(v > 0)]
    other_boundary = other_density * _rectified(other_mean, other_spread)
    product = other_bias * flipped + dots * both + other_scale**2 * other_boundary
    return Overlaps(both, density * _rectified(mean, spread), gated, product)


def _complement(r: Rows) -> Rows:
    return np.sqrt((1 - r) * (1 + r))


def _scales(rows: Rows) -> Rows:
    return np.maximum(np.sqrt(np.einsum("ij,ij->i", rows[:, :-1], rows[:, :-1])), _TINY)


def _density(mean: Rows, spread: Rows) -> Rows:
    z = mean / spread
    return np.exp(-0.5 * z * z) / (math.sqrt(2 * math.pi) * spread)


def _rectified(mean: Rows, spread: Rows) -> Rows:
    z = mean / spread
    return mean * ndtr(z) + spread * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def moments(ones: Rows, others: Rows) -> Rows:
    """E[f f*ᵀ] of two hidden layers, bias nodes included, [node + 1, other node + 1]."""
    return _bordered(overlaps(ones, others).product, rectified_means(ones), rectified_means(others))


def _bordered(product: Rows, ones: Rows, others: Rows) -> Rows:
    found = np.ones((len(ones) + 1, len(others) + 1))
    found[:-1, :-1], found[:-1, -1], found[-1, :-1] = product, ones, others
    return found


def exact_correlation(teacher: Rows, student: Rows) -> Rows:
    """The correlation rho of hidden nodes over all inputs, [teacher node, student node].

    What `dynamics.correlation` estimates from a sample. 1e-12 is added to each variance, so a node
    that fires on next to no inputs has correlation 0.
    """
    means = [rectified_means(rows) for rows in (teacher, student)]
    deviations = [
        np.sqrt(np.maximum(_squared_means(rows) - mean**2, 0) + _VARIANCE)
        for rows, mean in zip((teacher, student), means, strict=True)
    ]
    covariance = overlaps(teacher, student).product - np.multiply.outer(*means)
    return covariance / np.multiply.outer(*deviations)


def _squared_means(rows: Rows) -> Rows:
    """E[max(u, 0)²] = (b² + |a|²) Φ(b / |a|) + b |a| φ(b / |a|), [node]."""
    bias, scale = rows[:, -1], _scales(rows)
    return bias * rectified_means(rows) + scale**2 * firing(rows)


def difference(student: Network, teacher: Network) -> Network:
    """One network of both hidden layers, the student's nodes first, whose outputs are y* - y."""
    own, goal = student.output, teacher.output
    hidden = np.concatenate([student.hidden, teacher.hidden])
    parts = [-own[:, :-1], goal[:, :-1], goal[:, -1:] - own[:, -1:]]
    return Network(hidden, np.concatenate(parts, axis=1))


def exact_loss(student: Network, teacher: Network) -> float:
    """E[½|y* - y|²] over all inputs, to about 1e-8, at least 0.

    Where rows are nearly parallel, rounding of their correlation leaves that much.
    """
    apart = difference(student, teacher)
    squares = apart.output @ moments(apart.hidden, apart.hidden) * apart.output
    return max(0.0, 0.5 * float(np.sum(squares)))


def gaussian_update(student: Network, teacher: Network) -> Network:
    """Minus the gradient of E[½|y* - y|²] over all inputs, exactly; no products of means.

    Node k of the `difference` has the row (c_k, d_k) and outgoing weights e_k (the teacher's, or
    minus the student's), student node j the row (a_j, b_j) and w_j; y* - y has the biases t. With
    β_jk = w_j·e_k, w_j·t, and the `overlaps` of the student's nodes with all nodes,

        Δa_j = Σ_k β_jk both_jk c_k + [Σ_k β_jk boundary_jk + (w_j·t) φ(b_j / |a_j|) / |a_j|] a_j
        Δb_j = Σ_k β_jk gated_jk + (w_j·t) Φ(b_j / |a_j|)
        Δw_j = Σ_k e_k product_kj + t E[f_j]
    """
    own, apart = student.hidden, difference(student, teacher)
    outgoing, bias = student.output[:, :-1], apart.output[:, -1]
    found = overlaps(own, apart.hidden)
    beta, bias_beta = outgoing.T @ apart.output[:, :-1], outgoing.T @ bias
    factor = np.sum(beta * found.boundary, axis=1) + bias_beta * _density(own[:, -1], _scales(own))
    hidden = np.empty_like(own)
    hidden[:, :-1] = (beta * found.both) @ apart.hidden[:, :-1] + factor[:, None] * own[:, :-1]
    hidden[:, -1] = np.sum(beta * found.gated, axis=1) + bias_beta * firing(own)
    means = rectified_means(apart.hidden)
    reads = _bordered(found.product, means[: len(own)], means)
    return Network(hidden, apart.output @ reads.T)


# -- the family of expectations --------------------------------------------------------------------


class Factored(Spec):
    """The paper's: products of means over a batch, H*_l W*_l L*_lᵀ - H_l W_l L_l.

    At the output it is the batch's own mean; at the hidden layer it is not, and the output's bias
    pulls no hidden node, as in the paper's code.

    Note:
        `dynamics.factored_update` keeps the bias nodes in H and H*.

    Source: luckmatters, `test_multilayer.compute_terms`.
    """

    def update(self, student: Network, teacher: Network, inputs: Rows) -> Network:
        """The update of the student's rows, from inputs [sample, in + 1], the last entry 1."""
        apart, num_own = difference(student, teacher), len(student.hidden)
        nodes, gates = _fire(apart, inputs)
        output, _ = _output_update(apart, nodes, num_own)
        # β and H of the student's nodes with all nodes, H*W* - HW in one product.
        coupled = student.output[:, :-1].T @ apart.output[:, :-1]
        coupled *= gates[:, :num_own].T @ gates
        moved = coupled @ apart.hidden @ (inputs.T @ inputs)
        return Network(moved / len(inputs) ** 2, output)


class Batch(Spec):
    """The mean over a batch of every sample's own update: stochastic gradient descent."""

    def update(self, student: Network, teacher: Network, inputs: Rows) -> Network:
        """The update of the student's rows, from inputs [sample, in + 1], the last entry 1."""
        apart, num_own = difference(student, teacher), len(student.hidden)
        nodes, gates = _fire(apart, inputs)
        output, error = _output_update(apart, nodes, num_own)
        gradient = (error @ student.output[:, :-1]) * gates[:, :num_own]
        return Network(gradient.T @ inputs / len(inputs), output)


class AllInputs(Spec):
    """The mean over all inputs, N(0, I): gradient descent on an endless data set, without noise."""

    def update(self, student: Network, teacher: Network, inputs: Rows) -> Network:  # noqa: ARG002
        """The update of the student's rows; no sample is looked at."""
        return gaussian_update(student, teacher)


Expectation = Annotated[Factored | Batch | AllInputs, FAMILY]


def _fire(network: Network, inputs: Rows) -> tuple[Rows, Rows]:
    """The activations with the bias node, [sample, node + 1], and the gates, [sample, node]."""
    nodes = np.ones((len(inputs), len(network.hidden) + 1))
    gates = np.empty((len(inputs), len(network.hidden)))
    before = inputs @ network.hidden.T
    np.greater(before, 0, out=gates)
    np.multiply(before, gates, out=nodes[:, :-1])
    return nodes, gates


def _output_update(apart: Network, nodes: Rows, num_own: int) -> tuple[Rows, Rows]:
    """The output layer's mean update [out, node + 1], and y* - y [sample, out]."""
    error = nodes @ apart.output.T
    product = error.T @ nodes / len(nodes)
    return np.concatenate([product[:, :num_own], product[:, -1:]], axis=1), error


# -- simulate --------------------------------------------------------------------------------------


class Matrices(Spec):
    """One simulation, but for its seed; by default that of the paper's code with `--perturb`.

    Source: luckmatters, README and `test_multilayer`.

    Args:
        sizes: inputs, teacher nodes, outputs.
        multi: student nodes for each teacher node.
        start: how the student begins, before its rows are divided by their norms.
        expectation: what a step follows.
        batch_size: inputs of a step.
        learning_rate: above 0.
        num_steps: at least 1.
        measure_every: steps between two rows of the series, at least 1.
    """

    sizes: tuple[PositiveInt, PositiveInt, PositiveInt] = (10, 20, 30)
    multi: PositiveInt = 2
    start: Start = students.Perturbed(std=0.1)
    expectation: Expectation = Factored()
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 0.05
    num_steps: PositiveInt = 20_000
    measure_every: PositiveInt = 100


@dataclass(frozen=True)
class Series:
    """What a simulation went through; correlations and loss are exact, over all inputs.

    Args:
        steps: [time], from 0.
        best: each teacher node's highest correlation, [time, teacher node].
        outgoing: L2 norms of the weights that read each student node, and the biases' last,
            [time, student node + 1].
        loss: E[½|y* - y|²], [time].
        first: rho at the start, [teacher node, student node].
        last: rho at the end.
        student: at the end.
        teacher: all along.
    """

    steps: npt.NDArray[np.int64]
    best: Rows
    outgoing: Rows
    loss: Rows
    first: Rows
    last: Rows
    student: Network
    teacher: Network


def begin(settings: Matrices, seed: int) -> tuple[Network, Network]:
    """Student and teacher at step 0: unit rows, the teacher without biases."""
    num_inputs, num_nodes, num_outputs = settings.sizes
    teacher = teachers.Teacher(hidden=(num_nodes,), bias=teachers.ConstantBias(value=0), seed=seed)
    goal = teacher.parameters((num_inputs,), num_outputs)
    student = students.Student(multi=settings.multi, start=settings.start).parameters(goal, seed)
    return _network(student), _network(goal)


def _network(params: Params) -> Network:
    rows = [
        np.column_stack([params[f"{name}.weight"].numpy(), params[f"{name}.bias"].numpy()])
        for name in chains.layer_names(params)
    ]
    return Network(*map(unit, rows))


def simulate(settings: Matrices, seed: int) -> Series:
    """Run the matrix form; the same settings and seed give the same series.

    Args:
        settings: what to run.
        seed: of the teacher, the student and the inputs, at least 0.
    """
    student, teacher = begin(settings, seed)
    rows: list[tuple[int, Rows, Rows, float]] = []
    first = last = exact_correlation(teacher.hidden, student.hidden)
    draw = _inputs(settings, seed)
    for step in range(settings.num_steps + 1):
        if step % settings.measure_every == 0 or step == settings.num_steps:
            last = exact_correlation(teacher.hidden, student.hidden)
            outgoing = np.sqrt(np.square(student.output).sum(0))
            rows.append((step, last.max(1), outgoing, exact_loss(student, teacher)))
        if step < settings.num_steps:
            student = advance(student, teacher, draw(step), settings)
    steps, best, outgoings, loss = (np.array(column) for column in zip(*rows, strict=True))
    return Series(steps, best, outgoings, loss, first, last, student, teacher)


def advance(student: Network, teacher: Network, inputs: Rows, settings: Matrices) -> Network:
    """One step: the student's rows plus the learning rate times the update, at unit norm.

    Args:
        student: before the step; left as it is.
        teacher: what it learns.
        inputs: [sample, in + 1], the last entry 1.
        settings: of the simulation.
    """
    update = settings.expectation.update(student, teacher, inputs)
    return Network(
        unit(student.hidden + settings.learning_rate * update.hidden),
        unit(student.output + settings.learning_rate * update.output),
    )


def _inputs(settings: Matrices, seed: int) -> Callable[[int], Rows]:
    """Gives the inputs of a step, asked for in order; all come from one stream."""
    stream = seeds.stream(seed, "inputs")
    block = np.ones((_BLOCK, settings.batch_size, settings.sizes[0] + 1))

    def draw(step: int) -> Rows:
        if step % _BLOCK == 0 and not isinstance(settings.expectation, AllInputs):
            block[:, :, :-1] = stream.standard_normal(block[:, :, :-1].shape)
        return block[step % _BLOCK]

    return draw
