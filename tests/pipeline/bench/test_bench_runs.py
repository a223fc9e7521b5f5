"""What a run leaves, as the benchmarks of kills and of a full disk compare it: nothing that must be equal is missed."""

import json
from pathlib import Path

import pytest
from ml_metadata import metadata_store
from ml_metadata.proto import metadata_store_pb2

from pipeline.bench import _runs, kills

ALLOWED = (
    _runs.Allowed(r"Trainer/model_run/training\.json", "speeds", ("images_per_second",)),
    _runs.Allowed(r"Trainer/model_run/metrics\.jsonl", "speeds", ("step_ms",)),
    _runs.Allowed(r"Trainer/model/.*\.pb", "numbers of functions"),
)


def write(home: Path, execution: int, version: int, **changes: str) -> Path:
    """What a small run leaves."""
    files = {
        "training.json": json.dumps({"steps": 7, "images_per_second": execution}),
        "metrics.jsonl": "".join(json.dumps({"loss": n, "step_ms": execution}) + "\n" for n in range(3)),
        "curve": "points",
    }
    for name, text in {**files, **changes}.items():
        path = home / "artifacts" / "Trainer" / "model_run" / str(execution) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in (
        home / "artifacts" / "Trainer" / "model" / str(execution) / "Format-Serving" / "saved_model.pb",
        home / "artifacts" / "Trainer" / ".system" / "executor_execution" / str(execution) / "x",
    ):
        path.parent.mkdir(parents=True)
        path.write_text(str(execution))
    published = home / "serving" / "encoder" / str(version) / "saved_model.pb"
    published.parent.mkdir(parents=True)
    published.write_text("model")
    return home


@pytest.fixture
def reference(tmp_path: Path) -> dict[str, str]:
    return _runs.contents(write(tmp_path / "reference", 7, 1700), ALLOWED)


def test_numbers_of_executions_and_versions_and_what_is_allowed_may_differ(reference, tmp_path):
    again = _runs.contents(write(tmp_path / "again", 12, 1800), ALLOWED)
    assert _runs.differing(again, reference) == []
    assert "encoder/saved_model.pb" in reference
    assert "Trainer/model/Format-Serving/saved_model.pb" in reference


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("curve", "point"),
        ("training.json", json.dumps({"steps": 6, "images_per_second": 7})),
        ("metrics.jsonl", json.dumps({"loss": 0, "step_ms": 7}) + "\n"),
        ("more", ""),
    ],
)
def test_one_byte_one_value_one_line_and_one_file_more_are_seen(reference, tmp_path, name, text):
    changed = _runs.contents(write(tmp_path / "changed", 7, 1700, **{name: text}), ALLOWED)
    assert _runs.differing(changed, reference) == [f"Trainer/model_run/{name}"]


def test_a_missing_file_is_seen_even_if_its_content_may_differ(reference, tmp_path):
    home = write(tmp_path / "less", 7, 1700)
    (home / "artifacts" / "Trainer" / "model" / "7" / "Format-Serving" / "saved_model.pb").unlink()
    assert _runs.differing(_runs.contents(home, ALLOWED), reference) == ["Trainer/model/Format-Serving/saved_model.pb"]


def test_folders_that_no_successful_execution_stands_for_are_seen(tmp_path):
    home = write(tmp_path / "home", 1, 1700)
    connection = metadata_store_pb2.ConnectionConfig()
    connection.sqlite.filename_uri = str(home / "metadata.sqlite")
    store = metadata_store.MetadataStore(connection)
    kind = store.put_execution_type(metadata_store_pb2.ExecutionType(name="Trainer"))
    execution = metadata_store_pb2.Execution(type_id=kind, last_known_state=metadata_store_pb2.Execution.RUNNING)
    (execution.id,) = store.put_executions([execution])
    assert _runs.left_over(home) == [str(home / f"artifacts/Trainer/{key}/1") for key in ("model", "model_run")]
    execution.last_known_state = metadata_store_pb2.Execution.COMPLETE
    store.put_executions([execution])
    assert _runs.left_over(home) == []


def test_what_tft_keeps_of_a_split_is_known_whatever_execution_made_it(tmp_path):
    def kept(home: str, number: int, content: str) -> dict[str, str]:
        split = f"artifacts-ImageExampleGen-examples-{number}-Split-train-STAR-{number:064x}"
        path = tmp_path / home / "artifacts" / "Transform" / "updated_analyzer_cache" / "6" / split / "MANIFEST"
        path.parent.mkdir(parents=True)
        path.write_text(content)
        return _runs.contents(tmp_path / home)

    one, other = kept("one", 1, "sums"), kept("other", 12, "sums")
    assert one == other
    assert len(one) == 1
    assert _runs.differing(one, kept("another", 1, "other sums")) == list(one)


def test_kills_that_were_seen_are_gone_on_from(tmp_path):
    kept = tmp_path / "new" / "kills.json"
    assert kills._load(kept) == kills.Done()
    seen = kills.Done(("Trainer", "no_component"), 1)
    kills._save(kept, seen)
    assert kills._load(kept) == seen
    kills._save(None, seen)
    assert kills._load(None) == kills.Done()
    assert [path.name for path in kept.parent.iterdir()] == ["kills.json"]
