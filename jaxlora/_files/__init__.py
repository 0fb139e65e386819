"""How quantised weights lie in models' files."""
