"""Continuous against static batching, by guidellm:  python -m benchmarks.serving --guidellm=.venv-guidellm/bin/guidellm

Serves a model with each scheduler, has guidellm ask the same requests, and compares tokens per second, and guidellm's counts
and latencies with those of /metrics. Lengths of answers are log-uniform in 16 to 256, those of prompts too, or
--prompt_tokens. guidellm needs an environment of its own: python3 .ci/environment.py .venv-guidellm guidellm.
Without --workdir a model of 35M parameters is made first, with random weights. Results: docs/results/serving.md.
"""

import contextlib
import json
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

from absl import flags

from benchmarks.results import Results
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config, parse, run_program
from deepseek_jax.runs import run

LEAST, MOST = 16, 256  # tokens of an answer
MODEL = {
  "model.embed": 512, "model.layers": 12, "model.mlp": 1536, "model.attention.heads": 8,
  "train.steps": 1, "train.global_batch": 4, "sample.max_tokens": 0, "eval.final_sequences": 4,
}  # fmt: skip
SCHEDULERS = ("continuous", "static")


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  flags.DEFINE_string("guidellm", "guidellm", "the program", flag_values=values)
  flags.DEFINE_string("workdir", None, "run to serve, whose tokens are bytes", flag_values=values)
  flags.DEFINE_string(
    "out", "runs/serving", "folder of the model, the requests and what guidellm writes", flag_values=values
  )
  flags.DEFINE_string("json", None, "file of the results; default: results.json in --out", flag_values=values)
  flags.DEFINE_integer("max_batch", 8, "requests that run at a time", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("requests", 200, "requests of a round", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("rounds", 2, "of each scheduler, in turns", lower_bound=1, flag_values=values)
  flags.DEFINE_integer(
    "prompt_tokens", 0, "of every prompt, with bos; 0: log-uniform as the answers", flag_values=values
  )
  parse(argv, values, __doc__)
  out = pathlib.Path(values.out)
  out.mkdir(parents=True, exist_ok=True)
  workdir = values.workdir or make_model(out / "model")
  write_requests(out / "requests.jsonl", values.requests, values.prompt_tokens)
  settings = {name: values[name].value for name in ("workdir", "max_batch", "requests", "prompt_tokens")}
  results = Results(values.json or out / "results.json", settings)
  names = [f"{scheduler} {turn}" for turn in range(values.rounds) for scheduler in SCHEDULERS]

  def measure_row(name: str) -> dict[str, Any]:
    return measure(workdir, name.split()[0], out, values.max_batch, values.requests, values.guidellm)

  code = results.run(names, measure_row, lambda row: print(row, flush=True))
  if code == 0:
    print(table({name: results.rows[name] for name in names}))
  return code


def make_model(workdir: pathlib.Path) -> str:
  """The workdir of a model that was trained for one step."""
  if not (workdir / "checkpoints").exists():
    run(load_config("tiny_dense", MODEL), str(workdir))
  return str(workdir)


def write_requests(path: pathlib.Path, count: int, prompt_tokens: int) -> None:
  """Prompts of source code, and the tokens of their answers, the same for the same numbers."""
  text, draw = pathlib.Path(load_config.__code__.co_filename).read_text(encoding="utf-8"), random.Random(0)
  lines = []
  for _ in range(count):
    length = (prompt_tokens or log_uniform(draw)) - 1  # and bos
    start = draw.randrange(len(text) - MOST)
    lines.append(json.dumps({"prompt": text[start : start + length], "output_tokens_count": log_uniform(draw)}))
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def log_uniform(draw: random.Random) -> int:
  """A length."""
  return round(math.exp(draw.uniform(math.log(LEAST), math.log(MOST))))


@contextlib.contextmanager
def serving(workdir: str, *arguments: str) -> Iterator[str]:
  """The address of a server of `workdir` during the block."""
  command = [
    sys.executable,
    "-m",
    "deepseek_jax.serve",
    f"--workdir={workdir}",
    "--served_model_name=model",
    "--port=0",
  ]
  process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
  try:
    assert process.stdout
    found = re.search(r"http://[^/\s]+", process.stdout.readline())
    if not found:
      raise ConfigError("the server did not start; its errors are above")
    yield found[0]
  finally:
    process.terminate()
    process.wait(timeout=60)


def read_metrics(address: str) -> dict[str, float]:
  """{name: value} of /metrics, without the prefix."""
  with urllib.request.urlopen(f"{address}/metrics", timeout=60) as response:
    lines = response.read().decode().splitlines()
  pairs = (line.removeprefix("deepseek_jax_").rpartition(" ") for line in lines if not line.startswith("#"))
  return {name: float(value) for name, _, value in pairs}


def measure(
  workdir: str, scheduler: str, out: pathlib.Path, max_batch: int, requests: int, guidellm: str
) -> dict[str, Any]:
  """What guidellm and the server say of one round."""
  name = out / "guidellm.json"
  flags_of_server = (f"--scheduler={scheduler}", f"--max_batch={max_batch}", f"--max_length={2 * MOST + 64}")
  with serving(workdir, *flags_of_server, "--max_queue=1000") as address:
    command = [
      guidellm, "run", "--backend", f"kind=openai_http,target={address},model=model,request_format=/v1/completions",
      "--profile", f"kind=concurrent,streams={3 * max_batch}", "--constraint", f"kind=max_requests,count={requests}",
      "--data", f"kind=json_file,path={out / 'requests.jsonl'}", "--output", f"kind=json,path={name}",
      "--disable-console",
    ]  # fmt: skip
    samples, done = [(time.monotonic(), read_metrics(address))], threading.Event()

    def watch() -> None:
      while not done.wait(0.2):
        samples.append((time.monotonic(), read_metrics(address)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
      subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=1200)
    except FileNotFoundError:
      raise ConfigError(
        f"--guidellm={guidellm}: no such program; python3 .ci/environment.py .venv-guidellm guidellm"
      ) from None
    finally:
      done.set()
      watcher.join()
    samples.append((time.monotonic(), read_metrics(address)))
  return compare(json.loads(name.read_text())["benchmarks"][0], samples)


def compare(benchmark: dict[str, Any], samples: list[tuple[float, dict[str, float]]]) -> dict[str, Any]:
  """guidellm's figures and the server's own, each as [guidellm, server]; occupancy and steps are the server's.

  Occupancy is the share of slots that decoded, of all steps while requests waited, and of all steps.

  samples: (seconds, metrics) of the server before, while and after guidellm ran.
  """
  metrics, of_server = benchmark["metrics"], samples[-1][1]
  total = lambda name: round(metrics[name]["successful"]["total_sum"])
  mean = lambda name: of_server[f"{name}_sum"] / of_server[f"{name}_count"]
  tokens = of_server["engine_generated_tokens_total"]
  begin = max(at for at, values in samples if values["engine_generated_tokens_total"] == 0)
  end = min(at for at, values in samples if values["engine_generated_tokens_total"] == tokens)
  under_load = [values for _, values in samples if values["engine_waiting"]] or [of_server]
  return {
    "requests": [metrics["request_totals"]["successful"], int(of_server["engine_finished_total"])],
    "prompt tokens": [total("prompt_token_count"), int(of_server["engine_prompt_tokens_total"])],
    "generated tokens": [total("output_token_count"), int(tokens)],
    "tokens/s": [total("output_token_count") / benchmark["duration"], tokens / (end - begin)],
    "time to first token, ms": [
      metrics["time_to_first_token_ms"]["successful"]["mean"], 1e3 * mean("time_to_first_token_seconds")
    ],
    "inter-token latency, ms": [
      metrics["inter_token_latency_ms"]["successful"]["mean"], 1e3 * mean("inter_token_latency_seconds")
    ],
    "request latency, s": [metrics["request_latency"]["successful"]["mean"], mean("request_latency_seconds")],
    "errors": [request["info"]["error"] for request in benchmark["requests"]["errored"] or ()],
    "occupancy": [occupancy(under_load[-1], under_load[0]), occupancy(of_server, samples[0][1])],
    "decode steps": int(of_server["engine_decode_steps_total"]),
  }  # fmt: skip


def occupancy(now: dict[str, float], before: dict[str, float]) -> float:
  """The share of slots that decoded in the steps between two samples of the metrics; 0 without a step."""
  slots, steps = (now[name] - before[name] for name in ("engine_decoded_slots_total", "engine_decode_steps_total"))
  return slots / max(steps * now["engine_max_batch"], 1)


def table(rows: dict[str, Any]) -> str:
  """The rows as Markdown, and how many times as many tokens per second continuous batching gives."""
  names = [name for name in next(iter(rows.values())) if name not in ("name", "errors")]
  lines = ["| round | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
  for round_name, row in rows.items():
    cells = [
      " / ".join(f"{v:,.4g}" for v in (value if isinstance(value, list) else [value])) for value in map(row.get, names)
    ]
    lines.append(f"| {round_name} | " + " | ".join(cells) + " |")
  for turn in range(len(rows) // 2):
    continuous, static = (rows[f"{name} {turn}"]["tokens/s"][0] for name in SCHEDULERS)
    lines.append(
      f"round {turn}: continuous batching gives {continuous / static:.2f} times the tokens per second of static"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  run_program(main)
