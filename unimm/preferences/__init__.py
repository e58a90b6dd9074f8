"""Collecting preferences: candidates are drawn, and a scorer or a person says which are better.

What learns from pairs is the task `dpo` (`unimm.training.preferences`); what learns from scores themselves, while it
draws, is the task `grpo` (`unimm.preferences.grpo`).
"""
