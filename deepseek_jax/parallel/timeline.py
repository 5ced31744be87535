"""The pipeline's schedule as text: what each stage does in each tick, by the formulas that the pipeline runs."""

import numpy as np

from deepseek_jax.parallel.schedule import Schedule, WorkItem

MAX_WIDTH = 120  # characters of a line
GAP = "..."  # stands for the ticks that are left out
BUBBLE = "."


def work_items(schedule: Schedule) -> tuple[WorkItem, WorkItem]:
  """(forward, backward) items: arrays [stages, ticks]. `exists` is False also where a tick has no such pass."""
  tick, stage = np.arange(schedule.ticks)[None], np.arange(schedule.stages)[:, None]
  passes = (schedule.forward_item, schedule.has_forward), (schedule.backward_item, schedule.has_backward)
  items = []
  for item_of, has_pass in passes:
    found = [np.broadcast_to(a, (schedule.stages, schedule.ticks)) for a in item_of(tick, stage)]
    items.append(WorkItem(*found)._replace(exists=found[-1] & has_pass(tick)))
  return items[0], items[1]


def group_work(schedule: Schedule) -> dict[str, dict[int, list[int]]]:
  """{what all stages do once a group: {tick: the microbatches, one of each stage}}, in the order within a tick."""
  work = {
    "embed backward": schedule.ticks_since_embed_backward,
    "embed forward": schedule.ticks_since_embed,
    "loss": schedule.ticks_since_loss,
  }
  stage = np.arange(schedule.stages)
  found: dict[str, dict[int, list[int]]] = {}
  for name, ticks_since in work.items():
    due = [tick for tick in range(schedule.ticks) if schedule.is_due(ticks_since(tick))]
    found[name] = {}
    for tick in due:
      microbatch, exists = schedule.group_microbatch(ticks_since(tick), stage)
      found[name][tick] = np.asarray(microbatch)[np.asarray(exists)].tolist()
  return found


def format_timeline(schedule: Schedule, max_width: int = MAX_WIDTH) -> str:
  """The timeline: a column for each tick, two rows for each stage, and rows of the embedding and the loss.

  Ticks in the middle are left out where a line would be longer than `max_width` characters, which is said.
  """
  rows, shown = _rows(schedule), np.arange(schedule.ticks)
  label = max(map(len, rows))
  width = max(len(cell) for cells in rows.values() for cell in cells) + 1
  room = max((max_width - label - len(GAP) - 1) // width, 2)  # ticks beside the gap
  is_cut = label + width * schedule.ticks > max_width and room < schedule.ticks
  note = ""
  if is_cut:
    before, after = room - room // 2, room // 2
    shown = np.r_[:before, schedule.ticks - after : schedule.ticks]
    note = (
      f"\n{GAP}: ticks {before} to {schedule.ticks - after - 1}; all are {label + width * schedule.ticks} columns wide"
    )

  def line(name, cells):
    text = [cells[tick].rjust(width) for tick in shown]
    if is_cut:
      text.insert(room - room // 2, " " + GAP)
    return f"{name:<{label}}{''.join(text)}".rstrip()

  head = (
    f"{schedule.stages} stages x {schedule.virtual_stages} virtual stages, {schedule.microbatches} microbatches: "
    f"{schedule.ticks} ticks, bubble {schedule.bubble_fraction:.1%}\n"
    f"m.v: microbatch m on virtual stage v.  {BUBBLE}: bubble.  a-b: microbatches a to b, one on each stage.\n\n"
  )
  return head + "\n".join(line(*row) for row in rows.items()) + note


def _rows(schedule: Schedule) -> dict[str, list[str]]:
  """{name of a row: a cell for each tick}, in the order in which a tick does them."""
  ticks = np.arange(schedule.ticks)
  group_rows = {
    name: [f"{found[t][0]}-{found[t][-1]}" if t in found else "" for t in ticks.tolist()]
    for name, found in group_work(schedule).items()
  }
  rows = {"tick": [str(tick) for tick in ticks], "embed forward": group_rows["embed forward"]}
  forward, backward = work_items(schedule)
  for stage in range(schedule.stages):
    for name, items, has_pass in (
      ("forward", forward, schedule.has_forward),
      ("backward", backward, schedule.has_backward),
    ):
      rows[f"stage {stage} {name}"] = [
        f"{items.microbatch[stage, t]}.{items.virtual_stage[stage, t]}"
        if items.exists[stage, t]
        else BUBBLE * bool(has_pass(t))
        for t in ticks
      ]
  return rows | {"loss": group_rows["loss"], "embed backward": group_rows["embed backward"]}
