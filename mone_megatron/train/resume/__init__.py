"""Saving a run's state and taking it up again."""
