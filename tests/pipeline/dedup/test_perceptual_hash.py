"""Miniatures, spectra and hashes against slow definitions of them; the search for close hashes against trying all."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.image_files import png, smooth

import pipeline.dedup.hamming_index
from pipeline.dedup.hamming_index import MAX_DISTANCE, HammingIndex
from pipeline.dedup.perceptual_hash import (
    SHIFTS,
    SIDE,
    UNREADABLE,
    dct_embeddings,
    perceptual_hashes,
    thumbnails_of_arrays,
    thumbnails_of_files,
)


class TestThumbnails:
    @pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (20, 71, 3), (96, 40, 1), (8, 8, 1)])
    def test_are_what_pillow_makes(self, shape: tuple[int, int, int]) -> None:
        """Except at the border, beyond which Pillow has no pixels and DALI repeats the last ones, as we do."""
        images = smooth(5, *shape)
        found = thumbnails_of_arrays(images, transposed=False).images
        for image, thumbnail in zip(images, found, strict=True):
            gray = image.astype(np.float32) @ ([0.299, 0.587, 0.114] if shape[2] == 3 else [1.0])
            expected = Image.fromarray(gray.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(thumbnail[1:-1, 1:-1], np.asarray(expected)[1:-1, 1:-1], atol=0.01)

    def test_of_transposed_pixels_are_upright(self) -> None:
        images = smooth(4, 20, 30)
        upright, turned = thumbnails_of_arrays(images, False), thumbnails_of_arrays(images.swapaxes(1, 2), True)
        np.testing.assert_array_equal(upright.images, turned.images)
        np.testing.assert_array_equal(upright.digests, turned.digests)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_of_files_are_those_of_their_pixels(self, channels: int) -> None:
        images = smooth(4, 40, 40, channels)
        files = thumbnails_of_files([*map(png, images), b"no picture", png(images[0])[:200]])
        np.testing.assert_allclose(
            files.images[:4], thumbnails_of_arrays(images, False).images, atol=1.5
        )  # rounded twice
        assert files.digests[4:].tolist() == [UNREADABLE, UNREADABLE]
        assert UNREADABLE not in files.digests[:4]

    def test_digests_are_equal_for_equal_pictures_alone(self) -> None:
        images = smooth(50)
        changed = images.copy()
        changed[:, 27, 27] ^= 1
        digests = thumbnails_of_arrays(np.concatenate([images, changed, images]), False).digests
        assert len(np.unique(digests)) == 100
        np.testing.assert_array_equal(digests[:50], digests[100:])


def slow_embedding(image: NDArray[np.float32], shift: tuple[int, int]) -> list[float]:
    """The definition, pixel by pixel."""
    mean = sum(float(value) for value in image.flat) / SIDE**2
    fade = [math.sin(math.pi * (place + 0.5) / SIDE) for place in range(SIDE)]
    pixels = [[0.0] * SIDE for _ in range(SIDE)]
    for y in range(SIDE):
        for x in range(SIDE):
            from_y, from_x = min(max(y - shift[0], 0), SIDE - 1), min(max(x - shift[1], 0), SIDE - 1)
            pixels[y][x] = float(image[from_y, from_x])
    order = sorted(((v, u) for v in range(SIDE) for u in range(SIDE)), key=lambda p: (math.hypot(*p), p[0]))[1:257]
    values = []
    for v, u in order:
        scale = (2 / SIDE) / (math.sqrt(2) if v == 0 else 1) / (math.sqrt(2) if u == 0 else 1)
        weight = math.hypot(v, u) * (math.cos(math.pi * v / 2 / SIDE) * math.cos(math.pi * u / 2 / SIDE)) ** 2
        total = 0.0
        for y in range(SIDE):
            row = math.cos(math.pi * v * (y + 0.5) / SIDE) * fade[y]
            for x in range(SIDE):
                total += (pixels[y][x] - mean) * row * math.cos(math.pi * u * (x + 0.5) / SIDE) * fade[x]
        values.append(total * scale * weight)
    return values


class TestEmbeddings:
    def test_are_as_defined_and_hashes_their_signs(self) -> None:
        images = thumbnails_of_arrays(smooth(2), False).images
        for image, shift in zip(images, (SHIFTS[0], SHIFTS[-2]), strict=True):
            expected = np.array(slow_embedding(image, shift))
            found = dct_embeddings(image[None], [shift])[0]
            np.testing.assert_allclose(found[0], expected / np.linalg.norm(expected), atol=1e-5)
            bits = np.unpackbits(perceptual_hashes(found).view(np.uint8))
            clear = np.abs(expected[:128]) > 1e-3 * np.abs(expected).max()
            assert clear.sum() > 100
            np.testing.assert_array_equal(bits[clear], expected[:128][clear] > 0)

    def test_do_not_depend_on_brightness_and_contrast(self) -> None:
        images = thumbnails_of_arrays(smooth(20), False).images
        changed, same = dct_embeddings(images * 0.3 + 50)[0], dct_embeddings(images)[0]
        np.testing.assert_allclose(changed, same, atol=1e-4)
        assert np.bitwise_count(perceptual_hashes(changed) ^ perceptual_hashes(same)).sum(axis=1).max() <= 1

    @pytest.mark.parametrize("shift", SHIFTS)
    def test_a_shift_undoes_a_shift(self, shift: tuple[int, int]) -> None:
        images = thumbnails_of_arrays(smooth(20, 40, 40), False).images
        inner = images[:, 2:-2, 2:-2]
        there = np.pad(inner, ((0, 0), (2, 2), (2, 2)))
        moved = np.roll(there, shift, axis=(1, 2))
        np.testing.assert_allclose(dct_embeddings(there, [shift]), dct_embeddings(moved), atol=1e-5)

    def test_empty_pictures_have_none(self) -> None:
        for level in (0, 7, 255):
            images = thumbnails_of_arrays(np.full((3, 28, 28, 1), level, np.uint8), False).images
            embeddings = dct_embeddings(images)[0]
            assert not embeddings.any() and not perceptual_hashes(embeddings).any()


def near(index: NDArray[np.uint64], asked: NDArray[np.uint64]) -> list[tuple[int, int]]:
    chunks = HammingIndex(index).search(asked)
    return [pair for indexed, queried in chunks for pair in zip(indexed.tolist(), queried.tolist(), strict=True)]


def flipped(words: NDArray[np.uint64], bits: tuple[int, int], random: np.random.Generator) -> NDArray[np.uint64]:
    """The hashes with so many bits of each word changed."""
    changed = words.copy()
    for row in changed:
        for word, count in enumerate(bits):
            for bit in random.permutation(64)[:count]:
                row[word] ^= np.uint64(1) << np.uint64(bit)
    return changed


class TestSearch:
    @pytest.mark.parametrize("bits", [(0, 0), (1, 16), (3, 8), (4, 16)])
    def test_all_that_differ_in_few_bits_are_found_once(self, bits: tuple[int, int]) -> None:
        random = np.random.default_rng(bits)
        words = random.integers(0, 1 << 63, (700, 2), np.uint64)
        assert sorted(near(words, flipped(words, bits, random)[::-1])) == [(row, 699 - row) for row in range(700)]

    def test_most_that_differ_in_six_are_found_and_none_that_differ_in_more(self) -> None:
        random = np.random.default_rng(0)
        words = random.integers(0, 1 << 63, (1000, 2), np.uint64)
        assert len(near(words, flipped(words, (6, 16), random))) > 650
        assert near(words, flipped(words, (7, 0), random)) == []
        assert near(words, flipped(words, (0, 17), random)) == []

    def test_among_many_close_ones_it_finds_what_trying_all_finds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hashes that differ in few bits from few centres, as those of drawings; in small portions."""
        monkeypatch.setattr(pipeline.dedup.hamming_index, "_CHUNK", 64)
        random = np.random.default_rng(5)
        centres = random.integers(0, 1 << 63, (12, 2), np.uint64)
        words = np.concatenate([flipped(centres, (flips, 2 * flips), random) for flips in range(5) for _ in range(5)])
        asked = np.concatenate([flipped(centres, (flips, 2 * flips), random) for flips in range(4) for _ in range(3)])
        bits = np.bitwise_count(words[:, None] ^ asked[None])
        found = near(words, asked)
        assert len(found) == len(set(found))
        assert set(found) <= set(zip(*np.nonzero((bits <= MAX_DISTANCE).all(axis=2)), strict=True))
        assert set(found) >= set(zip(*np.nonzero((bits <= (4, 16)).all(axis=2)), strict=True))
        assert len(found) > 1000

    def test_among_thousands_of_equal_ones_all_pairs_are_found(self) -> None:
        words = np.full((3000, 2), 12345, np.uint64)
        words[2900:] = np.random.default_rng(0).integers(0, 1 << 63, (100, 2), np.uint64)
        indexed = np.concatenate([indexed for indexed, _ in HammingIndex(words).search(words[:2000])])
        assert np.bincount(indexed).tolist() == [2000] * 2900

    def test_nothing_is_near_nothing(self) -> None:
        some, none = np.ones((3, 2), np.uint64), np.empty((0, 2), np.uint64)
        assert near(some, none) == near(none, some) == near(none, none) == []
