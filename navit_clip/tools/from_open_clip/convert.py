"""What flags of open_clip's trainer become: each function sets fields of our configuration.

`CONVERT` has one for each flag that has a counterpart, unless the function of another flag reads
it. They are called with the value of the flag, given or open_clip's default, unless it is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from navit_clip.errors import UserError
from navit_clip.tools.from_open_clip.translation import Translation

OPEN_CLIP = "open_clip:"
STAND_IN = "ViT-B-16"  # for models that the packed towers cannot be
_NAFLEX_LENGTHS = (128, 256, 576, 784, 1024)  # open_clip's NaFlexBatchScheduler


Convert = Callable[[Translation, Any], None]


def to(path: str) -> Convert:
    """Sets a field to the value."""
    return lambda t, value: t.set(path, value)


def if_set(path: str, value: Any) -> Convert:
    """Sets a field if the flag, which has no value, is given."""
    return lambda t, given: t.set(path, value) if given else None


def run_dir(t: Translation, logs: str) -> None:
    """The folder of logs and the name become one."""
    root = "runs" if logs.lower() == "none" else logs
    t.set("run_dir", str(Path(root) / (t.args.name or t.args.model.replace("/", "-"))))


def epochs(t: Translation, value: int) -> None:
    """Epochs of a number of samples that need not be all of them."""
    if t.args.train_num_samples:
        t.set("samples", value * t.args.train_num_samples)
    else:
        t.set("epochs", value)


def train_data(t: Translation, value: str) -> None:
    """One dataset, several that are read by their sizes, or several by weight."""
    captions(t, t.args.text_key or "txt")
    shards = [t.shards(source) for source in value.split("::")]
    if (factors := t.args.train_data_upsampling_factors) is None:
        t.set("data.train", shards[0] if len(shards) == 1 else shards)
        return
    weights = [float(factor) for factor in factors.split("::")]
    if len(weights) != len(shards):
        raise UserError(f"--train-data-upsampling-factors {factors}: give {len(shards)} numbers")
    for i, (name, weight) in enumerate(zip(shards, weights, strict=True)):
        t.set(f"data.mix.dataset{i}", {"shards": name, "weight": weight})
    t.lose(
        "--train-data-upsampling-factors",
        "a weight is a dataset's part of the samples, not a multiple of its size: multiply each "
        "data.mix.NAME.weight by the size",
    )


def val_data(t: Translation, value: str) -> None:
    """Validation loss, in batches of the same size."""
    if not t.args.val_frequency:
        return
    t.set("data.validation", t.shards(value))
    t.set("eval.validation.batch", t.args.batch_size)
    t.every("eval.validation.every_steps", t.args.val_frequency)


def imagenet(name: str, class_map: str) -> Convert:
    """Zero-shot classification during the training."""

    def convert(t: Translation, data: str) -> None:
        if not t.args.zeroshot_frequency:
            return
        path = f"eval.evaluators.{name}"
        t.set(path, {"kind": "zeroshot", "data": data, "class_map": class_map})
        t.set(f"{path}.classnames", "imagenet")
        t.every(f"{path}.every_steps", t.args.zeroshot_frequency)

    return convert


def captions(t: Translation, value: str) -> None:
    """Where a caption is read: the first of several places, or one drawn by weight."""
    is_json = t.args.json_text_key is not None
    keys = (t.args.json_text_key or value).split(";")
    weights = (t.args.json_text_key_probs if is_json else None) or [1.0]
    taken = {key: weight for key, weight in zip(keys, weights, strict=False) if weight > 0}
    t.set("task.captions", {f"json.{k}" if is_json else k: w for k, w in taken.items()})
    if others := [key for key in keys if key not in taken]:
        flag = "--json-text-key" if is_json else "--text-key"
        t.lose(
            flag, f"{', '.join(others)}: captions are drawn by weight, there is no second choice"
        )


def model(t: Translation, name: str) -> None:
    """An architecture with its tokenizer, or a model with its weights."""
    from navit_clip import architectures  # torch; mistakes in flags are seen before it

    try:
        t.model = architectures.architecture(f"{OPEN_CLIP}{name}")
    except UserError as error:
        reason = str(error).partition(": ")[2].partition("; supported")[0]
        t.lose("--model", f"{name}: {reason}; {OPEN_CLIP}{STAND_IN} is in its place")
        t.is_stand_in, name = True, STAND_IN
        t.model = architectures.architecture(f"{OPEN_CLIP}{name}")
    if t.starts_from and not t.is_stand_in:
        t.set("init", {"model": f"{OPEN_CLIP}{name}", "weights": t.starts_from})
        return
    t.set("task.model.name", f"{OPEN_CLIP}{name}")
    if not t.model.text.fill_context:
        t.set("tokenizer.kind", "open_clip")
        return
    t.set("tokenizer", {"kind": "huggingface", "path": "tokenizer.json"})
    t.lose("--model", f"{name}: put the tokenizer.json of its Hugging Face repository here")


def teacher(t: Translation, name: str) -> None:
    """A model to distil."""
    t.set("task.distill.teacher", f"{OPEN_CLIP}{name}")


def weights(flag: str, note: str = "") -> Convert:
    """Set with the model."""

    def convert(t: Translation, value: str) -> None:
        if t.is_stand_in and value:
            t.lose(flag, f"{value} belongs to {t.args.model}")
        elif note and value != "latest":
            t.lose(flag, f"{value}: {note}")

    return convert


def architecture(*names: str, fixed: Any = None) -> Convert:
    """Sets fields of the architecture, which a run that starts from a model takes from there.

    Args:
        names: Of the fields, below task.model.
        fixed: The value, where the flag has none.
    """

    def convert(t: Translation, value: Any) -> None:
        if value is False:
            return
        for name in names:
            if "init" in t.config:
                t.lose(f"task.model.{name}", f"{value}: weights of open_clip bring their own")
            else:
                t.set(f"task.model.{name}", value if fixed is None else fixed)

    return convert


def siglip(t: Translation, given: bool) -> None:
    """The loss goes with a bias, which some models have anyway."""
    has_bias = t.model.init_bias is not None
    if given and not has_bias:
        if "init" in t.config:
            t.lose("--siglip", "the weights have no bias for it: the loss stays softmax")
            return
        t.set("task.model.init_scale", 10.0)
        t.set("task.model.init_bias", -10.0)
    if given or has_bias:
        t.set("task.loss.kind", "sigmoid")


def batch(t: Translation, size: int) -> None:
    """Squares of the model's side and a constant number of pairs, or NaFlex's lengths."""
    args, image = t.args, t.model.image
    context = args.force_context_length or t.model.text.context_length
    sides = args.force_image_size or [image.position.table_side * image.patch_size]
    if len({*sides}) > 1:
        raise UserError(f"--force-image-size {sides}: give one side, as squares are what is meant")
    patches = (sides[0] // image.patch_size) ** 2
    if args.force_image_size and "init" not in t.config:
        t.set("task.model.image.position.table_side", sides[0] // image.patch_size)
    drop = args.force_patch_dropout or 0.0
    if drop:
        t.set("data.drop", {"kind": "fixed", "rate": drop})
    if args.use_naflex:
        lengths = args.naflex_seq_lens or _NAFLEX_LENGTHS
        tokens = args.naflex_max_tokens_per_batch or 4 * 4096
        size = tokens // min(lengths)
        t.set("data.resolution.mode", "native")
        t.set("data.resolution.max_tokens", max(lengths))
        if sizes := args.naflex_patch_sizes:
            weights = args.naflex_patch_size_probs or [1.0] * len(sizes)
            t.set("data.resolution.patch_sizes", dict(zip(sizes, weights, strict=True)))
    else:
        tokens = size * math.ceil(patches * (1 - drop))
        t.set("data.resolution.mode", "square")
        t.set("data.resolution.max_side", sides[0])
        t.set("data.resolution.max_tokens", patches)
        t.set("data.packing", "constant")
    t.set("data.budget", {"tokens": {"image": tokens, "text": size * context}})
    t.set("data.budget.max_examples", size)


def augment(t: Translation, given: dict[str, Any]) -> None:
    """Random crops of at least 0.9 of the area by default; NaFlex's images are whole."""
    least, most = given.get("scale", (0.9, 1.0))
    if least < 1 and not t.args.use_naflex:
        t.set("data.augment.min_area", least)
    others = [name for name in given if name not in ("scale", "use_timm")]
    if most < 1:
        others.append(f"the upper end of scale, {most}")
    if others:
        t.lose("--aug-cfg", f"{', '.join(others)}: see the fields of data.augment")


