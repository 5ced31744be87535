import re

from benchmarks import report_time


def test_both_programs_are_timed(capsys):
  assert report_time.main(["report_time", "--rows=40", "--runs=3"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split("  ")[0] for line in lines] == ["report of 40 rows", "compare of 3 runs"]
  assert all(re.search(r"[\d.]+ s, [\d.]+ s of CPU time, page [\d.]+ KiB", line) for line in lines)
