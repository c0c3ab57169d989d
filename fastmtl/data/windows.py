"""Windows over pairs of a question and a context: overlapping parts of the context.

Each window is a sequence of its own with the whole question, as the special tokens of the tokenizer
join a pair. The first window begins with the context; the next begins `stride` tokens before the
end of the one before; the last ends with the context. Source: Devlin et al. 2018, "BERT", its
program run_squad.py; the windows are those of `return_overflowing_tokens` of Hugging Face's
tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastmtl.config.types import SpanConfig
from fastmtl.data.encode import state_kept
from fastmtl.data.places import Place
from fastmtl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS_AT_ONCE = 512  # an Encoding takes many times the memory of its arrays
Encoded = tuple[np.ndarray, np.ndarray]  # token ids int32 [t], first character and end of each [t, 2]


@dataclass(frozen=True)
class Template:
    """The special tokens around a question and a context, int32, and the token types.

    second: the number of special tokens before the context that have token type 1; -1 if all tokens
    have type 0.
    """

    before: np.ndarray
    between: np.ndarray
    after: np.ndarray
    second: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, path: Place | str) -> Template:
        """Return the template of a tokenizer. Raises UserError for other token types than 0, 1."""
        (pair,) = tokenizer(["a"], ["a"], return_token_type_ids=True).encodings
        of_question, of_context = ([i for i, s in enumerate(pair.sequence_ids) if s == part] for part in (0, 1))
        ids, types = np.array(pair.ids, np.int32), list(pair.type_ids)
        ends = of_question[-1] + 1, of_context[0]
        known = all(kind == 0 for kind in types) or (
            types == sorted(types) and types[: ends[0]] == [0] * ends[0] and types[ends[1]] == types[-1] == 1
        )
        if not known:
            raise UserError(
                f"{path}: the encoder's tokenizer gives token types other than 0 for a first text and 1 for a second; "
                "fix the post_processor of its tokenizer.json"
            )
        parts = ids[: of_question[0]], ids[slice(*ends)], ids[of_context[-1] + 1 :]
        return cls(*parts, sum(types[slice(*ends)]) if any(types) else -1)

    @property
    def special(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


def windows(
    questions: Sequence[str],
    contexts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: SpanConfig,
    max_length: int,
    path: Place | str,
) -> tuple[dict[str, np.ndarray], int]:
    """Return the arrays of the windows of all pairs, and how many have a question that is cut.

    The arrays are as in `Encode`: every token of a window is a unit. unit_spans are those of the
    context's tokens in the context, -1 for all others. Questions have at most config.max_question
    tokens; the tokenizer's truncation_side decides which are left. Raises UserError if there is no
    room for a context.
    """
    with state_kept(tokenizer):
        template = Template.of(tokenizer, path)
        room = max_length - template.special
        if config.stride + config.max_question >= room:
            raise UserError(
                f"{path}: span.stride: {config.stride} and span.max_question: {config.max_question} leave no room for "
                f"a context in windows of {max_length} tokens (encoder.max_length), {template.special} of which are "
                f"special: lower them until their sum is below {room}"
            )
        number = {text: index for index, text in enumerate(dict.fromkeys(contexts))}
        of_contexts = list(_encoded(list(number), tokenizer))
        of_questions = _encoded(questions, tokenizer)
        tokens, spans, lengths, second, row_of, cut = [], [], [], [], [], 0
        for row, ((question, _), context) in enumerate(zip(of_questions, contexts, strict=True)):
            too_long = len(question) > config.max_question
            if too_long:
                left = tokenizer.truncation_side == "left"
                question = question[-config.max_question :] if left else question[: config.max_question]
            ids, places = of_contexts[number[context]]
            for start, stop in _parts(len(ids), room - len(question), config.stride):
                tokens += [template.before, question, template.between, ids[start:stop], template.after]
                head = len(template.before) + len(question) + len(template.between)
                spans += [_none(head), places[start:stop], _none(len(template.after))]
                lengths.append(head + stop - start + len(template.after))
                second.append(lengths[-1] if template.second < 0 else head - template.second)
                row_of.append(row)
                cut += too_long
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return {
        "tokens": np.concatenate(tokens),
        "offsets": offsets,
        "second_text": np.array(second, np.int32),
        "unit_offsets": offsets,
        "unit_places": (np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)).astype(np.int32),
        "unit_spans": np.concatenate(spans),
        "row_of": np.array(row_of, np.int64),
    }, cut


def _encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
    for begin in range(0, len(texts), TEXTS_AT_ONCE):
        some = list(texts[begin : begin + TEXTS_AT_ONCE])
        for found in tokenizer(some, add_special_tokens=False, verbose=False).encodings:
            yield np.array(found.ids, np.int32), np.array(found.offsets, np.int32).reshape(-1, 2)


def _parts(tokens: int, room: int, stride: int) -> Iterable[tuple[int, int]]:
    """Yield the first token and the end of each window. room: the most tokens of a window."""
    start = 0
    while True:
        stop = min(start + room, tokens)
        yield start, stop
        if stop == tokens:
            return
        start += room - stride


def _none(tokens: int) -> np.ndarray:
    return np.full((tokens, 2), -1, np.int32)
