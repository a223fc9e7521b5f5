"""Images per second of a whole training step on this CPU, beside the same step in PyTorch; memory against its parts.

Takes about five minutes, and another one the first time, for PyTorch's environment.
"""

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import console, side_env
from pipeline.bench._comparison import TORCH_PROGRAM, Settings, make_driver, make_model
from pipeline.bench._worker import THREADS, Bystanders, started
from pipeline.worker import Worker

if TYPE_CHECKING:
    import keras

_ROWS = (("float32", 16), ("float32", 64), ("bfloat16", 16))
_WITH_BFLOAT16 = (*_ROWS, ("bfloat16", 64))
_BATCH = 128
_ROUNDS = 5
_ROUND_SECONDS = 2.0
_QUIET = 0.05  # share of the machine that others may take
_MIB = 1 << 20


def measure() -> Mapping[str, float]:
    """Measures a CIFAR ResNet-18 with MoCo v2's head, 32 px, 128 images a step, K 4096, two threads on both sides.

    A step is all of it: normalising the pixels, m-update, shuffling, keys, queries, loss, gradient, SGD, enqueue. Ours
    goes through the driver as in training. Each side has a process of its own; they take turns, and each round's pair
    gives one ratio. The first two steps (compilation, allocation) are left out.

    Returns:
        For each precision and width: images per second of both (medians of the rounds); the median of the rounds'
        ratios; the ratio of the best rounds, which other work on the machine disturbs least; the share of the machine
        that such work took; and of our process in MiB: peak memory, what it held before the driver was made (imports,
        model), the state, the activations (see `activation_bytes`); and (peak - before) / (state + activations).
        See `rows` for what is left out where.

    Raises:
        UserError: PyTorch's environment cannot be made.
    """
    python = side_env.TORCH.python()
    figures: dict[str, float] = {}
    for precision, width in rows(Path("/proc/cpuinfo").read_text()):
        row = _measure_row(python, Settings(width, precision, _BATCH, groups=1))
        figures |= {f"{precision}_width_{width}_{name}": value for name, value in row.items()}
    return figures


def rows(cpuinfo: str) -> Sequence[tuple[str, int]]:
    """Precision and width of each row.

    Without instructions for bfloat16 both sides emulate it, ten times slower than float32; one row then shows that.

    Args:
        cpuinfo: text of /proc/cpuinfo.
    """
    from trainer_module.strategy import has_bfloat16

    if has_bfloat16(cpuinfo):
        return _WITH_BFLOAT16
    console.line("this processor has no instructions for bfloat16: width 64 is not measured in it")
    return _ROWS


def _measure_row(python: Path, settings: Settings) -> dict[str, float]:
    with started([sys.executable, "-m", "pipeline.bench.train", settings.to_json()]) as ours:
        steps = _steps_a_round(ours)
        # Only now, so that neither starts while the other is timed.
        with started([python, "-I", TORCH_PROGRAM, "speed", settings.to_json(), str(THREADS)]) as theirs:
            sides = ((ours, steps), (theirs, _steps_a_round(theirs)))
            others = Bystanders((ours, theirs))
            rounds = [[n * settings.batch / _seconds(side, n) for side, n in sides] for _ in range(_ROUNDS)]
            share = others.share
            memory, way = ours.ask("memory"), theirs.ask("1")["way"]
    return {**_summary(settings, way, rounds, share), **memory}


