"""Every flag of open_clip's trainer, with its counterpart here or why there is none.

From this table `navit_clip.tools.from_open_clip.__main__` translates commands and
``python -m navit_clip.tools.from_open_clip.flags > docs/from_open_clip.md`` writes the guide.
Flags of open_clip 3.3 and of its main branch (June 2026, 4.2.0.dev0).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from navit_clip.tools.from_open_clip import convert as c


@dataclass(frozen=True)
class Flag:
    """A flag of open_clip's trainer.

    Attributes:
        ours: Fields or options that it becomes, separated by commas; ``-`` if there is none, and
            none is needed, empty if it is lost.
        note: How it is translated, or why not.
        convert: Sets our fields.
        only: ``main`` or ``3.3`` if just one of them has it.
        values: How many values it takes, as `argparse` has it: None for one, 0 for none; of flags
            of main alone, which the parser that is installed may not know.
    """

    ours: str = ""
    note: str = ""
    convert: c.Convert | None = None
    only: str = ""
    values: int | str | None = None


def _main(flag: Flag, values: int | str | None = None) -> Flag:
    return Flag(flag.ours, flag.note, flag.convert, "main", values)


def _read(ours: str, note: str = "") -> Flag:
    """What the function of another flag reads."""
    return Flag(ours, note, c.with_others)


_AUDIO = "no audio here"
_PADDING = "captions and images are packed end to end, nothing is padded"
_COCA = "CoCa's decoder of captions has no counterpart"
_REMOTE = "sync the run directory with a tool for it; a checkpoint appears whole or not at all"
_TWO_RANKS = "gradients are exact, and no rank holds the whole matrix of logits"

TABLE: dict[str, dict[str, Flag]] = {
    "Run": {
        "--logs": Flag("run_dir", "logs/NAME becomes run_dir", c.run_dir),
        "--name": _read("run_dir, log.wandb_name"),
        "--log-local": Flag("-", "rank 0 logs"),
        "--seed": Flag("seed", "", c.to("seed")),
        "--epochs": Flag(
            "epochs, samples", "samples, where --train-num-samples says what an epoch is", c.epochs
        ),
        "--train-num-samples": _read("samples", "times --epochs; cadences in steps come from it"),
        "--naflex-num-train-image-tokens": _main(
            Flag("", "a run is as long as its steps, samples or epochs")
        ),
        "--debug": Flag("", "--print_config shows the fields of a command"),
        "--copy-codebase": Flag("", "the package that is installed runs"),
    },
    "Model": {
        "--model": Flag(
            "task.model.name, init.model",
            "open_clip:NAME with its tokenizer; CLIP's and SigLIP's ViTs are supported, "
            "open_clip:ViT-B-16 stands in for others",
            c.model,
        ),
        "--pretrained": Flag("init.weights", "a tag or a file", c.weights("--pretrained")),
        "--resume": Flag(
            "init.weights",
            "weights alone; a run of ours continues by itself in the same run_dir",
            c.weights("--resume", "weights are taken, not epoch and optimiser"),
        ),
        "--pretrained-image": Flag("", "start from a whole model, or one of ours (init.model)"),
        "--pretrained-audio": _main(Flag("", _AUDIO)),
        "--cache-dir": Flag("", "downloads go where HF_HOME says"),
        "--force-context-length": Flag(
            "task.model.text.context_length",
            "",
            c.architecture("text.context_length"),
        ),
        "--force-quick-gelu": Flag(
            "task.model.image.encoder.activation, task.model.text.encoder.activation",
            "quick_gelu",
            c.architecture(
                "image.encoder.activation", "text.encoder.activation", fixed="quick_gelu"
            ),
        ),
        "--force-custom-text": Flag("-", "towers are always separate"),
        "--image-mean": Flag("task.model.image.pixel_mean", "", c.architecture("image.pixel_mean")),
        "--image-std": Flag("task.model.image.pixel_std", "", c.architecture("image.pixel_std")),
        "--lock-image": Flag(
            "task.lock.image",
            "projections, scale and bias always learn",
            c.lock("image", "lock_image_unlocked_groups", 1),
        ),
        "--lock-image-unlocked-groups": _read(
            "task.lock.image_unlocked_blocks", "open_clip's last group is the projection"
        ),
        "--lock-image-freeze-bn-stats": Flag("-", "ViTs have no batch norm"),
        "--lock-text": Flag("task.lock.text", "", c.lock("text", "lock_text_unlocked_layers", 0)),
        "--lock-text-unlocked-layers": _read("task.lock.text_unlocked_blocks"),
        "--lock-text-freeze-layer-norm": Flag("-", "norms are locked with their blocks"),
        "--siglip": Flag(
            "task.loss.kind, task.model.init_scale, task.model.init_bias",
            "sigmoid, 10, -10",
            c.siglip,
        ),
        "--loss-dist-impl": Flag("-", "task.loss.exchange chooses by the number of ranks"),
        "--coca-caption-loss-weight": Flag("", _COCA),
        "--coca-contrastive-loss-weight": Flag("", _COCA),
        "--distill-model": Flag("task.distill.teacher", "open_clip:NAME", c.teacher),
        "--distill-pretrained": Flag("task.distill.weights", "", c.to("task.distill.weights")),
        "--use-bnb-linear": Flag("", "no 8-bit layers here"),
        "--use-bn-sync": Flag("-", "ViTs have no batch norm"),
    },
    "Data": {
        "--train-data": Flag(
            "data.train, data.mix",
            "shards or a CSV as they are, several of them too",
            c.train_data,
        ),
        "--train-data-upsampling-factors": _read(
            "data.mix.NAME.weight", "multiply the factor by the size of the dataset"
        ),
        "--val-data": Flag("data.validation", "", c.val_data),
        "--val-num-samples": Flag("", "all of data.validation is read"),
        "--dataset-type": _read("", "by the name; synthetic: navit-clip data shapes"),
        "--dataset-resampled": Flag(
            "", "an epoch reads each sample once, in an order of its own; a run stops anywhere"
        ),
        "--csv-separator": _read("", "tabs and commas are told apart"),
        "--csv-img-key": _read("data.files.image_column"),
        "--csv-caption-key": _read("data.files.caption_columns"),
        "--image-key": _main(Flag("-", "jpg, jpeg, png and webp are found by themselves")),
        "--max-image-pixels": _main(Flag("data.resolution.max_pixels", "", c.max_pixels)),
        "--text-key": _main(_read("task.captions")),
        "--json-text-key": _main(_read("task.captions", "json.FIELD")),
        "--json-text-key-probs": _main(_read("task.captions", "its weights"), "+"),
        "--workers": Flag("data.workers", "", c.to("data.workers")),
        "--image-interpolation": Flag("", "images are averaged to their grid, antialiased"),
        "--image-resize-mode": Flag("", "data.resolution.mode: sampled or native keep the aspect"),
        "--aug-cfg": Flag(
            "data.augment",
            "scale, its default too; others have fields there",
            c.augment,
            values="k=v",
        ),
    },
    "Batches": {
        "--batch-size": Flag(
            "data.budget, data.packing, data.resolution",
            "squares of the model's own side, packing: constant; mode: sampled or native is what "
            "packing is for",
            c.batch,
        ),
        "--accum-freq": Flag("accumulate", "", c.to("accumulate")),
        "--force-image-size": _read("data.resolution.max_side"),
        "--force-patch-dropout": _read("data.drop", "kind: fixed"),
        "--use-naflex": _main(
            _read("data.resolution", "mode: native; every image has its own length"), 0
        ),
        "--force-naflex-vision": _main(Flag("-", "towers take any aspect ratio"), 0),
        "--naflex-seq-lens": _main(_read("data.resolution.max_tokens", "the longest"), "+"),
        "--naflex-seq-len-probs": _main(
            Flag("", "data.resolution.mode: sampled draws a side for each image"), "+"
        ),
        "--naflex-patch-sizes": _main(_read("data.resolution.patch_sizes"), "+"),
        "--naflex-patch-size-probs": _main(_read("data.resolution.patch_sizes"), "+"),
        "--naflex-max-tokens-per-batch": _main(_read("data.budget.tokens.image")),
        "--naflex-max-text-tokens": _main(Flag("", "of GenLIP, which has no counterpart")),
        "--naflex-batch-divisor": _main(Flag("-", "batches hold any number of pairs")),
        "--naflex-loss-scale": _main(Flag("", "the loss is a mean over all pairs of a step")),
        "--naflex-pad-multiple": _main(Flag("-", _PADDING)),
        "--text-pad-multiple": _main(Flag("-", _PADDING)),
        "--length-bucketing": _main(Flag("-", _PADDING), 0),
        "--bucket-pool": _main(Flag("-", _PADDING)),
        "--bucket-chunk": _main(Flag("-", _PADDING)),
        "--bucket-prefetch-pools": _main(Flag("-", _PADDING)),
    },
    "Optimiser": {
        "--opt": Flag("optim.name, optim.args", "timm/NAME becomes NAME", c.optimizer),
        "--opt-kwargs": _main(_read("optim.args"), "k=v"),
        "--opt-fallback-list": _main(
            Flag("", "Muon takes the matrices of linear layers, AdamW the rest"), "*"
        ),
        "--lr": Flag("optim.lr", "open_clip's default is 5e-4", c.to("optim.lr")),
        "--beta1": _read("optim.betas", "0.9"),
        "--beta2": _read("optim.betas", "0.98 for ViTs"),
        "--eps": _read("optim.eps", "1e-6 for ViTs"),
        "--momentum": _read("optim.args"),
        "--wd": Flag("optim.weight_decay", "0.2", c.to("optim.weight_decay")),
        "--wd-exclude": _main(Flag("", "norms, biases, probe and scale have no decay"), "*"),
        "--grad-clip-norm": _read("optim.clip_norm", "none is 0"),
        "--warmup": _read("optim.schedule.warmup_steps"),
        "--lr-scheduler": Flag("optim.schedule.kind", "const becomes constant", c.schedule),
        "--skip-scheduler": _read("optim.schedule.kind", "constant, without warm-up"),
        "--epochs-cooldown": _read("optim.schedule.cooldown_samples"),
        "--lr-cooldown-end": Flag("", "a cool-down ends at 0"),
        "--lr-cooldown-power": Flag("", "a cool-down is linear"),
        "--image-layer-decay": _main(Flag("optim.layer_decay", "for both towers", c.layer_decay)),
        "--visual-layer-decay": _main(Flag("optim.layer_decay", "for both towers", c.layer_decay)),
        "--text-layer-decay": _main(Flag("optim.layer_decay", "for both towers", c.layer_decay)),
        "--text-pooler-own-group": _main(Flag("", "pooling learns at the full rate"), 0),
    },
    "Speed and memory": {
        "--precision": Flag(
            "precision", "bf16 for all kinds of mixed precision; float16 is not used", c.precision
        ),
        "--grad-checkpointing": Flag(
            "parallel.activation_checkpointing",
            "",
            c.if_set("parallel.activation_checkpointing", True),
        ),
        "--local-loss": Flag("-", _TWO_RANKS),
        "--gather-with-grad": Flag("-", _TWO_RANKS),
        "--torchcompile": Flag(
            "parallel.compile", "block by block", c.if_set("parallel.compile", True)
        ),
        "--torchcompile-strategy": _main(Flag("-", "blocks are compiled, one graph each")),
        "--torchcompile-backend": _main(Flag("", "inductor")),
        "--torchcompile-mode": _main(Flag("", "default")),
        "--torchscript": Flag("", "no TorchScript here", only="3.3"),
        "--trace": Flag("", "no TorchScript here", only="3.3"),
        "--device": Flag("device", "", c.device),
        "--dist-url": Flag("-", "torchrun says where ranks meet"),
        "--dist-backend": Flag("-", "nccl on CUDA, gloo on a CPU"),
        "--horovod": Flag("", "torchrun starts the ranks", only="3.3"),
        "--ddp-static-graph": Flag("-", "not needed"),
        "--no-set-device-rank": Flag("", "a rank takes the device of its local rank"),
        "--fsdp": _main(Flag("parallel.kind", "fsdp", c.if_set("parallel.kind", "fsdp")), 0),
        "--fsdp-no-reshard-after-forward": _main(
            Flag(
                "parallel.reshard_after_forward",
                "false",
                c.if_set("parallel.reshard_after_forward", False),
            ),
            0,
        ),
        "--fsdp-offload-cpu": _main(
            Flag("", "parallel.activation_checkpointing and accumulate save memory"), 0
        ),
        "--fsdp-checkpoint": _main(Flag("-", "always sharded; model/ is whole")),
    },
    "Checkpoints, logs and evaluations": {
        "--save-frequency": Flag(
            "checkpoint.every_steps, checkpoint.keep_every", "in steps", c.checkpoints
        ),
        "--save-most-recent": Flag("-", "the newest checkpoints are always kept"),
        "--delete-previous-checkpoint": _read("checkpoint.keep_every", "left out"),
        "--log-every-n-steps": Flag("log.every_steps", "", c.to("log.every_steps")),
        "--log-metric-every-n-steps": _main(
            Flag("log.every_steps", "metrics and terminal alike", c.to("log.every_steps"))
        ),
        "--train-loss-ema-samples": _main(Flag("", "the loss is shown as it is")),
        "--report-to": Flag("log.wandb, log.tensorboard", "online, true", c.report_to),
        "--wandb-project-name": _read("log.wandb_project"),
        "--wandb-notes": _read("log.wandb_notes"),
        "--val-frequency": _read("eval.validation.every_steps", "in steps"),
        "--val-retrieval-chunk-size": _main(Flag("-", "scores never are in memory all at once")),
        "--val-retrieval-precision": _main(Flag("-", "scores are compared in float64")),
        "--imagenet-val": Flag(
            "eval.evaluators", "kind: zeroshot", c.imagenet("imagenet", "imagenet")
        ),
        "--imagenet-v2": Flag(
            "eval.evaluators", "kind: zeroshot", c.imagenet("imagenet_v2", "index")
        ),
        "--zeroshot-frequency": _read("eval.evaluators.NAME.every_steps", "in steps"),
        "--remote-sync": Flag("", _REMOTE),
        "--remote-sync-frequency": Flag("", _REMOTE),
        "--remote-sync-protocol": Flag("", _REMOTE),
    },
    "Audio": {
        name: _main(Flag("", _AUDIO), values)
        for name, values in {
            "--audio-ext": None,
            "--audio-fill": None,
            "--audio-fusion": 0,
            "--audio-int16-normalize": 0,
            "--audio-layer-decay": None,
            "--audio-multiprocessing-context": None,
            "--audio-trunc": None,
            "--audio-zeroshot-audio-key": None,
            "--audio-zeroshot-class-key": None,
            "--audio-zeroshot-dataset": None,
            "--audio-zeroshot-multiprocessing-context": None,
            "--audio-zeroshot-split": None,
            "--audio-zeroshot-target-key": None,
            "--audio-zeroshot-template": None,
            "--audio-zeroshot-workers": None,
        }.items()
    },
}
FLAGS = {name: flag for section in TABLE.values() for name, flag in section.items()}

_PAGE = """\
# From open_clip

