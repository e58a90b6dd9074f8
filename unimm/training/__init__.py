"""Training: typed recipes, the task protocol, and the one trainer that runs every stage on DeepSpeed.

Import the parts from their modules (`unimm.training.recipe`, `.task`, `.trainer`); this file imports nothing,
so that reading a recipe does not load torch.
"""
