"""Files that anybody may have written: one kind of error, in little time and memory."""

import copy
import json
import random as random_module
import re
import resource
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import peft
from jaxlora.peft import _regex
from jaxlora.peft._read import read
from tests.peft.folders import PREFIX, edit, params, write


@pytest.mark.parametrize(
  "pattern",
  [r"(a)\1", "x" * 9999, "a**", "\\", "(" * 61 + "a" + ")" * 61, "(?>a+)", "a++", "(?i:a)", "(?(1)a|b)", "a{2000}",
   "(((((a?){999}){999}){999}){999}){999}", "(?=.*(?=.*(?=.*(?=.*x))))a"],
)  # fmt: skip
def test_patterns_that_are_not_understood_or_take_for_ever_are_refused(pattern, tmp_path):
  write(tmp_path, {"a" * 400: (2, 8, 7)}, alpha_pattern={pattern: 3})
  start = time.process_time()
  with pytest.raises(peft.PeftError, match=r"is no pattern that is read here|matching it could take too long"):
    peft.load(tmp_path, params())
  assert time.process_time() - start < 3


@pytest.mark.parametrize(
  ("pattern", "matches"),
  {"(a+)+": True, "(a|a)*b": False, "(.*)*": True, "((a|b)|(a|b))+": True, ".*.*.*.*.*.*x": False,
   "(a|a)" * 40: False, "[a-z]+" * 9: True, "(?:a?)" * 60: False, "(((((a*)*)*)*)*)*b": False,
   "((a{1,99}){1,99}){1,99}b": False, "(?:(?=a*b)|a)*c": False, "(|||||a|a)*a": True}.items(),
)  # fmt: skip
def test_patterns_over_which_backtracking_takes_for_ever_are_matched_at_once(pattern, matches, tmp_path):
  name = "a" * 400
  write(tmp_path, {name: (2, 8, 7)}, alpha_pattern={pattern: 3.0}, lora_alpha=5.0)
  start = time.process_time()
  adapter = read(tmp_path)
  assert time.process_time() - start < 1
  assert adapter.modules[name].alpha == (3.0 if matches else 5.0)


QUANTIFIERS = ("*", "+", "?", "{2}", "{1,3}", "{,2}", "{1,}")


def random_pattern(random, depth):
  """A pattern of what files may have: classes, groups, greedy and lazy quantifiers, anchors, looks ahead and behind."""
  inner = lambda: random_pattern(random, depth - 1)
  kind = random.random()
  if depth == 0 or kind < 0.3:
    return random.choice(
      ["a", "b", r"\.", ".", r"\d", "[ab]", "[^a]", "[]a]", "1", r"\w", r"\b", r"\B", "^", "$", r"\x61b"]
    )
  if kind < 0.45:
    return inner() + inner()
  if kind < 0.6:
    return f"({random.choice(['', '?:', '?P<name>'])}{inner()}|{inner()})"
  if kind < 0.85:
    return f"(?:{inner()}){random.choice(QUANTIFIERS)}{random.choice(['', '?'])}"
  if kind < 0.95:
    return f"({random.choice(['?=', '?!'])}{inner()})"
  return f"({random.choice(['?<=', '?<!'])}{random.choice(['a', '[ab]1', 'ab'])})"


def test_random_patterns_match_what_python_matches():
  random, compared, matched = random_module.Random(0), 0, 0
  while compared < 20_000:
    applied = rf"(.*\.)?({random_pattern(random, 4)})$"
    try:
      expected = re.compile(applied)
    except re.error:
      continue
    pattern = _regex.compile_pattern(applied)
    for _ in range(5):
      text = "".join(random.choice("ab.1_") for _ in range(random.randint(0, 8)))
      found = pattern.matches(_regex.Name(text, _regex.Steps(10**6)))
      assert found == (expected.match(text) is not None), (applied, text)
      compared, matched = compared + 1, matched + found
  assert matched > 2000


@pytest.mark.parametrize(
  "pattern",
  [
    "head",
    "^head$",
    r"net\.head",
    "net.head",
    ".*head",
    ".*?head",
    r"net\..*\.?head",
    "(foo|head)",
    "(foo|he|ad)+",
    "he[a-d]+",
    "(?:net.)?head",
    r"\w+",
    r"(?!net)\w+\.head",
    r".*(?<!net)\.head",
    "foo)|(xhead",
  ],
)
def test_patterns_as_peft_has_them(pattern, tmp_path):
  names = ("head", "net.head", "foo", "a.b.head", "xhead", "head.x")
  write(tmp_path, dict.fromkeys(names, (2, 8, 7)), alpha_pattern={pattern: 3.0}, lora_alpha=5.0)
  for name, module in read(tmp_path).modules.items():
    assert module.alpha == (3.0 if re.match(rf"(.*\.)?({pattern})$", name) else 5.0), name


def test_patterns_by_the_thousand(tmp_path):
  """Ranks that were found module by module: a pattern for each name, as PEFT's EVA writes them."""
  names = [
    f"model.layers.{k}.{part}" for k in range(80) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
  ]
  write(tmp_path, dict.fromkeys(names, (2, 8, 7)), alpha_pattern={name: float(k + 1) for k, name in enumerate(names)})
  start = time.process_time()
  assert [module.alpha for module in read(tmp_path).modules.values()] == [
    float(names.index(name) + 1) for name in read(tmp_path).modules
  ]
  edit(tmp_path, alpha_pattern={f"(?:{name})+" * 40: 2.0 for name in names})
  with pytest.raises(peft.PeftError, match="characters of patterns"):
    read(tmp_path)
  edit(tmp_path, alpha_pattern={f"(?:.*{k})*x": 2.0 for k in range(2000)})
  with pytest.raises(peft.PeftError, match="2000 patterns for 240 modules: matching it could take too long"):
    read(tmp_path)
  assert time.process_time() - start < 10


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
      field = random.choice([*config, "lora_bias", "exclude_modules", "trainable_token_indices", "target_parameters"])
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
  random = random_module.Random(0)
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
        assert all(map(str, peft.check(tmp_path)))
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
