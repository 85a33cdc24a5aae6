"""Compares what `preflight/hlo.py` reads from programs with counts by hand."""

import pytest

from tokenbridge_jax.preflight.hlo import Collective, read_program

# Text like that of a TPU program: a loop of 14 runs with collectives of every form. The all-gather
# is split into several fusions; the first is before the loop and the next one in it.
HLO = """HloModule jit_step, is_scheduled=true

%async_collective_fusion.1 (param.1: f32[2,8]) -> f32[8,8] {
  %param.1 = f32[2,8]{1,0:T(8,128)} parameter(0)
  %all-gather.1 = f32[8,8]{1,0:T(8,128)} all-gather(%param.1), channel_id=7, \
replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]) {'b'}, dimensions={0}
  ROOT %start = f32[8,8]{1,0} custom-call(%all-gather.1), backend_config={"estimated_cycles":"900"}
}

%async_collective_fusion.2 (param.2: f32[2,8]) -> f32[8,8] {
  %param.2 = f32[2,8]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.2 = f32[8,8]{1,0:T(8,128)} all-gather(%param.2), channel_id=7, dimensions={0}
}

%all-reduce-scatter.3 (param.3: f32[8,8]) -> f32[2,8] {
  %param.3 = f32[8,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.5 = f32[8,8]{1,0:T(8,128)} all-reduce(%param.3), channel_id=1, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
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
  %fusion.2 = f32[8,8]{1,0} fusion(%wide.2), calls=%async_collective_fusion.2, \
backend_config={"estimated_cycles":"10"}
  %fusion.3 = f32[2,8]{1,0} fusion(%wide.2), calls=%all-reduce-scatter.3
  %all-reduce.3 = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, f32[3]{0:T(128)}) all-reduce(%a, %b), \
channel_id=9, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add
  %collective-permute-start.6 = (u8[5]{0:T(512)}, u8[5]{0:T(512)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%c), channel_id=12
  %collective-permute-done.6 = u8[5]{0:T(512)S(1)} collective-permute-done(\
%collective-permute-start.6)
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[2,8]{1,0}) tuple(%counter, %x)
}

ENTRY %main.9_spmd (param: f32[2,8]) -> f32[2,8] {
  %param = f32[2,8]{1,0:T(8,128)} parameter(0)
  %fusion.1 = f32[8,8]{1,0} fusion(%param), calls=%async_collective_fusion.1, \
backend_config={"estimated_cycles":"5"}
  %while.1 = (s32[]{:T(128)}, f32[2,8]{1,0}) while(%tuple), condition=%condition, body=%body
  %all-reduce.4 = pred[16]{0:T(512)} all-reduce(%p), channel_id=11, \
replica_groups=[1,8]<=[8], to_apply=%or
  ROOT %copy.1 = f32[2,8]{1,0:T(8,128)} copy(%param), backend_config={"estimated_cycles":"1000"}
}
"""


def test_cycles_and_collectives_of_a_program():
    program = read_program(HLO)
    assert program.cycles == 14 * 10 + 5 + 1000
    assert set(program.collectives) == {
        Collective("all-gather", 4, 1, 1, 8 * 8 * 4),
        Collective("all-reduce", 4, 1, 14, 14 * (4 * 8 * 2 + 3 * 4)),
        Collective("all-reduce", 8, 1, 1, 16),
        Collective("collective-permute", 2, 1, 14, 14 * 5),
        Collective("reduce-scatter", 4, 1, 14, 14 * 8 * 8 * 4),
    }


# As libtpu writes an all-reduce that SparseCores run beside the other operations.
OFFLOADED_HLO = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)S(7)} parameter(0)
  %y = f32[]{:T(128)S(7)} parameter(1)
  ROOT %add.8 = f32[]{:T(128)S(7)} add(%x, %y), backend_config={"estimated_cycles":"1165"}
}, execution_thread="sparsecore"

