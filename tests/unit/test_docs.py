"""README.md, CHANGELOG.md and docs/: what they name exists, and the programs they show do what they say.

A block of Python marked ``run`` is a program; it runs on a fabric of its own in place of the one that it calls "demo",
and must print the block of text right behind it. ``run-net`` does the same with a memory server. One marked ``run-test`` is a file of tests, run by pytest. Everything
else is read.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from dmrpc_cxl import cli
from tests.fabrics import running
from tests.net_servers import serving

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
DECISIONS = ROOT / "docs" / "decisions"
NUMBERED = sorted(DECISIONS.glob("[0-9]*.md"))
SECONDS = 100  # for one program; a host process under test has a watchdog of 120 s

FOLDERS = (
    "dmrpc_cxl", "dmrpc_net", "coordinator", "fabric", "pyuserfaultfd",
    "tests", "benchmarks", "examples", "scripts", "docs",
)  # fmt: skip
SOURCES = (".py", ".pyx", ".pxi", ".pxd", ".pyi", ".c", ".h", ".sh", ".md", ".cfg", ".toml")

each_document = pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
each_decision = pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)


class Block(NamedTuple):
    """A fenced block."""

    kind: str  # what stands behind the fence: "python run"
    text: str
    line: int
    behind: str  # what follows, up to the next heading


FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    return [
        Block(
            found[1].strip(), found[2], text.count("\n", 0, found.start()) + 1, text[found.end() :]
        )
        for found in FENCE.finditer(text)
    ]


def prose(text: str) -> str:
    """Return the text without its fenced blocks and HTML comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def links(text: str) -> list[str]:
    """Return the targets of all links that lead to files or headings of this project."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text)))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Return the names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---------------------------------------------------------------- programs


def shown(mark: str) -> list[object]:
    """Return the blocks with that mark, each a parameter with the place where it stands."""
    return [
        pytest.param(block, id=f"{path.relative_to(ROOT)}:{block.line}")
        for path in DOCS
        for block in blocks(read(path))
        if block.kind == f"python {mark}"
    ]


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run Python, with the checkout importable; return what it prints."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{cwd}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("block", shown("run"))
def test_a_program_that_is_shown_prints_what_is_shown(block: Block, tmp_path: Path) -> None:
    assert '"demo"' in block.text
    behind = re.match(r"\s*```text\n(.*?)^```", block.behind, re.MULTILINE | re.DOTALL)
    assert behind, "no block of text behind the program"
    with running() as fabric:
        (tmp_path / "shown.py").write_text(block.text.replace('"demo"', repr(fabric.name)))
        assert run("shown.py", cwd=tmp_path) == behind[1]


@pytest.mark.parametrize("block", shown("run-net"))
def test_a_program_for_memory_servers_prints_what_is_shown(block: Block, tmp_path: Path) -> None:
    behind = re.match(r"\s*```text\n(.*?)^```", block.behind, re.MULTILINE | re.DOTALL)
    assert behind, "no block of text behind the program"
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(serving())
        program = block.text.replace('"127.0.0.1:7000"', repr(servers.addresses[0]))
        if '"demo"' in program:
            fabric = stack.enter_context(running())
            program = program.replace('"demo"', repr(fabric.name))
        (tmp_path / "shown.py").write_text(
            program.replace('"secret-file"', repr(str(servers.secret)))
        )
        assert run("shown.py", cwd=tmp_path) == behind[1]


@pytest.mark.parametrize("block", shown("run-test"))
def test_tests_that_are_shown_pass(block: Block, tmp_path: Path) -> None:
    (tmp_path / "test_shown.py").write_text(block.text)
    options = ("-p", "tests.conftest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", ".")
    output = run("-m", "pytest", *options, "-q", "test_shown.py", cwd=tmp_path)
    assert f"{block.text.count('def test_')} passed" in output


def test_the_readme_shows_a_program_and_runs_it() -> None:
    assert any(block.kind == "python run" for block in blocks(read(ROOT / "README.md")))


@each_document
def test_every_block_of_python_is_python(path: Path) -> None:
    for block in blocks(read(path)):
        if block.kind.startswith("python") and ">>>" not in block.text:
            assert block.kind in ("python", "python run", "python run-net", "python run-test"), (
                block.kind
            )
            ast.parse(block.text)


# ---------------------------------------------------------------- links


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    wrong = []
    for target in links(read(path)):
        file, _, heading = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        if not found.is_relative_to(ROOT) or not found.exists():
            wrong.append(f"{target}: no such file")
        elif heading and heading not in anchors(read(found)):
            wrong.append(f"{target}: no such heading")
    assert wrong == []


def test_the_readme_links_every_document() -> None:
    linked = {
        (ROOT / target.partition("#")[0]).resolve() for target in links(read(ROOT / "README.md"))
    }
    documents = {path for path in DOCS if path.parent in (ROOT, ROOT / "docs")}
    assert documents - linked == {ROOT / "README.md"}
    assert DECISIONS / "README.md" in linked


# ---------------------------------------------------------------- names


@cache
def files() -> frozenset[str]:
    """Return the names of the project's files."""
    return frozenset(
        file.name for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.is_file()
    ) | {file.name for file in ROOT.iterdir()}


