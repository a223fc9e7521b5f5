"""Weights in the names and layouts of torchvision and of MoCo's PyTorch checkpoints, as .safetensors or .npz.

`layer1.0.conv1/kernel` here is `layer1.0.conv1.weight` there. A convolution's kernel is HWIO here and OIHW there, a
linear layer's [in, out] here and [out, in] there, the queue [K, C] here and [C, K] there (facebookresearch/moco,
moco/builder.py). Variables of a Keras model that torchvision does not have go by the same rule.

Imports neither TensorFlow nor Keras before there is a file to read, so that a command line can ask it for names.
"""

import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from trainer_module import npz
from trainer_module.errors import UserError

if TYPE_CHECKING:
    import keras

    from trainer_module.config import EncoderConfig
    from trainer_module.encoder import Encoder
    from trainer_module.moco import State

Tensors = dict[str, np.ndarray]

SUFFIXES = (".safetensors", ".npz")
QUERY, KEY = "module.encoder_q.", "module.encoder_k."
# In the order of preference: MoCo's query encoder, MoCo v3's, a model in DataParallel, torchvision's plain names.
PREFIXES = (QUERY, "encoder_q.", "module.base_encoder.", "base_encoder.", "module.", "")

_KINDS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_COUNTER = "num_batches_tracked"
_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}  # of a kernel, to PyTorch's
_DTYPES = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


# Names and layouts.


def torch_name(path: str) -> str:
    """Returns a Keras variable's name in PyTorch, such as layer1.0.bn1.running_mean for layer1.0.bn1/moving_mean."""
    layer, _, kind = path.rpartition("/")
    return f"{layer.replace('/', '.')}.{_KINDS.get(kind, kind)}"


def torch_tensors(variables: Iterable[tuple[str, np.ndarray]]) -> Tensors:
    """Returns variables, (Keras path, value) each, by PyTorch's names and in its layouts.

    Each batch normalisation also gets its int64 counter, 0, which PyTorch's own checkpoints hold.
    """
    tensors: Tensors = {}
    for path, value in variables:
        name = torch_name(path)
        tensors[name] = np.ascontiguousarray(_transposed(path, value))
        if name.endswith(".running_var"):
            tensors[f"{name.removesuffix('running_var')}{_COUNTER}"] = np.zeros([], np.int64)
    return tensors


def moco_tensors(model: "keras.Model", state: "State") -> Tensors:
    """Returns what a MoCo PyTorch checkpoint's state_dict holds: both encoders, module.queue and module.queue_ptr.

    Args:
        model: the architecture, head included.
        state: as arrays; lists in the order of the model's variables.
    """
    tensors: Tensors = {}
    for prefix, parameters, statistics in (
        (QUERY, state.query, state.query_stats),
        (KEY, state.key, state.key_stats),
    ):
        variables = zip(
            [v.path for v in (*model.trainable_variables, *model.non_trainable_variables)],
            [np.asarray(value) for value in (*parameters, *statistics)],
            strict=True,
        )
        tensors |= {f"{prefix}{name}": value for name, value in torch_tensors(variables).items()}
    tensors["module.queue"] = np.ascontiguousarray(np.asarray(state.queue, np.float32).T)
    tensors["module.queue_ptr"] = np.asarray(state.pointer, np.int64).reshape(1)
    return tensors


def _transposed(path: str, value: np.ndarray) -> np.ndarray:
    axes = _axes(path, value.ndim)
    return value if axes is None else value.transpose(axes)


def _axes(path: str, rank: int) -> tuple[int, ...] | None:
    return _AXES.get(rank) if path.endswith("/kernel") else None


# Files.


def check_suffix(path: str, what: str) -> None:
    """Refuses a file of another kind.

    Args:
        path: of the file, which need not exist.
        what: how a message names it, such as "--out x.pt".

    Raises:
        UserError: it ends neither in .safetensors nor in .npz; for PyTorch's own files with the script that converts.
    """
    name = PurePath(path).name
    if name.endswith(SUFFIXES):
        return
    if name.endswith((".pth", ".pt", ".tar", ".ckpt", ".bin")):
        target = (name.partition(".")[0] or "weights") + ".safetensors"
        raise UserError(
            f"{what}: is PyTorch's own format; convert it where PyTorch is: import torch, safetensors.torch; "
            f"d = torch.load({name!r}, map_location='cpu'); safetensors.torch.save_file("
            f"{{k: v.contiguous().clone() for k, v in d.get('state_dict', d).items()}}, {target!r})"
        )
    raise UserError(f"{what}: must end in {' or '.join(SUFFIXES)}; name a file of such a kind")


