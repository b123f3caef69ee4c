"""The same training step as people write it with Hugging Face and torch alone: SDPA, autocast to bf16 over fp32 masters, whole
fp32 logits, the losses in a line each, fused AdamW. tools/bench/gpu_step.py measures ours beside it."""

from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ted_scale.plan import Plan
from tools.bench.loss_arms import naive_mse, plain_kl_ce


def build(plan: Plan, device: torch.device):
    """(student, teacher or None, filters or None); weights are drawn on the device and never stored."""
    train = plan.run.train
    student = make(plan.student.folder, torch.float32, device).train()
    if plan.run.student.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = make(plan.teacher.folder, torch.bfloat16, device).eval().requires_grad_(False) if plan.teacher else None
    filters = make_filters(plan, device) if plan.pairs else None
    trained = [p for module in (student, filters) if module is not None for p in module.parameters() if p.requires_grad]
    settings = {"lr": train.lr, "betas": train.betas, "eps": train.eps, "weight_decay": train.weight_decay}
    return student, teacher, filters, torch.optim.AdamW(trained, fused=True, **settings)


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
    """What takes one optimizer step of one micro-batch and returns its loss."""
    student, teacher, filters, optimizer = built
    wants = {"use_cache": False, "output_hidden_states": bool(weights.layer)}

    def step():
        batch = next(batches)
        with torch.autocast(batch.tokens_BT.device.type, torch.bfloat16):
            with torch.no_grad(), clock.time("teacher"):
                said = teacher(batch.tokens_BT, **wants) if teacher else None
            with clock.time("student and losses"):
                out = student(batch.tokens_BT, **wants)
                loss = losses(plan, weights, batch, out, said, filters)
        with clock.time("backward"):
            loss.backward()
        with clock.time("optimizer"):
            torch.nn.utils.clip_grad_norm_(
                [p for g in optimizer.param_groups for p in g["params"]], plan.run.train.clip
            )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def losses(plan: Plan, weights, batch, out, said, filters):
    labels, mask = batch.labels_BT.flatten(), batch.weights_BT.flatten()
    call = {"labels": labels, "token_weight": mask, "denom": mask.sum()}
    z_t = said.logits.flatten(0, 1).float() if weights.kl else None
    total = plain_kl_ce(out.logits.flatten(0, 1).float(), z_t, kl_weight=weights.kl, ce_weight=weights.ce, **call)
    if weights.layer:
        del call["labels"]
        each = [layer(plan, k, out, said, filters[k], call) for k in range(len(plan.pairs))]
        total = total + weights.layer * sum(each) / len(each)
    return total


def layer(plan: Plan, k: int, out, said, pair, call: dict):
    """hidden_states begins with the embeddings, and its last one is behind the final norm: a pair of last blocks costs the
    same and says something else."""
    block_s, block_t = plan.pairs[k]
    (filter_s, filter_t), kind = pair, plan.run.loss.kind
    h_s, h_t = (side.hidden_states[b + 1].flatten(0, 1) for side, b in ((out, block_s), (said, block_t)))
    tensors = {"h_s": h_s, "w_s": filter_s.weight, "b_s": filter_s.bias}
    tensors |= {"h_t": h_t, "w_t": filter_t.weight, "b_t": filter_t.bias}
    return naive_mse(**tensors, kind=kind, **call)
