"""Results: what a verb found, as tables and as the document that is printed."""

from dataclasses import dataclass
from pathlib import Path

from windfall.findings import Table
from windfall.spec import Json


@dataclass(frozen=True)
class Result:
    """What a study found.

    Args:
        document: everything, JSON-able; the page is made from it.
        runs: counts: total, reused, trained, failed, diverged.
        seconds: of this call.
        lab: the folder of the runs.
        report: the page's path, or None.
    """

    document: Json
    runs: dict[str, int]
    seconds: float
    lab: Path
    report: Path | None

    @property
    def arms(self) -> Table:
        """Arms by level and metric: mean, interval, and every run's value and address."""
        return Table(self.document["arms"])

    @property
    def verdicts(self) -> Table:
        """One decided row per effect, at the study's level and metric."""
        return Table(self.document["verdicts"])

    @property
    def comparisons(self) -> Table:
        """Effects at other levels and metrics, with plain intervals."""
        return Table(self.document["comparisons"])

    @property
    def failures(self) -> Table:
        """Failed runs and their reasons."""
        return Table(self.document["failures"])

    @property
    def answer(self) -> list[str]:
        """The answer in words, the headline first."""
        return self.document["answer"]

    @property
    def winner(self) -> str | None:
        """Address of the best pruned run by validation accuracy."""
        return self.document["winner"]

    def to_json(self) -> Json:
        """The document that `windfall run --json` prints."""
        study = self.document["study"]
        names = ("arms", "verdicts", "comparisons", "failures", "winner", "notes", "answer")
        return {
            "study": {"name": study["name"], "address": study["address"]},
            "runs": self.runs,
            **{name: self.document[name] for name in names},
            "seconds": self.seconds,
            "estimate": self.document["estimate"],
            "lab": str(self.lab),
            "report": None if self.report is None else str(self.report),
        }
