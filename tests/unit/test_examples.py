"""The examples in the docstrings of dmrpc_cxl, run on a real fabric.

An example may use `fabric_name`. It runs in a process of its own, and the fabric is audited when it has ended.
"""

import doctest
import importlib
import io
import pkgutil

import pytest

import dmrpc_cxl
from tests.crews import run_apart
from tests.fabrics import running

MIB = 1 << 20


def modules() -> list[str]:
    """Return every module of the package; the native one is no file of Python's."""
    found = pkgutil.walk_packages(dmrpc_cxl.__path__, "dmrpc_cxl.")
    return ["dmrpc_cxl", *(module.name for module in found if not module.name.endswith("__main__"))]


def examples_of(module: str) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = finder.find(importlib.import_module(module), module)
    return [test for test in tests if test.examples]


EXAMPLES = [(module, test.name) for module in modules() for test in examples_of(module)]


@pytest.mark.parametrize(("module", "name"), EXAMPLES, ids=[name for _, name in EXAMPLES])
def test_an_example_does_what_it_shows(module: str, name: str) -> None:
    with running(size=8 * MIB) as fabric:
        assert run_apart(run_example, module, name, fabric.name) == ""


def run_example(module: str, name: str, fabric: str) -> str:
    """Return what is wrong with an example."""
    [test] = [test for test in examples_of(module) if test.name == name]
    test.globs = {**test.globs, "fabric_name": fabric}
    report = io.StringIO()
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.write)
    return report.getvalue()


def test_the_first_example_is_the_one_of_the_host_module() -> None:
    assert ("dmrpc_cxl.host", "dmrpc_cxl.host") in EXAMPLES


def test_an_example_that_is_wrong_would_be_found() -> None:
    with running(size=8 * MIB) as fabric:
        assert "Expected:\n    2\nGot:\n    3" in run_apart(
            run_example, __name__, f"{__name__}.wrong", fabric.name
        )


def wrong() -> None:
    """Show something that is not so.

    >>> len([fabric_name] * 3)
    2
    """
