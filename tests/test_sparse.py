"""The sparse engine against its twin, the separate one, and against itself interrupted.

Its kernels, lists, graph and machine code have tests of their own, in `test_sparse_kernels`.
"""

import copy
import math
from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_engines import (  # noqa: F401  the fixture is used by being here
    CLASSES,
    OPTIMIZERS,
    Paused,
    Tied,
    assert_pruned,
    assert_same,
    from_file,
    one_thread,
    paused_at,
)
from torch import nn

from windfall import masks as masking
from windfall import models, seeds
from windfall.batches import CropFlip
from windfall.data import Dataset
from windfall.engines import contract, separate, sparse
from windfall.engines.contract import Task
from windfall.engines.sparse import training
from windfall.initialize import TorchDefault, initial_parameters
from windfall.samples import Part
from windfall.spec import SpecError
from windfall.train import Adam, Constant, Cosine, Recipe, Sgd, State, StepDrops

SHAPE, BATCH, STEPS = (2, 5, 7), 20, 6


# -- data, recipes, states -------------------------------------------------------------------------


def part(num, shape, stored, purpose):
    stream = seeds.stream(0, purpose)
    inputs = torch.from_numpy(stream.integers(0, 256, (num, *shape), dtype=np.uint8))
    if stored != "uint8":
        inputs = inputs.to(getattr(torch, stored)) / 255
    return Part(inputs, torch.from_numpy(stream.integers(0, CLASSES, num)))


def dataset(shape=SHAPE, *, stored="uint8", nums=(61, 17, 23)):
    """Random labels and inputs; the sizes of the parts are no multiples of anything."""
    parts = [
        part(num, shape, stored, name)
        for num, name in zip(nums, ("train", "val", "test"), strict=True)
    ]
    mean, std = torch.linspace(0.3, 0.5, shape[0]), torch.linspace(0.3, 0.2, shape[0])
    peak = 255 if stored == "uint8" else 1
    return Dataset(*parts, mean.double(), std.double(), peak, CLASSES, "", None)


def recipe_of(**settings):
    short = {
        "optimizer": Sgd(momentum=0.8, nesterov=True, weight_decay=0.01),
        "learning_rate": 0.02,
        "steps": STEPS,
        "batch_size": BATCH,
        "eval_every": 4,
        "dtype": "float64",
    }
    return Recipe(**short | settings)


def beginning(build, *, density=None, seed=0, step=0):
    """The state at a step without a past; masks of every weight, or none."""
    params, buffers = initial_parameters(build, TorchDefault(), seed)
    mask = {}
    if density is not None:
        dense = masking.ones(params, [n for n, p in params.items() if p.dim() > 1])
        counts = {name: round(density * size) for name, size in masking.sizes(dense).items()}
        mask = masking.scatter(counts, dense, seed)
    return State(step, masking.apply(mask, params), buffers, mask)


def task(build, recipe, *, data=None, seed=0, last=None, keep=()):
    last = recipe.steps if last is None else last
    return Task(build(), data or dataset(), recipe, seed, last, frozenset(keep))


# -- how far apart two states are ------------------------------------------------------------------


def norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def distance(found, expected, start=None):
    """The norm of the difference, relative to that of the change from the start."""
    whole = [n for n, t in expected.items() if t.is_floating_point()]
    moved = [expected[n].double() - (0 if start is None else start[n]) for n in whole]
    apart = [found[n].double() - expected[n].double() for n in whole]
    return norm(apart) / max(norm(moved), 1e-300) if norm(apart) else 0.0


def assert_close(found, expected, start, tolerance=1e-10):
    """Two states are equal up to rounding, and what is not rounded exactly."""
    assert (found.step, found.diverged) == (expected.step, expected.diverged)
    mine, theirs = found.tensors(), expected.tensors()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
        if not tensor.is_floating_point():
            assert torch.equal(mine[name], tensor), name
    assert distance(found.params, expected.params, start.params) <= tolerance
    assert distance(found.buffers, expected.buffers, start.buffers) <= tolerance
    for kind, tensors in expected.optimizer.items():
        assert distance(found.optimizer[kind], tensors) <= tolerance, kind
    assert_evaluations_close(found.evaluations, expected.evaluations, tolerance / 100)
    assert found.snapshots.keys() == expected.snapshots.keys()
    for step, snapshot in expected.snapshots.items():
        assert distance(found.snapshots[step].tensors(), snapshot.tensors()) <= tolerance


def assert_evaluations_close(found, expected, tolerance):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for name, number in vars(theirs).items():
            is_exact = number is None or name == "step" or "accuracy" in name
            rounded = number if is_exact else pytest.approx(number, rel=tolerance)
            assert getattr(mine, name) == rounded, name


def assert_as_separate(build, recipe, *, data=None, state=None, **settings):
    """The training is that of the separate engine; returns its end."""
    data, state = data or dataset(), state or beginning(build)
    found = sparse.train(task(build, recipe, data=data, **settings), state)
    expected = separate.train(task(build, recipe, data=data, **settings), state)
    assert_close(found, expected, state)
    return found


# -- networks --------------------------------------------------------------------------------------


class Made(nn.Module):
    """Layers by name, and how they are used."""

    def __init__(self, run, layers):
        super().__init__()
        self.run = run
        for name, make in layers.items():
            self.add_module(name, make())

    def forward(self, inputs):
        return self.run(self, inputs)


