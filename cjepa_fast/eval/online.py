"""While training: how well the target encoder's features tell held-out classes apart.

All ranks take their share of the images, in batches of the size that a step has, so that
nothing is compiled anew and ZeRO-3 gathers weights as often on each. The probes run on the first.
Shapes: n images of a set, B images of a batch, N patches, D width.
"""

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from cjepa_fast import config as configuration
from cjepa_fast.config import Config
from cjepa_fast.data.evaluation import eval_batches
from cjepa_fast.data.masks import Masks, MaskSampler
from cjepa_fast.data.sources import ImageSet, Limits, Subset
from cjepa_fast.eval.figures import snapshots
from cjepa_fast.eval.figures.sheets import load_images
from cjepa_fast.eval.probes import knn, linear
from cjepa_fast.eval.splits import Split, labelled_splits
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.distributed import gather_rows, rank, world_size
from cjepa_fast.runtime.image_size import height_width
from cjepa_fast.telemetry.progress import shown_bar

SCORES = ("knn", "knn_centred", "linear")  # that are always logged
# Of (features (n, D), labels (n,)) to fit on and (features (m, D), labels (m,)) to score: percent.
Probe = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], float | Mapping]


class _Stopped(Exception):
    """An evaluation was left."""


class OnlineEvaluation:
    """Evaluates an encoder on two labelled splits, and knows when it may.

    every: optimiser steps between evaluations; share: of the run's time that they may take, the
    first and the last apart; batch_size: images a rank takes at a time; probes: beside kNN and the
    linear probe. The rest as in eval_batches and knn.predict.
    """

    def __init__(
        self,
        splits: tuple[Split, Split],
        *,
        every: int,
        share: float,
        batch_size: int,
        k: int,
        temperature: float,
        probes: Sequence[Probe] = (),
        **reading,
    ):
        self.probes = probes
        self.splits, self.every, self.share = splits, every, share
        self.batch_size, self.k, self.temperature = batch_size, k, temperature
        self.reading = reading
        self._began_s, self._spent_s = time.monotonic(), 0.0
        self._told = False
        self.attach(print, stopped=lambda: False, paused=contextlib.nullcontext)

    def attach(
        self,
        say: Callable[[str], None],
        stopped: Callable[[], bool],
        paused: Callable[[], contextlib.AbstractContextManager],
        owed: bool = False,
    ) -> None:
        """To a training: see training.loop.Evaluation."""
        self._say, self._stopped, self._paused, self.owed = say, stopped, paused, owed

    def due(self, step: int) -> bool:
        """Whether to evaluate after this step; of rank 0 alone the answer counts."""
        self.owed |= step % self.every == 0
        if not self.owed or rank():
            return False
        passed_s = time.monotonic() - self._began_s
        if self._spent_s <= self.share * passed_s:
            return True
        if not self._told:
            self._told = True
            self._say(
                f"evaluation waits: {self._spent_s:.1f} s of {passed_s:.0f} s went into it, more "
                f"than eval.online.share = {self.share:g}"
            )
        return False

    def evaluate(self, encoder: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float] | None:
        """Percent right of kNN, plain and mean-subtracted, and of a linear probe.

        encoder: (B, 3, H, W) -> (B, N, D). Every rank calls it; the first has the answer, the
        others an empty dict, and so has the first, with a warning, where no image of a split can be
        read any more. None where attach's `stopped` said so between two batches: it stays owed.
        """
        vectors = []
        try:
            for images, keep in self.splits:
                features_nD, index_n = self._features(encoder, images, keep)
                vectors += [features_nD, images.labels[index_n]]
        except _Stopped:
            self.owed = True
            return None
        self.owed = False
        if rank():
            return {}
        if gone := [s for s, n in zip(self.splits, map(len, vectors[1::2]), strict=True) if not n]:
            images, keep = gone[0]
            self._say(
                f"WARNING: no scores of the target encoder: none of the {len(keep)} images in "
                f"{images.root} can be read any more (eval.online.data, eval.online.test)"
            )
            return {}
        with self._paused():
            own = [score for probe in self.probes for score in _named(probe, vectors)]
        return _scores(*vectors, k=self.k, temperature=self.temperature) | dict(own)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """What is done within it, evaluating and drawing, counts as time spent."""
        began_s = time.monotonic()
        yield
        self._spent_s += time.monotonic() - began_s

    @torch.no_grad()
    def _features(self, encoder, images: ImageSet, keep_n: torch.Tensor):
        """(n, D) fp32 and the positions (n,), on the CPU, of all ranks' shares; of the others than
        the first rank's no features."""
        share = keep_n[rank() :: world_size()]
        found = []
        with shown_bar(len(share), "evaluation") as bar:
            for images_BCHW, index_B in self._batches(images, share, len(keep_n)):
                if self._stopped():
                    raise _Stopped
                tokens_BND = encoder(images_BCHW)
                found.append((tokens_BND[: len(index_B)].float().mean(1).cpu(), index_B))
                bar.update(len(index_B))
        features, indices = zip(*found, strict=True)
        return gather_rows(torch.cat(features), torch.cat(indices))

    def _batches(
        self, images: ImageSet, share: torch.Tensor, total: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one size, equally many on each rank; positions of the real images."""
        B = self.batch_size
        read = eval_batches(Subset(images, share), batch_size=B, **self.reading)
        with contextlib.closing(read):
            for _ in range(math.ceil(math.ceil(total / world_size()) / B)):
                images_BCHW, index_B = next(read, (None, torch.empty(0, dtype=torch.int64)))
                yield self._filled(images_BCHW), share[index_B]

    def _filled(self, images_BCHW: torch.Tensor | None) -> torch.Tensor:
        """To a whole batch; of what is added nothing is read."""
        whole = torch.zeros(
            (self.batch_size, len(self.reading["mean"]), *height_width(self.reading["image_size"])),
            dtype=self.reading["dtype"],
            device=self.reading["device"],
        )
        if images_BCHW is not None:
            whole[: len(images_BCHW)] = images_BCHW
        return whole


class SnapshotImages:
    """A few images with their masks, as the encoders of the moment see them.

    images_BCHW: fp32 on the CPU, normalised by mean and std; masks: of these images.
    """

    def __init__(self, images_BCHW: torch.Tensor, masks: Masks, mean: tuple, std: tuple):
        self._images_B3HW, self._masks, self._look = images_BCHW, masks, (mean, std)

    def draw(self, target: Encoder, context: Encoder) -> dict[str, np.ndarray]:
        """By name, each (height, width, 3) uint8. Compiled encoders run uncompiled here."""
        weight = next(target.parameters())
        images_BCHW = self._images_B3HW.to(weight.device, weight.dtype)
        with torch.compiler.set_stance("force_eager"):
            return snapshots.figures(target, context, images_BCHW, self._masks, *self._look)


def build_online(
    config: Config, device: torch.device, dtype: torch.dtype, steps_per_epoch: int
) -> OnlineEvaluation | None:
    """By eval.online, None where it names no images."""
    own, data = config.eval.online, config.data
    if own.data is None:
        return None
    paths = (own.data, own.test, own.labels, own.test_labels)
    train, test, *labels = (path and configuration.expand_path(path) for path in paths)
    splits = distributed.local_rank_0_first(
        lambda: labelled_splits(
            train, test, own.max_train, own.max_test, *labels, limits=Limits.of(data)
        )
    )
    micro_batch, _ = data.micro_batches(distributed.world_size())
    return OnlineEvaluation(
        splits,
        every=own.every_epochs * steps_per_epoch,
        share=own.share,
        batch_size=micro_batch,
        k=config.eval.k,
        temperature=config.eval.temperature,
        probes=_distinct([probe_at(path) for path in own.probes]),
        image_size=data.image_size,
        resize=config.eval.crop,
        mean=data.mean,
        std=data.std,
        device=device,
        dtype=dtype,
        threads=data.threads,
        decoder=data.decoder,
    )


def build_snapshots(
    config: Config,
    images: ImageSet,
    masks: MaskSampler,
    stage: int = 0,
    say: Callable[[str], None] = print,
) -> SnapshotImages | None:
    """What draws a few of the training images on rank 0 (eval.online.pictures). stage: of ZeRO.

    None where nothing would show them, as drawing takes longer than evaluating: TensorBoard alone
    does; and, with a line that says so, where no rank has all weights.
    """
    data, count, shown = config.data, config.eval.online.pictures, config.telemetry.tensorboard
    if config.eval.online.data is None or not (count and shown) or distributed.rank() != 0:
        return None
    if stage == 3 and world_size() > 1:
        say(
            "no figures on TensorBoard: under ZeRO stage 3 no rank has all weights; stage 2 draws "
            "them, and so does `cjepa-eval attention` of a checkpoint"
        )
        return None
    images_BCHW = load_images(
        images,
        count,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        decoder=data.decoder,
    )
    drawn = masks(0, 0, torch.arange(len(images_BCHW)))
    return SnapshotImages(images_BCHW, drawn, data.mean, data.std)


def probe_at(path: str) -> Probe:
    """The function at "module:function". Raises ValueError."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"eval.online.probes: {path} cannot be imported ({error}); write it as "
            '"module:function", of a module on PYTHONPATH'
        ) from error


