"""LoRA adapters as outputs: what a fine-tune changed, written so that PEFT can put it on the base again."""
