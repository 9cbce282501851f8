"""Prompts: the built-in set or a user's file, as tokens in left-padded batches.

The built-in set (`prompts.jsonl`, written for this project) holds 39 prompts in eleven
languages: reasoning, code in seven languages, mathematics with worked steps, long texts to summarize,
tool calls, structured output, dialogue. Many of them contain an assistant's answer before the last
question, so that a run that generates nothing sees both sides of a conversation too.

A user's file has the same form, one JSON object per line with `messages` (and `tools`), `prompt` or
`text`, and a `topic` if there are several kinds of prompts; or it is plain text with a prompt per line.
`messages` and `prompt` go through the tokenizer's chat template, `text` is taken as it is.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fp8lib import Fp8Error
from fp8lib.checkpoint.untrusted import printable

if TYPE_CHECKING:  # a broken prompts file is refused without importing torch
    import torch

BUILT_IN = Path(__file__).with_name("prompts.jsonl")

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: a conversation, or raw text.

    Attributes:
        where: file and line, for messages.
        messages: dicts with `role` and `content`, as chat templates take them; None for raw text.
        tools: function schemas the conversation may call.
        text: raw text; None for a conversation.
        topic: what kind of prompt it is, if its file says so.
    """

    where: str
    messages: list[dict] | None = None
    tools: list[dict] | None = None
    text: str | None = None
    topic: str | None = None

    def plain(self) -> str:
        """The prompt without a template: the contents of its messages, a blank line between them."""
        if self.messages is None:
            return self.text
        return "\n\n".join(filter(None, (_content(m.get("content")) for m in self.messages)))


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts that run together.

    Attributes:
        ids: int64 [prompts, tokens], padded on the left.
        mask: bool of the same shape; False where a prompt is padded.
        prompts: [prompts], which of the prompts they are.
    """

    ids: "torch.Tensor"
    mask: "torch.Tensor"
    prompts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())

    def to_model(self, device: object) -> dict:
        """The mask and positions that make a padded prompt run like an unpadded one.

        No mask where there is no padding: attention then takes the causal kernel that needs none.
        """
        mask = self.mask.to(device)
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return {"attention_mask": None if self.mask.all() else mask.long(), "position_ids": positions}


# --- reading -----------------------------------------------------------------------------------


def read_prompts(path: Path | None) -> list[Prompt]:
    """Read a prompts file, or the built-in set if path is None.

    Raises:
        Fp8Error: unreadable, empty, or a line that is no prompt; names the line.
    """
    path = path or BUILT_IN
    shown = printable(path)
    if path.suffix == ".json":
        raise Fp8Error(f"{shown}: give text with a prompt per line, or .jsonl with a JSON object per line")
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise Fp8Error(f"{shown}: cannot be read ({error.strerror})") from None
    read = _from_json if path.suffix == ".jsonl" else _from_text
    prompts = []
    for number, line in enumerate(lines, start=1):
        where = f"{shown}, line {number}"
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise Fp8Error(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        if text:
            prompts.append(read(text, where))
    if not prompts:
        raise Fp8Error(f"{shown}: holds no prompt; put one on each line")
    return prompts


def _from_text(line: str, where: str) -> Prompt:
    return Prompt(where, messages=[{"role": "user", "content": line}])


def _from_json(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Fp8Error(f"{where}: not valid JSON ({printable(error)})") from None
    if not isinstance(entry, dict) or not entry.keys() & {"messages", "prompt", "text"}:
        raise Fp8Error(f"{where}: needs a JSON object with messages, prompt or text")
    topic = entry["topic"] if isinstance(entry.get("topic"), str) else None
    if "messages" in entry:
        messages = _checked(entry["messages"], where)
        return Prompt(where, messages=messages, tools=entry.get("tools"), topic=topic)
    key = "prompt" if "prompt" in entry else "text"
    if not isinstance(entry[key], str) or not entry[key].strip():
        raise Fp8Error(f"{where}: {key} is not a text")
    prompt = Prompt(where, text=entry[key]) if key == "text" else _from_text(entry[key], where)
    return replace(prompt, topic=topic)


def _checked(messages: object, where: str) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise Fp8Error(f"{where}: messages is not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Fp8Error(f"{where}: a message needs a role and a content")
        if not isinstance(message.get("content"), str | list) and "tool_calls" not in message:
            raise Fp8Error(f"{where}: a message of the {printable(message['role'])} has no content")
    return messages


def _content(content: str | list | None) -> str:
    """Text of a message; of a list of parts, the parts that are text."""
    if isinstance(content, list):
        return "\n".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    return content or ""


# --- tokens ------------------------------------------------------------------------------------


def require_tokenizer(root: Path) -> None:
    """Refuse a model directory without a tokenizer, before anything is loaded.

    Raises:
        Fp8Error: there is none.
    """
    if not any((root / name).is_file() for name in _TOKENIZER_FILES):
        raise Fp8Error(
            f"{printable(root)}: no tokenizer in it (tokenizer.json); "
            "copy the tokenizer files of the model it was made from"
        )


def tokenize(prompts: Iterable[Prompt], tokenizer, chat_template: bool, max_tokens: int) -> list[list[int]]:
    """Token ids of every prompt.

    Args:
        prompts: what to tokenize.
        tokenizer: of transformers.
        chat_template: use the tokenizer's template if it has one.
        max_tokens: prompts are cut to their first so many tokens.

    Raises:
        Fp8Error: the template refuses a conversation, or a prompt has no tokens.
    """
    chat_template = chat_template and bool(tokenizer.chat_template)
    result = []
    for prompt in prompts:
        if prompt.messages is not None and chat_template:
            text, special = _templated(prompt, tokenizer), False  # the template holds the special tokens
        else:
            text, special = prompt.plain(), True
        ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"][:max_tokens]
        if not ids:
            raise Fp8Error(f"{prompt.where}: no token in it")
        result.append(ids)
    return result


def _templated(prompt: Prompt, tokenizer) -> str:
    asks = prompt.messages[-1]["role"] != "assistant"
    try:
        return tokenizer.apply_chat_template(
            prompt.messages, tools=prompt.tools, add_generation_prompt=asks, tokenize=False
        )
    except Exception as error:  # a template is a program of its own and may raise anything
        raise Fp8Error(
            f"{prompt.where}: the chat template refuses it ({printable(error)}); "
            "change the prompt, or give --no_chat_template"
        ) from error


def make_batches(prompts: Sequence[Sequence[int]], batch_size: int, max_tokens: int, pad: int) -> list[Batch]:
    """Prompts of similar length together, the longest first, so that running out of memory shows at once.

    Args:
        prompts: token ids.
        batch_size: prompts in a batch, at most.
        max_tokens: tokens in a batch of two or more, padding included, at most: what a batch needs beside
            the weights is then what the longest prompt needs alone.
        pad: id to pad with. It is masked: no statistic and no other token sees it.
    """
    import torch

    groups: list[list[int]] = []
    for number in sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True):
        fits = groups and len(groups[-1]) < batch_size
        if fits and len(prompts[groups[-1][0]]) * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(number)
        else:
            groups.append([number])
    batches = []
    for group in groups:
        rows = [list(prompts[number]) for number in group]
        width = len(rows[0])
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        batches.append(Batch(ids, torch.arange(width) >= (width - lengths)[:, None], tuple(group)))
    return batches


def divide(batches: Sequence[Batch], ranks: int) -> list[list[Batch]]:
    """Batches for each of so many processes: each to the one with the fewest tokens so far.

    Batches stay whole, because the size of a matrix product decides its last bits.
    """
    shares: list[list[Batch]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for batch in batches:
        rank = tokens.index(min(tokens))
        shares[rank].append(batch)
        tokens[rank] += batch.ids.numel()
    return shares
