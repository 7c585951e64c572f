"""The stage that all deaths happen on, and what came of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.crash.stage import Stage, Stages
from tests.crash.tally import Tally

TALLY = pytest.StashKey[Tally]()
FAILED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY] = Tally()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember whether a test failed: its stage is of no use any more."""
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report


@pytest.fixture(scope="session")
def stages() -> Iterator[Stages]:
    stages = Stages()
    yield stages
    stages.close()


@pytest.fixture
def stage(request: pytest.FixtureRequest, stages: Stages) -> Iterator[Stage]:
    """Give the fabric that somebody dies on; a new one after a failure."""
    with stages.use(lambda: request.node.stash.get(FAILED, True)) as stage:
        yield stage


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    return request.config.stash[TALLY]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    tally = config.stash[TALLY]
    if tally.deaths:
        terminalreporter.section("deaths")
        terminalreporter.write_line(tally.said())
