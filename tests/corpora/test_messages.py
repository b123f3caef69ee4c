"""Records of conversations: what a template drops of them is found, and other forms are read or refused."""

import json

import chats
import pytest
from marked import documents_of, targets_as_text, tokenize

from ted_scale.base.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chats.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
SAYS_CALLS = chats.TURNS.replace("{{ m.content }}", "{{ m.content or '' }}{{ m.tool_calls | tojson if m.tool_calls }}")
SAYS_TOOLS = "{{ tools | tojson if tools }}" + SAYS_CALLS


def with_tools(**more):
    turns = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": 'so "wet"'},
        {"role": "assistant", "content": "yes"},
    ]
    return {"messages": turns, **more}


DROPPED = {
    "calls": (
        chats.TURNS.replace("{{ m.content }}", "{{ m.content or '' }}"),
        with_tools(),
        "the tool calls of turn 2",
    ),
    "answers of tools": (
        SAYS_CALLS.replace("in messages", "in messages if m.role != 'tool'"),
        with_tools(),
        r"turn 3 \(tool",
    ),
    "tools": (SAYS_CALLS, with_tools(tools=[TOOL]), "the tools;"),
    "the second of two tools": (
        "{{ tools[0] | tojson if tools }}" + SAYS_CALLS,
        with_tools(tools=[TOOL, {**TOOL, "function": {**TOOL["function"], "name": "tides"}}]),
        "the tools;",
    ),
    "the second of two calls": (
        SAYS_TOOLS.replace("m.tool_calls | tojson", "m.tool_calls[0] | tojson"),
        {"messages": [{"role": "user", "content": "rain?"}, {"role": "assistant", "tool_calls": [CALL, CALL]}]},
        "the tool calls of turn 2",
    ),
    "parts": (
        chats.TURNS,
        {
            "messages": [
                {"role": role, "content": [{"type": "text", "text": "a cat"}]} for role in ("user", "assistant")
            ]
        },
        r"turn 1 \(user\), whose list of parts it writes as Python does \(make it one text\)",
    ),
    "thoughts": (
        chats.TURNS,
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "thinking": "hm"}]},
        r"thinking of turn 2 \(write",
    ),
    "a turn whose text is elsewhere, too": (
        chats.DROPS,
        {"messages": [{"role": role, "content": "a cat"} for role in ("system", "user", "assistant")]},
        r"turn 1 \(system",
    ),
}


@pytest.mark.parametrize("tools", ["[" * 100_000, '{"name": "a"}', "3"], ids=["too deep", "an object", "a number"])
def test_tools_that_are_no_list_are_a_sentence(tmp_path, folder, tools):
    (tmp_path / "t.jinja").write_text(SAYS_TOOLS)
    source = chats.write_records(tmp_path / "a.jsonl", [with_tools(tools=tools)])
    with pytest.raises(UserError, match=r'a\.jsonl:1 must have a (JSON )?list in "tools".* or pass --on-error skip'):
        tokenize(folder, tmp_path / "c", source, "--targets", "last", "--chat-template", tmp_path / "t.jinja")


@pytest.mark.parametrize("case", DROPPED)
def test_what_a_template_drops_is_found_whatever_it_is(tmp_path, folder, case):
    template, record, words = DROPPED[case]
    (tmp_path / "t.jinja").write_text(template)
    source = chats.write_records(tmp_path / "a.jsonl", [record])
    with pytest.raises(UserError, match=rf"a\.jsonl:1 must be shown whole .* it drops or changes .*{words}"):
        tokenize(folder, tmp_path / "c", source, "--targets", "last", "--chat-template", tmp_path / "t.jinja")


def test_calls_of_tools_are_targets_and_tools_may_be_the_text_of_a_list(tmp_path, folder):
    (tmp_path / "t.jinja").write_text(SAYS_TOOLS)
    options = ("--targets", "assistant", "--chat-template", tmp_path / "t.jinja")
    made = [
        documents_of(
            tokenize(folder, tmp_path / name, chats.write_records(tmp_path / f"{name}.jsonl", [record]), *options)
        )
        for name, record in (("list", with_tools(tools=[TOOL])), ("text", with_tools(tools=json.dumps([TOOL]))))
    ]
    assert made[0] == made[1]
    text = targets_as_text(folder, made[0][0])
    assert '"Oslo"}}}]<|im_end|>\n]' in text and 'tool\nso "wet"<|im_end|>' in text and "assistant\n[yes<" in text


def test_thoughts_that_are_written_and_those_of_an_earlier_answer_are_no_reason(tmp_path, folder):
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "no"), ("assistant", "so")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[1]["reasoning_content"] = messages[3]["reasoning_content"] = messages[3]["thinking"] = "hm"
    says = chats.TURNS.replace("{{ m.content }}", "{{ m.reasoning_content if loop.last }}{{ m.content }}")
    (tmp_path / "t.jinja").write_text(says)
    source = chats.write_records(tmp_path / "a.jsonl", [{"messages": messages}])
    (document,) = documents_of(
        tokenize(folder, tmp_path / "c", source, "--targets", "last", "--chat-template", tmp_path / "t.jinja")
    )
    assert targets_as_text(folder, document).endswith("[hmso<|im_end|>\n]")


