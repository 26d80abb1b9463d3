"""NVIDIA's tritonclient over HTTP and gRPC, as its users call it."""
import base64
import json
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path
from queue import Queue

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

HTTP, GRPC = sys.argv[1:]
MODEL = "nf_regnet_cifar10"
PHOTOGRAPH = (Path(__file__).resolve().parent.parent / "data" / "cat.jpg").read_bytes()


def classify(image):
    """What /v1 says."""
    request = urllib.request.Request(f"http://{HTTP}/v1/classify?top_k=3", data=image)
    return json.load(urllib.request.urlopen(request))["results"][0]["predictions"]


def refused(call, *words):
    try:
        call()
    except InferenceServerException as error:
        assert all(word in str(error) for word in words), error
        return
    raise AssertionError(f"not refused: {words}")


def tensors(kind, array, datatype, **more):
    one = kind.InferInput("input", list(array.shape), datatype)
    one.set_data_from_numpy(array, **more)
    return [one]


def told(client, config, statistics):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready(MODEL) and client.is_model_ready(MODEL, "1")
    assert config["max_batch_size"] >= 1 and config["backend"] == "onnxruntime"
    stats = statistics["model_stats"][0]
    assert stats["name"] == MODEL
    for block in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert int(stats["inference_stats"][block]["count"]) > 0, (block, stats)
    assert int(stats["inference_count"]) >= int(stats["execution_count"]) > 0


def over_http(images):
    client = http.InferenceServerClient(HTTP, concurrency=4)
    metadata = client.get_model_metadata(MODEL)
    assert metadata["inputs"][0]["shape"] == [-1, 3, *images.shape[2:]], metadata
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    binary = client.infer(MODEL, tensors(http, images, "FP32"), request_id="seven")
    logits = binary.as_numpy("logits")
    assert logits.shape == (len(images), 10) and binary.get_response()["id"] == "seven"
    text = http.InferRequestedOutput("logits", binary_data=False)
    as_json = client.infer(MODEL, tensors(http, images, "FP32", binary_data=False), outputs=[text])
    assert as_json.as_numpy("logits").tobytes() == logits.tobytes(), "JSON and bytes differ"
    for encoding in ("gzip", "deflate"):
        again = client.infer(
            MODEL,
            tensors(http, images, "FP32"),
            request_compression_algorithm=encoding,
            response_compression_algorithm=encoding,
        )
        assert again.as_numpy("logits").tobytes() == logits.tobytes(), encoding
    flying = [client.async_infer(MODEL, tensors(http, images[i : i + 1], "FP32")) for i in range(len(images))]
    alone = np.concatenate([one.get_result().as_numpy("logits") for one in flying])
    assert alone.tobytes() == logits.tobytes(), "alone and in a batch differ"
    half = client.infer(MODEL, tensors(http, images.astype(np.float16), "FP16")).as_numpy("logits")
    assert np.abs(half - logits).max() < 0.1

    picture = np.array([PHOTOGRAPH], dtype=np.object_)
    three = http.InferRequestedOutput("logits", class_count=3)
    classes = client.infer(MODEL, tensors(http, picture, "BYTES"), outputs=[three]).as_numpy("logits")
    check_classes(classes)
    refused(lambda: client.infer("nothing", tensors(http, images, "FP32")), "nothing", "404")
    refused(lambda: client.get_model_metadata(MODEL, "99"), "99")
    refused(lambda: client.infer(MODEL, tensors(http, images[:, :, :5], "FP32")), "must be [N,3,")
    refused(lambda: client.infer(MODEL, tensors(http, np.array([b"text"], dtype=np.object_), "BYTES")), "JPEG")
    # 1 microsecond is over before anything can be computed
    refused(lambda: client.infer(MODEL, tensors(http, images, "FP32"), timeout=1), "deadline")
    assert [entry["state"] for entry in client.get_model_repository_index()] == ["READY"]
    client.load_model(MODEL)
    assert client.infer(MODEL, tensors(http, images, "FP32")).as_numpy("logits").tobytes() == logits.tobytes()
    told(client, client.get_model_config(MODEL), client.get_inference_statistics(MODEL))
    client.close()
    return logits


