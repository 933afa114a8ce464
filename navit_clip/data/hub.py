"""Shards in repositories of the Hugging Face Hub: where its web server has them."""

from __future__ import annotations

import re

from navit_clip.errors import UserError

HUB = "hf://"

_ADDRESS = re.compile(
    r"hf://(?:(datasets|spaces|models)/)?([^/@]+/[^/@]+)"
    r"(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?/(.+)"
)


def repository(address: str) -> str:
    """The part of a Hub's address before the file's path.

    Raises:
        UserError: If it has another form.
    """
    return address[: _parsed(address).start(4)]


def web_file(address: str) -> tuple[str, dict[str, str]]:
    """The web address of a file, and the headers that open it.

    Asks nobody: the Hub limits how often its API is called, and downloads far less.

    Args:
        address: ``hf://datasets/OWNER/NAME/FILE``, with ``@REVISION`` behind the name if wanted,
            is opened by the token of ``hf auth login``; one of a web server stays as it is.

    Raises:
        UserError: If one of the Hub has another form, or no repository can be called so.
    """
    if not address.startswith(HUB):
        return address, {}
    match = _parsed(address)
    from huggingface_hub import hf_hub_url  # a second, which no other address needs
    from huggingface_hub.utils import build_hf_headers

    kind, name, revision, file = match.groups()
    repo_type = (kind or "models").removesuffix("s")
    try:
        url = hf_hub_url(name, file, repo_type=repo_type, revision=revision)
    except ValueError as error:
        raise UserError(f"{address}: {' '.join(str(error).split())}") from error
    return url, build_hf_headers()


def _parsed(address: str) -> re.Match[str]:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address}: expected such as {HUB}datasets/OWNER/NAME@REVISION/FILE")
    return match
