import errno
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
from typer.testing import CliRunner

from windfall import cli, data, states, worker
from windfall import execute as executor
from windfall.execute import Interrupted, execute
from windfall.schedule import Outcome, Progress
from windfall.spec import SpecError
from windfall.store import Lab

# A network and data that do, in a worker, what files in the folder TROUBLES say, a file a time.
TROUBLED = """
import os, signal, subprocess, sys
from pathlib import Path
import torch
from torch import nn

def trouble(place):
    if os.getpid() == int(os.environ["CALLER"]):
        return
    for file in sorted(Path(os.environ["TROUBLES"]).glob(f"{place}-*")):
        file.unlink()
        what = file.name.split("-")[2]
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "exit":
            sys.exit(3)
        if what == "raise":
            raise ValueError("bad luck, 漢字 ü")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.output, self.steps = nn.Linear(64, 12), nn.Linear(12, 10), 0

    def forward(self, inputs):
        self.steps += self.training
        if self.training and self.steps == 25:
            trouble("net")
        return self.output(self.hidden(inputs.flatten(1)).relu())

def digits():
    from sklearn.datasets import load_digits
    trouble("data")
    return torch.from_numpy(load_digits().images[:500, None]).float(), load_digits().target[:500]

class Noisy(Net):
    def forward(self, inputs):
        if os.getpid() != int(os.environ["CALLER"]):
            print('{"event": "end"}')
            print("from Python", file=sys.__stdout__)
            os.write(1, b"from the system\\n")
            if self.training and self.steps == 25:
                subprocess.run(["echo", "from a child"])
                assert sys.stdin.read() == ""
                assert os.read(0, 9) == b""
        return super().forward(inputs)
"""
ONE_LEVEL = {"levels": 1, "arms": ["ticket", "reinit"]}  # 6 runs of two seeds


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("library")
    (folder / "troubled.py").write_text(TROUBLED, encoding="utf-8")
    (folder / "troubles").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("CALLER", str(os.getpid()))
        patch.setenv("TROUBLES", str(folder / "troubles"))
        yield folder


@pytest.fixture
def troubles(library):
    """Lay out what is to happen, in this order; and see that it has all happened."""
    folder = library / "troubles"

    def lay(*names: str) -> None:
        for index, name in enumerate(names):
            place, what = name.split("-")
            (folder / f"{place}-{index}-{what}").touch()

    yield lay
    left = sorted(path.name for path in folder.iterdir())
    for name in left:
        (folder / name).unlink()
    assert left == []


@pytest.fixture(scope="module")
def untroubled(library, tmp_path_factory):
    """The graph of the network that can be troubled, and its contents when it is not."""
    of = small.graph(model="troubled:Net", **ONE_LEVEL)
    folder = tmp_path_factory.mktemp("untroubled") / "lab"
    small.trained(of, folder).close()
    return of, small.contents(folder)


def here(**changes: object):
    from troubled import Net

    return small.graph(model=lambda: Net(), **ONE_LEVEL | changes)


# ---- every run once, parents first, the same bits however many workers ---------------------


@pytest.mark.slow
def test_every_run_is_trained_once_and_after_its_parent(lab, tmp_path, monkeypatch):
    of = small.graph()
    small.trained(of, tmp_path / "here").close()
    seen: list[tuple[int, int]] = []

    def watch(progress: Progress) -> None:
        seen.append((progress.finished, progress.worked))

    assert execute(of, lab, workers=2, watch=watch) == Outcome(reused=0, trained=14)
    assert seen == sorted(seen)
    assert seen[-1] == (14, sum(run.clock[1] - run.clock[0] for run in of.runs.values()))
    order = list(small.rows(lab.folder))
    assert sorted(order) == sorted(of.runs)
    for child, run in of.runs.items():
        assert run.parent is None or order.index(run.parent) < order.index(child)
    assert small.contents(lab.folder) == small.contents(tmp_path / "here")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("no process is needed")

    rows = small.rows(lab.folder)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert execute(of, lab) == Outcome(reused=14, trained=0)
    assert small.rows(lab.folder) == rows


