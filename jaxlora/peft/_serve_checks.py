"""What may break a rule of a reader: functions of a folder, which return what they find."""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import re
from typing import Any

from jaxlora.peft._records import SEVERAL, Adapter, Module
from jaxlora.peft._tied import is_head

# The modules that PEFT saves whole for a task, by the ends of their names: peft/peft_model.py.
HEADS = {
  "SEQ_CLS": ("classifier", "score"),
  "TOKEN_CLS": ("classifier", "score"),
  "QUESTION_ANS": ("qa_outputs",),
}

TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclasses.dataclass(frozen=True)
class Folder:
  """What the rules look at.

  Attributes:
    adapter: the adapter that the folder holds.
    keys: of its tensors, as the file has them.
    known: the names of all modules of the model; `None` if they are not known.
  """

  adapter: Adapter
  keys: Sequence[str]
  known: Collection[str] | None = None

  @property
  def config(self) -> Mapping[str, Any]:
    return self.adapter.config

  @property
  def modules(self) -> Mapping[str, Module]:
    return self.adapter.modules


_WRAPPED = r"(?!.*(?:_orig_mod|_wrapped_module|_forward_module|original_module)\.)(?!module\.)"
_PEFTS = re.compile(rf"{_WRAPPED}base_model\.model\.(?!base_model\.model\.)")
_SERVERS = re.compile(
  rf"{_WRAPPED}(?:base_model\.model\.)?(?!base_model\.model\.)"
  r"(?!.*\.(?:lora_[AB]|lora_embedding_[AB]|modules_to_save)\.(?!weight$|bias$))"
)


def several_files(folder: Folder) -> list[str]:
  return [SEVERAL] if folder.adapter.form == SEVERAL else []


def keys_that_peft_leaves_out(folder: Folder) -> list[str]:
  return [key for key in folder.keys if not _PEFTS.match(key)]


def keys_that_servers_leave_out(folder: Folder) -> list[str]:
  return [key for key in folder.keys if not _SERVERS.match(key)]


def other_scales(folder: Folder, rank_of: Callable[[Module], int], *, rslora: bool) -> list[str]:
  """The modules whose scale is not that of one `lora_alpha` for all."""
  alpha = folder.config.get("lora_alpha", 8)
  power = 0.5 if rslora and folder.config.get("use_rslora") else 1.0
  return [
    f"{name}: scale {module.scale:.6g}, read as {alpha / rank_of(module) ** power:.6g}"
    for name, module in folder.modules.items()
    if abs(module.scale * rank_of(module) ** power - alpha) > 1e-6 * abs(alpha)
  ]


def other_ranks(folder: Folder) -> list[str]:
  rank = folder.config.get("r", 8)
  return [f"{name}: rank {m.rank}, r is {rank}" for name, m in folder.modules.items() if m.rank != rank]


def ranks_above(limit: int) -> Callable[[Folder], list[str]]:
  return lambda folder: [f"{name}: rank {m.rank}" for name, m in folder.modules.items() if m.rank > limit]


def tied_head(folder: Folder) -> list[str]:
  """The adapted embedding and head of a tied model."""
  if not folder.config.get("ensure_weight_tying"):
    return []
  return [name for name, module in folder.modules.items() if module.kind == "embedding" or is_head(name)]


def head_that_may_be_tied(folder: Folder) -> list[str]:
  return [] if tied_head(folder) else [name for name in folder.modules if is_head(name)]


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be


def ranks_above_vllms_default(folder: Folder) -> list[str]:
  rank = max((module.rank for module in folder.modules.values()), default=0)
  limit = next((limit for limit in VLLM_RANKS if limit >= rank), None)
  return [f"rank {rank}, so that --max-lora-rank {limit} is needed"] if limit and rank > 16 else []


def whole(folder: Folder) -> list[str]:
  saved = folder.config.get("modules_to_save") or []
  return sorted({**folder.adapter.whole, **folder.adapter.tokens}) or [f"modules_to_save: {name}" for name in saved]


def dora(folder: Folder) -> list[str]:
  magnitudes = [f"{name}: DoRA's magnitude" for name, module in folder.modules.items() if module.magnitude is not None]
  return magnitudes or (["use_dora"] if folder.config.get("use_dora") else [])


def packed_experts(folder: Folder) -> list[str]:
  packed = list(folder.adapter.packed)
  return packed or [f"target_parameters: {name}" for name in folder.config.get("target_parameters") or []]


