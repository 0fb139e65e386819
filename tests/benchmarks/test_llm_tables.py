"""Tables of the language model's runs, from made-up results: intervals, pairing, aspects, forgetting and samples."""

import numpy as np
import pytest

from tests.helpers import tiny_llm

tiny_llm.need_packages()

ASPECTS = ["challenge", "approach", "outcome"] * 20


@pytest.fixture(scope="module")
def llm():
  with tiny_llm.modules() as found:
    yield found


def result(label, seed, shift, method="lora", rate=1e-3, **more):
  """A run whose ROUGE-L is that of the papers, shifted."""
  generator = np.random.default_rng(0)
  values = generator.normal(30, 8, len(ASPECTS)) + shift + 0.1 * seed
  found = {
    "label": label, "settings": {"split": "test", "method": {"name": method}},
    "loss": 3 - shift / 10, "rougeL": values.mean(),
    "each": {name: values.tolist() for name in ("rouge1", "rouge2", "rougeL")}, "aspects": ASPECTS,
    "written": [f"{label} {k}" for k in range(len(ASPECTS))],
  }  # fmt: skip
  if method != "base":
    found["settings"]["schedule"] = {"rate": rate, "seed": seed}
    found["training"] = {"seconds": [1.0]}
  return found | {"rouge1": found["rougeL"], "rouge2": found["rougeL"]} | more


def test_an_interval_is_that_of_paired_papers(llm):
  """A shift that is the same everywhere has no width, however the papers differ; noise has the width of theory."""
  runs = [result("a", seed, 2.0) for seed in range(3)]
  others = [result("b", seed, 0.0) for seed in range(3)]
  sums = [llm.bootstrap.sums_of(group, "rougeL") for group in (runs, others)]
  assert sums[0].values.shape == (3, 20)
  np.testing.assert_allclose(llm.bootstrap.difference(*sums, draws=200), [2.0, 2.0, 2.0], rtol=1e-9)
  noise = np.random.default_rng(1).normal(0, 3, (1, 400))
  ones = np.ones_like(noise)
  found = llm.bootstrap.difference(llm.bootstrap.Sums(noise, ones), llm.bootstrap.Sums(0 * noise, ones), draws=4000)
  assert found.mean == pytest.approx(noise.mean())
  half = 1.96 * noise.std() / 400**0.5
  np.testing.assert_allclose([found.mean - found.low, found.high - found.mean], half, rtol=0.1)


def test_a_loss_is_weighted_by_its_tokens(llm):
  counts = np.tile([1.0, 2.0, 3.0], 20)
  of = lambda loss: {"loss_sums": (loss * counts).tolist(), "loss_counts": counts.tolist()}
  sums = [llm.bootstrap.sums_of([result("a", 0, 0, **of(loss))], "loss") for loss in (2.5, 2.0)]
  np.testing.assert_allclose(llm.bootstrap.difference(*sums, draws=100), [0.5, 0.5, 0.5])
  assert llm.bootstrap.sums_of([result("a", 0, 0)], "loss") is None  # results of before it was kept


def groups(llm, *results):
  return llm.comparisons.by_seed(results, "test")


def test_runs_are_compared_with_those_of_the_same_seeds(llm):
  """Of two rates the one with more seeds; seeds that the other lacks are left out; the base is the same for all."""
  found = groups(
    llm, result("base, instructed", 0, -5, "base"), *(result("LoRA r=8", seed, 0) for seed in (0, 1, 2)),
    result("LoRA r=8", 0, 90, rate=1e-2),
    result("full fine-tuning", 1, 2, "full"), result("full fine-tuning", 7, 50, "full"),
  )  # fmt: skip
  assert sorted(found["LoRA r=8"]) == [0, 1, 2]
  _, table = llm.comparisons.differences(found)
  rows = {row[0]: row[1:] for row in table}
  assert rows["full fine-tuning"][:2] == ["1", "+2.0 (+2.0 to +2.0)"]
  assert rows["base, instructed"][:2] == ["3", "-5.1 (-5.2 to -5.0)"]
  assert "LoRA r=8" not in rows


def test_other_pairs_are_not_compared(llm):
  short = result("full fine-tuning", 0, 2, "full") | {"aspects": ASPECTS[:30]}
  assert llm.comparisons.differences(groups(llm, result("LoRA r=8", 0, 0), short))[1] == []


