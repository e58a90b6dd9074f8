"""Image tokenizers: the model, its training losses and task, and its evaluation."""
