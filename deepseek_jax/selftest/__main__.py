"""Tests each kernel that a config takes on the accelerator at hand:  python -m deepseek_jax.selftest --config=v3

Kernels and shapes are those of the config's own training step, cut to a slice where they are large. Each is compared with
XLA's form of it, forward and backward, and timed beside it. One that crashes or hangs is found too: kernels run in a process
of their own. Results are kept in the cache folder; a second call tests what is missing. Any field of the config can be set:
--config.model.precision=fp8. Exit codes: 0 all pass or there is nothing to test, 1 one does not (wrong, failed, crashed, hung, slower
than XLA's form, or not to be compared), 2 a config that cannot run, 3 not all were reached, and the same command goes on.
"""

import json

from absl import flags

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program, write_output

UNFINISHED = 3


def main(argv) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "v3")
  flags.DEFINE_integer(
    "devices",
    None,
    "devices of the mesh whose shapes are tested (default: those of this host, or where they do not fit as few as the mesh allows)",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_float("seconds", 0, "after which no further kernel is begun; 0: all are tested", flag_values=values)
  flags.DEFINE_boolean("again", False, "test also what the cache folder has results of", flag_values=values)
  flags.DEFINE_string(
    "json", None, "also write the report to this file; - for stdout, and nothing else", flag_values=values
  )
  overrides = parse(argv, values, __doc__)
  config = load_config(values.config, overrides)

  # Imported late: --help and config errors need no jax.
  import jax

  from deepseek_jax.model.kernel_choice import check_kernels
  from deepseek_jax.selftest import table
  from deepseek_jax.selftest.check import OK
  from deepseek_jax.selftest.machine import accelerators, describe_device
  from deepseek_jax.selftest.run import results_folder
  from deepseek_jax.selftest.supervise import ChildFailed, Report, run_selftest

  quiet, shown = values.json == "-", []

  def on_result(report, result):
    if not quiet:
      print(table.row(result) if shown else f"{table.header(report)}\n{table.row(result)}", flush=True)
    shown.append(result)

  if not accelerators():
    check_kernels(config.model)
    report = Report(describe_device(jax.devices()[0], config.model.compute_dtype))
  else:
    try:
      report = run_selftest(
        config, results_folder(config), devices=values.devices or 0, any_mesh=True, seconds=values.seconds,
        again=values.again, on_result=on_result,
      )  # fmt: skip
    except ChildFailed as error:
      raise ConfigError(f"the process that tests kernels ended before it came to one: {error}") from None
  if report.refused:
    raise ConfigError(report.refused)
  if not quiet:
    print(table.summary(report))
  if values.json:
    write_output(json.dumps(report.json(), indent=1) + "\n", values.json)
  if any(result.verdict != OK for result in report.results.values()):
    return 1
  return 0 if report.complete else UNFINISHED


if __name__ == "__main__":
  run_program(main)
