"""The plain parts of the comparisons with PyTorch: verdicts, names and layouts, sizes, measuring processes."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline.bench import parity
from pipeline.bench._comparison import Settings
from pipeline.bench._worker import Bystanders
from pipeline.bench.train import activation_bytes, rows
from pipeline.worker import Worker
from trainer_module.batch_norm import FusedBatchNormalization
from trainer_module.moco import initial_state


@pytest.mark.parametrize(
    ("theirs", "agrees"), [([7.0, 6.50009], 1.0), ([7.0, 6.5002], 0.0), ([7.0, float("nan")], 0.0)]
)
def test_parity_agrees_within_its_tolerance_only(theirs, agrees, capsys):
    figures = parity.compare([[7.0, 6.5]] * 2, [theirs, [7.0, 6.5]])
    assert figures["agrees"] == agrees
    assert ("DIFFER" in capsys.readouterr().out) == (not agrees)


@pytest.fixture(scope="module")
def model():
    """One layer of each kind, on images of 4 px."""
    image = keras.Input((4, 4, 3), name="image")
    x = keras.layers.Conv2D(5, 3, use_bias=False, name="conv1")(image)
    x = keras.layers.ReLU(name="relu", dtype="mixed_bfloat16")(FusedBatchNormalization(name="bn1")(x))
    return keras.Model(image, keras.layers.Dense(2, name="fc.0")(keras.layers.GlobalAveragePooling2D(name="pool")(x)))


def test_weights_go_to_pytorch_by_torchvisions_names_and_layouts(model):
    state = tf.nest.map_structure(np.asarray, initial_state(model, 6, 0))
    tensors = parity.torch_tensors(model, state)
    assert tensors["encoder_q.conv1.weight"].shape == (5, 3, 3, 3)
    assert tensors["encoder_k.conv1.weight"][4, 1, 0, 2] == state.key[0][0, 2, 1, 4]
    assert tensors["encoder_q.fc.0.weight"].shape == (2, 5)
    assert tensors["queue"].shape == (2, 6)
    bn = {name for name in tensors if name.startswith("encoder_k.bn1")}
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert bn == {f"encoder_k.bn1.{kind}" for kind in kinds}


def test_activations_are_the_image_and_the_outputs_of_convolutions_relus_and_dense_layers_in_their_types(model):
    image, conv, relu, dense = 4 * 4 * 3 * 4, 2 * 2 * 5 * 4, 2 * 2 * 5 * 2, 2 * 4
    assert activation_bytes(model, 7) == 7 * (image + conv + relu + dense)


def test_settings_survive_their_way_to_the_other_process():
    settings = Settings(width=8, precision="bfloat16", batch=4, groups=2, seed=9)
    assert Settings.from_json(settings.to_json()) == settings


def test_a_measuring_process_answers_line_by_line_and_tells_why_it_ended():
    program = "import sys\nfor line in sys.stdin: print(int(line) * 2, flush=True)"
    with Worker([sys.executable, "-c", program]) as worker:
        assert [worker.ask("1"), worker.ask("20")] == [2, 40]
        with pytest.raises(RuntimeError, match="invalid literal for int"):
            worker.ask("many")


def test_the_long_row_in_bfloat16_is_left_out_where_the_processor_has_none_of_it(capsys):
    assert ("bfloat16", 64) in rows("flags : fpu avx2 avx512_bf16 amx_bf16\n")
    assert ("bfloat16", 64) not in rows("flags : fpu avx2\n")
    assert "no instructions for bfloat16" in capsys.readouterr().out


def test_work_of_others_is_told_from_that_of_the_measured_processes():
    spin = "import sys\nfor line in sys.stdin: print(sum(range(int(line))), flush=True)"
    with Worker([sys.executable, "-c", spin]) as worker:
        as_own, as_another = Bystanders([worker]), Bystanders([])
        worker.ask("20000000")
        assert worker.processor_seconds > 0.1
        assert as_own.share < as_another.share
