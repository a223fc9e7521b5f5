"""Results of the compiler are kept by what decides them, and only if they are whole."""

import dataclasses

import pytest

from pipeline import side_env
from pipeline.tpu import analysis, budgets
from pipeline.tpu.analysis import Compiled, Compiler
from pipeline.tpu.chips import parse_topology
from trainer_module.config import KeyBnMode

pytestmark = pytest.mark.long


@pytest.fixture
def request_():
    return budgets.programs()[KeyBnMode.none.name]


def test_a_result_is_found_again_and_a_damaged_one_is_made_again(tpu_environments, tmp_path, request_):
    with Compiler(tmp_path) as compiler:
        first = compiler.compile(request_, budgets.TOPOLOGY)
        assert isinstance(first, Compiled)
    (kept,) = tmp_path.iterdir()
    with Compiler(tmp_path) as compiler:
        assert compiler.compile(request_, budgets.TOPOLOGY) == first  # the seconds, too
        whole = kept.read_text()
        kept.write_text(whole[:100])
        again = compiler.compile(request_, budgets.TOPOLOGY)
    assert again.seconds != first.seconds
    assert dataclasses.replace(again, seconds=first.seconds) == first
    assert list(tmp_path.iterdir()) == [kept]


def test_what_decides_a_result_is_in_its_key(request_, tmp_path, monkeypatch):
    keys = {analysis._key(request_, budgets.TOPOLOGY), analysis._key(request_, parse_topology("v5e:4x4"))}
    keys.add(analysis._key(dataclasses.replace(request_, size=32), budgets.TOPOLOGY))
    packages = tmp_path / "list.txt"
    packages.write_text("another compiler")
    other = dataclasses.replace(side_env.TPU_COMPILE, requirements=packages)
    monkeypatch.setattr(side_env, "TPU_COMPILE", other)
    keys.add(analysis._key(request_, budgets.TOPOLOGY))
    assert len(keys) == 4


def test_an_encoder_of_the_user_s_own_is_compiled_anew_since_its_code_may_have_changed(request_):
    own = dataclasses.replace(request_, encoder=dataclasses.replace(request_.encoder, name="mine.encoder"))
    assert not analysis._can_be_kept(own)
    assert analysis._can_be_kept(request_)