def max_pixels(t: Translation, value: int) -> None:
    """A limit; ours cannot be lifted."""
    if value:
        t.set("data.resolution.max_pixels", value)
    else:
        t.lose("--max-image-pixels", "0: larger images than data.resolution.max_pixels are skipped")


def optimizer(t: Translation, name: str) -> None:
    """AdamW with its own fields, another with arguments by name."""
    args, name = t.args, name.lower()
    t.set("optim.clip_norm", args.grad_clip_norm or 0.0)
    betas = None if args.beta1 is None or args.beta2 is None else [args.beta1, args.beta2]
    if name == "adamw":
        t.set("optim.betas", betas)
        t.set("optim.eps", args.eps)
        return
    given = {"betas": betas, "eps": args.eps, "momentum": args.momentum, **(args.opt_kwargs or {})}
    if name == "nadamw":
        name, given = "torch.NAdam", {**given, "decoupled_weight_decay": True}
    t.set("optim.name", name.removeprefix("timm/"))
    if known := {key: value for key, value in given.items() if value is not None}:
        t.set("optim.args", known)


def schedule(t: Translation, kind: str) -> None:
    """Kind of the schedule, and its end."""
    args = t.args
    if args.skip_scheduler:
        t.set("optim.schedule.kind", "constant")
        return
    t.set("optim.schedule.kind", "cosine" if kind == "cosine" else "constant")
    t.set("optim.schedule.warmup_steps", args.warmup)
    if kind != "const-cooldown":
        return
    if args.train_num_samples and args.epochs_cooldown:
        samples = args.epochs_cooldown * args.train_num_samples
        t.set("optim.schedule.cooldown_samples", samples)
    else:
        t.unpaced.append("optim.schedule.cooldown_samples")


