"""Stand-ins for gcloud, kubectl, sbatch, srun, scontrol, scancel and squeue. Each refuses what its documentation does not have.

`install` makes them programs. State is in the folder $FAKES:

- argv.jsonl: every call that was understood.
- states: what `queued-resources describe` says, a line for each call, the last one from then on; no file: there is none.
- workers: on how many hosts `ssh --worker=all` runs its command, each with a home of its own in hosts/; no file: on none.
- tasks: how many tasks srun starts, which write their pids to pids.STEP; no file: none.
- requeued: made by `scontrol requeue`.
"""

import argparse
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

STATE = pathlib.Path(os.environ.get("FAKES", "."))


def parser(*flags, positionals=(), switches=()):
  """A parser of --FLAG=VALUE or --FLAG VALUE, `positionals` and `switches` without a value. No abbreviations."""
  parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=True)
  for name in positionals:
    parser.add_argument(name)
  for flag in flags:
    parser.add_argument(flag)
  for switch in switches:
    parser.add_argument(switch, action="store_true")
  return parser


# https://cloud.google.com/sdk/gcloud/reference: compute/tpus, container and storage; flags for all commands.
WIDE = ("--project", "--format")
SSH = ("--command", "--worker", "--zone", "--ssh-flag", "--ssh-key-file", *WIDE)
CREATE = (
  "--zone",
  "--accelerator-type",
  "--metadata",
  "--metadata-from-file",
  "--network",
  "--subnetwork",
  "--service-account",
  *WIDE,
)
GCLOUD = {
  "compute tpus tpu-vm ssh": parser(*SSH, positionals=["name"], switches=["--internal-ip", "--plain"]),
  "compute tpus tpu-vm create": parser(
    *CREATE, "--version", "--topology", "--type", positionals=["name"], switches=["--spot", "--reserved", "--quiet"]
  ),
  "compute tpus tpu-vm delete": parser("--zone", *WIDE, positionals=["name"], switches=["--quiet", "--async"]),
  "compute tpus queued-resources ssh": parser(*SSH, "--node", "--batch-size", positionals=["name"]),
  "compute tpus queued-resources create": parser(
    *CREATE, "--runtime-version", "--node-id", "--node-count", "--node-prefix", "--valid-until-duration",
    positionals=["name"], switches=["--spot", "--reserved", "--async", "--quiet"],
  ),
  "compute tpus queued-resources describe": parser("--zone", *WIDE, positionals=["name"]),
  "compute tpus queued-resources delete": parser(
    "--zone", *WIDE, positionals=["name"], switches=["--force", "--async", "--quiet"]
  ),
  "container clusters get-credentials": parser("--zone", "--region", "--location", *WIDE, positionals=["name"]),
  "container node-pools create": parser(
    "--cluster", "--location", "--node-locations", "--machine-type", "--tpu-topology", "--num-nodes", *WIDE,
    positionals=["name"], switches=["--spot"],
  ),
  "storage buckets create": parser("--location", *WIDE, positionals=["url"]),
  "storage buckets add-iam-policy-binding": parser("--member", "--role", *WIDE, positionals=["url"]),
}  # fmt: skip
# https://kubernetes.io/docs/reference/kubectl: of what the documentation of this project calls.
KUBECTL = {
  "apply": parser("-f", "--namespace", switches=["--server-side"]),
  "get": parser("--output", "--selector", "--namespace", positionals=["kind", "name"], switches=["--watch"]),
  "logs": parser("--container", "--selector", "--namespace", "--tail", switches=["--follow"]),
  "delete": parser("--namespace", positionals=["kind", "name"], switches=["--wait"]),
}
# https://slurm.schedmd.com: sbatch, srun, scontrol, scancel, squeue.
JOB_NAMES = (
  "nodes",
  "ntasks-per-node",
  "gpus-per-node",
  "cpus-per-task",
  "mem",
  "time",
  "job-name",
  "partition",
  "account",
)
JOB = tuple(f"--{name}" for name in JOB_NAMES)
SBATCH = parser(
  *JOB,
  "--output",
  "--error",
  "--signal",
  "--open-mode",
  "--export",
  switches=["--requeue", "--exclusive", "--parsable"],
)
SRUN = parser(*JOB, "--kill-on-bad-exit", "--wait", "--output", switches=["--label", "--unbuffered"])
SCONTROL = {"requeue": parser(positionals=["job"])}
SCANCEL = parser("--signal", positionals=["job"], switches=["--batch", "--full"])
SQUEUE = parser("--jobs", "--format", switches=["--me"])


def main(program, argv):
  globals()[f"run_{program}"](argv)


def parse(program, parsers, argv):
  """(command, its arguments) of a program with commands."""
  for command, its_parser in parsers.items():
    words = command.split()
    if argv[: len(words)] == words:
      its_parser.prog = f"{program} {command}"
      return command, its_parser.parse_args(argv[len(words) :])
  sys.exit(f"{program}: no such command: {shlex.join(argv)}")