def _summary(settings: Settings, way: str, rounds: Sequence[Sequence[float]], others: float) -> dict[str, float]:
    """Prints a row, and returns its figures.

    Args:
        settings: of the row.
        way: how PyTorch computed.
        rounds: images per second of both sides in each round.
        others: share of the machine that other processes took. They cost PyTorch more, whose threads wait for each
            other at every operation.
    """
    columns = list(zip(*rounds, strict=True))
    (rate, torch_rate), (best, torch_best) = map(statistics.median, columns), map(max, columns)
    ratio = statistics.median(a / b for a, b in rounds)
    console.line(
        f"{settings.precision} width {settings.width}: MoCo {rate:.1f} images/s, PyTorch {torch_rate:.1f} ({way}), "
        f"ratio {ratio:.2f}; of the best rounds {best / torch_best:.2f}"
    )
    if others > _QUIET:
        console.line(f"  other processes took {others:.0%} of this machine: measure again when it is quiet")
    return {
        "images_per_second": rate,
        "pytorch_images_per_second": torch_rate,
        "ratio": ratio,
        "ratio_of_best_rounds": best / torch_best,
        "share_of_other_processes": others,
    }


def _steps_a_round(side: Worker) -> int:
    """Warms a side up, and tells how many of its steps fill a round."""
    _seconds(side, 1)
    return max(1, round(_ROUND_SECONDS / _seconds(side, 1)))


def _seconds(side: Worker, steps: int) -> float:
    return side.ask(str(steps))["seconds"]


def activation_bytes(model: "keras.Model", batch: int) -> int:
    """What the backward pass of f_q needs from its forward pass, at the least.

    That is the input of each convolution, dense layer and batch normalisation, and the output of each ReLU, which tells
    its gradient; in a ResNet these are the image and the outputs of convolutions, ReLUs and dense layers, each once.
    Not counted are padded copies, gradients, workspaces, and the forward pass of f_k, which keeps nothing.
    """
    import keras

    kept = (keras.layers.InputLayer, keras.layers.Conv2D, keras.layers.ReLU, keras.layers.Dense)
    outputs = [layer.output for layer in model.layers if isinstance(layer, kept)]
    bytes_of = {"float32": 4, "bfloat16": 2}
    return sum(batch * int(np.prod(output.shape[1:])) * bytes_of[output.dtype] for output in outputs)


# Our side, in a process of its own.


class _Training:
    """A trainer on random views that takes steps when it is told to."""

    def __init__(self, settings: Settings) -> None:
        import tensorflow as tf

        from trainer_module.strategy import make_strategy

        tf.config.threading.set_intra_op_parallelism_threads(THREADS)
        tf.config.threading.set_inter_op_parallelism_threads(THREADS)
        strategy = make_strategy(settings.groups)
        model = make_model(settings)
        self._activations = activation_bytes(model, settings.batch)
        self._before = _status("VmRSS")
        self._driver = make_driver(settings, model, strategy)
        shape = (settings.batch, settings.side, settings.side, 3)
        views = np.random.default_rng(settings.seed).integers(0, 256, (2, *shape), np.uint8)
        data = tf.data.Dataset.from_tensors(tuple(tf.constant(view) for view in views)).repeat()
        self._batches = iter(strategy.experimental_distribute_dataset(data))
        self._step = self._driver.compiled_step()

    def seconds(self, steps: int) -> float:
        """Takes so many steps."""
        start = time.perf_counter()
        for _ in range(steps):
            float(self._step(self._batches).loss)
        return time.perf_counter() - start

    def memory(self) -> dict[str, float]:
        """See `measure`."""
        import tensorflow as tf

        state = sum(np.asarray(tensor).nbytes for tensor in tf.nest.flatten(self._driver.state()))
        peak, parts = _status("VmHWM"), state + self._activations
        return {
            "peak_mib": peak / _MIB,
            "before_driver_mib": self._before / _MIB,
            "state_mib": state / _MIB,
            "activations_mib": self._activations / _MIB,
            "growth_over_parts": (peak - self._before) / parts,
        }


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _main() -> None:
    """Entry of our side's process: a number is answered with the seconds of so many steps, "memory" with figures."""
    console.prefer_onednn()
    training = _Training(Settings.from_json(sys.argv[1]))
    for line in sys.stdin:
        answer: Any = training.memory() if line.strip() == "memory" else {"seconds": training.seconds(int(line))}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