def made(run, **layers):
    return lambda: Made(run, layers)


def headed(*makes, shape=SHAPE):
    """The layers, and a linear one after them."""

    def build():
        body = nn.Sequential(*[make() for make in makes]).eval()
        with torch.no_grad():
            size = body(torch.zeros(2, *shape)).flatten(1).shape[1]
        return nn.Sequential(
            OrderedDict(body=body.train(), flatten=nn.Flatten(), output=nn.Linear(size, CLASSES))
        )

    return build


def conv(channels=2, wide=4, kernel=3, **settings):
    return lambda: nn.Conv2d(channels, wide, kernel, **({"padding": 1} | settings))


def norm2d(channels=4):
    return lambda: nn.BatchNorm2d(channels)


def mlp():
    return models.Mlp(hidden=(19, 7)).build(SHAPE, CLASSES)


def normed():
    return headed(conv(bias=False), norm2d(), nn.ReLU, conv(4, 5), nn.ReLU)()


def convolutions(**settings):
    """Two with the settings, so that a gradient for the inputs is needed too."""
    settings = {"kernel": 3} | settings
    return headed(conv(2, 4, **settings), nn.ReLU, conv(4, 6, **settings | {"groups": 1}))


def branches(first, second):
    """One tensor read by two, the first one's gradient coming last."""

    def run(net, inputs):
        hidden = net.first(inputs)
        return net.one(net.a(hidden).flatten(1)) + net.two(net.b(hidden).flatten(1))

    def build():
        body = Made(
            lambda net, x: net.first(x), {"first": lambda: nn.Sequential(conv()(), nn.ReLU())}
        )
        with torch.no_grad():
            hidden = body(torch.zeros(2, *SHAPE))
            sizes = [each()(hidden).flatten(1).shape[1] for each in (first, second)]
        return Made(
            run,
            {
                "first": lambda: body, "a": first, "b": second,
                "one": lambda: nn.Linear(sizes[0], CLASSES),
                "two": lambda: nn.Linear(sizes[1], CLASSES),
            },
        )  # fmt: skip

    return build


class Loose(nn.Module):
    """A convolution without a ReLU after it, so that what reads it must cut it itself."""

    def __init__(self, run, **layers):
        super().__init__()
        self.conv, self.run = conv()(), run
        for name, make in layers.items():
            self.add_module(name, make())

    def forward(self, inputs):
        return self.run(self, self.conv(inputs))


def loose(run, **layers):
    return headed(lambda: Loose(run, **layers))


def block(stride):
    """A residual block: a shortcut that is the identity, or a normalized convolution."""

    def run(net, inputs):
        hidden = net.norm2(net.conv2(F.relu(net.norm1(net.conv1(inputs)))))
        return F.relu(hidden + net.shortcut(inputs))

    def shortcut():
        if stride == 1:
            return nn.Identity()
        return nn.Sequential(conv(4, 4, 1, padding=0, stride=stride, bias=False)(), norm2d()())

    return made(
        run,
        conv1=conv(4, 4, stride=stride, bias=False), norm1=norm2d(),
        conv2=conv(4, 4, bias=False), norm2=norm2d(), shortcut=shortcut,
    )  # fmt: skip


def before(net, x):
    """A block that normalizes and cuts before it convolves: its input is read by two."""
    return x + net.conv2(net.norm(x).relu())


