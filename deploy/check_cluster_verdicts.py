"""The verdicts of deploy/check-cluster: of what was counted alone."""
import json, math, re


class Wrong(Exception):
    """Why a step's verdict is `wrong`."""


def counts(log):
    """What a client counted: the report of `nfold bench load --json`, or deploy/check_cluster_client.py's line, in a pod's log
    among what was said on stderr."""
    decoder = json.JSONDecoder()
    for start in re.finditer(r"^\{", log, re.MULTILINE):
        try:
            report, _ = decoder.raw_decode(log, start.start())
        except ValueError:
            continue
        steps = report.get("steps", [report])
        outcomes, slowest = {}, 0.0
        for step in steps:
            for name, count in step["outcomes"].items():
                outcomes[name] = outcomes.get(name, 0) + count
            slowest = max(slowest, (step.get("latency_ms") or {}).get("max", 0), step.get("slowest_ms", 0))
        return {"outcomes": outcomes, "slowest_ms": slowest, "moved": report.get("moved", 0)}
    raise Wrong(f"no report in the load's log: {log.strip()[-300:]}")


def tally(loads, crowded):
    """Sent, answered, refused and failed. Where there are more callers than room, a deadline is a refusal, as is a 4xx."""
    refusals = {"refused", "deadline", "client_error"} if crowded else {"refused"}
    of = lambda names: sum(count for load in loads for name, count in load["outcomes"].items() if name in names)
    everything = {name for load in loads for name in load["outcomes"]}
    return {"sent": of(everything), "answered": of({"ok"}), "refused": of(refusals), "failed": of(everything - refusals - {"ok"})}


def judge(loads, seen, crowded=False, budget=0, slowest_s=5.0, refused=0.0):
    """Everything that is wrong with a step."""
    reasons, sums = [], tally(loads, crowded)
    for load in loads:
        sent = sum(load["outcomes"].values())
        if sent < load["expected"]:
            reasons.append(f"{load['client']} sent {sent} requests, {load['expected']:.0f} were due: the load was not there")
        if not crowded and not budget and load["slowest_ms"] > 1e3 * slowest_s:
            reasons.append(f"{load['client']}: an answer took {load['slowest_ms'] / 1e3:.1f} s, {slowest_s:.0f} s are allowed")
    allowed = sums["refused"] if crowded else math.floor(refused * sums["sent"])
    lost = sums["failed"] + max(0, sums["refused"] - allowed)
    if lost > budget:
        named = {}
        for load in loads:
            for name, count in load["outcomes"].items():
                named[name] = named.get(name, 0) + count
        ended = ", ".join(f"{count} {name}" for name, count in sorted(named.items()) if name != "ok")
        hint = "; where there is no room for as many, give less --rate, or --refused" if sums["refused"] > allowed else ""
        reasons.append(f"{lost} requests were lost, {budget} are allowed ({ended}){hint}")
    if loads and not sums["answered"]:
        reasons.append("nothing was answered")
    for (pod, container), (restarts, killed) in sorted(seen.items()):
        if killed:
            reasons.append(f"pod {pod}: {container} was killed for its memory (OOMKilled)")
        elif restarts:
            reasons.append(f"pod {pod}: {container} was restarted {restarts} times")
    return reasons


def lossy_budget(rate, gap_s, replicas, slowest_s, clients):
    """What pods that are killed may lose: their share of what comes until they are replaced, and what they had."""
    return math.ceil(rate * gap_s / replicas + rate * slowest_s + clients)


def judge_job(lines, wanted):
    """Every image exactly once, and classified."""
    names, broken = {}, 0
    for line in lines:
        row = json.loads(line)
        name = row["image"].rsplit("/", 1)[-1]
        names[name] = names.get(name, 0) + 1
        broken += "error" in row
    twice, missing = sorted(n for n, c in names.items() if c > 1), sorted(wanted - names.keys())
    foreign = sorted(names.keys() - wanted)
    told = [(twice, "more than once"), (missing, "not at all"), (foreign, "though they were not given")]
    reasons = [f"{len(found)} images were classified {how}, {found[0]} for one" for found, how in told if found]
    return reasons + ([f"{broken} images could not be classified"] if broken else [])
