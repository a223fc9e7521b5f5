"""The model that is to be served, as a server must be told: a folder of numbered versions, and one of them."""

import dataclasses
import os

from components.pusher import publish
from components.pusher.pointer import is_number
from trainer_module.errors import UserError


@dataclasses.dataclass(frozen=True)
class Located:
    """One version of a model.

    Attributes:
        base: a directory's absolute path, or gs://BUCKET/PATH.
        version: its number; empty where base is the SavedModel itself.
        followed: whether whoever serves may go on to versions that come later: it was not named, and is the highest.
    """

    base: str
    version: str
    followed: bool

    @property
    def path(self) -> str:
        """Of the SavedModel."""
        return f"{self.base.rstrip('/')}/{self.version}" if self.version else self.base

    @property
    def remote(self) -> bool:
        """Whether it lies in a bucket."""
        return self.base.startswith("gs://")


def locate(model: str) -> Located:
    """Finds the version to serve. gs://BUCKET/PATH/VERSION is taken as it is, and nobody is asked.

    Args:
        model: a SavedModel, or a place of publication, of which the version in service is taken.

    Raises:
        UserError: there is none, or the place cannot be read.
    """
    path = model.rstrip("/") if "://" in model else os.path.abspath(os.path.expanduser(model))
    above, _, last = path.rpartition("/")
    if path.startswith("gs://") and is_number(last) and above.count("/") >= 2:
        return Located(above, last, followed=False)
    try:
        at, version = publish.model_at(path)
        if version != ".":
            return Located(at.base, version, followed=publish.whole(at)[-1] == version)
    except UserError as error:
        raise UserError(f"--model {error}") from error
    return Located(above, last, followed=False) if is_number(last) else Located(path, "", followed=False)


def in_bucket(model: Located, target: str) -> Located:
    """Refuses a model that lies on this machine.

    Raises:
        UserError: says how to bring it to a bucket.
    """
    if not model.remote:
        raise UserError(
            f"--model {model.path}: {target} reads models from gs:// only; first ./moco publish --to "
            f"gs://BUCKET/encoder --model {model.path}"
        )
    return model
