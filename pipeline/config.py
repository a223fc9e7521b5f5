"""One experiment's configuration: the rooms' dataclasses put together, read from presets, YAML files and `--set`.

OmegaConf converts and checks types against the dataclasses; the tables below hold what a type cannot say (ranges,
choices, combinations). Every refusal is a `UserError` of one line that names the key, its value and the nearest
valid one.
"""

import copy
import dataclasses
import difflib
import enum
import functools
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._yaml import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from components.evaluator.config import EvaluateConfig
from components.image_example_gen.config import COLUMNS, LIMITS, IngestConfig
from components.model_card.config import CardConfig
from components.pusher.config import PublishConfig
from components.serving_check.config import ServingCheckConfig
from pipeline.cloud import machines
from pipeline.cloud.config import CloudConfig
from pipeline.engines.config import BeamConfig, Engine
from trainer_module.config import (
    AugmentConfig,
    EncoderConfig,
    ImageConfig,
    KeyBnMode,
    RecipeOrder,
    Schedule,
    StrategyKind,
    TrainConfig,
    Where,
    dealing,
    nearest_share,
)
from trainer_module.errors import UserError

PRESETS = Path(__file__).resolve().parent.parent / "configs"


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run, besides the images.

    Attributes:
        name: names the experiment in reports and in the model's card; letters, digits, dot, dash, underscore.
        seed: from which every random draw is derived.
        ingest, image, augment, encoder, train, evaluate, serving_check, card, publish, beam, cloud: see their classes.
    """

    name: str = "moco"
    seed: int = 0
    ingest: IngestConfig = IngestConfig()
    image: ImageConfig = ImageConfig()
    augment: AugmentConfig = AugmentConfig()
    encoder: EncoderConfig = EncoderConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    serving_check: ServingCheckConfig = ServingCheckConfig()
    card: CardConfig = CardConfig()
    publish: PublishConfig = PublishConfig()
    beam: BeamConfig = BeamConfig()
    cloud: CloudConfig = CloudConfig()


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a key admits; for a list, each of its items."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    def admits(self, value: float) -> bool:
        """Whether the number lies within; NaN lies within no range."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def describe(self) -> str:
        """Returns for instance "above 0 and at most 1"."""
        low = f"above {self.low:g}" if self.low_open else f"at least {_plain(self.low)}"
        high = f"below {self.high:g}" if self.high_open else f"at most {_plain(self.high)}"
        return f"{low} and {high}"

    def nearest(self, value: float, default: float) -> float:
        """Returns the admitted number nearest to `value`, or `default` where an open end has no nearest one."""
        if self.admits(value):
            return value
        if value < self.low and not self.low_open:
            return self.low
        if value > self.high and not self.high_open:
            return self.high
        return default


def _positive(high: float) -> Range:
    return Range(0, high, low_open=True)


_PROBABILITY = Range(0, 1)
_PIXELS = Range(8, 8192)
_MOMENTUM = Range(0, 1, high_open=True)

