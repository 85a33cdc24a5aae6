"""The page: its images compared with `Pipeline`, mistakes, and a visit with a real browser."""

import ctypes
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from jobs import wait_until
from ml_collections import ConfigDict
from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By

from tokenbridge_jax.autoencoder import save_autoencoder
from tokenbridge_jax.commands.import_torch import write_checkpoint
from tokenbridge_jax.data.images import prepare
from tokenbridge_jax.demo.drawing import (
    MAX_PREVIEWS,
    NO_CLASS,
    Choices,
    Demo,
    painted,
    write_archive,
)
from tokenbridge_jax.pipeline.description import ModelDescription
from tokenbridge_jax.runtime.errors import UserError

SAMPLING = dict(
    num_iter=2,
    guidance=1.0,
    guidance_schedule="linear",
    guidance_interval=(0.0, 1.0),
    guidance_every=1,
    temperature=0.8,
    order="random",
    choice_temperature=1.0,
)
# With a preview, `Pipeline` uses the programs that the page has compiled.
STEP_BY_STEP = SAMPLING | dict(preview=lambda *state: None)
CHOICES = Choices(
    class_id=1, second=NO_CLASS, share=0.5, images=1, seed=3, guidance=1.0, temperature=0.8,
    num_iter=2, order="random",
)  # fmt: skip


@pytest.fixture(scope="module")
def workdir(pipeline, tmp_path_factory):
    """A workdir with the pipeline; the name of the third class is its number."""
    workdir = epath.Path(tmp_path_factory.mktemp("demo"))
    codec, config = pipeline.codec, pipeline.config
    hashed = save_autoencoder(workdir / "autoencoder", codec.config, codec.params, {})
    ModelDescription(config, ("cat", "dog", "2"), hashed).save(workdir)
    write_checkpoint(workdir, config, {"model": pipeline.params}, {})
    return workdir


@pytest.fixture(scope="module")
def demo(pipeline):
    demo = Demo(pipeline, ConfigDict(SAMPLING | dict(batch_size=250)))
    yield demo
    demo.close()


@pytest.fixture(scope="module")
def image(pixels):
    return pixels[0]


MASK = np.arange(8) < np.full((8, 1), 4)  # The left half.


# --- Drawing --------------------------------------------------------------------------------------


def test_it_generates_the_same_images_as_the_pipeline(demo, pipeline):
    frames = [frame for frame in demo.generate(CHOICES) if frame]
    assert [(frame.done, frame.steps) for frame in frames] == [(1, 2), (2, 2), (2, 2)]
    expected = pipeline.generate([1], seed=3, **STEP_BY_STEP)
    np.testing.assert_array_equal(frames[-1].images, expected)
    assert (frames[0].images != expected).any()


def test_every_choice_has_an_effect(demo, pipeline, monkeypatch):
    calls = []
    monkeypatch.setattr(
        pipeline, "generate", lambda *x, **y: calls.append((x, y)) or np.zeros((4, 8, 8, 1))
    )
    choices = Choices(2, 0, 0.25, 4, 7, 2.5, 0.5, 16, "confidence")
    list(demo.generate(choices))
    list(demo.generate(choices._replace(class_id=NO_CLASS, second=NO_CLASS)))
    list(demo.generate(choices._replace(second=2)))
    ((class_ids,), settings), ((unconditional,), _), ((twice,), _) = calls
    assert class_ids == [{2: 0.75, 0: 0.25}] * 4
    assert unconditional == [None] * 4
    assert twice == [2] * 4
    del settings["preview"]
    assert settings == SAMPLING | dict(
        seed=7, guidance=2.5, temperature=0.5, num_iter=16, order="confidence",
        batch_size=4, preview_every=16 // MAX_PREVIEWS,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "keep", "blend"), [(MASK, 0.25, None), (MASK, 0.25, 1), (MASK & False, 0.625, None)]
)
def test_it_edits_like_the_pipeline(demo, pipeline, image, mask, keep, blend):
    """An empty mask gives variations of the whole image."""
    *_, last = demo.edit(CHOICES, image, mask, keep, blend)
    mask = mask if mask.any() else None
    expected = pipeline.edit(image, mask, 1, keep=keep, blend=blend, seed=3, **STEP_BY_STEP)
    np.testing.assert_array_equal(last.images, expected[None])
    assert (expected != image).any()


def test_a_touch_up_encodes_the_painted_part(demo, pipeline, image, monkeypatch):
    seen = []
    monkeypatch.setattr(
        pipeline, "edit", lambda images, *x, **y: seen.append(y["encode_hidden"]) or images
    )
    for touch_up in (False, True):
        list(demo.edit(CHOICES, image, MASK, 0, None, touch_up))
    assert seen == [None, True]  # With None, `keep` decides.


