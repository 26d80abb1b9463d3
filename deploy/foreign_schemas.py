"""Objects of other projects against those projects' own schemas, as far as PyPI carries them (deploy/schemas.txt):

* KEDA and the Prometheus Operator: pydantic models made from their CustomResourceDefinitions, unknown fields forbidden.
* KServe: the types, names and required fields of its SDK's models, read without importing them. Kubernetes' own types in
  there are left to the caller.
"""
import ast
import importlib
import importlib.util
import pathlib
import re

MODELS = {
    "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
    "keda.sh/v1alpha1": "cloudcoil.models.keda.v1alpha1",
}
KSERVE = {"serving.kserve.io/v1beta1": "v1beta1", "serving.kserve.io/v1alpha1": "v1alpha1"}
PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def known(resource):
    """Whether there is a schema for its kind."""
    return resource["apiVersion"] in MODELS or resource["apiVersion"] in KSERVE


def problems(resource):
    """What its schema says against it; raises ModuleNotFoundError where the schemas are not installed."""
    version, kind = resource["apiVersion"], resource["kind"]
    if version in KSERVE:
        return list(_kserve(KSERVE[version].capitalize() + kind, resource, kind))
    from pydantic import ValidationError

    model = getattr(importlib.import_module(MODELS[version]), kind, None)
    if model is None:
        return [f"kind {kind} is not known in {version}"]
    try:
        model.model_validate(resource, extra="forbid")
        return []
    except ValidationError as error:
        return ["/".join(map(str, e["loc"])) + f": {e['msg']}" for e in error.errors()]


def _read(name):
    """Fields of a class of KServe's SDK by their JSON names: {name: (type, required)}; None for an unknown class."""
    spec = importlib.util.find_spec("kserve")
    if spec is None:
        raise ModuleNotFoundError("kserve")
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    path = pathlib.Path(spec.origin).parent / "models" / f"{snake}.py"
    if not path.is_file():
        return None
    text = path.read_text()
    found = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    assert found.name == name, (found.name, name)
    tables = {node.targets[0].id: ast.literal_eval(node.value) for node in found.body if isinstance(node, ast.Assign)
              and node.targets[0].id in ("openapi_types", "attribute_map")}
    demanded = set(re.findall(r"Invalid value for `(\w+)`, must not be `None`", text))
    demanded -= set(re.findall(r"(\w+)=(?!None)[^,)]+[,)]", text[text.index("def __init__"):].split("\n")[0]))
    return {json: (tables["openapi_types"][own], own in demanded) for own, json in tables["attribute_map"].items()}


def _kserve(kind, value, place):
    """Problems of `value`, which should be of the SDK's type `kind`."""
    if inner := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{place}: not a list"
            return
        for i, item in enumerate(value):
            yield from _kserve(inner[1], item, f"{place}/{i}")
    elif inner := re.fullmatch(r"dict\(str, (.+)\)", kind):
        if not isinstance(value, dict):
            yield f"{place}: not a map"
            return
        for key, item in value.items():
            yield from _kserve(inner[1], item, f"{place}/{key}")
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (isinstance(value, bool) and kind != "bool"):
            yield f"{place}: {value!r} is not of type {kind}"
    elif (fields := _read(kind)) is not None:
        if not isinstance(value, dict):
            yield f"{place}: not an object"
            return
        for name, item in value.items():
            if name not in fields:
                yield f"{place}: field {name} is not known to {kind}"
            else:
                yield from _kserve(fields[name][0], item, f"{place}/{name}")
        for name, (_, demanded) in fields.items():
            if demanded and name not in value:
                yield f"{place}: field {name} is missing"
    elif not kind.startswith("V1") and kind not in ("object", "K8sIoApiCoreV1Volume"):
        yield f"{place}: no model of type {kind}"
