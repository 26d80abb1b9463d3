"""The self-test of deploy/check-cluster: a cluster of stubs with a clock of its own, right in everything but the fault that it is
given. Each step is run without one and must be right, and with each that concerns it and must be wrong, for that reason.
"""
import json, pathlib, shutil, tempfile

READY_S, DRAIN_S, SHARD_S = 4, 12, 6

# fault, step in which it shows, word of the reason
FAULTS = [
    ("pending", "install", "Insufficient cpu"),
    ("there already", "install", "is there already"),
    ("lose", "steady", "7 requests were lost"),
    ("late", "steady", "an answer took 7.0 s"),
    ("refuse", "steady", "9 requests were lost"),
    ("few", "steady", "the load was not there"),
    ("silent", "steady", "nothing was answered"),
    ("no report", "steady", "no report"),
    ("client fails", "steady", "failed: error: answers 404"),
    ("client pending", "steady", "does not start"),
    ("lose", "saturation", "7 requests were lost"),
    ("restarted", "saturation", "was restarted 1 times"),
    ("lose", "restart", "7 requests were lost"),
    ("pending later", "restart", "Insufficient cpu"),
    ("not rolled", "restart", "is still there"),
    ("slow", "restart", "the load ended"),
    ("lose", "image", "7 requests were lost"),
    ("not rolled", "image", "is still there"),
    ("lose", "undo", "7 requests were lost"),
    ("not rolled", "undo", "is still there"),
    ("lose", "delete_one", "7 requests were lost"),
    ("late", "delete_one", "an answer took"),
    ("never ends", "delete_one", "is still there"),
    ("not replaced", "delete_one", "1 pods"),
    ("lose", "delete_all", "7 requests were lost"),
    ("pending later", "delete_all", "Insufficient cpu"),
    ("lose", "drain", "7 requests were lost"),
    ("drain blocked", "drain", "Cannot evict"),
    ("lose many", "kill", "are allowed"),
    ("pending later", "kill", "Insufficient cpu"),
    ("no metric", "hpa", "unable to get metric"),
    ("never scales", "hpa", "does not scale to 3"),
    ("never scales down", "hpa", "does not scale to 2"),
    ("twice", "job", "1 images were classified more than once"),
    ("missing", "job", "1 images were classified not at all"),
    ("broken", "job", "could not be classified"),
    ("job fails", "job", "the Job failed"),
    ("job hangs", "job", "the Job does not end"),
    ("too late", "job", "nothing was shown"),
    ("lose", "job", "7 requests were lost"),
    ("pending later", "kserve", "Insufficient cpu"),
    ("refused object", "kserve", "no such field"),
    ("lose", "kserve", "7 requests were lost"),
    ("restarted", "kserve", "was restarted 1 times"),
    ("never ends", "kserve", "is still there"),
    ("not replaced", "kserve", "1 pods"),
    ("oom", "oom", "OOMKilled"),
    ("lose", "oom", "7 requests were lost"),
    ("restarted", "oom", "was restarted 1 times"),
]
# right in spite of it
ALLOWED = [("lose", "kill"), ("late", "kill"), ("refuse", "saturation"), ("refuse", "oom"), ("late", "saturation")]


