"""The shape of the package: who may import whom, and what an import pulls in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import windfall

# A module imports only from those before it; the list is the order of reading.
LAYERS = {
    "ground": "spec, seeds, limits",
    "mathematics": "masks, weightnorm, initialize, signs, models, chains, teachers, students, "
    "flops, dynamics, simulation, curvature, flatness, connectivity, propagation, biases, "
    "structure, jacobians, activations, signals, tracing, units, compact, architecture, "
    "reconstruction, evidence, filters, saliency, criteria, selection, adjust, prune",
    "laboratory": "files, samples, batches, data, inputs, sparsity, train, runs, pretrained, "
    "course, measures, products, laboratory, engines, tickets, arms, effects, probes, beginnings, "
    "levels, children, transmission, trainability, experiments",
    "studies": "stats, contingency, foretelling, study, graph, suite, luck, settings, states, "
    "store, worker, service, schedule, execute, courses",
    "outside": "latency, prospects, workload, trials, pace, costs, words, diagnosis, findings, "
    "patterns, tables, overview, results, exhibit, drawing, plots, portraits, page, gallery, "
    "depths, showcase, display, bench, parcels, formats, exports, weights, checkup, verbs, cli",
}
ORDER = ", ".join(LAYERS.values()).split(", ")
PACKAGE = Path(windfall.__path__[0])
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
FOREIGN = (
    "matplotlib",
    "numba",
    "ray",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "pandas",
    "torchvision",
)


def layer(module):
    """The place in the order of a module, or of the package that it is in."""
    return module.partition(".")[0]


def imported(tree):
    """The modules of the package that a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "windfall":
            names = [f"windfall.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module or ""]
        else:
            continue
        yield from (
            name.removeprefix("windfall.") for name in names if name.startswith("windfall.")
        )


def test_the_order_names_every_module_once():
    assert len(set(ORDER)) == len(ORDER)
    unplaced = {layer(module) for module in MODULES} - set(ORDER)
    assert not unplaced, "each needs a place in LAYERS, before all that import it"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_modules_above_it(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    place = ORDER.index(layer(module))
    below = [
        other
        for other in imported(tree)
        if layer(other) != layer(module) and ORDER.index(layer(other)) >= place
    ]
    assert below == []


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("import windfall.spec", ["spec"]),
        ("from windfall import masks, seeds as named", ["masks", "seeds"]),
        ("from windfall.engines import separate", ["engines"]),
        ("from windfall.engines.separate import train", ["engines.separate"]),
        ("def f():\n    from windfall import plots", ["plots"]),
        ("import torch\nfrom pathlib import Path\nimport windfallen", []),
    ],
)
def test_the_search_finds_every_form_of_import(text, modules):
    assert list(imported(ast.parse(text))) == modules


def test_importing_the_package_pulls_in_nothing_heavy_that_it_may_not_need():
    code = "import sys, windfall; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    told = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300
    )
    loaded = told.stdout.split()
    assert "windfall" in loaded
    assert not set(FOREIGN) & set(loaded)
