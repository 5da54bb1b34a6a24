"""Environments of aviary as its users write them."""

from aviary.core import TaskDataset, fenv


@fenv.start()
def quiz(answer):
    """Guess a number."""
    return f"Guess {answer}.", {"answer": answer}


@quiz.tool()
def guess(number: int, state) -> str:
    """Guess the number.

    Args:
        number: The guess.
        state: What the environment keeps.
    """
    if number < 0:
        raise ValueError("below nothing")
    state.done = number == state.answer
    state.reward = float(state.done)
    return "yes" if state.done else "no"


class Quiz(TaskDataset):
    def __init__(self, size: int = 1, *, odd: bool = False):
        self.size, self.odd = size, odd

    def __len__(self):
        return self.size

    def get_new_env_by_idx(self, idx):
        world = quiz(idx)
        world.exec_tool_calls = _raising(world.exec_tool_calls)
        if self.odd and idx:
            world.tools = []
        return world


def _raising(execute):
    """Let what a tool raises come out of the step, as in environments that leave the default."""

    async def run(message, **settings):
        return await execute(message, **{**settings, "handle_tool_exc": False})

    return run
