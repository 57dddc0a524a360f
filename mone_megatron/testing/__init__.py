"""Helpers for tests that ship with the package: real processes, real runs."""
