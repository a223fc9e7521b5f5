"""What Vertex AI and Kubeflow need to be told is asked for before anything is compiled."""

import pytest

from pipeline.cloud.targets import Target, check
from pipeline.config import load
from trainer_module.errors import UserError


@pytest.mark.parametrize(
    ("target", "overrides", "words"),
    [
        ("vertex", ["cloud.root=''"], ["cloud.root is empty", "e.g. cloud.root=gs://"]),
        ("vertex", ["cloud.image=''"], ["cloud.image is empty"]),
        ("vertex", ["cloud.tpu_image=''"], ["cloud.tpu_image is empty"]),
        ("kubeflow", ["cloud.project=''"], ["cloud.project is empty", "--target kubeflow"]),
        ("vertex", [f"name={'n' * 59}"], [f"name={'n' * 59}", "room for 58", f"e.g. name={'n' * 58}"]),
        ("vertex", ["publish.to=serving"], ["publish.to=serving", "gs://"]),
        ("vertex", ["train.checkpoints=here"], ["train.checkpoints=here"]),
        ("vertex", ["evaluate.missing_baseline=skip"], ["missing_baseline=skip", "=refuse"]),
    ],
)
def test_what_the_cloud_would_find_out_late_is_refused_here(target, overrides, words):
    with pytest.raises(UserError) as caught:
        check(load("vertex_v5e_8", overrides), Target[target])
    for word in words:
        assert word in str(caught.value)


def test_a_training_on_tpu_wants_a_job_with_one():
    with pytest.raises(UserError, match=r"cloud.trainer has no TPU; e.g. cloud.trainer.machine_type=ct5lp-hightpu-8t"):
        check(load("vertex_cpu", ["train.strategy=tpu"]), Target.vertex)


def test_a_file_that_names_what_is_needed_is_taken_for_either():
    for target in Target:
        check(load("vertex_v5e_8"), target)
    check(load("vertex_v5e_8", ["evaluate.missing_baseline=skip"]), Target.kubeflow)
