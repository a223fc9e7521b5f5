"""A lineage in words and as JSON."""

import dataclasses
import datetime
import json
from collections.abc import Iterator
from typing import Any

from pipeline.lineage.graph import ASIDE, Execution, Graph
from pipeline.lineage.lineage import Images, Lineage

_LABEL = 11
_UNKNOWN = "not noted"


def to_json(lineage: Lineage) -> str:
    """For programs. `source` says whether "metadata" or only the "card" is known; parameters are as TFX stores them."""
    graph = lineage.graph
    runs = {run: [e.id for e in graph.executions.values() if e.run == run] if graph else [] for run in lineage.runs}
    document: dict[str, Any] = {
        "source": "metadata" if graph else "card",
        "model": dataclasses.asdict(lineage.model) | {"artifact": lineage.root},
        "images": dataclasses.asdict(lineage.images) if lineage.images else None,
        "settings": {"sha256": lineage.settings_sha256, "values": dict(lineage.settings)},
        "code": dict(lineage.code),
        "packages": dict(lineage.packages),
        "runs": [{"id": run, "executions": executions} for run, executions in runs.items()],
        "compared_with": dataclasses.asdict(lineage.compared) if lineage.compared else None,
        "executions": [dataclasses.asdict(e) for e in graph.executions.values()] if graph else [],
        "artifacts": [dataclasses.asdict(a) for a in graph.artifacts.values()] if graph else [],
        "card": dict(lineage.card),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def lines(lineage: Lineage) -> Iterator[str]:
    """For people: what made the encoder, and the executions as a tree, each told once."""
    model = lineage.model
    yield f"encoder {model.version or ''}".rstrip() + f"  {model.path}"
    rows = [
        *([] if lineage.graph else [("known by", "its card alone; give the --workdir of its run for the rest")]),
        ("files", f"sha256 {model.sha256 or _UNKNOWN}"),
        *_images(lineage.images),
        ("settings", _settings(lineage)),
        *_code(lineage),
        *([("compared", _compared(lineage))] if lineage.graph else []),
        *_runs(lineage),
    ]
    before = ""
    for label, text in rows:
        yield f"  {'' if label == before else label:<{_LABEL}}{text}"
        before = label
    if lineage.graph and lineage.root is not None:
        yield ""
        yield from _tree(lineage.graph, lineage.root, lineage.runs)


def _images(images: Images | None) -> Iterator[tuple[str, str]]:
    if images is None:
        yield "images", _UNKNOWN
        return
    if images.source:
        yield "images", images.source
    span = "no span" if images.span is None else f"span {images.span}"
    version = "" if images.version is None else f", version {images.version}"
    counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in images.counts.items())
    yield "images", f"{counts or 'counts ' + _UNKNOWN}; {span}{version}"
    yield "images", f"manifest {images.manifest or _UNKNOWN}"
    yield "images", f"listing {images.fingerprint or _UNKNOWN}"


def _settings(lineage: Lineage) -> str:
    if not lineage.settings:
        return _UNKNOWN
    return f"{len(lineage.settings)}, sha256 {lineage.settings_sha256} (--json lists them)"


def _code(lineage: Lineage) -> Iterator[tuple[str, str]]:
    if lineage.graph is None:
        yield from (("code", f"{component:<17} {code}") for component, code in sorted(lineage.code.items()))
    for name in ("moco", "python", "tfx", "tensorflow"):
        if name in lineage.packages:
            yield "code", f"{name} {lineage.packages[name]}"


def _compared(lineage: Lineage) -> str:
    if lineage.compared is None:
        return "with no other model: none was blessed before"
    version = f"version {lineage.compared.version}, " if lineage.compared.version else ""
    return f"with {version}model {lineage.compared.artifact}, the last blessed one before"


def _runs(lineage: Lineage) -> Iterator[tuple[str, str]]:
    for number, run in enumerate(lineage.runs, start=1):
        made = [e.component for e in lineage.graph.executions.values() if e.run == run] if lineage.graph else []
        yield "runs", f"{number}  {run}" + (f"  {', '.join(made)}" if made else "")


def _tree(graph: Graph, root: int, runs: tuple[str, ...]) -> Iterator[str]:
    told: set[int] = set()

    def below(execution: Execution, lead: str) -> Iterator[str]:
        branches = list(_made_by(graph, execution).items())
        for place, (number, used) in enumerate(branches, start=1):
            last, again = place == len(branches), number in told
            told.add(number)
            maker = graph.executions[number]
            yield f"{lead}{'└─ ' if last else '├─ '}{', '.join(used)} by {_execution(maker, runs, again=again)}"
            if not again:
                yield from below(maker, lead + ("   " if last else "│  "))

    if first := graph.maker(root):
        yield f"{_artifact(graph, root)} by {_execution(first, runs, again=False)}"
        yield from below(first, "")


def _made_by(graph: Graph, execution: Execution) -> dict[int, list[str]]:
    """The executions that made what one was given, each with what it was given of it."""
    found: dict[int, list[str]] = {}
    for key, ids in execution.inputs.items():
        for one in ids if key not in ASIDE else ():
            if maker := graph.maker(one):
                found.setdefault(maker.id, []).append(_artifact(graph, one))
    return found


def _artifact(graph: Graph, number: int) -> str:
    return f"{graph.artifacts[number].type} {number}"


def _execution(execution: Execution, runs: tuple[str, ...], *, again: bool) -> str:
    name = f"{execution.component}, execution {execution.id}"
    if again:
        return f"{name}, as above"
    at = datetime.datetime.fromtimestamp(execution.finished_ms / 1e3, datetime.timezone.utc).strftime(
        "%Y-%m-%d %H:%M:%S"
    )
    return f"{name}, run {runs.index(execution.run) + 1}, {at} UTC" + (
        f", code {execution.code}" if execution.code else ""
    )
