import numpy as np
import pytest

from deepseek_jax.errors import DataError
from deepseek_jax.scaling import published
from deepseek_jax.scaling.published import published_exponents, read_published


def test_every_published_table_is_read_and_says_where_it_is_from():
  for name, table in published.PUBLISHED_TABLES.items():
    runs = read_published(name)
    assert len(runs) > 100 and runs.default_scale() == "N" and "arXiv" in table.source and "MIT" in table.source
    assert (np.abs(np.log(6 * runs.scale("N") * runs.tokens() / runs.flops())) < 0.02).all()
    assert table.file in (published.FOLDER / "README.md").read_text()


def test_each_published_exponent_is_of_a_setting_of_its_table():
  exponents = published_exponents("porian2024")
  assert len(exponents) == 10 and all(0.4 < a < 0.9 for a in exponents.values())
  assert sum(len(read_published("porian2024", setting)) for setting in exponents) == len(read_published("porian2024"))


def test_other_names_are_refused():
  with pytest.raises(DataError, match="expected one of porian2024, gadre2024"):
    read_published("kaplan2020")
  with pytest.raises(DataError, match="no published exponents; porian2024 has"):
    published_exponents("gadre2024")
