"""Training on several meshes against training on one device, and the compiled programs.

Numbers agree only to float32 rounding: the mesh decides the order in which a sum over the batch or
over a split axis is added.
"""

import functools
import math
import re

import jax
import numpy as np
import optax
import pytest
from jobs import start_job
from test_step import assert_trees_close
from tiny_model import random_batch, random_params, tiny, tree_error
from toy import ToyTask, first_devices, toy_batch, toy_training

from tokenbridge_jax.autoencoder import AutoencoderConfig
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.training.autoencoder_task import AutoencoderTask
from tokenbridge_jax.training.checkpoints import Checkpoints
from tokenbridge_jax.training.masking import MaskSampler
from tokenbridge_jax.training.model_task import ModelTask, make_validation
from tokenbridge_jax.training.optimizer import OptimizerConfig, RunNumbers
from tokenbridge_jax.training.state import (
    TrainState,
    _initial_state,
    abstract_state,
    state_shardings,
)
from tokenbridge_jax.training.step import make_train_step

BATCH = 16
# Plain gradient sums, so that an update shows every gradient as it is.
OPTIMIZER = optax.sgd(0.01, momentum=0.9)
# A model, and its number of micro-batches. The second uses every feature of training.
SCANNED = tiny(encoder_layers=2, dropout=0.1), 1
UNROLLED = tiny(scan_layers=False, dropout=0.1, remat="dots"), 2
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def make_step(config, mesh, accumulation=1):
    task = ModelTask(config, class_dropout=0.5)
    abstract = abstract_state(task.init, OPTIMIZER, mesh)
    settings = dict(ema_decay=0.9, accumulation=accumulation)
    plain = OPTIMIZER, lambda step: 0.01
    step = make_train_step(task, lambda numbers: plain, abstract, mesh, **settings)
    numbers = RunNumbers.of(OptimizerConfig(0.01, 2), seed=0)
    return abstract, functools.partial(step, numbers=numbers)


def train(sizes, config, accumulation):
    """Two updates, and the validation of the average."""
    mesh, masks = first_devices(*sizes), MaskSampler(config.positions, bucket=8)
    abstract, step = make_step(config, mesh, accumulation)
    params = random_params(config)
    start = TrainState(np.int32(0), params, params, OPTIMIZER.init(params))
    # Copies, because the step donates its inputs.
    state = jax.tree.map(lambda x, to: jax.device_put(np.array(x), to.sharding), start, abstract)
    batch = random_batch(config, BATCH)
    history = []
    with meshes.use_mesh(mesh):
        for i in range(2):
            state, metrics = step(state, meshes.to_global(batch, mesh), masks.draw(0, i))
            history.append({name: float(value) for name, value in metrics.items()})
        batch["weights"] = np.ones(BATCH, np.float32)
        nll = make_validation(config, masks, mesh, ratios=1)(state.ema_params, [batch])
    assert step.func._cache_size() == 1
    return state, history, nll


@functools.cache
def train_on_one_device(config, accumulation):
    return train((1, 1, 1), config, accumulation)


@pytest.mark.parametrize(
    ("settings", "sizes"), [*((SCANNED, sizes) for sizes in MESHES), (UNROLLED, (2, 2, 2))]
)
def test_training_on_a_mesh_is_training_on_one_device(settings, sizes):
    config, accumulation = settings
    expected, expected_history, expected_nll = train_on_one_device(config, accumulation)
    state, history, nll = train(sizes, config, accumulation)
    for metrics, other in zip(history, expected_history, strict=True):
        assert metrics == pytest.approx(other, rel=2e-5)
    assert nll == pytest.approx(expected_nll, rel=1e-6)
    assert tree_error(state.opt_state[0].trace, expected.opt_state[0].trace) < 3e-5
    assert_trees_close(state.params, expected.params)
    assert_trees_close(state.ema_params, expected.ema_params)

    # Parameters, average and momentum have the same layout, and the large ones are split.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    assert jax.tree.map(lambda leaf: leaf.sharding, state.ema_params) == shardings
    assert jax.tree.map(lambda leaf: leaf.sharding, state.opt_state[0].trace) == shardings
    fc1 = state.params["backbone"]["encoder_blocks"]["mlp"]["fc1"]["kernel"]
    assert fc1.addressable_shards[0].data.size * sizes[1] * sizes[2] == fc1.size
    qkv = state.params["head"]["blocks"]["attn"]["qkv"]["kernel"]
    assert qkv.addressable_shards[0].data.shape[3] == config.head_heads // sizes[2]


@functools.cache
def train_autoencoder(sizes):
    config = AutoencoderConfig(4, 1, 8, (1, 2), 1, (), 2, 1.0)
    task = AutoencoderTask(config, "float32", kl_weight=1e-3)
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), np.uint8)
    _, state, step = toy_training(task, mesh := first_devices(*sizes))
    with meshes.use_mesh(mesh):
        state, metrics = step(state, meshes.to_global({"images": images}, mesh), None)
    # After one step the first moment of Adam is the gradient, except for a factor.
    moments = state.opt_state[1].mu
    return {name: float(value) for name, value in metrics.items()}, moments, state.params


