"""A client that a generator made of /openapi.json classifies: raw bytes, a form with files, JSON, and is told errors.

    python generated.py FOLDER_OF_THE_CLIENT HTTP_ADDRESS
"""
import base64
import sys
from io import BytesIO
from pathlib import Path

sys.path.insert(0, sys.argv[1])

from nfold_client import Client
from nfold_client.api.classification import classify
from nfold_client.api.health import ready
from nfold_client.models import ClassifyAnswer, ErrorBody, Form, JsonBody, JsonImage
from nfold_client.types import File

CAT = (Path(__file__).resolve().parent.parent / "data" / "cat.jpg").read_bytes()
client = Client(base_url=f"http://{sys.argv[2]}")
assert ready.sync(client=client).ready is True

json_body = JsonBody(images=[JsonImage(b64=base64.b64encode(CAT).decode())], top_k=2)
form = Form(image=[File(payload=BytesIO(CAT), file_name="cat.jpg", mime_type="image/jpeg")], top_k=2)
raw = File(payload=BytesIO(CAT), file_name="cat.jpg", mime_type="application/octet-stream")
for body in (json_body, form, raw):
    answer = classify.sync(client=client, body=body, top_k=2)
    assert isinstance(answer, ClassifyAnswer), answer
    first = answer.results[0].predictions[0]
    assert (first.label, first.index) == ("cat", 3) and 0.8 < first.score < 0.9, answer
    assert len(answer.results[0].predictions) == 2, answer
refused = classify.sync(client=client, body=File(payload=BytesIO(b"no image"), file_name="a"))
assert isinstance(refused, ErrorBody) and refused.code == "unsupported_media_type", refused
