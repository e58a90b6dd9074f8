"""Words and images to model inputs, and back."""
