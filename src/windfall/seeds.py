"""Named random streams: everything random in Windfall is drawn from one.

A stream is named by a seed, a purpose and, where there are many, indices: `stream(3, "order", 0)`
is the first permutation of the data that every arm of seed 3 sees. Streams of different names are
independent, and drawing from one never moves another, so two runs that share a name share its draws
on every engine and device. With a stream of its own per epoch or step there is no state to save:
resuming at a step needs nothing but the step.
"""

import contextlib
import hashlib
import random
from collections.abc import Callable, Generator

import numpy as np
import torch


def key(seed: int, purpose: str, *indices: int) -> int:
    """A 128-bit key, SHA-256 of the name, for the stream of this name."""
    assert "/" not in purpose, purpose  # it separates the parts: no two names share a text
    name = "/".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")


def stream(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """The random stream of this name, at its beginning.

    Args:
        seed: the run's seed (or the split's), at least 0.
        purpose: what is drawn: `init`, `reinit`, `order`, `augment`, `prune`, `split`, ...
        *indices: which of many, e.g. the epoch.

    Example:
        >>> stream(0, "order", 1).permutation(5).tolist()
        [2, 0, 1, 3, 4]
    """
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *indices)))


@contextlib.contextmanager
def isolated(seed: int, purpose: str) -> Generator[Callable[[int], None]]:
    """Run code that can only draw from global generators: fork, seed and restore them.

    Inside, torch's, numpy's and Python's global generators are at the beginning of the named
    stream; outside, nothing has changed. Yields a function that moves torch's generators to the
    stream's index, for the draws of a training step.
    """
    python, numeric, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def reseed(index: int) -> None:
        low = key(seed, purpose, index) & 0xFFFF_FFFF
        torch.default_generator.manual_seed(low)
        if cuda:
            torch.cuda.manual_seed_all(low)

    try:
        low = key(seed, purpose) & 0xFFFF_FFFF
        random.seed(low)
        np.random.seed(low)
        torch.default_generator.manual_seed(low)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(low)
        yield reseed
    finally:
        random.setstate(python)
        np.random.set_state(numeric)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def generators() -> object:
    """Where the global generators of Python, numpy and torch stand: to see whether code drew."""
    state = np.random.get_state(legacy=False)["state"]
    numeric = {name: np.asarray(value).tobytes() for name, value in state.items()}
    return random.getstate(), numeric, torch.get_rng_state().numpy().tobytes()
