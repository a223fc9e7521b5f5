"""What `./moco publish` does, and says of it."""

import datetime
import os
from collections.abc import Iterator

from components.pusher import publish
from components.pusher.directory import read_card
from components.pusher.pointer import is_whole
from trainer_module.errors import UserError


def lines(to: str, *, model: str | None, force: bool = False, version: str | None, keep: int | None) -> Iterator[str]:
    """Does one thing, and says so line by line; lists the versions where nothing is to be done.

    Args:
        to: the place of publication, a directory or gs://BUCKET/PATH.
        model: to publish; a SavedModel or a place of publication.
        force: also publishes a model whose card does not say that it is blessed.
        version: to go back to.
        keep: how many versions are to stay.

    Raises:
        UserError: it cannot be done.
    """
    at = publish.place(to)
    if model is None and isinstance(at, publish.Directory):
        publish.check_folder(at.base)
    if model is not None:
        with publish.local_copy(model) as folder:
            _check_model(folder, model)
            if not force:
                _check_blessed(folder, model)
            yield f"in service: {publish.publish(folder, at)}"
    elif version is not None:
        publish.rollback(at, version)
        yield f"in service: {at.path(version)}"
    elif keep is not None:
        gone = publish.keep(at, keep)
        yield f"removed: {', '.join(gone) or 'nothing'}"
    else:
        yield from _listed(publish.versions(at)) or [f"no versions in {at.base}"]


def _check_model(folder: str, name: str) -> None:
    files = (os.path.join(above, file) for above, _, files in os.walk(folder) for file in files)
    if not is_whole({os.path.relpath(file, folder) for file in files}):
        raise UserError(f"--model {name}: is incomplete; name a folder that './moco run' pushed to")


def _check_blessed(folder: str, name: str) -> None:
    evaluation = read_card(folder).get("evaluation")
    if not (isinstance(evaluation, dict) and evaluation.get("blessed") is True):
        what = "is not blessed, as its card says" if evaluation else "has no card that says it is blessed"
        raise UserError(f"--model {name}: {what}; --force publishes it all the same")


def _listed(versions: list[publish.Listed]) -> list[str]:
    width = max((len(version.number) for version in versions), default=0)
    return [
        f"{version.number:<{width}}  {version.state:<15}  {_time(version.created)}  {version.size / 1e6:10,.1f} MB"
        for version in reversed(versions)
    ]


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
