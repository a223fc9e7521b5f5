"""The type of the artifact that a model's card is; named as Google's Model Card Toolkit names it."""

from tfx.types.artifact import Artifact


class ModelCard(Artifact):
    """A folder with the card of one model: model_card.json, model_card.md and model_card.html."""

    TYPE_NAME = "components.ModelCard"  # see components/__init__.py