def paths_in(text: str) -> Iterator[str]:
    """Yield what looks like the path of a file of the project."""
    folders = "|".join(FOLDERS)
    for found in re.finditer(rf"(?<![\w./-])(?:{folders})/[\w.*/-]*[\w*/]", text):
        yield found[0].rstrip("/")
    readers = set(re.findall(r"[Ss]ave (?:this|it) as `([^`]+)`", text))
    for span in code_spans(text):
        if re.fullmatch(r"[\w.-]+", span) and span.endswith(SOURCES) and span not in readers:
            yield span


@each_document
def test_files_that_are_named_exist(path: Path) -> None:
    text = re.sub(r"\]\([^)\s]*\)", "]", read(path))  # links are another test's
    missing = [
        name
        for name in paths_in(text)
        if ("/" in name and not any(ROOT.glob(name))) or ("/" not in name and name not in files())
    ]
    assert missing == []


@each_document
def test_functions_and_tests_that_are_named_are_in_the_file_beside(path: Path) -> None:
    """`name`, `other` ([file](path)): each is a function of that file."""
    name = r"`[A-Za-z_]\w*`"
    text = prose(read(path))
    wrong = []
    for found in re.finditer(rf"({name}(?:, {name})*)\s+(?:in |\()\[[^\]]+\]\(([^)\s#]+)\)", text):
        source = read((path.parent / found[2]).resolve())
        for function in re.findall(r"\w+", found[1]):
            if not re.search(rf"\b{function}\b", source):
                wrong.append(f"{function}: not in {found[2]}")
    for test in set(re.findall(r"`(test_\w+)`", text)):
        if not any(f"def {test}(" in read(file) for file in (ROOT / "tests").rglob("*.py")):
            wrong.append(f"{test}: no such test")
    assert wrong == []


def test_the_paper_map_names_function_and_test_in_each_row() -> None:
    text = read(ROOT / "docs" / "paper-map.md")
    rows = [
        line.strip("|").split("|") for line in re.findall(r"^\| (?:IV|V-B).*$", text, re.MULTILINE)
    ]
    assert len(rows) > 20
    for says, function, test, differs in rows:
        if "not there yet" not in differs:
            assert "](../tests/" in test, says
        if "A load is a load" not in says and "not there yet" not in differs:
            assert "](../" in function, says


@each_document
def test_make_targets_that_are_named_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", read(ROOT / "Makefile"), re.MULTILINE))
    text = read(path)
    shell = [block.text for block in blocks(text) if block.kind == "console"]
    named = {
        target
        for piece in (*code_spans(text), *shell)
        for target in re.findall(r"(?:^|[$&] )make ([a-z-]+)", piece, re.MULTILINE)
    }
    assert targets
    assert named - targets == set()


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of `dmrpc`."""
    shell = [block.text for block in blocks(text) if block.kind == "console"]
    for piece in (*code_spans(text), *shell):
        for line in re.findall(r"(?:^|[$&] |/bin/)dmrpc (.+)$", piece, re.MULTILINE):
            yield re.sub(r"\s(#|&).*", "", line).split()


@each_document
def test_commands_that_are_named_exist_with_their_options(path: Path) -> None:
    for words in commands_in(read(path)):
        command: click.Command = cli.main
        for word in words:
            if not isinstance(command, click.Group):
                break
            found = command.get_command(click.Context(command), word)
            if word == "...":
                break
            assert found, f"dmrpc {' '.join(words)}: {word}"
            command = found
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= known, f"dmrpc {' '.join(words)}"


# ---------------------------------------------------------------- decisions, and what must not be there


def test_decisions_are_numbered_and_listed() -> None:
    assert [path.stem[:4] for path in NUMBERED] == [f"{n:04}" for n in range(1, len(NUMBERED) + 1)]
    listed = links(read(DECISIONS / "README.md"))
    assert listed == [path.name for path in NUMBERED]


@each_decision
def test_a_decision_has_context_measurement_choice_and_consequences(path: Path) -> None:
    title, *headings = re.findall(r"^#+ .+$", read(path), re.MULTILINE)
    assert re.match(rf"# {path.stem[:4]}: \w", title)
    rest = [heading for heading in headings if heading != "## Options"]  # may stand behind Context
    assert rest == ["## Context", "## Measurement", "## Choice", "## Consequences"]


@each_document
def test_no_path_of_one_machine_is_named(path: Path) -> None:
    assert re.findall(r"(?<![\w.])/(?:root|home|work)\b", read(path)) == []


# ---------------------------------------------------------------- the rules can fail

SAMPLE = """# One: two, `three`

Save this as `mine.py`. See [a](b.md#c), `[x](y)`, [far](https://example.org/), `freelist.c`, tests/c/test_*.c,
`make test ARGS="-k x"`, `dmrpc fabric create NAME --size 1M`.

```console
$ make build && dmrpc doctor
```

```python run
import nothing  # [z](z)
```
"""


def test_what_is_looked_for_is_found() -> None:
    assert [(block.kind, block.line) for block in blocks(SAMPLE)] == [
        ("console", 6),
        ("python run", 10),
    ]
    assert links(SAMPLE) == ["b.md#c"]
    assert anchors(SAMPLE) == {"one-two-three"}
    assert sorted(paths_in(SAMPLE)) == ["freelist.c", "tests/c/test_*.c"]
    assert list(commands_in(SAMPLE)) == [["fabric", "create", "NAME", "--size", "1M"], ["doctor"]]
