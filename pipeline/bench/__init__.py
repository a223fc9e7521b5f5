"""Benchmarks: each module of this package measures one thing and holds `measure() -> Mapping[str, float]`.

One that draws, or takes so long that it must be able to go on, takes the folder for that: `measure(out)`; one whose
length is a matter of choice takes `count`. A figure's name says its unit ("images_per_second", "peak_mib"). The first
line of a module's docstring is its entry in `./moco bench --help`.
"""

import ast
import importlib
import inspect
import json
from pathlib import Path

from pipeline import console, outputs
from trainer_module.errors import UserError


def available() -> dict[str, str]:
    """Returns the benchmarks' names with what each measures, without importing them."""
    modules = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    return {path.stem: _summary(path) for path in modules}


def run(name: str, json_file: str | None, out: str | None = None, count: int | None = None) -> None:
    """Runs one benchmark, prints its figures and writes them as JSON if asked.

    Args:
        name: one of `available()`.
        json_file: where to write {"benchmark": name, "figures": {figure: value}}.
        out: folder for what it draws and what it goes on from.
        count: how often it does what it does.

    Raises:
        UserError: the folder of `json_file` is missing, or the benchmark needs no `out` or `count`.
    """
    outputs.check("--json", json_file, "figures.json")
    measure = importlib.import_module(f"{__name__}.{name}").measure
    if out and "out" not in inspect.signature(measure).parameters:
        raise UserError(f"--out {out}: the benchmark {name} only prints figures; leave --out away, or take --json")
    if count is not None and "count" not in inspect.signature(measure).parameters:
        raise UserError(f"--count {count}: the benchmark {name} does one thing; leave --count away")
    given = {"out": out or None, "count": count}
    figures = dict(measure(**{key: value for key, value in given.items() if value is not None}))
    for figure, value in figures.items():
        console.line(f"{figure:<44} {value:>14,.3f}")
    if json_file:
        outputs.write(json_file, json.dumps({"benchmark": name, "figures": figures}, indent=2) + "\n")


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]
