"""Functions of several operations that are compiled as one."""

import functools

import jax

# Called with arrays, a function is a single program for each shape, and not a chain of small ones that are compiled one
# by one; inside of a trace its operations stand as if it had been written there. Takes the arguments of `jax.jit`.
one_program = functools.partial(jax.jit, inline=True)
