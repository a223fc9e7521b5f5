"""Finds a published encoder in the metadata, or at least its card, and gathers what made it."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.pusher import publish
from components.pusher.directory import read_card
from components.pusher.pointer import DIGEST, is_number
from pipeline import database
from pipeline.lineage.graph import ASIDE, Artifact, Execution, Graph, Store
from trainer_module.errors import UserError

_SHOWN = 5  # versions in one line
_ARTIFACT = 3  # parts of an artifact's path below the root: component, output, execution
_PUSHED, _CARD = "PushedModel", "model_card"
_COUNTS = ("read", "ingested", "train", "eval", "quarantined", "duplicates", "near_duplicates_dropped", "unlabelled")


@dataclasses.dataclass(frozen=True)
class Model:
    """The published encoder.

    Attributes:
        version: its number; None for a model that lies in no numbered folder.
        path: where it lies, or lay.
        sha256: of its files, as its card says.
    """

    version: str | None
    path: str
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class Images:
    """What was ingested.

    Attributes:
        source: as it was given to the run; None where only the card is known.
        span, version: as TFX counts them; None where there is none.
        fingerprint: of the source's listing.
        manifest: names the images by content, split and label.
        counts: read, ingested, train, eval, …
    """

    source: str | None
    span: int | None
    version: int | None
    fingerprint: str | None
    manifest: str | None
    counts: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Compared:
    """The model that this one was compared with before it was blessed: its artifact, and its version if it has one."""

    artifact: int
    version: str | None


@dataclasses.dataclass(frozen=True)
class Lineage:
    """All that is known of how an encoder came to be.

    Attributes:
        model: which.
        images: None where neither metadata nor card tell of them.
        settings: {"train.queue": 65536, …}; empty where they were not noted.
        code: fingerprints of the sources by component.
        packages: versions of Python and packages, as the card says.
        runs: of the pipeline, oldest first.
        compared: None where there was none.
        graph: executions and artifacts; None where only the card is known.
        root: artifact of the graph that all leads to.
        card: the card's own words on where it comes from, {"run": …, "artifacts": …}.
    """

    model: Model
    images: Images | None
    settings: Mapping[str, Any]
    code: Mapping[str, str]
    packages: Mapping[str, str]
    runs: tuple[str, ...]
    compared: Compared | None
    graph: Graph | None
    root: int | None
    card: Mapping[str, Any]

    @property
    def settings_sha256(self) -> str | None:
        """Names the settings; equal ones have equal names."""
        text = json.dumps(dict(self.settings), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest() if self.settings else None


def find(model: str, workdir: str | None) -> Lineage:
    """The lineage of a published encoder.

    Args:
        model: the number of a version, or the path of one, or of a place of publication, whose version in service is
            taken; a directory or gs://.
        workdir: of the run that published it; None to look for it above the path.

    Raises:
        UserError: there is no such version, nothing is known of it, or there are no metadata.
    """
    if is_number(model) and (workdir or not os.path.isdir(model)):
        return _of_version(model, workdir)
    return _of_path(model, workdir)


def _of_version(number: str, workdir: str | None) -> Lineage:
    if workdir is None:
        raise UserError(f"--model {number}: a version's number needs --workdir DIR; or give the path of the version")
    home = Path(workdir).expanduser()
    store = _open(home)
    pushed = [one for one in store.artifacts(_PUSHED) if one.properties.get("pushed_version")]
    found = next((one for one in pushed if one.properties["pushed_version"] == number), None)
    if found is None:
        raise UserError(f"--model {number}: no such version was published from {workdir}; {_others(number, pushed)}")
    model = Model(number, found.properties["pushed_destination"], None)
    # The archive stays where the version itself was removed; and the working directory may have been moved since.
    moved = home.joinpath("artifacts", *Path(found.uri).parts[-_ARTIFACT:])
    cards = (read_card(path) for path in (model.path, found.uri, str(moved)))
    return _traced(store, found, model, next((card for card in cards if card), {}))


def _others(number: str, pushed: Sequence[Artifact]) -> str:
    versions = sorted(
        {one.properties["pushed_version"] for one in pushed}, key=lambda v: (abs(int(v) - int(number)), v)
    )
    if not versions:
        return "none was"
    more = f" and {len(versions) - _SHOWN} more" if len(versions) > _SHOWN else ""
    return f"nearest: {', '.join(versions[:_SHOWN])}{more}"


def _of_path(path: str, workdir: str | None) -> Lineage:
    at, version = publish.model_at(path)
    with at.errors_told():
        card = at.card(version)
    whole = at.path(version)
    name = os.path.basename(os.path.abspath(whole)) if version == "." else version
    model = Model(name if is_number(name) else None, whole, card.get(DIGEST))
    home = Path(workdir).expanduser() if workdir else _home_above(whole)
    if home is not None:
        store = _open(home)
        found = _pushed_with(store, card) or _pushed_to(store, whole, card)
        if found is not None:
            return _traced(store, found, model, card)
    if not card:
        where = f"the metadata of {home} do not know it" if home else "no --workdir is given"
        raise UserError(f"--model {path}: it has no card, and {where}; give the --workdir of the run that published it")
    return _of_card(model, card)


def _home_above(path: str) -> Path | None:
    """The working directory that a path lies in."""
    if "://" in path:
        return None
    return next((above for above in Path(path).absolute().parents if database.path_in(above).is_file()), None)


def _open(home: Path) -> Store:
    path = database.path_in(home)
    if not path.is_file():
        raise UserError(f"--workdir {home}: there is no {database.FILE}; name the working directory of a './moco run'")
    database.check(path)
    return Store(path)


def _pushed_with(store: Store, card: Mapping[str, Any]) -> Artifact | None:
    """The publication whose card this is: known by the execution that wrote it, and the run, which is unlike others."""
    said = card.get("lineage") or {}
    number = str(said.get("execution") or "")
    writer = store.execution(int(number)) if is_number(number) else None
    if writer is None or writer.run != said.get("run"):
        return None
    cards = {one for ids in writer.outputs.values() for one in ids}
    pushed = store.artifacts(_PUSHED)
    pushers = store.makers(one.id for one in pushed)
    return next((one for one in pushed if _uses(pushers.get(one.id), cards)), None)


def _uses(execution: Execution | None, artifacts: set[int]) -> bool:
    return execution is not None and any(artifacts & set(ids) for ids in execution.inputs.values())


def _pushed_to(store: Store, path: str, card: Mapping[str, Any]) -> Artifact | None:
    """The publication to a path, for models whose card does not say where it comes from."""
    if card.get("lineage"):
        return None
    there = os.path.realpath(path)
    pushed = (one for one in store.artifacts(_PUSHED) if one.properties.get("pushed_destination"))
    return next((one for one in pushed if os.path.realpath(one.properties["pushed_destination"]) == there), None)


def _traced(store: Store, pushed: Artifact, model: Model, card: Mapping[str, Any]) -> Lineage:
    graph = store.upstream(pushed.id)
    if pushed.id not in graph.artifacts or not graph.executions:
        raise UserError(f"--model {model.path}: the metadata know the publication, and not what made it")
    writer = graph.of_component("ModelCard")
    settings = json.loads(writer.parameters.get("config", "{}")) if writer else {}
    return Lineage(
        model=dataclasses.replace(model, sha256=card.get(DIGEST)),
        images=_images(graph),
        settings=settings or card.get("config", {}),
        code={e.component: e.code for e in graph.executions.values() if e.code},
        packages=card.get("versions", {}),
        runs=tuple(dict.fromkeys(e.run for e in graph.executions.values())),
        compared=_compared(store, graph),
        graph=graph,
        root=pushed.id,
        card=card.get("lineage") or {},
    )


def _images(graph: Graph) -> Images | None:
    for execution in graph.roots():
        for number in (one for ids in execution.outputs.values() for one in ids):
            properties = graph.artifacts[number].properties
            if "input_fingerprint" in properties:
                return Images(
                    source=_source(execution.parameters),
                    span=properties.get("span"),
                    version=properties.get("version"),
                    fingerprint=properties["input_fingerprint"],
                    manifest=properties.get("manifest"),
                    counts={key: properties[key] for key in _COUNTS if key in properties},
                )
    return None


def _source(parameters: Mapping[str, Any]) -> str | None:
    """The folder, glob or files that the images came from."""
    splits = json.loads(parameters.get("input_config") or "{}").get("splits") or [{}]
    parts = (parameters.get("input_base"), splits[0].get("pattern"))
    return os.path.join(*(part for part in parts if part)) if any(parts) else None


def _compared(store: Store, graph: Graph) -> Compared | None:
    for execution in graph.executions.values():
        for key in ASIDE:
            for number in execution.inputs.get(key, ()):
                return Compared(number, _version_of(store, number))
    return None


def _version_of(store: Store, model: int) -> str | None:
    """The latest version that a Trainer's model was published as."""
    for pushed in reversed(store.artifacts(_PUSHED)):
        version = pushed.properties.get("pushed_version")
        pusher = store.makers([pushed.id]).get(pushed.id) if version else None
        described = store.makers(pusher.inputs.get(_CARD, ())) if pusher else {}
        if any(model in ids for made in (pusher, *described.values()) if made for ids in made.inputs.values()):
            return version
    return None


def _of_card(model: Model, card: Mapping[str, Any]) -> Lineage:
    data, said = card.get("data"), card.get("lineage") or {}
    known = {} if data is None else data
    images = Images(
        source=None,
        span=known.get("span"),
        version=known.get("version"),
        fingerprint=known.get("fingerprint"),
        manifest=known.get("manifest"),
        counts={key: known["counts"][key] for key in _COUNTS if key in known.get("counts", {})},
    )
    return Lineage(
        model=model,
        images=None if data is None else images,
        settings=card.get("config", {}),
        code=card.get("code", {}),
        packages=card.get("versions", {}),
        runs=(said["run"],) if said.get("run") else (),
        compared=None,
        graph=None,
        root=None,
        card=said,
    )