def layer_decay(t: Translation, value: float) -> None:
    """One for both towers."""
    args = t.args
    image = args.image_layer_decay or getattr(args, "visual_layer_decay", None)
    found = {decay for decay in (image, args.text_layer_decay) if decay}
    t.set("optim.layer_decay", min(found))
    if image != args.text_layer_decay:
        line = "optim.layer_decay is that of both towers"
        if not any(lost.endswith(line) for lost in t.lost):
            t.lose("--image-layer-decay, --text-layer-decay", line)


def lock(tower: str, groups: str, kept: int) -> Convert:
    """Locks a tower.

    Args:
        tower: Ours.
        groups: Flag of how many of open_clip's groups learn.
        kept: How many of those are none of our blocks: the projection, which always learns here.
    """

    def convert(t: Translation, given: bool) -> None:
        if not given:
            return
        t.set(f"task.lock.{tower}", True)
        count = getattr(t.args, groups)
        encoder = getattr(t.model, tower).encoder
        if blocks := min(max(0, count - kept), encoder.depth):
            t.set(f"task.lock.{tower}_unlocked_blocks", blocks)

    return convert


def precision(t: Translation, value: str) -> None:
    """Mixed precision is that of bfloat16."""
    t.set("precision", "fp32" if value == "fp32" else "bf16")
    if value in ("fp16", "bf16") or value.startswith("pure"):
        t.lose("--precision", f"{value}: bf16 keeps parameters in float32")


