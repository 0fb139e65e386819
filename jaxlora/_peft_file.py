"""A PEFT folder as records: `adapter_config.json` and `adapter_model.safetensors`, read with suspicion, and written.

Nothing here knows of JAX or of trees: names, shapes and layouts are torch's. What a folder says is checked before it is
used: its sizes against the file's, its patterns against what they could cost, its numbers for NaN.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path
import re
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16; jax depends on it)
import numpy as np

from jaxlora._weight import SCALINGS

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_LARGEST_CONFIG = 1 << 24  # bytes; PEFT's own are kilobytes
_LONGEST_NAME = 512
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class PeftError(ValueError):
  """A PEFT folder that cannot be read, or a tree that no PEFT folder can hold; the message lists every reason."""


@dataclasses.dataclass(frozen=True)
class Module:
  """One adapted torch module, in torch's layouts.

      W' = W + scale * B A,    or, with a magnitude m,    m (W + scale * B A) / ||W + scale * B A||    by output

  Attributes:
    name: its name in the torch model, such as `model.layers.0.self_attn.q_proj`.
    kind: `"linear"`, `"conv"` or `"embedding"`.
    a: (rank, in); (rank, in, *kernel) for a convolution; (rank, vocabulary) for an embedding.
    b: (out, rank); (out, rank, 1, ...) for a convolution; (features, rank) for an embedding.
    alpha: numerator of the scale.
    scaling: `"standard"` or `"rslora"`.
    magnitude: DoRA's, (out,) or (1, out, 1, ...) for a convolution, (features,) for an embedding; or `None`.
  """

  name: str
  kind: str
  a: np.ndarray
  b: np.ndarray
  alpha: float
  scaling: str = "standard"
  magnitude: np.ndarray | None = None

  @property
  def rank(self) -> int:
    return self.a.shape[0]

  @property
  def scale(self) -> float:
    return SCALINGS[self.scaling](self.alpha, self.rank)

  @property
  def b_matrix(self) -> np.ndarray:
    """B as (out, rank), whatever the kind."""
    return self.b.reshape(self.b.shape[:2])

  def delta(self) -> np.ndarray:
    """`scale * B A` as the module's weight: (out, in, *kernel), or (vocabulary, features)."""
    wide = np.result_type(np.float32, *(x.dtype for x in (self.a, self.b) if x.dtype.itemsize > 2))
    a, b = self.a.astype(wide), self.b_matrix.astype(wide) * wide.type(self.scale)
    return (b @ a).T if self.kind == "embedding" else np.tensordot(b, a, 1)


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What a PEFT folder holds.

  Attributes:
    modules: the adapted modules by name.
    whole: tensors that replace a parameter, by its name: `modules_to_save`, trained biases, resized embeddings.
    bases: base weights of adapted modules that PEFT saved with them, by parameter name.
    config: the whole `adapter_config.json`.
    unsupported: options that make another function of these tensors than LoRA's: reasons not to use them.
  """

  modules: dict[str, Module]
  whole: dict[str, np.ndarray]
  bases: dict[str, np.ndarray]
  config: dict[str, Any]
  unsupported: tuple[str, ...] = ()

  @property
  def dropout(self) -> float:
    return float(self.config.get("lora_dropout") or 0.0)

  def stores_inputs_first(self, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether the base holds weights as GPT-2's Conv1D does, (in, out), told by those that are not square.

    Args:
      shapes: the shapes of the base's parameters by name.
    """
    for name, shape in shapes.items():
      bias = shapes.get(f"{name.removesuffix('.weight')}.bias", ())
      if name.endswith(tuple(f"{module}.weight" for module in CONV1D)) and len(set(shape)) == 2:
        return tuple(bias) == tuple(shape[1:])
    return False

  def merged(self, name: str, tensor: np.ndarray, *, inputs_first: bool | None = None) -> np.ndarray:
    """The parameter `name` of the torch model with this adapter folded in; itself where the adapter leaves it alone.

    Args:
      name: such as `model.layers.0.self_attn.q_proj.weight`.
      tensor: its value in the base model.
      inputs_first: what `stores_inputs_first` says of the base, for weights that are square; `None` goes by the
        adapter's `fan_in_fan_out`.

    Raises:
      PeftError: where the adapter does not fit it.
    """
    if self.unsupported:
      raise fail(f"{name}", self.unsupported)
    if name in self.whole:
      if self.whole[name].shape != tensor.shape:
        raise PeftError(f"{name}: shape {tensor.shape} in the base, {self.whole[name].shape} in the adapter.")
      return self.whole[name].astype(tensor.dtype)
    module = self.modules.get(name.removesuffix(".weight"))
    if module is None or not name.endswith(".weight"):
      return tensor
    delta = module.delta()
    if module.kind == "linear":
      if inputs_first is None:
        inputs_first = bool(self.config.get("fan_in_fan_out"))
      square = delta.shape == delta.T.shape
      turned = inputs_first and name.split(".")[-2] in CONV1D if square else delta.T.shape == tensor.shape
      delta = delta.T if turned else delta
    if delta.shape != tensor.shape:
      raise PeftError(f"{name}: shape {tensor.shape} in the base, {delta.shape} by the adapter. It is another model's.")
    wide = np.result_type(delta.dtype, np.float32 if tensor.dtype.itemsize < 4 else tensor.dtype)
    whole = tensor.astype(wide) + delta
    if module.magnitude is not None:
      output = 1 if module.kind == "embedding" or (module.kind == "linear" and turned) else 0
      whole = _with_norms(whole, module.magnitude, output)
    return whole.astype(tensor.dtype)


