"""Silent degradation is fatal here: warnings are errors, promotion is strict, and there are eight CPU devices."""

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import os

# Thousands of small programs are compiled once and run once: the machine code need not be good.
_FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
_FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]  # small programs: what is compiled in parts is compiled in 32
if importlib.metadata.version("jaxlib").startswith(
  "0.10."
):  # where it is a choice, the older emitters take half the time
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What the third-party model libraries look at when imported.
os.environ.update(USE_TF="0", USE_JAX="1", HF_HUB_OFFLINE="1")
os.environ.setdefault("USE_TORCH", "0")  # USE_TORCH=1 is for the tests that compare with torch, run by themselves

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from jaxlora._jax import trace_cache  # noqa: E402
from jaxlora._platform import policy  # noqa: E402
from tests.helpers import DEVICES, on_devices, profiles  # noqa: E402
from tests.helpers.forks import Forks  # noqa: E402

# Thousands of programs are lowered, too: where in Python an operation was written takes a twelfth of that time to tell.
jax.config.update("jax_traceback_in_locations_limit", 0)
# Nothing compiled is looked for in a cache on disk: there is none, and its keys are made of whole programs.
jax.config.update("jax_enable_compilation_cache", False)
# JAX's caches grow to a million objects that live on, and a full collection looks at all of them.
gc.set_threshold(*gc.get_threshold()[:2], 200)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_COMMON = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck), "print_blob": True}
hypothesis.settings.register_profile("ci", max_examples=50, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("nightly", max_examples=5000, **_COMMON)

# What a script leaves when it has run once; an example; libtpu, which lets one process in at a time.
ON_ONE_WORKER = ("benchmarks/", "serving/test_decode.py", "_platform/test_compilers.py")


def pytest_addoption(parser):
  parser.addoption(
    "--nightly", action="store_true", help="full products of builders and wrappers, and thousands of random programs"
  )


def pytest_configure(config):
  if config.getoption("--nightly"):
    os.environ[profiles.VARIABLE] = "nightly"  # for the modules of tests, and for xdist's workers
  by_default = "nightly" if profiles.is_nightly() else "ci"
  hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", by_default))


def pytest_report_header():
  if profiles.is_nightly():
    return "profile: nightly"
  return "profile: default; full products and larger counts are left out (--nightly or JAXLORA_TESTS=nightly runs them)"


def pytest_collection_modifyitems(config, items):
  if profiles.is_nightly():
    return
  left_out = [item for item in items if item.get_closest_marker("nightly")]
  items[:] = [item for item in items if not item.get_closest_marker("nightly")]
  config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Tests of the files that share something costly go to one worker; all others are dealt out one by one."""
  if config.getvalue("dist") != "load":
    return None
  from xdist.scheduler.loadscope import LoadScopeScheduling

  class Scheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid):
      file = nodeid.split("::")[0]
      return file if file.removeprefix("tests/").startswith(ON_ONE_WORKER) else nodeid

  return Scheduling(config, log)


@pytest.fixture
def x64():
  """Double precision, for comparisons at 1e-12."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(autouse=True)
def many_tokens(monkeypatch):
  """The few tokens of tests count as many: TPUs' products of few tokens are those of other platforms."""
  for name in ("cpu", "tpu"):
    few = dataclasses.replace(policy.PLATFORMS[name], few_tokens=0)
    monkeypatch.setitem(policy.PLATFORMS, name, few)


@pytest.fixture
def lenient():
  """JAX's default promotion, for code that is not ours."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture(params=DEVICES)
def devices(request):
  """The two ways of waiting for a cotangent: a function that places arguments on one device, or on two."""
  return functools.partial(on_devices, 1 if request.param == "one device" else 2)


@pytest.fixture
def fresh_traces():
  """Nothing traced before is used, and nothing traced here afterwards: for tests that take something of JAX away."""
  trace_cache._once.cache_clear()
  yield
  trace_cache._once.cache_clear()


@pytest.fixture(scope="session")
def forks():
  """Processes that have imported everything."""
  with contextlib.closing(Forks()) as started:
    yield started
