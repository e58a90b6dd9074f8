"""Collecting preferences: candidates are drawn, and a scorer or a person says which are better.

What learns from them is the task `dpo` (`unimm.training.preferences`).
"""