def _with_norms(weight: np.ndarray, norms: np.ndarray, axis: int) -> np.ndarray:
  """The weight with other norms along the axis of its outputs; outputs of norm zero stay zero."""
  others = tuple(d for d in range(weight.ndim) if d != axis)
  found = np.sqrt(np.sum(weight * weight, axis=others, keepdims=True))
  gain = norms.astype(weight.dtype).reshape(found.shape) / np.where(found == 0, 1, found)
  return weight * gain


def fail(subject: str, problems: Sequence[str], remedy: str = "") -> PeftError:
  """One error for all that is wrong."""
  shown = [f"\n  - {problem if len(problem) < 1000 else problem[:1000] + ' ...'}" for problem in problems[:200]]
  more = f"\n  - and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
  return PeftError(f"{subject}: {len(problems)} problem(s):{''.join(shown)}{more}{remedy and chr(10) + remedy}")


# ----------------------------------------------------------------------------------------------------------------------
# Reading.


def read(folder: Any) -> Adapter:
  """Reads and checks a PEFT LoRA folder. What it asks for beyond LoRA is in the result's `unsupported`.

  Raises:
    PeftError: listing everything that is wrong with it. No other error comes from what the files hold.
  """
  folder = Path(folder)
  config = _read_config(folder)
  tensors = _read_tensors(folder)
  problems = list(_malformed(config))
  adapter = Adapter({}, {}, {}, config, tuple(_unsupported(config)))
  pieces: dict[str, dict[str, np.ndarray]] = {}
  for key, tensor in tensors.items():
    if problem := _file_tensor(key, tensor, pieces, adapter):
      problems.append(problem)
  ranks, alphas = (_by_pattern(config, field, pieces, problems) for field in ("rank_pattern", "alpha_pattern"))
  for name, held in pieces.items():
    module = _module(name, held, ranks[name], alphas[name], config, problems)
    if module is not None:
      adapter.modules[name] = module
  if not pieces and not adapter.whole:
    problems.append(f"{WEIGHTS} holds no adapter")
  if problems:
    raise fail(f"{folder}", [*adapter.unsupported, *problems])
  return adapter


