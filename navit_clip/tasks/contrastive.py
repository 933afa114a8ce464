"""Contrastive image–text training: CLIP's softmax loss or SigLIP's sigmoid loss over all pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from navit_clip.architectures import architecture
from navit_clip.configs import check_choices
from navit_clip.data.builders.pairs import PairBuilder, PairInputs
from navit_clip.data.config import DataConfig, check_captions
from navit_clip.data.mixture import Mixture
from navit_clip.errors import UserError
from navit_clip.losses.contrastive import sigmoid_contrastive_loss, softmax_contrastive_loss
from navit_clip.losses.mean import mean_over_ranks
from navit_clip.model import NaViTCLIP
from navit_clip.models.clip import CLIP, CLIPConfig, CLIPOutput
from navit_clip.models.flops import LengthSums, backward_flops, forward_flops
from navit_clip.models.lora import LoraConfig, add_adapters, merge_adapters
from navit_clip.models.masked_features import MaskedFeatures, MaskedFeaturesConfig
from navit_clip.packed.batch import Batch, Inputs
from navit_clip.tasks.base import Loss
from navit_clip.tasks.caption_report import report_captions
from navit_clip.tasks.confusions import hard_pairs
from navit_clip.tasks.distillation import DistillConfig, Teacher
from navit_clip.tasks.draw_batch import draw_batch, pairs_of
from navit_clip.tasks.images import (
    ImageTask,
    ImageTaskConfig,
    check_sizes,
    layers_above,
    refuse_mixing,
    take_weights,
)
from navit_clip.tasks.locking import LockConfig, lock_towers
from navit_clip.tasks.media import Drawing, Media, webp
from navit_clip.tasks.source import InitConfig
from navit_clip.tokenizers.base import Tokenizer

_MOST_SIDE = 1460  # pixels of the drawing of a batch


@dataclass(frozen=True)
class ContrastiveLossConfig:
    """The contrastive loss.

    Attributes:
        kind: ``softmax`` (CLIP), or ``sigmoid`` (SigLIP), which needs model.init_bias.
        chunk_size: Side of the largest block of logits that ever exists; null takes what suits
            the device.
        precision: ``auto`` multiplies as the towers do, under `precision` bf16 on CUDA in bfloat16;
            ``fp32`` in float32. Sums are float32 in any case, and so is all of it on the CPU.
        exchange: How texts reach the images of other ranks: ``ring`` passes them from rank to rank,
            ``gather`` collects some of all ranks' at once, in rounds. ``auto`` gathers with more
            than 16 ranks and fewer than 4,096 pairs on each.
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    chunk_size: int | None = None
    precision: Literal["auto", "fp32"] = "auto"
    exchange: Literal["auto", "ring", "gather"] = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")


