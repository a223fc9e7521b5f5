"""ModelCard, the component."""

import json
from collections.abc import Mapping
from typing import Any

from tfx import types
from tfx.dsl.components.base import base_component, executor_spec

from components.model_card.artifact import ModelCard as ModelCardArtifact
from components.model_card.config import CardConfig
from components.model_card.executor import Executor
from components.model_card.spec import ModelCardSpec
from trainer_module import config_json


class ModelCard(base_component.BaseComponent):
    """Writes what there is to know of a model, blessed or not, for programs and for people.

    Output `model_card`: an artifact `components.model_card.artifact.ModelCard`, with
        model_card.json   the card, see components.model_card.card for its keys
        model_card.md     the same to be read, with the metadata of a Hugging Face card on top
        model_card.html   pictures: nearest neighbours, a map of the embeddings, recall of each class, training curves
    The same inputs give the same bytes.
    """

    SPEC_CLASS = ModelCardSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(Executor)

    def __init__(
        self,
        *,
        model: types.BaseChannel,
        model_run: types.BaseChannel,
        examples: types.BaseChannel,
        evaluation: types.BaseChannel,
        blessing: types.BaseChannel,
        name: str,
        statement: CardConfig,
        config: Mapping[str, Any],
        code: Mapping[str, str],
        project: str,
    ):
        """Makes the node.

        Args:
            model: of the Trainer, with the serving export.
            model_run: of the Trainer, with training.json and the curves.
            examples: of ImageExampleGen.
            evaluation: of the Evaluator.
            blessing: of the Evaluator.
            name: of the experiment.
            statement: licence, owner, intended use and other words of the publisher.
            config: the whole configuration, {"train.queue": 65536, …}.
            code: fingerprints of the sources by stage; those of the card itself take part in the cache key.
            project: version of the project.
        """
        super().__init__(
            ModelCardSpec(
                model=model,
                model_run=model_run,
                examples=examples,
                evaluation=evaluation,
                blessing=blessing,
                name=name,
                statement=config_json.dumps(statement),
                config=json.dumps(dict(config), sort_keys=True),
                code=json.dumps(dict(code), sort_keys=True),
                project=project,
                model_card=types.Channel(type=ModelCardArtifact),
            )
        )
