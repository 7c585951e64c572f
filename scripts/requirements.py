"""Print what has to be installed before the package: lines for ``pip install -r``.

Usage: python scripts/requirements.py GROUP...

GROUP is ``build`` (what setup.py needs, from pyproject.toml), ``run`` (what the package needs at
run time) or the name of an extra (both from setup.cfg). So the Makefile installs the same things as
pip would, without having the native module compiled once more for every extra.
"""

import ast
import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build_requirements() -> list[str]:
    # Python 3.10 has no tomllib; the one line needed is also a Python literal.
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"^requires = (\[.*\])$", text, re.MULTILINE)
    if found is None:
        sys.exit("pyproject.toml: no line 'requires = [...]' in [build-system]")
    return list(ast.literal_eval(found[1]))


def requirements(group: str) -> list[str]:
    if group == "build":
        return build_requirements()
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    section, key = ("options", "install_requires")
    if group != "run":
        section, key = ("options.extras_require", group)
    if not config.has_option(section, key):
        sys.exit(f"setup.cfg: [{section}] has no {key!r}")
    return config[section][key].split("\n")


def main() -> None:
    for group in sys.argv[1:]:
        for line in requirements(group):
            if line and not line.startswith("#"):
                print(line)


if __name__ == "__main__":
    main()