`navit-clip from-open-clip 'COMMAND'` prints a training command of open_clip as ours: the YAML of
the run, with the commands that use it and what could not be translated as comments.

```sh
navit-clip from-open-clip 'torchrun --nproc_per_node 4 -m open_clip_train.main
  --train-data "/data/cc12m/cc12m-train-{0000..2175}.tar" --train-num-samples 10968539
  --batch-size 320 --model ViT-B-32' > run.yaml
```

It is meant to be the same run: squares of the model's size, as many pairs in every batch,
open_clip's defaults where they differ from ours. Then make it ours: `data.resolution.mode: native`
or `sampled` keeps each image's aspect ratio, `data.drop` leaves patches out, and a budget of text
tokens that matches the captions (`navit-clip data inspect` measures them) leaves little padding. A
command without training data becomes commands of `navit-clip eval`, for which weights are a file.

Below is every flag of open_clip 3.3 and of its main branch (June 2026), marked where just one of
them has it. "-" needs no counterpart, an empty field has none. This page is written by
`python -m navit_clip.tools.from_open_clip.flags`.
"""


def page() -> str:
    """docs/from_open_clip.md."""
    return "\n".join([_PAGE, *(line for title in TABLE for line in _section(title))])


def _section(title: str) -> Iterator[str]:
    yield from (f"## {title}", "", "| open_clip | navit-clip | |", "|---|---|---|")
    for (ours, note, only), names in groupby(
        TABLE[title], lambda name: (TABLE[title][name].ours, *_about(TABLE[title][name]))
    ):
        flags = ", ".join(f"`{name}`" for name in names)
        fields = ", ".join(f"`{part}`" for part in ours.split(", ") if part not in ("", "-"))
        yield f"| {flags}{only} | {fields or ours} | {note} |"
    yield ""


def _about(flag: Flag) -> tuple[str, str]:
    return flag.note, f" ({flag.only})" if flag.only else ""


if __name__ == "__main__":
    print(page(), end="")
