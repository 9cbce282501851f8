"""Prompts: the built-in set, files of a user, templates, and the batches they run in."""

import json
import re

import pytest
import torch
import transformers

from fp8lib import Fp8Error
from fp8lib.model.prompts import BUILT_IN, make_batches, read_prompts, require_tokenizer, tokenize


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return transformers.AutoTokenizer.from_pretrained(checkpoint("dense", tokenizer=True))


# --- the built-in set --------------------------------------------------------------------------


def test_the_built_in_set_covers_what_such_models_are_used_for():
    entries = [json.loads(line) for line in BUILT_IN.read_text(encoding="utf-8").splitlines()]
    assert len(read_prompts(None)) == len(entries) >= 24
    topics = {e["topic"] for e in entries}
    assert topics >= {
        "reasoning", "code", "mathematics", "multilingual", "long context", "tool calls",
        "structured output", "dialogue",
    }  # fmt: skip
    assert len({e["language"] for e in entries} - {"en"}) >= 6
    assert len({e["messages"][-1]["content"] for e in entries}) == len(entries), "each once"
    text = "\n".join(m["content"] for e in entries for m in e["messages"])
    code = set(re.findall(r"^```(\w+)$", text, re.M))
    assert code >= {"python", "cpp", "rust", "typescript", "sql", "go", "bash"}
    tools = [e for e in entries if e["topic"] == "tool calls"]
    assert all(e["tools"] for e in tools)
    assert any(m.get("tool_calls") for e in tools for m in e["messages"])
    assert any(m["role"] == "tool" for e in tools for m in e["messages"])
    assert any(len([m for m in e["messages"] if m["role"] == "user"]) >= 3 for e in entries)
    passage = next(e for e in entries if e["topic"] == "long context")["messages"][0]["content"]
    assert len(passage.split()) > 1000, "a long text, about 1,700 tokens of a real tokenizer"


def test_the_built_in_set_asks_for_an_answer_each_time():
    assert all(p.messages[-1]["role"] == "user" for p in read_prompts(None))


def test_the_built_in_set_passes_a_real_template(tokenizer):
    ids = tokenize(read_prompts(None), tokenizer, True, 100_000)
    assert all(tokenizer.decode(row).endswith("<|im_start|>assistant\n") for row in ids)


# --- files -------------------------------------------------------------------------------------


def test_a_text_file_has_a_prompt_per_line(tmp_path, tokenizer):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffWhat is a tide?\r\n\n  Erkläre Gezeiten.  \n".encode())
    prompts = read_prompts(path)
    assert [p.messages for p in prompts] == [
        [{"role": "user", "content": "What is a tide?"}],
        [{"role": "user", "content": "Erkläre Gezeiten."}],
    ]
    assert prompts[1].where == f"{path}, line 3"


