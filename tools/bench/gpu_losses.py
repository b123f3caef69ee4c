"""Part b of tools/bench/gpu.py: the losses of tools/bench/losses.py at real sizes, and how much of the memory's bandwidth the
row kernel uses. Arms that compile nothing run first, so that a slow compiler costs only its own rows."""

from argparse import Namespace

import torch

from ted_scale.kernels import filtered_mse, logit_loss_strict
from ted_scale.kernels.backend import choose
from ted_scale.kernels.formulas.logits import LogitLoss
from ted_scale.kernels.logit_loss import SPAN, row_losses_of, rows_of_chunk
from tools.bench import losses
from tools.bench.gpu_machine import best, copy_rate
from tools.bench.loss_arms import ARMS, layers_case, logit_case, means, normal, ours_kl_ce

TINY = {"tokens": 128, "d_s": 32, "d_t": 64, "vocab": 512, "width": 32, "pairs": 2}
CHUNKS = (512, 768, 1024, 2048)
TILES = (
    (8192, 768, 1536), (8192, 1024, 2048), (8192, 2048, 2048), (4096, 1024, 4096), (2048, 2048, 4096)
)  # fmt: skip
ROW_BYTES = 18  # a logit: both sides' fp32 read for the losses and read again for the gradient, which is 16 bits


def operation(task, write, operation: str, size: str) -> None:
    """Every arm of one operation; each set of arms has naive eager, the base of the ratios."""
    device = task.device()
    arms = list(ARMS[operation](device))
    compiles = [arm for arm in arms if "compile" in arm][: 1 if task.tiny else None]
    for chosen, known in (([arm for arm in arms if "compile" not in arm], ""), (["naive", *compiles], "naive")):
        rows = losses.operation_rows(operation, arguments(task, device, size, chosen))
        for row in rows:
            if row.arm != known:
                write_loss(write, row)
        left_out(write, chosen, rows)


def arguments(task, device: str, size: str, arms: list[str]) -> Namespace:
    sizes = TINY if task.tiny else losses.SIZES[size]
    return Namespace(device=device, dtype="bfloat16", arms=arms, repeats=2 if task.tiny else 10, **sizes)


def write_loss(write, row) -> None:
    where = {"arm": row.arm, "sizes": row.sizes}
    if row.failed:
        write("time", **where, status="failed", reason=row.failed)
        return
    write("time", row.median * 1e3, "ms", **where)
    write("memory", row.beyond_weight_gradients / 1e9, "GB", **where)
    if row.gradient_error is not None:
        write("gradient beside naive's", row.gradient_error, "", **where)


def left_out(write, arms: list[str], rows) -> None:
    for arm in sorted(set(arms) - {row.arm for row in rows}):
        write("time", arm=arm, status="skipped", reason="its library, or this part of it, is not installed")


def gradient_error(task, write) -> None:
    """Near the teacher, where two softmaxes nearly cancel; compared with fp64."""
    for row in losses.gradient_errors(Namespace(device=task.device(), arms=None)):
        end = {"status": "failed", "reason": row.failed} if row.failed else {}
        write("gradient error", row.gradient_error, "", arm=row.arm, sizes=row.sizes, **end)


def chunk_sizes(task, write) -> None:
    """The effect of the chunk's budget: with more tokens, weights are read less often and scratch is larger."""
    device = task.device()
    case = logit_case("linear_kl_ce", arguments(task, device, "cuda", []), torch.bfloat16, device)
    arms = {f"{n} tokens": lambda n=n: ours_kl_ce(chunk_tokens=n) for n in ((64, 128) if task.tiny else CHUNKS)}
    for row in losses.case_rows(case, arms, device, 2 if task.tiny else 10):
        write_loss(write, row)


def tile_sizes(task, write) -> None:
    """Strict mode's tiles (tokens x columns of logits, columns of their gradient), and the layer loss's tokens a chunk."""
    device = task.device()
    case = logit_case("linear_kl_ce", arguments(task, device, "cuda", []), torch.bfloat16, device)
    arms = {
        f"strict {r} x {c}, {s}": lambda t=(r, c, s): strict_in(*t) for r, c, s in TILES[: 2 if task.tiny else None]
    }
    for row in losses.case_rows(case, arms, device, 2 if task.tiny else 10):
        write_loss(write, row)
    del case
    case = layers_case("filtered_mse_nmse", arguments(task, device, "cuda", []), torch.bfloat16, device)
    rows = (32, 64) if task.tiny else (2048, 4096, 8192)
    layers = {f"{n} tokens": lambda n=n: lambda **call: filtered_mse(**call, chunk_tokens=n) for n in rows}
    for row in losses.case_rows(case, layers, device, 2 if task.tiny else 10):
        write_loss(write, row)


def strict_in(rows: int, columns: int, gradients: int):
    call = ours_kl_ce(mode="strict")

    def loss(**values):
        logit_loss_strict.ROWS, logit_loss_strict.LOGITS, logit_loss_strict.SLICE = rows, columns, gradients
        return call(**values)

    return loss


def row_kernel(task, write) -> None:
    """KL and CE of one chunk's logits and their gradient, as the chunked loss calls them."""
    device, size = task.device(), TINY if task.tiny else losses.SIZES["cuda"]
    vocab, fp32 = size["vocab"], torch.float32
    h, w = (torch.empty(rows, 8, dtype=torch.bfloat16, device=device) for rows in (size["tokens"], vocab))
    loss, backend = LogitLoss(1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0), choose("auto", torch.device(device))
    rows = rows_of_chunk(h, w, w, loss, backend, SPAN, 0)
    z_s, z_t = (normal(rows, vocab, fp32, device, 2.0) for _ in range(2))
    labels, weight = torch.randint(0, vocab, (rows,), device=device), means(rows, device)["token_weight"]
    of_rows = row_losses_of(backend)
    room = torch.empty(rows, vocab, dtype=torch.bfloat16, device=device)
    seconds = best(lambda: of_rows(z_s, z_t, labels, weight, loss, True, room), device)  # on CPU z_s is overwritten
    rate, copy = ROW_BYTES * rows * vocab / seconds, copy_rate(device, 1 << (22 if task.tiny else 32))
    where = {"arm": "ours", "sizes": f"rows={rows} V={vocab}"}
    write("bandwidth", rate / 1e9, "GB/s", **where)
    write("copy bandwidth", copy / 1e9, "GB/s", **where)
    write("share of copy bandwidth", rate / copy, "", **where)
