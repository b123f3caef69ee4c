"""torch and its devices, and what a run would use of them: a process of its own, which prints a line of JSON for each part.

Note: what was printed counts also if a later part hangs or the process dies, as a broken driver makes it.
"""

import ctypes
import json

LIBRARY = "libcuda.so.1"
HEADS, ROW = 128, 4096  # a usual width of a head, and of a row, for the attention that would be taken


def main() -> None:
    say("driver", driver=cuda_of_the_driver())
    import torch

    say(
        "torch", version=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip,
        devices=devices(torch), cpu=torch.backends.cpu.get_cpu_capability(),
    )  # fmt: skip
    import triton

    say("triton", version=triton.__version__)
    say("run", **would_run(torch))


def say(part: str, **values) -> None:
    print(json.dumps({"part": part, **values}), flush=True)


def cuda_of_the_driver() -> str | None:
    """The newest CUDA that the driver runs, asked without torch; None where there is no driver."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL(LIBRARY).cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed else f"{number.value // 1000}.{number.value % 1000 // 10}"


def devices(torch) -> list[dict]:
    if not torch.cuda.is_available():
        return []
    return [described(torch, number) for number in range(torch.cuda.device_count())]


def described(torch, number: int) -> dict:
    """With a product that is checked: a device may be listed and not work."""
    free, total = torch.cuda.mem_get_info(number)
    ones = torch.ones(64, 64, device=f"cuda:{number}", dtype=torch.bfloat16)
    major, minor = torch.cuda.get_device_capability(number)
    return {
        "name": torch.cuda.get_device_name(number), "capability": f"sm_{major}{minor}", "memory": total, "free": free,
        "works": bool(((ones @ ones) == 64).all()),
    }  # fmt: skip


def would_run(torch) -> dict:
    """By the rules of the run itself."""
    from deepspeed.accelerator import get_accelerator

    from ted_scale.forecast import machine
    from ted_scale.kernels import backend
    from ted_scale.models import attention, fused

    kind = get_accelerator().device_name()
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    precision = "bf16" if kind == "cuda" else "fp32"
    layer = attention.Layer(HEADS, HEADS, None, None)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    paths = [attention.choose_path(layer, ROW, packed, dtype, device) for packed in (False, True)]
    sheet = machine.of_torch_name(torch.cuda.get_device_name(device), precision) if kind == "cuda" else None
    return {
        "device": kind, "precision": precision, "losses": backend.describe("auto", device),
        "causal": paths[0], "document": paths[1],
        "blocks": fused.chosen("auto", "llama", paths[:1], device), "sheet": sheet.name if sheet else None,
    }  # fmt: skip


if __name__ == "__main__":
    main()
