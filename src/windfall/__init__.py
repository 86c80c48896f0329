"""Windfall: why a pruned network is good, and the network that won.

    import windfall

    result = windfall.run("lottery", {"num_seeds": 5})
    print(result.answer[0])
    result.verdicts.to_pandas()

Your own network and data:

    study = windfall.Study(model=make_network, data=windfall.tensors(images, labels), num_seeds=5)
    windfall.run(study)

The map, in the order of reading: `spec`, `seeds` (ground); `masks`, `initialize`, `models`,
`flops`, `architecture`, `criteria`, `selection`, `prune` (mathematics); `data`, `train`, `runs`,
`engines`, `tickets`, `arms` (laboratory); `stats`, `study`, `graph`, `suite`, `store`, `execute`
(studies); `tables`, `plots`, `page`, `exports`, `cli` (outside).
"""

from importlib.metadata import version

from windfall.data import load as load_data
from windfall.data import tensors
from windfall.execute import Interrupted
from windfall.parcels import load_network
from windfall.prune import Prune
from windfall.runs import Run
from windfall.settings import load as load_study
from windfall.spec import SpecError
from windfall.store import Lab
from windfall.study import Study
from windfall.train import Recipe
from windfall.verbs import Result, export, pattern, plan, report, run, show

__version__ = version("windfall")

__all__ = [
    "Interrupted",
    "Lab",
    "Prune",
    "Recipe",
    "Result",
    "Run",
    "SpecError",
    "Study",
    "export",
    "load_data",
    "load_network",
    "load_study",
    "pattern",
    "plan",
    "report",
    "run",
    "show",
    "tensors",
]
