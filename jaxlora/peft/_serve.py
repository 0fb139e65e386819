"""What PEFT, vLLM, SGLang and llama.cpp require of a folder: a record per rule, with the function that asks for it.

Read in PEFT 0.21.2, vLLM (main of October 2026, and releases before it where they differ), SGLang (main of August 2026)
and llama.cpp (main of August 2026).
"""

from collections.abc import Callable, Collection
import dataclasses

from jaxlora.peft import _serve_checks as checks

READERS = ("peft", "vllm", "sglang", "llama.cpp")


@dataclasses.dataclass(frozen=True)
class Rule:
  """One requirement of a reader.

  Attributes:
    name: what it is called in reports.
    readers: who asks for it.
    requires: what must hold, as a sentence.
    otherwise: what the reader does where it does not hold.
    remedy: what to do then.
    source: the file and function of the reader that asks for it.
    broken: what breaks it in a folder; nothing where it holds.
    made: whether `serve=` and `--write` bring it about, without a change of the function.
    note: whether it may be met outside of the folder: it is told, and no reason to refuse.
  """

  name: str
  readers: tuple[str, ...]
  requires: str
  otherwise: str
  remedy: str
  source: str
  broken: Callable[[checks.Folder], Collection[str]]
  made: bool = False
  note: bool = False


_REWRITE = (
  "write it with jaxlora.peft.save(..., serve='{reader}'), or jaxlora check FOLDER --serve {reader} --write OUT"
)
_MERGE = "serve the merged model: jaxlora.merge(tree), or jaxlora merge BASE FOLDER OUT"
_SERVERS = ("vllm", "sglang", "llama.cpp")

