"""Hugging Face causal LMs: learnt from their config, sharded by ZeRO-3, filled from safetensors, with our attention."""
