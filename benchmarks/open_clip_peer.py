"""open_clip's own trainer and training loader, for `benchmarks.end_to_end` and `benchmarks.loader`.

Runs in an environment of its own and imports nothing of this project.

- ``train FOLDER FLAG…``: its trainer; the folder holds a model configuration of open_clip's format.
- ``load SETTINGS``, as JSON: each line on standard input is one epoch of its loader, answered by
  one line of JSON with the number of images and the seconds of CPU time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace


def train(models: str, *flags: str) -> None:
    """The whole training."""
    import open_clip
    from open_clip_train.main import main

    open_clip.add_model_config(models)
    main(list(flags))


def load(words: str) -> None:
    """The loader, once for each line of standard input."""
    # Libraries print to standard output, which is the answer's.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(words)

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
    (train if sys.argv[1] == "train" else load)(*sys.argv[2:])
