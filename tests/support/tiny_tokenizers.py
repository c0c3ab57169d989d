"""Small tokenizers in Hugging Face's format: WordPiece, byte-level BPE and Unigram."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tiny_bert import WORDS, save_tiny_bert
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, RobertaTokenizerFast

_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
_TEXT = [" ".join(WORDS)] * 3


def save_tokenizer(kind: str, directory: Path) -> None:
    """Save a tokenizer: "wordpiece" (BERT's), "bytes" (RoBERTa's) or "unigram" (XLM-RoBERTa's).

    The last two write pairs as `<s> a </s></s> b </s>`, and have no token types.
    """
    if kind == "wordpiece":
        with tempfile.TemporaryDirectory() as folder:
            for file in save_tiny_bert(Path(folder) / "bert").glob("tokenizer*"):
                shutil.copy(file, directory)
    elif kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        letters = pre_tokenizers.ByteLevel.alphabet()
        special = [*_SPECIAL, "<mask>"]
        made.train_from_iterator(
            _TEXT,
            trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=letters, show_progress=False),
        )
        made.model.save(str(directory))
        RobertaTokenizerFast.from_pretrained(str(directory)).save_pretrained(directory)
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        made.train_from_iterator(
            _TEXT,
            trainers.UnigramTrainer(vocab_size=200, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False),
        )
        made.add_special_tokens(["<mask>"])
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
        names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
        PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(directory)
