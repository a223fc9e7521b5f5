"""Weights of PyTorch: the same features as there from the same weights, names, layouts, files, refusals."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import tensorflow as tf
from torch_reference import layout, make

from trainer_module import torch_weights
from trainer_module.config import EncoderConfig, Head, Precision, Stem
from trainer_module.encoder import build_encoder
from trainer_module.errors import UserError
from trainer_module.moco import initial_state
from trainer_module.torch_weights import (
    QUERY,
    check_encoder,
    digest,
    load_backbone,
    load_initial_weights,
    moco_tensors,
    read_moco_checkpoint,
    torch_tensors,
    write_tensors,
)

SMALL = EncoderConfig("resnet18", width=4, dim=8)


def values(model):
    return [(v.path, np.array(v)) for v in model.variables]


def small(seed=0, config=SMALL):
    return build_encoder(config, 32, Precision.float32, seed)


@pytest.fixture(scope="module")
def encoder():
    """For tests that leave it as it is."""
    return small(1)


@pytest.fixture(scope="module")
def blank():
    """For tests that load weights: give it to `blanked` first."""
    return small(2)


def blanked(encoder):
    for variable in encoder.model.variables:
        variable.assign(np.full(variable.shape, 0.5, np.float32))
    return encoder


def refused(encoder, path):
    with pytest.raises(UserError) as caught:
        load_initial_weights(encoder, str(path))
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert str(path) in text
    return text


def largest_error(ours, theirs):
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


# The same network as PyTorch's.


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def both(request, tmp_path_factory):
    """Our encoder and PyTorch's arrays, after our encoder has read the weights that PyTorch had."""
    reference = np.load(make.FOLDER / f"{request.param}.npz")
    encoder = build_encoder(EncoderConfig(request.param), make.SIZE, Precision.float32, 0)
    shapes = {name: t.shape for name, t in torch_tensors(values(encoder.model)).items()}
    counters = {name: np.ones([], np.int64) for name in shapes if name.endswith("num_batches_tracked")}
    drawn = {name: make.tensor(name, shape) for name, shape in shapes.items() if name not in counters}
    path = str(tmp_path_factory.mktemp("weights") / "moco.safetensors")
    write_tensors(path, {f"{QUERY}{name}": value for name, value in (drawn | counters).items()})
    load_initial_weights(encoder, path)
    return encoder, reference, shapes


def test_names_are_those_of_pytorchs_state_dict(both):
    encoder, reference, shapes = both
    assert set(shapes) == set(reference["names"])
    name = "resnet18" if encoder.backbone.output_shape[-1] == 512 else "resnet50"
    assert set(layout.shapes(name)) == {name for name in reference["names"] if not name.startswith("fc.")}


def test_features_and_statistics_are_pytorchs_in_inference_and_training(both):
    encoder, reference, _ = both
    pixels = make.images()
    assert make.digest(pixels) == reference["pixels"]
    x, model = tf.constant(make.normalised(pixels)), encoder.model
    parameters = [v.value for v in model.trainable_variables]
    stats = [v.value for v in model.non_trainable_variables]
    features = encoder.backbone.stateless_call(
        [v.value for v in encoder.backbone.trainable_variables], stats, x, training=False
    )[0]
    assert largest_error(features, reference["inference"]) < 1e-4
    assert largest_error(model.stateless_call(parameters, stats, x)[0], reference["inference_embedding"]) < 1e-4
    embedding, after = model.stateless_call(parameters, stats, x, training=True)
    assert largest_error(embedding, reference["training_embedding"]) < 1e-4
    features = encoder.backbone.stateless_call(
        [v.value for v in encoder.backbone.trainable_variables], stats, x, training=True
    )[0]
    assert largest_error(features, reference["training"]) < 1e-4
    ours = {
        torch_weights.torch_name(v.path): (np.mean(s), np.std(s))
        for v, s in zip(model.non_trainable_variables, after, strict=True)
    }
    for name, theirs in zip(reference["statistics_names"], reference["statistics"], strict=True):
        np.testing.assert_allclose(ours[name], theirs, rtol=1e-4, atol=1e-5, err_msg=name)


