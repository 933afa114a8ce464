"""SigLIP's tokenizer: open_clip's ids on the same file, full contexts, files that come back."""

from __future__ import annotations

import json
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from shard_factory import CAPTIONS
from siglip_files import write_spiece

from navit_clip.errors import UserError
from navit_clip.tokenizers.load import TokenizerConfig, build_tokenizer, load_tokenizer
from navit_clip.tokenizers.siglip import SiglipTokenizer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra siglip) is not installed")

RNG = random.Random(0)
TEXTS = [
    *CAPTIONS,
    "",
    "A red, SQUARE!",
    "two green stripes " * 40,
    "snake_case & &amp;amp; x",
    "naïve café 東京 🐈 'don't' sÃ©",
    "tab\tline\x85 \u3000 \ufeff\u200b İ",
    "<eos> </s> <pad>",
    *(
        "".join(RNG.choice("abc DE_'&;.,!é\n <>/s") for _ in range(RNG.randrange(60)))
        for _ in range(100)
    ),
]


def write_json(path: Path, end: str = "</s>", specials: tuple[str, ...] = ("<pad>", "</s>")) -> Any:
    """A tokenizer.json in the manner of T5, which SigLIP's are."""
    trained = tokenizers.Tokenizer(tokenizers.models.Unigram())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=90,
        special_tokens=[*specials, "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    trained.train_from_iterator(CAPTIONS * 5, trainer)
    if end:
        trained.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, trained.token_to_id(end))]
        )
    trained.save(str(path))
    return trained


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of a repository; SigLIP 1 pads with its end token."""
    path = tmp_path_factory.mktemp("siglip") / "tokenizer.json"
    write_json(path)
    path.with_name("tokenizer_config.json").write_text('{"pad_token": "</s>"}')
    return path


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SentencePiece model of a repository, ids as in T5."""
    return write_spiece(tmp_path_factory.mktemp("spiece"))


@pytest.mark.parametrize("context", [1, 2, 7, 64])
@pytest.mark.parametrize("pad", ["</s>", "<pad>"])
def test_ids_are_those_of_open_clip(released, context, pad):
    from open_clip.tokenizer import get_clean_fn

    # What HFTokenizer and transformers do, by the means of the package itself.
    reference = tokenizers.Tokenizer.from_file(str(released))
    reference.enable_truncation(context)
    reference.enable_padding(length=context, pad_token=pad, pad_id=reference.token_to_id(pad))
    clean = get_clean_fn("canonicalize")
    ours = SiglipTokenizer(released, pad)
    for text in TEXTS:
        assert ours.encode(text, context) == reference.encode(clean(text)).ids, text
    assert ours.vocab_size == reference.get_vocab_size()


@pytest.mark.parametrize("context", [1, 2, 7, 64])
def test_ids_of_a_sentencepiece_model(spiece, context):
    from open_clip.tokenizer import get_clean_fn

    reference, clean = SentencePieceProcessor(model_file=str(spiece)), get_clean_fn("canonicalize")
    ours = build_tokenizer(TokenizerConfig("huggingface", str(spiece), pad_id=1))
    assert ours.vocab_size == reference.vocab_size()
    for text in TEXTS:
        ids = [*reference.encode(clean(text))[: context - 1], 1]
        assert ours.encode(text, context) == ids + [1] * (context - len(ids))


def test_cleaning_and_padding_spelt_out(spiece):
    ours = build_tokenizer(TokenizerConfig("huggingface", str(spiece), pad_id=0))
    assert ours.encode("A Red,  square!", 20) == ours.encode("a red_square", 20)
    ids = ours.encode("red", 20)
    assert len(ids) == 20
    end = ids.index(1)
    assert ids[end:] == [1] + [0] * (19 - end)


