"""Collecting preferences: candidates are drawn, scored, and the best and worst of each prompt become a pair.

What learns from them is the task `dpo` (`unimm.training.preferences`).
"""
