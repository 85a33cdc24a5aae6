"""Compares outpainting with separate edits of each window, and tests what it keeps."""

import functools
import itertools

import numpy as np
import pytest

from tokenbridge_jax.pipeline.editing import draw_windows
from tokenbridge_jax.runtime.errors import UserError

SETTINGS = dict(num_iter=2, temperature=0.8)


def _canvas_of(pixels, pipeline, monkeypatch, *arguments, **keywords):
    """The last canvas of indices that `outpaint` decodes, and the images that it returns."""
    canvases: list = []
    decode = pipeline.codec.decode_maps
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.codec, "decode_maps", lambda x: canvases.append(x) or decode(x))
        drawn = pipeline.outpaint(pixels, *arguments, **keywords)
    return canvases[-1], drawn


def test_a_canvas_equals_separate_edits_of_each_window(pipeline, pixels, monkeypatch):
    """Margins of 4 columns at the left and 3 at the right; windows go outwards from column 4."""
    classes = ["dog", None, {0: 0.5, 1: 0.5}]
    settings = SETTINGS | dict(left=8, right=6, seed=9)
    canvas, drawn = _canvas_of(pixels, pipeline, monkeypatch, classes, **settings)
    assert drawn.shape == (3, 8, 22, 1)
    expected = np.zeros((3, 4, 11, 4), np.uint8)
    expected[:, :, 4:8] = before = pipeline.encode(pixels).reshape(3, 4, 4, 4)
    left = np.ones((4, 11), bool)
    left[:, 4:8] = False
    # Windows start at every second column and at 7. First comes the one with the fewest positions
    # to draw; of equal ones, the left one.
    seeds = [9, *np.random.SeedSequence(9).generate_state(9)]
    for column, seed in zip([2, 0, 6, 7], seeds, strict=False):
        window = np.s_[:, column : column + 4]
        edited = pipeline.generate_indices(
            classes,
            known=expected[:, *window].reshape(3, 16, 4),
            hidden=np.tile(left[window].reshape(1, 16), (3, 1)),
            seed=int(seed),
            **SETTINGS,
        )
        expected[:, *window] = edited.reshape(3, 4, 4, 4)
        left[window] = False
    assert not left.any()
    np.testing.assert_array_equal(canvas, expected)
    np.testing.assert_array_equal(canvas[:, :, 4:8], before)
    # Neither the batch size nor the other images have an effect.
    again = pipeline.outpaint(pixels, classes, batch_size=2, **settings)
    np.testing.assert_array_equal(again, drawn)
    alone = pipeline.outpaint(pixels[0], "dog", **settings)
    np.testing.assert_array_equal(alone, drawn[0])


@pytest.mark.parametrize("overlap", [0.5, 0.0, 0.75])
def test_every_hidden_position_is_drawn_once(pipeline, monkeypatch, overlap: float):
    """Each image has its own random mask. In some windows nothing is known."""
    rng = np.random.default_rng(4)
    canvas = rng.integers(5, size=(3, 7, 9, 4)).astype(np.uint8)
    hidden = rng.random((3, 7, 9)) < np.array([0.9, 0.5, 0.02])[:, None, None]
    hidden[1, :, :5] = True
    drawn_by = np.zeros((3, 7, 9), int)
    seeds = []

    def draw(class_ids, *, known, hidden, seed):
        """Draws the numbers from 101; known positions keep theirs."""
        seeds.append(seed)
        return np.where(hidden[..., None], 100 + len(seeds), known)

    monkeypatch.setattr(pipeline, "generate_indices", draw)
    before, shown = canvas.copy(), []
    for done, most in draw_windows(pipeline, [0] * 3, canvas, hidden, overlap=overlap, seed=3):
        shown.append((done, most, (canvas >= 100).all(axis=3)))
    np.testing.assert_array_equal((canvas >= 100).all(axis=3), hidden)
    np.testing.assert_array_equal(canvas[~hidden], before[~hidden])
    assert len(set(seeds)) == len(seeds)
    states = [np.zeros_like(hidden), *(state for _, _, state in shown)]
    for was, now in itertools.pairwise(states):
        assert (was <= now).all()
        drawn_by += now & ~was
        for new in now & ~was:  # They are all in one window.
            rows, columns = new.nonzero()
            assert not len(rows) or (np.ptp(rows) < 4 and np.ptp(columns) < 4)
    np.testing.assert_array_equal(drawn_by, hidden)
    assert [done for done, _, _ in shown] == list(range(1, shown[0][1] + 1))


def test_images_larger_and_smaller_than_the_model_accept_margins_and_masks(
    pipeline, pixels, monkeypatch
):
    tall = np.concatenate([pixels, pixels[::-1]], axis=1)  # 16x8 pixels.
    mask = np.zeros((16, 8), bool)
    mask[4:11, 3] = True
    settings = SETTINGS | dict(mask=mask, bottom=2)
    run = functools.partial(_canvas_of, pipeline=pipeline, monkeypatch=monkeypatch, class_id=1)
    canvas, drawn = run(tall, encode_hidden=True, blend=0, **settings)
    hidden = np.zeros((9, 4), bool)
    hidden[2:6, 1] = hidden[8] = True
    known = np.asarray(pipeline.codec.encode(tall).indices).reshape(3, 8, 4, 4)
    np.testing.assert_array_equal(canvas[:, :8][:, ~hidden[:8]], known[:, ~hidden[:8]])
    kept = np.concatenate([~mask, np.zeros((2, 8), bool)])
    np.testing.assert_array_equal(drawn[:, kept], tall[:, ~mask])
    # Pixels of hidden positions have no effect, except with `encode_hidden`.
    covered = hidden[:8].repeat(2, axis=0).repeat(2, axis=1)[..., None]
    unseen, _ = run(tall, **settings)
    assert (unseen[:, ~hidden] != canvas[:, ~hidden]).any()
    for other in (255 - tall, tall[::-1]):
        again, _ = run(np.where(covered, other, tall), **settings)
        np.testing.assert_array_equal(again, unseen)
    seen, _ = run(np.where(covered, 255 - tall, tall), encode_hidden=True, **settings)
    assert (seen[:, ~hidden] != canvas[:, ~hidden]).any()
    shown: list = []
    drawn = pipeline.outpaint(
        pixels[:, :4, :6], 0, top=4, left=2, preview=lambda *x: shown.append(x), **SETTINGS
    )
    assert [x[:2] for x in shown] == [(1, 1)]
    np.testing.assert_array_equal(shown[0][2], drawn)
    assert drawn.shape == (3, 8, 8, 1)


def test_mistakes_in_outpainting_are_reported(pipeline, pixels):
    def refused(match, pixels=pixels, class_id=0, **keywords):
        with pytest.raises(UserError, match=match):
            pipeline.outpaint(pixels, class_id, **keywords)

    refused("left=3 must be a multiple of 2 pixels, 0 or more", left=3)
    refused("top=-2 must be a multiple of 2 pixels", top=-2)
    refused("nothing is to be redrawn: give left, top, right, bottom or mask")
    refused(r"4x10 pixels with the margins are less than the 8x8", pixels[:, :4], right=2)
    refused(r"overlap=1\.0 must be a share from 0 to below 1", left=2, overlap=1.0)
    refused(r"7x8 is not divisible", pixels[:, :7], left=2)
    refused("the mask of image 0 is empty", mask=np.zeros((8, 8), bool))
    refused("there are 2 classes for 3 images", class_id=[0, 1], left=2)
    refused("blend=-1 must be 0 or more", left=2, blend=-1)
    refused("seed=-1 must be from 0", left=2, seed=-1)