def test_drawing_ends_when_the_visitor_leaves(demo, pipeline, monkeypatch):
    steps = []

    def generate(class_ids, *, preview, **settings):
        for step in range(1, 1000):
            steps.append(step)
            preview(step, 1000, np.zeros((1, 8, 8, 1), np.uint8))
            time.sleep(0.01)

    monkeypatch.setattr(pipeline, "generate", generate)
    frames = demo.generate(CHOICES)
    next(frames)
    frames.close()
    demo._sampler.submit(lambda: None).result()  # Waits until the drawing has ended.
    assert len(steps) < 1000


def test_a_brush_that_covers_a_quarter_of_a_pixel_paints_it():
    rng = np.random.default_rng(0)
    layers = [(rng.random((24, 24, 4)) < 0.1) * 150 for _ in range(2)]
    layers[0][:12, :9, 3] = 1
    mask = painted([layer.astype(np.uint8) for layer in layers], 8)
    covered = [(layer[..., 3] > 0).reshape(8, 3, 8, 3).mean(axis=(1, 3)) for layer in layers]
    np.testing.assert_array_equal(mask, (covered[0] > 0.25) | (covered[1] > 0.25))
    assert mask[:4, :3].all()
    assert not painted([], 8).any()


def test_uploads_are_cropped_as_in_tokenize(demo, tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(30, 41, 3)).astype(np.uint8)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    with Image.open(path) as picture:
        np.testing.assert_array_equal(demo.read(str(path)), prepare(picture, 8, 1))
    path.write_text("no picture")
    with pytest.raises(UserError, match="this file cannot be used: not a picture"):
        demo.read(str(path))
    Image.new("1", (2**14, 2**13)).save(path)
    with pytest.raises(UserError, match="cannot be used: more than 67108864 pixels"):
        demo.read(str(path))


def test_a_download_holds_pictures_arrays_and_settings(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(2, 8, 8, 1)).astype(np.uint8)
    write_archive(tmp_path / "x.zip", images, CHOICES._asdict())
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert archive.namelist() == ["0.png", "1.png", "samples.npz", "settings.json"]
        with Image.open(archive.open("1.png")) as picture:
            np.testing.assert_array_equal(np.asarray(picture), images[1, :, :, 0])
        with np.load(io.BytesIO(archive.read("samples.npz"))) as arrays:
            np.testing.assert_array_equal(arrays["arr_0"], images)
        assert json.loads(archive.read("settings.json")) == CHOICES._asdict()


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(class_id=3), r"class 3 does not exist; classes are 0\.\.2"),
        (dict(second=-2), "class -2 does not exist"),
        (dict(class_id=NO_CLASS, second=0), "a second class needs a first one"),
        (dict(share=1.5), "share=1.5 must be a number from 0 to 1"),
        (dict(images=17), r"images=17 is not one of \(1, 4, 9, 16\)"),
        (dict(images=10**9), "images=1000000000 is not one of"),
        (dict(seed=-1), "seed=-1 must be a number from 0 to 4294967295"),
        (dict(seed=2**32), "seed=4294967296 must be a number"),
        (dict(seed=None), "seed=None must be a number"),
        (dict(guidance=float("nan")), "guidance=nan must be a number from 0 to 10"),
        (dict(temperature=9), "temperature=9 must be a number from 0 to 2"),
        (dict(num_iter=17), "steps=17 must be a number from 1 to 16"),
        (dict(order="spiral"), "sampling.order='spiral' is not one of random, raster"),
    ],
)
def test_choices_are_bounded(demo, image, changes, message):
    choices = CHOICES._replace(**changes)
    with pytest.raises(UserError, match=message):
        demo.generate(choices)
    with pytest.raises(UserError, match=message):
        demo.edit(choices, image, MASK, 0, None)


def test_mistakes_in_an_edit_are_reported(demo, image):
    def refused(match, image=image, mask=MASK, keep=0.0, blend=None):
        with pytest.raises(UserError, match=match):
            list(demo.edit(CHOICES, image, mask, keep, blend))

    refused("there is no picture yet", image=None)
    refused("paint over the part to redraw", mask=MASK & False)
    refused("keep=1 must be a number from 0 to 0.95", keep=1)
    refused("blend=3 must be a number from 0 to 2", blend=3)
    refused("covers all positions of image 0", mask=MASK | True)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--port=70000", "port"),
        ("--host=192.0.2.1", "cannot listen on 192.0.2.1:7860"),
        ("--step=5", "there is no checkpoint of step 5; there are 0"),
        ("--distributed", "demo runs in one process"),
    ],
)
def test_mistakes_in_a_flag_are_reported(refused, workdir, monkeypatch, flag, message):
    monkeypatch.setattr("tokenbridge_jax.runtime.processes.join", lambda *x, **y: None)
    refused("demo", message, [f"--workdir={workdir}", flag])


def test_a_port_in_use_is_reported(refused, workdir):
    with socket.create_server(("127.0.0.1", 0)) as server:
        flags = [f"--workdir={workdir}", f"--port={server.getsockname()[1]}"]
        refused("demo", "(Address already in use); --port=0 takes any free port", flags)


def test_without_gradio_it_says_what_to_install(refused, workdir, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *x: None if name == "gradio" else find(name, *x)
    )
    message = "error: the page needs Gradio: pip install -e '.[demo]'\n"
    refused("demo", message, [f"--workdir={workdir}"])


