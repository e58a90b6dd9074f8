"""What a stage can train; `unimm.training.recipe.TASKS` lists them."""
