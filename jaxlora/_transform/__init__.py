"""`wrap`: programs on adapted weights."""
