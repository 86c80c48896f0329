import sys

import numpy as np
import pytest
import torch
from test_files import idx_bytes, write_cifar, write_mnist
from torch.utils.data import TensorDataset

from windfall import data, samples, seeds, spec
from windfall.spec import SpecError


def toy(num=40, classes=4, dtype=torch.float32):
    """Inputs [num, 3], all different, and labels."""
    return torch.arange(num * 3, dtype=dtype).reshape(num, 3), torch.arange(num) % classes


@pytest.fixture
def member(request, tmp_path, monkeypatch):
    """A small data set of every kind."""
    root = {"root": str(tmp_path), "verify": False, "num_validation": 4}
    monkeypatch.setitem(sys.modules, "my_data", type(sys)("my_data"))
    sys.modules["my_data"].load = toy
    if request.param == "mnist":
        write_mnist(tmp_path)
    if request.param == "fashion-mnist":
        write_mnist(tmp_path, "fashion-mnist")
    if request.param == "cifar10":
        write_cifar(tmp_path)
    if request.param == "cifar100":
        write_cifar(tmp_path, data.files.CIFAR100, labels=2, num=10)
    return {
        "digits": lambda: data.Digits(),
        "mnist": lambda: data.Mnist(**root),
        "fashion-mnist": lambda: data.FashionMnist(**root),
        "cifar10": lambda: data.Cifar10(**root),
        "cifar100": lambda: data.Cifar100(**root),
        "gaussian": lambda: data.Gaussian(num_train=50, num_validation=10, num_test=10),
        "tensors": lambda: data.tensors(*toy()),
        "user-data": lambda: data.UserData(callable="my_data:load"),
    }[request.param]()


every_member = pytest.mark.parametrize("member", list(spec.members(data.Data)), indirect=True)


# -- what holds for every member -------------------------------------------------------------------


@every_member
def test_the_parts_are_disjoint_and_together_the_decoded_samples(member):
    whole, loaded = member.decoded(), data.load(member)
    split_off = [] if whole.test else [loaded.test]
    parts = [loaded.train, loaded.validation, *split_off]

    def rows(parts):
        return sorted(
            (part.inputs[i].numpy().tobytes(), int(part.labels[i]))
            for part in parts
            for i in range(len(part))
        )

    assert rows(parts) == rows([whole.train])
    assert whole.test is None or torch.equal(loaded.test.inputs, whole.test.inputs)


@every_member
def test_inputs_and_labels_are_of_the_promised_kind(member):
    loaded = data.load(member)
    for part in (loaded.train, loaded.validation, loaded.test):
        assert len(part) == len(part.inputs) > 0
        assert part.inputs.dtype == torch.uint8 or part.inputs.is_floating_point()
        assert tuple(part.inputs.shape[1:]) == loaded.input_shape
        assert part.labels.dtype == torch.int64
        assert 0 <= part.labels.min() <= part.labels.max() < loaded.num_classes


@every_member
def test_prepared_training_inputs_have_mean_0_and_deviation_1_per_channel(member):
    loaded = data.load(member.model_copy(update={"normalize": True}))
    prepared = loaded.prepare(loaded.train.inputs, torch.float64)
    axes = [axis for axis in range(prepared.dim()) if axis != 1]
    mean, std = prepared.mean(axes), prepared.std(axes, correction=0)
    assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-10)
    assert torch.allclose(std, torch.ones_like(std), atol=1e-10)


@every_member
def test_without_normalization_inputs_are_only_scaled(member):
    loaded = data.load(member.model_copy(update={"normalize": False}))
    stored = loaded.train.inputs
    prepared = loaded.prepare(stored, torch.float64)
    assert torch.allclose(prepared, stored.double() / loaded.peak, rtol=1e-15, atol=0)
    assert stored.is_floating_point() or prepared.max() <= 1


@every_member
def test_the_sha256_depends_on_the_content_and_not_on_the_split(member):
    sha256 = data.load(member).sha256
    assert len(sha256) == 64
    if member.normalize:
        update = {"normalize": False, "num_validation": 2}
        if not isinstance(member, data.Gaussian):
            update["split_seed"] = 1
        assert data.load(member.model_copy(update=update)).sha256 == sha256


