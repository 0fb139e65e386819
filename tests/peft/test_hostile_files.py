"""Files that anybody may have written: one kind of error, in little time and memory."""

import copy
import json
import re
import resource
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import peft
from jaxlora.peft import _patterns
from tests.peft.folders import PREFIX, params, write


@pytest.mark.parametrize(
  "pattern",
  ["(a+)+", "(a|a)*b", "(.*)*", "((a|b)|(a|b))+", ".*.*.*.*.*.*x", "(a|a)" * 40, r"(a)\1", "(?=a)", "a{1000}",
   "x" * 9999, "a**", "[a-z]+" * 9, "(?:a?)" * 60, "\\"],
)  # fmt: skip
def test_patterns_that_could_take_for_ever_are_refused(pattern, tmp_path):
  write(tmp_path, {"a" * 400: (2, 8, 7)}, alpha_pattern={pattern: 3})
  start = time.perf_counter()
  with pytest.raises(peft.PeftError, match="is no pattern that is read here"):
    peft.load(tmp_path, params())
  assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
  "pattern",
  [
    "head",
    "^head$",
    r"net\.head",
    "net.head",
    ".*head",
    r"net\..*\.?head",
    "(foo|head)",
    "he[a-d]+",
    "(?:net.)?head",
    r"\w+",
  ],
)
def test_patterns_as_peft_has_them(pattern):
  regex, _ = _patterns.compile_suffix(pattern, 60)
  for name in ("head", "net.head", "foo", "a.b.head", "xhead", "head.x"):
    assert bool(regex.match(name)) == bool(re.match(rf"(.*\.)?({pattern})$", name)), name


def junk(random):
  return random.choice(
    [
      None,
      True,
      -1,
      0,
      3,
      2.5,
      10**30,
      1e308,
      "",
      "head",
      "(a+)+",
      [],
      [1],
      ["head"],
      {},
      {"head": 4},
      {"": {}},
      [[[]]],
    ]
  )


def corrupt_json(random, text):
  """A configuration with some of it replaced, by structure or by bytes."""
  if random.random() < 0.5:
    config = json.loads(text)
    for _ in range(random.randint(1, 3)):
      field = random.choice([*config, "lora_bias", "exclude_modules", "trainable_token_indices"])
      config[field] = junk(random)
      if random.random() < 0.2:
        del config[field]
    return json.dumps(config).encode()
  return corrupt_bytes(random, text)


def corrupt_bytes(random, data):
  data = bytearray(data)
  for _ in range(random.randint(1, 4)):
    where = random.randrange(len(data) + 1)
    kind = random.random()
    if kind < 0.4 and where < len(data):
      data[where] = random.randrange(256)
    elif kind < 0.6:
      del data[where : where + random.randint(1, 40)]
    elif kind < 0.8:
      data[where:where] = bytes(random.randrange(256) for _ in range(random.randint(1, 8)))
    else:
      data = data[:where]
  return bytes(data)


def corrupt_tensors(random, data):
  """A safetensors file with some of its header replaced, by structure or by bytes."""
  if random.random() < 0.4:
    return corrupt_bytes(random, data)
  length = int.from_bytes(data[:8], "little")
  header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
  for _ in range(random.randint(1, 2)):
    name = random.choice(list(header))
    entry = header[name] if isinstance(header[name], dict) else {}
    kind = random.randrange(6)
    if kind == 0:
      entry["shape"] = random.choice(
        [[2**62, 2**62], [10**18], [-1, 8], [0, 10**18], [2**63 - 1], [], "x", [1.5], None]
      )
    elif kind == 1:
      entry["dtype"] = random.choice(["F64", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "Z9", 3, None])
    elif kind == 2:
      entry["data_offsets"] = random.choice([[0, 2**63], [2**64, 1], [-4, 60], [8, 4], [0], "x", None, [0, len(body)]])
    elif kind == 3:
      header[random.choice(["head.lora_A.weight", f"{PREFIX}x.lora_A.weight", "", "\0", f"{PREFIX}.lora_A.weight"])] = (
        header.pop(name)
      )
    elif kind == 4:
      header[name] = junk(random)
    else:
      header[f"{name}2"] = copy.deepcopy(entry)
  text = json.dumps(header).encode()
  size = len(text) if random.random() < 0.8 else random.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(text) - 1])
  return size.to_bytes(8, "little") + text + body


def test_corrupted_folders_give_one_kind_of_error(tmp_path):
  """Thousands of them: no crash, no other error, no memory beyond the file's."""
  import random as randomness

  random = randomness.Random(0)
  base = {"head": {"kernel": jnp.ones((8, 7)), "bias": jnp.ones(7)}, "pre": {"kernel": jnp.ones((8, 8))}}
  base["norm"] = {"scale": jnp.ones(8)}
  write(
    tmp_path,
    {"head": (2, 8, 7), "pre": (3, 8, 8)},
    {"head.bias": np.ones(7, np.float32), "norm.weight": 2 * np.ones(8, np.float32)},
  )
  good = {name: (tmp_path / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
  peft.load(tmp_path, base)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  outcomes, longest = {"loaded": 0, "refused": 0}, 0
  start = time.perf_counter()
  for name, corrupt in (("adapter_config.json", corrupt_json), ("adapter_model.safetensors", corrupt_tensors)):
    for _ in range(2000):
      (tmp_path / name).write_bytes(corrupt(random, good[name]))
      try:
        peft.load(tmp_path, base)
        outcomes["loaded"] += 1
      except peft.PeftError as error:
        outcomes["refused"] += 1
        longest = max(longest, len(str(error)))
    (tmp_path / name).write_bytes(good[name])
  assert longest < 10_000
  assert outcomes["refused"] > 2500, outcomes
  assert outcomes["loaded"] > 100, outcomes
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
  assert time.perf_counter() - start < 120


def test_deep_and_large_configurations(tmp_path):
  write(tmp_path, {"head": (2, 8, 7)})
  path = tmp_path / "adapter_config.json"
  for text in ("[" * 200_000, '{"r":' * 100_000, "[]", "null", "1" * 10_000, '{"r": ' + "9" * 10_000 + "}", "\xff" * 9):
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(peft.PeftError):
      peft.load(tmp_path, params())
  with path.open("wb") as file:
    file.truncate(1 << 30)  # sparse: it takes no room
  with pytest.raises(peft.PeftError, match="expected a configuration of at most"):
    peft.load(tmp_path, params())
