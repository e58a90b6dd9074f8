"""What a model is: its configuration, its parts, and how they compute."""
