#!/usr/bin/env bash
# Runs a program over 1, 2, 4, ... nodes of the job, up to all of them, a rank a GPU; in its arguments {nodes} and
# {ranks} stand for their numbers:
#
#   sbatch slurm/bench_multinode.sh examples/quickstart.yaml parallel.tensor=1 parallel.pipeline=1 'parallel.data={ranks}' \
#     --json runs/scaling.json        (strong scaling; --scaling weak: rollout.prompts_per_step is of each replica)
#   sbatch --nodes=8 --export=ALL,TOOL="python my_bench.py" slurm/bench_multinode.sh --out 'results/{nodes}.json'
#
# ---- Edit here: the cluster.
#SBATCH --job-name=bench_multinode
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.out
##SBATCH --partition=...
##SBATCH --account=...
#
# ---- Edit there: the environment, at the top of megatron_opd/launch/slurm/job.sh (or OPD_SETUP, OPD_CONTAINER outside).
cd "${OPD_HOME:-$SLURM_SUBMIT_DIR}" || exit 1
# shellcheck source=megatron_opd/launch/slurm/job.sh
source megatron_opd/launch/slurm/job.sh

opd_bench "${TOOL:-python tools/bench_step.py}" "$@"
