"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from navit_clip import before_torch  # noqa: F401  first: tests share their cores with processes

import torch  # isort: skip
from hypothesis import settings
from interpreter import end_interpreter
from loader_cases import Pipeline, pair_pipeline
from shard_factory import CAPTIONS, write_shard

from navit_clip.inference.preprocess import Preprocess
from navit_clip.model import NaViTCLIP
from navit_clip.models.clip import CLIPConfig
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.models.position import PositionConfig
from navit_clip.models.text_tower import TextTowerConfig
from navit_clip.models.transformer import EncoderConfig
from navit_clip.tokenizers.sentencepiece import SentencePieceTokenizer
from navit_clip.tools.train_tokenizer import train_tokenizer

_LONGEST = {
    "test_guides",
    "test_survival",
    "test_task_seam",
    "test_torchrun",
    "test_train",
    "test_train_distributed",
}

# A busy machine fails no test by its clock, and a commit none by examples that it did not choose.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--kills N`` of the slow test in training/test_survival.py."""
    parser.addoption("--kills", type=int, default=6, help="how often a run is killed (slow test)")


def pytest_configure() -> None:
    """What a process of tests has of the machine, and what it passes on to those it starts."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # beside others that want the cores
        torch.set_num_threads(1)
    # Commands that tests start can be interrupted, though a shell's background jobs cannot.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """Leaves no process behind."""
    end_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that none is left for one process alone at the end."""
    items.sort(key=lambda item: item.path.stem not in _LONGEST)


@pytest.hookimpl(optionalhook=True)  # without xdist there are no processes
def pytest_xdist_auto_num_workers() -> int:
    """Half as many more processes than cores: much of a test is waiting for others to start."""
    return max(2, 3 * (os.cpu_count() or 1) // 2)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As ranks and commands of tests have: matrix products of two threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model trained on the captions of `shard_factory`."""
    root = tmp_path_factory.mktemp("tokenizer")
    shard = write_shard(
        root / "captions.tar", {str(i): {"txt": text.encode()} for i, text in enumerate(CAPTIONS)}
    )
    train_tokenizer([str(shard)], ["txt"], 64, root / "tokenizer.model")
    return root / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: SentencePieceTokenizer) -> Path:
    """A tiny model of random weights, exported: patches of 8 pixels, at most 12 of them."""
    torch.manual_seed(0)
    encoder = EncoderConfig(width=16, depth=2, heads=2)
    config = CLIPConfig(
        embed_dim=8,
        image=ImageTowerConfig(
            patch_size=8, encoder=encoder, position=PositionConfig(table_side=16)
        ),
        text=TextTowerConfig(vocab_size=tokenizer.vocab_size, context_length=16, encoder=encoder),
    )
    model = NaViTCLIP(config, tokenizer, Preprocess(max_tokens=12))
    with torch.no_grad():
        # At their first values all images of such a small model lie almost in one point.
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def pipeline(tokenizer: SentencePieceTokenizer) -> Callable[..., Pipeline]:
    """Makes pipelines of pairs: ``pipeline(shards, seed=…, field=…)``, see `loader_cases`."""
    return partial(pair_pipeline, tokenizer=tokenizer)
