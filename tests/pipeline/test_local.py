"""The whole pipeline on real images: killed and continued, then cached, then with another setting.

The tests run in order on one working directory, since each run goes on from the one before.
"""

import contextlib
import json
import multiprocessing
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ml_metadata import metadata_store
from ml_metadata.proto import metadata_store_pb2
from small_runs import SETTINGS, result_of, settings, write_images
from tfx.orchestration import metadata
from tfx.types.artifact_utils import verify_artifacts
from tfx.types.standard_artifacts import Examples, InfraBlessing

from components.pusher.executor import CARD_FILE
from components.serving_check.executor import mark
from pipeline import cli, config, console, local, report
from trainer_module.config import AugmentConfig
from trainer_module.errors import UserError
from trainer_module.input import open_source

pytestmark = pytest.mark.long

UPSTREAM = {
    "ImageExampleGen", "StatisticsGen", "SchemaGen", "ExampleValidator", "Transform", "ViewAugmenter"
}  # fmt: skip
COMPONENTS = UPSTREAM | {"Trainer", "Evaluator", "ServingCheck", "ModelCard", "Pusher"}


@pytest.fixture(scope="module")
def images(tmp_path_factory, sample_images):
    return write_images(tmp_path_factory.mktemp("images"), sample_images)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


def store_of(workdir):
    return metadata_store.MetadataStore(metadata.sqlite_metadata_connection_config(str(workdir / "metadata.sqlite")))


def running(workdir):
    state = metadata_store_pb2.Execution.RUNNING
    return [e for e in store_of(workdir).get_executions() if e.last_known_state == state]


# What shows that a stage has begun; in the order in which they run.
SIGNS = {
    "ImageExampleGen": "artifacts/ImageExampleGen/examples/*/*",
    "StatisticsGen": "artifacts/StatisticsGen/statistics/*",
    "Transform": "artifacts/Transform/transform_graph/*",
    "ViewAugmenter": "artifacts/ViewAugmenter/views/*/*",
    "Trainer": "checkpoints/step-*.index",
    "Evaluator": "artifacts/Evaluator/evaluation/*",
    "ServingCheck": "artifacts/ServingCheck/blessing/*",
    "Pusher": "artifacts/Pusher/pushed_model/*/*",
}


VERTEX = "google.cloud.aiplatform"


def run_in_child(images, workdir, out):
    with out.open("a") as file, contextlib.redirect_stdout(file), console.progress_shown():
        print("imports", VERTEX, VERTEX in sys.modules)
        local.run(settings(), str(images), workdir)


@pytest.fixture(scope="module")
def killed(images, workdir, tmp_path_factory):
    """Runs of one command that were killed one after the other, in every stage that takes its time."""
    out = tmp_path_factory.mktemp("out") / "out.txt"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.local"])  # so TFX is imported once for all of them
    for stage, sign in SIGNS.items():
        child = context.Process(target=run_in_child, args=(images, workdir, out))
        child.start()
        deadline = time.monotonic() + 300
        while not list(workdir.glob(sign)) and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, (stage, out.read_text())
        if stage == "Trainer":
            refuse_other_settings(images, workdir)
    return out.read_text()


def refuse_other_settings(images, workdir):
    """Other settings than a killed training's are refused before anything runs."""
    before = sorted(workdir.glob("**/*"))
    line = r"checkpoints is of a run with seed=0, now 1, train\.learning_rate=0\.03, now 0\.05; finish it with"
    with pytest.raises(UserError, match=line):
        local.run(settings("train.learning_rate=0.05", "seed=1"), str(images), workdir)
    assert sorted(workdir.glob("**/*")) == before


@pytest.fixture(scope="module")
def first(killed, images, workdir):
    """The same run, continued to its end."""
    assert killed
    dead = running(workdir)
    assert local.run(settings(), str(images), workdir) == 0
    return dead


def test_killed_runs_have_said_what_they_did_and_each_finished_stage_was_taken_over_by_the_next(killed):
    done = re.findall(r"^(\w+) .* (?:[\d.]+ s|cached)$", killed, re.MULTILINE)
    computed = re.findall(r"^(\w+) .* [\d.]+ s$", killed, re.MULTILINE)
    assert sorted(computed) == sorted(set(computed)), "a finished stage was done again"
    assert {"ImageExampleGen", "Transform", "ViewAugmenter", "Trainer", "Evaluator", "ModelCard"} <= set(done)
    assert "Traceback" not in killed


