"""Run mypy over the checkout, under the names that the packages are imported by.

Usage: python scripts/check_types.py [MYPY OPTION...]

setup.cfg packages coordinator/ as ``dmrpc_cxl.coordinator`` and fabric/ as ``dmrpc_cxl.fabric``.
mypy finds modules by their place in the file system and knows nothing of that, so this program lays
links out in build/typing as an installation would lay out the packages, has mypy check that tree,
and gives the files their real names again in what it prints. Every file is in that tree once, so it
is reported once.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "typing"
CACHE = ROOT / "build" / "mypy-cache"
TOP_LEVEL = ("pyuserfaultfd", "dmrpc_net", "tests", "benchmarks", "examples", "scripts", "docs")
INSIDE_DMRPC_CXL = ("coordinator", "fabric")


def lay_out() -> list[str]:
    """Make the tree afresh. Returns the names of its top-level folders."""
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "dmrpc_cxl"
    package.mkdir(parents=True)
    for entry in (ROOT / "dmrpc_cxl").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name in INSIDE_DMRPC_CXL:
        if (ROOT / name).is_dir():
            (package / name).symlink_to(ROOT / name)
    for name in TOP_LEVEL:
        if any((ROOT / name).rglob("*.py")):
            (TREE / name).symlink_to(ROOT / name)
    return sorted(entry.name for entry in TREE.iterdir())


def real_names(output: str) -> str:
    inside = "|".join(INSIDE_DMRPC_CXL)
    return re.sub(rf"^dmrpc_cxl/(?=(?:{inside})/)", "", output, flags=re.MULTILINE)


def main() -> int:
    folders = lay_out()
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(CACHE), *sys.argv[1:], *folders]
    # mypy looks for modules in its working directory, and must not find the checkout's there.
    done = subprocess.run(command, cwd=TREE, stdout=subprocess.PIPE, text=True, check=False)
    print(real_names(done.stdout), end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
