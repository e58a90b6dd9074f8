"""Training an image tokenizer."""
