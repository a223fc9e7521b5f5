"""Fingerprints: a stage's changes when its code or what it imports changes, and at nothing else."""

import shutil

import pytest

from pipeline import fingerprint
from trainer_module import lines


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project's sources that a test may change."""
    for room in fingerprint.ROOMS:
        shutil.copytree(fingerprint.ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(fingerprint.ROOT / "requirements.txt", tmp_path)
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    return tmp_path


def change(path, text):
    path.write_text(path.read_text() + text)


def test_a_change_in_what_a_stage_imports_changes_its_fingerprint(project):
    before = fingerprint.of("components.view_augmenter.component")
    change(project / "trainer_module" / "views.py", "\nCHANGED = 1\n")
    assert fingerprint.of("components.view_augmenter.component") != before


def test_a_change_elsewhere_or_in_a_comment_does_not(project):
    before = fingerprint.of("components.image_example_gen.component")
    change(project / "trainer_module" / "views.py", "\nCHANGED = 1\n")
    change(project / "components" / "image_example_gen" / "codec.py", "\n# a remark\n")
    assert fingerprint.of("components.image_example_gen.component") == before


def test_training_depends_on_the_step_and_not_on_the_command_line(project):
    before = fingerprint.of("trainer_module.run_fn")
    change(project / "pipeline" / "cli.py", "\nCHANGED = 1\n")
    assert fingerprint.of("trainer_module.run_fn") == before
    change(project / "trainer_module" / "moco.py", "\nCHANGED = 1\n")
    assert fingerprint.of("trainer_module.run_fn") != before


def test_another_line_of_tfx_is_another_fingerprint(project, monkeypatch):
    before = fingerprint.of("components.image_example_gen.component")
    monkeypatch.setattr(lines, "NAME", "1.0")
    assert fingerprint.of("components.image_example_gen.component") != before
