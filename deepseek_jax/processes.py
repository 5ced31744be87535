"""Which process of a run this one is: from its flags, its environment, or the scheduler that started it."""

import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from deepseek_jax.errors import ConfigError

FLAGS = ("--coordinator", "--processes", "--process")
ENV_VARS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def define_process_flags(flag_values: flags.FlagValues) -> None:
  """Defines --coordinator, --processes and --process."""
  flags.DEFINE_string(
    "coordinator",
    None,
    f"HOST:PORT of process 0. If none of the three flags is given: {', '.join(ENV_VARS)}; else Slurm, Open MPI, a TPU pod "
    "or an indexed Kubernetes job; else a single process.",
    flag_values=flag_values,
  )
  flags.DEFINE_integer(
    "processes",
    None,
    "processes of the run; 1: a single process, whatever the environment says",
    flag_values=flag_values,
  )
  flags.DEFINE_integer("process", None, "which of them this one is, from 0", flag_values=flag_values)


def find_initialize_args(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize`, from the values of the flags or else from the environment.

  None: a single process. Nothing is started. Raises ConfigError where values are missing, malformed or contradict
  each other.
  """
  names: Sequence[str] = FLAGS
  given: Sequence[Any] = (coordinator, processes, process)
  if all(value is None for value in given):
    names, given = ENV_VARS, [os.environ.get(variable) for variable in ENV_VARS]
    if all(value is None for value in given):
      return _find_scheduler_args()
  pairs = list(zip(names, given, strict=True))
  got = ", ".join(f"{name}={value}" for name, value in pairs if value is not None)
  try:
    count, index = (None if value is None else int(value) for value in given[1:])
  except ValueError:
    raise ConfigError(f"{names[1]} and {names[2]} must be integers, got {got}") from None
  if count is not None and not 0 <= (index or 0) < count:
    raise ConfigError(f"{names[1]} must be 1 or more and {names[2]} 0 to {names[1]} - 1, got {got}")
  if count == 1:
    return None
  if missing := [name for name, value in pairs if value is None]:
    raise ConfigError(
      f"a run of several processes needs {', '.join(names)}: got {got}, without {' and '.join(missing)}"
    )
  host, _, port = given[0].rpartition(":")
  if not (host and port.isdecimal() and 0 < int(port) < 65536):
    raise ConfigError(f"{names[0]} must be HOST:PORT with a port from 1 to 65535, got {given[0]!r}")
  return {
    "coordinator_address": given[0],
    "num_processes": count,
    "process_id": index,
    "cluster_detection_method": "deactivate",
  }


def _find_scheduler_args() -> dict[str, Any] | None:
  """`find_initialize_args` from the environment of a scheduler, as jax detects it."""
  # No public name tells the number of processes without starting them.
  from jax._src.clusters import ClusterEnv, K8sCluster

  for cluster in ClusterEnv._cluster_types:
    # In any pod jax would ask Kubernetes which job it belongs to; a notebook's pod belongs to none.
    if cluster.opt_in_only_method or (cluster is K8sCluster and "JOB_COMPLETION_INDEX" not in os.environ):
      continue
    try:
      if cluster.is_env_present():
        return {"cluster_detection_method": cluster.name or None} if cluster.get_process_count() > 1 else None
    except Exception as error:  # what is incomplete raises whatever it comes to
      raise ConfigError(
        f"the environment is that of {cluster.__name__}, but does not say which processes there are "
        f"({type(error).__name__}: {error}): give {', '.join(FLAGS)}; --processes=1 trains in a single process"
      ) from None
  if os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
    raise ConfigError(
      "Open MPI started several processes, and this version of jax cannot read where: give --coordinator=HOST:PORT "
      "--processes=$OMPI_COMM_WORLD_SIZE --process=$OMPI_COMM_WORLD_RANK"
    )
  if (index := os.environ.get("JOB_COMPLETION_INDEX", "0")) != "0":
    raise ConfigError(
      f"this is pod {index} of an indexed Kubernetes job, and jax cannot ask Kubernetes for the others: give "
      f"{', '.join(FLAGS)}, or install jax[k8s]"
    )
  return None
