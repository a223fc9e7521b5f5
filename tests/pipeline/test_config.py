"""Configuration: presets, files and --set; a refusal is one line that names key, value and the nearest valid one."""

import dataclasses
import enum
import json
import math
import os
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline import config as configuration
from pipeline.config import CHOICES, RANGES, Config, flatten, load, preset_names, to_yaml, validate
from trainer_module.config import Head, RecipeOrder, Schedule, Stem, Where, is_conduct, is_operational
from trainer_module.errors import UserError

DEFAULTS = configuration._schema()
NUMERIC = sorted(key for key, leaf in DEFAULTS.items() if leaf.hint in (int, float))


def refusal(*overrides: str, base: str = "moco_v2") -> str:
    with pytest.raises(UserError) as caught:
        load(base, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


# Presets.


def test_the_presets_are_four_recipes_and_examples_for_the_cloud():
    recipes = [name for name in preset_names() if not name.startswith("vertex_")]
    assert recipes == ["cifar", "demo", "moco_v1", "moco_v2"]
    assert set(preset_names()) - set(recipes) == {
        "vertex_cpu", "vertex_v3_8", "vertex_v4_8", "vertex_v5e_16", "vertex_v5e_64", "vertex_v5e_8"
    }  # fmt: skip


@pytest.mark.parametrize("name", preset_names())
def test_each_preset_loads_bears_its_name_and_says_what_it_is_for(name):
    assert load(name).name == name
    header = (configuration.PRESETS / f"{name}.yaml").read_text().split("\n\n")[0]
    assert "Launch:" in header
    assert "Sources:" in header
    assert f"--config {name}" in header


def test_moco_v1_and_v2_are_the_papers():
    v1, v2 = load("moco_v1"), load("moco_v2")
    for preset in (v1, v2):
        train = preset.train
        assert (train.queue, train.momentum, train.global_batch, train.epochs) == (65536, 0.999, 256, 200)
        assert (train.learning_rate, train.sgd_momentum, train.weight_decay) == (0.03, 0.9, 1e-4)
        assert (preset.encoder.name, preset.encoder.stem, preset.encoder.width) == ("resnet50", Stem.imagenet, 64)
        assert (preset.encoder.dim, preset.augment.size, preset.augment.crop_scale_min) == (128, 224, 0.2)
        assert (preset.augment.gray_probability, preset.augment.flip_probability) == (0.2, 0.5)
    assert (v1.train.temperature, v1.train.schedule, v1.train.milestones) == (0.07, Schedule.step, (120, 160))
    assert (v2.train.temperature, v2.train.schedule) == (0.2, Schedule.cosine)
    assert (v1.encoder.head, v2.encoder.head) == (Head.v1, Head.v2)
    assert (v1.augment.order, v1.augment.hue, v1.augment.jitter_probability) == (RecipeOrder.v1, 0.4, 1.0)
    assert v1.augment.blur_probability == 0
    assert (v2.augment.order, v2.augment.hue, v2.augment.jitter_probability) == (RecipeOrder.v2, 0.1, 0.8)
    assert (v2.augment.blur_probability, v2.augment.blur_sigma_min, v2.augment.blur_sigma_max) == (0.5, 0.1, 2.0)


def test_cifar_is_the_authors_notebook():
    cifar = load("cifar")
    train = cifar.train
    assert (train.queue, train.momentum, train.temperature) == (4096, 0.99, 0.1)
    assert (train.learning_rate, train.global_batch, train.weight_decay, train.replicas) == (0.06, 512, 5e-4, 8)
    assert (cifar.augment.size, cifar.augment.blur_probability, cifar.image.storage_size) == (32, 0, 32)
    assert (cifar.evaluate.knn_k, cifar.evaluate.knn_temperature) == (200, 0.1)


@pytest.mark.parametrize("name", preset_names())
def test_the_online_knn_is_the_evaluations(name):
    config = load(name)
    watch, evaluate = config.train.watch, config.evaluate
    assert (watch.knn_k, watch.knn_temperature) == (evaluate.knn_k, evaluate.knn_temperature)


def test_moco_v2_lists_every_key_so_that_it_can_be_looked_up():
    listed = yaml.safe_load((configuration.PRESETS / "moco_v2.yaml").read_text())
    settings_listed = {setting.key for setting in configuration._settings(listed, "")}
    assert settings_listed == set(DEFAULTS) - {"name"}


# Files and --set.


def test_a_file_changes_the_preset_that_it_names_and_set_wins_over_the_file(tmp_path: Path):
    file = tmp_path / "my photos.yaml"
    file.write_text("preset: cifar\ntrain:\n  epochs: 7\n  queue: 8192\n")
    config = load(str(file), ["train.epochs=9"])
    assert (config.name, config.train.epochs, config.train.queue, config.train.momentum) == ("my-photos", 9, 8192, 0.99)


@pytest.mark.parametrize("shorthand", [True, False])
def test_a_keras_model_takes_the_place_of_the_presets_resnet_with_its_stem_and_width(tmp_path: Path, shorthand):
    model = "keras.applications.EfficientNetV2B0"
    file = tmp_path / "own.yaml"
    file.write_text(f"preset: demo\nencoder: {model if shorthand else f'{{name: {model}, dim: 64}}'}\n")
    encoder = load("demo", [f"encoder={model}" if shorthand else f"encoder={{name: {model}, dim: 64}}"]).encoder
    assert (encoder.name, encoder.stem, encoder.width) == (model, Stem.imagenet, 64)
    assert encoder.dim == (128 if shorthand else 64)
    assert load(str(file)).encoder == encoder
    (tmp_path / "resolved.yaml").write_text(to_yaml(load(str(file))))
    assert load(str(tmp_path / "resolved.yaml")).encoder == encoder


def test_initial_weights_are_a_file_of_names_and_arrays(tmp_path: Path):
    for path in (tmp_path / "a.npz", tmp_path / "b.safetensors"):
        path.write_bytes(b"")
        assert load("moco_v2", [f"encoder.weights={path}"]).encoder.weights == str(path)
    assert load("moco_v2", ["encoder.weights=gs://bucket/c.npz"]).encoder.weights == "gs://bucket/c.npz"


def test_a_file_without_preset_starts_from_the_defaults(tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_text("name: mine\ntrain: {epochs: 7}\n")
    expected = dataclasses.replace(Config(), name="mine", train=dataclasses.replace(Config().train, epochs=7))
    assert load(str(file)) == expected


def test_set_takes_numbers_enums_lists_booleans_sections_and_references():
    config = load(
        "moco_v2",
        [
            "train.epochs=1e3",
            "train.weight_decay=1e-5",
            "augment.where=trainer",
            "train.milestones=[10, 20]",
            "evaluate.linear_probe=false",
            "encoder={name: resnet18, dim: 64}",
            "train.key_bn.mode=none",
            "train.queue=${train.global_batch}",
            "ingest.label_key=a=b",
        ],
    )
    assert (config.train.epochs, config.train.weight_decay, config.augment.where) == (1000, 1e-5, Where.trainer)
    assert (config.train.milestones, config.evaluate.linear_probe) == ((10, 20), False)
    assert (config.encoder.name, config.encoder.dim, config.train.key_bn.mode.name) == ("resnet18", 64, "none")
    assert (config.train.queue, config.ingest.label_key) == (256, "a=b")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.que=3", ["train.que ", "did you mean train.queue?"]),
        ("queue=3", ["did you mean train.queue?"]),
        ("train.lr=3", ["did you mean train.learning_rate?"]),
        ("trian.epochs=3", ["trian.epochs", "did you mean train.epochs?"]),
        ("train.milestones[0]=3", ["train.milestones", "[120,160]"]),
        ("train.epochs=many", ["train.epochs=many", "not an integer", "train.epochs=200"]),
        ("train.epochs=1.5", ["train.epochs=1.5", "not an integer", "train.epochs=2"]),
        ("train.epochs=0", ["train.epochs=0", "train.epochs=1"]),
        ("train.epochs=true", ["train.epochs=true", "not an integer"]),
        ("train.epochs=null", ["train.epochs=null", "not an integer"]),
        ("train.epochs='???'", ["train.epochs='???'", "not an integer"]),
        ("train.temperature=warm", ["train.temperature=warm", "not a number", "0.2"]),
        ("evaluate.linear_probe=perhaps", ["evaluate.linear_probe=perhaps", "not true or false"]),
        ("train.milestones=120", ["train.milestones=120", "not a list of integers", "[120]"]),
        ("train.milestones=1,2", ["not a list of integers", "[1,2]"]),
        ("train.milestones=[a]", ["train.milestones=[a]", "[120,160]"]),
        ("train.milestones=[5,0]", ["train.milestones=[5,0]", "[5,1]"]),
        ("train.schedule=cosin", ["train.schedule=cosin", "cosine, step", "e.g. train.schedule=cosine"]),
        ("augment.where=null", ["augment.where=null", "beam"]),
        ("encoder=3", ["encoder is a section", "encoder.name=resnet50"]),
        ("encoder=[resnet18]", ["encoder is a section"]),
        (
            "encoder=efficientnet",
            ["encoder.name=efficientnet", "nor a name such as keras.applications.EfficientNetV2B0"],
        ),
        ("encoder.name=keras.applications.", ["encoder.name=keras.applications.", "is not one of"]),
        ("encoder.weights=/nowhere/moco.npz", ["encoder.weights=/nowhere/moco.npz", "no such file"]),
        ("encoder.weights=/tmp/moco.h5", ["encoder.weights=/tmp/moco.h5", "must end in .safetensors or .npz"]),
        ("encoder.weights=moco_v2.pth.tar", ["encoder.weights=moco_v2.pth.tar", "torch.load", "moco_v2.safetensors"]),
        ("encoder.name=resnet51", ["encoder.name=resnet51", "resnet50, resnet1", "e.g. encoder.name=resnet50"]),
        ("train=3", ["train is a section", "train.replicas=2"]),
        ("train.key_bn=none", ["train.key_bn is a section", "train.key_bn.mode"]),
        ("name=a b", ["name='a b'", "name=a-b"]),
        ("preset=demo", ["--config demo"]),
        ("train.epochs", ["is not key=value", "train.epochs="]),
        ("train", ["is not key=value", "train.replicas="]),
        ("=3", ["is not key=value"]),
        ("", ["is not key=value"]),
        ("train.epochs=[1,2", ["train.epochs=[1,2", "not YAML"]),
        ("train.epochs=${train.nothing}", ["train.epochs", "train.nothing"]),
        ("train.epochs=${", ["train.epochs=${"]),
        ("train.epochs=${nope}", ["train.epochs", "nope", "or write the value"]),
        ("name=${oc.env:HOME}", ["name='${oc.env:HOME}'", "only ${other.key} is followed"]),
        ("train.epochs={}", ["train.epochs={} is not an integer", "e.g. train.epochs=200"]),
        ("train.epochs=1:30", ["train.epochs=1:30 is not an integer", "e.g. train.epochs=200"]),
        ("train.epochs=010", ["train.epochs=010 is not an integer", "e.g. train.epochs=10"]),
        ("train.epochs='010'", ["train.epochs=010 is not an integer"]),
        ("train.epochs=0x10", ["train.epochs=0x10 is not an integer"]),
        ("train.epochs=1_000", ["train.epochs=1_000 is not an integer", "e.g. train.epochs=1000"]),
        ("train.milestones=[1:30]", ["train.milestones=[1:30] is not a list of integers"]),
        ("train.milestones=[10,020]", ["train.milestones=[10,020] is not a list of integers", "[10,20]"]),
        ("train.temperature=1e309", ["train.temperature=1e309 is too large a number", "e.g. train.temperature=0.2"]),
        ("train.temperature=.inf", ["train.temperature=.inf is not a number"]),
        ("train.temperature=1:30.5", ["train.temperature=1:30.5 is not a number"]),
        ("train.epochs=" + "9" * 5000, ["train.epochs=99", "is too large a number"]),
        ("train.epochs=", ["train.epochs= is not an integer", "e.g. train.epochs=200"]),
        ("train.epochs=~", ["train.epochs=~ is not an integer"]),
        ("train=", ["train=: train is a section"]),
        ("train.epochs=" + "[" * 2000 + "]" * 2000, ["nested too deep"]),
        ("train.epochs.x=3", ["train.epochs.x", "train.epochs is no section", "e.g. train.epochs=200"]),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line_with_the_mend(override, words):
    text = refusal(override)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.queue=100"], ["train.queue=100", "train.global_batch=256", "e.g. train.queue=256"]),
        (["train.global_batch=250"], ["train.global_batch=250", "train.replicas=8", "248 or 256"]),
        (["train.global_batch=3"], ["train.global_batch=3", "e.g. train.global_batch=8"]),
        (["augment.size=300"], ["augment.size=300", "image.storage_size=256", "e.g. augment.size=256"]),
        (["image.eval_resize=100"], ["image.eval_resize=100", "augment.size=224", "image.eval_resize=224"]),
        (["augment.where=beam", "augment.pairs_per_image=0"], ["augment.pairs_per_image=0", "augment.where=beam"]),
        (["augment.order=v1"], ["augment.blur_probability=0.5", "augment.order=v1"]),
        (["ingest.max_pixels=63"], ["ingest.max_pixels=63", "ingest.min_side=8", "e.g. ingest.max_pixels=64"]),
        (["augment.crop_scale_max=0.1"], ["augment.crop_scale_min=0.2", "augment.crop_scale_max=0.1"]),
        (["augment.crop_ratio_min=2"], ["augment.crop_ratio_min=2", "augment.crop_ratio_max="]),
        (["augment.blur_sigma_min=3"], ["augment.blur_sigma_min=3", "e.g. augment.blur_sigma_min=2"]),
        (["train.key_bn.mode=butterfly", "train.replicas=3", "train.global_batch=72"], ["=72 over 3 ", "mode=auto"]),
        (["train.key_bn.mode=butterfly", "train.replicas=8", "train.global_batch=72"], ["=72 over 8 ", "mode=auto"]),
        (
            ["train.key_bn.mode=all_to_all", "train.global_batch=72"],
            ["equal shares to 8", "e.g. train.global_batch=64"],
        ),
        (["train.key_bn.mode=split", "train.key_bn.groups=5"], ["train.key_bn.groups=5", "e.g. train.key_bn.groups=4"]),
        (
            ["train.strategy=single", "train.key_bn.mode=split", "train.global_batch=260"],
            ["=8 equal groups", "=260 over 1 ", "e.g. train.key_bn.groups=5"],
        ),
        (
            ["train.strategy=single", "train.key_bn.mode=split", "train.global_batch=257"],
            ["=8 equal groups", "=257 over 1 ", "e.g. train.global_batch=256"],
        ),
        (
            ["train.strategy=single", "train.key_bn.mode=split", "train.global_batch=5"],
            ["=8 equal groups", "=5 over 1 ", "e.g. train.global_batch=16"],
        ),
        (["train.key_bn.groups=1"], ["train.key_bn.groups=1", "at least 2", "e.g. train.key_bn.groups=2"]),
        (["train.schedule=step", "train.milestones=[3,2,3]"], ["train.milestones=[3,2,3]", "[2,3]"]),
        (
            ["encoder=keras.applications.VGG16", "encoder.width=8"],
            ["encoder.width=8", "VGG16", "leave encoder.width=64"],
        ),
        (["encoder=keras.applications.VGG16", "encoder.stem=cifar"], ["encoder.stem=cifar", "encoder.stem=imagenet"]),
        (["encoder=resnet18", "encoder.name=resnet34"], ["encoder.name", "twice"]),
        (["train.tpu.name=pod", "train.strategy=single"], ["train.tpu.name=pod", "e.g. train.strategy=tpu"]),
        (["train.checkpoints=s3://bucket/run"], ["train.checkpoints=s3://bucket/run", "gs://BUCKET/PATH"]),
        (["train.epochs=3", "train.epochs=4"], ["train.epochs", "twice", "3 and 4"]),
        (["evaluate.slices=[image/lable]"], ["evaluate.slices=[image/lable]", "e.g. evaluate.slices=[image/label]"]),
        (["evaluate.slices=[image/label,image/encoded]"], ["grouped by image/encoded", "image/format", "image/width"]),
        (["evaluate.slices=[image/sha256]"], ["grouped by image/sha256", "e.g. evaluate.slices=[image/"]),
        (["evaluate.significance=0"], ["evaluate.significance=0 must be above 0 and at most 1"]),
        (["evaluate.gain_significance=0"], ["evaluate.gain_significance=0 must be above 0 and at most 1"]),
        (["cloud.root=/tmp/moco"], ["cloud.root=/tmp/moco", "gs://BUCKET/PATH"]),
        (["cloud.root=gs://"], ["cloud.root=gs://", "gs://BUCKET/PATH"]),
        (["cloud.region='Europe West'"], ["Europe West", "e.g. cloud.region=europe-west4"]),
        (["cloud.image=moco latest"], ["moco latest", "e.g. cloud.image=REGION-docker.pkg.dev"]),
        (["cloud.service_account=me"], ["cloud.service_account=me", "NAME@PROJECT.iam.gserviceaccount.com"]),
        (["cloud.network=default"], ["cloud.network=default", "projects/NUMBER/global/networks/NAME"]),
        (["cloud.dataflow.subnetwork=foo"], ["cloud.dataflow.subnetwork=foo", "regions/REGION/subnetworks/NAME"]),
        (["cloud.labels=[Team=a]"], ["Team=a", "e.g. cloud.labels=[team=vision]"]),
    ],
)
def test_what_cannot_work_together_is_refused_with_the_nearest_valid_value(overrides, words):
    text = refusal(*overrides)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("base", "overrides", "words"),
    [
        ("vertex_v5e_8", ["cloud.trainer.topology=4x4"], ["topology=4x4", "ct5lp-hightpu-8t", "topology=2x4"]),
        ("vertex_v5e_8", ["cloud.trainer.topology=''"], ["topology=''", "topology=2x4"]),
        ("vertex_v5e_8", ["cloud.region=us-east1"], ["cloud.region=us-east1", "v5e", "e.g. cloud.region=us-central1"]),
        ("vertex_v5e_8", ["cloud.trainer.accelerator=TPU_V3"], ["two forms", "2x4", "TPU_V3"]),
        ("vertex_v5e_8", ["cloud.trainer.machine_type=n2-standard-8"], ["no use", "machine_type=ct5lp-hightpu-8t"]),
        ("vertex_v5e_8", ["cloud.trainer.machine_type=ct6e-standard-4t", "cloud.trainer.topology=''"], ["2.16"]),
        ("vertex_v5e_8", ["train.strategy=single", "train.key_bn.mode=split"], ["idle", "e.g. train.strategy=tpu"]),
        ("vertex_v5e_16", ["train.global_batch=520"], ["the 16 cores", "512 or 528"]),
        ("vertex_v5e_64", ["train.key_bn.mode=all_to_all"], ["to 64 replicas", "e.g. train.key_bn.mode=auto"]),
        ("vertex_v3_8", ["cloud.trainer.count=32"], ["cloud.trainer.count=32"]),
        ("vertex_v3_8", ["cloud.trainer.count=4"], ["8 cores", "e.g. cloud.trainer.count=8"]),
        ("vertex_v3_8", ["cloud.trainer.accelerator=TPU_V5"], ["TPU_V5", "e.g. cloud.trainer.accelerator=TPU_V3"]),
        ("vertex_v3_8", ["cloud.trainer.machine_type=n1-highmem-8"], ["e.g. cloud.trainer.machine_type=cloud-tpu"]),
        ("vertex_v3_8", ["cloud.region=asia-east1"], ["v3", "us-central1, europe-west4"]),
        ("vertex_v4_8", ["cloud.region=us-central1"], ["v4", "e.g. cloud.region=us-central2"]),
    ],
)
def test_a_training_machine_that_is_not_to_be_had_is_refused(base, overrides, words):
    text = refusal(*overrides, base=base)
    for word in words:
        assert word in text


