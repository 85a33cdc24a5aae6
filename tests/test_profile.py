"""The profile of a TPU program, against counts by hand; small programs need libtpu."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tokenbridge_jax.preflight import chips
from tokenbridge_jax.preflight.bundles import read_schedule
from tokenbridge_jax.preflight.profile import Operation, read_profile
from tokenbridge_jax.preflight.profile_report import module, rows, write_profile

ROOT = Path(__file__).parent.parent
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)

# The form of libtpu's schedules: 2 bundles, a loop of 12 runs of which 10 run the 3 bundles of its
# region, 1 bundle. A branch is taken 4 bundles later. The region ends with a wait for 4 granules.
SCHEDULE = """= control target key start
LB: loop body
= control target key end

     0   :  { %s10_s1 = smov 0 /* copy for cssa */  ;;  %1 = vsyncpa [#allocation1], 0 }
   0x1   :  { %2 = sst [smem:[#allocation9_spill]] %s10_s1 } /* End region 5 */
   0x2 LB: > { %s11_s2 = sadd.s32 1, %s12_s1  ;;  %s12_s1 = sphi %s10_s1, %s13_s1  ;;  \
%p1_p0 = scmp.ge.s32.totalorder %s12_s1, 1 } /* Start region 7 :: Start region 8 */
   0x3   : > { %p2_p1 = scmp.lt.s32.totalorder %s12_s1, 11 }
   0x4   : > { %p3_p2 = pnand %p1_p0, %p2_p1 }
   0x5   : > { %20 = sbr.rel (%p3_p2) target = $region9 }
   0x6   : > {}
   0x7   : > {}
   0x8   : > {}
   0x9   : > {}
   0xa   : > { %21 = vmatmul.bf16.gmra.mxu0 %v1_v1 } /* Start region 10 */
   0xb   : > { %22 = dma.general %s5_s5, /* BoundsCheck
 hlo: fusion.1 */ %s6_s6 }
   0xc   : > { %23 = dma.done.wait [#allocation1], 4 /* a wait */ }
   0xd PF: > { %p4_p3 = scmp.ge.s32.totalorder %s11_s2, 12 /* loop exit test */  ;;  \
%s13_s1 = smov %s11_s2 } /* Start/End empty region 9 */
   0xe   : > { %30 = sbr.rel (!%p4_p3) target = $region7 }
   0xf   :  {}
  0x10   :  {}
  0x11   :  {}
  0x12   :  {}
  0x13   :  {} /* exit bundle */
"""
LOOP, REGION = 12 * (4 + 4 + 2 + 4), 10 * 3


def utilization(bundles):
    """Every bundle uses one of four slots for arithmetic, and fills none of the others."""
    head = "== CAPACTIY:\nMXU, VALU, VSTORE:SPILL\n    4     4     1\n== UTILIZATION:\n"
    return head + "0 1 0\n" * bundles


def test_bundles_count_as_often_as_they_run():
    schedule = read_schedule(SCHEDULE, utilization(20), delay_slots=4)
    assert schedule.cycles == 2 + LOOP + REGION + 1
    assert schedule.hbm_bytes == 10 * 4 * 32
    assert schedule.product_rows == 10 * 16
    assert schedule.guessed == 0
    assert schedule.busy == pytest.approx({"MXU": 0, "VALU": 0.25, "VSTORE:SPILL": 0})


def test_a_loop_that_depends_on_data_runs_once_and_is_marked():
    depends = SCHEDULE.replace("%s11_s2, 12 /*", "%s99_s9, 12 /*")
    schedule = read_schedule(depends, utilization(20), delay_slots=4)
    assert schedule.guessed == 1
    assert schedule.cycles == 2 + LOOP // 12 + 1


HLO = """HloModule jit_step, is_scheduled=true

%fused (param.1: f32[8,128]) -> f32[8,128] {
  ROOT %multiply.1 = f32[8,128]{1,0:T(8,128)} multiply(%param.1, %param.1)
}

ENTRY %main (param: f32[8,128]) -> f32[8,128] {
  %param = f32[8,128]{1,0:T(8,128)} parameter(0)
  %fetch = (f32[4096,1024]{1,0:S(1)}, f32[4096,1024]{1,0}, u32[]{:S(2)}) copy-start(%param)
  %fusion.1 = f32[8,128]{1,0} fusion(%param), calls=%fused, \
metadata={op_name="jit(step)/head/mlp/mlp.terms/mul"}
  %arrived = f32[4096,1024]{1,0:S(1)} copy-done(%fetch)
  %all-reduce.4 = f32[1024,1024]{1,0} all-reduce(%arrived), channel_id=1, \
replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %fusion.2 = f32[8,128]{1,0} fusion(%param), calls=%fused
}
"""


def test_an_operation_takes_its_cycles_or_its_bytes_and_copies_overlap(tmp_path):
    (tmp_path / "17-fusion.1-02-final_bundles.txt").write_text(SCHEDULE)
    name = "17-fusion.1-00-final_hlo-static-per-bundle-utilization.txt"
    (tmp_path / name).write_text(utilization(20))
    (tmp_path / "1-TLP-00-deduplication-map.txt").write_text(
        "key:fusion.1\nordinal:1\nequivalent_hlos[size=2]:\n  fusion.1\n  fusion.2\n"
    )
    where, clock = chips.parse_slice("v5e:2x2"), 1e6  # So slow that the cycles take longer.
    first, reduce, second = read_profile(HLO, tmp_path, where, clock)
    cycles = read_schedule(SCHEDULE, utilization(20), delay_slots=4).cycles
    assert (first.name, first.source) == ("fusion.1", "jit(step)/head/mlp/mlp.terms/mul")
    assert module(first) == "head/mlp"
    assert (first.bound, first.cycles, first.seconds) == ("bundles", cycles, cycles / clock)
    assert (second.name, second.seconds) == ("fusion.2", first.seconds)
    # Three quarters of 4 MiB to and fro, over half of the links along both axes.
    assert (reduce.bound, reduce.seconds) == ("ICI", pytest.approx(1.5 * 2**22 / 100e9))

    # With a faster clock, the copy of 16 MiB takes longer than the operation that hides it.
    first, wait, *_ = read_profile(HLO, tmp_path, where, 1e9)
    moved = 10 * 4 * 32 / where.figures.hbm
    hidden = first.seconds - moved
    assert (wait.name, wait.bound) == ("arrived", "HBM")
    assert wait.seconds == pytest.approx(2**24 / where.figures.hbm - hidden)


def test_tables_and_picture(tmp_path):
    busy = {"MXU": 0.9, "VALU": 0.2, "VSTORE:SPILL": 0.1}
    operations = [
        Operation("fusion.1", "jit(step)/head/fc1/dot", 2, 3e-3, "bundles", 400, 100, busy),
        Operation("fusion.2", "jit(step)/head/fc1/mul", 2, 1e-3, "HBM", 100, 900, busy, True),
        Operation("all-reduce.1", "", 1, 4e-3, "ICI"),
    ]
    (reduce, fc1) = sorted(rows(operations, module), key=lambda row: row.name)
    assert (fc1.total, fc1.bound, fc1.cycles, fc1.hbm_bytes) == (4e-3, "bundles", 500, 1000)
    assert fc1.busy["MXU"] == pytest.approx(0.9)
    assert reduce.bound == "ICI"
    write_profile(operations, "train", tmp_path)
    text = (tmp_path / "profile.txt").read_text()
    assert "8.00 ms a run on one device: 12% HBM, 50% ICI, 38% bundles" in text
    assert text.index("head/fc1") < text.index("all-reduce.1")
    assert (tmp_path / "profile.png").read_bytes()[:4] == b"\x89PNG"


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_small_programs_take_what_they_must(topology, tmp_path):
    script = ROOT / "tests" / "tpu_programs.py"
    command = [sys.executable, str(script), topology, str(tmp_path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)
    figures = chips.parse_slice(topology).figures
    cores = figures.cores // figures.devices
    at_peak = 2 * 2048 * 1024 * 1024 / figures.cycle_flops
    assert at_peak <= found["product"]["cycles"] <= 1.1 * at_peak
    at_peak = 6 * 2 * 16**2 * 3**2 * 256**2 / figures.cycle_flops
    # At this size six products take 1.6 to 2.1 times as long, and three 0.9 to 1.3 times.
    assert 1.4 * at_peak <= found["exact"]["cycles"]
    copied = 2 * 4 * 4096 * 4096
    assert copied <= found["double"]["bytes"] <= 1.01 * copied
    assert found["double"]["bounds"] == ["HBM"]
    assert found["double"]["seconds"] == pytest.approx(copied / figures.hbm, rel=0.01)
    # 64 registers, three operations on each, four of them a cycle; each is stored once a run.
    least = 100 * 64 * 3 / 4 / cores
    assert least <= found["cubes"]["cycles"] <= 5 * least * cores
    # Seven products with scores of 4 heads of 2 images, which no operation but the kernels sees.
    at_peak = 7 * 2 * 2 * 4 * 136 * 136 * 64 / figures.cycle_flops
    assert (found["attention"]["kernels"], found["attention"]["scores"]) == (2, False)
    assert found["channels"]["kernels"] == 2
    assert found["attention"]["cycles"] > at_peak / cores