CONVOLUTIONS = {
    "3x3": convolutions(),
    "no bias": convolutions(bias=False),
    "no padding": convolutions(padding=0),
    "padding 2": convolutions(padding=2),
    "padding beyond the kernel": convolutions(kernel=1, padding=1),
    "strided padding beyond the kernel": convolutions(kernel=2, padding=3, stride=2),
    "5x5": convolutions(kernel=5, padding=2),
    "1x1": convolutions(kernel=1, padding=0),
    "3x1": convolutions(kernel=(3, 1), padding=(1, 0)),
    "2x3, uneven padding": convolutions(kernel=(2, 3), padding=(0, 2)),
    "stride 2": convolutions(stride=2),
    "stride 2, 1x1": convolutions(kernel=1, padding=0, stride=2),
    "stride 2, 5x5": convolutions(kernel=5, padding=2, stride=2),
    "stride 3": convolutions(stride=3),
    "stride beyond the kernel": convolutions(kernel=2, padding=1, stride=4),
    "dilation": convolutions(dilation=2, padding=2),
    "dilation, stride": convolutions(dilation=(1, 2), padding=2, stride=2),
    "groups": convolutions(groups=2),
    "depthwise": headed(conv(), nn.ReLU, conv(4, 8, groups=4)),
    "one place": headed(conv(2, 20, (5, 7), padding=0), nn.ReLU, conv(20, 18, 1, padding=0)),
    "wide": headed(conv(2, 40), nn.ReLU, conv(40, 20), nn.ReLU),
}
POOLS = {
    "max 2": headed(conv(), nn.ReLU, lambda: nn.MaxPool2d(2)),
    "max 3": headed(conv(), lambda: nn.MaxPool2d(3), conv(4, 4)),
    "max 2x3": headed(conv(), nn.ReLU, lambda: nn.MaxPool2d((2, 3))),
    "mean 2": headed(conv(), nn.ReLU, lambda: nn.AvgPool2d(2), conv(4, 4)),
    "mean 3": headed(conv(), lambda: nn.AvgPool2d(3)),
    "adaptive": headed(conv(), nn.ReLU, lambda: nn.AdaptiveAvgPool2d(1)),
    "adaptive rows": headed(conv(), nn.ReLU, lambda: nn.AdaptiveAvgPool2d((1, 7))),
    "adaptive as it is": headed(conv(), lambda: nn.AdaptiveAvgPool2d((None, 1))),
    "of the input": headed(lambda: nn.MaxPool2d(2), conv()),
    "ReLU after": headed(conv(), lambda: nn.MaxPool2d(2), nn.ReLU, conv(4, 4)),
    "max beside mean": branches(lambda: nn.MaxPool2d(2), lambda: nn.AvgPool2d(2)),
    "mean beside max": branches(lambda: nn.AvgPool2d(3), lambda: nn.MaxPool2d(3)),
    "max before a convolution": branches(lambda: nn.MaxPool2d(2), conv(4, 4)),
    "max after a convolution": branches(conv(4, 4), lambda: nn.MaxPool2d(2)),
    "mean before a convolution": branches(lambda: nn.AvgPool2d(3), conv(4, 4)),
    "mean after a convolution": branches(conv(4, 4), lambda: nn.AvgPool2d(3)),
}
GRAPHS = {
    "linear": headed(),
    "linear, no bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(70, CLASSES, bias=False)),
    "BatchNorm1d": headed(
        nn.Flatten, lambda: nn.Linear(70, 9), lambda: nn.BatchNorm1d(9, 1e-3, 0.3), nn.ReLU
    ),
    "BatchNorm2d": normed,
    "BatchNorm2d first": headed(norm2d(2), conv()),
    "BatchNorm2d of a pool": headed(conv(), lambda: nn.MaxPool2d(2), norm2d(), nn.ReLU, conv(4, 4)),
    "identity": headed(conv(2, 4), norm2d(), nn.ReLU, block(1), block(1)),
    "downsample": headed(conv(2, 4), norm2d(), nn.ReLU, block(2), block(1)),
    "normalized before": headed(
        conv(), *[made(before, norm=norm2d(), conv2=conv(4, 4, bias=False))] * 2, norm2d(), nn.ReLU
    ),
    "norm and its input": loose(lambda net, x: net.norm(x) + x, norm=norm2d()),
    "its input and norm, cut": loose(lambda net, x: F.relu(x + net.norm(x)), norm=norm2d()),
    "a sum read twice": loose(
        lambda net, x: (lambda y: y + net.two(y))(x + net.one(x)), one=conv(4, 4), two=conv(4, 4)
    ),
    "a cut sum read twice": loose(
        lambda net, x: (lambda y: y + net.two(y))(F.relu(x + net.one(x))),
        one=conv(4, 4), two=conv(4, 4),
    ),
    "sum of three": loose(lambda net, x: x + net.one(x) + net.two(x), one=conv(4, 4), two=norm2d()),
    "sum of halos": loose(lambda net, x: x + net.one(x), one=conv(4, 4, 5, padding=2)),
    "ReLU read beside its input": loose(lambda net, x: x + net.one(F.relu(x)), one=conv(4, 4)),
    "ReLU read after its input": loose(lambda net, x: net.one(F.relu(x)) + x, one=conv(4, 4)),
    "ReLU plus its input": loose(lambda net, x: F.relu(x) + x),
    "ReLU of the input": headed(nn.ReLU, conv()),
    "ReLU of a ReLU": headed(conv(), nn.ReLU, nn.ReLU, conv(4, 4)),
    "ReLU of the logits": lambda: nn.Sequential(mlp(), nn.ReLU()),
    "ReLU of normalized logits": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(70, CLASSES), nn.BatchNorm1d(CLASSES), nn.ReLU()
    ),
    "input read twice": made(
        lambda net, x: net.one(x.flatten(1)) + net.two(net.conv(x).flatten(1)),
        one=lambda: nn.Linear(70, CLASSES), conv=conv(), two=lambda: nn.Linear(140, CLASSES),
    ),
    "flat input added": made(
        lambda net, x: (lambda y: net.two(F.relu(net.one(y) + y)))(x.flatten(1)),
        one=lambda: nn.Linear(70, 70), two=lambda: nn.Linear(70, CLASSES),
    ),
    "features read twice": loose(
        lambda net, x: (lambda y: net.one(y) + net.two(y))(F.relu(x).flatten(1)),
        one=lambda: nn.Linear(140, 10), two=lambda: nn.Linear(140, 10),
    ),
}  # fmt: skip
SMALL = (3, 8, 8)
ZOO = {
    "lenet": (lambda: models.Lenet_300_100(width=0.1).build(SMALL, CLASSES), 0.05),
    "conv-2": (lambda: models.Conv_2(width=0.1).build(SMALL, CLASSES), 0.02),
    "conv-4": (lambda: models.Conv_4(width=0.1).build(SMALL, CLASSES), 0.02),
    "resnet-20": (lambda: models.Resnet_20(width=0.25).build(SMALL, CLASSES), 1e-3),
    "vgg": (lambda: models.Vgg_11(width=0.05).build((3, 16, 16), CLASSES), 1e-3),
}


def zoo_data(name):
    return dataset((3, 16, 16) if name == "vgg" else SMALL)