def test_a_run_on_this_machine_does_not_wait_for_vertex_ai_s_client_to_be_imported(killed):
    assert set(re.findall(rf"^imports {VERTEX} (\w+)$", killed, re.MULTILINE)) == {"False"}


def test_a_finished_training_leaves_no_checkpoints_even_if_a_later_stage_was_killed(killed, workdir):
    assert killed
    assert not (workdir / "checkpoints").exists()


def test_the_same_command_continues_a_killed_run_without_redoing_finished_stages(first, workdir):
    result = result_of(workdir)
    assert set(result["cached"]) == COMPONENTS - {"Pusher"}
    assert len(list((workdir / "serving" / "encoder").glob("[0-9]*"))) == 1
    (training,) = workdir.glob("artifacts/Trainer/model_run/*/training.json")
    assert json.loads(training.read_text())["resumed_from"] > 0


def test_what_a_killed_stage_had_begun_is_removed_and_marked_as_failed(first, workdir):
    assert len(first) == 1
    assert not running(workdir)
    assert not list(workdir.glob(f"artifacts/*/*/{first[0].id}"))


def test_result_json_has_the_promised_keys_and_counts(first, workdir):
    result = result_of(workdir)
    assert result["status"] == "succeeded"
    assert result["blessed"] is True
    images = result["images"]
    assert (images["read"], images["ingested"], images["quarantined"], images["duplicates"]) == (162, 160, 1, 1)
    assert images["train"] + images["eval"] == 160
    assert set(result["metrics"]) >= {
        "knn_top1", "linear_top1", "random_init_knn_top1", "pixel_knn_top1", "embedding_std", "effective_rank",
        "pretext_top1", "alignment", "uniformity",
    }  # fmt: skip
    assert all(np.isfinite(value) for value in result["metrics"].values())
    assert result["train"]["steps"] == 40 * (images["train"] // 16)
    assert (result["train"]["strategy"], result["train"]["replicas"]) == ("MirroredStrategy", 2)
    assert COMPONENTS | {"total"} <= set(result["seconds"])


def test_every_component_leaves_its_artifact(first, workdir):
    artifacts = workdir / "artifacts"
    (quarantine,) = artifacts.glob("ImageExampleGen/examples/*/quarantine.jsonl")
    assert [json.loads(line)["path"] for line in quarantine.read_text().splitlines()] == ["food/broken.png"]
    for pattern in (
        "ImageExampleGen/examples/*/Split-train/*",
        "ImageExampleGen/examples/*/Split-eval/*",
        "StatisticsGen/statistics/*/Split-eval/FeatureStats.pb",
        "SchemaGen/schema/*/schema.pbtxt",
        "ExampleValidator/anomalies/*/Split-eval/SchemaDiff.pb",
        "Transform/transform_graph/*/transform_fn/saved_model.pb",
        "ViewAugmenter/views/*/views.json",
        "Trainer/model/*/Format-Serving/saved_model.pb",
        "Trainer/model/*/Format-TFMA/saved_model.pb",
        "Trainer/model_run/*/train/events.*",
        "Evaluator/evaluation/*/metrics*",
        "Evaluator/blessing/*/BLESSED",
        "ServingCheck/blessing/*/INFRA_BLESSED",
        "ModelCard/model_card/*/model_card.html",
        "Pusher/pushed_model/*/saved_model.pb",
    ):
        assert list(artifacts.glob(pattern)), pattern
    assert len(list(artifacts.glob("ImageExampleGen/examples/*/Split-train/*"))) > 1


def test_the_resolved_configuration_is_in_the_run_s_folder_and_in_the_model_s_card(first, workdir):
    assert config.load(str(workdir / "config.yaml")).train == settings().train
    card = json.loads(Path(result_of(workdir)["pushed_model"], CARD_FILE).read_text())
    assert card["config"]["train.queue"] == 64
    assert card["encoder"]["dim"] == 6


def test_the_card_of_the_published_model_says_what_it_was_made_from_and_how_good_it_is(first, workdir):
    result = result_of(workdir)
    card = json.loads(Path(result["pushed_model"], CARD_FILE).read_text())
    assert {key: card["data"]["counts"][key] for key in result["images"]} == result["images"]
    metrics = {metric["name"]: metric["trained"] for metric in card["evaluation"]["metrics"]}
    assert metrics["knn_top1"]["value"] == result["metrics"]["knn_top1"]
    assert metrics["knn_top1"]["low"] < metrics["knn_top1"]["high"]
    assert card["training"]["steps"] == result["train"]["steps"]
    assert {"Trainer", "Evaluator", "Pusher"} <= set(card["code"])
    models = {artifact.id for artifact in store_of(workdir).get_artifacts_by_type("Model")}
    assert card["lineage"]["artifacts"]["model"]["id"] in models
    page = Path(result["model_card"]).read_bytes()
    assert page == Path(result["pushed_model"], "assets.extra", "model_card.html").read_bytes()
    assert page.count(b'<figure class="query">') == 12


def test_the_pushed_encoder_needs_nothing_but_tensorflow_and_its_signatures_agree(
    first, workdir, sample_images, tmp_path
):
    picture = tmp_path / "picture.png"
    picture.write_bytes(sample_images["food"][3])
    program = """
import sys
import numpy as np, tensorflow as tf
data = open(sys.argv[2], "rb").read()
model = tf.saved_model.load(sys.argv[1])
example = tf.train.Example(features=tf.train.Features(feature={
    "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))})).SerializeToString()
pixels = tf.cast(tf.io.decode_png(data, channels=3), tf.float32)[tf.newaxis]
calls = {"serving_default": {"image_bytes": tf.constant([data])}, "examples": {"examples": tf.constant([example])},
         "pixels": {"image": pixels}}
assert set(model.signatures) == set(calls), set(model.signatures)
out = [model.signatures[name](**arguments)["embedding"].numpy() for name, arguments in calls.items()]
assert out[0].shape == (1, 6) and abs(np.linalg.norm(out[0]) - 1) < 1e-5
assert np.abs(out[0] - out[1]).max() == 0, "examples"
# The stored image is 32 px, so the bytes are resized twice and rounded once, the pixels once.
assert np.sum(out[0] * out[2]) > 0.98, np.sum(out[0] * out[2])
assert not {"tfx", "apache_beam", "tensorflow_transform", "pipeline", "components", "trainer_module"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, result_of(workdir)["pushed_model"], str(picture)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_pushed_encoder_is_the_one_that_was_checked_with_its_warm_up(first, workdir):
    result = result_of(workdir)
    serving = result["serving"]
    assert serving["reasons"] == []
    assert (serving["signatures"], serving["images"]) == (3, 216)
    assert max(serving["off_trainer"], serving["off_batch"], serving["off_unit_length"]) < 1e-5
    assert Path(result["pushed_model"], "assets.extra", "tf_serving_warmup_requests").stat().st_size > 1000
    (model,) = workdir.glob("artifacts/Trainer/model/*/Format-Serving")
    assert not (model / "assets.extra" / "tf_serving_warmup_requests").exists()


def test_a_second_run_takes_everything_from_the_cache_and_says_so_whatever_changed_in_how_it_trains(
    first, images, workdir, capsys
):
    before = result_of(workdir)
    conduct = settings("train.log_steps=7", "train.checkpoint_seconds=9", f"train.checkpoints={workdir / 'elsewhere'}")
    assert local.run(conduct, str(images), workdir) == 0
    result = result_of(workdir)
    assert set(result["cached"]) == COMPONENTS
    assert result["pushed_model"] == before["pushed_model"]
    assert len(list((workdir / "serving" / "encoder").glob("[0-9]*"))) == 1
    out = capsys.readouterr().out
    assert out.count(" cached\n") == len(COMPONENTS)
    assert "components were reused from an earlier run" in out


def test_a_run_waits_for_a_program_that_has_the_database_locked_and_both_are_well(first, images, workdir):
    hold = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('BEGIN EXCLUSIVE'); print(1, flush=True)"
    command = [sys.executable, "-c", f"{hold}; sys.stdin.read()", str(workdir / "metadata.sqlite")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline()
        threading.Timer(1.0, holder.stdin.close).start()
        assert local.run(settings(), str(images), workdir) == 0
    assert set(result_of(workdir)["cached"]) == COMPONENTS
    with contextlib.closing(sqlite3.connect(workdir / "metadata.sqlite")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_clock_that_was_a_year_ahead_in_earlier_runs_costs_nothing_of_the_cache(first, images, workdir):
    year = 365 * 86_400_000
    with contextlib.closing(sqlite3.connect(workdir / "metadata.sqlite")) as connection:
        for table in ("Execution", "Context"):
            for column in ("create_time_since_epoch", "last_update_time_since_epoch"):
                connection.execute(f"UPDATE {table} SET {column} = {column} + {year}")
        connection.commit()
    before = result_of(workdir)
    assert local.run(settings(), str(images), workdir) == 0
    assert set(result_of(workdir)["cached"]) == COMPONENTS
    assert result_of(workdir)["pushed_model"] == before["pushed_model"]


@pytest.mark.parametrize("advice_followed", [True, False])
def test_the_folder_that_a_refusal_of_the_views_names_is_the_one_by_which_tfx_makes_them_again(
    tmp_path, advice_followed
):
    artifact = Examples()
    artifact.uri = str(tmp_path / "views" / "3")
    split = Path(artifact.uri, "Split-train")
    split.mkdir(parents=True)
    entry = {"name": "views-p0000-00000-of-00001.tfrecord", "records": 1, "bytes": 5_000_000}
    manifest = {"size": 8, "images": 1, "pairs_per_image": 1, "files": [entry]}
    Path(artifact.uri, "views.json").write_text(json.dumps(manifest))
    node = report.Node("ViewAugmenter", 0, 0, True, {"views": [artifact]})
    assert report.describe(node) == "1 pairs of views of 8 px for 1 images, 5 MB"
    with pytest.raises(UserError) as refusal:
        open_source(str(split), AugmentConfig(size=8))
    named = re.search(r"delete (\S+) and run again", str(refusal.value))[1]
    Path(artifact.uri, "views.json").write_text("{}")
    with pytest.raises(UserError, match=f"delete {re.escape(named)} and run again"):
        report.describe(node)
    shutil.rmtree(named if advice_followed else split)
    # By this the launcher decides whether what an earlier run made still stands for the stage.
    with pytest.raises(RuntimeError, match="missing") if advice_followed else contextlib.nullcontext():
        verify_artifacts({"views": [artifact]})


@pytest.mark.parametrize("blessed", [True, False])
def test_the_blessing_of_the_stock_infra_validator_is_told_as_well(tmp_path, blessed):
    blessing = InfraBlessing()
    blessing.uri = str(tmp_path)
    mark(blessing, blessed)
    node = report.Node("ServingCheck", 0, 0, False, {"blessing": [blessing]})
    said = "blessed by InfraValidator" if blessed else "not blessed: InfraValidator did not bless it; its log says why"
    assert report.describe(node) == said
    assert not list(report._serving(node))


def test_a_version_that_was_deleted_is_published_again(first, images, workdir):
    shutil.rmtree(workdir / "serving")
    assert local.run(settings(), str(images), workdir) == 0
    result = result_of(workdir)
    assert set(result["cached"]) == COMPONENTS - {"Pusher"}
    assert (Path(result["pushed_model"]) / "saved_model.pb").exists()


def test_another_training_setting_reads_no_image_again_and_is_compared_with_the_last_blessed(first, images, workdir):
    elsewhere = workdir / "published" / "encoder"
    changed = settings("train.epochs=3", "evaluate.tolerance=1.0", f"publish.to={elsewhere}")
    assert local.run(changed, str(images), workdir) == 0
    result = result_of(workdir)
    assert set(result["cached"]) == UPSTREAM
    blessings = store_of(workdir).get_artifacts_by_type("ModelBlessing")
    assert any("baseline_model_id" in artifact.custom_properties for artifact in blessings)
    assert len(list((workdir / "serving" / "encoder").glob("[0-9]*"))) == 1
    assert [str(path) for path in elsewhere.glob("[0-9]*")] == [result["pushed_model"]]


def test_the_lineage_of_a_version_names_its_images_settings_code_and_run_and_the_model_it_was_compared_with(
    first, images, workdir, capsys
):
    (elsewhere,) = (workdir / "published" / "encoder").glob("[0-9]*")
    assert cli.main(["lineage", "--model", str(elsewhere), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (ingest,) = workdir.glob("artifacts/ImageExampleGen/examples/*/ingest.json")
    counts = json.loads(ingest.read_text())
    assert found["images"]["source"].startswith(str(images))
    assert found["images"]["manifest"] == counts["manifest"]
    assert found["images"]["counts"]["train"] == counts["train"]
    assert (found["settings"]["values"]["train.queue"], found["settings"]["values"]["train.epochs"]) == (64, 3)
    card = json.loads((elsewhere / CARD_FILE).read_text())
    made = {
        "ImageExampleGen",
        "Transform",
        "ViewAugmenter",
        "Trainer",
        "Evaluator",
        "ServingCheck",
        "ModelCard",
        "Pusher",
    }
    assert found["code"] == {stage: card["code"][stage] for stage in made}
    assert (found["source"], found["model"]["sha256"]) == ("metadata", card["model_sha256"])
    runs = {execution["component"]: execution["run"] for execution in found["executions"]}
    assert runs["Trainer"] == runs["Pusher"] == card["lineage"]["run"] != runs["ImageExampleGen"]
    assert found["compared_with"]["version"] in {path.name for path in (workdir / "serving" / "encoder").iterdir()}
    assert cli.main(["lineage", "--model", found["model"]["version"], "--workdir", str(workdir)]) == 0
    assert f"manifest {counts['manifest']}" in capsys.readouterr().out


# One more than the largest gain there is, and less time than any call takes: no model can pass either.
STRICT = ("train.epochs=1", "train.learning_rate=0.02", "evaluate.min_gain=1.0", "serving_check.max_latency_ms=0.0001")


def test_a_worse_model_than_the_last_blessed_is_not_pushed_and_fails_only_where_a_blessing_is_required(
    first, images, workdir, capsys
):
    strict = settings(*STRICT)
    versions = sorted((workdir / "serving" / "encoder").glob("[0-9]*"))
    assert local.run(strict, str(images), workdir) == 0
    assert local.run(strict, str(images), workdir, require_blessing=True) == 1
    result = result_of(workdir)
    assert (result["status"], result["blessed"], result["pushed_model"]) == ("not_blessed", False, None)
    assert "Not blessed: " in Path(result["model_card"]).read_text()
    assert sorted((workdir / "serving" / "encoder").glob("[0-9]*")) == versions
    out = capsys.readouterr().out
    reason = r"serving_default: one image takes .* ms \(p95\), above serving_check\.max_latency_ms=0\.0001"
    assert re.search(rf"^ServingCheck +not blessed: {reason}", out, re.MULTILINE)
    assert re.search(rf"^blessed   no: .*; cannot be served: {reason}", out, re.MULTILINE)
    assert re.search(r"^rules     holds   judged on \d+ eval images against \d+ train images$", out, re.MULTILINE)
    assert re.search(r"^ {10}broken  kNN .* is not proven to be above the untrained encoder's", out, re.MULTILINE)
    found = r"^look at   [\d,]+ eval images? looks? like one of the train split, and stays?; .*near_duplicates\.jsonl$"
    assert re.search(found, out, re.MULTILINE)


def last_blessed(workdir):
    """Folder of the model that was blessed last."""
    store = store_of(workdir)
    blessings = [
        {name: value.int_value for name, value in artifact.custom_properties.items()}
        for artifact in store.get_artifacts_by_type("ModelBlessing")
    ]
    last = max(blessing["current_model_id"] for blessing in blessings if blessing["blessed"])
    (model,) = store.get_artifacts_by_id([last])
    return Path(model.uri)


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.glob("**/*")) if path.is_file()}


def test_a_last_blessed_model_that_was_deleted_ends_in_one_line_with_all_versions_kept_and_the_line_says_the_mend(
    first, images, workdir, capsys
):
    gone = last_blessed(workdir)
    shutil.rmtree(gone)
    versions = files_of(workdir / "serving")
    assert versions
    overrides = dict(setting.split("=") for setting in (*SETTINGS, *STRICT, "evaluate.knn_k=6"))
    typed = [text for key, value in overrides.items() for text in ("--set", f"{key}={value}")]
    command = ["run", "--images", str(images), "--workdir", str(workdir), "--config", "demo", *typed]
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(
        rf"moco: .*the last blessed model {re.escape(str(gone))}\S* is gone, so nothing can be compared", line
    )
    result = result_of(workdir)
    assert (result["status"], result["blessed"], result["pushed_model"]) == ("failed", False, None)
    assert files_of(workdir / "serving") == versions
    assert not running(workdir)

    (mend,) = re.findall(r"--set (\S+)$", line)
    assert mend == "evaluate.missing_baseline=skip"
    assert cli.main([*command, "--set", mend]) == 0
    assert set(result_of(workdir)["cached"]) >= UPSTREAM | {"Trainer"}
    # It was compared with the one that was blessed before.
    assert re.search(r" below the blessed model's \d", capsys.readouterr().out)
    assert files_of(workdir / "serving") == versions
