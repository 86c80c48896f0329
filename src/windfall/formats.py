"""Formats: a network in files that others read, each read again before it counts as written.

    .safetensors   the tensors, and beside them a .json that says what network they are of
    .pt2           a program of torch.export
    .onnx          a graph for ONNX Runtime and others

Files are made in a folder beside their target and are given their names once all are proved. Only
`.safetensors` and `.json` are ever read from elsewhere; a `.pt2` is loaded when it was just written
here, and never else.
"""

import contextlib
import errno
import importlib.util
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from windfall import parcels, seeds
from windfall.parcels import Build
from windfall.spec import Json, SpecError
from windfall.states import write_whole
from windfall.store import FULL

EXTRA = ("onnx", "onnxscript", "onnxruntime")
BATCH = 2  # of the example that is followed: one input alone could be taken for a constant

Compute = Callable[[Tensor], Tensor]


class NotMade(SpecError):
    """A network that a format has no way to say."""


# -- one format each -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A way to write a network.

    Args:
        suffix: of its file.
        make: the contents of its files, by suffix, from a network in evaluation mode and what is to
            be told of it.
        load: what the file that was made computes, from its path and the network's document.
        extra: the packages that it needs beside those of every installation.
    """

    suffix: str
    make: Callable[[nn.Module, Json], dict[str, bytes]]
    load: Callable[[Path, Build | None], Compute]
    extra: tuple[str, ...] = ()

    @property
    def lacks(self) -> str | None:
        """What must be installed before the format can be made, as a remedy; None if nothing."""
        if all(importlib.util.find_spec(name) for name in self.extra):
            return None
        return "it needs the packages of an extra. Install them: pip install 'windfall[onnx]'"


def _rebuilt(path: Path, build: Build | None) -> Compute:
    return parcels.load_network(path, network=build)


@contextlib.contextmanager
def _hushed() -> Generator[None]:
    """Exporters are foreign code: they warn, log, print and draw from global generators."""
    disabled = logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        stack.enter_context(seeds.isolated(0, "export"))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, disabled)
        stack.enter_context(torch.no_grad())
        try:
            yield
        except Exception as problem:
            raise NotMade(_reason(problem)) from problem


def _reason(problem: BaseException) -> str:
    """The first line of what went wrong at the bottom of it."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0].rstrip('.') if lines else ''}"


def _followed(network: nn.Module, document: Json) -> torch.export.ExportedProgram:
    like = next(network.parameters(), torch.zeros(()))
    inputs = torch.zeros(BATCH, *document["input_shape"], dtype=like.dtype)
    free = ({0: torch.export.Dim("batch")},)
    return torch.export.export(network, (inputs,), dynamic_shapes=free, strict=False)


def _program(network: nn.Module, document: Json) -> dict[str, bytes]:
    with _hushed():
        content = io.BytesIO()
        torch.export.save(_followed(network, document), content)
    return {".pt2": content.getvalue()}


def _run_program(path: Path, build: Build | None) -> Compute:  # noqa: ARG001
    with _hushed():
        network = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def compute(inputs: Tensor) -> Tensor:
        with _hushed():
            return network(inputs)

    return compute


def _graph(network: nn.Module, document: Json) -> dict[str, bytes]:
    with _hushed():
        made: Any = torch.onnx.export(
            _followed(network, document),
            dynamo=True,
            verbose=False,
            input_names=["inputs"],
            output_names=["outputs"],
            dynamic_shapes=({0: "batch"},),
        )
        return {".onnx": made.model_proto.SerializeToString()}


def _run_graph(path: Path, build: Build | None) -> Compute:  # noqa: ARG001
    with _hushed():
        import onnxruntime  # here: the extra `onnx` may not be installed

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4  # its own words go to standard error
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=providers)

    def compute(inputs: Tensor) -> Tensor:
        with _hushed():
            outputs: Any = session.run(None, {"inputs": inputs.numpy()})
            return torch.from_numpy(outputs[0])

    return compute


FORMATS = {
    each.suffix: each
    for each in (
        Format(".safetensors", parcels.contents, _rebuilt),
        Format(".pt2", _program, _run_program),
        Format(".onnx", _graph, _run_graph, EXTRA),
    )
}


SUFFIXES = (*FORMATS, ".json")


