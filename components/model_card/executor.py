"""Executor of ModelCard: gathers the facts, embeds a sample of the images, writes the three files."""

import json
import posixpath
from collections.abc import Mapping
from typing import Any

from tfx import types
from tfx.dsl.components.base import base_executor
from tfx.types import artifact_utils
from tfx.utils import io_utils, path_utils

from components.model_card import facts, markdown, page, sample
from components.model_card.card import JSON_FILE, MARKDOWN_FILE, PAGE_FILE, Card, Evaluation, Pictures, Recall, to_json
from components.model_card.config import CardConfig
from trainer_module import config_json
from trainer_module.alarms import Interval
from trainer_module.export import FACTS_FILE
from trainer_module.metrics_file import FILE, read_intervals

_BANK, _QUERIES = 2000, 500  # images that are embedded, at the most


class Executor(base_executor.BaseExecutor):
    """See the component. One process: what is read and embedded does not grow with the data set."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """Writes the card. See the component for the arguments."""
        self._log_startup(input_dict, output_dict, exec_properties)
        inputs = {key: artifact_utils.get_single_instance(artifacts) for key, artifacts in input_dict.items()}
        uri = artifact_utils.get_single_instance(output_dict["model_card"]).uri
        statement = config_json.loads(CardConfig, exec_properties["statement"])
        config = json.loads(exec_properties["config"])
        intervals = read_intervals(posixpath.join(inputs["model_run"].uri, "train", FILE))
        evaluation = facts.read_evaluation(inputs["evaluation"], inputs["blessing"])
        material = _material(inputs, evaluation.recall, intervals, pictures=statement.pictures)
        card = self._card(inputs, exec_properties, statement, config, evaluation, page.shown(material))
        for name, text in (
            (JSON_FILE, to_json(card)),
            (MARKDOWN_FILE, markdown.to_markdown(card)),
            (PAGE_FILE, page.to_html(card, material)),
        ):
            io_utils.write_string_file(posixpath.join(uri, name), text)

    def _card(
        self,
        inputs: Mapping[str, types.Artifact],
        exec_properties: Mapping[str, Any],
        statement: CardConfig,
        config: Mapping[str, Any],
        evaluation: Evaluation,
        pictures: Pictures,
    ) -> Card:
        training = facts.read_training(inputs["model_run"], config)
        return Card(
            name=exec_properties["name"],
            statement=statement,
            encoder=facts.read_json(posixpath.join(_export(inputs), FACTS_FILE)),
            config={**config, "train.epochs": training.epochs},  # a run may have set it
            data=facts.read_data(inputs["examples"]),
            training=training,
            evaluation=evaluation,
            versions=facts.versions(exec_properties["project"]),
            code=json.loads(exec_properties["code"]),
            lineage=facts.lineage(self._context, inputs),
            pictures=pictures,
        )


def _export(inputs: Mapping[str, types.Artifact]) -> str:
    return path_utils.serving_model_dir(inputs["model"].uri)


def _material(
    inputs: Mapping[str, types.Artifact],
    recall: tuple[Recall, ...],
    intervals: tuple[Interval, ...],
    *,
    pictures: bool,
) -> page.Material:
    encoder = sample.Encoder(_export(inputs))
    bank, queries = (
        sample.read(
            sample.choose(artifact_utils.get_split_uri([inputs["examples"]], split), limit),
            encoder,
            page.THUMBNAIL if pictures else None,
        )
        for split, limit in (("train", _BANK), ("eval", _QUERIES))
    )
    return page.Material(bank, queries, recall, intervals)
