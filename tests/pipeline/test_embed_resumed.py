"""./moco embed after an interruption at any moment: takes over what is finished and ends with the same bytes."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faulty_storage
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from colours import Colours

from components.image_example_gen import finding
from pipeline import cli
from pipeline.embed import embed
from pipeline.embedding import store
from pipeline.embedding.encoder import Encoder
from pipeline.embedding.index import open_index
from trainer_module.errors import UserError

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path, sample_images) -> Path:
    """A folder of 14 pictures and a torn one."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number, data in enumerate(sample_images["flags"][:14]):
        (folder / f"{number:02}.png").write_bytes(data)
    (folder / "99.png").write_bytes(sample_images["flags"][0][:99])
    return folder


@pytest.fixture
def model_calls(monkeypatch) -> list[bytes]:
    """What the model has been given, image by image."""
    seen: list[bytes] = []
    original = Encoder.__call__

    def call(self, encoded):
        seen.extend(encoded)
        return original(self, encoded)

    monkeypatch.setattr(Encoder, "__call__", call)
    return seen


# The command with shards that are soon finished.
SMALL_SHARDS = """
import functools, sys
from pipeline import cli, embed
embed.embed = functools.partial(embed.embed, shard_rows=2)
sys.exit(cli.main(["embed", "--model", sys.argv[1], "--images", sys.argv[2], "--out", sys.argv[3], "--batch", "2"]))
"""


@pytest.mark.parametrize(
    ("name", "sent", "code"),
    [("out.parquet", signal.SIGKILL, -signal.SIGKILL), ("out.npz", signal.SIGTERM, cli.INTERRUPTED)],
)
def test_a_run_that_was_killed_goes_on_and_ends_with_the_bytes_of_an_unbroken_one(
    tmp_path, pushed, sample_images, name, sent, code, model_calls
):
    source = tmp_path / "source"
    source.mkdir()
    pictures = [data for images in sample_images.values() for data in images][:100]
    for number, data in enumerate(pictures):
        (source / f"{number:04}.png").write_bytes(data)
    out, work = tmp_path / name, tmp_path / f".{name}.parts"
    out.write_text("the old one")
    arguments = [sys.executable, "-c", SMALL_SHARDS, str(pushed), str(source), str(out)]
    with subprocess.Popen(arguments, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        while len(list(work.glob("part-*"))) < 5:
            assert process.poll() is None, "it was too quick to be killed"
            time.sleep(0.005)
        os.killpg(process.pid, sent)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    if sent == signal.SIGTERM:
        assert said.splitlines()[-1] == "moco: interrupted; the same command continues"
        assert "Traceback" not in said
    assert out.read_text() == "the old one"
    finished = list(work.glob("part-*"))
    summary = embed(str(pushed), str(source), str(out), batch=2, shard_rows=2)
    assert summary.images == 100
    assert summary.kept == 2 * len(finished)
    assert len(model_calls) == 100 - summary.kept
    embed(str(pushed), str(source), str(tmp_path / f"unbroken{name}"), batch=2)
    assert out.read_bytes() == (tmp_path / f"unbroken{name}").read_bytes()
    assert sorted(os.listdir(tmp_path)) == sorted(["source", name, f"unbroken{name}"])


@pytest.mark.parametrize("name", ["out.parquet", "out/"])
def test_a_stop_at_any_write_loses_nothing_and_leaves_nothing(tmp_path, pushed, source, monkeypatch, name, model_calls):
    (tmp_path / "broken").mkdir()
    out = str(tmp_path / "broken") + "/" + name
    written: set[str] = set()
    while stops_at_a_new_write(monkeypatch, written, str(pushed), str(source), out):
        assert name == "out/" or not os.path.exists(out)
    assert len(model_calls) == 14, "what was not written was embedded again, or what was written"
    unbroken = f"{tmp_path}/unbroken{name[3:]}"
    embed(str(pushed), str(source), unbroken, batch=4, shard_rows=8)
    assert files(Path(unbroken)) == files(Path(out))
    assert not [entry for entry in os.listdir(tmp_path / "broken") if entry.startswith(".")]


def stops_at_a_new_write(monkeypatch, written: set[str], model: str, source: str, out: str) -> bool:
    """Whether a run came to a file that was never written; it is interrupted once that has been."""
    original = store.write

    def write(path, data):
        new = path not in written
        original(path, data)
        written.add(path)
        if new:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store, "write", write)
        try:
            embed(model, source, out, batch=4, shard_rows=8)
        except (Exception, KeyboardInterrupt) as error:
            return cli.was_interrupted(error) or pytest.fail(str(error))
    return False


