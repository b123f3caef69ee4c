"""What the fork server of the loader's workers imports once for all of them: it would take each of them seconds."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no worker has business on a GPU

from ted_scale.corpora.megatron import megatron_indexed
from ted_scale.data import loader  # noqa: F401

megatron_indexed()
