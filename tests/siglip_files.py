"""Files of a SigLIP tokenizer, trained on few captions."""

from __future__ import annotations

import io
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from shard_factory import CAPTIONS


def write_spiece(folder: Path) -> Path:
    """The SentencePiece model of a repository, ids as in T5."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 5),
        model_writer=model,
        vocab_size=70,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path = folder / "spiece.model"
    path.write_bytes(model.getvalue())
    return path
