import numpy as np
import pytest

from deepseek_jax.errors import DataError
from deepseek_jax.scaling.table import read_table

GOOD = "run_id,flops,params,tokens,val_loss,status\na,6e18,1e8,1e10,3.0,finished\nb,6e19,1e9,1e10,2.5,finished\nc,6e20,1e9,1e11,2.2,finished\n"


def read(tmp_path, text, **arguments):
  path = tmp_path / "runs.csv"
  path.write_text(text)
  return read_table(path, **arguments)


def test_columns_are_float64_and_other_names_are_mapped(tmp_path):
  text = GOOD.replace("flops,params,tokens,val_loss", "C,n,D,final loss")
  table = read(tmp_path, text, columns="flops=C, params=n, tokens=D, loss=final loss")
  assert table.loss_name() == "loss"
  assert table["flops"].dtype == np.float64
  np.testing.assert_array_equal(table.flops(), [6e18, 6e19, 6e20])
  np.testing.assert_array_equal(table.scale("N"), [1e8, 1e9, 1e9])


def test_flops_and_tokens_follow_from_each_other_without_overflow(tmp_path):
  without = read(tmp_path, "params,tokens,loss\n100000000000,20000000000000,2\n1e9,2e10,3\n2e9,2e10,2.9\n")
  np.testing.assert_allclose(without.flops(), [1.2e25, 1.2e20, 2.4e20])  # 6 N D, above int64
  by_scale = read(tmp_path, "flops,M,loss\n1e18,1e9,3\n1e19,1e9,2.9\n1e20,2e9,2.7\n")
  np.testing.assert_allclose(by_scale.tokens(), [1e9, 1e10, 5e10])


def test_unfinished_and_unwanted_rows_are_left_out(tmp_path):
  text = GOOD + "d,1e20,1e9,2e10,,failed\n"
  assert len(read(tmp_path, text)) == 3
  assert len(read(tmp_path, GOOD, where="params=1e9", min_rows=1)) == 2


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    (("3.0", "nan"), "row 2, column 'val_loss': expected a positive finite number, got nan"),
    (("3.0", "-1"), "row 2, column 'val_loss'"),
    (("6e19", "0"), "row 3, column 'flops'"),
    (("2.5", "two"), "row 3, column 'val_loss': expected a number, got 'two'"),
    (("b,6e19", "a,6e19"), "row 3: the same run_id 'a' as in row 2"),
    (("c,6e20,1e9", "c,6e20"), "row 4: 5 cells, and the header has 6"),
    (("val_loss", "something"), "no column of losses"),
    (("params,tokens", "params,params"), "the header has 'params' twice"),
    (("c,6e20,1e9,1e11,2.2,finished\n", ""), "2 rows, and 3 are needed"),
  ],
)
def test_bad_tables_are_refused_with_row_and_column(tmp_path, change, expected):
  with pytest.raises(DataError, match=".*".join(map(__import__("re").escape, [expected]))):
    table = read(tmp_path, GOOD.replace(*change))
    table[table.loss_name()], table.flops()


def test_a_column_that_is_not_used_may_hold_anything(tmp_path):
  table = read(tmp_path, "flops,params,loss,seed,lr\n1e18,1e8,3,x,\n2e18,2e8,2.9,y,\n3e18,2e8,2.8,z,\n")
  assert "lr" not in table and len(table.flops()) == 3


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    ({"columns": "flops"}, "expected OURS=THEIRS"),
    ({"columns": "speed=flops"}, "expected OURS=THEIRS"),
    ({"columns": "loss=final"}, "has no column 'final'"),
    ({"where": "warmup=short"}, "has no column 'warmup'"),
    ({"where": "flops=7"}, "0 rows of 3 after --where"),
  ],
)
def test_bad_arguments_name_what_the_table_has(tmp_path, arguments, expected):
  with pytest.raises(DataError, match=expected):
    read(tmp_path, GOOD, **arguments)


def test_columns_that_are_named_come_before_others_of_their_kind(tmp_path):
  text = "flops,params,loss,eval_loss\n1e18,1e8,1,3\n2e18,1e8,1,2.9\n3e18,2e8,1,2.8\n"
  table = read(tmp_path, text, columns="val_loss=eval_loss")
  assert table.loss_name() == "val_loss" and table[table.loss_name()][0] == 3


def test_tokens_follow_from_non_embedding_parameters(tmp_path):
  table = read(tmp_path, "flops,params_nonembedding,loss\n6e18,1e8,3\n6e19,1e9,2.5\n6e20,1e9,2.2\n")
  assert table.default_scale() == "N_nonemb"
  np.testing.assert_allclose(table.tokens(), [1e10, 1e10, 1e11])


def test_a_status_that_never_says_finished_is_named(tmp_path):
  with pytest.raises(DataError, match="'status' has 'completed'"):
    read(tmp_path, GOOD.replace("finished", "completed"))


def test_blank_cells_of_optional_columns_and_blank_lines_do_not_matter(tmp_path):
  text = "\nrun_id,flops,params,params_active,loss\n,1e18,1e8,,3\n,2e18,2e8,1e8,2.9\n\n,3e18,3e8,1e8,2.8\n"
  table = read(tmp_path, text)
  np.testing.assert_array_equal(table.scale("N"), [1e8, 2e8, 3e8])
  assert list(table.rows) == [3, 4, 6] and table.optional("params_active") is None


def test_the_same_numbers_written_otherwise_are_duplicates(tmp_path):
  with pytest.raises(DataError, match="row 4: the same run as in row 2"):
    read(tmp_path, "index,flops,params,loss\n0,1e18,1e8,3\n1,2e18,1e8,2.9\n2,1.000e+18,100000000,3.0\n")


def test_identical_rows_without_run_ids_are_duplicates(tmp_path):
  with pytest.raises(DataError, match="row 4: the same run as in row 2"):
    read(tmp_path, "flops,params,loss\n1e18,1e8,3\n2e18,1e8,2.9\n1e18,1e8,3\n")


def test_a_missing_file_and_an_empty_one(tmp_path):
  with pytest.raises(DataError, match="cannot be read"):
    read_table(tmp_path / "none.csv")
  with pytest.raises(DataError, match="is empty"):
    read(tmp_path, "")
