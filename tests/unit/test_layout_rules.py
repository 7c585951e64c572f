"""The import arrows between the parts of the project point one way.

    errors <- _native <- the rest of dmrpc_cxl <- rpc <- the facade, cli
    dmrpc_cxl <- coordinator, fabric            pyuserfaultfd uses nothing of ours
    packages <- tests, examples, benchmarks, scripts

The rules are read off the source, not off ``sys.modules``: an import counts wherever it stands, in
a function as well as at the top, so nobody can turn an arrow round by importing late. Only imports
for the type checker (``if TYPE_CHECKING:``) may go up inside dmrpc_cxl, since they never run.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Folder of the checkout -> the name under which it is imported (package_dir in setup.cfg).
PACKAGES = {
    "dmrpc_cxl": "dmrpc_cxl",
    "coordinator": "dmrpc_cxl.coordinator",
    "fabric": "dmrpc_cxl.fabric",
    "pyuserfaultfd": "pyuserfaultfd",
    "dmrpc_net": "dmrpc_net",
}
SERVICES = ("dmrpc_cxl.coordinator", "dmrpc_cxl.fabric")
NOT_PACKAGED = ("tests", "examples", "benchmarks", "scripts")
SECOND_NAMES = ("coordinator", "fabric")
OURS = ("dmrpc_cxl", "pyuserfaultfd", "dmrpc_net", *NOT_PACKAGED, *SECOND_NAMES)

# Inside dmrpc_cxl a module imports from its own rank and below. What is not listed has rank HOST.
ERRORS, NATIVE, HOST, RPC, FACADE, CLI = range(6)
RANKS = {
    "dmrpc_cxl.errors": ERRORS,
    "dmrpc_cxl._native": NATIVE,
    "dmrpc_cxl.rpc": RPC,
    "dmrpc_cxl": FACADE,
    "dmrpc_cxl.cli": CLI,
}


class Import(NamedTuple):
    target: str  # dotted name; of `from a import b` it is "a.b", whatever b is
    line: int
    for_types_only: bool


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def module_name(path: Path) -> str:
    """Name under which the file ``path``, relative to the checkout, is imported."""
    package = PACKAGES.get(path.parts[0], path.parts[0])
    rest = [part for part in (*path.parts[1:-1], path.stem) if part != "__init__"]
    return ".".join([package, *rest])


def imports_of(source: str, package: str) -> Iterator[Import]:
    """All imports of a Python source; ``package`` is what a leading dot stands for."""

    def absolute(node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parent = package.split(".")
        parent = parent[: len(parent) - (node.level - 1)]
        return ".".join([*parent, *filter(None, [node.module])])

    def walk(node: ast.AST, for_types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and re.fullmatch(
            r"(typing\.)?TYPE_CHECKING", ast.unparse(node.test)
        ):
            for statement in node.body:
                yield from walk(statement, True)
            for statement in node.orelse:
                yield from walk(statement, for_types_only)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, for_types_only)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(f"{absolute(node)}.{alias.name}", node.lineno, for_types_only)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            name = node.args[0].value
            yield Import(package + name if name.startswith(".") else name, node.lineno, False)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, for_types_only)

    yield from walk(ast.parse(source), False)


def cython_imports_of(source: str, package: str) -> Iterator[Import]:
    """All imports of a Cython source, which ``ast`` can parse only line by line."""
    # An import in parentheses is put on one line, blank lines after it keep the numbers right.
    source = re.sub(
        r"^([ \t]*from\s[^\n(]*import\s*)\(([^)]*)\)",
        lambda m: m[1] + re.sub(r"#[^\n]*|\n", " ", m[2]).rstrip(" ,") + "\n" * m[2].count("\n"),
        source,
        flags=re.MULTILINE,
    )
    for number, line in enumerate(source.splitlines(), start=1):
        if re.match(r"\s*(from\s+[\w.]+\s+c?import\s|c?import\s)", line):
            try:
                found = list(imports_of(re.sub(r"\bcimport\b", "import", line.strip()), package))
            except SyntaxError:  # a sentence of a docstring that begins like an import
                continue
            yield from (entry._replace(line=number) for entry in found)


def rank_of(module: str) -> int:
    while module not in RANKS:
        module, _, rest = module.rpartition(".")
        if module == "dmrpc_cxl" and rest:
            return HOST
    return RANKS[module]


def violations(module: str, found: Import, modules: set[str]) -> Iterator[str]:
    """Say what is wrong with one import of ``module``. ``modules`` is every module that exists."""
    target = found.target
    # `from a import b`: b is a module, or a name inside of module a.
    while target not in modules and any(inside(target, name) for name in modules):
        target = target.rpartition(".")[0]
    where = f"{module}:{found.line} imports {target}"

    if any(inside(target, name) for name in SECOND_NAMES):
        # Under a second name its classes would exist twice.
        yield f"{where}, whose name is dmrpc_cxl.{target}"
    if any(inside(module, name) for name in NOT_PACKAGED):
        return
    if any(inside(target, name) for name in NOT_PACKAGED):
        yield f"{where}, which is not part of any package"
    if inside(module, "pyuserfaultfd"):
        if any(inside(target, name) for name in OURS if name != "pyuserfaultfd"):
            yield f"{where}; pyuserfaultfd is to be useful by itself"
        return
    if not inside(module, "dmrpc_cxl") or any(inside(module, name) for name in SERVICES):
        return
    if any(inside(target, name) for name in SERVICES):
        if rank_of(module) != CLI:
            yield f"{where}; the services use dmrpc_cxl, never the reverse"
    elif (
        inside(target, "dmrpc_cxl")
        and not found.for_types_only
        and rank_of(target) > rank_of(module)
    ):
        yield f"{where}, which is above it"


def sources() -> list[Path]:
    return sorted(
        path.relative_to(ROOT)
        for folder in (*PACKAGES, *NOT_PACKAGED)
        for suffix in ("*.py", "*.pyi", "*.pyx", "*.pxd", "*.pxi")
        for path in (ROOT / folder).rglob(suffix)
    )


def check(path: Path, source: str, modules: set[str]) -> list[str]:
    module = module_name(path)
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    read = imports_of if path.suffix in (".py", ".pyi") else cython_imports_of
    return [
        complaint
        for found in read(source, package)
        for complaint in violations(module, found, modules)
    ]


MODULES = {module_name(path) for path in sources()}


def test_sources_of_the_packages_are_found():
    assert "dmrpc_cxl.errors" in MODULES
    assert any(path.name == "_native.pyx" for path in sources())


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_follow_the_arrows(path):
    assert check(path, (ROOT / path).read_text(), MODULES) == []


def test_packages_are_mapped_as_setup_cfg_maps_them():
    text = (ROOT / "setup.cfg").read_text()
    mapped = {name: folder for folder, name in PACKAGES.items() if folder != name}
    assert dict(re.findall(r"^    (dmrpc_cxl\.\w+) = (\w+)$", text, re.MULTILINE)) == mapped


# ---------------------------------------------------------------- the rules can fail

MADE_UP = {
    "dmrpc_cxl",
    "dmrpc_cxl.errors",
    "dmrpc_cxl._native",
    "dmrpc_cxl.buffer",
    "dmrpc_cxl.host",
    "dmrpc_cxl.rpc",
    "dmrpc_cxl.rpc.client",
    "dmrpc_cxl.cli",
    "dmrpc_cxl.coordinator",
    "dmrpc_cxl.coordinator.ledger",
    "dmrpc_cxl.fabric",
    "pyuserfaultfd",
}

BROKEN = {
    "errors looks up": ("dmrpc_cxl/errors.py", "from . import _native"),
    "native looks up": ("dmrpc_cxl/_native.pyx", "from .host import Host"),
    "native cimports from above": ("dmrpc_cxl/_native.pyx", "from dmrpc_cxl.host cimport Host"),
    "native imports over several lines": (
        "dmrpc_cxl/_native.pyx",
        "cdef int x\nfrom dmrpc_cxl.errors import (\n    DmError,  # the root\n)\n"
        "from .rpc import (\n    client,\n)\n",
    ),
    "host looks up": ("dmrpc_cxl/host.py", "from dmrpc_cxl.rpc import client"),
    "host looks up late": ("dmrpc_cxl/host.py", "def f():\n    from .rpc.client import Client"),
    "host looks up by name": ("dmrpc_cxl/host.py", "importlib.import_module('dmrpc_cxl.rpc')"),
    "host looks up by relative name": ("dmrpc_cxl/host.py", "import_module('.rpc', __package__)"),
    "host imports the facade": ("dmrpc_cxl/host.py", "from dmrpc_cxl import attach"),
    "rpc imports the facade": ("dmrpc_cxl/rpc/client.py", "from .. import attach"),
    "facade imports the command line": ("dmrpc_cxl/__init__.py", "from .cli import main"),
    "library uses the coordinator": ("dmrpc_cxl/host.py", "import dmrpc_cxl.coordinator.ledger"),
    "library uses the coordinator's types": (
        "dmrpc_cxl/rpc/client.py",
        "if TYPE_CHECKING:\n    from dmrpc_cxl.coordinator import ledger",
    ),
    "facade uses the fabric": ("dmrpc_cxl/__init__.py", "from . import fabric"),
    "a service under its second name": ("fabric/launcher.py", "from coordinator import ledger"),
    "a test uses a second name": ("tests/unit/test_ledger.py", "import coordinator.ledger"),
    "a package uses the tests": ("coordinator/ledger.py", "from tests.support import seed"),
    "the command line uses the benchmarks": ("dmrpc_cxl/cli.py", "import benchmarks.bench"),
    "pyuserfaultfd uses dmrpc_cxl": ("pyuserfaultfd/__init__.py", "from dmrpc_cxl import errors"),
    "pyuserfaultfd uses it for types": (
        "pyuserfaultfd/event.py",
        "import typing\nif typing.TYPE_CHECKING:\n    import dmrpc_cxl",
    ),
}

SOUND = {
    "down": ("dmrpc_cxl/host.py", "from . import _native, errors\nfrom .buffer import Buffer"),
    "down from a subpackage": ("dmrpc_cxl/rpc/client.py", "from ..host import Host"),
    "up, for types": (
        "dmrpc_cxl/buffer.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .rpc.client import Client",
    ),
    "native": (
        "dmrpc_cxl/_native.pyx",
        '"""What it does:\nimport of errors is late."""\n'
        "from dmrpc_cxl import errors\nfrom libc.stdint cimport int8_t",
    ),
    "the facade": ("dmrpc_cxl/__init__.py", "from .host import attach\nfrom .rpc import client"),
    "the command line": ("dmrpc_cxl/cli.py", "from dmrpc_cxl.fabric import launch"),
    "a service": ("coordinator/server.py", "import dmrpc_cxl\nfrom .ledger import Ledger"),
    "a test": ("tests/unit/test_ledger.py", "from dmrpc_cxl.coordinator import ledger"),
    "others' modules": ("pyuserfaultfd/event.py", "import ctypes\nfrom . import _abi"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_arrow_is_found(case):
    path, source = BROKEN[case]
    assert len(check(Path(path), source, MADE_UP)) == 1


@pytest.mark.parametrize("case", SOUND)
def test_a_right_arrow_passes(case):
    path, source = SOUND[case]
    assert check(Path(path), source, MADE_UP) == []