# -- the twin --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CONVOLUTIONS, *POOLS, *GRAPHS])
def test_a_network_trains_as_by_the_separate_engine(case):
    build = (CONVOLUTIONS | POOLS | GRAPHS)[case]
    for density in (None, 0.3):
        state = beginning(build, density=density)
        final = assert_as_separate(build, recipe_of(), state=state, keep=[3])
        assert norm(final.params[n] - p for n, p in state.params.items()) > 1e-2
        if density:
            assert_pruned(final)


def perturbed(state):
    """Its weights moved by a few units in the last place."""
    moved = state.copy()
    draw = torch.Generator().manual_seed(0)
    for name, param in moved.params.items():
        noise = torch.randn(param.shape, generator=draw, dtype=torch.float64)
        moved.params[name] = param.double() * (1 + 1e-15 * noise)
    return moved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "optimizer"),
    [
        ("lenet", "adam"), ("conv-2", "adam"), ("conv-4", "momentum"),
        ("resnet-20", "momentum"), ("vgg", "adam"),
    ],
)  # fmt: skip
def test_after_200_steps_the_zoo_is_still_as_by_the_separate_engine(network, optimizer):
    """The separate engine itself, moved by 1e-15, stays where it was: the bound is no luck."""
    build, rate = ZOO[network]
    methods = {
        "momentum": (Sgd(momentum=0.9, weight_decay=1e-3), rate),
        "adam": (Adam(eps=1e-4, weight_decay=1e-2), rate / 20),
    }
    method, rate = methods[optimizer]
    recipe = recipe_of(
        optimizer=method,
        learning_rate=rate,
        schedule=StepDrops(at=(90, 150), factor=0.2, warmup=20),
        steps=200,
        eval_every=40,
        augment=CropFlip(padding=1),
    )
    data, state = zoo_data(network), beginning(build, density=0.3)
    final = assert_as_separate(build, recipe, data=data, state=state)
    assert_pruned(final)
    again = separate.train(task(build, recipe, data=data), perturbed(state))
    assert distance(final.params, again.params, state.params) <= 1e-10


SCHEDULES = {
    "constant": Constant(),
    "constant, warm-up": Constant(warmup=15),
    "drops, warm-up": StepDrops(at=(10, 30), factor=0.2, warmup=5),
    "cosine": Cosine(),
    "cosine, warm-up": Cosine(warmup=12),
}
METHODS = OPTIMIZERS | {
    "momentum": (Sgd(momentum=0.9), 0.03),
    "adam without memory": (Adam(beta1=0.0, beta2=0.0, eps=1e-3), 0.01),
}


@pytest.mark.parametrize("optimizer", METHODS)
def test_every_optimizer_follows_every_schedule(optimizer):
    method, rate = METHODS[optimizer]
    ends = []
    for schedule in SCHEDULES.values():
        recipe = recipe_of(
            optimizer=method, learning_rate=rate, schedule=schedule, steps=40, eval_every=15
        )
        ends.append(assert_as_separate(mlp, recipe, state=beginning(mlp, density=0.4)))
    for one, other in pairwise(ends):
        assert not torch.equal(one.params["output.weight"], other.params["output.weight"])


@pytest.mark.parametrize("batch_size", [1, 5, 16, 60, 100, 300])
@pytest.mark.parametrize(
    "build",
    [mlp, headed(conv(), norm2d(), nn.ReLU, lambda: nn.MaxPool2d(2), conv(4, 4))],
    ids=["mlp", "normed"],
)
def test_every_batch_size_trains_as_by_the_separate_engine(build, batch_size):
    recipe = recipe_of(batch_size=batch_size, learning_rate=0.01, steps=3, eval_every=2)
    assert_as_separate(build, recipe, state=beginning(build, density=0.5))


def test_a_batch_of_one_has_no_variance_and_is_refused_as_by_the_separate_engine():
    """Normalization of features; of images, one sample has many numbers a channel."""
    build, recipe = GRAPHS["BatchNorm1d"], recipe_of(batch_size=1)
    for engine in (separate, sparse):
        with pytest.raises((ValueError, SpecError)):
            engine.train(task(build, recipe), beginning(build))


def without(state, *, rows=(), columns=()):
    """The state, its layers without some rows and columns."""
    for name, mask in state.masks.items():
        mask[[row for row in rows if row < len(mask)]] = False
        mask[:, [column for column in columns if column < mask.shape[1]]] = False
        state.params[name] = state.params[name] * mask
    return state


@pytest.mark.parametrize(
    "build", [mlp, normed, CONVOLUTIONS["stride 2"]], ids=["mlp", "normed", "strided"]
)
def test_every_density_trains_as_by_the_separate_engine(build):
    for density in (1, 0.3, 0.02, 0):
        state = beginning(build, density=density)
        final = assert_as_separate(build, recipe_of(), state=state)
        assert density == 1 or bool(final.masks)
        if density < 1:
            assert_pruned(final)
    for kinds in ({"rows": (0, 2)}, {"columns": (0, 1, 3)}, {"rows": range(9)}):
        state = without(beginning(build, density=0.6), **kinds)
        assert_as_separate(build, recipe_of(), state=state)


def test_a_mask_of_ones_is_no_mask():
    one, other = beginning(normed), beginning(normed, density=1)
    one, other = (sparse.train(task(normed, recipe_of()), state) for state in (one, other))
    other.masks = {}
    assert_same(one, other)