RULES = (
  Rule(
    name="file",
    readers=("peft", "vllm", "llama.cpp"),
    requires="the weights are in one file, adapter_model.safetensors",
    otherwise="they are not found",
    remedy=_REWRITE,
    source="peft/utils/save_and_load.py: load_peft_weights; vllm/lora/lora_model.py: LoRAModel.from_local_checkpoint;"
    " llama.cpp/convert_lora_to_gguf.py: main",
    broken=checks.several_files,
    made=True,
  ),
  Rule(
    name="keys",
    readers=("peft",),
    requires="keys begin with base_model.model. once, and have no wrapper's name in them",
    otherwise="PEFT leaves the tensors out, with a warning",
    remedy=_REWRITE,
    source="peft/utils/save_and_load.py: set_peft_model_state_dict",
    broken=checks.keys_that_peft_leaves_out,
    made=True,
  ),
  Rule(
    name="keys",
    readers=_SERVERS,
    requires="keys have neither a wrapper's nor an adapter's name in them",
    otherwise="the tensors are refused, or left out",
    remedy=_REWRITE,
    source="vllm/lora/utils.py: parse_fine_tuned_lora_name; sglang/srt/lora/lora.py: LoRAAdapter._process_weight;"
    " llama.cpp/convert_lora_to_gguf.py: get_base_tensor_name",
    broken=checks.keys_that_servers_leave_out,
    made=True,
  ),
  Rule(
    name="task",
    readers=("peft",),
    requires=f"task_type is one of {', '.join(checks.TASKS)}, or none",
    otherwise="PEFT raises",
    remedy="save it with one of these, or without: task_type=None",
    source="peft/config.py: PeftConfigMixin.__post_init__",
    broken=checks.unknown_tasks,
  ),
  Rule(
    name="adapted-head",
    readers=("peft",),
    requires="what is saved whole, by modules_to_save or for the task_type, is not adapted",
    otherwise="PEFT raises",
    remedy="save it without that task: task_type=None; or train the head whole: LoraConfig(exclude=..., train=...)",
    source="peft/peft_model.py: PeftModelForSequenceClassification.__init__; peft/utils/other.py: ModulesToSaveWrapper",
    broken=checks.adapted_heads,
  ),
  Rule(
    name="head",
    readers=("peft",),
    requires="the file holds what modules_to_save names, and for SEQ_CLS and TOKEN_CLS the classifier or score, for"
    " QUESTION_ANS the qa_outputs",
    otherwise="PEFT raises KeyError where the model has such a module",
    remedy="save the whole tree, whose head is written as it is, or without that task: task_type=None",
    source="peft/peft_model.py: PeftModelForSequenceClassification.__init__; peft/utils/save_and_load.py:"
    " set_peft_model_state_dict",
    broken=checks.missing_heads,
  ),
  Rule(
    name="experts",
    readers=("peft",),
    requires="a module whose parameters hold experts as (in, out) says is_transposed, as those of transformers 5 do",
    otherwise="PEFT takes A for the outputs: an error for other sizes, and wrong without a word for equal ones",
    remedy="load it with transformers 5, or set is_transposed = True on the module before PeftModel.from_pretrained",
    source="peft/tuners/lora/layer.py: ParamWrapper.__init__",
    broken=checks.packed_experts,
    note=True,
  ),
  Rule(
    name="null-patterns",
    readers=("peft",),
    requires="rank_pattern and alpha_pattern are objects",
    otherwise="PEFT raises",
    remedy=_REWRITE,
    source="peft/tuners/lora/model.py: LoraModel._create_and_replace",
    broken=checks.null_patterns,
    made=True,
  ),
  Rule(
    name="dora",
    readers=_SERVERS,
    requires="no DoRA",
    otherwise="the adapter is refused",
    remedy=_MERGE,
    source="vllm/lora/peft_helper.py: PEFTHelper._validate_features; sglang/srt/lora/lora_manager.py:"
    " LoRAManager.validate_new_adapter; llama.cpp/convert_lora_to_gguf.py: LoraModel.get_tensors",
    broken=checks.dora,
  ),
  Rule(
    name="whole",
    readers=_SERVERS,
    requires="no parameters trained whole",
    otherwise="vLLM and llama.cpp refuse them, SGLang and llama.cpp's norms leave them out without a word",
    remedy=_MERGE,
    source="vllm/lora/peft_helper.py: PEFTHelper._validate_features; vllm/lora/utils.py: parse_fine_tuned_lora_name;"
    " sglang/srt/lora/lora.py: LoRAAdapter._process_weight; llama.cpp/convert_lora_to_gguf.py: LoraModel.get_tensors;"
    " llama.cpp/src/llama-adapter.cpp: llama_adapter_lora_init_impl",
    broken=checks.whole,
  ),
  Rule(
    name="experts",
    readers=_SERVERS,
    requires="no experts in one parameter, PEFT's target_parameters",
    otherwise="llama.cpp has no tensor of such a name, and readers differ in how the factors of experts lie",
    remedy=_MERGE,
    source="vllm/lora/lora_model.py: LoRAModel.from_local_checkpoint; sglang/srt/lora/utils.py:"
    " get_normalized_target_modules; llama.cpp/convert_lora_to_gguf.py: get_base_tensor_name",
    broken=checks.packed_experts,
  ),
  Rule(
    name="bias",
    readers=("vllm",),
    requires="bias is none",
    otherwise="vLLM refuses it",
    remedy=_MERGE,
    source="vllm/lora/peft_helper.py: PEFTHelper.validate_legal",
    broken=checks.biases,
  ),
  Rule(
    name="linear",
    readers=_SERVERS,
    requires="adapted modules are linear, or embeddings",
    otherwise="there is no layer for them",
    remedy=_MERGE,
    source="vllm/lora/utils.py: get_supported_lora_modules; sglang/srt/lora/layers.py: get_lora_layer;"
    " llama.cpp/convert_lora_to_gguf.py: LoraTorchTensor",
    broken=checks.convolutions,
  ),
  Rule(
    name="scale",
    readers=("vllm",),
    requires="every module's scale is lora_alpha / r (/ sqrt(r) with use_rslora): releases do not read rank_pattern and"
    " alpha_pattern",
    otherwise="the update has another size, without a word",
    remedy=_REWRITE,
    source="vllm/lora/peft_helper.py: PEFTHelper.__post_init__",
    broken=lambda folder: checks.other_scales(folder, lambda _: folder.config.get("r", 8), rslora=True),
    made=True,
  ),
  Rule(
    name="scale",
    readers=("sglang",),
    requires="every module's scale is lora_alpha / r: use_rslora, rank_pattern and alpha_pattern are not read",
    otherwise="the update has another size, without a word",
    remedy=_REWRITE,
    source="sglang/srt/lora/lora.py: LoRAAdapter.__init__ (sglang#40835)",
    broken=lambda folder: checks.other_scales(folder, lambda _: folder.config.get("r", 8), rslora=False),
    made=True,
  ),
  Rule(
    name="scale",
    readers=("llama.cpp",),
    requires="every module's scale is lora_alpha / the rank of its own tensors: use_rslora and alpha_pattern are not"
    " read",
    otherwise="the update has another size, without a word",
    remedy=_REWRITE,
    source="llama.cpp/convert_lora_to_gguf.py: LoraModel.set_gguf_parameters; llama.cpp/src/llama-adapter.h:"
    " llama_adapter_lora_weight::get_scale",
    broken=lambda folder: checks.other_scales(folder, lambda module: module.rank, rslora=False),
    made=True,
  ),
  Rule(
    name="zero-alpha",
    readers=("llama.cpp",),
    requires="lora_alpha is not 0",
    otherwise="0 is taken for a scale of 1",
    remedy=_REWRITE,
    source="llama.cpp/src/llama-adapter.h: llama_adapter_lora_weight::get_scale",
    broken=checks.no_alpha,
    made=True,
  ),
  Rule(
    name="rank",
    readers=("sglang",),
    requires="every module has the rank r",
    otherwise="an assertion fails when the weights are copied",
    remedy=_REWRITE,
    source="sglang/srt/lora/mem_pool.py: LoRAMemoryPool.load_lora_weight_to_buffer",
    broken=checks.other_ranks,
    made=True,
  ),
  Rule(
    name="rank",
    readers=("vllm",),
    requires="no module has a rank above r, by which --max-lora-rank is checked",
    otherwise="weights do not fit into the buffers",
    remedy=_REWRITE,
    source="vllm/lora/peft_helper.py: PEFTHelper.validate_legal",
    broken=lambda folder: checks.ranks_above(folder.config.get("r", 8))(folder),
    made=True,
  ),
  Rule(
    name="largest-rank",
    readers=("vllm",),
    requires="ranks are at most 512",
    otherwise="no --max-lora-rank admits the adapter",
    remedy="bring it to a lower rank: jaxlora.compress(tree, rank=512)",
    source="vllm/config/lora.py: MaxLoRARanks",
    broken=checks.ranks_above(checks.VLLM_RANKS[-1]),
  ),
  Rule(
    name="max-lora-rank",
    readers=("vllm",),
    requires="ranks are at most 16, or --max-lora-rank says more",
    otherwise="vLLM refuses it",
    remedy="start the server with that option",
    source="vllm/config/lora.py: LoRAConfig.max_lora_rank",
    broken=checks.ranks_above_vllms_default,
    note=True,
  ),
  Rule(
    name="method",
    readers=("vllm",),
    requires="no method beside LoRA's own: lora_bias, layer_replication, activated, block-diagonal or QALoRA",
    otherwise="vLLM refuses it",
    remedy="merge it in PEFT: merge_and_unload",
    source="vllm/lora/peft_helper.py: PEFTHelper._validate_features",
    broken=checks.other_methods,
  ),
  Rule(
    name="start",
    readers=("vllm",),
    requires="init_lora_weights is no start that changes the base",
    otherwise="vLLM refuses it",
    remedy="convert it in PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=...)",
    source="vllm/lora/peft_helper.py: PEFTHelper._init_is_supported",
    broken=checks.other_starts,
  ),
  Rule(
    name="targets",
    readers=("vllm",),
    requires="target_modules is there",
    otherwise="vLLM raises",
    remedy=_REWRITE,
    source="vllm/lora/peft_helper.py: PEFTHelper.from_dict",
    broken=checks.no_targets,
    made=True,
  ),
  Rule(
    name="targets",
    readers=("sglang",),
    requires="target_modules is a list, or 'all-linear'",
    otherwise="SGLang raises",
    remedy=_REWRITE,
    source="sglang/srt/lora/utils.py: get_normalized_target_modules",
    broken=checks.targets_as_text,
    made=True,
  ),
  Rule(
    name="fused",
    readers=("sglang",),
    requires="q_proj and v_proj are adapted together, and so are gate_proj and up_proj",
    otherwise="the missing half is a KeyError, or the module stays without a buffer",
    remedy="write zero factors for the other half: jaxlora.peft.save(whole tree, serve='sglang'); or " + _MERGE,
    source="sglang/srt/lora/lora.py: LoRAAdapter.normalize_qkv_proj, normalize_gate_up_proj (sglang#25913)",
    broken=checks.halves_of_fused,
  ),
  Rule(
    name="layers",
    readers=("sglang",),
    requires="modules are in layers.<number>, or are embed_tokens or lm_head",
    otherwise="the tensors are left out, without a word",
    remedy=_MERGE,
    source="sglang/srt/lora/lora.py: LoRAAdapter._process_weight; sglang/srt/layers/utils: get_layer_id",
    broken=checks.outside_of_layers,
  ),
  Rule(
    name="tied",
    readers=("llama.cpp",),
    requires="an embedding that is the head, too, is not adapted",
    otherwise="the converter refuses the head",
    remedy=_MERGE,
    source="llama.cpp/convert_lora_to_gguf.py: LoraModel.modify_tensors (llama.cpp#9065)",
    broken=checks.tied_head,
  ),
  Rule(
    name="head-of-its-own",
    readers=("llama.cpp",),
    requires="an adapted lm_head is not tied to the embedding",
    otherwise="the converter refuses it where the base ties them",
    remedy=f"look at tie_word_embeddings in the base's config.json; where it is true, {_MERGE}",
    source="llama.cpp/convert_lora_to_gguf.py: LoraModel.modify_tensors (llama.cpp#9065)",
    broken=checks.head_that_may_be_tied,
    note=True,
  ),
  Rule(
    name="base",
    readers=("llama.cpp",),
    requires="base_model_name_or_path names the base, or convert_lora_to_gguf.py is given --base",
    otherwise="the base's configuration is not found",
    remedy="name it: jaxlora.peft.save(..., base_model_name_or_path='org/model')",
    source="llama.cpp/convert_lora_to_gguf.py: load_hparams_from_hf",
    broken=checks.no_base,
    note=True,
  ),
)  # fmt: skip
