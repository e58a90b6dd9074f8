"""What a model reads of synthetic tables, measured."""
