"""Sampling: guidance, filters, and the samplers of text and of images."""
