"""Continual pre-training with task-aware layer-wise distillation (TED) on DeepSpeed ZeRO-3.

teacher    the big frozen model; student: the smaller one that is trained beside it
pair       (student block, teacher block), counted from 0; a block's state is its output, before the final norm
filter     a linear map (maybe behind an MLP) of a state into the common width, learnt on the next token in stage I
lift       a map from that width back to what a head reads, of stage I alone; both filters of a pair share it
signal     what the teacher says about one micro-batch: the matched blocks' states and its head's input
head       everything a model applies after its last block: norm, projection, bias, scale, soft-cap
step       one optimizer step; micro-step: one forward and backward of one micro-batch on every rank
tokens     are counted over all ranks; positions of samples too

A tensor's name ends in its shape: B batch, T sequence, N = B·T tokens, D student width, E teacher width, F common
width, V vocabulary. `_s` is the student's, `_t` the teacher's.
"""

import logging

__version__ = "0.1.0"

# transformers imports torchao if it is installed. On a CPU, torchao then warns about CUDA libraries, and torch about
# torchao's style.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
# The log says on which device a run is.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: not record.getMessage().startswith("Setting accelerator to CPU")
)
