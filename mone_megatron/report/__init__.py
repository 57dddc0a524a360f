"""Draws what a run shows to people: its page and pictures, and runs side by side."""
