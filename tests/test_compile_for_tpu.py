"""What `launch/compile_for_tpu.py` counts, against counts by hand; whole runs need libtpu."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import imagenet256
from tokenbridge_jax.model import abstract_params

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "launch" / "compile_for_tpu.py"
spec = importlib.util.spec_from_file_location("compile_for_tpu", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

# The form of a TPU program's text: a loop of 14 runs with collectives of every form. The gathering
# starts before the loop, hidden behind other fusions, and goes on in it.
HLO = """HloModule jit_step, is_scheduled=true

%async_collective_fusion.1 (param.1: f32[2,8]) -> f32[8,8] {
  %param.1 = f32[2,8]{1,0:T(8,128)} parameter(0)
  %all-gather.1 = f32[8,8]{1,0:T(8,128)} all-gather(%param.1), channel_id=7, dimensions={0}
  ROOT %start = f32[8,8]{1,0} custom-call(%all-gather.1), backend_config={"estimated_cycles":"900"}
}

%async_collective_fusion.2 (param.2: f32[2,8]) -> f32[8,8] {
  %param.2 = f32[2,8]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.2 = f32[8,8]{1,0:T(8,128)} all-gather(%param.2), channel_id=7, dimensions={0}
}

%all-reduce-scatter.3 (param.3: f32[8,8]) -> f32[2,8] {
  %param.3 = f32[8,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.5 = f32[8,8]{1,0:T(8,128)} all-reduce(%param.3), channel_id=1, to_apply=%add
  ROOT %slice.1 = f32[2,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.5, %i, %j)
}

%condition (wide.1: (s32[], f32[2,8])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(14)
  %wide.1 = (s32[]{:T(128)}, f32[2,8]{1,0:T(8,128)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%wide.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %constant.5), direction=LT
}

%body (wide.2: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %wide.2 = (s32[]{:T(128)}, f32[2,8]{1,0:T(8,128)}) parameter(0)
  %fusion.2 = f32[8,8]{1,0} fusion(%x), calls=%async_collective_fusion.2, \
backend_config={"estimated_cycles":"10"}
  %fusion.3 = f32[2,8]{1,0} fusion(%x), calls=%all-reduce-scatter.3
  %all-reduce.3 = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, f32[3]{0:T(128)}) all-reduce(%a, %b), \
channel_id=9, use_global_device_ids=true, to_apply=%add
  %collective-permute-start.6 = (u8[5]{0:T(512)}, u8[5]{0:T(512)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%c), channel_id=12
  %collective-permute-done.6 = u8[5]{0:T(512)S(1)} collective-permute-done(\
%collective-permute-start.6)
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[2,8]{1,0}) tuple(%counter, %x)
}

ENTRY %main.9_spmd (param: f32[2,8]) -> f32[2,8] {
  %param = f32[2,8]{1,0:T(8,128)} parameter(0)
  %fusion.1 = f32[8,8]{1,0} fusion(%x), calls=%async_collective_fusion.1, \
backend_config={"estimated_cycles":"5"}
  %while.1 = (s32[]{:T(128)}, f32[2,8]{1,0}) while(%tuple), condition=%condition, body=%body
  %all-reduce.4 = pred[16]{0:T(512)} all-reduce(%p), channel_id=11, to_apply=%or
  ROOT %copy.1 = f32[2,8]{1,0:T(8,128)} copy(%param), backend_config={"estimated_cycles":"1000"}
}
"""


def test_cycles_and_collectives_of_a_program():
    counted = script.count(HLO)
    assert counted["cycles"] == 14 * 10 + 5 + 1000
    assert counted["collectives"] == {
        "all-gather": {"count": 1, "runs": 1, "bytes": 8 * 8 * 4},
        "all-reduce": {"count": 2, "runs": 15, "bytes": 14 * (4 * 8 * 2 + 3 * 4) + 16},
        "collective-permute": {"count": 1, "runs": 14, "bytes": 14 * 5},
        "reduce-scatter": {"count": 1, "runs": 14, "bytes": 14 * 8 * 8 * 4},
    }


def test_products_count_as_often_as_they_run():
    def loss(w, x):
        @jax.checkpoint
        def layer(x, _):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, length=5)[0])

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    jaxpr = gradient.trace(jnp.ones((6, 6)), jnp.ones((2, 6))).jaxpr.jaxpr
    # Forward, forward again, and two products of the same size backward; five times each.
    assert script.matmul_flops(jaxpr) == 5 * 4 * (2 * 2 * 6 * 6)


def test_of_the_platforms_branches_the_default_counts():
    def twice_or_once(x):
        return jax.lax.platform_dependent(x, cuda=lambda x: x @ x @ x, default=lambda x: x @ x)

    jaxpr = jax.jit(twice_or_once).trace(jnp.ones((6, 6))).jaxpr.jaxpr
    assert script.matmul_flops(jaxpr) == 2 * 6**3


def run(*flags):
    """What the script prints for the smallest ImageNet config with one layer a part."""
    changes = [f"--config.model.{part}_layers=1" for part in ("encoder", "decoder", "head")]
    changes += ["--config.model.dropout=0.0", "--config.sampling.num_iter=2"]
    command = [sys.executable, str(SCRIPT), "--config=configs/imagenet256.py:quick", *changes]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.run([*command, *flags], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu")


@pytest.mark.usefixtures("libtpu")
def test_training_step_on_a_slice():
    result = json.loads(run("--batch=8").stdout)
    config = imagenet256.get_config("quick")
    config.model.update(encoder_layers=1, decoder_layers=1, head_layers=1)
    model = script.make_model(config)
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(model))]
    assert (result["chips"], result["batch_a_chip"]) == (4, 2)
    # 14 positions are hidden; forward, and about twice that backward. Attention's weights are
    # computed once more, and slots are padded.
    assert 3 <= result["matmul_flops"] / (2 * model.forward_flops(14)) <= 4.5
    # Parameters, EMA and two moments, all updated in place.
    memory = result["memory"]
    assert memory["argument"] >= 16 * sum(sizes)
    assert memory["argument"] - 64 * 1024 < memory["alias"] <= memory["argument"]
    # Every gradient is summed over the chips, in bfloat16 at least.
    assert result["collectives"]["all-reduce"]["bytes"] >= 2 * sum(sizes)


@pytest.mark.usefixtures("libtpu")
def test_sampler_on_a_slice():
    result = json.loads(run("--batch=4", "--what=sample").stdout)
    assert result["what"] == "sample"
    assert result["memory"]["alias"] == 0
    assert result["matmul_flops"] > 0


@pytest.mark.usefixtures("libtpu")
def test_too_large_a_program_is_an_answer():
    result = json.loads(run("--batch=4000000", "--what=sample").stdout)
    assert "memory" in result["error"].lower()
    assert "compile_seconds" not in result


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("flag", "named"), [("--batch=6", "--batch=6"), ("--topology=v9:2x2", "v9")]
)
def test_mistakes_are_one_line(flag, named):
    result = run(flag)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert named in result.stderr
