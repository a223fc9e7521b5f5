"""Pusher, the component: TFX's, which also takes the model's card."""

from collections.abc import Mapping
from typing import Any, ClassVar

from tfx import types
from tfx.dsl.components.base import base_component, executor_spec
from tfx.proto import pusher_pb2
from tfx.types import standard_artifacts
from tfx.types.component_spec import ChannelParameter
from tfx.types.standard_component_specs import PusherSpec as StockSpec
from tfx.utils import json_utils

from components.model_card.artifact import ModelCard
from components.pusher.executor import MODEL_CARD, Executor


class PusherSpec(StockSpec):
    """The stock Pusher's, and a card."""

    INPUTS: ClassVar = {**StockSpec.INPUTS, MODEL_CARD: ChannelParameter(type=ModelCard, optional=True)}


class Pusher(base_component.BaseComponent):
    """Publishes a blessed model with its card, whole or not at all; see the executor.

    Output `pushed_model`: the stock Pusher's.
    """

    SPEC_CLASS = PusherSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(Executor)

    def __init__(
        self,
        *,
        push_destination: pusher_pb2.PushDestination,
        model: types.BaseChannel | None = None,
        model_blessing: types.BaseChannel | None = None,
        infra_blessing: types.BaseChannel | None = None,
        model_card: types.BaseChannel | None = None,
        custom_config: Mapping[str, Any] | None = None,
    ):
        """Makes the node.

        Args:
            push_destination: a file system's folder, or gs://BUCKET/PATH.
            model: of the Trainer; without it, infra_blessing must hold one.
            model_blessing, infra_blessing: those that are given must bless the model.
            model_card: of ModelCard; its files go into assets.extra.
            custom_config: see the executor.
        """
        super().__init__(
            PusherSpec(
                model=model,
                model_blessing=model_blessing,
                infra_blessing=infra_blessing,
                model_card=model_card,
                push_destination=push_destination,
                custom_config=json_utils.dumps(dict(custom_config or {})),
                pushed_model=types.Channel(type=standard_artifacts.PushedModel),
            )
        )
