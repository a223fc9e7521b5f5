"""gRPC by TensorFlow Serving's public client: Predict, metadata, status, health, reflection, codes of errors."""

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, predict_pb2

CODE = grpc.StatusCode


def request(name="half_plus_two", signature="", **inputs) -> predict_pb2.PredictRequest:
    made = predict_pb2.PredictRequest()
    made.model_spec.name = name
    made.model_spec.signature_name = signature
    for key, value in inputs.items():
        made.inputs[key].CopyFrom(value if isinstance(value, tensor_pb2.TensorProto) else tf.make_tensor_proto(value))
    return made


def refused(function, message, **options) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        function(message, timeout=20, **options)
    return caught.value.code(), caught.value.details()


def test_predict_gives_the_outputs_and_which_model_they_are_of(half):
    answer = half.prediction.Predict(request(x=np.float32([[1, 2], [3, 4]])), timeout=20)
    np.testing.assert_array_equal(tf.make_ndarray(answer.outputs["y"]), [[2.5, 3], [3.5, 4]])
    assert list(answer.outputs["y"].float_val) == [2.5, 3, 3.5, 4]
    spec = answer.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("half_plus_two", 123, "serving_default")


def test_several_inputs_and_outputs_of_all_types(half):
    inputs = {
        "tag": [b"a", b"\xffbc"],
        "signal": np.int32([[1] * 5, [2] * 5]),
        "sensor": np.ones((2, 2, 2), np.float32),
    }
    answer = half.prediction.Predict(request(signature="named", **inputs), timeout=20)
    found = {name: tf.make_ndarray(value).tolist() for name, value in answer.outputs.items()}
    tags = [b"a", b"\xffbc"]
    assert found == {"length": [1, 3], "total": [5, 10], "mean": [1, 1], "copy_bytes": tags, "tag": tags}


def test_an_output_filter_chooses(half):
    inputs = {"tag": [b"a"], "signal": np.int32([[1] * 5]), "sensor": np.ones((1, 2, 2), np.float32)}
    asked = request(signature="named", **inputs)
    asked.output_filter.extend(["total", "mean"])
    assert set(half.prediction.Predict(asked, timeout=20).outputs) == {"total", "mean"}
    asked.output_filter.append("nothing")
    assert refused(half.prediction.Predict, asked)[0] is CODE.INVALID_ARGUMENT


def test_a_version_or_its_label_can_be_named(half):
    asked = request(x=np.float32([1]))
    asked.model_spec.version.value = 123
    assert half.prediction.Predict(asked, timeout=20).outputs["y"].float_val[0] == 2.5
    asked.model_spec.version_label = "stable"
    assert half.prediction.Predict(asked, timeout=20).outputs["y"].float_val[0] == 2.5


def test_a_tensor_may_be_packed_or_repeat_one_value(half):
    packed = tf.make_tensor_proto(np.float32([1, 2]))
    assert packed.tensor_content
    assert list(half.prediction.Predict(request(x=packed), timeout=20).outputs["y"].float_val) == [2.5, 3]
    repeated = tf.make_tensor_proto(np.float32(4), shape=[3])
    assert list(half.prediction.Predict(request(x=repeated), timeout=20).outputs["y"].float_val) == [4, 4, 4]


def wrong_version() -> predict_pb2.PredictRequest:
    asked = request(x=np.float32([1]))
    asked.model_spec.version.value = 99
    return asked


def wrong_label() -> predict_pb2.PredictRequest:
    asked = request(x=np.float32([1]))
    asked.model_spec.version_label = "canary"
    return asked


def huge() -> tensor_pb2.TensorProto:
    return tensor_pb2.TensorProto(dtype=1, tensor_shape=tf.TensorShape([2**20, 2**20]).as_proto(), float_val=[1.0])


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        (request("foo", x=np.float32([1])), CODE.NOT_FOUND, "Servable not found for request: Latest(foo)"),
        (wrong_version(), CODE.NOT_FOUND, "Specific(half_plus_two, 99)"),
        (wrong_label(), CODE.INVALID_ARGUMENT, "Unrecognized servable version label"),
        (request(signature="no", x=np.float32([1])), CODE.INVALID_ARGUMENT, '"no" not found in signature def'),
        (request(), CODE.INVALID_ARGUMENT, "the inputs are none, not x"),
        (request(z=np.float32([1])), CODE.INVALID_ARGUMENT, "the inputs are z, not x"),
        (request(x=np.int32([1])), CODE.INVALID_ARGUMENT, "has type int32, not float32"),
        (request(x=[b"a"]), CODE.INVALID_ARGUMENT, "has type string, not float32"),
        (request(x=tensor_pb2.TensorProto(dtype=99)), CODE.INVALID_ARGUMENT, "has type number 99, not float32"),
        (request(x=np.float32(1)), CODE.INVALID_ARGUMENT, "has shape []"),
        (request(x=np.zeros((0, 2), np.float32)), CODE.INVALID_ARGUMENT, "at least one"),
        (request(x=huge()), CODE.INVALID_ARGUMENT, "is over"),
        (
            request(
                x=tensor_pb2.TensorProto(dtype=1, tensor_shape=tf.TensorShape([3]).as_proto(), tensor_content=b"12")
            ),
            CODE.INVALID_ARGUMENT,
            "has not the values of its shape",
        ),
        (request(signature="one_number", x=np.float32([1, 2])), CODE.INVALID_ARGUMENT, "one row for each instance"),
    ],
)
def test_what_is_wrong_gets_its_code(half, asked, code, words):
    found, details = refused(half.prediction.Predict, asked)
    assert found is code
    assert words in details


