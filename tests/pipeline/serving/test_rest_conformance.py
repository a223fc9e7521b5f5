"""REST as TensorFlow Serving documents it: its examples and its error codes, case by case, by plain requests.

The cases are those of tensorflow_serving/g3doc/api_rest.md, model_servers/http_rest_api_handler_test.cc and
util/json_tensor_test.cc.
"""

import base64
import gzip
import json

import pytest
import requests

NAME = "/v1/models/half_plus_two"


def b64(data: bytes) -> dict:
    return {"b64": base64.b64encode(data).decode()}


def named(**changed) -> str:
    inputs = {"tag": ["a"], "signal": [[1, 2, 3, 4, 5]], "sensor": [[[1, 2], [3, 4]]]} | changed
    return json.dumps({"signature_name": "named", "inputs": inputs})


@pytest.mark.parametrize("where", ["", "/versions/123", "/labels/stable"])
@pytest.mark.parametrize(
    ("instances", "predictions"),
    [
        ([1.0, 2.0, 5.0], [2.5, 3.0, 4.5]),
        ([1, 2], [2.5, 3.0]),
        ([[1.0, 2.0], [3.0, 4.0]], [[2.5, 3.0], [3.5, 4.0]]),
        ([[[1, 2]], [[3, 4]]], [[[2.5, 3.0]], [[3.5, 4.0]]]),
        ([{"x": 3.0}, {"x": 4.0}], [3.5, 4.0]),
        ([1, 2.0, 5.003, 0.007], [2.5, 3.0, 4.5015, 2.0035]),
        ([16_777_214, -16_777_214], [8_388_609.0, -8_388_605.0]),
        ([1e10, 16_777_216.0], [5e9, 8_388_610.0]),
    ],
)
def test_the_row_form_gives_predictions(half, where, instances, predictions):
    answer = half.post(f"{NAME}{where}:predict", json={"instances": instances})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {"predictions": predictions}


@pytest.mark.parametrize("inputs", [[3.0, 4.0], {"x": [3.0, 4.0]}])
def test_the_column_form_gives_outputs(half, inputs):
    answer = half.post(f"{NAME}:predict", json={"signature_name": "serving_default", "inputs": inputs})
    assert answer.json() == {"outputs": [3.5, 4.0]}


ROWS = [
    {"tag": "foo", "signal": [1, 2, 3, 4, 5], "sensor": [[1, 2], [3, 4]]},
    {"tag": b64(b"\xffar"), "signal": [3, 4, 1, 2, 5], "sensor": [[4, 5], [6, 8]]},
]


def test_several_named_tensors_go_in_and_out_in_both_forms(half):
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    answers = [
        half.post(f"{NAME}:predict", json={"signature_name": "named", **body}).json()
        for body in ({"instances": ROWS}, {"inputs": columns})
    ]
    outputs = answers[1]["outputs"]
    assert outputs == {
        "copy_bytes": [b64(b"foo"), b64(b"\xffar")],
        "length": [3, 3],
        "mean": [2.5, 5.75],
        "tag": ["foo", "\ufffdar"],
        "total": [15, 15],
    }
    assert answers[0]["predictions"] == [{name: column[row] for name, column in outputs.items()} for row in range(2)]


@pytest.mark.parametrize("key", ["instances", "inputs"])
def test_numbers_that_are_not_finite_go_in_and_out_by_their_names(half, key):
    answer = half.post(f"{NAME}:predict", data=f'{{"{key}": [[NaN, 0.2], [Infinity, -Infinity]]}}')
    assert answer.status_code == 200
    assert answer.text.partition(":")[2] == "[[NaN,2.1],[Infinity,-Infinity]]}"


