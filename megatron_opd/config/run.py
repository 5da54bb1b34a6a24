"""The run itself: where it lives, how long it is, how it steps, and where its metrics go."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from megatron_opd.config.section import AtLeastOne, Count, FilePath, NotNegative, Positive, bound, section


@section
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    dir: FilePath
    """Directory of the run: checkpoints, metrics, logs, export. The same command on the same directory resumes.
    Settings may change in between, and train.log lists the changes; the student (student.model, student.dtype, lora)
    and optim.distributed may not, and the contents of data.train only with data.on_change."""
    seed: Annotated[int, bound(gt=-(2**62), lt=2**62)] = 1234
    """Seed of the order of prompts, of every sampled token and of dropout: the same seed gives the same numbers."""
    deterministic: bool = False
    """Bitwise repeatable numbers on GPUs too, for one seed and one layout, with slower kernels; CPUs always give them.
    Servers also need --enable-deterministic-inference in servers.args."""
    timeout_s: Positive = 1800.0
    """Longest wait of a rank for another one in a collective, in seconds; then the run stops with an error."""
    max_restarts: Count = 0
    """Number of times that `megatron-opd launch` and Slurm jobs start a failed run again from its newest checkpoint;
    `train` never does. `launch` and `serve` restart a server that has ended as often, while the others go on."""


@section
class TrainConfig:
    """The loop."""

    steps: AtLeastOne
    """Steps of the whole run. A step samples answers, scores them, and trains on them in minibatches x epochs
    updates."""
    micro_batch_size: AtLeastOne = 8
    """Sequences in one forward pass of one replica; gradients accumulate over the micro-batches of a step."""
    packing: bool = False
    """Packing: the sequences of a micro-batch go through the student and the in-process teachers as one row, without
    padding between them. The metric `batch/padding` is the share of padding in what the student computes."""
    minibatches: AtLeastOne = 1
    """Parts into which the answers of a step are cut, in order; each part is one update of the weights."""
    epochs: AtLeastOne = 1
    """Passes over the answers of a step."""
    measure_after: bool = False
    """Measure the divergences on the step's answers again after the update (one more forward pass)."""
    eval_every: Count = 0
    """Steps between evaluations; the first one is before the first step, the last one after the last. 0: no
    evaluation."""
    eval_samples: AtLeastOne = 1
    """Answers drawn to each evaluation prompt at rollout.temperature, for avg@k and pass@k; 1: the greedy answer
    alone."""
    eval_nll: bool = False
    """Evaluate the cross-entropy of the reference answers of data.eval under the student too, where rows have one.
    Answers longer than rollout.max_new_tokens are cut there."""
    eval_teachers: bool = False
    """Evaluate each teacher's own accuracy too, once before the first step. One rank loads it whole and has it answer
    data.eval, for which the others wait up to run.timeout_s; the answers are kept in <run.dir>/teacher_answers.json."""
    eval_agreement: bool = False
    """Evaluate the share of tokens at which the student's likeliest next token is the teachers' too: on its own
    answers, and teacher-forced on each teacher's greedy answers to data.eval, which are made as for eval_teachers."""
    save_every: Count = 0
    """Steps between checkpoints; there is always one after the last step. 0: only that one."""
    keep_last: AtLeastOne = 2
    """Complete checkpoints to keep; an older one is removed when a newer one is complete."""
    resume_from: Literal["newest", "newest-valid"] = "newest"
    """Checkpoint that a run continues from. A damaged newest one is an error that names the next older one that is
    whole; with newest-valid the run goes on from that, and keeps what it passes over as `step_….damaged`."""
    verify_checkpoints: bool = True
    """Hash the files of a checkpoint when it is saved, and compare them before it is loaded: each time one more reading
    of all of it, shared by the ranks. Without, only sizes are recorded and compared."""
    save_best: str = ""
    """Metric of the evaluations, e.g. eval/accuracy/all or eval/kl/ensemble: whenever it is better than ever, the
    student becomes the Hugging Face directory <run.dir>/best, and best.json says of which step. Empty: none."""
    stop_when: list[str] = dataclasses.field(default_factory=list)
    """Conditions that end the run before train.steps, each enough: "eval/kl/ensemble < 0.05", "reward/mean > 0.9", or
    "eval/nll/all stalls 3" (no new best in 3 measurements)."""
    max_skipped: Count = 10
    """Steps in a row that may be skipped because loss or gradient is not finite; one more ends the run."""
    export: bool = True
    """Write the final student as a Hugging Face directory, <run.dir>/hf."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on the answers of one step."""
        return self.minibatches * self.epochs


@section
class OptimConfig:
    """Adam, its schedule and gradient clipping."""

    lr: NotNegative = 1e-5
    """Peak learning rate."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay from lr to min_lr over train.steps, an update at a time."""
    warmup_steps: Count = 0
    """Steps of linear warm-up, counted in updates, like the decay, where a step has several. A run may end within it,
    below `lr`."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    beta1: Annotated[float, bound(ge=0, lt=1)] = 0.9
    """Adam's first moment decay."""
    beta2: Annotated[float, bound(ge=0, lt=1)] = 0.95
    """Adam's second moment decay."""
    eps: Positive = 1e-8
    """Adam's epsilon."""
    clip_grad: NotNegative = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    initial_loss_scale: Annotated[float, bound(ge=1)] = 4096.0
    """Factor of the loss in the backward pass of an fp16 student at the start. It is halved, and the step skipped, when
    a gradient overflows, and doubled after 1,000 steps without an overflow. The gradient norm is logged and clipped
    without it."""
    distributed: bool = True
    """Shard optimizer state over data-parallel replicas (Megatron's distributed optimizer)."""


@section
class LogConfig:
    """Where metrics go besides the console and <run.dir>/metrics.jsonl, which are always on."""

    tensorboard: bool = False
    """Also write TensorBoard event files to <run.dir>/tensorboard."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also log to Weights & Biases; offline writes to <run.dir>/wandb."""
    wandb_project: str = "megatron-opd"
    """Project name for Weights & Biases."""
    answer_every: Count = 10
    """Steps between answers that the console and train.log show, one at a time, the first one after the first step.
    0: none."""
    completions_every: Count = 0
    """Steps between tables of answers: those of one training step go to <run.dir>/completions.jsonl (and to a table of
    W&B). 0: no tables."""
    completions: AtLeastOne = 32
    """Answers in such a table, the first ones of the step."""
