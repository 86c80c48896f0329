"""A process that measures: it answers each line of JSON on its standard input with one.

    python -m windfall.bench.worker JOB THREADS

A job is a module of this package; its `serve` is given `talk`, which sends an answer and returns
the next message. The process ends when the pipe closes.
"""

import importlib
import json
import os
import sys

import torch

from windfall.spec import Json

JOBS = {name: f"windfall.bench.{name}" for name in ("step", "replicas", "study", "process", "luck")}
JOBS["peaks"] = "windfall.bench.roofline"


def main() -> None:
    """Serve the job that the command line names."""
    job, threads = sys.argv[1], int(sys.argv[2])
    # the pipes are this module's alone: what libraries print goes elsewhere
    messages, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)

    def talk(answer: Json | None, /) -> Json:
        if answer is not None:
            answers.write(json.dumps(answer).encode() + b"\n")
            answers.flush()
        line = messages.readline()
        if not line:
            raise SystemExit(0)
        return json.loads(line)

    importlib.import_module(JOBS[job]).serve(talk)


if __name__ == "__main__":
    main()
