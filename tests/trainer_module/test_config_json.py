"""Configurations survive their way through JSON."""

import dataclasses
import json

import pytest

from trainer_module import config_json
from trainer_module.config import AugmentConfig, KeyBnConfig, KeyBnMode, RecipeOrder, Schedule, TrainConfig, Where


@dataclasses.dataclass(frozen=True)
class Both:
    augment: AugmentConfig
    train: TrainConfig
    names: tuple[str, ...] = ()


BOTH = Both(
    AugmentConfig(order=RecipeOrder.v1, where=Where.both, hue=0.25),
    TrainConfig(milestones=(1, 2, 3), schedule=Schedule.step, key_bn=KeyBnConfig(KeyBnMode.none)),
    ("ä", "b"),
)


def test_nested_dataclasses_enums_and_tuples_come_back_equal() -> None:
    assert config_json.loads(Both, config_json.dumps(BOTH)) == BOTH


def test_equal_configurations_give_equal_texts() -> None:
    assert config_json.dumps(BOTH) == config_json.dumps(dataclasses.replace(BOTH))
    assert config_json.dumps(BOTH) != config_json.dumps(dataclasses.replace(BOTH, names=()))


def test_absent_fields_take_their_defaults() -> None:
    assert config_json.loads(AugmentConfig, '{"size": 32}') == AugmentConfig(size=32)


@pytest.mark.parametrize(("field", "error"), [({"sizes": 3}, TypeError), ({"where": "moon"}, KeyError)])
def test_unknown_fields_and_members_are_refused(field: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        config_json.loads(AugmentConfig, json.dumps(field))


@pytest.mark.parametrize("text", ['{"hue": 1, "what": 2}', "[1]", "7", "{", b"\xff"])
def test_a_foreign_text_that_is_no_such_dataclass_is_a_value_error(text) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the reason is the reader's to tell
        config_json.loads_foreign(AugmentConfig, text)
    assert config_json.loads_foreign(AugmentConfig, '{"hue": 0.5}') == AugmentConfig(hue=0.5)
