# shellcheck shell=bash
# The supervisor of a run in a Slurm job: `opd_run CONFIG [section.key=value ...]` in a batch script. It starts the
# servers, waits until they are ready, starts the ranks (one Slurm task each), passes warnings on, restarts, requeues, and
# ends everything. slurm/*.sh source this file; `megatron-opd launch --slurm` puts its text into the script it writes.
set -uo pipefail

# ---- The environment of every process. Set these before, in the script or in the environment of sbatch.
: "${OPD_SETUP:=source .venv/bin/activate}"      # shell code before each command: module load, venv, conda
: "${OPD_CONTAINER:=}"                           # image for pyxis (srun --container-image); OPD_SETUP runs inside it
: "${OPD_MOUNTS:=$PWD:$PWD}"                     # srun --container-mounts
: "${OPD_GPUS_PER_NODE:=8}"                      # 0: no GPUs
: "${OPD_RANKS_PER_NODE:=$OPD_GPUS_PER_NODE}"    # only to be set without GPUs
: "${OPD_READY_S:=3600}"                         # in which all servers must answer; loading 70B from a cold disk is slow

# ---- Network. Each can be overridden from outside.
# Only what is wrong; INFO for one run shows which network NCCL took, which is the first thing to look at when it is slow.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A collective that fails or times out ends the process with an error; without it the rank would wait for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# Before Blackwell, tensor parallelism overlaps communication with matrix products only if kernels queue up in one line.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# InfiniBand is found by itself. Where a node has other adapters too (storage), name the right ones:
#   export NCCL_IB_HCA=mlx5_0,mlx5_1,...
# Ranks meet over TCP. Where the default interface cannot reach the other nodes, name one that can:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# One thread a rank: ranks share the cores, and what they do on the CPU is small.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

readonly OPD_PREEMPTED=75  # preemption.EXIT_CODE
# Before a rank's command; torchrun's names. A single task would otherwise take itself for a program started by hand.
# shellcheck disable=SC2016  # the variables of each task
readonly OPD_AS_RANK='env RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS'

opd_say() { printf '%(%H:%M:%S)T  %s\n' -1 "$*" >&2; }

