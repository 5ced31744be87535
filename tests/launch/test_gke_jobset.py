"""launch/gke_jobset.yaml against the schemas of Kubernetes and JobSet, and against what the rest of the project assumes."""

import copy
import runpy

import jsonschema
import kubernetes_validate
import pytest
import yaml

from deepseek_jax import train
from deepseek_jax.flags import load_config, parse
from tests.launch.conftest import ROOT

JOBSET = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())


def fields(required=(), **properties):
  return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


NAMES = {"type": "array", "items": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
# JobSet v1alpha2, as api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset has it, without what is read only.
SCHEMA = fields(
  ("apiVersion", "kind", "metadata", "spec"),
  apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
  kind={"const": "JobSet"},
  metadata=fields(
    ["name"],
    # The longest pod name, with the job's and the pod's number behind it, is a DNS label.
    name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?$"},
    namespace={"type": "string"},
    labels={"type": "object", "additionalProperties": {"type": "string"}},
    annotations={"type": "object", "additionalProperties": {"type": "string"}},
  ),
  spec=fields(
    ["replicatedJobs"],
    replicatedJobs={
      "type": "array",
      "minItems": 1,
      "items": fields(
        ["name", "template"],
        name={"type": "string"},
        groupName={"type": "string"},
        replicas=COUNT,
        template={"type": "object"},  # a Job: Kubernetes has its schema
        dependsOn={
          "type": "array",
          "items": fields(["name", "status"], name={}, status={"enum": ["Ready", "Complete"]}),
        },
      ),
    },
    failurePolicy=fields(
      maxRestarts=COUNT,
      restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
      rules={
        "type": "array",
        "items": fields(
          ["name", "action"],
          name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
          action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
          onJobFailureReasons=NAMES,
          onJobFailureMessagePatterns=NAMES,
          targetReplicatedJobs=NAMES,
        ),
      },
    ),
    successPolicy=fields(["operator"], operator={"enum": ["All", "Any"]}, targetReplicatedJobs=NAMES),
    network=fields(enableDNSHostnames={"type": "boolean"}, subdomain={}, publishNotReadyAddresses={"type": "boolean"}),
    suspend={"type": "boolean"},
    coordinator=fields(["replicatedJob"], replicatedJob={"type": "string"}, jobIndex=COUNT, podIndex=COUNT),
    managedBy={"type": "string"},
    ttlSecondsAfterFinished=COUNT,
  ),
)


def validate(jobset):
  """Raises where a field is unknown, has a value that cannot be, or is missing."""
  jsonschema.validate(jobset, SCHEMA)
  for job in jobset["spec"]["replicatedJobs"]:
    kubernetes_validate.validate(
      {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]},
      "1.37",
      strict=True,
    )


def test_every_field_is_known():
  validate(JOBSET)


@pytest.mark.parametrize(
  "path",
  [
    "spec.failurePolicy.maxRestarts",
    "spec.failurePolicy.rules.0.onJobFailureReasons",
    "spec.replicatedJobs.0.replicas",
    "spec.replicatedJobs.0.template.spec.backoffLimit",
    "spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.onExitCodes.operator",
    "spec.replicatedJobs.0.template.spec.template.spec.restartPolicy",
    "spec.replicatedJobs.0.template.spec.template.spec.containers.0.resources",
    "spec.replicatedJobs.0.template.spec.template.spec.volumes.0.persistentVolumeClaim.claimName",
  ],
)
def test_a_misspelt_field_is_found(path):
  jobset = copy.deepcopy(JOBSET)
  *parents, name = path.split(".")
  place = jobset
  for parent in parents:
    place = place[int(parent) if parent.isdigit() else parent]
  place[name + "x"] = place.pop(name)
  with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match=name):
    validate(jobset)


def test_a_failure_starts_all_pods_again_and_a_mistake_none():
  spec = JOBSET["spec"]
  policy, (job,) = spec["failurePolicy"], (job["template"]["spec"] for job in spec["replicatedJobs"])
  (rule,) = job["podFailurePolicy"]["rules"]
  assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
  assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
  assert set(rule["onExitCodes"]["values"]) == runpy.run_path(ROOT / "launch" / "supervise.py")["NO_RESTART"] - {0}
  assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"] and policy["maxRestarts"] > 0


def test_chips_hosts_and_topology_agree():
  (job,) = (job["template"]["spec"] for job in JOBSET["spec"]["replicatedJobs"])
  pod = job["template"]["spec"]
  chips = 1
  for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
    chips *= int(size)
  (container,) = pod["containers"]
  assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
  assert container["name"] == job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
  assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_python_is_process_1_and_takes_the_arguments():
  (job,) = (job["template"]["spec"] for job in JOBSET["spec"]["replicatedJobs"])
  (container,) = job["template"]["spec"]["containers"]
  assert container["command"] == ["python", "-m", "deepseek_jax.train"]
  values = train.program_flags()
  overrides = parse(["train", *container["args"]], values, "")
  config = load_config(values.config, overrides)
  assert values.workdir.startswith("gs://") and config.model.layers == 95
