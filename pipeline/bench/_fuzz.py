"""The process that the benchmark `fuzz` starts: python -m pipeline.bench._fuzz PACKAGES TARGET MODEL CORPUS FLAG...

Whatever comes out of a reader but a refusal ends it, with a traceback.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import console

if TYPE_CHECKING:
    from pipeline.serving.images import ImageLimits

Reader = Callable[[bytes], None]
_INSTRUMENTED = ["PIL", "components.image_example_gen", "pipeline.serving"]
_MAX_BYTES = 2**20
_MAX_PIXELS = 2**18


def main(packages: str, target: str, model: str, corpus: str, *flags: str) -> None:
    """Fuzzes one reader until its inputs are used up."""
    console.quiet(False)
    sys.path.append(packages)  # last, so that nothing of ours comes from there
    import atheris

    with atheris.instrument_imports(include=_INSTRUMENTED):
        reader, seeds = {"json": _json, "message": _message, "image": _image}[target](model)
    for number, seed in enumerate(seeds):
        Path(corpus, f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], corpus, *flags], reader)
    atheris.Fuzz()


def _json(model: str) -> tuple[Reader, Sequence[bytes]]:
    from pipeline.serving import tensors_json
    from pipeline.serving.model import Model
    from pipeline.serving.refusal import Refused

    loaded = Model(model, 1, _limits(), ThreadPoolExecutor(1))

    def read(data: bytes) -> None:
        with contextlib.suppress(Refused):
            document = tensors_json.parse(data)
            signature = loaded.signature(tensors_json.signature_name(document))
            signature.check(tensors_json.tensors(document, signature)[1])

    return read, [
        b'{"instances": [{"b64": "AAA="}]}',
        b'{"inputs": {"image_bytes": ["a", {"b64": "/9j/"}]}, "signature_name": ""}',
        b'{"instances": [{"image": [[[1, 2.5, 3]]]}], "signature_name": "pixels"}',
        b'{"inputs": [[[[NaN, -Infinity, 16777216]]]], "signature_name": "pixels"}',
    ]


def _message(model: str) -> tuple[Reader, Sequence[bytes]]:
    import numpy as np
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2

    from pipeline.serving import grpc_service
    from pipeline.serving.model import Model
    from pipeline.serving.refusal import Refused

    loaded = Model(model, 1, _limits(), ThreadPoolExecutor(1))

    def read(data: bytes) -> None:
        with contextlib.suppress(Refused):
            request = grpc_service.parsed(predict_pb2.PredictRequest, data)
            signature = loaded.signature(request.model_spec.signature_name)
            signature.check(grpc_service.tensors_of(request.inputs, signature, _MAX_BYTES))

    def seed(signature: str, name: str, value: object) -> bytes:
        request = predict_pb2.PredictRequest()
        request.model_spec.signature_name = signature
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
        return request.SerializeToString()

    return read, [
        seed("", "image_bytes", [b"a", b"b"]),
        seed("pixels", "image", np.zeros((1, 2, 2, 3), np.float32)),
        seed("pixels", "image", tf.zeros((1, 1, 1, 3))),
    ]


def _image(_: str) -> tuple[Reader, Sequence[bytes]]:
    from PIL import Image

    from pipeline.serving import images

    limits, pool = _limits(), ThreadPoolExecutor(1)

    def read(data: bytes) -> None:
        for _ in images.prepared([data], images.BARE, limits, pool, {}):
            images.explain(data, images.BARE, limits)

    def seeds() -> Iterator[bytes]:
        picture = Image.radial_gradient("L").resize((24, 16))
        exif = Image.Exif()
        exif[0x0112] = 6
        for mode, kind in (
            ("RGB", "JPEG"),
            ("CMYK", "JPEG"),
            ("RGBA", "PNG"),
            ("P", "GIF"),
            ("L", "BMP"),
            ("RGB", "WEBP"),
        ):
            file = io.BytesIO()
            picture.convert(mode).save(file, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
            yield file.getvalue()

    return read, list(seeds())


def _limits() -> "ImageLimits":
    from components.image_example_gen.codec import Limits
    from pipeline.serving import images

    return images.ImageLimits(_MAX_BYTES, Limits(_MAX_PIXELS, 8), 2 * _MAX_PIXELS)


if __name__ == "__main__":
    main(*sys.argv[1:])