class Cluster:
    """As much of kubectl as deploy/check-cluster asks for. `fault` begins with `step`."""

    def __init__(self, check, fault=None, step=None, nodes=2, custom_metrics=True, kserve=True, interrupt=None):
        self.check, self.fault, self.step, self.interrupt = check, fault, step, interrupt
        self.custom_metrics, self.time, self.current, self.serial = custom_metrics, 0.0, "install", 0
        self.kserve, self.predictors = kserve, []
        self.nodes = {f"node-{i}": False for i in range(nodes)}
        self.namespaces, self.pods, self.metric, self.hpa = [], {}, 0, False
        self.replicas, self.revision, self.loaded = 0, 1, False

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.time += seconds

    def command(self, _, value):
        self.metric = value

    def has(self, *faults):
        return self.fault in faults and self.current == self.step

    # what runs

    def pod(self, **more):
        self.serial += 1
        free = [node for node, cordoned in self.nodes.items() if not cordoned]
        used = [pod["node"] for pod in self.pods.values() if pod["kind"] == "nfold" and pod["ends"] is None]
        node = min(free, key=used.count)
        return {"born": self.time, "ends": None, "node": node, "revision": self.revision, "kind": "nfold", "restarts": 0,
                "ready": self.time + READY_S, "oom": False, **more}

    def tick(self):
        """The controllers."""
        for name in [n for n, p in self.pods.items() if p["ends"] is not None and p["ends"] <= self.time]:
            del self.pods[name]
        if self.hpa and not self.has("no metric"):
            up, down = self.metric > 16 and not self.has("never scales"), self.metric <= 16
            self.replicas = 3 if up or (self.replicas == 3 and not (down and not self.has("never scales down"))) else 2
        live = {n: p for n, p in self.pods.items() if p["kind"] == "nfold" and p["ends"] is None}
        old = [n for n, p in live.items() if p["revision"] != self.revision and not self.has("not rolled")]
        surge = 1 if old else 0
        never = self.has("pending", "pending later")
        while len(live) < self.replicas + surge and not self.has("not replaced"):
            made = self.pod()
            made["ready"] = 1e9 if never else self.time + (200 if self.has("slow") else READY_S)
            name = f"nfold-{self.serial}"
            live[name] = self.pods[name] = made
        for service in self.predictors:
            there = [p for p in self.pods.values() if p.get("service") == service and p["ends"] is None]
            ever = any(p.get("service") == service for p in self.pods.values())
            for _ in range(0 if ever and self.has("not replaced") else self.check.REPLICAS - len(there)):
                made = self.pod(kind="predictor", service=service)
                made["ready"] = 1e9 if never else made["ready"]
                self.pods[f"{service}-{self.serial}"] = made
        if len(live) > self.replicas and all(p["ready"] <= self.time for p in live.values()):
            self.end((old or list(live))[0])

    def end(self, name, after=DRAIN_S):
        pod = self.pods[name]
        if pod["ends"] is None:
            pod["ends"] = 1e9 if self.has("never ends") and pod["kind"] != "load" else self.time + after

    def described(self, name, pod):
        ok, kind = pod["ready"] <= self.time, pod["kind"]
        conditions = [{"type": "Ready", "status": str(ok)}]
        if pod["ready"] == 1e9:
            conditions.append({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "Insufficient cpu"})
        phase = "Running" if ok else "Pending"
        status = {"name": kind, "restartCount": pod["restarts"], "state": {"running": {}} if ok else {"waiting": {}}}
        if self.has("restarted", "oom") and kind in ("nfold", "predictor") and self.loaded:
            status["restartCount"] += 1
            reason = "OOMKilled" if self.fault == "oom" else "Error"
            status["lastState"] = {"terminated": {"reason": reason}}
        if "over" in pod and pod["over"] <= self.time:
            phase = "Failed" if self.has("client fails") and kind == "load" else "Succeeded"
            status["state"] = {"terminated": {"exitCode": 0}}
        labels = {"batch.kubernetes.io/job-completion-index": str(pod["index"])} if "index" in pod else {}
        metadata = {"name": name, "labels": labels, **({"deletionTimestamp": "now"} if pod["ends"] is not None else {})}
        return {"metadata": metadata, "spec": {"nodeName": pod["node"]},
                "status": {"phase": phase, "conditions": conditions, "containerStatuses": [status]}}

    # kubectl

    def __call__(self, *words, given=None, timeout=None):
        words = [w for w in words if not w.startswith("--timeout")]
        if words[0] == "--namespace":
            words = words[2:]
        self.time += 0.1
        self.tick()
        if self.interrupt and self.interrupt(self, words):
            self.interrupt = None
            raise KeyboardInterrupt
        found = getattr(self, words[0])(*words[1:], **({"given": given} if given else {}))
        self.tick()
        return found if isinstance(found, str) else json.dumps(found)

    def wrong(self, text):
        raise self.check.Wrong(text)

    def kustomize(self, folder):
        kinds = {"job": "Job", "kserve": "InferenceService"}
        return f"kind: {kinds.get(folder.rsplit('/', 1)[-1], 'Deployment')}"

    def create(self, *_, given):
        document = json.loads(given)
        kind, name = document["kind"], document["metadata"]["name"]
        if kind == "Namespace":
            self.namespaces.append(name)
        elif kind == "HorizontalPodAutoscaler":
            self.hpa = True
        elif kind == "Pod":
            container = document["spec"]["containers"][0]
            words = container.get("args") or container["command"]
            seconds = float(words[words.index("--duration") + 1][:-1] if "--duration" in words else words[5 + 1])
            made = self.pod(kind="load", words=words, seconds=seconds)
            self.loaded = self.loaded or self.current == self.step
            made["ready"] = 1e9 if self.has("client pending") else self.time + 2
            self.pods[name] = {**made, "over": made["ready"] + seconds}
        return ""

    def apply(self, *_, given):
        if "InferenceService" in given:
            if self.has("refused object"):
                self.wrong("no such field")
            self.predictors = list(self.check.KSERVE)
        elif "Job" in given:
            for index in range(self.check.SHARDS):
                self.shard(index, self.time + SHARD_S * (index // 4))
        else:
            self.replicas = self.check.REPLICAS
        return ""

    def shard(self, index, begins):
        begins += 2
        self.serial += 1
        self.pods[f"shard-{index}-{self.serial}"] = self.pod(kind="nfold-job", index=index, ready=begins, over=begins + SHARD_S)

    def get(self, kind, *words):
        if kind == "--raw":
            there = self.kserve if "kserve" in words[0] else self.custom_metrics
            return "{}" if there else self.wrong("NotFound")
        if kind == "clusterservingruntime":
            return ""
        if kind == "inferenceservice":
            mine = [p for p in self.pods.values() if p.get("service") == words[0]]
            ok = bool(mine) and all(p["ready"] <= self.time for p in mine)
            return {"status": {"conditions": [{"type": "Ready", "status": str(ok)}]}} if mine else {}
        if kind == "namespace":
            return "namespace/mine" if self.has("there already") else ""
        if kind == "nodes":
            status = {"conditions": [{"type": "Ready", "status": "True"}]}
            return {"items": [{"metadata": {"name": name}, "spec": {"unschedulable": cordoned}, "status": status}
                              for name, cordoned in self.nodes.items()]}
        if kind == "service":
            # KServe's may have no address of its own
            own = {"nfold-grpc-predictor": "None"}.get(words[0], "fd00::1")
            return {"spec": {"clusterIP": own, "ports": [{"port": 80}]}}
        if kind == "hpa":
            status = "False" if self.has("no metric") else "True"
            return {"status": {"conditions": [{"type": "ScalingActive", "status": status, "message": "unable to get metric"}]}}
        if kind == "pod":
            return self.described(words[0], self.pods[words[0]])
        if kind == "pods":
            key, _, value = words[1].partition("=")
            wanted = {"job-name": "nfold-job", "serving.kserve.io/inferenceservice": "predictor"}.get(key, "nfold")
            of = lambda pod: pod["kind"] == wanted and pod.get("service", value) == value
            items = [self.described(n, p) for n, p in self.pods.items() if of(p)]
            # the Job's container has the name of the Deployment's
            for item in items:
                item["status"]["containerStatuses"][0]["name"] = "nfold"
            return {"items": items}
        if kind == "deployment":
            live = [p for p in self.pods.values() if p["kind"] == "nfold" and p["ends"] is None]
            return {"metadata": {"generation": self.revision}, "spec": {"replicas": self.replicas},
                    "status": {"observedGeneration": self.revision, "readyReplicas": sum(p["ready"] <= self.time for p in live),
                               "updatedReplicas": sum(p["revision"] == self.revision or self.has("not rolled") for p in live)}}
        done = {p["index"] for p in self.pods.values() if p["kind"] == "nfold-job" and p["ends"] is None and p["over"] <= self.time}
        conditions = [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}] if self.has("job fails") else []
        if len(done) == self.check.SHARDS and not self.has("job hangs"):
            conditions = [{"type": "Complete", "status": "True"}]
        return {"status": {"succeeded": len(done), "conditions": conditions}}

    def delete(self, kind, *names):
        names = [n for n in names if not n.startswith("--")]
        if kind == "namespace":
            # one that is somebody else's must not be asked for
            self.namespaces.remove(names[0])
        elif kind == "hpa":
            self.hpa = False
        elif kind == "inferenceservice":
            self.predictors = []
            self.pods = {n: p for n, p in self.pods.items() if p["kind"] != "predictor"}
        elif kind == "servingruntime":
            pass
        elif kind == "job":
            self.pods = {n: p for n, p in self.pods.items() if p["kind"] != "nfold-job"}
        else:
            for name in names:
                pod = self.pods[name]
                if pod["kind"] == "nfold-job":
                    if self.has("too late"):
                        continue
                    self.shard(pod["index"], self.time + 1)
                self.end(name, DRAIN_S if pod["kind"] in ("nfold", "predictor") else 1)
        return ""

    def scale(self, _, replicas):
        self.replicas = int(replicas.split("=")[1])
        return ""

    def rollout(self, *_):
        self.revision += 1
        return ""

    set = patch = rollout

    def drain(self, node, *_):
        self.nodes[node] = True
        if self.has("drain blocked"):
            self.wrong("Cannot evict pod as it would violate the pod's disruption budget")
        for name in [n for n, p in self.pods.items() if p["node"] == node and p["kind"] == "nfold"]:
            self.end(name)
        return ""

    def uncordon(self, node):
        self.nodes[node] = False
        return ""

    def logs(self, name, *_):
        pod = self.pods[name]
        if pod["kind"] == "nfold-job":
            return self.results(pod["index"])
        words = pod["words"]
        rate = float(words[words.index("--rate") + 1]) if "--rate" in words else 50
        rate = float(words[5]) if words[0] == "python3" else rate
        sent = round(rate * pod["seconds"])
        losses = {"lose": ("transport", 7), "refuse": ("refused", 9), "lose many": ("timeout", 900)}
        lost = losses.get(self.fault) if self.has(self.fault) else None
        first = name.endswith(("kept", "saturating", "large"))
        outcomes = {"ok": sent}
        if lost and first:
            outcomes = {"ok": sent - lost[1], lost[0]: lost[1]}
        if self.has("few"):
            outcomes = {"ok": sent // 10}
        if self.has("silent"):
            outcomes = {"refused": sent}
        if self.has("client fails"):
            return "error: answers 404"
        if self.has("no report"):
            return "closed loop, 4 connections\n"
        slowest = 7000.0 if self.has("late") else 40.0
        if words[0] == "python3":
            return json.dumps({"outcomes": outcomes, "slowest_ms": slowest, "moved": 1}) + "\n"
        report = {"schema": "nfold-bench-load/1", "steps": [{"outcomes": outcomes, "latency_ms": {"max": slowest}}]}
        return "open loop, 20.0 requests/s\n" + json.dumps(report, indent=2) + "\nwrote {nothing}\n"

    def results(self, index):
        count, shards = self.check.COPIES, self.check.SHARDS
        names = [f"{i}.jpg" for i in range(index, count, shards)]
        if index == 3 and self.has("twice"):
            names.append(names[0])
        if index == 3 and self.has("missing"):
            names.pop()
        rows = [{"image": f"/images/{name}", "predictions": []} for name in names]
        if index == 3 and self.has("broken"):
            rows[0] = {"image": rows[0]["image"], "error": {"reason": "decode"}}
        return "".join(json.dumps(row) + "\n" for row in rows)


def self_test(check):
    problems, seen = [], {"right": 0, "wrong": 0}
    def options(*more):
        return check.arguments(["--image", "a/nfold:1", "--models-image", "a/models:1", "--set-metric", "set", *more])
    def run(cluster, *more):
        said = []
        def say(text):
            said.append(text)
            # the stub's faults belong to a step
            if ":" in text and text.split(":")[0] in {s.__name__ for s in check.STEPS}:
                cluster.current = text.split(":")[0]
        rows = check.run(options(*more), cluster, say)
        return {row["step"]: row for row in rows}, rows, said
    def expect(what, sound, told=""):
        if not sound:
            problems.append(f"{what}: {told}")
    def restored(what, cluster):
        expect(what, not cluster.namespaces and not any(cluster.nodes.values()), "the cluster is not as it was")
    for more in ([], ["--client-image", "python:3", "--image2", "a/nfold:2"]):
        cluster = Cluster(check)
        by_name, rows, said = run(cluster, *more)
        for name, row in by_name.items():
            expect(f"{name} {more} without a fault", row["verdict"] == "right", row["reasons"])
            expect(f"{name} {more} without a fault", name == "install" or row["sent"] > 0 and row["failed"] == 0, row)
            seen["right"] += row["verdict"] == "right"
        expect("passed", check.passed(rows) and len(rows) == len(check.STEPS))
        clients = {load["client"] for row in rows for load in row["loads"]}
        expect("clients", ({"fresh", "stream"} <= clients) == bool(more), clients)
        expect("table", ("not covered" in check.table(rows, options(*more))) == (not more))
        restored("without a fault", cluster)
    for fault, step, word in FAULTS:
        cluster = Cluster(check, fault, step)
        by_name, rows, said = run(cluster, "--steps", step)
        row = by_name[step]
        expect(f"{fault} in {step}", row["verdict"] == "wrong" and any(word in reason for reason in row["reasons"]), row)
        expect(f"{fault} in {step}", not check.passed(rows), "passed all the same")
        seen["wrong"] += row["verdict"] == "wrong"
        expect(f"{fault} in {step}", not any("error: namespace" in text for text in said), "deleted what is not its own")
        restored(f"{fault} in {step}", cluster)
    for fault, step in ALLOWED:
        by_name, rows, _ = run(Cluster(check, fault, step), "--steps", f"steady,{step}")
        expect(f"{fault} is allowed in {step}", check.passed(rows), by_name[step])
    missing = {s.__name__ for s in check.STEPS} - {step for _, step, _ in FAULTS}
    expect("steps without a fault that they find", not missing, missing)
    # nothing after an install that failed
    _, rows, _ = run(Cluster(check, "pending", "install"))
    expect("after a failed install", {row["verdict"] for row in rows[1:]} == {"not run"}, rows)
    # a node is given back before the next step
    cluster = Cluster(check, "drain blocked", "drain", interrupt=lambda c, w: c.current == "kill" and expect(
        "a drain that was blocked", not any(c.nodes.values()), "its node is cordoned in the next step"))
    run(cluster, "--steps", "drain,kill")
    # what can't be run is named
    by_name, rows, _ = run(Cluster(check, nodes=1, custom_metrics=False, kserve=False))
    expect("no KServe", by_name["kserve"]["verdict"] == "skipped" and "KServe" in by_name["kserve"]["reasons"][0], by_name["kserve"])
    expect("one node", by_name["drain"]["verdict"] == "skipped" and "1 nodes" in by_name["drain"]["reasons"][0], by_name["drain"])
    expect("no API", by_name["hpa"]["verdict"] == "skipped" and "custom metrics" in by_name["hpa"]["reasons"][0], by_name["hpa"])
    expect("skipped steps", check.passed(rows))
    # ^C: as the step begins, while a node is cordoned, while a Job runs
    for what, when in {"at a load": lambda c, w: w[0] == "logs", "in a drain": lambda c, w: w[0] == "get" and any(c.nodes.values()),
                       "in the Job": lambda c, w: w[:2] == ["get", "job"]}.items():
        cluster = Cluster(check, interrupt=when)
        try:
            run(cluster)
            expect(f"^C {what}", False, "was not seen")
        except KeyboardInterrupt:
            restored(f"^C {what}", cluster)
    for share, verdict in (("0.02", "right"), ("0.001", "wrong")):
        by_name, *_ = run(Cluster(check, "refuse", "steady"), "--steps", "steady", "--refused", share)
        expect(f"--refused {share}", by_name["steady"]["verdict"] == verdict, by_name["steady"])
    cluster = Cluster(check)
    run(cluster, "--steps", "steady", "--keep")
    expect("--keep", len(cluster.namespaces) == 1)
    budget = check.lossy_budget(40, 6, 2, 0.05, 2)
    expect("budget", budget == 124, budget)
    if shutil.which("kubectl"):
        rendered(check, options, expect)
    else:
        print("SKIP: no kubectl here, so that nothing was rendered")
    for text in problems:
        print(f"error: {text}")
    print(f"check-cluster: {seen['right']} steps right, {seen['wrong']} faults found, {len(problems)} failed")
    return bool(problems)


def rendered(check, options, expect):
    """With the real kubectl: these images and this namespace reach everything."""
    for overlay in ("cpu", "cuda"):
        chosen = options("--overlay", overlay, "--cpu", "250m", "--model", "mine")
        with tempfile.TemporaryDirectory() as folder:
            of = lambda what: check.render(check.Kubectl(chosen), pathlib.Path(folder), chosen, "vision", what)
            deployed, job = of("overlay"), of("job") if overlay == "cpu" else None
            served = of("kserve")
        expect(f"{overlay}: KServe", {"image: a/nfold:1", "image: a/models:1"} == {
            line.strip(" -") for line in served.splitlines() if "image: " in line}, served)
        expect(f"{overlay}: KServe", "ClusterServingRuntime" not in served and served.count("namespace: vision") == 3, served)
        expect(f"{overlay}: KServe", all(f"name: {name}\n" in served for name in check.KSERVE) and "storageUri" not in served, served)
        for text in (deployed, job or deployed):
            images = {line.split("image: ")[1] for line in text.splitlines() if "image: " in line}
            expect(f"{overlay}: images", images == {"a/nfold:1", "a/models:1"}, images)
            expect(f"{overlay}: cpu", "cpu: 250m" in text and 'cpu: "' not in text.replace("nvidia", ""), text)
        documents = deployed.split("\n---\n")
        expect(f"{overlay}: namespace", all("namespace: vision" in text for text in documents), deployed)
        expect(f"{overlay}: HPA", "HorizontalPodAutoscaler" not in deployed and "replicas: 2" in deployed, deployed)
        expect(f"{overlay}: label", deployed.count("nfold-check: vision") >= len(documents) + 1, deployed)
        expect("Job", not job or "persistentVolumeClaim" not in job and "value: mine" in job and "namespace: vision" in job, job)
