import base64
import re
import struct
import zlib

import numpy as np

from deepseek_jax.training.expert_heatmap import LEVELS, encode_png, heatmaps
from deepseek_jax.training.expert_loads import ExpertLoads, encode


def decode_png(png):
  """(indices [height, width], palette [colors, 3]) of a PNG of four bits a pixel, with the checksum of each chunk checked."""
  assert png.startswith(b"\x89PNG\r\n\x1a\n")
  chunks, rest = {}, png[8:]
  while rest:
    (size,) = struct.unpack(">I", rest[:4])
    name, data, crc, rest = rest[4:8], rest[8 : 8 + size], rest[8 + size : 12 + size], rest[12 + size :]
    assert struct.unpack(">I", crc) == (zlib.crc32(name + data),)
    chunks[name] = data
  assert list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
  width, height, *kind = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
  assert kind == [4, 3, 0, 0, 0]
  rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
  assert not rows[:, 0].any()
  pixels = np.stack([rows[:, 1:] >> 4, rows[:, 1:] & 15], -1).reshape(height, -1)[:, :width]
  return pixels, np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)


def images(page):
  return {title: decode_png(base64.b64decode(data)) for data, title in re.findall(r'base64,(.*?)" alt="(.*?)"', page)}


def test_a_png_has_the_pixels_and_the_colors():
  rng = np.random.default_rng(0)
  palette = rng.integers(0, 256, (16, 3)).astype(np.uint8)
  for shape in ((1, 1), (3, 5), (256, 200)):
    indices = rng.integers(0, 16, shape).astype(np.uint8)
    found, colors = decode_png(encode_png(indices, palette))
    np.testing.assert_array_equal(found, indices)
    np.testing.assert_array_equal(colors, palette)


def test_experts_are_rows_and_levels_are_half_octaves_around_the_mean():
  fractions = np.array([0.0, 0.25, 0.5, 0.25 / 2**0.5, 0.001])
  fractions[1] = 1 / 5  # the mean of five
  codes = np.stack([encode(np.full(5, 0.2)), encode(fractions)])
  page = heatmaps(ExpertLoads(2, np.array([2, 4]), {"layer_7": codes}))
  (pixels, palette) = images(page)["layer 7, step 4: expert 2 has most, 2.5 times the mean; 1 without a token"]
  middle = (LEVELS + 1) // 2
  assert pixels[:, 0].tolist() == [middle] * 5
  assert pixels[:, 1].tolist() == [0, middle, middle + 3, middle, 1]  # 2.5: 1.32 octaves; 0.88: 0.2 below; far below
  assert len(palette) == LEVELS + 1 and palette[0].max() < 30 and palette[middle].min() > 240
  assert palette[1][2] > palette[1][0] and palette[LEVELS][0] > palette[LEVELS][2]  # blue and orange


def test_every_expert_of_v3_makes_a_small_page():
  rng = np.random.default_rng(0)
  codes = {f"layer_{i}": np.stack([encode(rng.dirichlet(np.full(256, 4.0))) for _ in range(256)]) for i in range(3)}
  page = heatmaps(ExpertLoads(1, np.arange(256), codes))
  assert len(images(page)) == 3 + 2 and len(page) * 59 / 3 < 3e6  # of 58 layers and the one of multi-token prediction


def test_without_records_there_is_nothing():
  assert heatmaps(ExpertLoads(1, np.zeros(0, np.int64), {"layer_1": np.zeros((0, 4), np.uint8)})) == ""
