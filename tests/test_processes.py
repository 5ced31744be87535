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
  for name in (*ENV_VARS, *SLURM, *OPEN_MPI, "KUBERNETES_SERVICE_HOST", "TPU_WORKER_HOSTNAMES"):
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


def test_a_slice_of_a_tpu_pod_is_found_by_its_host_names(environment, monkeypatch):
  from jax._src.clusters import cloud_tpu_cluster

  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  environment(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_ID="1", TPU_WORKER_HOSTNAMES="a,b")
  environment(MEGASCALE_NUM_SLICES="2", MEGASCALE_SLICE_ID="0")
  assert find_initialize_args() == {"cluster_detection_method": "gketpu"}
  environment(MEGASCALE_NUM_SLICES="1", TPU_WORKER_HOSTNAMES="localhost")
  assert find_initialize_args() is None


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
