"""Losses of 20 steps beside the PyTorch MoCo builder's arithmetic: same weights, same views, same permutations.

Takes a minute or two, and another the first time, for PyTorch's environment.
"""

import hashlib
import json
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline import console
from pipeline.bench import _torch_env
from pipeline.bench._comparison import TORCH_PROGRAM, Settings, make_driver, make_model
from pipeline.bench._worker import ROOT, THREADS, Worker

if TYPE_CHECKING:
    from trainer_module.moco import State

TOLERANCE = 1e-4
_STEPS = 20
_SETTINGS = Settings(width=16, precision="float32", batch=64, groups=2)
_KINDS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "bias": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def measure() -> Mapping[str, float]:
    """Trains a CIFAR ResNet-18 of width 16 on views of the sample pictures, in float32 on both sides.

    Ours runs as it trains: the driver, two replicas as logical devices, keys shuffled between them. PyTorch's runs on
    one device and normalises the two halves of the batch apart, as two GPUs would. The random numbers (initial weights
    and queue, views, permutations) are ours; all the arithmetic is each side's own.

    Returns:
        steps, the first and the last loss of each, the largest difference of the losses, the tolerance, and 1 for
        agreement (0 for none).

    Raises:
        UserError: PyTorch's environment cannot be made.
    """
    python = _torch_env.python_with_torch()
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "settings.json").write_text(_SETTINGS.to_json())
        with Worker([sys.executable, "-m", "pipeline.bench.parity", work]) as worker:
            ours = worker.ask("go")
        with Worker([python, "-I", TORCH_PROGRAM, "parity", work, str(THREADS)]) as worker:
            theirs = worker.ask("go")
    return compare(ours, theirs)


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Prints both columns and the verdict, and returns the figures."""
    console.line(f"{'step':>4}  {'MoCo':>12}  {'PyTorch':>12}  {'difference':>10}")
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    for step, (a, b, difference) in enumerate(zip(ours, theirs, differences, strict=True), 1):
        console.line(f"{step:>4}  {a:>12.7f}  {b:>12.7f}  {difference:>10.1e}")
    largest = float(np.max(differences))  # NaN where a loss is
    agrees = largest <= TOLERANCE
    console.line(f"the losses {'agree' if agrees else 'DIFFER'}: at most {largest:.1e} apart, tolerance {TOLERANCE:g}")
    return {
        "steps": len(ours),
        "first_loss": ours[0],
        "first_loss_pytorch": theirs[0],
        "last_loss": ours[-1],
        "last_loss_pytorch": theirs[-1],
        "largest_difference_1e-6": largest * 1e6,
        "tolerance_1e-6": TOLERANCE * 1e6,
        "agrees": float(agrees),
    }


def torch_tensors(paths: tuple[list[str], list[str]], state: "State") -> dict[str, np.ndarray]:
    """The state as the builder's state_dict names it: encoder_q, encoder_k, queue [C, K], queue_ptr.

    Args:
        paths: of the model's trainable and non-trainable variables, such as "layer1.0.conv1/kernel".
        state: as arrays.
    """
    parts = {
        "encoder_q": (state.query, state.query_stats),
        "encoder_k": (state.key, state.key_stats),
    }
    tensors = {
        f"{encoder}.{_torch_name(path)}": _torch_layout(path, np.asarray(value))
        for encoder, groups in parts.items()
        for names, values in zip(paths, groups, strict=True)
        for path, value in zip(names, values, strict=True)
    }
    counters = {
        name.replace("running_var", "num_batches_tracked"): np.zeros([], np.int64)
        for name in tensors
        if name.endswith("running_var")
    }
    queue = {"queue": np.asarray(state.queue).T, "queue_ptr": np.asarray([state.pointer], np.int64)}
    return {**tensors, **counters, **queue}


def _torch_name(path: str) -> str:
    layer, kind = path.rsplit("/", 1)
    return f"{layer}.{_KINDS[kind]}"


def _torch_layout(path: str, value: np.ndarray) -> np.ndarray:
    return np.transpose(value, {4: (3, 2, 0, 1), 2: (1, 0)}[value.ndim]) if path.endswith("/kernel") else value


# Our side, in a process of its own.


def _train(folder: Path) -> list[float]:
    """Writes views, permutations and the state before the first step to FOLDER, trains, and returns the losses."""
    import tensorflow as tf

    from trainer_module.shuffle import permutation
    from trainer_module.strategy import make_strategy

    settings = _SETTINGS
    strategy = make_strategy(settings.groups)
    model = make_model(settings)
    driver = make_driver(settings, model, strategy)
    paths = [v.path for v in model.trainable_variables], [v.path for v in model.non_trainable_variables]
    np.savez(folder / "start.npz", **torch_tensors(paths, driver.state()))
    views = _views(_STEPS * settings.batch, settings)
    np.save(folder / "views.npy", views)
    permutations = [permutation(tf.constant([settings.seed, step]), settings.batch) for step in range(_STEPS)]
    np.save(folder / "permutations.npy", np.stack(permutations))
    data = tf.data.Dataset.from_tensor_slices((views[:, 0], views[:, 1]))
    batches = iter(strategy.experimental_distribute_dataset(data))
    step = driver.compiled_step()
    return [float(step(batches).loss) for _ in range(_STEPS)]


def _views(count: int, settings: Settings) -> np.ndarray:
    """uint8[count / batch, 2, batch, side, side, 3]: MoCo v2's pairs of views of sample pictures."""
    import tensorflow as tf

    from trainer_module.config import AugmentConfig, ImageConfig
    from trainer_module.images import stored_image
    from trainer_module.views import view_pair

    encoded = _sample(count)
    ids = [hashlib.sha256(data).hexdigest() for data in encoded]
    image, augment = ImageConfig(storage_size=2 * settings.side), AugmentConfig(size=settings.side)

    def pair(data: tf.Tensor, id_hex: tf.Tensor) -> tf.Tensor:
        return view_pair(stored_image(data, image), id_hex, tf.constant(0, tf.int64), settings.seed, augment)

    pairs = tf.data.Dataset.from_tensor_slices((encoded, ids)).map(pair, tf.data.AUTOTUNE).batch(settings.batch)
    return np.stack(list(pairs.as_numpy_iterator())).swapaxes(1, 2)


def _sample(count: int) -> list[bytes]:
    """Files of the first pictures of the sample."""
    files: list[bytes] = []
    for path in sorted((ROOT / "configs" / "demo_images").glob("*.tar")):
        with tarfile.open(path) as tar:
            streams = (tar.extractfile(member) for member in tar if member.name.endswith(".png"))
            files += [stream.read() for stream in streams if stream]
    return files[:count]


def _main() -> None:
    """Entry of our side's process: answers one line."""
    console.prefer_onednn()
    sys.stdin.readline()
    sys.stdout.write(json.dumps(_train(Path(sys.argv[1]))) + "\n")


if __name__ == "__main__":
    _main()
