"""Preference alignment: pairs of answers, in words or drawings, of which one is better; their losses and task."""
