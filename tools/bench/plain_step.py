"""The baselines: the same training step as people write it with Hugging Face and torch alone, with SDPA, whole fp32 logits
and fused AdamW.

There are two. `build` and `step_of` are for a GPU (tools/bench/gpu_step.py): random weights, autocast to bf16 over fp32
masters, every method. `PlainTorch` is for CPU ranks (tools/bench/step.py, plain_kd.py): `kd` on the run's own weights, in fp32
or by autocast over fp32 masters; `Alone` times the parts of its step one by one.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from ted_scale.kernels import linear_kl_ce
from ted_scale.plan import Plan
from tools.bench.loss_arms import naive_mse, plain_kl_ce


def adamw(train, parameters) -> torch.optim.Optimizer:
    """With the settings of a run file's [train]; like the trainer's, it decays matrices alone."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)


def clip_and_update(optimizer: torch.optim.Optimizer, clip: float) -> None:
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# On a GPU


def build(plan: Plan, device: torch.device):
    """(student, teacher or None, filters or None); weights are drawn on the device and never stored."""
    student = make(plan.student.folder, torch.float32, device).train()
    if plan.run.student.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = make(plan.teacher.folder, torch.bfloat16, device).eval().requires_grad_(False) if plan.teacher else None
    filters = make_filters(plan, device) if plan.pairs else None
    trained = [p for module in (student, filters) if module is not None for p in module.parameters() if p.requires_grad]
    return student, teacher, filters, adamw(plan.run.train, trained)


def make(folder, dtype, device: torch.device):
    with device:
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=dtype, attn_implementation="sdpa"
        )


def make_filters(plan: Plan, device: torch.device) -> torch.nn.ModuleList:
    """(student's, teacher's) of each pair; the teacher's are fixed in stage II."""

    def pair():
        filter_s = torch.nn.Linear(plan.student.width, plan.width, device=device)
        filter_t = torch.nn.Linear(plan.teacher.width, plan.width, device=device, dtype=torch.bfloat16)
        for linear in (filter_s, filter_t):
            torch.nn.init.eye_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
        return torch.nn.ModuleList([filter_s, filter_t.requires_grad_(False)])

    return torch.nn.ModuleList(pair() for _ in plan.pairs)


def step_of(plan: Plan, weights, built, batches, clock) -> Callable:
    """A function that takes one optimizer step of one micro-batch and returns its loss."""
    student, teacher, filters, optimizer = built
    wants = {"use_cache": False, "output_hidden_states": bool(weights.layer)}

    def step():
        batch = next(batches)
        with torch.autocast(batch.tokens_BT.device.type, torch.bfloat16):
            with torch.no_grad(), clock.time("teacher"):
                out_t = teacher(batch.tokens_BT, **wants) if teacher else None
            with clock.time("student and losses"):
                out = student(batch.tokens_BT, **wants)
                loss = losses(plan, weights, batch, out, out_t, filters)
        with clock.time("backward"):
            loss.backward()
        with clock.time("optimizer"):
            clip_and_update(optimizer, plan.run.train.clip)
        return loss.detach()

    return step


def losses(plan: Plan, weights, batch, out, out_t, filters):
    labels, mask = batch.labels_BT.flatten(), batch.weights_BT.flatten()
    call = {"labels": labels, "token_weight": mask, "denom": mask.sum()}
    z_t = out_t.logits.flatten(0, 1).float() if weights.kl else None
    total = plain_kl_ce(out.logits.flatten(0, 1).float(), z_t, kl_weight=weights.kl, ce_weight=weights.ce, **call)
    if weights.layer:
        del call["labels"]
        each = [layer(plan, k, out, out_t, filters[k], call) for k in range(len(plan.pairs))]
        total = total + weights.layer * sum(each) / len(each)
    return total


def layer(plan: Plan, k: int, out, out_t, pair, call: dict):
    """hidden_states begins with the embeddings, and its last entry is after the final norm. So the value for a pair of last
    blocks differs from ours; its cost does not."""
    block_s, block_t = plan.pairs[k]
    (filter_s, filter_t), kind = pair, plan.run.loss.kind
    h_s, h_t = (side.hidden_states[b + 1].flatten(0, 1) for side, b in ((out, block_s), (out_t, block_t)))
    tensors = {"h_s": h_s, "w_s": filter_s.weight, "b_s": filter_s.bias}
    tensors |= {"h_t": h_t, "w_t": filter_t.weight, "b_t": filter_t.bias}
    return naive_mse(**tensors, kind=kind, **call)


# On CPU ranks


class PlainTorch:
    """A step of kd. `watch` is a Stopwatch of step_parts.py."""

    def __init__(self, run, teacher: str, student: str, device: torch.device):
        def load(path: str, dtype: torch.dtype):
            return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device)

        self.run, bf16 = run, run.train.precision == "bf16"
        self.teacher = load(teacher, torch.bfloat16 if bf16 else torch.float32).requires_grad_(False).eval()
        self.student = load(student, torch.float32).train()
        self.precision = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
        self.optimizer = adamw(run.train, self.student.parameters())

    def step(self, micro_batches, watch) -> float:
        count = sum((b.labels_BT >= 0).sum() for b in micro_batches)
        total = 0.0
        for batch in micro_batches:
            with watch.part("teacher"), torch.no_grad():
                logits_t = self.teacher(batch.tokens_BT, use_cache=False).logits
            with watch.part("student forward"), self.precision():
                logits_s = self.student(batch.tokens_BT, use_cache=False).logits
            with watch.part("losses"):
                loss = plain_loss(logits_s, logits_t, batch.labels_BT) / count
            with watch.part("backward"):
                loss.backward()
            total += loss.item()
        with watch.part("optimizer"):
            clip_and_update(self.optimizer, self.run.train.clip)
        return total


def plain_loss(logits_s, logits_t, labels_BT):
    log_q, log_p = (logits.flatten(0, 1).float().log_softmax(-1) for logits in (logits_s, logits_t))
    kl = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    labels = labels_BT.flatten()
    return kl[labels >= 0].sum() + functional.nll_loss(log_q, labels, ignore_index=-100, reduction="sum")


def summed_ce(model, batch):
    logits = model(batch.tokens_BT, use_cache=False).logits.flatten(0, 1).float()
    return functional.cross_entropy(logits, batch.labels_BT.flatten(), ignore_index=-100, reduction="sum")


class Alone:
    """The parts that a step of kd needs, each alone on plain modules: bodies, our losses, AdamW."""

    def __init__(self, plain: PlainTorch):
        self.plain = plain

    def step(self, micro_batches, watch) -> None:
        student, teacher = self.plain.student, self.plain.teacher
        for batch in micro_batches:
            with watch.part("teacher"), torch.no_grad():
                last_t = teacher.model(batch.tokens_BT, use_cache=False)[0].flatten(0, 1)
            with watch.part("student body"):
                last_s = student.model(batch.tokens_BT, use_cache=False)[0]
            states = last_s.detach().flatten(0, 1).requires_grad_()
            with watch.part("KL + CE"):
                self.losses(states, last_t, batch)
            with watch.part("student body"):
                last_s.backward(states.grad.view_as(last_s))
        with watch.part("AdamW"):
            self.plain.optimizer.step()
            self.plain.optimizer.zero_grad(set_to_none=True)

    def losses(self, states, last_t, batch) -> None:
        heads = [model.get_output_embeddings().weight for model in (self.plain.student, self.plain.teacher)]
        labels, weights = batch.labels_BT.flatten(), batch.weights_BT.flatten()
        linear_kl_ce(states, heads[0], last_t, heads[1], labels, weights, denom=weights.sum())[0].backward()
