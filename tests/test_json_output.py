import json

from deepseek_jax.json_output import to_json_text


def test_what_is_not_finite_is_null():
  tree = {"a": [1.5, float("nan")], "b": (float("inf"), "x"), "c": {"d": None, "e": True}}
  assert json.loads(to_json_text(tree)) == {"a": [1.5, None], "b": [None, "x"], "c": {"d": None, "e": True}}