# Its parameters are split only over fsdp: the devices of the tensor axis hold copies.
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_the_autoencoder_trains_on_a_mesh_as_on_one_device(sizes):
    metrics, moments, params = train_autoencoder(sizes)
    expected, expected_moments, _ = train_autoencoder((1, 1, 1))
    # The norm sums all gradients, and differed by 1.2e-5 on one machine.
    norm, expected_norm = metrics["grad_norm"], expected["grad_norm"]
    assert norm == pytest.approx(expected_norm, rel=3e-5)
    assert metrics | {"grad_norm": expected_norm} == pytest.approx(expected, rel=1e-5)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected_moments))
    # Some gradients are zero in exact arithmetic: a bias before a norm.
    assert_trees_close(moments, expected_moments, rtol=1e-4, atol=1e-5 * largest)
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    on_one = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(params))
    assert on_one < 0.6 * whole


def wide(layers):
    """So wide that parameters need more memory than activations; 8 devices divide its sizes."""
    return tiny(
        encoder_layers=layers, encoder_width=128, encoder_heads=8, decoder_width=128,
        decoder_heads=8, head_width=128, head_heads=8, positions=4, buffer=1,
    )  # fmt: skip


def test_no_device_ever_holds_the_whole_state():
    mesh = meshes.make_mesh(1, 8, 1)
    task = ModelTask(wide(2), class_dropout=0.5)
    abstract = abstract_state(task.init, OPTIMIZER, mesh)
    make = jax.jit(
        lambda key: _initial_state(OPTIMIZER, task.init(key)),
        out_shardings=state_shardings(abstract),
    )
    memory = make.lower(jax.random.key(0)).compile().memory_analysis()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    assert memory.output_size_in_bytes < 1.2 * whole / 8
    assert memory.temp_size_in_bytes < whole / 8


@pytest.fixture(scope="module")
def fsdp_programs():
    """The compiled steps of two layers and of four, with parameters split over eight devices."""
    mesh = meshes.make_mesh(1, 8, 1)
    masks = MaskSampler(4, bucket=4)

    def compiled(layers):
        config = wide(layers)
        abstract, step = make_step(config, mesh)
        batch = meshes.to_global(random_batch(config, 8), mesh)
        with meshes.use_mesh(mesh):
            lowered = step.func.lower(abstract, batch, masks.draw(0, 0), **step.keywords)
            return abstract, lowered.compile()

    return {layers: compiled(layers) for layers in (2, 4)}


def layer_bytes(abstract):
    """The bytes of the largest parameter in one layer of the encoder, and of the whole layer."""
    blocks = jax.tree.leaves(abstract.params["backbone"]["encoder_blocks"])
    sizes = [4 * math.prod(leaf.shape[1:]) for leaf in blocks]
    return max(sizes), sum(sizes)


def test_parameters_are_gathered_layer_by_layer(fsdp_programs):
    abstract, program = fsdp_programs[4]
    largest, layer = layer_bytes(abstract)
    results = re.findall(r" = (.*?) all-gather(?:-start)?\(", program.as_text())
    gathered = [
        sum(4 * math.prod(map(int, re.findall(r"\d+", dims))) for dims in shapes)
        for shapes in (re.findall(r"\w+\[([\d,]*)\]", result) for result in results)
    ]
    # The head's modulation is the largest of all parameters: 6 D x D, and fc1 is 4 D x D.
    assert largest <= max(gathered) <= 1.5 * largest < layer
    # Activations stay with their images: devices exchange only gradients and sums.
    assert not re.search(r" (all-to-all|collective-permute)(-start)?\(", program.as_text())


def test_twice_the_layers_need_no_second_copy_of_the_parameters(fsdp_programs):
    abstract, program = fsdp_programs[4]
    more = program.memory_analysis().temp_size_in_bytes
    more -= fsdp_programs[2][1].memory_analysis().temp_size_in_bytes
    _, layer = layer_bytes(abstract)
    # Two more layers need an eighth of their gradients, and activations, but not their parameters.
    assert more < layer


def test_the_step_after_a_restore_is_not_compiled_again(tmp_path):
    mesh = meshes.make_mesh(2, 2, 2)
    abstract, state, step = toy_training(ToyTask(), mesh)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.open()
    with meshes.use_mesh(mesh):
        state, _ = step(state, meshes.to_global(toy_batch(0), mesh), None)
        checkpoints.save(state, 1, {})
        checkpoints.wait()
        restored = checkpoints.restore(abstract, 1)
        step(restored, meshes.to_global(toy_batch(1), mesh), None)
    checkpoints.close()
    assert step.func._cache_size() == 1


PROCESS = """
import jax
import numpy as np
from jax.experimental import multihost_utils
from tokenbridge_jax.runtime import meshes, processes

processes.join(True)
whole = np.arange(24).reshape(8, 3)
devices = jax.devices()
for sizes, order in [((4, 1, 1), [0, 2, 1, 3]), ((1, 1, 4), range(4)), ((1, 2, 2), [2, 0, 1, 3])]:
    mesh = meshes.make_mesh(*sizes, devices=[devices[i] for i in order])
    rows = meshes.local_rows(mesh, len(whole))
    array = meshes.to_global({"x": whole[rows]}, mesh)["x"]
    assert (multihost_utils.process_allgather(array, tiled=True) == whole).all()
    print(f"rows {rows.tolist()}")
processes.leave(0)
"""


def test_two_processes_assemble_the_batch():
    """Rows that alternate between processes, and rows of both, where tensor crosses processes."""
    job = start_job(["-c", PROCESS], [[], []], devices=2)
    printed = [process.communicate(timeout=120)[0] for process in job]
    # Other lines may come from the library for collectives.
    rows = [re.findall(r"rows (\[[\d, ]*\])", text) for text in printed]
    everything = str(list(range(8)))
    assert rows == [[own, everything, everything] for own in ("[0, 1, 4, 5]", "[2, 3, 6, 7]")]
