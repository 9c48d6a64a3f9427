"""Sampling: fill a canvas of masks step by step."""
