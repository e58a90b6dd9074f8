"""Collecting preferences: candidates are drawn, and a scorer or a person says which are better.

What learns from pairs is the task `dpo` (`unimm.preferences`); what learns from scores of what it draws
meanwhile (`unimm.preferences.online`) are the tasks `grpo` and `online_dpo`.
"""
