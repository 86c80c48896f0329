"""Exports: a run's network handed over: made smaller, proved equal, measured, written.

    found = export(lab, address, "small.onnx")
    found.files, found.document["latency"]

What is written computes what the run's network did: every file is loaded again and run on test
inputs before it gets its name. What is said of speed was measured, beside the dense network of the
same model; fewer FLOPs are not called faster where they were not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from windfall import compact, flops, formats, latency, seeds, structure, words
from windfall import masks as masking
from windfall.data import Dataset
from windfall.formats import Compute
from windfall.masks import Params
from windfall.models import UserModel, kinds
from windfall.runs import Pruned, Run
from windfall.spec import Json, SpecError
from windfall.store import Lab, Record
from windfall.train import State
from windfall.worker import Workshop, versions

NUM_INPUTS = 256  # on which each file is compared; of the test part
TOLERANCE = 1e-5  # of the largest output, or of 1: rounding of other kernels, and no more
BATCH_SIZES = (1, 64)
SECONDS = 2.0  # of measuring a batch size


@dataclass(frozen=True)
class Export:
    """What was handed over.

    Args:
        document: everything that is told of it, JSON-able, without NaN.
        files: that were written.
    """

    document: Json
    files: tuple[Path, ...]

    def to_json(self) -> Json:
        """The document that `windfall export --json` prints."""
        return self.document


@dataclass(frozen=True)
class _Subject:
    """A finished run, and all that its network needs.

    Args:
        run: what it is.
        record: what is kept of it.
        state: its final state.
        data: its data set; None where it cannot be read.
        reason: why it cannot.
        input_shape: of one input.
        num_classes: the number of classes.
    """

    run: Run
    record: Record
    state: State
    data: Dataset | None
    reason: str | None
    input_shape: tuple[int, ...]
    num_classes: int

    def build(self) -> nn.Module:
        """The whole network, as it is built; its values do not matter."""
        with seeds.isolated(self.run.seed, "build"):
            whole = self.run.model.build(self.input_shape, self.num_classes)
        return whole.to(self.run.recipe.torch_dtype).eval()

    @property
    def tensors(self) -> Params:
        """The parameters, masked, and the buffers."""
        return masking.apply(self.state.masks, self.state.params) | self.state.buffers

    def network(self) -> nn.Module:
        """The network as it was trained, masked, in evaluation mode."""
        return structure.given(self.build(), self.tensors)

    def inputs(self) -> Tensor:
        """Inputs of the test part as the network is given them; random where there is no data."""
        dtype = self.run.recipe.torch_dtype
        if self.data is None:
            shape = (NUM_INPUTS, *self.input_shape)
            return torch.from_numpy(seeds.stream(0, "export").standard_normal(shape)).to(dtype)
        return self.data.prepare(self.data.test.inputs[:NUM_INPUTS], dtype)


def export(lab: Lab, address: str, output: str | Path) -> Export:
    """Write a finished run's network, without what does nothing in it.

    Args:
        lab: where the run is; only read.
        address: of the run, whole.
        output: the file; without a suffix, one of every format that can be made.

    Raises:
        SpecError: when it cannot be; no file is left of it.
    """
    to = formats.target(output)
    subject = _subject(lab, address)
    whole = subject.build()
    original = structure.given(whole, subject.tensors)
    found = _smaller(subject, whole)
    smaller = structure.given(whole, found.tensors)
    document = _document(subject, whole, smaller, found)
    inputs = subject.inputs()
    expected = _expected(original, inputs)
    measured = _measured(whole, smaller, subject.input_shape)
    build = subject.build if isinstance(subject.run.model, UserModel) else None
    told = {**_told(subject, document), **measured}
    written = formats.write(to, smaller, document, build, _proof(inputs, expected))
    told |= {
        "files": [str(path) for path in written.files],
        "proofs": [{"format": s, **proof} for s, proof in written.proved.items()],
        "left_out": [{"format": s, "reason": why} for s, why in written.left_out.items()],
        "lab": str(lab.folder),
    }
    told["notes"] = _notes(told, found)
    return Export(told, tuple(written.files))


@dataclass(frozen=True)
class Rebuilt:
    """A finished run's network, as it was trained.

    Args:
        network: masked, in evaluation mode.
        inputs: of the validation part, as the network is given them; None where it cannot be read.
        reason: why it cannot.
        labels: of the validation part, [sample].
    """

    network: nn.Module
    inputs: Tensor | None
    reason: str | None
    labels: Tensor | None = None


def rebuilt(lab: Lab, address: str) -> Rebuilt:
    """Build the network of a finished run again; a user's own by the function that the run names.

    Args:
        lab: where the run is; only read.
        address: of the run, whole.

    Raises:
        SpecError: when it cannot be.
    """
    subject = _subject(lab, address)
    data, dtype = subject.data, subject.run.recipe.torch_dtype
    if data is None:
        return Rebuilt(subject.network(), None, subject.reason)
    inputs = data.prepare(data.validation.inputs, dtype)
    return Rebuilt(subject.network(), inputs, None, data.validation.labels)


# -- the run ---------------------------------------------------------------------------------------


def _subject(lab: Lab, address: str) -> _Subject:
    record = lab.record(address)
    assert record is not None, address
    if record.status == "diverged":
        raise SpecError(
            f"RUN must have a network that computes something; the training of {address[:12]}"
            " diverged. Lower its learning rate, or name another run."
        )
    if not lab.has_weights(address):
        raise SpecError(
            f"RUN must have its weights in the lab; those of {address[:12]} were deleted. Delete"
            " its lab and run the study again."
        )
    run, state = Run.from_json(record.spec), lab.weights(address)
    for name, tensor in (state.params | state.buffers).items():
        if not bool(torch.isfinite(tensor).all()):
            raise SpecError(
                f"RUN must have a network of finite weights; `{name}` of {address[:12]} has others."
                " Name another run."
            )
    return _Subject(run, record, state, *_surroundings(lab, run, address))


def _surroundings(
    lab: Lab, run: Run, address: str
) -> tuple[Dataset | None, str | None, tuple[int, ...], int]:
    """The run's data, or why there is none, and the shapes of its inputs and outputs."""
    try:
        data = Workshop(lab, "cpu").data(run)
        return data, None, data.input_shape, data.num_classes
    except SpecError as problem:
        plan = lab.recalled(address)
        if plan is None:
            raise
        return None, str(problem), tuple(plan["input_shape"]), plan["num_classes"]


