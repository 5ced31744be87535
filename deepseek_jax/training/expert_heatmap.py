"""The heat map of expert loads over steps in a run's report: for each layer one small PNG, of every expert."""

import base64
import struct
import zlib

import numpy as np

from deepseek_jax.training.expert_loads import DEAD, ExpertLoads, decode
from deepseek_jax.training.page import escape

LEVELS = 15  # of load / mean, each a factor of 2^0.5; with that of dead experts, as many as four bits of a pixel hold
OCTAVES = (LEVELS - 1) / 4  # above the mean, and below it
# Blue for less than the mean, orange for more: apart for color-blind readers as well. Dead experts are nearly black.
DEAD_COLOR = (17, 17, 17)
COLORS = ((33, 102, 172), (103, 169, 207), (245, 245, 245), (241, 163, 64), (140, 45, 4))
FEW, MANY = 4, 64  # so few layers get larger images; of more experts than MANY each has a row of one CSS pixel or more


def heatmaps(loads: ExpertLoads) -> str:
  """A legend, and an image of each layer, [experts, records] from expert 0 at the top, as HTML; nothing without records."""
  if not len(loads.steps):
    return ""
  images = []
  for layer, codes in loads.codes.items():
    text = f"{_title(layer)}, {_summary(codes[-1], int(loads.steps[-1]))}"
    images.append(f"<div>{_image(_to_levels(codes).T, text)}<span>{_title(layer)}</span></div>")
  scale = _image(np.arange(1, LEVELS + 1, dtype=np.uint8)[None], "from less than the mean to more")
  dead = _image(np.zeros((1, 1), np.uint8), "no token")
  far = 2**OCTAVES
  legend = (
    f'<p class="heat-legend">{dead}<span>no token</span><span>1/{far:.0f} of the mean</span>{scale}'
    f"<span>{far:.0f} times</span></p>"
  )
  every = f", one in every {loads.stride:,} steps" if loads.stride > 1 else ""
  note = (
    f"Load of each expert over steps {loads.steps[0]:,} to {loads.steps[-1]:,}, beside the mean of its layer: a row is an "
    f"expert, 0 at the top; a column is a logged step{every}. Hover for the last one."
  )
  size = " few" if len(images) <= FEW else ""
  if max(codes.shape[1] for codes in loads.codes.values()) > MANY:
    size += " many"
  return f'{legend}<div class="heat{size}">{"".join(images)}</div><p class="note">{note}</p>'


def encode_png(indices: np.ndarray, palette: np.ndarray) -> bytes:
  """A PNG of `indices` uint8 [height, width], below 16, into the colors `palette` uint8 [colors, 3] (ISO/IEC 15948)."""
  height, width = indices.shape
  padded = np.pad(indices, ((0, 0), (0, width % 2)))
  rows = np.zeros((height, 1 + padded.shape[1] // 2), np.uint8)  # each row starts with its filter, 0 for none
  rows[:, 1:] = padded[:, ::2] << 4 | padded[:, 1::2]

  def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)  # four bits, of a palette
  image = zlib.compress(rows.tobytes(), 9)
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    chunk(*c) for c in ((b"IHDR", header), (b"PLTE", palette.tobytes()), (b"IDAT", image), (b"IEND", b""))
  )


def _title(layer: str) -> str:
  return escape(layer.replace("_", " "))


def _image(levels: np.ndarray, text: str) -> str:
  data = base64.b64encode(encode_png(levels, _PALETTE)).decode()
  return f'<img src="data:image/png;base64,{data}" alt="{text}" title="{text}">'


def _to_levels(codes: np.ndarray) -> np.ndarray:
  """uint8, indices into the palette: 0 for a dead expert, 8 for the mean."""
  with np.errstate(divide="ignore"):
    octaves = np.log2(decode(np.arange(256, dtype=np.uint8)))
  table = np.clip(np.round(2 * (octaves + OCTAVES)) + 1, 1, LEVELS)
  table[DEAD] = 0
  return table.astype(np.uint8)[codes]


def _make_palette() -> np.ndarray:
  """uint8 [1 + LEVELS, 3]."""
  positions, known = np.linspace(0, 1, LEVELS), np.linspace(0, 1, len(COLORS))
  channels = [np.interp(positions, known, channel) for channel in zip(*COLORS, strict=True)]
  return np.vstack([DEAD_COLOR, np.round(np.stack(channels, 1))]).astype(np.uint8)


def _summary(codes: np.ndarray, step: int) -> str:
  """The extremes of the last record of a layer, in words."""
  ratios = decode(codes)
  most, least = int(ratios.argmax()), int(ratios.argmin())
  dead = int((codes == DEAD).sum())
  rest = f"{dead:,} without a token" if dead else f"expert {least} has least, {ratios[least]:.2g} of it"
  return f"step {step:,}: expert {most} has most, {ratios[most]:.2g} times the mean; {rest}"


_PALETTE = _make_palette()
