"""What `python -m benchmarks.gpu` runs: programs, in the order of what they are worth on a machine that is lent for minutes."""

import dataclasses

TRAINED = {  # config -> what makes it small
  "dense_1b": ("layers=1", "attention.heads=1", "attention.kv_heads=1"),
  "v3_3b": (
    "layers=1", "first_dense_layers=0", "num_mtp_layers=0", "attention.heads=1", "attention.q_lora_rank=128",
    "attention.kv_lora_rank=128", "attention.qk_nope_head_dim=64", "attention.v_head_dim=64", "moe.num_routed_experts=16",
    "moe.mlp=128",
  ),
}  # fmt: skip
TOY = ("model.embed=128", "model.mlp=128", "model.vocab=256", "model.compute_dtype=float32", "model.remat=none")
TOY_BATCH = ("data.seq=128", "train.global_batch=1", "train.microbatch=0")
PRECISIONS = ("bf16", "fp8")
CPU = {"JAX_PLATFORMS": "cpu"}
ALL_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}  # jax takes three quarters of a GPU by itself


@dataclasses.dataclass(frozen=True)
class Step:
  """A program of a part.

  command: arguments of the interpreter; "{json}", its results, "{out}", "{seconds}", after which it is to come to its end, and
    "{topology}" and "{attention}", for plans, are filled in.
  seconds: its share of the part's time; it gets more where steps before it took less.
  toy: arguments that make it small, for --toy.
  beside: needs no GPU, and runs on its own beside the others.
  trained: takes overrides of the config.
  """

  name: str
  part: int
  seconds: float
  command: tuple[str, ...]
  toy: tuple[str, ...] = ()
  environment: dict = dataclasses.field(default_factory=dict)
  beside: bool = False
  trained: bool = False


def selftest(name, seconds, *fields):
  command = ("-m", "deepseek_jax.selftest", *fields, "--seconds={seconds}", "--json={json}")
  return Step(name, 1, seconds, command)


def table(name, part, seconds, *arguments):
  """A benchmark that has --seconds, --json and --small."""
  command = ("-m", f"benchmarks.{name}", *arguments, "--seconds={seconds}", "--json={json}")
  return Step(name, part, seconds, command, toy=("--small",))


def training(config, precision):
  """(the training of a config, its plan)."""
  name, fields = f"{config}_{precision}", (f"--config=benchmarks/{config}.py", f"--config.model.precision={precision}")
  sizes = (*(f"model.{size}" for size in TRAINED[config]), *TOY, *TOY_BATCH)
  toy = tuple(f"--config.{size}" for size in sizes)
  return (
    Step(
      f"train_{name}", 2, 55, ("-m", "benchmarks.train_step", *fields, "--json={json}"), (*toy, "--steps=1"), ALL_MEMORY,
      trained=True,
    ),
    Step(
      f"plan_{name}", 2, 55,
      (
        "-m", "deepseek_jax.plan", *fields, "--config.model.attention.implementation={attention}", "--topology={topology}",
        "--analytic", "--json={json}",
      ),
      toy, CPU, beside=True, trained=True,
    ),
  )  # fmt: skip


STEPS = (
  selftest("selftest_v3_fp8", 90, "--config=v3", "--config.model.precision=fp8"),
  selftest("selftest_v3_bf16", 30, "--config=v3"),  # its grouped products
  selftest("selftest_67b_fp8", 45, "--config=67b", "--config.model.precision=fp8"),
  table("fp8_matmul", 1, 80, "--row_seconds=40"),
  table("attention", 1, 35, "--row_seconds=30"),
  table("tune_kernels", 2, 60, "--table={out}/tiles.json"),
  *(step for config in TRAINED for precision in PRECISIONS for step in training(config, precision)),
)
