#!/usr/bin/env bash
# slurm/pipeline.sh [sbatch options --] experiment=NAME out=DIR key=value ...: SFT, the reward model and PPO-ptx, each
# when the one before has ended well. DIR holds what they read: the data room with rankings, and pretrained weights.
# Prints the three job numbers. `megatron-rlhf submit pipeline ...` does the same for your cluster.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
options=()
if [[ " $* " == *" -- "* ]]; then
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
fi
export MRLHF_SLURM=$here
after=()
for script in 1_sft 2_reward 3_ppo; do
    job=$(sbatch --parsable ${options[@]+"${options[@]}"} ${after[@]+"${after[@]}"} "$here/$script.sbatch" "$@")
    echo "$script ${job%%;*}"
    after=(--dependency=afterok:"${job%%;*}")
done
