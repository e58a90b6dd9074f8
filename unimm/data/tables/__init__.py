"""Synthetic tables: real fonts, words and numbers, drawn as images with their Markdown or LaTeX and questions."""