# -- written ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Files that are asked for.

    Args:
        base: their path without a suffix.
        formats: to be made.
        is_open: that which cannot be made is left out, not refused.
    """

    base: Path
    formats: tuple[Format, ...]
    is_open: bool

    def within(self, folder: Path, suffix: str) -> Path:
        """The file of a suffix, in a folder."""
        return folder / f"{self.base.name}{suffix}"


def target(output: str | Path) -> Target:
    """What is meant by a file's name: its format, or without a suffix all that can be made.

    Raises:
        SpecError: when the suffix is unknown, the format lacks a package, or no file can be there.
    """
    path = Path(output)
    chosen = FORMATS.get(path.suffix)
    if path.suffix and chosen is None:
        raise SpecError(
            f"`-o` must be a file that ends in {', '.join(FORMATS)}, or in nothing for all of them;"
            f" got {path}."
        )
    if path.name in ("", "..") or path.is_dir():
        raise SpecError(f"`-o` must be a file; got the folder {path}. Name a file in it.")
    if not path.parent.is_dir():
        raise SpecError(f"`-o` must be a file in a folder that exists; got {path}.")
    if chosen is None:
        return Target(path, tuple(FORMATS.values()), is_open=True)
    if chosen.lacks:
        raise SpecError(
            f"`-o` must be of a format that can be made here; got {path}: {chosen.lacks}."
        )
    return Target(path.with_suffix(""), (chosen,), is_open=False)


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        files: their paths.
        proved: by suffix of a format, what the proof of it returned.
        left_out: by suffix, why a format was not made.
    """

    files: list[Path]
    proved: dict[str, Any]
    left_out: dict[str, str]


def write(
    to: Target,
    network: nn.Module,
    document: Json,
    build: Build | None,
    prove: Callable[[str, Compute], Any],
) -> Written:
    """Write a network in every format that is asked for, all files or none.

    Args:
        to: the files.
        network: in evaluation mode; left as it is.
        document: what its JSON tells: `address`, `model`, `input_shape`, `num_classes` and more.
        build: makes the whole network, where loading has to be given it; else None.
        prove: called with each format's suffix and what the file that was made computes; raises
            what is wrong with it.

    Raises:
        SpecError: when a format cannot say the network, a proof fails, or there is no writing.
    """
    proved: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    try:
        with _beside(to.base) as folder:
            for each in to.formats:
                try:
                    made = _made(each, to, folder, network, document)
                    proved[each.suffix] = prove(each.suffix, each.load(made, build))
                except NotMade as problem:
                    if not to.is_open:
                        raise _refused(each, problem) from None
                    left_out[each.suffix] = str(problem)
                    to.within(folder, each.suffix).unlink(missing_ok=True)
            return Written(_renamed(folder, to), proved, left_out)
    except OSError as problem:
        if problem.errno in FULL:
            raise
        raise SpecError(
            f"`-o` must be a file to write; got {to.base}: {problem.strerror or problem}."
        ) from None


def _refused(each: Format, problem: NotMade) -> SpecError:
    return SpecError(
        f"`-o` must be of a format that can say the network; {each.suffix} cannot: {problem}."
        " Write .safetensors."
    )


def _made(each: Format, to: Target, folder: Path, network: nn.Module, document: Json) -> Path:
    """Make a format's files in a folder; the one that is loaded."""
    if each.lacks:
        raise NotMade(each.lacks)
    for suffix, content in each.make(network, document).items():
        write_whole(to.within(folder, suffix), content)
    return to.within(folder, each.suffix)


@contextlib.contextmanager
def _beside(base: Path) -> Generator[Path]:
    folder = Path(tempfile.mkdtemp(".part", f".{base.name}.", base.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _renamed(folder: Path, to: Target) -> list[Path]:
    """Give the files of a folder their names, all or none; if none, older ones keep theirs."""
    places = [to.within(to.base.parent, suffix) for suffix in SUFFIXES]
    pairs = [(folder / path.name, path) for path in places if (folder / path.name).exists()]
    taken = [path for _, path in pairs if path.is_dir()]
    if taken:
        raise IsADirectoryError(errno.EISDIR, f"{taken[0]} is a folder")
    older = {path: folder / f"older-{path.name}" for _, path in pairs if path.exists()}
    moved: list[Path] = []
    try:
        for path, aside in older.items():
            path.replace(aside)
        for made, path in pairs:
            made.replace(path)
            moved.append(path)
    except OSError:
        for path in moved:
            path.unlink(missing_ok=True)
        for path, aside in older.items():
            if aside.exists():
                aside.replace(path)
        raise
    return moved
