"""The run itself: where it lives, how long it is, how it steps, and where its metrics go."""

from __future__ import annotations

from typing import Annotated, Literal

from megatron_opd.config.section import AtLeastOne, Count, FilePath, NotNegative, Positive, bound, section


@section
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    dir: FilePath
    """Directory of the run: checkpoints, metrics, logs, export. The same command on the same directory resumes.
    Settings may change then, and train.log says which did, but not the student (student.model, student.dtype, lora) nor
    optim.distributed, and the contents of data.train only with data.on_change."""
    seed: Annotated[int, bound(gt=-(2**62), lt=2**62)] = 1234
    """Seeds the order of prompts, every sampled token and dropout: same seed, same numbers."""
    deterministic: bool = False
    """The same numbers bit for bit on GPUs too, from the same seed in the same layout, with slower kernels there; on a
    CPU they always are. Servers need --enable-deterministic-inference in servers.args for it."""
    timeout_s: Positive = 1800.0
    """Seconds a rank waits for another one in a collective before the run stops with an error."""
    max_restarts: Count = 0
    """Times that `megatron-opd launch` and Slurm jobs start the run again from its newest checkpoint after a failure;
    `train` never does. `launch` and `serve` start servers that have ended again as often, while the others go on."""


@section
class TrainConfig:
    """The loop."""

    steps: AtLeastOne
    """Steps of the whole run: answers are sampled, scored and trained on, in minibatches x epochs updates."""
    micro_batch_size: AtLeastOne = 8
    """Sequences in one forward pass of one replica; gradients accumulate over the micro-batches of a step."""
    packing: bool = False
    """Let the sequences of a micro-batch go through student and in-process teachers as one row, without padding between
    them; the share of padding that goes through the student is `batch/padding` in the metrics."""
    minibatches: AtLeastOne = 1
    """Parts into which the answers of a step are cut, in order, with an update of the weights for each."""
    epochs: AtLeastOne = 1
    """Times that the answers of a step are trained on."""
    measure_after: bool = False
    """Also measure the divergences on the step's answers after the update (one more forward pass)."""
    eval_every: Count = 0
    """Evaluate every this many steps, and before the first and after the last; 0: never."""
    eval_samples: AtLeastOne = 1
    """Above 1: also draw this many answers to each evaluation prompt at rollout.temperature, for avg@k and pass@k."""
    eval_nll: bool = False
    """Also measure the cross-entropy of the reference answers of data.eval under the student, where rows have one; what
    is longer than rollout.max_new_tokens is cut there."""
    eval_teachers: bool = False
    """Also measure each teacher's own accuracy once, before the first step (loads it whole on one rank)."""
    save_every: Count = 0
    """Save a checkpoint every this many steps and after the last; 0: only after the last."""
    keep_last: AtLeastOne = 2
    """Complete checkpoints kept; older ones are removed after a newer one is complete."""
    resume_from: Literal["newest", "newest-valid"] = "newest"
    """Checkpoint that a run continues from. A damaged newest one is an error that names the next older one that is
    whole; with newest-valid the run goes on from that, and keeps what it passes over as `step_….damaged`."""
    verify_checkpoints: bool = True
    """Hash the files of a checkpoint when it is saved, and compare them before it is loaded: each time one more reading
    of all of it, shared by the ranks. Without, only sizes are recorded and compared."""
    max_skipped: Count = 10
    """Steps in a row that are skipped where loss or gradient is not finite; one more ends the run (0: the first)."""
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
    """Steps of linear warm-up; as the decay, counted in updates where a step has several."""
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
    """Factor of the loss in the backward pass of an fp16 student, at first: halved, and the step skipped, where a
    gradient overflows, doubled after 1,000 steps without. The norm is logged, and clipped, without it."""
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
    completions_every: Count = 0
    """Write answers of a training step to <run.dir>/completions.jsonl (and a table of W&B) every this many steps; 0:
    never."""
    completions: AtLeastOne = 32
    """Answers that are written then, the first ones of the step."""
