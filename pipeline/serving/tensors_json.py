"""TensorFlow Serving's row and column form: JSON to tensors and back.

https://www.tensorflow.org/tfx/serving/api_rest and tensorflow_serving/util/json_tensor.cc say how, `NaN` and `Infinity`
included, which JSON does not have. A row that failed is null in place of each of its numbers, so that shapes stay;
`errors` beside it, an addition to TensorFlow Serving's answer, says why. Messages name the place of what is wrong and
never quote it.
"""

import base64
import binascii
import contextlib
import itertools
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import orjson

from pipeline.serving.batching import Result, check_rows
from pipeline.serving.model import Signature, Spec
from pipeline.serving.refusal import Refused, invalid

Form = Literal["instances", "inputs"]
_ANSWER: dict[Form, str] = {"instances": "predictions", "inputs": "outputs"}
_MAX_RANK = 8
# What is parsed holds the interpreter's lock meanwhile: each of these bounds keeps that to 0.1 s, against 0.4 s.
_MAX_LISTS = 500_000  # lists and objects in a document: each costs 20 times its bytes once it is parsed
_MAX_VALUES = 1_500_000
_NOT_FINITE = {
    "nan": orjson.Fragment(b"NaN"),
    "inf": orjson.Fragment(b"Infinity"),
    "-inf": orjson.Fragment(b"-Infinity"),
}
_KINDS: dict[str, tuple[set[type], str]] = {
    "f": ({int, float}, "number"),
    "i": ({int}, "integer"),
    "u": ({int}, "integer"),
    "b": ({bool}, "boolean"),
    "O": ({str, dict}, 'string or {"b64": …}'),
}


