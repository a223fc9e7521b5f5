"""What is refused of --images by names alone, and what a source with {SPAN} says of its folders."""

import os
from pathlib import Path

import pytest

from pipeline import source
from trainer_module.errors import UserError

GIF = b"GIF89a" + bytes(20)


@pytest.fixture
def spans(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("padded/01", "padded/02", "plain/9", "plain/10", "days/2026-11-01", "days/2026-11-23", "both/v1/007"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.gif").write_bytes(GIF)
    return tmp_path


def refusal(images: str) -> str:
    with pytest.raises(UserError) as caught:
        source.check(images)
    return str(caught.value)


@pytest.mark.parametrize("images", ["http://example.org/cats", "HTTPS://example.org/x.tar", "file:///tmp/x"])
def test_a_scheme_that_is_not_read_is_refused_with_what_is(images):
    text = refusal(images)
    assert f"{images.partition(':')[0]}:// is not read" in text
    assert "tar files or TFRecords on this machine or on gs://" in text
    assert "pip" not in text


def test_a_name_that_is_no_utf_8_is_refused_and_a_link_to_it_is_read(tmp_path: Path):
    folder = os.fsencode(tmp_path) + b"/lat\xffin"
    os.mkdir(folder)
    Path(os.fsdecode(folder), "a.gif").write_bytes(GIF)
    for images in (os.fsdecode(folder), os.fsdecode(folder) + "/*"):
        text = refusal(images)
        assert "lat\\xffin" in text
        assert "not valid UTF-8" in text
        assert text.isprintable()
    os.symlink(folder, tmp_path / "latin")
    source.check(str(tmp_path / "latin"))


@pytest.mark.parametrize(
    "images",
    ["padded/{SPAN:2}", "padded/{SPAN:2}/*.gif", "plain/{SPAN}", "days/{YYYY}-{MM}-{DD}", "both/v{VERSION}/{SPAN:3}"],
)
def test_spans_that_are_numbered_as_the_source_says_are_read(spans, images):
    source.check(images)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("padded/{SPAN}", ["padded/01", "e.g. --images 'padded/{SPAN:2}'"]),
        ("both/v{VERSION:1}/{SPAN}", ["v1/007", "e.g. --images 'both/v{VERSION:1}/{SPAN:3}'"]),
        ("plain/{SPAN:2}", ["plain/9", "not the 2 digits of {SPAN:2}"]),
        ("days/{SPAN}", ["days/2026-11-01", "'2026-11-01' where {SPAN} stands for a number"]),
    ],
)
def test_spans_that_are_not_are_refused_with_the_folder_and_no_regular_expression(spans, images, words):
    text = refusal(images)
    for word in [f"--images {images}: ", *words]:
        assert word in text
    assert "(?P" not in text


@pytest.mark.parametrize(
    ("images", "newest"),
    [
        ("padded/{SPAN:2}", "padded/02"),
        ("plain/{SPAN}/*.gif", "plain/10/a.gif"),
        ("days/{YYYY}-{MM}-{DD}", "days/2026-11-23"),
    ],
)
def test_where_one_span_is_wanted_the_newest_is_named(spans, images, newest):
    with pytest.raises(UserError) as caught:
        source.without_span(images)
    assert str(caught.value).endswith(f"name the folder or files of one; e.g. --images {spans / newest}")


def test_a_source_without_spans_and_a_folder_that_is_called_like_one_pass(spans):
    (spans / "{SPAN}").mkdir()
    for images in ("padded/01", "padded/*", "gs://bucket/x", "{SPAN}"):
        source.without_span(images)
