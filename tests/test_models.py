"""The family `Model`: the zoo's shapes and counts, kinds of layers, and users' own networks."""

import hashlib
import importlib
import linecache
import operator
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from windfall import initialize, models, seeds, spec
from windfall.models import ModelField, UserModel, check_outputs, kinds, user, user_model

ZOO = [member for member in spec.members(models.Model).values() if member is not UserModel]
CIFAR, MNIST, SMALL = (3, 32, 32), (1, 28, 28), (1, 16, 16)
SMALLEST = {  # rows and columns of an image
    "conv-2": 2,
    "conv-4": 4,
    "conv-6": 8,
    "vgg-11": 16,
    "vgg-13": 16,
    "vgg-16": 16,
    "vgg-19": 16,
    "resnet-20": 4,
    "resnet-56": 4,
    "resnet-110": 4,
    "preresnet-110": 4,
    "preresnet-164": 4,
    "densenet-40": 4,
    "densenet-bc-100": 4,
}


def weights(module, input_shape):
    return {name: module.get_parameter(name) for name in kinds(module, input_shape)}


def on_meta(model, input_shape):
    """The network of ten classes without values."""
    with torch.device("meta"):
        return model.build(input_shape, 10)


def gradients(model, input_shape):
    """Of every parameter, on random inputs in training mode; None where none arrives."""
    with seeds.isolated(0, "test"):
        module, inputs = model.build(input_shape, 10), torch.randn(8, *input_shape)
    nn.functional.cross_entropy(module(inputs), torch.arange(8)).backward()
    return {name: param.grad for name, param in module.named_parameters()}


@pytest.mark.parametrize("member", ZOO, ids=spec.tag)
class TestEveryModelOfTheZoo:
    @pytest.mark.parametrize("input_shape", [MNIST, CIFAR, SMALL, (2, 17, 20)])
    def test_it_maps_inputs_to_one_logit_a_class(self, member, input_shape):
        module = member(width=0.25).build(input_shape, 7)
        check_outputs(module, input_shape, 7, spec.tag(member))
        assert module(torch.zeros(3, *input_shape)).shape == (3, 7)

    def test_it_takes_the_smallest_images_and_says_when_they_are_smaller(self, member):
        name, smallest = spec.tag(member), SMALLEST.get(spec.tag(member), 1)
        for input_shape in [(1, smallest, smallest + 1), (2, smallest + 1, smallest)]:
            module = member(width=0.1).build(input_shape, 7)
            check_outputs(module, input_shape, 7, name)
            assert module(torch.zeros(3, *input_shape)).shape == (3, 7)
        if name in SMALLEST:
            with pytest.raises(spec.SpecError, match=rf"^model {name} must be given images "):
                member(width=0.1).build((1, smallest - 1, smallest), 7)

    def test_its_weights_are_all_its_parameters_but_biases_and_normalization(self, member):
        module = on_meta(member(), SMALL)
        named = [name for name, param in module.named_parameters() if param.ndim > 1]
        assert list(weights(module, SMALL)) == named

    def test_its_names_are_readable_and_its_output_is_called_output(self, member):
        found = kinds(on_meta(member(), SMALL), SMALL)
        words = {"hidden": "hidden", "convolution": "conv", "output": "output"}
        for name, kind in found.items():
            layer = name.removesuffix(".weight").rpartition(".")[2]
            assert layer.startswith(words[kind])
        assert [name for name, kind in found.items() if kind == "output"] == ["output.weight"]

    def test_width_multiplies_every_hidden_size(self, member):
        narrow = weights(on_meta(member(width=0.5), SMALL), SMALL)
        wide = weights(on_meta(member(), SMALL), SMALL)
        for name in wide:
            half = 1 if name == "output.weight" else 2
            assert wide[name].shape[0] == half * narrow[name].shape[0]

    def test_no_width_leaves_a_layer_empty(self, member):
        for weight in weights(member(width=1e-6).build(SMALL, 10), SMALL).values():
            assert weight.numel() > 0

    def test_a_gradient_reaches_every_parameter(self, member):
        found = gradients(member(width=0.25), SMALL)
        assert [name for name, grad in found.items() if grad is None or not grad.any()] == []

    def test_it_can_be_traced_as_modules_and_sums(self, member):
        module = member(width=0.25).build(SMALL, 5).eval()
        traced = fx.symbolic_trace(module)
        sorts = {node.op for node in traced.graph.nodes}
        functions = {node.target for node in traced.graph.nodes if node.op == "call_function"}
        assert sorts <= {"placeholder", "call_module", "call_function", "output"}
        assert functions <= {operator.add, torch.cat}
        inputs = torch.ones(2, *SMALL)
        assert torch.equal(traced(inputs), module(inputs))

    def test_its_json_is_itself(self, member):
        model = member(width=0.25)
        assert spec.decode(models.Model, model.to_json()) == model
        assert spec.decode(models.Model, spec.tag(member)) == member()

    @pytest.mark.parametrize("width", [0, -1, float("inf"), float("nan")])
    def test_impossible_widths_are_refused(self, member, width):
        with pytest.raises(spec.SpecError, match="`width` must be"):
            spec.decode(models.Model, {"kind": spec.tag(member), "width": width})

    def test_it_can_be_built_anywhere(self, member):
        assert models.is_importable(member())


