"""Helps tests, and ships with the package: real processes, real runs."""