def test_a_mask_of_one_layer_leaves_the_others_dense():
    state = beginning(mlp, density=0.2)
    del state.masks["hidden2.weight"]
    assert_as_separate(mlp, recipe_of(), state=state)


@pytest.mark.parametrize(
    ("build", "name"), [(mlp, "hidden1.bias"), (GRAPHS["BatchNorm1d"], "body.2.bias")]
)
def test_masks_of_biases_and_normalizations_are_refused(build, name):
    state = beginning(build)
    state.masks[name] = torch.arange(len(state.params[name])) % 2 == 0
    state.params[name] = state.params[name] * state.masks[name]
    with pytest.raises(contract.Unsupported, match=f"masks of weights .* got one of `{name}`"):
        sparse.train(task(build, recipe_of()), state)


@pytest.mark.parametrize("stored", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1, 7), (1, 4, 4), (1, 5, 7), (3, 5, 8)])
def test_every_number_and_type_of_features_is_read(shape, stored):
    build = lambda: models.Mlp(hidden=(5,)).build(shape, CLASSES)  # noqa: E731
    assert_as_separate(build, recipe_of(), data=dataset(shape, stored=stored))


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
def test_images_of_floats_are_read(stored):
    assert_as_separate(CONVOLUTIONS["3x3"], recipe_of(), data=dataset(stored=stored))


def test_inputs_that_lie_scattered_in_memory_are_read():
    data = dataset()
    scattered = data.train.inputs.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not scattered.is_contiguous()
    data = replace(data, train=Part(scattered, data.train.labels))
    assert_as_separate(mlp, recipe_of(), data=data)


def test_flat_inputs_need_no_flattening_layer():
    build = lambda: nn.Sequential(nn.Linear(70, 4), nn.ReLU(), nn.Linear(4, CLASSES))  # noqa: E731
    data = dataset()
    parts = {
        name: replace(getattr(data, name), inputs=getattr(data, name).inputs.flatten(1))
        for name in ("train", "validation", "test")
    }
    flat = replace(data, **parts, mean=torch.zeros(1).double(), std=torch.ones(1).double())
    assert_as_separate(build, recipe_of(), data=flat)


@pytest.mark.parametrize("num", [1, 2, 31, 32, 33, 200, 1001])
@pytest.mark.parametrize("build", [mlp, normed])
def test_evaluations_are_right_whatever_the_number_of_examples(build, num):
    data = dataset(nums=(61, num, 45))
    (look,) = assert_as_separate(build, recipe_of(), data=data, last=0).evaluations
    accuracy = look.validation_accuracy * num
    assert accuracy == pytest.approx(round(accuracy), abs=1e-9)
    assert_as_separate(build, recipe_of(), data=data)


@pytest.mark.parametrize("augment", [CropFlip(padding=1), CropFlip(padding=2, flip=False)])
def test_batches_are_augmented_as_the_seed_says(augment):
    ends = [
        assert_as_separate(normed, recipe_of(augment=each, steps=70), seed=5)
        for each in (augment, None)
    ]
    one, other = (end.params["body.0.weight"] for end in ends)
    assert not torch.equal(one, other)


# -- float32 ---------------------------------------------------------------------------------------


def errors_in_float32(build, recipe, data, state):
    """Of this engine and of torch, relative to the update in float64."""
    reference = separate.train(
        task(build, recipe.model_copy(update={"dtype": "float64"}), data=data), state
    )
    finals = [engine.train(task(build, recipe, data=data), state) for engine in (sparse, separate)]
    assert all(tensor.dtype == torch.float32 for tensor in finals[0].params.values())
    return [distance(final.params, reference.params, state.params) for final in finals]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "optimizer"),
    [
        ("lenet", "momentum"), ("lenet", "adam"), ("conv-2", "momentum"), ("conv-4", "adam"),
        ("resnet-20", "momentum"), ("vgg", "adam"),
    ],
)  # fmt: skip
def test_in_float32_the_update_is_right_to_a_ten_thousandth(network, optimizer):
    """Or to three times torch's own error where that is the larger: then torch cannot do it."""
    build, rate = ZOO[network]
    method = {"momentum": Sgd(momentum=0.9, weight_decay=1e-3), "adam": Adam(weight_decay=1e-2)}
    recipe = recipe_of(
        optimizer=method[optimizer],
        learning_rate=rate if optimizer == "momentum" else rate / 20,
        dtype="float32",
        steps=15,
        schedule=Cosine(warmup=3),
        augment=CropFlip(padding=1),
    )
    for density in (None, 0.2):
        state = beginning(build, density=density)
        error, own = errors_in_float32(build, recipe, zoo_data(network), state)
        assert 0 < error <= max(1e-4, 3 * own)


@pytest.mark.parametrize("density", [None, 0.2])
def test_in_float32_adam_at_rate_a_tenth_is_right_to_a_ten_thousandth(density):
    """Or to three times torch's own error: weights then move by a tenth at every step."""
    shape = (1, 28, 28)
    build = lambda: models.Lenet_300_100().build(shape, CLASSES)  # noqa: E731
    recipe = recipe_of(optimizer=Adam(), learning_rate=0.1, batch_size=60, steps=5, dtype="float32")
    data = dataset(shape, nums=(301, 60, 60))
    error, own = errors_in_float32(build, recipe, data, beginning(build, density=density))
    assert 0 < error <= max(1e-4, 3 * own)