def over_grpc(images, logits):
    client = grpc.InferenceServerClient(GRPC)
    metadata = client.get_model_metadata(MODEL)
    assert list(metadata.inputs[0].shape) == [-1, 3, *images.shape[2:]], metadata
    one = client.infer(MODEL, tensors(grpc, images, "FP32"), request_id="eight", priority=1, timeout=5_000_000)
    assert one.as_numpy("logits").tobytes() == logits.tobytes(), "HTTP and gRPC differ"
    assert one.get_response().id == "eight"
    answers = Queue()
    for _ in range(8):
        client.async_infer(MODEL, tensors(grpc, images, "FP32"), callback=lambda result, error: answers.put((result, error)))
    for _ in range(8):
        result, error = answers.get(timeout=30)
        assert error is None and result.as_numpy("logits").tobytes() == logits.tobytes(), error
    for encoding in ("gzip", "deflate"):
        again = client.infer(MODEL, tensors(grpc, images, "FP32"), compression_algorithm=encoding)
        assert again.as_numpy("logits").tobytes() == logits.tobytes(), encoding
    streamed = Queue()
    client.start_stream(callback=partial(lambda queue, result, error: queue.put((result, error)), streamed))
    for i in range(4):
        client.async_stream_infer(MODEL, tensors(grpc, images[i : i + 1], "FP32"), request_id=str(i))
    for i in range(4):
        result, error = streamed.get(timeout=30)
        assert error is None and result.get_response().id == str(i), error
        assert result.as_numpy("logits").tobytes() == logits[i : i + 1].tobytes()
    client.stop_stream()
    three = grpc.InferRequestedOutput("logits", class_count=3)
    picture = np.array([PHOTOGRAPH], dtype=np.object_)
    check_classes(client.infer(MODEL, tensors(grpc, picture, "BYTES"), outputs=[three]).as_numpy("logits"))
    refused(lambda: client.infer("nothing", tensors(grpc, images, "FP32")), "NOT_FOUND")
    refused(lambda: client.infer(MODEL, tensors(grpc, images[:, :, :5], "FP32")), "INVALID_ARGUMENT")
    refused(lambda: client.infer(MODEL, tensors(grpc, images, "FP32"), client_timeout=1e-5), "DEADLINE_EXCEEDED")
    config = client.get_model_config(MODEL, as_json=True)["config"]
    assert client.get_model_repository_index().models[0].state == "READY"
    client.unload_model(MODEL)
    refused(lambda: client.infer(MODEL, tensors(grpc, images, "FP32")), "NOT_FOUND")
    client.load_model(MODEL)
    assert client.infer(MODEL, tensors(grpc, images, "FP32")).as_numpy("logits").tobytes() == logits.tobytes()
    time.sleep(0.05)
    told(client, config, client.get_inference_statistics(MODEL, as_json=True))
    client.close()


def check_classes(classes):
    parts = [text.decode().split(":") for text in np.ravel(classes)]
    due = classify(PHOTOGRAPH)
    assert [(int(index), label) for _, index, label in parts] == [(p["index"], p["label"]) for p in due], (parts, due)
    assert parts[0][2] == "cat", parts
    # the softmax of the values is the score
    values = np.array([float(value) for value, _, _ in parts])
    ratio = np.exp(values[1] - values[0])
    assert abs(ratio - due[1]["score"] / due[0]["score"]) < 1e-4, (parts, due)


def main():
    client = http.InferenceServerClient(HTTP)
    shape = client.get_model_metadata(MODEL)["inputs"][0]["shape"]
    images = np.random.default_rng(7).standard_normal((5, *shape[1:])).astype(np.float32)
    logits = over_http(images)
    over_grpc(images, logits)
    # pixels of the model's size are normalised by the server
    pixels = np.random.default_rng(8).integers(0, 256, (2, *shape[2:], 3), dtype=np.uint8)
    by_pixels = client.infer(MODEL, tensors(http, pixels, "UINT8")).as_numpy("logits")
    text = {"inputs": [{"name": "input", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.tolist()}]}
    request = urllib.request.Request(f"http://{HTTP}/v2/models/{MODEL}/infer", data=json.dumps(text).encode())
    by_json = json.load(urllib.request.urlopen(request))["outputs"][0]["data"]
    assert np.array(by_json, dtype=np.float32).tobytes() == by_pixels.tobytes()
    text["inputs"][0] |= {"datatype": "BYTES", "shape": [1], "data": [base64.b64encode(PHOTOGRAPH).decode()]}
    request = urllib.request.Request(f"http://{HTTP}/v2/models/{MODEL}/infer", data=json.dumps(text).encode())
    assert np.argmax(json.load(urllib.request.urlopen(request))["outputs"][0]["data"]) == classify(PHOTOGRAPH)[0]["index"]


main()
