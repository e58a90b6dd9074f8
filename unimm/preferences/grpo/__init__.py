"""GRPO: a model draws, a scorer gives each drawing a reward, and what beat its group becomes likelier."""
