"""Tests each kernel that a config uses on the local accelerator:  python -m deepseek_jax.selftest --config=v3

Kernels and shapes are those of the config's own training step; large ones are cut to a slice. Each kernel is compared
with XLA's implementation, forward and backward, and timed with it. Kernels run in a process of their own, so that one
that crashes or hangs is found too. Results are saved in the cache folder; a second call tests what is missing. Any
field of the config can be set: --config.model.precision=fp8. Exit codes: 0 all pass or there is nothing to test, 1 one
does not (wrong, failed, crashed, hung, slower than XLA, or not comparable), 2 a config that cannot run, 3 not all were
reached: run the same command again.
"""

import json
from collections.abc import Sequence

from absl import flags

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program, write_output

UNFINISHED = 3


def main(argv: Sequence[str]) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "v3")
  flags.DEFINE_integer(
    "devices",
    None,
    "devices of the mesh whose shapes are tested (default: those of this host, or where they do not fit as few as the mesh allows)",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_float("seconds", 0, "after which no further kernel is started; 0: all are tested", flag_values=values)
  flags.DEFINE_boolean(
    "again", False, "also test kernels whose results are saved in the cache folder", flag_values=values
  )
  flags.DEFINE_string(
    "json", None, "also write the report to this file; - for stdout, and nothing else", flag_values=values
  )
  flags.DEFINE_string("stage", None, "stage of training to test, of a config that has `stages`", flag_values=values)
  overrides = parse(argv, values, __doc__)
  config = load_config(values.config, overrides)

  # Imported late: --help and config errors need no jax.
  import jax

  from deepseek_jax.model.kernel_choice import check_kernels
  from deepseek_jax.selftest import table
  from deepseek_jax.selftest.check import OK, Result
  from deepseek_jax.selftest.machine import accelerators, describe_device
  from deepseek_jax.selftest.run import results_folder
  from deepseek_jax.selftest.supervise import ChildFailed, Report, run_selftest
  from deepseek_jax.stages import find_stage, resolve_stages

  config = find_stage(resolve_stages(config), values.stage or "").config
  quiet = values.json == "-"
  header_printed = False

  def on_result(report: Report, result: Result) -> None:
    nonlocal header_printed
    if quiet:
      return
    if not header_printed:
      print(table.header(report))
      header_printed = True
    print(table.row(result), flush=True)

  chips = accelerators()
  if not chips:
    check_kernels(config.model)
    report = Report(describe_device(jax.devices()[0], config.model.compute_dtype))
  else:
    try:
      report = run_selftest(
        config, results_folder(config), chips, devices=values.devices or 0, any_mesh=True, seconds=values.seconds,
        retest=values.again, on_result=on_result,
      )  # fmt: skip
    except ChildFailed as error:
      raise ConfigError(f"the process that tests kernels ended before it reached one: {error}") from None
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
