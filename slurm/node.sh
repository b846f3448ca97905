#!/usr/bin/env bash
# slurm/node.sh VERB key=value ...: one rank of the world, as `srun` starts it on every node: its place, its CPUs and
# its network cards, then the program in this process's place. Read from the environment:
#
#   SLURM_PROCID, SLURM_LOCALID, ...     what srun says
#   MASTER_ADDR, MASTER_PORT             rank 0's, from slurm/job.sh
#   MRLHF_PYTHON                         the interpreter (python3)
#   MRLHF_CONTAINER                      words before it, such as `apptainer exec --nv IMAGE`
#   MRLHF_BIND=none                      leaves CPUs, memory and network cards alone
set -euo pipefail

# Until the program has its own handlers these signals would end it; the job sends them again.
trap '' USR1 USR2 TERM

export RANK=$SLURM_PROCID WORLD_SIZE=${SLURM_STEP_NUM_TASKS:-$SLURM_NTASKS} LOCAL_RANK=$SLURM_LOCALID
tasks=${SLURM_STEP_TASKS_PER_NODE:-}
# "8" or "8(x2)" where all nodes are alike; "8(x2),4" is no one number
[[ $tasks == *,* || -z $tasks ]] || export LOCAL_WORLD_SIZE=${tasks%%(*}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} PYTHONUNBUFFERED=1

sys=${MRLHF_SYS:-/sys}

# The NUMA node that this rank's GPU hangs on; nothing where there is no GPU, or one NUMA node.
numa_node() {
    local bus
    [[ $(find "$sys/devices/system/node" -maxdepth 1 -name 'node[0-9]*' 2>/dev/null | wc -l) -gt 1 ]] || return 0
    bus=$(nvidia-smi --query-gpu=pci.bus_id --format=csv,noheader -i "$LOCAL_RANK" 2>/dev/null) || return 0
    bus=${bus,,}
    # nvidia-smi writes the PCI domain with eight digits, Linux with four
    cat "$sys/bus/pci/devices/${bus#0000}/numa_node" 2>/dev/null || true
}

# InfiniBand and RoCE cards with a port that is up; NCCL takes of these the nearest to each GPU.
cards() {
    local card
    for card in "$sys"/class/infiniband/*; do
        if grep -qs ACTIVE "$card"/ports/*/state; then basename "$card"; fi
    done
}

bind=()
if [[ ${MRLHF_BIND:-} != none ]]; then
    node=$(numa_node)
    # preferred and not bound: a node whose memory is full lends from its neighbour
    if [[ -n $node && $node -ge 0 ]] && command -v numactl >/dev/null; then
        bind=(numactl --cpunodebind="$node" --preferred="$node")
    fi
    found=$(cards | paste -sd, -)
    # = takes names whole: mlx5_1 is not mlx5_10
    [[ -z $found || -n ${NCCL_IB_HCA:-} ]] || export NCCL_IB_HCA="=$found"
fi

# shellcheck disable=SC2086
exec ${bind[@]+"${bind[@]}"} ${MRLHF_CONTAINER:-} ${MRLHF_PYTHON:-python3} -m megatron_rlhf "$@"
