"""From a configuration to the networks and the step: what the Trainer, the benchmarks and the TPU report all run."""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from trainer_module.batch_norm import batch_norms
from trainer_module.config import EncoderConfig, KeyBnMode, TrainConfig
from trainer_module.encoder import Encoder, build_encoder
from trainer_module.errors import UserError
from trainer_module.moco import MoCo, State, initial_state
from trainer_module.shuffle import key_encoding, ring_size


class Built(NamedTuple):
    """The networks with their initial weights, and the step."""

    encoder: Encoder
    moco: MoCo


def build(
    encoder: EncoderConfig,
    train: TrainConfig,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    learning_rate: Callable[[tf.Tensor], tf.Tensor],
    seed: int,
    *,
    hosts: int = 1,
) -> Built:
    """Builds the networks and the step.

    Args:
        encoder, train: the configuration.
        size: side of a view in pixels.
        mean, std: per channel, in the units of the pixels (0 to 255).
        learning_rate: step -> float32[].
        seed: of weights and permutations.
        hosts: that feed the replicas.

    Raises:
        UserError: encoder.name cannot be an encoder, or has no batch normalisation whose statistics could be stored.
    """
    layers = batch_norms(train.key_bn)
    query = build_encoder(encoder, size, train.precision, seed, layers.query)
    if train.key_bn.mode is KeyBnMode.stored and not query.model.non_trainable_variables:
        raise UserError(
            f"train.key_bn.mode=stored keeps statistics of batch normalisation, and encoder.name={encoder.name} has "
            "none; e.g. train.key_bn.mode=none, which cannot leak here"
        )
    same = layers.key is layers.query
    key_model = None if same else build_encoder(encoder, size, train.precision, seed, layers.key).model
    moco = MoCo(
        model=query.model,
        mean=mean,
        std=std,
        encode_keys=key_encoding(train.key_bn.mode, m=train.momentum, hosts=hosts),
        learning_rate=learning_rate,
        m=train.momentum,
        temperature=train.temperature,
        sgd_momentum=train.sgd_momentum,
        weight_decay=train.weight_decay,
        seed=seed,
        key_model=key_model,
    )
    return Built(query, moco)


def first_state(moco: MoCo, train: TrainConfig) -> State:
    """The state before the first step."""
    return initial_state(
        moco.model,
        train.queue,
        moco.seed,
        ring=ring_size(train.key_bn),
        queue_dtype=train.queue_precision.value,
    )
