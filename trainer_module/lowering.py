"""The step lowered for a TPU with no TPU attached: the program that every core runs, as XLA's HLO.

It is the step that the trainer runs, with the state as its arguments and results in place of variables. TensorFlow's
build for TPUs (`tensorflow-tpu`) is needed: the plain one has no kernels of the operations between cores.
"""

import dataclasses
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.eager.polymorphic_function import compiler_ir

from trainer_module.build import build, first_state
from trainer_module.config import EncoderConfig, TrainConfig
from trainer_module.driver import learning_rate, named
from trainer_module.moco import Metrics, MoCo, State
from trainer_module.replica import TpuCollectives

# ImageNet's, whose numbers make no difference to what a step costs; the trainer measures its own images.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
STEPS_PER_EPOCH = 5004  # of ImageNet at 256 images a step


@dataclasses.dataclass(frozen=True)
class Request:
    """Which step, and for how many cores.

    Attributes:
        encoder, train: the configuration; train.global_batch is over all cores.
        size: side of a view in pixels.
        replicas: cores that share a global batch, R; they divide it.
        hosts: that feed the cores.
        seed: of weights and permutations.
    """

    encoder: EncoderConfig
    train: TrainConfig
    size: int
    replicas: int
    hosts: int = 1
    seed: int = 0


class Tensor(NamedTuple):
    """An argument or a result of the program.

    Attributes:
        name: of a leaf of the state as in trainer_module.driver.named; `views/query`, `views/key`, `replica`;
            `metrics/…` by the fields of Metrics.
        dtype: TensorFlow's name, such as "float32".
        shape: its sides.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A core's program; all cores run the same one.

    Attributes:
        hlo: a serialised HloModuleProto.
        replicas: cores that its collectives take in.
        arguments, results: in their order. A result with the name of an argument is its new value: a leaf of the
            state, which the trainer keeps in place.
    """

    hlo: bytes
    replicas: int
    arguments: tuple[Tensor, ...]
    results: tuple[Tensor, ...]

    def manifest(self) -> dict[str, Any]:
        """Everything but the program, as JSON values."""
        fields = ("arguments", "results")
        return {"replicas": self.replicas, **{f: [t._asdict() for t in getattr(self, f)] for f in fields}}


class LoweredReplica(TpuCollectives):
    """One of R cores, in a program that is told its own id."""

    def __init__(self, count: int, index: tf.Tensor) -> None:
        self._count, self._index = count, index

    @property
    def count(self) -> int:
        """Number of cores, R."""
        return self._count

    @property
    def index(self) -> tf.Tensor:
        """int32[]: this core's id."""
        return self._index


def lower(request: Request) -> Lowered:
    """Builds the networks and lowers one step of them.

    Raises:
        UserError: encoder.name cannot be an encoder.
    """
    train = request.train
    moco = build(
        request.encoder,
        train,
        request.size,
        MEAN,
        STD,
        learning_rate(train, STEPS_PER_EPOCH),
        request.seed,
        hosts=request.hosts,
    ).moco
    return lower_step(moco, first_state(moco, train), train.global_batch // request.replicas, request.replicas)


def lower_step(moco: MoCo, state: State, batch: int, replicas: int) -> Lowered:
    """Lowers one step.

    Args:
        moco: the step.
        state: its shapes and types count.
        batch: images of one core, n.
        replicas: R.
    """
    state_spec = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), state)
    side = moco.model.input_shape[1]
    views = tf.TensorSpec([batch, side, side, 3], tf.uint8)

    @tf.function(jit_compile=True, autograph=False)
    def step(state: State, x_q: tf.Tensor, x_k: tf.Tensor, replica_id: tf.Tensor) -> tuple[State, Metrics]:
        return moco.step(state, x_q, x_k, LoweredReplica(replicas, tf.reshape(replica_id, [])))

    # A vector of one, so that the ids of several cores can be laid end to end.
    concrete = step.get_concrete_function(state_spec, views, views, tf.TensorSpec([1], tf.int32))
    assert not concrete.variables, "a captured variable would be a constant of the program"
    hlo = compiler_ir.from_concrete_function(concrete)(stage="hlo_serialized", platform_name="TPU")
    leaves = named(state_spec)
    new_state, metrics = concrete.structured_outputs
    inputs = {**leaves, "views/query": views, "views/key": views, "replica": tf.TensorSpec([1], tf.int32)}
    results = {**named(new_state), **{f"metrics/{name}": value for name, value in metrics._asdict().items()}}
    return Lowered(hlo, replicas, _described(inputs), _described(results))


def _described(tensors: dict[str, Any]) -> tuple[Tensor, ...]:
    return tuple(Tensor(name, t.dtype.name, tuple(t.shape.as_list())) for name, t in tensors.items())
