"""Images of one split that are also in another, possibly brighter, noisier, recompressed or shifted by a pixel.

Identical images are found by their digests. Candidates for near-duplicates are pairs whose perceptual hashes differ in
few bits (`pipeline.dedup.perceptual_hash`); one image of each pair is also hashed shifted by a pixel in each direction.
The embeddings of the candidates are then compared.

The required similarity depends on the image: two handwritten digits '1' by different people differ less than two copies
of a photograph. A pair counts if it is much closer than the closest unrelated image is expected to be (in the spirit of
Lowe's ratio test, 2004, https://doi.org/10.1023/B:VISI.0000029664.99615.94). This distance is estimated on a sample of
the first split and extrapolated to the complete split by the local dimension of the images (Levina and Bickel 2004,
https://proceedings.neurips.cc/paper/2004/hash/74934548253bcab8490ebd74afed7031-Abstract.html).

Measured recall on 500 changed copies of each kind, inserted into the training splits:

| change | CIFAR-10 | MNIST and EMNIST |
|---|---|---|
| brightness, noise of 8 levels, JPEG quality 50 | over 99% | over 99% |
| shift by one pixel | 100% | 90 to 99% |
| noise of 16 levels | 98% | 90 to 93% |
| downsampled to 24 pixels and upsampled | 100% | 81 to 92% |
| shift by half a pixel | 99% | 39 to 66% |

Of 21 pairs of the same photograph in a fifth of CIFAR-10, identified by eye, 12 are found. Not found are flipped,
rotated, inverted and cropped copies, and images with more than seven different copies in the sample. False positives
are simple drawings: 14 of 10,000 test images of EMNIST (96,323 training images), 2 of MNIST (60,000), none of CIFAR-10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from pipeline.common.process_pool import default_workers, map_in_processes
from pipeline.common.rng import permutation
from pipeline.dedup.hamming_index import HammingIndex
from pipeline.dedup.perceptual_hash import SHIFTS, UNREADABLE, dct_embeddings, perceptual_hashes, read_thumbnails
from pipeline.readers.raw_split import RawSplit

# A pair counts if its squared distance is at most this fraction of the expected one of the closest unrelated image, or
# at most `_SAME`, below which there are no unrelated pairs in EMNIST, MNIST and CIFAR-10.
_MAX_DISTANCE_RATIO = 0.25
_SAME = 0.004
# The expected distance follows from the 8th and 128th closest images of a sample; up to seven may be copies.
_RANKS = (8, 128)
_SAMPLE = 8192
_UNRELATED = 2.0  # squared distance of orthogonal embeddings
_BLOCK = 1024  # most images of a task of a process
_BLOCK_BYTES = 8 << 20  # most bytes of them
_FILE_BYTES = 1 << 18  # assumed size of an image file


@dataclass(frozen=True)
class Matches:
    """The P images of a first split that are in a second split, each with the most similar image there.

    Attributes:
        first: int64 [P], positions in the first split, ascending.
        second: int64 [P], position of the most similar image in the second split.
        identical: bool [P], whether both images have the same bytes.
        similarity: float32 [P], cosine similarity of the embeddings; 1 for identical images.
        second_matches: int64, positions of all images of the second split that are in the first, ascending.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    identical: NDArray[np.bool_]
    similarity: NDArray[np.float32]
    second_matches: NDArray[np.int64]


