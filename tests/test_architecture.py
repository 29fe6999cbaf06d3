"""The law of the house: data flows one way. A file imports, when it is loaded, only files before it in the README."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "kokanee"
OUTSIDE = {"__init__.py", "__main__.py", "world/__init__.py"}


def listed() -> list[str]:
    """The files in the README's table, in its order."""
    rows = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row)]


def imported(path: Path) -> set[str]:
    """The files of the package that a file imports when it is loaded."""
    nodes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    names = [f"{node.module}.{alias.name}" for node in nodes for alias in node.names]
    places = [name.removeprefix("kokanee.").split(".") for name in names if name.startswith("kokanee.")]
    return {"/".join(place[: 2 if place[0] == "world" else 1]) + ".py" for place in places}


def test_every_file_is_in_the_readme_once():
    there = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")} - OUTSIDE
    assert sorted(listed()) == sorted(there)


def test_a_file_imports_only_files_before_it():
    order = listed()
    before = {name: order[:number] for number, name in enumerate(order)}
    assert [(name, other) for name in order for other in imported(SOURCE / name) if other not in before[name]] == []
    assert "errors.py" in imported(SOURCE / "media.py") and "world/words.py" in imported(
        SOURCE / "world" / "grammar.py"
    )
