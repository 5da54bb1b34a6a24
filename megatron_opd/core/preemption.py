"""Being asked to make room: a signal to a rank, agreement of all at the next step boundary, a checkpoint, an exit code.

Slurm sends such a signal some minutes before it takes the nodes away (`#SBATCH --signal`, a partition's grace time). A
rank only notes it: between two steps everything that a checkpoint needs is at hand, and in the middle of one it is not.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

from megatron_opd.core import lifeline

EXIT_CODE = 75
"""Of a run that has made room and wants to go on later: EX_TEMPFAIL in sysexits.h."""


class Preempted(Exception):
    """All ranks have agreed to stop here; everything trained is saved."""


class Notice:
    """Whether this process was asked to make room. It listens to signals from its construction on, until `close`."""

    def __init__(self, signals: tuple[signal.Signals, ...]) -> None:
        self.asked = False
        self.signals = signals
        for number in signals:
            signal.signal(number, self._note)

    def close(self) -> None:
        """From here on the process ends anyway. Python gives a signal its deadly default back while it shuts down, but
        leaves one alone that is ignored; warnings may come more than once."""
        for number in self.signals:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, *_: object) -> None:
        self.asked = True


def warnings(environ: Mapping[str, str] = os.environ) -> tuple[signal.Signals, ...]:
    """The signals that are warnings to a rank, by who has started it.

    SIGUSR1 always is. Slurm also sends SIGTERM, and kills what is still there later. To any other launcher SIGTERM is
    how the ranks that are left are ended, and those may be waiting for one that is gone.
    """
    launchers = {"TORCHELASTIC_RUN_ID", lifeline.LAUNCHER}
    is_job_step = "SLURM_PROCID" in environ and not launchers & set(environ)
    return (signal.SIGUSR1, signal.SIGTERM) if is_job_step else (signal.SIGUSR1,)
