"""Images as users have them: the same embedding wherever they are embedded, and one error for one bad image."""

import base64
import io
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageFile
from tensorflow_serving.apis import predict_pb2

from components.image_example_gen import codec
from components.image_example_gen.config import IngestConfig
from pipeline import embed
from pipeline.serving import images
from pipeline.serving.config import ServeConfig
from pipeline.serving.images import ImageLimits

LIMITS = ImageLimits.of(ServeConfig("x"))


def picture(mode: str = "RGB", size: tuple[int, int] = (37, 29)) -> Image.Image:
    coarse = np.random.default_rng(5).integers(0, 256, (5, 5, 4), np.uint8)
    image = Image.fromarray(coarse, "RGBA").resize(size, Image.Resampling.BICUBIC)
    return image.convert(mode) if mode != "I;16" else Image.fromarray(np.uint16(np.asarray(image.convert("L"))) * 257)


def saved(format: str, mode: str = "RGB", size: tuple[int, int] = (37, 29), orientation: int = 1, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    told = {} if orientation == 1 else {"exif": exif}
    file = io.BytesIO()
    picture(mode, size).save(file, format, **told, **options)
    return file.getvalue()


def behind_pixels(png: bytes, orientation: int) -> bytes:
    """A PNG that tells its orientation after its pixels, as ImageMagick writes it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\x00\x00")
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return png[:-12] + chunk + png[-12:]


FORMATS = {
    "JPEG": saved("JPEG"),
    "large JPEG, which is shrunk in its DCT": saved("JPEG", size=(400, 300)),
    "progressive JPEG": saved("JPEG", progressive=True),
    "grey JPEG": saved("JPEG", "L"),
    "CMYK JPEG": saved("JPEG", "CMYK"),
    **{f"JPEG turned by EXIF {turn}": saved("JPEG", orientation=turn) for turn in range(2, 9)},
    "PNG": saved("PNG"),
    "grey PNG": saved("PNG", "L"),
    "16-bit PNG": saved("PNG", "I;16"),
    "palette PNG": saved("PNG", "P"),
    "PNG with alpha": saved("PNG", "RGBA"),
    "grey PNG with alpha": saved("PNG", "LA"),
    "PNG turned by EXIF": saved("PNG", orientation=6),
    "PNG turned by EXIF behind its pixels": behind_pixels(saved("PNG"), 8),
    "WebP": saved("WEBP"),
    "lossless WebP with alpha": saved("WEBP", "RGBA", lossless=True),
    "WebP turned by EXIF": saved("WEBP", orientation=3),
    "GIF": saved("GIF", "P"),
    "animated GIF": saved("GIF", "P", save_all=True, append_images=[picture("L")]),
    "BMP": saved("BMP"),
    "grey BMP": saved("BMP", "L"),
    "1 pixel over the smallest side": saved("PNG", size=(9, 60)),
}


def example(image: bytes) -> bytes:
    made = tf.train.Example()
    made.features.feature["image/encoded"].bytes_list.value.append(image)
    made.features.feature["image/label"].bytes_list.value.append(b"kept")
    made.features.feature["image/sha256"].bytes_list.value.append(codec.sha256(image).encode())
    made.features.feature["image/split"].bytes_list.value.append(b"train")
    return made.SerializeToString()


def b64(data: bytes) -> dict:
    return {"b64": base64.b64encode(data).decode()}


def by_grpc(server, rows: list[bytes], signature: str, name: str) -> predict_pb2.PredictResponse:
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "encoder", signature
    request.inputs[name].CopyFrom(tf.make_tensor_proto(rows, tf.string))
    return server.prediction.Predict(request, timeout=30)


def test_the_server_embed_and_the_evaluation_agree_for_every_format(server, encoders, evaluation, tmp_path):
    """To 1e-5, for the same bytes; through REST and gRPC, by bytes and by tf.Example."""
    (tmp_path / "images").mkdir()
    for number, data in enumerate(FORMATS.values()):
        (tmp_path / "images" / f"{number:02}.png").write_bytes(data)
    embed.embed(str(encoders(0)), str(tmp_path / "images"), str(tmp_path / "out.npz"))
    rows = np.load(tmp_path / "out.npz")
    bulk = rows["embedding"][np.argsort(rows["path"])]
    limits = codec.Limits(IngestConfig.max_pixels, IngestConfig.min_side)
    evaluated = evaluation([example(codec.canonical(data, limits).encoded) for data in FORMATS.values()])
    served = {
        "rest": server.predict(instances=list(map(b64, FORMATS.values()))).json()["predictions"],
        "rest, examples": server.predict(
            signature_name="examples", instances=[b64(example(data)) for data in FORMATS.values()]
        ).json()["predictions"],
        "grpc": tf.make_ndarray(by_grpc(server, list(FORMATS.values()), "", "image_bytes").outputs["embedding"]),
        "grpc, examples": tf.make_ndarray(
            by_grpc(server, list(map(example, FORMATS.values())), "examples", "examples").outputs["embedding"]
        ),
    }
    np.testing.assert_allclose(bulk, evaluated, atol=1e-5)
    for way, found in served.items():
        np.testing.assert_allclose(np.array(found, np.float32), bulk, atol=1e-5, err_msg=way)
    assert np.linalg.matrix_rank(bulk, tol=1e-3) > 1  # they are not all alike


def test_the_pixel_signature_agrees_with_the_model_called_directly(server, encoders):
    pixels = np.asarray(picture()).astype(np.float32)
    loaded = tf.saved_model.load(str(encoders(0)))
    want = loaded.signatures["pixels"](tf.constant(pixels[np.newaxis]))["embedding"].numpy()
    found = server.predict(signature_name="pixels", instances=[pixels.tolist()]).json()["predictions"]
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_what_counts_as_plain_needs_no_change(name):
    """What the header calls canonical is what a full decoding leaves as it is; the rest is decoded once more."""
    data = FORMATS[name]
    plain = codec.is_plain(data, codec.inspect(data, LIMITS.pixels))
    assert plain == (codec.canonical(data, LIMITS.pixels).encoded == data)


def bad_images() -> dict[str, bytes]:
    png, jpeg = saved("PNG", size=(200, 200)), saved("JPEG", size=(200, 200))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    header = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    bomb = png[:8] + b"\x00\x00\x00\x0d" + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]
    return {
        "empty": b"",
        "not_an_image": b"hello",
        "too_small": saved("PNG", size=(7, 100)),
        "too_many_pixels": bomb,
        "too_many_bytes": saved("PNG") + b"\0" * LIMITS.max_bytes,
        "truncated": png[: len(png) // 2],
        "truncated ": jpeg[: len(jpeg) // 2],
        "damaged": bytes(flipped),
        "damaged ": b"\x89PNG\r\n\x1a\n" + b"\0" * 50,
    }


@pytest.fixture(scope="module")
def mixed() -> tuple[list[bytes], dict[int, str]]:
    """64 images, of which some are bad, and the reason of each of these."""
    bad = bad_images()
    batch = [saved("JPEG", size=(30 + number, 30)) for number in range(64)]
    where = {7 * number: name for number, name in enumerate(bad)}
    for index, name in where.items():
        batch[index] = bad[name]
    return batch, {index: name.strip() for index, name in where.items()}


def test_bad_images_get_their_errors_and_the_others_their_embeddings_by_rest(server, mixed):
    batch, bad = mixed
    for document, answer in (
        ({"instances": list(map(b64, batch))}, "predictions"),
        ({"inputs": {"image_bytes": list(map(b64, batch))}}, "outputs"),
    ):
        found = server.predict(**document)
        assert found.status_code == 200
        body = found.json()
        assert {error["index"]: error["error"].partition(":")[0] for error in body["errors"]} == bad
        rows = np.array(body[answer], np.float32)  # null is NaN, so a client that knows of no errors goes on
        assert rows.shape == (64, 6)
        assert set(np.flatnonzero(np.isnan(rows).any(axis=1))) == set(bad)
        good = [index for index in range(64) if index not in bad]
        alone = server.predict(instances=[b64(batch[index]) for index in good]).json()
        assert "errors" not in alone
        np.testing.assert_allclose(rows[good], alone["predictions"], atol=1e-5)


def test_bad_images_get_their_errors_and_the_others_their_embeddings_by_grpc(server, mixed):
    batch, bad = mixed
    answer = by_grpc(server, batch, "", "image_bytes")
    errors = tf.make_ndarray(answer.outputs["error"])
    assert {index: text.decode().partition(":")[0] for index, text in enumerate(errors) if text} == bad
    rows = tf.make_ndarray(answer.outputs["embedding"])
    assert set(np.flatnonzero(np.isnan(rows).any(axis=1))) == set(bad)
    assert "error" not in by_grpc(server, batch[1:6], "", "image_bytes").outputs


def test_a_request_of_which_nothing_is_left_is_400(server, mixed):
    batch, bad = mixed
    before = server.metric('errors_total{kind="not_an_image"}')
    answer = server.predict(instances=[b64(batch[index]) for index in bad])
    assert answer.status_code == 400
    for index, reason in enumerate(bad.values()):
        assert f"instance {index}: {reason}" in answer.json()["error"]
    assert server.metric('errors_total{kind="not_an_image"}') == before + 1


def test_what_is_no_example_is_an_error_of_its_row(server):
    rows = [example(FORMATS["JPEG"]), b"\xff\xff", tf.train.Example().SerializeToString()]
    body = server.predict(signature_name="examples", instances=list(map(b64, rows))).json()
    assert [(error["index"], error["error"].partition(":")[0]) for error in body["errors"]] == [
        (1, "not_an_example"),
        (2, "not_an_example"),
    ]


def test_limits_are_checked_before_anything_is_decoded(monkeypatch):
    def decode(*_):
        raise AssertionError("decoded")

    bad = bad_images()
    rows = [bad[name] for name in ("too_small", "too_many_pixels", "too_many_bytes")]
    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    errors: dict[int, str] = {}
    assert list(images.prepared(rows, images.BARE, LIMITS, None, errors)) == []
    assert len(errors) == 3
    plain = [FORMATS["JPEG"], FORMATS["PNG"], FORMATS["grey JPEG"]]
    assert list(images.prepared(plain, images.BARE, LIMITS, None, {})) == [([0, 1, 2], plain)]
