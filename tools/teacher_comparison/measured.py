"""One model against both teachers, by source: run by `compare_teachers.py` as `measured.py FOLDER`.

The trainer's own evaluation, once for each source. Every model is measured with both teachers at full weight, whatever
it learnt from.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from megatron_opd.config.file import load
from megatron_opd.student import cpu, groups
from megatron_opd.tracking.tracker import Tracker
from megatron_opd.trainer.preflight import read_inputs


def main(folder: str) -> None:
    """Prints the metrics by source, on one line."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    cpu.enable()
    from megatron_opd.trainer.held_out import HeldOut
    from megatron_opd.trainer.loop import Run

    asked = json.loads((Path(folder) / "measure.json").read_text())
    config = load(asked["config"], asked["overrides"])
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    parallel = groups.start(config.parallel, config.run)
    inputs = read_inputs(config)
    tracker = Tracker()
    run = Run(config, parallel, inputs, tracker)
    run.sync()
    found = {}
    for source, prompts in inputs.eval:
        only = dataclasses.replace(inputs, eval=[(source, prompts)])
        held_out = HeldOut(config.train, config.loss, config.teachers, only, run.experience, tracker)
        held_out.directory = Path(asked["answers"]) / source.name
        held_out.directory.mkdir(parents=True, exist_ok=True)
        metrics = held_out.evaluate(run.student, run.objective, step=1)
        found[source.name] = {
            name.removeprefix("eval/").removesuffix(f"/{source.name}"): value
            for name, value in metrics.items()
            if not name.endswith("/all")
        }
    print(json.dumps(found), flush=True)
    run.close()
    groups.stop()


if __name__ == "__main__":
    main(sys.argv[1])
