"""Tokenizers give back the exact text, and never a special token for what a text contains."""

import json
import shutil
from io import BytesIO

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from mtx.data.tokenizer import load_tokenizer
from mtx.data.tokenizer_training import train_sentencepiece
from mtx.errors import UserError

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\0",
    "a\0b",
    "\r\n\x1b[0m\x07",
    " leading",
    "trailing ",
    "two  spaces\t\ttabs",
    "\u2581",
    "\u2581\u2581 \u2581",
    "a\u2581b",
    " \u2581 ",
    "\u2581 a",
    "\ufffd",
    "\u2585\u2047 \u2047 ",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "<s></s><unk><pad>",
    "<0x0A><0xE2>",
    "e\u0301 \u1100\u1161",
    "\U0001f926\U0001f3fc\u200d\u2642\ufe0f",
    "\ufeffbyte order mark",
    "\u00a0\u3000\u2028\u2029\u0085",
    "\ufb01 \u212b \u00c5 \uff21",
    "\U0010ffff\U000e0001\ue000",
]


@pytest.fixture(scope="session")
def llama_style_model(tmp_path_factory, chapters):
    """A SentencePiece BPE that adds a space before the text, as Llama's and Mistral's first models do."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in chapters for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(params=["sentencepiece_model", "llama_style_model", "bpe_json", "gpt2_folder"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


def test_decoding_gives_the_exact_text(tokenizer, random_texts, chapters):
    texts = [*TEXTS, *random_texts(3000, seed=1), *chapters[:2]]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_document_id not in ids.tolist()
        assert all(0 <= i < tokenizer.vocab_size for i in ids.tolist())


def test_every_code_point_in_one_text(tokenizer):
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_encode_is_encode_batch(tokenizer, random_texts):
    texts = random_texts(50, seed=2)
    assert [tokenizer.encode(text) for text in texts] == [ids.tolist() for ids in tokenizer.encode_batch(texts)]


def test_ids_that_the_vocabulary_lacks_are_left_out(tokenizer):
    ids = tokenizer.encode("Emma")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 70]) == "Emma"


def test_the_space_mark_costs_other_text_nothing(sentencepiece_model):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    ours = load_tokenizer(sentencepiece_model)
    assert ours.encode("Emma Woodhouse, handsome") == plain.encode("Emma Woodhouse, handsome")
    marked = ours.encode("Emma\u2581Woodhouse")
    assert plain.decode(marked) == "Emma\u2581Woodhouse"  # so anybody's SentencePiece reads it


def test_gpt2_files_and_json_agree(bpe_json, gpt2_folder, tmp_path, chapters):
    from_json, from_files = load_tokenizer(bpe_json), load_tokenizer(gpt2_folder)
    assert from_files.encode(chapters[0]) == from_json.encode(chapters[0])
    assert from_files.end_of_document_id == from_json.end_of_document_id == 0
    (tmp_path / "vocab.json").write_bytes((gpt2_folder / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((gpt2_folder / "vocab.bpe").read_bytes())
    assert load_tokenizer(tmp_path).fingerprint == from_files.fingerprint


def test_a_hugging_face_folder(bpe_json):
    assert load_tokenizer(bpe_json.parent).fingerprint == load_tokenizer(bpe_json).fingerprint


def test_special_tokens_of_a_vocabulary_never_come_from_text(tmp_path, bpe_json):
    backend = tokenizers.Tokenizer.from_file(str(bpe_json))
    assert backend.encode("<|endoftext|>").ids == [0]  # what the library does unless told otherwise
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    ids = ours.encode("a<|endoftext|>b and so on and on")
    assert 0 not in ids
    assert ours.decode(ids) == "a<|endoftext|>b and so on and on"
    assert ours.decode([*ids, 0]).endswith("on<|endoftext|>")


def test_the_fingerprint_is_of_the_content(tmp_path, sentencepiece_model):
    original = load_tokenizer(sentencepiece_model)
    shutil.copy(sentencepiece_model, tmp_path / "other-name.model")
    assert load_tokenizer(tmp_path / "other-name.model").fingerprint == original.fingerprint
    changed = bytearray(sentencepiece_model.read_bytes())
    changed[changed.index(b"the")] = ord("q")
    (tmp_path / "changed.model").write_bytes(changed)
    assert load_tokenizer(tmp_path / "changed.model").fingerprint != original.fingerprint


def test_what_ends_a_document(tmp_path, sentencepiece_model, llama_style_model, bpe_json):
    assert load_tokenizer(sentencepiece_model).end_of_document_id == 1
    llama = load_tokenizer(llama_style_model)
    assert llama.token(llama.end_of_document_id) == "</s>"
    named = load_tokenizer(bpe_json, end_of_document="th")
    assert named.token(named.end_of_document_id) == "th"
    shutil.copy(bpe_json, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "ing"}}))
    declared = load_tokenizer(tmp_path)
    assert declared.token(declared.end_of_document_id) == "ing"
    with pytest.raises(UserError, match="no token 'nowhere'"):
        _ = load_tokenizer(bpe_json, end_of_document="nowhere").end_of_document_id


def test_nothing_ends_a_document(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="--end-of-document"):
        _ = tokenizer.end_of_document_id


def test_a_tokenizer_that_normalizes_is_not_exact(tmp_path, bpe_json):
    """Which the build notices; here the premise of its check."""
    backend = tokenizers.Tokenizer.from_file(str(bpe_json))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Emma")) == "emma"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.model", None, "no such file"),
        ("broken.model", b"\x0a\x05hello", "not a SentencePiece model"),
        ("tokenizer.json", b"{", "not JSON"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("text.txt", b"hello", "not a tokenizer; give"),
        ("folder/encoder.json", b"{}", "not a tokenizer; give"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(path.parent if "folder" in name else path)


def test_merges_that_do_not_fit_the_vocabulary(tmp_path):
    (tmp_path / "encoder.json").write_text('{"a": 0, "b": 1}')
    for merge in ("a b", "a", "a  b", "c a"):
        (tmp_path / "vocab.bpe").write_text(f"#version: 0.2\n{merge}\n")
        with pytest.raises(UserError, match=rf"vocab\.bpe:2: '{merge}' does not fit encoder\.json"):
            load_tokenizer(tmp_path)


def test_training_is_reproducible_and_overwrites_nothing(tmp_path, chapters, sentencepiece_model):
    again = tmp_path / "again.model"
    train_sentencepiece(chapters, vocab_size=500, out=again)
    assert again.read_bytes() == sentencepiece_model.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        train_sentencepiece(chapters, vocab_size=600, out=again)
    assert again.read_bytes() == sentencepiece_model.read_bytes()


@pytest.mark.parametrize("vocab_size", [100, 100_000])
def test_a_vocabulary_that_the_texts_cannot_fill(tmp_path, vocab_size):
    with pytest.raises(UserError, match=f"a vocabulary of {vocab_size} cannot be learned"):
        train_sentencepiece(["a few words"], vocab_size=vocab_size, out=tmp_path / "x.model")
    with pytest.raises(UserError, match="there is no text"):
        train_sentencepiece([], vocab_size=300, out=tmp_path / "x.model")
    assert not list(tmp_path.iterdir())


def test_long_lines_are_learned_from(tmp_path):
    """SentencePiece drops long lines by default: a text of one line would teach it nothing."""
    text = " ".join(f"word{i % 50}" for i in range(40_000))
    train_sentencepiece([text], vocab_size=275, out=tmp_path / "x.model")
    tokenizer = load_tokenizer(tmp_path / "x.model")
    assert len(tokenizer.encode(text)) < len(text) / 2
