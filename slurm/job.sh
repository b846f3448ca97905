#!/usr/bin/env bash
# slurm/job.sh VERB out=DIR key=value ...: what a batch script becomes: one world of ranks, started by one `srun`.
#
# SIGUSR1 (from `#SBATCH --signal=B:USR1@SECONDS`) or SIGTERM: every rank saves and ends with 75, and the job is queued
# again. So it is when a rank was killed, crashed or hung (76, from the watchdog): what was saved last is the work that
# stays. Bad input (2) is not tried again, and neither is a run without progress: when MRLHF_ATTEMPTS starts in a row
# left no new state or weights in DIR, the job ends and says so. A job that somebody cancelled stays so.
#
#   MRLHF_ATTEMPTS    starts in a row without progress (3)
#   MRLHF_SRUN        further options of srun
#   MASTER_ADDR       rank 0's address; by default the address that SLURM itself has of the first node
#   see slurm/node.sh for those of the ranks
set -uo pipefail

# the copy that sbatch makes of a script stands elsewhere, so this file is always called by its own path
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
say() { echo "job $SLURM_JOB_ID: $*" >&2; }

verb=${1:?VERB is missing, for example ppo}
out=
for word in "${@:2}"; do
    if [[ $word == out=* ]]; then out=${word#out=}; fi
done
if [[ -z $out ]]; then
    say "no out=DIR; write for example out=/scratch/run1"
    exit 2
fi
allowed=${MRLHF_ATTEMPTS:-3}
record=$out/slurm/$verb.attempts
mkdir -p "$out/slurm" || exit 2

# The newest state or weights of any stage, such as ppo/state/step_40.score: finished ones have their own names.
newest() {
    local folder found=
    for folder in "$out"/*/state/step_* "$out"/*/weights; do
        case $folder in *.partial | *.removed) continue ;; esac
        [[ -f $folder/manifest.json ]] || continue
        if [[ -z $found || $folder -nt $found ]]; then found=$folder; fi
    done
    echo "${found#"$out"/}"
}

# Starts in a row without progress, if the run stood at $1 now: 0 where it was never there before. Each line of the
# record is of one start: how many went before it without progress, and where the run stood, in brackets.
fruitless() {
    if grep -Fqs "[$1]" "$record"; then
        echo $(($(tail -n 1 "$record" | cut -d' ' -f1) + 1))
    else
        echo 0
    fi
}

stop_without_progress() {
    say "stopped: $1 starts in a row saved nothing new (newest: ${2:-nothing}), the last ended with ${3}; see above" \
        "for the reason, then submit again"
    exit 1
}

# A submission by hand starts the count anew; the scheduler's own restarts, after a node failed too, go on with it.
if [[ ${SLURM_RESTART_COUNT:-0} -eq 0 ]]; then rm -f "$record"; fi
stands=$(newest)
before=$(fruitless "$stands")
if ((before >= allowed)); then stop_without_progress "$before" "$stands" "no word"; fi
echo "$before [$stands]" >>"$record"

if [[ -z ${MASTER_ADDR:-} ]]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol show node -o "$first" | tr ' ' '\n' | sed -n 's/^NodeAddr=//p')
    export MASTER_ADDR=${MASTER_ADDR:-$first}
fi
# 101 keeps neighbouring jobs apart on a node; a restart takes another port than the ranks it replaces
export MASTER_PORT=$((20000 + (101 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 20000))

asked=
save() {
    say "asked to stop: every rank saves"
    if [[ -z $asked ]]; then
        asked=yes
        # Again and again: ranks that are still coming up have no ears yet.
        while scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null; do sleep 5; done &
        resend=$!
    fi
}
trap save USR1 TERM

options=(--kill-on-bad-exit=1)
# srun does not take this over from sbatch since 22.05
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
say "start $((${SLURM_RESTART_COUNT:-0} + 1)) of $verb on $SLURM_JOB_NODELIST, after ${stands:-nothing}"
# shellcheck disable=SC2086
srun "${options[@]}" ${MRLHF_SRUN:-} bash "$here/node.sh" "$@" &
step=$!
while :; do
    wait "$step"
    code=$?
    # a trap ends `wait` early
    kill -0 "$step" 2>/dev/null || break
done
trap - USR1 TERM
[[ -z $asked ]] || kill "$resend" 2>/dev/null

if ((code == 0)); then
    say "$verb is done"
    exit 0
fi
if ((code == 2)); then
    say "stopped: bad input, see above; it is not tried again"
    exit 2
fi
state=$(scontrol show job -o "$SLURM_JOB_ID" | tr ' ' '\n' | sed -n 's/^JobState=//p')
if [[ $state != RUNNING ]]; then
    say "the ranks ended with $code; the job is $state and not queued again by itself"
    exit "$code"
fi
stands=$(newest)
now=$(fruitless "$stands")
if ((now >= allowed)); then stop_without_progress "$now" "$stands" "$code"; fi
say "the ranks ended with $code; queued again, to go on after ${stands:-nothing} (without progress so far: $now of $allowed)"
scontrol requeue "$SLURM_JOB_ID" || exit "$code"
# the requeue ends this script
sleep 60
