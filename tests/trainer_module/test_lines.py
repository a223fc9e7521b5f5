"""The line of TFX that runs here: told by the Python, true of what is installed, named where a TPU is looked for."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from trainer_module import lines, strategy
from trainer_module.config import TpuConfig

PINS = (Path(__file__).parents[2] / "requirements.in").read_text()


@pytest.mark.parametrize("package", ["tfx", "tensorflow", "keras", "protobuf", "apache-beam"])
def test_what_is_installed_is_what_this_line_pins(package):
    sign = ">=" if lines.NEWER else "<"
    pattern = rf'^{package}(?:\[gcp\])?==(\S+); python_version {sign} "3.11"'
    assert re.findall(pattern, PINS, re.MULTILINE) == [metadata.version(package)]


def test_the_summary_names_the_line():
    assert lines.summary().startswith(f"TFX {lines.NAME}.")
    assert "Python {}.{}".format(*sys.version_info) in lines.summary()


@pytest.mark.parametrize(
    ("module", "name", "methods"),
    [
        ("model_service_pb2", "ModelService", {"GetModelStatus", "HandleReloadConfigRequest"}),
        (
            "prediction_service_pb2",
            "PredictionService",
            {"Classify", "GetModelMetadata", "MultiInference", "Predict", "Regress"},
        ),
    ],
)
def test_a_service_of_tensorflow_serving_has_its_methods_and_messages(module, name, methods):
    service = lines.serving_service(module, name)
    assert service.full_name == f"tensorflow.serving.{name}"
    assert {method.name for method in service.methods} == methods
    assert all(method.input_type.full_name.startswith("tensorflow.serving.") for method in service.methods)


@pytest.mark.parametrize("newer", [True, False])
def test_who_looks_for_a_tpu_hears_which_line_has_one(monkeypatch, newer):
    monkeypatch.setattr(lines, "NEWER", newer)
    error = RuntimeError("No registered 'ConfigureDistributedTPU' OpKernel for CPU devices")
    said = strategy._why(error, TpuConfig(name="grpc://10.0.0.1:8470"))
    assert "tensorflow-tpu" in said
    assert ("goes with TFX 1.16 on Python 3.10" in said) is newer


HUSHED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from trainer_module import lines
lines.NEWER = True
lines.hush_import_of_tensorflow()
import tensorflow
os.write(2, b"afterwards")
print(tensorflow.VERSION, tensorflow.__spec__.loader is tensorflow.__loader__, type(tensorflow.__loader__).__name__)
"""


@pytest.mark.parametrize(("ending", "status"), [("", 0), ("raise ValueError('cannot be imported')", 1)])
def test_an_import_is_hushed_and_its_end_is_not(tmp_path, ending, status):
    (tmp_path / "tensorflow.py").write_text(f"import os\nos.write(2, b'chatter')\nVERSION = 7\n{ending}\n")
    root = Path(lines.__file__).parents[1]
    command = [sys.executable, "-c", HUSHED, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "chatter" not in done.stderr
    if status:
        assert "ValueError: cannot be imported" in done.stderr
    else:
        assert done.stderr == "afterwards"
        assert done.stdout == "7 True SourceFileLoader\n"
