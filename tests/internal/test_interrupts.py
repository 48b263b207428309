"""Signals and the time limit end a wait once; handlers are as before afterwards."""

import os
import signal
import time

import pytest

from merge_gate._internal.interrupts import Interrupted, deferred_signals, interruptible
from tests.support.wording import Wording


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_and_a_second_one_is_ignored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interruptible(60):
        with pytest.raises(Interrupted, match=number.name):
            _wait_for(number)
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    assert signal.getsignal(number) is before


def test_the_time_limit(wording: Wording) -> None:
    with interruptible(0.06), wording.of(Interrupted) as caught:
        time.sleep(5)
    assert caught.value.signal_name == "SIGALRM"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_clears_away_is_not_interrupted_and_the_next_is() -> None:
    with deferred_signals(60) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        with pytest.raises(Interrupted, match="SIGTERM"), signals.interruptible():
            pytest.fail("it began to wait after a signal")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible(60):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def _wait_for(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)
