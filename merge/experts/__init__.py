"""Mixtures: dense models as the experts of a stock MoE, and LoRA adapters behind a router on one base.

A recipe with `experts` is planned as its base alone, with all that a recipe can change about tokens; then
`assembling` puts experts and routers in the place of the base's layers. What comes of it is a plan as any.
"""