def test_bytes_that_are_no_message_are_an_invalid_argument(half):
    call = half.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    code, details = refused(call, b"\xff\xff\xff\xff")
    assert code is CODE.INVALID_ARGUMENT
    assert "no PredictRequest" in details


def test_other_apis_are_unimplemented(half):
    call = half.channel.unary_unary("/tensorflow.serving.PredictionService/Classify")
    assert refused(call, b"")[0] is CODE.UNIMPLEMENTED


def test_a_message_over_the_limit_is_refused_while_it_comes(half):
    asked = request(x=np.zeros(9 * 2**20, np.float32))
    assert refused(half.prediction.Predict, asked)[0] is CODE.RESOURCE_EXHAUSTED


def test_metadata_are_the_signatures(half):
    asked = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    asked.model_spec.name = "half_plus_two"
    answer = half.prediction.GetModelMetadata(asked, timeout=20)
    found = get_model_metadata_pb2.SignatureDefMap()
    answer.metadata["signature_def"].Unpack(found)
    assert {"serving_default", "named", "one_number"} <= set(found.signature_def)
    assert answer.model_spec.version.value == 123
    asked.metadata_field[:] = ["nothing"]
    assert refused(half.prediction.GetModelMetadata, asked)[0] is CODE.INVALID_ARGUMENT
    asked.metadata_field[:] = []
    assert refused(half.prediction.GetModelMetadata, asked)[0] is CODE.INVALID_ARGUMENT


def test_status_is_that_of_the_versions(half):
    asked = get_model_status_pb2.GetModelStatusRequest()
    assert refused(half.models.GetModelStatus, asked)[0] is CODE.INVALID_ARGUMENT
    asked.model_spec.name = "half_plus_two"
    (one,) = half.models.GetModelStatus(asked, timeout=20).model_version_status
    assert (one.version, one.state) == (123, get_model_status_pb2.ModelVersionStatus.AVAILABLE)
    asked.model_spec.version.value = 99
    assert refused(half.models.GetModelStatus, asked)[0] is CODE.NOT_FOUND
    asked.model_spec.version_label = "canary"
    assert refused(half.models.GetModelStatus, asked)[0] is CODE.INVALID_ARGUMENT
    asked.model_spec.version_label = "stable"
    (one,) = half.models.GetModelStatus(asked, timeout=20).model_version_status
    assert one.version == 123


@pytest.mark.parametrize(("names", "words"), [(["no"], "not found in signature: no"), (["y", "y"], "twice")])
def test_an_output_filter_that_is_wrong_is_refused_before_anything_is_computed(half, names, words):
    asked = request(x=np.float32([1]))
    asked.output_filter.extend(names)
    batches = half.metric("batch_rows_count ")
    code, details = refused(half.prediction.Predict, asked)
    assert code is CODE.INVALID_ARGUMENT
    assert words in details
    assert half.metric("batch_rows_count ") == batches


def test_a_request_without_a_model_spec_is_an_invalid_argument(half):
    metadata = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    for call, asked in (
        (half.prediction.Predict, predict_pb2.PredictRequest()),
        (half.prediction.GetModelMetadata, metadata),
        (half.models.GetModelStatus, get_model_status_pb2.GetModelStatusRequest()),
    ):
        assert refused(call, asked) == (CODE.INVALID_ARGUMENT, "Missing ModelSpec")


def test_health_and_reflection_answer(half):
    stub = health_pb2_grpc.HealthStub(half.channel)
    for service in ("", "tensorflow.serving.PredictionService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    ask = reflection_pb2.ServerReflectionRequest
    call = reflection_pb2_grpc.ServerReflectionStub(half.channel).ServerReflectionInfo
    questions = [ask(list_services=""), ask(file_containing_symbol="tensorflow.serving.PredictionService")]
    services, file = call(iter(questions), timeout=20)
    names = {service.name for service in services.list_services_response.service}
    assert {"tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"} <= names
    assert file.file_descriptor_response.file_descriptor_proto
