"""Studies: the same training over variants and seeds, and what can be said of the difference."""