def test_the_status_of_a_model_is_that_of_its_versions(half):
    version = {"version": "123", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    for path in (NAME, f"{NAME}/versions/123", f"{NAME}/labels/stable"):
        assert half.get(path).json() == {"model_version_status": [version]}


@pytest.mark.parametrize("where", ["", "/versions/123", "/labels/stable"])
def test_the_metadata_of_a_model_are_its_signatures(half, where):
    document = half.get(f"{NAME}{where}/metadata").json()
    assert document["model_spec"] == {"name": "half_plus_two", "signature_name": "", "version": "123"}
    signatures = document["metadata"]["signature_def"]["signature_def"]
    assert signatures["serving_default"]["inputs"]["x"]["tensor_shape"] == {"dim": [], "unknown_rank": True}
    named = signatures["named"]
    assert named["method_name"] == "tensorflow/serving/predict"
    assert named["inputs"]["sensor"]["dtype"] == "DT_FLOAT"
    assert [dim["size"] for dim in named["inputs"]["sensor"]["tensor_shape"]["dim"]] == ["-1", "2", "2"]


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("GET", "/v1/foo", "Malformed request: GET /v1/foo"),
        ("POST", "/v1/foo", "Malformed request: POST /v1/foo"),
        ("GET", "/v1/models", "Missing model name"),
        ("GET", "/v1/models/debug/model_name", "Malformed request"),
        ("POST", "/v1/models", "Malformed request"),
        ("GET", "/v1/models/foo:predict", "Malformed request"),
        ("GET", "/v1/models/foo/version/50:predict", "Malformed request"),
        ("POST", "/v1/models/foo/version/50:regress", "Malformed request"),
        ("POST", "/v1/models/foo/versions/HELLO:regress", "Malformed request"),
        ("POST", f"/v1/models/foo/versions/{2**64 - 1}:regress", "Failed to convert version"),
        ("POST", "/v1/models/foo/metadata", "Malformed request"),
        ("POST", "/v1/models/foo/label/some_label:regress", "Malformed request"),
        ("POST", "/v1/models/foo/versions/50/labels/some_label:regress", "Malformed request"),
        ("POST", "/v1/models/foo/versions/some_label:regress", "Malformed request"),
        ("PUT", f"{NAME}:predict", "Malformed request: PUT"),
        ("DELETE", NAME, "Malformed request: DELETE"),
    ],
)
def test_a_malformed_request_is_400(half, method, path, words):
    answer = requests.request(method, half.rest + path, timeout=10)
    assert answer.status_code == 400
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/models/foo:predict", "Servable not found for request: Latest(foo)"),
        ("/v1/models/foo/versions/50:predict", "Servable not found for request: Specific(foo, 50)"),
        (f"{NAME}/versions/99:predict", "Servable not found for request: Specific(half_plus_two, 99)"),
        (f"{NAME}99:predict", "Servable not found"),
    ],
)
def test_an_unknown_model_or_version_is_404(half, path, words):
    answer = half.post(path, json={"instances": [1]})
    assert (answer.status_code, words in answer.json()["error"]) == (404, True)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/models/foo", "Could not find any versions of model foo"),
        (f"{NAME}/versions/99", "Could not find version 99 of model half_plus_two"),
        ("/v1/models/foo/metadata", "Servable not found for request: Latest(foo)"),
        (f"{NAME}/versions/99/metadata", "Servable not found for request: Specific(half_plus_two, 99)"),
        ("/index", "no such page"),
    ],
)
def test_the_status_of_what_is_not_there_is_404(half, path, words):
    answer = half.get(path)
    assert (answer.status_code, words in answer.json()["error"]) == (404, True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "JSON Parse error: The document is empty"),
        ("instances = [1, 2]", "JSON Parse error: "),
        ('{"instances": [1, 2}', "JSON Parse error: "),
        ("[1]", "Is not object"),
        ("{}", "Missing 'inputs' or 'instances' key"),
        ('{"instances": ["x", "y"]}', "is not of expected type: number"),
        ('{"instances": [true]}', "is not of expected type: number"),
        ('{"instances": [null]}', "Type: Null"),
        ('{"signature_name": 100}', "'signature_name' key must be a string value."),
        ('{"signature_name": "no", "instances": [1]}', 'Serving signature name: "no" not found in signature def'),
        ('{"instances": [1], "inputs": [1]}', "only one of 'inputs' or 'instances' keys"),
        ('{"instances": 5}', "to be an list/array"),
        ('{"instances": []}', "No values in 'instances' array"),
        ('{"instances": [[1], [1, 2]]}', "differ in size"),
        ('{"instances": [1, [2]]}', "is not of expected type"),
        ('{"instances": [[1], 2]}', "stand beside values"),
        ('{"instances": [{"x": 1}, 2]}', "Expecting object but got value/list at item 1"),
        ('{"instances": [1, {"x": 2}]}', "Expecting value/list but got object at item 1"),
        ('{"instances": [{"y": 1}]}', "keys must be equal to: x"),
        ('{"inputs": {"y": 1}}', "Missing named input: x"),
        ('{"inputs": 5}', "has shape [], not [any, …]"),
        ('{"instances": [1e300]}', "without loss of precision"),
        ('{"instances": [16777216]}', "without loss of precision"),
        ('{"instances": [[1.5], [-16777217]]}', "without loss of precision"),
        ('{"instances": [NaN, 1}', "JSON Parse error: "),
        ('{"instances": [NaN], "signature_name": "\\ud800"}', "half of a surrogate pair"),
        ('{"signature_name": ["NaN", NaN]}', "'signature_name' key must be a string value."),
        ('{"signature_name": "named", "instances": [1]}', "expecting list of objects"),
        ('{"signature_name": "named", "inputs": [1]}', "expecting an object"),
        ('{"signature_name": "one_number", "instances": [1, 2]}', "has not one row for each instance"),
        (
            named(signal=[[1, 2, 3]]),
            "input signal has shape [1, 3], not [any, 5]",
        ),
        (
            named(tag=["a", "b"]),
            "the same number of instances",
        ),
        (
            named(tag=[{"b64": "*"}]),
            "Unable to base64 decode",
        ),
        (
            named(tag=[{"b64": 1}]),
            "not formatted correctly for base64 data",
        ),
        (
            named(tag=[{"b64": "YQ==", "x": 1}]),
            "not formatted correctly for base64 data",
        ),
        (
            named(signal=[[1, 2, 3, 4, 5.0]]),
            "is not of expected type: integer",
        ),
        (
            named(signal=[[1, 2, 3, 4, 5_000_000_000]]),
            "without loss of precision",
        ),
    ],
)
def test_a_body_that_is_wrong_is_400_with_what_is_wrong(half, body, words):
    answer = half.post(f"{NAME}:predict", data=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]


