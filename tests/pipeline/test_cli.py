"""The command line: help, refusals in one line, exit codes, and nothing heavy imported before it is needed."""

import argparse
import errno
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline import bench, cli
from trainer_module.errors import UserError

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "demo",
    "run",
    "test",
    "embed",
    "search",
    "weights",
    "publish",
    "lineage",
    "serve",
    "deploy",
    "compile",
    "submit",
    "bench",
    "tpu-report",
]
HEAVY = ("jax", "tensorflow", "tfx", "apache_beam", "pandas", "keras", "ml_metadata", "pyarrow")


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line on standard error of a command that must end with code 2."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moco: ")
    assert captured.err.count("\n") == 1
    return captured.err


def moco(*arguments: str, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, "-X", "importtime", "-m", "pipeline", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False, **settings)
    imported, said = [], []
    for line in done.stderr.splitlines(keepends=True):
        (imported if line.startswith("import time:") else said).append(line)
    done.modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in imported}
    done.stderr = "".join(said)
    return done


# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(capsys, command):
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "example" in shown
    assert f"./moco {command}" in shown


def test_the_help_lists_the_commands_that_there_are_and_no_others(capsys):
    assert cli.main(["--help"]) == 0
    assert re.findall(r"^    ([\w-]+)", capsys.readouterr().out, re.MULTILINE) == COMMANDS


def test_the_help_says_which_line_of_tfx_this_is(capsys):
    assert cli.main(["--help"]) == 0
    assert f"This is TFX {version('tfx')}" in " ".join(capsys.readouterr().out.split())