def test_a_table_gives_no_tool_the_keys_of_another(tmp_path, folder):
    import pyarrow
    from pyarrow import parquet

    other = {"type": "function", "function": {"name": "weather", "arguments": {"day": "today"}}}
    records = [with_tools(tools=[TOOL]), with_tools(tools=[TOOL])]
    records[1]["messages"][1] = {"role": "assistant", "tool_calls": [other]}
    (tmp_path / "t.jinja").write_text(SAYS_TOOLS.replace("tools | tojson", "'weather markedtool0x'"))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    source, options = tmp_path / "a.parquet", ("--targets", "last", "--chat-template", tmp_path / "t.jinja")
    said = [targets_as_text(folder, one) for one in documents_of(tokenize(folder, tmp_path / "c", source, *options))]
    assert '{"city": "Oslo"}' in said[0] and '{"day": "today"}' in said[1]


UNASKED = chats.TURNS.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
ENDS_LAST = chats.TURNS.replace(
    "<|im_end|>\n", "<|im_end|>{{ '<|endoftext|>' if loop.last and m.role == 'assistant' }}\n"
)
HI, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize("targets", ["assistant", "last", "completion"])
def test_a_generation_prompt_behind_the_answer_is_no_target(tmp_path, folder, targets):
    record = {"prompt": [HI], "completion": [YES]} if targets == "completion" else {"messages": [HI, YES]}
    source, file = chats.write_records(tmp_path / "a.jsonl", [record]), tmp_path / "t.jinja"
    options = ("--targets", targets, "--chat-template", file)
    file.write_text(UNASKED)
    with pytest.raises(UserError, match=r"a\.jsonl:1 must .* generation prompt behind it; put that into {% if add_gen"):
        tokenize(folder, tmp_path / "c", source, *options)
    file.write_text(ENDS_LAST)  # what ends a conversation in another way is a target
    (document,) = documents_of(tokenize(folder, tmp_path / "c", source, *options))
    assert targets_as_text(folder, document).endswith("[yes<|im_end|><|endoftext|>\n]")


@pytest.mark.parametrize("template", [chats.TURNS, chats.MARKED], ids=["plain", "marked"])
def test_an_answer_of_weight_0_is_no_target(tmp_path, folder, template):
    (tmp_path / "t.jinja").write_text(template)
    source = chats.write_records(tmp_path / "a.jsonl", [{"messages": [HI, {**YES, "weight": 0}, HI, YES]}])
    options = ("--targets", "assistant", "--chat-template", tmp_path / "t.jinja")
    (document,) = documents_of(tokenize(folder, tmp_path / "c", source, *options))
    said = targets_as_text(folder, document)
    assert said.count("[") == 1 and said.index("[yes") > said.index("assistant\nyes")
    half = chats.write_records(tmp_path / "b.jsonl", [{"messages": [HI, {**YES, "weight": 0.5}]}])
    with pytest.raises(UserError, match=r"b\.jsonl:1 must have 0 or 1 as the \"weight\" of a message, but has 0\.5"):
        tokenize(folder, tmp_path / "d", half, *options)


REFUSED_PAIRS = {
    "nothing": ({"prompt": "hi", "completion": ""}, "completion with text"),
    "white space": ({"prompt": "hi", "completion": " \n"}, "completion with text"),
    "a user's turn": (
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "completion": [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "no"}],
        },
        'turns of the assistant alone in "completion", but has one of user',
    ),
    "an answer of weight 0": ({"prompt": [HI], "completion": [{**YES, "weight": 0}]}, "one has .weight.: 0"),
    "a dropped turn": (
        {
            "prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}],
            "completion": [{"role": "assistant", "content": "yes"}],
        },
        r"drops or changes turn 1 \(system\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED_PAIRS)
def test_a_pair_that_would_teach_something_else_is_refused(tmp_path, folder, case):
    record, words = REFUSED_PAIRS[case]
    (tmp_path / "drops.jinja").write_text(chats.DROPS)
    source = chats.write_records(tmp_path / "a.jsonl", [record])
    options = ("--targets", "completion", "--chat-template", tmp_path / "drops.jinja")
    with pytest.raises(UserError, match=rf"a\.jsonl:1 must .*{words}"):
        tokenize(folder, tmp_path / "c", source, *options)


def test_files_of_windows_are_read_as_any_others(tmp_path, folder):
    source, records = tmp_path / "a.jsonl", chats.conversations(3)
    source.write_text("".join(json.dumps(record) + "\r\n" for record in records), encoding="utf-8-sig", newline="")
    theirs = documents_of(tokenize(folder, tmp_path / "c", source, "--targets", "assistant"))
    plain = chats.write_records(tmp_path / "b.jsonl", records)
    assert theirs == documents_of(tokenize(folder, tmp_path / "d", plain, "--targets", "assistant"))


def test_records_of_another_form_are_refused_with_the_keys_that_they_have(tmp_path, folder):
    source = chats.write_records(tmp_path / "a.jsonl", [{"conversations": [{"from": "human", "value": "hi"}]}])
    with pytest.raises(
        UserError, match=r'a list of messages in "messages", but the keys are conversations; docs/fine_tun'
    ):
        tokenize(folder, tmp_path / "c", source, "--targets", "assistant")