@pytest.mark.parametrize(
    ("model", "input_shape", "expected", "others"),
    [
        (models.Mlp(), MNIST, 784 * 100 + 100 * 50 + 50 * 10, 160),
        (models.Mlp(hidden=()), MNIST, 7_840, 10),
        (models.Lenet_300_100(), MNIST, 266_200, 410),
        (models.Conv_2(), CIFAR, 4_300_992, 2 * 64 + 522),
        (models.Conv_4(), CIFAR, 2_425_024, 2 * (64 + 128) + 522),
        (models.Conv_6(), CIFAR, 2_261_184, 2 * (64 + 128 + 256) + 522),
        (models.Vgg_11(), CIFAR, 9_217_728 + 5_120, 2 * 2_752 + 10),
        (models.Vgg_13(), CIFAR, 9_402_048 + 5_120, 2 * 2_944 + 10),
        (models.Vgg_16(), CIFAR, 14_710_464 + 5_120, 2 * 4_224 + 10),
        (models.Vgg_19(), CIFAR, 20_018_880 + 5_120, 2 * 5_504 + 10),
        (models.Resnet_20(), CIFAR, 267_696 + 2_560 + 640, 2 * (16 + 6 * 112 + 96) + 10),
        (models.Resnet_56(), CIFAR, 848_304 + 2_560 + 640, 2 * (16 + 18 * 112 + 96) + 10),
        (models.Resnet_110(), CIFAR, 1_719_216 + 2_560 + 640, 2 * (16 + 36 * 112 + 96) + 10),
        (models.Preresnet_110(), CIFAR, 1_719_216 + 2_560 + 640, 2 * 4_048 + 10),
        (models.Preresnet_164(), CIFAR, 1_676_464 + 2_560, 2 * 12_112 + 10),
        (models.Densenet_40(), CIFAR, 997_136 + 4_480, 2 * 9_048 + 10),
        (models.Densenet_BC_100(), CIFAR, 741_744 + 3_420, 2 * 11_994 + 10),
    ],
)
def test_the_number_of_weights_is_the_papers(model, input_shape, expected, others):
    """And that of the others, biases and two numbers for a normalized channel, is by hand."""
    module = on_meta(model, input_shape)
    total = sum(param.numel() for param in module.parameters())
    num_weights = sum(weight.numel() for weight in weights(module, input_shape).values())
    assert (num_weights, total - num_weights) == (expected, others)


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (models.Conv_2(), [64, 64]),
        (models.Conv_4(), [64, 64, 128, 128]),
        (models.Conv_6(), [64, 64, 128, 128, 256, 256]),
    ],
)
def test_convolutional_networks_are_built_as_the_paper_says(model, channels):
    parts = list(model.build(CIFAR, 10))
    block = [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    dense = [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert list(map(type, parts)) == block * (len(channels) // 2) + dense
    convs = [part for part in parts if isinstance(part, nn.Conv2d)]
    assert [part.out_channels for part in convs] == channels
    assert {(part.kernel_size, part.padding) for part in convs} == {((3, 3), (1, 1))}
    assert {part.kernel_size for part in parts if isinstance(part, nn.MaxPool2d)} == {2}
    assert [part.out_features for part in parts if isinstance(part, nn.Linear)] == [256, 256, 10]


def test_lenet_is_an_mlp_of_300_and_100():
    mlp = models.Mlp(hidden=(300, 100), width=0.3).build(MNIST, 10)
    lenet = models.Lenet_300_100(width=0.3).build(MNIST, 10)
    assert str(lenet) == str(mlp)


def test_widths_round_to_the_nearest_size():
    module = models.Mlp(hidden=(10, 7, 1), width=0.34).build((4,), 2)
    assert [weight.shape[0] for weight in weights(module, (4,)).values()] == [3, 2, 1, 2]


@pytest.mark.parametrize(
    ("model", "input_shape", "smallest"),
    [
        (models.Conv_2(), (3, 1, 8), 2),
        (models.Conv_4(), (3, 3, 3), 4),
        (models.Conv_6(), (3, 8, 7), 8),
        (models.Conv_6(), (28, 28), 8),
        (models.Conv_2(), (784,), 2),
        (models.Vgg_16(), (1, 8, 8), 16),
        (models.Vgg_19(), (3, 32, 15), 16),
        (models.Vgg_11(), (32, 32), 16),
        (models.Resnet_20(), (3, 3, 32), 4),
        (models.Resnet_56(), (28, 28), 4),
        (models.Resnet_110(), (784,), 4),
        (models.Preresnet_164(), (3, 3, 32), 4),
        (models.Densenet_40(), (784,), 4),
    ],
)
def test_inputs_that_do_not_survive_pooling_are_refused(model, input_shape, smallest):
    message = (
        f"model {spec.tag(type(model))} must be given images [channel, height, width] of at least "
        f"{smallest} x {smallest} pixels; got {input_shape}."
    )
    with pytest.raises(spec.SpecError, match=f"^{re.escape(message)}$"):
        model.build(input_shape, 10)


@pytest.mark.parametrize("hidden", [(0,), (3, -1), (2.5,)])
def test_impossible_hidden_sizes_are_refused(hidden):
    with pytest.raises(spec.SpecError, match="`hidden"):
        spec.checked(lambda: models.Mlp(hidden=hidden))


def test_a_module_of_the_package_imports_only_from_those_it_names_before():
    text = models.__doc__[models.__doc__.index("In the order of reading") :]
    order = re.findall(r"`(\w+)`", text)
    home = Path(models.__path__[0])
    assert sorted(order) == sorted(path.stem for path in home.glob("[a-z]*.py"))
    for place, name in enumerate(order):
        found = re.findall(r"windfall\.models\.(\w+)", (home / f"{name}.py").read_text("utf-8"))
        assert set(found) <= set(order[:place])


# -- kinds and outputs of any network ---------------------------------------------------------


class Deceiver(nn.Module):
    """Registers its output first, and a layer that never runs last."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3)
        self.norm = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(1, 2, 2)
        self.middle = nn.Linear(8, 6)
        self.unused = nn.Linear(5, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs):
        hidden = self.dropout(self.norm(self.conv(inputs)).flatten(1))
        return self.last(self.middle(hidden))


class Shared(nn.Module):
    """Two layers with one weight, the second of them the output."""

    def __init__(self):
        super().__init__()
        self.first, self.between, self.second = (nn.Linear(4, 4) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(self.between(self.first(inputs)))


def test_the_output_is_the_layer_that_runs_last_wherever_it_was_registered():
    assert kinds(Deceiver(), (1, 3, 3)) == {
        "last.weight": "output",
        "conv.weight": "convolution",
        "middle.weight": "hidden",
        "unused.weight": "hidden",
    }


def test_a_shared_weight_is_the_output_when_it_runs_last():
    assert kinds(Shared(), (4,)) == {"first.weight": "output", "between.weight": "hidden"}


@pytest.mark.parametrize(
    ("module", "input_shape", "expected"),
    [
        (nn.Sequential(nn.Conv1d(2, 3, 2), nn.Conv1d(3, 4, 2)), (2, 5), ["convolution", "output"]),
        (nn.Sequential(nn.Conv3d(1, 1, 2), nn.Flatten(), nn.Linear(1, 2)), (1, 2, 2, 2), None),
        (nn.Sequential(nn.ConvTranspose2d(1, 1, 2), nn.Conv2d(1, 1, 2)), (1, 2, 2), None),
        (nn.ReLU(), (3,), []),
    ],
)
def test_every_sort_of_convolution_is_one(module, input_shape, expected):
    expected = ["convolution", "output"] if expected is None else expected
    assert list(kinds(module, input_shape).values()) == expected


def test_looking_at_a_network_leaves_it_and_the_generators_as_they_were():
    module = Deceiver()
    module.dropout.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    generator = torch.get_rng_state()
    kinds(module, (1, 3, 3))
    check_outputs(module, (1, 3, 3), 3, "deceiver")
    with pytest.raises(spec.SpecError):
        kinds(module, (1, 9, 9))
    assert [part.training for part in module.modules()] == [True] * 6 + [False]
    assert not any(part._forward_hooks for part in module.modules())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_network_of_another_dtype_is_looked_at_in_its_own():
    check_outputs(Deceiver().double(), (1, 3, 3), 3, "deceiver")
    check_outputs(Deceiver().bfloat16(), (1, 3, 3), 3, "deceiver")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(4, 7), r"model must return 10 classes; got 7, from `mine`\."),
        (nn.Unflatten(1, (2, 2)), r"logits of shape \(2, 10\) .* got \(2, 2, 2\), from `mine`"),
        (nn.Flatten(0), r"logits of shape \(2, 10\) .* got \(8,\), from `mine`"),
        (nn.LSTM(4, 10), r"logits of shape \(2, 10\) .* got tuple, from `mine`"),
        (nn.Linear(5, 10), r"must accept inputs of shape \(2, 4\); .* of `mine` raised"),
    ],
)
def test_networks_with_other_outputs_are_refused(module, message):
    with pytest.raises(spec.SpecError, match=message):
        check_outputs(module, (4,), 10, "mine")


# -- a user's own network ---------------------------------------------------------------------

SOURCE = """\
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

def raises():
    raise RuntimeError("no luck")

def needs(size):
    return nn.Linear(size, 2)

def number():
    return 7

def lazy():
    return nn.LazyLinear(3)

class Net(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)

    class Inner(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)

one_lambda, other_lambda = lambda: nn.Linear(4, 2), lambda: nn.Linear(4, 2)

def closure(activation):
    def make():
        return nn.Sequential(nn.Linear(4, 2), activation)
    return make

network = make()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of a user's, importable, its file at `mine.__file__`."""
    (tmp_path / "my_networks.py").write_text(SOURCE)
    (tmp_path / "broken_networks.py").write_text("import nothing_of_this_name")
    (tmp_path / "leaving_networks.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(user, "_kept", {})
    importlib.invalidate_caches()
    yield importlib.import_module("my_networks")
    for name in ("my_networks", "broken_networks", "leaving_networks"):
        sys.modules.pop(name, None)


class Cells(types.ModuleType):
    """A notebook: a module without a file, whose cells' texts Python remembers."""

    def run(self, text):
        name = f"<cell {hashlib.sha256(text.encode()).hexdigest()[:8]}>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        exec(compile(text, name, "exec"), vars(self))


@pytest.fixture
def notebook(monkeypatch):
    cells = Cells("cells")
    monkeypatch.setitem(sys.modules, "cells", cells)
    monkeypatch.setattr(user, "_kept", {})
    cells.run("import torch\nfrom torch import nn\n")
    return cells


class TestUserModel:
    def test_it_holds_its_name_its_modules_source_and_its_parameters(self, mine):
        model = user_model(mine.make)
        assert model.callable == "my_networks:make"
        assert model.source == hashlib.sha256(SOURCE.encode()).hexdigest()
        assert model.parameters == {
            "0.weight": (3, 4),
            "0.bias": (3,),
            "2.weight": (2, 3),
            "2.bias": (2,),
        }
        assert models.is_importable(model)

    @pytest.mark.parametrize("value", ["my_networks:make", {"callable": "my_networks:make"}])
    def test_a_name_and_the_callable_mean_the_same(self, mine, value):
        value = value if isinstance(value, str) else value | {"kind": "user-model"}
        assert spec.decode(ModelField, value) == spec.decode(ModelField, mine.make)
        assert spec.decode(ModelField, value).address == user_model(mine.make).address

    def test_its_json_is_itself_and_it_can_be_a_key(self, mine):
        model = user_model(mine.make)
        assert UserModel.from_json(model.to_json()) == model
        assert {model: 1}[spec.decode(models.Model, model.to_json())] == 1

    def test_a_class_and_a_nested_class_are_callables(self, mine):
        assert isinstance(user_model(mine.Net).build((4,), 2), mine.Net)
        inner = user_model(mine.Net.Inner)
        assert inner.callable == "my_networks:Net.Inner"
        assert models.is_importable(inner)
        assert isinstance(models.resolve(inner.callable)(), mine.Net.Inner)

    def test_it_builds_the_network(self, mine):
        module = user_model(mine.make).build((4,), 2)
        check_outputs(module, (4,), 2, "my_networks:make")
        assert kinds(module, (4,)) == {"0.weight": "hidden", "2.weight": "output"}

    def test_it_begins_as_the_callable_does_under_its_seed(self, mine):
        model = user_model(mine.make)
        found, _ = initialize.initial_parameters(
            lambda: model.build((4,), 2), initialize.TorchDefault(), 3
        )
        expected, _ = initialize.initial_parameters(mine.make, initialize.TorchDefault(), 3)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_making_it_moves_no_generator(self, mine):
        before = torch.get_rng_state()
        user_model(mine.make)
        assert torch.equal(torch.get_rng_state(), before)

    def test_reading_a_stored_one_imports_nothing(self, mine):
        document = user_model(mine.make).to_json() | {"callable": "not_installed:make"}
        model = UserModel.from_json(document)
        assert model.callable == "not_installed:make"
        with pytest.raises(spec.SpecError, match="`source` must be given"):
            spec.checked(lambda: UserModel.from_json({"callable": "my_networks:make"}))

    def test_a_changed_source_is_refused_and_is_another_model(self, mine, tmp_path):
        before = user_model(mine.make)
        (tmp_path / "my_networks.py").write_text(SOURCE + "# changed\n")
        with pytest.raises(
            spec.SpecError, match="the source of `my_networks:make` has changed since"
        ):
            before.build((4,), 2)
        assert user_model(mine.make).address != before.address

    def test_parameters_that_depend_on_more_than_the_source_are_refused(self, mine):
        model = user_model(mine.make)
        other = model.model_copy(update={"parameters": {"0.weight": (3, 4)}})
        with pytest.raises(spec.SpecError, match="the list of parameters of `my_networks:make`"):
            other.build((4,), 2)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("my_networks:raises", r"`my_networks:raises` raised RuntimeError\('no luck'\)"),
            ("my_networks:needs", "made without arguments; calling `my_networks:needs`"),
            ("my_networks:number", "return an nn.Module; `my_networks:number` returned int"),
            ("my_networks:lazy", "`weight` of `my_networks:lazy` is lazy"),
            ("my_networks:absent", "name a callable; `absent` of `my_networks` is None"),
            ("my_networks:Net.absent", "name a callable; `Net.absent` of `my_networks` is None"),
            ("my_networks:__name__", "name a callable; `__name__` of `my_networks` is 'my_"),
            ("broken_networks:make", "importing `broken_networks` raised ModuleNotFoundError"),
            ("leaving_networks:make", "importing `leaving_networks` raised SystemExit"),
            ("not_installed:make", "not_installed.* Install it, or add its folder to PYTHONPATH"),
            ("__main__:make", "`__main__:make` cannot be imported by name"),
            ("my_networks:<lambda>", "`my_networks:<lambda>` cannot be imported by name"),
            (":make", "name a module that can be imported"),
        ],
    )
    def test_names_of_no_network_are_refused(self, mine, name, message):
        with pytest.raises(spec.SpecError, match=message) as caught:
            spec.decode(ModelField, name)
        assert str(caught.value).startswith("Must ")

    def test_a_call_that_is_not_a_network_names_itself(self, mine):
        with pytest.raises(spec.SpecError, match=r"^`model` must return .* `my_networks:number`"):
            user_model(mine.number)

    @pytest.mark.parametrize("value", [nn.Linear(4, 2), print], ids=["network", "builtin"])
    def test_an_instance_is_refused_with_the_remedy(self, value):
        with pytest.raises(
            spec.SpecError, match=r"an instance of .* Give its class, or a function"
        ):
            spec.decode(ModelField, value)

    def test_an_unknown_name_lists_the_known(self):
        with pytest.raises(spec.SpecError, match=r"Did you mean `conv-4`\? Known: mlp, lenet"):
            spec.decode(ModelField, "conv4")

    def test_members_and_names_pass_through_the_field(self):
        assert spec.decode(ModelField, "conv-4") == models.Conv_4()
        assert spec.decode(ModelField, models.Conv_4(width=2)) == models.Conv_4(width=2)

    def test_an_error_in_a_field_names_the_field_once(self, mine):
        class Holder(spec.Spec):
            model: ModelField

        for value in (mine.number, "my_networks:number"):
            with pytest.raises(spec.SpecError, match=r"^`model` must return an nn.Module; "):
                spec.checked(lambda value=value: Holder(model=value))


class TestCallablesThatCannotBeImported:
    def test_lambdas_and_nested_functions_are_built_in_this_process_alone(self, mine):
        for function in (mine.one_lambda, mine.closure(nn.ReLU())):
            model = user_model(function)
            assert not models.is_importable(model)
            assert isinstance(model.build((4,), 2), nn.Module)
            user._kept.clear()
            assert not models.is_importable(model)
            with pytest.raises(spec.SpecError, match=r"cannot be imported by name. Define it at"):
                model.build((4,), 2)

    def test_two_lambdas_of_one_line_are_two_models(self, mine):
        one, other = user_model(mine.one_lambda), user_model(mine.other_lambda)
        assert one.callable == other.callable
        assert one.address != other.address

    def test_what_a_function_encloses_tells_it_apart(self, mine):
        one, again = (user_model(mine.closure(nn.ReLU())) for _ in range(2))
        other = user_model(mine.closure(nn.Tanh()))
        assert one == again
        assert one.address != other.address
        assert isinstance(one.build((4,), 2)[1], nn.ReLU)
        assert isinstance(other.build((4,), 2)[1], nn.Tanh)

    def test_a_function_that_another_name_hides_is_kept(self, mine, monkeypatch):
        original = mine.make
        monkeypatch.setattr(mine, "make", lambda: nn.Linear(1, 1))
        model = user_model(original)
        assert not models.is_importable(model)
        assert len(model.build((4,), 2)) == 3

    def test_a_notebooks_function_is_known_by_its_text(self, notebook):
        cell = "def make():\n    return nn.Linear(4, 2)\n"
        notebook.run(cell)
        first = user_model(notebook.make)
        notebook.run(cell)
        again = user_model(notebook.make)
        notebook.run(cell.replace("2)", "2, bias=True)"))
        changed = user_model(notebook.make)
        assert first == again
        assert first.parameters == changed.parameters
        assert first.address != changed.address
        assert not models.is_importable(first)
        for model in (first, changed):
            assert model.build((4,), 2).weight.shape == (2, 4)

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("SLOPE = 0.1", "SLOPE = 0.2"),
            ("return self.linear(inputs)", "return self.linear(inputs).tanh()"),
            ("return Net()", "return Net().train()"),
            ("return nn.Linear(4, 2)", "return nn.Linear(4, 2).requires_grad_()"),
        ],
    )
    def test_whatever_changes_in_a_notebook_makes_another_model(self, notebook, before, after):
        text = """\
SLOPE = 0.1
def part():
    return nn.Linear(4, 2)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.slope = part(), SLOPE
    def forward(self, inputs):
        return self.linear(inputs)
def make():
    return Net()
"""
        assert text.count(before) == 1
        notebook.run(text)
        first = user_model(notebook.make)
        notebook.run(text.replace(before, after))
        assert user_model(notebook.make).address != first.address

    def test_text_that_cannot_be_read_is_refused_with_the_remedy(self, notebook):
        exec("def make():\n    return nn.Linear(4, 2)\n", vars(notebook))
        with pytest.raises(spec.SpecError, match=r"`cells:make` has none. Define it in a module"):
            user_model(notebook.make)


SCRIPT = """\
import my_networks
from torch import nn
from windfall import models, spec

def make():
    return nn.Linear(4, 2)

imported = spec.decode(models.ModelField, "my_networks:make")
own = models.user_model(make)
print(imported.address, models.is_importable(imported))
print(own.callable, models.is_importable(own), own.build((4,), 2))
"""


@pytest.mark.slow
def test_a_fresh_process_finds_the_same_model_and_keeps_its_own(mine, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"{user_model(mine.make).address} True",
        "__main__:make False Linear(in_features=4, out_features=2, bias=True)",
    ]
