"""The command line: verbs, each one public call."""

import contextlib
import errno
import json
import sys
import tomllib
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any

import typer

from windfall import data, store, verbs
from windfall.execute import Interrupted
from windfall.spec import Json, SpecError

app = typer.Typer(
    help="Why is a pruned network good: its weights, its architecture, or its luck?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Data sets.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="A bundled study or a .toml file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; may be repeated."),
]
LabFolder = Annotated[
    Path | None, typer.Option("--lab", help="Folder of the runs (default ./lab or WINDFALL_LAB).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Workers = Annotated[int | None, typer.Option("--workers", help="Processes (default: one a core).")]


def settings(pairs: list[str] | None) -> dict[str, Any]:
    """The settings that `--set PATH=VALUE` names; a value is TOML, a bare word, or words by commas.

    Raises:
        SpecError: when there is no `=`.
    """
    found: dict[str, Any] = {}
    for pair in pairs or ():
        path, equals, text = pair.partition("=")
        if not equals or not path:
            raise SpecError(f"`--set` must be PATH=VALUE; got {pair!r}.")
        found[path.strip()] = _value(text.strip())
    return found


def _value(text: str) -> Any:
    with contextlib.suppress(tomllib.TOMLDecodeError):
        return tomllib.loads(f"value = {text}")["value"]
    return [_value(part.strip()) for part in text.split(",")] if "," in text else text


@contextlib.contextmanager
def _told() -> Generator[None]:
    """Turn what went wrong into one message and the exit code that means it."""
    try:
        yield
    except SpecError as problem:
        print(f"windfall: {problem}", file=sys.stderr)
        raise typer.Exit(2) from None
    except Interrupted:
        print("windfall: stopped; everything finished so far is kept.", file=sys.stderr)
        raise typer.Exit(130) from None
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"windfall: no space is left: {problem}. Finished runs are kept.", file=sys.stderr)
        raise typer.Exit(1) from None


def _print_json(document: Json) -> None:
    print(json.dumps(document, allow_nan=False))


def _present(result: verbs.Result, *, as_json: bool) -> None:
    if as_json:
        _print_json(result.to_json())
        return
    from windfall import display

    display.show(display.result(result.document))
    if result.report is not None:
        print(f"Page: {result.report}")


@app.command()
def run(
    study: StudyName,
    set_: Set = None,
    lab: LabFolder = None,
    workers: Workers = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Train what a study lacks, print its answer, write its page."""
    with _told():
        result = verbs.run(study, settings(set_), lab=lab, workers=workers, device=device)
        _present(result, as_json=as_json)
    if result.failures:
        raise typer.Exit(1)


@app.command()
def plan(
    study: StudyName,
    set_: Set = None,
    lab: LabFolder = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """List the runs a study needs, which are stored, and what the rest costs."""
    with _told():
        document = verbs.plan(study, settings(set_), lab=lab, workers=workers)
        if as_json:
            _print_json(document)
            return
        from windfall import display

        display.show(display.plan(document))


@app.command()
def show(
    study: StudyName, set_: Set = None, lab: LabFolder = None, as_json: AsJson = False
) -> None:
    """Print a study's verdicts and the tables behind them, from the lab."""
    with _told():
        _present(verbs.show(study, settings(set_), lab=lab), as_json=as_json)


@app.command()
def pattern(
    study: StudyName, set_: Set = None, lab: LabFolder = None, as_json: AsJson = False
) -> None:
    """Print how much of each stage pruning keeps, and the settings of such a design."""
    with _told():
        document = verbs.pattern(study, settings(set_), lab=lab)
        if as_json:
            _print_json(document)
            return
        from windfall import display

        display.show(display.pattern(document))


@app.command()
def report(
    study: StudyName,
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write.")],
    set_: Set = None,
    lab: LabFolder = None,
    as_json: AsJson = False,
) -> None:
    """Write a study's page, from the lab."""
    with _told():
        result = verbs.report(study, output, settings(set_), lab=lab)
        if as_json:
            _print_json(result.to_json())
        else:
            print(f"Page: {result.report}")


@app.command()
def export(
    which: Annotated[
        str,
        typer.Argument(metavar="RUN|STUDY", help="The beginning of an address, or whose winner."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="A .safetensors, .pt2 or .onnx file; no suffix: all of them."
        ),
    ],
    set_: Set = None,
    lab: LabFolder = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's smaller network, proved equal and measured."""
    with _told():
        found = verbs.export(which, output, settings(set_), lab=lab)
        if as_json:
            _print_json(found.to_json())
            return
        from windfall import display

        display.show(display.export(found.document))


@app.command()
def biases(
    which: Annotated[
        str,
        typer.Argument(
            metavar="FILE|NAME|RUN",
            help="Tensors (.safetensors, .pt), torchvision's vgg11_bn ..., or a run's address.",
        ),
    ],
    lab: LabFolder = None,
    as_json: AsJson = False,
) -> None:
    """Print how many BatchNorm biases of a network are negative, and what its ReLUs pass."""
    with _told():
        document = verbs.biases(which, lab=lab)
        if as_json:
            _print_json(document)
            return
        from windfall import display

        display.show(display.biases(document))


@app.command()
def check(
    which: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RUN",
            help="The zoo's vgg-11 ..., your package.module:function, or a run's address.",
        ),
    ],
    set_: Set = None,
    lab: LabFolder = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="An HTML page to write besides.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what goes through a network, layer by layer, what ails it, and the remedy."""
    with _told():
        document = verbs.check(which, settings(set_), lab=lab, output=output)
        if as_json:
            _print_json(document)
            return
        from windfall import checkup, display

        display.show(checkup.table(document))
        if output is not None:
            print(f"Page: {output}")


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="mnist, fashion-mnist, cifar10, ...")],
) -> None:
    """Fetch and verify a data set."""
    with _told():
        print(f"{name}: {data.get(name)}")


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Which; default all.")] = None,
    set_: Set = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A JSON file to write besides.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run this machine's benchmarks."""
    from windfall import bench as benchmarks
    from windfall import display

    with _told():
        results: list[Json] = []
        for result in benchmarks.run(name, settings(set_)):
            results.append(result)
            if output is not None:
                document = json.dumps({"benchmarks": results}, allow_nan=False, indent=1)
                store.write_whole(output, document.encode())
            if not as_json:
                display.show(benchmarks.render(result))
        if as_json:
            _print_json({"benchmarks": results})


def main() -> None:
    """The entry point of the `windfall` command."""
    sys.path.append(str(Path.cwd()))  # a user's `package.module:function` lies where they stand
    app()
