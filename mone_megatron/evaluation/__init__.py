"""Evaluates models in the format of transformers: tasks, perplexity, text generation."""
