"""Shards in repositories of the Hugging Face Hub: where its web server has them."""

from __future__ import annotations

import re

from navit_clip.errors import UserError

HUB = "hf://"

_ADDRESS = re.compile(
    r"hf://(?:(datasets|spaces|models)/)?([^/@]+/[^/@]+)"
    r"(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?/(.+)"
)


def web_file(address: str) -> tuple[str, dict[str, str]]:
    """The web address of a file, and the headers that open it.

    Asks nobody: the Hub limits how often its API is called, and downloads far less.

    Args:
        address: ``hf://datasets/OWNER/NAME/FILE``, with ``@REVISION`` behind the name if wanted,
            is opened by the token of ``hf auth login``; one of a web server stays as it is.

    Raises:
        UserError: If one of the Hub has another form.
    """
    if not address.startswith(HUB):
        return address, {}
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address}: expected such as {HUB}datasets/OWNER/NAME@REVISION/FILE")
    from huggingface_hub import hf_hub_url  # a second, which no other address needs
    from huggingface_hub.utils import build_hf_headers

    kind, repository, revision, file = match.groups()
    repo_type = (kind or "models").removesuffix("s")
    return hf_hub_url(repository, file, repo_type=repo_type, revision=revision), build_hf_headers()
