"""Who may import whom: docs/house.md says it, and every import statement of the package is held against it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "avit_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# Public names and the starts of commands: they may import whatever they show or start.
DOORS = ("__init__", "compare", "convert", "eval", "export", "train.__main__")


def name_of(file: Path) -> str:
    """The module's name without the package's: "model.vit", "rules"; a room's __init__ has the room's name."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Every import of a file with its line, those inside functions too; names with dots: "jax.numpy"."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: write imports from the package's name on"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def allowed() -> dict[str, set[str]]:
    """The table of docs/house.md: for each room the rooms and modules it may import."""
    page = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    table = page[page.index("| Room ") :].partition("\n\n")[0]
    rows = re.findall(r"^\| `([\w.]+)` +\|(.*?)\|", table, re.MULTILINE)
    return {room: set(re.findall(r"`([\w.]+)`", cell)) for room, cell in rows}


def imports_elsewhere(file: Path) -> Iterator[tuple[str, str]]:
    """Where and what a file imports of other rooms: ("avit_jax/model/vit.py:7", "halting.rule.State")."""
    room = name_of(file).partition(".")[0]
    for line, name in imports(file):
        package, _, inner = name.partition(".")
        if package == "avit_jax" and inner and inner.partition(".")[0] != room:
            yield f"{file.relative_to(ROOT)}:{line}", inner


def is_one_of(name: str, modules: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def test_every_room_imports_only_what_the_table_allows() -> None:
    table = allowed()
    wrong = []
    for file in FILES:
        name = name_of(file)
        if name in DOORS:
            continue
        room = name.partition(".")[0]
        assert room in table, f"docs/house.md says nothing about what avit_jax/{room} may import"
        wrong += [
            f"{where} imports {what}" for where, what in imports_elsewhere(file) if not is_one_of(what, table[room])
        ]
    assert not wrong, "the table in docs/house.md does not allow it:\n" + "\n".join(wrong)


def test_the_table_allows_nothing_that_is_not_there() -> None:
    modules = {name_of(file) for file in FILES}
    table = allowed()
    assert set(table) == {module.partition(".")[0] for module in modules - {*DOORS}}
    for room, others in table.items():
        for other in others:
            assert is_one_of(other, set(table)) and other in modules, f"{room} may import {other}, which is not there"
            assert other.partition(".")[0] != room, f"{room} need not be told that it may import itself"


def test_who_imports_the_whole_room_is_above_it() -> None:
    """Two rooms never depend on the whole of each other: one direction names single modules."""
    table = {room: {other for other in others if "." not in other} for room, others in allowed().items()}
    below: dict[str, int] = {}
    while len(below) < len(table):
        ready = [room for room, others in table.items() if room not in below and others <= below.keys()]
        assert ready, f"rooms that depend on each other: {sorted(table.keys() - below.keys())}"
        below |= dict.fromkeys(ready, len(below))
    assert below["runtime"] == 0 and below["model"] < below["execution"] < below["evaluate"] < below["commands"]


def test_a_module_says_what_it_is_about() -> None:
    names = {part for file in FILES for part in name_of(file).split(".")}
    assert not names & {"checks", "common", "experiment", "helpers", "misc", "speed", "utils"}


def test_configs_are_parsed_at_the_door() -> None:
    """Inside, a room knows its own dataclass and no ConfigDict."""
    known = {name_of(file).partition(".")[0] for file in FILES for _, name in imports(file) if "ml_collections" in name}
    assert known == {"commands"}


def test_private_names_of_jax_have_one_place() -> None:
    """runtime/jax_private.py says of each why there is no public one."""
    private = {name_of(file) for file in FILES for _, name in imports(file) if name.startswith("jax._src")}
    assert private <= {"runtime.jax_private"}


@pytest.mark.parametrize("folder", ["avit_jax", "benchmarks", "configs", "tests"])
def test_tests_and_benchmarks_are_nobodys_foundation(folder: str) -> None:
    """Benchmarks may run what tests/harness has, as a campaign; nothing else reaches for either."""
    refused = {
        "avit_jax": {"benchmarks", "configs", "tests"},
        "configs": {"benchmarks", "tests"},
        "tests": {"benchmarks"},
    }
    for file in (ROOT / folder).rglob("*.py"):
        for line, name in imports(file):
            assert name.partition(".")[0] not in refused.get(folder, ()), f"{file}:{line} imports {name}"
            if folder == "benchmarks" and name.startswith("tests."):
                assert name.startswith("tests.harness."), f"{file}:{line} imports {name}"