def test_the_help_of_bench_lists_the_benchmarks_that_there_are(capsys):
    assert cli.main(["bench", "-h"]) == 0
    shown = capsys.readouterr().out
    for name, summary in bench.available().items():
        assert name in shown
        assert summary
        assert summary[:40] in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["embed", "--help"],
        ["search", "--help"],
        ["search", "--index", "/nowhere.parquet", "--query", "x.png"],
        ["weights", "--help"],
        ["weights", "--model", "x", "--out", "y.pth"],
        ["weights", "--model", "/nowhere", "--out", "y.npz"],
        ["run", "--images", "x", "--workdir", "y", "--set", "encoder.weights=y.pth"],
        ["run", "--images", "x", "--workdir", "y", "--set", "encoder=keras.nothing", "--set", "encoder.width=8"],
        ["publish", "--help"],
        ["publish", "--to", "/nowhere", "--rollback", "1"],
        ["publish", "--to", "gs://no such", "--list"],
        ["serve", "--help"],
        ["serve", "--model", "x", "--max-batch", "0"],
        ["serve", "--model", "/nowhere"],
        ["deploy", "--help"],
        ["deploy", "--target", "vertex", "--model", "gs://b-u-c/x/1", "--project", "my-project"],
        ["deploy", "--target", "docker", "--model", "x", "--endpoint", "y"],
        ["compile", "--help"],
        ["compile", "--target", "vertex", "--config", "vertex_v5e_8", "--out", "x.yaml"],
        ["compile", "--target", "vertex", "--config", "moco_v2", "--out", "x.json"],
        ["compile", "--target", "airflow", "--config", "moco_v2", "--out", "x.json"],
        ["submit", "--help"],
        ["submit", "--target", "vertex"],
        ["submit", "--target", "kubeflow", "--config", "demo"],
        ["bench", "--help"],
        ["tpu-report", "--help"],
        ["tpu-report", "--topology", "v5e:3x5"],
        ["tpu-report", "--set", "train.key_bn.mode=all_to_all", "--batch-per-core", "30"],
        ["rnu"],
        ["run"],
        ["run", "--images", "x", "--workdir", "y", "--config", "moco_v3"],
        ["run", "--images", "x", "--workdir", "y", "--set", "train.epochs=many"],
        ["run", "--images", "/nowhere", "--workdir", "y"],
        ["demo", "--workdir", "/etc/passwd"],
        ["embed", "--model", "/nowhere", "--images", "x", "--out", "y.csv"],
    ],
)
def test_help_and_refusals_import_nothing_heavy(arguments):
    done = moco(*arguments)
    assert done.returncode == (0 if "--help" in arguments else 2)
    assert done.modules & {"argparse"}
    assert not done.modules & set(HEAVY)
    assert done.stderr.count("\n") == (0 if "--help" in arguments else 1)


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no command", ", ".join(COMMANDS)]),
        (["rnu"], ["'rnu'", "did you mean run?"]),
        (["--debgu"], ["--debgu", "the command comes first"]),
        (["run"], ["--images", "--workdir", "./moco run --help"]),
        (["run", "--images", "x", "--workdir", "y", "--configg", "z"], ["--configg", "did you mean --config?"]),
        (["run", "--images", "x", "--workdir", "y", "--set", "train.queue=1"], ["train.queue=1", "train.queue=256"]),
        (["run", "--images", "x", "--workdir", "y", "--set"], ["--set", "./moco run --help"]),
        (["demo", "--seed", "many"], ["seed=many", "not an integer"]),
        (["demo", "extra"], ["demo takes no extra"]),
        (["embed", "--model", "a", "--images", "b", "--out", "c", "--batch", "z"], ["--batch", "'z'"]),
        (["search", "--index", "/nowhere.parquet", "--query", "x"], ["/nowhere.parquet", "./moco embed"]),
        (["search", "--index", "x", "--query", "y", "-k", "0"], ["-k 0", "at least 1"]),
        (["search", "--index", "x"], ["--query", "./moco search --help"]),
        (["publish", "--list"], ["--to", "./moco publish --help"]),
        (["publish", "--to", "x"], ["--model", "--list", "--rollback", "--keep"]),
        (["publish", "--to", "x", "--list", "--keep", "3"], ["--keep", "not allowed with", "--list"]),
        (["publish", "--to", "x", "--keep", "some"], ["--keep some", "--keep 3"]),
        (["publish", "--to", "x", "--keep", "0"], ["--keep 0", "--keep 3"]),
        (["publish", "--to", "x", "--keep", "9" * 5000], ["is not a number of versions", "--keep 3"]),
        (["publish", "--to", "x", "--rollback", "last"], ["--rollback last", "--list"]),
        (["publish", "--to", "/nowhere", "--rollback", "17"], ["/nowhere", "no such folder"]),
        (["publish", "--to", "x", "--model", "/nowhere"], ["/nowhere", "no such folder"]),
        (["publish", "--to", "s3://bucket/x", "--list"], ["s3://bucket/x", "gs://BUCKET/PATH"]),
        (["bench", "nothing-like-it"], ["'nothing-like-it' is no benchmark", "Benchmarks: "]),
        (["bench", "ingest", "--out", "somewhere"], ["--out somewhere", "ingest only prints figures"]),
        (["bench", "ingest", "--count", "3"], ["--count 3", "ingest does one thing"]),
        (["bench", "kills", "--count", "0"], ["--count 0", "e.g. --count 50"]),
        (["lineage", "--model", "17"], ["--model 17", "needs --workdir DIR"]),
        (["bench"], ["NAME", "./moco bench --help"]),
        (["test", "-x", "--line", "1.21"], ["--line comes directly after test", "./moco test --line 1.21"]),
        (["tpu-report", "--topology", "v5e:2x3"], ["v5e:2x3", "did you mean v5e:2x", "1x1, 2x2, 2x4"]),
        (["tpu-report", "--topology", "v9:2x2"], ["v9:2x2", "no such TPU slice", "v5e:2x4"]),
        (["tpu-report", "--batch-per-core", "0"], ["--batch-per-core 0", "at least 1"]),
        (["tpu-report", "--batch-per-core", "many"], ["--batch-per-core", "many"]),
        (["tpu-report", "--check-budgets", "--fit"], ["--check-budgets", "--fit", "leave one"]),
        (["tpu-report", "--write-budgets", "--topology", "v5e:4x4"], ["--write-budgets", "--topology"]),
        (["tpu-report", "--write-budgets", "--check-budgets"], ["--write-budgets", "for --check-budgets"]),
        (["tpu-report", "--config", "moco_v3"], ["--config moco_v3", "moco_v2"]),
        (["tpu-report", "--json", "/nowhere/x.json"], ["--json /nowhere/x.json", "does not exist"]),
        (
            ["tpu-report", "--topology", "v5e:4x4", "--set", "train.global_batch=264"],
            ["train.global_batch=264", "the 16 cores of v5e:4x4", "--batch-per-core 16"],
        ),
        (
            ["tpu-report", "--set", "train.key_bn.mode=all_to_all", "--batch-per-core", "30"],
            ["train.key_bn.mode=all_to_all", "8 cores of v5e:2x4", "--batch-per-core 32"],
        ),
        (
            ["tpu-report", "--set", "train.key_bn.mode=split", "--batch-per-core", "30"],
            ["train.key_bn.groups=8", "--batch-per-core 30 ", "--batch-per-core 32"],
        ),
        (["tpu-report", "--batch-per-core", "10000"], ["--batch-per-core 10000", "train.queue=80000"]),
    ],
)
def test_a_usage_error_is_one_line_with_the_mend_and_code_2(capsys, arguments, words):
    said = refused(capsys, *arguments)
    for word in words:
        assert word in said