def _read_config(folder: Path) -> dict[str, Any]:
  path = folder / CONFIG
  try:
    if not folder.is_dir():
      raise PeftError(
        f"{folder}: not a folder; expected one with {CONFIG} and {WEIGHTS}, as save_pretrained writes it."
      )
    if not path.is_file():
      raise PeftError(f"{folder}: no {CONFIG}; expected the folder that PEFT's save_pretrained writes.")
    if path.stat().st_size > _LARGEST_CONFIG:
      raise PeftError(
        f"{path}: {path.stat().st_size:,} bytes; expected a configuration of at most {_LARGEST_CONFIG:,}."
      )
    config = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    if isinstance(error, PeftError):
      raise
    raise PeftError(f"{path}: not readable as JSON ({type(error).__name__}: {str(error)[:200]}).") from error
  if not isinstance(config, dict):
    raise PeftError(f"{path}: found a {type(config).__name__}, expected a JSON object.")
  return config


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
  import safetensors  # an extra: jaxlora[peft]

  path = folder / WEIGHTS
  try:
    if not path.is_file():
      if (folder / PICKLE).exists():
        raise PeftError(
          f"{folder}: the weights are in {PICKLE}, a pickle, which can run any code when read; jaxlora reads none."
          " Save it again with PEFT's save_pretrained(folder), which writes safetensors."
        )
      raise PeftError(f"{folder}: no {WEIGHTS}; expected the folder that PEFT's save_pretrained writes.")
    tensors, problems = {}, []
    # safetensors checks every shape against the bytes that are there before anything is made of it.
    with safetensors.safe_open(str(path), framework="np") as file:
      for key in file.keys():  # noqa: SIM118  (not a mapping)
        about = file.get_slice(key)
        if about.get_dtype() not in _DTYPES:
          problems.append(f"{key}: dtype {about.get_dtype()}, expected one of {', '.join(_DTYPES)}")
        elif 0 in about.get_shape():
          problems.append(f"{key}: shape {tuple(about.get_shape())} holds nothing")
        elif len(key) > _LONGEST_NAME:
          problems.append(f"{key[:60]}...: a name of {len(key)} characters, expected at most {_LONGEST_NAME}")
        else:
          tensors[key] = file.get_tensor(key)
  except (OSError, ValueError, TypeError, KeyError, OverflowError, safetensors.SafetensorError) as error:
    if isinstance(error, PeftError):
      raise
    raise PeftError(f"{path}: not readable as safetensors ({str(error)[:200]}).") from error
  if problems:
    raise fail(str(path), problems)
  return tensors


# What the file's keys say of one tensor, after the prefix.
_KEY = re.compile(
  r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
  r"|lora_magnitude_vector(?:\.weight)?|lora_B\.bias|base_layer\.weight|base_layer\.bias)"
)
_PARTS = {
  "lora_A.weight": "a",
  "lora_B.weight": "b",
  "lora_embedding_A": "embedding a",
  "lora_embedding_B": "embedding b",
  "lora_B.bias": "bias",
}
# What comes beside the factors, and the option that says that it does.
_EXTRAS = {"magnitude": ("lora_magnitude_vector", "use_dora"), "bias": ("lora_B.bias", "lora_bias")}


def _file_tensor(
  key: str, tensor: np.ndarray, pieces: dict[str, dict[str, np.ndarray]], adapter: Adapter
) -> str | None:
  """Puts a tensor where it belongs; returns what is wrong with it, if anything is."""
  if not np.isfinite(tensor).all():
    return f"{key}: holds NaN or infinite values"
  if not key.startswith(PREFIX):
    return f"{key}: expected a name that starts with {PREFIX!r}"
  name = key.removeprefix(PREFIX)
  found = _KEY.fullmatch(name)
  if found is None:
    if "lora_" in name or "." not in name:
      return f"{key}: unknown; expected lora_A.weight, lora_B.weight, lora_embedding_A or lora_embedding_B of a module"
    adapter.whole[name] = tensor
    return None
  module, part = found["module"], found["part"]
  if part == "base_layer.bias":
    adapter.whole[f"{module}.bias"] = tensor
  elif part == "base_layer.weight":
    adapter.bases[f"{module}.weight"] = tensor
  else:
    pieces.setdefault(module, {})[_PARTS.get(part, "magnitude")] = tensor
  return None


