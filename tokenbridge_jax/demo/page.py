"""The page, in Gradio: settings on the left, generated and edited images on the right."""

import html
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from gradio.components import Component
from jaxtyping import UInt8
from PIL import Image

from tokenbridge_jax.demo.drawing import (
    MAX_KEEP,
    MAX_TEMPERATURE,
    MAX_UPLOAD_PIXELS,
    NO_CLASS,
    NUMBERS_OF_IMAGES,
    Choices,
    Demo,
    Frame,
    painted,
    write_archive,
)
from tokenbridge_jax.runtime import pictures
from tokenbridge_jax.runtime.checks import MAX_SEED
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.sampling.orders import ORDERS

MAX_UPLOAD = "20mb"
MAX_WAITING = 8
# Seconds after which files of the page are deleted.
KEEP_FILES = 3600
# Side in pixels of the canvas for painting. Small images are enlarged by a whole factor.
CANVAS = 512
# Images with a smaller side are enlarged without smoothing.
PIXELATED_BELOW = 128

CSS = """
.pixelated img { image-rendering: pixelated; }
.images { max-width: 440px; margin: 0 auto; }
.images .grid-wrap { overflow: hidden; max-height: none; }
.status { min-height: 2.5em; }
.bar { height: 6px; margin-top: 6px; border-radius: 3px; background: var(--border-color-primary); }
.bar div { height: 100%; border-radius: 3px; background: var(--color-accent); }
"""


class Drawing(NamedTuple):
    """The part of a tab that draws: its buttons, and the gallery of images."""

    start: gr.Button
    stop: gr.Button
    status: gr.HTML
    gallery: gr.Gallery
    take: gr.Button
    download: gr.DownloadButton
    images: gr.State
    selected: gr.State


def launch(demo: Demo, host: str, port: int, folder: str) -> gr.Blocks:
    """Starts a server for the page, and returns. Neither contacts any other server.

    Args:
      demo: draws the images.
      host: address to listen on.
      port: a free port.
      folder: for the page's files.
    """
    os.environ["GRADIO_TEMP_DIR"] = folder  # Gradio reads it when components are made.
    # Gradio decodes painted images before this code can check their size.
    Image.MAX_IMAGE_PIXELS = MAX_UPLOAD_PIXELS
    page = build(demo, Path(folder))
    page.queue(max_size=MAX_WAITING, api_open=False)
    page.launch(
        server_name=f"[{host}]" if ":" in host else host,  # The form of IPv6 addresses in URLs.
        server_port=port,
        theme=gr.themes.Default(
            primary_hue="indigo",
            font=("system-ui", "sans-serif"),
            font_mono=("ui-monospace", "monospace"),
        ),
        css=CSS,
        max_file_size=MAX_UPLOAD,
        state_session_capacity=100,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        share=False,
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )
    return page


