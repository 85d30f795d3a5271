"""Mixtures: dense models as the experts of a stock MoE, and LoRA adapters behind a router on one base.

A recipe with `experts` is planned as its base alone, with all that a recipe can change about tokens; then
`assembling` puts experts and routers in the place of the base's layers. What comes of it is a plan as any.

stock      models of transformers: which becomes which, and their experts added and dropped
lora       adapters as they are, in a checkpoint with a modelling file of its own; added and dropped
xlora      adapters in PEFT's own format
routers    rows of routers before any training; which tensors they are, and where they send texts
training   routers that learn
checks     whether what was written loads, and which code of it may run
"""
