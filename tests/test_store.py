import ast
import contextlib
import errno
import fcntl
import functools
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import small
import torch

import windfall
from windfall import data, states, store
from windfall.spec import SpecError, canonical, digest
from windfall.store import Lab, Record, write_whole
from windfall.train import Evaluation, State

NAN, INF = float("nan"), float("inf")
SOURCES = Path(windfall.__file__).parent


def state(seed: int = 0, losses: tuple[float, ...] = (2.5, 1.25)) -> State:
    """A state with a tensor of every kind that a lab keeps."""
    draw = torch.Generator().manual_seed(seed)
    params = {
        "hidden.weight": torch.randn(5, 3, generator=draw),
        "hidden.bias": torch.tensor([0.0, -0.0, 1e-42, NAN, INF]),
        "output.weight": torch.randn(3, 7, generator=draw, dtype=torch.float64).T,
    }
    masks = {"hidden.weight": torch.rand(5, 3, generator=draw) < 0.5}
    buffers = {"norm.mean": torch.randn(3, generator=draw), "norm.seen": torch.tensor(7)}
    optimizer = {
        "exp_avg": {"hidden.weight": torch.randn(5, 3, generator=draw)},
        "step": {"hidden.weight": torch.tensor(3.0)},
    }
    looks = [
        Evaluation(10 * i, None if i == 0 else loss, loss, 0.5, loss, 0.1)
        for i, loss in enumerate(losses)
    ]
    return State(10, params, buffers, masks, optimizer, looks)