@pytest.mark.slow
def test_studies_share_their_runs_and_add_the_snapshots_they_need(lab, tmp_path):
    rewind = {"kind": "rewind", "to": {"kind": "to-step", "step": 20}}
    first, second = small.graph(**ONE_LEVEL), small.graph(levels=1, arms=["ticket", rewind])
    small.train(first, lab)
    before = small.rows(lab.folder)
    assert execute(second, lab, workers=1) == Outcome(reused=4, trained=2)  # dense and ticket
    after = small.rows(lab.folder)
    assert after.keys() == before.keys() | second.runs.keys()
    replayed = {address for address, steps in second.keep.items() if steps}
    assert len(replayed) == 2
    assert all(after[address] == before[address] for address in before.keys() - replayed)
    small.trained(second, tmp_path / "here").close()
    found, expected = small.contents(lab.folder), small.contents(tmp_path / "here")
    assert {address: found[address] for address in expected} == expected


@pytest.mark.slow
def test_tensors_in_memory_reach_the_workers(lab, tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    given = data.tensors(digits.images[:, None] / 16, digits.target, name="ours")
    of = small.graph(data=given, num_seeds=1, **ONE_LEVEL)
    assert execute(of, lab, workers=1) == Outcome(reused=0, trained=3)
    small.trained(of, tmp_path / "here").close()
    assert small.contents(lab.folder) == small.contents(tmp_path / "here")


@pytest.mark.usefixtures("library")
def test_a_run_that_another_process_finished_counts_as_reused(lab):
    of = here(num_seeds=1)
    first = small.jobs(of)[0]

    def watch(progress: Progress) -> None:
        if not progress.worked and lab.record(first.address) is None:
            other = Lab(lab.folder)
            worker.Workshop(other, "cpu").perform(first)
            other.close()

    assert execute(of, lab, watch=watch) == Outcome(reused=1, trained=2)


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_must_be_one_or_more(workers, lab):
    with pytest.raises(SpecError, match="`--workers` must be at least 1"):
        execute(small.graph(), lab, workers=workers)


# ---- workers that die, code that fails -----------------------------------------------------


@pytest.mark.slow
def test_a_worker_that_dies_costs_one_retry(untroubled, troubles, lab):
    of, expected = untroubled
    messages: list[str | None] = []
    troubles("net-kill")
    outcome = execute(of, lab, workers=1, watch=lambda progress: messages.append(progress.message))
    assert outcome == Outcome(reused=0, trained=6)
    (message,) = filter(None, messages)
    assert message.endswith(
        ": its worker was killed by SIGKILL, perhaps for want of memory; it is tried once more"
    )
    assert small.contents(lab.folder) == expected
    assert lab.failures(of.runs) == {}


@pytest.mark.slow
def test_a_run_whose_worker_dies_twice_has_failed(untroubled, troubles, tmp_path, monkeypatch):
    of, expected = untroubled
    text = small.TOML.format(num_seeds=2, levels=1, steps=60, eval_every=20)
    text = text.replace('{ kind = "mlp", hidden = [16, 8] }', '"troubled:Net"')
    (tmp_path / "study.toml").write_text(text.replace(', "finetune"', ""))
    line = ["run", str(tmp_path / "study.toml"), "--lab", str(tmp_path / "lab"), "--json"]
    monkeypatch.chdir(tmp_path)
    troubles("net-kill", "net-exit")
    ended = CliRunner().invoke(cli.app, [*line, "--workers", "1"])
    assert ended.exit_code == 1, (ended.exception, ended.stderr)
    assert "killed by SIGKILL, perhaps for want of memory; it is tried once more" in ended.stderr
    document = json.loads(ended.stdout)
    assert document["runs"] == {"total": 6, "reused": 0, "trained": 3, "failed": 3, "diverged": 0}

    failures = {(f["arm"], f["level"], f["seed"]): f["reason"] for f in document["failures"]}
    reason = "its worker ended with exit code 3"
    root = failures["dense", 0, 0]
    assert root == reason
    dense = next(f["address"] for f in document["failures"] if f["arm"] == "dense")
    for arm in ("ticket", "reinit"):
        assert failures[arm, 1, 0] == f"its parent {dense[:12]} failed: {reason}"
    assert len(failures) == 3
    for row in document["arms"]:
        assert row["mean"] is row["interval"] is None
        values = {run["seed"]: run["value"] for run in row["runs"]}
        assert values[0] is None
        assert values[1] is not None
    assert {row["verdict"] for row in document["verdicts"]} == {"undecided"}
    for row in document["verdicts"]:
        assert row["difference"] is row["interval"] is row["p_adjusted"] is None

    lab = Lab(tmp_path / "lab")
    small.train(of, lab)  # no trouble: what had failed is tried anew
    lab.close()
    ended = CliRunner().invoke(cli.app, line)
    assert ended.exit_code == 0, (ended.exception, ended.stderr)
    document = json.loads(ended.stdout)
    assert document["runs"] == {"total": 6, "reused": 6, "trained": 0, "failed": 0, "diverged": 0}
    assert document["failures"] == []
    assert all(row["difference"] is not None for row in document["verdicts"])
    assert small.contents(tmp_path / "lab") == expected


@pytest.mark.slow
def test_an_exception_in_a_users_code_fails_its_run_alone(library, troubles, lab, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")  # of a machine that is set up otherwise
    own = {"kind": "user-data", "callable": "troubled:digits", "num_validation": 50}
    of = small.graph(model="troubled:Net", data=own, num_seeds=3, **ONE_LEVEL)
    troubles("data-raise", "net-raise")  # the first run fails by its data, the second in training
    outcome = execute(of, lab, workers=1)
    assert (outcome.reused, outcome.trained, len(outcome.failures)) == (0, 3, 6)
    roots = [address for address in outcome.failures if of.runs[address].parent is None]
    assert len(roots) == 2
    for address, reason in outcome.failures.items():
        assert "ValueError: bad luck, 漢字 ü" in reason
        if address not in roots:
            parent = of.runs[address].parent
            assert reason == f"its parent {parent[:12]} failed: {outcome.failures[parent]}"
    assert lab.failures(of.runs) == outcome.failures
    assert len(lab.records(of.runs)) == 3


@pytest.mark.slow
def test_what_a_users_code_prints_or_reads_is_not_the_workers_business(library, lab, capfd):
    of = small.graph(model="troubled:Noisy", num_seeds=1, **ONE_LEVEL)
    assert execute(of, lab, workers=1) == Outcome(reused=0, trained=3)
    told = capfd.readouterr()
    assert told.out == ""
    for line in ('{"event": "end"}', "from Python", "from the system", "from a child"):
        assert line in told.err
    assert "Warning" not in told.err


def test_a_worker_that_died_before_it_was_sent_a_job_is_buried(lab):
    hired = executor._Worker(lab, "cpu")
    hired.process.kill()
    hired.process.wait()
    for _ in range(3):
        hired.send({"run": "x" * 100_000})
    assert hired.end() == "its worker was killed by SIGKILL, perhaps for want of memory"


@pytest.mark.slow
def test_a_worker_leaves_ctrl_c_to_its_executor(lab, capfd):
    hired, events = executor._Worker(lab, "cpu"), []
    for _ in range(20):  # from its first moments to the end of its imports
        hired.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    small.until(lambda: events.extend(hired.heard() or ()) or events, "the worker is ready")
    hired.process.send_signal(signal.SIGINT)
    hired.send({"stop": True})
    assert hired.end() == "its worker ended with exit code 0"
    assert events == [{"event": "ready"}]
    assert capfd.readouterr().err == ""


# ---- in this process: networks that cannot be imported by name -----------------------------


@pytest.mark.usefixtures("library")
def test_a_network_of_a_notebook_trains_in_this_process_and_says_so(lab, monkeypatch):
    of, messages = here(num_seeds=1), []
    monkeypatch.setattr(subprocess, "Popen", None)
    told = execute(of, lab, workers=8, watch=lambda progress: messages.append(progress.message))
    assert told == Outcome(reused=0, trained=3)
    (message,) = filter(None, messages)
    assert message == ("the network cannot be imported by name: it trains in this process alone")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_this_process_and_a_checkpoint_continues(number, lab, tmp_path):
    of = here()
    small.trained(of, tmp_path / "unbroken").close()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for last in (30, 75, 70, 95):  # of what is left to do

        def watch(progress: Progress, last: int = last) -> None:
            if progress.worked >= last:
                os.kill(os.getpid(), number)

        before = small.rows(lab.folder)
        with pytest.raises(Interrupted):
            execute(of, lab, watch=watch)
        after = small.rows(lab.folder)
        assert {address: after[address] for address in before} == before
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert list((lab.folder / "checkpoints").iterdir())
    execute(of, lab)
    assert small.contents(lab.folder) == small.contents(tmp_path / "unbroken")


@pytest.mark.usefixtures("library")
def test_ctrl_c_stops_the_wait_for_another_process(lab):
    of, calls = here(num_seeds=1), []

    def watch(progress: Progress) -> None:
        calls.append(progress.worked)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with Lab(lab.folder).locked(next(iter(of.runs))), pytest.raises(Interrupted):
        execute(of, lab, watch=watch)
    assert calls[-1] == 0


@pytest.mark.usefixtures("library")
def test_a_failure_in_this_process_is_a_result_too(lab, monkeypatch):
    of, real, calls = here(), worker.Workshop.perform, itertools.count()

    def perform(self: worker.Workshop, *arguments: object) -> str:
        if next(calls) == 0:
            raise ValueError("bad luck")
        return real(self, *arguments)

    monkeypatch.setattr(worker.Workshop, "perform", perform)
    outcome = execute(of, lab)
    assert (outcome.trained, len(outcome.failures)) == (3, 3)
    assert "ValueError: bad luck" in outcome.failures.values()
    assert lab.failures(of.runs) == outcome.failures


@pytest.mark.usefixtures("library")
def test_a_full_disk_ends_the_study_and_keeps_what_was_finished(lab, tmp_path, monkeypatch):
    of, real, calls = here(), states.write_whole, itertools.count()
    small.trained(of, tmp_path / "unbroken").close()

    def write(path: Path, content: bytes) -> None:
        if next(calls) >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(states, "write_whole", write)
        with pytest.raises(
            OSError, match=r"no space is left in .*; 4 runs are not trained"
        ) as full:
            execute(of, lab)
    assert full.value.errno == errno.ENOSPC
    before, again = small.rows(lab.folder), Lab(lab.folder)
    assert len(before) == 2
    assert set(again.failures(of.runs)) == set(of.runs) - set(before)
    assert execute(of, again) == Outcome(reused=2, trained=4)
    assert small.contents(lab.folder) == small.contents(tmp_path / "unbroken")
    assert again.failures(of.runs) == {}
    again.close()


# ---- the whole program ---------------------------------------------------------------------

LONG = """
name = "long"
num_seeds = 2
model = { kind = "mlp", hidden = [16, 8] }
data = "digits"
arms = ["dense"]
levels = 1
engine = "separate"  # takes seconds: there is something to stop
recipe = { optimizer = "adam", steps = 5000, batch_size = 32, eval_every = 2500 }
"""


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A study of two runs of seconds each, and its contents when it is never stopped."""
    recipe = {"steps": 5000, "eval_every": 2500, "learning_rate": 0.1}
    of = small.graph(recipe, name="long", arms=["dense"], levels=1, engine="separate")
    folder = tmp_path_factory.mktemp("long") / "lab"
    small.trained(of, folder).close()
    return of, small.contents(folder)


def begun(folder: Path, moment: str) -> subprocess.Popen[str]:
    """The long study as a process, `windfall run`, and when it has got to a moment."""
    (folder / "long.toml").write_text(LONG)
    process = small.start(small.command("run", "long.toml", "--lab", "lab", "--workers", 2), folder)
    small.until(lambda: len(small.children(process.pid)) == 2, "two workers are hired")
    if moment == "training":
        small.until(lambda: len(small.held(folder / "lab")) == 2, "two runs are in training")
        time.sleep(0.4)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "moment"), [("process", "training"), ("group", "training"), ("group", "importing")]
)
def test_ctrl_c_stops_a_study_that_continues_bit_for_bit(whom, moment, long, tmp_path):
    process = begun(tmp_path, moment)
    workers, clock = small.children(process.pid), time.monotonic()
    (os.killpg if whom == "group" else os.kill)(process.pid, signal.SIGINT)
    out, told = process.communicate(timeout=300)
    assert process.returncode == 130
    assert time.monotonic() - clock < executor.GRACE_SECONDS
    assert out == ""
    assert told.splitlines()[-1] == "windfall: stopped; everything finished so far is kept."
    assert "Traceback" not in told
    assert not any(map(small.is_running, workers))

    of, expected = long
    lab = Lab(tmp_path / "lab")
    assert small.held(lab.folder) == []
    for job in small.jobs(of):
        paused = lab.checkpoint(job.address)
        assert (paused is None) == (moment == "importing")
        steps: list[int] = []
        if moment == "training":
            result = worker.Workshop(lab, "cpu").perform(
                job, lambda step, to=steps: to.append(step)
            )
            assert result == "trained"
            assert steps[0] == paused[0].step
    if moment == "training":
        assert small.contents(lab.folder) == expected
    lab.close()


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    process = begun(tmp_path, "training")
    workers = small.children(process.pid)
    process.kill()
    process.communicate()
    clock = time.monotonic()
    small.until(lambda: not any(map(small.is_running, workers)), "the workers have ended", 20)
    assert time.monotonic() - clock < 10
    lab = Lab(tmp_path / "lab")
    for address in small.held(lab.folder):
        with lab.locked(address) as held:
            assert held
    lab.close()


@pytest.mark.slow
def test_two_processes_share_one_lab(tmp_path):
    text = small.TOML.format(num_seeds=2, levels=2, steps=400, eval_every=200)
    (tmp_path / "small.toml").write_text(text)
    line = small.command("run", "small.toml", "--lab", "lab", "--workers", 1, "--json")
    processes = [small.start(line, tmp_path) for _ in range(2)]
    told = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    documents = [json.loads(out) for out, _ in told]
    counts = [document["runs"] for document in documents]
    assert sum(count["trained"] for count in counts) == counts[0]["total"] == 14
    for count in counts:
        assert count["reused"] + count["trained"] == count["total"]
        assert count["failed"] == 0
    for part in ("study", "arms", "verdicts", "comparisons", "winner"):
        assert documents[0][part] == documents[1][part]
    rows = small.rows(tmp_path / "lab")
    assert sorted(row[0] for row in rows.values()) == list(range(1, 15))  # no row was replaced
    small.trained(small.graph({"steps": 400, "eval_every": 200}), tmp_path / "here").close()
    assert small.contents(tmp_path / "lab") == small.contents(tmp_path / "here")


SCRIPT = """
import json, sys
import windfall
from net import make
from torch import nn

common = dict(
    data="digits", num_seeds=1, levels=1, arms=["ticket"],
    recipe=dict(optimizer="adam", steps=20, eval_every=10),
)
def here():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

first = windfall.run(windfall.Study(model=make, **common), lab=sys.argv[1], workers=2)
second = windfall.run(windfall.Study(model=here, **common), lab=sys.argv[1], workers=2)
print(json.dumps([first.to_json(), second.to_json()]))
"""


@pytest.mark.slow
def test_a_plain_script_runs_a_study_in_a_lab_of_any_name(tmp_path):
    scripts, elsewhere = tmp_path / "my scripts", tmp_path / "elsewhere"
    scripts.mkdir(), elsewhere.mkdir()
    (scripts / "script.py").write_text(SCRIPT)
    (scripts / "net.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    lab = tmp_path / "läb 漢字 #1?%20"
    line = [sys.executable, "-W", "error", str(scripts / "script.py"), str(lab)]
    process = small.start(line, elsewhere)
    out, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    assert [document["runs"]["trained"] for document in json.loads(out)] == [2, 2]
    assert told.count("cannot be imported by name: it trains in this process alone") == 1
    assert len(small.rows(lab)) == 4
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
def test_a_study_on_a_full_disk_exits_with_1_and_can_go_on(tmp_path):
    text = small.TOML.format(num_seeds=2, levels=2, steps=60, eval_every=20)
    (tmp_path / "small.toml").write_text(text)
    of = small.graph()
    small.trained(of, tmp_path / "here").close()
    size = (tmp_path / "here" / "lab.sqlite").stat().st_size
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    line = small.command("run", "small.toml", "--lab", "lab", "--workers", 1, before=limit)
    process = small.start(line, tmp_path)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 1, told
    assert "windfall: no space is left" in told
    assert "Finished runs are kept." in told
    assert "Traceback" not in told
    rows = small.rows(tmp_path / "lab")
    assert 0 < len(rows) < 14
    lab = Lab(tmp_path / "lab")
    for address in rows:
        assert lab.weights(address).step == of.runs[address].clock[1]
    assert not list((tmp_path / "lab").rglob("*.part"))
    small.train(of, lab)
    assert small.contents(tmp_path / "lab") == small.contents(tmp_path / "here")
    after = small.rows(tmp_path / "lab")
    assert {address: after[address] for address in rows} == rows
    lab.close()