def parse(body: bytes | bytearray) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        Refused: INVALID_ARGUMENT, it holds none, or is nested too deep.
    """
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    if body.count(b"[") + body.count(b"{") > _MAX_LISTS:
        raise invalid(f"the document has more than {_MAX_LISTS} lists and objects; send fewer instances, or use gRPC")
    if body.count(b",") >= _MAX_VALUES:
        raise invalid(f"the document has more than {_MAX_VALUES} values; send fewer instances, or use gRPC")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        document = _with_non_finite(body, error)
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {_type(document)} Is not object")
    return document


def _with_non_finite(body: bytes | bytearray, error: orjson.JSONDecodeError) -> Any:
    """What a body holds that strict JSON refuses, if NaN or Infinity can be why."""
    if b"NaN" in body or b"Infinity" in body:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(body)
    raise invalid(f"JSON Parse error: {error.msg} at offset: {error.pos}") from None


def check_count(document: Mapping[str, Any], most: int) -> None:
    """Refuses more instances than could ever be admitted, before any of them is looked at.

    Raises:
        Refused: INVALID_ARGUMENT.
    """
    inputs = document.get("inputs")
    columns = inputs.values() if isinstance(inputs, dict) else (inputs,)
    for rows in (document.get("instances"), *columns):
        if isinstance(rows, list):
            check_rows(len(rows), most)


def signature_name(document: Mapping[str, Any]) -> str:
    """The signature that a request names; empty for the default one.

    Raises:
        Refused: INVALID_ARGUMENT.
    """
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid("JSON Value not formatted correctly. 'signature_name' key must be a string value.")
    _utf8(name, "signature_name")
    return name


def tensors(document: Mapping[str, Any], signature: Signature) -> tuple[Form, dict[str, np.ndarray]]:
    """The inputs in a request.

    Raises:
        Refused: INVALID_ARGUMENT, in TensorFlow Serving's words where it has some.
    """
    if "instances" in document and "inputs" in document:
        raise invalid("Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist")
    if "instances" in document:
        return "instances", _from_rows(document["instances"], signature)
    if "inputs" in document:
        return "inputs", _from_columns(document["inputs"], signature)
    raise invalid("Missing 'inputs' or 'instances' key")


def answer(form: Form, result: Result) -> bytes:
    """A result in the form of its request."""
    columns = {name: _plain(rows, name.endswith("_bytes"), result.errors) for name, rows in result.outputs.items()}
    if len(columns) == 1:
        (value,) = columns.values()
    elif form == "inputs":
        value = columns
    else:
        value = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    document: dict[str, Any] = {_ANSWER[form]: value}
    if result.errors:
        document["errors"] = [{"index": index, "error": text} for index, text in sorted(result.errors.items())]
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def error(message: str) -> bytes:
    """An error as TensorFlow Serving tells it."""
    return orjson.dumps({"error": message})


def _from_rows(instances: Any, signature: Signature) -> dict[str, np.ndarray]:
    if not isinstance(instances, list):
        raise invalid("Excepting 'instances' to be an list/array")
    if not instances:
        raise invalid("No values in 'instances' array")
    named = _is_named(instances[0])
    if not named and len(signature.inputs) > 1:
        raise invalid("instances is a plain list, but expecting list of objects as multiple input tensors required")
    for index, instance in enumerate(instances):
        if _is_named(instance) != named:
            got, want = ("object", "value/list") if not named else ("value/list", "object")
            raise invalid(f"Expecting {want} but got {got} at item {index} of input list")
        if named and instance.keys() != signature.inputs.keys():
            raise invalid(
                f"Failed to process element: {index} of 'instances' list. keys must be equal to: "
                f"{','.join(signature.inputs)}"
            )
    return {
        name: _tensor([instance[name] for instance in instances] if named else instances, spec, "instances")
        for name, spec in signature.inputs.items()
    }


def _from_columns(inputs: Any, signature: Signature) -> dict[str, np.ndarray]:
    if not _is_named(inputs):
        if len(signature.inputs) > 1:
            raise invalid("inputs is a plain value/list, but expecting an object as multiple input tensors required")
        (spec,) = signature.inputs.values()
        return {spec.name: _tensor(inputs, spec, "inputs")}
    for name in signature.inputs:
        if name not in inputs:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
    return {name: _tensor(inputs[name], spec, f"inputs.{name}") for name, spec in signature.inputs.items()}


def _is_named(value: Any) -> bool:
    """Whether it is an object of named inputs, and not {"b64": …}."""
    return isinstance(value, dict) and not _is_b64(value)


def _is_b64(value: dict) -> bool:
    return len(value) == 1 and isinstance(value.get("b64"), str)


def _tensor(value: Any, spec: Spec, where: str) -> np.ndarray:
    """Nested lists as a tensor, level by level, so that depth costs no stack."""
    shape: list[int] = []
    leaves = [value]
    while leaves and isinstance(leaves[0], list):
        size = len(leaves[0])
        if not all(isinstance(leaf, list) and len(leaf) == size for leaf in leaves):
            raise invalid(f"{where}: lists at level {len(shape)} differ in size, or stand beside values")
        shape.append(size)
        if len(shape) > _MAX_RANK:
            raise invalid(f"{where}: lists are nested deeper than {_MAX_RANK}")
        leaves = list(itertools.chain.from_iterable(leaves))
    return _leaves(leaves, spec, where).reshape(shape)


def _leaves(leaves: list[Any], spec: Spec, where: str) -> np.ndarray:
    types, wanted = _KINDS[spec.dtype.kind]
    if not set(map(type, leaves)) <= types:
        index, found = next((i, leaf) for i, leaf in enumerate(leaves) if type(leaf) not in types)
        raise invalid(f"{where}: value {index} has Type: {_type(found)}, is not of expected type: {wanted}")
    if spec.dtype == object:
        array = np.empty(len(leaves), object)
        array[:] = [_bytes(leaf, f"{where}[{index}]") for index, leaf in enumerate(leaves)]
        return array
    if spec.dtype.kind == "f":
        return _floats(leaves, spec, where)
    try:
        array = np.array(leaves, np.int64)
    except OverflowError:
        raise _lossy(where, spec) from None
    if array.size and spec.dtype.kind != "b":
        limits = np.iinfo(spec.dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise _lossy(where, spec)
    return array.astype(spec.dtype)


def _floats(leaves: list[Any], spec: Spec, where: str) -> np.ndarray:
    """Numbers; one that the type would not hold as it was written is refused, as TensorFlow Serving does.

    That is a whole number of more digits than the type has, and any beyond its range; not a fraction that it rounds.
    """
    try:
        array = np.array(leaves, np.float64)
    except OverflowError:
        raise _lossy(where, spec) from None
    limits = np.finfo(spec.dtype)
    sizes = np.abs(array)
    whole = 2.0 ** (limits.nmant + 1) - 1
    suspects = np.flatnonzero((sizes > whole) & np.isfinite(array)).tolist()
    if any(sizes[index] > limits.max or isinstance(leaves[index], int) for index in suspects):
        raise _lossy(where, spec)
    return array.astype(spec.dtype)


def _lossy(where: str, spec: Spec) -> Refused:
    return invalid(f"{where}: Cannot convert JSON value to {spec.dtype} without loss of precision.")


def _bytes(leaf: str | dict, where: str) -> bytes:
    if isinstance(leaf, str):
        return _utf8(leaf, where)
    if not _is_b64(leaf):
        raise invalid(f"{where}: not formatted correctly for base64 data")
    text: str = leaf["b64"]
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"{where}: Unable to base64 decode") from None


def _utf8(text: str, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise invalid(f"{where}: half of a surrogate pair is no character") from None


def _plain(rows: np.ndarray, binary: bool, errors: Mapping[int, str]) -> Any:
    """A tensor as orjson writes it, with null for what failed."""
    if rows.dtype == object:
        return _strings(rows.tolist(), binary)
    odd = np.argwhere(~np.isfinite(rows)).tolist() if rows.dtype.kind == "f" else []
    if all(index in errors for index, *_ in odd) and (odd or not errors):
        return np.ascontiguousarray(rows)  # of which orjson writes NaN as null
    flat = np.empty(rows.size, object)
    flat[:] = list(rows.ravel())  # NumPy's own scalars, which orjson writes in the digits of their type
    values = flat.reshape(rows.shape)
    for place in map(tuple, odd):
        values[place] = _NOT_FINITE[str(rows[place])]
    values[list(errors)] = None
    return values.tolist()


def _strings(value: Any, binary: bool) -> Any:
    if isinstance(value, list):
        return [_strings(part, binary) for part in value]
    return {"b64": base64.b64encode(value).decode()} if binary else value.decode(errors="replace")


def _type(value: Any) -> str:
    names = {dict: "Object", list: "Array", str: "String", bool: "Bool", type(None): "Null"}
    return names.get(type(value), "Number")
