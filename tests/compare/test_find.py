import errno
import os

import pytest

from deepseek_jax.compare.find import find_runs, short_names


def make(root, *runs):
  for run in runs:
    (root / run).mkdir(parents=True)
    (root / run / "config.json").write_text("{}")


def names(root, place):
  runs, passed_over = find_runs(str(place))
  return [run.removeprefix(f"{root}/") for run in runs], [reason for _, reason in passed_over]


def test_folders_are_searched_at_any_depth_in_natural_order(tmp_path):
  make(tmp_path, "run-10", "run-2", "deep/er/a", ".hidden/b", "²")  # ² is a digit, and no number
  (tmp_path / "run-2" / "checkpoints").mkdir()
  (tmp_path / "run-2" / "checkpoints" / "config.json").write_text("{}")  # runs hold no runs
  (tmp_path / "stopped").mkdir()
  (tmp_path / "stopped" / "events.jsonl").write_text("")  # without a config: to be named when it is read
  assert names(tmp_path, tmp_path) == (["deep/er/a", "run-2", "run-10", "stopped", "²"], [])
  assert names(tmp_path, tmp_path / "run-2") == (["run-2"], [])


def test_links_are_followed_unless_they_lead_back(tmp_path):
  make(tmp_path, "runs/a", "elsewhere/b")
  (tmp_path / "runs" / "b").symlink_to(tmp_path / "elsewhere" / "b")
  (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
  (tmp_path / "runs" / "self").symlink_to("self")
  assert names(tmp_path, tmp_path / "runs") == (["runs/a", "runs/b"], [])


def test_globs_match_runs_and_folders_of_runs(tmp_path):
  make(tmp_path, "a-1", "a-2", "b", "seeds/a/x")
  (tmp_path / "a-notes.txt").write_text("")
  found, reasons = names(tmp_path, tmp_path / "a-*")
  assert found == ["a-1", "a-2"] and reasons == ["expected the folder of a run, got a file"]
  assert names(tmp_path, tmp_path / "**" / "a*") == (
    ["a-1", "a-2", "seeds/a/x"], ["expected the folder of a run, got a file"]
  )  # fmt: skip


@pytest.mark.parametrize(
  ("place", "reason"),
  [("none", "no such folder"), ("none-*", "matches nothing"), ("empty", "no run is in this folder")],
)
def test_what_is_no_run_is_named(tmp_path, place, reason):
  (tmp_path / "empty").mkdir()
  assert find_runs(str(tmp_path / place)) == ([], [(str(tmp_path / place), reason)])


def test_a_folder_that_cannot_be_listed_is_named_and_the_others_are_found(tmp_path, monkeypatch):
  for name in ("a", "locked/b", "c"):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "config.json").write_text("{}")
  listdir = os.listdir

  def refuse(folder):
    if folder.endswith("locked"):
      raise PermissionError(errno.EACCES, "Permission denied")
    return listdir(folder)

  monkeypatch.setattr(os, "listdir", refuse)
  runs, passed_over = find_runs(str(tmp_path))
  assert runs == [str(tmp_path / "a"), str(tmp_path / "c")]
  assert passed_over == [(str(tmp_path / "locked"), "cannot be listed: Permission denied")]


def test_runs_in_a_bucket_are_found_by_url_folder_and_wildcard(buckets):
  from deepseek_jax.storage import ObjectStore

  store = ObjectStore("gs://bucket-a/all")
  for name in ("muon-0/config.json", "muon-1/events.jsonl", "adamw/x/config.json", "muon-0/checkpoints/5/config.json"):
    store.write(name, b"{}")
  base = "gs://bucket-a/all"
  assert find_runs(f"{base}/muon-0/") == ([f"{base}/muon-0"], [])
  assert find_runs(base) == ([f"{base}/adamw/x", f"{base}/muon-0", f"{base}/muon-1"], [])
  assert find_runs(f"{base}/m*") == ([f"{base}/muon-0", f"{base}/muon-1"], [])
  assert find_runs(f"{base}/none") == ([], [(f"{base}/none", "no run is there")])


def test_names_are_paths_without_what_they_share():
  assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
  assert short_names(["/x/runs/a/0", "/x/runs/b/0", "/x/c"]) == ["runs/a/0", "runs/b/0", "c"]
  assert short_names(["runs/only"]) == ["only"] and short_names(["."]) == ["."]
