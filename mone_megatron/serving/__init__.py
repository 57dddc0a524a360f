"""Serving exports: which engine is there, and how its server is started."""
