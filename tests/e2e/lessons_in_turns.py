"""An environment of a user's own: the tools of the example, which end the process where a test wants that."""

import asyncio
import os
import signal

from megatron_opd.config import EnvironmentConfig
from megatron_opd.rollout.environments.build import build_kind

KIND = build_kind(EnvironmentConfig(name="tools", tools=["calculator"]))
ANSWERED = []


class Lessons:
    """The calculator. KILL_AT is how many turns it answers before the process is killed, NAP_S how long each takes."""

    tools = KIND.tools

    def __init__(self):
        self._tools = KIND.make()

    async def start(self, prompt):
        await self._tools.start(prompt)

    async def answer(self, turn):
        ANSWERED.append(turn.number)
        if len(ANSWERED) == int(os.environ.get("KILL_AT", "0")):
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(float(os.environ.get("NAP_S", "0")) * (len(ANSWERED) % 3))
        return await self._tools.answer(turn)

    async def close(self):
        await self._tools.close()