def read_moco_checkpoint(path: str) -> Tensors:
    """Reads every tensor of a file under the name that it has there; half precision becomes float32.

    Args:
        path: .safetensors or .npz, on this machine or gs://.

    Raises:
        UserError: it is missing, of another kind, or cannot be read.
    """
    check_suffix(path, path)
    data = _read(path)
    try:
        tensors = _from_npz(data) if path.endswith(".npz") else _from_safetensors(data)
    except (safetensors.SafetensorError, zipfile.BadZipFile, ValueError, KeyError, OSError, EOFError) as error:
        kind = path.rpartition(".")[2]
        raise UserError(f"{path}: cannot be read as .{kind}: {_first_line(error)}") from error
    return {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in tensors.items()}


def write_tensors(path: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a file that appears when it is whole.

    Args:
        path: .safetensors or .npz, on this machine or gs://; a file that is there is replaced.
        tensors: by name.

    Raises:
        UserError: the suffix is another one.
    """
    import tensorflow as tf

    check_suffix(path, path)
    if path.endswith(".npz"):
        buffer = io.BytesIO()
        npz.write(buffer, tensors)
        data = buffer.getvalue()
    else:
        data = safetensors.numpy.save(dict(tensors), metadata={"format": "pt"})
    temporary = f"{path}.{os.getpid()}.part"
    try:
        with tf.io.gfile.GFile(temporary, "wb") as file:
            file.write(data)
        tf.io.gfile.rename(temporary, path, overwrite=True)
    finally:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.remove(temporary)


def digest(path: str) -> str:
    """Returns 16 hexadecimal digits of a file's content, for cache keys; nothing for an empty path.

    Raises:
        UserError: it is missing.
    """
    return hashlib.sha256(_read(path)).hexdigest()[:16] if path else ""


def _read(path: str) -> bytes:
    import tensorflow as tf

    try:
        with tf.io.gfile.GFile(os.path.expanduser(path), "rb") as file:
            return file.read()
    except tf.errors.OpError as error:
        reason = "there is no such file" if isinstance(error, tf.errors.NotFoundError) else _first_line(error)
        raise UserError(f"{path}: {reason}") from error


def _from_npz(data: bytes) -> Tensors:
    if not data.startswith(b"PK"):  # np.load would also take a bare array, or a pickle
        raise ValueError("is no archive of arrays")
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _from_safetensors(data: bytes) -> Tensors:
    return {name: _array(name, **entry) for name, entry in safetensors.deserialize(data)}


def _array(name: str, dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    if dtype not in _DTYPES:
        raise ValueError(f"{name} is of type {dtype}; convert it to float32 first")
    return np.frombuffer(data, np.dtype(_DTYPES[dtype]).newbyteorder("<")).reshape(shape)


# Into a model.


def check_encoder(config: "EncoderConfig", size: int) -> None:
    """Builds an encoder of a Keras model or of given weights for trial, so that a fault is known before a long run.

    Args:
        config: the architecture.
        size: side of the input image in pixels.

    Raises:
        UserError: see build_encoder and load_initial_weights.
    """
    from trainer_module.config import Precision
    from trainer_module.encoder import BLOCKS, build_encoder

    if config.name in BLOCKS and not config.weights:
        return
    encoder = build_encoder(config, size, Precision.float32, seed=0)
    if config.weights:
        load_initial_weights(encoder, config.weights)


def load_initial_weights(encoder: "Encoder", path: str) -> None:
    """Loads initial weights of f_q; f_k is made as its copy, as always.

    The backbone must be there. The head is taken where all of it is there in these shapes, and else stays fresh, which
    the log tells.

    Args:
        encoder: that build_encoder made; its weights are replaced.
        path: .safetensors or .npz with a MoCo checkpoint's or torchvision's names.

    Raises:
        UserError: the file cannot be read, or is of another architecture.
    """
    place = f"encoder.weights={path}"
    tensors = read_moco_checkpoint(path)
    prefix = load_backbone(encoder.backbone, tensors, place)
    backbone = {id(v) for v in encoder.backbone.variables}
    head = [v for v in encoder.model.variables if id(v) not in backbone]
    taken = _fits(head, tensors, prefix)
    if taken:
        _assign(head, tensors, prefix, place)
    found = "head taken" if taken else "head fresh: the file holds none of these names and shapes"
    logging.getLogger(__name__).info("%s: backbone taken (%s…), %s", place, prefix, found)


def load_backbone(model: "keras.Model", tensors: Mapping[str, np.ndarray], place: str = "weights") -> str:
    """Assigns every variable of a model from tensors of PyTorch's names; their names may have one of PREFIXES.

    Args:
        model: to be loaded.
        tensors: in PyTorch's layouts; a classifier, a head or counters among them are left alone.
        place: where they come from, for messages.

    Returns:
        The prefix that they had.

    Raises:
        UserError: a tensor is missing or of another shape, or the file holds layers that the model lacks.
    """
    wanted = {torch_name(v.path): v for v in model.variables}
    prefix = _prefix(wanted, tensors, place)
    guess = _guess(tensors, prefix)
    for name, variable in wanted.items():
        there = tensors.get(f"{prefix}{name}")
        if there is None:
            raise UserError(f"{place}: has no {prefix}{name}{guess or '; name the encoder that it was made with'}")
        expected = _torch_shape(variable)
        if there.shape != expected:
            cause = _cause(name, there.shape, expected) or guess
            raise UserError(
                f"{place}: {prefix}{name} is {list(there.shape)} there and {list(expected)} in this encoder{cause}"
            )
    _refuse_more(wanted, tensors, prefix, guess, place)
    _assign(model.variables, tensors, prefix, place)
    return prefix


def _prefix(wanted: Iterable[str], tensors: Mapping[str, np.ndarray], place: str) -> str:
    names = list(wanted)
    for prefix in PREFIXES:
        if any(f"{prefix}{name}" in tensors for name in names):
            return prefix
    some = ", ".join(list(tensors)[:3]) or "none"
    raise UserError(
        f"{place}: holds no tensor of this encoder, such as {names[0]} or {QUERY}{names[0]}; it has: {some}"
    )


def _refuse_more(
    wanted: Mapping[str, Any], tensors: Mapping[str, np.ndarray], prefix: str, guess: str, place: str
) -> None:
    """A deeper network's first blocks would fit, and would not be that network."""
    stages = {name.partition(".")[0] for name in wanted}
    for full in sorted(tensors):
        name = full.removeprefix(prefix)
        of_a_stage = full.startswith(prefix) and name.partition(".")[0] in stages
        if of_a_stage and name not in wanted and not name.endswith(_COUNTER):
            raise UserError(f"{place}: has {full}, which this encoder lacks{guess}")


def _fits(variables: Iterable[Any], tensors: Mapping[str, np.ndarray], prefix: str) -> bool:
    there = ((tensors.get(f"{prefix}{torch_name(v.path)}"), _torch_shape(v)) for v in variables)
    return all(value is not None and value.shape == shape for value, shape in there)


def _assign(variables: Iterable[Any], tensors: Mapping[str, np.ndarray], prefix: str, place: str) -> None:
    for variable in variables:
        name = f"{prefix}{torch_name(variable.path)}"
        value = tensors[name]
        if not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value).all():
            raise UserError(f"{place}: {name} holds values that are no finite numbers; take another checkpoint")
        axes = _axes(variable.path, value.ndim)
        variable.assign(value if axes is None else value.transpose(np.argsort(axes)))


def _torch_shape(variable: Any) -> tuple[int, ...]:
    shape = tuple(int(side) for side in variable.shape)
    axes = _axes(variable.path, len(shape))
    return shape if axes is None else tuple(shape[axis] for axis in axes)


def _cause(name: str, there: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Returns which key would make the first convolution fit."""
    if name != "conv1.weight" or len(there) != 4:
        return ""
    if there[2:] != expected[2:]:
        return f"; likely encoder.stem={'imagenet' if there[2] == 7 else 'cifar'}"
    return f"; likely encoder.width={there[0]}" if there[0] != expected[0] else ""


def _guess(tensors: Mapping[str, np.ndarray], prefix: str) -> str:
    """Returns which ResNet the names are of, if any."""
    from trainer_module.encoder import BLOCKS, BOTTLENECK

    bottleneck = f"{prefix}layer1.0.conv3.weight" in tensors
    blocks = tuple(
        sum(f"{prefix}layer{stage}.{index}.conv1.weight" in tensors for index in range(100)) for stage in range(1, 5)
    )
    names = [name for name, count in BLOCKS.items() if count == blocks and (name in BOTTLENECK) == bottleneck]
    return f"; likely encoder.name={names[0]}" if names else ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
