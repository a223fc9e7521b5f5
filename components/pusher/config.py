"""Where blessed encoders are published."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PublishConfig:
    """The place of publication.

    Attributes:
        to: a directory, made if missing, or gs://BUCKET/PATH; empty: serving/encoder in the working directory.
        keep: versions that stay after a publication, besides the one in service, newest first; 0 for all.
    """

    to: str = ""
    keep: int = 0
