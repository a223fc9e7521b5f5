"""A bucket on loopback."""

import socket
from collections.abc import Callable, Iterator

import pytest
from gcp_storage_emulator.server import create_server

BUCKET = "pictures"


@pytest.fixture(scope="module")
def upload() -> Iterator[Callable[[dict[str, bytes]], None]]:
    """Writes objects by name into gs://pictures, a bucket of an emulator to which clients of this process turn.

    No credentials are looked for.
    """
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions
    from google.cloud.storage import Client

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setattr(FileSystems, "_pipeline_options", PipelineOptions(["--no_auth"]))
        bucket = Client.create_anonymous_client().bucket(BUCKET)

        def write(files: dict[str, bytes]) -> None:
            for name, data in files.items():
                bucket.blob(name).upload_from_string(data)

        yield write
    server.stop()