def test_the_padding_is_read_from_the_repository(released, tmp_path):
    config = TokenizerConfig("huggingface", str(released))
    assert build_tokenizer(config).pad_id == 1
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes(released.read_bytes())
    described = copy.with_name("tokenizer_config.json")
    described.write_text('{"pad_token": {"content": "<pad>", "special": true}}')
    config = TokenizerConfig("huggingface", str(copy))
    assert build_tokenizer(config).pad_id == 0
    assert build_tokenizer(TokenizerConfig("huggingface", str(copy), pad_id=1)).pad_id == 1
    for content in ("{}", "[", '{"pad_token": null}', '{"pad_token": {}}', "[]"):
        described.write_text(content)
        with pytest.raises(UserError, match=r"cannot read a pad_token from .*tokenizer_config"):
            build_tokenizer(config)
    described.write_text('{"pad_token": "<nothing>"}')
    with pytest.raises(UserError, match="no padding token '<nothing>'"):
        build_tokenizer(config)
    described.unlink()
    with pytest.raises(UserError, match=r"no .*tokenizer_config\.json .*set tokenizer\.pad_id"):
        build_tokenizer(config)


def test_a_padding_token_that_sentencepiece_does_not_know(spiece):
    assert SiglipTokenizer(spiece, "<pad>").pad_id == 0
    with pytest.raises(UserError, match="no padding token '<nothing>'"):
        SiglipTokenizer(spiece, "<nothing>")
    for pad in (-1, 10_000):
        with pytest.raises(UserError, match=f"no padding token {pad} among its"):
            SiglipTokenizer(spiece, pad)


@pytest.mark.parametrize("kind", ["released", "spiece"])
def test_a_saved_tokenizer_gives_the_same_ids(kind, tmp_path, request):
    built = SiglipTokenizer(request.getfixturevalue(kind), 1)
    built.save(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    assert description == {"kind": "huggingface", "pad_id": 1}
    loaded = load_tokenizer(tmp_path)
    again = pickle.loads(pickle.dumps(built))  # for another process
    assert loaded.vocab_size == built.vocab_size
    for text in TEXTS:
        assert loaded.encode(text, 20) == again.encode(text, 20) == built.encode(text, 20)


def test_what_the_file_says_about_length_does_not_matter(released, tmp_path):
    other = tokenizers.Tokenizer.from_file(str(released))
    other.enable_truncation(3)
    other.enable_padding(length=9)
    path = tmp_path / "tokenizer.json"
    other.save(str(path))
    for text in TEXTS:
        expected = SiglipTokenizer(released, 1).encode(text, 12)
        assert SiglipTokenizer(path, 1).encode(text, 12) == expected


@pytest.mark.parametrize("kind", ["released", "spiece"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_a_cut_file_is_one_line(kind, fraction, tmp_path, request):
    SiglipTokenizer(request.getfixturevalue(kind), 1).save(tmp_path)
    path = tmp_path / "tokenizer.model"
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(UserError, match=r"tokenizer\.model") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{}", b'{"model": 3}', b"[1]", b"\xff\xfe{", b"{\xff}"])
def test_a_file_that_is_no_tokenizer_is_named(content, tmp_path):
    (tmp_path / "wrong.json").write_bytes(content)
    with pytest.raises(UserError, match=r"wrong\.json"):
        SiglipTokenizer(tmp_path / "wrong.json", 1)


@pytest.mark.parametrize(
    "description", ['{"kind": "huggingface"}', '{"kind": "huggingface", "pad_id": "1"}']
)
def test_a_description_without_padding_is_refused(description, released, tmp_path):
    SiglipTokenizer(released, 1).save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(description)
    with pytest.raises(UserError, match=r"tokenizer\.json needs a whole number as pad_id"):
        load_tokenizer(tmp_path)


def test_a_pickle_in_its_place_is_refused_not_run(released, tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    SiglipTokenizer(released, 1).save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_tokenizer_without_an_end_is_not_siglips(tmp_path):
    write_json(tmp_path / "endless.json", end="")
    with pytest.raises(UserError, match=r"endless\.json puts no end token behind a caption"):
        SiglipTokenizer(tmp_path / "endless.json", 1)


def test_the_package_is_asked_for_when_it_is_missing(released, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'navit-clip\[siglip\]'"):
        SiglipTokenizer(released, 1)


def test_a_configuration_that_makes_no_sense():
    with pytest.raises(ValueError, match=r"path must name the tokenizer\.json"):
        TokenizerConfig("huggingface")
    with pytest.raises(ValueError, match="pad_id belongs to kind: huggingface"):
        TokenizerConfig("open_clip", pad_id=0)
    with pytest.raises(ValueError, match="kind must be one of"):
        TokenizerConfig("siglip", "x")  # type: ignore[arg-type]