@every_member
def test_loading_is_deterministic_and_the_split_follows_its_seed(member):
    one, same = data.load(member), data.load(member)
    other = data.load(member.model_copy(update={"split_seed": 1}))
    assert torch.equal(one.train.inputs, same.train.inputs)
    assert torch.equal(one.validation.labels, same.validation.labels)
    assert not torch.equal(one.validation.inputs, other.validation.inputs)


@every_member
def test_a_member_survives_json_and_its_address_leaves_out_where_files_lie(member):
    assert spec.decode(data.Data, member.to_json(addressed=False)) == member
    unaddressed = {"root": "elsewhere", "verify": True, "note": "mine"}
    assert not unaddressed.keys() & member.to_json().keys()
    update = {
        key: unaddressed[key] for key in unaddressed.keys() & type(member).model_fields.keys()
    }
    assert member.model_copy(update=update).address == member.address


@every_member
def test_to_moves_everything(member):
    loaded = data.load(member)
    moved = loaded.to("meta")
    tensors = [moved.mean, moved.std]
    for part in (moved.train, moved.validation, moved.test):
        tensors += [part.inputs, part.labels]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.prepare(moved.train.inputs, torch.float32).device.type == "meta"
    assert moved.sha256 == loaded.sha256


# -- known answers ---------------------------------------------------------------------------------


def test_the_digits_are_scikit_learns():
    loaded = data.load(data.Digits())
    assert [len(part) for part in (loaded.train, loaded.validation, loaded.test)] == [
        1197,
        300,
        300,
    ]
    assert loaded.input_shape == (1, 8, 8)
    assert (loaded.peak, loaded.num_classes, loaded.note) == (16, 10, None)
    assert int(loaded.train.inputs.max()) == 16
    assert loaded.sha256 == "67376e9eb34d92a43611366bccd67c95801b7720eba3d7be9db1bf9ce6123d97"


def test_the_default_sizes_of_official_data_sets():
    assert [spec.decode(data.Data, name).num_validation for name in data.files.SOURCES] == [
        5000
    ] * 4


def test_normalization_by_hand():
    images = torch.tensor([[[[0, 255]]], [[[255, 255]]], [[[7, 7]]]], dtype=torch.uint8)
    mean, std = samples.moments(images[:2], 255)
    assert mean.tolist() == [0.75]
    assert std.tolist() == pytest.approx([np.sqrt(0.1875)])
    part = samples.Part(images[:2], torch.tensor([0, 1]))
    loaded = data.Dataset(part, part, part, mean, std, 255, 2, "", None)
    expected = (51 / 255 - 0.75) / np.sqrt(0.1875)
    got = loaded.prepare(torch.full((1, 1, 1, 2), 51, dtype=torch.uint8), torch.float64)
    assert got.tolist() == [[[[pytest.approx(expected)] * 2]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3000, 5), (1500, 3, 2, 4)])
def test_statistics_equal_torchs(dtype, shape):
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).add(2).to(dtype)
    axes = [axis for axis in range(inputs.dim()) if axis != 1]
    mean, std = samples.moments(inputs, 1)
    assert torch.allclose(mean, inputs.double().mean(axes), rtol=1e-12)
    assert torch.allclose(std, inputs.double().std(axes, correction=0), rtol=1e-12)


def test_statistics_of_bytes_equal_torchs():
    inputs = torch.randint(0, 256, (2500, 3, 4, 5), dtype=torch.uint8)
    mean, std = samples.moments(inputs, 255)
    assert torch.allclose(mean, inputs.double().div(255).mean((0, 2, 3)), rtol=1e-12)
    assert torch.allclose(std, inputs.double().div(255).std((0, 2, 3), correction=0), rtol=1e-12)


@pytest.mark.parametrize("value", [0.1, 0.0, 3e7])
def test_a_constant_channel_is_centered_and_not_blown_up(value):
    inputs, labels = toy()
    inputs[:, 1] = value
    loaded = data.load(data.tensors(inputs, labels))
    assert loaded.std[1] == 1
    assert loaded.prepare(inputs, torch.float64)[:, 1].abs().max() < 1e-6