def convolutions(folder: Folder) -> list[str]:
  return [f"{name}: a convolution" for name, module in folder.modules.items() if module.kind == "conv"]


# Projections that SGLang has in one matrix: what each of them needs beside it.
_BESIDE = {"q_proj": ("v_proj",), "k_proj": ("q_proj", "v_proj"), "v_proj": ("q_proj",), "gate_proj": ("up_proj",)}


def partners(modules: Collection[str]) -> list[tuple[str, str]]:
  """The modules that have no factors though they are in one matrix with an adapted one, and that one."""
  found = []
  for name in modules:
    stem, _, last = name.rpartition(".")
    needed = [f"{stem}.{other}" for other in _BESIDE.get(last, ())]
    found += [(other, name) for other in needed if other not in modules]
  return found


def halves_of_fused(folder: Folder) -> list[str]:
  return [f"{name}: without {other.rpartition('.')[2]} beside it" for other, name in partners(folder.modules)]


def outside_of_layers(folder: Folder) -> list[str]:
  known = re.compile(r"(?:.*\.)?layers\.\d+\..+|.*(?:embed_tokens|lm_head).*")
  return [name for name in folder.modules if not known.fullmatch(name)]


def targets_as_text(folder: Folder) -> list[str]:
  targets = folder.config.get("target_modules")
  listed = isinstance(targets, list) and bool(targets)
  return [] if listed or targets in ("all", "all-linear") else [f"target_modules: {targets!r}"]


def no_targets(folder: Folder) -> list[str]:
  return [] if folder.config.get("target_modules") else ["target_modules: none"]


def module_saved_with(name: str, endings: Collection[str]) -> str | None:
  """The module that PEFT saves whole, as its name ends so: this one, or one that it is in; `None` for neither."""
  parts = name.split(".")
  containers = (".".join(parts[: k + 1]) for k in range(len(parts)))
  return next((container for container in containers if container.endswith(tuple(endings))), None)


def _is_saved(name: str, endings: Collection[str]) -> bool:
  return module_saved_with(name, endings) is not None


def adapted_heads(folder: Folder) -> list[str]:
  heads = HEADS.get(str(folder.config.get("task_type")), ())
  saved = [*heads, *(folder.config.get("modules_to_save") or [])]
  return [f"{name}: adapted" for name in folder.modules if _is_saved(name, saved)]


def missing_heads(folder: Folder) -> list[str]:
  """The modules that PEFT takes from the file for the task or by `modules_to_save`, where it holds none of them.

  Of a model whose modules are not known it may have them: PEFT writes the names of both heads, and a model has one.
  """
  heads = HEADS.get(str(folder.config.get("task_type")), ())
  asked = [*heads, *(folder.config.get("modules_to_save") or [])]
  held = {name.rpartition(".")[0] for name in folder.adapter.whole} | set(folder.modules)
  if not asked or any(_is_saved(name, asked) for name in held):
    return []
  if folder.known is not None and not any(_is_saved(name, asked) for name in folder.known):
    return []
  return [f"no weights of {' or '.join(dict.fromkeys(asked))}"]


def unknown_tasks(folder: Folder) -> list[str]:
  task = folder.config.get("task_type")
  return [] if task is None or task in TASKS else [f"task_type: {task!r}"]


def null_patterns(folder: Folder) -> list[str]:
  return [field for field in ("rank_pattern", "alpha_pattern") if folder.config.get(field, {}) is None]


def other_starts(folder: Folder) -> list[str]:
  start = folder.config.get("init_lora_weights", True)
  fine = not isinstance(start, str) or start.lower() in ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
  return [] if fine else [f"init_lora_weights: {start!r}"]


def other_methods(folder: Folder) -> list[str]:
  options = ("lora_bias", "layer_replication", "alora_invocation_tokens", "use_bdlora", "use_qalora")
  return [option for option in options if folder.config.get(option)]


def biases(folder: Folder) -> list[str]:
  return [f"bias: {folder.config['bias']!r}"] if folder.config.get("bias", "none") != "none" else []


def no_alpha(folder: Folder) -> list[str]:
  return ["lora_alpha: 0"] if folder.config.get("lora_alpha", 8) == 0 else []


def no_base(folder: Folder) -> list[str]:
  return [] if folder.config.get("base_model_name_or_path") else ["base_model_name_or_path: none"]
