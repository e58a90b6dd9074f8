"""Batch jobs: every item of a source is captioned, answered or drawn, once, whatever happens on the way."""