def test_an_unknown_label_and_another_api_are_400(half):
    unknown = f"{NAME}/labels/nonexistent"
    for answer in (
        half.post(f"{unknown}:predict", json={"instances": [1]}),
        half.get(unknown),
        half.get(f"{unknown}/metadata"),
    ):
        assert (answer.status_code, "Unrecognized servable version label" in answer.text) == (400, True)
    for method in ("classify", "regress"):
        answer = half.post(f"{NAME}:{method}", json={"examples": [{"x": 1.0}]})
        assert (answer.status_code, f"tensorflow/serving/{method}" in answer.text) == (400, True)


def test_paths_may_be_written_in_capitals_and_escaped(half):
    assert half.post("/V1/MODELS/half%5Fplus%5Ftwo:PREDICT", json={"instances": [1.0]}).json() == {"predictions": [2.5]}


def test_base64_may_lack_its_padding(half):
    tag = {"b64": base64.b64encode(b"a").decode().rstrip("=")}
    inputs = {"tag": [tag], "signal": [[1, 2, 3, 4, 5]], "sensor": [[[1, 2], [3, 4]]]}
    answer = half.post(f"{NAME}:predict", json={"signature_name": "named", "inputs": inputs})
    assert answer.json()["outputs"]["tag"] == ["a"]


def test_a_compressed_body_is_read(half):
    body, headers = gzip.compress(b'{"instances": [1.0]}'), {"Content-Encoding": "gzip"}
    assert half.post(f"{NAME}:predict", data=body, headers=headers).json() == {"predictions": [2.5]}


def test_a_compressed_body_that_is_damaged_is_400_and_counted(half):
    body = gzip.compress(b'{"instances": [1.0]}')
    before = half.metric('requests_total{api="rest",code="INVALID_ARGUMENT",method="predict"}')
    damaged = [b"notgzip", body[:-12], body[:12] + bytes(6) + body[18:], body + b"more"]
    for data in damaged:
        answer = half.post(f"{NAME}:predict", data=data, headers={"Content-Encoding": "gzip"})
        assert (answer.status_code, "compressed" in answer.json()["error"]) == (400, True)
    assert half.metric('requests_total{api="rest",code="INVALID_ARGUMENT",method="predict"}') == before + len(damaged)


def test_head_answers_as_get_without_a_body(half):
    for path in ("/healthz", "/readyz", "/metrics", NAME):
        answer = requests.head(half.rest + path, timeout=10)
        assert (answer.status_code, answer.content) == (200, b"")
    assert requests.head(half.rest + "/index", timeout=10).status_code == 404


def test_health_and_metrics_are_told(half):
    assert half.get("/healthz").status_code == 200
    assert half.get("/readyz").json() == {"status": "ok"}
    before = half.metric('requests_total{api="rest",code="OK",method="predict"}')
    half.post(f"{NAME}:predict", json={"instances": [1.0]})
    assert half.metric('requests_total{api="rest",code="OK",method="predict"}') == before + 1
    assert half.metric("version ") == 123
    assert half.metric("queue_rows ") == 0
    assert half.metric("batch_rows_count ") > 0
    assert half.get("/monitoring/prometheus/metrics").text.startswith("# HELP")
