"""What can go wrong with a server, by what to do about it."""

from __future__ import annotations

from megatron_opd.core.protocols import Lost


class SGLangError(Lost):
    """Any failure of a request. `kind` is its name in the metrics."""

    kind = "failed"


class Refused(SGLangError):
    """The request is wrong, or the server was started without what it needs: sending it again cannot help."""

    kind = "refused"


class Unfit(Refused):
    """Trainer and servers are not set up for each other: neither another try nor another server can help."""


class Down(SGLangError):
    """No connection, a lost one, no answer in time, or an internal error: another server may do better."""

    kind = "down"


class BadAnswer(SGLangError):
    """The server answered, but with something that is not an answer to what was asked."""

    kind = "bad_answer"


RETRIED = (Down, BadAnswer)
