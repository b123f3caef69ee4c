"""lm-eval on the student as it stands in training. Prompts, requests, batches and metrics are lm-eval's own.

Every rank takes part in every call, and every rank gets all scores. Note: lm-eval's class for Hugging Face models expects a
model. It gets one without weights, from which it reads the length of texts only: the logits come from the engine.
"""

import functools
import logging
from pathlib import Path

import lm_eval.api.task
import torch
from lm_eval import evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM

from ted_scale.base.errors import Preempted
from ted_scale.config.method import Validation
from ted_scale.data.stream import Batch
from ted_scale.evaluation import greedy, turns
from ted_scale.evaluation.scores import Score, scores
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.inspection import empty_model, read_config
from ted_scale.ranks import agree, pulse

lm_eval.api.task.tqdm = functools.partial(lm_eval.api.task.tqdm, disable=True)  # a bar for each task, on every rank


class Live(HFLM):
    def __init__(self, student, anatomy: Anatomy, tokenizer: Path, rows: int):
        """`rows` is the number of texts in a forward of a rank."""
        with torch.device("meta"):
            stand_in = empty_model(read_config("student.path", anatomy.folder))
        super().__init__(pretrained=stand_in, tokenizer=str(tokenizer), batch_size=rows * agree.share()[1])
        self.student, self.rows = student, rows

    @property
    def device(self):
        return self.student.device

    def loglikelihood(self, requests, disable_tqdm=True):
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm=True, override_bs=None):
        of_one_forward = super()._loglikelihood_tokens
        return turns.answered(
            turns.batches_of(requests, self.rows),
            lambda numbers: of_one_forward([requests[number] for number in numbers], disable_tqdm=True),
            self.device,
        )

    def generate_until(self, requests, disable_tqdm=True):
        of_one_batch = super().generate_until
        asked = [(repr(request.args[1]), len(self.tok_encode(request.args[0]))) for request in requests]
        return turns.answered(
            turns.batches_of_prompts(asked, self.rows),
            lambda numbers: of_one_batch([requests[number] for number in numbers], disable_tqdm=True),
            self.device,
            greedy.OF_SUITE,
        )

    def _model_generate(self, context, max_length, stop, attention_mask, **_):
        """What `generate` returns: the prompts as they came, filled up from the left, and the answers, filled up to the right."""
        tokens = max_length - context.shape[1]
        prompts = [row[mask.bool()].tolist() for row, mask in zip(context, attention_mask, strict=True)]

        def ended(ids: list[int]) -> bool:
            text = self.tok_decode(ids, skip_special_tokens=False)
            return self.eot_token_id in ids or any(word in text for word in stop)

        found = greedy.answers(self.logits_at, prompts, tokens, ended, self.device)
        ids = [greedy.until(answer, self.eot_token_id) for answer in found]
        filled = [answer + [self.tokenizer.pad_token_id] * (tokens - len(answer)) for answer in ids]
        return torch.cat([context, torch.tensor(filled, device=self.device)], dim=1)

    def logits_at(self, batch: Batch, at: torch.Tensor) -> torch.Tensor:
        return self.student(batch, None, None, None, at=at)

    @torch.no_grad()
    def _model_call(self, inps, attn_mask=None, labels=None):
        return self.student(Batch(inps, None, None, None), None, None, None)


def ask(tasks, student, anatomy: Anatomy, tokenizer: Path, validation: Validation) -> list[Score] | None:
    """The scores of `tasks`. None if a signal asks to stop."""
    pulse.doing("the requests of validation.suite")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = Live(student, anatomy, tokenizer, validation.suite_batch)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # the same examples in the prompts of every validation
    student.eval()
    try:
        found = evaluate(model, tasks, limit=validation.suite_limit, bootstrap_iters=0, log_samples=False)
    except Preempted:
        return None
    finally:
        student.train()
    return scores(found)
