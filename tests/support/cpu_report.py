"""``pytest --cpu-report``: the CPU time of each test, as far as it is its own.

CPU time, unlike the time on the clock, hardly depends on what else the machine does. A test's is that of its process
and of the processes that it started and waited for, in setup, call and teardown; a fixture counts for the test that
first asks for it, and what a whole module needs once (imports, collection) for no test.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

LIMIT = 5.0  # CPU-seconds: no quick test should take longer
_NAME = "cpu seconds"


def used() -> float:
    """CPU-seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class CpuReport:
    """Measures in the process that runs a test, prints in the one that was started."""

    def __init__(self) -> None:
        self.tests: dict[str, float] = {}
        self.processes = 0.0

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> object:
        self._began = used()
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> None:
        now = used()
        item.user_properties.append((_NAME, now - self._began))
        self._began = now

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":  # it lists what setup and call appended
            self.tests[report.nodeid] = sum(v for name, v in report.user_properties if name == _NAME)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[_NAME] = used()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        self.processes += getattr(node, "workeroutput", {}).get(_NAME, 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        files: Counter[str] = Counter()
        for name, seconds in self.tests.items():
            files[name.split("::")[0]] += seconds
        terminalreporter.section("CPU-seconds")
        for name, seconds in files.most_common():
            write(f"{seconds:8.1f}  {name}")
        total = self.processes or used()
        write(f"{sum(files.values()):8.1f}  all tests; {total:.1f} with imports and collection")
        slow = sorted(((s, n) for n, s in self.tests.items() if s > LIMIT), reverse=True)
        write(f"tests above {LIMIT:g} CPU-seconds: {len(slow)}")
        for seconds, name in slow:
            write(f"{seconds:8.1f}  {name}")