def _smaller(subject: _Subject, whole: nn.Module) -> compact.Compacted:
    """The tensors without what masks have left without use; as they are where there are none."""
    if subject.state.masks:
        return compact.compacted(whole, subject.input_shape, subject.tensors)
    return compact.Compacted(subject.tensors, subject.state.channels)


# -- the proof -------------------------------------------------------------------------------------


def _outputs(network: Compute, inputs: Tensor) -> Tensor:
    """What a network computes of the first input alone, and of all at once."""
    with seeds.isolated(0, "export"), torch.no_grad():
        return torch.cat([network(inputs[:1]), network(inputs)])


def _expected(network: nn.Module, inputs: Tensor) -> Tensor:
    outputs = _outputs(network, inputs)
    if not bool(torch.isfinite(outputs).all()):
        raise SpecError("RUN must have a network of finite outputs; got others. Name another run.")
    return outputs


def _proof(inputs: Tensor, expected: Tensor) -> Callable[[str, Compute], Json]:
    """A proof that what a file computes is what the original does, for any number of inputs."""
    bound = TOLERANCE * max(1.0, float(expected.abs().max()))

    def prove(suffix: str, compute: Compute) -> Json:
        outputs = _outputs(compute, inputs)
        if outputs.shape != expected.shape or outputs.dtype != expected.dtype:
            raise SpecError(
                f"The {suffix} file must give what the run's network does, {expected.dtype}"
                f" {list(expected.shape)}; got {outputs.dtype} {list(outputs.shape)}."
            )
        difference = float((outputs - expected).abs().max())
        if not difference <= bound:  # NaN is not
            raise SpecError(
                f"The {suffix} file must give what the run's network does within {bound:.2g}; got a"
                f" difference of {difference:.2g}. Nothing was written; use another format."
            )
        return {"difference": difference, "tolerance": bound, "num_inputs": len(inputs)}

    return prove


# -- what is told ----------------------------------------------------------------------------------