def _module(
  name: str, held: Mapping[str, np.ndarray], rank: Any, alpha: Any, config: Mapping[str, Any], problems: list[str]
) -> Module | None:
  """One adapted module of its tensors, or what is wrong with them."""
  embedding = "embedding a" in held or "embedding b" in held
  half = "embedding " if embedding else ""
  a, b = held.get(f"{half}a"), held.get(f"{half}b")
  if a is None or b is None or (embedding and ("a" in held or "b" in held)):
    found = ", ".join(sorted(held))
    problems.append(f"{name}: found {found} alone; expected both lora_A and lora_B (lora_embedding_A and _B)")
    return None
  if a.ndim != b.ndim or not (a.ndim == 2 or (not embedding and 3 <= a.ndim <= 5)):
    problems.append(
      f"{name}: lora_A has shape {a.shape}, lora_B {b.shape}; expected both 2-D, or both of one convolution"
    )
    return None
  if a.shape[0] != b.shape[1] or any(size != 1 for size in b.shape[2:]):
    problems.append(
      f"{name}: lora_A has shape {a.shape}, lora_B {b.shape}; expected (rank, in, ...) and (out, rank, 1, ...)."
      " (The lora_B of a grouped convolution has fewer: PEFT's update of those lies across the groups, which no"
      " kernel of the base's shape can hold.)"
    )
    return None
  if isinstance(rank, int) and rank != a.shape[0]:
    problems.append(f"{name}: rank {a.shape[0]} in {WEIGHTS}, {rank} by {CONFIG}")
  problems += [
    f"{name}: has a {extra} beside its factors, but {CONFIG} does not say {option}"
    for part, (extra, option) in _EXTRAS.items()
    if part in held and not config.get(option)
  ]
  magnitude = held.get("magnitude")
  if config.get("use_dora") and (magnitude is None or magnitude.size != b.shape[0]):
    found = "none" if magnitude is None else f"shape {magnitude.shape}"
    problems.append(
      f"{name}: lora_magnitude_vector: found {found}, expected one number for each of {b.shape[0]} outputs"
    )
    return None
  return Module(
    name=name,
    kind="embedding" if embedding else "linear" if a.ndim == 2 else "conv",
    a=a,
    b=b,
    alpha=float(alpha) if isinstance(alpha, (int, float)) else 1.0,
    scaling="rslora" if config.get("use_rslora") else "standard",
    magnitude=magnitude,
  )


# Options that make another function of the factors, or that begin from another base. Each: the values that do not.
_UNSUPPORTED = {
  "lora_bias": "a bias in lora_B",
  "target_parameters": "LoRA on bare parameters",
  "layer_replication": "layers that share their base",
  "alora_invocation_tokens": "activated LoRA",
  "use_qalora": "QALoRA",
  "use_bdlora": "block-diagonal LoRA",
  "arrow_config": "Arrow",
  "kasa_config": "KaSA",
  "monteclora_config": "MonteCLoRA",
  "trainable_token_indices": "trainable tokens",
}
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")  # the others change the base when they start


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
  """What the configuration asks for that this library does not do."""
  for field, what in _UNSUPPORTED.items():
    if config.get(field):
      yield f"{field}: {what}: not supported; merge it in PEFT (merge_and_unload), or train it as plain LoRA"
  init = config.get("init_lora_weights", True)
  if not isinstance(init, bool) and init not in _PLAIN_INITS:
    yield (
      f"init_lora_weights: {_short(init)} changes the base weights when it starts, and the file holds the factors of"
      " that other base. Save it as plain LoRA: PEFT's save_pretrained(folder,"
      " path_initial_model_for_weight_conversion=...)"
    )


