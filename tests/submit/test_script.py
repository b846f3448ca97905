"""Proves what the batch script of a job holds, that bash reads it, and where node.sh puts a rank, its CPUs and its
network cards.

The machine's NUMA nodes, GPUs and cards are files and small programs made for the test. Not proved here: that numactl,
NCCL and a container do what they are told.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlhf.config.schema import Slurm
from megatron_rlhf.submit.place import Place, place
from megatron_rlhf.submit.script import directory, render

HERE = Path("/scratch/run1")


def script(slurm: Slurm, world: int = 16) -> str:
    """The script of a PPO job, which bash reads without a fault."""
    text = render("ppo", ["experiment=quickstart", "layout.policy=tp2 pp2"], slurm, place(slurm, world, 8), HERE)
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return text


def test_it_asks_for_what_the_settings_say() -> None:
    asked = Slurm(
        **{"partition": "gpu", "account": "lab", "qos": "high", "time": "2-00:00:00", "signal": 300, "cpus": 12},
        options="--exclusive; --mem=0",
    )
    header = [line.removeprefix("#SBATCH ") for line in script(asked).splitlines() if line.startswith("#SBATCH")]
    assert set(header) == {
        *("--job-name=mrlhf-ppo", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12"),
        *("--time=2-00:00:00", "--partition=gpu", "--account=lab", "--qos=high", "--signal=B:USR1@300", "--requeue"),
        *("--open-mode=append", "--kill-on-invalid-dep=yes", f"--output={HERE}/slurm/ppo-%j.log"),
        *("--exclusive", "--mem=0"),
    }
    assert script(asked).splitlines()[0] == "#!/usr/bin/env bash"
    assert not any(f"--{name}" in script(Slurm(gpus=0)) for name in ("partition", "account", "qos", "gpus", "cpus"))


def test_the_last_line_is_the_job_with_its_words() -> None:
    last = script(Slurm()).splitlines()[-1]
    assert last == f"exec {directory()}/job.sh ppo out={HERE} experiment=quickstart 'layout.policy=tp2 pp2'"
    assert f"export MRLHF_PYTHON={sys.executable}\n" in script(Slurm())
    assert "export MRLHF_ATTEMPTS=5\n" in script(Slurm(attempts=5))


def test_modules_set_up_and_containers_are_lines_of_their_own() -> None:
    text = script(Slurm(modules="cuda/12.8 nccl", setup="source /venv/bin/activate && ulimit -l unlimited"))
    assert "\nmodule load cuda/12.8 nccl\nsource /venv/bin/activate && ulimit -l unlimited\n" in text
    text = script(Slurm(container="pyxis:/images/a.sqsh", mounts="/a:/a,/b:/b"))
    assert "export MRLHF_SRUN='--container-image=/images/a.sqsh --container-mounts=/a:/a,/b:/b'\n" in text
    assert "export MRLHF_PYTHON=python3\n" in text and "MRLHF_CONTAINER" not in text
    text = script(Slurm(container="apptainer:/a.sif", mounts="/a"))
    assert "export MRLHF_CONTAINER='apptainer exec --nv --bind /a /a.sif'\n" in text and "MRLHF_SRUN" not in text
    assert "--nv" not in script(Slurm(container="apptainer:/a.sif", gpus=0))


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """Two NUMA nodes, two GPUs of which the second hangs on the second node, three cards of which one is down."""
    programs, sys_ = tmp_path / "bin", tmp_path / "sys"
    programs.mkdir()
    for node in ("node0", "node1"):
        (sys_ / "devices/system/node" / node).mkdir(parents=True)
    for gpu, node in (("0000:17:00.0", "0"), ("0000:ca:00.0", "1")):
        (sys_ / "bus/pci/devices" / gpu).mkdir(parents=True)
        (sys_ / "bus/pci/devices" / gpu / "numa_node").write_text(f"{node}\n")
    for card, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN"), ("mlx5_10", "4: ACTIVE")):
        (sys_ / "class/infiniband" / card / "ports/1").mkdir(parents=True)
        (sys_ / "class/infiniband" / card / "ports/1/state").write_text(f"{state}\n")
    said = {
        "nvidia-smi": "case ${@: -1} in 0) echo 00000000:17:00.0 ;; 1) echo 00000000:CA:00.0 ;; esac",
        "numactl": 'echo "bound: $1 $2"; shift 2; exec "$@"',
        "play": 'echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of ${LOCAL_WORLD_SIZE:-?}; '
        'cards ${NCCL_IB_HCA:-none}; $*"',
        "box": 'echo "in a box: $1"; shift; exec "$@"',
    }
    for name, line in said.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (programs / name).chmod(0o755)
    place = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }
    return {"PATH": f"{programs}:/usr/bin:/bin", "MRLHF_SYS": str(sys_), "MRLHF_PYTHON": "play", **place}


def node(environment: dict[str, str]) -> list[str]:
    """What a rank says."""
    done = subprocess.run(
        [str(directory() / "node.sh"), "ppo", "a=b c"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_rank_is_bound_to_its_gpus_node_and_to_the_cards_that_are_up(machine: dict[str, str]) -> None:
    rank = "rank 5 of 8, 1 of 4; cards =mlx5_0,mlx5_10; -m megatron_rlhf ppo a=b c"
    assert node(machine) == ["bound: --cpunodebind=1 --preferred=1", rank]
    assert node({**machine, "SLURM_LOCALID": "0"})[0] == "bound: --cpunodebind=0 --preferred=0"
    assert node({**machine, "MRLHF_CONTAINER": "box image"}) == [
        "bound: --cpunodebind=1 --preferred=1",
        "in a box: image",
        rank,
    ]


def test_nothing_is_bound_where_it_is_not_wanted_or_not_there(machine: dict[str, str], tmp_path: Path) -> None:
    plain = "rank 5 of 8, 1 of 4; cards none; -m megatron_rlhf ppo a=b c"
    assert node({**machine, "MRLHF_BIND": "none"}) == [plain]
    assert node({**machine, "MRLHF_SYS": str(tmp_path / "nothing")}) == [plain]
    mine = node({**machine, "NCCL_IB_HCA": "mlx5_7"})[-1]
    assert "cards mlx5_7;" in mine
    uneven = {**machine, "SLURM_STEP_TASKS_PER_NODE": "4,2", "MRLHF_BIND": "none"}
    assert "1 of ?" in node(uneven)[0]


@pytest.mark.parametrize(("name", "verb"), [("1_sft", "sft"), ("2_reward", "reward"), ("3_ppo", "ppo")])
def test_the_scripts_to_edit_ask_for_what_rendered_ones_do(name: str, verb: str) -> None:
    """For one node of eight GPUs: the same lines but for the log's place, and the same end."""
    text = (directory() / f"{name}.sbatch").read_text()
    rendered = render(verb, [], Slurm(), Place(1, 8, 8), HERE)

    def asked(script: str) -> set[str]:
        return {line for line in script.splitlines() if line.startswith("#SBATCH") and "--output" not in line}

    assert asked(text) == asked(rendered)
    assert text.splitlines()[-1] == f'exec "${{MRLHF_SLURM:-$SLURM_SUBMIT_DIR/slurm}}/job.sh" {verb} "$@"'
