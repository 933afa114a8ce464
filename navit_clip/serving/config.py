"""What a server takes from its clients, and how it packs requests together: its flags.

Needs none of the packages that serving needs, so that a missing one is named in one line. Every
limit is checked before the memory or the time that it bounds is spent.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from navit_clip.data.image_header import check_max_pixels


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        max_inputs: Texts and images in one request, and prompts of its labels.
        max_request_tokens: Tokens of all of them together.
        max_bytes: Of one request.
        max_characters: Of one text; a model reads the beginning alone.
        max_pixels: Of all images of one request together; slow formats count several times.
        max_requests: Requests that are worked on at once; more are turned away with 503.
        max_waiting_tokens: Tokens that wait for the model; requests beyond them likewise.
        body_seconds: In which a client has to send its request.

    Raises:
        ValueError: If one is not positive, or `max_pixels` is more than a decoder takes.
    """

    max_inputs: int = 256
    max_request_tokens: int = 65_536
    max_bytes: int = 32 << 20
    max_characters: int = 20_000
    max_pixels: int = 64_000_000
    max_requests: int = 128
    max_waiting_tokens: int = 262_144
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} must be positive, got {getattr(self, field.name)}")
        check_max_pixels(self.max_pixels)


@dataclass(frozen=True)
class BatchConfig:
    """How requests are packed together.

    Attributes:
        batch_tokens: Most tokens of one forward pass; a longer input goes alone.
        wait_ms: Milliseconds that the first input of a batch waits at most for requests that are
            being decoded.

    Raises:
        ValueError: If `batch_tokens` is below 1, or `wait_ms` negative.
    """

    batch_tokens: int = 16_384
    wait_ms: float = 5.0

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {self.batch_tokens}")
        if not 0 <= self.wait_ms < 60_000:
            raise ValueError(f"wait_ms must be from 0 to 60,000, got {self.wait_ms}")
