"""Images of one split that are in another too, perhaps brighter, noisier, recompressed or moved by a pixel.

Identical images are found by their digests. For the others, candidates are pairs whose perceptual hashes differ in few
bits (`pipeline.dedup.perceptual_hash`), where one of the two is also tried moved by a pixel in each direction. Then the
embeddings of the candidates are compared.

How similar two images have to be depends on the image: two people's handwritten '1' differ less than two copies of a
photograph. So a pair counts if it is much closer than the closest unrelated image is expected to be, which a sample of
the first split tells (in the spirit of Lowe's ratio test, 2004, https://doi.org/10.1023/B:VISI.0000029664.99615.94).
The expectation is extrapolated from the sample to the whole split by the dimension that the images around seem to have
(Levina and Bickel 2004,
https://proceedings.neurips.cc/paper/2004/hash/74934548253bcab8490ebd74afed7031-Abstract.html).

Measured with 500 changed copies of genuine images of each kind, put among the train splits: found are over 99 % of
those with another brightness, noise of 8 levels or JPEG quality 50; of those moved by a pixel 100 % (CIFAR-10) and 90
to 99 % (drawings of 28x28, MNIST and EMNIST); with noise of 16 levels 98 % and 90 to 93 %; made smaller to 24 pixels
and larger again 100 % and 81 to 92 %; moved by half a pixel 99 % and 39 to 66 %. Of 21 pairs of the same photograph
that are in a fifth of CIFAR-10, found by eye, 12. Not found are mirrored, turned and inverted images, crops, and
images of which the sample has more than seven copies that differ notably. Found though no copies are simple drawings
that agree by chance: 14 of 10,000 test images of EMNIST in 96,323, 2 of MNIST in 60,000, none of CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from pipeline.common.process_pool import default_workers, map_in_processes
from pipeline.common.rng import permutation
from pipeline.dedup.hamming_index import HammingIndex
from pipeline.dedup.perceptual_hash import SHIFTS, UNREADABLE, dct_embeddings, perceptual_hashes, read_thumbnails
from pipeline.readers.raw_split import RawSplit

# A pair counts if its squared distance is at most this fraction of the one expected of the closest unrelated image, or
# if it hardly differs at all: no two of EMNIST, MNIST or CIFAR-10 come as close by chance.
_MAX_DISTANCE_RATIO = 0.25
_SAME = 0.004
# That follows from the distances to the images of two ranks in a sample. The first leaves room for several copies.
_RANKS = (8, 128)
_SAMPLE = 8192
_UNRELATED = 2.0  # squared distance of embeddings that have nothing in common
_BLOCK = 1024  # images that a process handles at a time


@dataclass(frozen=True)
class Matches:
    """Images of a first split that are in a second, each once, with the closest there.

    Attributes:
        first: int64 [P], their positions, ascending.
        second: int64 [P], the position of the closest image in the second split.
        identical: bool [P], whether both are equal, byte for byte.
        similarity: float32 [P], the cosine of their embeddings; 1 for identical images.
        second_matches: int64, positions of all images of the second split that are in the first, ascending.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    identical: NDArray[np.bool_]
    similarity: NDArray[np.float32]
    second_matches: NDArray[np.int64]


