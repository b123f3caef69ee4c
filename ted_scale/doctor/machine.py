"""torch with its devices, cores, memory, shared memory, and what a run would use: read from what device.py printed."""

import os
import sys
from pathlib import Path

from ted_scale.base.packages import install, requirement_of
from ted_scale.base.parsing import parse_json
from ted_scale.doctor.finding import MISSING, NOTE, OK, ROOT, Ended, Finding, last_error, run, size

PROBE_S = 240  # torch, transformers and DeepSpeed are imported, from a file server too
SHARED, LEAST_SHARED = Path("/dev/shm"), 2**30  # Docker's own 64 MiB end NCCL and DeepSpeed's ranks with a bus error
CPU_BUILD = "install torch's build for CUDA: pytorch.org/get-started has the command"


class Probed(dict):
    """What device.py printed, by part; `why` is why a later part is not there."""

    why = ""


def probe() -> Probed:
    """What torch and Triton say, asked in a process of its own: an import that crashes or hangs ends that one alone."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    ended = run([[sys.executable, "-m", "ted_scale.doctor.device"]], PROBE_S, [environment])
    return parts_of(ended)


def parts_of(ended: Ended) -> Probed:
    found = Probed()
    for line in ended.said.splitlines():
        if line.startswith('{"part"'):
            values = parse_json(line)
            found[values.pop("part")] = values
    if ended.codes != [0]:
        late = ended.codes == [None]
        found.why = f"no answer within {PROBE_S} s" if late else last_error(ended.said)
    return found


def torch(probed: Probed) -> list[Finding]:
    """Whether it loads, for what it is built, and whether it uses the GPUs that the driver knows."""
    if "torch" not in probed:
        return [Finding("torch", MISSING, f"it does not load: {probed.why}", install(requirement_of("torch")))]
    found, driver = probed["torch"], probed.get("driver", {}).get("driver")
    build = f"CUDA {found['cuda']}" if found["cuda"] else f"ROCm {found['hip']}" if found["hip"] else "CPU"
    said = f"{found['version']}, built for {build}" + (f"; the driver runs CUDA {driver}" if driver else "")
    if driver and not found["devices"] and not found["hip"]:
        return [Finding("torch", MISSING, f"{said}, but torch uses no GPU", way_to_the_gpu(found["cuda"], driver))]
    return [Finding("torch", OK, said), *devices(found), triton(probed)]


def way_to_the_gpu(cuda: str | None, driver: str) -> str:
    if cuda is None:
        return CPU_BUILD
    if number(cuda) > number(driver):
        return f"install a driver for CUDA {cuda}, or torch for CUDA {driver} or older"
    return "look at nvidia-smi and CUDA_VISIBLE_DEVICES"


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def devices(found: dict) -> list[Finding]:
    if not found["devices"]:
        return [Finding("device", NOTE, f"no GPU; CPU ranks work, for small models ({found['cpu']})")]
    return [device(number, each) for number, each in enumerate(found["devices"])]


def device(number: int, found: dict) -> Finding:
    what, said = (
        f"cuda:{number}",
        f"{found['name']}, {found['capability']}, {size(found['memory'])}, {size(found['free'])} free",
    )
    if not found["works"]:
        return Finding(what, MISSING, f"{said}; a product on it is wrong", "look at nvidia-smi and dmesg; leave it out")
    if found["free"] < found["memory"] / 2:
        return Finding(what, NOTE, f"{said}; another process uses it", "look at nvidia-smi")
    return Finding(what, OK, said)


def triton(probed: Probed) -> Finding:
    if "triton" in probed:
        return Finding("triton", OK, probed["triton"]["version"])
    needed = MISSING if probed["torch"]["devices"] else NOTE  # without a GPU no kernel of it runs
    return Finding("triton", needed, f"it does not load: {probed.why}", install(requirement_of("triton")))


def host() -> list[Finding]:
    """Cores that this process may use, memory, and the shared memory that NCCL and data loaders need."""
    cores = len(os.sched_getaffinity(0))
    found = [Finding("cpu", OK, f"{cores} cores for this process of {os.cpu_count()}"), memory()]
    if not SHARED.is_dir():
        return [*found, Finding("shared memory", NOTE, f"there is no {SHARED}", "in a container: --ipc host")]
    room = os.statvfs(SHARED)
    total = room.f_blocks * room.f_frsize
    if total < LEAST_SHARED:
        return [
            *found,
            Finding(
                "shared memory", MISSING, f"{SHARED} has {size(total)}", "in a container: --ipc host, or --shm-size 8g"
            ),
        ]
    return [
        *found,
        Finding("shared memory", OK, f"{SHARED} has {size(total)}, {size(room.f_bavail * room.f_frsize)} free"),
    ]


def memory() -> Finding:
    try:
        import psutil

        from ted_scale.ranks import capacity
    except ImportError as error:
        return Finding("memory", NOTE, f"not known: {error}")
    ours, now = capacity.of_the_host(), psutil.virtual_memory()
    limit = "" if ours == now.total else f", of which this process may have {size(ours)}"
    return Finding("memory", OK, f"{size(now.total)}{limit}, {size(now.available)} free")


def what_runs(probed: Probed) -> list[Finding]:
    """Device, ranks, precision, losses, attention."""
    if "run" not in probed:
        return [Finding("a run", MISSING, f"cannot start here: {probed.why}", "put right what is missing above")]
    found, cores = probed["run"], len(os.sched_getaffinity(0))
    gpus = len(probed["torch"]["devices"])
    ranks = f"{gpus} rank{'s' if gpus > 1 else ''}, one a GPU" if gpus else f"1 rank, up to {cores} on these cores"
    paths = f"attention: {found['causal']}, with documents apart {found['document']}"
    plan = f"; forecast it with --gpu {found['sheet']}" if found["sheet"] else ""
    how = f"{ranks}, on {found['device']}, train.precision = '{found['precision']}'"
    said = f"{how}; {found['losses']}; {paths}; blocks: {found['blocks']}"
    return [Finding("a run", OK, said + plan)]
