"""Helps tests with real processes and real runs; it ships with the package."""
