"""The only place that names a backend."""
