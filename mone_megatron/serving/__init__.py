"""Serves exports: finds the engine that is there, and starts its server."""
