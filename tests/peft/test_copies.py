"""Copies of the base in a PEFT folder, in another dtype than the base's; what a narrow base loses of saved modules."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora import _cli, peft
from jaxlora._base.rounding import same_but_for_rounding
from tests.helpers import array
from tests.peft.test_tied import EMBEDDING, OWN, TABLE, write

# Many of Llama's embeddings are small: half precision keeps few of their digits, or none.
SMALL = np.asarray(TABLE) * np.float32(10) ** (-7 * np.random.default_rng(0).random(TABLE.shape, np.float32))
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
ADAPTED = {"target_modules": ["q_proj", "embed_tokens"]}


def tree_of(table):
  return {**OWN, "model": {**OWN["model"], "embed_tokens": {"embedding": jnp.asarray(table)}}}


@pytest.mark.parametrize("trained", DTYPES)
@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize("key", ["embed_tokens.base_layer.weight", "embed_tokens.weight"])
def test_a_copy_of_the_base_in_another_dtype_is_the_base(tmp_path, trained, held, key):
  adapted = "base_layer" in key
  table, factors = SMALL.astype(jnp.bfloat16), EMBEDDING if adapted else {}
  config = ADAPTED if adapted else {}
  write(tmp_path / "p", {**factors, f"model.{key}": table.astype(trained)}, **config)
  tree = peft.load(tmp_path / "p", tree_of(table.astype(held)))
  node = tree["model"]["embed_tokens"]["embedding"]
  assert isinstance(node, jaxlora.LoraWeight) == adapted
  assert not isinstance(node, jaxlora.FullWeight)
  np.testing.assert_array_equal(node.base if adapted else node, table.astype(held))
  changed = table.astype(np.float32)
  changed[0, 0] += 1
  write(tmp_path / "q", {**factors, f"model.{key}": changed.astype(trained)}, **config)
  if adapted:
    with pytest.raises(peft.PeftError, match="it is not this one: other values"):
      peft.load(tmp_path / "q", tree_of(table.astype(held)))
    peft.load(tmp_path / "q", tree_of(changed.astype(trained)))  # the remedy
  else:
    assert isinstance(
      peft.load(tmp_path / "q", tree_of(table.astype(held)))["model"]["embed_tokens"]["embedding"], jaxlora.FullWeight
    )


def test_two_16_bit_copies_of_a_float32_original_are_the_same():
  assert same_but_for_rounding(SMALL.astype(np.float16), SMALL.astype(jnp.bfloat16))
  assert not same_but_for_rounding((SMALL * 1.02).astype(np.float16), SMALL.astype(jnp.bfloat16))
  assert not same_but_for_rounding(np.nextafter(SMALL, 1), SMALL)
  assert not same_but_for_rounding(SMALL[1:], SMALL)


def test_merge_leaves_copies_of_the_base_alone_and_refuses_another_base(tmp_path, capsys):
  base = {"model.embed_tokens.weight": SMALL, "model.layers.0.q_proj.weight": np.ones((4, 6), np.float32)}
  save_file({**base, "lm_head.weight": np.asarray(TABLE)}, tmp_path / "base.safetensors")
  write(tmp_path / "p", {"model.embed_tokens.weight": SMALL.astype(np.float16)})
  arguments = ["merge", str(tmp_path / "base.safetensors"), str(tmp_path / "p"), str(tmp_path / "out.safetensors")]
  assert _cli.main(arguments) == 0
  np.testing.assert_array_equal(load_file(tmp_path / "out.safetensors")["model.embed_tokens.weight"], SMALL)
  write(tmp_path / "p", {**EMBEDDING, "model.embed_tokens.base_layer.weight": SMALL + 1}, **ADAPTED)
  assert _cli.main(arguments) == 1
  assert "holds the weight that it was trained on" in capsys.readouterr().err


def test_saved_modules_that_a_narrow_base_rounds_away_are_told(tmp_path):
  head = np.asarray(OWN["lm_head"]["kernel"]).astype(jnp.bfloat16)
  trained = head.astype(np.float32) + 1e-3 * np.asarray(array(7, head.shape, jnp.float32))
  write(tmp_path / "p", {"lm_head.weight": trained.T}, modules_to_save=["lm_head"])
  tree = {**OWN, "lm_head": {"kernel": jnp.asarray(head)}}
  with pytest.warns(jaxlora.RoundingWarning, match=r"trained in lm_head/kernel \(\d+%\). Load onto parameters"):
    value = peft.load(tmp_path / "p", tree)["lm_head"]["kernel"].value
  assert value.dtype == jnp.bfloat16
  wide = {**OWN, "lm_head": {"kernel": jnp.asarray(head, jnp.float32)}}  # the remedy
  np.testing.assert_array_equal(peft.load(tmp_path / "p", wide)["lm_head"]["kernel"].value, trained)


def test_merged_tells_what_a_dtype_rounds_away():
  name = "model.layers.0.q_proj"
  a, b = (np.asarray(array(k, shape, jnp.float32)) for k, shape in ((1, (2, 16)), (2, (8, 2))))
  base = np.asarray(array(3, (8, 16), jnp.float32))
  for alpha, small in ((2e-4, True), (2.0, False)):
    adapter = peft.Adapter({name: peft.Module(name, "linear", a, b, alpha)}, whole={}, bases={}, config={})
    narrow = base.astype(jnp.bfloat16)
    if small:
      with pytest.warns(jaxlora.RoundingWarning, match=rf"merged: rounding to bfloat16 .* in {name}.weight \(\d+%\)"):
        got = adapter.merged(f"{name}.weight", narrow)
    else:
      got = adapter.merged(f"{name}.weight", narrow)
    assert got.dtype == jnp.bfloat16
    kept = adapter.merged(f"{name}.weight", narrow, dtype=np.float32)  # the remedy
    exact = narrow.astype(np.float64) + alpha / 2 * (b.astype(np.float64) @ a)
    assert np.linalg.norm(kept - exact) < 1e-2 * np.linalg.norm(exact - narrow.astype(np.float64))
    assert adapter.merged("model.norm.weight", narrow) is narrow
