"""Checkpoints: formats, conversion, LoRA and surgery."""
