"""./moco weights: a published encoder's weights by PyTorch's names, which start another encoder."""

import numpy as np
import pytest
import tensorflow as tf

from pipeline import cli
from trainer_module.config import EncoderConfig, Precision
from trainer_module.encoder import Encoder, build_encoder
from trainer_module.torch_weights import load_initial_weights, read_moco_checkpoint

CONFIG = EncoderConfig("resnet18", width=4, dim=8)


class Published(tf.Module):
    """A backbone whose variables are exported as the Trainer exports them, with or without names."""

    def __init__(self, encoder: Encoder, named: bool):
        super().__init__()
        self.held = [tf.Variable(v.value, name=v.path if named else None) for v in encoder.backbone.variables]
        self.trainable = sum(v.trainable for v in encoder.backbone.variables)
        self.place = [[v.path for v in encoder.backbone.variables].index(p) for p in ordered(encoder)]
        self.call = lambda parameters, stats, x: encoder.backbone.stateless_call(parameters, stats, x, training=False)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def serving_default(self, image_bytes):
        ordered_values = [tf.convert_to_tensor(self.held[at]) for at in self.place]
        x = tf.zeros([tf.shape(image_bytes)[0], 32, 32, 3])
        return {"embedding": self.call(ordered_values[: self.trainable], ordered_values[self.trainable :], x)[0]}


def ordered(encoder: Encoder) -> list[str]:
    return [v.path for v in (*encoder.backbone.trainable_variables, *encoder.backbone.non_trainable_variables)]


def published(folder, named=True):
    encoder = build_encoder(CONFIG, 32, Precision.float32, 1)
    module = Published(encoder, named)
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serving_default})
    return encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving") / "encoder"
    return published(folder / "7"), folder


def refused(capsys, *arguments):
    assert cli.main(["weights", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("moco: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_the_weights_that_are_written_are_the_published_ones_and_can_start_an_encoder(model, tmp_path, capsys, suffix):
    encoder, folder = model
    out = tmp_path / f"encoder{suffix}"
    assert cli.main(["weights", "--model", str(folder), "--out", str(out)]) == 0
    assert f"to {out}" in capsys.readouterr().out
    tensors = read_moco_checkpoint(str(out))
    assert tensors["layer1.0.conv1.weight"].shape == (4, 4, 3, 3)
    assert tensors["layer4.1.bn2.num_batches_tracked"] == 0
    other = build_encoder(CONFIG, 32, Precision.float32, 2)
    load_initial_weights(other, str(out))
    for a, b in zip(encoder.backbone.variables, other.backbone.variables, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=a.path)


def test_a_model_of_an_older_release_is_refused(tmp_path, capsys):
    published(tmp_path / "old", named=False)
    assert "no names" in refused(capsys, "--model", tmp_path / "old", "--out", tmp_path / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_bad_arguments_are_refused_in_one_line(model, tmp_path, capsys):
    folder = model[1]
    assert "must end in .npz or .safetensors" in refused(capsys, "--model", folder, "--out", tmp_path / "x.pth")
    assert "does not exist" in refused(capsys, "--model", folder, "--out", tmp_path / "nowhere" / "x.npz")
    assert "no such folder" in refused(capsys, "--model", tmp_path / "absent", "--out", tmp_path / "x.npz")
    assert "no SavedModel there" in refused(capsys, "--model", tmp_path, "--out", tmp_path / "x.npz")
    assert "--out" in refused(capsys, "--model", folder)
