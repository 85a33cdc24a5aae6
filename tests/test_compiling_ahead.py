"""Programs that are compiled while something else happens: images are drawn, weights are read."""

import collections
import math
import re
import threading
from concurrent.futures import wait

import jax
import numpy as np
import pytest
from flax.errors import ScopeParamNotFoundError
from tiny_model import random_params, tiny, tiny_pipeline

from tokenbridge_jax import Pipeline
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.pipeline import pipeline
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.sampling import batches

SECONDS = 60  # Longer than anything here takes.
STEPS = {"num_iter": 3, "guidance": 2.0}
# What draws images and decodes them, given a pipeline.
CALLS = {
    "generate": lambda p: p.generate([0, 1, 2], batch_size=2, **STEPS),
    "preview": lambda p: p.generate([0, 1, 2], preview=lambda *_: None, **STEPS),
}


@pytest.fixture
def own():
    """A pipeline with a codec that has compiled nothing."""
    config = tiny(positions=16)
    return tiny_pipeline(config, random_params(config))


@pytest.fixture
def compiled():
    """How often XLA has compiled a function, by its name."""
    count = collections.Counter()

    def listen(event, _, fun_name="", **__):
        count[fun_name] += event.endswith("/backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("call", CALLS)
def test_the_decoder_compiles_once_while_images_are_drawn(own, monkeypatch, compiled, call):
    begun = {name: threading.Event() for name in ("drawing", "compiling")}
    met = []

    def meeting(function, mine, other):
        """The function, which begins when the other one has begun."""

        def run(*arguments):
            begun[mine].set()
            met.append(begun[other].wait(SECONDS))
            return function(*arguments)

        return run

    compiling = meeting(own.codec._compile_decoder, "compiling", "drawing")
    monkeypatch.setattr(own.codec, "_compile_decoder", compiling)
    for name in ("generate", "generate_steps"):
        drawing = meeting(getattr(batches, name), "drawing", "compiling")
        monkeypatch.setattr(batches, name, drawing)
    images = CALLS[call](own)
    assert met
    assert all(met)
    assert compiled["jit(_decode)"] == 1
    # The images of a codec that compiles when it decodes.
    monkeypatch.setattr(Codec, "compile_decoder", lambda *_: None)
    other = tiny_pipeline(own.config, own.params)
    np.testing.assert_array_equal(CALLS[call](other), images)
    assert compiled["jit(_decode)"] == 2


def test_decoding_waits_for_the_thread(own, monkeypatch, compiled):
    asked, codec, ready = threading.Event(), own.codec, []
    compiling, dequantize, decode = codec._compile_decoder, codec._dequantize, codec._decode

    def decoding(*arguments):
        ready.append([thread.done() for thread in codec._compiled.values()])
        return decode(*arguments)

    decoding.lower = decode.lower
    monkeypatch.setattr(codec, "_decode", decoding)
    monkeypatch.setattr(
        codec, "_compile_decoder", lambda shape: asked.wait(SECONDS) and compiling(shape)
    )
    monkeypatch.setattr(codec, "_dequantize", lambda x: (asked.set(), dequantize(x))[1])
    codec.compile_decoder(1, 4, 4)
    codec.decode(np.zeros((1, 16, own.config.channels), np.uint8))
    assert ready == [[True]]
    assert compiled["jit(_decode)"] == 1


def test_nothing_compiles_before_images_are_drawn(own, monkeypatch):
    monkeypatch.setattr(own.codec, "_compile_decoder", None)
    own.stream([0, 1])
    assert list(own.stream([0, 1], numbers=[])) == []
    for wrong in ({"seed": -1}, {"guidance": "much"}, {"batch_size": 0}):
        with pytest.raises(UserError):
            own.generate([0, 1], preview=lambda *_: None, **wrong)
    with pytest.raises(UserError):
        own.generate([99], preview=lambda *_: None)
    assert not own.codec._compiled


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_an_error_while_drawing_arrives_at_once(own, monkeypatch, error):
    over = threading.Event()

    def compiling(shape):
        assert over.wait(SECONDS)
        raise RuntimeError("compiling failed too")

    def drawing(*_):
        raise error("drawing failed")

    monkeypatch.setattr(own.codec, "_compile_decoder", compiling)
    monkeypatch.setattr(batches, "generate", drawing)
    with pytest.raises(error, match="drawing failed"):
        own.generate([0, 1])
    (pending,) = own.codec._compiled.values()
    assert not pending.done()
    over.set()
    with pytest.raises(RuntimeError, match="compiling failed too"):
        pending.result(SECONDS)


def test_an_error_of_compiling_arrives_where_images_are_decoded(own):
    params = {name: part for name, part in own.codec.params.items() if name != "decoder"}
    codec = Codec(own.codec.config, params, own.codec.quantizer, own.mesh)
    indices = np.zeros((1, 16, own.config.channels), np.uint8)
    codec.compile_decoder(1, 4, 4)
    for _ in range(2):
        with pytest.raises(ScopeParamNotFoundError):
            codec.decode(indices)


AHEAD = {"count": 3, "batch_size": 2, **STEPS}


@pytest.fixture
def saved(own, tmp_path):
    own.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_a_pipeline_is_loaded_with_the_programs_of_its_first_images(saved, compiled, sizes):
    jax.clear_caches()
    mesh = meshes.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    expected = CALLS["generate"](Pipeline.load(saved, mesh=mesh))
    assert compiled["jit(_draw)"] == compiled["jit(_decode)"] == 1
    jax.clear_caches()
    loaded = Pipeline.load(saved, mesh=mesh, ahead=AHEAD)
    wait(loaded.codec._compiled.values())
    assert compiled["jit(_draw)"] == compiled["jit(_decode)"] == 2
    np.testing.assert_array_equal(CALLS["generate"](loaded), expected)
    assert compiled["jit(_draw)"] == compiled["jit(_decode)"] == 2


@pytest.mark.parametrize(
    ("ahead", "message"),
    [
        ({}, r"ahead=\{\} must be a dict with count, the number of images"),
        (5, "ahead=5 must be a dict"),
        ({"num_iter": 3}, "with count"),
        ({"count": 0}, "count=0 must be at least 1"),
        ({"count": 1, "batch_size": 0}, "sampling.batch_size=0 must be"),
        ({"count": 1, "number_of_steps": 3}, "number_of_steps"),
    ],
)
def test_what_is_drawn_first_is_checked(saved, compiled, ahead, message):
    with pytest.raises(UserError, match=message):
        Pipeline.load(saved, ahead=ahead)
    assert not compiled["jit(_draw)"]


def test_saved_programs_take_the_place_of_compiling(saved):
    with pytest.raises(UserError, match="ahead compiles what programs=True reads"):
        Pipeline.load(saved, ahead=AHEAD, programs=True)


def test_an_error_of_compiling_is_that_of_loading(saved, monkeypatch):
    def fail(*_):
        raise RuntimeError("compiling failed")

    monkeypatch.setattr(pipeline, "compile_batch", fail)
    with pytest.raises(RuntimeError, match="compiling failed"):
        Pipeline.load(saved, ahead=AHEAD)
    for part in ("model.safetensors", "autoencoder/params.safetensors"):
        path = saved / part
        path.write_bytes(path.read_bytes()[:-100])
        # Of several errors that of the autoencoder counts, then that of the weights.
        with pytest.raises(UserError, match=re.escape(str(path))):
            Pipeline.load(saved, ahead=AHEAD)


def test_damaged_weights_are_named_before_programs_are_compiled(saved, monkeypatch):
    over, begun = threading.Event(), []

    def compiling(*_):
        begun.append(threading.current_thread())
        assert over.wait(SECONDS)

    monkeypatch.setattr(pipeline, "compile_batch", compiling)
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        Pipeline.load(saved, ahead=AHEAD)
    over.set()
    for thread in begun:
        thread.join(SECONDS)