def build(demo: Demo, folder: Path) -> gr.Blocks:
    """Builds the page and connects its buttons; `folder` is for its files."""
    config, step = demo.pipeline.config, demo.pipeline.step
    with gr.Blocks(
        title="TokenBridge", analytics_enabled=False, delete_cache=(KEEP_FILES, KEEP_FILES)
    ) as page:
        gr.Markdown(
            f"## TokenBridge\n{demo.side}×{demo.side} pixels, {config.positions} positions, "
            f"{config.classes} classes, checkpoint of step {step}"
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                settings = _settings(demo)
            with gr.Column(scale=2, min_width=300), gr.Tabs() as tabs:
                with gr.Tab("Generate", id="generate"):
                    generated = _drawing(demo, "Generate")
                with gr.Tab("Edit", id="edit"), gr.Row():
                    with gr.Column(min_width=300):
                        upload, editor, keep, encode_hidden, blend, ramp = _edit_inputs(demo)
                    with gr.Column(min_width=300):
                        edited = _drawing(demo, "Edit")

        original = gr.State()

        def generate(*choices: Any) -> Iterator[Frame | None]:
            return demo.generate(Choices(*choices))

        def edit(*values: Any) -> Iterator[Frame | None]:
            *choices, image, canvas, keep, encode_hidden, blend, ramp = values
            mask = painted(canvas["layers"] if canvas else [], demo.side)
            width = int(ramp) if blend else None
            return demo.edit(Choices(*choices), image, mask, keep, width, encode_hidden)

        _connect(generated, generate, settings, folder / "samples.zip")
        inputs = [*settings, original, editor, keep, encode_hidden, blend, ramp]
        _connect(edited, edit, inputs, folder / "edits.zip")

        def read(path: str) -> tuple[np.ndarray, Image.Image]:
            try:
                image = demo.read(path)
            except UserError as error:
                raise _shown(error) from None
            return image, on_canvas(image)

        upload.upload(
            read, upload, [original, editor], show_progress="hidden", api_visibility="private"
        )
        editor.clear(lambda: None, None, original, api_visibility="private")

        def take(images: np.ndarray, selected: int) -> tuple[np.ndarray, gr.Tabs]:
            return images[selected], gr.Tabs(selected="edit")

        for drawing in generated, edited:
            given = [drawing.images, drawing.selected]
            # The editor accepts a picture only once its tab is visible.
            drawing.take.click(take, given, [original, tabs], api_visibility="private").then(
                on_canvas, original, editor, api_visibility="private"
            )
    return page


def on_canvas(image: UInt8[np.ndarray, "H W I"]) -> Image.Image:
    """Enlarges an image to the size of the canvas."""
    factor = max(1, CANVAS // len(image))
    return pictures.to_pil(image.repeat(factor, axis=0).repeat(factor, axis=1))


def _settings(demo: Demo) -> list[Component]:
    """One component for each field of `Choices`, in the same order."""
    defaults, config = demo.defaults, demo.pipeline.config
    labels = [str(i) for i in range(config.classes)]
    for i, name in enumerate(demo.pipeline.description.class_names):
        labels[i] = name if name == labels[i] else f"{name} ({i})"
    classes = [(label, i) for i, label in enumerate(labels)]
    with gr.Row():
        class_id = gr.Dropdown(
            [*classes, ("no class", NO_CLASS)], value=0, label="Class", min_width=120
        )
        second = gr.Dropdown(
            [("none", NO_CLASS), *classes], value=NO_CLASS, label="Mixed with", min_width=120
        )
    share = gr.Slider(0, 1, value=0.5, step=0.05, label="Share of the second class", visible=False)
    second.change(
        lambda second: gr.Slider(visible=second != NO_CLASS), second, share, queue=False,
        api_visibility="private",
    )  # fmt: skip
    images = gr.Radio(list(NUMBERS_OF_IMAGES), value=4, label="Images")
    dice = gr.Button("random")
    seed = gr.Number(0, precision=0, label="Seed", buttons=[dice])
    dice.click(
        lambda: random.randint(0, MAX_SEED), None, seed, queue=False, api_visibility="private"
    )
    with gr.Accordion("How to sample", open=False):
        guidance = gr.Slider(
            0, demo.max_guidance, value=defaults.guidance, step=0.1, label="Guidance",
            info="1 is none; more makes images closer to the class, and less varied",
        )  # fmt: skip
        temperature = gr.Slider(
            0, MAX_TEMPERATURE, value=defaults.temperature, step=0.05, label="Temperature",
            info="less makes images more typical, and less varied",
        )  # fmt: skip
        most = config.positions
        steps = gr.Slider(1, most, value=min(defaults.num_iter, most), step=1, label="Steps")
        order = gr.Dropdown(
            list(ORDERS), value=defaults.order, label="Order",
            info="the order in which positions are drawn",
        )  # fmt: skip
    return [class_id, second, share, images, seed, guidance, temperature, steps, order]


def _edit_inputs(demo: Demo) -> tuple[gr.UploadButton, gr.ImageEditor, Any, Any, Any, Any]:
    upload = gr.UploadButton("Upload a picture", file_types=["image"], size="md")
    editor = gr.ImageEditor(
        label="Paint to redraw",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=CANVAS // 8, colors=[("#ff2d75", 0.6)], color_mode="fixed"),
        eraser=gr.Eraser(default_size=CANVAS // 8),
        format="png",
        canvas_size=(CANVAS, CANVAS),
        buttons=[],
        elem_classes=_look(demo),
    )
    keep = gr.Slider(
        0, MAX_KEEP, value=0, step=0.05, label="Keep",
        info="share of the painted positions that stay, at random; of all if nothing is painted",
    )  # fmt: skip
    encode_hidden = gr.Checkbox(
        False, label="Resemble what is painted over",
        info="for touch-ups; otherwise the painted part is ignored, except with Keep",
    )  # fmt: skip
    blend = gr.Checkbox(False, label="Original pixels outside", info="instead of the autoencoder's")
    ramp = gr.Slider(
        0, demo.side // 4, value=0, step=1, label="Blended over (pixels)", visible=False
    )
    blend.change(
        lambda on: gr.Slider(visible=on), blend, ramp, queue=False, api_visibility="private"
    )
    return upload, editor, keep, encode_hidden, blend, ramp


def _drawing(demo: Demo, action: str) -> Drawing:
    with gr.Row():
        start = gr.Button(action, variant="primary", size="md", scale=3, min_width=120)
        stop = gr.Button("Stop", size="md", scale=1, min_width=60)
    status = gr.HTML(elem_classes="status")
    gallery = gr.Gallery(
        show_label=False,
        columns=2,
        object_fit="contain",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes=["images", *_look(demo)],
    )
    with gr.Row():
        take = gr.Button("Edit selected", size="md", interactive=False, min_width=120)
        download = gr.DownloadButton("Download all", size="md", interactive=False, min_width=120)
    selected = gr.State(0)

    def select(event: gr.SelectData) -> int:
        return event.index

    gallery.select(select, None, selected, queue=False, api_visibility="private")
    return Drawing(start, stop, status, gallery, take, download, gr.State(), selected)


def _look(demo: Demo) -> list[str]:
    return ["pixelated"] if demo.side < PIXELATED_BELOW else []


def _connect(
    drawing: Drawing,
    draw: Callable[..., Iterator[Frame | None]],
    inputs: Sequence[Component],
    archive: Path,
) -> None:
    """Connects the buttons that start and stop `draw`, which gets the values of `inputs`."""

    def run(*values: Any) -> Iterator[dict[Component, Any]]:
        started = time.monotonic()
        yield {drawing.status: _progress(None, 0)}
        last = None
        try:
            for frame in draw(*values):
                last = frame or last
                shown = {drawing.status: _progress(last, time.monotonic() - started)}
                yield shown | ({drawing.gallery: _tiled(frame.images)} if frame else {})
        except UserError as error:
            yield {drawing.status: ""}
            raise _shown(error) from None
        assert last is not None
        # Gradio makes its own copy for each visitor.
        write_archive(archive, last.images, dict(zip(Choices._fields, values, strict=False)))
        yield {
            drawing.images: last.images,
            drawing.selected: 0,
            drawing.status: f"done in {time.monotonic() - started:.1f} s",
            drawing.take: gr.Button(interactive=True),
            drawing.download: gr.DownloadButton(value=archive, interactive=True),
        }

    outputs = [
        drawing.gallery, drawing.status, drawing.images, drawing.selected, drawing.take,
        drawing.download,
    ]  # fmt: skip
    drawn = drawing.start.click(
        run,
        list(inputs),
        outputs,
        show_progress="minimal",
        show_progress_on=drawing.status,
        concurrency_limit=1,
        concurrency_id="sampler",
        api_visibility="private",
    )
    drawing.stop.click(
        lambda: "stopped", None, drawing.status, cancels=[drawn], api_visibility="private"
    )


def _tiled(images: UInt8[np.ndarray, "B H W I"]) -> gr.Gallery:
    """Makes a gallery of the images; none is selected."""
    shown = [pictures.to_pil(image) for image in images]
    return gr.Gallery(shown, columns=math.isqrt(len(images)), selected_index=None)


def _progress(frame: Frame | None, seconds: float) -> str:
    if frame is None:
        return f"starting, {seconds:.0f} s; the first request with new settings takes longer"
    width = f"width: {frame.done / frame.steps:.0%}"
    text = f"step {frame.done} of {frame.steps}, {seconds:.1f} s"
    return f'{text}<div class="bar"><div style="{width}"></div></div>'


def _shown(error: UserError) -> gr.Error:
    """Shows a mistake on the page, which reads messages as HTML: so the text is escaped."""
    return gr.Error(html.escape(str(error), quote=False), print_exception=False)
