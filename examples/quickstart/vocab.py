"""The quickstart's tokenizer: one token per character, as a SentencePiece model and as Hugging Face files."""

import io
import json

import sentencepiece
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
CHARACTERS = "0123456789+-<>=:"
# Divisible by 16 even when two tensor-parallel ranks share it, which FP8 matrix products need.
VOCAB_SIZE = 32


def train_sentencepiece(path):
    """Train the character-level SentencePiece model and write it to ``path``.

    The corpus holds the character ``i`` in all sentences but the first ``i``, so frequencies, and with them
    ids, fall in the order of ``CHARACTERS``.  Unused control symbols fill the vocabulary.
    """
    fillers = [f"<unused{i}>" for i in range(VOCAB_SIZE - len(CHARACTERS) - 3)]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CHARACTERS[: i + 1] for i in range(len(CHARACTERS))),
        model_writer=buffer,
        model_type="char",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece=PAD,
        eos_piece=EOS,
        unk_piece=UNK,
        control_symbols=fillers,
        minloglevel=2,
    )
    path.write_bytes(buffer.getvalue())


def write_hf_tokenizer(sentencepiece_path, directory):
    """Write ``tokenizer.json`` and its companions with the pieces of the SentencePiece model.

    A BPE model without merges is a character tokenizer; ``Fuse`` joins characters without spaces.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    pieces = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token=UNK))
    tokenizer.add_special_tokens([piece for piece in pieces if piece not in CHARACTERS])
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=64,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
    _name_class_for_any_release(directory / "tokenizer_config.json")


def _name_class_for_any_release(path):
    """Name the tokenizer class as every release of transformers knows it; version 5 saves its own new name."""
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_tokenizer(directory, texts):
    """Assert that both tokenizers agree on ``texts``: one id per character, nothing added, exact round trip."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    fast = AutoTokenizer.from_pretrained(directory)
    assert processor.get_piece_size() == len(fast) == VOCAB_SIZE
    assert (fast.pad_token_id, fast.eos_token_id) == (processor.pad_id(), processor.eos_id())
    for text in texts:
        ids = fast(text)["input_ids"]
        assert ids == processor.encode(text), text
        assert len(ids) == len(text), text
        assert fast.decode([*ids, fast.eos_token_id], skip_special_tokens=True) == text
        assert processor.decode(ids) == text