def device(t: Translation, value: str) -> None:
    """CUDA is taken where there is one."""
    if value.startswith("cpu"):
        t.set("device", "cpu")
    elif not value.startswith("cuda"):
        t.lose("--device", f"{value}: cuda and cpu are supported")


def checkpoints(t: Translation, frequency: int) -> None:
    """All are kept unless the last one alone is to be."""
    t.every("checkpoint.every_steps", frequency)
    if not t.args.delete_previous_checkpoint and (steps := t.steps(frequency)) is not None:
        t.set("checkpoint.keep_every", steps)


def mirror(t: Translation, address: str) -> None:
    """The copy of a run has its name below the address."""
    t.set("checkpoint.mirror", f"{address.rstrip('/')}/{Path(t.config['run_dir']).name}")


def report_to(t: Translation, value: str) -> None:
    """Dashboards."""
    names = set(filter(None, value.split(",")))
    if names & {"wandb", "all"}:
        t.set("log.wandb", "online")
        t.set("log.wandb_project", t.args.wandb_project_name)
        for field, given in (("name", t.args.name), ("notes", t.args.wandb_notes)):
            if given:
                t.set(f"log.wandb_{field}", given)
    if names & {"tensorboard", "all"}:
        t.set("log.tensorboard", True)
    for name in sorted(names - {"wandb", "tensorboard", "all"}):
        t.lose("--report-to", f"{name}: metrics.jsonl of the run directory has all metrics")


# Flags that the functions of others read, though no field stands for them alone.
READ = ("--dataset-type", "--csv-separator")
CONVERT: dict[str, Convert] = {
    "--logs": run_dir,
    "--seed": to("seed"),
    "--epochs": epochs,
    "--model": model,
    "--pretrained": weights("--pretrained"),
    "--resume": weights("--resume", "weights are taken, not epoch and optimiser"),
    "--force-context-length": architecture("text.context_length"),
    "--force-quick-gelu": architecture(
        "image.encoder.activation", "text.encoder.activation", fixed="quick_gelu"
    ),
    "--image-mean": architecture("image.pixel_mean"),
    "--image-std": architecture("image.pixel_std"),
    # open_clip's last group of a vision tower is the projection.
    "--lock-image": lock("image", "lock_image_unlocked_groups", 1),
    "--lock-text": lock("text", "lock_text_unlocked_layers", 0),
    "--siglip": siglip,
    "--distill-model": teacher,
    "--distill-pretrained": to("task.distill.weights"),
    "--train-data": train_data,
    "--val-data": val_data,
    "--max-image-pixels": max_pixels,
    "--workers": to("data.workers"),
    "--aug-cfg": augment,
    "--batch-size": batch,
    "--accum-freq": to("accumulate"),
    "--opt": optimizer,
    "--lr": to("optim.lr"),
    "--wd": to("optim.weight_decay"),
    "--lr-scheduler": schedule,
    "--image-layer-decay": layer_decay,
    "--visual-layer-decay": layer_decay,
    "--text-layer-decay": layer_decay,
    "--precision": precision,
    "--grad-checkpointing": if_set("parallel.activation_checkpointing", True),
    "--torchcompile": if_set("parallel.compile", True),
    "--device": device,
    "--fsdp": if_set("parallel.kind", "fsdp"),
    "--fsdp-no-reshard-after-forward": if_set("parallel.reshard_after_forward", False),
    "--save-frequency": checkpoints,
    "--log-every-n-steps": to("log.every_steps"),
    "--log-metric-every-n-steps": to("log.every_steps"),
    "--report-to": report_to,
    "--remote-sync": mirror,
    "--imagenet-val": imagenet("imagenet", "imagenet"),
    "--imagenet-v2": imagenet("imagenet_v2", "index"),
}
