"""fit, hparams and report, as the command line gives them."""

import json

import numpy as np
import pytest

from deepseek_jax.errors import ConfigError, DataError
from deepseek_jax.scaling.fit_commands import fit, hparams, report
from deepseek_jax.scaling.published import FOLDER, PUBLISHED_TABLES
from tests.scaling import tables
from tests.scaling.test_hparams import grid


def fitted(capsys, *flags):
  assert fit(["fit", "--json=-", *flags]) == 0
  return json.loads(capsys.readouterr().out)


def test_the_public_tables_through_the_command_line(capsys):
  s1 = fitted(capsys, f"--table={tables.S1}", "--approach=3", "--scale=N", "--bootstrap=20", "--holdout=largest")
  assert {k: s1[k] for k in ("E", "A", "B", "alpha", "beta")} == pytest.approx(
    {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}, rel=1e-5
  )
  assert abs(s1["holdout"]["error"]) < 1e-6 and s1["rows"] == 70 and s1["approach"] == 3
  s3 = fitted(capsys, f"--table={tables.S3}", f"--columns={tables.S3_COLUMNS}", "--approach=2", "--bootstrap=20")
  assert s3["a"] == pytest.approx(0.5243, abs=0.003) and s3["b"] == pytest.approx(0.4757, abs=0.003)
  published = PUBLISHED_TABLES["porian2024"]
  porian = fitted(
    capsys, f"--table={FOLDER / published.file}", f"--columns={published.columns}", "--approach=2", "--scale=N", "--bootstrap=0",
    "--where=hparams=tuned,warmup=short,decay=const,param_count=standard",
  )  # fmt: skip
  assert porian["a"] == pytest.approx(0.4970, abs=0.005) and porian["interpolation"] == "akima" and porian["ci"] == {}


def test_people_see_a_table(capsys):
  assert fit(["fit", f"--table={tables.S3}", f"--columns={tables.S3_COLUMNS}", "--approach=2", "--bootstrap=20"]) == 0
  shown = capsys.readouterr().out
  assert "vertices by parabola" in shown and "95% interval of 20 samples" in shown


@pytest.mark.parametrize(
  ("flags", "error", "expected"),
  [
    ([], ConfigError, "--table is required"),
    ([f"--table={tables.S3}"], DataError, "no column of losses"),
    ([f"--table={tables.S1}", "--approach=7"], DataError, "expected one of 1, 2, 3, repeated"),
    ([f"--table={tables.S1}", "--scale=M"], DataError, "no column 'M'"),
    ([f"--table={tables.S1}", "--fixed_E=9"], DataError, "not below the smallest loss"),
    ([f"--table={tables.S1}", "--scale=Q"], ConfigError, "scale"),
    ([f"--table={tables.S1}", "--scale=N", "--prior_E=1"], ConfigError, "expected MEAN,DEVIATION"),
    ([f"--table={tables.S1}", "--scale=N", "--fixed_E=-1"], ConfigError, "expected a positive number"),
    ([f"--table={tables.S1}", "--scale=N", "--delta=inf"], ConfigError, "expected a positive number"),
    ([f"--table={tables.S1}", "--scale=N_nonemb", "--approach=clark"], DataError, "a law of N, the parameters"),
    ([f"--table={tables.S1}", "--scale=N", "--ci=95"], ConfigError, "between 0 and 1"),
  ],
)
def test_wrong_flags_and_tables(flags, error, expected):
  with pytest.raises(error, match=expected):
    fit(["fit", *flags])


def test_hparams_writes_laws(tmp_path, capsys):
  path = tables.write_table(tmp_path / "t.csv", grid([1e17, 1e18, 1e19]))
  assert hparams(["hparams", f"--table={path}", "--bootstrap=20", f"--json={tmp_path / 'law.json'}"]) == 0
  tree = json.loads((tmp_path / "law.json").read_text())
  assert tree["lr"]["exponent"] == pytest.approx(-0.125, abs=1e-3) and tree["batch_tokens"]["ci"]["exponent"]
  assert "batch_tokens" in capsys.readouterr().out
  with pytest.raises(DataError, match="--tolerance=2"):
    hparams(["hparams", f"--table={path}", "--tolerance=2"])


def test_the_report_is_one_page_and_its_numbers(tmp_path, capsys):
  columns = tables.isoflop_runs(np.geomspace(1e17, 1e20, 5), noise=0.002) | {"params": np.geomspace(1e7, 1e9, 35)}
  path = tables.write_table(tmp_path / "t.csv", columns)
  assert report(["report", f"--table={path}", f"--out={tmp_path / 'r'}", "--bootstrap=20", "--title=A <b> title"]) == 0
  page = (tmp_path / "r" / "index.html").read_text()
  assert "A &lt;b&gt; title" in page and "http" not in page.replace("http-equiv", "") and page.count("<svg") == 5
  numbers = json.loads((tmp_path / "r" / "numbers.json").read_text())
  assert set(numbers["fits"]) == {"1", "2", "3", "1 held out", "2 held out", "3 held out"}
  columns |= {"seed": np.zeros(35), "lr": np.full(35, 1e-3), "batch_tokens": np.full(35, 1e5), "seconds": np.ones(35)}
  more = {name: np.concatenate([values, np.repeat(values[10], 6)]) for name, values in columns.items()}
  more["lr"][35:], more["batch_tokens"][35:] = np.tile([5e-4, 1e-3, 2e-3], 2), np.repeat([5e4, 2e5], 3)
  more["val_loss"][35:] *= np.linspace(1.001, 1.01, 6)
  grid_path = tables.write_table(tmp_path / "g.csv", more)
  assert report(["report", f"--table={grid_path}", f"--out={tmp_path / 'g'}", "--bootstrap=20"]) == 0
  page = (tmp_path / "g" / "index.html").read_text()
  assert page.count("<svg") == 8 and "Time and loss at" in page and "Batch size at" in page
  with pytest.raises(ConfigError, match="--out is required"):
    report(["report", f"--table={path}"])
  with pytest.raises(ConfigError, match="cannot be written"):
    report(["report", f"--table={path}", "--out=/proc/none", "--bootstrap=0"])
