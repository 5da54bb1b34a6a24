"""The directories of a run's models on every rank, of the same commits everywhere.

Rank 0 finds out which commit a name means; one rank of each machine downloads, and the others wait for it. A download
ends by itself when the hub does not answer any more, and a rank that is lost is noticed by the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from threading import Thread

from megatron_opd.config.model_names import may_be_name
from megatron_opd.core.parallel import Parallel, PeerError
from megatron_opd.models import hub
from megatron_opd.models.hub import Need

_LOOK_S = 2.0
"""Time between two looks at whether somebody still downloads, in seconds: shorter than any time-out of a run."""
_LONGEST_S = 6 * 3600.0
"""Longest wait of the ranks."""


def settle(
    wanted: Mapping[str, Need], what: Mapping[str, str], parallel: Parallel, *, say: Callable[[str], None]
) -> dict[str, str]:
    """The directory of each model by its name as written. Collective over all ranks.

    `what` has the setting of each. Raises ValueError on a rank that cannot have a model, and PeerError on the others.
    """
    if not any(may_be_name(text) for text in wanted):
        return {text: text for text in wanted}
    found = _in_turn(parallel, parallel.is_main, lambda: hub.directories(wanted, what, say=say))
    names = parallel.share_world(lambda: {text: hub.pinned(text, found[text]) for text in wanted})
    pinned = {names[text]: need for text, need in wanted.items()}
    settings = {names[text]: setting for text, setting in what.items()}
    quiet = say if parallel.is_main else _say_nothing
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    _in_turn(parallel, is_first, lambda: hub.directories(pinned, settings, say=quiet))
    here = _in_turn(parallel, True, lambda: hub.directories(pinned, settings, say=quiet))
    for text, name in names.items():
        if parallel.is_main and name != text:
            say(f"{what[text]}: {text} is the commit {name.rpartition('@')[2]}")
    return {text: here[name] for text, name in names.items()}


def _in_turn(parallel: Parallel, is_mine: bool, find: Callable[[], dict[str, str]]) -> dict[str, str]:
    """The result of `find` on ranks whose turn it is, nothing on the others, which wait. Collective over all ranks."""
    result: dict[str, str] = {}
    failed: list[Exception] = []

    def work() -> None:
        try:
            result.update(find())
        except Exception as error:  # said on this rank, and told to the others
            failed.append(error)

    worker = Thread(target=work, daemon=True, name="models")
    deadline = time.monotonic() + _LONGEST_S

    def is_busy() -> bool:
        if is_mine:
            worker.join(_LOOK_S)
        return worker.is_alive() and time.monotonic() < deadline

    if is_mine:
        worker.start()
    while parallel.any_world(is_busy()):
        pass
    if worker.is_alive():
        hours = f"{_LONGEST_S / 3600:.2g} hours"
        failed.append(
            ValueError(f"the models are not here after {hours}; download them before the run (`hf download`)")
        )
    said = [why for why in parallel.gather_world(str(failed[0]) if failed else "") if why]
    if failed:
        raise failed[0]
    if said:
        raise PeerError(said[0])
    return result


def _say_nothing(_: str) -> None:
    """Rank 0 speaks for all."""