def find_identical(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> Matches:
    """Find the images of a first split that are in a second by their digests, uint64 [N] and [M]."""
    known, first_position = np.unique(second, return_index=True)
    found = np.flatnonzero(np.isin(first, known) & (first != UNREADABLE))
    return Matches(
        first=found,
        second=first_position[np.searchsorted(known, first[found])],
        identical=np.ones(len(found), bool),
        similarity=np.ones(len(found), np.float32),
        second_matches=np.flatnonzero(np.isin(second, first[found])),
    )


def find_near_duplicates(first: RawSplit, second: RawSplit) -> Matches:
    """Find the images of a first split that are in a second, on all cores. A pure function of the images.

    The memory taken is about 1 KB for each image of the second split, and some 100 MB for each core.
    """
    reference = _Reference.of(first, second)

    def search(positions: NDArray[np.int64]) -> tuple[NDArray, ...]:
        return reference.search(first, positions)

    what = f"comparing {first.name} with {second.name}"
    digests, closest, similarity, met = _in_blocks(search, len(first.labels), what)
    exact = find_identical(digests, reference.digests)
    identical = np.zeros(len(digests), bool)
    identical[exact.first] = True
    closest[exact.first], similarity[exact.first] = exact.second, 1
    found = np.flatnonzero(closest >= 0)
    copies = np.isin(reference.digests, reference.digests[met])  # the index holds one image of each digest
    copies[exact.second_matches] = True
    return Matches(found, closest[found], identical[found], similarity[found], np.flatnonzero(copies))


def _in_blocks(work: Callable[[NDArray[np.int64]], tuple[NDArray, ...]], count: int, what: str) -> list[NDArray]:
    """The results of `work(positions)` for blocks of 0 .. count-1, on all cores, each concatenated."""

    blocks = [np.arange(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]

    bar = tqdm(total=count, desc=what, unit=" images", unit_scale=True, disable=None, leave=False)
    # Processes that each multiply matrices on all cores get in each other's way: it takes 1.6 times as long.
    with bar, threadpool_limits(limits=1, user_api="blas"):
        results = map_in_processes(lambda block: work(blocks[block]), list(map(len, blocks)), default_workers(), bar)
    return [np.concatenate(values) for values in zip(*results, strict=True)]


@dataclass(frozen=True)
class _Reference:
    """The second split, indexed for search.

    Attributes:
        digests: uint64 [M], of all images.
        positions: int64 [m], of the images that have structure, one of each digest.
        embeddings: float32 [m, 256].
        least_cosine: float32 [m], from which on an image of the first split counts as a copy.
        index: of their hashes.
    """

    digests: NDArray[np.uint64]
    positions: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    least_cosine: NDArray[np.float32]
    index: HammingIndex

    @classmethod
    def of(cls, first: RawSplit, second: RawSplit) -> _Reference:
        count = len(first.labels)
        drawn = np.sort(permutation(count, seed=0, stream=0)[:_SAMPLE])
        blocks = [read_thumbnails(first, some) for some in np.split(drawn, range(_BLOCK, len(drawn), _BLOCK))]
        distinct = np.unique(np.concatenate([block.digests for block in blocks]), return_index=True)[1]
        sample = np.concatenate([dct_embeddings(block.images)[0] for block in blocks])[distinct]

        def embed(positions: NDArray[np.int64]) -> tuple[NDArray, ...]:
            thumbnails = read_thumbnails(second, positions)
            embeddings = dct_embeddings(thumbnails.images)[0]
            return thumbnails.digests, embeddings, _least_cosine(embeddings, sample, len(drawn) / count)

        digests, embeddings, least_cosine = _in_blocks(embed, len(second.labels), f"hashing {second.name}")
        positions = np.unique(digests, return_index=True)[1]
        positions = positions[embeddings[positions].any(axis=1)]
        embeddings = embeddings[positions]
        index = HammingIndex(perceptual_hashes(embeddings))
        return cls(digests, positions, embeddings, least_cosine[positions], index)

    def search(self, first: RawSplit, positions: NDArray[np.int64]) -> tuple[NDArray, ...]:
        """Compare images of the first split, each moved by a pixel in each direction, with the second.

        Returns:
            Of the n images: digests uint64 [n], positions int64 [n] of the closest near-duplicates in the second, -1
            where there is none, and the cosines float32 [n]; and positions int64 of all that match one of them.
        """
        thumbnails = read_thumbnails(first, positions)
        _, distinct, copy_of = np.unique(thumbnails.digests, return_index=True, return_inverse=True)
        embeddings = dct_embeddings(thumbnails.images[distinct], SHIFTS).reshape(-1, self.embeddings.shape[1])
        closest, similarity = np.full(len(distinct), -1), np.zeros(len(distinct), np.float32)
        met = np.zeros(len(self.positions), bool)
        for indexed, queried in self.index.search(perceptual_hashes(embeddings)):
            cosines = np.einsum("nk,nk->n", self.embeddings[indexed], embeddings[queried])
            close = np.flatnonzero(cosines >= self.least_cosine[indexed])
            met[indexed[close]] = True
            close = close[np.argsort(cosines[close], kind="stable")]  # of equal indices, the last assignment holds
            image = queried[close] % len(distinct)
            better = cosines[close] > similarity[image]
            image, close = image[better], close[better]
            closest[image], similarity[image] = self.positions[indexed[close]], cosines[close]
        return thumbnails.digests, closest[copy_of], similarity[copy_of], self.positions[met]


def _least_cosine(embeddings: NDArray[np.float32], sample: NDArray[np.float32], fraction: float) -> NDArray[np.float32]:
    """The cosine float32 [n] to each embedding [n, 256] from which on an image of the first split is a copy.

    Args:
        embeddings: of images of the second split.
        sample: float32 [s, 256], embeddings of different images of the first split.
        fraction: of the first split that was drawn for the sample.
    """
    distances = np.full((len(embeddings), max(_RANKS[1], len(sample))), _UNRELATED, np.float32)
    distances[:, : len(sample)] = _UNRELATED * (1 - embeddings @ sample.T)
    ranked = np.partition(distances, [rank - 1 for rank in _RANKS], axis=1)
    near, far = (np.maximum(ranked[:, rank - 1].astype(np.float64), 1e-6) for rank in _RANKS)
    # The number of images within a distance is a power of it: of the squared distance, half the dimension.
    inverse_power = np.log(far / near) / np.log(_RANKS[1] / _RANKS[0])
    closest_unrelated = near * (fraction / _RANKS[0]) ** inverse_power
    most = np.clip(_MAX_DISTANCE_RATIO * closest_unrelated, _SAME, _MAX_DISTANCE_RATIO * _UNRELATED)
    return (1 - most / _UNRELATED).astype(np.float32)
