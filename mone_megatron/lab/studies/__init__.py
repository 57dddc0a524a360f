"""Studies train the same over variants and seeds, and say what can be said of the difference."""