@pytest.mark.parametrize("offset", [3, 100, 1000])
def test_in_float32_numbers_far_from_zero_are_normalized_as_well_as_by_torch(offset):
    """A mean of up to 2,500 standard deviations, of which the running mean knows nothing yet."""
    build = GRAPHS["BatchNorm1d"]
    state = beginning(build)
    state.params["body.1.bias"] += offset
    error, own = errors_in_float32(build, recipe_of(dtype="float32"), dataset(), state)
    assert 0 < error <= max(1e-4, 3 * own)


# -- pruned weights and divergence -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["sgd-decay", "nesterov-decay", "adam-decay"])
def test_a_pruned_weight_is_exactly_zero_at_every_step_and_every_other_trains(optimizer, dtype):
    method, rate = OPTIMIZERS[optimizer]
    recipe = recipe_of(optimizer=method, learning_rate=rate, dtype=dtype, eval_every=1)
    start, seen = beginning(normed, density=0.3), []
    final = sparse.train(task(normed, recipe), start, lambda _, state: seen.append(state()))
    assert [state.step for state in seen] == list(range(STEPS))
    for state in [*seen, final]:
        assert_pruned(state)
    for name, mask in final.masks.items():
        is_moved = final.params[name] != start.params[name].to(final.params[name].dtype)
        assert is_moved[mask].double().mean() > 0.9
    kinds = {"sgd-decay": set(), "nesterov-decay": {"momentum_buffer"}}
    assert final.optimizer.keys() == kinds.get(optimizer, {"step", "exp_avg", "exp_avg_sq"})


