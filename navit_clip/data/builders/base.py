"""What turns a raw sample into an example, and many examples into a model's inputs, for any task.

Between the reader, which knows shards and orders, and the packer, which knows lengths: neither
knows what an example is. A task brings a `SampleBuilder`; `navit_clip.data.builders.pairs` has the
one for image–caption pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from navit_clip.data.packer import Packable
from navit_clip.data.raw_sample import RawSample
from navit_clip.packed.batch import Inputs

AnySample = TypeVar("AnySample", bound="Sample")
AnyInputs_co = TypeVar("AnyInputs_co", bound=Inputs, covariant=True)


class Origin(NamedTuple):
    """Where a sample was read, enough to read it again and get the same example.

    Attributes:
        epoch: Epoch of the reader that read it.
        shard: Index of the shard in the list of all shards.
        sample: Index of the sample within its shard.
        images_seen: Samples that all readers had taken when it was drawn, for what follows a
            schedule.
    """

    epoch: int
    shard: int
    sample: int
    images_seen: int


class Sample(Packable, Protocol):
    """One example, ready to be packed."""

    @property
    def id(self) -> str:
        """``shard/key``."""

    @property
    def origin(self) -> Origin:
        """Where it was read."""

    @property
    def full_lengths(self) -> tuple[int, ...]:
        """Tokens in each stream before any were dropped."""


class SampleBuilder(Protocol[AnySample, AnyInputs_co]):
    """Builds samples and collates them; picklable, since it runs in data workers.

    The same sample for the same raw sample and origin, wherever it runs.
    """

    @property
    def streams(self) -> tuple[str, ...]:
        """A name for each of a sample's `lengths`, such as ``("image", "text")``.

        Token budgets are given by these names. Only the first stream is ever trimmed.
        """

    def __call__(
        self, raw: RawSample, origin: Origin, fields: Mapping[str, float] | None
    ) -> AnySample:
        """Builds one sample.

        Args:
            raw: As the shard has it.
            origin: Where it was read.
            fields: Weights of the fields to choose from, such as captions, of the sample's own
                dataset; None takes the builder's.

        Raises:
            SkipSampleError: If the raw sample is unusable.
        """

    def collate(self, samples: Sequence[AnySample], pad_to: tuple[int, ...] | None) -> AnyInputs_co:
        """Packs the samples of one batch.

        Args:
            samples: At least one, all of one bucket.
            pad_to: Tokens that each stream is padded to; None pads none.
        """