def test_statistics_come_from_the_training_part_only():
    inputs, labels = toy()
    test = (inputs + 1000, labels)
    loaded = data.load(data.tensors(inputs, labels, test, num_validation=10))
    assert torch.allclose(loaded.mean, loaded.train.inputs.double().mean(0))
    assert not torch.allclose(loaded.mean, inputs.double().mean(0))


def test_prepare_takes_any_leading_axes():
    loaded = data.load(data.tensors(torch.rand(30, 3, 4, 4), torch.arange(30) % 2))
    batch = loaded.train.inputs[:12]
    stacked = loaded.prepare(batch.reshape(2, 6, 3, 4, 4), torch.float32)
    assert torch.equal(stacked.reshape(12, 3, 4, 4), loaded.prepare(batch, torch.float32))
    assert stacked.dtype == torch.float32


# -- the seed of the run ---------------------------------------------------------------------------


def test_nothing_that_is_loaded_depends_on_global_generators():
    torch.manual_seed(0)
    one = data.load(data.Gaussian(num_train=20))
    torch.manual_seed(1)
    assert torch.equal(one.train.inputs, data.load(data.Gaussian(num_train=20)).train.inputs)


def test_gaussian_samples_are_what_they_say():
    loaded = data.load(data.Gaussian(dimension=4, num_train=40_000, std=2.5, num_classes=3))
    inputs = loaded.train.inputs
    assert inputs.dtype == torch.float32
    covariance = torch.cov(inputs.double().T)
    assert torch.allclose(covariance, 6.25 * torch.eye(4, dtype=torch.float64), atol=0.2)
    assert torch.equal(loaded.prepare(inputs, torch.float32), inputs)
    teacher = torch.from_numpy(seeds.stream(0, "gaussian-teacher").standard_normal((3, 4)))
    for part in (loaded.train, loaded.validation, loaded.test):
        assert torch.equal(part.labels, (part.inputs.double() @ teacher.T).argmax(1))
    assert loaded.train.labels.unique().tolist() == [0, 1, 2]


# -- files -----------------------------------------------------------------------------------------


def test_unverified_files_are_labelled(tmp_path):
    write_mnist(tmp_path)
    mnist = data.Mnist(root=str(tmp_path), verify=False, num_validation=4)
    assert data.load(mnist).note == "mnist: files not verified"
    note = "MNIST, first twenty"
    assert data.load(mnist.model_copy(update={"note": note})).note == note


def test_the_sha256_does_not_depend_on_the_root(tmp_path):
    for name in ("one", "two"):
        write_mnist(tmp_path / name)
    one, two = (
        data.load(data.Mnist(root=str(tmp_path / name), verify=False, num_validation=4))
        for name in ("one", "two")
    )
    assert one.sha256 == two.sha256
    path = tmp_path / "two" / "mnist" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(idx_bytes(np.full(20, 3, np.uint8)))
    changed = data.load(data.Mnist(root=str(tmp_path / "two"), verify=False, num_validation=4))
    assert changed.sha256 != one.sha256


def test_the_environment_names_the_root(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv("WINDFALL_DATA", str(tmp_path))
    assert len(data.load(data.Mnist(verify=False, num_validation=4)).train) == 16


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(20, 10, np.uint8), r"mnist: Labels must lie in 0 \.\.\. 9 .*; got 1?0 \.\.\. 10"),
        (np.zeros(19, np.uint8), "mnist: Training inputs and labels .* got 20 and 19"),
    ],
)
def test_labels_of_files_are_checked(tmp_path, labels, message):
    write_mnist(tmp_path)
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").write_bytes(idx_bytes(labels))
    with pytest.raises(SpecError, match=message):
        data.load(data.Mnist(root=str(tmp_path), verify=False, num_validation=4))


# -- your own --------------------------------------------------------------------------------------


class Squares:
    """A map-style data set."""

    def __init__(self, num, item=None):
        self.num, self.item = num, item

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return self.item or (torch.tensor([float(index), 1.0]), index % 3)


