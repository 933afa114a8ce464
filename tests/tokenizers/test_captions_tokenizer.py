"""Tokens of captions, never without an end, and tokenizers trained on captions."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from shard_factory import CAPTIONS, as_json, write_shard, write_tar

from navit_clip.errors import UserError
from navit_clip.tokenizers.clip_bpe import OpenClipTokenizer
from navit_clip.tokenizers.load import TokenizerConfig, build_tokenizer, load_tokenizer
from navit_clip.tokenizers.sentencepiece import SentencePieceTokenizer
from navit_clip.tools import train_tokenizer as training


def test_sentencepiece_ids_are_the_models_and_end_with_the_end(tokenizer, tokenizer_path):
    pieces = SentencePieceProcessor(model_file=str(tokenizer_path))
    for caption in CAPTIONS:
        assert tokenizer.encode(caption, 1000) == [*pieces.encode(caption), pieces.eos_id()]
    assert tokenizer.vocab_size == pieces.vocab_size()


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 20))
def test_any_text_keeps_its_end_and_the_context(tokenizer, text, context):
    ids = tokenizer.encode(text, context)
    whole = tokenizer.encode(text, 10_000)
    assert 1 <= len(ids) <= context
    assert ids[-1] == whole[-1] == tokenizer.encode("", 1)[-1]
    assert ids[:-1] == whole[: context - 1][: len(ids) - 1]
    assert max(ids) < tokenizer.vocab_size
    assert len(ids) == min(len(whole), context)


def test_a_tokenizer_works_in_another_process(tokenizer):
    for one in (tokenizer, OpenClipTokenizer()):
        again = pickle.loads(pickle.dumps(one))
        assert again.encode(CAPTIONS[0], 20) == one.encode(CAPTIONS[0], 20)


TEXTS = (
    *CAPTIONS,
    "",
    "  Upper CASE,   spaces &amp; entities  ",
    "naïve café 東京 🐈",
    "word " * 200,
    "don't &amp;amp;lt; we'LL 100% 'ſ",
    "tab\tfile\x1cseparator\x85line\u2028separator\u3000ideographic \ufeff\u200b",
)


@pytest.mark.parametrize("context", [8, 16, 77])
def test_open_clip_ids_are_its_own_without_the_padding(context):
    from open_clip.tokenizer import SimpleTokenizer

    ours, theirs = OpenClipTokenizer(), SimpleTokenizer()
    assert ours.vocab_size == theirs.vocab_size
    for text, row in zip(TEXTS, theirs(list(TEXTS), context).tolist(), strict=True):
        end = row.index(theirs.eot_token_id)
        assert ours.encode(text, context) == row[: end + 1]


def test_a_caption_of_100_kb_without_a_space_takes_no_minutes():
    # open_clip's encoding takes time quadratic in the length of a word.
    letters = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 100_000)))
    tokenizer = OpenClipTokenizer()
    ids = tokenizer.encode(letters, 77)
    assert len(ids) == 77
    assert ids[:70] == tokenizer.encode(letters[:400], 77)[:70]


@pytest.mark.parametrize("kind", ["sentencepiece", "open_clip"])
def test_a_saved_tokenizer_gives_the_same_ids(kind, tokenizer_path, tmp_path):
    built = build_tokenizer(TokenizerConfig(kind, str(tokenizer_path)))
    built.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocab_size == built.vocab_size
    assert [loaded.encode(text, 20) for text in TEXTS] == [built.encode(text, 20) for text in TEXTS]


def test_a_tokenizer_needs_nothing_but_its_own_directory(tokenizer, tmp_path):
    (tmp_path / "a").mkdir()
    tokenizer.save(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").encode(CAPTIONS[0], 9) == tokenizer.encode(CAPTIONS[0], 9)


def test_sentencepiece_needs_a_path():
    with pytest.raises(ValueError, match=r"path.*train_tokenizer"):
        TokenizerConfig("sentencepiece")


def test_a_missing_model_file_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"no\.model.*train_tokenizer"):
        SentencePieceTokenizer(tmp_path / "no.model")
    with pytest.raises(UserError, match=str(tmp_path)):
        SentencePieceTokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\0" * 200])
def test_a_wrong_model_file_is_named(content, tmp_path):
    (tmp_path / "wrong.model").write_bytes(content)
    with pytest.raises(UserError, match=r"wrong\.model"):
        SentencePieceTokenizer(tmp_path / "wrong.model")


def test_a_model_without_an_end_piece_is_refused(tmp_path):
    SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_prefix=str(tmp_path / "endless"),
        vocab_size=40,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"endless\.model has no end-of-sentence piece"):
        SentencePieceTokenizer(tmp_path / "endless.model")


@pytest.mark.parametrize(
    "content", [None, "", "{}", "[]", "null", '{"kind": "other"}', '{"kind": ["sentencepiece"]}']
)
def test_a_damaged_tokenizer_description_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_description_without_its_model_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("context", [2, 5, 77])
@pytest.mark.parametrize(
    "text", ["a dog <end_of_text> in the park", "<END_OF_TEXT>", "x<end_of_text><end_of_text>y"]
)
def test_the_end_token_as_text_ends_the_caption_where_open_clip_reads_it(text, context):
    from open_clip import get_tokenizer

    theirs = get_tokenizer("ViT-B-32")([text], context_length=context)[0]
    ours = OpenClipTokenizer().encode(text, context)
    assert ours == theirs[: theirs.argmax() + 1].tolist()


@pytest.fixture
def captioned(tmp_path):
    return write_shard(
        tmp_path / "shards" / "0.tar",
        {
            **{
                str(i): {"txt": text.encode(), "json": as_json(more=["zebra zebra"])}
                for i, text in enumerate(CAPTIONS)
            },
            "bad": {"txt": b"\xff", "json": b"{"},
        },
    )


def train(*words: object) -> int:
    try:
        training.main([str(word) for word in words], "train_tokenizer")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_training_reads_every_field_and_skips_bad_captions(captioned, tmp_path, capsys):
    output = tmp_path / "new" / "t.model"
    flags = ("--shards", captioned.parent, "--vocab-size", 64, "--output", output)
    assert train(*flags) == 0
    assert "pieces" in capsys.readouterr().out
    without = SentencePieceTokenizer(output)
    assert train(*flags, "--captions", "txt", "json.more") == 0
    both = SentencePieceTokenizer(output)
    unknown = SentencePieceProcessor(model_file=str(output)).unk_id()
    assert unknown in without.encode("zebra", 20)
    assert unknown not in both.encode("zebra", 20)
    assert unknown not in both.encode(CAPTIONS[0], 50)


SCRIPTS = ["東京の猫", "大阪の犬", "party 🐈", "party 🚀"]


@pytest.fixture
def rare_scripts(tmp_path):
    texts = [*CAPTIONS * 400, *SCRIPTS]
    samples = {str(i): {"txt": text.encode()} for i, text in enumerate(texts)}
    return write_shard(tmp_path / "scripts.tar", samples)


@pytest.mark.parametrize(
    ("flags", "distinct"),
    [((), False), (("--coverage", 1), True), (("--byte-fallback",), True)],
)
def test_scripts_that_a_tokenizer_does_not_know_are_reported(
    flags, distinct, rare_scripts, tmp_path, capsys
):
    size = 320 if "--byte-fallback" in flags else 64
    output = tmp_path / "t.model"
    assert train("--shards", rare_scripts, "--vocab-size", size, "--output", output, *flags) == 0
    printed = capsys.readouterr().out
    tokenizer = SentencePieceTokenizer(output)
    found = {tuple(tokenizer.encode(text, 77)) for text in SCRIPTS}
    assert (len(found) == len(SCRIPTS)) == distinct
    assert ("--byte-fallback" in printed) != distinct
    assert (tokenizer.unknown_id is None) == ("--byte-fallback" in flags)
    if "--byte-fallback" in flags:
        # And of no other script either.
        assert len({tuple(tokenizer.encode(text, 77)) for text in "γδжש😀"}) == 5


@pytest.mark.parametrize("fraction", ["0", "1.1", "nan", "all"])
def test_a_coverage_that_is_no_fraction(fraction, captioned, tmp_path, capsys):
    assert train("--shards", captioned, "--output", tmp_path / "t", "--coverage", fraction) == 2
    assert "expected a fraction above 0" in capsys.readouterr().err


def test_captions_of_any_length_are_learnt_from(tmp_path):
    long = {str(i): {"txt": " ".join(CAPTIONS * 90).encode()} for i in range(3)}
    shard = write_shard(tmp_path / "long.tar", long)
    output = tmp_path / "t.model"
    assert train("--shards", shard, "--vocab-size", 64, "--output", output) == 0
    tokenizer = SentencePieceTokenizer(output)
    assert tokenizer.unknown_id not in tokenizer.encode(CAPTIONS[0], 50)


def test_training_twice_gives_the_same_model(captioned, tmp_path):
    models = []
    for name in ("a.model", "b.model"):
        train("--shards", captioned, "--vocab-size", 64, "--output", tmp_path / name)
        models.append((tmp_path / name).read_bytes())
    assert models[0] == models[1]


def test_training_keeps_what_was_readable_of_a_truncated_shard(captioned, tmp_path):
    data = captioned.read_bytes()
    captioned.write_bytes(data[: len(data) // 2 // 512 * 512 + 100])
    output = tmp_path / "t.model"
    assert train("--shards", captioned, "--vocab-size", 64, "--output", output) == 0
    unknown = SentencePieceProcessor(model_file=str(output)).unk_id()
    assert unknown not in SentencePieceTokenizer(output).encode(CAPTIONS[0], 50)


@pytest.mark.parametrize(
    ("named", "flags"),
    [
        ("nowhere", {"--shards": "nowhere"}),
        ("json.none", {"--captions": "json.none"}),
        ("--vocab-size", {"--vocab-size": 3}),
        ("SentencePiece cannot train 9 pieces", {"--vocab-size": 9}),
        ("cannot write", {"--output": "{shard}/t.model"}),
        ("no caption found", {"--shards": "{empty}"}),
    ],
)
def test_mistakes_in_training_are_one_line(named, flags, captioned, tmp_path, capsys):
    empty = write_tar(tmp_path / "empty.tar", [])
    values = {"--shards": captioned, "--vocab-size": 64, "--output": tmp_path / "t.model", **flags}
    words = [
        str(word).format(shard=captioned, empty=empty) for item in values.items() for word in item
    ]
    assert train(*words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train_tokenizer: error: ")
    assert named in error


def test_training_reads_long_captions(tmp_path, capsys):
    samples = {
        str(i): {"txt": (f"{CAPTIONS[i % 5]} word{i} " * 200).encode(), "json": b"{}"}
        for i in range(30)
    }
    shard = write_shard(tmp_path / "long.tar", samples)
    output = tmp_path / "t.model"
    assert train("--shards", shard, "--vocab-size", 60, "--output", output) == 0
    samples["x"] = {"txt": b"word " * 20_000}
    assert (
        train("--shards", write_shard(shard, samples), "--vocab-size", 60, "--output", output) == 0
    )
    assert "1 captions of more than 65,536 bytes left out" in capsys.readouterr().out
    shard = write_shard(tmp_path / "0.tar", {"x": samples["x"]})
    assert train("--shards", shard, "--vocab-size", 60, "--output", output) == 2
    assert "all 1 captions are longer than 65,536 bytes" in capsys.readouterr().err
