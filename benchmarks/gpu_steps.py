"""The programs that `python -m benchmarks.gpu` runs, the most important first."""

import dataclasses

TRAINED_CONFIGS = {  # config -> fields that make it small, for --toy
  "dense_1b": ("layers=1", "attention.heads=1", "attention.kv_heads=1"),
  "v3_3b": (
    "layers=1", "first_dense_layers=0", "num_mtp_layers=0", "attention.heads=1", "attention.q_lora_rank=128",
    "attention.kv_lora_rank=128", "attention.qk_nope_head_dim=64", "attention.v_head_dim=64", "moe.num_routed_experts=16",
    "moe.mlp=128",
  ),
}  # fmt: skip
TOY_MODEL = ("model.embed=128", "model.mlp=128", "model.vocab=256", "model.compute_dtype=float32", "model.remat=none")
TOY_BATCH = ("data.seq=128", "train.global_batch=1", "train.microbatch=0")
PRECISIONS = ("bf16", "fp8")
CPU = {"JAX_PLATFORMS": "cpu"}
ALL_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}  # by default jax allocates three quarters of a GPU's memory


@dataclasses.dataclass(frozen=True)
class Step:
  """A program of a part."""

  name: str
  part: int
  seconds: float  # its share of the part's time; it gets more if the steps before it took less
  # Arguments of the interpreter. Filled in are {json}: file of its results, {out}: folder of all results, {seconds}:
  # time limit, and for plans {topology} and {attention}.
  command: tuple[str, ...]
  toy_arguments: tuple[str, ...] = ()  # make it small, for --toy
  environment: dict[str, str] = dataclasses.field(default_factory=dict)
  needs_gpu: bool = True  # a step that does not runs in parallel to the others
  has_config: bool = False  # takes --config.FIELD overrides


def selftest_step(name: str, seconds: float, *fields: str) -> Step:
  """A run of the kernels' self-test."""
  command = ("-m", "deepseek_jax.selftest", *fields, "--seconds={seconds}", "--json={json}")
  return Step(name, 1, seconds, command)


def table_step(name: str, part: int, seconds: float, *arguments: str) -> Step:
  """A run of a benchmark that has --seconds, --json and --small."""
  command = ("-m", f"benchmarks.{name}", *arguments, "--seconds={seconds}", "--json={json}")
  return Step(name, part, seconds, command, toy_arguments=("--small",))


def training_steps(config: str, precision: str) -> tuple[Step, Step]:
  """(training steps of a config, its plan)."""
  name, fields = f"{config}_{precision}", (f"--config=benchmarks/{config}.py", f"--config.model.precision={precision}")
  sizes = (*(f"model.{size}" for size in TRAINED_CONFIGS[config]), *TOY_MODEL, *TOY_BATCH)
  toy_arguments = tuple(f"--config.{size}" for size in sizes)
  return (
    Step(
      f"train_{name}", 2, 55, ("-m", "benchmarks.train_step", *fields, "--json={json}"), (*toy_arguments, "--steps=1"), ALL_MEMORY,
      has_config=True,
    ),
    Step(
      f"plan_{name}", 2, 55,
      (
        "-m", "deepseek_jax.plan", *fields, "--config.model.attention.implementation={attention}", "--topology={topology}",
        "--analytic", "--json={json}",
      ),
      toy_arguments, CPU, needs_gpu=False, has_config=True,
    ),
  )  # fmt: skip


STEPS = (
  selftest_step("selftest_v3_fp8", 90, "--config=v3", "--config.model.precision=fp8"),
  selftest_step("selftest_v3_bf16", 30, "--config=v3"),  # for its grouped matmuls
  selftest_step("selftest_67b_fp8", 45, "--config=67b", "--config.model.precision=fp8"),
  table_step("fp8_matmul", 1, 80, "--row_seconds=40"),
  table_step("attention", 1, 35, "--row_seconds=30"),
  table_step("tune_kernels", 2, 60, "--table={out}/tiles.json"),
  *(step for config in TRAINED_CONFIGS for precision in PRECISIONS for step in training_steps(config, precision)),
)
