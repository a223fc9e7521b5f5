"""The picture page: whole in one file, the same each time, right in what it shows, and safe whatever names say."""

import dataclasses
import html.parser
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from materials import make_card, make_material, make_split
from PIL import Image

from components.model_card import pictures
from components.model_card.card import Recall
from components.model_card.page import Limits, shown, to_html
from components.model_card.pictures import Split

NASTY = '</svg><script>alert("1")</script> & $x^2$ <img src=http://x.test/>'


class Reader(html.parser.HTMLParser):
    """What a browser would find: elements that are open and never closed, all attributes, and the text."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(train, held_out, **changes) -> str:
    return to_html(make_card(), dataclasses.replace(make_material(train, held_out), **changes))


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(["birds", "frogs", "newts"] * 20, ["birds", "frogs", "newts", None] * 5)


def test_the_page_needs_no_other_file_no_network_and_no_script(page):
    reader = Reader(page)
    assert not reader.open
    assert "script" not in reader.tags
    addresses = [value for name, value in reader.attributes if name in ("src", "href", "xlink:href")]
    assert {a.split(",")[0] for a in addresses if not a.startswith("#")} == {
        "data:image/jpeg;base64",
        "data:image/png;base64",
        "model_card.md",
    }
    assert not [url for url in re.findall(r"url\(([^)]*)\)", page) if not url.startswith("#")]
    assert "default-src 'none'" in page


def test_ids_are_of_one_element_each_and_all_that_is_pointed_at_is_there(page):
    attributes = Reader(page).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    pointed = [value[1:] for name, value in attributes if name.endswith("href") and value.startswith("#")]
    pointed += re.findall(r"url\(#([^)]*)\)", page)
    assert pointed
    assert set(pointed) <= set(ids)


def test_both_themes_are_told_and_the_plots_take_the_page_s_ink(page):
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#010203" not in page
    assert "#ffffff" not in page.split("</style>")[1]


def test_equal_material_gives_equal_bytes_in_another_process_with_other_threads():
    program = """
