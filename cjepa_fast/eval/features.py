"""One vector an image: the encoder's last-layer tokens, averaged over the patches.

Shapes: n images of a set, B images of a batch, D width.
"""

import hashlib
from collections.abc import Callable

import torch
from tqdm import tqdm

from cjepa_fast.data.evaluation import eval_batches
from cjepa_fast.data.sources import ImageSet
from cjepa_fast.vit import Encoder

QUIET_S = 5.0  # seconds before a progress bar appears


@torch.inference_mode()
def extract(
    encoder: Encoder,
    images: ImageSet,
    *,
    keep: torch.Tensor | None = None,
    crop: float = 1.0,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    threads: int = 2,
    title: str = "features",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, D) fp32 and the images' positions in the set (n,) int64, both on the CPU.

    keep: positions to use, ascending (default: all). crop: share of the short side of the centre
    crop. An image that turns out unreadable is left out, hence the positions.
    """
    encoder = encoder.to(device).eval()
    device_type = torch.device(device).type

    def pooled(images_B3HW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
            return encoder(images_B3HW).float().mean(1)

    return image_vectors(
        images, pooled, image_size=encoder.image_size, mean=encoder.mean, std=encoder.std,
        keep=keep, crop=crop, batch_size=batch_size, device=device, threads=threads, title=title,
    )  # fmt: skip


def image_vectors(
    images: ImageSet,
    function: Callable[[torch.Tensor], torch.Tensor],
    *,
    image_size: int,
    mean: tuple,
    std: tuple,
    keep: torch.Tensor | None,
    crop: float,
    batch_size: int,
    device: torch.device | str,
    threads: int,
    title: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`function` (B, 3, H, W) -> (B, D) over a set: (n, D) and the positions (n,), on the CPU."""
    chosen = images if keep is None else Subset(images, keep)
    batches = eval_batches(
        chosen, image_size=image_size, resize=crop, batch_size=batch_size, device=device,
        dtype=torch.float32, mean=mean, std=std, threads=threads,
    )  # fmt: skip
    vectors, places = [], []
    shown = {"delay": QUIET_S, "leave": False, "disable": None}  # None: off in files and pipes
    with tqdm(total=len(chosen), desc=title, unit="image", **shown) as bar:
        for images_B3HW, index_B in batches:
            vectors.append(function(images_B3HW).float().cpu())
            places.append(index_B.clone())
            bar.update(len(index_B))
    place_n = torch.cat(places)
    return torch.cat(vectors), place_n if keep is None else keep[place_n]


class Subset:
    """Some images of a set, by position, with what evaluation reads of an ImageSet."""

    def __init__(self, images: ImageSet, keep_n: torch.Tensor):
        self.images, self.keep_n = images, keep_n
        self.sizes_N2 = images.sizes_N2[keep_n.numpy()]

    def __len__(self) -> int:
        return len(self.keep_n)

    def name(self, i: int) -> str:
        return self.images.name(int(self.keep_n[i]))

    def read(self, i: int) -> bytes:
        return self.images.read(int(self.keep_n[i]))


def split_by_name(images: ImageSet, test_share: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions for training and for testing: by a hash of each image's name, so that a picture
    stays on its side when others are added or removed."""
    hashes = [hashlib.blake2b(images.name(i).encode("utf-8", "surrogateescape"), digest_size=8)
              for i in range(len(images))]  # fmt: skip
    share = torch.tensor([int.from_bytes(h.digest(), "big") / 2**64 for h in hashes])
    test = share < test_share
    return (~test).nonzero().flatten(), test.nonzero().flatten()
