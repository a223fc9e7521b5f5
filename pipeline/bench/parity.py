"""Losses of 20 steps beside the PyTorch MoCo builder's arithmetic: same weights, same views, same permutations.

Takes two or three minutes, and another one the first time, for PyTorch's environment.
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

from pipeline import console, side_env
from pipeline.bench._comparison import TORCH_PROGRAM, Settings, make_driver, make_moco, make_model
from pipeline.bench._worker import THREADS, started
from pipeline.worker import ROOT
from trainer_module import npz

if TYPE_CHECKING:
    import keras

    from trainer_module.driver import Driver
    from trainer_module.moco import State

TOLERANCE = 1e-4
_STEPS = 20
_PRECISIONS = ("float64", "float32")
# In float32 the normalised pixels are exact with these, so that no implementation starts with other ones.
_SETTINGS = Settings(width=16, precision="float32", batch=64, groups=2, mean=(128.0,) * 3, std=(64.0,) * 3)
_KINDS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "bias": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def measure() -> Mapping[str, float]:
    """Trains a CIFAR ResNet-18 of width 16 on views of the sample pictures.

    The random numbers (initial weights and queue, views, permutations) are ours; all the arithmetic is each side's
    own. Ours has two replicas as logical devices and shuffles the keys between them; PyTorch's runs on one device and
    normalises the two halves of the batch apart, as two GPUs would.

    The verdict is on float64. In float32, where ours runs through the driver as it trains, any two implementations part
    after a few steps, since rounding errors grow; how far PyTorch's own float32 gets from its float64 is the yardstick.

    Returns:
        steps, the first and the last loss in float64, the largest difference of the losses, the tolerance, and 1 for
        agreement (0 for none); the largest distance of each side's float32 to PyTorch's float64, over the first three
        steps and over all.

    Raises:
        UserError: PyTorch's environment cannot be made.
    """
    python = side_env.TORCH.python()
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "settings.json").write_text(_SETTINGS.to_json())
        with started([sys.executable, "-m", "pipeline.bench.parity", work]) as worker:
            ours = [worker.ask(precision) for precision in _PRECISIONS]
        with started([python, "-I", TORCH_PROGRAM, "parity", work, str(THREADS)]) as worker:
            theirs = [worker.ask(precision) for precision in _PRECISIONS]
    return compare(ours, theirs)


def compare(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Prints the columns and the verdict, and returns the figures.

    Args:
        ours, theirs: losses in float64, losses in float32.
    """
    (a64, a32), (b64, b32) = np.array(ours), np.array(theirs)
    difference, rounding, torch_rounding = (np.abs(x - b64) for x in (a64, a32, b32))
    console.line(f"{'':4}  {'float64':^40}  {'float32 from PyTorch float64':^28}")
    console.line(f"{'step':>4}  {'MoCo':>14}{'PyTorch':>14}{'apart':>12}  {'MoCo':>14}{'PyTorch':>14}")
    for step, row in enumerate(zip(a64, b64, difference, rounding, torch_rounding, strict=True), 1):
        console.line("{:>4}  {:>14.9f}{:>14.9f}{:>12.1e}  {:>14.1e}{:>14.1e}".format(step, *row))
    largest = float(difference.max())  # NaN where a loss is
    agrees = largest <= TOLERANCE
    console.line(f"the losses {'agree' if agrees else 'DIFFER'}: at most {largest:.1e} apart, tolerance {TOLERANCE:g}")
    return {
        "steps": len(a64),
        "first_loss": a64[0],
        "last_loss": a64[-1],
        "last_loss_pytorch": b64[-1],
        "largest_difference_millionths": largest * 1e6,
        "tolerance_millionths": TOLERANCE * 1e6,
        "agrees": float(agrees),
        "float32_first_3_steps_millionths": rounding[:3].max() * 1e6,
        "float32_first_3_steps_pytorch_millionths": torch_rounding[:3].max() * 1e6,
        "float32_millionths": rounding.max() * 1e6,
        "float32_pytorch_millionths": torch_rounding.max() * 1e6,
    }


def torch_tensors(model: "keras.Model", state: "State") -> dict[str, np.ndarray]:
    """The state as the builder's state_dict names it: encoder_q, encoder_k, queue [C, K], queue_ptr.

    Args:
        model: whose variables' paths, such as "layer1.0.conv1/kernel", give the names.
        state: as arrays.
    """
    paths = [[v.path for v in variables] for variables in (model.trainable_variables, model.non_trainable_variables)]
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


class _Training:
    """Trains on the same views from the same state in the type asked for."""

    def __init__(self, folder: Path) -> None:
        """Writes the state before the first step, views and permutations to FOLDER."""
        import tensorflow as tf

        from trainer_module.shuffle import permutation
        from trainer_module.strategy import make_strategy

        self._strategy, self._model = make_strategy(_SETTINGS.groups), make_model(_SETTINGS)
        self._views = _views(_STEPS * _SETTINGS.batch, _SETTINGS)
        seeds = [tf.constant([_SETTINGS.seed, step]) for step in range(_STEPS)]
        np.save(folder / "views.npy", self._views)
        np.save(folder / "permutations.npy", np.stack([permutation(seed, _SETTINGS.batch) for seed in seeds]))
        npz.write(folder / "start.npz", torch_tensors(self._model, self._driver().state()))

    def losses(self, precision: str) -> list[float]:
        """Of each step."""
        return {"float32": self._float32, "float64": self._float64}[precision]()

    def _driver(self) -> "Driver":
        return make_driver(_SETTINGS, self._model, self._strategy)

    def _float32(self) -> list[float]:
        import tensorflow as tf

        data = tf.data.Dataset.from_tensor_slices((self._views[:, 0], self._views[:, 1]))
        batches = iter(self._strategy.experimental_distribute_dataset(data))
        step = self._driver().compiled_step()
        return [float(step(batches).loss) for _ in range(_STEPS)]

    def _float64(self) -> list[float]:
        from pipeline.bench import _float64

        model = _float64.in_float64(self._model)
        state = _float64.start(model, _SETTINGS.queue, _SETTINGS.seed)
        steps = _float64.run(make_moco(_SETTINGS, model), state, self._views, self._strategy)
        return [float(metrics.loss) for _, metrics in steps]


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
    """Entry of our side's process: a type is answered with the losses in it."""
    console.prefer_onednn()
    training = _Training(Path(sys.argv[1]))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(training.losses(line.strip())) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
