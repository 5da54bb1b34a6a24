"""What a run needs of a row besides the student's prompt: its answer as tokens, and the prompts that teachers see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_opd.config import AnswersConfig, DataConfig, SourceConfig, TeacherConfig
from megatron_opd.core.types import Prompt
from megatron_opd.models.tokenizer import load_tokenizer
from megatron_opd.prompts.chat import SYSTEM_ROLES, Encoder, Messages, build_encoder, checked
from megatron_opd.prompts.files import as_messages, at_path
from megatron_opd.prompts.mix import Limit, ParsedRow


@dataclass(frozen=True, kw_only=True, slots=True)
class RowReader:
    """Completes prompts that are otherwise ready."""

    encoder: Encoder
    limit: Limit
    """Of what teachers see; it holds for them as for the student."""
    views: tuple[View, ...] = ()
    wants_answers: bool = False
    """Whether answers of the rows are wanted as tokens."""
    has_rows_without: bool = False
    """Whether a row may lack one, instead of an error."""
    max_answer_tokens: int = 0
    cuts: bool = False
    """Cut longer answers, instead of an error."""

    def __call__(self, asked: Sequence[ParsedRow]) -> list[Prompt | None]:
        """The prompts, in order; None for one that a teacher's limit drops. Raises ValueError naming the row."""
        prompts: list[Prompt | None] = [one.prompt for one in asked]
        if self.wants_answers:
            answered = [i for i, one in enumerate(asked) if one.prompt.answer is not None or not self.has_rows_without]
            for i, ids in zip(answered, self._answers([asked[i] for i in answered]), strict=True):
                prompts[i] = replace(asked[i].prompt, answer_ids=ids)
        for view in self.views:
            shown = [_of(one, view.shown) for one in asked]
            for i, ids in enumerate(view.encoder.encode([text for _, text in shown])):
                prompt = prompts[i]
                fits = len(ids) <= self.limit.tokens or view.encoder is not self.encoder  # whose tokens are others
                if not fits and not self.limit.drop:
                    raise ValueError(
                        f"{asked[i].where}: teacher '{view.teacher}' sees a prompt of {len(ids)} tokens, and"
                        f" data.on_too_long is error; the limit is {self.limit.tokens} ({self.limit.why})"
                    )
                if prompt is not None:
                    prompts[i] = view.added_to(prompt, ids, shown[i][0]) if fits else None
        return prompts

    def _answers(self, asked: Sequence[ParsedRow]) -> list[tuple[int, ...]]:
        """What follows the prompt's tokens where the reference is the answer, up to its first end of sequence."""
        turns = [_of(one, self._turn) for one in asked]
        joint = self.encoder.encode([one.rendered + turn for one, turn in zip(asked, turns, strict=True)])
        alone = self.encoder.tokenizer.encode_all(turns, add_special_tokens=False)
        found = []
        for one, both, own in zip(asked, joint, alone, strict=True):
            start = len(one.prompt.token_ids)
            # A tokenizer may join characters across the border; the student meets the prompt's tokens as they are.
            continues = tuple(both[:start]) == one.prompt.token_ids
            found.append(_of(one, lambda _, ids=both[start:] if continues else own: self._ended(ids)))
        return found

    def _turn(self, one: ParsedRow) -> str:
        if not isinstance(one.prompt.answer, str):
            raise ValueError(
                'answers of the data set are trained on (answers.lmbda), so every row needs a text field "answer" (or'
                " the one that answer_field names), or a last message of the assistant"
            )
        reply = one.reply or {"role": "assistant", "content": one.prompt.answer}
        turn = self.encoder.turn(one.messages or one.prompt.text, one.rendered, reply)
        turn.encode()  # half a surrogate pair is no text
        return turn

    def _ended(self, ids: Sequence[int]) -> tuple[int, ...]:
        tokenizer = self.encoder.tokenizer
        end = next((i for i, token in enumerate(ids) if token in tokenizer.eos_ids), None)
        ended = (*ids, tokenizer.eos_id) if end is None else tuple(ids[: end + 1])
        if len(ended) <= self.max_answer_tokens:
            return ended
        if self.cuts:
            return ended[: self.max_answer_tokens]
        raise ValueError(
            f"the answer has {len(ended)} tokens with the end of sequence, more than rollout.max_new_tokens"
            f" ({self.max_answer_tokens}); raise that, or set answers.on_too_long to cut"
        )


