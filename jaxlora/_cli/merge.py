"""`jaxlora merge`: a model's tensors with an adapter folded in, one at a time."""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora._base.files import nbytes_of
from jaxlora._base.rounding import notable
from jaxlora._base.text import size
from jaxlora._cli.bases import open_base
from jaxlora._cli.changes import changes_of
from jaxlora._cli.edits import Weights
from jaxlora._cli.result import BadFile, Result
from jaxlora._cli.rewrite import Edit
from jaxlora._cli.write_model import write_model
from jaxlora._files.carried import carry, changed_config, quantisation_of
from jaxlora._files.format import FormatError
from jaxlora._files.formats import quantised_weights
from jaxlora._files.tensors import TensorFileError, TensorFiles


def run_merge(options: Any) -> Result:
  """Folds ADAPTER into the tensors of BASE, and writes OUT."""
  files = open_base(options.base)
  weights = _weights(options, files)
  changes = changes_of(options, weights)
  edits = weights.edits(changes)
  out, folder = _target(Path(options.out), files)
  config = changed_config(files.config, dequantised=options.dequantize, dtype=options.dtype, untied=options.untie)
  with _bar(files, edits) as bar:
    carried = _write(files, out, edits, config, options.dequantize, bar, folder=folder)
  report = {"out": str(out), "tensors": len(files.tensors), "merged": sorted(changes), "bytes": files.size}
  report |= {"lost": weights.lost, "carried": carried}
  lines = [f"{out}: {len(changes)} of {len(files.tensors)} tensors merged, {size(files.size)}"]
  return report, lines + _about_config(files, config, carried) + _about_rounding(weights)


def _weights(options: Any, files: TensorFiles) -> Weights:
  """The weights of the base, whatever the tensors that hold them."""
  config = files.config
  quantisation = quantisation_of(config)
  try:
    quantised = quantised_weights(files.tensors, quantisation, files.read)
  except FormatError as error:
    raise BadFile(f"{options.base}: {error}") from error
  told = str(config.get("dtype") or config.get("torch_dtype"))
  plain = jnp.dtype(told if told in ("float32", "float16", "bfloat16") else "bfloat16")
  dtype = None if options.dtype is None else jnp.dtype(options.dtype)
  return Weights(files, quantised, dtype, options.dequantize, plain)


def _target(out: Path, files: TensorFiles) -> tuple[Path, bool]:
  """Where the model goes, and whether that is a new folder; where it is a file it may be in a folder that exists."""
  if files.form == "orbax" and out.suffix != ".safetensors":
    if out.exists():
      raise TensorFileError(f"{out}: exists; expected a new folder, or a file called .safetensors.")
    return out, True
  several = files.index is not None or len(files.files) > 1
  suffixes = (".safetensors", f".{files.form}")
  folder = several or (files.folder is not None and not out.is_dir() and out.suffix not in suffixes)
  if folder and out.exists():
    raise TensorFileError(f"{out}: exists; expected a new folder.")
  if not folder and out.is_dir():
    out = out / files.files[0].name
  if any(out.exists() and out.samefile(file) for file in files.files):
    raise BadFile(f"{out}: is the base itself; expected another place.")
  return out, folder


def _bar(files: TensorFiles, edits: Sequence[Edit]) -> Any:
  """A progress bar over the bytes that are written."""
  from tqdm import tqdm  # an extra: jaxlora[peft]

  outputs = {name: spec for edit in edits for name, spec in edit.outputs.items()}
  gone = {name for edit in edits for name in edit.removed}
  copied = sum(t.nbytes for name, t in files.tensors.items() if name not in outputs and name not in gone)
  total = copied + sum(nbytes_of(*spec) for spec in outputs.values())
  return tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="merging", leave=False)


def _write(
  files: TensorFiles,
  out: Path,
  edits: Sequence[Edit],
  config: Mapping[str, Any],
  dequantised: bool,
  bar: Any,
  *,
  folder: bool,
) -> list[str]:
  """Writes the model, and beside it what the base's folder holds; returns the names of the latter."""

  def rest(target: Path) -> list[str]:
    return carry(files.folder, target, config, dequantised=dequantised) if files.folder else []

  carried: list[str] = []
  if folder:
    write_model(files, out, edits, bar.update, folder=True, beside=lambda new: carried.extend(rest(new)))
    return carried
  alone = files.folder is None or out.name != files.files[0].name or out.parent.resolve() == files.folder.resolve()
  if not alone and config != files.config and (out.parent / "config.json").exists():
    raise BadFile(f"{out.parent / 'config.json'}: exists, and the merged model needs another. Name a new folder.")
  write_model(files, out, edits, bar.update, folder=False)
  return [] if alone else rest(out.parent)


def _about_config(files: TensorFiles, config: Mapping[str, Any], carried: Sequence[str]) -> list[str]:
  """What is to be changed in a config.json that was not carried along."""
  if config == files.config or "config.json" in carried:
    return []
  gone = [name for name in files.config if name not in config]
  changed = [f"{name}: {json.dumps(config[name])}" for name in config if config[name] != files.config.get(name)]
  return [
    f"config.json is not beside OUT; that of the merged model has {'; '.join([*(f'no {n}' for n in gone), *changed])}."
    " (With folders as BASE and OUT it goes along.)"
  ]


def _about_rounding(weights: Weights) -> list[str]:
  """What rounding has taken of the updates, and how to keep it."""
  lines = []
  forms = sorted({weights.quantised[name].format.name for name in weights.lost if name in weights.quantised})
  if forms and not weights.dequantize:
    shares = [share for name, share in weights.lost.items() if name in weights.quantised]
    lines.append(
      f"stored again as {', '.join(forms)}: of the updates' norms {max(shares):.1%} is lost to rounding at most,"
      f" {float(np.median(shares)):.1%} in the median"
    )
  if found := notable(weights.lost):
    option = "--dequantize stores plain floats" if lines else "--dtype float32 keeps it"
    lines.append(f"warning: more than a tenth of the update is rounded away in {found}. {option}.")
  return lines