def _distinct(probes: list[Probe]) -> list[Probe]:
    """Raises ValueError where a probe's name, by which its scores are logged, is not its own."""
    names = [getattr(probe, "__name__", "") for probe in probes]
    for i, name in enumerate(names):
        if not name.isidentifier():
            raise ValueError(
                f"eval.online.probes: {probes[i]!r} has no name to log its scores by: write a "
                "function with def"
            )
        if name in (*SCORES, *names[:i]):
            taken = "a score that is always logged" if name in SCORES else "named twice"
            raise ValueError(f"eval.online.probes: {name} is {taken}: give it a name of its own")
    return probes


def _named(probe: Probe, vectors: list[torch.Tensor]) -> Iterator[tuple[str, float]]:
    """Its scores by name: its own name, and behind it the key where it gives several."""
    found = probe(*vectors)
    for key, value in (found if isinstance(found, Mapping) else {"": found}).items():
        yield f"{probe.__name__}{'_' * bool(key)}{key}", float(value)


def _scores(train_nD, label_n, test_mD, test_label_m, **options) -> dict[str, float]:
    options["k"] = min(options["k"], len(train_nD))
    tops = knn.both(train_nD, label_n, test_mD, test_label_m, **options)
    percent = linear.percent(linear.ridge(train_nD, label_n, test_mD), test_label_m)
    found = tops["top1"], tops["top1_centred"], percent
    return dict(zip(SCORES, found, strict=True))