# Names, layouts, files.


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("prefix", ["module.encoder_q.", "encoder_q.", "module.base_encoder.", "module.", ""])
def test_what_is_written_is_read_back_to_the_bit_under_each_prefix(encoder, blank, tmp_path, suffix, prefix):
    written, read = encoder, blanked(blank)
    path = str(tmp_path / f"weights{suffix}")
    write_tensors(path, {prefix + name: t for name, t in torch_tensors(values(written.model)).items()})
    load_initial_weights(read, path)
    for (name, a), (_, b) in zip(values(written.model), values(read.model), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert [file.name for file in tmp_path.iterdir()] == [f"weights{suffix}"]


def test_half_precision_is_read_as_float32(tmp_path):
    x = np.array([[1.5, -2.0], [0.0, 3e-3]], np.float32)
    path = tmp_path / "half.safetensors"
    contents = [("BF16", (x.view(np.uint32) >> 16).astype(np.uint16)), ("F16", x.astype(np.float16))]
    header = {
        dtype: {"dtype": dtype, "shape": x.shape, "data_offsets": [8 * at, 8 * at + 8]}
        for at, (dtype, _) in enumerate(contents)
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(value.tobytes() for _, value in contents))
    read = read_moco_checkpoint(str(path))
    assert {t.dtype for t in read.values()} == {np.dtype(np.float32)}
    for value in read.values():
        np.testing.assert_allclose(value, x, rtol=1e-2)


def test_a_moco_checkpoint_has_both_encoders_and_the_queue_as_the_authors_have(encoder, blank, tmp_path):
    other = blanked(blank)
    state = initial_state(encoder.model, 24, 0)
    path = str(tmp_path / "moco.safetensors")
    write_tensors(path, moco_tensors(encoder.model, state._replace(key=[k + 1 for k in state.key])))
    tensors = read_moco_checkpoint(path)
    assert tensors["module.queue"].shape == (8, 24)
    np.testing.assert_array_equal(tensors["module.queue"].T, state.queue)
    assert (tensors["module.queue_ptr"].shape, tensors["module.queue_ptr"].dtype) == ((1,), np.int64)
    kernel = np.asarray(encoder.model.get_layer("layer2.0.conv1").kernel)
    np.testing.assert_array_equal(tensors["module.encoder_q.layer2.0.conv1.weight"], kernel.transpose(3, 2, 0, 1))
    head = np.asarray(encoder.model.get_layer("fc.2").kernel)
    np.testing.assert_array_equal(tensors["module.encoder_k.fc.2.weight"], head.T + 1)
    load_initial_weights(other, path)
    for (name, a), (_, b) in zip(values(encoder.model), values(other.model), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_a_digest_follows_the_content_and_not_the_name(tmp_path):
    for name, value in (("a.npz", 1), ("b.npz", 1), ("c.npz", 2)):
        write_tensors(str(tmp_path / name), {"x": np.array(value)})
    a, b, c = (digest(str(tmp_path / name)) for name in ("a.npz", "b.npz", "c.npz"))
    assert a == b != c
    assert digest("") == ""


# Into an encoder.


@pytest.mark.parametrize(("head", "taken"), [(Head.v2, True), (Head.v1, False)])
def test_the_head_is_taken_where_it_fits_and_else_stays_fresh(tmp_path, caplog, head, taken):
    source, target, fresh = small(1, EncoderConfig("resnet18", width=4, dim=8, head=head)), small(2), small(2)
    path = str(tmp_path / "weights.npz")
    write_tensors(path, torch_tensors(values(source.model)))
    with caplog.at_level(logging.INFO):
        load_initial_weights(target, path)
    expected = source if taken else fresh
    for layer in ("fc.0", "fc.2"):
        for a, b in zip(
            expected.model.get_layer(layer).get_weights(), target.model.get_layer(layer).get_weights(), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    assert ("head taken" if taken else "head fresh") in caplog.text


def test_a_head_of_nan_is_refused(encoder, tmp_path):
    tensors = torch_tensors(values(encoder.model))
    tensors["fc.2.bias"] = np.full_like(tensors["fc.2.bias"], np.nan)
    write_tensors(str(tmp_path / "nan.npz"), tensors)
    assert "fc.2.bias holds values that are no finite numbers" in refused(encoder, tmp_path / "nan.npz")


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({"width": 8}, ["conv1.weight is [8, 3, 7, 7] there and [4, 3, 7, 7]", "encoder.width=8"]),
        ({"stem": Stem.cifar}, ["conv1.weight is [4, 3, 3, 3] there", "encoder.stem=cifar"]),
        ({"name": "resnet34"}, ["has layer1.2.bn1.bias, which this encoder lacks", "encoder.name=resnet34"]),
        ({"name": "resnet50"}, ["layer1.0.conv1.weight is [4, 4, 1, 1] there", "encoder.name=resnet50"]),
    ],
)
def test_weights_of_another_architecture_are_refused_with_the_key_that_mends_it(encoder, tmp_path, there, words):
    path = tmp_path / "weights.safetensors"
    config = EncoderConfig(**({"name": "resnet18", "width": 4, "dim": 8} | there))
    write_tensors(str(path), torch_tensors(values(small(config=config).model)))
    text = refused(encoder, path)
    for word in words:
        assert word in text


def test_a_trial_refuses_what_the_trainer_would(encoder, tmp_path):
    path = str(tmp_path / "weights.npz")
    write_tensors(path, torch_tensors(values(encoder.backbone)))
    check_encoder(dataclasses.replace(SMALL, weights=path), 32)
    with pytest.raises(UserError, match=r"encoder\.width=4"):
        check_encoder(dataclasses.replace(SMALL, weights=path, width=8), 32)
    with pytest.raises(UserError, match="no such file"):
        check_encoder(dataclasses.replace(SMALL, weights="/nowhere/x.npz"), 32)
    with pytest.raises(UserError, match="cannot be imported"):
        check_encoder(EncoderConfig("nowhere.at.all"), 32)


def test_a_missing_tensor_is_named(encoder):
    tensors = torch_tensors(values(encoder.backbone))
    del tensors["layer3.1.bn2.running_var"]
    with pytest.raises(UserError, match=r"mine: has no layer3\.1\.bn2\.running_var; likely encoder.name=resnet18$"):
        load_backbone(encoder.backbone, tensors, "mine")


def test_a_file_without_any_tensor_of_the_encoder_is_refused(encoder, tmp_path):
    write_tensors(str(tmp_path / "x.npz"), {"embedding": np.zeros(3, np.float32)})
    text = refused(encoder, tmp_path / "x.npz")
    assert "such as conv1.weight" in text
    assert "it has: embedding" in text


def test_a_file_of_pytorch_is_refused_with_the_script_that_converts_it(encoder, tmp_path):
    for name in ("moco_v2_800ep_pretrain.pth.tar", "x.pt", "it's.pth"):
        script = refused(encoder, tmp_path / name).partition("where PyTorch is: ")[2]
        compile(script, "script", "exec")
        assert f"{name.partition('.')[0]}.safetensors" in script


def test_what_cannot_be_read_is_refused_in_one_line(encoder, tmp_path):
    assert "no such file" in refused(encoder, tmp_path / "absent.npz")
    assert "must end in .safetensors or .npz" in refused(encoder, tmp_path / "weights.h5")
    (tmp_path / "folder.npz").mkdir()
    refused(encoder, tmp_path / "folder.npz")
    whole = tmp_path / "whole.safetensors"
    write_tensors(str(whole), torch_tensors(values(encoder.model)))
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", x=np.array([{}], object))
    contents = {
        "empty.npz": b"",
        "empty.safetensors": b"",
        "text.npz": b"no archive",
        "text.safetensors": b"no tensors at all",
        "torn.safetensors": whole.read_bytes()[:-100],
        "array.npz": (tmp_path / "array.npy").read_bytes(),
        "objects.npz": (tmp_path / "objects.npz").read_bytes(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert "cannot be read as ." in refused(encoder, tmp_path / name)