def test_settings_that_may_change_between_two_starts_are_settings():
    may = {key for key in flatten(load("moco_v2")) if is_operational(key)}
    assert {"train.replicas", "train.log_steps", "train.tpu.zone", "train.watch.sample.bank"} <= may
    assert not {"seed", "train.queue", "train.key_bn.mode", "augment.size", "encoder.width"} & may


def test_only_what_neither_trains_nor_judges_is_left_out_of_the_trainer_s_cache_key():
    out = {key for key in flatten(load("moco_v2")) if is_conduct(key)}
    assert out == {
        *(f"train.{name}" for name in ("steps_per_loop", "checkpoints", "checkpoint_seconds", "keep_checkpoints")),
        *(f"train.{name}" for name in ("log_steps", "watch.max_input_share", "watch.patience")),
    }
    assert all(is_operational(key) for key in out)


def test_logical_cpu_devices_do_not_matter_where_a_tpu_has_cores_of_its_own():
    load("moco_v2", ["train.strategy=tpu", "train.tpu.name=local", "train.global_batch=250"])


def test_the_value_that_a_refusal_proposes_is_accepted():
    refused = ["train.queue=100", "train.global_batch=250", "augment.size=300", "train.epochs=-4", "seed=-1"]
    for override in [*refused, "evaluate.slices=[image/lable]"]:
        proposed = refusal(override).rpartition("e.g. ")[2].split(" or ")[0]
        load("moco_v2", [proposed])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("train:\n  epochs: 3\n bad\n", ["line 3", "not YAML"]),
        ("train:\n  epochs: 3\n  epochs: 4\n", ["line 3", "epochs"]),
        ("- 1\n- 2\n", ["list"]),
        ("null: 3\n", ["a key must be the name of a setting"]),
        ("just words\n", ["just words is not a setting"]),
        ("42\n", ["holds no keys"]),
        ("train:\n  epoch: 3\n", ["train.epoch ", "did you mean train.epochs?"]),
        ("train:\n  epochs: many\n", ["train.epochs=many"]),
        ("train: 3\n", ["train is a section"]),
        ("train:\n", ["train is a section"]),
        ("train:\n  epochs: {}\n", ["mine.yaml: train.epochs={} is not an integer"]),
        ("train:\n  epochs: 1:30\n", ["train.epochs=1:30 is not an integer"]),
        ("train:\n  epochs: 010\n", ["train.epochs=010 is not an integer"]),
        ("train:\n  temperature: 1e309\n", ["train.temperature=1e309 is too large a number"]),
        ("preset: moco_v3\n", ["preset=moco_v3", "moco_v2"]),
        ("preset: [1]\n", ["preset="]),
        ("1: 2\n", ["1 is not a setting"]),
        ("train:\n  learning: {rate: 3}\n", ["train.learning", "train.learning_rate"]),
        ("\x00", []),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(tmp_path: Path, content, words):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    text = refusal(base=str(file))
    for word in ["mine.yaml", *words]:
        assert word in text


