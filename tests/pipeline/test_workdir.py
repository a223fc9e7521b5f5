"""The working directory: what cannot be one, images that lead into it, and its lock, which keeps one run in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import workdir
from pipeline.workdir import opened
from trainer_module.errors import UserError

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from pipeline.workdir import opened
from trainer_module.errors import UserError
sys.stdin.readline()
try:
    with opened(sys.argv[1]):
        print("in", flush=True)
        sys.stdin.readline()
except UserError as error:
    print(error, flush=True)
"""


def start(home: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(home)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_of_runs_that_start_at_the_same_time_one_goes_on_and_the_others_are_refused(tmp_path: Path):
    home = tmp_path / "new"
    runs = [start(home) for _ in range(6)]
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    said = [run.stdout.readline() for run in runs]
    assert said.count("in\n") == 1
    assert sum(line.startswith(f"another run uses {home}; wait for it") for line in said) == 5
    for run in runs:
        run.communicate()


def test_a_killed_run_leaves_no_lock(tmp_path: Path):
    run = start(tmp_path)
    run.stdin.write("\n")
    run.stdin.flush()
    assert run.stdout.readline() == "in\n"
    with pytest.raises(UserError, match="another run uses"), opened(str(tmp_path)):
        pass
    run.kill()
    run.communicate()
    with opened(str(tmp_path)) as home:
        assert home == tmp_path


def test_a_working_folder_that_is_a_file_or_below_one_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below/it"):
        with pytest.raises(UserError, match="is a file"):
            workdir.check(str(tmp_path / name))


def test_a_remote_working_folder_is_refused():
    with pytest.raises(UserError, match="on this machine"):
        workdir.check("gs://bucket/work")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_working_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="not writable"):
        workdir.check(str(tmp_path / "work"))
    tmp_path.chmod(0o700)


def test_a_missing_parent_of_the_working_folder_is_fine(tmp_path: Path):
    workdir.check(str(tmp_path / "a" / "b" / "c"))


@pytest.mark.parametrize(
    ("home", "images"),
    [
        ("images", "images"),
        ("images/run", "images"),
        ("images/run", "images/"),
        ("images/new/run", "images/*"),
        ("images/run", "ima*"),
        ("images/a/run", "images/**/*.png"),
        ("link/run", "images"),
        ("images/../images/run", "images"),
        ("images/1/run", "images/{SPAN}/*"),
    ],
)
def test_a_working_folder_inside_the_images_is_refused(tmp_path: Path, monkeypatch, home, images):
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="lies inside --images"):
        workdir.check_apart(home, images)


@pytest.mark.parametrize(
    ("home", "images"),
    [
        ("run", "images"),
        ("images-run", "images"),
        (".", "images"),
        ("run", "images/*"),
        ("images/run", "images/*.tar"),
        ("run", "gs://bucket/images"),
        ("images/run", "images/a/*"),
    ],
)
def test_a_working_folder_beside_the_images_is_fine(tmp_path: Path, monkeypatch, home, images):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    workdir.check_apart(home, images)


def test_a_working_folder_that_is_a_link_into_nothing_or_round_in_a_circle_is_refused(tmp_path: Path):
    (tmp_path / "nothing").symlink_to(tmp_path / "missing")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("nothing", "circle"):
        with pytest.raises(UserError, match=f"--workdir .*{name}"):
            workdir.check(str(tmp_path / name))
    with pytest.raises(UserError, match="--workdir ~nobody9/x"):
        workdir.check("~nobody9/x")


@pytest.mark.parametrize("sign", ["[", "]", "*", "?", "\\"])
def test_a_working_folder_that_libraries_take_for_a_pattern_is_refused_with_the_sign_wherever_it_is(tmp_path, sign):
    for name in (f"a{sign}b", f"a{sign}b/below"):
        with pytest.raises(UserError) as caught:
            workdir.check(str(tmp_path / name))
        assert f"name a folder without {sign}" in str(caught.value)


def test_a_sign_of_patterns_in_the_present_folder_counts_too(tmp_path: Path, monkeypatch):
    (tmp_path / "a*b").mkdir()
    monkeypatch.chdir(tmp_path / "a*b")
    with pytest.raises(UserError, match="a folder without"):
        workdir.check("run")


def test_a_working_folder_whose_name_is_no_utf_8_is_refused_in_words_that_can_be_printed(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        workdir.check(f"{tmp_path}/wd\udcff")
    assert f"--workdir {tmp_path}/wd\\xff: its name is not valid UTF-8" in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_place_where_no_folder_can_be_made_is_refused():
    with pytest.raises(UserError, match=r"^--workdir /proc/x: .*no folder can be made there"), opened("/proc/x"):
        pass


@pytest.mark.parametrize("images", ["images", "images/*", "imag{SPAN}"])
@pytest.mark.parametrize(
    ("link", "to", "home"),
    [
        ("images/cats/link", "runs/self", "runs/self"),
        ("images/cats/link", "runs", "runs/self"),
        ("images/cats/link", "runs", "runs/new/deeper"),
        ("images/link", "other", "runs/self"),
        ("images/link", "runs/self/artifacts/x", "runs/self"),
    ],
)
def test_links_in_the_images_that_lead_to_the_working_folder_are_refused(tmp_path, monkeypatch, images, link, to, home):
    for folder in ("images/cats", "other", "runs/self/artifacts/x"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "other" / "runs").symlink_to(tmp_path / "runs")
    (tmp_path / "images" / "round").symlink_to(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    workdir.check_apart(home, images)
    (tmp_path / link).symlink_to(tmp_path / to)
    with pytest.raises(UserError) as caught:
        workdir.check_apart(home, images)
    assert link in str(caught.value)
    assert f" in --images {images} leads there" in str(caught.value)


def test_links_that_lead_elsewhere_or_are_hidden_and_images_in_the_working_folder_are_fine(tmp_path, monkeypatch):
    for folder in ("images/cats", "elsewhere", "run/artifacts", "run/photos"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "images" / "cats" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "cats" / "lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "images" / ".hidden").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    workdir.check_apart("run", "images")
    workdir.check_apart("run", "run/photos")
    with pytest.raises(UserError, match="leads there"):
        workdir.check_apart("run", "run/artifacts")