class View:
    """The prompt that one teacher sees."""

    def __init__(self, teacher: TeacherConfig, encoder: Encoder) -> None:
        """`encoder` is the student's, or the teacher's where its tokenizer is its own."""
        self.teacher, self.encoder, self.field = teacher.name, encoder, teacher.prompt_field
        self.system_prompt = teacher.system_prompt
        # What a file says must not run as a program, nor an unknown field be nothing.
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        self.template = environment.from_string(teacher.prompt_template) if teacher.prompt_template else None
        if teacher.system_prompt:
            self._try_system_prompt()

    def shown(self, row: ParsedRow) -> tuple[tuple[dict[str, Any], ...], str]:
        """(the messages that are kept of what this teacher sees, if any; its text). Raises ValueError where the row
        lacks what it is made of."""
        asked = self._asked(row)
        rendered = self.encoder.render(asked)
        rendered.encode()  # half a surrogate pair is no text
        return self.encoder.kept(asked), rendered

    def added_to(self, prompt: Prompt, ids: Sequence[int], kept: tuple[dict[str, Any], ...]) -> Prompt:
        """The prompt with what this teacher sees: token ids, and the messages that are `kept`."""
        own = {self.teacher: kept} if kept else {}
        teacher_ids = {**prompt.teacher_ids, self.teacher: tuple(ids)}
        return replace(prompt, teacher_ids=teacher_ids, teacher_messages={**prompt.teacher_messages, **own})

    def _asked(self, row: ParsedRow) -> str | Messages:
        own = self._own(row)
        if isinstance(own, list):
            own = checked(own)
            if own[-1]["role"] == "assistant":
                own.pop()
        if not own or (isinstance(own, str) and not own.strip()):
            raise ValueError(f"the prompt that teacher '{self.teacher}' sees is empty")
        if not isinstance(own, str | list):
            raise ValueError(f"teacher '{self.teacher}' needs a text or messages in the field \"{self.field}\"")
        return self._with_system(own)

    def _try_system_prompt(self) -> None:
        """Once, before any row: a template that takes none refuses every one."""
        try:
            self.encoder.render(self._with_system("?"))
        except ValueError as error:
            raise ValueError(
                f"the system_prompt of teacher '{self.teacher}', tried with one message: {error}"
            ) from None

    def _with_system(self, own: str | Messages) -> str | Messages:
        if not self.system_prompt:
            return own
        messages = [{"role": "user", "content": own}] if isinstance(own, str) else own
        others = messages[1:] if messages[0]["role"] in SYSTEM_ROLES else messages
        return [{"role": "system", "content": self.system_prompt}, *others]

    def _own(self, asked: ParsedRow) -> Any:
        if self.field:
            return as_messages(at_path(asked.fields, self.field))
        if self.template is None:
            return asked.messages or asked.prompt.text
        known = {**asked.fields, "prompt": asked.prompt.text, "answer": asked.prompt.answer}
        try:
            text = self.template.render({name: value for name, value in known.items() if value is not None})
        except Exception as error:  # of any kind: expressions compute with the row's values
            raise ValueError(f"the prompt_template of teacher '{self.teacher}': {error}") from None
        if not asked.messages:
            return text
        return [*asked.messages[:-1], {**asked.messages[-1], "content": text}]


def build_views(
    teachers: Sequence[TeacherConfig], data: DataConfig, source: SourceConfig, encoder: Encoder
) -> tuple[View, ...]:
    """The prompts besides the student's that teachers see of a source; `encoder` is the student's."""
    asked = [teacher for teacher in teachers if teacher.weight_for(source.name) > 0]
    return tuple(
        View(teacher, _own_encoder(teacher, data, encoder) if teacher.tokenizer == "own" else encoder)
        for teacher in asked
        if teacher.has_own_prompt or (teacher.tokenizer == "own" and _is_there(teacher))
    )


def build_row_reader(
    views: tuple[View, ...],
    encoder: Encoder,
    *,
    limit: Limit,
    answers: AnswersConfig,
    max_answer_tokens: int,
    is_trained_on: bool,
    is_measured: bool,
) -> RowReader | None:
    """What the run needs of the rows of a source, which is trained on, or whose answers are only measured
    (train.eval_nll), or neither; None: nothing more than the student's prompt."""
    learns_answers = is_trained_on and answers.lmbda < 1 and not answers.seq_kd
    if not (views or learns_answers or is_measured):
        return None
    return RowReader(
        encoder=encoder,
        limit=limit,
        views=views,
        wants_answers=learns_answers or is_measured,
        has_rows_without=is_measured,
        max_answer_tokens=max_answer_tokens,
        cuts=is_measured or answers.on_too_long == "cut",
    )


def _own_encoder(teacher: TeacherConfig, data: DataConfig, encoder: Encoder) -> Encoder:
    tokenizer = load_tokenizer(teacher.model)
    return build_encoder(data, tokenizer, tools=encoder.tools, is_continued=encoder.is_continued)


def _is_there(teacher: TeacherConfig) -> bool:
    """Whether there is a model at all; that there is none is said where its config.json is looked for."""
    return Path(teacher.model).is_dir()


def _of(asked: ParsedRow, make: Any) -> Any:
    """`make` of a row. Raises ValueError naming it."""
    try:
        return make(asked)
    except ValueError as error:
        raise ValueError(f"{asked.where}: {error}") from None
