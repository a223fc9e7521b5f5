"""Which model a candidate is compared with."""

from ml_metadata import MetadataStore
from tfx import types
from tfx.dsl.components.common import resolver
from tfx.dsl.input_resolution.strategies.latest_blessed_model_strategy import LatestBlessedModelStrategy
from tfx.dsl.io import fileio
from tfx.utils import path_utils

from components.evaluator.config import MissingBaseline

CANDIDATE = "candidate"
NONE = "none"  # custom property of an artifact that stands for no model, where a service wants one


class LatestOtherBlessedModelStrategy(resolver.ResolverStrategy):
    """Resolves the latest blessed model that is not the candidate itself.

    With `missing` = skip it is the latest whose evaluation export is there. Else one whose files are gone is resolved
    all the same, and the Evaluator refuses to go on, so that nothing is blessed without the comparison unknown to
    anyone.

    With TFX's LatestBlessedModelStrategy a repeated run would find its own model as the baseline: the inputs of the
    Evaluator would differ from those of the first run, so the cache would miss and the same model be pushed twice.
    """

    def __init__(self, missing: str = MissingBaseline.refuse.value) -> None:
        """Args:
        missing: value of a MissingBaseline.
        """
        self._missing = MissingBaseline(missing)

    def resolve_artifacts(
        self, store: MetadataStore, input_dict: dict[str, list[types.Artifact]]
    ) -> dict[str, list[types.Artifact]]:
        """Resolves by TFX's strategy, after taking the candidate away.

        Args:
            store: of the metadata.
            input_dict: `candidate`, `model` and `model_blessing`, all there are.

        Returns:
            The same keys, since TFX looks for each of them: the candidate, and one model with its blessing or, when
            nothing else was blessed, none.
        """
        candidates = {artifact.id for artifact in input_dict[CANDIDATE]}
        others = {key: artifacts for key, artifacts in input_dict.items() if key != CANDIDATE}
        others["model"] = [model for model in others["model"] if model.id not in candidates and self._is_there(model)]
        resolved = LatestBlessedModelStrategy().resolve_artifacts(store, others) or {}
        return {CANDIDATE: input_dict[CANDIDATE], **resolved}

    def _is_there(self, model: types.Artifact) -> bool:
        export = f"{path_utils.eval_model_dir(model.uri)}/saved_model.pb"
        return self._missing is MissingBaseline.refuse or fileio.exists(export)
