#!/bin/bash
# sbatch examples/slurm.sh --config CONFIG --run_dir SHARED/RUN [--section.field VALUE ...]     (docs/clusters.md)
#SBATCH --job-name=gshardx
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$HOME/.cache}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export COORDINATOR=$head:$((61440 + SLURM_JOB_ID % 4096))  # above Linux's ephemeral ports, one for each job

# A shell a task, because each process needs its own number; exec, so that signals reach Python alone. A lost process is
# named by the others within 60 s: until then nothing may kill them.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --wait=120 --cpu-bind=none bash -c 'exec python -m gshardx.train "$@" \
    --coordinator "$COORDINATOR" --num_processes "$SLURM_NTASKS" --process_id "$SLURM_PROCID"' task "$@"
code=$?

# 3: another process was lost; 128 and more: a signal ended one, for 143 after saving. The same command continues.
if [ "$code" -eq 3 ] || [ "$code" -ge 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
