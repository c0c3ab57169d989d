"""A small random encoder with its tokenizer."""

from __future__ import annotations

from pathlib import Path

WORDS = """the a an this that is was are were it he she they we i you and or but not no never very really quite too so
film movie story actor song book cat dog bird man woman child boy girl city road house river car train food soup cake
good bad great poor awful lovely dull bright slow quick old new small large red blue green happy sad funny boring
sat sits ran runs saw sees made makes ate eats drove drives read reads on in at with to from by of for after
before""".split()


def save_tiny_bert(directory: Path, *, hidden: int = 32, layers: int = 2, heads: int = 4) -> Path:
    """Save a random BERT of a few thousand weights and a tokenizer in Hugging Face's format."""
    import string

    import torch
    from transformers import BertConfig, BertModel
    from transformers.models.bert.tokenization_bert import BertTokenizerFast

    pieces = [*WORDS, *string.ascii_lowercase, *("##" + c for c in string.ascii_lowercase), *string.digits, *".,!?'-"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary_file = directory / "vocab.txt"
    vocabulary_file.write_text("\n".join(dict.fromkeys(vocabulary)) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(str(vocabulary_file), do_lower_case=True)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
