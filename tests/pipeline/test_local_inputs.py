"""The whole pipeline on images that are unlabelled, too few, or already in the hands of another run."""

import re
from pathlib import Path

import numpy as np
import pytest
from small_runs import RESNET, result_of, settings, write_images
from tfx.types import standard_artifacts

from pipeline import cli, local, report
from pipeline.workdir import opened
from trainer_module.errors import UserError

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def images(tmp_path_factory, sample_images):
    return write_images(tmp_path_factory.mktemp("images"), sample_images)


def test_unlabelled_images_run_to_the_end_with_label_metrics_null(sample_images, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, data in enumerate(sample_images["tools"][:60]):
        (folder / f"{i}.png").write_bytes(data)
    workdir = tmp_path / "work"
    workdir.mkdir()
    assert local.run(settings(*RESNET, "train.epochs=1", "train.replicas=1"), str(folder), workdir) == 0
    metrics = result_of(workdir)["metrics"]
    labelled = {name for name in metrics if re.search("knn_top|linear_top|majority_top|recall_at|knn_gain", name)}
    assert {"knn_top1", "linear_top1", "random_init_knn_top1", "pixel_knn_top1"} <= labelled
    assert {metrics[name] for name in labelled} == {None}
    assert all(np.isfinite(metrics[name]) for name in metrics.keys() - labelled)
    page = Path(result_of(workdir)["model_card"]).read_text()
    assert '<figure class="query">' in page
    assert "There are no labels in both splits" in page


def test_three_images_end_in_one_line_with_exit_code_2(sample_images, tmp_path, capsys):
    folder = tmp_path / "three"
    folder.mkdir()
    for i, data in enumerate(sample_images["tools"][:3]):
        (folder / f"{i}.png").write_bytes(data)
    code = cli.main(["run", "--images", str(folder), "--workdir", str(tmp_path / "w"), "--config", "demo"])
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("moco: ")
    assert not (tmp_path / "w" / "serving").exists()
    assert result_of(tmp_path / "w")["status"] == "failed"


def test_a_second_run_on_a_working_directory_in_use_is_refused(images, tmp_path, capsys):
    with opened(str(tmp_path / "w")):
        assert cli.main(["run", "--images", str(images), "--workdir", str(tmp_path / "w"), "--config", "demo"]) == 2
    assert "another run uses" in capsys.readouterr().err


def test_too_few_images_for_a_batch_are_refused_before_anything_is_made_of_them(images, tmp_path):
    with pytest.raises(UserError, match=r"fewer than train.global_batch=512"):
        local.run(settings("train.global_batch=512", "train.queue=512"), str(images), tmp_path)
    assert not (tmp_path / "artifacts" / "ViewAugmenter").exists()
    result = result_of(tmp_path)
    assert (result["status"], result["images"]["read"], result["metrics"]["knn_top1"]) == ("failed", 162, None)


def test_artifacts_of_metadata_that_were_removed_are_set_aside_and_never_mixed_with_new_ones(images, tmp_path):
    stale = (
        tmp_path / "artifacts" / "ImageExampleGen" / "examples" / "1" / "Split-train" / "images-00000-of-00001.tfrecord"
    )
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier run")
    with pytest.raises(UserError, match=r"fewer than train.global_batch=512"):
        local.run(settings("train.global_batch=512", "train.queue=512"), str(images), tmp_path)
    made = {path.name for path in stale.parent.iterdir()}
    assert made == {f"images-{index:05d}-of-{len(made):05d}.tfrecord" for index in range(len(made))}
    assert len(made) > 1
    (kept,) = tmp_path.glob("artifacts-unknown-*/ImageExampleGen/examples/1/Split-train/*")
    assert kept.read_bytes() == b"of an earlier run"


@pytest.mark.parametrize(
    ("images", "shown"),
    [("day-{SPAN:2}/v{VERSION}/*.png", "day-07/v3/*.png"), ("{YYYY}/{MM}/{DD}", "1970/01/08"), ("x/*.tar", "x/*.tar")],
)
def test_the_line_that_embeds_names_the_span_that_was_read(images, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = standard_artifacts.Examples()
    examples.set_int_custom_property("span", 7)
    examples.set_int_custom_property("version", 3)
    node = report.Node("ImageExampleGen", 1.0, 1.0, cached=False, outputs={"examples": [examples]})
    assert report._shown(report._as_read(images, node)) == shown
