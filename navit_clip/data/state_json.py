"""Where a rank stands in its data as plain values, which any file holds."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

from navit_clip.data.builders.base import Origin
from navit_clip.data.order import Cursor, Leftover, ShardSlice
from navit_clip.data.state import DataState, ReaderState


def data_to_json(data: DataState) -> dict[str, Any]:
    """The state of a rank's data as plain values.

    Cursors, slices and origins become lists without names, since there may be thousands.
    """
    return {
        **vars(data),
        "leftovers": {
            reader: [[own.epoch, [astuple(part) for part in own.slices]] for own in leftovers]
            for reader, leftovers in data.leftovers.items()
        },
        "readers": {reader: vars(state) for reader, state in data.readers.items()},
    }


def data_from_json(values: dict[str, Any]) -> DataState:
    """The state that `data_to_json` made plain values of."""
    leftovers = {
        int(reader): [Leftover(epoch, tuple(map(_slice, slices))) for epoch, slices in leftovers]
        for reader, leftovers in values["leftovers"].items()
    }
    readers = {
        int(reader): ReaderState(
            [Cursor(*cursor) for cursor in state["cursors"]],
            state["taken"],
            state["drawn"],
            [Origin(*origin) for origin in state["buffer"]],
            [Origin(*origin) for origin in state["pending"]],
        )
        for reader, state in values["readers"].items()
    }
    return DataState(**{**values, "leftovers": leftovers, "readers": readers})


def _slice(values: list[Any]) -> ShardSlice:
    epoch, shard, start, stride, offset, extra = values
    return ShardSlice(epoch, shard, start, stride, offset, tuple(extra))
