"""A request's JSON, or image, to inputs that the batcher takes: checked, decoded, sized, tokenised.

`app` reads the body, then calls `Reader.read` in a thread.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from navit_clip.data.decode import EncodedImage
from navit_clip.data.image_header import read_header
from navit_clip.errors import SkipSampleError
from navit_clip.inference.embed import size_image
from navit_clip.inference.preprocess import Preprocess
from navit_clip.models.image_tower import ImageTowerConfig
from navit_clip.serving.batcher import Item, tokens_of
from navit_clip.serving.config import Limits
from navit_clip.serving.limits import RequestError
from navit_clip.tokenizers.base import Tokenizer

_WANTED = 'a string, {"text": …} or {"image": …}'


def bad(message: str) -> RequestError:
    """The answer to a request that makes no sense."""
    return RequestError(400, "invalid_request", message)


@dataclass(frozen=True)
class Entry:
    """One input as the client sent it: its name for messages, and one of the three."""

    name: str
    text: str | None = None
    image: bytes | None = None
    address: str | None = None


def read_json(body: bytes | bytearray, known: set[str]) -> dict[str, Any]:
    """The object in a body.

    Raises:
        RequestError: 400 if it is none, or has another key than those known.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise bad(f"the request is no JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise bad("the request is no JSON object")
    if unknown := sorted(values.keys() - known):
        raise bad(f"unknown key {unknown[0][:80]!r}: there are {', '.join(sorted(known))}")
    return values


def strings(values: dict[str, Any], name: str, most: int) -> list[str]:
    """A list of strings in a request.

    Raises:
        RequestError: 400 if it is anything else, empty or too long.
    """
    found = values.get(name)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise bad(f"{name} must be a list of strings")
    _check_count(name, len(found), most)
    return found


@dataclass(frozen=True)
class Reader:
    """Makes inputs for one model.

    Attributes:
        tower: The image tower's configuration.
        preprocess: How the model wants its images.
        tokenizer: None for a model that reads no texts.
        context: Of texts, in tokens.
        limits: What clients may ask for.
        addresses: Fetch images at public addresses.
    """

    tower: ImageTowerConfig
    preprocess: Preprocess
    tokenizer: Tokenizer | None
    context: int
    limits: Limits
    addresses: bool

    def entries(self, values: dict[str, Any], images_only: bool) -> list[Entry]:
        """What stands under ``input``: one string or object, or a list of them.

        A string is a text, or an image where there can be nothing else.

        Raises:
            RequestError: 400 if something is neither text nor image; names its index.
        """
        if "input" not in values:
            raise bad("input is missing")
        given = values["input"]
        given = given if isinstance(given, list) else [given]
        _check_count("input", len(given), self.limits.max_inputs)
        return [self._entry(f"input[{i}]", one, images_only) for i, one in enumerate(given)]

    def _entry(self, name: str, given: Any, images_only: bool) -> Entry:
        if isinstance(given, str):
            given = {"image" if images_only else "text": given}
        if not isinstance(given, dict) or len(given) != 1:
            raise bad(f"{name} must be {_WANTED}")
        ((kind, value),) = given.items()
        if kind not in ("text", "image") or not isinstance(value, str):
            raise bad(f"{name} must be {_WANTED}")
        if kind == "image":
            return self._image(name, value)
        if images_only:
            raise bad(f"{name} must be an image")
        return Entry(name, text=value)

    def _image(self, name: str, value: str) -> Entry:
        if value[:8].lower().startswith(("http://", "https://")):
            if not self.addresses:
                raise bad(f"{name}: this server fetches no addresses: send the image in base64")
            return Entry(name, address=value)
        if value.startswith("data:"):
            head, _, value = value.partition(",")
            if not head.endswith(";base64"):
                raise bad(f"{name}: a data address must be in base64")
        try:
            return Entry(name, image=base64.b64decode(value, validate=True))
        except (binascii.Error, ValueError) as error:
            raise bad(f"{name} is no base64: {str(error)[:80]}") from error

    def items(self, entries: Sequence[Entry]) -> list[Item]:
        """Sized images and ids of texts, in order.

        Raises:
            RequestError: 400 if one cannot be used, names it; or they have too many pixels or
                tokens together.
        """
        # Headers first, of all of them: nothing is decoded of a request that asks for too much.
        pixels = sum(self._cost(entry) for entry in entries)
        if pixels > (most := self.limits.max_pixels):
            raise bad(
                f"the images have {pixels:,} pixels, at most {most:,} "
                "(those of QOI, PNM and JPEG 2000, which take long, count several times)"
            )
        items: list[Item] = []
        tokens = 0
        for entry in entries:
            items.append(self._ids(entry) if entry.image is None else self._sized(entry))
            tokens += tokens_of(items[-1])
            if tokens > self.limits.max_request_tokens:
                most = self.limits.max_request_tokens
                raise bad(f"the inputs have more than {most:,} tokens together: send fewer at once")
        return items

    def _cost(self, entry: Entry) -> int:
        if entry.image is None:
            return 0
        try:
            return read_header(entry.image, self.limits.max_pixels).cost
        except SkipSampleError as error:
            raise bad(f"{entry.name}: {error.detail}") from error

    def _sized(self, entry: Entry) -> Item:
        assert entry.image is not None
        try:
            image = EncodedImage(entry.image, self.limits.max_pixels)
            most, square = self.preprocess.max_tokens, self.preprocess.square
            return size_image(image, self.tower, most, square=square)
        except SkipSampleError as error:
            raise bad(f"{entry.name}: {error.detail}") from error

    def _ids(self, entry: Entry) -> Item:
        assert entry.text is not None
        if self.tokenizer is None:
            raise bad(f"{entry.name}: this model reads images alone")
        check_length(entry.name, len(entry.text), self.limits)
        if any("\ud800" <= c <= "\udfff" for c in entry.text):
            raise bad(f"{entry.name} has half a character (a lone surrogate)")
        return self.tokenizer.encode(entry.text, self.context)


def check_length(name: str, characters: int, limits: Limits) -> None:
    """Refuses a text that is too long.

    Raises:
        RequestError: 400.
    """
    if characters > (most := limits.max_characters):
        raise bad(f"{name} has {characters:,} characters, at most {most:,}")


def _check_count(name: str, count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise bad(f"{name} has {count:,} entries, expected 1 to {most:,}")