def test_tables_are_made_of_what_is_recorded(llm):
  """What is written down has the figures of all pairs, not their text; its tables are those of the runs."""
  runs = [
    result(label, seed, gain, **{"written": ["text"]})
    for label, gain in (("LoRA r=8", 0), ("LoRA r=8, nf4 base", 2), ("LoRA r=64", 3), ("LoRA r=64, rslora", 4))
    for seed in (0, 1)
  ]
  chosen = result("LoRA r=8", 100, 0, rate=3e-3)
  chosen["settings"]["split"] = "val"
  runs += [result("first sentence", 0, -5, "base"), chosen]
  told = {
    "hardware": {"cpu": "any", "cores": 2, "backend": "cpu"},
    "versions": {"jax": "1", "flax": "2", "python": "3"},
  }
  kept = llm.recorded.compact([run | told for run in runs])
  assert "text" not in str(kept)
  assert kept["runs"][0]["each"] == runs[0]["each"]
  text = llm.recorded.quantised(kept)
  assert "| LoRA r=8, nf4 base | 2 | +2.0 (+2.0 to +2.0) |" in text
  assert text.count("| LoRA r=8 |") == text.count("| first sentence |") == 1
  assert "r=64" not in text
  text = llm.recorded.scaling(kept)
  assert ("| less LoRA r=64 |" in text, "| LoRA r=64, rslora | 2 | +1.0 (+1.0 to +1.0) |" in text) == (True, True)
  assert "nf4" not in text
  text = llm.recorded.rates(kept)
  assert ("| LoRA r=8 | val | 0.003 |" in text, "r=64" in text) == (True, False)


def test_the_methods_are_told_with_the_base_and_the_machines(llm):
  told = lambda cpu: {
    "hardware": {"cpu": cpu, "cores": 2, "backend": "cpu"},
    "versions": {"jax": "1", "flax": "2", "python": "3"},
  }
  base = result("base, instructed", 0, -3, "base", **told("one"))
  base["settings"]["schedule"] = {"rate": 1.0, "seed": 0}
  others = [result(label, 0, gain, **told("two")) for label, gain in (("LoRA r=8", 0), ("full fine-tuning", 1))]
  text = llm.recorded.methods(llm.recorded.compact([*others, base, result("first sentence", 0, -9, "base")]))
  first, rest = text.split("\n", 1)
  assert ("(one)" in first, "(two)" in first) == (True, True)
  rows = [line.split(" | ")[0] for line in rest.splitlines() if line.startswith("| ")]
  assert [row[2:] for row in rows[1:5]] == ["first sentence", "base, instructed", "LoRA r=8", "full fine-tuning"]
  assert "| full fine-tuning | 1 | +1.0 (+1.0 to +1.0) |" in rest
  assert "| base, instructed | 1 | -3.0 (-3.0 to -3.0) |" in rest


def test_recorded_runs_are_joined_by_later_ones(llm, tmp_path):
  known = [result("LoRA r=8", seed, 0) for seed in (0, 1)]
  again = result("LoRA r=8", 1, 5)
  other = result("full fine-tuning", 0, 2)
  joined = llm.recorded.merged(known, [again, other])
  assert joined == [known[0], again, other]
  assert llm.recorded.read(tmp_path / "none.json") == []


def test_forgetting_is_told_of_the_same_text_alone(llm):
  text = lambda loss, digest="a": {"plain_text": {"loss": loss, "digest": digest}}
  base = result("base, instructed", 0, 0, "base", **text(2.0))
  lora = [result("LoRA r=8", seed, 0, **text(2.0 + np.log(2))) for seed in (0, 1)]
  table = llm.comparisons.forgetting(
    groups(llm, base, *lora, result("other", 0, 0, **text(2.0, "b")), result("old", 0, 0))
  )
  rows = [line.split() for line in table.splitlines()[2:]]
  assert [row[-1] for row in rows] == ["1.000", "0.000"]
  assert "14.78 ± 0.00  2.000 ± 0.000" in table
  assert ("other" in table, "old" in table) == (False, False)
  assert llm.comparisons.forgetting(groups(llm, *lora)) == ""  # without the base there is nothing to be over


def test_samples_are_chosen_by_their_place_among_the_differences(llm):
  a, b = result("A", 0, 0), result("B", 0, 0)
  order = np.random.default_rng(2).permutation(len(ASPECTS))
  a["each"] = {"rougeL": (np.array(b["each"]["rougeL"]) + order).tolist()}
  pairs = [{"paper": f"paper{k}", "aspect": aspect, "summary": f"person {k}"} for k, aspect in enumerate(ASPECTS)]
  text = llm.comparisons.samples(groups(llm, a, b), pairs, "A", "B")
  for name, place in (("lowest (5%)", 3), ("median (50%)", 30), ("highest (95%)", 56)):
    k = int(np.flatnonzero(order == place)[0])
    assert f"{name}: +{place}.0, paper{k}, {ASPECTS[k]}\n  by a person: person {k}\n  A: A {k}\n  B: B {k}" in text
  assert llm.comparisons.samples(groups(llm, a, b), pairs[:3], "A", "B") == ""  # of other pairs
  assert llm.comparisons.samples(groups(llm, a), pairs, "A", "B") == ""


def test_aspects_and_the_plot(llm, tmp_path):
  found = groups(llm, result("LoRA r=8", 0, 0), result("first sentence", 0, 0, "base", loss=None))
  table = llm.comparisons.aspects(found)
  means = [np.mean(found["LoRA r=8"][0]["each"]["rougeL"][k::3]) for k in range(3)]
  assert table.splitlines()[2].split()[-3:] == [f"{mean:.1f}" for mean in means]
  llm.plots.plot(found, tmp_path / "new" / "plot.png")
  assert (tmp_path / "new" / "plot.png").stat().st_size > 5000