@pytest.mark.parametrize("optimizer", ["nesterov-decay", "adam-decay"])
def test_a_pruned_weight_stays_zero_when_the_dense_optimizer_state_is_restored(optimizer):
    method, rate = OPTIMIZERS[optimizer]
    recipe = recipe_of(optimizer=method, learning_rate=rate)
    dense = sparse.train(task(normed, recipe, keep=[3]), beginning(normed)).snapshots[3]
    mask = beginning(normed, density=0.3).masks
    moments = {
        kind: masking.apply(mask, tensors) if kind != "step" else tensors
        for kind, tensors in dense.optimizer.items()
    }
    state = State(3, masking.apply(mask, dense.params), dense.buffers, mask, moments)
    with_past = assert_as_separate(normed, recipe, state=state)
    assert_pruned(with_past)
    state.optimizer = {}
    final = assert_as_separate(normed, recipe, state=state)
    assert not torch.equal(final.params["output.weight"], with_past.params["output.weight"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("build", [mlp, normed])
def test_divergence_is_a_result_at_the_same_evaluation(build, dtype):
    rate = 1e300 if dtype == "float64" else 1e30
    recipe = recipe_of(steps=40, learning_rate=rate, dtype=dtype)
    state = beginning(build, density=0.4)
    final, expected = (
        engine.train(task(build, recipe, keep=[2]), state) for engine in (sparse, separate)
    )
    assert (final.step, final.diverged) == (expected.step, True)
    assert 0 < final.step < recipe.steps
    assert not final.evaluations[-1].is_finite
    assert [look.is_finite for look in final.evaluations] == [
        look.is_finite for look in expected.evaluations
    ]
    assert not all(bool(tensor.isfinite().all()) for tensor in final.params.values())
    assert_pruned(final)
    assert list(final.snapshots) == list(expected.snapshots)
    pulses = []
    again = sparse.train(task(build, recipe), final, lambda step, _: pulses.append(step))
    assert (pulses, again.step, again.diverged) == ([], final.step, True)
    assert len(again.evaluations) == len(final.evaluations)


def test_a_state_that_is_not_finite_diverges_before_its_first_step():
    state = beginning(mlp)
    state.params["output.bias"][0] = math.nan
    final = sparse.train(task(mlp, recipe_of()), state)
    assert (final.step, final.diverged, len(final.evaluations)) == (0, True, 1)
    assert final.params["output.bias"].isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("case", ["max 2", "mean 2", "BatchNorm2d", "identity", "ReLU of a ReLU"])
def test_what_is_not_a_number_stays_so_on_its_way_to_the_loss(case):
    build = (POOLS | GRAPHS)[case]
    state = beginning(build)
    state.params[next(iter(state.params))][0] = math.nan
    assert sparse.train(task(build, recipe_of()), state).diverged


def loud():
    return nn.Sequential(nn.Flatten(), nn.Linear(70, 4), nn.Linear(4, CLASSES))


def test_a_gradient_that_overflows_does_not_reach_a_pruned_weight():
    data = dataset()
    data.mean.zero_()
    data.std[1] = 4e-39 * 1e3  # the second channel's pixels are up to 2.5e35
    state = beginning(loud)
    state.params["1.weight"][:, 35:] *= 1e-7  # the outputs are moderate, the gradients are not
    state.params["2.weight"] *= 1e7
    dense = state.copy()
    state.masks = {"1.weight": (torch.arange(70) < 35).repeat(4, 1)}
    state.params = masking.apply(state.masks, state.params)
    recipe = recipe_of(dtype="float32", optimizer=Sgd(), learning_rate=1e-9, steps=1)
    for engine in (separate, sparse):
        ends = [engine.train(task(loud, recipe, data=data), each) for each in (dense, state)]
        assert not ends[0].params["1.weight"].isfinite().all()
        assert_pruned(ends[1])
        assert not ends[1].diverged


# -- pauses, snapshots, pulses ---------------------------------------------------------------------


def every_step(monkeypatch):
    """A pulse before every step, as where a step costs a tenth of a second."""
    monkeypatch.setattr(training, "BURST_FLOPS", 1.0)


RESUMED = {
    "adam": (normed, Adam(weight_decay=1e-3), "float32", 20),
    "adam, odd batch": (normed, Adam(), "float64", 7),
    "momentum": (mlp, Sgd(momentum=0.9, nesterov=True, weight_decay=1e-3), "float32", 20),
    "momentum, odd batch": (mlp, Sgd(momentum=0.9), "float64", 23),
    "sgd": (mlp, Sgd(), "float32", 3),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_training_paused_at_any_pulse_ends_bit_for_bit_as_one_that_was_not(case, monkeypatch):
    build, optimizer, dtype, batch_size = RESUMED[case]
    recipe = recipe_of(
        optimizer=optimizer,
        learning_rate=0.01,
        schedule=Cosine(warmup=4),
        dtype=dtype,
        batch_size=batch_size,
        steps=90,
        eval_every=40,
        augment=CropFlip(padding=1),
    )
    start, seen = beginning(build, density=0.5), []

    def begin():
        return task(build, recipe, keep=[3, 30, 77])

    unbroken = sparse.train(begin(), start)
    with monkeypatch.context() as patch:
        every_step(patch)
        single = sparse.train(begin(), start, lambda _, state: seen.append(state()))
    assert [state.step for state in seen] == list(range(90))
    assert_same(single, unbroken)  # nor does it matter how many steps are run at once
    for step in (0, 1, 3, 29, 30, 31, 40, 63, 64, 65, 77, 89):
        assert_same(sparse.train(begin(), from_file(seen[step])), unbroken)


def test_a_pulse_may_stop_the_training():
    recipe = recipe_of(steps=200, eval_every=90, optimizer=Adam())
    unbroken = sparse.train(task(mlp, recipe), beginning(mlp))
    with pytest.raises(Paused) as pause:
        sparse.train(task(mlp, recipe), beginning(mlp), paused_at(90))
    (paused,) = pause.value.args
    assert paused.step == 90
    assert_same(sparse.train(task(mlp, recipe), from_file(paused)), unbroken)


@pytest.mark.parametrize("flops", [1.0, 1e5, 1e30])
def test_pulses_come_before_snapshots_and_evaluations_and_often_enough(flops, monkeypatch):
    monkeypatch.setattr(training, "BURST_FLOPS", flops)
    steps = []
    recipe = recipe_of(steps=200, eval_every=90)
    run = task(mlp, recipe, keep=[70, 7])
    sparse.train(run, beginning(mlp), lambda step, _: steps.append(step))
    assert steps[0] == 0
    assert {7, 70, 90, 180} <= set(steps)
    gaps = np.diff([*steps, 200])
    assert gaps.min() >= 1
    assert gaps.max() <= contract.AHEAD
    if flops == 1.0:
        assert gaps.max() == 1


def test_fewer_steps_are_run_at_once_where_a_step_costs_more():
    counts = []
    for density in (1, 0.1):
        steps = []
        state = beginning(normed, density=density)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "BURST_FLOPS", 2e6)
            recipe = recipe_of(steps=64, eval_every=100)
            sparse.train(task(normed, recipe), state, lambda step, _, s=steps: s.append(step))
        counts.append(len(steps))
    assert counts[0] > counts[1]


def test_snapshots_are_the_states_at_their_steps_and_do_not_follow_the_training(monkeypatch):
    every_step(monkeypatch)
    seen = {}
    recipe = recipe_of(steps=12, optimizer=Adam())
    final = sparse.train(
        task(normed, recipe, keep=[0, 3, 11, 12, 99]),
        beginning(normed),
        lambda step, state: seen.update({step: state()}),
    )
    assert list(final.snapshots) == [0, 3, 11]
    for step, snapshot in final.snapshots.items():
        assert (snapshot.evaluations, snapshot.snapshots) == ([], {})
        seen[step].evaluations, seen[step].snapshots = [], {}
        assert_same(snapshot, seen[step])


def test_the_given_state_is_not_changed_and_shares_nothing_with_the_result():
    recipe = recipe_of()
    dense = sparse.train(task(normed, recipe, keep=[2]), beginning(normed))
    for state in (beginning(normed, density=0.5), dense.snapshots[2], dense):
        before = copy.deepcopy(state)
        final = sparse.train(task(normed, recipe, last=17, keep=[4]), state)
        assert_same(state, before)
        tensors = [*final.params.values(), *final.buffers.values(), final.losses]
        tensors += [t for kind in final.optimizer.values() for t in kind.values()]
        for tensor in tensors:
            tensor.add_(1)
        for mask in final.masks.values():
            mask.logical_not_()
        assert_same(state, before)


@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize("optimizer", [Sgd(momentum=0.9), Adam()], ids=["momentum", "adam"])
def test_a_run_from_a_snapshot_with_its_optimizer_ends_bit_for_bit_as_the_unbroken_one(
    optimizer, k
):
    recipe = recipe_of(optimizer=optimizer, dtype="float32", schedule=Cosine())
    unbroken = sparse.train(task(normed, recipe, keep=[k]), beginning(normed))
    kept = from_file(unbroken).snapshots[k]
    again = sparse.train(task(normed, recipe), kept)
    first, *rest = again.evaluations
    assert (first.step, first.train_loss) == (k, None)
    later = {look.step: look for look in unbroken.evaluations}
    assert all(look.test_loss == later[look.step].test_loss for look in rest)
    again.evaluations, again.snapshots = unbroken.evaluations, unbroken.snapshots
    assert_same(again, unbroken)
    kept.optimizer = {}
    without = sparse.train(task(normed, recipe), kept)
    same = torch.equal(without.params["output.weight"], unbroken.params["output.weight"])
    assert same == (k == 0)  # from there on the optimizer's memory matters


@pytest.mark.parametrize("optimizer", [Sgd(momentum=0.9), Adam()], ids=["momentum", "adam"])
def test_a_checkpoint_of_the_separate_engine_means_the_same_to_this_one(optimizer):
    recipe = recipe_of(optimizer=optimizer, steps=12)
    start = beginning(normed, density=0.5)
    with pytest.raises(Paused) as pause:
        separate.train(task(normed, recipe), start, paused_at(7))
    final = sparse.train(task(normed, recipe), from_file(pause.value.args[0]))
    assert_close(final, separate.train(task(normed, recipe), start), start)


@pytest.mark.parametrize(
    ("first", "last", "every"),
    [
        (0, 10, 4), (0, 8, 4), (0, 3, 100), (0, 3, 1), (3, 10, 4),
        (4, 9, 4), (10, 13, 4), (5, 5, 4), (0, 0, 4), (64, 140, 50),
    ],
)  # fmt: skip
def test_the_same_steps_are_evaluated(first, last, every):
    """Beyond the recipe's last step, and none at all, included."""
    recipe = recipe_of(steps=10, eval_every=every, schedule=Cosine())
    state = beginning(mlp, step=first)
    final = assert_as_separate(mlp, recipe, state=state, last=last)
    steps = {first, last, *(t for t in range(first, last + 1) if t % every == 0)}
    assert [look.step for look in final.evaluations] == sorted(steps)
    assert (final.step, float(final.losses)) == (last, 0)


def test_counts_of_normalizations_go_on():
    state = beginning(normed)
    state.buffers["body.1.num_batches_tracked"] += 5
    final = assert_as_separate(normed, recipe_of(), state=state)
    assert int(final.buffers["body.1.num_batches_tracked"]) == 5 + STEPS


class Spare(nn.Module):
    """With buffers that no layer reads."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(70, CLASSES)
        self.register_buffer("spare", torch.tensor([1.0, 2.0]))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, inputs):
        return self.output(inputs.flatten(1))


def test_buffers_that_no_layer_reads_are_kept():
    final = assert_as_separate(Spare, recipe_of())
    assert final.buffers["spare"].tolist() == [1, 2]


def test_seeds_see_batches_of_their_own():
    state = beginning(mlp)
    ends = [assert_as_separate(mlp, recipe_of(), state=state, seed=seed) for seed in (0, 1)]
    assert not torch.equal(ends[0].params["output.weight"], ends[1].params["output.weight"])


def test_the_global_generators_are_untouched():
    run, state = task(normed, recipe_of(augment=CropFlip(padding=1))), beginning(normed)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sparse.train(run, state)
    assert torch.equal(torch.get_rng_state(), before)


# -- what is refused -------------------------------------------------------------------------------


def other_bias(state):
    state.params["output.bias"] = torch.zeros(1)


def returned(state):
    state.params["output.weight"] = torch.ones(CLASSES, 7)
    state.masks = {"output.weight": torch.zeros(CLASSES, 7, dtype=torch.bool)}


def remembered(state):
    state.masks = {"output.weight": torch.zeros(CLASSES, 7, dtype=torch.bool)}
    state.params["output.weight"] = torch.zeros(CLASSES, 7)
    state.optimizer = {"momentum_buffer": {"output.weight": torch.ones(CLASSES, 7)}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.params.pop("output.bias"), "parameter `output.bias` .* state's is none"),
        (lambda s: s.params.update(new=torch.zeros(2)), "`new` of shape none"),
        (other_bias, r"`output.bias` of shape \[3\] .* is \[1\]"),
        (lambda s: s.buffers.update(new=torch.zeros(())), "buffer `new`"),
        (returned, "must be 0 .* got others in `output.weight` of `params`"),
        (remembered, "must be 0 .* got others in `output.weight` of `momentum_buffer`"),
    ],
)
def test_a_state_is_refused_as_by_the_separate_engine(change, message):
    state, told = beginning(mlp), []
    change(state)
    for engine in (sparse, separate):
        with pytest.raises(SpecError, match=message) as refused:
            engine.train(task(mlp, recipe_of()), state)
        told.append(str(refused.value))
    assert told[0] == told[1]


def test_a_weight_that_two_layers_share_is_refused():
    data = dataset((2, 4, 4))
    with pytest.raises(contract.Unsupported, match=r"second.*is"):
        sparse.train(task(Tied, recipe_of(), data=data), beginning(Tied))


def test_data_on_another_device_is_refused():
    data = dataset()
    inputs = torch.empty(61, *SHAPE, dtype=torch.uint8, device="meta")
    data = replace(data, train=Part(inputs, data.train.labels))
    with pytest.raises(contract.Unsupported, match="sparse is for the CPU"):
        sparse.train(task(mlp, recipe_of(), data=data), beginning(mlp))
