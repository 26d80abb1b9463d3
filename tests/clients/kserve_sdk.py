"""KServe's inference clients, REST and gRPC, as its users call them."""
import asyncio
import json
import sys
import urllib.request
from pathlib import Path

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

HTTP, GRPC = sys.argv[1:]
MODEL = "nf_regnet_cifar10"
PHOTOGRAPH = (Path(__file__).resolve().parent.parent / "data" / "cat.jpg").read_bytes()


def request(array, datatype, binary):
    one = InferInput("input", list(array.shape), datatype)
    one.set_data_from_numpy(array, binary_data=binary)
    return InferRequest(MODEL, [one], request_id="nine")


async def main():
    rest = InferenceRESTClient(RESTConfig(protocol="v2", verbose=False))
    base = f"http://{HTTP}"
    assert await rest.is_server_live(base) and await rest.is_server_ready(base)
    assert await rest.is_model_ready(base, MODEL)
    with urllib.request.urlopen(f"{base}/v2/models/{MODEL}") as metadata:
        shape = json.load(metadata)["inputs"][0]["shape"]
    images = np.random.default_rng(3).standard_normal((2, *shape[1:])).astype(np.float32)
    answers = []
    for binary in (True, False):
        answer = await rest.infer(base, request(images, "FP32", binary), model_name=MODEL)
        assert answer.id == "nine" and answer.model_name == MODEL
        answers.append(answer.outputs[0].as_numpy())
    assert answers[0].shape == (2, 10) and answers[0].astype(np.float32).tobytes() == answers[1].astype(np.float32).tobytes()
    grpc = InferenceGRPCClient(GRPC)
    assert await grpc.is_server_live() and await grpc.is_server_ready() and await grpc.is_model_ready(MODEL)
    for binary in (True, False):
        answer = await grpc.infer(request(images, "FP32", binary))
        assert answer.outputs[0].as_numpy().astype(np.float32).tobytes() == answers[0].astype(np.float32).tobytes(), binary
    picture = await grpc.infer(request(np.array([PHOTOGRAPH], dtype=np.object_), "BYTES", True))
    assert np.argmax(picture.outputs[0].as_numpy()) == 3, "a cat"
    try:
        await rest.is_model_ready(base, "nothing")
    except Exception as error:
        assert "404" in str(error), error
    await grpc.close()
    await rest.close()


asyncio.run(main())
