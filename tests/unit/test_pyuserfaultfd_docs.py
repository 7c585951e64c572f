"""pyuserfaultfd: what the documentation shows is what happens."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import sys
from pathlib import Path

import pytest

import pyuserfaultfd
from tests.unit import pyuserfaultfd_peer as peer
from tests.unit.pyuserfaultfd_peer import isolated

nothing_left = peer.nothing_left

FOLDER = Path(pyuserfaultfd.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
@isolated
def test_examples_in_docstrings_are_true(name: str):
    module = importlib.import_module(f"pyuserfaultfd.{name}")
    assert doctest.testmod(module).failed == 0


@isolated
def test_examples_in_the_readme_are_true():
    result = doctest.testfile(str(FOLDER / "README.md"), module_relative=False)
    assert result.attempted
    assert result.failed == 0


def test_readme_says_who_must_not_serve_faults():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "must not serve" in text
    assert "GIL" in text


def test_public_names_exist_and_are_documented():
    assert sorted(pyuserfaultfd.__all__) == sorted(
        name
        for name, value in vars(pyuserfaultfd).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    )
    for name in pyuserfaultfd.__all__:
        value = getattr(pyuserfaultfd, name)
        if inspect.isclass(value):
            assert inspect.getdoc(value), name
            for attribute, member in vars(value).items():
                if inspect.isfunction(member) and not attribute.startswith("_"):
                    assert inspect.getdoc(member), f"{name}.{attribute}"


def test_package_needs_the_standard_library_only():
    for path in FOLDER.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for_the_type_checker = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in for_the_type_checker:
                continue
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                assert name.split(".")[0] in sys.stdlib_module_names, f"{path.name}: {name}"


def test_package_is_marked_as_typed():
    assert (FOLDER / "py.typed").is_file()
