"""Platforms' own clients: Hugging Face's InferenceClient and KServe's v1 client; TorchServe's documented curl.

    python hosts.py huggingface|kserve-v1|torchserve HTTP_ADDRESS
"""
import asyncio
import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

KIND, HTTP = sys.argv[1:]
MODEL = "nf_regnet_cifar10"
CAT = Path(__file__).resolve().parent.parent / "data" / "cat.jpg"


def huggingface():
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    client = InferenceClient(model=f"http://{HTTP}")
    found = client.image_classification(str(CAT))
    assert [f.label for f in found][:2] == ["cat", "dog"] and len(found) == 5 and 0.8 < found[0].score < 0.9, found
    # with parameters it sends JSON
    top = client.image_classification(CAT.read_bytes(), top_k=2)
    assert [(f.label, round(f.score, 6)) for f in top] == [(f.label, round(f.score, 6)) for f in found[:2]], (top, found)
    sigmoid = client.image_classification(str(CAT), function_to_apply="sigmoid")
    assert sigmoid[0].label == "cat" and sigmoid[0].score > found[0].score, sigmoid
    try:
        client.image_classification(b"not an image")
    except HfHubHTTPError as error:
        assert error.response.status_code == 415 and "not an image" in str(error), error
    else:
        raise AssertionError("no error for what is no image")


async def kserve():
    from kserve import InferenceRESTClient
    from kserve.inference_client import RESTConfig

    client = InferenceRESTClient(RESTConfig(protocol="v1", verbose=False))
    base = f"http://{HTTP}"
    assert await client.is_model_ready(base, MODEL)
    image = {"image": {"b64": base64.b64encode(CAT.read_bytes()).decode()}}
    answer = await client.infer(base, {"instances": [image, image]}, model_name=MODEL)
    tops = [classes[0]["label"] for classes in answer["predictions"]]
    assert tops == ["cat", "cat"], answer
    try:
        await client.infer(base, {"instances": [{}]}, model_name=MODEL)
    except Exception as error:
        assert "400" in str(error), error
    else:
        raise AssertionError("no error for an instance without an image")
    await client.close()


def torchserve():
    for how in (["-T", str(CAT)], ["-F", f"data=@{CAT}"], ["--data-binary", f"@{CAT}"]):
        command = ["curl", "--silent", "--show-error", "--max-time", "20", f"http://{HTTP}/predictions/{MODEL}", *how]
        classes = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        assert max(classes, key=classes.get) == "cat" and len(classes) == 5, (how, classes)


if KIND == "huggingface":
    huggingface()
elif KIND == "kserve-v1":
    asyncio.run(kserve())
elif shutil.which("curl"):
    torchserve()
else:
    print("  SKIPPED torchserve: there is no curl here")