def _document(
    subject: _Subject, whole: nn.Module, smaller: nn.Module, found: compact.Compacted
) -> Json:
    """What the JSON beside the weights says: enough to build the network again."""
    data, run = subject.data, subject.run
    last = subject.record.evaluations[-1]
    prepared = data and {
        "peak": data.peak,
        "mean": [float(mean) for mean in data.mean],
        "std": [float(std) for std in data.std],
    }
    return {
        "address": subject.record.address,
        "model": run.model.to_json(addressed=False),
        "input_shape": list(subject.input_shape),
        "num_classes": subject.num_classes,
        "dtype": run.recipe.dtype,
        "inputs": prepared,
        "channels": {
            name: {"before": len(stay), "kept": stay.nonzero().flatten().tolist()}
            for name, stay in found.channels.items()
        },
        "weights": _counts(subject, whole, smaller),
        "accuracy": {"validation": last.validation_accuracy, "test": last.test_accuracy},
        "run": subject.record.spec,
        "versions": {"trained": subject.record.versions, "exported": versions()},
    }


def _counts(subject: _Subject, whole: nn.Module, smaller: nn.Module) -> Json:
    """Numbers of prunable weights: of the dense network, in the file, and of those not 0."""
    names = kinds(whole, subject.input_shape)
    own = dict(smaller.named_parameters())
    return {
        "before": sum(p.numel() for name, p in whole.named_parameters() if name in names),
        "after": sum(own[name].numel() for name in names),
        "nonzero": sum(int(own[name].count_nonzero()) for name in names),
    }


def _told(subject: _Subject, document: Json) -> Json:
    run = subject.run
    model = run.model.callable if isinstance(run.model, UserModel) else document["model"]["kind"]
    return {
        "run": {
            "address": document["address"],
            "model": model,
            "level": run.start.level if isinstance(run.start, Pruned) else 0,
            "seed": run.seed,
            "accuracy": document["accuracy"],
        },
        "channels": [
            {"group": name, "before": each["before"], "after": len(each["kept"])}
            for name, each in document["channels"].items()
        ],
        "weights": document["weights"],
        "inputs": {
            "from": f"test part of {run.data.to_json()['kind']}" if subject.data else "random",
            "reason": subject.reason,
        },
    }


def _measured(before: nn.Module, after: nn.Module, shape: tuple[int, ...]) -> Json:
    """FLOPs, bytes and seconds of a forward pass, of the dense network and of the one written."""
    networks = {"before": before, "after": after}
    costs = {name: flops.multiply_adds(each, shape) for name, each in networks.items()}
    used = {n: p != 0 for n, p in after.named_parameters() if n in costs["after"]}
    nonzero = flops.masked_multiply_adds(costs["after"], used)
    times = latency.measured(networks, shape, BATCH_SIZES, seconds=SECONDS)
    return {
        "flops": {
            **{name: 2 * sum(each.values()) for name, each in costs.items()},
            "nonzero": 2 * sum(nonzero.values()),
        },
        "latency": [latency.compared(size, *each.values()) for size, each in times.items()],
        "threads": 1,
        "memory": {
            "tensors": {name: latency.tensor_bytes(each) for name, each in networks.items()},
            "activations": [
                {"batch_size": size}
                | {n: latency.activation_bytes(each, shape, size) for n, each in networks.items()}
                for size in BATCH_SIZES
            ],
        },
    }


def _notes(told: Json, found: compact.Compacted) -> list[str]:
    notes = [f"{row['format']} was not made: {row['reason']}." for row in told["left_out"]]
    if told["inputs"]["reason"] is not None:
        notes.append(
            "The files were compared on random inputs, standard normal, for the run's data cannot"
            f" be read: {told['inputs']['reason']}"
        )
    if found.reason is not None:
        notes.append(f"The network is exported at full size: {found.reason}")
    return notes if found.reason else notes + _slow(told)


def _slow(told: Json) -> list[str]:
    """What is to be said where fewer FLOPs did not make it faster."""
    cost = told["flops"]
    if cost["after"] == cost["before"]:
        if cost["nonzero"] == cost["before"]:
            return []
        return [
            "No channel is without use, so the network keeps its size and its time:"
            f" {words.percent(cost['nonzero'] / cost['before'])} of the FLOPs are not of zeros, but"
            " dense kernels multiply the zeros too."
        ]
    return [
        f"At a batch of {row['batch_size']} it is not faster, although it has"
        f" {words.percent(cost['after'] / cost['before'])} of the FLOPs: {_compared(row)}."
        for row in told["latency"]
        if row["after_is"] != "faster"
    ]


def _compared(row: Json) -> str:
    before, after = (f"{1e3 * row[name]['median']:.3g} ms" for name in ("before", "after"))
    low, high = row["ratio"]["interval"]
    why = ", no more than rounds differ" if row["after_is"] == "same" else ""
    return f"{after} against {before}, {row['ratio']['median']:.3f} [{low:.3f}, {high:.3f}]{why}"
