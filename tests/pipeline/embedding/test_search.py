"""./moco search: the nearest images of an index by image or by path, as text, JSON and a page of pictures."""

import dataclasses
import html.parser
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from colours import Colours
from PIL import Image

from pipeline import cli
from pipeline.embed import embed
from pipeline.embedding import index as indexes
from pipeline.embedding import page
from pipeline.embedding.index import Index, open_index
from pipeline.embedding.search import search, text
from trainer_module.errors import UserError

EVIL = "<script>alert('x')</script> & \"y\".png"


@pytest.fixture(scope="module")
def made(tmp_path_factory, pushed, sample_images) -> Path:
    """A source with folders, an archive, a twin, a name that is HTML and a torn picture; and its embeddings."""
    home = tmp_path_factory.mktemp("search")
    source = home / "source"
    for label in ("flags", "food"):
        (source / label).mkdir(parents=True)
        for number, data in enumerate(sample_images[label][:4]):
            (source / label / f"{number}.png").write_bytes(data)
    shutil.copy(source / "food" / "0.png", source / "food" / "twin.png")
    (source / EVIL.replace("/", "_")).write_bytes(sample_images["flags"][9])
    (source / "torn.png").write_bytes(sample_images["flags"][0][:99])
    with tarfile.open(source / "more.tar", "w") as tar:
        for number, data in enumerate(sample_images["flags"][4:7]):
            member = tarfile.TarInfo(f"deep/flags/{number}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for name in ("index.parquet", "index.npz", "index/"):
        embed(str(pushed), str(source), f"{home}/{name}", batch=4, shard_rows=4)
    return home


@pytest.fixture(params=["index.parquet", "index.npz", "index/"])
def index(made, request) -> Index:
    return open_index(f"{made}/{request.param}")


def brute(made: Path, path: str, k: int) -> list[tuple[str, float]]:
    """The k nearest by all cosine similarities in float64, ties in the order of the rows."""
    rows = [row for row in pq.read_table(made / "index.parquet").to_pylist() if row["embedding"]]
    vectors = np.array([row["embedding"] for row in rows], np.float64)
    similarities = vectors @ vectors[[row["path"] for row in rows].index(path)]
    order = np.argsort(-similarities.astype(np.float32), kind="stable")[:k]
    return [(rows[row]["path"], similarities[row]) for row in order]


def test_the_nearest_of_a_row_are_those_of_an_exhaustive_search(made, index):
    for name in ("food/0.png", "more.tar/deep/flags/1.png"):
        (found,) = search(index, [name], 7)
        expected = brute(made, name, 7)
        assert [hit.path for hit in found.hits] == [path for path, _ in expected]
        np.testing.assert_allclose([hit.similarity for hit in found.hits], [one for _, one in expected], atol=1e-6)
        assert [hit.rank for hit in found.hits] == list(range(1, 8))
        assert found.hits[0].similarity == pytest.approx(1, abs=1e-6)


def test_rows_are_counted_through_all_parts_of_an_index(made, monkeypatch):
    monkeypatch.setattr(indexes, "_ROWS", 2)
    (found,) = search(open_index(f"{made}/index.npz"), ["food/0.png"], 9)
    assert [hit.path for hit in found.hits] == [path for path, _ in brute(made, "food/0.png", 9)]


def test_an_image_finds_itself_and_its_twin_first(made, index):
    (found,) = search(index, [str(made / "source" / "food" / "0.png")], 3)
    assert {hit.path for hit in found.hits[:2]} == {"food/0.png", "food/twin.png"}
    assert found.hits[1].similarity == pytest.approx(1, abs=1e-5)
    assert {hit.label for hit in found.hits[:2]} == {"food"}


def test_several_queries_are_answered_in_their_order_each_under_its_name(made, index):
    names = ["food/1.png", str(made / "source" / "flags" / "2.png")]
    found = search(index, names, 2)
    assert [one.query.name for one in found] == names
    assert [one.hits[0].path for one in found] == ["food/1.png", "flags/2.png"]
    lines = text(found)
    assert lines[0] == names[0]
    assert lines[1].split() == ["1", "1.0000", "food/1.png", "food"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--query", "nowhere.png"], ["nowhere.png", "no such file", "no image of that path"]),
        (["--query", "torn.png"], ["torn.png", "has no embedding", "truncated"]),
        (["--query", "{source}/torn.png"], ["torn.png", "not usable as an image"]),
        (["--query", "{source}/more.tar"], ["more.tar", "not_an_image"]),
        (["--query", "food/0.png", "-k", "0"], ["-k 0", "at least 1"]),
        (["--query", "food/0.png", "-k", "14"], ["-k 14", "only 13", "-k 13"]),
        (["--query", "{source}/food/0.png", "--model", "/nowhere"], ["--model /nowhere", "no such folder"]),
        (["--query", "food/0.png", "--html", "/nowhere/x.html"], ["--html /nowhere/x.html", "does not exist"]),
        (["--query", "food/0.png", "--json", "{source}"], ["--json", "is a folder"]),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(made, capsys, arguments, words):
    typed = [argument.format(source=made / "source") for argument in arguments]
    assert cli.main(["search", "--index", str(made / "index.parquet"), *typed]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in words:
        assert word in said


def test_an_index_that_is_none_is_refused(made, tmp_path):
    whole = (made / "index.parquet").read_bytes()
    (tmp_path / "torn.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no index")
    np.savez(tmp_path / "old.npz", path=np.array(["x"]))
    pq.write_table(pq.read_table(made / "index.parquet").replace_schema_metadata({}), tmp_path / "old.parquet")
    (tmp_path / "folder").mkdir()
    shutil.copytree(made / "index", tmp_path / "lost")
    next((tmp_path / "lost").glob("part-*")).unlink()
    for name, reason in {
        "nowhere.parquet": "no such file",
        "torn.parquet": "damaged",
        "text.npz": "damaged",
        "old.npz": "does not say which model",
        "old.parquet": "does not say which model",
        "folder": "_index.json",
        "lost": "part-",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            open_index(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_image_is_embedded_by_the_model_of_the_index_and_no_other(made, index, pushed, tmp_path):
    query = str(made / "source" / "food" / "0.png")
    other = Colours(seed=1)
    tf.saved_model.save(other, str(tmp_path / "other"), signatures={"serving_default": other.serving_default})
    with pytest.raises(UserError, match="is not the model that made"):
        search(index, [query], 3, str(tmp_path / "other"))
    with pytest.raises(UserError, match="is not the model that made"):
        search(index, ["food/0.png"], 3, str(tmp_path / "other"))
    shutil.copytree(pushed / "7", tmp_path / "copy")
    expected = search(index, [query], 3)
    moved = dataclasses.replace(index, about=dataclasses.replace(index.about, model=str(tmp_path / "gone")))
    assert search(moved, [query], 3, str(tmp_path / "copy"))[0].hits == expected[0].hits
    assert search(moved, ["food/0.png"], 3)[0].hits[0].path == "food/0.png"
    with pytest.raises(UserError, match=r"gone: there is no such folder.*--model"):
        search(moved, [query], 3)


def test_the_command_prints_and_writes_what_was_found(made, tmp_path, capsys):
    arguments = ["search", "--index", str(made / "index.parquet"), "--query", "food/0.png", "-k", "3"]
    assert cli.main([*arguments, "--json", str(tmp_path / "x.json"), "--html", str(tmp_path / "x.html")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["1", "2", "3"]
    document = json.loads((tmp_path / "x.json").read_text())
    assert [hit["path"] for hit in document["results"][0]["hits"]] == [line.split()[2] for line in printed]
    assert (tmp_path / "x.html").read_text().startswith("<!DOCTYPE html>")


# The page.


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.said = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.said += data


def test_the_page_shows_every_picture_and_asks_no_network(index):
    made_page = Page(page.to_html(search(index, ["food/0.png", "more.tar/deep/flags/1.png"], 6), index))
    pictures = [attributes["src"] for tag, attributes in made_page.tags if tag == "img"]
    assert len(pictures) == 2 + 2 * 6
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in pictures)
    assert "picture not found" not in made_page.said
    others = [value for tag, attributes in made_page.tags if tag != "img" for value in attributes.values() if value]
    assert not any("://" in value for value in others)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in made_page.tags}


def test_a_name_is_never_taken_for_html(made, index):
    name = EVIL.replace("/", "_")
    source = page.to_html(search(index, [name], 2), index)
    assert "<script" not in source
    made_page = Page(source)
    assert name in made_page.said
    assert name in [attributes.get("alt") for tag, attributes in made_page.tags if tag == "img"]


def test_a_picture_that_moved_or_changed_is_said_to_be_missing_in_its_place(made, tmp_path, pushed):
    source = tmp_path / "source"
    shutil.copytree(made / "source", source)
    embed(str(pushed), str(source), f"{tmp_path}/index.parquet")
    index = open_index(f"{tmp_path}/index.parquet")
    found = search(index, ["food/0.png"], 13)
    (source / "food" / "1.png").unlink()
    shutil.copy(source / "food" / "3.png", source / "food" / "2.png")
    (source / "more.tar").unlink()
    made_page = Page(page.to_html(found, index))
    assert made_page.said.count("picture not found") == 1 + 1 + 3
    assert len([tag for tag, _ in made_page.tags if tag == "img"]) == 1 + 13 - 5
    shutil.rmtree(source)
    assert Page(page.to_html(found, index)).said.count("picture not found") == 1 + 13


def test_pictures_are_upright_and_small_on_the_page(tmp_path, made):
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    Image.new("RGB", (900, 300), "red").save(stream, "JPEG", exif=exif)
    (tmp_path / "wide.jpg").write_bytes(stream.getvalue())
    index = open_index(f"{made}/index.parquet")
    source = page.to_html(search(index, [str(tmp_path / "wide.jpg")], 1), index)
    uri = next(attributes["src"] for tag, attributes in Page(source).tags if tag == "img")
    picture = Image.open(io.BytesIO(tf.io.decode_base64(uri.split(",")[1].replace("+", "-").replace("/", "_")).numpy()))
    assert picture.size == (67, 200)
