"""Tables of the values that codes stand for."""

import numpy as np

# Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314), appendix E: as likely each for
# weights that are normally distributed, and zero among them.
NF4 = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833334,
  -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


# bitsandbytes' floats of 4 bits, over their largest: a sign, 2 bits of exponent, 1 of fraction.
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4 = (*_FP4, *(-value for value in _FP4))

# OCP's Microscaling Formats (MX), version 1.0: the same bits, E2M1.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_E2M1, *(-value for value in _E2M1))


def _dynamic_map() -> tuple[float, ...]:
  """A sign, an exponent of as many zeros as it says, and a fraction of the bits that are left."""
  exponents = 7
  values = [np.float32(0), np.float32(1)]
  for i in range(exponents):
    edges = _evenly(np.float32(0.1), np.float32(1), 2**i + 1)
    means = (edges[:-1] + edges[1:]) / np.float32(2)
    values += [np.float32(sign * 10.0 ** (i + 1 - exponents)) * mean for sign in (1, -1) for mean in means]
  return tuple(sorted(map(float, values)))


def _evenly(first: np.float32, last: np.float32, count: int) -> np.ndarray:
  """Numbers at equal distances, rounded once and from both ends, as torch makes them."""
  step, k = np.float64((last - first) / np.float32(count - 1)), np.arange(count)
  values = np.where(k < count // 2, first + step * k, last - step * (count - 1 - k))
  return values.astype(np.float32)


# Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (arXiv:1511.04561): bitsandbytes' signed map.
DYNAMIC8 = _dynamic_map()
