#!/usr/bin/env bash
# Llama-3.1-70B-Instruct teaches Llama-3.1-8B-Instruct. Two layouts:
#
#   sbatch slurm/opd_70b_to_8b.sh                                            teacher in the trainer, 3 nodes
#   sbatch --nodes=4 --export=ALL,OPD_LAYOUT=served slurm/opd_70b_to_8b.sh   teacher on a node of its own, 4 nodes
#
# Arguments are more settings (train.steps=100); docs/cluster.md says how to get here from nothing. With the teacher in FP8
# (docs/fp8.md; before it trains, the run measures what that does to the signal):
#
#   sbatch slurm/opd_70b_to_8b.sh 'precision.fp8.teachers=[llama-70b]'                products in FP8, weights in bf16
#   sbatch slurm/opd_70b_to_8b.sh 'precision.fp8.teachers=[llama-70b]' precision.fp8.resident=true teachers.0.offload=false
#                                        weights in FP8 too, in half the memory, so that they can stay on the GPUs
#   ... OPD_LAYOUT=served slurm/opd_70b_to_8b.sh 'teachers.0.servers.args=[--quantization, fp8]'   the servers' own FP8
#
# ---- Edit here: the cluster.
#SBATCH --job-name=opd_70b_to_8b
#SBATCH --nodes=3
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

case "${OPD_LAYOUT:=in-process}" in
  in-process) settings=() ;;
  # What 8,192 hidden numbers a token cost as JSON, 64 log-probabilities do not: docs/serving.md.
  served) settings=(teachers.0.backend=sglang teachers.0.carrier=topk teachers.0.top_k=64
    'teachers.0.servers={tensor: 8, count: 1, port: 31000}' teachers.0.offload=false) ;;
  *) echo "error: OPD_LAYOUT is in-process or served, not $OPD_LAYOUT" >&2; exit 1 ;;
esac

opd_run "${OPD_CONFIG:-examples/cluster/opd_70b_to_8b.yaml}" ${settings[@]+"${settings[@]}"} "$@"
