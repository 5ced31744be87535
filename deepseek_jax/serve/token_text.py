"""Tokens and log-probabilities as responses show them."""

from deepseek_jax.data.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's API gives this


def token_text(tokenizer: Tokenizer, id: int) -> str:
  """The text of a token; of a part of a character "bytes:" and its bytes as escapes, of an unknown id "token_id:"."""
  content = tokenizer.token_bytes(id)
  if not content:
    return f"token_id:{id}"
  try:
    return content.decode()
  except UnicodeDecodeError:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def listed_logprob(logprob: float) -> float:
  """`logprob`, or LEAST_LOGPROB where it is less."""
  return max(logprob, LEAST_LOGPROB)
