"""What deploy/check-cluster puts into a cluster: deploy/'s own manifests, rendered for these images and this namespace."""
import json, pathlib, shutil

DEPLOY = pathlib.Path(__file__).resolve().parent
PHOTOGRAPH = DEPLOY.parent / "tests" / "data" / "cat.jpg"
REPLICAS = 2
# of the Job: as many as it says, and images enough for a shard to take seconds
SHARDS, COPIES = 8, 4000
# InferenceServices for the check, and those of deploy/kserve that they are made of: REST, gRPC
KSERVE = {"nfold-rest": "nf-regnet-cifar10", "nfold-grpc": "nf-regnet-cifar10-grpc"}
LOCKED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
UNPRIVILEGED = {"runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"}}


def progressive(side):
    """A JPEG whose decoder keeps all coefficients: progressive, grey, a scan of a bit for each block."""
    part = lambda marker, data: bytes([0xFF, marker]) + (len(data) + 2).to_bytes(2, "big") + data
    frame = b"\x08" + side.to_bytes(2, "big") * 2 + bytes([3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    scan = bytes([3, 1, 0, 2, 0, 3, 0, 0, 0, 0])
    blocks = 3 * ((side + 7) // 8) ** 2
    return (b"\xff\xd8" + part(0xDB, b"\0" + b"\1" * 64) + part(0xC2, frame) + part(0xC4, b"\0\1" + bytes(16))
            + part(0xDA, scan) + bytes((blocks + 7) // 8) + b"\xff\xd9")


def image_of(name, reference):
    """An entry of kustomize's `images`."""
    plain, _, digest = reference.partition("@")
    head, colon, tag = plain.rpartition(":")
    tagged = colon and "/" not in tag
    entry = {"name": f"registry.example.com/{name}", "newName": head if tagged else plain}
    return {**entry, **({"digest": digest} if digest else {"newTag": tag} if tagged else {"newTag": "latest"})}


def render(cluster, folder, options, namespace, what):
    """The overlay, the Job or KServe's objects, for these images and this namespace."""
    images = [image_of("nfold", options.image), image_of("nfold-models", options.models_image)]
    shared = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": namespace, "images": images}
    if what == "overlay":
        shutil.copytree(DEPLOY / "kubernetes", folder / "kubernetes", dirs_exist_ok=True)
        own = folder / "kubernetes" / "overlays" / "check-cluster"
        own.mkdir(exist_ok=True)
        gone = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "nfold"},
                "$patch": "delete"}
        patches = [{"target": {"kind": "HorizontalPodAutoscaler", "name": "nfold"}, "patch": json.dumps(gone)}]
        at = {"op": "replace", "path": "/spec/template/spec/containers/0/resources/requests/cpu", "value": options.cpu}
        patches += [{"target": {"kind": "Deployment", "name": "nfold"}, "patch": json.dumps([at])}] if options.cpu else []
        wanted = {"resources": [f"../{options.overlay}"], "replicas": [{"name": "nfold", "count": REPLICAS}],
                  "labels": [{"pairs": {"nfold-check": namespace}, "includeTemplates": True}], "patches": patches}
        # through which `images:` reaches mounted ones
        if (DEPLOY / "kubernetes" / "overlays" / "cpu" / "images.yaml").is_file():
            shutil.copy(DEPLOY / "kubernetes" / "overlays" / "cpu" / "images.yaml", own)
            wanted["configurations"] = ["images.yaml"]
    elif what == "kserve":
        own = folder / "kserve"
        own.mkdir(exist_ok=True)
        for name in ("runtime.yaml", "inferenceservice.yaml"):
            shutil.copy(DEPLOY / "kserve" / name, own)
        wanted = {"resources": ["runtime.yaml", "inferenceservice.yaml"], "patches": kserve_patches(options)}
    else:
        own = folder / "job"
        own.mkdir(exist_ok=True)
        shutil.copy(DEPLOY / "jobs" / "classify.yaml", own)
        wanted = {"resources": ["classify.yaml"], "patches": [{"target": {"kind": "Job"}, "patch": json.dumps(job_patch(options))}]}
    (own / "kustomization.yaml").write_text(json.dumps({**shared, **wanted}))
    return cluster("kustomize", str(own))


def job_patch(options):
    """The Job's volumes, filled by init containers; its results, read by a second container."""
    small = {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}}
    fill = (f"mkdir /models/repository && cp -r /repository/. /models/repository/ && cp -L /given/1-photograph.jpg /images/0.jpg "
            f"&& seq 1 {COPIES - 1} | while read -r i; do ln /images/0.jpg /images/$i.jpg || exit 1; done")
    result = "/results/$JOB_COMPLETION_INDEX.jsonl"
    mount = lambda *names: [{"name": name, "mountPath": f"/{name}"} for name in names]
    shared = {"image": "registry.example.com/nfold-models", "resources": small, "securityContext": LOCKED}
    path = "/spec/template/spec"
    return [
        {"op": "add", "path": f"{path}/initContainers", "value": [
            {"name": "fill", **shared, "command": ["sh", "-c", fill], "volumeMounts": mount("models", "images", "given")}]},
        {"op": "add", "path": f"{path}/containers/-", "value": {
            "name": "results", **shared, "volumeMounts": mount("results"),
            "command": ["sh", "-c", f"until [ -e {result} ]; do sleep 1; done; cat {result}"]}},
        {"op": "replace", "path": f"{path}/volumes", "value": [
            *({"name": name, "emptyDir": {}} for name in ("models", "images", "results")),
            {"name": "given", "configMap": {"name": "check-cluster"}}]},
        {"op": "replace", "path": f"{path}/containers/0/resources/requests/cpu", "value": options.cpu or "250m"},
        {"op": "replace", "path": f"{path}/containers/0/env/1/value", "value": options.model},
    ]


def kserve_patches(options):
    """deploy/kserve for one namespace: the runtime for it alone, and a service for each protocol. Instead of a `storageUri`, which
    needs storage of the cluster's, an init container puts the models where KServe's would. Two pods each: one is deleted."""
    runtime = [{"op": "replace", "path": "/kind", "value": "ServingRuntime"}]
    if options.cpu:
        runtime.append({"op": "replace", "path": "/spec/containers/0/resources/requests/cpu", "value": options.cpu})
    small = {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}}
    fill = {"name": "models", "image": "registry.example.com/nfold-models", "command": ["cp", "-r", "/repository/.", "/models"],
            "resources": small, "securityContext": LOCKED, "volumeMounts": [{"name": "models", "mountPath": "/models"}]}
    path = "/spec/predictor"
    service = [
        {"op": "remove", "path": f"{path}/model/storageUri"},
        {"op": "add", "path": f"{path}/model/volumeMounts", "value": [{"name": "models", "mountPath": "/mnt/models", "readOnly": True}]},
        {"op": "add", "path": f"{path}/volumes", "value": [{"name": "models", "emptyDir": {}}]},
        {"op": "add", "path": f"{path}/initContainers", "value": [fill]},
        {"op": "add", "path": f"{path}/securityContext", "value": UNPRIVILEGED},
        {"op": "add", "path": f"{path}/minReplicas", "value": REPLICAS},
        {"op": "add", "path": f"{path}/maxReplicas", "value": REPLICAS},
    ]
    patches = [{"target": {"kind": "ClusterServingRuntime"}, "patch": json.dumps(runtime), "options": {"allowKindChange": True}}]
    for name, given in KSERVE.items():
        named = [{"op": "replace", "path": "/metadata/name", "value": name}, *service]
        patches.append({"target": {"kind": "InferenceService", "name": given}, "patch": json.dumps(named),
                        "options": {"allowNameChange": True}})
    return patches
