import gzip
import hashlib
import io
import json
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from windfall import data, files
from windfall.spec import SpecError


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


def write_mnist(root, folder="mnist", num_train=20, num_test=6, classes=10):
    """A tiny data set in MNIST's layout; returns its arrays by file name."""
    random = np.random.default_rng(num_train)
    arrays = {}
    for prefix, num in (("train", num_train), ("t10k", num_test)):
        images = random.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        labels = (np.arange(num) % classes).astype(np.uint8)
        arrays[f"{prefix}-images-idx3-ubyte.gz"] = images
        arrays[f"{prefix}-labels-idx1-ubyte.gz"] = labels
    (root / folder).mkdir(parents=True)
    for name, array in arrays.items():
        (root / folder / name).write_bytes(idx_bytes(array))
    return arrays


def cifar_records(num, labels, seed):
    random = np.random.default_rng(seed)
    return random.integers(0, 10, (num, labels + 3072), dtype=np.uint8)


def write_cifar(root, source=files.CIFAR10, labels=1, num=4):
    """A tiny data set in CIFAR's binary layout; returns its records by file name."""
    (root / source.folder).mkdir(parents=True)
    records = {name: cifar_records(num, labels, seed) for seed, name in enumerate(source.files)}
    for name, rows in records.items():
        (root / source.folder / name).write_bytes(rows.tobytes())
    return records


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A tiny official MNIST, published at a fake address, and the root that is empty of it."""
    published = tmp_path / "published"
    write_mnist(published)
    contents = {name: (published / "mnist" / name).read_bytes() for name in files.MNIST.files}
    source = replace(files.MNIST, files={name: md5(c) for name, c in contents.items()})
    monkeypatch.setattr(files, "MNIST", source)
    monkeypatch.setitem(files.SOURCES, "mnist", source)
    return contents, tmp_path / "root"


@pytest.fixture
def archived(tmp_path, monkeypatch):
    """A tiny official CIFAR-10 archive and the root that is empty of it."""
    write_cifar(tmp_path / "published")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(tmp_path / "published" / files.CIFAR10.folder, files.CIFAR10.folder)
    content = archive.getvalue()
    source = replace(files.CIFAR10, archive=files.Archive("cifar-10-binary.tar.gz", md5(content)))
    monkeypatch.setattr(files, "CIFAR10", source)
    monkeypatch.setitem(files.SOURCES, "cifar10", source)
    return content, tmp_path / "root"


class Web:
    """Stands for the network: serves contents by file name, counts and may fail."""

    def __init__(self, monkeypatch, contents, broken=()):
        self.contents, self.broken, self.asked = contents, broken, []
        monkeypatch.setattr(files.pooch, "retrieve", self.retrieve)

    def retrieve(self, url, known_hash, fname, path):
        self.asked.append(url)
        if any(url.startswith(base) for base in self.broken):
            raise OSError("no route to host")
        content = self.contents[url.rpartition("/")[2]]
        assert known_hash == f"md5:{md5(content)}"
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / fname).write_bytes(content)


# -- reading ---------------------------------------------------------------------------------------


def test_idx_files_are_read_as_written(tmp_path):
    arrays = write_mnist(tmp_path)
    (images, labels), (test_images, test_labels) = files.MNIST.read(tmp_path, verify=False)
    assert np.array_equal(images[:, 0], arrays["train-images-idx3-ubyte.gz"])
    assert np.array_equal(labels, arrays["train-labels-idx1-ubyte.gz"])
    assert np.array_equal(test_images[:, 0], arrays["t10k-images-idx3-ubyte.gz"])
    assert np.array_equal(test_labels, arrays["t10k-labels-idx1-ubyte.gz"])


@pytest.mark.parametrize(("source", "num_labels"), [(files.CIFAR10, 1), (files.CIFAR100, 2)])
def test_cifar_records_are_read_plane_by_plane_with_the_fine_label(tmp_path, source, num_labels):
    rows = list(write_cifar(tmp_path, source, num_labels).values())
    (images, labels), (test_images, test_labels) = source.read(tmp_path, verify=False)
    train = np.concatenate(rows[:-1])
    assert labels.tolist() == train[:, num_labels - 1].tolist()
    assert test_labels.tolist() == rows[-1][:, num_labels - 1].tolist()
    assert images.shape == (len(train), 3, 32, 32)
    assert images[3, 2, 5, 7] == train[3, num_labels + 2 * 1024 + 5 * 32 + 7]
    assert test_images[1, 0, 0, 1] == rows[-1][1, num_labels + 1]


images = np.zeros((3, 28, 28), np.uint8)
packed = idx_bytes(images)
raw = gzip.decompress(packed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must begin with 00000803 .*; got nothing"),
        (b"not gzip at all", "must be a whole gzip file; got Not a gzipped file"),
        (packed[:-20], "must be a whole gzip file; got"),
        (packed[:30] + b"?" + packed[31:], "must be a whole gzip file; got"),
        (gzip.compress(raw[:3]), "must begin with 00000803"),
        (gzip.compress(b"\0\0\x0d\x03" + raw[4:]), "must begin with 00000803 .*; got 00000d03"),
        (idx_bytes(images[:, 0]), "must begin with 00000803 .*; got 00000802"),
        (gzip.compress(raw[:-1]), "must hold exactly 2,352 values.*; got 2,351"),
        (gzip.compress(raw + b"\0"), "must hold exactly 2,352 values.*; got 2,353"),
        (idx_bytes(np.zeros((3, 27, 28), np.uint8)), r"of shape \(28, 28\); got \(27, 28\)"),
        (idx_bytes(np.zeros((0, 28, 28), np.uint8)), "at least one; got 0"),
    ],
)
def test_malformed_idx_files_are_refused_by_name(tmp_path, content, message):
    write_mnist(tmp_path)
    path = tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=f"t10k-images-idx3-ubyte.gz.*({message})"):
        files.MNIST.read(tmp_path, verify=False)


@pytest.mark.parametrize("length", [0, 3072, 3074, 2 * 3073 - 1])
def test_cifar_files_of_a_broken_length_are_refused_by_name(tmp_path, length):
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").write_bytes(bytes(length))
    message = f"data_batch_3.bin must hold a whole number of records of 3,073.*got {length:,}"
    with pytest.raises(SpecError, match=message):
        files.CIFAR10.read(tmp_path, verify=False)


# -- verification ----------------------------------------------------------------------------------


def test_each_missing_file_is_named_with_its_checksum_and_the_remedy(tmp_path):
    write_mnist(tmp_path)
    for name in ("train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz"):
        (tmp_path / "mnist" / name).unlink()
    with pytest.raises(SpecError) as caught:
        data.load(data.Mnist(root=str(tmp_path)))
    message = str(caught.value)
    assert str(tmp_path / "mnist" / "train-labels-idx1-ubyte.gz") in message
    assert "d53e105ee54ea40749a09fcbcd1e9432" in message
    assert "9fb629c4189551a2d022fa330f9573f3" in message
    assert "train-images" not in message
    assert "`windfall data get mnist`" in message


def test_official_files_are_accepted_and_altered_ones_named_with_both_checksums(official):
    contents, root = official
    (root / "mnist").mkdir(parents=True)
    for name, content in contents.items():
        (root / "mnist" / name).write_bytes(content)
    loaded = data.load(data.Mnist(root=str(root), num_validation=5))
    assert loaded.note is None
    name = "train-images-idx3-ubyte.gz"
    (root / "mnist" / name).write_bytes(contents[name][:-1])
    with pytest.raises(SpecError) as caught:
        data.load(data.Mnist(root=str(root), num_validation=5))
    message = str(caught.value)
    assert name in message
    assert md5(contents[name]) in message
    assert md5(contents[name][:-1]) in message
    assert "data.verify=false" in message


def test_cifar_without_a_manifest_is_refused_unless_unverified(tmp_path):
    write_cifar(tmp_path)
    with pytest.raises(SpecError, match=r"windfall-manifest.json.*c32a1d4ab5d03f12.*verify=false"):
        files.CIFAR10.read(tmp_path, verify=True)
    files.CIFAR10.read(tmp_path, verify=False)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "must list the sha256 of data_batch_1.bin"),
        ("[]", "must list the sha256"),
        ('{"sha256": {}}', "must list the sha256"),
        (
            json.dumps({"archive_md5": "0", "sha256": dict.fromkeys(files.CIFAR10.files, "0")}),
            "must be of cifar-10-binary.tar.gz, md5 c32a1d4ab5d03f1284b67883e8d87530; got 0",
        ),
    ],
)
def test_a_manifest_of_something_else_is_refused(tmp_path, manifest, message):
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-bin" / files.MANIFEST).write_text(manifest)
    with pytest.raises(SpecError, match=message):
        files.CIFAR10.read(tmp_path, verify=True)


@pytest.mark.parametrize("source", files.SOURCES.values(), ids=list(files.SOURCES))
def test_every_source_has_a_member_of_its_name_and_checksums(source):
    spec = data.decode(data.Data, source.name)
    assert spec.verify
    checksums = [source.archive.md5] if source.archive else list(source.files.values())
    assert all(len(checksum) == 32 and int(checksum, 16) for checksum in checksums)


# -- fetching --------------------------------------------------------------------------------------


def test_get_downloads_once_and_is_offline_afterwards(official, monkeypatch):
    contents, root = official
    web = Web(monkeypatch, contents)
    assert data.get("mnist", str(root)) == root / "mnist"
    assert len(web.asked) == 4
    assert data.get("mnist", str(root)) == root / "mnist"
    assert len(web.asked) == 4


@pytest.mark.parametrize("name", ["mnits", "digits"])
def test_get_knows_what_can_be_downloaded(name):
    with pytest.raises(SpecError, match=f"got '{name}'.*Known: mnist, fashion-mnist, cifar10"):
        data.get(name)


def test_get_tries_the_next_address_and_reports_all(official, monkeypatch):
    contents, root = official
    first, second = files.MNIST.urls
    web = Web(monkeypatch, contents, broken=[first])
    files.MNIST.fetch(root)
    assert sum(url.startswith(second) for url in web.asked) == 4
    (root / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    Web(monkeypatch, contents, broken=[first, second])
    with pytest.raises(SpecError, match=r"(?s)t10k-labels.*amazonaws.*no route.*googleapis.*Put"):
        files.MNIST.fetch(root)


def test_get_never_overwrites_a_file_that_is_not_the_official_one(official, monkeypatch):
    contents, root = official
    web = Web(monkeypatch, contents)
    path = root / "mnist" / "train-images-idx3-ubyte.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(SpecError, match=r"train-images.*Move it away and run"):
        files.MNIST.fetch(root)
    assert path.read_bytes() == b"mine"
    assert not web.asked


def test_get_unpacks_an_archive_and_later_loads_verify_by_its_manifest(archived, monkeypatch):
    content, root = archived
    web = Web(monkeypatch, {"cifar-10-binary.tar.gz": content})
    folder = data.get("cifar10", str(root))
    assert len(web.asked) == 1
    assert not list(folder.glob("*.partial"))
    files.CIFAR10.fetch(root)
    assert len(web.asked) == 1
    assert data.load(data.Cifar10(root=str(root), num_validation=5)).note is None

    path = folder / "data_batch_2.bin"
    altered = bytearray(path.read_bytes())
    altered[1] ^= 1
    path.write_bytes(altered)
    actual = hashlib.sha256(altered).hexdigest()
    with pytest.raises(SpecError, match=f"data_batch_2.bin must be the official file.*{actual}"):
        files.CIFAR10.read(root, verify=True)


def test_get_uses_an_archive_that_is_already_there(archived, monkeypatch):
    content, root = archived
    web = Web(monkeypatch, {})
    root.mkdir()
    (root / "cifar-10-binary.tar.gz").write_bytes(content)
    files.CIFAR10.fetch(root)
    assert not web.asked


def test_get_never_unpacks_over_other_files(archived, monkeypatch):
    content, root = archived
    Web(monkeypatch, {"cifar-10-binary.tar.gz": content})
    path = root / "cifar-10-batches-bin" / "test_batch.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(SpecError, match=r"test_batch.bin must be the official file"):
        files.CIFAR10.fetch(root)
    assert path.read_bytes() == b"mine"
    assert not (path.parent / files.MANIFEST).exists()


def test_the_root_is_the_given_one_else_the_environments_else_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("WINDFALL_DATA", str(tmp_path))
    assert files.root("here") == Path("here")
    assert files.root(None) == tmp_path
    monkeypatch.delenv("WINDFALL_DATA")
    assert files.root(None).name == "windfall"
