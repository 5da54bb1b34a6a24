"""Hooks about time: long files first, and what took long in the end. Nothing here makes a test fail.

With two workers that take file after file, a long file that begins last keeps one of them alone. So files run in the
order of `durations.json`, the seconds that each took on two idle cores when `make test-durations` wrote it. The same
seconds are what a reader looks at when the suite gets slow.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

PAGE = Path(__file__).with_suffix(".json")
SLOW_S = 10.0
"""What a test may take without the marker `slow`."""
_UNKNOWN_S = 5.0
"""What a file that is not on the page counts as."""


def pytest_addoption(parser):
    parser.addoption("--write-durations", action="store_true", help=f"write {PAGE.name} from this run")


def pytest_collection_modifyitems(items):
    """Files by falling duration; the order within a file stays. Every worker comes to the same order."""
    seconds = json.loads(PAGE.read_text()) if PAGE.is_file() else {}
    items.sort(key=lambda item: -seconds.get(_file(item.nodeid), _UNKNOWN_S))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """Seconds by folder, the slowest tests, and those that ask for the marker `slow`."""
    took, slow = defaultdict(float), set()
    for report in _reports(terminalreporter):
        took[report.nodeid] += report.duration
        if "slow" in report.keywords:
            slow.add(report.nodeid)
    if len(took) < 2:
        return
    write = terminalreporter.write_line
    terminalreporter.section("seconds, of all workers together")
    for folder, seconds in sorted(_sums(took, _folder).items(), key=lambda one: -one[1]):
        write(f"{seconds:8.1f}  {folder}")
    write(f"{sum(took.values()):8.1f}  in all, of {len(took)} tests; the ten slowest:")
    for name, seconds in sorted(took.items(), key=lambda one: -one[1])[:10]:
        write(f"{seconds:8.1f}  {name}")
    over = sorted(name for name, seconds in took.items() if seconds > SLOW_S and name not in slow)
    if over:
        write(f"{len(over)} tests without the marker slow took more than {SLOW_S:g} s (on an idle machine?)")
    if config.getoption("--write-durations"):
        page = {file: round(seconds, 1) for file, seconds in sorted(_sums(took, _file).items())}
        PAGE.write_text(json.dumps(page, indent=1) + "\n")


def _reports(terminalreporter):
    """Every phase of every test that ran."""
    for reports in terminalreporter.stats.values():
        yield from (report for report in reports if hasattr(report, "duration") and hasattr(report, "nodeid"))


def _sums(took, key):
    sums = defaultdict(float)
    for name, seconds in took.items():
        sums[key(name)] += seconds
    return sums


def _file(nodeid):
    return nodeid.partition("::")[0]


def _folder(nodeid):
    return _file(nodeid).rpartition("/")[0]
