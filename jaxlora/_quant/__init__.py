"""Arrays that are codes and scales."""
