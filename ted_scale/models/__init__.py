"""Hugging Face causal LMs: inspected from their config, sharded by ZeRO-3, loaded from safetensors, with our attention."""

import logging

# transformers imports torchao where it is installed: on a CPU that warns of libraries for CUDA, and torch of torchao's style.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
