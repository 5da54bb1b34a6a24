"""What a run keeps: checkpoints that it resumes from, and the export at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megatron_opd.config import RunConfig, TrainConfig
from megatron_opd.config import file as config_file
from megatron_opd.core import run_dir
from megatron_opd.core.named_weights import drain
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.whole_file import write_whole
from megatron_opd.models import adapter_dir, hf_dir
from megatron_opd.prompts.mix import PromptMix
from megatron_opd.student.checkpoint import Checkpoints
from megatron_opd.student.student import Student
from megatron_opd.tracking.tracker import Tracker
from megatron_opd.trainer.completions import Completions
from megatron_opd.trainer.run_record import RunRecord, state_of


class Saving:
    """Saves, restores and exports the student of a run."""

    def __init__(
        self,
        run: RunConfig,
        parallel: Parallel,
        student: Student,
        tracker: Tracker,
        *,
        record: RunRecord,
        train: TrainConfig,
    ) -> None:
        self.dir, self.parallel, self.student, self.tracker = Path(run.dir), parallel, student, tracker
        self.record = record
        self.checkpoints = Checkpoints(
            run.dir,
            parallel,
            keep_last=train.keep_last,
            skip_damaged=train.resume_from == "newest-valid",
            verify=train.verify_checkpoints,
            say=tracker.message,
        )
        self.saved = 0

    def restore(self, prompts: PromptMix, completions: Completions, settings: dict[str, Any]) -> int:
        """The step after which the run goes on; student, prompts and logs are as they were then.

        `settings` are those of the whole run, which are recorded; the log says what changed, of them and of what else
        decides results. Raises OtherData on rank 0 (PeerError on the others) as `RunRecord.check` does.
        """
        loop = self.checkpoints.restore(self.student, look=self.record.check)
        path = self.dir / run_dir.CONFIG
        changed = self.parallel.share_world(lambda: config_file.record(settings, path, write_whole))
        if loop is None:
            self.tracker.rewind(-1)
            completions.rewind(-1)
            if changed is not None:
                self.tracker.message(f"no complete checkpoint in {self.dir}: starting from the beginning")
            return 0
        state = state_of(loop)
        prompts.load_state(state.prompts)
        self.student.skips = state.skips
        self.tracker.rewind(loop["step"])
        completions.rewind(loop["step"])
        self.tracker.message(f"resuming after step {loop['step']}")
        for line in changed or []:
            self.tracker.message(f"changed since the last start: {line}")
        for line in self.record.differences(loop):
            self.tracker.message(line)
        self.saved = int(loop["step"])
        return self.saved

    def save(self, step: int, cursor: dict[str, Any]) -> None:
        """A checkpoint after `step`, whose prompts end at `cursor`; nothing if there is one."""
        if step <= self.saved:
            return
        path = self.checkpoints.save(self.student, self.record.loop(step, cursor, self.student.skips))
        self.saved = step
        self.tracker.message(f"saved {path}")

    def export(self, name: str = run_dir.HF_EXPORT, adapter: str = run_dir.ADAPTER) -> None:
        """The student as the Hugging Face directory `name` of the run; with LoRA also its adapters. Collective."""
        out = self.dir / name
        weights, adapters = self.student.export(), self.student.export_adapters()
        if self.parallel.is_main:
            try:
                hf_dir.write(weights, out, like=self.student.path)
                if self.student.lora.rank:
                    base = self.student.path
                    adapter_dir.write(adapters, out.with_name(adapter), self.student.lora, base=base)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"the export {out} could not be written: {error}; is the disk full?") from error
        else:
            drain(weights)
            drain(adapters)
        self.tracker.message(f"exported {out}")
