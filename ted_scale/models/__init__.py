"""Hugging Face causal LMs: inspected from their config, sharded by ZeRO-3, loaded from safetensors, with our attention."""
