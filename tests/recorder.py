"""A pytest plugin (``-p tests.recorder --record FILE``) that writes down every outcome, for tools/mutants.py.

One JSON object a line: first ``imported``, the file that vjepa_scale comes from in this process; then ``test``,
``outcome`` and ``message`` of every test, and of every file that cannot be collected.
"""

import json
from pathlib import Path
from typing import Any

import hypothesis
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, required=True, help="the file to write")


def pytest_configure(config: pytest.Config) -> None:
    # The first example that fails is enough (a smaller one takes minutes), and the same ones are tried every time.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("recorder", phases=phases, derandomize=True)
    hypothesis.settings.load_profile("recorder")
    config.pluginmanager.register(_Recorder(config.getoption("--record")))


class _Recorder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_sessionstart(self) -> None:
        import vjepa_scale  # as the tests will find it

        self._add(imported=vjepa_scale.__file__)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(test=report.nodeid, outcome="not collected", message=str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test has three reports, and the one that tells its outcome is its call's or the first that did not pass.
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash is not None else str(report.longrepr or "")
            self._add(test=report.nodeid, outcome=report.outcome, message=message)

    def _add(self, **row: Any) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")
