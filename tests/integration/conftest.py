"""Crews of hosts for the tests in this folder: see tests/crews.py; services: see tests/rpc_services.py."""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.crews import Crew, Crews
from tests.rpc_services import Rpc, using_rpc
from tests.runs import Start, starting, writing
from tests.standing import Standing

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember whether a test failed, for fixtures that end after it."""
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


@pytest.fixture(scope="session")
def crews() -> Iterator[Crews]:
    """Every crew of this run; audited when the run ends."""
    crews = Crews()
    yield crews
    crews.close()


@pytest.fixture
def crew(request: pytest.FixtureRequest, crews: Crews) -> Iterator[Crew]:
    """Hosts on a fabric with pages of 4 KiB, or of the kind that the parameter names."""
    with crews.use(
        getattr(request, "param", "4K"), lambda: request.node.stash.get(_FAILED, True)
    ) as crew:
        yield crew


@pytest.fixture(scope="session")
def rpc_standing() -> Iterator[Standing]:
    """A fabric with two host processes that serve."""
    standing = Standing({}, {}, size=64 << 20)
    yield standing
    standing.close()


@pytest.fixture
def rpc(rpc_standing: Standing) -> Iterator[Rpc]:
    """Two host processes for services, and a host here; audited when the test ends."""
    with using_rpc(rpc_standing) as rpc:
        yield rpc


@pytest.fixture(params=["ring", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    """What connects clients and services."""
    return str(request.param)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start runs, in a folder of the test's own; when the test ends, nothing of them may be left."""
    with starting(tmp_path) as start:
        yield start


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., str]:
    """Write Python programs into the folder that runs are started in; gives its file name."""
    return writing(tmp_path)
