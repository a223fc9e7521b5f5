"""MoCo as a Keras 3 model, for training loops of one's own; the pipeline itself uses trainer_module.driver.

`MoCoModel` has fit, evaluate, predict, save and load. Its parts can be used by themselves, too: `ShuffledBatchNorm`
(trainer_module.batch_norm), a layer that is given its statistics, and `KeyQueue` (trainer_module.key_queue). Importing
this module is all that keras.saving.load_model needs to find them.
"""

import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer_module.batch_norm import (
    FusedBatchNormalization,
    ShuffledBatchNorm,
    SplitBatchNormalization,
    SyncBatchNormalization,
)
from trainer_module.config import KeyBnMode
from trainer_module.errors import UserError
from trainer_module.key_queue import KeyQueue
from trainer_module.moco import Metrics, MoCo, State, initial_state, layers_of
from trainer_module.replica import SingleReplica
from trainer_module.shuffle import key_encoding
from trainer_module.strategy import multiply_in_full

__all__ = ["KeyQueue", "MoCoModel", "ShuffledBatchNorm"]

_ONE_DEVICE = (KeyBnMode.split, KeyBnMode.stored, KeyBnMode.ema, KeyBnMode.none)
_COMPILE = ("run_eagerly", "steps_per_execution", "jit_compile")
# Of the numbers that are given: their kind, which of them are admitted, and these in words.
_RANGES: dict[str, tuple[Any, Callable[[float], bool], str]] = {
    "queue": (numbers.Integral, lambda value: value >= 1, "must be an integer, at least 1"),
    "ring": (numbers.Integral, lambda value: value >= 1, "must be an integer, at least 1"),
    "momentum": (numbers.Real, lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    "temperature": (numbers.Real, lambda value: 0 < value < math.inf, "must be a number above 0"),
    "sgd_momentum": (numbers.Real, lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    "weight_decay": (numbers.Real, lambda value: 0 <= value < math.inf, "must be at least 0"),
}

Rate = float | Callable[[tf.Tensor], tf.Tensor]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The constructor's arguments but the encoders."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    queue: int
    momentum: float
    temperature: float
    key_bn: KeyBnMode
    ring: int
    seed: int


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What the model holds beside its encoder; in a dataclass, which Keras does not look into for variables."""

    settings: _Settings
    moco: MoCo
    state: State


@dataclasses.dataclass(frozen=True)
class _Sgd:
    """The settings of compile."""

    learning_rate: Rate
    sgd_momentum: float
    weight_decay: float


class _OfStep(keras.optimizers.schedules.LearningRateSchedule):
    """A function of the step, as Keras wants it."""

    def __init__(self, function: Callable[[tf.Tensor], tf.Tensor]) -> None:
        self._function = function

    def __call__(self, step: Any) -> tf.Tensor:
        return self._function(tf.cast(step, tf.int32))


class _FiniteLoss(keras.callbacks.Callback):
    """Refuses to go on where the epoch's average of the loss is not finite, which it stays once one loss is not."""

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        del batch
        _check_loss(self.model, float((logs or {}).get("loss", 0.0)))


@keras.saving.register_keras_serializable("moco")
class MoCoModel(keras.Model):
    """MoCo with `fit`, on one device: the encoder's own weights are f_q and are trained in place.

    `model.save` and keras.saving.load_model keep all of the state: both encoders, queue, momentum of SGD, statistics.

    Example:
        import numpy as np
        import tensorflow as tf
        from trainer_module.config import EncoderConfig, Precision, Stem
        from trainer_module.encoder import build_encoder
        from trainer_module.keras_api import MoCoModel

        views = np.random.default_rng(0).integers(0, 256, (2, 16, 8, 8, 3)).astype("uint8")
        pairs = tf.data.Dataset.from_tensor_slices((views[0], views[1])).batch(8, drop_remainder=True)

        encoder = build_encoder(EncoderConfig(name="resnet18", stem=Stem.cifar, width=2), 8, Precision.float32, seed=0)
        model = MoCoModel(encoder.model, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4), queue=64)
        model.compile(learning_rate=0.03)
        model.fit(pairs, epochs=1, verbose=0)
        embeddings = model.predict(views[0], verbose=0)                        # unit, float32[16, 128]
        features = encoder.backbone((views[0] - model.mean) / model.std)       # float32[16, 16]

    Args:
        encoder: image float32[B, H, W, 3], normalised -> embeddings [B, C]; a built model without random layers.
        mean, std: per channel, in the units of the pixels (0 to 255).
        queue: K, at least the size of a batch.
        momentum: of the key encoder (m).
        temperature: of the softmax (T).
        key_bn: a KeyBnMode or its name: split (the encoder's batch normalisations then are SplitBatchNormalization),
            stored (key_encoder's are ShuffledBatchNorm), ema, none.
        key_encoder: the architecture of f_k where its layers differ; the same variables in the same order.
        ring: key batches whose statistics are kept, for stored.
        seed: of the queue and of the draws.

    Raises:
        UserError: a mode that needs several devices or does not fit the layers; an encoder that is not built, or keeps
            a random state; a number out of range, or mean and std that are not one for each channel.
    """

    def __init__(
        self,
        encoder: keras.Model,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        queue: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        key_bn: KeyBnMode | str = KeyBnMode.ema,
        key_encoder: keras.Model | None = None,
        ring: int = 8,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        # The state keeps its types under every policy; the encoder's layers cast for themselves.
        super().__init__(autocast=False, **kwargs)
        mode = _mode(key_bn)
        _check_numbers({"queue": queue, "ring": ring, "momentum": momentum, "temperature": temperature})
        _check_encoder("encoder", encoder)
        _check_pixels(encoder, mean, std)
        if key_encoder is not None:
            _check_key_encoder(encoder, key_encoder)
        _check_layers(mode, encoder, key_encoder)
        settings = _Settings(_floats(mean), _floats(std), queue, momentum, temperature, mode, ring, seed)
        self.encoder = encoder
        state = self._variables(encoder, initial_state(encoder, queue, seed, ring=_ring(settings)))
        self._parts = _Parts(settings, _moco(encoder, key_encoder, settings), state)
        names = [name for name in Metrics._fields if name != "learning_rate"]
        self._means = [keras.metrics.Mean(name=name) for name in names]
        self.built = True

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of the pixels."""
        return self._parts.settings.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, of the pixels."""
        return self._parts.settings.std

    @property
    def state(self) -> State:
        """All that a step changes, see trainer_module.moco.State; as variables."""
        return self._parts.state

    def build(self, input_shape: Any = None) -> None:
        """Does nothing: all variables exist already."""

    def compile(
        self, learning_rate: Rate = 0.03, sgd_momentum: float = 0.9, weight_decay: float = 1e-4, **kwargs: Any
    ) -> None:
        """Chooses the optimizer's settings; SGD as in the paper is part of the step.

        `model.optimizer` holds the learning rate, so that Keras's callbacks that read or set it do so here. As in the
        trainer, float32 is multiplied as float32 on TPUs and GPUs from here on, by all of this process:
        tf.config.experimental.enable_tensor_float_32_execution(True) afterwards takes that back.

        Args:
            learning_rate: a number, which callbacks may change, or a function of the step, int32[] -> float32[], such
                as a keras LearningRateSchedule. `save` keeps numbers and Keras's schedules; after loading a model with
                a function of one's own, compile it again.
            sgd_momentum, weight_decay: of SGD.
            **kwargs: run_eagerly, steps_per_execution, jit_compile, as in keras.Model.compile.

        Raises:
            UserError: another argument of keras.Model.compile, such as optimizer or loss; no learning rate; a number
                out of range.
        """
        _check_compile(learning_rate, kwargs)
        _check_numbers({"sgd_momentum": sgd_momentum, "weight_decay": weight_decay})
        multiply_in_full()
        schedule = isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule)
        held = _OfStep(learning_rate) if callable(learning_rate) and not schedule else learning_rate
        super().compile(optimizer=keras.optimizers.SGD(held), loss=None, **{"jit_compile": False, **kwargs})
        self._parts = dataclasses.replace(
            self._parts,
            moco=dataclasses.replace(
                self._parts.moco,
                learning_rate=lambda _: tf.cast(self.optimizer.learning_rate, tf.float32),
                sgd_momentum=sgd_momentum,
                weight_decay=weight_decay,
            ),
        )

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """uint8[B, H, W, 3] -> unit embeddings of f_q, float32[B, C]."""
        state = self._tensors()
        return self._parts.moco.encode(state.query, state.query_stats, x, training)[0]

    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """As keras.Model.fit, but stops at the end of a batch after which the loss is not finite.

        By then the step has spoilt the state, so go on from a model or weights that a ModelCheckpoint had saved.

        Raises:
            UserError: the loss is not finite.
        """
        given = inspect.signature(super().fit).bind(*args, **kwargs).arguments
        callbacks = given.pop("callbacks", None)
        stop = _FiniteLoss()  # first, so that no other callback saves what is spoilt
        if isinstance(callbacks, keras.callbacks.CallbackList):
            stop.set_model(self)
            callbacks.callbacks.insert(0, stop)
        else:
            callbacks = [stop, *tf.nest.flatten(callbacks or [])]
        return super().fit(**given, callbacks=callbacks)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As keras.Model.train_on_batch; gives the averages since `reset_metrics`.

        Raises:
            UserError: the loss is not finite. The step has spoilt the state by then, see `fit`.
        """
        logs = super().train_on_batch(*args, **kwargs)
        (loss,) = (float(mean.result()) for mean in self._means if mean.name == "loss")
        _check_loss(self, loss)
        return logs

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """One MoCo step.

        Args:
            data: (query, key) views, uint8[B, H, W, 3] each, B fixed and at most K.

        Returns:
            The epoch's averages so far of trainer_module.moco.Metrics, and the learning rate of this step.

        Raises:
            UserError: other data.
        """
        query, key = _views(data)
        _check_batch(query.shape[0], self._parts.settings, self.encoder)
        state = self._tensors()
        # Schedules count by the optimizer, which need not come from the same file as the state.
        self.optimizer.iterations.assign(tf.cast(state.step, self.optimizer.iterations.dtype))
        new, metrics = self._parts.moco.step(state, query, key, SingleReplica())
        tf.nest.map_structure(lambda variable, value: variable.assign(value), self.state, new)
        return {**self._averaged(metrics, query), "learning_rate": metrics.learning_rate}

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """The metrics of (query, key) views against the queue, in inference mode; changes no state.

        Args:
            data: (query, key) views, uint8[B, H, W, 3] each, any B.

        Returns:
            The averages so far of trainer_module.moco.Metrics, without the learning rate.

        Raises:
            UserError: other data.
        """
        query, key = _views(data)
        return self._averaged(self._parts.moco.evaluate(self._tensors(), query, key), query)

    @property
    def metrics(self) -> list[keras.Metric]:
        """Averages, which Keras starts anew at every epoch."""
        return self._means

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes, the encoders' architectures included."""
        settings = dataclasses.asdict(self._parts.settings)
        key_encoder = self._parts.moco.key_model
        return {
            **settings,
            "name": self.name,
            "mean": list(self.mean),
            "std": list(self.std),
            "key_bn": self._parts.settings.key_bn.name,
            "encoder": keras.saving.serialize_keras_object(self.encoder),
            "key_encoder": keras.saving.serialize_keras_object(key_encoder) if key_encoder is not None else None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "MoCoModel":
        """The model of get_config, with initial weights."""
        made = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
            for name in ("encoder", "key_encoder")
            if config[name] is not None
        }
        return cls(**{**config, **made})

    def get_compile_config(self) -> dict[str, Any] | None:
        """What compile takes; None where its learning rate is a function, which cannot be saved."""
        if not self.compiled:
            return None
        held = self.optimizer.get_config()["learning_rate"] if not isinstance(self._held_rate(), _OfStep) else None
        if held is None:
            return None
        moco = self._parts.moco
        return {"learning_rate": held, "sgd_momentum": moco.sgd_momentum, "weight_decay": moco.weight_decay}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as get_compile_config says."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def _held_rate(self) -> Any:
        return self.optimizer._learning_rate

    def _tensors(self) -> State:
        return tf.nest.map_structure(tf.convert_to_tensor, self.state)

    def _averaged(self, metrics: Metrics, query: tf.Tensor) -> dict[str, tf.Tensor]:
        # The last batch of an evaluation may be smaller.
        weight = tf.cast(tf.shape(query)[0], tf.float32)
        for average in self._means:
            average.update_state(getattr(metrics, average.name), sample_weight=weight)
        return {average.name: average.result() for average in self._means}

    def _variables(self, encoder: keras.Model, start: State) -> State:
        return State(
            step=self._weight("step", start.step),
            query=list(encoder.trainable_variables),
            query_stats=list(encoder.non_trainable_variables),
            key=self._weights("key", start.key),
            key_stats=self._weights("key_stats", start.key_stats),
            slots=self._weights("slots", start.slots),
            ring=self._weights("ring", start.ring),
            queue=self._weight("queue", start.queue),
            pointer=self._weight("pointer", start.pointer),
        )

    def _weights(self, name: str, values: list[tf.Tensor]) -> list[keras.Variable]:
        return [self._weight(f"{name}{i}", value) for i, value in enumerate(values)]

    def _weight(self, name: str, value: tf.Tensor) -> keras.Variable:
        made = self.add_weight(
            name=name, shape=tuple(value.shape), dtype=value.dtype.name, trainable=False, autocast=False
        )
        made.assign(value)
        return made


def _moco(encoder: keras.Model, key_encoder: keras.Model | None, settings: _Settings) -> MoCo:
    return MoCo(
        model=encoder,
        mean=settings.mean,
        std=settings.std,
        encode_keys=key_encoding(settings.key_bn, m=settings.momentum),
        learning_rate=lambda _: tf.zeros([]),  # until compiled
        m=settings.momentum,
        temperature=settings.temperature,
        sgd_momentum=0.0,
        weight_decay=0.0,
        seed=settings.seed,
        key_model=key_encoder,
    )


def _ring(settings: _Settings) -> int:
    return settings.ring if settings.key_bn is KeyBnMode.stored else 0


def _mode(key_bn: KeyBnMode | str) -> KeyBnMode:
    names = ", ".join(mode.name for mode in _ONE_DEVICE)
    if isinstance(key_bn, str) and not isinstance(key_bn, KeyBnMode):
        if key_bn not in KeyBnMode.__members__:
            raise UserError(f"key_bn={key_bn!r} is no mode; use one of {names}")
        key_bn = KeyBnMode[key_bn]
    if key_bn not in _ONE_DEVICE:
        raise UserError(f"key_bn={key_bn.name} needs several devices; on one use {names}")
    return key_bn


def _check_numbers(given: dict[str, Any]) -> None:
    for name, value in given.items():
        kind, admits, words = _RANGES[name]
        if not isinstance(value, kind) or not admits(value):
            raise UserError(f"{name}={value!r}: {words}")


def _check_pixels(encoder: keras.Model, mean: Any, std: Any) -> None:
    channels = encoder.input_shape[-1]
    for name, values in (("mean", mean), ("std", std)):
        if np.shape(values) != (channels,) or not np.all(np.isfinite(values)):
            raise UserError(f"{name}={values!r} must be {channels} finite numbers, one for each channel of the encoder")
    if min(std) <= 0:
        raise UserError(f"std={std!r} must be above 0")


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _check_encoder(name: str, encoder: keras.Model) -> None:
    if not encoder.built or not encoder.trainable_variables:
        raise UserError(f"{name} has no weights to train; build it, for example by starting it with keras.Input")
    for variable in encoder.non_trainable_variables:
        if "float" not in str(variable.dtype):
            raise UserError(
                f"{name}: {variable.path} is {variable.dtype}; a counter or a random state, as of Dropout, would make "
                "keys inconsistent: leave that layer out"
            )


def _check_key_encoder(encoder: keras.Model, key_encoder: keras.Model) -> None:
    _check_encoder("key_encoder", key_encoder)
    for kind in ("trainable_variables", "non_trainable_variables"):
        mine, theirs = ([tuple(v.shape) for v in getattr(model, kind)] for model in (encoder, key_encoder))
        if mine != theirs:
            raise UserError(f"key_encoder.{kind} have not the shapes of the encoder's; build both with the same layers")


def _check_layers(mode: KeyBnMode, encoder: keras.Model, key_encoder: keras.Model | None) -> None:
    if mode is KeyBnMode.split:
        for name, model in (("encoder", encoder), ("key_encoder", key_encoder or encoder)):
            _check_norms(mode, name, model, SplitBatchNormalization)
    elif mode is KeyBnMode.stored:
        if key_encoder is None:
            raise UserError(
                "key_bn=stored needs a key_encoder: the encoder built once more with ShuffledBatchNorm in place of its "
                "batch normalisations"
            )
        _check_norms(mode, "key_encoder", key_encoder, ShuffledBatchNorm)


def _check_norms(mode: KeyBnMode, name: str, model: keras.Model, wanted: type[keras.Layer]) -> None:
    known = (keras.layers.BatchNormalization, FusedBatchNormalization, SyncBatchNormalization)
    norms = [layer for layer in layers_of(model) if isinstance(layer, known)]
    if not norms:
        raise UserError(f"key_bn={mode.name}: {name} has no batch normalisation; use key_bn=none, which then is safe")
    for layer in norms:
        if not isinstance(layer, wanted):
            raise UserError(
                f"key_bn={mode.name}: {name}'s layer {layer.name} is {type(layer).__name__}, which would let keys "
                f"leak; use trainer_module.batch_norm.{wanted.__name__}"
            )
        if isinstance(layer, SplitBatchNormalization) and layer.groups < 2:
            raise UserError(
                f"key_bn={mode.name}: {name}'s layer {layer.name} has groups={layer.groups}, which is no shuffling and "
                "would let keys leak; give it 2 at least"
            )


def _check_compile(learning_rate: Any, kwargs: dict[str, Any]) -> None:
    unused = [name for name in kwargs if name not in _COMPILE]
    if unused:
        raise UserError(
            f"compile({unused[0]}=…): MoCoModel has its own loss and SGD; "
            "give learning_rate, sgd_momentum, weight_decay"
        )
    number = isinstance(learning_rate, numbers.Real) and not isinstance(learning_rate, bool)
    optimizer = isinstance(learning_rate, keras.optimizers.Optimizer)
    if optimizer or not (number or callable(learning_rate)):
        raise UserError(
            f"compile(learning_rate={learning_rate!r}): neither a number nor a function of the step; e.g. 0.03"
        )


def _check_loss(model: "MoCoModel", loss: float) -> None:
    if not math.isfinite(loss):
        step, rate = int(model.state.step.numpy()), float(model.optimizer.learning_rate)
        raise UserError(
            f"training diverged: after step {step} the loss is {loss}; look for NaN in the views, "
            f"lower compile(learning_rate={rate:g}), and go on from weights that were saved before"
        )


def _views(data: Any) -> tuple[tf.Tensor, tf.Tensor]:
    # Keras pads what train_on_batch is given with None.
    views = [view for view in (data if isinstance(data, tuple | list) else (data,)) if view is not None]
    shapes = [getattr(view, "shape", None) for view in views]
    if len(views) != 2 or any(shape is None or len(shape) != 4 for shape in shapes):
        found = ", ".join(str(shape) for shape in shapes)
        raise UserError(f"MoCoModel trains on batches of (query, key) views, [B, H, W, 3] each; these are {found}")
    return views[0], views[1]


def _check_batch(size: int | None, settings: _Settings, encoder: keras.Model) -> None:
    if size is None:
        raise UserError("the size of the batches is not fixed; make the dataset with .batch(n, drop_remainder=True)")
    if size > settings.queue:
        raise UserError(f"queue={settings.queue} is smaller than the batch of {size}; make MoCoModel(queue={size})")
    if settings.key_bn is KeyBnMode.split:
        groups = {layer.groups for layer in layers_of(encoder) if isinstance(layer, SplitBatchNormalization)}
        for count in groups:
            if size % count:
                nearest = max(size // count, 1) * count
                raise UserError(
                    f"batches of {size} cannot be split into groups={count}; "
                    f"e.g. .batch({nearest}, drop_remainder=True)"
                )
