"""Fingerprints of code: TFX's cache knows a stage by its class and parameters, not by what its code does.

A stage whose sources changed must run again, so each stage carries the hash of the sources that it uses as a parameter.
"""

import ast
import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

from trainer_module import lines

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pipeline", "components", "trainer_module")


def of(*modules: str) -> str:
    """Hashes modules of this project, everything of it that they import, however deep, and the pinned requirements.

    Comments and formatting do not count; docstrings do. Another version of a library may give other results.

    Args:
        *modules: dotted names, such as "components.view_augmenter.executor".

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256((ROOT / "requirements.txt").read_bytes())
    digest.update(lines.NAME.encode())  # of what is listed, other packages are installed
    for path in sorted(_closure(modules)):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(_read(path.read_bytes()).code)
    return digest.hexdigest()[:16]


def _closure(modules: tuple[str, ...]) -> set[Path]:
    found: set[Path] = set()
    waiting = [path for module in modules for path in [_file(module)] if path]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imports(path)
    return found


class _Source(NamedTuple):
    """What counts of a file's content."""

    code: bytes
    names: tuple[str, ...]  # that it imports


@functools.cache  # most stages share most of their sources
def _read(content: bytes) -> _Source:
    tree = ast.parse(content)
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return _Source(ast.dump(tree).encode(), tuple(names))


def _imports(path: Path) -> list[Path]:
    return [file for name in _read(path.read_bytes()).names for file in [_file(name)] if file]


def _file(module: str) -> Path | None:
    if module.split(".")[0] not in ROOMS:
        return None
    path = ROOT.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)