# --- The page -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(workdir):
    """The command in its own process, and the address that it printed."""
    flags = [f"--config.sampling.{name}={SAMPLING[name]}" for name in ("num_iter", "temperature")]
    command = [sys.executable, "-m", "tokenbridge_jax.commands.demo", f"--workdir={workdir}"]
    process = subprocess.Popen(
        [*command, "--port=0", "--config.sampling.guidance=1", *flags],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process, process.stdout.readline().split()[4]
    process.kill()
    process.communicate()


def test_the_page_starts_with_the_config_and_sends_no_analytics(server):
    _, address = server
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(f"{address}config") as answer:
        config = json.load(answer)
    assert not config["analytics_enabled"]
    parts = {part["props"].get("label"): part["props"] for part in config["components"]}
    classes = [["cat (0)", 0], ["dog (1)", 1], ["2", 2]]
    assert parts["Class"]["choices"] == [*classes, ["no class", NO_CLASS]]
    assert parts["Mixed with"]["choices"] == [["none", NO_CLASS], *classes]
    assert (parts["Temperature"]["value"], parts["Steps"]["value"]) == (0.8, 2)
    assert parts["Steps"]["maximum"] == 16


@pytest.fixture
def browser():
    names = shutil.which("chromium"), shutil.which("chromedriver")
    if None in names:
        pytest.skip("there is no chromium, or no chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = names[0]
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900",
        "--enable-unsafe-swiftshader",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(names[1]))
    yield browser
    browser.quit()


class Visitor:
    """A person who looks at the page and uses it."""

    def __init__(self, browser):
        self.browser = browser

    def seen(self, css: str):
        elements = self.browser.find_elements(By.CSS_SELECTOR, css)
        return [element for element in elements if element.is_displayed()]

    def click(self, css: str, text: str):
        wait_until(lambda: [e for e in self.seen(css) if e.text == text])[0].click()

    def draw(self, button: str) -> np.ndarray:
        """Clicks a button and waits for the image."""
        self.click("button.primary", button)
        wait_until(lambda: "done in" in self.seen(".status")[0].text)
        (shown,) = self.seen(".images img")
        with urllib.request.urlopen(shown.get_attribute("src")) as answer:
            return np.asarray(Image.open(io.BytesIO(answer.read())))

    def canvas(self) -> np.ndarray:
        (canvas,) = wait_until(lambda: self.seen("canvas"))
        return np.asarray(Image.open(io.BytesIO(canvas.screenshot_as_png)))

    def paint_upper_left(self) -> None:
        """Paints from the upper left to the centre; the brush is an eighth of the image wide."""
        (canvas,) = self.seen("canvas")
        before = self.canvas()
        # The image fills most of the canvas' height.
        size = canvas.size["height"] // 20
        stroke = ActionChains(self.browser).move_to_element_with_offset(
            canvas, -4 * size, -4 * size
        )
        stroke.click_and_hold().move_by_offset(size, size).move_by_offset(size, size).release()
        stroke.perform()
        wait_until(lambda: (self.canvas() != before).any())

    def requests(self) -> list[str]:
        messages = [
            json.loads(e["message"])["message"] for e in self.browser.get_log("performance")
        ]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [parameters["request"]["url"] for parameters in sent]


def test_a_visit(browser, server, tmp_path):
    """Generates an image, paints over a part, edits it; no request goes to another server."""
    _, address = server
    browser.get(address)
    visitor = Visitor(browser)
    visitor.click("label", "1")
    image = visitor.draw("Generate")
    assert image.shape == (8, 8)

    visitor.click("button", "Edit selected")
    wait_until(lambda: visitor.canvas().std() > 20)  # It is white until the image is shown.
    visitor.click("button.primary", "Edit")
    message = "paint over the part to redraw"
    wait_until(lambda: any(message in element.text for element in visitor.seen(".toast-body")))
    visitor.click("label", "Original pixels outside")
    visitor.paint_upper_left()
    edited = visitor.draw("Edit")
    same = edited == image
    assert same[:, 4:].all()
    assert same[4:].all()
    assert not same[:4, :4].all()
    assert browser.save_screenshot(str(tmp_path / "demo.png"))

    asked = [url for url in visitor.requests() if not url.startswith(("data:", "blob:"))]
    assert all(url.startswith(address) for url in asked)


def test_a_signal_stops_the_server_whichever_thread_receives_it(server):
    process, _ = server
    threads = [int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()]

    def receives(thread: int) -> bool:
        status = Path(f"/proc/{process.pid}/task/{thread}/status").read_text()
        blocked = int(re.search(r"SigBlk:\s*(\w+)", status)[1], 16)
        return thread != process.pid and not blocked & 1 << (signal.SIGINT - 1)

    other = next(filter(receives, sorted(threads, reverse=True)))
    assert ctypes.CDLL(None).tgkill(process.pid, other, signal.SIGINT) == 0
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "tokenbridge demo: interrupted\n")
