"""Sweeps on Ray. No other package of raysweep imports ray."""
