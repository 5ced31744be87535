"""Conversion from Hugging Face and back, and its limit of memory."""

import shutil

import pytest

from benchmarks import convert
from tests.benchmarks.programs import benchmark


def test_convert(tmp_path):
  out, _ = benchmark("convert", f"--folder={tmp_path}", "--vocab=512", "--embed=64", "--layers=2", "--experts=16")
  assert "to workdir" in out and "tensors are bitwise equal after the round trip" in out
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("peaks", "code"), [((2**29, 2**30), 0), ((2**31, 2**29), 1)])
def test_convert_fails_where_it_takes_too_much_memory(tmp_path, monkeypatch, capsys, peaks, code):
  peak = iter(peaks)
  monkeypatch.setattr(
    convert, "convert", lambda source, target, *arguments: (1.0, shutil.copytree(source, target) and next(peak))
  )
  sizes = ("--vocab=512", "--embed=64", "--layers=2", "--experts=16")
  assert convert.main(["convert", f"--folder={tmp_path}", *sizes]) == code
  assert capsys.readouterr().out.count("TOO MUCH") == code