# Each numeric key has a row; a test says so. The upper ends only refuse what must be a slip of the hand.
RANGES: Mapping[str, Range] = {
    "seed": Range(0, 2**31 - 1),
    **{f"ingest.{name}": Range(low, high) for name, (low, high) in LIMITS.items()},
    "image.storage_size": _PIXELS,
    "image.max_aspect": Range(1, 1000),
    "image.eval_resize": Range(0, 8192),
    "augment.size": _PIXELS,
    "augment.crop_scale_min": _positive(1),
    "augment.crop_scale_max": _positive(1),
    "augment.crop_ratio_min": _positive(100),
    "augment.crop_ratio_max": _positive(100),
    "augment.brightness": _PROBABILITY,
    "augment.contrast": _PROBABILITY,
    "augment.saturation": _PROBABILITY,
    "augment.hue": Range(0, 0.5),
    "augment.jitter_probability": _PROBABILITY,
    "augment.gray_probability": _PROBABILITY,
    "augment.blur_probability": _PROBABILITY,
    "augment.blur_sigma_min": _positive(100),
    "augment.blur_sigma_max": _positive(100),
    "augment.flip_probability": _PROBABILITY,
    "augment.pairs_per_image": Range(0, 10**5),
    "encoder.width": Range(1, 1024),
    "encoder.dim": Range(2, 8192),
    "train.replicas": Range(1, 4096),
    "train.global_batch": Range(1, 2**20),
    "train.epochs": Range(1, 10**6),
    "train.queue": Range(1, 2**26),
    "train.momentum": _MOMENTUM,
    "train.temperature": _positive(100),
    "train.learning_rate": _positive(1000),
    "train.milestones": Range(1, 10**6),
    "train.sgd_momentum": _MOMENTUM,
    "train.weight_decay": Range(0, 1),
    "train.key_bn.groups": Range(2, 65_536),
    "train.key_bn.ring": Range(1, 65_536),
    "train.steps_per_loop": Range(0, 10**6),
    "train.checkpoint_seconds": Range(0, 10**7),
    "train.keep_checkpoints": Range(1, 10**4),
    "train.log_steps": Range(1, 10**6),
    "train.watch.knn_epochs": Range(0, 10**6),
    "train.watch.knn_k": Range(1, 10**6),
    "train.watch.knn_temperature": _positive(100),
    "train.watch.sample.bank": Range(1, 10**6),
    "train.watch.sample.queries": Range(1, 10**6),
    "train.watch.min_embedding_std": Range(0, 1),
    "train.watch.min_effective_rank": Range(0, 8192),
    "train.watch.leak_pretext": _PROBABILITY,
    "train.watch.leak_knn_drop": _PROBABILITY,
    "train.watch.max_input_share": _PROBABILITY,
    "train.watch.patience": Range(1, 10**6),
    "evaluate.knn_k": Range(1, 10**6),
    "evaluate.knn_temperature": _positive(100),
    "evaluate.min_embedding_std": Range(0, 1),
    "evaluate.min_effective_rank": Range(0, 8192),
    "evaluate.min_gain": Range(-1, 1),
    "evaluate.gain_significance": _positive(1),
    "evaluate.tolerance": Range(0, 1),
    "evaluate.significance": _positive(1),
    "evaluate.linear_probe_images": Range(1, 10**8),
    "evaluate.max_bank": Range(1, 10**8),
    "evaluate.max_queries": Range(1, 10**8),
    "evaluate.max_geometry": Range(2, 10**8),
    "serving_check.timeout_s": _positive(86_400),
    "serving_check.tolerance": _positive(1),
    "serving_check.max_latency_ms": Range(0, 10**7),
    "publish.keep": Range(0, 10**6),
    "beam.workers": Range(0, 1024),
    "cloud.dataflow.max_workers": Range(1, 4000),
    "cloud.dataflow.disk_gb": Range(10, 65_536),
    "cloud.worker.cpus": Range(0.5, 416),
    "cloud.worker.memory_gb": Range(1, 12_288),
    "cloud.trainer.count": Range(0, 8),
    "cloud.trainer.timeout_hours": _positive(8760),
}

CHOICES: Mapping[str, tuple[str, ...]] = {"encoder.name": ("resnet18", "resnet34", "resnet50", "resnet101")}

# What a key takes besides its choices: a pattern, and an example of it. The Trainer alone can import such a name.
_OR_ELSE: Mapping[str, tuple[re.Pattern[str], str]] = {
    "encoder.name": (re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII), "keras.applications.EfficientNetV2B0")
}

# Sections that take one text for one of their keys: `encoder: resnet18`.
_SHORTHANDS: Mapping[str, str] = {"encoder": "encoder.name"}

_RESNET_ONLY = ("encoder.stem", "encoder.width")

