"""The lab: a folder where every finished run is kept once, by its address.

    lab/lab.json                       the format's version
    lab/lab.sqlite                     a row a run: spec, evaluations, seconds, engine, versions
    lab/weights/ADDRESS.safetensors    final parameters, buffers, masks, snapshots
    lab/checkpoints/ADDRESS.safetensors  runs that were stopped
    lab/locks/ADDRESS                  held by whoever trains the run; freed by the kernel

A run is finished when its row exists; its weights were written, whole, before. Runs trained
together have one checkpoint, under the address of the first, and their rows appear at once. What is
being written has the ending `.part` and is never read. Nothing that is read runs code. Two
processes may use one lab.
"""

import contextlib
import errno
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from windfall import data as datasets
from windfall import states
from windfall.data import Data, Tensors
from windfall.masks import Masks
from windfall.spec import Json, SpecError, canonical, digest
from windfall.states import write_whole
from windfall.train import Evaluation, State

FORMAT = 1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write says when there is no space
PART_SECONDS = 3600.0  # a `.part` older than this was left by a process that was killed

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    address TEXT PRIMARY KEY, spec TEXT NOT NULL, status TEXT NOT NULL, facts TEXT NOT NULL,
    kept INTEGER NOT NULL, seconds REAL NOT NULL, engine TEXT NOT NULL, versions TEXT NOT NULL,
    created TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS failures (address TEXT PRIMARY KEY, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS studies (
    address TEXT PRIMARY KEY, name TEXT NOT NULL, graph TEXT NOT NULL, created TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Record:
    """What is kept of a finished run beside its weights.

    Args:
        address: of the run.
        spec: its canonical JSON, decoded.
        status: `done` or `diverged`.
        evaluations: in order of steps.
        snapshots: steps at which it kept a snapshot.
        kept: number of prunable weights kept; -1 for a dense run.
        seconds: of training, evaluation included; of runs trained together, an equal share each.
        engine: that trained it, and the device.
        versions: of windfall, torch and numpy.
        created: time of its end, ISO 8601, UTC.
        budget: the `steps` that were granted it, and the `multiply_adds` of one example's forward
            pass through what it kept; empty when an older version trained it.
        distance: L2, of the weights of its layers from those that it began with; None likewise, or
            when it is not finite.
        stack: addresses of the runs trained as one program, itself included, in their order in it;
            empty when it was trained alone.
    """

    address: str
    spec: Json
    status: str
    evaluations: list[Evaluation]
    snapshots: list[int]
    kept: int
    seconds: float
    engine: str
    versions: dict[str, str]
    created: str
    stack: list[str] = field(default_factory=list[str])
    budget: dict[str, int] = field(default_factory=dict[str, int])
    distance: float | None = None

    @property
    def unit(self) -> tuple[str, ...]:
        """The runs that must be trained for this one to come out bit for bit, in order."""
        return tuple(self.stack) or (self.address,)


def now() -> str:
    """The time, ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Lab:
    """A lab folder, open.

    Args:
        folder: where it lies; made when it does not exist.
        readonly: only read; the folder must be a lab already.

    Raises:
        SpecError: when the folder is no lab, cannot be written, or is of a newer version.
    """

    def __init__(self, folder: str | Path, *, readonly: bool = False) -> None:
        self.folder = Path(folder)
        try:
            self._check(readonly=readonly)
            if not readonly:
                self._prepare()
        except OSError as problem:
            if problem.errno in FULL:
                raise
            purpose = "read" if readonly else "write in"
            raise SpecError(
                f"`--lab` must be a folder to {purpose}; {self.folder}: {problem.strerror}."
            ) from None
        self._database = self._opened(readonly=readonly)

    def _check(self, *, readonly: bool) -> None:
        folder, marker = self.folder, self.folder / "lab.json"
        if not marker.exists():
            if folder.exists() and not (folder.is_dir() and _is_new(folder)):
                raise SpecError(
                    f"`--lab` must be a lab or a new folder; {folder} has no lab.json."
                    " Name another."
                )
            if readonly:
                raise SpecError(
                    f"`--lab` must be a lab; there is none in {folder}. Run a study first."
                )
            # the marker first: a lab whose making was cut short is a lab still
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(marker, canonical({"windfall-lab": FORMAT}).encode())
        try:
            version = int(json.loads(marker.read_bytes())["windfall-lab"])
        except (ArithmeticError, ValueError, KeyError, TypeError):
            raise SpecError(f"`--lab` must be a lab; {marker} is not one of windfall's.") from None
        if version > FORMAT:
            raise SpecError(
                f"`--lab` must be of format {FORMAT} or older; {folder} was written by a newer"
                f" windfall (format {version}). Upgrade windfall, or name another lab."
            )

    def _prepare(self) -> None:
        for part in ("weights", "checkpoints", "locks", "data"):
            (self.folder / part).mkdir(exist_ok=True)
        probe = self.folder / "locks" / f"probe-{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
        for left in self.folder.glob("**/*.????????.part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > PART_SECONDS:
                    left.unlink()

    def _opened(self, *, readonly: bool) -> sqlite3.Connection:
        path = self.folder / "lab.sqlite"
        try:
            if not readonly:
                database = sqlite3.connect(path, timeout=60)
                with database:
                    database.executescript(_SCHEMA)
                return database
            try:
                return _readable(path, "ro")
            except sqlite3.OperationalError as problem:
                if problem.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
                    raise
                return _readable(path, "rw")  # to undo what a killed process had half written
        except sqlite3.Error as problem:
            if _is_full(problem):
                raise OSError(errno.ENOSPC, f"no space left for {path}") from None
            raise SpecError(
                f"`--lab` must hold a readable lab.sqlite; {path}: {problem}."
            ) from None

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    # ---- finished runs ----

    def record(self, address: str) -> Record | None:
        """What is kept of a run; None if it is not finished."""
        return next(iter(self.records([address]).values()), None)

    def records(self, addresses: Iterable[str]) -> dict[str, Record]:
        """What is kept of the finished ones among these runs."""
        found: dict[str, Record] = {}
        for address in addresses:
            query = "SELECT * FROM runs WHERE address = ?"
            row = self._database.execute(query, (address,)).fetchone()
            if row is not None:
                found[address] = _record(row)
        return found

    def matching(self, prefix: str) -> list[str]:
        """The addresses of finished runs that begin with `prefix`."""
        query = "SELECT address FROM runs WHERE substr(address, 1, ?) = ? ORDER BY address"
        return [row[0] for row in self._database.execute(query, (len(prefix), prefix))]

    def holds(self, record: Record, keep: Iterable[int]) -> bool:
        """Whether a finished run's weights are there, with the snapshots of `keep` it came by.

        A diverged run never came by the steps after its last evaluation.
        """
        reached = {step for step in keep if step < record.evaluations[-1].step}
        return reached <= set(record.snapshots) and self.has_weights(record.address)

    def has_weights(self, address: str) -> bool:
        """Whether a run's weights are there; a user may have deleted them."""
        return self._weights(address).exists()

    def finish(self, record: Record, state: State) -> None:
        """Keep a finished run: its weights first, then its row."""
        self.finish_all([(record, state)])

    def finish_all(self, finished: Sequence[tuple[Record, State]]) -> None:
        """Keep runs that were finished together, all or none: their weights first, then the rows.

        Their checkpoint goes, and any that one of them had alone.
        """
        for record, state in finished:
            assert digest(record.spec) == record.address
            final = State(
                state.step,
                state.params,
                state.buffers,
                state.masks,
                snapshots=state.snapshots,
                channels=state.channels,
            )
            facts = {"step": state.step, "diverged": state.diverged, "evaluations": []}
            states.write_tensors(self._weights(record.address), final.tensors(), facts)
        rows = [_row(record, state) for record, state in finished]
        with self._writing() as database:
            database.executemany("INSERT OR REPLACE INTO runs VALUES (?,?,?,?,?,?,?,?,?)", rows)
            database.executemany(
                "DELETE FROM failures WHERE address = ?", [row[:1] for row in rows]
            )
        for record, _ in finished:
            for address in {record.address, record.unit[0]}:
                self._checkpoint(address).unlink(missing_ok=True)

    def weights(self, address: str) -> State:
        """The final state of a finished run: parameters, buffers, masks, snapshots."""
        return states.read(self._weights(address))[0][0]

    def masks(self, address: str) -> Masks:
        """The masks of a finished run, of weights or of channels, and nothing else of its file."""
        for part in ("masks/", "channels/"):
            tensors, _ = states.read_tensors(self._weights(address), part)
            if tensors:
                return {name.removeprefix(part): mask for name, mask in tensors.items()}
        return {}

    # ---- checkpoints ----

    def save_checkpoint(self, address: str, state: State, facts: Json) -> None:
        """Keep the state of a run in training; `facts` is given back with it."""
        self.save_checkpoints(address, [state], facts)

    def save_checkpoints(self, first: str, together: Sequence[State], facts: Json) -> None:
        """Keep the states of runs trained together, in one file under the address of the first."""
        states.write(self._checkpoint(first), together, facts)

    def checkpoint(self, address: str) -> tuple[State, Json] | None:
        """The last checkpoint of an unfinished run, or None."""
        found = self.checkpoints(address)
        return found and (found[0][0], found[1])

    def checkpoints(self, first: str) -> tuple[list[State], Json] | None:
        """The last checkpoint of runs trained together, by the first one's address, or None."""
        path = self._checkpoint(first)
        return states.read(path) if path.exists() else None

    # ---- failures and studies ----

    def fail(self, address: str, reason: str) -> None:
        """Note that an unfinished run failed, and why; forgotten when it is finished."""
        is_open = "NOT EXISTS (SELECT 1 FROM runs WHERE address = ?)"  # another process may have
        with self._writing() as database:
            database.execute(
                f"INSERT OR REPLACE INTO failures SELECT ?, ? WHERE {is_open}",
                (address, reason, address),
            )

    def failures(self, addresses: Iterable[str]) -> dict[str, str]:
        """The reasons of the failed ones among these runs."""
        rows = dict(self._database.execute("SELECT address, reason FROM failures").fetchall())
        return {address: rows[address] for address in addresses if address in rows}

    def remember(self, address: str, name: str, graph: Json) -> None:
        """Keep what a study consists of, so that it can be shown from the lab alone."""
        with self._writing() as database:
            row = (address, name, canonical(graph), now())
            database.execute("INSERT OR REPLACE INTO studies VALUES (?,?,?,?)", row)

    def recall(self, address: str) -> Json | None:
        """What a study consists of, or None if it was never run here."""
        query = "SELECT graph FROM studies WHERE address = ?"
        row = self._database.execute(query, (address,)).fetchone()
        return None if row is None else json.loads(row[0])

    def recalled(self, run: str) -> Json | None:
        """What one of the studies consists of that a run belongs to; None if there is none."""
        query = "SELECT graph FROM studies WHERE instr(graph, ?) LIMIT 1"
        row = self._database.execute(query, (run,)).fetchone()
        return None if row is None else json.loads(row[0])

    # ---- tensors of a user's own ----

    def keep_data(self, data: Data) -> None:
        """Keep tensors that only this process has, so that workers can train on them."""
        path = self._tensors(data)
        if path is not None and not path.exists():
            whole = data.decoded()
            parts = {"train": whole.train, "test": whole.test}
            tensors = {
                f"{name}/{kind}": getattr(part, kind)
                for name, part in parts.items()
                if part is not None
                for kind in ("inputs", "labels")
            }
            states.write_tensors(path, tensors, {})

    def lend_data(self, data: Data) -> None:
        """Give this process the tensors that `keep_data` kept, if the data is such and they are."""
        path = self._tensors(data)
        if path is not None and path.exists():
            kept, _ = states.read_tensors(path)
            test = (kept["test/inputs"], kept["test/labels"]) if "test/inputs" in kept else None
            train = (kept["train/inputs"], kept["train/labels"])
            datasets.tensors(*train, test, num_classes=getattr(data, "num_classes", None))

    def _tensors(self, data: Data) -> Path | None:
        is_own = isinstance(data, Tensors)
        return self.folder / "data" / f"{data.sha256}.safetensors" if is_own else None

    # ---- locks and files ----

    @contextlib.contextmanager
    def locked(self, *addresses: str) -> Generator[bool]:
        """Hold the locks of runs; yields False at once when another process holds one of them."""
        with contextlib.ExitStack() as held:
            # in one order everywhere: of two who ask for the same, one gets them
            yield all(held.enter_context(self._locked(address)) for address in sorted(addresses))

    @contextlib.contextmanager
    def _locked(self, address: str) -> Generator[bool]:
        path = self.folder / "locks" / address
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                yield False
                return
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(descriptor).st_ino:
                    break
            os.close(descriptor)  # another holder removed the file between open and lock
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def _weights(self, address: str) -> Path:
        return self.folder / "weights" / f"{address}.safetensors"

    def _checkpoint(self, address: str) -> Path:
        return self.folder / "checkpoints" / f"{address}.safetensors"

    @contextlib.contextmanager
    def _writing(self) -> Generator[sqlite3.Connection]:
        try:
            with self._database:
                yield self._database
        except sqlite3.OperationalError as problem:
            if _is_full(problem):
                raise OSError(errno.ENOSPC, f"no space left in {self.folder}") from None
            raise


def _is_new(folder: Path) -> bool:
    """Whether a folder is empty, but for a lab.json that is being written."""
    return all(path.match("lab.json*.part") for path in folder.iterdir())


def _readable(path: Path, mode: str) -> sqlite3.Connection:
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", timeout=60, uri=True)
    database.execute("SELECT COUNT(*) FROM runs")
    return database


def _is_full(problem: sqlite3.Error) -> bool:
    return problem.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)


def _row(record: Record, state: State) -> tuple[Any, ...]:
    facts = {**states.finite(state.facts()), "snapshots": record.snapshots}
    if record.stack:
        facts["stack"] = record.stack
    if record.budget:
        facts |= {"budget": record.budget, "distance": record.distance}
    return (
        record.address,
        canonical(record.spec),
        record.status,
        canonical(facts),
        record.kept,
        record.seconds,
        record.engine,
        canonical(record.versions),
        record.created,
    )


def _record(row: tuple[Any, ...]) -> Record:
    address, spec, status, facts, kept, seconds, engine, versions, created = row
    known = states.infinite(json.loads(facts))
    return Record(
        address,
        json.loads(spec),
        status,
        [Evaluation(**look) for look in known["evaluations"]],
        known["snapshots"],
        kept,
        seconds,
        engine,
        json.loads(versions),
        created,
        known.get("stack", []),
        known.get("budget", {}),
        known.get("distance"),
    )