def files(path: Path) -> dict[str, bytes]:
    """The files of a folder without its lock, or the one file."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.name != ".lock"}


def interrupt(out: str, *arguments) -> None:
    """Leaves a work folder with finished shards behind, as a kill after the last one does."""
    finish = embed.__globals__["_finish"]
    embed.__globals__["_finish"] = lambda *_: signal.raise_signal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            embed(*arguments, out, batch=2, shard_rows=4)
    finally:
        embed.__globals__["_finish"] = finish


def test_of_images_that_changed_between_two_starts_only_their_shards_are_made_anew(tmp_path, pushed, source):
    out = str(tmp_path / "out.parquet")
    interrupt(out, str(pushed), str(source))
    shutil.copy(source / "00.png", source / "05.png")
    shards = sorted(tmp_path.glob(".out.parquet.parts/part-*"))
    shards[0].write_bytes(shards[0].read_bytes()[:-9])  # as a power cut may leave it
    summary = embed(str(pushed), str(source), out, batch=2, shard_rows=4)
    assert summary.kept == 15 - 4 - 4
    embed(str(pushed), str(source), str(tmp_path / "new.parquet"), batch=2)
    assert Path(out).read_bytes() == (tmp_path / "new.parquet").read_bytes()


def test_nothing_is_taken_over_from_another_model_or_another_batch(tmp_path, pushed, source):
    out = str(tmp_path / "out.parquet")
    other = Colours(seed=1)
    tf.saved_model.save(other, str(tmp_path / "other"), signatures={"serving_default": other.serving_default})
    interrupt(out, str(pushed), str(source))
    assert embed(str(tmp_path / "other"), str(source), out, batch=2, shard_rows=4).kept == 0
    embed(str(tmp_path / "other"), str(source), str(tmp_path / "new.parquet"), batch=2)
    assert Path(out).read_bytes() == (tmp_path / "new.parquet").read_bytes()
    interrupt(out, str(pushed), str(source))
    assert embed(str(pushed), str(source), out, batch=4, shard_rows=4).kept == 0


def test_a_model_that_moved_is_the_same_model(tmp_path, pushed, source):
    out = str(tmp_path / "out.parquet")
    interrupt(out, str(pushed), str(source))
    shutil.copytree(pushed / "7", tmp_path / "moved")
    assert embed(str(tmp_path / "moved"), str(source), out, batch=2, shard_rows=4).kept == 15


def test_an_image_that_vanishes_meanwhile_gets_an_error_that_the_next_start_mends(
    tmp_path, pushed, source, monkeypatch
):
    original = finding.read_again

    def read_again(ref, sha):
        if ref.path == "03.png":
            raise OSError("the network is down")
        return original(ref, sha)

    monkeypatch.setattr(finding, "read_again", read_again)
    out = str(tmp_path / "out/")
    assert out.endswith("out")
    assert embed(str(pushed), str(source), f"{out}/", batch=2, shard_rows=4).errors == 2
    rows = {row["path"]: row["error"] for row in pq.read_table(out).to_pylist() if row["error"]}
    assert rows["03.png"] == "unreadable: the network is down"
    monkeypatch.setattr(finding, "read_again", original)
    summary = embed(str(pushed), str(source), f"{out}/", batch=2, shard_rows=4)
    assert (summary.errors, summary.kept) == (1, 11)


def test_a_folder_is_brought_up_to_date_and_its_index_says_what_counts(tmp_path, pushed, source):
    out = tmp_path / "out"
    embed(str(pushed), str(source), f"{out}/", batch=2, shard_rows=4)
    names = [name for name in sorted(os.listdir(out)) if name.startswith("part-")]
    assert json.loads((out / "_index.json").read_text())["parts"] == names
    assert len(names) == 4
    shutil.copy(source / "01.png", source / "98.png")
    assert embed(str(pushed), str(source), f"{out}/", batch=2, shard_rows=4).kept == 12
    index = open_index(str(out))
    assert index.rows == 16
    paths = [path for table in index.tables(["path"]) for path in table["path"].to_pylist()]
    assert paths == sorted(path.name for path in source.iterdir())
    assert pq.read_table(out)["path"].to_pylist() == paths  # what was replaced is gone
    for name in ("12.png", "13.png", "98.png", "99.png"):
        (source / name).unlink()
    assert embed(str(pushed), str(source), f"{out}/", batch=2, shard_rows=4).kept == 12
    assert pq.read_table(out).num_rows == 12
    assert sorted(entry for entry in os.listdir(out) if not entry.startswith("part-")) == [".lock", "_index.json"]


def test_a_folder_on_gs_holds_what_one_on_disk_holds_and_goes_on_too(tmp_path, pushed, source, monkeypatch):
    with faulty_storage.storage() as storage, faulty_storage.proxy(storage) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", faulty_storage.url(proxy))
        embed(str(pushed), str(source), f"{tmp_path}/out/", batch=2, shard_rows=4)
        embed(str(pushed), str(source), "gs://models/embeddings/", batch=2, shard_rows=4)
        here, there = open_index(f"{tmp_path}/out"), open_index("gs://models/embeddings/")
        assert here.about == there.about
        columns = ["path", "embedding", "error"]
        assert list(here.tables(columns)) == list(there.tables(columns))
        (source / "99.png").unlink()
        assert embed(str(pushed), str(source), "gs://models/embeddings/", batch=2, shard_rows=4).kept == 12


def test_two_runs_do_not_write_one_file_at_a_time(tmp_path, pushed, source):
    work = tmp_path / ".out.parquet.parts"
    work.mkdir()
    with (work / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another run uses .*--out"):
            embed(str(pushed), str(source), str(tmp_path / "out.parquet"))


def test_embeddings_are_found_again_as_they_were(tmp_path, pushed, source):
    for name in ("out.parquet", "out.npz", "out/"):
        embed(str(pushed), str(source), f"{tmp_path}/{name}", batch=2, shard_rows=4)
    indexes = [open_index(f"{tmp_path}/{name}") for name in ("out.parquet", "out.npz", "out")]
    columns = ["path", "sha256", "embedding", "error", "label"]
    first, *others = ([row for table in index.tables(columns) for row in table.to_pylist()] for index in indexes)
    assert len(first) == 15
    assert all(np.isfinite(row["embedding"]).all() for row in first if not row["error"])
    assert all(rows == first for rows in others)
