"""A cron line as systemd's calendar lines: the same moments, judged by systemd itself."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
from itertools import islice

import pytest

from llm_orchestrator.engine.schedule import times_after
from llm_orchestrator.errors import ConfigError
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.recovery.timetable import (
    default_cron,
    longest_gap_s,
    on_calendar,
    plain_cron,
)

BEGIN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
BEGIN_US = int(BEGIN.timestamp()) * MICROSECONDS
LINES = {
    "0 2 * * *": ["*-*-* 02:00:00"],
    "@hourly": ["*-*-* *:00:00"],
    "*/15 * * * *": ["*-*-* *:00/15:00"],
    "5-50/10 1,3 * * *": ["*-*-* 01,03:05..50/10:00"],
    "10/20 * * * *": ["*-*-* *:10/20:00"],
    "0 2 * * 1-5": ["Mon,Tue,Wed,Thu,Fri *-*-* 02:00:00"],
    "0 2 * * 7": ["Sun *-*-* 02:00:00"],
    "0 2 * * 5-7": ["Sun,Fri,Sat *-*-* 02:00:00"],
    "0 2 * * */2": ["Sun,Tue,Thu,Sat *-*-* 02:00:00"],
    "0 0 * jan,jul mon-wed": ["Mon,Tue,Wed *-01,07-* 00:00:00"],
    "0 3 */2 * *": ["*-*-01/2 03:00:00"],
    "0 0 1 */3 *": ["*-01/3-01 00:00:00"],
    # both days given: either of them, so two lines
    "30 4 1,15 * 5": ["*-*-01,15 04:30:00", "Fri *-*-* 04:30:00"],
    # ... but a field that begins with a star only restricts the other one
    "0 3 */2 * 2": ["Tue *-*-01/2 03:00:00"],
    "0 2 1 * */3": ["Sun,Wed,Sat *-*-01 02:00:00"],
}


def moments_of_systemd(line: str) -> list[str]:
    """The next moments of one calendar line, as systemd counts them."""
    done = subprocess.run(
        ["systemd-analyze", "calendar", "--iterations=40", f"--base-time={BEGIN:%F %T} UTC", line],
        env={"TZ": "UTC", "LC_ALL": "C", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return re.findall(r"\w{3} (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC", done.stdout)


@pytest.mark.parametrize("cron", LINES)
def test_a_cron_line_is_said_in_systemds_words(cron: str) -> None:
    assert on_calendar(cron) == LINES[cron]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
@pytest.mark.parametrize("cron", LINES)
def test_systemd_means_the_same_moments(cron: str) -> None:
    told = {moment for line in on_calendar(cron) for moment in moments_of_systemd(line)}
    planned = [
        f"{datetime.datetime.fromtimestamp(moment / MICROSECONDS, datetime.UTC):%F %T}"
        for moment in islice(times_after(plain_cron(cron), "UTC", BEGIN_US), 15)
    ]
    assert len(planned) == 15
    assert sorted(told)[:15] == planned


@pytest.mark.parametrize("cron", ["", "0 2 * *", "61 * * * *", "@often", "0 2 * * fri-mon"])
def test_what_is_no_cron_line_is_refused(cron: str) -> None:
    with pytest.raises(ConfigError):
        on_calendar(cron)


def test_without_an_archive_the_default_is_hourly_and_says_why() -> None:
    assert default_cron(has_archive=True)[0] == "0 2 * * *"
    cron, why = default_cron(has_archive=False)
    assert longest_gap_s(cron, BEGIN_US) == 3_600
    assert "archive_place" in why


def test_the_longest_time_without_a_backup_counts() -> None:
    assert longest_gap_s("0 2 * * *", BEGIN_US) == 86_400
    assert longest_gap_s("0 8,20 * * 1-5", BEGIN_US) == 60 * 3_600  # over the week-end
