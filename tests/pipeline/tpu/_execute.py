"""Runs in .venv-tpu-compile: takes steps of a lowered program on XLA's CPU, one device for each core.

A question is {"hlo": FILE, "manifest": …, "state": FILE.npz by the names of the leaves, "views": FILE.npz with x_q and
x_k, uint8[steps, B, H, W, 3], "to": FILE.npz}. It writes "T/NAME" for each result NAME of each step T, from 1, as core
0 has it, and answers with the names of the results that differ between the cores.

{"hlo": FILE, "products": true} asks for the program's matrix products and convolutions alone, [type, precision] each.
"""

import os
import re
from pathlib import Path
from typing import Any

CORES = 8
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={CORES}"

from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from pipeline.tpu import _compile  # noqa: E402  # before jax, whose environment it sets
from pipeline.worker import serve  # noqa: E402

import jax  # noqa: E402  # isort: skip
import numpy as np  # noqa: E402  # isort: skip
from jax._src import xla_bridge  # noqa: E402  # isort: skip
from jax._src.interpreters import mlir  # noqa: E402  # isort: skip
from jax._src.lib import xla_client  # noqa: E402  # isort: skip


_PRODUCT = re.compile(r"= (?P<dtype>\w+)\[[^=]* (?:dot|convolution)\(.*")
_PRECISION = re.compile(r"operand_precision=\{(?P<precision>\w+,\w+)\}")


def products(text: str) -> list[tuple[str, str]]:
    """Type of the result and precision of the operands of each, as XLA's text has them."""
    found = []
    for line in _PRODUCT.finditer(text):
        precision = _PRECISION.search(line[0])
        found.append((line["dtype"], precision["precision"] if precision else "default"))
    return found


def answer(question: dict[str, Any]) -> Any:
    if question.get("products"):
        return products(_compile.read(Path(question["hlo"])).get_hlo_module().to_string())
    manifest = question["manifest"]
    replicas = manifest["replicas"]
    cpu = xla_bridge.get_backend("cpu")
    devices = cpu.local_devices()[:replicas]
    with mlir.make_ir_context():
        module = _compile.to_mlir(_compile.read(Path(question["hlo"])), manifest)
        program = cpu.compile_and_load(module, xla_client.DeviceList(tuple(devices)), _compile.options(replicas))
    # Each core has its own value of every argument, of the program's own shape.
    everywhere = NamedSharding(Mesh(np.array(devices), ("replica",)), PartitionSpec())
    state, views = np.load(question["state"]), np.load(question["views"])
    values = {name: [state[name]] * replicas for name in state.files}
    values["replica"] = [np.array([index], np.int32) for index in range(replicas)]
    written, differ = {}, set()
    for step in range(len(views["x_q"])):
        values["views/query"], values["views/key"] = (np.split(views[name][step], replicas) for name in ("x_q", "x_k"))
        arguments = []
        for argument in manifest["arguments"]:
            shards = [jax.device_put(v, d) for v, d in zip(values[argument["name"]], devices, strict=True)]
            arguments.append(jax.make_array_from_single_device_arrays(tuple(argument["shape"]), everywhere, shards))
        outputs = program.execute_sharded(arguments).disassemble_into_single_device_arrays()
        for result, shards in zip(manifest["results"], outputs, strict=True):
            arrays = [np.asarray(shard) for shard in shards]
            values[result["name"]] = arrays
            written[f"{step + 1}/{result['name']}"] = arrays[0]
            differ |= {result["name"]} if any(not np.array_equal(a, arrays[0]) for a in arrays) else set()
    np.savez(question["to"], **written)
    return {"differ": sorted(differ)}


if __name__ == "__main__":
    serve(answer)