def record(seed: int = 0, *, of: State | None = None, **changes: object) -> Record:
    spec = {"kind": "run", "seed": seed, "name": "réseau"}
    looks = (of or state(seed)).evaluations
    known = {
        "address": digest(spec),
        "spec": spec,
        "status": "done",
        "evaluations": looks,
        "snapshots": [],
        "kept": 12,
        "seconds": 1.5,
        "engine": "separate/cpu",
        "versions": {"torch": "2"},
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Record(**(known | changes))


def same_tensors(a: State, b: State) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(small.is_same(left[n], right[n]) for n in left)


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    known = {path.relative_to(folder): path.stat() for path in folder.rglob("*")}
    return {str(path): (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in known.items()}


@pytest.fixture
def lab(tmp_path):
    opened = Lab(tmp_path / "lab")
    yield opened
    opened.close()


# ---- a file is there whole or not at all ---------------------------------------------------


class Torn:
    """A file that fails after half of what it is given is written."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def fail_at(step: str, patch: pytest.MonkeyPatch) -> None:
    """Make one step of `write_whole` fail."""

    def refuse(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    opened, synced = Path.open, os.fsync
    calls: list[int] = []

    def sync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == (1 if step == "sync" else 2):
            refuse()
        synced(descriptor)

    match step:
        case "open":
            patch.setattr(Path, "open", refuse)
        case "write":
            patch.setattr(Path, "open", lambda path, *mode: Torn(opened(path, *mode)))
        case "rename":
            patch.setattr(Path, "replace", refuse)
        case "sync" | "sync of the folder":
            patch.setattr(os, "fsync", sync)


@pytest.mark.parametrize("step", ["open", "write", "sync", "rename", "sync of the folder"])
@pytest.mark.parametrize("is_killed", [False, True], ids=["failed", "killed"])
def test_a_write_that_stops_at_any_step_leaves_a_whole_file(step, is_killed, tmp_path, monkeypatch):
    path, old, new = tmp_path / "file", b"old" * 1000, b"new" * 2000
    path.write_bytes(old)
    with monkeypatch.context() as patch:
        fail_at(step, patch)
        if is_killed:  # a killed process cleans nothing up
            patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(OSError):
            write_whole(path, new)
    assert path.read_bytes() == (new if step == "sync of the folder" else old)
    left = [other.name for other in tmp_path.iterdir() if other != path]
    assert all(name.endswith(".part") for name in left)
    assert is_killed or not left
    write_whole(path, new)
    assert path.read_bytes() == new


def test_several_processes_may_write_one_file_at_once(tmp_path):
    path, contents = tmp_path / "file", [bytes([i]) * 200_000 for i in range(4)]

    def write(content: bytes) -> None:
        for _ in range(20):
            write_whole(path, content)
            assert path.read_bytes() in contents

    small.together(*(functools.partial(write, content) for content in contents))
    assert [other.name for other in tmp_path.iterdir()] == ["file"]


def test_a_part_is_never_read_and_goes_when_it_is_old(lab):
    state_, record_ = state(), record()
    lab.finish(record_, state_)
    lab.save_checkpoint(digest("other"), state_, {})
    weights = next((lab.folder / "weights").iterdir())
    whole = weights.read_bytes()
    young, old = (weights.with_name(f"{weights.name}.{name}.part") for name in ("0" * 8, "1" * 8))
    checkpoint = lab.folder / "checkpoints" / f"{record_.address}.safetensors.22222222.part"
    for part in (young, old, checkpoint):
        part.write_bytes(whole[:100])
    os.utime(old, (0, time.time() - 2 * store.PART_SECONDS))
    again = Lab(lab.folder)
    assert again.matching("") == [record_.address]
    assert again.checkpoint(record_.address) is None
    assert same_tensors(again.weights(record_.address), lab.weights(record_.address))
    assert young.exists()  # perhaps another process is writing it
    assert not old.exists()
    again.close()


# ---- finished runs -------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["weights", "row", "commit", "checkpoint"])
def test_a_run_is_finished_whole_or_not_at_all(step, lab, monkeypatch):
    lab.save_checkpoint(record().address, state(), {"seconds": 1.0})
    real = Lab._writing

    @contextlib.contextmanager
    def torn(self):
        if step == "row":
            raise OSError(errno.EIO, "Input/output error")
        with real(self) as database:
            yield database
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        if step == "weights":
            fail_at("rename", patch)
        elif step == "checkpoint":
            fail_at("rename", patch)
            patch.setattr(states, "write_tensors", lambda *_: None)
            patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "")))
        else:
            patch.setattr(Lab, "_writing", torn)
        lab.finish(record(), state())
    again = Lab(lab.folder)
    finished = again.record(record().address)
    assert (finished is None) == (step != "checkpoint")
    assert again.checkpoint(record().address) is not None  # nothing was lost
    again.finish(record(), state())
    assert again.checkpoint(record().address) is None
    assert again.record(record().address) == record()
    assert again.weights(record().address).step == 10
    again.close()


@pytest.mark.parametrize("step", ["second weights", "second row"])
def test_runs_trained_together_are_finished_all_or_none(step, lab, monkeypatch):
    stack = [record(seed).address for seed in range(3)]
    finished = [(record(seed, stack=stack), state(seed)) for seed in range(3)]
    lab.save_checkpoints(stack[0], [state(seed) for seed in range(3)], {"stack": stack})
    lab.fail(stack[1], "bad luck")
    real, calls = states.write_tensors, []

    def write(path: Path, *arguments: object) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(path, *arguments)

    if step == "second weights":
        monkeypatch.setattr(states, "write_tensors", write)
    else:
        lab._database.execute(
            "CREATE TEMP TRIGGER once BEFORE INSERT ON main.runs WHEN (SELECT COUNT(*) FROM runs)"
            " BEGIN SELECT RAISE(ABORT, 'bad luck'); END"
        )
    with pytest.raises((OSError, sqlite3.IntegrityError)):
        lab.finish_all(finished)
    again = Lab(lab.folder)
    assert again.records(stack) == {}
    assert again.failures(stack) == {stack[1]: "bad luck"}
    assert len(again.checkpoints(stack[0])[0]) == 3
    monkeypatch.undo()
    again.finish_all(finished)
    assert again.records(stack) == dict(zip(stack, [each for each, _ in finished], strict=True))
    assert {each.unit for each in again.records(stack).values()} == {tuple(stack)}
    assert again.failures(stack) == {}
    assert list((lab.folder / "checkpoints").iterdir()) == []
    again.close()


def test_a_run_of_an_older_lab_was_trained_alone(lab):
    lab.finish(record(), state())
    (facts,) = lab._database.execute("SELECT facts FROM runs").fetchone()
    assert json.loads(facts).keys() == {"step", "diverged", "evaluations", "snapshots"}
    assert lab.record(record().address).unit == (record().address,)


def test_the_checkpoint_of_a_stack_comes_back_bit_for_bit_in_order(lab):
    together = [state(seed, losses=(2.5, NAN) if seed == 1 else (2.5, 1.0)) for seed in range(12)]
    for seed, each in enumerate(together):
        each.step = seed
        each.snapshots = {3: state(100 + seed)}
        each.snapshots[3].step, each.snapshots[3].evaluations = 3, []
    lab.save_checkpoints("a" * 64, together, {"keep": [3]})
    found, facts = lab.checkpoints("a" * 64)
    assert facts == {"keep": [3]}
    assert [each.step for each in found] == list(range(12))
    for one, other in zip(found, together, strict=True):
        assert same_tensors(one, other)
        assert repr(one.evaluations) == repr(other.evaluations)
    first, _ = lab.checkpoint("a" * 64)
    assert same_tensors(first, together[0])


def test_a_diverged_run_comes_back_with_its_losses(lab):
    odd = state(losses=(2.5, NAN, INF, -INF))
    odd.diverged = True
    lab.finish(record(of=odd, status="diverged"), odd)
    known = lab.record(record().address)
    assert repr(known.evaluations) == repr(odd.evaluations)
    assert lab.weights(record().address).diverged
    lab.save_checkpoint(record().address, odd, {})
    restored, _ = lab.checkpoint(record().address)
    assert repr(restored.evaluations) == repr(odd.evaluations)
    (facts,) = (
        sqlite3.connect(lab.folder / "lab.sqlite").execute("SELECT facts FROM runs").fetchone()
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads(facts, parse_constant=refuse)


def test_a_record_comes_back_as_it_was_under_the_digest_of_its_spec(lab):
    kept = record(snapshots=[3, 20], kept=-1)
    lab.finish(kept, state())
    assert lab.record(kept.address) == kept
    assert digest(lab.record(kept.address).spec) == kept.address
    assert lab.records([kept.address, digest("unknown")]).keys() == {kept.address}
    with pytest.raises(AssertionError):
        lab.finish(record(address=digest("another")), state())


def test_tensors_come_back_bit_for_bit_and_aligned(lab):
    final = state()
    final.snapshots = {3: state(1), 20: state(2)}
    for step, snapshot in final.snapshots.items():
        snapshot.step, snapshot.evaluations = step, []
    lab.finish(record(snapshots=[3, 20]), final)
    weights = lab.weights(record().address)
    final.optimizer = {}  # of the last step, which nothing starts from
    assert same_tensors(weights, final)
    assert list(weights.snapshots) == [3, 20]
    assert weights.masks["hidden.weight"].dtype == torch.bool
    assert small.is_same(lab.masks(record().address)["hidden.weight"], final.masks["hidden.weight"])

    whole = state()
    whole.snapshots = final.snapshots
    whole.losses = torch.tensor(0.1 + 0.2, dtype=torch.float64)
    lab.save_checkpoint(record().address, whole, {"keep": [3], "seconds": 0.5})
    restored, facts = lab.checkpoint(record().address)
    assert same_tensors(restored, whole)
    assert restored.evaluations == whole.evaluations
    assert facts == {"keep": [3], "seconds": 0.5}
    # sums of floats depend on where in memory they begin; torch's own tensors are at 64 bytes
    assert all(tensor.data_ptr() % 64 == 0 for tensor in restored.tensors().values())


def shortened(path: Path, fraction: float) -> None:
    os.truncate(path, int(fraction * path.stat().st_size))


DAMAGES = {
    "empty": lambda path: shortened(path, 0),
    "cut in its header": lambda path: shortened(path, 0.05),
    "cut in its tensors": lambda path: shortened(path, 0.9),
    "other bytes": lambda path: path.write_bytes(b"not a safetensors file" * 9),
    "a header of garbage": lambda path: path.write_bytes(
        (64).to_bytes(8, "little") + b"{" * 64 + path.read_bytes()[72:]
    ),
    "another program's": lambda path: path.write_bytes(
        safetensors.torch.save({"x": torch.ones(2)})
    ),
    "another program's facts": lambda path: path.write_bytes(
        safetensors.torch.save({"x": torch.ones(2)}, {"facts": "[]"})
    ),
    "no state": lambda path: path.write_bytes(
        safetensors.torch.save({"x": torch.ones(2)}, {"facts": canonical({"evaluations": []})})
    ),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["weights", "checkpoints"])
def test_a_damaged_file_is_refused_by_its_name(damage, part, lab):
    address = record().address
    lab.finish(record(), state())
    lab.save_checkpoint(address, state(), {})
    path = lab.folder / part / f"{address}.safetensors"
    DAMAGES[damage](path)
    read = lab.weights if part == "weights" else lab.checkpoint
    if part == "checkpoints" and damage == "gone":
        assert read(address) is None
        return
    with pytest.raises(SpecError) as refused:
        read(address)
    assert str(path) in str(refused.value)
    assert "Delete it, and the study's next run makes it again." in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_run_holds_what_it_came_by(lab):
    looks = [Evaluation(step, None, 1.0, 0.1, 1.0, 0.1) for step in (0, 20)]
    kept = record(evaluations=looks, snapshots=[5])
    lab.finish(kept, state())
    assert lab.holds(kept, [])
    assert lab.holds(kept, [5])
    assert not lab.holds(kept, [5, 7])
    assert lab.holds(kept, [20, 30])  # it ended before
    (lab.folder / "weights" / f"{kept.address}.safetensors").unlink()
    assert not lab.holds(kept, [])


def test_runs_are_found_by_the_beginning_of_their_address(lab):
    addresses = sorted(record(seed).address for seed in range(20))
    for seed in range(20):
        lab.finish(record(seed), state(seed))
    assert lab.matching("") == addresses
    assert lab.matching(addresses[3]) == [addresses[3]]
    assert lab.matching(addresses[3][:1]) == [a for a in addresses if a[0] == addresses[3][0]]
    assert lab.matching("%") == lab.matching("g") == lab.matching("_' OR 1 --") == []


def test_failures_are_remembered_until_the_run_is_finished(lab):
    address, other = record().address, record(1).address
    lab.fail(address, "first reason")
    lab.fail(address, "second reason")
    lab.fail(other, "another")
    assert lab.failures([address, digest("x")]) == {address: "second reason"}
    lab.finish(record(), state())
    assert lab.failures([address, other]) == {other: "another"}
    lab.fail(address, "another process had finished it meanwhile")
    assert lab.failures([address, other]) == {other: "another"}


def test_a_study_is_recalled_as_it_was_last_run(lab):
    assert lab.recall("address") is None
    lab.remember("address", "name", {"nodes": [1]})
    lab.remember("address", "name", {"nodes": [1, "ü"]})
    assert Lab(lab.folder, readonly=True).recall("address") == {"nodes": [1, "ü"]}


# ---- locks ---------------------------------------------------------------------------------


def test_a_lock_has_one_holder_and_is_freed_by_an_error(lab):
    other = Lab(lab.folder)
    with lab.locked("a" * 64) as mine, other.locked("a" * 64) as theirs:
        assert (mine, theirs) == (True, False)
        with other.locked("b" * 64) as another:
            assert another
    with contextlib.suppress(RuntimeError), lab.locked("a" * 64):
        raise RuntimeError
    with other.locked("a" * 64) as theirs:
        assert theirs
    assert list((lab.folder / "locks").iterdir()) == []
    other.close()


def test_the_locks_of_several_runs_are_held_all_or_none(lab):
    other, names = Lab(lab.folder), [letter * 64 for letter in "bac"]
    with lab.locked(names[2]), other.locked(*names) as theirs:
        assert not theirs
    assert small.held(lab.folder) == []
    with lab.locked(*names) as mine:
        assert mine
        assert sorted(small.held(lab.folder)) == sorted(names)
        for name in names:
            with other.locked(name) as theirs:
                assert not theirs
    assert small.held(lab.folder) == []
    other.close()


def test_the_kernel_frees_the_lock_of_a_killed_process(lab, tmp_path):
    ready = tmp_path / "ready"

    def hold() -> None:
        with Lab(lab.folder).locked("a" * 64) as held:
            assert held
            ready.touch()
            time.sleep(600)

    pid = small.forked(hold)
    small.until(ready.exists, "the other process holds the lock")
    with lab.locked("a" * 64) as held:
        assert not held
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with lab.locked("a" * 64) as held:
        assert held


@pytest.mark.slow
def test_many_processes_never_hold_one_lock_together(lab, tmp_path):
    inside, rounds = tmp_path / "inside", 150

    def contend() -> None:
        mine, entered = Lab(lab.folder), 0
        while entered < rounds:
            with mine.locked("a" * 64) as held:
                if held:
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another is inside
                    inside.unlink()
                    entered += 1

    small.together(*[contend] * 4)


def test_a_lock_file_that_another_holder_removed_is_not_held(lab, monkeypatch):
    path, real, calls = lab.folder / "locks" / ("a" * 64), fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()  # its holder ends: between this process's open and its lock
        if len(calls) == 2:
            path.unlink()
            path.touch()  # and here a third process has made a new one
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with lab.locked("a" * 64) as held:
        assert held
        assert len(calls) == 3
        assert os.fstat(calls[-1]).st_ino == path.stat().st_ino


# ---- opening -------------------------------------------------------------------------------


def test_a_lab_is_read_without_a_byte_written(lab):
    lab.finish(record(), state())
    lab.remember("study", "name", {})
    before = listing(lab.folder)
    reader = Lab(lab.folder, readonly=True)
    assert reader.record(record().address) == record()
    assert reader.weights(record().address).step == 10
    assert reader.failures([record().address]) == {}
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.fail("x", "y")
    reader.close()
    assert listing(lab.folder) == before


def test_a_lab_is_read_while_another_process_writes_it(lab):
    writer = small.forked(
        lambda: [Lab(lab.folder).finish(record(seed), state(seed)) for seed in range(40)]
    )
    reader, seen = Lab(lab.folder, readonly=True), 0
    while seen < 40:
        found = reader.matching("")
        assert len(found) >= seen
        seen = len(found)
        for address in found[-1:]:
            assert reader.weights(address).step == 10
    assert os.waitpid(writer, 0)[1] == 0
    reader.close()


def half_written(lab: Lab) -> Path:
    """A copy of a lab as a process killed in the middle of writing to its database leaves it."""
    lab.finish(record(), state())
    for seed in range(1, 30):
        lab.fail(record(seed).address, "x" * 3000)
    other = sqlite3.connect(lab.folder / "lab.sqlite", isolation_level=None)
    other.execute("PRAGMA cache_size = 3")
    other.execute("BEGIN")
    other.execute("UPDATE failures SET reason = ?", ("y" * 3000,))
    assert (lab.folder / "lab.sqlite-journal").stat().st_size > 0
    copy = lab.folder.with_name("copy")
    shutil.copytree(lab.folder, copy)
    other.execute("ROLLBACK")
    other.close()
    return copy


@pytest.mark.parametrize("readonly", [False, True])
def test_what_a_killed_process_had_half_written_is_undone(readonly, lab):
    opened = Lab(half_written(lab), readonly=readonly)
    assert opened.record(record().address) == record()
    reasons = opened.failures(record(seed).address for seed in range(30))
    assert set(reasons.values()) == {"x" * 3000}
    opened.close()


def marked(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "lab.json").write_text(text)


NO_LABS = {
    "a file": (lambda folder: folder.write_text("x"), "has no lab.json"),
    "a folder of other things": (
        lambda folder: (folder.mkdir(), (folder / "thesis.tex").touch()),
        "has no lab.json",
    ),
    "a newer lab": (
        lambda folder: marked(folder, '{"windfall-lab": 2}'),
        "written by a newer windfall",
    ),
    "no JSON": (lambda folder: marked(folder, "{"), "is not one of windfall's"),
    "no text": (
        lambda folder: (marked(folder, ""), (folder / "lab.json").write_bytes(b"\xff\xfe")),
        "is not one of windfall's",
    ),
    "other JSON": (lambda folder: marked(folder, "[1]"), "is not one of windfall's"),
    "another key": (lambda folder: marked(folder, '{"lab": 1}'), "is not one of windfall's"),
    "no number": (
        lambda folder: marked(folder, '{"windfall-lab": null}'),
        "is not one of windfall's",
    ),
    "infinity": (
        lambda folder: marked(folder, '{"windfall-lab": Infinity}'),
        "is not one of windfall's",
    ),
}


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("what", NO_LABS)
def test_what_is_no_lab_is_refused_and_left_alone(what, readonly, tmp_path):
    folder = tmp_path / "folder"
    make, told = NO_LABS[what]
    make(folder)
    before = listing(tmp_path)
    with pytest.raises(SpecError, match=told) as refused:
        Lab(folder, readonly=readonly)
    assert str(folder) in str(refused.value)
    assert str(refused.value).startswith("`--lab` must be")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("is_there", [False, True])
def test_a_lab_that_is_not_there_cannot_be_read(is_there, tmp_path):
    folder = tmp_path / "folder"
    if is_there:
        folder.mkdir()
    with pytest.raises(SpecError, match=r"there is none in .*folder\. Run a study first"):
        Lab(folder, readonly=True)
    assert folder.exists() == is_there
    Lab(folder).close()
    Lab(folder, readonly=True).close()


def test_a_database_that_cannot_be_read_is_refused(lab):
    lab.close()
    (lab.folder / "lab.sqlite").write_bytes(b"garbage" * 1000)
    for readonly in (False, True):
        with pytest.raises(SpecError, match=r"must hold a readable lab\.sqlite"):
            Lab(lab.folder, readonly=readonly)
    (lab.folder / "lab.sqlite").unlink()
    with pytest.raises(SpecError, match=r"must hold a readable lab\.sqlite"):
        Lab(lab.folder, readonly=True)


@pytest.mark.parametrize("left", [[], ["lab.json.part"], ["lab.json.01234567.part"], ["lab.json"]])
def test_a_lab_whose_making_was_cut_short_is_made(left, tmp_path):
    for name in left:
        text = '{"windfall-lab":1}' if name == "lab.json" else '{"win'
        (tmp_path / name).write_text(text)
    opened = Lab(tmp_path)
    opened.finish(record(), state())
    opened.close()
    assert Lab(tmp_path, readonly=True).record(record().address) == record()


def test_several_processes_may_make_one_lab_at_once(tmp_path):
    for attempt in range(5):
        folder = tmp_path / f"lab{attempt}"

        def make(seed: int, folder: Path = folder) -> None:
            Lab(folder).finish(record(seed), state(seed))

        small.together(*(functools.partial(make, seed) for seed in range(4)))
        opened = Lab(folder, readonly=True)
        assert len(opened.matching("")) == 4
        opened.close()


@pytest.mark.parametrize(
    "name", ["with space", "ünïcödé 漢字", "per%20cent?mode=memory", "hash#mark", "semi;colon:"]
)
def test_a_lab_may_have_any_name(name, tmp_path):
    folder = tmp_path / name
    writer = Lab(folder)
    writer.finish(record(), state())
    assert Lab(folder, readonly=True).record(record().address) == record()
    assert {path.name for path in tmp_path.iterdir()} == {name}
    writer.close()


@pytest.mark.parametrize("problem", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
@pytest.mark.parametrize("call", ["mkdir", "touch", "exists", "read_bytes"])
def test_a_folder_that_cannot_be_used_is_refused(problem, call, tmp_path, monkeypatch):
    Lab(tmp_path / "lab").close()

    def refuse(*_, **__):
        raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(SpecError, match=f"a folder to write in; .*lab: {os.strerror(problem)}"):
        Lab(tmp_path / "lab")


# ---- read-only and full disks, real ones where the system lets us mount them ---------------


def mounted(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount; skip the test where that is not allowed."""
    unshare = shutil.which("unshare")
    allowed = unshare and subprocess.run(
        [unshare, "-m", "mount", "-t", "tmpfs", "none", str(tmp_path)],
        check=False,
        capture_output=True,
    )
    if not allowed or allowed.returncode:
        pytest.skip("mounting needs rights that this process lacks")
    return subprocess.run(
        [unshare, "-m", "sh", "-ec", script],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_lab_on_a_readonly_disk_is_read_and_not_written(tmp_path):
    writer = Lab(tmp_path / "lab")
    writer.finish(record(), state())
    writer.close()
    code = """
from windfall.store import Lab
from windfall.spec import SpecError
print(len(Lab("lab", readonly=True).matching("")))
try:
    Lab("lab")
except SpecError as problem:
    print(problem)
"""
    (tmp_path / "read.py").write_text(code)
    script = f"mount --bind lab lab; mount -o remount,bind,ro lab; {sys.executable} read.py"
    told = mounted(script, tmp_path)
    assert told.stdout.splitlines() == [
        "1",
        "`--lab` must be a folder to write in; lab: Read-only file system.",
    ], told.stderr


def fill(lab: Lab, most: int = 400) -> int:
    """Finish runs until there is no space; how many it were."""
    for seed in range(most):
        try:
            lab.finish(record(seed), state(seed))
        except OSError as problem:
            assert problem.errno in store.FULL
            return seed
    raise AssertionError("the disk was not full")


def check_filled(folder: Path, finished: int) -> None:
    """Every run finished before the disk was full is whole, and there is no other."""
    opened = Lab(folder)
    addresses = [record(seed).address for seed in range(finished)]
    assert opened.matching("") == sorted(addresses)
    for seed, address in enumerate(addresses):
        assert opened.record(address) == record(seed)
        assert small.is_same(
            opened.weights(address).params["hidden.weight"], state(seed).params["hidden.weight"]
        )
    assert not list(folder.rglob("*.part"))
    opened.finish(record(finished), state(finished))
    opened.close()


@pytest.mark.parametrize("bytes_", [2_000, 60_000], ids=["weights", "database"])
def test_a_lab_outlives_a_limit_on_files(bytes_, tmp_path):
    folder, told = tmp_path / "lab", tmp_path / "told"
    Lab(folder).close()

    def work() -> None:
        opened = Lab(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))
        finished = fill(opened)
        with pytest.raises(OSError):
            opened.save_checkpoint("a" * 64, state(), {"much": "x" * bytes_})
        opened.close()
        told.write_text(str(finished))

    small.together(work)
    finished = int(told.read_text())
    assert (finished > 0) == (bytes_ > 2_000)
    check_filled(folder, finished)


def test_a_lab_outlives_a_full_database(lab):
    pages = lab._database.execute("PRAGMA page_count").fetchone()[0]
    lab._database.execute(f"PRAGMA max_page_count = {pages + 4}")
    finished = fill(lab)
    assert finished > 0
    with pytest.raises(OSError, match="no space left"):
        lab.fail(digest("x"), "x" * 30_000)
    with pytest.raises(OSError, match="no space left"):
        lab.remember("study", "name", {"nodes": "x" * 30_000})
    lab.close()
    check_filled(lab.folder, finished)


@pytest.mark.slow
def test_a_lab_outlives_a_full_disk(tmp_path):
    (tmp_path / "fill.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_store import *\n"
        "lab = Lab('disk/lab')\nfinished = fill(lab)\nassert finished > 0\n"
        "lab.close()\nPath('disk/ballast').unlink()\n"
        "check_filled(Path('disk/lab'), finished)\nprint('kept', finished)\n"
    )
    script = (
        "mkdir disk; mount -t tmpfs -o size=300k none disk;"
        " head -c 100000 /dev/zero > disk/ballast;"
        f" {sys.executable} fill.py"
    )
    told = mounted(script, tmp_path)
    assert told.stdout.startswith("kept "), told.stderr


# ---- tensors of a user's own ---------------------------------------------------------------


@pytest.mark.parametrize("has_test", [False, True])
def test_tensors_in_memory_are_lent_to_another_process(has_test, lab, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 1, 3, 3), generator=draw, dtype=torch.uint8)
    labels = torch.arange(60) % 3
    test = (pixels[:9].clone(), labels[:9].clone()) if has_test else None
    given = data.tensors(pixels, labels, test, num_classes=5, name="mine")
    whole = data.load(given)
    small.together(*[lambda: lab.keep_data(given)] * 3)
    lab.keep_data(given)
    monkeypatch.setattr(data, "_HELD", {})
    lab.lend_data(given)
    lent = data.load(given)
    assert lent.sha256 == whole.sha256
    assert lent.num_classes == 5
    for part in ("train", "validation", "test"):
        assert small.is_same(getattr(lent, part).inputs, getattr(whole, part).inputs)
        assert small.is_same(getattr(lent, part).labels, getattr(whole, part).labels)


def test_data_that_any_process_can_read_is_not_kept(lab):
    lab.keep_data(data.Digits())
    lab.lend_data(data.Digits())
    assert list((lab.folder / "data").iterdir()) == []


# ---- nothing that is read runs code --------------------------------------------------------


def test_no_module_can_unpickle():
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy"}
    calls = {"torch.load", "torch.save", "torch.jit.load", "numpy.load", "np.load", "eval", "exec"}
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            assert not modules & {name.partition(".")[0] for name in imported}, path
            if isinstance(node, ast.Call) and not _reads_tensors_alone(node):
                assert ast.unparse(node.func) not in calls, f"{path}:{node.lineno}"


def _reads_tensors_alone(call):
    """`torch.load(..., weights_only=True)` builds tensors and plain tables, and refuses code."""
    told = {word.arg: ast.unparse(word.value) for word in call.keywords}
    return ast.unparse(call.func) == "torch.load" and told.get("weights_only") == "True"
