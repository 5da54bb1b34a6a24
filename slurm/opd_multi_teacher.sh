#!/usr/bin/env bash
# A 32B math, a 32B code and a 72B general teacher for one 7B student: math and code problems go to their specialist
# and the generalist, averaged; everything else to the generalist alone.
#
#   sbatch slurm/opd_multi_teacher.sh      4 nodes: trainer, students' servers, the 72B, and the two 32B on one node
#
# Arguments are more settings (train.steps=100); docs/cluster.md says how to get here from nothing.
#
# ---- Edit here: the cluster.
#SBATCH --job-name=opd_multi_teacher
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
##SBATCH --partition=...
##SBATCH --account=...
#
# ---- Edit there: the environment, at the top of megatron_opd/launch/slurm/job.sh (or OPD_SETUP, OPD_CONTAINER outside).
cd "${OPD_HOME:-$SLURM_SUBMIT_DIR}" || exit 1
# shellcheck source=megatron_opd/launch/slurm/job.sh
source megatron_opd/launch/slurm/job.sh

opd_run "${OPD_CONFIG:-examples/cluster/opd_multi_teacher.yaml}" "$@"