import sys, threadpoolctl
threadpoolctl.threadpool_limits(1)
sys.path[:0] = sys.argv[1:]
from materials import make_card, make_material
from components.model_card.page import to_html
sys.stdout.buffer.write(to_html(make_card(), make_material(["a", "b", None] * 40, ["a", "b"] * 20)).encode())
"""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[3])]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    there = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, check=True, env=environment
    ).stdout
    assert len(there) > 100_000
    assert there == page_of(["a", "b", None] * 40, ["a", "b"] * 20).encode()


def test_each_query_stands_with_its_nearest_neighbours_and_words_say_which_are_right():
    ways = np.eye(3, dtype=np.float32)
    picture = Image.new("RGB", (8, 8))
    bank = Split(ways, ("birds", "frogs", "newts"), (picture,) * 3)
    close = np.array([[0.8, 0.6, 0.0]], np.float32)
    queries = Split(close, ("frogs",), (picture,))
    rows, similarity = pictures.nearest(bank, queries, 2)
    assert rows.tolist() == [[0, 1]]
    assert similarity[0] == pytest.approx([0.8, 0.6])
    material = dataclasses.replace(make_material(["birds"], ["frogs"]), bank=bank, queries=queries)
    reader = Reader(to_html(make_card(), material, Limits(neighbours=2)))
    assert "held out frogs ✗ 0.80 birds ✓ 0.60 frogs" in reader.text
    assert [value for name, value in reader.attributes if name == "aria-label"][:2] == ["another class", "same class"]


def test_queries_are_the_first_of_the_sample_and_no_more_than_asked_for(page):
    assert page.count('<figure class="query">') == 12
    reader = Reader(page)
    assert "12 of the held-out images, chosen by a hash" in reader.text
    material = make_material(["a"] * 5, ["a"] * 3)
    assert dataclasses.astuple(shown(material)) == (5, 3, 3, 5, 8)
    assert page_of(["a"] * 5, ["a"] * 3).count('<figure class="same">') == 15


def test_names_are_shown_as_they_are_and_never_run():
    material = make_material([NASTY, "b"] * 20, [NASTY, "b"] * 5)
    reader = Reader(to_html(make_card(name=NASTY), material))
    assert not reader.open
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert not [value for name, value in reader.attributes if "x.test" in value and name not in ("title", "alt")]
    assert NASTY in reader.text  # heading and neighbours
    assert NASTY[:20] in " ".join(reader.words[reader.words.index("Map of the embeddings") :])  # legend, cut


def test_recall_of_each_class_is_that_of_the_confusion_matrix_with_wilson_s_interval():
    counts = np.array([[2, 1, 0, 0], [3, 1, 4, 0], [0, 0, 0, 0], [0, 0, 0, 5]])
    first, second, last = pictures.recall(["a", "b", "c", "d"], counts)
    # Wilson's interval of 2 of 3, by his formula.
    z, n, p = 1.959964, 3, 2 / 3
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * (p * (1 - p) / n + (z / (2 * n)) ** 2) ** 0.5
    assert (first.label, first.images, first.value, first.taken_for) == ("a", 3, pytest.approx(2 / 3), "b")
    assert first.low == pytest.approx((middle - half) / scale, abs=1e-5)
    assert first.high == pytest.approx((middle + half) / scale, abs=1e-5)
    assert (second.label, second.images, second.value, second.taken_for) == ("b", 8, 1 / 8, "c")
    assert (last.label, last.value, last.taken_for) == ("d", 1.0, None)
    assert "taken for a 3 0.67 b" in Reader(page_of(["a"], ["a"], recall=[first])).text


def test_bars_are_sorted_and_the_best_and_worst_stay_where_there_are_too_many_classes():
    found = [Recall(f"class {n:03d}", 10, n / 100, 0.0, 1.0, None) for n in range(100)]
    text = page_of(["a"] * 5, ["a"], recall=found)
    names = re.findall(r'<th scope="row">class (\d+)', text)
    assert names == [f"{n:03d}" for n in [*range(99, 79, -1), *range(19, -1, -1)]]
    assert "60 of 100 classes in between are not shown" in text
    assert "are not shown" not in page_of(["a"] * 5, ["a"], recall=found[:40])


def test_the_curves_of_a_long_training_are_thinned_and_absent_ones_leave_no_heading():
    long, short = (to_html(make_card(), make_material(["a"], ["a"], intervals=n)) for n in (100_000, 500))
    assert len(long) < 1.2 * len(short)
    assert "<h2>Training</h2>" in short
    assert "<h2>Training</h2>" not in page_of(["a"], ["a"], intervals=[])


def test_unlabelled_images_get_neighbours_and_a_map_and_no_marks():
    text = Reader(page_of([None] * 40, [None] * 20)).text
    assert "✓" not in text
    assert "✗" not in text
    assert "60 images (20 held out, 40 of the training images) by t-SNE" in text
    assert "There are no labels in both splits" in text


@pytest.mark.parametrize(("train", "held_out"), [(["a"], ["a"]), ([None], [None]), (["a", "b"], ["c"]), ([], ["a"])])
def test_a_few_images_make_a_page(train, held_out):
    text = page_of(train, held_out)
    assert not Reader(text).open
    assert "principal components" in text


def test_embeddings_that_are_not_finite_are_counted_and_a_page_of_none_is_still_one():
    material = make_material(["a"] * 3, ["a"] * 2)
    nothing = Split(np.zeros((0, 16), np.float32), (), (), dropped=3)
    text = to_html(make_card(), dataclasses.replace(material, bank=nothing, queries=nothing, recall=[]))
    assert "6 embeddings are NaN or infinite" in text
    assert "There are no images to compare" in text
    assert "There are no images to show" in text


def test_a_collapsed_encoder_s_map_is_one_point():
    points, method = pictures.project(np.ones((50, 8), np.float32))
    assert method == "principal components"
    assert np.ptp(points) == 0.0


def test_the_map_keeps_apart_what_is_apart():
    split = make_split(["a", "b", "c"] * 40, 3)
    points, method = pictures.project(split.embedding)
    assert method == "t-SNE"
    assert (points.min(), points.max()) == (0.0, 1.0)
    clusters = [points[np.array(split.labels) == name] for name in "abc"]
    middles = np.array([cluster.mean(axis=0) for cluster in clusters])
    width = max(np.linalg.norm(cluster - cluster.mean(axis=0), axis=1).mean() for cluster in clusters)
    assert np.linalg.norm(middles - np.roll(middles, 1, axis=0), axis=1).min() > 2 * width


def test_images_on_the_map_lie_apart():
    points = np.random.default_rng(0).random((500, 2))
    chosen = pictures.spread(points, 0.1)
    gaps = np.abs(points[chosen][:, None] - points[chosen]).max(axis=2)[np.triu_indices(len(chosen), 1)]
    assert len(chosen) > 30
    assert gaps.min() >= 0.1


def test_where_images_must_not_be_shown_there_are_none():
    material = make_material(["a", "b"] * 10, ["a", "b"] * 5)
    bank, queries = (dataclasses.replace(split, thumbnails=()) for split in (material.bank, material.queries))
    hidden = dataclasses.replace(material, bank=bank, queries=queries)
    text = to_html(make_card(), hidden)
    assert "img" not in Reader(text).tags
    assert "data:image" not in text
    assert "Images are not shown" in text
    assert "30 images (10 held out, 20 of the training images)" in text
    assert shown(hidden).queries == 0


def test_a_full_page_of_the_worst_images_stays_below_two_megabytes():
    material = make_material([f"class {n}" for n in range(50)] * 10, [f"class {n}" for n in range(50)] * 10, size=80)
    assert 500_000 < len(to_html(make_card(), material).encode()) < 2_000_000


@pytest.mark.parametrize(
    ("mode", "kind", "size"), [("L", "JPEG", (640, 480)), ("RGB", "JPEG", (10, 900)), ("RGB", "PNG", (4, 4))]
)
def test_a_thumbnail_fits_keeps_its_shape_and_is_never_larger_than_the_image(mode, kind, size):
    file = io.BytesIO()
    Image.new(mode, size, "red" if mode == "RGB" else 90).save(file, kind)
    small = pictures.thumbnail(file.getvalue(), 80)
    assert small.mode == "RGB"
    assert max(small.size) == min(80, max(size))
    assert small.size[0] / small.size[1] == pytest.approx(size[0] / size[1], rel=0.2)