def test_debug_shows_the_traceback_of_a_refusal(capsys):
    assert cli.main(["run", "--images", "x", "--workdir", "y", "--config", "moco_v3", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("moco: --config moco_v3")


def test_a_missing_source_of_images_is_refused_before_a_working_folder_is_made(tmp_path: Path):
    done = moco("run", "--images", str(tmp_path / "nowhere"), "--workdir", str(tmp_path / "work"))
    assert done.returncode == 2
    assert str(tmp_path / "nowhere") in done.stderr
    assert not (tmp_path / "work").exists()


# Failures.


def chained(outer: BaseException, inner: BaseException) -> BaseException:
    try:
        try:
            raise inner
        except BaseException as error:
            raise outer from error
    except BaseException as error:
        return error


BEAM = """Traceback (most recent call last):
  File "apache_beam/runners/common.py", line 1501, in process
trainer_module.errors.UserError: 7 of 9 images are bad; raise ingest.max_bad_fraction [while running 'Check/Count']

During handling of the above exception, another exception occurred:
RuntimeError: more"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("mend it"), "mend it"),
        (UserError("mend it [while running 'Read/ParDo']"), "mend it"),
        (chained(RuntimeError("outer"), UserError("mend it")), "mend it"),
        (RuntimeError(BEAM), "7 of 9 images are bad; raise ingest.max_bad_fraction"),
        (chained(ValueError("outer"), RuntimeError(BEAM)), "7 of 9 images are bad; raise ingest.max_bad_fraction"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/disk/x"),
            "no space left on the disk while writing /disk/x",
        ),
        (chained(RuntimeError("x"), OSError(errno.ENOSPC, "No space left on device")), "no space left on the disk"),
        (RuntimeError("OSError: [Errno 28] No space left on device [while running 'W']"), "no space left on the disk"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/disk/x"), "no space left on the disk while writing /disk/x"),
        (RuntimeError("INTERNAL: database or disk is full"), "no space left on the disk"),
        (
            chained(RuntimeError("x"), RuntimeError("ABORTED: Concurrent writes aborted after max number of retries.")),
            "the metadata database is locked by another program",
        ),
    ],
)
def test_what_a_user_can_mend_is_found_wherever_it_hides(error, line):
    assert (cli.user_error(error) or "").startswith(line)
    assert "while running" not in (cli.user_error(error) or "")


def test_a_user_error_raised_by_a_real_dofn_is_said_in_its_own_words():
    code = """
import logging, sys
logging.disable()
import apache_beam as beam
from pipeline import cli
from trainer_module.errors import UserError
class Refuse(beam.DoFn):
    def process(self, element):
        raise UserError("7 of 9 images are bad; mend them")
try:
    runner = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
    with beam.Pipeline(runner) as pipeline:
        pipeline | beam.Create([1]) | beam.ParDo(Refuse())
except Exception as error:
    print(cli.user_error(error))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout == "7 of 9 images are bad; mend them\n"


def test_every_other_error_is_ours():
    assert cli.user_error(ValueError("x")) is None
    assert cli.user_error(OSError(errno.EACCES, "denied")) is None
    assert cli.user_error(RuntimeError("the class UserError: is mentioned only")) is None


def test_a_fault_of_ours_keeps_its_traceback_and_gives_code_1(capsys, monkeypatch):
    def broken(_):
        raise ValueError("boom")

    monkeypatch.setattr(cli, "_bench", broken)
    assert cli.main(["bench", "x"]) == 1
    said = capsys.readouterr().err
    assert "ValueError: boom" in said
    assert "Traceback" in said
    assert "fault of this program" in said.splitlines()[-1]


# A run that waits where the sources are checked, until the interrupt comes.
WAITING = """
import sys, time
from components.image_example_gen import sources
from pipeline import cli
def check(_):
    print("waiting", flush=True)
    time.sleep(60)
sources.check = check
sys.exit(cli.main(["run", "--images", sys.argv[1], "--workdir", sys.argv[2]]))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_run_that_is_stopped_before_its_first_stage_says_that_the_same_command_continues(tmp_path: Path, sent):
    images = tmp_path / "images"
    images.mkdir()
    command = [sys.executable, "-c", WAITING, str(images), str(tmp_path / "work")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(sent)
    assert process.communicate(timeout=60)[1] == "moco: interrupted; the same command continues\n"
    assert process.returncode == 130


# A start whose imports wait until the interrupt comes.
IMPORTING = """
import runpy, sys, types
class Waiting:
    def find_spec(self, name, *_):
        if name == "pipeline.cli":
            print("importing", flush=True)
            import time
            time.sleep(60)
sys.meta_path.insert(0, Waiting())
sys.argv = ["moco", "run"]
runpy.run_module("pipeline", run_name="__main__")
"""


def test_ctrl_c_while_the_command_line_is_imported_is_one_line_too():
    command = [sys.executable, "-c", IMPORTING]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "moco: interrupted\n"
    assert process.returncode == 130


def test_an_interrupt_that_is_ignored_stays_ignored():
    at_once = IMPORTING.replace("time.sleep(60)", "import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{at_once}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("moco: the following arguments are required")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "a", "--workdir", "run[1]"], ["--workdir run[1]: [ in ", "a folder without ["]),
        (["--images", "a", "--workdir", "wd\udcff"], ["wd\\xff", "not valid UTF-8"]),
        (["--images", "lat\udcffin", "--workdir", "w"], ["lat\\xffin", "not valid UTF-8", "a link to it"]),
        (["--images", "http://a/b", "--workdir", "w"], ["http:// is not read", "on gs://"]),
        (["--images", "pictures", "--workdir", "/proc/x"], ["--workdir /proc/x"]),
        (["--images", "pictures", "--workdir", "pictures/new"], ["--workdir pictures/new: lies inside"]),
        (["--images", "pictures", "--workdir", "self"], ["pictures/link in --images pictures leads there"]),
    ],
)
def test_paths_that_no_run_can_have_are_one_line(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.gif").write_bytes(b"GIF89a" + bytes(20))
    (tmp_path / "pictures" / "link").symlink_to(tmp_path / "self")
    said = refused(capsys, "run", *arguments)
    for word in words:
        assert word in said
    assert not (tmp_path / "w").exists()


# ./moco test and ./moco bench.


def test_test_says_what_each_group_covers_and_hands_on_arguments_and_exit_code(tmp_path: Path):
    # Tests of its own, since the project's conftest.py imports TensorFlow.
    target = tmp_path / "test_two.py"
    in_the_root = f"import os\n\ndef test_four():\n    assert os.getcwd() == {str(ROOT)!r}\n"
    target.write_text(f"{in_the_root}\ndef test_five():\n    assert False\n")
    done = moco("test", "-k", "four", str(target), "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    assert "tests/pipeline\n" in done.stdout
    assert re.search(r"^  cli +The command line: help", done.stdout, re.MULTILINE)
    assert "1 passed, 1 deselected" in done.stdout
    assert moco("test", str(target), "-p", "no:cacheprovider").returncode == 1


def test_groups_are_folders_with_a_line_for_each_module(tmp_path: Path):
    for path, text in {
        "tests/a/test_one.py": '"""What one covers.\n\nMore."""\n',
        "tests/a/b/test_two.py": "import os\n",
        "tests/a/helper.py": '"""No test."""\n',
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    shown = [line.split() for line in cli.test_groups(tmp_path / "tests")]
    assert shown == [["tests/a"], ["one", "What", "one", "covers."], ["tests/a/b"], ["two"]]


def test_bench_refuses_a_missing_folder_for_its_figures_before_it_measures(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        bench.run("any", str(tmp_path / "nowhere" / "figures.json"))


def test_ctrl_c_within_a_beam_stage_counts_as_an_interruption():
    import apache_beam as beam

    def interrupt(_):
        raise KeyboardInterrupt

    with (
        pytest.raises(RuntimeError) as caught,
        beam.Pipeline(runner="apache_beam.runners.portability.fn_api_runner.FnApiRunner") as pipeline,
    ):
        _ = pipeline | beam.Create([1]) | beam.Map(interrupt)
    assert cli.was_interrupted(caught.value)
    assert not cli.was_interrupted(RuntimeError("something else"))


@pytest.mark.parametrize(("images", "workdir", "key"), [("", "w", "--images"), ("x", " ", "--workdir")])
def test_an_empty_folder_name_is_refused_by_its_own_key(capsys, images, workdir, key):
    assert refused(capsys, "run", "--images", images, "--workdir", workdir).startswith(f"moco: {key} is empty")


def test_an_option_given_twice_is_refused():
    for words in (
        ["run", "--images", "a", "--images", "b", "--workdir", "w"],
        ["embed", "--model", "a", "--model", "b"],
        ["demo", "--seed", "1", "--seed", "2"],
        ["demo", "--workdir", "a", "--workdir", "b"],
        ["search", "--index", "a", "--query", "b", "--query", "c"],
    ):
        with pytest.raises(UserError, match="is given twice"):
            cli._parse(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_takes_the_last_of_several_values_without_a_word(command):
    parser = argparse.ArgumentParser()
    cli._COMMANDS[command][0](parser)
    silent = [action.option_strings for action in parser._actions if type(action) is argparse._StoreAction]
    assert [names for names in silent if names] == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP])
def test_what_a_path_s_rights_forbid_is_one_line_and_not_a_fault_of_ours(code):
    text = cli.user_error(RuntimeError("x")) or cli.user_error(OSError(code, os.strerror(code), "/secret/x"))
    assert text is not None
    assert text.startswith("/secret/x: ")
    assert cli.user_error(OSError(errno.ENOENT, "gone", "/x")) is None