%called (param_0: f32[16,8], param_1: f32[4,8], param_2: token[]) -> (f32[16,8], f32[4,8]) {
  %param_0 = f32[16,8]{1,0:T(8,128)} parameter(0)
  %param_1 = f32[4,8]{1,0:T(8,128)} parameter(1)
  %param_2 = token[] parameter(2)
  ROOT %all-reduce.6 = (f32[16,8]{1,0:T(8,128)}, f32[4,8]{1,0:T(8,128)}) all-reduce(%param_0, \
%param_1), channel_id=1, replica_groups=mesh['a'=4,'b'=1] {'a'}, to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (param: f32[16,8], other: f32[4,8]) -> f32[16,8] {
  %param = f32[16,8]{1,0:T(8,128)} parameter(0)
  %other = f32[4,8]{1,0:T(8,128)} parameter(1)
  %prepare = s32[]{:S(2)} custom-call(), custom_call_target="PrepareAsyncCallStart"
  %all-reduce.7.call-start = ((f32[16,8]{1,0:T(8,128)}, f32[4,8]{1,0:T(8,128)}, token[]), \
(f32[16,8]{1,0:T(8,128)}, f32[4,8]{1,0:T(8,128)})) call-start(%param, %other, %prepare), \
async_execution_thread="sparsecore", to_apply=%called
  %all-reduce.7.call-done = (f32[16,8]{1,0:T(8,128)}, f32[4,8]{1,0:T(8,128)}) \
call-done(%all-reduce.7.call-start)
  ROOT %result = f32[16,8]{1,0:T(8,128)} get-tuple-element(%all-reduce.7.call-done), index=0
}
"""


def test_a_collective_that_sparsecores_run():
    program = read_program(OFFLOADED_HLO)
    assert program.collectives == [Collective("all-reduce", 4, 1, 1, 4 * (16 * 8 + 4 * 8))]
    assert program.traffic == 0


# A stack of 14 layers of 2 KiB. A step of the loop slices one layer, adds 2 KiB in VMEM to it,
# writes the sum in place into another stack, and starts to fetch 1 KiB.
TRAFFIC_HLO = """HloModule jit_step, is_scheduled=true

%layer (stack.1: f32[14,512], sums.1: f32[14,512], x.1: f32[512], i.1: s32[]) -> f32[14,512] {
  %stack.1 = f32[14,512]{1,0:T(8,128)} parameter(0)
  %sums.1 = f32[14,512]{1,0:T(8,128)} parameter(1)
  %x.1 = f32[512]{0:T(512)S(1)} parameter(2)
  %i.1 = s32[]{:T(128)S(6)} parameter(3)
  %cut = f32[1,512]{1,0:T(1,128)} dynamic-slice(%stack.1, %i.1, %i.1), dynamic_slice_sizes={1,512}
  %add = f32[1,512]{1,0:T(1,128)} add(%cut, %x.1)
  ROOT %put = f32[14,512]{1,0:T(8,128)} dynamic-update-slice(%sums.1, %add, %i.1, %i.1)
}

%condition (state.1: (s32[], f32[14,512])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(14)
}

%body (state.2: (s32[], f32[14,512])) -> (s32[], f32[14,512]) {
  %state.2 = (s32[]{:T(128)}, f32[14,512]{1,0:T(8,128)}) parameter(0)
  %stack.2 = f32[14,512]{1,0:T(8,128)} get-tuple-element(%state.2), index=1
  %x.2 = f32[512]{0:T(512)S(1)} get-tuple-element(%state.2), index=2
  %i.2 = s32[]{:T(128)S(6)} get-tuple-element(%state.2), index=0
  %fusion.2 = f32[14,512]{1,0:T(8,128)} fusion(%stack.2, %stack.2, %x.2, %i.2), calls=%layer
  %fetch = (f32[256]{0:T(256)S(1)}, f32[256]{0:T(256)}, u32[]{:S(2)}) copy-start(%y)
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[14,512]{1,0:T(8,128)}) tuple(%i.2, %fusion.2)
}

ENTRY %main (param: f32[14,512]) -> f32[14,512] {
  %param = f32[14,512]{1,0:T(8,128)} parameter(0)
  %while.1 = (s32[]{:T(128)}, f32[14,512]{1,0}) while(%param), condition=%condition, body=%body
  ROOT %copy.1 = f32[14,512]{1,0:T(8,128)} copy(%param)
}
"""


@pytest.mark.parametrize("dtype", ["f8e4m3fn", "f8e5m2"])
def test_arrays_of_8_bit_floats_have_a_size(dtype: str):
    found = read_program(TRAFFIC_HLO.replace("f32[", f"{dtype}["))
    assert found.traffic == read_program(TRAFFIC_HLO).traffic / 4


def test_memory_traffic_of_a_program():
    assert read_program(TRAFFIC_HLO).traffic == 14 * (2048 + 2048 + 1024) + 2 * 14 * 2048