def _malformed(config: Mapping[str, Any]) -> Iterator[str]:
  """What in the configuration makes no sense."""
  if config.get("peft_type") != "LORA":
    yield f"peft_type: found {_short(config.get('peft_type'))}, expected 'LORA'"
  for field, choices in (("use_rslora", (True, False)), ("bias", ("none", "all", "lora_only"))):
    if field in config and not (isinstance(config[field], type(choices[0])) and config[field] in choices):
      yield f"{field}: found {_short(config[field])}, expected one of {', '.join(map(repr, choices))}"
  saved = config.get("modules_to_save")
  if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
    yield f"modules_to_save: found {_short(saved)}, expected a list of names"
  dropout = config.get("lora_dropout", 0.0)
  if not (_is_number(dropout) and 0 <= dropout < 1):
    yield f"lora_dropout: found {_short(dropout)}, expected a probability in [0, 1)"


def _short(value: Any) -> str:
  shown = repr(value)
  return shown if len(shown) <= 80 else f"{shown[:80]}..."


def _is_number(value: Any) -> bool:
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return False
  return -1e30 < value < 1e30  # False for NaN; no overflow for a whole number of any length


_CHECKS = {
  "rank_pattern": ("r", lambda x: isinstance(x, int) and _is_number(x) and x >= 1, "a whole number of at least 1"),
  "alpha_pattern": ("lora_alpha", lambda x: _is_number(x) and x > 0, "a finite number above 0"),
}


def _by_pattern(config: Mapping[str, Any], field: str, names: Collection[str], problems: list[str]) -> dict[str, Any]:
  """`r` or `lora_alpha` of every module: that of the first pattern that matches the end of its name, or the default."""
  default_field, check, expected = _CHECKS[field]
  default, patterns = config.get(default_field, 8), config.get(field)
  patterns = {} if patterns is None else patterns
  if not check(default):
    problems.append(f"{default_field}: found {_short(default)}, expected {expected}")
    default = None
  if not isinstance(patterns, dict):
    problems.append(f"{field}: found {_short(patterns)}, expected an object of patterns")
    return dict.fromkeys(names, default)
  compiled, total = [], 0.0
  for pattern, value in patterns.items():
    if not check(value):
      problems.append(f"{field}[{_short(pattern)}]: found {_short(value)}, expected {expected}")
      continue
    try:
      regex, cost = compile_suffix(pattern, max(map(len, names), default=0))
      compiled.append((regex, value))
      total += cost
    except (re.error, OverflowError, RecursionError, PeftError) as error:
      problems.append(f"{field}: {_short(pattern)} is no pattern that is read here ({str(error)[:200]})")
  if len(compiled) * len(names) > 10**7 or total * len(names) > 30 * _LARGEST_COST:
    problems.append(f"{field}: {len(compiled)} patterns for {len(names)} modules: matching them could take too long")
    compiled = []
  return {name: next((value for regex, value in compiled if regex.match(name)), default) for name in names}


# A pattern is a regex from a file that anybody may have written. Matching is by backtracking, whose cost is at most the
# product of what each element may try; elements that could multiply it further are not taken.
_TOKEN = re.compile(
  r"\\[.\-_dDwWsSbBA-Z]|\[\^?[^\[\]\\]+\]|\(\?:|[(|)^$]|[*+?]|\{\d{1,2}(?:,\d{0,2})?\}|[^\\\[\](){}*+?|]"
)
_LARGEST_COST = 10**8


