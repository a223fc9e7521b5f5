"""./moco publish, from the words that are typed to what is in service."""

import json
import os
import subprocess
import sys
from pathlib import Path

import faulty_storage
import pytest

from components.pusher import publish
from pipeline import cli, config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the files that make a SavedModel whole, and a card that says it is blessed."""
    card = json.dumps({"evaluation": {"blessed": True}})
    files = {"saved_model.pb": "one", "variables/variables.index": "one", "assets.extra/model_card.json": card}
    for name, content in files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(content)
    return tmp_path / "model"


@pytest.fixture(params=["directory", "bucket"])
def base(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if request.param == "directory":
        yield str(tmp_path / "serving")
        return
    with faulty_storage.storage() as storage, faulty_storage.proxy(storage) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", faulty_storage.url(proxy))
        yield "gs://models/encoder"


def typed(capsys: pytest.CaptureFixture, *arguments: object) -> list[str]:
    """The lines that a command answers."""
    assert cli.main(["publish", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line of a command that must end with code 2."""
    assert cli.main(["publish", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moco: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_model_is_published_listed_gone_back_from_and_removed(capsys, base, model):
    paths = []
    for word in ("one", "two", "three"):
        (model / "saved_model.pb").write_text(word)
        (line,) = typed(capsys, "--to", base, "--model", model)
        paths.append(line.removeprefix("in service: "))
        assert publish.resolve(base) == paths[-1]
    first, second, third = (path.rpartition("/")[2] for path in paths)
    listed = [line.split()[:2] for line in typed(capsys, "--to", base, "--list")]
    assert listed == [[third, "in"], [second, "ready"], [first, "ready"]]
    assert typed(capsys, "--to", base, "--rollback", second) == [f"in service: {paths[1]}"]
    assert publish.resolve(base) == paths[1]
    assert typed(capsys, "--to", base, "--keep", "1") == [f"removed: {first}"]
    listed = [line.split()[:2] for line in typed(capsys, "--to", base, "--list")]
    assert listed == [[third, "withdrawn"], [second, "in"]]


def test_a_model_that_somebody_went_back_from_is_not_said_to_be_in_service(capsys, base, model):
    for word in ("one", "two"):
        (model / "saved_model.pb").write_text(word)
        card = {"evaluation": {"blessed": True}, "model_sha256": word}
        (model / "assets.extra" / "model_card.json").write_text(json.dumps(card))
        typed(capsys, "--to", base, "--model", model)
    second, first = (line.split()[0] for line in typed(capsys, "--to", base, "--list"))
    typed(capsys, "--to", base, "--rollback", first)
    assert f"--rollback {second} returns to it" in refused(capsys, "--to", base, "--model", model)
    assert publish.resolve(base).endswith(first)


def test_a_model_is_published_only_if_its_card_says_that_it_is_blessed_or_by_force(capsys, base, model):
    card = model / "assets.extra" / "model_card.json"
    for content, words in (
        ('{"evaluation": {"blessed": false}}', "is not blessed, as its card says; --force"),
        ('{"evaluation": {"blessed": "no"}}', "is not blessed, as its card says; --force"),
        ("{}", "has no card that says it is blessed; --force"),
        ("[]", "has no card that says it is blessed; --force"),
    ):
        card.write_text(content)
        assert words in refused(capsys, "--to", base, "--model", model)
    card.unlink()
    assert "has no card" in refused(capsys, "--to", base, "--model", model)
    (line,) = typed(capsys, "--to", base, "--model", model, "--force")
    assert line == f"in service: {publish.resolve(base)}"
    assert "--force goes with --model" in refused(capsys, "--to", base, "--list", "--force")


def test_what_is_in_service_in_one_place_is_published_to_another(capsys, base, model, tmp_path):
    typed(capsys, "--to", base, "--model", model)
    typed(capsys, "--to", tmp_path / "copy", "--model", base)
    with publish.local_copy(str(tmp_path / "copy")) as folder:
        assert Path(folder, "saved_model.pb").read_text() == "one"


def test_a_folder_that_is_no_whole_model_is_refused(capsys, base, model, tmp_path):
    (model / "variables" / "variables.index").unlink()
    assert "is incomplete" in refused(capsys, "--to", base, "--model", model)
    assert "no such folder" in refused(capsys, "--to", base, "--model", tmp_path / "nowhere")
    assert "no SavedModel there" in refused(capsys, "--to", base, "--model", tmp_path)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_told(capsys, model, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "permission denied" in refused(capsys, "--to", tmp_path / "locked", "--model", model)


def test_destinations_that_cannot_be_are_told(capsys, model, tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refused(capsys, "--to", file, "--list")
    assert f"cannot write to push destination {file}: file exists" in refused(capsys, "--to", file, "--model", model)
    assert "no such folder" in refused(capsys, "--to", tmp_path / "nowhere", "--keep", "3")
    assert "an empty path is no place" in refused(capsys, "--to", "", "--list")
    assert "an empty path is no place" in refused(capsys, "--to", tmp_path, "--model", "")
    assert "cannot write to push destination /proc/x" in refused(capsys, "--to", "/proc/x", "--model", model)


def test_without_credentials_the_way_to_them_is_told(capsys, monkeypatch):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    said = refused(capsys, "--to", "gs://models/x", "--list")
    assert "/nowhere/key.json was not found" in said
    assert "gcloud auth application-default login" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "key: Is a directory"), ("[]", "is no key file"), ("{", "is not a valid json file.)"), ("{}", "type")],
)
def test_credentials_that_are_none_are_told_in_one_line(capsys, monkeypatch, tmp_path, content, words):
    key = tmp_path / "a folder of some length" / "key"
    key.parent.mkdir()
    key.mkdir() if content is None else key.write_text(content)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    said = refused(capsys, "--to", "gs://models/x", "--list")
    assert words in said
    assert "('" not in said.replace("('authorized_user'", "")
    assert "gcloud auth application-default login" in said


def test_a_full_disk_is_told_and_the_old_version_stays(capsys, model, tmp_path):
    serving = tmp_path / "serving"
    typed(capsys, "--to", serving, "--model", model)
    before = publish.resolve(str(serving))
    (model / "variables" / "variables.data").write_bytes(bytes(2**20))
    # A limit of the process stands for that of a disk: the write fails in the midst of the copy.
    program = (
        "import resource, signal, sys; from pipeline import cli; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19)); sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "publish", "--to", str(serving), "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"moco: cannot write to push destination {serving}: file too large")
    assert done.stderr.count("\n") == 1
    assert publish.resolve(str(serving)) == before
    assert [name for name in os.listdir(serving) if name.startswith(".pushing")] == []


# ./moco run: the setting publish.to, before anything runs.


@pytest.fixture
def run_refused(capsys: pytest.CaptureFixture, tmp_path: Path, sample_tars: list[Path]):
    """The one line by which a run is refused; nothing may have been made then."""

    def run(*settings: str) -> str:
        chosen = [word for setting in settings for word in ("--set", setting)]
        images, workdir = str(sample_tars[0]), tmp_path / "work"
        assert cli.main(["run", "--images", images, "--workdir", str(workdir), "--config", "demo", *chosen]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert not workdir.exists()
        return captured.err

    return run


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("s3://bucket/x", "is neither a directory nor gs://BUCKET/PATH; e.g. publish.to=gs://bucket/x"),
        ("gs:/bucket/x", "is neither a directory nor gs://BUCKET/PATH; e.g. publish.to=gs://bucket/x"),
        ("gs://no such/x", "cannot be the name of a bucket"),
        ("{tmp}/file", "/file is a file; name a directory"),
        ("{tmp}/file/below", "/file is a file; name a directory"),
        ("/proc/encoder", "/proc cannot be written ("),
    ],
)
def test_a_destination_that_cannot_be_is_refused_before_a_run_begins(run_refused, tmp_path, to, words):
    (tmp_path / "file").touch()
    line = run_refused(f"publish.to={to.format(tmp=tmp_path)}")
    assert line.startswith("moco: publish.to=")
    assert words in line


def test_a_bucket_that_is_missing_or_forbidden_is_refused_before_a_run_begins(run_refused, monkeypatch):
    def forbid(number: int, request: faulty_storage.Request) -> faulty_storage.Answer:
        return faulty_storage.refusal(403, "forbidden", "no storage.objects.list access")

    with faulty_storage.storage() as storage:
        for plan, base, words in (
            (faulty_storage.no_faults, "gs://another/x", "there is no bucket gs://another"),
            (forbid, "gs://models/x", "your credentials do not allow that"),
        ):
            with faulty_storage.proxy(storage, plan) as proxy:
                monkeypatch.setenv("STORAGE_EMULATOR_HOST", faulty_storage.url(proxy))
                assert words in run_refused(f"publish.to={base}")


def test_a_relative_destination_is_meant_from_the_present_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    for typed_as, meant in (
        ("encoders/birds", str(tmp_path / "encoders" / "birds")),
        ("~/encoders", "/home/somebody/encoders"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("''", ""),
    ):
        assert config.resolved(config.load("demo", [f"publish.to={typed_as}"])).publish.to == meant
