"""The manifest of a run on Kubernetes: what each pod runs, and what becomes of it when it ends.

A TrainJob comes with a runtime of its own, since only a runtime can say what exit codes mean.
"""

from typing import TYPE_CHECKING, Any

from launch.exit_codes import FINISHED, MEANINGS, PREEMPTED
from launch.handover import PLAN, handover_texts
from launch.protocol import Job
from trainer.directory import CONFIG

if TYPE_CHECKING:
    from launch.kubernetes import KubernetesSpec

JOBSET, TRAINJOB = KINDS = ("jobset", "trainjob")
PLACE = "/etc/tessera"
NODE = "node"
"""Of the replicated job and the container."""
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_JOBSET_API, _TRAINER_API = "jobset.x-k8s.io/v1alpha2", "trainer.kubeflow.org/v1alpha1"
_PODS = "The pods. Exit code 75, or the loss of a pod, starts all of them again."
Tree = dict[str, Any]


def render(spec: "KubernetesSpec", job: Job, name: str) -> str:
    """Return the documents of a run that is called `name` in the cluster."""
    config, plan = handover_texts(
        job, nodes=spec.nodes, processes=spec.processes,
        restarts=spec.max_restarts(spec.world_size), watchdog=spec.watchdog, counts_starts=True,
    )  # fmt: skip
    documents: list[tuple[str, Tree]] = [
        ("What to train: the config as it was composed and checked.",
         _document("v1", "ConfigMap", spec, name) | {"data": {CONFIG: config}}),
        ("How the pods start it, and the key by which their launchers know each other.",
         _document("v1", "Secret", spec, name) | {"stringData": {PLAN: plan}}),
    ]  # fmt: skip
    pods = _job_set(spec, name)
    if spec.kind == JOBSET:
        job_set = _document(_JOBSET_API, "JobSet", spec, name) | {"spec": pods}
        documents.append((_PODS, job_set))
    else:
        runtime = {"mlPolicy": {"numNodes": spec.nodes}, "template": {"spec": pods}}
        reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name}
        made = _document(_TRAINER_API, "TrainingRuntime", spec, name) | {"spec": runtime}
        run = _document(_TRAINER_API, "TrainJob", spec, name) | {"spec": {"runtimeRef": reference}}
        documents += [(_PODS, made), ("The run.", run)]
    return "---\n".join(f"# {comment}\n{_yaml(tree)}" for comment, tree in documents)


def _document(api: str, kind: str, spec: "KubernetesSpec", name: str) -> Tree:
    metadata: Tree = {"name": name, "labels": {"app.kubernetes.io/name": "tessera"}}
    if spec.namespace:
        metadata["namespace"] = spec.namespace
    if spec.queue and kind in ("JobSet", "TrainJob"):
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = spec.queue
    return {"apiVersion": api, "kind": kind, "metadata": metadata}


def _job_set(spec: "KubernetesSpec", name: str) -> Tree:
    final = {
        "action": "FailJobSet", "name": "final", "onJobFailureReasons": ["PodFailurePolicy"],
    }  # fmt: skip
    template: Tree = {"spec": _job(spec, name)}
    if spec.kind == TRAINJOB:  # by it the Trainer finds the pods that train
        template = {"metadata": {"labels": {
            "trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}} | template  # fmt: skip
    return {
        "network": {"enableDNSHostnames": True, "subdomain": name},
        "failurePolicy": {"maxRestarts": spec.requeues, "rules": [final]},
        "replicatedJobs": [{"name": NODE, "replicas": 1, "template": template}],
    }


def _job(spec: "KubernetesSpec", name: str) -> Tree:
    """Return the job of all pods: the first one that fails ends it, and its code says how."""
    codes = sorted(MEANINGS.keys() - {FINISHED, PREEMPTED})
    final = {"containerName": NODE, "operator": "In", "values": codes}
    return {
        "completionMode": "Indexed",
        "completions": spec.nodes,
        "parallelism": spec.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": final}]},
        "template": {
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": spec.grace_seconds,
                "containers": [_container(spec, name)],
                "volumes": _volumes(spec, name),
            }
        },
    }


def _container(spec: "KubernetesSpec", name: str) -> Tree:
    wanted: Tree = {"cpu": spec.cpus, "memory": spec.memory, "nvidia.com/gpu": spec.gpus or None}
    limits = {key: str(value) for key, value in wanted.items() if value is not None}
    return {
        "name": NODE,
        "image": spec.image,
        "command": ["python", "-m", "launch.node", PLACE],
        "env": [
            {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}},
            {"name": "MASTER_ADDR", "value": f"{name}-{NODE}-0-0.{name}"},
        ],
        **({"resources": {"limits": limits}} if limits else {}),
        "volumeMounts": [
            {"name": "handover", "mountPath": PLACE, "readOnly": True},
            {"name": "runs", "mountPath": spec.mount},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _volumes(spec: "KubernetesSpec", name: str) -> list[Tree]:
    sources = [{"configMap": {"name": name}}, {"secret": {"name": name}}]
    return [
        {"name": "handover", "projected": {"sources": sources}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": spec.claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": spec.shared_memory}},
    ]


def _yaml(tree: Tree) -> str:
    """Return YAML in which texts of several lines stand as they are."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Of this call alone: the representer below is no one else's."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return str(yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=100))