# What other programs call our keys, for "did you mean".
_ALSO_CALLED: Mapping[str, str] = {
    "batch": "train.global_batch",
    "batch_size": "train.global_batch",
    "batch-size": "train.global_batch",
    "k": "train.queue",
    "m": "train.momentum",
    "t": "train.temperature",
    "lr": "train.learning_rate",
    "wd": "train.weight_decay",
    "arch": "encoder.name",
    "model": "encoder.name",
    "backbone": "encoder.name",
    "pretrained": "encoder.weights",
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def load(preset_or_file: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration and refuses what cannot work.

    Args:
        preset_or_file: name of a preset in configs/, or path of a YAML file. Such a file holds only the keys that
            differ from the defaults, or from the preset that it names with `preset: NAME`.
        overrides: `key=value` settings, which win over the file; values are YAML.

    Returns:
        The validated configuration.

    Raises:
        UserError: whatever is wrong, in one line.
    """
    try:
        settings = [*_from_file_or_preset(preset_or_file), *_from_overrides(overrides)]
    except RecursionError as error:
        raise UserError("the configuration is nested too deep; settings lie at most three sections deep") from error
    config = _build(_without_former_resnet(settings))
    validate(config)
    return config


def validate(config: Config) -> None:
    """Refuses values out of range and combinations that cannot work.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    for key, value in _leaves(config):
        _check_value(key, value)
    for fault in _impossible(config):
        raise UserError(fault)


def resolved(config: Config) -> Config:
    """With the paths that a run is told as they are from any folder; relative ones are meant from the present one."""
    to = config.publish.to
    if not to or "://" in to:
        return config
    publish = dataclasses.replace(config.publish, to=os.path.abspath(os.path.expanduser(to)))
    return dataclasses.replace(config, publish=publish)


def to_yaml(config: Config) -> str:
    """Returns the whole configuration as YAML that `load` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: Config) -> dict[str, Any]:
    """Returns {"train.queue": 65536, …} with JSON's types only: enums by name, tuples as lists."""
    return {key: _json(value) for key, value in _leaves(config)}


def preset_names() -> list[str]:
    """Returns the names of the presets in configs/."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


# Reading: every source becomes a list of settings, one for each leaf, so that a refusal can name key and place.


@dataclasses.dataclass(frozen=True)
class _Setting:
    key: str
    value: Any
    place: str  # prefix of messages: "mine.yaml: ", or nothing for --set
    typed: str = "null"  # in place of a value that is none

    def show(self) -> str:
        """The value as it was typed."""
        return self.typed if self.value is None else _show(self.value)


class _Loader(get_yaml_loader()):  # type: ignore[misc]
    """OmegaConf's, but a number is a plain decimal one, and what else YAML 1.1 takes for one stays as it was typed.

    It would read 1:30 as 90, 010 as 8, and 1e309 as an infinity.
    """


_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_MOST_DIGITS = 300  # Python refuses to convert thousands


def _construct_number(_: _Loader, node: yaml.ScalarNode) -> int | float | str:
    text = node.value
    if not _is_plain(text):
        return text
    return int(text) if _INTEGER.fullmatch(text) else float(text)


def _is_plain(text: str) -> bool:
    """Whether a text is a decimal number as everybody writes them."""
    if len(text) > _MOST_DIGITS or not (_INTEGER.fullmatch(text) or _FLOAT.fullmatch(text)):
        return False
    return math.isfinite(float(text))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_number)


def _from_file_or_preset(name: str) -> list[_Setting]:
    if name in preset_names():
        return _from_preset(name)
    path = Path(name)
    if not name or not path.is_file():
        raise UserError(_no_such_config(name))
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-._")[:63] or "moco"
    return _from_yaml(path, stem)


def _from_preset(name: str, place: str = "") -> list[_Setting]:
    if name not in preset_names():
        raise UserError(
            f"{place}preset={name} is not a preset; did you mean {_or(_by_nearness(name, preset_names()))}?"
        )
    return _from_yaml(PRESETS / f"{name}.yaml", name)


def _from_yaml(path: Path, name: str) -> list[_Setting]:
    content = _read(path)
    base = content.pop("preset", None)
    settings = [] if base is None else _from_preset(str(base), f"{path}: ")
    return [*settings, _Setting("name", name, ""), *_settings(content, f"{path}: ")]


def _no_such_config(name: str) -> str:
    path = Path(name)
    if path.exists() and not path.is_dir():
        return f"--config {name} is neither a file that lies on a disk nor a preset; write it to one"
    if name and path.is_dir():
        return f"--config {name} is a folder; name a YAML file in it, or a preset ({', '.join(preset_names())})"
    files = [str(path.parent / file.name) for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(name, [*preset_names(), *files], n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    presets = ", ".join(_by_nearness(name, preset_names()))
    return f"--config {name or repr(name)} is neither a file nor a preset; {hint}presets: {presets}"


def _read(path: Path) -> dict[Any, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
        if not isinstance(content, dict | list | str | types.NoneType):
            raise UserError(f"{path}: holds no keys; expected lines such as 'train:' and '  epochs: 100'")
        loaded = OmegaConf.create({} if content is None else content)
    except yaml.YAMLError as error:
        raise UserError(_yaml_fault(str(path), error)) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8; --config wants YAML") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except OmegaConfBaseException as error:
        # OmegaConf says so of keys such as null, which no section can have.
        raise UserError(f"{path}: {_first_line(error)}; a key must be the name of a setting") from error
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{path}: holds a list; expected keys such as 'train:' with '  epochs: 100' below")
    return typing.cast(dict[Any, Any], OmegaConf.to_container(loaded, resolve=False))


def _yaml_fault(place: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{place}{where}: not YAML: {_problem(error)}"


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or _first_line(error))


def _set(override: str) -> str:
    """Returns an override as it was typed, on one line whatever is in it."""
    return f"--set {override}" if override.isprintable() and override else f"--set {override!r}"


def _from_overrides(overrides: Sequence[str]) -> list[_Setting]:
    settings: list[_Setting] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not key or not equals:
            example = f"{_nearest_key(key)}=…" if key else "train.epochs=100"
            raise UserError(f"{_set(override)} is not key=value; e.g. --set {example}")
        if key == "preset":
            near = _by_nearness(text, preset_names())[0]
            raise UserError(f"{_set(override)}: a preset is chosen with --config; e.g. --config {near}")
        try:
            tree = OmegaConf.create()
            OmegaConf.update(tree, key, yaml.load(text, _Loader))
            content = OmegaConf.to_container(tree, resolve=False)
        except yaml.YAMLError as error:
            raise UserError(f"{_set(override)}: not YAML: {_problem(error)}") from error
        except OmegaConfBaseException as error:
            raise UserError(f"{_set(override)}: {_first_line(error)}") from error
        made = _settings(typing.cast(dict[Any, Any], content), "")
        settings += [dataclasses.replace(one, typed=text.strip()) for one in made] if len(made) == 1 else made
    seen: dict[str, _Setting] = {}
    for setting in settings:
        if setting.key in seen:
            raise UserError(
                f"--set {setting.key} is given twice ({seen[setting.key].show()} and {setting.show()}); keep one"
            )
        seen[setting.key] = setting
    return settings


def _settings(content: Mapping[Any, Any], place: str, prefix: str = "") -> list[_Setting]:
    settings: list[_Setting] = []
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, str):
            key = _SHORTHANDS.get(key, key)
        if isinstance(value, dict) and key not in _schema() and (value or key in _sections()):
            settings += _settings(value, place, f"{key}.")
        else:
            settings.append(_Setting(key, value, place))
    return settings


def _without_former_resnet(settings: list[_Setting]) -> list[_Setting]:
    """Where a Keras model takes the place of an earlier source's ResNet, that source's stem and width go with it."""
    named = [at for at, setting in enumerate(settings) if setting.key == "encoder.name"]
    if not named or not _is_dotted(settings[named[-1]].value):
        return settings
    last, place = named[-1], settings[named[-1]].place
    return [
        setting
        for at, setting in enumerate(settings)
        if setting.key not in _RESNET_ONLY or at > last or setting.place == place
    ]


def _is_dotted(encoder: Any) -> bool:
    return isinstance(encoder, str) and _OR_ELSE["encoder.name"][0].fullmatch(encoder) is not None


# Building: OmegaConf converts each setting to the type that the dataclasses state.


@dataclasses.dataclass(frozen=True)
class _Leaf:
    hint: Any
    default: Any


@functools.cache
def _schema() -> Mapping[str, _Leaf]:
    hints = dict(_hints(Config))
    leaves = {key: _Leaf(hints[key], default) for key, default in _leaves(Config())}
    return types.MappingProxyType(leaves)


def _hints(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _hints(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


@functools.cache
def _sections() -> frozenset[str]:
    parts = (key.split(".") for key in _schema())
    return frozenset(".".join(part[:depth]) for part in parts for depth in range(1, len(part)))


@functools.cache
def _defaults() -> DictConfig:
    """To be copied, which is five times as fast as making it anew."""
    tree = OmegaConf.structured(Config)
    for section in (tree, *(OmegaConf.select(tree, key) for key in _sections())):
        OmegaConf.set_readonly(section, False)  # OmegaConf locks what comes from frozen dataclasses
    return typing.cast(DictConfig, tree)


def _build(settings: Sequence[_Setting]) -> Config:
    tree = copy.deepcopy(_defaults())
    for setting in settings:
        _put(tree, setting)
    try:
        return typing.cast(Config, OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        raise UserError(f"{key}: {_first_line(error)}; name a setting in ${{…}}, or write the value") from error


def _put(tree: Any, setting: _Setting) -> None:
    leaf = _schema().get(setting.key)
    if leaf is None and setting.key not in _sections():
        raise UserError(f"{setting.place}{setting.key} is not a setting; did you mean {_nearest_key(setting.key)}?")
    if leaf is None:
        example = next(key for key in _schema() if key.startswith(f"{setting.key}."))
        raise UserError(
            f"{setting.place}{setting.key}={setting.show()}: {setting.key} is a section; "
            f"set one of its keys, e.g. {example}={_show(_schema()[example].default)}"
        )
    value = setting.value
    if leaf.hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e3 is a number of epochs, too
    if isinstance(value, dict) and value:
        below = ", ".join(f"{setting.key}.{name}" for name in value)
        raise UserError(
            f"{setting.place}{below}: {setting.key} is no section but one value; "
            f"e.g. {setting.key}={_show(leaf.default)}"
        )
    # Resolvers such as ${oc.env:X} would make a configuration mean something else in another environment.
    if isinstance(value, str) and re.search(r"\$\{[^}]*:", value):
        raise UserError(
            f"{setting.place}{setting.key}={_show(value)}: only ${{other.key}} is followed; write the value"
        )
    # OmegaConf takes "???" for a value to come, and keeps the old one without a word.
    if value == "???" or value == {} or _is_no_number(value, leaf.hint):
        raise UserError(_wrong_type(setting, leaf))
    try:
        OmegaConf.update(tree, setting.key, value, merge=False)
    except OmegaConfBaseException as error:
        raise UserError(_wrong_type(setting, leaf)) from error


def _is_no_number(value: Any, hint: Any) -> bool:
    """Whether a text, or one in a list, stands where a number is wanted and is none that everybody reads alike."""
    kind, _ = _unwrap(hint)
    if isinstance(value, list):
        return any(_is_no_number(item, kind) for kind in typing.get_args(kind)[:1] for item in value)
    return kind in (int, float) and isinstance(value, str) and "${" not in value and not _is_plain(value)


def _wrong_type(setting: _Setting, leaf: _Leaf) -> str:
    key, value = setting.key, setting.value
    kind, _ = _unwrap(leaf.hint)
    said = f"{setting.place}{key}={setting.show()}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        names = _by_nearness(str(value), [member.name for member in kind])
        return f"{said} is not one of {', '.join(names)}; e.g. {key}={names[0]}"
    mend = f"e.g. {key}={_show(_convertible(value, leaf))}"
    if kind in (int, float) and isinstance(value, str) and (_INTEGER.fullmatch(value) or _FLOAT.fullmatch(value)):
        return f"{said} is too large a number; {mend}"
    return f"{said} is not {_describe(leaf.hint)}; {mend}"


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """Returns the type without its `| None`, and whether it had one."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return kinds[0], True
    return hint, False


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_ITEMS = {int: "integers", float: "numbers", str: "texts"}


def _describe(hint: Any) -> str:
    kind, optional = _unwrap(hint)
    items = typing.get_args(kind)
    text = f"a list of {_ITEMS.get(items[0], 'values')}" if items else _KINDS.get(kind, str(kind))
    return f"{text} or null" if optional else text


def _convertible(value: Any, leaf: _Leaf) -> Any:
    """Returns the value nearest to what was written that has the right type; else the default."""
    kind, _ = _unwrap(leaf.hint)
    if typing.get_args(kind):
        if typing.get_args(kind)[0] is str:
            return [str(item) for item in value] if isinstance(value, list) else [str(value)]
        texts = value if isinstance(value, list) else str(value).split(",")
        items = [_number(text) for text in texts]
        return leaf.default if not items or None in items else [round(item) for item in items if item is not None]
    number = _number(value)
    if kind is int and number is not None:
        return round(number)
    return leaf.default


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


# Validation of values and of what they mean together.


def _check_value(key: str, value: Any) -> None:
    if key == "name" and not _NAME.fullmatch(value):
        mend = re.sub(r"[^A-Za-z0-9_.-]+", "-", value).strip("-._")[:63] or "moco"
        raise UserError(f"name={_show(value)} must be 1 to 63 letters, digits, '.', '-' or '_'; e.g. name={mend}")
    if key in CHOICES and value not in CHOICES[key] and not (key in _OR_ELSE and _OR_ELSE[key][0].fullmatch(value)):
        names = _by_nearness(value, CHOICES[key])
        other = f", nor a name such as {_OR_ELSE[key][1]}" if key in _OR_ELSE else ""
        raise UserError(f"{key}={_show(value)} is not one of {', '.join(names)}{other}; e.g. {key}={names[0]}")
    if key in RANGES and value is not None:
        items = value if isinstance(value, tuple) else (value,)
        if not all(RANGES[key].admits(item) for item in items):
            raise UserError(_out_of_range(key, value))


def _out_of_range(key: str, value: Any) -> str:
    bounds, default = RANGES[key], _schema()[key].default
    if isinstance(value, tuple):
        nearest: Any = tuple(type(item)(bounds.nearest(item, bounds.low)) for item in value)
        return f"{key}={_show(value)}: each must be {bounds.describe()}; e.g. {key}={_show(nearest)}"
    # A NaN lies beside every range; an infinity has no use even where a bound is near.
    nearest = bounds.nearest(value, default) if math.isfinite(value) else default
    return f"{key}={_show(value)} must be {bounds.describe()}; e.g. {key}={_show(type(value)(nearest))}"


def _impossible(config: Config) -> Iterator[str]:
    """Yields what cannot work together, each as one line with the nearest valid value."""
    yield from _disordered(config)
    yield from _impossible_images(config)
    yield from _impossible_views(config)
    yield from _impossible_encoder(config)
    yield from _impossible_training(config)
    yield from _impossible_slices(config.evaluate)
    yield from _impossible_publication(config)
    yield from _impossible_beam(config.beam)
    yield from _impossible_cloud(config)


_ORDERED = (
    ("augment.crop_scale_min", "augment.crop_scale_max"),
    ("augment.crop_ratio_min", "augment.crop_ratio_max"),
    ("augment.blur_sigma_min", "augment.blur_sigma_max"),
)


def _disordered(config: Config) -> Iterator[str]:
    values = dict(_leaves(config))
    for low, high in _ORDERED:
        if values[low] > values[high]:
            yield f"{low}={_show(values[low])} is above {high}={_show(values[high])}; e.g. {low}={_show(values[high])}"


def _impossible_images(config: Config) -> Iterator[str]:
    ingest, image, size = config.ingest, config.image, config.augment.size
    if ingest.max_pixels < ingest.min_side**2:
        yield (
            f"ingest.max_pixels={ingest.max_pixels} admits no image of ingest.min_side={ingest.min_side}; "
            f"e.g. ingest.max_pixels={ingest.min_side**2}"
        )
    if size > image.storage_size:
        yield (
            f"augment.size={size} is larger than the stored image, image.storage_size={image.storage_size}; "
            f"e.g. augment.size={image.storage_size}"
        )
    if 0 < image.eval_resize < size:
        yield (
            f"image.eval_resize={image.eval_resize} is smaller than the crop, augment.size={size}; "
            f"e.g. image.eval_resize={size}, or 0 for {round(size * 256 / 224)}"
        )


def _impossible_views(config: Config) -> Iterator[str]:
    augment = config.augment
    if augment.where is Where.beam and augment.pairs_per_image < 1:
        yield (
            f"augment.pairs_per_image={augment.pairs_per_image} leaves augment.where=beam without views; "
            "e.g. augment.pairs_per_image=1, or augment.where=trainer"
        )
    if augment.order is RecipeOrder.v1 and augment.blur_probability > 0:
        yield (
            f"augment.blur_probability={augment.blur_probability} has no place in augment.order=v1 (no blur there); "
            "e.g. augment.blur_probability=0, or augment.order=v2"
        )


def _impossible_encoder(config: Config) -> Iterator[str]:
    encoder, values = config.encoder, dict(_leaves(config))
    for key in _RESNET_ONLY if _is_dotted(encoder.name) else ():
        if values[key] != _schema()[key].default:
            default = _show(_schema()[key].default)
            yield f"{key}={_show(values[key])} says nothing of encoder.name={encoder.name}; leave {key}={default}"
    if encoder.weights:
        from trainer_module.torch_weights import check_suffix

        check_suffix(encoder.weights, f"encoder.weights={_show(encoder.weights)}")
        # What is on gs:// is looked for by who reads it: that takes TensorFlow.
        if "://" not in encoder.weights and not os.path.isfile(os.path.expanduser(encoder.weights)):
            yield f"encoder.weights={_show(encoder.weights)}: there is no such file"


def _impossible_slices(evaluate: EvaluateConfig) -> Iterator[str]:
    for column in evaluate.slices:
        if column not in COLUMNS:
            columns = _by_nearness(column, COLUMNS)
            yield (
                f"evaluate.slices={_show(evaluate.slices)}: images cannot be grouped by {_show(column)}, but by "
                f"{', '.join(columns)}; e.g. evaluate.slices=[{columns[0]}]"
            )


def _impossible_publication(config: Config) -> Iterator[str]:
    to = config.publish.to
    scheme = re.match(r"(\w+):/", to)
    if scheme and not to.startswith("gs://"):
        yield (
            f"publish.to={_show(to)} is neither a directory nor gs://BUCKET/PATH; e.g. publish.to=gs://"
            f"{to[scheme.end() :].lstrip('/') or 'BUCKET/PATH'}"
        )


_SCHEDULER = re.compile(r"(tcp|tls)://[^/\s]+:\d{1,5}")


def _impossible_beam(beam: BeamConfig) -> Iterator[str]:
    if beam.address and not _SCHEDULER.fullmatch(beam.address):
        yield f"beam.address={_show(beam.address)} is no address of a Dask scheduler; e.g. beam.address=tcp://HOST:8786"
    if beam.address and beam.engine is not Engine.dask:
        engine = beam.engine.name
        yield f"beam.address={_show(beam.address)} has no use with beam.engine={engine}; e.g. beam.engine=dask"
    if beam.workers and (beam.engine is Engine.memory or beam.address):
        whose = f"beam.address={_show(beam.address)}" if beam.address else f"beam.engine={beam.engine.name}"
        yield f"beam.workers={beam.workers} has no use with {whose}, which starts none; e.g. beam.workers=0"


_CLOUD_PLACES = ("cloud.root", "cloud.images", "cloud.dataflow.temp")
_CLOUD_NAMES = {  # key: (pattern, example); a service would refuse others when hours of work are done
    "cloud.region": (r"[a-z]+-[a-z]+\d{1,2}", "europe-west4"),
    "cloud.image": (r"\S+", "REGION-docker.pkg.dev/PROJECT/REPOSITORY/moco:TAG"),
    "cloud.tpu_image": (r"\S+", "REGION-docker.pkg.dev/PROJECT/REPOSITORY/moco-tpu:TAG"),
    "cloud.service_account": (r"[^@\s]+@[^@\s]+", "NAME@PROJECT.iam.gserviceaccount.com"),
    "cloud.network": (r"projects/[^/\s]+/global/networks/[^/\s]+", "projects/NUMBER/global/networks/NAME"),
    "cloud.dataflow.subnetwork": (
        r"(https://\S+/)?regions/[^/\s]+/subnetworks/[^/\s]+",
        "regions/REGION/subnetworks/NAME",
    ),
}
_LABEL = re.compile(r"[a-z][a-z0-9_-]{0,62}=[a-z0-9_-]{0,63}")


def _impossible_cloud(config: Config) -> Iterator[str]:
    cloud, values = config.cloud, dict(_leaves(config))
    for key in _CLOUD_PLACES:
        if values[key] and not re.match("gs://[^/]", values[key]):
            yield f"{key}={_show(values[key])} names no place on gs://; e.g. {key}=gs://BUCKET/PATH"
    for key, (pattern, example) in _CLOUD_NAMES.items():
        if values[key] and not re.fullmatch(pattern, values[key]):
            yield f"{key}={_show(values[key])} is no such name; e.g. {key}={example}"
    for label in cloud.labels:
        if not _LABEL.fullmatch(label):
            yield (
                f"cloud.labels={_show(cloud.labels)}: {_show(label)} is not key=value in lower-case letters, digits, "
                "'-' and '_'; e.g. cloud.labels=[team=vision]"
            )
    yield from machines.faults(cloud.trainer, cloud.region)
    yield from _impossible_cores(config.train, machines.machines(cloud.trainer).cores)


def _impossible_cores(train: TrainConfig, cores: int) -> Iterator[str]:
    """What the cores of a TPU that is rented for the training cannot do."""
    if not cores:
        return
    if train.strategy in (StrategyKind.mirrored, StrategyKind.single):
        yield f"train.strategy={train.strategy.name} leaves the TPU of cloud.trainer idle; e.g. train.strategy=tpu"
    if train.global_batch % cores:
        below = train.global_batch // cores * cores
        near = [str(batch) for batch in (below, below + cores) if batch]
        yield (
            f"train.global_batch={train.global_batch} is not divisible by the {cores} cores of cloud.trainer; "
            f"e.g. train.global_batch={_or(near)}"
        )
    if does := dealing(train.key_bn, cores, train.global_batch // cores):
        yield (
            f"train.key_bn.mode={train.key_bn.mode.name} {does}, which train.global_batch={train.global_batch} over "
            f"the {cores} cores of cloud.trainer does not allow; e.g. train.key_bn.mode=auto"
        )


def _impossible_training(config: Config) -> Iterator[str]:
    train = config.train
    if "://" in train.checkpoints and not train.checkpoints.startswith("gs://"):
        yield f"train.checkpoints={_show(train.checkpoints)} is neither a folder nor gs://BUCKET/PATH; name one"
    if train.tpu.name and train.strategy in (StrategyKind.mirrored, StrategyKind.single):
        yield (
            f"train.tpu.name={_show(train.tpu.name)} has no use with train.strategy={train.strategy.name}; "
            "e.g. train.strategy=tpu"
        )
    # The cores of a TPU are counted when it is found.
    by_replicas = train.strategy in (StrategyKind.auto, StrategyKind.mirrored) and not train.tpu.name
    if by_replicas and train.global_batch % train.replicas:
        below = train.global_batch // train.replicas * train.replicas
        near = [str(batch) for batch in (below, below + train.replicas) if batch]
        yield (
            f"train.global_batch={train.global_batch} is not divisible by train.replicas={train.replicas}; "
            f"e.g. train.global_batch={_or(near)}"
        )
    if train.queue < train.global_batch:
        yield (
            f"train.queue={train.queue} is smaller than train.global_batch={train.global_batch}; "
            f"e.g. train.queue={train.global_batch}"
        )
    yield from _impossible_key_bn(train)
    ordered = tuple(sorted(set(train.milestones)))
    if train.schedule is Schedule.step and train.milestones != ordered:
        yield f"train.milestones={_show(train.milestones)} must rise; e.g. train.milestones={_show(ordered)}"


def _impossible_key_bn(train: TrainConfig) -> Iterator[str]:
    key_bn, replicas = train.key_bn, 1 if train.strategy is StrategyKind.single else train.replicas
    if train.strategy is StrategyKind.tpu or train.tpu.name:
        return  # the cores of a TPU are counted when it is found
    share = train.global_batch // replicas
    if does := dealing(key_bn, replicas, share):
        mend = {
            KeyBnMode.all_to_all: f"train.global_batch={nearest_share(key_bn, replicas, share) * replicas}",
            KeyBnMode.butterfly: "train.key_bn.mode=auto",
            KeyBnMode.split: _fewer_groups(key_bn.groups, share)
            or f"train.global_batch={max(nearest_share(key_bn, replicas, share), 2 * key_bn.groups) * replicas}",
        }[key_bn.mode]
        yield (
            f"train.key_bn.mode={key_bn.mode.name} {does}, which train.global_batch={train.global_batch} over "
            f"{replicas} does not allow; e.g. {mend}"
        )


def _fewer_groups(groups: int, share: int) -> str:
    """The most groups of two images and more; empty where there is but one group, which would be no shuffling."""
    possible = [g for g in range(2, min(groups, share // 2) + 1) if share % g == 0]
    return f"train.key_bn.groups={possible[-1]}" if possible else ""


# Words.


def _nearest_key(key: str) -> str:
    """Returns the key nearest to what was written: by another name, by the same last word, then by likeness."""
    last = key.rpartition(".")[2]
    if last.lower() in _ALSO_CALLED:
        return _ALSO_CALLED[last.lower()]
    if key in _sections():
        return next(candidate for candidate in _schema() if candidate.startswith(f"{key}."))

    def nearness(candidate: str) -> tuple[bool, float, float]:
        name = candidate.rpartition(".")[2]
        return name == last, _likeness(key, candidate) + _likeness(last, name), _likeness(key, candidate)

    return max(_schema(), key=nearness)


def _by_nearness(text: str, candidates: Sequence[str]) -> list[str]:
    """Returns the candidates, likest first; among equals the one that begins alike."""
    return sorted(
        candidates,
        key=lambda candidate: (_likeness(text, candidate), _common_start(text, candidate)),
        reverse=True,
    )


def _common_start(one: str, other: str) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return value


def _show(value: Any) -> str:
    """Returns a value as one would type it after `--set key=`."""
    value = _json(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        text = f"[{','.join(_show(item) for item in value)}]"
    elif isinstance(value, float):
        text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    else:
        text = repr(value) if isinstance(value, str) and not re.fullmatch(r"[\w./:-]+", value) else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
