"""The only place with names that JAX does not promise."""