def test_two_spellings_of_the_same_data_have_one_sha256(monkeypatch):
    inputs, labels = toy()
    spellings = [
        (inputs, labels),
        (inputs.numpy(), labels.int().numpy()),
        TensorDataset(inputs, labels),
        list(zip(inputs.numpy(), labels.tolist(), strict=True)),
    ]
    module = type(sys)("spellings")
    monkeypatch.setitem(sys.modules, "spellings", module)
    found = {data.tensors(inputs, labels).sha256}
    for spelling in spellings:
        module.load = lambda spelling=spelling: spelling
        found.add(data.load(data.UserData(callable="spellings:load")).sha256)
    assert len(found) == 1
    found.clear()
    for spelling in spellings:
        module.load = lambda spelling=spelling: (spelling, Squares(6, (inputs[0], 2)))
        loaded = data.load(data.UserData(callable="spellings:load"))
        assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (36, 4, 6)
        found.add(loaded.sha256)
    assert len(found) == 1


def test_tensors_default_to_tenths_and_the_largest_label():
    loaded = data.load(data.tensors(*toy()))
    assert [len(part) for part in (loaded.train, loaded.validation, loaded.test)] == [32, 4, 4]
    assert loaded.num_classes == 4
    assert data.load(data.tensors(*toy(), num_classes=7)).num_classes == 7
    test = (torch.zeros(2, 3), torch.tensor([5, 0]))
    loaded = data.load(data.tensors(*toy(), test, note="mine"))
    assert [len(part) for part in (loaded.train, loaded.validation, loaded.test)] == [36, 4, 2]
    assert (loaded.num_classes, loaded.note) == (6, "mine")


def test_tensors_changed_in_place_are_refused():
    inputs, labels = toy()
    mine = data.tensors(inputs, labels, name="mine")
    inputs[3, 0] += 1
    with pytest.raises(SpecError, match="`data` 'mine' must not be changed in place"):
        data.load(mine)


def test_tensors_of_another_process_are_refused_with_the_remedy():
    with pytest.raises(SpecError, match=r"must be in this process's memory.*kind `user-data`"):
        data.load(data.Tensors(sha256="0" * 64, num_classes=2))


def test_tensors_of_too_few_classes_are_refused_when_loaded():
    mine = data.tensors(*toy())
    with pytest.raises(SpecError, match=r"Labels must lie in 0 \.\.\. 1 .*; got 0 \.\.\. 3"):
        data.load(mine.model_copy(update={"num_classes": 2}))


