"""VertexTrainer: which checkpoints a training finds again, and in whose project it runs."""

import dataclasses

import pytest

from components.vertex_trainer import executor, host
from components.vertex_trainer.executor import of_this_run
from pipeline.config import load
from pipeline.create_pipeline import Places, make_experiment
from trainer_module.errors import UserError

INPUTS = ("gs://b/views", "gs://b/graph")


def experiment(*overrides):
    places = Places("gs://b", "gs://b/serving", "gs://b/checkpoints")
    return make_experiment(load("cifar", overrides), places, weights="")


def folder(*overrides, epochs=7, inputs=INPUTS):
    return of_this_run(experiment(*overrides), epochs, inputs).checkpoints


def test_a_run_has_its_own_epochs():
    assert of_this_run(experiment(), 7, INPUTS).train.epochs == 7


def test_a_training_that_begins_again_finds_its_checkpoints_and_no_other_does():
    assert folder().startswith("gs://b/checkpoints/")
    assert folder() == folder("train.log_steps=3", "train.checkpoint_seconds=5")
    others = {
        folder(),
        folder("train.learning_rate=0.1"),
        folder(epochs=8),
        folder(inputs=("gs://b/other", "gs://b/graph")),
    }
    assert len(others) == 4


def test_the_slice_takes_the_place_of_the_configured_tpu_and_nothing_else():
    told = experiment("train.strategy=tpu", "train.tpu.name=local")
    changed = host._with_tpu(told, "grpc://a:8470,grpc://b:8470")
    assert changed.train.tpu.name == "grpc://a:8470,grpc://b:8470"
    assert dataclasses.replace(changed, train=told.train) == told


def test_the_project_is_the_pipelines_own_where_none_is_configured():
    assert executor._project(["--runner=DataflowRunner", "--project=p", "--region=r"]) == "p"
    with pytest.raises(UserError, match=r"cloud\.project"):
        executor._project([])