def test_a_file_that_is_no_text_is_refused(tmp_path: Path):
    file = tmp_path / "image.yaml"
    file.write_bytes(b"\xff\xd8\xff\xe0 not text")
    assert "image.yaml" in refusal(base=str(file))


def test_an_empty_file_is_the_defaults(tmp_path: Path):
    file = tmp_path / "empty.yaml"
    file.write_text("")
    assert load(str(file)) == dataclasses.replace(Config(), name="empty")


def test_a_file_that_is_nested_without_end_is_refused_in_one_line(tmp_path: Path):
    for depth in (300, 2000):
        file = tmp_path / f"{depth}.yaml"
        file.write_text("".join(f"{' ' * at}a:\n" for at in range(depth)))
        assert len(refusal(base=str(file))) < 500


def test_a_pipe_in_place_of_a_file_is_refused_as_what_it_is(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo.yaml")
    text = refusal(base=str(tmp_path / "fifo.yaml"))
    assert "write it to one" in text
    assert "did you mean" not in text


def test_what_only_looks_like_a_number_stays_a_text_where_a_text_is_wanted():
    config = load("demo", ["ingest.label_key=010", "ingest.image_key=1:30", "card.limits=[1_000]"])
    assert (config.ingest.label_key, config.ingest.image_key, config.card.limits) == ("010", "1:30", ("1_000",))


def test_plain_numbers_are_read_however_they_are_written():
    for typed, value in (("+2", 2.0), ("2", 2.0), ("2.", 2.0), (".5", 0.5), ("5E-1", 0.5), ("'0.5'", 0.5)):
        assert load("moco_v2", [f"train.temperature={typed}"]).train.temperature == value


def test_a_missing_preset_or_file_is_refused_with_the_nearest_ones(tmp_path: Path):
    (tmp_path / "photos.yaml").write_text("")
    assert "did you mean moco_v2?" in refusal(base="moco_v3")
    assert f"did you mean {tmp_path}/photos.yaml?" in refusal(base=f"{tmp_path}/photo.yaml")
    assert "presets: " in refusal(base="/nowhere/at/all.yaml")
    assert "is a folder" in refusal(base=str(tmp_path))
    assert "neither a file nor a preset" in refusal(base="")


# Ranges.


def test_every_number_has_a_range_that_holds_its_default_and_every_range_a_key():
    lists = {key for key, leaf in DEFAULTS.items() if typing.get_args(leaf.hint)[:1] in ((int,), (float,))}
    assert set(RANGES) == set(NUMERIC) | lists
    assert set(CHOICES) <= set(DEFAULTS)
    validate(Config())


@settings(max_examples=200, deadline=None)
@given(key=st.sampled_from(NUMERIC), value=st.sampled_from([math.nan, math.inf, -math.inf, -1e30, 1e30]))
def test_no_number_may_be_nonsense(key, value):
    with pytest.raises(UserError, match=f"^{key}="):
        configuration._check_value(key, value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(key=st.sampled_from(NUMERIC), data=st.data())
def test_a_number_out_of_its_range_is_refused_with_one_that_lies_within(key, data):
    bounds, kind = RANGES[key], DEFAULTS[key].hint
    step = 1 if kind is int else 1e-3
    outside = data.draw(st.sampled_from([bounds.low - step, bounds.high + step]))
    text = refusal(f"{key}={kind(outside)!r}")
    assert text.startswith(f"{key}=")
    proposed = text.rpartition(f"e.g. {key}=")[2]
    assert bounds.admits(kind(proposed))


def test_open_ends_are_refused_themselves():
    for key, bounds in RANGES.items():
        assert bounds.admits(bounds.low) is not bounds.low_open, key
        assert bounds.admits(bounds.high) is not bounds.high_open, key


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
@example(text="0\r0=")
def test_no_text_after_set_raises_anything_but_a_user_error(text):
    refusals = []
    try:
        load("demo", [text])
    except UserError as error:
        refusals.append(str(error))
    assert all(len(refusal.splitlines()) == 1 for refusal in refusals)


@settings(max_examples=100, deadline=None)
@given(key=st.sampled_from(sorted(DEFAULTS)), value=st.text(max_size=20))
def test_no_value_after_set_raises_anything_but_a_user_error_of_one_line(key, value):
    refusals = []
    try:
        load("demo", [f"{key}={value}"])
    except UserError as error:
        refusals.append(str(error))
    assert all(len(text.splitlines()) == 1 for text in refusals)


# Writing.


@st.composite
def configs(draw: st.DrawFn) -> Config:
    replicas = draw(st.integers(1, 64))
    batch = replicas * draw(st.integers(1, 64))
    overrides = {
        "seed": draw(st.integers(0, 2**31 - 1)),
        "augment.hue": draw(st.floats(0, 0.5)),
        "train.learning_rate": draw(st.floats(1e-12, 1000)),
        "train.replicas": replicas,
        "train.global_batch": batch,
        "train.queue": batch + draw(st.integers(0, 10**6)),
        "train.schedule": draw(st.sampled_from(["cosine", "step"])),
        "train.milestones": sorted(draw(st.sets(st.integers(1, 10**6), max_size=4))),
        "augment.where": draw(st.sampled_from(["beam", "trainer", "both"])),
        "evaluate.linear_probe": draw(st.booleans()),
    }
    return load("moco_v2", [f"{key}={json.dumps(value)}" for key, value in overrides.items()])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs())
def test_what_is_written_reads_back_equal(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("config") / "resolved.yaml"
    file.write_text(to_yaml(config))
    assert load(str(file)) == config


def test_flatten_names_every_key_with_types_of_json():
    flat = flatten(load("moco_v1"))
    assert set(flat) == set(DEFAULTS)
    assert json.loads(json.dumps(flat)) == flat
    assert (flat["train.milestones"], flat["train.schedule"], flat["train.queue"]) == ([120, 160], "step", 65536)


def test_every_part_is_frozen():
    def parts(value):
        yield value
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if dataclasses.is_dataclass(inner):
                yield from parts(inner)

    for part in parts(load("demo")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)
        assert isinstance(hash(part), int)


def test_every_enum_is_written_by_a_name_that_reads_back():
    for key, leaf in DEFAULTS.items():
        if isinstance(leaf.hint, type) and issubclass(leaf.hint, enum.Enum):
            for member in leaf.hint:
                overrides = [f"{key}={member.name}", "augment.blur_probability=0"]
                section, _, name = key.rpartition(".")
                part = load("moco_v2", overrides)
                for step in section.split("."):
                    part = getattr(part, step)
                assert getattr(part, name) is member


def test_the_words_of_a_card_are_taken_as_they_are_and_a_lone_limit_is_told_how_to_be_a_list():
    card = load("demo", ["card.license=apache-2.0", "card.owner=Vision <us> & co", "card.limits=[Not by night.]"]).card
    assert (card.license, card.owner, card.limits) == ("apache-2.0", "Vision <us> & co", ("Not by night.",))
    with pytest.raises(UserError, match=r"^card.limits='Not by night.' is not a list of texts; e.g. card.limits=\["):
        load("demo", ["card.limits=Not by night."])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["beam.engine=flink"], ["beam.engine=flink", "memory", "dask"]),
        (["beam.engine=dask", "beam.address=here"], ["beam.address=here", "e.g. beam.address=tcp://HOST:8786"]),
        (["beam.address=tcp://a:8786"], ["no use with beam.engine=memory", "e.g. beam.engine=dask"]),
        (["beam.workers=2"], ["beam.workers=2 has no use with beam.engine=memory"]),
        (["beam.engine=dask", "beam.address=tcp://a:8786", "beam.workers=2"], ["beam.workers=2", "beam.workers=0"]),
    ],
)
def test_an_engine_that_cannot_be_is_refused(overrides, words):
    with pytest.raises(UserError) as caught:
        load("demo", overrides)
    for word in words:
        assert word in str(caught.value)