good, labels = toy()


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((good, labels), {}, None),
        ((good, labels, (good, labels)), {}, None),
        ((good[::2].numpy()[::-1], labels[::2]), {}, None),
        ((good.double(), labels.to(torch.uint8)), {}, None),
        ((good, labels[:-1]), {}, "Training inputs and labels must be equally many; got 40 and 39"),
        ((good, labels, (good, labels[1:])), {}, "Test inputs and labels must be equally many"),
        ((good.long(), labels), {}, "inputs must be uint8 or floating; got torch.int64.*float"),
        ((good, labels.float()), {}, "labels must be integers; got torch.float32.*long"),
        ((good, labels > 1), {}, "labels must be integers; got torch.bool"),
        ((good, labels - 1), {}, r"Labels must lie in 0 \.\.\. 2 .*; got -1 \.\.\. 2"),
        ((good, labels), {"num_classes": 3}, r"must lie in 0 \.\.\. 2 .*; got 0 \.\.\. 3"),
        ((good, labels), {"num_classes": 0}, "`num_classes` must be at least 1; got 0"),
        ((good[:0], labels[:0]), {}, r"inputs must not be empty; got shape \(0, 3\)"),
        ((good[:, :0], labels), {}, r"inputs must not be empty; got shape \(40, 0\)"),
        ((good[:, 0], labels), {}, r"must be \[sample, ...\] and labels \[sample\]; got .*\(40,\)"),
        ((good, labels[:, None]), {}, r"labels \[sample\]; got .*\(40, 1\)"),
        (
            (good, labels, (good[:, :2], labels)),
            {},
            r"Test inputs must be like .*got float32 \(2,\)",
        ),
        ((good, labels, (good.double(), labels)), {}, "Test inputs must be like .*got float64"),
        ((good / 0, labels), {}, "inputs must be finite; got NaN or infinity in sample 0"),
        (("pixels", labels), {}, "Training inputs must be a tensor or an array of numbers"),
        ((np.array(["a", "b"]), labels), {}, "must be a tensor or an array of numbers"),
        ((good, labels), {"num_validation": 36}, "`data.num_validation` must leave .* 40 .*got 36"),
        ((good, labels), {"num_validation": 0}, "`num_validation` must be greater .*; got 0"),
        ((good, labels), {"num_test": 39}, "`data.num_test` 39"),
        ((good[:2], labels[:2]), {}, "must leave training samples of the 2 there are"),
        ((good, labels, (good, labels)), {"num_test": 4}, "`data.num_test` must be left out"),
        ((good, labels), {"split_sed": 1}, "Has no field `split_sed`. Did you mean `split_seed`"),
    ],
)
def test_what_cannot_be_data_is_refused(arguments, settings, message):
    if message is None:
        data.load(data.tensors(*arguments, **settings))
        return
    with pytest.raises(SpecError, match=message):
        data.load(data.tensors(*arguments, **settings))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Squares(0), "A Dataset must not be empty; got Squares of length 0"),
        (Squares(3, (1.0,)), "must be a pair .*; got tuple at 0"),
        (Squares(3, ("image", 1)), "Input 0 must be a tensor or an array of numbers; got"),
        (Squares(3, (torch.zeros(2), torch.zeros(2).long())), "labels single numbers"),
        ([(torch.zeros(2), 0), (torch.zeros(3), 0)], r"must be of one shape .* \[\(2,\), \(3,\)\]"),
        (iter([1]), "map-style Dataset of .*; got list_iterator"),
        (good, "Data must be inputs and labels.*; got Tensor"),
        ((good, labels, good), "must be a pair"),
        (None, "Data must be inputs and labels.*; got NoneType"),
        ((good, None), "Data must be inputs and labels"),
    ],
)
def test_what_a_function_must_return(monkeypatch, value, message):
    module = type(sys)("returns")
    module.load = lambda: value
    monkeypatch.setitem(sys.modules, "returns", module)
    with pytest.raises(SpecError, match=message):
        data.load(data.UserData(callable="returns:load"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:load", "module that can be imported; .*No module named 'no_such_module'"),
        ("fragile:load", "fragile:load, whose import raised SyntaxError"),
        ("mine:lod", "must name a function of mine; got `lod`. Did you mean `load`"),
        ("mine:constant", "must name a function of mine; got `constant`"),
        ("mine:fails", "mine:fails raised ZeroDivisionError: division by zero"),
    ],
)
def test_functions_that_cannot_be_called_are_named(tmp_path, monkeypatch, path, message):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fragile.py").write_text("def")
    (tmp_path / "mine.py").write_text(
        "constant = 1\ndef load(): return []\ndef fails(): return 1 / 0\n"
    )
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(SpecError, match=message):
        data.load(data.UserData(callable=path))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("cifar", "Must be one of the known names; got 'cifar'"),
        ({"kind": "digits", "num_test": 0}, "`num_test` must be greater than or equal to 1"),
        ({"kind": "digits", "root": "x"}, "Has no field `root`"),
        ({"kind": "gaussian", "std": 0}, "`std` must be greater than 0"),
        ({"kind": "mnist", "split_seed": -1}, "`split_seed` must be greater than or equal to 0"),
        ({"kind": "user-data"}, "`callable` must be given"),
        (
            {"kind": "user-data", "callable": "package.module"},
            "`callable` must be `package.module:function`; got 'package.module'",
        ),
        ({"kind": "tensors", "sha256": "x", "num_classes": 2}, "`sha256`"),
    ],
)
def test_settings_that_cannot_be_are_refused(document, message):
    with pytest.raises(SpecError, match=message):
        spec.decode(data.Data, document)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"num_validation": 1497},
            "must leave training samples of the 1,797 .*got 1,497 and .* 300",
        ),
        ({"num_validation": 1, "num_test": 5000}, "got 1 and `data.num_test` 5,000"),
    ],
)
def test_parts_larger_than_the_data_are_refused(sizes, message):
    with pytest.raises(SpecError, match=message):
        data.load(data.Digits(**sizes))
    assert len(data.load(data.Digits(num_validation=1496)).train) == 1
