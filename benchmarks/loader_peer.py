"""open_clip's own training loader, measured in an environment of its own by `benchmarks.loader`.

Imports nothing of this project. Reads its settings as JSON from its first argument; then each line
on standard input is one epoch, answered by one line of JSON with the number of images and the
seconds of CPU time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace


def main() -> None:
    """The subprocess."""
    # Libraries print to standard output, which is the answer's.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])

    import torch
    from open_clip import get_tokenizer, image_transform
    from open_clip_train.data import get_wds_dataset

    torch.set_num_threads(1)
    data = get_wds_dataset(
        SimpleNamespace(
            train_data=settings["shards"],
            train_num_samples=settings["images"],
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            batch_size=settings["batch_size"],
            workers=0,
            world_size=1,
            seed=0,
        ),
        image_transform(settings["image_size"], is_train=True),
        is_train=True,
        floor=True,
        tokenizer=get_tokenizer("ViT-B-32", context_length=settings["context_length"]),
    )
    for epoch, _ in enumerate(sys.stdin):
        data.set_epoch(epoch)
        begin = time.process_time()
        images = sum(len(batch[0]) for batch in data.dataloader)
        seconds = time.process_time() - begin
        print(json.dumps({"images": images, "seconds": seconds}), file=answers)


if __name__ == "__main__":
    main()
