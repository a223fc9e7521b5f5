"""What each host of the training job does: it trains, or lends its TPU to the one that trains.

TensorFlow drives a slice of several hosts from one process: host 0 coordinates, and on every host, 0 included, a
server of TensorFlow lends the TPU chips of that host (the design of Cloud TPU's own runtime, "Run TensorFlow code on
TPU Pod slices"). A job runs the same command on all of them, and here each finds out which it is.
"""

import dataclasses
import os
import signal
from typing import Any

from tfx import types
from tfx.components.trainer.executor import GenericExecutor
from tfx.types.standard_component_specs import CUSTOM_CONFIG_KEY
from tfx.utils import json_utils

from trainer_module import tpu_slice
from trainer_module.run_fn import Experiment
from trainer_module.strategy import prepare

HOSTS = "hosts"  # key of custom_config: machines of the slice


class Executor(GenericExecutor):
    """TFX's Trainer, on any of the hosts of a job."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """Trains on host 0, and lends the TPU until that has ended elsewhere.

        Raises:
            UserError: the service does not say which hosts there are, or one of them lends nothing.
        """
        # A machine that is taken back is told so half a minute before: the training saves as it does at Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        told = json_utils.loads(exec_properties[CUSTOM_CONFIG_KEY])
        if told.get(HOSTS, 1) == 1:
            self._train(told, input_dict, output_dict, exec_properties)
            return
        here = tpu_slice.this_host(os.environ, told[HOSTS])
        if here.index:
            tpu_slice.lend(here)
            return
        with tpu_slice.tpu_lent(here) as server:
            tpu_slice.wait_for_hosts(here, server)
            told |= _with_tpu(Experiment.from_custom_config(told), here.name).to_custom_config()
            self._train(told, input_dict, output_dict, exec_properties)

    def _train(
        self,
        told: dict[str, Any],
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        prepare(Experiment.from_custom_config(told).train)  # before TensorFlow's first operation
        super().Do(input_dict, output_dict, {**exec_properties, CUSTOM_CONFIG_KEY: json_utils.dumps(told)})


def _with_tpu(experiment: Experiment, name: str) -> Experiment:
    tpu = dataclasses.replace(experiment.train.tpu, name=name)
    return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, tpu=tpu))
