"""What the processes of a run do in `test_hosts.py`: each of these is run by all of them, on real `jax.distributed`."""

import hashlib
import os
from pathlib import Path
import signal
import time

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

import jaxlora
from jaxlora import checkpoint, hub, peft
from jaxlora._base.processes import spans_processes
from jaxlora.checkpoint import _processes

SPECS = {"up": P("data", "model"), "down": P("model", "data"), "bias": P()}
CONFIG = jaxlora.LoraConfig(rank=32, targets="up|down", train="bias", variant="dora")
TX = optax.adam(1e-2)


def start(process, count, devices, port):
  """Joins the run."""
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_enable_compilation_cache", False)
  if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, process)


def mesh_of(data, model):
  return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def params_on(mesh):
  """The base: every process makes its own shards."""
  rng = np.random.default_rng(0)
  held = {"up": rng.standard_normal((64, 128)) / 8, "down": rng.standard_normal((128, 64)) / 8, "bias": np.zeros(64)}

  def placed(name):
    array = held[name].astype(np.float32)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, SPECS[name]), lambda index: array[index])

  return {name: placed(name) for name in held}


def batch_on(mesh, step):
  rows = np.random.default_rng(step).standard_normal((4, 64)).astype(np.float32)
  return jax.make_array_from_callback(rows.shape, NamedSharding(mesh, P("data")), lambda index: rows[index])


def fn(p, x):
  return x + jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"]


@jax.jit
def training_step(frozen, trainable, state, x):
  loss = lambda half: jnp.mean(jaxlora.wrap(fn)(jaxlora.join(frozen, half), x) ** 2)
  updates, state = TX.update(jax.grad(loss)(trainable), state, trainable)
  return optax.apply_updates(trainable, updates), state


def digest(tree):
  """A digest of all bits of a tree, which every process takes part in."""
  whole = [multihost(leaf) for leaf in jax.tree.leaves(tree)]
  return hashlib.sha256(b"".join(leaf.tobytes() for leaf in whole)).hexdigest()


def multihost(leaf):
  return np.asarray(multihost_utils.process_allgather(leaf, tiled=True) if spans_processes(leaf) else leaf)


def template(tree):
  return jaxlora.sharding.follow(TX.init(jaxlora.split(tree)[1]), tree)


def train(say, path, data, model, last, dies=None):
  """Trains up to a step, from the latest checkpoint on, and saves every step; one process may die on the way."""
  mesh = mesh_of(data, model)
  params = params_on(mesh)
  with checkpoint.Manager(path, max_to_keep=None) as manager:
    if manager.latest_step() is None:
      tree, first = jaxlora.adapt(params, CONFIG, jax.random.key(0)), 0
      state = template(tree)
    else:
      found = manager.restore(params, template)
      tree, state, first = found.tree, found.opt_state, found.step
    say("from", first)
    frozen, trainable = jaxlora.split(tree)
    for step in range(first + 1, last + 1):
      trainable, state = training_step(frozen, trainable, state, batch_on(mesh, step))
      manager.save(step, jaxlora.join(frozen, trainable), state, data={"step": step}, key=jax.random.key(step))
      if step == dies and jax.process_index() == jax.process_count() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
  say("digest", digest((trainable, state)))
  part = trainable["up"].a.addressable_shards[0].data
  say("shard", list(part.shape))


def restore(say, path, data, model):
  """Restores the latest step, on whatever mesh this is."""
  mesh = mesh_of(data, model)
  with checkpoint.Manager(path) as manager:
    found = manager.restore(params_on(mesh), template)
  _, trainable = jaxlora.split(found.tree)
  say("digest", digest((trainable, found.opt_state)))
  lies = found.tree["up"].a.sharding
  say("specs", lies.spec[1], lies.mesh.shape["data"])
  say("same", digest(jaxlora.split(checkpoint.load(path, params_on(mesh)))[1]) == digest(trainable))


def alone(say, path):
  """What one process may not do alone, what it may, and the remedy."""
  _processes.PATIENCE = 1.0
  mesh = mesh_of(2, 1)
  params = params_on(mesh)
  tree = jaxlora.adapt(params, CONFIG, jax.random.key(0))
  if jax.process_index() == 0:
    errors = []
    for call in (
      lambda: checkpoint.save(path, tree),
      lambda: checkpoint.Manager(path),
      lambda: checkpoint.save(path, tree),
    ):
      try:
        call()
      except checkpoint.CheckpointError as error:
        errors.append(str(error))
    say("errors", *errors)
    Path(path + ".told").touch()
  while not Path(path + ".told").exists():
    time.sleep(0.1)
  _processes.PATIENCE = 60.0
  checkpoint.save(path, tree)  # the remedy: all call it
  if jax.process_index() == 0:
    say("contents", sorted(checkpoint.contents(path).leaves))
  try:
    jaxlora.adapt(params, CONFIG, jax.random.key(jax.process_index()))
  except ValueError as error:
    say("keys", str(error))
  key = multihost_utils.broadcast_one_to_all(jax.random.key_data(jax.random.key(jax.process_index())))
  say("digest", digest(jaxlora.adapt(params, CONFIG, key)))


def folders(say, path):
  """Files of whole arrays, of a tree whose shards several processes hold: what each is told, and the remedy."""
  params = {name: leaf for name, leaf in params_on(mesh_of(2, 1)).items() if name != "bias"}
  axes = dict.fromkeys(params, "io")
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, axes=axes), jax.random.key(0))
  for name, call in (("peft", lambda: peft.save(path, tree)), ("hub", lambda: hub.save(path, params))):
    try:
      call()
    except ValueError as error:
      say(name, str(error))
  bank = jaxlora.stack({"one": tree}, capacity=2).put("two", tree)
  say("bank", list(bank.factors["up"].a.addressable_shards[0].data.shape))
  whole = multihost_utils.process_allgather(tree, tiled=True)
  base, own = jaxlora.strip(whole), f"{path}-{jax.process_index()}"
  peft.save(own, whole)
  hub.save(own + "-base", base, axes=axes)
  loaded = peft.load(own, hub.load(own + "-base", base, axes=axes), axes=axes)
  say("digest", digest(loaded) == digest(whole))


JOBS = {job.__name__: job for job in (train, restore, alone, folders)}
