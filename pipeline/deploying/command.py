"""What `./moco deploy` does, and says of it. Light: nothing of the cloud is imported before it is needed."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.deploying.config import FilesConfig, VertexConfig, validate
from pipeline.serving.config import option
from trainer_module.errors import UserError

_BATCHES = ("max_batch", "max_wait_ms", "max_queue", "threads")
_SERVERS = ("min_replicas", "max_replicas")
_TAKES = {
    "docker": ("name", "image", "out", *_BATCHES, "rest_port", "grpc_port"),
    "kserve": ("name", "image", "out", *_BATCHES, *_SERVERS, "cpus", "memory_gb"),
    "vertex": ("project", "region", *(field.name for field in dataclasses.fields(VertexConfig))),
}
TARGETS = tuple(_TAKES)


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What is asked for.

    Attributes:
        target: one of `TARGETS`.
        model: a SavedModel, or a place of publication; may be gs://.
        config: of the target.
        out: folder for files; empty for a target that writes none.
        project, region: of Vertex AI; empty for another target.
        dry_run: whether it is only shown.
    """

    target: str
    model: str
    config: FilesConfig | VertexConfig
    out: str
    project: str
    region: str
    dry_run: bool


def asked(target: str, model: str, given: Mapping[str, Any], dry_run: bool) -> Deployment:
    """A deployment of what was typed.

    Args:
        target: one of `TARGETS`.
        model: see `Deployment`.
        given: options that were typed, by their fields' names.
        dry_run: see `Deployment`.

    Raises:
        UserError: an option is missing, wrong, or of another target.
    """
    for name in given:
        if name not in _TAKES[target]:
            fits = " and ".join(f"--target {other}" for other, takes in _TAKES.items() if name in takes)
            raise UserError(f"{option(name)} goes with {fits}, not with --target {target}; leave it out")
    kind = VertexConfig if target == "vertex" else FilesConfig
    places = {"out", "project", "region"}
    config = kind(**{name: value for name, value in given.items() if name not in places})
    validate(config)
    place = {name: given.get(name) or "" for name in places}
    if isinstance(config, FilesConfig) and not place["out"] and not dry_run:
        raise UserError(f"--out is missing: the folder for the files, e.g. --out serving-{config.name}; or --dry-run")
    if isinstance(config, VertexConfig):
        from pipeline.cloud.place import check_place

        check_place(place["project"], place["region"])
    return Deployment(target, model, config, dry_run=dry_run, **place)


def lines(deployment: Deployment) -> Iterator[str]:
    """Does it, and says so line by line.

    Raises:
        UserError: it cannot be done.
    """
    if isinstance(deployment.config, VertexConfig):
        yield from _on_vertex(deployment, deployment.config)
        return
    files = _files(deployment, deployment.config)
    if deployment.dry_run:
        yield from _shown(files)
    else:
        yield from _written(files, Path(deployment.out).expanduser())


def _on_vertex(deployment: Deployment, config: VertexConfig) -> Iterator[str]:
    from pipeline.deploying.located import in_bucket, locate

    model = in_bucket(locate(deployment.model), "Vertex AI")
    from pipeline.cloud.vertex import Connection
    from pipeline.deploying import vertex

    connection = Connection(deployment.project, deployment.region)
    yield from (vertex.dry_run if deployment.dry_run else vertex.deploy)(config, model, connection)


def _files(deployment: Deployment, config: FilesConfig) -> dict[str, str]:
    from pipeline.deploying import docker, kserve
    from pipeline.deploying.located import in_bucket, locate

    model = locate(deployment.model)
    if deployment.target == "docker":
        return docker.files(config, model)
    return kserve.files(config, in_bucket(model, "KServe"))


def _shown(files: Mapping[str, str]) -> Iterator[str]:
    for name, text in files.items():
        if len(files) > 1:
            yield f"==> {name} <=="
        yield text.rstrip("\n")


def _written(files: Mapping[str, str], folder: Path) -> Iterator[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        if text.startswith("#!"):
            path.chmod(0o755)
        yield f"wrote {path}"
    last = list(files)[-1]
    yield (
        f"serve it with: {folder / last}"
        if last.endswith(".sh")
        else f"serve it with: kubectl apply -f {folder / last}"
    )
