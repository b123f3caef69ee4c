"""A rank runs out of memory: one sentence says what to lower. memory.py estimates what a run needs.

torch has an exception for a full device but none for a full host. For a full host its allocator raises a RuntimeError, which only
the text distinguishes from other errors.
"""

import contextlib
import errno
import traceback
from pathlib import Path

from ted_scale.base.errors import OutOfMemory, shortened
from ted_scale.ranks import pulse

HERE = Path(__file__)
PACKAGE = HERE.parents[1]
FULL = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")  # of a host or a device


@contextlib.contextmanager
def enough(ways: str):
    """If memory runs out in this context, raise OutOfMemory with the line that asked for memory, and with `ways` to need less."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise OutOfMemory(
            f"a rank's memory must hold {pulse.now.what}{line_of(error)}, but does not ({reason_of(error)}); {ways}"
        ) from None


def ran_out(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    by_text = isinstance(error, RuntimeError) and any(text in str(error) for text in FULL)
    return by_text or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def reason_of(error: BaseException) -> str:
    """The message, without the line of torch's source and without torch's advice."""
    message = " ".join(str(error).split()) or type(error).__name__
    return shortened(message[max(0, message.find("DefaultCPUAllocator")) :], 160)


def line_of(error: BaseException) -> str:
    """The innermost line of this package."""
    files = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    here = [f"{path.name}:{line}" for path, line in files if path.is_relative_to(PACKAGE) and path != HERE]
    return f" (in {here[-1]})" if here else ""


def ways_to_need_less(run, ds_config: dict, on_cpu: bool, placement: str | None = None) -> str:
    """The ways that this run does not use yet, the cheapest first. `placement` is a placement of the teacher that needs less."""
    ways = []
    if run.teacher and run.teacher.early:
        ways.append("set teacher.early = false")
    if run.teacher and run.teacher.micro_batch > 1:
        ways.append(f"lower teacher.micro_batch ({run.teacher.micro_batch})")
    if placement:
        ways.append(f"set teacher.placement = '{placement}'")
    if run.train.micro_batch > 1:
        ways.append(f"lower train.micro_batch ({run.train.micro_batch})")
    if not run.student.gradient_checkpointing:
        ways.append("set student.gradient_checkpointing = true")
    ways.append(f"lower data.seq_len ({run.data.seq_len})")
    if not on_cpu:
        ways.append("set loss.chunk_tokens lower than its default" if run.loss.chunk_tokens is None else
                    f"lower loss.chunk_tokens ({run.loss.chunk_tokens})")  # fmt: skip
    if run.validation.suite:
        ways.append(f"lower validation.suite_batch ({run.validation.suite_batch})")
    if not on_cpu and not ds_config["zero_optimization"].get("offload_optimizer"):
        ways.append("take ds_config = 'ds_configs/zero3_offload_optimizer.json'")
    return f"{', '.join(ways)}, or give it more ranks; --dry-run has an estimate by terms"
