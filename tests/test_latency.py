"""What forward passes take: nothing here depends on how fast the machine is."""

import itertools
import statistics

import pytest
import torch
from torch import nn

from windfall import latency
from windfall.latency import Latency


class Counted(nn.Module):
    """A network that notes who ran, on how many inputs, and in which mode."""

    def __init__(self, name, log):
        super().__init__()
        self.name, self.log, self.layer = name, log, nn.Linear(3, 2)

    def forward(self, x):
        modes = (self.training, torch.is_inference_mode_enabled(), torch.get_num_threads())
        self.log.append((self.name, len(x), modes))
        return self.layer(x)


@pytest.fixture
def clock(monkeypatch):
    """A clock on which a pass takes as long as is said."""
    now, log = [0.0], []

    def passed(name, seconds):
        network = Counted(name, log)
        network.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + seconds * 1e-3))
        return network

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(latency.time, "monotonic", lambda: now[0])
    return passed, log


def test_a_network_takes_what_its_passes_take(clock):
    passed, _ = clock
    networks = {"slow": passed("slow", 3), "fast": passed("fast", 0.5)}
    found = latency.measured(networks, (3,), (1, 4), seconds=0.1)
    assert list(found) == [1, 4]
    for each in found.values():
        assert each["slow"].median == pytest.approx(3e-3)
        assert each["fast"].median == pytest.approx(0.5e-3)
        assert len(each["slow"].rounds) == len(each["fast"].rounds)


def test_rounds_end_with_the_time_but_are_enough(clock):
    passed, _ = clock
    for seconds, least, most in ((1e-9, 11, 11), (1e9, 101, 101), (0.1, 17, 18)):
        found = latency.measured(
            {"a": passed("a", 3), "b": passed("b", 3)}, (3,), (1,), seconds=seconds
        )
        assert least <= len(found[1]["a"].rounds) <= most


def test_every_round_runs_every_network_and_the_order_turns(clock):
    passed, log = clock
    latency.measured({"a": passed("a", 3), "b": passed("b", 3)}, (3,), (5,), seconds=1e-9)
    ran = "".join(name for name, _, _ in log)
    assert ran == "aabb" + "abba" * 5 + "ab"  # first they warm up
    assert {size for _, size, _ in log} == {5}
    assert {modes for *_, modes in log} == {(False, True, 1)}


def test_fast_passes_are_timed_many_at_a_time(clock):
    passed, log = clock
    found = latency.measured({"a": passed("a", 0.5)}, (3,), (1,), seconds=1e-9)
    assert found[1]["a"].median == pytest.approx(0.5e-3)
    assert len(log) == 1 + 1 + 2 + 4 + 11 * 4


def test_the_threads_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        latency.measured({"a": nn.Linear(3, 2)}, (3,), (1,), seconds=1e-9)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_median_and_the_quartiles_of_rounds():
    found = Latency((5.0, 2.0, 3.0, 4.0, 1.0))
    assert (found.median, found.quartiles) == (3.0, (2.0, 4.0))


def rounds(*ratios):
    """Rounds of which every second one was disturbed, threefold, and those of another network."""
    disturbed = [1.0 + 2.0 * (index % 2) for index in range(len(ratios))]
    pairs = list(zip(disturbed, ratios, strict=True))
    return Latency(tuple(d * r for d, r in pairs)), Latency(tuple(d for d, _ in pairs))


@pytest.mark.parametrize(
    ("ratios", "word"),
    [
        ([0.9] * 12, "faster"),
        ([1.1] * 12, "slower"),
        ([1.0] * 12, "same"),
        ([0.9] * 9 + [1.1] * 3, "same"),  # 3 of 12 or fewer by chance: 7 %
        ([0.9] * 10 + [9.0] * 2, "faster"),  # 2 of 12 or fewer: 2 %
        ([0.9] * 2 + [1.1] * 10, "slower"),
    ],
)
def test_what_is_faster_is_so_round_by_round(ratios, word):
    one, other = rounds(*ratios)
    assert one.over(other).word == word
    assert other.over(one).word == {"faster": "slower", "slower": "faster"}.get(word, word)
    assert one.over(other).median == pytest.approx(statistics.median(ratios))


def test_an_interval_of_the_median_is_the_sign_tests():
    one, other = rounds(*range(1, 102))
    found = one.over(other)
    assert (found.low, found.median, found.high) == pytest.approx(
        (41, 51, 61)
    )  # tables of the test


def test_a_float64_network_is_given_float64():
    network = nn.Linear(3, 2).double()
    assert latency.measured({"a": network}, (3,), (2,), seconds=1e-9)[2]["a"].median > 0


def test_bytes_of_a_network():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert latency.tensor_bytes(network) == 4 * (12 + 4 + 4 * 4) + 8  # and a step counter
    assert latency.tensor_bytes(network.double()) == 8 * (12 + 4 + 4 * 4) + 8


@pytest.mark.slow
def test_bytes_of_a_forward_pass(capfd):
    def linear(*sizes):
        pairs = itertools.pairwise(sizes)
        return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairs))

    # what a layer reads and what it makes are there at once; the inputs are not counted
    assert latency.activation_bytes(linear(100, 2000), (100,), 64) == 64 * 2000 * 4
    assert latency.activation_bytes(linear(100, 2000, 300), (100,), 64) == 64 * (2000 + 300) * 4
    assert latency.activation_bytes(linear(9, 50, 40, 30), (9,), 8) == 8 * (50 + 40) * 4
    assert capfd.readouterr() == ("", "")
