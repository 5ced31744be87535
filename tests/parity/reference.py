"""What transformers computes for a case: logits, losses, routing, gradients, in float64.

Needs torch and transformers.
"""

import contextlib
import json

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

from tests.parity.weights import module_shapes, published


class Float64(TorchFunctionMode):
  """Gives float64 where float32 is asked for: norms, softmax, router and rotary tables of transformers upcast to it."""

  def __torch_function__(self, function, types, args=(), kwargs=None):
    if function is torch.Tensor.float:
      return args[0].double()
    args, kwargs = ([wider(a) for a in args], {name: wider(a) for name, a in (kwargs or {}).items()})
    return function(*args, **kwargs)


def wider(argument):
  return torch.float64 if argument is torch.float32 else argument


@contextlib.contextmanager
def float64():
  before = torch.get_default_dtype()
  torch.set_default_dtype(torch.float64)
  try:
    with Float64():
      yield
  finally:
    torch.set_default_dtype(before)


class MoEV1(torch.nn.Module):
  """DeepSeekMoE 16B has no class in transformers; the text model of DeepSeek-OCR-2 is the same without a head."""

  def __init__(self, config):
    super().__init__()
    self.model = DeepseekOcr2TextModel(config)
    self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)

  def forward(self, tokens, **kwargs):
    output = self.model(tokens, **kwargs)
    output.logits = self.lm_head(output.last_hidden_state)
    return output


def read_config(folder):
  """transformers' config of a folder, as it reads it itself."""
  raw = json.loads((folder / "config.json").read_text())
  if raw["model_type"] == "deepseek":
    first = raw.pop("first_k_dense_replace")
    kinds = ["dense"] * first + ["sparse"] * (raw["num_hidden_layers"] - first)
    rope = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}
    raw |= {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "mlp_layer_types": kinds, "rope_parameters": rope}
    for name in ("model_type", "rope_scaling", "architectures"):
      raw.pop(name)
    config = DeepseekOcr2TextConfig(**raw)
  else:
    config = transformers.AutoConfig.from_pretrained(folder)
  config._attn_implementation = config._experts_implementation = "eager"
  return config


def make_modules(folder, case, modules):
  """(model, MtpModel or None) of transformers in float64 with the values of all `modules`, {name: array}."""
  config = read_config(folder)
  with float64():
    v1 = case.config["model_type"] == "deepseek"
    model = MoEV1(config) if v1 else transformers.AutoModelForCausalLM.from_config(config)
    mtp = MtpModel(model, depth) if (depth := case.config.get("num_nextn_predict_layers", 0)) else None
    for module in filter(None, (model, mtp)):
      module.double().eval()
  state = {name: torch.from_numpy(array).double() for name, array in modules.items()}
  main = {name: a for name, a in state.items() if not name.startswith("mtp.")}
  if case.config["tie_word_embeddings"]:
    main["lm_head.weight"] = main["model.embed_tokens.weight"]
  model.load_state_dict(main)
  if mtp is not None:
    own = {name.removeprefix("mtp."): a for name, a in state.items() if name.startswith("mtp.")}
    missing, unexpected = mtp.load_state_dict(own, strict=False)
    assert not unexpected and not [name for name in missing if name.startswith("layers.")], (missing, unexpected)
  return model, mtp


def compute(folder, case, modules):
  """Everything that is compared, in float64.

  Returns a dict: logits [batch, seq, vocab]; loss; mtp_loss (0 without); indices and weights [moe_layers, batch, seq,
  k] by expert id (absent without experts); grads {published name: array} of loss + mtp_weight * mtp_loss.
  """
  model, mtp = make_modules(folder, case, modules)
  tokens, routing = torch.from_numpy(case.tokens), []
  for layer in model.model.layers:
    if hasattr(layer.mlp, "gate"):
      layer.mlp.gate.register_forward_hook(lambda module, inputs, outputs: routing.append(outputs[1:]))
  with float64():
    output = model.model(tokens, use_cache=False).last_hidden_state
    logits = model.lm_head(output)
    loss, mtp_loss = cross_entropy(logits, tokens, 1), torch.zeros(())
    hidden, depths = output, len(mtp.layers) if mtp is not None else 0
    for depth in range(depths):
      positions = torch.arange(depth + 1, tokens.shape[1])[None]
      hidden = mtp.forward_layer(depth, hidden[:, :-1], positions, None, input_ids=tokens[:, depth + 1 :])
      mtp_loss = mtp_loss + cross_entropy(mtp._project_to_logits(hidden), tokens[:, depth + 1 :], 1) / depths
    (loss + case.mtp_weight * mtp_loss).backward()
  result = {"logits": array(logits), "loss": array(loss), "mtp_loss": array(mtp_loss)}
  if routing:
    result |= sorted_routing(routing, tokens.shape)
  named = dict(model.named_parameters()) | {f"mtp.{name}": p for name, p in (mtp.named_parameters() if mtp else ())}
  gradients = {
    name: array(named[name].grad) if named[name].grad is not None else np.zeros(shape)
    for name, shape in module_shapes(case.config).items()
    if name in named
  }
  return result | {"grads": published(gradients, case.config["num_hidden_layers"])}


def cross_entropy(logits, tokens, shift):
  return F.cross_entropy(logits[:, :-shift].flatten(0, 1), tokens[:, shift:].flatten())


def sorted_routing(outputs, shape):
  weights, indices = (np.stack([array(output[i]) for output in outputs]) for i in (0, 1))
  order = np.argsort(indices, -1)
  shape = (len(outputs), *shape, -1)
  return {
    "indices": np.take_along_axis(indices, order, -1).reshape(shape),
    "weights": np.take_along_axis(weights, order, -1).reshape(shape),
  }


def array(tensor):
  return tensor.detach().numpy().copy()
