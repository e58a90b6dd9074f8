"""Published architectures: one module for each family, with its key maps and configs, both ways."""
