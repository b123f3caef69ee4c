"""launch/slurm with three small programs in place of Slurm: the environment of a rank, and which jobs are requeued."""

import os
import stat
import subprocess

import pytest
from places import ROOT

SCRIPTS = ROOT / "launch" / "slurm"

SRUN = """#!/usr/bin/env bash
echo "$@" > "$TRIAL/asked"
while [[ $1 == --* ]]; do shift; done
highest=0
for task in 0 1 2 3; do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 SLURM_NTASKS_PER_NODE=2 SLURM_CPUS_PER_TASK=3 "$@"
  code=$?
  if [ $code -gt $highest ]; then highest=$code; fi
done
exit $highest
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) printf 'node7\\nnode8\\n' ;;
  requeue) echo "$2" >> "$TRIAL/requeued" ;;
esac
"""
PYTHON = """#!/usr/bin/env bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_SIZE $OMP_NUM_THREADS $MASTER_ADDR $MASTER_PORT: $*" >> "$TRIAL/ranks"
exit "$CODE"
"""


@pytest.fixture
def slurm(tmp_path):
    """Run the script with ranks that exit with `code`: (its exit code, its output)."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)

    def run(code: int, **environment) -> tuple[int, str]:
        ours = ("OMP_NUM_THREADS", "PYTHON")  # rank.sh reads them
        own = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k not in ours}
        job = {"SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": str(ROOT)}
        env = {**own, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TRIAL": str(tmp_path), "CODE": str(code)}
        command = ["bash", str(SCRIPTS / "pretrain.sbatch"), "--config", "a b.toml"]
        done = subprocess.run(command, env=env | environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    return run


def test_every_rank_gets_its_numbers_and_the_address_of_rank_0(slurm, tmp_path):
    assert slurm(0)[0] == 0
    assert (tmp_path / "ranks").read_text().splitlines() == [
        f"{rank} {rank % 2} 4 2 3 node7 21234: -u launch/pretrain.py --config a b.toml" for rank in range(4)
    ]


@pytest.mark.parametrize("code", [75, 1, 4, 5, 137])
def test_exit_codes_that_a_restart_can_help_are_requeued(slurm, tmp_path, code):
    assert slurm(code)[0] == 0
    assert (tmp_path / "requeued").read_text() == "31234\n"


@pytest.mark.parametrize("code", [0, 2, 3, 6])
def test_exit_codes_that_a_restart_cannot_help_are_not_requeued(slurm, tmp_path, code):
    assert slurm(code)[0] == code
    assert not (tmp_path / "requeued").exists()


def test_restarts_are_bounded(slurm, tmp_path):
    code, said = slurm(75, SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert code == 75 and "MAX_RESTARTS (3) is reached" in said
    assert not (tmp_path / "requeued").exists()
    assert slurm(75, SLURM_RESTART_COUNT="2", MAX_RESTARTS="3")[0] == 0


def test_the_job_asks_slurm_to_warn_the_ranks_and_keeps_its_log():
    asked = [
        line.split(maxsplit=1)[1]
        for line in (SCRIPTS / "pretrain.sbatch").read_text().splitlines()
        if "#SBATCH" in line
    ]
    assert {"--signal=USR1@120", "--requeue", "--open-mode=append"} <= set(asked)
