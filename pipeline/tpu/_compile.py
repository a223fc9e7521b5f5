"""Runs in .venv-tpu-compile: compiles lowered programs with the real TPU compiler, for slices that are not there.

A question is {"hlo": FILE, "manifest": …, "topology": "v5e:2x4"}, or {"versions": true}. libtpu's client is reached by
parts of jax that are not its public interface, which is why the versions are pinned exactly.
"""

import collections
import importlib.metadata
import os
import re
import time
from pathlib import Path
from typing import Any

# Before jax is imported: no TPU is looked for, neither on this machine nor in Google Cloud's metadata, and several
# processes may compile at a time, since none holds one.
os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD="true",
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-8",
    TPU_WORKER_HOSTNAMES="localhost",
)

import jax
import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jax.experimental import topologies
from jaxlib.mlir import ir

from pipeline.tpu import hlo
from pipeline.tpu.chips import parse_topology
from pipeline.worker import serve

_SIZE = r"(?P<{0}>[\d.]+)(?P<{0}_unit>[KMG]?)"
_OUT_OF_HBM = tuple(
    re.compile(pattern.format(_SIZE.format("used"), _SIZE.format("has")))
    for pattern in (r"\({}\) exceeds available HBM \({}\)", r"Used {} of {} hbm")
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    if question.get("versions"):
        return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    computation = read(Path(question["hlo"]))
    began = time.monotonic()
    try:
        executable = _compile(computation, question["manifest"], question["topology"])
    except jax.errors.JaxRuntimeError as error:
        return {"compiles": False, "seconds": time.monotonic() - began, **_refusal(str(error))}
    return {"compiles": True, "seconds": time.monotonic() - began, **_figures(executable, computation, question)}


def read(path: Path) -> Any:
    """The program of a file."""
    return xla_client.XlaComputation(path.read_bytes())


def to_mlir(computation: Any, manifest: dict[str, Any]) -> Any:
    """A program as the compiler takes it, with the state updated in place; inside an MLIR context.

    Raises:
        RuntimeError: the program does not have the arguments and results of the manifest.
    """
    module = ir.Module.parse(xla_client._xla.mlir.xla_computation_to_mlir_module(computation))
    main = next(op for op in module.body.operations if op.attributes["sym_name"].value == "main")
    arguments, results = ([t["name"] for t in manifest[kind]] for kind in ("arguments", "results"))
    if (len(main.type.inputs), len(main.type.results)) != (len(arguments), len(results)):
        raise RuntimeError(
            f"the program has {len(main.type.inputs)} arguments and {len(main.type.results)} results, its manifest "
            f"{len(arguments)} and {len(results)}"
        )
    result_of = {name: index for index, name in enumerate(results)}
    main.attributes["arg_attrs"] = ir.ArrayAttr.get([_donated(result_of.get(name)) for name in arguments])
    return module


def _donated(result: int | None) -> Any:
    """An argument's attributes: the memory of a leaf of the state is that of its new value."""
    if result is None:
        return ir.DictAttr.get({})
    index = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), result)
    return ir.DictAttr.get({"tf.aliasing_output": index})


def options(replicas: int) -> Any:
    """Of the compiler: one program, so many replicas."""
    return compiler.get_compile_options(
        num_replicas=replicas, num_partitions=1, device_assignment=np.arange(replicas).reshape(-1, 1)
    )


def _compile(computation: Any, manifest: dict[str, Any], name: str) -> Any:
    chip = parse_topology(name).chip
    devices = topologies.get_topology_desc(topology_name=name, platform="tpu", **dict(chip.compiler_options)).devices
    if len(devices) != manifest["replicas"]:
        raise RuntimeError(f"{name} has {len(devices)} devices, the program {manifest['replicas']} replicas")
    with mlir.make_ir_context():
        module = to_mlir(computation, manifest)
        return devices[0].client.compile(module, xla_client.DeviceList(tuple(devices)), options(len(devices)))


def _refusal(said: str) -> dict[str, Any]:
    """The compiler's reason; for want of memory with the bytes that it needed and had."""
    if memory := next(filter(None, (pattern.search(said) for pattern in _OUT_OF_HBM)), None):
        used, has = (float(memory[n]) * _UNITS[memory[n + "_unit"]] for n in ("used", "has"))
        return {"reason": "out of memory", "needed": int(used), "available": int(has), "said": said[:4000]}
    return {"reason": said.partition("\n")[0][:300], "said": said[:4000]}


def _figures(executable: Any, computation: Any, question: dict[str, Any]) -> dict[str, Any]:
    memory = executable.get_compiled_memory_stats()
    cost = executable.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    text = executable.hlo_modules()[0].to_string()
    lowered, replicas = computation.get_hlo_module().to_string(), question["manifest"]["replicas"]
    return {
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "in_place": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        },
        "exchanged": [vars(c) for c in hlo.collectives(lowered, lowered, replicas)],
        "collectives": [vars(c) for c in hlo.collectives(lowered, text, replicas)],
        "collective_instructions": collections.Counter(i.kind for i in hlo.instructions(text) if i.kind),
        "bytes_by_part": hlo.bytes_by_part(text),
        "hbm_bytes_by_part": hlo.bytes_by_part(text, hbm_only=True),
        "cycles_by_part": hlo.cycles_by_part(text),
    }


if __name__ == "__main__":
    serve(answer)