def run_gcloud(argv):
  command, options = parse("gcloud", GCLOUD, argv)
  if command.endswith("queued-resources create"):
    if bool(options.node_id) == bool(options.node_count) or not (options.accelerator_type and options.runtime_version):
      sys.exit("gcloud: --node-id or --node-count, --accelerator-type and --runtime-version are required")
    (STATE / "states").write_text("PROVISIONING\nACTIVE\n")
  elif command.endswith("describe"):
    describe(options.name)
  elif command.endswith("queued-resources delete"):
    state = (STATE / "states").read_text().split()[0]
    if not options.force and state not in ("ACCEPTED", "FAILED", "SUSPENDED"):
      sys.exit(f"gcloud: {options.name} has nodes: --force")
    (STATE / "states").unlink()
  elif command.endswith("ssh") and (STATE / "workers").exists():
    on_hosts(options)


def describe(name):
  path = STATE / "states"
  if not path.exists():
    sys.exit(f"ERROR: (gcloud) NOT_FOUND: Resource 'queuedResources/{name}' was not found")
  first, *rest = path.read_text().splitlines()
  path.write_text("\n".join(rest or [first]))
  print(first)


def on_hosts(options):
  """Runs --command on the hosts, one after the other."""
  count = int((STATE / "workers").read_text())
  for host in range(count) if options.worker == "all" else [int(options.worker or 0)]:
    home = STATE / "hosts" / str(host)
    if code := subprocess.run(["sh", "-c", options.command], cwd=home, env=os.environ | {"HOME": str(home)}).returncode:
      sys.exit(code)


def run_kubectl(argv):
  command, options = parse("kubectl", KUBECTL, argv)
  if command == "apply" and not options.f.startswith("https://"):
    assert "\nkind: JobSet\n" in pathlib.Path(options.f).read_text()


def run_sbatch(argv):
  script = next(i for i, word in enumerate(argv) if not word.startswith("-"))
  SBATCH.parse_args([*directives(argv[script]), *argv[:script]])


def directives(script):
  """The options in the #SBATCH lines of a script, which end at the first line that is no comment."""
  options = []
  for line in pathlib.Path(script).read_text().splitlines():
    if line.startswith("#SBATCH "):
      options += shlex.split(line.removeprefix("#SBATCH "), comments=True)
    elif line and not line.startswith("#"):
      break
  return options


def run_srun(argv):
  """Starts the tasks, forwards signals to them, and ends with the highest of their exit codes.

  When one has ended, the others have --wait seconds. Variables as "OUTPUT ENVIRONMENT VARIABLES" of srun's manual has them.
  """
  command = next(i for i, word in enumerate(argv) if not word.startswith("-"))
  options = SRUN.parse_args(argv[:command])
  if not (STATE / "tasks").exists():
    return
  count = int((STATE / "tasks").read_text())
  job = {
    "SLURM_JOB_ID": os.environ["SLURM_JOB_ID"], "SLURM_NTASKS": str(count), "SLURM_NPROCS": str(count),
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_TASKS_PER_NODE": str(count), "SLURM_NODEID": "0",
  }  # fmt: skip
  tasks = []
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: [task.send_signal(number) for task in tasks])
  for task in range(count):
    place = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}
    tasks.append(subprocess.Popen(argv[command:], env=os.environ | job | place))
  restart = os.environ.get("SLURM_RESTART_COUNT", "0")
  (STATE / f"pids.{restart}").write_text(" ".join(str(task.pid) for task in tasks))
  while all(task.poll() is None for task in tasks):
    time.sleep(0.02)
  deadline = time.monotonic() + float(options.wait)
  while any(task.poll() is None for task in tasks):
    if time.monotonic() > deadline or options.kill_on_bad_exit != "0":
      for task in tasks:
        task.kill()
    time.sleep(0.02)
  sys.exit(max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks))


def run_scontrol(argv):
  _, options = parse("scontrol", SCONTROL, argv)
  if options.job != os.environ["SLURM_JOB_ID"]:
    sys.exit(f"scontrol: Invalid job id specified: {options.job}")
  (STATE / "requeued").touch()


def run_scancel(argv):
  SCANCEL.parse_args(argv)


def run_squeue(argv):
  SQUEUE.parse_args(argv)


def install(folder, state):
  """Makes the stand-ins programs in `folder`; returns the environment in which they are found."""
  folder.mkdir()
  for program in ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "scancel", "squeue"):
    path = folder / program
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {pathlib.Path(__file__).resolve()} {program} "$@"\n')
    path.chmod(0o755)
  state.mkdir(exist_ok=True)
  return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "FAKES": str(state)}


def calls(state):
  """Every call that was understood, as lists of words."""
  path = state / "argv.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2:])
  with (STATE / "argv.jsonl").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\n")
