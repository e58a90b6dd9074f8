"""Learning from drawings that the model makes while it learns: what the tasks `grpo` and `online_dpo` share."""
