"""What of a model's outputs is kept in the repository, and the comparison of outputs with that.

Logits: all of them on a few positions, and at every position two random projections of them, so that no position is
unseen. Gradients, for each tensor: the largest magnitude, elements at random places, and random projections of all.
"""

import zlib

import numpy as np

POSITIONS, PROJECTIONS, ELEMENTS = 6, 2, 16


def rng(name):
  return np.random.default_rng(zlib.crc32(name.encode()))


def positions(seq):
  """Of logits that are kept whole: the first, the last, and some between."""
  return np.linspace(0, seq - 1, POSITIONS).round().astype(int)


def project(array, name):
  """[..., 2] of [..., n]: the last dimension in two random directions of unit length."""
  directions = rng(name).standard_normal((array.shape[-1], PROJECTIONS))
  return np.asarray(array, np.float64) @ (directions / np.linalg.norm(directions, axis=0))


def gradient(name, grad):
  """[1 + 16 + 2]: largest magnitude, elements, projections."""
  flat = np.asarray(grad, np.float64).ravel()
  places = rng(name).integers(flat.size, size=ELEMENTS)
  return np.concatenate([[np.abs(flat).max()], flat[places], project(flat, name)])


def digest(outputs):
  """{key: array} to be saved, of what reference.compute returns, or of a forward pass alone."""
  logits = outputs["logits"]
  kept = {
    "scale": np.abs(logits).max(),
    "logits": logits[:, positions(logits.shape[1])],
    "projected": project(logits, "logits"),
  }
  if "grads" in outputs:
    grads = outputs["grads"]
    kept |= {
      "loss": outputs["loss"],
      "mtp_loss": outputs.get("mtp_loss", 0.0),
      "names": np.array(sorted(grads)),
      "grads": np.stack([gradient(name, grads[name]) for name in sorted(grads)]),
    }
  if "indices" in outputs:
    kept |= {"indices": outputs["indices"].astype(np.uint8), "weights": outputs["weights"]}
  return kept


def errors(kept, outputs, mtp_weight):
  """{what: largest error}: of logits, router weights and gradients over the tensor's largest; of the loss relative.

  `kept` is what `digest` gave for the reference. The loss of `outputs` has mtp_weight * mtp_loss in it. Raises
  AssertionError where the choices of the router, or the names of the gradients, are not the same.
  """
  mine = digest(outputs)
  found = {"logits": max(np.abs(mine[key] - kept[key]).max() for key in ("logits", "projected")) / kept["scale"]}
  if "indices" in kept:
    np.testing.assert_array_equal(mine["indices"], kept["indices"])
    found["weights"] = np.abs(mine["weights"] - kept["weights"]).max() / kept["weights"].max()
  if "grads" not in outputs:
    return found
  assert mine["names"].tolist() == kept["names"].tolist()
  found["loss"] = abs(mine["loss"] / (kept["loss"] + mtp_weight * kept["mtp_loss"]) - 1)
  largest = np.maximum(kept["grads"][:, :1], np.finfo(np.float32).tiny)
  found["grads"] = (np.abs(mine["grads"] - kept["grads"]) / largest).max()
  return found
