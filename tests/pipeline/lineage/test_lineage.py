"""./moco lineage on real metadata stores: what made a version, by number, path and card, and what cannot be told."""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from recorded import SETTINGS, Recorder, card, write_version

from pipeline import cli

ROOT = Path(__file__).parents[3]
FIRST, SECOND = "1700000000", "1700000100"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def recorder(home: Path) -> Recorder:
    return Recorder(home)


def told(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert cli.main(["lineage", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def document(capsys: pytest.CaptureFixture, *arguments: object) -> dict:
    return json.loads(told(capsys, "--json", *arguments))


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert cli.main(["lineage", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moco: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_version_s_images_settings_code_and_runs_are_told(capsys, recorder, home):
    made = recorder.publish("run one", FIRST)
    found = document(capsys, "--model", FIRST, "--workdir", home)
    assert found["source"] == "metadata"
    assert found["model"] == {
        "version": FIRST,
        "path": str(home / "serving" / "encoder" / FIRST),
        "sha256": "cd" * 32,
        "artifact": made["pushed"],
    }
    images = found["images"]
    assert (images["source"], images["span"], images["version"]) == ("/photos/*.tar", 3, None)
    assert (images["fingerprint"], images["manifest"]) == ("files:2", "ab" * 32)
    assert images["counts"] == {"read": 9, "train": 7, "eval": 2}
    assert found["settings"]["values"] == SETTINGS
    code = {"ImageExampleGen": "c0", "Trainer": "c1", "Evaluator": "c2", "ModelCard": "c3", "Pusher": "c4"}
    assert found["code"] == code
    assert found["packages"]["moco"] == "1.0"
    assert [run["id"] for run in found["runs"]] == ["run one"]
    assert {execution["component"] for execution in found["executions"]} == code.keys()
    assert {artifact["id"] for artifact in found["artifacts"]} >= {made["images"], made["model"], made["pushed"]}


def test_a_person_reads_a_tree_in_which_each_execution_is_told_once(capsys, recorder, home):
    recorder.publish("run one", FIRST)
    out = told(capsys, "--model", FIRST, "--workdir", home)
    head, _, tree = out.partition("\n\n")
    for words in ("/photos/*.tar", "9 read, 7 train, 2 eval; span 3", f"manifest {'ab' * 32}", "1  run one"):
        assert words in head
    assert len(re.findall(r"by Trainer, execution \d+, run 1, .* UTC, code c1", tree)) == 1
    assert len(re.findall(r"by ImageExampleGen, execution \d+, run 1", tree)) == 1
    assert "by ImageExampleGen, execution 1, as above" in tree
    assert tree.splitlines()[0].startswith("PushedModel ")


def test_stages_from_the_cache_are_told_with_the_run_that_made_them(capsys, recorder, home):
    made = recorder.publish("run one", FIRST)
    recorder.take_from_cache("ImageExampleGen", "run two", {}, {"examples": made["images"]})
    recorder.take_from_cache("Trainer", "run two", {"examples": made["images"]}, {"model": made["model"]})
    again = recorder.execute(
        "Pusher",
        "run two",
        {"model": made["model"]},
        {"pushed_model": ("PushedModel", {"pushed_version": SECOND, "pushed_destination": str(home / SECOND)})},
    )
    found = document(capsys, "--model", SECOND, "--workdir", home)
    assert found["model"]["artifact"] == again["pushed_model"]
    runs = {e["component"]: e["run"] for e in found["executions"]}
    assert runs == {"ImageExampleGen": "run one", "Trainer": "run one", "Pusher": "run two"}
    assert [run["id"] for run in found["runs"]] == ["run one", "run two"]


def test_the_model_that_it_was_compared_with_is_named_and_has_no_part_in_it(capsys, recorder, home):
    first = recorder.publish("run one", FIRST, read=100)
    recorder.publish("run two", SECOND, baseline=first["model"])
    found = document(capsys, "--model", SECOND, "--workdir", home)
    assert found["compared_with"] == {"artifact": first["model"], "version": FIRST}
    assert found["images"]["counts"]["read"] == 9
    assert [run["id"] for run in found["runs"]] == ["run two"]
    assert f"with version {FIRST}, model {first['model']}" in told(capsys, "--model", SECOND, "--workdir", home)
    assert document(capsys, "--model", FIRST, "--workdir", home)["compared_with"] is None


def test_a_path_and_a_folder_of_versions_find_their_working_directory_by_themselves(capsys, recorder, home):
    recorder.publish("run one", FIRST)
    recorder.publish("run two", SECOND)
    serving = home / "serving" / "encoder"
    for path, version in ((serving / FIRST, FIRST), (serving / SECOND, SECOND), (serving, SECOND)):
        found = document(capsys, "--model", path)
        assert (found["model"]["version"], found["source"]) == (version, "metadata")


def test_a_copy_elsewhere_is_known_by_its_card_wherever_the_working_directory_was_moved(
    capsys, recorder, home, tmp_path
):
    made = recorder.publish("run one", FIRST)
    shutil.copytree(home / "serving" / "encoder" / FIRST, tmp_path / "copies" / "7")
    moved = home.rename(tmp_path / "moved")
    found = document(capsys, "--model", tmp_path / "copies", "--workdir", moved)
    assert (found["model"]["version"], found["model"]["artifact"]) == ("7", made["pushed"])
    assert found["source"] == "metadata"


def test_a_model_from_elsewhere_is_told_by_its_card_and_never_mistaken_for_one_of_here(
    capsys, recorder, home, tmp_path
):
    recorder.publish("run one", FIRST)
    for name in ("5", str(home / "serving" / "encoder" / "9")):  # the same numbers of executions, another run
        write_version(tmp_path / name, card("run of another machine", 4))
        found = document(capsys, "--model", tmp_path / name, "--workdir", home)
        assert (found["source"], found["executions"], found["runs"][0]["id"]) == ("card", [], "run of another machine")
        assert (found["images"]["manifest"], found["settings"]["values"]) == ("ab" * 32, SETTINGS)
    out = told(capsys, "--model", tmp_path / "5")
    assert "its card alone" in out
    assert "code       Trainer" in out


def test_a_version_is_known_by_its_number_if_it_is_gone_and_the_working_directory_was_moved(
    capsys, recorder, home, tmp_path
):
    recorder.publish("run one", FIRST)
    shutil.rmtree(home / "serving")
    moved = home.rename(tmp_path / "moved")
    found = document(capsys, "--model", FIRST, "--workdir", moved)
    assert (found["images"]["manifest"], found["model"]["sha256"]) == ("ab" * 32, "cd" * 32)


def test_what_cannot_be_told_is_refused_in_one_line(capsys, recorder, home, tmp_path):
    assert "none was" in refused(capsys, "--model", "17", "--workdir", home)
    for number in (FIRST, SECOND, "1700000090"):
        recorder.publish(f"run {number}", number)
    line = refused(capsys, "--model", "1700000095", "--workdir", home)
    assert line.endswith(f"nearest: 1700000090, {SECOND}, {FIRST}\n")
    assert "needs --workdir" in refused(capsys, "--model", "17")
    assert "there is no metadata.sqlite" in refused(capsys, "--model", "17", "--workdir", tmp_path)
    assert "no such folder" in refused(capsys, "--model", tmp_path / "nowhere")
    write_version(tmp_path / "bare", None)
    assert "has no card, and no --workdir is given" in refused(capsys, "--model", tmp_path / "bare")
    assert "do not know it" in refused(capsys, "--model", tmp_path / "bare", "--workdir", home)


def test_a_damaged_database_is_refused_in_one_line(capsys, recorder, home):
    recorder.publish("run one", FIRST)
    whole = (home / "metadata.sqlite").read_bytes()
    for damaged in (b"no database" * 100, whole[: len(whole) // 2], whole[:8192] + bytes(4096) + whole[12288:]):
        (home / "metadata.sqlite").write_bytes(damaged)
        assert "is damaged" in refused(capsys, "--model", FIRST, "--workdir", home)


def test_reading_a_lineage_leaves_the_database_as_it_is_and_imports_neither_tensorflow_nor_tfx(recorder, home):
    recorder.publish("run one", FIRST)
    before = (home / "metadata.sqlite").read_bytes()
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "pipeline",
        "lineage",
        "--model",
        str(home / "serving/encoder"),
    ]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "ml_metadata" in imported
    assert not imported & {"tensorflow", "tfx", "apache_beam", "numpy"}
    assert (home / "metadata.sqlite").read_bytes() == before
    with sqlite3.connect(home / "metadata.sqlite") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
