"""What all tests share."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.fabrics import Fabric, running

# A shell starts what it puts in the background with SIGINT ignored, and all children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No example is judged by the clock: how fast something is, benchmarks/ measures. A failure prints
# the blob that repeats it.
settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile(
    "campaign",  # make fuzz
    deadline=None,
    print_blob=True,
    max_examples=20_000,
    suppress_health_check=[HealthCheck.too_slow],
)
# Hypothesis's own profile "ci" tries the same examples every time: the merge of one change is not
# held up by what luck finds in another.
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    """Give a fabric of 32 MiB; audited when the test ends: every frame back, no Ref alive."""
    with running() as fabric:
        yield fabric
