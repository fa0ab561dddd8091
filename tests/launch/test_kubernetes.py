"""`launch=kubernetes`: what is rendered, held against the schemas of the cluster's own types.

kubernetes_schema.json is what the manifests use of JobSet v1alpha2, batch/v1, core/v1 and Kubeflow
Trainer v1alpha1, taken from the package kubeflow-trainer-api 2.3.0 (generated from their OpenAPI).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import exit_codes
from launch.handover import PLAN, read_handover
from launch.kubernetes import KubernetesSpec
from launch.manifest import KINDS
from launch.node import node_of
from launch.protocol import Job
from tests.test_architecture import ROOT
from trainer.directory import CONFIG
from trainer.stored_config import read_stored

SCHEMAS = json.loads(Path(__file__).with_name("kubernetes_schema.json").read_text())
TYPES = {"string": str, "integer": int, "boolean": bool}
TREE: dict[str, Any] = {
    "runs": "/runs", "stop_at": None, "deterministic": "off", "resume": "auto", "name": "demo",
    "text": "two\nlines: {{ x }} 'q' \"d\" # $(A)",
}  # fmt: skip


def spec(**changes: Any) -> KubernetesSpec:
    values: dict[str, Any] = {"image": "registry/tessera:1", "claim": "training", "nodes": 2,
                              "processes": 4, "gpus": 4}  # fmt: skip
    return KubernetesSpec(**values | changes)


def job(folder: str = "/runs/demo", **tree: Any) -> Job:
    return Job(run=None, tree=TREE | tree, folder=Path(folder), end=None)


def documents(text: str) -> dict[str, dict[str, Any]]:
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


def problems(value: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """Return what of a value is not as the schema has it; keys that it does not know count."""
    kind = schema["type"]
    if kind == "object":
        known = schema.get("properties")
        if known is None:
            return [] if all(isinstance(text, str) for text in value.values()) else [where]
        found = [f"{where}.{key} unknown" for key in value.keys() - known.keys()]
        found += [f"{where}.{key} missing" for key in set(schema["required"]) - value.keys()]
        return found + [
            each for key in value.keys() & known.keys()
            for each in problems(value[key], known[key], f"{where}.{key}")
        ]  # fmt: skip
    if kind == "array":
        rows = value if isinstance(value, list) else [None]
        return [each for row in rows for each in problems(row, schema["items"], f"{where}[]")]
    return [] if type(value) is TYPES[kind] else [f"{where} is {value!r}, no {kind}"]


def pods(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the job of all pods."""
    owner = found.get("JobSet") or found["TrainingRuntime"]["spec"]["template"]
    (replicated,) = owner["spec"]["replicatedJobs"]
    return dict(replicated["template"]["spec"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"gpus": 0, "processes": 1, "nodes": 1},
        {"cpus": "64", "memory": "500Gi", "namespace": "ml", "queue": "team-a"},
    ],
)  # fmt: skip
def test_every_document_is_of_the_clusters_own_types(kind: str, changes: dict[str, Any]) -> None:
    found = documents(spec(kind=kind, **changes).manifest(job()))
    own = ["JobSet"] if kind == "jobset" else ["TrainingRuntime", "TrainJob"]
    assert list(found) == ["ConfigMap", "Secret", *own]
    for name in own:
        assert problems(found[name], SCHEMAS[name], name) == []