def test_a_jsonl_file_has_messages_a_prompt_or_a_text(tmp_path, tokenizer):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]},
        {"prompt": "P"},
        {"text": "raw <|im_end|>"},
        {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    prompts = read_prompts(path)

    def texts(template: bool) -> list[str]:
        return [tokenizer.decode(row) for row in tokenize(prompts, tokenizer, template, 1000)]

    start, end = "<|im_start|>", "<|im_end|>\n"
    asks = f"{start}assistant\n"
    assert texts(True) == [
        f"{start}system\nS{end}{start}user\nU{end}{asks}",
        f"{start}user\nP{end}{asks}",
        "raw <|im_end|>",
        f"{start}user\nU{end}{start}assistant\nA{end}",  # complete: asks for nothing
    ]
    assert texts(False) == ["S\n\nU", "P", "raw <|im_end|>", "U\n\nA"]


def test_without_a_chat_template_the_text_is_taken_as_it_is(tmp_path, tokenizer):
    path = tmp_path / "prompts.txt"
    path.write_text("Hello")
    plain = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    assert [plain.decode(row) for row in tokenize(read_prompts(path), plain, True, 100)] == ["Hello"]


def test_content_may_be_a_list_of_parts(tmp_path, tokenizer):
    path = tmp_path / "prompts.jsonl"
    parts = [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    assert read_prompts(path)[0].plain() == "one\ntwo"


def test_long_prompts_are_cut_to_their_first_tokens(tmp_path, tokenizer):
    path = tmp_path / "prompts.txt"
    path.write_text("abcdef")
    assert tokenize(read_prompts(path), tokenizer, False, 4) == [tokenizer("abcd")["input_ids"]]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.txt", b"", "p.txt: holds no prompt"),
        ("p.txt", b"\n \n\t\n", "p.txt: holds no prompt"),
        ("p.txt", b"fine\n\xff\xfe\n", "p.txt, line 2: not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "p.jsonl, line 2: not valid JSON"),
        ("p.jsonl", b"[" * 200_000, "p.jsonl, line 1: not valid JSON"),
        ("p.jsonl", b'\n"text"', "p.jsonl, line 2: needs a JSON object with messages, prompt or text"),
        ("p.jsonl", b'{"promt": "a"}', "line 1: needs a JSON object with messages, prompt or text"),
        ("p.jsonl", b'{"prompt": ""}', "line 1: prompt is not a text"),
        ("p.jsonl", b'{"text": 3}', "line 1: text is not a text"),
        ("p.jsonl", b'{"messages": []}', "line 1: messages is not a list of messages"),
        ("p.jsonl", b'{"messages": ["hi"]}', "line 1: a message needs a role and a content"),
        ("p.jsonl", b'{"messages": [{"content": "x"}]}', "line 1: a message needs a role"),
        ("p.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: a message of the user has no content"),
        ("p.json", b"[]", "give text with a prompt per line, or .jsonl"),
    ],
)
def test_a_broken_prompts_file_is_refused_with_its_line(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(Fp8Error) as refused:
        read_prompts(path)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_prompts_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(Fp8Error, match=r"none\.txt: cannot be read \(No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(Fp8Error, match=r"cannot be read \(Is a directory"):
        read_prompts(tmp_path)


def test_a_prompt_that_the_template_refuses_is_named(tmp_path, tokenizer):
    path = tmp_path / "prompts.jsonl"
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}, call]}))
    with pytest.raises(Fp8Error, match=r"prompts\.jsonl, line 1: the chat template refuses it .*--no_chat"):
        tokenize(read_prompts(path), tokenizer, True, 100)


def test_a_directory_without_a_tokenizer_is_refused(checkpoint):
    require_tokenizer(checkpoint("dense", tokenizer=True))
    with pytest.raises(Fp8Error, match=r"no tokenizer in it \(tokenizer\.json\); copy"):
        require_tokenizer(checkpoint("dense"))


# --- batches -----------------------------------------------------------------------------------


def test_batches_are_padded_on_the_left_and_hold_prompts_of_similar_length():
    prompts = [[1] * 3, [2] * 8, [3] * 4, [4] * 7]
    batches = make_batches(prompts, 2, 100, 9)
    assert [b.ids.tolist() for b in batches] == [
        [[2] * 8, [9] + [4] * 7],
        [[3] * 4, [9] + [1] * 3],
    ]
    assert [b.mask.tolist() for b in batches] == [
        [[True] * 8, [False] + [True] * 7],
        [[True] * 4, [False] + [True] * 3],
    ]
    assert [b.tokens for b in batches] == [15, 7]


def test_a_batch_holds_no_more_tokens_than_the_longest_prompt_may():
    prompts = [[1] * 100, [2] * 40, [3] * 40, [4] * 20, [5] * 20]
    shapes = [tuple(b.ids.shape) for b in make_batches(prompts, 8, 100, 0)]
    assert shapes == [(1, 100), (2, 40), (2, 20)]


def test_a_padded_prompt_has_the_positions_of_an_unpadded_one():
    batch = make_batches([[1] * 3, [2] * 5], 2, 100, 0)[0]
    inputs = batch.to_model("cpu")
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert torch.equal(inputs["attention_mask"], batch.mask.long())
    assert make_batches([[1] * 3], 2, 100, 0)[0].to_model("cpu")["attention_mask"] is None
