"""The TFX components that are ours.

Kubeflow's pipeline spec names the class of an artifact by `<package>.<Class>`, with no dots in the package (TFX's
`compiler_utils._SCHEMA_TITLE_RE`), and the containers import it by that name. So artifacts of ours are found here.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Imports TFX only where an artifact is asked for."""
    if name != "ModelCard":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from components.model_card.artifact import ModelCard

    return ModelCard