def test_the_schema_refuses_what_the_cluster_would() -> None:
    found = documents(spec().manifest(job()))["JobSet"]
    found["spec"]["failurePolicy"]["maxRestart"] = 3
    found["spec"]["failurePolicy"]["maxRestarts"] = "3"
    del found["spec"]["replicatedJobs"][0]["name"]
    assert sorted(problems(found, SCHEMAS["JobSet"])) == [
        ".spec.failurePolicy.maxRestart unknown",
        ".spec.failurePolicy.maxRestarts is '3', no integer",
        ".spec.replicatedJobs[].name missing",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_starts_all_pods_again_and_a_final_failure_ends_the_job(kind: str) -> None:
    found = documents(spec(kind=kind, requeues=7).manifest(job()))
    work = pods(found)
    (rule,) = work["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    codes = rule["onExitCodes"]["values"]
    assert {
        exit_codes.BAD_CONFIG,
        exit_codes.DATA,
        exit_codes.INTERNAL,
        exit_codes.NO_PROGRESS,
    } <= set(codes)
    assert set(exit_codes.MEANINGS) - set(codes) == {exit_codes.FINISHED, exit_codes.PREEMPTED}
    assert work["backoffLimit"] == 0
    assert work["template"]["spec"]["restartPolicy"] == "Never"  # or no policy is allowed
    owner = found.get("JobSet") or found["TrainingRuntime"]["spec"]["template"]
    policy = owner["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    (final,) = policy["rules"]
    assert (final["action"], final["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_files_in_the_pods_are_read_back_by_the_launcher_as_they_were(tmp_path: Path) -> None:
    found = documents(spec().manifest(job("/runs/My_Demo-2")))
    (tmp_path / CONFIG).write_text(found["ConfigMap"]["data"][CONFIG])
    (tmp_path / PLAN).write_text(found["Secret"]["stringData"][PLAN])
    assert read_stored(tmp_path / CONFIG) == TREE
    plan = read_handover(tmp_path)
    assert (plan.folder, plan.nodes, plan.processes, plan.restarts) == ("/runs/My_Demo-2", 2, 4, 3)
    assert plan.counts_starts  # maxRestarts: a lost pod is worth another start
    assert plan.key not in json.dumps(found["ConfigMap"])
    (container,) = pods(found)["template"]["spec"]["containers"]
    around = {each["name"]: each.get("value") for each in container["env"]}
    assert around == {"NODE_RANK": None, "MASTER_ADDR": "my-demo-2-node-0-0.my-demo-2"}
    environ = {"NODE_RANK": "1", "MASTER_ADDR": str(around["MASTER_ADDR"])}
    assert node_of(environ, plan).ranks == range(4, 8)
    assert container["command"][-1] == {m["name"]: m for m in container["volumeMounts"]}[
        "handover"]["mountPath"]  # fmt: skip


def test_names_of_runs_become_names_of_services(tmp_path: Path) -> None:
    for folder in ("/runs/Demo_1.x", "/runs/7b", f"/runs/{'a' * 99}", "/runs/a-"):
        name = documents(spec().manifest(job(folder)))["JobSet"]["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,43}[a-z0-9])?", name), name


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kind": "job"}, "set it to jobset or trainjob"), ({"nodes": 0}, "launch.nodes=0"),
        ({"gpus": 2}, "set launch.processes=2"), ({"memory": "64 GB"}, "no quantity"),
        ({"namespace": "a b"}, "no name in Kubernetes"), ({"claim": "x\n- y"}, "no name"),
        ({"requeues": -1}, "set it to 0 or more"), ({"restarts": -1}, "negative"),
    ],
)  # fmt: skip
def test_what_the_cluster_would_refuse_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        spec(**changes)


def test_what_pods_need_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"launch\.image is missing"):
        spec(image=None).check()
    with pytest.raises(ValueError, match=r"launch\.claim is missing"):
        spec(claim=None).check()
    with pytest.raises(ValueError, match="set runs=/runs, where the pods mount"):
        spec().manifest(job(runs="runs"))


def test_a_manifest_is_applied_only_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called; cat > {tmp_path}/applied\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    output = tmp_path / "run.yaml"
    assert spec(output=str(output)).start(job()) == exit_codes.FINISHED
    assert "JobSet" in documents(output.read_text())
    assert not (tmp_path / "called").exists()
    assert spec(apply=True).start(job()) == exit_codes.FINISHED
    assert (tmp_path / "called").read_text() == "apply -f -\n"
    assert "JobSet" in documents((tmp_path / "applied").read_text())
    assert capsys.readouterr().out == ""
    kubectl.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs kubectl"):
        spec(apply=True).start(job())


@pytest.mark.slow
def test_the_command_prints_a_manifest_and_nothing_else(tmp_path: Path) -> None:
    words = ["experiment=demo", "launch=kubernetes", "launch.image=i", "launch.claim=c",
             "launch.nodes=2", f"runs={tmp_path}", f"launch.mount={tmp_path}"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "launch", "train", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == exit_codes.FINISHED, done.stderr
    assert list(documents(done.stdout)) == ["ConfigMap", "Secret", "JobSet"]
    assert not list(tmp_path.iterdir())