def compile_suffix(pattern: str, longest: int) -> tuple[re.Pattern[str], float]:
  r"""A pattern as PEFT applies it, `(.*\.)?(pattern)$`, and the most steps it takes on a name of `longest` characters.

  Raises:
    PeftError, re.error: if they are too many, or it is no regex.
  """
  position, choices, previous = 0, [1], "("
  loops, cost, steps = 1, 1.0, longest + 2.0  # `.*` before the pattern is the first loop
  while position < len(pattern):
    found = _TOKEN.match(pattern, position)
    token = found.group() if found else pattern[position]
    if found is None or len(pattern) > 4 * _LONGEST_NAME:
      raise PeftError(f"at {token!r}: expected names, '.', classes, groups without quantifiers and '|'")
    if token[0] in "*+?{":
      if previous[0] in "()|^$*+?{" and not (previous == ")" and token == "?"):
        raise PeftError(f"{token!r} after {previous!r}: expected quantifiers after single characters")
      loops, cost = (loops, 2 * cost) if token == "?" else (loops + 1, cost)
    elif token in ("(", "(?:"):
      choices.append(1)
    elif token == "|":
      choices[-1] += 1
    elif token == ")" and len(choices) > 1:
      cost *= choices.pop()
    previous, position = token, position + len(token)
    steps = cost * math.prod(choices) * (longest + 2.0) ** loops / math.factorial(loops)
    if loops > 8 or steps > _LARGEST_COST:
      raise PeftError("matching it could take too long: too many quantifiers or alternatives")
  return re.compile(rf"(.*\.)?({pattern})$"), steps


# ----------------------------------------------------------------------------------------------------------------------
# Writing.


