"""Evaluation of models under attack."""
