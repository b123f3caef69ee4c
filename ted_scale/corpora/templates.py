"""A chat template, and where in what it renders the assistant speaks.

The template says so itself by `{% generation %}`, or it is asked for the conversation up to a turn: what it writes before the
answer and after it must be how the whole conversation begins. Note: a template is a program from somebody else. transformers
runs it in jinja2's sandbox, which reaches no file, no module and nothing but the messages (docs/security.md).
"""

import re
from datetime import date
from functools import cache
from itertools import takewhile
from typing import NamedTuple

from ted_scale.base.errors import shown
from ted_scale.corpora.messages import refuse_dropped

OWN_TEMPLATE = "give one that marks the answers with {% generation %} by --chat-template FILE"
PLAIN = frozenset({"role", "content"})
MARKS, DAY = re.compile(r"\{%-?\s*generation\s*-?%\}"), re.compile("strftime_now")

Span = tuple[int, int]  # characters


class Template(NamedTuple):
    text: str
    values: dict[str, str]  # the special tokens by the names that templates know them by
    day: date  # what a template that asks for the time is told, whenever and wherever it is rendered
    unasked: bool = False  # writes_unasked, which is known once the rest is

    @property
    def marks(self) -> bool:
        return holds(self.text, MARKS)

    @property
    def asks_for_day(self) -> bool:
        return holds(self.text, DAY)

    def render(self, messages: list[dict], tools: list | None, *, prompt: bool = False) -> str:
        """Messages that are roles and contents alone go to the template itself: transformers copies any others, and gives them
        more names, which takes as long as many a template."""
        if tools is None and all(map(PLAIN.issuperset, messages)):
            given = {"tools": None, "documents": None, "add_generation_prompt": prompt, **self.values}
            try:
                return self.compiled().render(messages=messages, **given)
            except Exception as error:  # whatever the template raises
                raise refusal(error) from None
        return self._rendered(messages, tools, add_generation_prompt=prompt)[0][0]

    def marked(self, messages: list[dict], tools: list | None) -> tuple[str, list[Span]]:
        """(text, what the template itself marks in it)"""
        texts, spans = self._rendered(messages, tools, return_assistant_tokens_mask=True)
        return texts[0], [(begin, end) for begin, end in spans[0] if begin < end]

    def compiled(self):
        made = compile_once(self.text)
        if self.asks_for_day:  # the compiled template is cached; as a value, a function would not pass
            made.globals["strftime_now"] = self.day.strftime
        return made

    def _rendered(self, messages: list[dict], tools: list | None, **options) -> tuple[list[str], list[list[Span]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            self.compiled()
            return render_jinja_template(
                conversations=[messages], tools=tools, chat_template=self.text, **options, **self.values
            )
        except Exception as error:  # whatever the template raises
            raise refusal(error) from None


@cache
def compile_once(text: str):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(text)  # by a cache of its own, which render_jinja_template uses, too


@cache
def holds(text: str, pattern: re.Pattern) -> bool:
    """A template may be long, and is asked with every conversation."""
    return bool(pattern.search(text))


def refusal(error: Exception) -> ValueError:
    return ValueError(
        f"must be a conversation that the chat template takes, but it says: {' '.join(str(error).split())[:300]}; correct it"
    )


def answers(template: Template, messages: list[dict], tools: list | None, last: bool) -> tuple[str, list[Span]]:
    """(text, where the assistant answers in it: each time, or the last time; an answer of weight 0 does not count). A ValueError
    has the rest of a sentence."""
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    taught = [turn for turn in (turns[-1:] if last else turns) if weighs(messages[turn])]
    if turns and not taught:
        raise ValueError('must have an answer that counts, but each has "weight": 0; leave it out')
    if template.marks:
        text, spans = template.marked(messages, tools)
        several = len(spans) > len(turns)  # a template may mark an answer in pieces, which belong to no one turn
        if len(spans) < len(turns) or (several and (last or len(taught) < len(turns))):
            raise ValueError(
                f"must have {len(turns)} answers that the chat template marks with {{% generation %}}, but it marks {len(spans)}; "
                "correct the template"
            )
        spans = spans if several else [spans[turns.index(turn)] for turn in taught]
    else:
        text = template.render(messages, tools)
        spans = [answer(template, messages, tools, turn, text) for turn in taught]
    refuse_dropped(template.text, template.render, text, messages, tools)
    return text, spans


def weighs(message: dict) -> bool:
    """OpenAI's "weight" of an answer, 0 or 1."""
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise ValueError(f'must have 0 or 1 as the "weight" of a message, but has {shown(weight)}; correct it')
    return bool(weight)


def writes_unasked(template: Template) -> bool:
    """Whether the generation prompt stands behind every conversation, as in Llama 3's first template: it would be learned as the
    answer's end."""
    turns = [{"role": role, "content": f"a {role}"} for role in ("user", "assistant", "user")]
    try:
        asked, whole, more = (template.render(turns[:count], None) for count in (1, 2, 3))
    except ValueError:  # said of a conversation, with its place
        return False
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(whole, more, strict=False))
    extra = whole[len(list(alike)) :]
    return bool(extra) and whole.startswith(asked) and asked.endswith(extra)


def answer(template: Template, messages: list[dict], tools: list | None, turn: int, text: str, turns: int = 1) -> Span:
    """Where `text`, which the template made of all messages, has those from `turn` on, which are so many."""
    if template.unasked:
        raise ValueError(
            "must be written by a chat template that ends with the answer, but this one writes the generation prompt behind it; "
            "put that into {% if add_generation_prompt %} and give the template by --chat-template FILE"
        )
    before, stop = template.render(messages[:turn], tools, prompt=True), turn + turns
    after = text if stop == len(messages) else template.render(messages[:stop], tools)
    if not (text.startswith(after) and after.startswith(before) and len(before) < len(after)):
        earlier = "" if stop == len(messages) else "take --targets last, or "
        raise ValueError(
            f"must be written by a chat template that begins with the same text whatever follows, but turn {turn + 1} is another "
            f"at the end than within the conversation, or than after the generation prompt; {earlier}{OWN_TEMPLATE}"
        )
    return len(before), len(after)
