"""Any Keras 3 model as an encoder: built by its dotted name and fitted to MoCo.

A model of keras.applications draws its weights from Python's random state, drops activations at random, scales pixels
itself and names its layers by how many there were before. MoCo needs weights that follow from the seed, a step that is
pure, normalised input, and names that are the same in every process. So the model's layers are made anew from their own
configurations, with those four things changed.
"""

import difflib
import inspect
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import keras

from trainer_module.errors import UserError

# In a layer's configuration, what marks it as noise. A mask that differs between f_q and f_k would make their keys
# inconsistent (no published MoCo has one), and its random state could not be averaged over the replicas.
_NOISE = ("rate", "drop_path_rate", "stddev")


def keras_features(
    name: str, size: int, dtype: str, seeds: Iterator[int], batch_norm: Callable[..., keras.Layer]
) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Builds a model without its last layer, its pretrained weights and its preprocessing.

    Args:
        name: dotted name of a function that returns a functional keras.Model, such as keras.applications.ResNet50V2.
            It takes input_shape; include_top, weights and include_preprocessing are given where it has them.
        size: side of the input image in pixels.
        dtype: Keras's policy for the layers.
        seeds: one for each initialiser.
        batch_norm: makes a batch normalisation layer in place of each of the model's, given `name`, `dtype`, and the
            model's own `momentum` and `epsilon`.

    Returns:
        The input, float32[N, size, size, 3], and the features, [N, h, w, C] or [N, C].

    Raises:
        UserError: there is no such function, or its model cannot be an encoder of such images.
    """
    model = _construct(name, size)
    if model.output.shape[-1] is None or len(model.output.shape) not in (2, 4):
        raise UserError(f"encoder.name={name}: its output is {_shape(model.output)}, not [N, h, w, C] or [N, C]")
    fitting = _Fitting(name, dtype, seeds, batch_norm, _stable_names(model))
    fitted = keras.models.clone_model(model, clone_function=fitting.layer, call_function=_call)
    for variable in fitted.non_trainable_variables:
        if "float" not in str(variable.dtype):
            raise UserError(
                f"encoder.name={name}: {variable.path} is {variable.dtype}; the replicas average their statistics, so "
                "an encoder cannot keep a counter or a random state"
            )
    return fitted.input, fitted.output


def _construct(name: str, size: int) -> keras.Model:
    function = _find(name)
    accepted = inspect.signature(function).parameters if callable(function) else {}
    if "input_shape" not in accepted:
        raise UserError(
            f"encoder.name={name} is no function that takes input_shape and returns a keras.Model; {_hint(name)}"
        )
    wanted = {
        "input_shape": (size, size, 3),
        "include_top": False,
        "weights": None,
        "include_preprocessing": False,
    }
    try:
        model = function(**{key: value for key, value in wanted.items() if key in accepted})
    except (ValueError, TypeError) as error:
        raise UserError(f"encoder.name={name} cannot take augment.size={size}: {_first_line(error)}") from error
    if not isinstance(model, keras.models.Model) or not hasattr(model, "input") or len(model.inputs) != 1:
        raise UserError(f"encoder.name={name} returns no functional keras.Model of one input; {_hint(name)}")
    return model


def _find(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"encoder.name={name} cannot be imported ({_first_line(error)}); {_hint(name)}") from error


def _hint(name: str) -> str:
    known = [word for word in dir(keras.applications) if word[0].isupper()]
    likeness = difflib.SequenceMatcher(b=name.rpartition(".")[2].lower())

    def nearness(word: str) -> float:
        likeness.set_seq1(word.lower())
        return likeness.ratio()

    return f"did you mean keras.applications.{max(known, key=nearness)}?"


def _stable_names(model: keras.Model) -> dict[int, str]:
    """Numbers the layers that Keras named by their class, from 1 in each model; the others keep their names."""
    counts: Counter[str] = Counter()
    names = {}
    for operation in model.operations:
        kind = _snake_case(type(operation).__name__)
        names[id(operation)] = operation.name
        if re.fullmatch(rf"{kind}(_\d+)?", operation.name):
            counts[kind] += 1
            names[id(operation)] = f"{kind}_{counts[kind]}"
    return names


def _snake_case(name: str) -> str:
    """As Keras names a layer after its class: Conv2D -> conv2d, ReLU -> re_lu."""
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))).lower()


class _Fitting:
    """Makes each layer of one model anew."""

    def __init__(
        self,
        model: str,
        dtype: str,
        seeds: Iterator[int],
        batch_norm: Callable[..., keras.Layer],
        names: dict[int, str],
    ) -> None:
        self._model, self._dtype, self._seeds, self._batch_norm, self._names = model, dtype, seeds, batch_norm, names

    def layer(self, old: Any) -> Any:
        """A layer, or an operation that holds nothing, of the same kind."""
        config = old.get_config()
        if not isinstance(old, keras.Layer):
            return type(old).from_config(config)
        # The encoder's input is normalised already.
        scaling = isinstance(old, keras.layers.Rescaling | keras.layers.Normalization)
        name = self._names.get(id(old), old.name)
        if scaling or any(key in config for key in _NOISE):
            return keras.layers.Identity(name=name, dtype=self._dtype)
        if isinstance(old, keras.layers.BatchNormalization):
            return self._norm(old, name)
        return type(old).from_config(self._seeded(config) | {"name": name, "dtype": self._dtype})

    def _norm(self, old: keras.layers.BatchNormalization, name: str) -> keras.Layer:
        if len(old.input.shape) != 4 or old.axis not in (-1, 3):
            raise UserError(
                f"encoder.name={self._model}: {old.name} normalises axis {old.axis} of {_shape(old.input)}; batch "
                "normalisation must be over the channels of [N, h, w, C]"
            )
        return self._batch_norm(name=name, dtype=self._dtype, momentum=old.momentum, epsilon=old.epsilon)

    def _seeded(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: next(self._seeds) if key == "seed" else self._seeded(v) for key, v in value.items()}
        return [self._seeded(item) for item in value] if isinstance(value, list) else value


def _call(layer: Any, *args: Any, **kwargs: Any) -> Any:
    # Keras records `mask=None` for the layers that took one; those in their place do not.
    return layer(*args, **{key: value for key, value in kwargs.items() if value is not None})


def _shape(tensor: keras.KerasTensor) -> str:
    return f"[{', '.join('N' if at == 0 else str(side) for at, side in enumerate(tensor.shape))}]"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