def write(
  folder: Any,
  modules: Sequence[Module],
  whole: Mapping[str, np.ndarray],
  *,
  bias: str = "none",
  known: Collection[str] | None = None,
  dropout: float = 0.0,
  base_model_name_or_path: str | None = None,
  task_type: str | None = None,
) -> None:
  """Writes a folder that `PeftModel.from_pretrained` loads.

  Args:
    folder: made if it does not exist; earlier files of these two names are replaced.
    modules: the adapted modules; all of them have a magnitude, or none.
    whole: tensors that replace a parameter, by parameter name: biases of adapted modules, and every parameter of each
      module to save.
    bias: PEFT's option of that name, which says which biases are saved.
    known: the names of all modules that the torch model is known to have, so that short names can be told to be
      unique; `None` if that is not known.
    dropout, base_model_name_or_path, task_type: for the configuration.

  Raises:
    PeftError: if PEFT's patterns cannot tell the adapted modules from others.
  """
  import safetensors.numpy  # an extra: jaxlora[peft]

  adapted = {module.name: module for module in modules}
  saved = _modules_to_save(whole, adapted, bias)
  config = _config(adapted, saved, known, bias)
  config |= {"lora_dropout": dropout, "base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
  tensors = {}
  for module in modules:
    a, b = (
      ("lora_embedding_A", "lora_embedding_B") if module.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    )
    tensors[f"{PREFIX}{module.name}.{a}"], tensors[f"{PREFIX}{module.name}.{b}"] = module.a, module.b
    if module.magnitude is not None:
      tensors[f"{PREFIX}{module.name}.lora_magnitude_vector"] = module.magnitude
  for name, tensor in whole.items():
    module_name, _, parameter = name.rpartition(".")
    inner = "base_layer." if module_name in adapted else ""
    tensors[f"{PREFIX}{module_name}.{inner}{parameter}"] = tensor
  tensors = {name: _writable(tensor) for name, tensor in tensors.items()}
  if broken := [f"{name}: holds NaN or infinite values" for name, x in tensors.items() if not np.isfinite(x).all()]:
    raise fail("save", broken, "Training has diverged: go back to an earlier checkpoint; nothing was written.")

  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with _replacing(folder / WEIGHTS) as path:
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  with _replacing(folder / CONFIG) as path:
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
  """A path to write to, that takes the place of `path` once it is whole."""
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    yield part
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def _writable(tensor: np.ndarray) -> np.ndarray:
  """Contiguous, and of a dtype that torch computes in."""
  tensor = np.ascontiguousarray(tensor)
  return tensor if tensor.dtype.name in ("float64", "float32", "float16", "bfloat16") else tensor.astype(np.float32)


def _modules_to_save(whole: Mapping[str, np.ndarray], adapted: Collection[str], bias: str) -> list[str]:
  """The modules whose parameters are in `whole` and are no biases that the `bias` option covers."""
  names = {name.rpartition(".")[::2] for name in whole}
  weights = {module for module, parameter in names if parameter != "bias"}
  loose = {module for module, parameter in names if parameter == "bias"} - weights - set(adapted)
  return sorted(weights | (loose if bias != "all" else set()))


def _config(
  adapted: Mapping[str, Module], saved: Sequence[str], known: Collection[str] | None, bias: str
) -> dict[str, Any]:
  scalings = {module.scaling for module in adapted.values()}
  rslora = scalings == {"rslora"}
  # One option says how alpha becomes a scale; where the modules differ, alpha is told as the standard one takes it.
  alphas = {
    name: module.alpha if len(scalings) == 1 else module.scale * module.rank for name, module in adapted.items()
  }
  settings = {name: (module.rank, alphas[name]) for name, module in adapted.items()}
  rank, alpha = max(settings.values(), key=list(settings.values()).count, default=(8, 8))
  others = set(adapted if known is None else known) | set(adapted)
  return {
    "peft_type": "LORA",
    "auto_mapping": None,
    "revision": None,
    "inference_mode": True,
    "r": rank,
    "lora_alpha": _whole(alpha),
    "target_modules": target_modules(sorted(adapted), others, saved, complete=known is not None),
    "modules_to_save": list(saved) or None,
    "bias": bias,
    "use_rslora": rslora,
    "use_dora": any(module.magnitude is not None for module in adapted.values()),
    "fan_in_fan_out": bool(adapted) and all(name.rpartition(".")[2] in CONV1D for name in adapted),
    "init_lora_weights": True,  # readers such as vLLM's refuse any other; what the file holds starts from the base
    "rank_pattern": _patterns({name: setting[0] for name, setting in settings.items()}, rank),
    "alpha_pattern": _patterns({name: _whole(setting[1]) for name, setting in settings.items()}, _whole(alpha)),
    "layers_to_transform": None,
    "layers_pattern": None,
  }


CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")  # GPT-2's modules with weights of shape (in, out)


def _whole(alpha: float) -> float:
  return int(alpha) if float(alpha).is_integer() else float(alpha)


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
  """Regexes over ends of names for the values that are not the default."""
  patterns = {}
  for value in sorted(set(values.values()) - {default}):
    chosen = [name for name in values if values[name] == value]
    for ending in endings(chosen, list(values)):
      patterns[("^" if ending in values else "") + re.escape(ending)] = value
  return patterns


def endings(chosen: Collection[str], names: Collection[str]) -> list[str]:
  """The fewest ends of names, in whole components, that all of `chosen` have and no other of `names` has."""
  others = {ending for name in set(names) - set(chosen) for ending in _endings(name)}
  return sorted({next((e for e in _endings(name) if e not in others), name) for name in chosen})


def _endings(name: str) -> list[str]:
  parts = name.split(".")
  return [".".join(parts[k:]) for k in range(len(parts) - 1, -1, -1)]


def target_modules(
  adapted: Sequence[str], known: Collection[str], saved: Collection[str], *, complete: bool
) -> list[str] | str:
  """What picks exactly the adapted modules by PEFT's rule: a list of ends of names, or one regex over whole names.

  Raises:
    PeftError: if PEFT would leave an adapted module out, or save another one with those to save.
  """
  problems = [
    f"{name}: PEFT adapts nothing in a module that is saved whole ({module})"
    for name in adapted
    for module in saved
    if f".{name}.".find(f".{module}.") >= 0
  ]
  problems += [
    f"{name}: PEFT would save it whole, too, as its name ends like {module}"
    for name in adapted
    for module in saved
    if name.endswith(module)
  ]
  if problems:
    raise fail("save", problems, "Train fewer leaves whole, or adapt fewer.")
  targets = endings(adapted, known) if complete else list(adapted)
  if any(name.endswith(f".{target}") for target in targets for name in set(known) - set(adapted)):
    return "|".join(re.escape(name) for name in adapted)
  return targets
