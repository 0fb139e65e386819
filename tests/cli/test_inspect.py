"""`jaxlora inspect`: what it shows of either format, and what it takes for a large adapter."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora import _cli, checkpoint, peft
from jaxlora._cli.norms import delta_norm, measured, measured_flat, tensor_norm
from tests.cli.files import HEAD, PARAMS, llama_adapter
from tests.helpers import adapted, array


@pytest.mark.parametrize("kind", ["checkpoint", "peft"])
def test_inspect_shows_either_format(run, capsys, folders, tree, kind):
  report = run("inspect", folders / kind)
  assert report["format"] == {"checkpoint": "jaxlora", "peft": "peft"}[kind]
  rows = {leaf["path"].replace("/", "_").replace(".", "_"): leaf for leaf in report["leaves"]}
  (row,) = [leaf for name, leaf in rows.items() if "layers_1" in name]
  node = tree["layers_1"]["q_proj"]["kernel"]
  assert (row["rank"], row["alpha"], row["scale"], row["dtype"], row["nan"]) == (1, 0.5, 0.5, "float32", 0)
  np.testing.assert_allclose(row["norm"], np.linalg.norm(node.delta()), rtol=1e-5)
  np.testing.assert_allclose(row["a_norm"], np.linalg.norm(node.a), rtol=1e-5)
  np.testing.assert_allclose(row["b_norm"], np.linalg.norm(node.b), rtol=1e-5)
  assert report["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(jaxlora.split(tree)[1]))
  assert report["bytes"] == 4 * report["parameters"]
  assert _cli.main(["inspect", str(folders / kind)]) == 0
  text = capsys.readouterr().out
  assert "q_proj" in text
  assert f"{report['parameters']:,} parameters" in text
  if kind == "checkpoint":
    assert report["metadata"] == {"task": "summaries"}
    assert report["base"] == checkpoint.fingerprint(PARAMS)
    assert '"summaries"' in text


def test_inspect_of_stacked_roles_whole_leaves_and_nan(run, capsys, tmp_path):
  base = {"w": np.ones((3, 4, 5), np.float32), "b": np.ones(4, np.float32)}
  a, b = (np.asarray(array(k, (3, 2, n), jnp.float32)) for k, n in ((1, 4), (2, 5)))
  node = jaxlora.LoraWeight(base["w"], a, b, roles="sio", rank=2, alpha=3.0)
  whole = jaxlora.FullWeight(base["b"], np.array([3, 4, np.nan, 0], np.float32))
  with checkpoint.Manager(tmp_path / "run") as manager:
    manager.save(7, {"w": node, "b": whole}, {"m": a})
  report = run("inspect", tmp_path / "run", code=1)
  assert (report["step"], report["training"], report["nan"]) == (7, True, 1)
  rows = {leaf["path"]: leaf for leaf in report["leaves"]}
  np.testing.assert_allclose(rows["w"]["norm"], np.linalg.norm(node.delta()), rtol=1e-5)
  assert rows["b"]["kind"] == "whole"
  assert rows["b"]["norm"] is None
  assert _cli.main(["inspect", str(tmp_path / "run" / "7")]) == 1
  assert "NaN or infinite values in b" in capsys.readouterr().out


def test_inspect_shows_where_a_peft_folder_has_nan(run, tmp_path):
  params = {"head": {"kernel": array(1, (8, 7), jnp.float32), "bias": array(2, (7,), jnp.float32)}}
  peft.save(tmp_path, adapted(params, targets="head/kernel", train="head/bias"))
  path = tmp_path / "adapter_model.safetensors"
  tensors = load_file(path)
  tensors["base_model.model.head.lora_B.weight"][3] = [np.nan, np.inf]
  save_file(tensors, path)
  report = run("inspect", tmp_path, code=1)
  rows = {leaf["path"]: leaf for leaf in report["leaves"]}
  assert (report["nan"], rows["head"]["nan"], rows["head.bias"]["nan"]) == (2, 2, 0)
  assert (rows["head"]["norm"], rows["head"]["b_norm"]) == (None, None)
  assert rows["head"]["a_norm"] > 0


@pytest.mark.parametrize("fields", [{"variant": "loha"}, {"variant": "dora"}, {"init": "pissa"}], ids=str)
def test_inspect_of_other_variants(run, tmp_path, fields):
  tree = adapted({"w": array(1, (8, 7), jnp.float32)}, targets="w", alpha=3, **fields)
  checkpoint.save(tmp_path / "c", tree)
  (row,) = run("inspect", tmp_path / "c")["leaves"]
  np.testing.assert_allclose(row["norm"], np.linalg.norm(tree["w"].delta()), rtol=1e-5)
  held = [part for name, part in tree["w"].parts().items() if name != "base"]
  assert row["parameters"] == sum(part.size for part in held)
  assert row["nan"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("shape", [(1, 1, 70_000), (2, 3, 40_000), (1, 70_000, 2), (1, 2, 0)])
def test_norms_are_numpys_over_any_number_of_pieces(dtype, shape):
  real, imaginary = np.random.default_rng(0).standard_normal((2, *shape))
  values = (real + 1j * imaginary if dtype == "complex64" else real).astype(jnp.dtype(dtype))
  wide = values.astype(np.complex128 if dtype == "complex64" else np.float64)
  np.testing.assert_allclose(tensor_norm(measured_flat(values)), np.linalg.norm(wide.ravel()), rtol=1e-12)
  if shape[1] < 10:
    found = measured(values)
    np.testing.assert_allclose(tensor_norm(found), np.linalg.norm(wide.ravel()), rtol=1e-12)
    np.testing.assert_allclose(found.gram, (wide @ wide.conj().swapaxes(1, 2)).real, rtol=1e-9, atol=1e-9)


def test_the_norm_of_a_product_and_nan_in_pieces():
  a, b = (np.random.default_rng(k).standard_normal((2, 3, n)) for k, n in ((1, 50), (2, 40_000)))
  delta = np.einsum("sri,sro->sio", a, b)
  np.testing.assert_allclose(delta_norm(measured(a), measured(b), 0.5), np.linalg.norm(delta) / 2, rtol=1e-12)
  b[1, 2, [5, 39_999]] = np.nan, np.inf
  assert measured(b).nan == 2
  assert delta_norm(measured(a), measured(b), 0.5) is None


def test_inspect_of_an_8b_adapter_takes_the_memory_of_its_file(tmp_path, forks):
  """A delta of the head alone would be 2 GiB. Beside the file's own bytes there are only pieces, and the report."""
  llama_adapter(tmp_path / "small", 0, rank=1)
  _, size = llama_adapter(tmp_path / "large", 32)
  commands = [["inspect", str(tmp_path / name)] for name in ("small", "large")]
  said = [line for line in forks.run("command_lines", *commands) if line[0] == "code"]
  assert [code for _, code, _ in said] == [0, 0]
  before, after = (most for _, _, most in said)
  assert size > 80 << 20
  assert after - before < size + (12 << 20)


def test_inspect_of_an_8b_adapter_takes_little_time(run, tmp_path):
  modules, _ = llama_adapter(tmp_path / "large", 16)
  started = time.process_time()
  report = run("inspect", tmp_path / "large")
  taken = time.process_time() - started
  assert taken < modules / 100, f"{taken:.2f} s for {modules} modules"
  (head,) = [leaf for leaf in report["leaves"] if leaf["path"] == "output"]
  assert head["shape"] == [*reversed(HEAD["output"])]
