"""Official data files: where they lie, what they sum to, how they are read.

A `Source` names the files of one data set. Its bytes are verified before they are parsed, and the
bytes that were verified are the bytes that are parsed. Nothing is ever unpickled, and only `fetch`
uses the network.

    train, test = MNIST.read(root(None), verify=True)
    images, labels = train
"""

import gzip
import hashlib
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pooch

from windfall.spec import SpecError

Bytes = npt.NDArray[np.uint8]
Parts = tuple[tuple[Bytes, Bytes], tuple[Bytes, Bytes]]

MANIFEST = "windfall-manifest.json"


def root(given: str | None) -> Path:
    """The folder of data sets: `given`, else WINDFALL_DATA, else the user's cache folder."""
    return Path(given or os.environ.get("WINDFALL_DATA") or pooch.os_cache("windfall")).expanduser()


@dataclass(frozen=True)
class Archive:
    """A published archive that contains a data set's files.

    Args:
        name: its file name.
        md5: its published checksum.
    """

    name: str
    md5: str


@dataclass(frozen=True)
class Source:
    """One data set as its official files.

    Args:
        name: the name that `windfall data get` knows it by.
        num_classes: of its labels.
        parse: the training and the test part, from the bytes of every file.
        folder: the folder of its files, below the root.
        files: the published md5 of each file; empty where only the archive's is published. Such
            files are verified against a manifest written when the archive was unpacked.
        urls: where the files (or the archive) are published, the first to be tried first.
        archive: the archive that they come in, if they do.
    """

    name: str
    num_classes: int
    parse: Callable[[dict[Path, bytes]], Parts]
    folder: str
    files: dict[str, str]
    urls: tuple[str, ...]
    archive: Archive | None = None

    def read(self, root: Path, *, verify: bool) -> Parts:
        """Images and labels of the training and of the test part.

        Raises:
            SpecError: when files are missing, malformed, or (with `verify`) not the official ones.
        """
        return self.parse(self.contents(root, verify=verify))

    def contents(self, root: Path, *, verify: bool) -> dict[Path, bytes]:
        """The bytes of every file, by path, in the order of `files`; verified, not parsed."""
        folder = root / self.folder
        paths = [folder / name for name in self.files]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            lines = "".join(f"\n  {path} ({self._origin(path.name)})" for path in missing)
            raise SpecError(
                f"`data.root` must hold the files of {self.name}; missing:{lines}\n"
                f"Run `windfall data get {self.name}`, or set `data.root` or WINDFALL_DATA."
            )
        expected = self._checksums(folder) if verify else {}
        contents: dict[Path, bytes] = {}
        for path in paths:
            contents[path] = path.read_bytes()
            if verify:
                self._check(path, contents[path], expected[path.name])
        return contents

    def _origin(self, name: str) -> str:
        if self.archive is None:
            return f"md5 {self.files[name]}"
        return f"from {self.archive.name}, md5 {self.archive.md5}"

    def _remedy(self) -> str:
        return (
            f"run `windfall data get {self.name}`, or set `data.verify=false` and a `data.note` "
            "that says what these files are."
        )

    def _check(self, path: Path, content: bytes, expected: str) -> None:
        algorithm, _, digest = expected.partition(":")
        actual = hashlib.new(algorithm, content).hexdigest()
        if actual != digest:
            raise SpecError(
                f"{path} must be the official file, {algorithm} {digest}; got {actual} "
                f"({len(content):,} bytes). Move it away and {self._remedy()}"
            )

    def _checksums(self, folder: Path) -> dict[str, str]:
        """The expected checksum of each file, as `algorithm:digest`."""
        if self.archive is None:
            return {name: f"md5:{digest}" for name, digest in self.files.items()}
        path = folder / MANIFEST
        if not path.is_file():
            raise SpecError(
                f"{folder} must hold {MANIFEST}, the checksums of what was unpacked from "
                f"{self.archive.name} (md5 {self.archive.md5}); it is missing. "
                f"To verify them, {self._remedy()}"
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            digests = {name: str(manifest["sha256"][name]) for name in self.files}
            md5 = manifest["archive_md5"]
        except (ValueError, KeyError, TypeError) as problem:
            raise SpecError(
                f"{path} must list the sha256 of {', '.join(self.files)}; got a file that does not "
                f"({type(problem).__name__}: {problem}). "
                f"Move it away and {self._remedy()}"
            ) from None
        if md5 != self.archive.md5:
            raise SpecError(
                f"{path} must be of {self.archive.name}, md5 {self.archive.md5}; got {md5}. "
                f"Move it away and {self._remedy()}"
            )
        return {name: f"sha256:{digest}" for name, digest in digests.items()}

    def is_complete(self, root: Path) -> bool:
        """Whether every file is there, the manifest included."""
        names = [*self.files, *([MANIFEST] if self.archive else [])]
        return all((root / self.folder / name).is_file() for name in names)

    def fetch(self, root: Path) -> Path:
        """Download what is missing, verify everything, and return the folder.

        A folder that is already complete is verified and used as it is, without the network. A
        file that is there and is not the official one is never overwritten.
        """
        folder = root / self.folder
        if not self.is_complete(root):
            if self.archive is None:
                for name, md5 in self.files.items():
                    self._download(folder / name, md5)
            else:
                self._download(root / self.archive.name, self.archive.md5)
                self._unpack(root / self.archive.name, folder, self.archive.md5)
        self.contents(root, verify=True)
        return folder

    def _download(self, target: Path, md5: str) -> None:
        if target.is_file():
            self._check(target, target.read_bytes(), f"md5:{md5}")
            return
        problems: list[str] = []
        for base in self.urls:
            try:
                pooch.retrieve(
                    base + target.name, f"md5:{md5}", fname=target.name, path=target.parent
                )
            except (OSError, ValueError) as problem:
                problems.append(f"\n  {base + target.name}: {problem}")
            else:
                return
        raise SpecError(
            f"{target.name} (md5 {md5}) must be downloadable; got:{''.join(problems)}\n"
            f"Put the file at {target} and run `windfall data get {self.name}` again."
        )

    def _unpack(self, archive: Path, folder: Path, md5: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        digests: dict[str, str] = {}
        with tarfile.open(archive) as tar:
            for name in self.files:
                member = tar.extractfile(f"{self.folder}/{name}")
                assert member is not None, name  # the archive's checksum was verified
                content = member.read()
                digests[name] = hashlib.sha256(content).hexdigest()
                path = folder / name
                if path.is_file():
                    self._check(path, path.read_bytes(), f"sha256:{digests[name]}")
                else:
                    _write(path, content)
        manifest = {"archive": archive.name, "archive_md5": md5, "sha256": digests}
        _write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def idx(path: Path, content: bytes, shape: tuple[int, ...]) -> Bytes:
    """The array of a gzipped IDX file of unsigned bytes, [count, *shape].

    Layout: the bytes 0, 0, 8 (unsigned byte), the number of dimensions; each dimension as a
    big-endian 32-bit integer; the values in row-major order, and nothing after them.

    Args:
        path: named in messages.
        content: the compressed bytes.
        shape: what every dimension after the first must be.
    """
    try:
        raw = bytearray(gzip.decompress(content))
    except (OSError, EOFError, zlib.error) as problem:
        raise SpecError(f"{path} must be a whole gzip file; got {problem}.") from None
    magic, header = bytes([0, 0, 8, 1 + len(shape)]), 4 * (2 + len(shape))
    if len(raw) < header or bytes(raw[:4]) != magic:
        got = raw[:4].hex() or "nothing"
        raise SpecError(f"{path} must begin with {magic.hex()} (IDX); got {got}.")
    dimensions = struct.unpack(f">{1 + len(shape)}I", raw[4:header])
    if dimensions[1:] != shape:
        raise SpecError(f"{path} must hold items of shape {shape}; got {dimensions[1:]}.")
    size = int(np.prod(dimensions, dtype=np.int64))
    if size == 0 or len(raw) != header + size:
        raise SpecError(
            f"{path} must hold exactly {size:,} values, as its dimensions {dimensions} say, and at "
            f"least one; got {len(raw) - header:,}."
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(dimensions)


def records(path: Path, content: bytes, num_labels: int) -> tuple[Bytes, Bytes]:
    """The images, [count, 3, 32, 32], and labels, [count], of a file in CIFAR's binary layout.

    Layout: records of `num_labels` label bytes (the last is the fine one) and 3,072 pixel bytes,
    the red, green and blue planes in row-major order.
    """
    record = num_labels + 3072
    if not content or len(content) % record:
        raise SpecError(
            f"{path} must hold a whole number of records of {record:,} bytes, at least one; "
            f"got {len(content):,} bytes."
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, record)
    return rows[:, num_labels:].reshape(-1, 3, 32, 32), rows[:, num_labels - 1]


def mnist(contents: dict[Path, bytes]) -> Parts:
    """The parts of a data set in MNIST's layout, images [sample, 1, 28, 28]."""
    images, labels, test_images, test_labels = (
        idx(path, content, () if "labels" in path.name else (28, 28))
        for path, content in contents.items()
    )
    return (images[:, None], labels), (test_images[:, None], test_labels)


def cifar(contents: dict[Path, bytes], num_labels: int) -> Parts:
    """The parts of a data set in CIFAR's binary layout, images [sample, 3, 32, 32]."""
    *train, test = (records(path, content, num_labels) for path, content in contents.items())
    images, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    return (images, labels), test


MNIST = Source(
    name="mnist",
    num_classes=10,
    parse=mnist,
    folder="mnist",
    files={
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    urls=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
)
FASHION_MNIST = Source(
    name="fashion-mnist",
    num_classes=10,
    parse=mnist,
    folder="fashion-mnist",
    files={
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    urls=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
)
CIFAR10 = Source(
    name="cifar10",
    num_classes=10,
    parse=partial(cifar, num_labels=1),
    folder="cifar-10-batches-bin",
    files={
        **{f"data_batch_{part}.bin": "" for part in range(1, 6)},
        "test_batch.bin": "",
    },
    urls=("https://www.cs.toronto.edu/~kriz/",),
    archive=Archive("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
)
CIFAR100 = Source(
    name="cifar100",
    num_classes=100,
    parse=partial(cifar, num_labels=2),
    folder="cifar-100-binary",
    files={"train.bin": "", "test.bin": ""},
    urls=("https://www.cs.toronto.edu/~kriz/",),
    archive=Archive("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
)
SOURCES = {source.name: source for source in (MNIST, FASHION_MNIST, CIFAR10, CIFAR100)}