@dataclass(frozen=True)
class ContrastiveConfig(ImageTaskConfig):
    """Contrastive training of an image and a text tower.

    Attributes:
        kind: ``contrastive``.
        model: Architecture of both towers; that of `init` if it is given. Its ``name`` gives all
            fields that are not given: navit_b16 (ti, s, b, l, h; 14, 16, 32), swin_t (p, t, s, b,
            l), open_clip:NAME.
        loss: The loss over all pairs of all ranks.
        distill: A teacher to learn from beside.
        lock: Which towers keep their first weights.
        masked: Masked prediction of an EMA's features beside the contrastive loss.
        lora: Adapters in towers that keep them too.
        captions: Caption field to sampling weight: ``all`` captions of an image (those of
            ``json.captions``, ``json.caption`` and ``txt``, each once), ``txt``, any text member
            such as ``title.txt``, or ``json.FIELD``. A dataset of data.mix may have its own.

    Raises:
        ValueError: If fields do not fit each other; names them.
    """

    needs_tokenizer = True

    kind: Literal["contrastive"] = "contrastive"
    model: CLIPConfig = field(default_factory=CLIPConfig)
    loss: ContrastiveLossConfig = field(default_factory=ContrastiveLossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    lock: LockConfig = field(default_factory=LockConfig)
    masked: MaskedFeaturesConfig = field(default_factory=MaskedFeaturesConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    captions: dict[str, float] = field(default_factory=lambda: {"all": 1.0})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_captions("captions", self.captions)
        self.lock.check(self.model)
        for tower in self.lora.towers:
            if getattr(self.lock, tower):
                raise ValueError(
                    f"lora.{tower} keeps all of the tower's own weights: leave lock.{tower} out"
                )
        if (self.loss.kind == "sigmoid") != (self.model.init_bias is not None):
            raise ValueError(
                "loss.kind sigmoid and model.init_bias go together (SigLIP uses -10), got "
                f"loss.kind={self.loss.kind} model.init_bias={self.model.init_bias}"
            )
        kept = self.lock.image or bool(self.lora.image)
        if self.masked.weight and (kept or self.model.image.stem != "none"):
            raise ValueError(
                f"masked.weight={self.masked.weight} trains the image tower to see hidden patches: "
                "lock.image must be false, lora.image empty and model.image.stem none, got "
                f"{str(self.lock.image).lower()}, {self.lora.image} and {self.model.image.stem}"
            )

    @property
    def kept(self) -> tuple[str, ...]:
        """The towers that are locked or have adapters."""
        locked = (f"lock.{tower}" for tower in self.lock.unlocked_blocks)
        return *locked, *(f"lora.{tower}" for tower in self.lora.towers)

    def check(self, data: DataConfig) -> None:
        """Compares budgets and sizes with what the towers take."""
        resolution, image = data.resolution, self.model.image
        longest = {
            "image": (resolution.max_tokens, "data.resolution.max_tokens"),
            "text": (self.model.text.context_length, "task.model.text.context_length"),
        }
        data.budget.check(longest)
        check_sizes(data, image)
        refuse_mixing(data, self.kind)

    def build(self, data: DataConfig) -> ContrastiveTask:
        """The task on this data."""
        return ContrastiveTask(self, data)

    @classmethod
    def defaults_from(cls, init: InitConfig, run_dir: Path) -> dict[str, Any]:
        """The architecture of the model that the run starts from, or of its image tower alone."""
        model = init.read_config(run_dir)
        if isinstance(model, CLIPConfig):
            return {"model": asdict(model)}
        return super().defaults_from(init, run_dir)

    @classmethod
    def named_fields(cls, name: str) -> dict[str, Any]:
        """Both towers."""
        return {"model": asdict(architecture(name))}


class ContrastiveTask(ImageTask):
    """Both towers, pairs, and the loss over the pairs of all ranks.

    Args:
        config: Model, loss and captions.
        data: How images are sized and dropped.
    """

    couples_examples = True
    _predicts = False  # as of `before_step`
    _tokenizer: Tokenizer | None = None

    def build_model(self) -> CLIP:
        """A new model with random weights, on the host."""
        return CLIP(self.config.model)

    def build_samples(self, tokenizer: Tokenizer | None, seed: int) -> PairBuilder:
        """What makes pairs of samples."""
        if tokenizer is None:
            raise UserError("init.model brings no tokenizer: give `tokenizer`")
        self._tokenizer = tokenizer
        image, text = self.config.model.image, self.config.model.text
        if tokenizer.vocab_size > text.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but task.model.text.vocab_size="
                f"{text.vocab_size}: raise it"
            )
        return PairBuilder(
            self.data.resolution,
            self.data.drop,
            image.patch_size,
            image.position.max_grid_side,
            seed,
            self.config.captions,
            tokenizer,
            text.context_length,
            augment=self.data.augment,
            planner=self.planner,
            hide=self.config.masked.rate if self.config.masked.weight else 0.0,
        )

    def report(self, mixture: Mixture, tokenizer: Tokenizer | None) -> Iterator[str]:
        """Which captions are read, and how much of them the tokenizer knows."""
        if tokenizer is None:
            return iter(())
        return report_captions(mixture, self.config.captions, tokenizer)

    def count(self, inputs: Inputs) -> float:
        """Pairs."""
        assert isinstance(inputs, PairInputs)
        return inputs.images.segments.num_examples

    def loss(
        self,
        outputs: CLIPOutput,
        inputs: Sequence[Inputs] = (),
        counts: Sequence[float] = (),
    ) -> Loss:
        """The loss over the pairs of all ranks; a collective call."""
        config = self.config.loss
        features = outputs.image_ED, outputs.text_ED, outputs.logit_scale
        device = outputs.image_ED.device.type
        follow = config.precision == "auto"
        # With them the ranks need not ask each other on the device.
        ring: dict[str, Any] = {
            "chunk_size": config.chunk_size,
            "counts": [int(count) for count in counts] or None,
            "exchange": config.exchange,
        }
        metrics = {"logit_scale": outputs.logit_scale.detach()}
        with nullcontext() if follow else torch.autocast(device, enabled=False):
            if config.kind == "softmax":
                total = softmax_contrastive_loss(*features, **ring)
            else:
                assert outputs.logit_bias is not None  # checked by ContrastiveConfig
                total = sigmoid_contrastive_loss(*features, outputs.logit_bias, **ring)
                # A copy: it is read after the optimiser may have changed the parameter.
                metrics["logit_bias"] = outputs.logit_bias.detach().clone()
            if self.teacher is not None:
                distillation = self.teacher.loss(outputs, inputs, **ring)
                total = total + self.config.distill.weight * distillation
                metrics["distillation"] = distillation.detach()
        if outputs.masked_E is not None:
            masked = mean_over_ranks(outputs.masked_E, counts)
            metrics["masked_loss"] = masked.detach()
            total = total + self.config.masked.weight * masked
        return Loss(total, metrics)

    @cached_property
    def teacher(self) -> Teacher | None:
        """The teacher, if there is one; after `build_samples`, which is given the tokenizer."""
        config = self.config
        if config.distill.teacher is None:
            return None
        return Teacher(config.distill, config.model, self.data, self._tokenizer)

    def drawing(self, batch: Batch[Any], tokenizer: Tokenizer | None) -> Drawing | None:
        """The packed batch patch by patch, with its captions."""
        pairs = pairs_of(batch, tokenizer.decode if tokenizer else lambda ids: "")
        return Drawing(webp(draw_batch(batch.counts, pairs, "the training"), _MOST_SIDE))

    def examples(
        self, inputs: Inputs, outputs: Sequence[Tensor], tokenizer: Tokenizer | None
    ) -> Mapping[str, Media]:
        """Also margins of the logits and the pairs that are confused most."""
        assert isinstance(inputs, PairInputs)
        image_ED, text_ED, scale, *_ = outputs
        hard = hard_pairs(inputs, (image_ED, text_ED, scale), tokenizer)
        return {**super().examples(inputs, outputs, tokenizer), **hard}

    def before_step(self, model: nn.Module, step: int) -> None:
        """Begins masked prediction when it is due."""
        self._predicts = self.config.masked.weight > 0 and step >= self.config.masked.start_step
        if (masked := cast(CLIP, model).masked) is not None:
            masked.active = self._predicts

    def after_step(self, model: nn.Module, found_inf: Tensor) -> None:
        """Keeps the logit scale within its maximum, and the teacher near the image tower."""
        clip = cast(CLIP, model)
        clip.clamp_scale()
        if clip.masked is not None:
            clip.masked.follow(clip.image, self.config.masked.decay, found_inf)

    def adapt(self, model: nn.Module) -> None:
        """Adds adapters to the towers that are configured to learn by them."""
        add_adapters(cast(CLIP, model), self.config.lora)

    def plain_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Merges the adapters, if there are any."""
        lora = self.config.lora
        return merge_adapters(weights, lora.scale) if lora.towers else weights

    def describe(self, folder: Path) -> None:
        """Writes the description as model.json, and the adapters' settings if there are any."""
        super().describe(folder)
        self.config.lora.write(folder)

    def prepare(self, model: nn.Module) -> None:
        """Locks towers, adds masked prediction and reads the teacher, as configured."""
        super().prepare(model)
        clip = cast(CLIP, model)
        lock_towers(clip, self.config.lock)
        if self.config.masked.weight:
            clip.masked = MaskedFeatures(clip.image)
        if self.teacher is not None:  # one that does not fit is refused before there is a batch
            self.teacher.model.to(clip.device)

    def layers_above(self, name: str) -> int:
        """Those of its tower; projections and scale have none above them."""
        tower, _, rest = name.partition(".")
        if tower not in ("image", "text"):
            return 0
        return layers_above(rest, getattr(self.config.model, tower).encoder.depth)

    def flops(self, inputs: Inputs) -> float:
        """FLOPs of one forward and one backward pass of both towers, and of the teacher's forward.

        Args:
            inputs: On any device; only the lengths of examples are read, which the host holds.
        """
        assert isinstance(inputs, PairInputs)
        images, texts = (
            LengthSums.of(segments.lengths[: segments.num_examples])
            for segments in (inputs.images.segments, inputs.texts.segments)
        )
        model, lock, adapted = self.config.model, self.config.lock, self.config.lora.towers
        model = replace(model, image=model.image.with_patch_size(inputs.images.patch_size))
        towers = forward_flops(model, images, texts)
        total = sum(
            sum(forward)
            + backward_flops(
                forward,
                trained_fraction=lock.trained_fraction(model, tower),
                adapted=tower in adapted,
            )
            for tower, forward in towers.items()
        )
        if self._predicts:  # the tower reads all again, and so does the teacher, forward alone
            tower = towers["image"]._replace(pool=0, projection=0)
            head = 2 * model.image.encoder.width**2 * images.tokens
            total += 2 * sum(tower) + backward_flops(tower) + 3 * head
        if self.teacher is not None:
            model = self.teacher.model.config
            model = replace(model, image=model.image.with_patch_size(inputs.images.patch_size))
            total += sum(map(sum, forward_flops(model, images, texts).values()))
        return total

    def start_from(self, init: InitConfig) -> tuple[nn.Module, Tokenizer | None]:
        """The model that the run starts from, and its tokenizer.

        Of a classifier or a masked image model it takes the image tower; all else is new.
        """
        model = init.read_model()
        if not isinstance(model, NaViTCLIP):
            return self.with_tower(init, model), None
        init.check("task.model", asdict(self.config.model), asdict(model.config))
        if model.config != self.config.model:  # rotary positions, which `check` lets one add
            extended = NaViTCLIP(self.config.model, model.tokenizer, model.preprocess)
            take_weights(extended, model)
            model = extended
        return model.train(), model.tokenizer
