"""What the documentation says that can be checked: its code blocks, its commands, the files and names it mentions."""

import ast
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"(?:^ {4}.*\n|^\n)+", re.M)
_SPAN = re.compile(r"`([^`]+)`")
_FOLDERS = ("avit_jax/", "tests/", "benchmarks/", "configs/", "checkpoints/", "docs/", "examples/", ".ci/")


def page_name(page: Path) -> str:
    """Such as docs/rules.md."""
    return str(page.relative_to(ROOT))


def python_blocks(text: str) -> list[str]:
    """The code of every ```python block."""
    return [code for language, code in _FENCE.findall(text) if language == "python"]


def _plain(text: str) -> str:
    return _FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """What stands between backticks in the prose, line breaks as spaces."""
    prose = _INDENTED.sub("\n", _plain(text))
    return [" ".join(span.split()) for span in _SPAN.findall(prose)]


def commands(text: str) -> list[list[str]]:
    """Every command of the page as words, beginning with python, pip, pytest and the like."""
    blocks = [block for block in _INDENTED.findall(_plain(text)) if block.strip()]
    lines = [*spans(text)]
    for block in blocks:
        lines += re.sub(r"\\\n", " ", block).splitlines()
    found = []
    for line in lines:
        for part in re.split(r"&&|;", line):
            match = re.search(r"(?:^|/|\s|\")((?:python|pip|pytest|mkdocs|ruff)(?= |$).*?)\"?$", part.strip())
            if match:
                try:
                    words = shlex.split(match[1], comments=True)
                except ValueError:  # prose in a block, such as "it's"
                    continue
                found.append([word for word in words if word != "..."])
    return found


def mentioned_paths(text: str) -> set[tuple[str, str]]:
    """Files and folders of the project that the page names, each with a function or class of it, or ""."""
    code = [*spans(text), *(word for command in commands(text) for word in command)]
    found = set()
    for span in code:
        for word in span.split():
            path, _, name = word.rpartition("=")[2].partition(":")
            if path.startswith(_FOLDERS) and re.fullmatch(r"[\w./-]+", path) and "NAME" not in path:
                is_function = path.startswith("avit_jax/") and re.fullmatch(r"[A-Za-z_][\w.]*", name)
                found.add((path, name if is_function else ""))
    return found


def links(text: str) -> list[str]:
    """The relative targets of links and pictures, without anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", _plain(text)) + re.findall(r"^\[\w+\]: (\S+)$", text, re.M)
    return [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]


def has_name(file: Path, dotted: str) -> bool:
    """Whether a Python file defines such a function, class, method or module variable."""
    body: list[ast.stmt] = ast.parse(file.read_text(encoding="utf-8")).body
    for part in dotted.split("."):
        for node in body:
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]
            if part in names:
                body = getattr(node, "body", [])
                break
        else:
            return False
    return True
