"""Tokenized text on disk and in object storage: written, checked, opened. Megatron's .bin/.idx and what stands beside them."""
