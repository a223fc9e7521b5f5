"""The two lines of TFX that this project runs on, and all that differs between them.

TFX 1.16 goes with Python 3.10, TFX 1.21 with later ones: the markers in requirements.txt say so, and so the Python
tells which line this is. Each part needs another library, so it is imported where it is asked for.
"""

import importlib
import os
import sys
from importlib import abc, machinery, metadata, util
from typing import Any

NEWER = sys.version_info >= (3, 11)
NAME = "1.21" if NEWER else "1.16"
# Of TensorFlow Serving, for models of this line's TensorFlow.
SERVING_IMAGE = "tensorflow/serving:2.21.0" if NEWER else "tensorflow/serving:2.16.1"


def summary() -> str:
    """Names the line that runs here, for people."""
    python = ".".join(map(str, sys.version_info[:2]))
    return f"TFX {metadata.version('tfx')}, TensorFlow {metadata.version('tensorflow')}, Python {python}"


def lifted_combine_per_key() -> Any:
    """Beam's transform that combines each bundle before it is grouped; Beam 2.74 keeps it elsewhere than 2.65."""
    place = "transforms.combiners" if NEWER else "runners.direct.helper_transforms"
    return importlib.import_module(f"apache_beam.{place}").LiftedCombinePerKey


def serving_service(module: str, name: str) -> Any:
    """The descriptor of a service of TensorFlow Serving, which reflection then knows, too.

    tfx-bsl 1.21 wants tensorflow-serving-api 2.19, whose modules of services were generated for protobuf 3. Under
    protobuf 6 their import stops once the pool has the description, where they would mark it as having options.

    Args:
        module: of tensorflow_serving.apis, such as "model_service_pb2".
        name: such as "ModelService".
    """
    from google.protobuf import descriptor_pool

    try:
        importlib.import_module(f"tensorflow_serving.apis.{module}")
    except AttributeError:
        if not NEWER:
            raise
    return descriptor_pool.Default().FindServiceByName(f"tensorflow.serving.{name}")


def message_to_json(message: Any) -> str:
    """A protobuf message as JSON with all its fields, empty ones too; protobuf 6 has renamed what asks for these."""
    from google.protobuf import json_format

    all_fields = "always_print_fields_with_no_presence" if NEWER else "including_default_value_fields"
    return json_format.MessageToJson(message, preserving_proto_field_name=True, **{all_fields: True})


def kubeflow_client(client: Any) -> Any:
    """Lets kfp's client be asked by the names of kfp 2.5: 2.16 has runs.run_service_create_run for runs.create_run."""
    for service in (client.runs, client.recurring_runs, client.experiments):
        for name in [one for one in dir(service) if "_service_" in one]:
            setattr(service, name.partition("_service_")[2], getattr(service, name))
    return client


def where_tpus_are() -> str:
    """What a person must hear who looks for a TPU here: no build of TensorFlow for TPUs fits TFX 1.21."""
    return f", which goes with TFX 1.16 on Python 3.10; this is TFX {NAME}" if NEWER else ""


def hush_import_of_tensorflow() -> None:
    """Keeps TensorFlow's import from writing to standard error.

    TensorFlow 2.16 obeys TF_CPP_MIN_LOG_LEVEL from its first word on, 2.21 only once its import is over.
    """
    if NEWER and "tensorflow" not in sys.modules:
        sys.meta_path.insert(0, _HushedImport())


class _HushedImport(abc.MetaPathFinder, abc.Loader):
    """Finds TensorFlow once, and has its import done with standard error closed to native code."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> machinery.ModuleSpec | None:
        """See the base class."""
        del path, target
        if name != "tensorflow":
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: machinery.ModuleSpec) -> Any:
        """See the base class."""
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        """See the base class."""
        module.__spec__.loader = module.__loader__ = self._loader
        sys.stderr.flush()
        terminal = os.dup(2)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        try:
            self._loader.exec_module(module)
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
