"""Mixtures of adapters in the format that PEFT loads."""
