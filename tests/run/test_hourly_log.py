"""A long run says every hour how far it is, and how long the rest will take at its pace."""

from __future__ import annotations

from merge_gate.run.hourly_log import EVERY_S, HourlyLog


def test_once_an_hour_with_an_estimate_of_the_rest() -> None:
    now_s = 0.0
    hourly = HourlyLog(lambda: now_s)
    now_s = 100.0
    hourly.merging_begins(500)  # taken over: that took no time
    assert not hourly.is_due
    now_s = EVERY_S + 100.0
    assert hourly.is_due
    assert (
        hourly.line(600, 1000, 3) == "after 1 h 00 min: 600 of 1,000 adapters judged, 3 failed; about 4 h 00 min left"
    )
    assert not hourly.is_due
    now_s += EVERY_S
    assert hourly.is_due
    assert "after 2 h 00 min: 900 of 1,000" in hourly.line(900, 1000, 3)


def test_where_nothing_was_judged_there_is_no_estimate() -> None:
    now_s = 0.0
    hourly = HourlyLog(lambda: now_s)
    now_s = EVERY_S
    assert hourly.line(0, 10, 0) == "after 1 h 00 min: 0 of 10 adapters judged, 0 failed"
