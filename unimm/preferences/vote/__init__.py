"""Votes on drawings, and the page where they are cast."""
