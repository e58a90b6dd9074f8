"""Online DPO: a model draws, a scorer ranks, and DPO learns from the best and the worst of each prompt."""
