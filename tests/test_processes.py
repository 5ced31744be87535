"""Who a process is, found out without starting anything."""

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.processes import ENV_VARS, find_initialize_args

SLURM = {
  "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[3-6]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip
ONE_OF_TWO = {
  "coordinator_address": "host:8000",
  "num_processes": 2,
  "process_id": 1,
  "cluster_detection_method": "deactivate",
}


@pytest.fixture
def environment(monkeypatch):
  """Sets variables, in a process that no scheduler started."""
  pod = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")
  for name in (*ENV_VARS, *SLURM, *OPEN_MPI, *pod):
    monkeypatch.delenv(name, raising=False)

  def set_all(**variables):
    for name, value in variables.items():
      monkeypatch.setenv(name, value)

  return set_all


def test_a_process_that_nobody_placed_is_alone(environment):
  assert find_initialize_args() is None
  assert find_initialize_args(processes=1) is None
  assert find_initialize_args("host:8000", 1, 0) is None
  environment(**SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
  assert find_initialize_args() is None


def test_flags_go_before_variables_and_these_before_the_scheduler(environment):
  environment(**SLURM)
  assert find_initialize_args() == {"cluster_detection_method": "slurm"}
  environment(**dict(zip(ENV_VARS, ("host:8000", "2", "1"), strict=True)))
  assert find_initialize_args() == ONE_OF_TWO
  assert find_initialize_args("[::1]:9", 3, 0)["coordinator_address"] == "[::1]:9"
  assert find_initialize_args(processes=1) is None


def test_open_mpi_is_found_or_asks_for_flags(environment, monkeypatch):
  environment(**OPEN_MPI)
  assert find_initialize_args() == {"cluster_detection_method": "ompi"}
  monkeypatch.delenv("OMPI_COMM_WORLD_RANK")
  monkeypatch.delenv("OMPI_MCA_orte_hnp_uri")  # as Open MPI 5 does
  with pytest.raises(ConfigError, match=r"--coordinator.*--process"):
    find_initialize_args()


# As jax.distributed.initialize comes to them: (coordinator, number of processes, this process).
def place(arguments):
  from jax._src.clusters import ClusterEnv

  return ClusterEnv.auto_detect_unset_distributed_params(
    None, None, None, None, arguments["cluster_detection_method"], 1
  )[:3]


@pytest.mark.parametrize(
  ("nodes", "first"),
  [
    ("node07", "node07"),
    ("node07,other9", "node07"),
    ("node[07-12]", "node07"),
    ("node[007,009-012],other[1-2]", "node007"),
  ],
)
def test_slurm_says_where_process_0_is(environment, nodes, first):
  environment(**SLURM | {"SLURM_STEP_NODELIST": nodes})
  assert place(find_initialize_args()) == (f"{first}:{61440 + 77}", 4, 2)


@pytest.fixture
def tpu_pod(environment, monkeypatch):
  """Sets variables of a pod of a GKE JobSet on TPUs; none of its names has to be known here."""
  from jax._src.clusters import cloud_tpu_cluster

  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
  for name in ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS", "TPU_PROCESS_ADDRESSES"):
    monkeypatch.delenv(name, raising=False)
  environment(
    # With TPU_SKIP_MDS_QUERY jax asks no metadata server. JobSet and Kubernetes set the others.
    TPU_SKIP_MDS_QUERY="1", KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="1",
    JOBSET_NAME="deepseek-67b", JOBSET_RESTART_ATTEMPT="2",
  )  # fmt: skip

  def set_all(**variables):
    # What these do not say jax looks up on the metadata server.
    environment(
      **{"MEGASCALE_NUM_SLICES": "", "MEGASCALE_SLICE_ID": "", "MEGASCALE_COORDINATOR_ADDRESS": ""} | variables
    )

  return set_all


HOSTS = "deepseek-67b-slice-0-0.deepseek-67b,deepseek-67b-slice-0-1.deepseek-67b"


def test_a_jobset_of_one_slice_is_found_by_its_host_names(tpu_pod, monkeypatch):
  tpu_pod(TPU_WORKER_ID="1", TPU_WORKER_HOSTNAMES=HOSTS)
  assert find_initialize_args() == {"cluster_detection_method": "gketpu"}
  assert place(find_initialize_args()) == ("deepseek-67b-slice-0-0.deepseek-67b:8482", 2, 1)


def test_a_jobset_of_several_slices_is_found_by_the_variables_of_megascale(tpu_pod):
  """Worker 1 of slice 1 of 2."""
  tpu_pod(
    TPU_WORKER_ID="1", TPU_WORKER_HOSTNAMES=HOSTS.replace("slice-0", "slice-1"), MEGASCALE_NUM_SLICES="2",
    MEGASCALE_SLICE_ID="1", MEGASCALE_COORDINATOR_ADDRESS="deepseek-67b-slice-0-0.deepseek-67b:8080",
  )  # fmt: skip
  assert place(find_initialize_args()) == ("deepseek-67b-slice-0-0.deepseek-67b:8482", 4, 3)


def test_a_slice_of_one_host_is_alone(tpu_pod):
  tpu_pod(TPU_WORKER_ID="0", TPU_WORKER_HOSTNAMES="localhost", MEGASCALE_NUM_SLICES="1")
  assert find_initialize_args() is None


@pytest.mark.filterwarnings("ignore:Kubernetes environment detected")
def test_a_pod_of_an_indexed_job_that_cannot_find_the_others_does_not_train_alone(environment):
  """Without TPUs jax asks Kubernetes by a package that is not installed here."""
  environment(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="1")
  with pytest.raises(ConfigError, match=r"pod 1 of an indexed Kubernetes job.*--coordinator.*jax\[k8s\]"):
    find_initialize_args()


@pytest.mark.filterwarnings("error")  # that jax looks for the kubernetes package
def test_a_pod_without_a_job_index_is_alone(environment):
  environment(KUBERNETES_SERVICE_HOST="10.0.0.1")
  assert find_initialize_args() is None


@pytest.mark.parametrize(
  ("given", "says"),
  [
    ((None, 2, None), "--coordinator and --process"),
    (("host:8000", None, 1), "without --processes"),
    (("host:8000", 2, None), "without --process$"),
    (("host:8000", 2, 2), "--process 0 to --processes - 1"),
    (("host:8000", 0, 0), "--processes must be 1 or more"),
    ((None, 1, 1), "--process 0 to"),
    (("host:8000", 2, -1), "--process 0 to"),
    (("host", 2, 1), "HOST:PORT"),
    ((":8000", 2, 1), "HOST:PORT"),
    (("host:65536", 2, 1), "HOST:PORT"),
  ],
)
def test_flags_that_are_missing_or_wrong_are_named(environment, given, says):
  with pytest.raises(ConfigError, match=says):
    find_initialize_args(*given)


@pytest.mark.parametrize(
  ("values", "says"),
  [(("host:8000",), "without JAX_NUM_PROCESSES and JAX_PROCESS_ID"), (("host:8000", "two", "0"), "must be integers")],
)
def test_variables_that_are_missing_or_wrong_are_named(environment, values, says):
  environment(**dict(zip(ENV_VARS, values, strict=False)))
  with pytest.raises(ConfigError, match=says):
    find_initialize_args()


def test_what_a_scheduler_left_out_is_an_error_and_not_a_run_alone(environment):
  environment(**OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "many"})
  with pytest.raises(ConfigError, match=r"that of OmpiCluster.*many.*--processes=1"):
    find_initialize_args()
