#!/bin/bash
# NFNet-F0 on four nodes of eight GPUs: sbatch examples/cluster/slurm.sh
# The same file begins the run and goes on with it, after a time limit, a preemption or a lost node.
#SBATCH --job-name=nfnet-f0
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1        # one torchrun a node, which starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=112        # 14 for each GPU: 12 loader processes and room
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120          # to the steps, 120 to 180 s before the limit: time to save
#SBATCH --requeue                  # after a preemption or a lost node; the limit is dealt with below
#SBATCH --open-mode=append         # one log for all starts
set -uo pipefail

SHARED=${SHARED:-/shared/$USER}    # every node must see it: rank 0 writes checkpoints there, all read them
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# torchrun passes only those signals on to its processes that it is told to; what has not ended by shutdown-timeout is
# killed, so it is less than the 120 s above. max-restarts starts all processes anew when one dies: no new job needed.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 3 --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 100 \
    -m normfree train nfnet_f0_imagenet --data.root "$SHARED/imagenet" --data.workers 12 \
    --run-dir "$SHARED/runs/nfnet-f0" --resume auto
code=$?

# Slurm puts no job back that has reached its limit, and torchrun ends with 1 after a save as after an error: only one that
# ends in its last minutes is put back.
if ((code != 0)) && ((${SLURM_JOB_END_TIME:-9999999999} - $(date +%s) < 200)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