# opd_step NAME NODES TASKS LOG COMMAND: becomes a job step; NODES are numbers of the job's nodes, "0,1".
opd_step() {
  local name=$1 tasks=$3 log=$4 command=$5 hosts=() numbers=() options=()
  IFS=, read -ra numbers <<<"$2"
  for number in "${numbers[@]}"; do hosts+=("${OPD_NODES[number]}"); done
  local per_node=$((tasks / ${#hosts[@]}))
  local cpus=$((${SLURM_CPUS_ON_NODE:-1} / per_node))
  ((OPD_GPUS_PER_NODE)) && options+=("--gpus-per-node=$OPD_GPUS_PER_NODE" --gpu-bind=none)
  [[ $OPD_CONTAINER ]] && options+=("--container-image=$OPD_CONTAINER" "--container-mounts=$OPD_MOUNTS"
    "--container-workdir=$PWD")
  # --overlap: steps of one job share its nodes. --kill-on-bad-exit: one rank's failure ends all.
  # Warnings are for ranks, which listen to them; whoever does not must not die of one, nor a rank that still starts.
  exec srun --overlap --kill-on-bad-exit=1 --unbuffered --job-name="$name" --nodes="${#hosts[@]}" \
    --nodelist="$(IFS=,; echo "${hosts[*]}")" --ntasks="$tasks" --ntasks-per-node="$per_node" \
    --cpus-per-task="$((cpus ? cpus : 1))" --distribution=block ${log:+--output="$log"} ${options[@]+"${options[@]}"} \
    bash -c "trap '' USR1; { $OPD_SETUP"$'\n'"} && exec $command" # the line may end in a ; or a remark
}

opd_nodes() { mapfile -t OPD_NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST"); }

# opd_address NODE: what other nodes reach it by.
opd_address() { scontrol -o show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'; }

# opd_rendezvous NODE: where ranks meet. The port is below those that connections get by chance, and not the last start's.
# Rank 0 listens there on all interfaces: only the cluster's network may reach it (docs/security.md).
opd_rendezvous() {
  MASTER_ADDR=$(opd_address "$1")
  MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + OPD_STARTS++) % 10000))
  export MASTER_ADDR MASTER_PORT
}

# opd_plan CONFIG ...: asks, in the environment of the job, for the run's steps; one line each, fields by tabs.
opd_plan() {
  local command table kind
  command="python -m megatron_opd launch --slurm --steps --nodes ${#OPD_NODES[@]}"
  command+=" --gpus-per-node $OPD_RANKS_PER_NODE $(printf '%q ' "$@")"
  table=$(opd_step plan 0 1 "" "$command") || return 1
  OPD_NAMES=() OPD_ON=() OPD_TASKS=() OPD_COMMANDS=() OPD_SERVERS=0
  while IFS=$'\t' read -r kind first second third fourth fifth; do
    case $kind in
      run) OPD_DIR=$first OPD_MAX_RESTARTS=$second ;;
      step)
        OPD_NAMES+=("$first") OPD_ON+=("$second") OPD_TASKS+=("$third") OPD_COMMANDS+=("$fifth")
        ((OPD_SERVERS += fourth))
        ;;
    esac
  done <<<"$table"
  OPD_TRAINER=$((${#OPD_NAMES[@]} - 1))
  ((OPD_TRAINER >= 0))
}

# opd_start I: starts step I in the background.
opd_start() {
  local stem=$OPD_LOGS/${OPD_NAMES[$1]}.$((OPD_STARTED[$1]++)) command=${OPD_COMMANDS[$1]}
  local log=${stem//%/%%}-%t.log  # % is srun's
  (($1 == OPD_TRAINER)) && command="$OPD_AS_RANK $command"
  opd_step "${OPD_NAMES[$1]}" "${OPD_ON[$1]}" "${OPD_TASKS[$1]}" "$log" "$command" \
    2>"$stem.srun" &
  OPD_PIDS[$1]=$!
  opd_say "${OPD_NAMES[$1]}: ${OPD_TASKS[$1]} task(s) on node(s) ${OPD_ON[$1]} of ${OPD_NODES[*]}, log $log"
}

opd_runs() { kill -0 "${OPD_PIDS[$1]}" 2>/dev/null; }

# opd_pause: a second, cut short by a signal.
opd_pause() { sleep 1 & wait $!; }

# opd_may_restart: counts one more failure of this job, over its requeues too.
opd_may_restart() {
  local file=$OPD_DIR/logs/job-$SLURM_JOB_ID.failures count
  count=$(($(cat "$file" 2>/dev/null || echo 0) + 1))
  echo "$count" >"$file"
  ((count <= OPD_MAX_RESTARTS))
}

# opd_ready: waits until every server has noted its address, which `megatron-opd serve` does when it answers.
opd_ready() {
  local began=$SECONDS noted
  while noted=$(find "$OPD_DIR/servers" -type f -name '[!.]*' 2>/dev/null | wc -l); ((noted < OPD_SERVERS)); do
    [[ $OPD_WARNED$OPD_CANCELLED ]] && return 1
    for ((i = 0; i < OPD_TRAINER; i++)); do
      opd_runs "$i" || { opd_say "error: ${OPD_NAMES[i]} ended before it was ready, see $OPD_LOGS"; return 1; }
    done
    ((SECONDS - began < OPD_READY_S)) || { opd_say "error: $noted of $OPD_SERVERS servers are ready"; return 1; }
    opd_pause
  done
  ((OPD_SERVERS == 0)) || opd_say "all $OPD_SERVERS server(s) are ready after $((SECONDS - began)) s"
}

# opd_train: starts the ranks and waits for their end; restarts servers that end before. Sets OPD_CODE.
opd_train() {
  [[ $OPD_WARNED ]] && OPD_CODE=$OPD_PREEMPTED && return
  opd_rendezvous "${OPD_NODES[0]}"
  opd_start "$OPD_TRAINER"
  local began=$SECONDS
  while opd_runs "$OPD_TRAINER"; do
    for ((i = 0; i < OPD_TRAINER; i++)); do
      opd_runs "$i" || [[ ${OPD_GONE[i]:-} ]] && continue
      opd_say "${OPD_NAMES[i]} has ended"
      if opd_may_restart; then opd_start "$i"; else OPD_GONE[i]=1; fi
    done
    # srun passes it on to all ranks, but dies of it while it starts; ranks may be told any number of times.
    [[ $OPD_WARNED ]] && ((SECONDS - began >= 5)) && kill -USR1 "${OPD_PIDS[OPD_TRAINER]}" 2>/dev/null
    opd_pause
  done
  wait "${OPD_PIDS[OPD_TRAINER]}"
  OPD_CODE=$?
  opd_first_code "$OPD_LOGS/trainer.$((OPD_STARTED[OPD_TRAINER] - 1)).srun"
}

# opd_first_code FILE: srun's exit code is the largest, which is that of the ranks that it has killed because another one
# failed. Sets OPD_CODE to that one's, from what srun said in FILE, and repeats that.
opd_first_code() {
  local first
  cat "$1" >&2
  ((OPD_CODE)) || return 0
  first=$(sed -n 's/^srun: error: .*: tasks\{0,1\} .*: Exited with exit code \([0-9]*\)$/\1/p' "$1" | head -n 1)
  OPD_CODE=${first:-$OPD_CODE}
}

# opd_stop: ends the servers, politely at first. What is left then, Slurm ends with the job.
opd_stop() {
  local began=$SECONDS left=1 step name
  # By Slurm: srun does not pass SIGTERM on, but has its tasks killed.
  while read -r step name; do
    for ((i = 0; i < OPD_TRAINER; i++)); do
      [[ ${OPD_NAMES[i]} == "$name" ]] && scancel --signal=TERM "$step" 2>/dev/null
    done
  done < <(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j')
  while ((left && SECONDS - began < 30)); do
    left=0
    for ((i = 0; i < OPD_TRAINER; i++)); do opd_runs "$i" && left=1; done
    ((left)) && opd_pause
  done
  return 0
}

# opd_requeue WHY: gives the nodes back; the same job continues later from its newest checkpoint.
opd_requeue() {
  opd_say "$1; requeueing"
  scontrol requeue "$SLURM_JOB_ID" && sleep 300  # until Slurm ends this script
}

opd_nodes_answer() {
  local all
  all=$(seq -s, 0 $((${#OPD_NODES[@]} - 1)))
  (opd_step ping "$all" "${#OPD_NODES[@]}" /dev/null true) &
  local ping=$! began=$SECONDS
  while kill -0 $ping 2>/dev/null; do
    ((SECONDS - began < 60)) || { kill -KILL $ping; return 1; }
    opd_pause
  done
  wait $ping
}

opd_run() {
  OPD_WARNED="" OPD_CANCELLED="" OPD_STARTS=0 OPD_CODE=1 OPD_PIDS=() OPD_GONE=()
  trap 'OPD_WARNED=1' USR1
  trap 'OPD_CANCELLED=1' TERM INT
  # Servers that other nodes reach need a key; it is in the environment of this job's steps only.
  export MEGATRON_OPD_API_KEY="${MEGATRON_OPD_API_KEY:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}"
  opd_nodes
  opd_plan "$@" || exit 1
  declare -ga OPD_STARTED=("${OPD_NAMES[@]/*/0}")
  OPD_LOGS=$OPD_DIR/logs/job-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  rm -rf "$OPD_DIR/servers"  # addresses of a start that was killed
  mkdir -p "$OPD_LOGS" || exit 1
  for ((i = 0; i < OPD_TRAINER; i++)); do opd_start "$i"; done
  if opd_ready; then
    while :; do
      opd_train
      [[ $OPD_CODE == 0 || $OPD_CODE == "$OPD_PREEMPTED" || $OPD_CANCELLED ]] && break
      opd_say "error: the trainer ended with exit code $OPD_CODE, see $OPD_LOGS and $OPD_DIR/logs/stacks-*.txt"
      opd_may_restart || break
      opd_nodes_answer || { opd_requeue "a node does not answer"; break; }
      opd_say "starting the ranks again"
    done
  elif [[ $OPD_WARNED ]]; then
    OPD_CODE=$OPD_PREEMPTED
  fi
  opd_stop
  [[ $OPD_CODE == "$OPD_PREEMPTED" && ! $OPD_CANCELLED ]] && opd_requeue "the run has saved and made room"
  opd_say "the job ends with exit code $OPD_CODE"
  exit "$OPD_CODE"
}

# opd_bench PROGRAM [ARGUMENT ...]: the program over 1, 2, 4, ... nodes and all of them, one after the other; its ranks
# have torchrun's variables. The job's exit code is that of the last one that failed.
opd_bench() {
  local program=$1 count=1 all code=0 arguments ranks
  shift
  OPD_STARTS=0
  opd_nodes
  all=${#OPD_NODES[@]} OPD_LOGS=${OPD_LOGS:-$PWD/runs/bench-$SLURM_JOB_ID}
  mkdir -p "$OPD_LOGS" || exit 1
  while :; do
    ranks=$((count * OPD_RANKS_PER_NODE))
    arguments=("${@//\{nodes\}/$count}")
    arguments=(${arguments[@]+"${arguments[@]//\{ranks\}/$ranks}"})
    opd_rendezvous "${OPD_NODES[0]}"
    opd_say "$count node(s), $ranks ranks, logs $OPD_LOGS/bench-$count-*.log"
    (opd_step bench "$(seq -s, 0 $((count - 1)))" "$ranks" "${OPD_LOGS//%/%%}/bench-$count-%t.log" \
      "$OPD_AS_RANK $program $(printf '%q ' ${arguments[@]+"${arguments[@]}"})") || { code=$?; opd_say "error: $count node(s): exit code $code"; }
    ((count < all)) || break
    count=$((2 * count < all ? 2 * count : all))
  done
  exit "$code"
}