def find_identical(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> Matches:
    """Find identical images of two splits by their digests, uint64 [N] and [M]."""
    known, first_position = np.unique(second, return_index=True)
    matches = np.flatnonzero(np.isin(first, known) & (first != UNREADABLE))
    return Matches(
        first=matches,
        second=first_position[np.searchsorted(known, first[matches])],
        identical=np.ones(len(matches), bool),
        similarity=np.ones(len(matches), np.float32),
        second_matches=np.flatnonzero(np.isin(second, first[matches])),
    )


def find_near_duplicates(first: RawSplit, second: RawSplit, workers: int | None = None) -> Matches:
    """Find the images of a first split that are in a second, with some processes (default: on all cores).

    If both are the same object, an image matches only earlier ones.

    The result is a pure function of the images. Memory: about 1 KB per image of the second split and 100 MB per core.
    """
    reference, within = _Reference.of(first, second, workers), first is second
    digests, closest, similarity, matched = _in_blocks(
        lambda positions: reference.search(first, positions, within),
        first,
        f"comparing {first.name} with {second.name}",
        workers,
    )
    exact = find_identical(digests, reference.digests)
    if within:
        is_later = exact.second < exact.first
        first_of = exact.second[is_later]
        exact = replace(exact, first=exact.first[is_later], second=first_of, second_matches=np.unique(first_of))
    identical = np.zeros(len(digests), bool)
    identical[exact.first] = True
    closest[exact.first], similarity[exact.first] = exact.second, 1
    matches = np.flatnonzero(closest >= 0)
    is_copy = np.isin(reference.digests, reference.digests[matched])  # the index has one image of each digest
    is_copy[exact.second_matches] = True
    return Matches(matches, closest[matches], identical[matches], similarity[matches], np.flatnonzero(is_copy))


def _blocks(split: RawSplit, positions: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Divide positions int64 [n] into blocks that are read at once."""
    image_bytes = _FILE_BYTES if split.encoded else math.prod(side or 1 for side in split.image_shape)
    return np.split(positions, range(step := max(1, min(_BLOCK, _BLOCK_BYTES // image_bytes)), len(positions), step))


def _in_blocks(
    work: Callable[[NDArray[np.int64]], tuple[NDArray, ...]], split: RawSplit, description: str, workers: int | None
) -> list[NDArray]:
    """Compute `work(positions)` for blocks of all positions of a split, and concatenate each result."""
    count = len(split.labels)
    blocks, workers = _blocks(split, np.arange(count)), workers or default_workers()
    bar = tqdm(total=count, desc=description, unit=" images", unit_scale=True, disable=None, leave=False)
    # With BLAS threads in each process the search takes 1.6 times as long.
    with bar, threadpool_limits(limits=1, user_api="blas"):
        results = map_in_processes(lambda block: work(blocks[block]), list(map(len, blocks)), workers, bar)
    return [np.concatenate(values) for values in zip(*results, strict=True)]


@dataclass(frozen=True)
class _Reference:
    """The second split, indexed for search.

    Attributes:
        digests: uint64 [M], of all images.
        positions: int64 [m], of the images with structure, one of each digest.
        embeddings: float32 [m, 256], of the images at `positions`.
        min_cosine: float32 [m], cosine similarity from which an image of the first split counts as a copy.
        index: Index of the hashes of `embeddings`.
    """

    digests: NDArray[np.uint64]
    positions: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    min_cosine: NDArray[np.float32]
    index: HammingIndex

    @classmethod
    def of(cls, first: RawSplit, second: RawSplit, workers: int | None) -> _Reference:
        count = len(first.labels)
        sampled = np.sort(permutation(count, seed=0, stream=0)[:_SAMPLE])
        blocks = [read_thumbnails(first, positions) for positions in _blocks(first, sampled)]
        distinct = np.unique(np.concatenate([block.digests for block in blocks]), return_index=True)[1]
        sample = np.concatenate([dct_embeddings(block.images)[0] for block in blocks])[distinct]

        def embed(positions: NDArray[np.int64]) -> tuple[NDArray, ...]:
            thumbnails = read_thumbnails(second, positions)
            embeddings = dct_embeddings(thumbnails.images)[0]
            return thumbnails.digests, embeddings, _min_cosine(embeddings, sample, len(sampled) / count)

        digests, embeddings, min_cosine = _in_blocks(embed, second, f"hashing {second.name}", workers)
        positions = np.unique(digests, return_index=True)[1]
        positions = positions[embeddings[positions].any(axis=1)]
        embeddings = embeddings[positions]
        index = HammingIndex(perceptual_hashes(embeddings))
        return cls(digests, positions, embeddings, min_cosine[positions], index)

    def search(self, first: RawSplit, positions: NDArray[np.int64], within: bool) -> tuple[NDArray, ...]:
        """Compare n images of the first split, each shifted by a pixel in each direction, with the second.

        Args:
            first: The first split.
            positions: int64 [n], ascending.
            within: Whether images match only images at lower positions.

        Returns:
            The digests uint64 [n]; the position int64 [n] of the closest near-duplicate in the second split, -1 for
            none; its cosine similarity float32 [n]; the positions int64 of all images of the second split that match.
        """
        thumbnails = read_thumbnails(first, positions)
        _, distinct, copy_of = np.unique(thumbnails.digests, return_index=True, return_inverse=True)
        embeddings = dct_embeddings(thumbnails.images[distinct], SHIFTS).reshape(-1, self.embeddings.shape[1])
        closest, similarity = np.full(len(distinct), -1), np.zeros(len(distinct), np.float32)
        is_matched = np.zeros(len(self.positions), bool)
        for indexed, queried in self.index.search(perceptual_hashes(embeddings)):
            cosines = np.einsum("nk,nk->n", self.embeddings[indexed], embeddings[queried])
            close = np.flatnonzero(cosines >= self.min_cosine[indexed])
            if within:
                close = close[self.positions[indexed[close]] < positions[distinct[queried[close] % len(distinct)]]]
            is_matched[indexed[close]] = True
            close = close[np.argsort(cosines[close], kind="stable")]  # for repeated indices, the last assignment wins
            image = queried[close] % len(distinct)
            better = cosines[close] > similarity[image]
            image, close = image[better], close[better]
            closest[image], similarity[image] = self.positions[indexed[close]], cosines[close]
        return thumbnails.digests, closest[copy_of], similarity[copy_of], self.positions[is_matched]


def _min_cosine(embeddings: NDArray[np.float32], sample: NDArray[np.float32], fraction: float) -> NDArray[np.float32]:
    """Compute the cosine similarity from which an image of the first split counts as a copy.

    Args:
        embeddings: float32 [n, 256], of images of the second split.
        sample: float32 [s, 256], of distinct images of the first split.
        fraction: Size of the sample as a fraction of the first split.

    Returns:
        float32 [n].
    """
    distances = np.full((len(embeddings), max(_RANKS[1], len(sample))), _UNRELATED, np.float32)
    distances[:, : len(sample)] = _UNRELATED * (1 - embeddings @ sample.T)
    ranked = np.partition(distances, [rank - 1 for rank in _RANKS], axis=1)
    near, far = (np.maximum(ranked[:, rank - 1].astype(np.float64), 1e-6) for rank in _RANKS)
    # The number of images within a distance is a power of it: half the dimension for the squared distance.
    inverse_power = np.log(far / near) / np.log(_RANKS[1] / _RANKS[0])
    closest_unrelated = near * (fraction / _RANKS[0]) ** inverse_power
    max_distance = np.clip(_MAX_DISTANCE_RATIO * closest_unrelated, _SAME, _MAX_DISTANCE_RATIO * _UNRELATED)
    return (1 - max_distance / _UNRELATED).astype(np.float32)
