"""The process that trains for an executor.

It reads jobs as lines of JSON from standard input, answers on standard output with events (`ready`,
`step`, `note`, `lost`, `end`), and ends when the pipe closes.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from contextlib import redirect_stdout
from typing import Any, BinaryIO

from windfall.spec import Json, SpecError, canonical
from windfall.store import Lab
from windfall.worker import Job, Stopped, Workshop, ended

PROGRESS_SECONDS = 0.5  # between two reports of a run's step


def _listen(messages: BinaryIO, jobs: "queue.Queue[Json]", stopping: threading.Event) -> None:
    for line in messages:
        message = json.loads(line)
        if message.get("stop"):
            stopping.set()
        jobs.put(message)
    os._exit(1)  # the pipe closed: nobody is there to hear of the run, and its checkpoint stands


def _serve(lab: Lab, device: str, messages: BinaryIO, events: BinaryIO) -> None:
    jobs: queue.Queue[Json] = queue.Queue()
    stopping = threading.Event()
    threading.Thread(target=_listen, args=(messages, jobs, stopping), daemon=True).start()
    workshop = Workshop(lab, device)

    def say(event: str, **facts: Any) -> None:
        events.write(canonical({"event": event, **facts}).encode() + b"\n")
        events.flush()

    def lose(address: str, problem: Exception) -> None:
        say("lost", address=address, reason=ended(problem)[1])

    say("ready")
    while not (message := jobs.get()).get("stop"):
        told = time.monotonic()

        def pulse(step: int) -> bool:
            nonlocal told
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                say("step", step=step)
            return stopping.is_set()

        try:
            job = Job.from_json(message)
            result = workshop.perform(job, pulse, lambda text: say("note", text=text), lose)
            say("end", result=result, reason=None)
        except Stopped:
            return
        except Exception as problem:
            result, reason = ended(problem)
            if result == "failed" and not isinstance(problem, SpecError):
                traceback.print_exc(file=sys.stderr)
            say("end", result=result, reason=reason)


def main() -> None:
    """Serve jobs from standard input until it closes; arguments: the lab and the device."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the executor hears it and says stop
    # the pipes are this module's alone: what a user's code reads or prints goes elsewhere
    messages, events = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    with redirect_stdout(sys.stderr):
        _serve(Lab(sys.argv[1]), sys.argv[2], messages, events)


if __name__ == "__main__":
    main()
