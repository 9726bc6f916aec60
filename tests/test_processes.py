"""One process alone, how the work is shared out among several, and signals that wait until they are asked for."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart import processes
from headstart.processes import Signals, World, find_world, join, leave, speaks_first

bounded = settings(max_examples=60, deadline=None)

BOTH = [signal.SIGINT, signal.SIGTERM]
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


# The world


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ((None, None, None), World()),
        (("0", "1", "0"), World()),
        (("3", "1", "3"), World()),  # left over from elsewhere: one process is the first
        (("0", "4", "0"), World(0, 4, 0)),
        (("5", "8", "1"), World(5, 8, 1)),
    ],
)
def test_the_place_of_a_process_is_what_torchrun_says(monkeypatch, place, expected):
    for name, value in zip(PLACE, place, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert find_world() == expected


def test_the_first_process_is_the_one_that_writes():
    assert World().first and World(0, 4, 0).first
    assert not World(1, 4, 1).first and not World(4, 8, 0).first  # the first of another machine


@bounded
@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_are_of_like_size_and_everything_is_in_exactly_one(count, size):
    items = [f"item {number}" for number in range(count)]
    shares = [World(rank, size, rank).share(items) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == sorted(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for share in shares:
        assert [*share] == [item for item in items if item in share]  # in order


def test_a_process_alone_says_sums_and_waits_by_itself():
    import torch

    world, values = World(), torch.tensor([1.5, -2.0])
    assert world.share([1, 2, 3]) == [1, 2, 3]
    assert world.sum(values) is values and world.most(values) is values
    assert values.tolist() == [1.5, -2.0]
    told = {"folder": ["a"]}
    assert world.tell(told) is told
    world.copy([values])
    assert values.tolist() == [1.5, -2.0]
    world.wait()


def test_a_process_alone_connects_with_nobody():
    import torch
    from torch import distributed

    join(World(), torch.device("cpu"))
    assert not distributed.is_initialized()
    leave()


def test_without_a_connection_the_first_process_speaks_at_once_and_others_after_a_while(monkeypatch):
    waits = []
    monkeypatch.setattr(processes.time, "sleep", waits.append)
    assert [speaks_first(rank) for rank in range(3)] == [True, True, True]
    assert waits == 2 * [processes.GRACE_SECONDS]


def test_who_speaks_of_a_mistake_that_is_found_at_once_is_known_without_importing_torch():
    code = "import sys; from headstart import processes; processes.speaks_first(0); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Signals


@pytest.fixture
def acted():
    """The signals that have acted: both are handled by writing them here, until the test ends."""
    seen = []
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in BOTH}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    return [signal.getsignal(number) for number in BOTH]


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_noted_and_acts_when_it_is_raised_again(acted, number):
    with Signals() as signals:
        assert signals.came is None
        signal.raise_signal(number)
        assert signals.came == number and acted == []
        signals.raise_again()
        assert acted == [number]
    assert acted == [number]


@pytest.mark.parametrize("second", BOTH)
@pytest.mark.parametrize("first", BOTH)
def test_a_second_signal_acts_at_once(acted, first, second):
    with Signals() as signals:
        signal.raise_signal(first)
        signal.raise_signal(second)
        assert acted == [second] and signals.came == first
        signals.raise_again()
    assert acted == [second, first]


@pytest.mark.parametrize("second", BOTH)
@pytest.mark.parametrize("first", BOTH)
def test_patience_passes_over_later_signals_until_the_first_is_raised_again(acted, first, second):
    with Signals(patient=True) as signals:
        signal.raise_signal(first)
        signal.raise_signal(second)
        signal.raise_signal(first)
        assert acted == [] and signals.came == first
        signals.raise_again()
        assert acted == [first]
        signal.raise_signal(second)  # from here on all is as it was before
    assert acted == [first, second]


def test_a_noted_signal_that_is_not_raised_again_is_gone(acted):
    with Signals():
        signal.raise_signal(signal.SIGTERM)
    assert acted == []


def test_an_interrupt_is_the_usual_one_when_it_is_raised_again():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signals.raise_again()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("raised", [[], [signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
def test_handlers_are_what_they_were_afterwards(acted, raised):
    before = handlers()
    with Signals() as signals:
        assert all(now != then for now, then in zip(handlers(), before, strict=True))
        for number in raised:
            signal.raise_signal(number)
    assert handlers() == before
    signals.raise_again()
    assert handlers() == before


def test_handlers_are_what_they_were_after_an_error(acted):
    before = handlers()
    with pytest.raises(ValueError), Signals():
        raise ValueError
    assert handlers() == before


def test_where_no_signal_has_come_raising_again_does_nothing_and_later_ones_are_noted(acted):
    with Signals() as signals:
        for _ in range(3):
            signals.raise_again()
        assert acted == []
        signal.raise_signal(signal.SIGTERM)
        assert acted == [] and signals.came == signal.SIGTERM
        signals.raise_again()
    assert acted == [signal.SIGTERM]


def test_a_signal_that_is_ignored_stays_ignored(acted):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.came is None
        signal.raise_signal(signal.SIGTERM)
        assert signals.came == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_in_another_thread_nothing_happens(acted):
    before, failures, entered, go_on = handlers(), [], threading.Event(), threading.Event()

    def work():
        try:
            with Signals() as signals:
                entered.set()
                go_on.wait(5)
                signals.raise_again()
                assert signals.came is None
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(5)
    during = handlers()
    signal.raise_signal(signal.SIGTERM)
    go_on.set()
    thread.join(5)
    assert during == handlers() == before and acted == [signal.SIGTERM] and not failures


ENDS = """
import signal
from headstart.processes import Signals

with Signals() as signals:
    signal.raise_signal({number})
    print("going on", flush=True)
    signals.raise_again()
    print("still here", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="processes end otherwise there")
def test_a_termination_ends_the_process_as_if_it_had_never_been_noted():
    code = ENDS.format(number=int(signal.SIGTERM))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "going on\n" and done.returncode == -signal.SIGTERM and done.stderr == ""
